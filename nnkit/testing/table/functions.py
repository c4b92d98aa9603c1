"""Plain functions beside others on the same arrays: values and gradients, in one call of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.adapters import weights_like
from nnkit.testing.equivalent import Distance, Steps, compare_steps

__all__ = ["compare_functions", "of_jax", "of_torch"]


def of_jax(f: Callable[..., Any], wrt: Sequence[int] = (0,)) -> Steps:
    """Values and gradients of a JAX function with respect to the arguments ``wrt``."""

    def run(*arguments: Any) -> Any:
        def total(*arguments: Any) -> Any:
            y = f(*arguments)
            return jnp.sum(y * jnp.asarray(weights_like(y), y.dtype)), y

        gradient, y = jax.grad(total, tuple(wrt), has_aux=True)(*arguments)
        return {"y": y, "gradient": list(gradient)}

    compiled = jax.jit(run)

    def step(carry: Any, arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return carry, compiled(*arguments)

    return Steps(lambda start: start, step)


def of_torch(f: Callable[..., Any], wrt: Sequence[int] = (0,)) -> Steps:
    """The same of a function of torch tensors."""

    def step(carry: Any, arguments: Any) -> Any:
        import torch

        tensors = [torch.tensor(np.array(a)) for a in arguments]
        for i in wrt:
            tensors[i].requires_grad_(True)
        y = f(*tensors)
        total = (y * torch.tensor(weights_like(y), dtype=y.dtype)).sum()
        gradient = torch.autograd.grad(total, [tensors[i] for i in wrt])
        return carry, {"y": y.detach().numpy(), "gradient": [g.numpy() for g in gradient]}

    return Steps(lambda start: start, step)


def compare_functions(
    ours: Steps, theirs: Steps, arguments: Callable[[], tuple[Any, ...]], dtype: Any
) -> Distance:
    """One call of each on the arguments, whose floating ones are cast."""
    with jax.enable_x64(dtype == jnp.float64):
        cast = tuple(
            jnp.asarray(a, dtype if np.issubdtype(np.asarray(a).dtype, np.floating) else np.int32)
            for a in arguments()
        )
        return compare_steps(ours, theirs, None, [cast])
