"""Activations beside ``jax.nn`` and PyTorch: values and slopes on a grid, 0 among its points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import activations
from nnkit.testing.equivalent import Distance
from nnkit.testing.table.functions import compare_functions, of_jax, of_torch
from nnkit.testing.table.row import Bound, Row

__all__ = ["TABLE", "rows"]

GRID = np.append(np.linspace(-12, 12, 481), [-50, -20.5, 20.5, 50]).reshape(-1, 5)

# Ours and PyTorch's; jax.nn has ours under the same name. leaky_relu has jax.nn's slope of 1 at 0, where
# PyTorch has 0.01, and is asked at no 0.
TABLE: dict[str, tuple[Callable[..., Any], Callable[[Any], Callable[..., Any]]]] = {
    "relu": (activations.relu, lambda F: F.relu),
    "relu6": (activations.relu6, lambda F: F.relu6),
    "leaky_relu": (activations.leaky_relu, lambda F: lambda x: F.leaky_relu(x, 0.01)),
    "elu": (activations.elu, lambda F: F.elu),
    "selu": (activations.selu, lambda F: F.selu),
    "sigmoid": (activations.sigmoid, lambda F: lambda x: x.sigmoid()),
    "hard_sigmoid": (activations.hard_sigmoid, lambda F: F.hardsigmoid),
    "tanh": (activations.tanh, lambda F: lambda x: x.tanh()),
    "softplus": (activations.softplus, lambda F: lambda x: F.softplus(x, threshold=700)),
    "silu": (activations.silu, lambda F: F.silu),
    "gelu": (activations.gelu, lambda F: lambda x: F.gelu(x, approximate="tanh")),
    "softmax": (activations.softmax, lambda F: lambda x: F.softmax(x, -1)),
    "log_softmax": (activations.log_softmax, lambda F: lambda x: F.log_softmax(x, -1)),
}

# PyTorch's slope of hardsigmoid is a float32 1/6 in float64 too; its slope of GELU's tanh form subtracts numbers
# of the size of x².
LOOSE = {"hard_sigmoid": {"float64": 1e-6}, "gelu": {"float32": 1e-5, "float64": 1e-13}}


def rows() -> Iterator[Row]:
    """Every activation; ``jax.nn`` has the same bits but for rounding, PyTorch's exp and tanh are others."""
    for name in TABLE:
        for dtype in (jnp.float32, jnp.float64):
            kind = jnp.dtype(dtype).name
            tight = 1e-6 if dtype == jnp.float32 else 1e-14
            if hasattr(jax.nn, name) or name == "tanh":
                yield Row("activations", name, "jax", kind, Bound(relative=tight), partial(_jax, name, dtype))
            loose = LOOSE.get(name, {}).get(kind, tight)
            yield Row("activations", name, "torch", kind, Bound(relative=loose), partial(_torch, name, dtype))


def _jax(name: str, dtype: Any) -> Distance:
    theirs = jnp.tanh if name == "tanh" else getattr(jax.nn, name)
    return compare_functions(of_jax(TABLE[name][0]), of_jax(theirs), lambda: (GRID,), dtype)


def _torch(name: str, dtype: Any) -> Distance:
    import torch

    ours, theirs = TABLE[name]
    grid = GRID if name != "leaky_relu" else np.where(GRID == 0, 0.5, GRID)
    return compare_functions(of_jax(ours), of_torch(theirs(torch.nn.functional)), lambda: (grid,), dtype)
