"""Arrays of other libraries as numpy's and JAX's, every bit kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["to_jax", "to_numpy", "to_torch_tensor"]


def to_numpy(name: str, value: Any) -> np.ndarray:
    """An array of numpy, JAX or PyTorch, or a variable of Flax's that holds one, as numpy's, not copied."""
    if hasattr(value, "unbox"):  # Flax's arrays with the names of mesh axes
        value = value.unbox()
    if hasattr(value, "get_value"):  # a variable of nnx
        value = value.get_value()
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has none of its own, so torch refuses
            import torch

            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name!r} is a {type(value).__name__}, not an array")
    return np.asarray(value)


def to_jax(name: str, array: np.ndarray) -> jax.Array:
    """A copy on the default device, of the same dtype or an error."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{name!r} is {array.dtype}, which JAX would cut to 32 bits now: call "
            "jax.config.update('jax_enable_x64', True) first, or convert it to 32 bits"
        )
    return jnp.array(array)


def to_torch_tensor(array: np.ndarray) -> Any:
    """A PyTorch tensor with memory of its own."""
    import torch

    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
