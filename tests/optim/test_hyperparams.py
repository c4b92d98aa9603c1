"""Hyper-parameters in the state, set without compiling, and the learning rate read from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim, tree
from tests.optim.oracle import optax_jit, parameters, rough_gradients, smooth_gradients, trajectory, ulps

PARAMS = {"w": jnp.array([1.0, -2.0])}
GRADS = {"w": jnp.array([0.5, 4.0])}


def _schedule(step: Any) -> Any:
    return 0.1 * jnp.exp2(-jnp.asarray(step, jnp.float32))


INJECTED = {
    "adam": lambda m: m.inject_hyperparams(m.adam)(1e-2),
    "schedules": lambda m: m.inject_hyperparams(m.adam)(_schedule, b1=lambda t: 0.5 + _schedule(t)),
    "sgd": lambda m: m.inject_hyperparams(m.sgd)(_schedule, momentum=0.9, nesterov=True),
    "static": lambda m: m.inject_hyperparams(m.adamw, static_args="mask")(
        1e-2, mask=lambda p: jax.tree.map(lambda _: True, p)
    ),
    "dtype": lambda m: m.inject_hyperparams(m.rmsprop, hyperparam_dtype=jnp.bfloat16)(1e-2, momentum=0.5),
    "in a chain": lambda m: m.chain(m.clip_by_global_norm(1.0), m.inject_hyperparams(m.adam)(_schedule)),
}


@pytest.mark.parametrize("name", INJECTED)
def test_as_optax(name: str) -> None:
    """optax's own state after each step: counts, hyper-parameters and averages, and the updates."""
    ours, theirs = INJECTED[name](optim), INJECTED[name](optax)
    params = parameters(jnp.float32)
    state, their_state = ours.init(params), theirs.init(params)
    update, their_update = jax.jit(ours.update), optax_jit(theirs.update)
    for grads in rough_gradients(jnp.float32, 6):
        assert jax.tree.structure(state) != jax.tree.structure(0)
        assert ulps(state, their_state) <= 2
        updates, new = update(grads, state, params)
        their_updates, their_state = their_update(grads, their_state, params)
        assert ulps(updates, their_updates) <= 2
        assert ulps(new, their_state) <= 2
        state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(their_state))


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_injected_is_the_plain_optimizer(name: str) -> None:
    plain = {"adam": optim.adam(1e-2), "sgd": optim.sgd(_schedule, 0.9, nesterov=True)}[name]
    params, grads = parameters(jnp.float32), smooth_gradients(jnp.float32, 20)
    expected, _ = trajectory(plain, optim.apply_updates, params, grads)
    got, _ = trajectory(INJECTED[name](optim), optim.apply_updates, params, grads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_first_step_uses_the_schedule_at_0_and_counts_go_on_from_there() -> None:
    tx = optim.inject_hyperparams(optim.sgd)(_schedule)
    state = tx.init(PARAMS)
    for step in range(3):
        assert int(state.count) == step
        np.testing.assert_allclose(optim.learning_rate(state), 0.1 * 0.5**step, rtol=1e-6)
        updates, state = tx.update(GRADS, state, PARAMS)
        np.testing.assert_allclose(updates["w"], -0.1 * 0.5**step * GRADS["w"], rtol=1e-6)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1 * 0.5**step, rtol=1e-6)


