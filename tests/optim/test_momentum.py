"""The lecture's forms, written out in numpy on a function whose gradient depends on where it is taken."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim

MU = 0.9
CURVATURE = np.array([1.0, 4.0, 0.1])
START = np.array([1.0, -2.0, 3.0])
STEPS = 100


def _rate(step: Any) -> Any:
    return 0.1 * 0.9 ** (step if isinstance(step, int) else step.astype(jnp.float64))


def _gradient(at: Any) -> Any:
    return CURVATURE * at + 0.3 * at**3


def _lecture_momentum(rate: Any) -> np.ndarray:
    theta, rho, points = START.copy(), np.zeros(3), []
    for step in range(STEPS):
        rho = MU * rho - rate(step) * _gradient(theta)
        theta = theta + rho
        points.append(theta)
    return np.stack(points)


def _lecture_nesterov(rate: Any) -> tuple[np.ndarray, np.ndarray]:
    """The iterates, and the look-ahead points that follow them."""
    theta, rho, points, ahead = START.copy(), np.zeros(3), [], []
    for step in range(STEPS):
        rho = MU * rho - rate(step) * _gradient(theta + MU * rho)
        theta = theta + rho
        points.append(theta)
        ahead.append(theta + MU * rho)
    return np.stack(points), np.stack(ahead)


def _lecture_adagrad(rate: Any) -> np.ndarray:
    theta, s, points = START.copy(), np.zeros(3), []
    for step in range(STEPS):
        g = _gradient(theta)
        s = s + g**2
        theta = theta - rate(step) * g / np.sqrt(s)
        points.append(theta)
    return np.stack(points)


def _lecture_rmsprop(rate: Any) -> np.ndarray:
    theta, s, points = START.copy(), np.zeros(3), []
    for step in range(STEPS):
        g = _gradient(theta)
        s = 0.9 * s + 0.1 * g**2
        theta = theta - rate(step) * g / np.sqrt(s)
        points.append(theta)
    return np.stack(points)


def _lecture_adam(rate: Any) -> np.ndarray:
    theta, m, s, points = START.copy(), np.zeros(3), np.zeros(3), []
    for step in range(STEPS):
        g = _gradient(theta)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        theta = theta - rate(step) * m / np.sqrt(s)
        points.append(theta)
    return np.stack(points)


def run(tx: Any, where: Any = lambda params, state: params) -> tuple[np.ndarray, list[Any]]:
    """The iterates in float64 of ``tx`` with gradients taken at ``where(params, state)``, and the states."""
    params = {"w": jnp.asarray(START)}
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = {"w": _gradient(where(params, state)["w"])}
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    points, states = [], []
    for _ in range(STEPS):
        params, state = step(params, state)
        points.append(np.asarray(params["w"]))
        states.append(state)
    return np.stack(points), states


def check_points(points: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(points, expected, rtol=1e-12, atol=1e-13)


CONSTANT = 0.05
FORMS: dict[str, tuple[Any, Any]] = {
    "momentum": (lambda rate: optim.momentum(rate, MU), _lecture_momentum),
    "adagrad": (lambda rate: optim.adagrad(rate, 0.0, 0.0), _lecture_adagrad),
    "rmsprop": (lambda rate: optim.rmsprop(rate, eps=0.0), _lecture_rmsprop),
    "adam": (lambda rate: optim.adam(rate, eps=0.0, bias_correction=False), _lecture_adam),
}


@pytest.mark.parametrize("name", FORMS)
def test_lecture_forms(name: str) -> None:
    make, lecture = FORMS[name]
    with jax.enable_x64(True):
        check_points(run(make(CONSTANT))[0], lecture(lambda step: CONSTANT))
        check_points(run(make(_rate))[0], lecture(_rate))


@pytest.mark.parametrize("scheduled", [False, True])
def test_nesterov_by_look_ahead_and_by_change_of_variable(scheduled: bool) -> None:
    rate = _rate if scheduled else lambda step: CONSTANT
    given = _rate if scheduled else CONSTANT
    iterates, ahead = _lecture_nesterov(rate)
    with jax.enable_x64(True):
        literal, states = run(
            optim.momentum(given, MU), lambda params, state: optim.look_ahead(params, state, MU)
        )
        check_points(literal, iterates)
        next_points = [
            optim.look_ahead({"w": jnp.asarray(p)}, s, MU)["w"] for p, s in zip(literal, states, strict=True)
        ]
        check_points(np.stack(next_points), ahead)
        # The same with the look-ahead points for parameters.
        moved, states = run(optim.nesterov(given, MU))
        check_points(moved, ahead)
        back = [
            optim.look_ahead({"w": jnp.asarray(p)}, s, -MU)["w"] for p, s in zip(moved, states, strict=True)
        ]
        check_points(np.stack(back), iterates)


def test_at_a_constant_rate_the_forms_are_those_of_sgd() -> None:
    with jax.enable_x64(True):
        check_points(run(optim.momentum(CONSTANT, MU))[0], run(optim.sgd(CONSTANT, MU))[0])
        check_points(run(optim.nesterov(CONSTANT, MU))[0], run(optim.sgd(CONSTANT, MU, True))[0])


def test_under_a_schedule_they_part() -> None:
    """As conventions have it: the lecture's and Keras's velocity keeps the old rate."""
    with jax.enable_x64(True):
        for ours, sgd in ((optim.momentum, False), (optim.nesterov, True)):
            apart = run(ours(_rate, MU))[0] - run(optim.sgd(_rate, MU, sgd))[0]
            assert np.abs(apart).max() > 0.01


def test_momentum_is_the_same_chain_of_optax() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        theirs = optax.chain(optax.scale_by_learning_rate(_rate), optax.trace(MU))
        check_points(run(optim.momentum(_rate, MU))[0], run(theirs)[0])


def test_look_ahead_finds_the_velocity_in_a_chain_and_keeps_the_dtype() -> None:
    tx = optim.chain(optim.add_decayed_weights(0.1), optim.nesterov(0.1, 0.5, accumulator_dtype=jnp.float32))
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    _, state = tx.update(params, tx.init(params), params)
    ahead = optim.look_ahead(params, state, 0.5)
    assert ahead["w"].dtype == jnp.bfloat16
    assert ahead["w"].tolist() == [0.9453125, 0.9453125]


@pytest.mark.parametrize(
    "mutant",
    [
        lambda: run(optim.momentum(CONSTANT, MU))[0],  # the gradient where the parameters are
        lambda: run(optim.sgd(CONSTANT, MU, nesterov=False))[0],  # without the extra momentum
        lambda: run(optim.nesterov(CONSTANT, MU), lambda p, s: optim.look_ahead(p, s, MU))[0],  # twice ahead
        lambda: run(optim.momentum(CONSTANT, MU), lambda p, s: optim.look_ahead(p, s, 1.0))[0],
    ],
)
def test_wrong_nesterovs_are_told_apart(mutant: Any) -> None:
    iterates, ahead = _lecture_nesterov(lambda step: CONSTANT)
    with jax.enable_x64(True):
        points = mutant()
    for expected in (iterates, ahead):
        with pytest.raises(AssertionError):
            check_points(points, expected)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("momentum", lambda: optim.sgd(_rate, MU)),
        ("adagrad", lambda: optim.adagrad(_rate)),
        ("rmsprop", lambda: optim.rmsprop(_rate, 0.99, eps=0.0)),
        ("rmsprop", lambda: optim.rmsprop(_rate, eps=0.0, bias_correction=True)),
        ("adam", lambda: optim.adam(_rate, eps=0.0)),
        ("adam", lambda: optim.adam(_rate, bias_correction=False, eps=1e-3)),
    ],
)
def test_other_forms_are_told_apart(name: str, mutant: Any) -> None:
    with jax.enable_x64(True), pytest.raises(AssertionError):
        check_points(run(mutant())[0], FORMS[name][1](_rate))
