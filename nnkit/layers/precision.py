"""Mixed precision: the dtypes of parameters, of the computation and of the output apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnkit import tree
from nnkit.checks import LayerError
from nnkit.layers.children import Window, check_child
from nnkit.types import Array, Layer, Params, PyTree, Spec, State

__all__ = ["policy", "with_dtype"]


def policy(
    layer: Layer,
    *,
    param_dtype: Any = None,
    compute_dtype: Any = None,
    output_dtype: Any = None,
    keep: str | Callable[[str], bool] | None = None,
) -> Layer:
    """The layer with its parameters in one dtype, its computation in another, its output in a third.

    ``init`` makes the parameters in ``param_dtype``. ``apply`` casts them and the input to
    ``compute_dtype`` and the output to ``output_dtype``. Gradients come out in ``param_dtype``, since they
    go back through the cast. Only real floating-point arrays are cast: integers (token ids), bools, complex
    numbers and keys stay. State (running statistics) is never cast: it keeps the dtypes that the layer
    gives it, float32 at least in normalisation, which also computes in float32.

    The usual choice is float32, bfloat16, float32. In float16 small gradients become 0 and large ones inf;
    :func:`nnkit.optim.dynamic_loss_scale` prevents both, which bfloat16 does not need. What
    :func:`observe` shows inside is in ``compute_dtype``, the parameters there in ``param_dtype``.

    Args:
      layer: any layer or model. A policy inside another gets parameters that the outer one has rounded,
        unless ``keep`` names them.
      param_dtype: of the parameters; None for what the layer makes, the input's dtype as a rule.
      compute_dtype: of parameters and input inside; None for no cast.
      output_dtype: of the output; None for the input's, or where that has no floating-point arrays for
        whatever comes out.
      keep: parameters that are not cast, by a regular expression of their whole path or a predicate of it:
        those that layers widen themselves, scales and biases of normalisations, ``"norm_.*"``, and those of a
        layer with a dtype of its own, whose ``with_dtype`` inside takes them unrounded. Kernels and biases
        elsewhere are of the operands' dtype: for these, ``keep="head/.*"`` and ``head=with_dtype(...)``.

    Raises:
      TypeError: for a dtype that is not real and floating-point; the error of a layer that is handed a kept
        parameter in another dtype than its input's gets a note that says so.

    Source: Micikevicius et al. 2018, "Mixed precision training"; jmp's ``Policy``.

    >>> half = layers.policy(
    ...     layers.dense(3), param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, output_dtype=jnp.float32
    ... )
    >>> params, state = half.init(jax.random.key(0), jnp.zeros((1, 4), jnp.bfloat16))
    >>> y, _ = half.apply(params, state, jnp.ones((2, 4), jnp.bfloat16), train=True)
    >>> str(params["kernel"].dtype), str(y.dtype)
    ('float32', 'float32')
    """
    check_child("policy", layer)
    param_dtype = _real(param_dtype, "param_dtype")
    compute_dtype = _real(compute_dtype, "compute_dtype")
    output_dtype = _real(output_dtype, "output_dtype")

    def cast_params(params: Params, dtype: Any) -> Params:
        if keep is None:
            return _cast(params, dtype)
        kept = tree.mask(params, keep)
        return jax.tree.map(lambda k, p: p if k else _cast(p, dtype), kept, params)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params, state = layer.init(key, _cast(x, param_dtype))
        if compute_dtype != param_dtype:
            # What a layer keeps in the dtype of its input must fit the input that it will get.
            _, like = jax.eval_shape(layer.init, key, _cast(x, compute_dtype))
            state = _like(state, like)
        return cast_params(params, param_dtype), state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        window = Window(lambda params, x: layer.apply(params, state, x, key=key, train=train))
        inside = cast_params(params, compute_dtype), _cast(x, compute_dtype)
        try:
            (y, new_state), seen = window.run(window.added, *inside)
        except (TypeError, ValueError) as error:
            kept = _of_another_dtype(inside[0], compute_dtype)
            if kept and not isinstance(error, LayerError):
                error.add_note(
                    f"policy(keep=...) keeps {kept[0]} out of {compute_dtype}, the dtype of its layer's input: keep "
                    "scales and biases of normalisations only, or give the layer with_dtype(layer, dtype)"
                )
            raise
        window.tell(seen, params, new_state)
        return _cast(y, output_dtype or _dtype(x)), _like(new_state, state)

    return layer._replace(init=init, apply=apply)


def with_dtype(layer: Layer, dtype: Any) -> Layer:
    """The layer in a dtype of its own: parameters and computation; the output is as the input again.

    A part that needs more digits than the rest: ``with_dtype(head, jnp.float32)`` in a bfloat16 network.

    >>> head = layers.with_dtype(layers.dense(3), jnp.float32)
    >>> params, state = head.init(jax.random.key(0), jnp.zeros((1, 4), jnp.bfloat16))
    >>> y, _ = head.apply(params, state, jnp.ones((2, 4), jnp.bfloat16), train=True)
    >>> str(params["kernel"].dtype), str(y.dtype)
    ('float32', 'bfloat16')
    """
    dtype = _real(dtype, "dtype", "with_dtype")
    return policy(layer, param_dtype=dtype, compute_dtype=dtype)


def _real(dtype: Any, name: str, owner: str = "policy") -> Any:
    if dtype is None:
        return None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{owner}({name}=...) must be a real floating-point dtype, got {jnp.dtype(dtype)}")
    return jnp.dtype(dtype)


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _cast(part: PyTree, dtype: Any) -> PyTree:
    """Arrays and specs in ``dtype`` where they are real; None casts nothing."""
    if dtype is None:
        return part

    def leaf(a: Any) -> Any:
        if not _is_real(a):
            return a
        return (
            jax.ShapeDtypeStruct(a.shape, dtype) if isinstance(a, jax.ShapeDtypeStruct) else a.astype(dtype)
        )

    return jax.tree.map(leaf, part)


def _of_another_dtype(params: Params, dtype: Any) -> list[str]:
    """The paths of the real parameters that are not in the dtype; without one, of none."""
    if dtype is None:
        return []
    return [path for path, leaf in tree.flatten(params).items() if _is_real(leaf) and leaf.dtype != dtype]


def _dtype(x: Any) -> Any:
    """The dtype of the real arrays of the input, or None where there is none or are several."""
    dtypes = {a.dtype for a in jax.tree.leaves(x) if _is_real(a)}
    return dtypes.pop() if len(dtypes) == 1 else None


def _like(state: State, old: State) -> State:
    """The state in the dtypes that it had, so that it keeps its form from call to call."""
    if jax.tree.structure(state) != jax.tree.structure(old):
        return state
    return jax.tree.map(lambda new, old: new.astype(old.dtype) if _is_real(new) else new, state, old)