def test_half_precision_parameters_do_not_round_the_decays() -> None:
    """In bfloat16, optax's choice, 0.999 is 1."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = optim.inject_hyperparams(optim.adam)(1e-3).init(params)
    assert state.hyperparams["b2"].dtype == jnp.float32
    assert float(state.hyperparams["b2"]) < 1
    tx = optim.inject_hyperparams(optim.adam)(1e-1)
    updates, _ = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(updates["w"], np.float32), -0.1, rtol=1e-2)


def test_setting_compiles_nothing_again() -> None:
    tx = optim.chain(optim.clip(1.0), optim.inject_hyperparams(optim.adam)(1e-2))
    traces = 0

    @jax.jit
    def step(state: Any) -> Any:
        nonlocal traces
        traces += 1
        return tx.update(GRADS, state, PARAMS)

    updates, state = step(tx.init(PARAMS))
    np.testing.assert_allclose(updates["w"], -1e-2, rtol=1e-5)
    updates, state = step(optim.set_hyperparams(state, learning_rate=1e-3, b2=0.99))
    np.testing.assert_allclose(optim.learning_rate(state), 1e-3, rtol=1e-6)
    _, state = step(optim.set_hyperparams(state, learning_rate=np.float64(1e-4), eps=jnp.float32(1e-3)))
    assert traces == 1
    assert abs(float(state[1].hyperparams["eps"]) - 1e-3) < 1e-9


def test_a_mapped_population_has_a_rate_each() -> None:
    tx = optim.inject_hyperparams(optim.sgd)(0.1)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    state = optim.set_hyperparams(state, learning_rate=jnp.array([1.0, 2.0, 3.0]))
    updates, state = jax.vmap(lambda s: tx.update(GRADS, s, PARAMS))(state)
    np.testing.assert_allclose(updates["w"], -jnp.arange(1.0, 4.0)[:, None] * GRADS["w"])
    np.testing.assert_allclose(optim.learning_rate(state), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        optim.learning_rate(optim.set_hyperparams(state, learning_rate=0.5)), [0.5] * 3
    )


def test_all_parts_of_the_name_are_set() -> None:
    inject = optim.inject_hyperparams
    tx = optim.partition(
        {"a": inject(optim.sgd)(0.1), "b": inject(optim.adam)(0.2)}, {"w": "a", "v": "b", "u": "b"}
    )
    state = tx.init({"w": jnp.ones(2), "v": jnp.ones(2), "u": jnp.ones(())})
    rates = optim.learning_rate(state)
    assert {label: round(float(rate), 6) for label, rate in rates.items()} == {"a": 0.1, "b": 0.2}
    state = optim.set_hyperparams(state, learning_rate=0.5, b1=0.8)
    assert {label: float(rate) for label, rate in optim.learning_rate(state).items()} == {"a": 0.5, "b": 0.5}


class _Halving:
    """A schedule with a state of its own: it halves whenever it is told to."""

    def init(self) -> Any:
        return jnp.float32(1.0)

    def update(self, state: Any, *, halve: Any = False, **_: Any) -> Any:
        return jnp.where(halve, state / 2, state)

    def __call__(self, state: Any, **_: Any) -> Any:
        return state


def test_a_schedule_with_a_state() -> None:
    tx = optim.inject_hyperparams(optim.sgd)(_Halving())
    state = tx.init(PARAMS)
    seen = []
    for halve in (True, False, False):
        updates, state = tx.update(GRADS, state, PARAMS, halve=halve)
        seen.append(float(updates["w"][0]))
    assert seen == [-0.5, -0.25, -0.25]


RATES = {
    "sgd": (lambda: optim.sgd(0.1), lambda step: 0.1),
    "an array": (lambda: optim.adam(jnp.float32(0.1)), lambda step: 0.1),
    "a schedule": (lambda: optim.adam(_schedule), _schedule),
    "momentum": (lambda: optim.momentum(_schedule), _schedule),
    "a chain": (lambda: optim.chain(optim.clip(1.0), optim.adamw(_schedule), optim.identity()), _schedule),
    "a named chain": (
        lambda: optim.named_chain(("clip", optim.clip(1.0)), ("adam", optim.adam(_schedule))),
        _schedule,
    ),
    "masked": (lambda: optim.masked(optim.sgd(_schedule), {"w": True}), _schedule),
    "accumulated": (lambda: optim.MultiSteps(optim.sgd(_schedule), 2), lambda step: _schedule(step // 2)),
    "apply_if_finite": (lambda: optim.apply_if_finite(optim.sgd(_schedule), 3), _schedule),
    "one of a partition": (
        lambda: optim.partition({"a": optim.sgd(_schedule), "b": optim.set_to_zero()}, {"w": "a"}),
        _schedule,
    ),
    "injected": (lambda: optim.inject_hyperparams(optim.adam)(0.1), lambda step: 0.1),
    "an injected schedule": (lambda: optim.inject_hyperparams(optim.adam)(_schedule), _schedule),
    "a plateau": (
        lambda: optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(factor=0.5, patience=2, monitor="loss")),
        lambda step: 0.1,
    ),
    "optax's injected": (lambda: optax.inject_hyperparams(optax.adam)(0.1), lambda step: 0.1),
}


@pytest.mark.parametrize("name", RATES)
def test_the_rate_is_what_the_next_step_uses(name: str) -> None:
    make, rate = RATES[name]
    tx = make()
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in range(4):
        np.testing.assert_allclose(optim.learning_rate(state), rate(step), rtol=1e-6)
        with jax.numpy_dtype_promotion("standard"):
            _, state = update(GRADS, state, PARAMS)
    np.testing.assert_allclose(jax.jit(optim.learning_rate)(state), rate(4), rtol=1e-6)


def test_a_plateau_in_the_rate() -> None:
    tx = optim.chain(optim.sgd(_schedule), optim.reduce_on_plateau(factor=0.5, patience=1, monitor="loss"))
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS)
    for _ in range(3):
        state = optim.report(state, {"loss": 1.0})
    np.testing.assert_allclose(optim.learning_rate(state), _schedule(1) * float(state[1].scale), rtol=1e-6)
    assert float(state[1].scale) < 1
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -optim.learning_rate(state) * GRADS["w"], rtol=1e-6)


def test_rates_of_a_mapped_state() -> None:
    tx = optim.adam(_schedule)
    state = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
    _, state = jax.vmap(lambda s: tx.update(GRADS, s, PARAMS))(state)
    np.testing.assert_allclose(optim.learning_rate(state), [0.05, 0.05], rtol=1e-6)


def test_another_optimizer_may_go_on_with_the_state() -> None:
    """The note of the rate is no part of the structure, and is the new optimizer's after its update."""
    first, second = optim.sgd(0.1, 0.9), optim.sgd(0.01, 0.9)
    state = first.init(PARAMS)

    def step(state: Any, _: Any) -> Any:
        return second.update(GRADS, state, PARAMS)[1], None

    state, _ = jax.lax.scan(step, state, length=3)
    np.testing.assert_allclose(optim.learning_rate(state), 0.01, rtol=1e-6)
    assert jax.tree.structure(first.init(PARAMS)) == jax.tree.structure(second.init(PARAMS))


