"""PyTorch's trajectories, with PyTorch's conventions reached through arguments.

In float64 both go their own way for 200 steps from one start. Gradients depend on the step alone, so
what differs is the optimizer; weight decay feeds the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import optim

STEPS = 200


def _gradients(dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    g = rng.normal(size=(STEPS, 40)) * 10.0 ** rng.uniform(-3, 3, size=(STEPS, 40))
    g[:, :4] = 0.0
    g[:, 4:8] *= rng.random((STEPS, 4)) < 0.1
    g[:, 8:12] = rng.normal(size=(STEPS, 4)) + 2
    return g.astype(dtype)


def _theirs(make: Callable[[Any], torch.optim.Optimizer], grads: np.ndarray, epoch: int = 0) -> np.ndarray:
    start = np.random.default_rng(1).normal(size=grads.shape[1]).astype(grads.dtype)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = make([parameter])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    points = []
    for step, grad in enumerate(grads):
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        if epoch and (step + 1) % epoch == 0:
            schedule.step()
        points.append(parameter.detach().numpy().copy())
    return np.stack(points)


def _ours(optimizer: Any, grads: np.ndarray) -> np.ndarray:
    start = np.random.default_rng(1).normal(size=grads.shape[1]).astype(grads.dtype)
    params = {"w": jnp.asarray(start)}

    @jax.jit
    def run(params: Any, state: Any, grads: Any) -> Any:
        def step(carry: Any, grad: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update({"w": grad}, state, params)
            params = optim.apply_updates(params, updates)
            return (params, state), params["w"]

        return jax.lax.scan(step, (params, state), grads)[1]

    return np.asarray(run(params, optimizer.init(params), jnp.asarray(grads)))


def _decayed(rate: float, optimizer: Any) -> Any:
    """PyTorch's ``weight_decay`` of all but AdamW."""
    return optim.chain(optim.add_decayed_weights(rate), optimizer)


