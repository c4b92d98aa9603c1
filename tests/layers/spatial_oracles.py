"""Layers on images beside Flax and PyTorch: forward, input gradient and parameter gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from nnkit.types import Layer

BOUNDS = {"float32": 1e-5, "float64": 1e-10}


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def with_gradients(functions: list[Callable[[Any, Any], Any]], params: Any, x: Any) -> list[dict[str, Any]]:
    """For each function its output and the gradients of Σ sin(output), in one compilation."""

    def run(f: Callable[[Any, Any], Any], params: Any, x: Any) -> dict[str, Any]:
        y, back = jax.vjp(f, params, x)
        dparams, dx = back(jnp.cos(y))
        return {"y": y, "dx": dx, **{f"d{name}": d for name, d in _flat(dparams).items()}}

    return jax.jit(lambda params, x: [run(f, params, x) for f in functions])(params, x)


def torch_with_gradients(f: Callable[[Any, Any], Any], params: Any, x: Any) -> dict[str, Any]:
    """The same of a PyTorch function of channels-first images, whose parameters are nnkit's."""
    leaves = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in _flat(params).items()}
    given = torch.tensor(np.asarray(x), requires_grad=True)
    y = f(leaves, given.movedim(-1, 1)).movedim(1, -1)
    y.sin().sum().backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "dx": given.grad, **grads}


def check_equal(ours: dict[str, Any], theirs: dict[str, Any], dtype: str) -> None:
    """Every entry within the bound, relative to the largest number in it."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got, expected = np.asarray(ours[name]), np.asarray(expected)
        assert (got.shape, got.dtype) == (expected.shape, np.dtype(dtype)), (name, got.shape, expected.shape)
        size = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_array_less(np.abs(got - expected) / size, BOUNDS[dtype], err_msg=name)


def check_layer(
    layer: Layer,
    x: np.ndarray,
    *,
    in_jax: Callable[[Any, Any], Any] | None = None,
    in_torch: Callable[[Any, Any], Any] | None = None,
) -> None:
    """``layer`` against functions ``f(params, x) -> y``, in float32 and float64."""
    for dtype in BOUNDS:
        with jax.enable_x64(dtype == "float64"):
            given = jnp.asarray(x, dtype)
            shapes, state = jax.eval_shape(layer.init, jax.random.key(0), given)
            params = jax.tree.map(lambda p: jnp.asarray(data(*p.shape), p.dtype), shapes)

            def ours(params: Any, x: Any, state: Any = state) -> Any:
                return layer.apply(params, state, x, train=True)[0]

            functions = [ours] if in_jax is None else [ours, in_jax]
            found, *theirs = with_gradients(functions, params, given)
            if in_torch is not None:
                theirs.append(torch_with_gradients(in_torch, params, given))
            for expected in theirs:
                check_equal(found, expected, dtype)


def _flat(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}
