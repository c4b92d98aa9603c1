"""Optimizers beside PyTorch's: a row of TORCH is ours with PyTorch's conventions, and PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import optim
from nnkit.testing.adapters import of_torch_optimizer
from nnkit.testing.equivalent import Distance, compare_steps, of_transformation
from nnkit.testing.table.row import Bound, Row

__all__ = ["TORCH", "decayed", "measure", "rows", "torch_gradients"]

RATE = 1e-2


def decayed(rate: float, optimizer: Any) -> Any:
    """PyTorch's ``weight_decay`` of all but AdamW."""
    return optim.chain(optim.add_decayed_weights(rate), optimizer)


TORCH: dict[str, tuple[Any, Any]] = {
    "sgd": (optim.sgd(RATE), lambda T, p: T.SGD(p, RATE)),
    "sgd_momentum": (optim.sgd(RATE, 0.9), lambda T, p: T.SGD(p, RATE, momentum=0.9)),
    "sgd_nesterov": (optim.sgd(RATE, 0.9, True), lambda T, p: T.SGD(p, RATE, momentum=0.9, nesterov=True)),
    "sgd_decay": (decayed(0.1, optim.sgd(RATE)), lambda T, p: T.SGD(p, RATE, weight_decay=0.1)),
    "sgd_nesterov_decay": (
        decayed(0.1, optim.sgd(RATE, 0.9, True)),
        lambda T, p: T.SGD(p, RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adagrad": (optim.adagrad(RATE, 0.0, 1e-10, eps_in_sqrt=False), lambda T, p: T.Adagrad(p, RATE)),
    "adagrad_arguments": (
        decayed(0.1, optim.adagrad(RATE, 0.5, 1e-3, eps_in_sqrt=False)),
        lambda T, p: T.Adagrad(p, RATE, initial_accumulator_value=0.5, eps=1e-3, weight_decay=0.1),
    ),
    "rmsprop": (
        optim.rmsprop(RATE, 0.99, eps_in_sqrt=False, learning_rate_in_momentum=False),
        lambda T, p: T.RMSprop(p, RATE),
    ),
    "rmsprop_momentum": (
        optim.rmsprop(RATE, 0.95, 1e-3, eps_in_sqrt=False, momentum=0.9, learning_rate_in_momentum=False),
        lambda T, p: T.RMSprop(p, RATE, alpha=0.95, eps=1e-3, momentum=0.9),
    ),
    "rmsprop_centered": (
        optim.rmsprop(RATE, 0.99, eps_in_sqrt=False, centered=True),
        lambda T, p: T.RMSprop(p, RATE, centered=True),
    ),
    "rmsprop_centered_momentum_decay": (
        decayed(
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
        lambda T, p: T.RMSprop(p, RATE, alpha=0.9, eps=1e-3, centered=True, momentum=0.5, weight_decay=0.1),
    ),
    "adam": (optim.adam(RATE), lambda T, p: T.Adam(p, RATE)),
    "adam_arguments": (
        decayed(0.1, optim.adam(RATE, 0.8, 0.95, 1e-4)),
        lambda T, p: T.Adam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "adamw": (optim.adamw(RATE, weight_decay=0.01), lambda T, p: T.AdamW(p, RATE)),
    "adamw_arguments": (
        optim.adamw(RATE, 0.8, 0.95, 1e-4, weight_decay=0.3),
        lambda T, p: T.AdamW(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.3),
    ),
    "nadam": (optim.nadam(RATE, momentum_decay=4e-3), lambda T, p: T.NAdam(p, RATE)),
    "nadam_arguments": (
        decayed(0.1, optim.nadam(RATE, 0.8, 0.95, 1e-4, momentum_decay=0.1)),
        lambda T, p: T.NAdam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1, momentum_decay=0.1),
    ),
    "nadam_of_optax": (optim.nadam(RATE), lambda T, p: T.NAdam(p, RATE, momentum_decay=1e6)),
    "nadamw": (
        optim.nadamw(RATE, weight_decay=0.3, momentum_decay=4e-3),
        lambda T, p: T.NAdam(p, RATE, weight_decay=0.3, decoupled_weight_decay=True),
    ),
    "radam": (optim.radam(RATE, bias_correction_eps=True), lambda T, p: T.RAdam(p, RATE)),
    "radam_arguments": (
        decayed(0.1, optim.radam(RATE, 0.8, 0.95, 1e-4, bias_correction_eps=True)),
        lambda T, p: T.RAdam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "radamw": (
        optim.chain(
            optim.scale_by_radam(bias_correction_eps=True),
            optim.add_decayed_weights(0.3),
            optim.scale_by_learning_rate(RATE),
        ),
        lambda T, p: T.RAdam(p, RATE, weight_decay=0.3, decoupled_weight_decay=True),
    ),
    "adamax": (optim.adamax(RATE), lambda T, p: T.Adamax(p, RATE)),
    "adamax_arguments": (
        decayed(0.1, optim.adamax(RATE, 0.8, 0.95, 1e-4)),
        lambda T, p: T.Adamax(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1),
    ),
    "adadelta": (optim.adadelta(), lambda T, p: T.Adadelta(p)),
    "adadelta_arguments": (
        optim.adadelta(0.5, 0.95, 1e-3, 0.1),
        lambda T, p: T.Adadelta(p, 0.5, 0.95, 1e-3, weight_decay=0.1),
    ),
    "amsgrad": (optim.amsgrad(RATE, correct_after_max=True), lambda T, p: T.Adam(p, RATE, amsgrad=True)),
    "amsgrad_arguments": (
        decayed(0.1, optim.amsgrad(RATE, 0.8, 0.95, 1e-4, correct_after_max=True)),
        lambda T, p: T.Adam(p, RATE, (0.8, 0.95), 1e-4, weight_decay=0.1, amsgrad=True),
    ),
    "amsgradw": (
        optim.chain(
            optim.scale_by_amsgrad(correct_after_max=True),
            optim.add_decayed_weights(0.3),
            optim.scale_by_learning_rate(RATE),
        ),
        lambda T, p: T.AdamW(p, RATE, weight_decay=0.3, amsgrad=True),
    ),
}


def torch_gradients(dtype: Any = np.float64, steps: int = 200) -> np.ndarray:
    """Gradients over six decades with zeros, sparse ones and some that keep their sign, (steps, 40)."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(steps, 40)) * 10.0 ** rng.uniform(-3, 3, size=(steps, 40))
    g[:, :4] = 0.0
    g[:, 4:8] *= rng.random((steps, 4)) < 0.1
    g[:, 8:12] = rng.normal(size=(steps, 4)) + 2
    return g.astype(dtype)


def measure(name: str) -> Distance:
    """Both go their own way in float64, PyTorch's scalars as well."""
    import torch

    ours, theirs = TORCH[name]
    start = {"w": np.random.default_rng(1).normal(size=40)}
    before = torch.get_default_dtype()
    # PyTorch keeps NAdam's product of momenta in its default dtype, float32 beside float64 parameters.
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            return compare_steps(
                of_transformation(ours, trajectory=True),
                of_torch_optimizer(partial(theirs, torch.optim)),
                jax.tree.map(jnp.asarray, start),
                [{"w": jnp.asarray(g)} for g in torch_gradients()],
            )
    finally:
        torch.set_default_dtype(before)


def rows() -> Iterator[Row]:
    """Every optimizer that PyTorch has, in float64."""
    for name in TORCH:
        yield Row("optimizers", name, "torch", "float64", Bound(relative=1e-13), partial(measure, name))
