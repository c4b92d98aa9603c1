"""Which programs there are, when they are traced, and how near a mapped one is to the exact one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import search
from nnkit.search import Engine

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("f")
A = {"a": search.uniform(0, 1)}


def _counting():
    traced = []

    def f(key, hparams):
        traced.append(hparams["k"])
        return {"loss": hparams["a"] + hparams["k"]}

    return traced, f


def test_of_many_groups_those_used_last_are_kept(monkeypatch):
    # Fails where the first that was made is the first to go.
    monkeypatch.setattr("nnkit.search.compiled._MOST", 2)
    traced, f = _counting()
    engine = Engine(f, A | {"k": search.choice([0, 1, 2])}, seeds=[0], members="exact", workers=1)

    def run(*ks):
        return [float(t.history["loss"][0]) for t in sorted(engine.run([{"a": 0.5, "k": k} for k in ks]))]

    assert run(0, 1) == [0.5, 1.5]
    assert run(0) == [0.5]  # so that 1 is the one to go
    assert run(2) == [2.5]
    assert run(0) == [0.5]
    assert traced == [0, 1, 2]
    assert run(1) == [1.5]
    assert traced == [0, 1, 2, 1]


def test_groups_take_turns_and_are_traced_when_it_is_theirs():
    traced, f = _counting()
    engine = Engine(f, A | {"k": search.choice(list(range(20)))}, seeds=[0], members="exact", workers=1)
    tasks = engine._in_turns(engine.groups([{"a": u, "k": k} for u in (0.2, 0.4) for k in range(20)]))
    order = [next(tasks).trial for _ in range(4)]
    assert order == [0, 1, 20, 2]  # two groups at a time for one thread, until one of them is through
    assert traced == [0, 1, 2]
    assert sorted(order + [task.trial for task in tasks]) == list(range(40))


def test_whole_numbers_may_be_traced():
    def f(key, hparams):
        return {"loss": hparams["n"] // 2 + jnp.zeros(2, jnp.int32)}

    for members in ("exact", "mapped"):
        engine = Engine(f, {"n": search.integer(1, 9, static=False)}, seeds=[0], members=members)
        found = sorted(engine.run([{"n": 7}, {"n": 4}]))
        assert [t.history["loss"].tolist() for t in found] == [[[3, 3]], [[2, 2]]]
        assert found[0].history["loss"].dtype == np.int32
        assert len(engine.groups([{"n": 7}, {"n": 4}])) == 1


def descent(key, hparams):
    """A network by gradient descent, begun with the same numbers in any precision."""
    dtype = jnp.result_type(float)
    x, y = X.astype(dtype), (X[:, :1] * X[:, 1:2]).astype(dtype)
    first, second = jax.random.split(key)
    w = jax.random.normal(first, (6, 8), jnp.float32).astype(dtype)
    v = jax.random.normal(second, (8, 1), jnp.float32).astype(dtype)

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params[0]) @ params[1] - y) ** 2)

    def step(params, _):
        value, slope = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - hparams["lr"] * g, params, slope), value

    return {"loss": jax.lax.scan(step, (w, v), length=30)[1]}


@pytest.mark.slow
def test_mapped_members_are_as_near_as_the_precision_is():
    """A member's distance in float32 to itself in float64 is what its roundings have grown to.

    Mapped, the same sums are rounded in another order, and the same dynamics make as much of that: by the triangle
    inequality the two differ by twice that distance; twice more is for roundings that are larger in one order
    than in another. In float64 all of it is smaller by the ratio of the units, 2^-29.
    Fails where the traced numbers go through bfloat16.
    """
    flats = [{"lr": lr} for lr in np.float32(np.geomspace(2e-3, 0.2, 8)).tolist()]

    def run(members):
        engine = Engine(descent, {"lr": search.log_uniform(1e-3, 0.3)}, seeds=[0, 1], members=members)
        return np.stack([t.history["loss"] for t in sorted(engine.run(flats))]).astype("f8")

    exact, mapped = run("exact"), run("mapped")
    with jax.enable_x64(True):
        exact64, mapped64 = run("exact"), run("mapped")
    grown = np.abs(exact / exact64 - 1).max()
    assert 0 < grown < 1e-4
    assert np.abs(mapped / exact - 1).max() <= 4 * grown
    assert np.abs(mapped64 / exact64 - 1).max() <= 4 * grown * 2.0**-29