def test_a_traced_rate_is_not_guessed() -> None:
    state = jax.vmap(lambda rate: optim.sgd(rate).init(PARAMS))(jnp.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"was traced where the optimizer was built: inject_hyperparams"):
        optim.learning_rate(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: optim.scale_by_adam().init(PARAMS), r"tells no learning rate: inject_hyperparams\(adam\)"),
        (lambda: optax.adam(0.1).init(PARAMS), r"tells no learning rate"),
    ],
)
def test_states_without_a_rate(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.learning_rate(state())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1.0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \[0, inf\), got nan"),
        ({"eps": float("inf")}, r"eps must be a finite number, got inf"),
        ({"learning_rate": np.ones(3)}, r"shape \(\) in the state and got an array of shape \(3,\)"),
        ({"learning_rate": "fast"}, r"shape \(\) in the state and got 'fast'"),
        ({"lr": 0.1}, r"no hyper-parameter 'lr' that can be set, it has .*learning_rate.*: build"),
        ({"b1": 0.5}, r"b1 is set by a schedule"),
    ],
)
def test_bad_values(values: Any, message: str) -> None:
    state = optim.inject_hyperparams(optim.adam)(0.1, b1=lambda step: 0.9).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        optim.set_hyperparams(state, **values)


def test_a_state_in_which_nothing_lies() -> None:
    with pytest.raises(ValueError, match=r"none lies in it: build the optimizer with inject_hyperparams"):
        optim.set_hyperparams(optim.adam(0.1).init(PARAMS), learning_rate=0.2)


def test_bad_arguments_are_the_factory_s_errors() -> None:
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), got 2"):
        optim.inject_hyperparams(optim.adam)(0.1, b1=2.0)
    with pytest.raises(ValueError, match=r"static_args names 'masks', which is no argument of adamw: it has"):
        optim.inject_hyperparams(optim.adamw, static_args="masks")
    with pytest.raises(TypeError, match=r"missing a required argument: 'learning_rate'"):
        optim.inject_hyperparams(optim.adam)()


