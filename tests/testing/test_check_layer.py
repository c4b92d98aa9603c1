"""``check_layer``: right layers pass, each wrong one is caught by its check, and the text says why."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, testing
from nnkit.testing import Report, Result
from nnkit.testing import layer as checks
from nnkit.types import Layer
from tests.testing.wrong_layers import WRONG, layer, plain

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
CHECKS = {check.title: check for check in checks.CHECKS}


@pytest.mark.parametrize(
    ("title", "wrong", "arguments", "words"),
    [(title, wrong, arguments, words) for title, _, wrong, arguments, words in WRONG],
    ids=[f"{title}: {name}" for title, name, *_ in WRONG],
)
def test_a_wrong_layer_is_caught_by_its_check(title, wrong, arguments, words):
    with pytest.raises(testing.ConformanceError) as caught:
        CHECKS[title](wrong, X, **arguments)
    assert {failure.check for failure in caught.value.failures} == {title}
    assert re.search(words, str(caught.value)), str(caught.value)


def test_every_check_has_a_wrong_layer():
    """The mesh's is put to it on 8 devices in on_a_mesh.py."""
    assert {title for title, *_ in WRONG} | {"mesh"} == set(CHECKS)


def test_all_failures_come_at_once_and_the_skipped_are_named():
    wrong = plain(lambda x, w: (x - x.mean(axis=0)).astype(jnp.float32) * jax.lax.stop_gradient(w))
    skip = {"dtypes": "float32 only", "forward mode": "as reverse"}
    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_layer(wrong, X, skip=skip)
    assert [f.check for f in caught.value.failures] == [
        "independence of examples",
        "finite differences",
        "second derivatives",
    ]
    assert str(caught.value).startswith("wrong fails 3 of 20 checks\n\nindependence of examples: the output")


def test_the_report():
    report = testing.check_layer(
        layers.dropout(0.5),
        X,
        factory=layers.dropout,
        hyperparameters={"rate": 0.5},
        skip={"mesh": "one device here"},
    )
    assert report.status("hyper-parameters") == "passed"
    assert report.subject == "dropout"
    text = str(report)
    assert text.startswith("dropout: 21 of 22 checks passed")
    assert re.search(r"randomness +passed +draws in training", text)
    assert re.search(r"mesh +skipped +one device here", text)


class Inputs(NamedTuple):
    x: jax.Array
    ids: jax.Array
    mask: jax.Array | None = None


def _of_inputs(params, state, inputs, *, key=None, train):
    y = inputs.x * params["w"][inputs.ids]
    return (jnp.where(inputs.mask, y, 0) if inputs.mask is not None else y), state


@pytest.mark.parametrize(
    "x",
    [
        Inputs(X, jnp.arange(6) % 3, jnp.arange(24).reshape(6, 4) % 3 > 0),
        Inputs(X, jnp.arange(6) % 3),
    ],
    ids=["NamedTuple", "with None"],
)
def test_inputs_of_several_arrays(x):
    made = layer(_of_inputs, lambda key, x: ({"w": jax.random.normal(key, (3, 4), x.x.dtype)}, {}))
    testing.check_layer(made, x, skip={"mesh": "one device"})


def test_token_ids():
    def embed(params, state, ids, *, key=None, train):
        return params["embedding"][ids], state

    made = Layer(lambda key, x: ({"embedding": jax.random.normal(key, (7, 3))}, {}), embed, "embed_")
    report = testing.check_layer(made, jnp.arange(6).reshape(3, 2))
    assert report.status("dtypes") == "not applied"
    assert report.status("finite differences") == "passed"


def test_one_error_in_many_checks_is_told_once():
    def apply(params, state, x, *, key=None, train):
        raise ValueError("a fault of its own")

    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_layer(layer(apply), X)
    text = str(caught.value)
    assert text.count("a fault of its own") == 1
    assert "the same as under 'state'" in text


def test_an_init_that_raises_ends_it():
    def init(key, x):
        raise TypeError("no such thing")

    broken = Layer(init, layers.identity.apply, "broken_")
    with pytest.raises(testing.ConformanceError, match="TypeError: no such thing") as caught:
        testing.check_layer(broken, X)
    assert len(caught.value.failures) == 1
    assert "init raises: nothing else can be looked at" in str(caught.value)
    with pytest.raises(TypeError, match="no such thing"):
        checks.jit(broken, X)


def test_a_number_looked_at_in_python_is_told():
    with pytest.raises(testing.ConformanceError, match=r"likely +a traced number is looked at in Python"):
        testing.check_layer(layers.stateless(lambda x: x if x.sum() > 0 else -x), X)


@pytest.mark.parametrize(
    ("made", "x"),
    [
        (layers.relu, jnp.zeros((3, 4))),
        (layers.max_pool((2, 2)), jnp.ones((2, 4, 4, 2))),
        (layers.gelu, X * 1e6),
        (layers.layer_norm(), X * 1e-3),
    ],
    ids=["relu at 0", "a maximum of ties", "large", "small"],
)
def test_derivatives_are_taken_off_ties_and_at_any_scale(made, x):
    for check in (checks.gradients, checks.forward_mode, checks.second_derivatives):
        assert check(made, x).status == "passed"


def test_integer_parameters():
    made = plain(lambda x, w: x * w)
    with_table = made._replace(init=lambda key, x: ({"w": jnp.ones(4, x.dtype), "table": jnp.arange(4)}, {}))
    for check in (checks.extremes, checks.gradients, checks.dtypes):
        assert check(with_table, X).status == "passed"


def test_a_check_alone_says_what_it_did():
    assert checks.jit(layers.relu, X).status == "passed"
    alone = checks.mesh(layers.relu, X)
    assert alone.status == "not applied"
    assert "one device is visible" in alone.detail
    ids = jnp.ones((3, 2), jnp.int32)
    same = checks.examples(layers.embedding(4, 2), ids)
    assert same.status == "not applied"
    assert "the same integers" in same.detail


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown check 'vmpa'; did you mean 'vmap'"):
        testing.check_layer(layers.relu, X, skip={"vmpa": "why"})
    with pytest.raises(ValueError, match="needs a reason in words, got ''"):
        testing.check_layer(layers.relu, X, skip={"vmap": ""})
    with pytest.raises(TypeError, match=r"takes a nnkit\.Layer first, got .*layers\.stateless\(f\)"):
        testing.check_layer(jnp.sin, X)
    with pytest.raises(TypeError, match=r"got dict: write layers\.dense\(3\)"):
        testing.check_layer({}, X)
    with pytest.raises(ValueError, match="unknown check 'vmapp'; did you mean 'vmap'"):
        Report("x", (Result("vmap", "passed", "", 0.0),)).status("vmapp")
    with pytest.raises(TypeError, match=r"factory= and hyperparameters= go together"):
        testing.check_layer(layers.relu, X, factory=layers.dropout)


def test_donation_really_fails_where_the_check_says_so():
    wrong = next(w for title, name, w, *_ in WRONG if name == "two leaves in one buffer")
    step = jax.jit(lambda trees: jax.tree.map(lambda a: a + 1, trees), donate_argnums=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="donate the same buffer twice"):
        step(wrong.init(jax.random.key(0), X))


def test_importing_nnkit_does_not_import_the_checks():
    code = "import nnkit, sys; print([m for m in sys.modules if m.startswith('nnkit.testing')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
