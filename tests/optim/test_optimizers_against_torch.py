"""PyTorch's trajectories, with PyTorch's conventions reached through arguments.

In float64 both go their own way for 200 steps from one start. Gradients depend on the step alone, so
what differs is the optimizer; weight decay feeds the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import optim
from nnkit.testing.table.optimizers_torch import TORCH, decayed, torch_gradients


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


RATE = 1e-2
T = torch.optim
ROWS = {name: (ours, partial(theirs, T)) for name, (ours, theirs) in TORCH.items()}


def check_trajectory(ours: Any, theirs: Any, dtype: Any, tolerance: float, epoch: int = 0) -> None:
    """Every parameter at every step, by the largest parameter: parameters cross 0."""
    grads = torch_gradients(dtype)
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
        ("nadamw", decayed(0.3, optim.nadam(RATE, momentum_decay=4e-3))),
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