RATE = 1e-2
T = torch.optim
ROWS: dict[str, tuple[Any, Any]] = {
    "sgd": (optim.sgd(RATE), lambda p: T.SGD(p, RATE)),
    "sgd_momentum": (optim.sgd(RATE, 0.9), lambda p: T.SGD(p, RATE, momentum=0.9)),
    "sgd_nesterov": (optim.sgd(RATE, 0.9, True), lambda p: T.SGD(p, RATE, momentum=0.9, nesterov=True)),
    "sgd_decay": (_decayed(0.1, optim.sgd(RATE)), lambda p: T.SGD(p, RATE, weight_decay=0.1)),
    "sgd_nesterov_decay": (
        _decayed(0.1, optim.sgd(RATE, 0.9, True)),
        lambda p: T.SGD(p, RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adagrad": (optim.adagrad(RATE, 0.0, 1e-10, eps_in_sqrt=False), lambda p: T.Adagrad(p, RATE)),
    "adagrad_arguments": (
        _decayed(0.1, optim.adagrad(RATE, 0.5, 1e-3, eps_in_sqrt=False)),
        lambda p: T.Adagrad(p, RATE, initial_accumulator_value=0.5, eps=1e-3, weight_decay=0.1),
    ),
    "rmsprop": (
        optim.rmsprop(RATE, 0.99, eps_in_sqrt=False, learning_rate_in_momentum=False),
        lambda p: T.RMSprop(p, RATE),
    ),
    "rmsprop_momentum": (
        optim.rmsprop(RATE, 0.95, 1e-3, eps_in_sqrt=False, momentum=0.9, learning_rate_in_momentum=False),
        lambda p: T.RMSprop(p, RATE, alpha=0.95, eps=1e-3, momentum=0.9),
    ),
    "rmsprop_centered": (
        optim.rmsprop(RATE, 0.99, eps_in_sqrt=False, centered=True),
        lambda p: T.RMSprop(p, RATE, centered=True),
    ),
    "rmsprop_centered_momentum_decay": (
        _decayed(
            0.1,
            optim.rmsprop(
                RATE,
                0.9,
                1e-3,
                eps_in_sqrt=False,
                centered=True,
                momentum=0.5,
                learning_rate_in_momentum=False,
            ),
        ),
        lambda p: T.RMSprop(p, RATE, alpha=0.9, eps=1e-3, centered=True, momentum=0.5, weight_decay=0.1),
    ),
    "adam": (optim.adam(RATE), lambda p: T.Adam(p, RATE)),
    "adam_arguments": (
        _decayed(0.1, optim.adam(RATE, 0.8, 0.95, 1e-4)),
        lambda p: T.Adam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "adamw": (optim.adamw(RATE, weight_decay=0.01), lambda p: T.AdamW(p, RATE)),
    "adamw_arguments": (
        optim.adamw(RATE, 0.8, 0.95, 1e-4, weight_decay=0.3),
        lambda p: T.AdamW(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.3),
    ),
}


def check_trajectory(ours: Any, theirs: Any, dtype: Any, tolerance: float, epoch: int = 0) -> None:
    """Every parameter at every step, by the largest parameter: parameters cross 0."""
    grads = _gradients(dtype)
    with jax.enable_x64(dtype == np.float64):
        mine = _ours(ours, grads)
    expected = _theirs(theirs, grads, epoch)
    assert mine.dtype == dtype
    np.testing.assert_allclose(mine, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ROWS)
def test_float64_trajectories(name: str) -> None:
    """The two round in another order; 3e-15 was the largest difference seen."""
    check_trajectory(*ROWS[name], np.float64, 1e-13)


@pytest.mark.parametrize("name", ["sgd_nesterov_decay", "adagrad", "rmsprop_momentum", "adam", "adamw"])
def test_float32_trajectories(name: str) -> None:
    """b2ᵗ is a float32 power here and a float64 one there, 6e-6 apart at the first step."""
    check_trajectory(*ROWS[name], np.float32, 1e-5 if "adam" in name else 5e-7)


def _by_epoch(epoch: int) -> Any:
    return optim.exponential_decay(RATE, epoch, 0.9, staircase=True)


EPOCHS: dict[str, Any] = {
    "sgd": (lambda rate: optim.sgd(rate, 0.9), lambda p: T.SGD(p, RATE, momentum=0.9)),
    "rmsprop": (
        lambda rate: optim.rmsprop(
            rate, 0.99, eps_in_sqrt=False, momentum=0.9, learning_rate_in_momentum=False
        ),
        lambda p: T.RMSprop(p, RATE, momentum=0.9),
    ),
}


@pytest.mark.parametrize("epoch", [1, 7])
@pytest.mark.parametrize("name", EPOCHS)
def test_the_learning_rate_by_epochs(name: str, epoch: int) -> None:
    """ExponentialLR, which is stepped after an epoch's last update; the rate is a float32 number."""
    ours, theirs = EPOCHS[name]
    check_trajectory(ours(_by_epoch(epoch)), theirs, np.float64, 1e-6, epoch)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("sgd", optim.momentum(_by_epoch(7), 0.9)),
        ("sgd", optim.sgd(lambda step: _by_epoch(7)(step + 1), 0.9)),
        ("sgd", optim.sgd(lambda step: _by_epoch(7)(jnp.maximum(step - 1, 0)), 0.9)),
        ("rmsprop", optim.rmsprop(_by_epoch(7), 0.99, eps_in_sqrt=False, momentum=0.9)),
    ],
)
def test_other_places_for_the_rate_are_told_apart(name: str, ours: Any) -> None:
    with pytest.raises(AssertionError):
        check_trajectory(ours, EPOCHS[name][1], np.float64, 1e-6, 7)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("sgd_nesterov", optim.sgd(RATE, 0.9)),
        ("sgd_decay", optim.sgd(RATE)),
        ("adagrad", optim.adagrad(RATE)),
        ("rmsprop", optim.rmsprop(RATE)),
        ("rmsprop_momentum", optim.rmsprop(RATE, 0.95, 1e-3, momentum=0.9)),
        ("rmsprop_centered", optim.rmsprop(RATE, 0.99, eps_in_sqrt=False)),
        ("adam", optim.adam(RATE, bias_correction=False)),
        ("adam", optim.adam(RATE, eps=0.0, eps_root=1e-8)),
        ("adam_arguments", optim.adamw(RATE, 0.8, 0.95, 1e-4, weight_decay=0.1)),
        ("adamw", optim.adamw(RATE)),
    ],
)
def test_other_conventions_are_told_apart(name: str, ours: Any) -> None:
    with pytest.raises(AssertionError):
        check_trajectory(ours, ROWS[name][1], np.float64, 1e-13)
