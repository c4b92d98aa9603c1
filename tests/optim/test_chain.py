"""Chains: order, states, further arguments, and optax's transformations beside nnkit's."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import (
    check_against_optax,
    optax_jit,
    parameters,
    smooth_gradients,
    trajectory,
    ulps,
)

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0])}
GRADS = {"w": jnp.array([0.5, 4.0, -1.0])}


def _adds(amount: float, seen: list[Any], **parameters: Any) -> optim.GradientTransformation:
    """Adds to the updates and tells which further arguments reached it."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append(extra)
        return jax.tree.map(lambda u: u + amount, updates), state

    return optim.GradientTransformation(lambda params: optim.EmptyState(), update)


def test_members_act_in_order() -> None:
    seen: list[Any] = []
    first = optim.chain(_adds(1.0, seen), optim.scale(2.0))
    second = optim.chain(optim.scale(2.0), _adds(1.0, seen))
    assert first.update({"w": 3.0}, first.init({"w": 0.0}))[0] == {"w": 8.0}
    assert second.update({"w": 3.0}, second.init({"w": 0.0}))[0] == {"w": 7.0}


def test_the_empty_chain_is_the_identity() -> None:
    tx = optim.chain()
    assert tx.init(PARAMS) == ()
    assert tx.update(GRADS, ()) == (GRADS, ())


def test_chains_nest() -> None:
    flat = optim.chain(optim.scale(2.0), optim.trace(0.5), optim.scale(0.1))
    nested = optim.chain(optim.chain(optim.scale(2.0), optim.trace(0.5)), optim.scale(0.1))
    assert jax.tree.structure(nested.init(PARAMS)) != jax.tree.structure(flat.init(PARAMS))
    a, b = flat.update(GRADS, flat.init(PARAMS))[0], nested.update(GRADS, nested.init(PARAMS))[0]
    assert ulps(a, b) == 0


def test_further_arguments_reach_those_who_take_them() -> None:
    everything: list[Any] = []
    named: list[Any] = []

    def by_name(updates: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        named.append(value)
        return updates, state

    def without(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, state

    def empty(params: Any) -> Any:
        return ()

    tx = optim.chain(
        _adds(0.0, everything),
        optim.GradientTransformation(empty, by_name),  # pyright: ignore[reportArgumentType]
        optim.GradientTransformation(empty, without),  # pyright: ignore[reportArgumentType]
        optim.chain(_adds(0.0, everything)),
        optim.adam(1e-3),
    )
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0, grad=GRADS)
    assert named == [3.0]
    assert [sorted(extra) for extra in everything] == [["grad", "value"]] * 2


def test_signatures_are_read_once() -> None:
    class Counted:
        calls = 0

        @property
        def __signature__(self) -> Any:
            Counted.calls += 1
            import inspect

            return inspect.signature(lambda updates, state, params=None: None)

        def __call__(self, updates: Any, state: Any, params: Any = None) -> Any:
            return updates, state

    tx = optim.chain(optim.GradientTransformation(lambda params: (), Counted()))  # pyright: ignore
    read = Counted.calls
    for _ in range(3):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    assert Counted.calls == read


def test_optax_members_in_our_chain() -> None:
    """With a member of optax that needs the loss."""
    ours = optim.chain(optax.clip_by_global_norm(1.0), optim.trace(0.9), optax.polyak_sgd(0.1))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.polyak_sgd(0.1))
    update = jax.jit(ours.update)
    a, new = update(GRADS, ours.init(PARAMS), PARAMS, value=2.0)
    b, their_new = jax.jit(theirs.update)(GRADS, theirs.init(PARAMS), PARAMS, value=2.0)
    assert ulps(a, b) == ulps(new, their_new) == 0
    with pytest.raises(TypeError, match="value"):
        ours.update(GRADS, ours.init(PARAMS), PARAMS)


