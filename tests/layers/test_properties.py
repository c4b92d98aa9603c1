"""Every property over every row of the catalog, and each property seen to fail."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers
from nnkit.types import Layer
from tests import properties
from tests.catalog import LAYERS, LayerRow

EVERYWHERE = [
    properties.has_the_protocols_signature,
    properties.init_looks_at_shapes_only,
    properties.jit_equals_eager,
    properties.vmap_equals_loop,
    properties.gradients_equal_finite_differences,
    properties.state_keeps_its_form_and_training_alone_changes_it,
    properties.compiles_once,
    properties.no_key_is_used_twice,
    properties.output_has_the_inputs_dtype,
    properties.paths_are_readable_and_unique,
]
rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)


@rows
@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda check: check.__name__)
def test_property(check, row: LayerRow):
    if check is properties.gradients_equal_finite_differences and row.name == "frozen":
        return  # its gradient is 0 by definition; test_combine.py holds it to that
    check(row.layer, row.x)


@rows
def test_randomness_comes_from_the_key(row: LayerRow):
    properties.randomness_comes_from_the_key(row.layer, row.x, row.random)


@rows
def test_examples_are_independent(row: LayerRow):
    properties.examples_are_independent(row.layer, row.x, train=False)
    if not row.mixes_batch:
        properties.examples_are_independent(row.layer, row.x, train=True)


def test_the_catalog_has_every_layer():
    named = {row.name for row in LAYERS}
    helpers = {"observe", "summary"}
    assert set(layers.__all__) - helpers <= named


# ---- wrong layers, one for each property -------------------------------------------------------


def _wrong(apply, init=lambda key, x: ({"w": jnp.ones(4)}, {"s": jnp.zeros(())})) -> Layer:
    return Layer(init, apply)


@jax.custom_vjp
def _square(x):
    return x**2


_square.defvjp(lambda x: (x**2, x), lambda x, g: (g * x,))


class _Counter:
    n = 0

    def __call__(self) -> float:
        self.n += 1
        return float(self.n)


def _apply_with_default_train(params, state, x, *, key=None, train=True):
    return x * params["w"], state


def _init_from_values(key, x):
    return {"w": jnp.full(4, jnp.mean(jnp.asarray(getattr(x, "addressable_data", lambda i: 0.0)(0))))}, {}


def _impure(count=_Counter()):  # noqa: B008
    return lambda params, state, x, *, key=None, train: (x * params["w"] + count(), state)


def _key_twice(params, state, x, *, key=None, train):
    if key is None:
        return x * params["w"], state
    return x * jax.random.uniform(key, x.shape) * jax.random.normal(key, x.shape), state


def _key_ignored(params, state, x, *, key=None, train):
    return x * jax.random.uniform(jax.random.key(0), x.shape), state


def _mixing(params, state, x, *, key=None, train):
    return x - x.mean(axis=0), state


def _widening(params, state, x, *, key=None, train):
    return x.astype(jnp.float32), state


def _growing(params, state, x, *, key=None, train):
    return x, {**state, "new": jnp.zeros(())}


def _changing_at_test_time(params, state, x, *, key=None, train):
    return x, {"s": state["s"] + 1}


def _reshaping_the_state(params, state, x, *, key=None, train):
    return x, {"s": jnp.zeros((*state["s"].shape, 1))}


WRONG = [
    (properties.has_the_protocols_signature, _wrong(_apply_with_default_train)),
    (properties.init_looks_at_shapes_only, _wrong(_apply_with_default_train, _init_from_values)),
    (properties.jit_equals_eager, _wrong(_impure())),
    (properties.vmap_equals_loop, _wrong(_impure())),
    (
        properties.gradients_equal_finite_differences,
        _wrong(lambda p, s, x, *, key=None, train: (_square(x), s), lambda key, x: ({}, {})),
    ),
    (properties.state_keeps_its_form_and_training_alone_changes_it, _wrong(_growing)),
    (properties.state_keeps_its_form_and_training_alone_changes_it, _wrong(_changing_at_test_time)),
    (properties.compiles_once, _wrong(_reshaping_the_state)),
    (properties.no_key_is_used_twice, _wrong(_key_twice)),
    (properties.output_has_the_inputs_dtype, _wrong(_widening)),
    (
        properties.paths_are_readable_and_unique,
        _wrong(_widening, lambda key, x: ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})),
    ),
    (
        properties.paths_are_readable_and_unique,
        _wrong(_widening, lambda key, x: ({"dense_": jnp.ones(1)}, {})),
    ),
    (lambda layer, x: properties.randomness_comes_from_the_key(layer, x, True), _wrong(_key_ignored)),
    (lambda layer, x: properties.examples_are_independent(layer, x, True), _wrong(_mixing)),
]


@pytest.mark.parametrize(("check", "layer"), WRONG)
def test_a_wrong_layer_fails(check, layer):
    with pytest.raises(AssertionError):
        check(layer, jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32))
