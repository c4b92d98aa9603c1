"""masked and partition: optax's numbers and states, prefixes, functions, nesting, wrong ones, bad input."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim, tree
from tests.optim.oracle import beside, fields_of, parameters, rough_gradients, smooth_gradients, ulps

PARAMS = {"dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "head": [jnp.ones(2), jnp.ones(())]}
GRADS = jax.tree.map(lambda p: 2 * p, PARAMS)


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def _by_size(yes: Any, no: Any) -> Any:
    return lambda params: jax.tree.map(lambda p: yes if p.size > 2 else no, params)


def _momentum(m: Any) -> Any:
    return m.sgd(0.1, 0.9, nesterov=True)


ROWS: dict[str, Any] = {
    "masked": lambda m: m.masked(_momentum(m), {"dense_0": {"kernel": True, "bias": False}, "more": True}),
    "masked_prefix": lambda m: m.masked(m.adam(0.1), {"dense_0": True, "more": False}),
    "masked_function": lambda m: m.masked(m.add_decayed_weights(0.1), _by_size(True, False)),
    "masked_all": lambda m: m.masked(m.adam(0.1), True),
    "masked_none": lambda m: m.masked(m.adam(0.1), False),
    "masked_twice": lambda m: m.masked(
        m.masked(_momentum(m), {"dense_0": True, "more": False}), _by_size(True, False)
    ),
    "partition": lambda m: m.partition({"a": _momentum(m), "b": m.ema(0.9)}, _by_size("a", "b")),
    "partition_prefix": lambda m: m.partition(
        {0: m.adam(0.1), 1: m.set_to_zero(), 2: m.ema(0.5)}, {"dense_0": 0, "more": 1}
    ),
    "partition_chain": lambda m: m.chain(
        m.partition({"a": m.clip(0.5), "b": m.identity()}, {"dense_0": "a", "more": "b"}), m.scale(-0.1)
    ),
    "partition_nested": lambda m: m.partition(
        {"a": m.partition({"c": m.scale(2.0), "d": _momentum(m)}, _by_size("c", "d")), "b": m.ema(0.9)},
        {"dense_0": "a", "more": "b"},
    ),
}


def check(ours: Any, theirs: Any, dtype: Any = jnp.float32, steps: int = 200) -> None:
    params, grads = parameters(dtype), rough_gradients(dtype, steps)
    assert ulps(ours.init(params), theirs.init(params)) == 0
    updates, their_updates, states, their_states = beside(ours, theirs, params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert ulps(updates, their_updates) <= 2
    assert ulps(states, their_states) == 0


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_a_step(name: str) -> None:
    check(ROWS[name](optim), ROWS[name](optax))


@pytest.mark.parametrize("name", ["masked", "partition"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes_are_optax(name: str, dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        check(ROWS[name](optim), ROWS[name](optax), dtype, 40)


def _names(tree: Any) -> Any:
    """The state with its types named: MaskedNode is of either library."""
    if isinstance(tree, dict):
        return {k: _names(v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return (type(tree).__name__, [_names(v) for v in tree])
    return None if tree is None else "leaf"


@pytest.mark.parametrize("name", ROWS)
def test_states_look_like_optax(name: str) -> None:
    params = parameters(jnp.float32)
    ours, theirs = ROWS[name](optim).init(params), ROWS[name](optax).init(params)
    assert fields_of(ours) == fields_of(theirs)
    assert _names(ours) == _names(theirs)


def test_masked_parts_have_no_state() -> None:
    state = optim.masked(optim.trace(0.9), {"dense_0": {"kernel": True, "bias": False}, "head": False}).init(
        PARAMS
    )
    trace = state.inner_state.trace
    assert trace["head"] == trace["dense_0"]["bias"] == optim.MaskedNode()
    assert len(jax.tree.leaves(state)) == 1


def test_masks_by_name_and_of_numpys_bools() -> None:
    for mask in (
        lambda p: tree.mask(p, ".*kernel"),
        {"dense_0": {"kernel": np.bool_(True), "bias": np.array(False)}, "head": jnp.array(False)},
    ):
        tx = optim.masked(optim.scale(10.0), mask)
        updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
        assert updates["dense_0"]["kernel"][0, 0] == 20
        assert updates["dense_0"]["bias"][0] == updates["head"][1] == 2


def test_a_mask_is_asked_of_the_parameters() -> None:
    """Which may differ from their gradients in dtype, and have none; optax asks the updates, and fails."""
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.ones(3)}
    grads = {"a": jnp.ones(3), "b": None, "c": jnp.ones(3)}
    tx = optim.masked(optim.scale(2.0), lambda t: jax.tree.map(lambda x: x.dtype == jnp.float32, t))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["a"].tolist() == [1, 1, 1]
    assert updates["b"] is None
    assert updates["c"].tolist() == [2, 2, 2]
    labels = lambda t: jax.tree.map(lambda x: str(x.dtype), t)
    both = optim.partition({"float32": optim.scale(2.0), "bfloat16": optim.scale(3.0)}, labels)
    updates, _ = both.update(grads, both.init(params), params)
    assert updates["a"].tolist() == [3, 3, 3]
    assert updates["b"] is None


def test_parameters_that_are_kept() -> None:
    params = {"w": jnp.ones(2), "steps": jnp.array(3)}
    tx = optim.partition(
        {"train": optim.sgd(1.0), "keep": optim.set_to_zero()}, {"w": "train", "steps": "keep"}
    )
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert updates["w"].tolist() == [-1, -1]
    assert int(updates["steps"]) == 0


@pytest.mark.parametrize("container", [list, tuple, dict])
def test_nothing_to_optimize(container: Any) -> None:
    for tx in (
        optim.masked(optim.adam(0.1), container()),
        optim.partition({0: optim.adam(0.1)}, lambda _: 0),
    ):
        updates, _ = tx.update(container(), tx.init(container()))
        assert updates == container()


def _told(seen: list[Any]) -> Any:
    def update(u: Any, s: Any, p: Any = None, **extra: Any) -> Any:
        seen.append(extra)
        return u, s

    return optim.GradientTransformation(lambda p: (), update)


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_further_arguments(wrap: str) -> None:
    for compatible in (False, True):
        seen: list[Any] = []
        mask, labels = {"dense_0": True, "head": False}, {"dense_0": "a", "head": "b"}
        tx = {
            "masked": optim.masked(_told(seen), mask, mask_compatible_extra_args=compatible),
            "partition": optim.partition(
                {
                    "a": _told(seen),
                    "b": optim.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)),
                },  # pyright: ignore
                labels,
                mask_compatible_extra_args=compatible,
            ),
        }[wrap]
        tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0, grad=GRADS)
        assert seen[0]["value"] == 3.0
        assert (seen[0]["grad"]["head"] == optim.MaskedNode()) == compatible
        assert jax.tree.structure(seen[0]["grad"]["dense_0"]) == jax.tree.structure(GRADS["dense_0"])
    polyak = optim.masked(optax.polyak_sgd(1.0), {"dense_0": True, "head": False})
    with pytest.raises(TypeError, match="value"):
        polyak.update(GRADS, polyak.init(PARAMS), PARAMS)
    polyak.update(GRADS, polyak.init(PARAMS), PARAMS, value=1.0)


def test_traced_numbers_inside_map() -> None:
    grads = smooth_gradients(jnp.float32, 1)[0]

    def run(rate: Any, decay: Any) -> Any:
        tx = optim.partition({"a": optim.sgd(rate, decay), "b": optim.ema(decay)}, _by_size("a", "b"))
        return tx.update(grads, tx.init(grads), grads)[0]

    rates, decays = jnp.array([0.1, 0.5]), jnp.array([0.5, 0.9])
    mapped = jax.jit(jax.vmap(run))(rates, decays)
    for i in range(2):
        one = jax.jit(run)(rates[i], decays[i])
        for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-6)


def test_optax_maps_over_the_parameters_in_our_states() -> None:
    tx = optim.chain(
        optim.masked(optim.trace(0.9), {"dense_0": True, "head": False}),
        optim.partition({"a": optim.adam(0.1), "b": optim.ema(0.5)}, {"dense_0": "a", "head": "b"}),
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert doubled[0].inner_state.trace["dense_0"]["bias"].tolist() == [4, 4]
    assert int(doubled[1].inner_states["b"].inner_state.count) == 1


_ADAM = {"dense_0": True, "more": False}
MUTANTS: dict[str, tuple[str, Any]] = {
    "the mask turned": ("masked_prefix", optim.masked(optim.adam(0.1), {"dense_0": False, "more": True})),
    "no mask": ("masked_prefix", optim.adam(0.1)),
    "the others to 0": (
        "masked_prefix",
        optim.partition({0: optim.adam(0.1), 1: optim.set_to_zero()}, {"dense_0": 0, "more": 1}),
    ),
    "the gradient for the update": (
        "masked_prefix",
        optim.GradientTransformation(
            optim.masked(optim.adam(0.1), _ADAM).init,
            lambda u, s, p=None, **_: (u, optim.masked(optim.adam(0.1), _ADAM).update(u, s, p)[1]),
        ),
    ),
    "labels swapped": (
        "partition_chain",
        optim.chain(
            optim.partition({"a": optim.clip(0.5), "b": optim.identity()}, {"dense_0": "b", "more": "a"}),
            optim.scale(-0.1),
        ),
    ),
    "transformations swapped": (
        "partition",
        optim.partition({"b": optim.sgd(0.1, 0.9, nesterov=True), "a": optim.ema(0.9)}, _by_size("a", "b")),
    ),
    "one for all": (
        "partition",
        optim.partition({"a": optim.sgd(0.1, 0.9, True), "b": optim.ema(0.9)}, lambda p: "a"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    row, mutant = MUTANTS[name]
    params, grads = parameters(jnp.float32), rough_gradients(jnp.float32, 3)
    theirs = ROWS[row](optax)
    state, their_state = mutant.init(params), theirs.init(params)
    worst = 0
    for grad in grads:
        updates, state = jax.jit(mutant.update)(grad, state, params)
        with jax.numpy_dtype_promotion("standard"):
            expected, their_state = jax.jit(theirs.update)(grad, their_state, params)
        worst = max(worst, ulps(updates, expected))
    with pytest.raises(AssertionError):
        assert worst <= 100


def test_bad_masks() -> None:
    with raises(
        TypeError,
        "masked: inner must have init and update, got bool: pass a transformation, sgd(0.1) for instance",
    ):
        optim.masked(True, optim.sgd(0.1))  # pyright: ignore[reportArgumentType]
    text = "masked: the mask must be a tree of bools like the parameters or a prefix of them, got PyTreeDef"
    for mask in ({"dense_1": True}, {"dense_0": {"kernel": True}, "head": True}, lambda p: [True]):
        tx = optim.masked(optim.sgd(0.1), mask)
        with pytest.raises(ValueError, match=text):
            tx.init(PARAMS)
        with pytest.raises(ValueError, match=text):
            tx.update(PARAMS, optim.MaskedState(optim.sgd(0.1).init(PARAMS)), PARAMS)
    with raises(TypeError, "masked: a mask must hold True and False, got float"):
        optim.masked(optim.sgd(0.1), 1.0).init(PARAMS)
    with pytest.raises(TypeError, match=r"^masked: a mask must be known when compiling, got a traced array"):
        jax.eval_shape(lambda keep: optim.masked(optim.sgd(0.1), keep).init(PARAMS), True)
    with raises(
        TypeError,
        "masked got the state of another transformation: EmptyState in place of MaskedState(inner_state); "
        "pass what this optimizer's own init or update returned",
    ):
        optim.masked(optim.sgd(0.1), True).update(PARAMS, optim.EmptyState(), PARAMS)
    decay = optim.masked(optim.add_decayed_weights(0.1), True)
    with pytest.raises(ValueError, match="add_decayed_weights needs the parameters"):
        decay.update(PARAMS, decay.init(PARAMS))


def test_bad_partitions() -> None:
    advice = 'pass transformations by label, partition({"a": adam(0.1), "b": sgd(0.1)}, labels)'
    with raises(TypeError, f"partition: transforms must be a dict, got list: {advice}"):
        optim.partition([optim.sgd(0.1)], "a")  # pyright: ignore[reportArgumentType]
    with raises(
        TypeError, f"partition: the transformation of 'a' must have init and update, got float: {advice}"
    ):
        optim.partition({"a": 0.1}, "a")  # pyright: ignore[reportArgumentType]
    members = {"a": optim.sgd(0.1), "b": optim.adam(0.1)}
    text = "partition: no transformation for the label 'c' at {}; there are those of 'a', 'b'"
    with raises(ValueError, text.format("dense_0/bias")):
        optim.partition(members, {"dense_0": {"kernel": "a", "bias": "c"}, "head": "b"}).init(PARAMS)
    with raises(ValueError, text.format("the root")):
        optim.partition(members, lambda p: "c").init(PARAMS)
    with pytest.raises(ValueError, match="the mask must be a tree of bools like the parameters or a prefix"):
        optim.partition(members, {"dense_0": {"kernel": "a"}, "head": "b"}).init(PARAMS)
    tx = optim.partition(members, {"dense_0": "a", "head": "b"})
    with raises(
        TypeError,
        "partition got the state of another transformation: MaskedState in place of PartitionState("
        "inner_states); pass what this optimizer's own init or update returned",
    ):
        tx.update(PARAMS, optim.MaskedState(()), PARAMS)
    with raises(
        ValueError,
        "partition has the labels [\"'a'\", \"'b'\"] and got states of [\"'a'\"]: "
        "pass what its own init or update returned",
    ):
        tx.update(PARAMS, optim.PartitionState({"a": tx.init(PARAMS).inner_states["a"]}), PARAMS)
