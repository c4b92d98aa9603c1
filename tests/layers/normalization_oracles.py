"""How a normalisation is compared with Flax's and PyTorch's: the output, and the gradients of all arguments."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DTYPES = tuple(TOLERANCE)


def precision(dtype: str) -> Any:
    """The context in which JAX has this dtype."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def draw(shape: tuple[int, ...], seed: int = 0, mean: float = 1.0, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, shape)


def close(got: Any, want: Any, dtype: str) -> None:
    """Relative to each array's largest entry, since an entry near 0 is a difference of such as that one."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        b = np.asarray(b)
        assert str(a.dtype) == dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(
            a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(b).max(initial=0)
        )


def value_and_gradients(f: Any, params: Any, x: Any) -> Any:
    """f(params, x), and the gradients of a weighted sum of it by params and by x."""

    @jax.jit
    def run(params: Any, x: Any, weights: Any) -> Any:
        y, back = jax.vjp(f, params, x)
        return y, *back(weights)

    shape = jax.eval_shape(f, params, x).shape
    return run(params, x, jnp.asarray(draw(shape, 99), x.dtype))


def torch_value_and_gradients(f: Any, params: dict[str, np.ndarray], x: np.ndarray) -> Any:
    """The same of a function of tensors."""
    tensors = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()}
    tx = torch.tensor(np.asarray(x), requires_grad=True)
    y = f(tensors, tx)
    y.backward(torch.tensor(draw(tuple(y.shape), 99), dtype=y.dtype))
    grads = {name: t.grad.numpy() for name, t in tensors.items()}
    return y.detach().numpy(), grads, tx.grad.numpy()


def affine(shape: tuple[int, ...], dtype: str) -> dict[str, jax.Array]:
    """A scale and a bias that are no special case."""
    return {"scale": jnp.asarray(draw(shape, 7), dtype), "bias": jnp.asarray(draw(shape, 8), dtype)}


def flax_apply(module: Any, variables: Any, *args: Any, **options: Any) -> Any:
    """Flax's own dtypes meet only under standard promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return module.apply(variables, *args, **options)
