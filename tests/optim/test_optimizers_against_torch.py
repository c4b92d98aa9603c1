"""PyTorch's trajectories, with PyTorch's conventions reached through arguments.

In float64 both go their own way for 200 steps from one start. Gradients depend on the step alone, so
what differs is the optimizer; weight decay feeds the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def _scalars_in_float64() -> Iterator[None]:
    """PyTorch keeps NAdam's product of momenta in its default dtype, float32 beside float64 parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
    "nadam": (optim.nadam(RATE, momentum_decay=4e-3), lambda p: T.NAdam(p, RATE)),
    "nadam_arguments": (
        _decayed(0.1, optim.nadam(RATE, 0.8, 0.95, 1e-4, momentum_decay=0.1)),
        lambda p: T.NAdam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1, momentum_decay=0.1),
    ),
    "nadam_of_optax": (optim.nadam(RATE), lambda p: T.NAdam(p, RATE, momentum_decay=1e6)),
    "nadamw": (
        optim.nadamw(RATE, weight_decay=0.3, momentum_decay=4e-3),
        lambda p: T.NAdam(p, RATE, weight_decay=0.3, decoupled_weight_decay=True),
    ),
    "radam": (optim.radam(RATE, bias_correction_eps=True), lambda p: T.RAdam(p, RATE)),
    "radam_arguments": (
        _decayed(0.1, optim.radam(RATE, 0.8, 0.95, 1e-4, bias_correction_eps=True)),
        lambda p: T.RAdam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "radamw": (
        optim.chain(
            optim.scale_by_radam(bias_correction_eps=True),
            optim.add_decayed_weights(0.3),
            optim.scale_by_learning_rate(RATE),
        ),
        lambda p: T.RAdam(p, RATE, weight_decay=0.3, decoupled_weight_decay=True),
    ),
    "adamax": (optim.adamax(RATE), lambda p: T.Adamax(p, RATE)),
    "adamax_arguments": (
        _decayed(0.1, optim.adamax(RATE, 0.8, 0.95, 1e-4)),
        lambda p: T.Adamax(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "adadelta": (optim.adadelta(), lambda p: T.Adadelta(p)),
    "adadelta_arguments": (
        optim.adadelta(0.5, 0.95, 1e-3, 0.1),
        lambda p: T.Adadelta(p, 0.5, 0.95, 1e-3, weight_decay=0.1),
    ),
    "amsgrad": (optim.amsgrad(RATE, correct_after_max=True), lambda p: T.Adam(p, RATE, amsgrad=True)),
    "amsgrad_arguments": (
        _decayed(0.1, optim.amsgrad(RATE, 0.8, 0.95, 1e-4, correct_after_max=True)),
        lambda p: T.Adam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1, amsgrad=True),
    ),
    "amsgradw": (
        optim.chain(
            optim.scale_by_amsgrad(correct_after_max=True),
            optim.add_decayed_weights(0.3),
            optim.scale_by_learning_rate(RATE),
        ),
        lambda p: T.AdamW(p, RATE, weight_decay=0.3, amsgrad=True),
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


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("sgd_nesterov_decay", 5e-7),
        ("adagrad", 5e-7),
        ("rmsprop_momentum", 5e-7),
        ("adamax", 5e-7),
        ("adadelta", 5e-7),
        # b2ᵗ is a float32 power here and a float64 one there, 6e-6 apart at the first step.
        ("adam", 1e-5),
        ("adamw", 1e-5),
        ("nadam", 1e-5),
        ("amsgrad", 1e-5),
        ("radam", 5e-7),  # whose first steps, without b2, are the largest
    ],
)
def test_float32_trajectories(name: str, tolerance: float) -> None:
    check_trajectory(*ROWS[name], np.float32, tolerance)


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
        ("nadam", optim.nadam(RATE)),
        ("nadam", optim.nadam(RATE, momentum_decay=5e-3)),
        ("nadamw", _decayed(0.3, optim.nadam(RATE, momentum_decay=4e-3))),
        ("radam", optim.radam(RATE)),
        ("radam", optim.radam(RATE, threshold=6.0, bias_correction_eps=True)),
        ("radam", optim.radam(RATE, nesterov=True, bias_correction_eps=True)),
        ("adamax", optim.adamax(RATE, b2=0.99)),
        ("adamax_arguments", optim.adamaxw(RATE, 0.8, 0.95, 1e-4, 0.1)),
        ("adadelta", optim.adadelta(eps=1.1e-6)),
        ("adadelta_arguments", optim.adadelta(0.5, 0.95, 1e-3)),
        ("amsgrad", optim.amsgrad(RATE)),
        ("amsgrad", optim.adam(RATE)),
        ("amsgrad", optim.amsgrad(RATE, bias_correction_mu=False, correct_after_max=True)),
    ],
)
def test_other_conventions_are_told_apart(name: str, ours: Any) -> None:
    with pytest.raises(AssertionError):
        check_trajectory(ours, ROWS[name][1], np.float64, 1e-13)