def test_the_state_of_another() -> None:
    tx = optim.inject_hyperparams(optim.adam)(0.1)
    with pytest.raises(TypeError, match=r"got the state of another transformation"):
        tx.update(GRADS, optim.adam(0.1).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=r"got a state of learning_rate.*, this optimizer has b1"):
        tx.update(GRADS, optim.inject_hyperparams(optim.sgd)(0.1).init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jax.vmap(lambda r: optim.sgd(optim.linear_schedule(r, 0.0, 10)).init(PARAMS))(jnp.ones(2)),
        lambda: optim.inject_hyperparams(lambda peak: optim.sgd(optim.cosine_decay_schedule(peak, 9)))(
            0.1
        ).init(PARAMS),
        lambda: optim.inject_hyperparams(lambda lr: optim.sgd(lr))(0.1).init(PARAMS),
        lambda: optim.inject_hyperparams(
            lambda learning_rate: optim.sgd(optim.linear_schedule(0.0, learning_rate, 10))
        )(0.1).init(PARAMS),
        lambda: optim.inject_hyperparams(
            lambda learning_rate: optim.partition(
                {"a": optim.sgd(learning_rate), "b": optim.sgd(learning_rate * 0.1)}, {"w": "a"}
            )
        )(0.1).init(PARAMS),
    ],
)
def test_rates_made_of_traced_or_other_numbers_are_not_guessed(make: Any) -> None:
    with pytest.raises(ValueError, match="was traced where the optimizer was built"):
        optim.learning_rate(make())


def test_masked_parts_with_a_rate_each() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    first, second = {"a": True, "b": False}, {"a": False, "b": True}
    tx = optim.chain(optim.masked(optim.sgd(0.1), first), optim.masked(optim.sgd(0.01), second))
    state = tx.init(params)
    with pytest.raises(ValueError, match="parts of the parameters have rates of their own"):
        optim.learning_rate(state)
    np.testing.assert_allclose([float(optim.learning_rate(part)) for part in state], [0.1, 0.01], rtol=1e-6)


def test_a_partition_within_a_partition() -> None:
    params = {"a": jnp.ones((2, 2)), "z": jnp.ones(2)}
    tx = optim.partition({"m": optim.muon(1e-3), "z": optim.sgd(0.1)}, {"a": "m", "z": "z"})
    rates = optim.learning_rate(tx.init(params))
    assert set(rates) == {"m", "z"}
    np.testing.assert_allclose(jax.tree.leaves(rates["m"]), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(rates["z"], 0.1, rtol=1e-6)


def test_integers_in_the_state_are_not_truncated() -> None:
    state = optim.inject_hyperparams(optim.adamw)(1e-3, weight_decay=0).init(PARAMS)
    with pytest.raises(ValueError, match=r"weight_decay lies in the state as an integer and got 0.1: build"):
        optim.set_hyperparams(state, weight_decay=0.1)
    assert int(optim.set_hyperparams(state, weight_decay=1).hyperparams["weight_decay"]) == 1


def test_one_array_set_in_two_places_can_be_donated() -> None:
    inject = optim.inject_hyperparams
    tx = optim.chain(inject(optim.sgd)(0.1), inject(optim.sgd)(0.1))
    state = optim.set_hyperparams(tx.init(PARAMS), learning_rate=jnp.float32(0.5))
    updates, _ = jax.jit(lambda s: tx.update(GRADS, s, PARAMS), donate_argnums=0)(state)
    np.testing.assert_allclose(updates["w"], 0.25 * GRADS["w"])


def test_what_is_no_number_or_no_schedule_is_said_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="ns_steps must be") as caught:
        optim.inject_hyperparams(optim.muon)(1e-3)
    assert "name in static_args those that must stay" in "".join(caught.value.__notes__)
    with pytest.raises(TypeError, match=r"takes the function mask for a schedule.*static_args='mask'"):
        optim.inject_hyperparams(optim.adamw)(1e-3, mask=tree.decayed)
