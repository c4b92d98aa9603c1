"""Penalties on parameters: ``penalty(params) -> scalar``, to be added to the loss.

They go by path, never by a parameter's number of axes, so they are the same inside a ``vmap`` over
a stacked population. Biases, scales and slopes are left alone unless a mask says otherwise.
Running statistics are not parameters and never come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nnkit import checks, tree
from nnkit.types import PyTree

__all__ = ["Penalty", "combine", "l1", "l2"]

Penalty: TypeAlias = Callable[[PyTree], Array]
Mask: TypeAlias = PyTree | str | Callable[[PyTree], PyTree]


def l1(strength: float | Float[Array, ""], mask: Mask | None = None) -> Penalty:
    """strength * sum of |w| over the masked parameters; Keras's ``L1``. The slope at 0 is 0.

    Args and errors: as :func:`l2`.

    >>> params = {"dense_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([5.0, 5.0])}}
    >>> print(l1(0.5)(params))
    1.5
    """
    # jnp.abs has slope 1 at 0, where l1 is meant to hold a parameter.
    return _penalty("l1", strength, mask, lambda w: w * jax.lax.stop_gradient(jnp.sign(w)))


def l2(strength: float | Float[Array, ""], mask: Mask | None = None) -> Penalty:
    """strength * sum of w² over the masked parameters: the squared Frobenius norm, Keras's ``L2``.

    Its gradient is 2 strength w. The ``weight_decay`` of PyTorch's SGD and of optax's
    ``add_decayed_weights`` adds weight_decay w to the gradient, the penalty ½ weight_decay sum w²:
    ``l2(weight_decay / 2)`` is the same under SGD. Under Adam no penalty equals the decoupled decay
    of AdamW, because a penalty's gradient is rescaled with the rest.

    Args:
      strength: at least 0; may be traced.
      mask: which parameters: a tree of bools like the parameters, a function that makes one of
        them, or a regular expression that must match the whole path (``".*/kernel"``). By default
        :func:`nnkit.tree.decayed`, all but biases, scales and slopes.

    Returns:
      ``penalty(params)``, at least float32. Its errors come while tracing: a mask that selects
      nothing or is not shaped like the parameters (ValueError), parameters that are not floating
      (TypeError).

    Raises:
      ValueError: a strength that is negative or not finite.

    >>> params = {"dense_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([5.0, 5.0])}}
    >>> print(l2(0.1)(params), l2(0.1, mask=".*")(params))
    0.5 5.5
    >>> print(jax.grad(l2(0.1))(params)["dense_0"]["kernel"])
    [[ 0.2 -0.4]]
    """
    return _penalty("l2", strength, mask, jnp.square)


def combine(*penalties: Penalty) -> Penalty:
    """The sum of penalties; of ``l1`` and ``l2`` the elastic net (Zou & Hastie, 2005).

    >>> print(combine(l1(1.0), l2(2.0))({"kernel": jnp.array([3.0])}))
    21.0
    """
    if not penalties:
        raise ValueError("combine got no penalties: pass at least one, combine(l1(1e-4), l2(1e-4))")
    return lambda params: jax.tree.reduce(jnp.add, [penalty(params) for penalty in penalties])


def _penalty(name: str, strength: Any, mask: Mask | None, of: Callable[[Array], Array]) -> Penalty:
    if checks.is_static_number(strength) and not 0 <= strength < np.inf:
        raise ValueError(f"{name} got strength={strength}: it must be at least 0 and finite")

    def penalty(params: PyTree) -> Array:
        selected = _select(name, params, mask)
        # Summed in at least float32: 11 bits of float16 stop counting at 2048 numbers of size 1.
        wide = [x.astype(jnp.float32) if x.dtype.itemsize < 4 else x for x in selected.values()]
        dtype = max((x.dtype for x in wide), key=lambda dtype: dtype.itemsize)
        total = sum(jnp.sum(of(x.astype(dtype))) for x in wide)
        return jnp.asarray(strength).astype(dtype) * total

    return penalty


def _select(name: str, params: PyTree, mask: Mask | None) -> dict[str, Array]:
    """The masked parameters by path."""
    leaves = tree.flatten(params)
    if mask is None:
        bools = tree.decayed(params)
    elif isinstance(mask, str):
        bools = tree.mask(params, mask)
    else:
        bools = mask(params) if callable(mask) else mask
    chosen = tree.flatten(bools)
    if jax.tree.structure(bools) != jax.tree.structure(params):
        odd = sorted(leaves.keys() ^ chosen.keys())
        raise ValueError(
            f"{name}: the mask must be a tree of bools shaped like the parameters"
            + (f"; only one of them has {odd[0]}" if odd else "")
        )
    for path, choice in chosen.items():
        if not isinstance(choice, bool | np.bool_):
            raise TypeError(f"{name}: the mask at {path} must be True or False, got {type(choice).__name__}")
    selected = {path: jnp.asarray(leaves[path]) for path, choice in chosen.items() if choice}
    if not selected:
        raise ValueError(
            f"{name}: the mask selects none of {', '.join(leaves) or 'no parameters'}: "
            'name them by a regular expression on the whole path, mask=".*/kernel"'
        )
    for path, leaf in selected.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{name}: parameter {path} is {leaf.dtype}, a penalty needs floating numbers")
    return selected