WRAPPERS: dict[str, Any] = {
    "chain": lambda m: optax.chain(optax.clip(1.0), m.adam(1e-2), m.scale(0.5)),
    "masked": lambda m: optax.masked(
        m.adamw(1e-2, weight_decay=0.1), lambda p: jax.tree.map(lambda x: x.ndim > 0, p)
    ),
    "partition": lambda m: optax.partition(
        {"a": m.adam(1e-2), "b": m.sgd(0.1, 0.9)}, {"dense_0": "a", "more": "b"}
    ),
    "MultiSteps": lambda m: optax.MultiSteps(m.adam(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda m: optax.apply_if_finite(m.rmsprop(1e-2, momentum=0.9), 2),
    "inject_hyperparams": lambda m: optax.inject_hyperparams(m.adamw)(
        learning_rate=m.exponential_decay(0.1, 5, 0.9), b1=0.8, weight_decay=0.1
    ),
    "lookahead_free_chain": lambda m: optax.named_chain(
        ("decay", m.add_decayed_weights(0.1)), ("step", m.adagrad(0.1))
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_our_optimizers_in_optax_wrappers(name: str) -> None:
    params, grads = parameters(jnp.float32), smooth_gradients(jnp.float32, 20)
    ours, _ = trajectory(WRAPPERS[name](optim), optim.apply_updates, params, grads, optax_jit)
    theirs, _ = trajectory(WRAPPERS[name](optax), optax.apply_updates, params, grads, optax_jit)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def test_optax_tree_functions_read_our_states() -> None:
    tx = optim.adam(1e-3)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert int(optax.tree.get(state, "count")) == 1
    assert ulps(optax.tree.get(state, "mu"), state[0].mu) == 0
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert ulps(doubled[0].mu, {"w": 2 * state[0].mu["w"]}) == 0
    assert int(doubled[0].count) == 1


def test_a_state_of_optax_continues_here() -> None:
    """The fields are the same, so a run can change over; the state stays of the class that it was."""
    ours, theirs = optim.adam(1e-3), optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(GRADS, theirs.init(PARAMS), PARAMS)
        expected, _ = jax.jit(theirs.update)(GRADS, state, PARAMS)
    updates, new = jax.jit(ours.update)(GRADS, state, PARAMS)
    assert ulps(updates, expected) <= 5  # one leaf: optax's two divisions are reciprocals then
    assert jax.tree.structure(new) == jax.tree.structure(state)


def _named(m: Any) -> Any:
    """The names are not in the alphabet's order, which a plain dict's leaves would have."""
    return m.named_chain(
        ("zeta", m.ema(0.5)), ("decay", m.add_decayed_weights(0.1)), ("alpha", m.scale(-0.1))
    )


def test_named_chains_are_optax() -> None:
    params, grads = parameters(jnp.float32), smooth_gradients(jnp.float32, 20)
    check_against_optax(_named(optim), _named(optax), jnp.float32, steps=20)
    ours, _ = trajectory(_named(optim), optim.apply_updates, params, grads, optax_jit)
    chain = optim.chain(optim.ema(0.5), optim.add_decayed_weights(0.1), optim.scale(-0.1))
    plain, _ = trajectory(chain, optim.apply_updates, params, grads, optax_jit)
    assert ulps(ours, plain) == 0
    state = _named(optim).init(PARAMS)
    assert isinstance(state, OrderedDict)
    assert [*state] == [*_named(optax).init(PARAMS)] == ["zeta", "decay", "alpha"]
    assert isinstance(state["zeta"], optim.EmaState)


def test_a_named_state_is_found_by_name() -> None:
    """Also where it comes back as a plain dict in another order, from a file for instance."""
    tx = _named(optim)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    other = {name: state[name] for name in sorted(state)}
    a, b = tx.update(GRADS, state, PARAMS), tx.update(GRADS, other, PARAMS)
    assert ulps(a, b) == 0
    assert [*b[1]] == ["zeta", "decay", "alpha"]


def test_a_named_chain_in_another_order_is_caught() -> None:
    wrong = optim.named_chain(
        ("zeta", optim.ema(0.5)), ("alpha", optim.scale(-0.1)), ("decay", optim.add_decayed_weights(0.1))
    )
    updates, _ = wrong.update(GRADS, wrong.init(PARAMS), PARAMS)
    theirs = _named(optax)
    expected, _ = optax_jit(theirs.update)(GRADS, theirs.init(PARAMS), PARAMS)
    with pytest.raises(AssertionError):
        assert ulps(updates, expected) <= 2


@pytest.mark.parametrize(
    "outer", ["chain", "named_chain", "masked", "partition", "MultiSteps", "apply_if_finite", "lookahead"]
)
def test_further_arguments_go_through_every_wrapper(outer: str) -> None:
    """To nnkit's and to optax's, as many as they take, wrapped twice."""
    seen: list[Any] = []

    def by_name(updates: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        seen.append(value)
        return updates, state

    inner = optim.chain(
        optim.GradientTransformation(lambda params: (), by_name),  # pyright: ignore[reportArgumentType]
        optax.polyak_sgd(1.0),
        _adds(0.0, seen),
    )
    wrap = {
        "chain": lambda tx: optim.chain(tx),
        "named_chain": lambda tx: optim.named_chain(("one", tx)),
        "masked": lambda tx: optim.masked(tx, {"w": True}),
        "partition": lambda tx: optim.partition({"a": tx}, {"w": "a"}),
        "MultiSteps": lambda tx: optim.MultiSteps(tx, 1).gradient_transformation(),
        "apply_if_finite": lambda tx: optim.apply_if_finite(tx, 1),
        "lookahead": lambda tx: optim.lookahead(tx, 2, 0.5),
    }[outer]
    params = optim.LookaheadParams.init_synced(PARAMS) if outer == "lookahead" else PARAMS
    once = lambda tx: wrap(tx) if outer == "lookahead" else wrap(wrap(tx))
    tx = once(inner)
    more = {"value": 3.0, "grad": GRADS, "value_fn": lambda p: 0.0}
    tx.update(GRADS, tx.init(params), params, **more)
    assert seen[0] == 3.0
    assert sorted(seen[-1]) == ["grad", "value", "value_fn"]
    assert seen[-1]["value_fn"] is more["value_fn"]
    with pytest.raises(TypeError, match="value"):
        tx.update(GRADS, tx.init(params), params)


def test_bad_named_chains() -> None:
    def raises(kind: Any, text: str) -> Any:
        return pytest.raises(kind, match=f"^{re.escape(text)}$")

    advice = 'pass pairs of a name and a transformation, named_chain(("adam", scale_by_adam()))'
    for arg in (optim.scale(1.0), ("a", optim.scale(1.0), 3), (1, optim.scale(1.0))):
        with raises(TypeError, f"named_chain: member 0 is not a name and a transformation: {advice}"):
            optim.named_chain(arg)  # pyright: ignore[reportArgumentType]
    with raises(TypeError, f"named_chain: member 'a' must have init and update, got float: {advice}"):
        optim.named_chain(("a", 1.0))  # pyright: ignore[reportArgumentType]
    with raises(ValueError, "named_chain: the name 'a' is used twice: every member needs its own"):
        optim.named_chain(("a", optim.scale(1.0)), ("a", optim.scale(1.0)))
    tx = optim.named_chain(("a", optim.scale(1.0)), ("b", optim.scale(1.0)))
    own = "pass what its own init or update returned"
    with raises(ValueError, f"named_chain has the members ['a', 'b'] and got states of ['a', 'c']: {own}"):
        tx.update(GRADS, {"a": optim.EmptyState(), "c": optim.EmptyState()}, PARAMS)
    with raises(ValueError, f"named_chain has the members ['a', 'b'] and got tuple: {own}"):
        tx.update(GRADS, (optim.EmptyState(),) * 2, PARAMS)
