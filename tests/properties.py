"""What the tests of single layers share; what every layer promises is in nnkit.testing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from nnkit import tree
from nnkit.types import Layer


def made(layer: Layer, x: Any, seed: int = 0) -> tuple[Any, Any]:
    """Parameters and state that are no special case: zeros and ones are moved off their values."""
    params, state = layer.init(jax.random.key(seed), x)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), max(len(leaves), 1))
    moved = [p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(structure, moved), state


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    left, right = tree.flatten(a), tree.flatten(b)
    assert left.keys() == right.keys(), (list(left), list(right))
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_allclose(left[path], right[path], rtol=rtol, atol=atol, err_msg=path)
