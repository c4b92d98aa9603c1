"""Which elements of an operation's operands made elements of its result inf or NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

__all__ = ["SAME_NUMBERS", "blamed", "nonfinite"]

# fmt: off
SAME_NUMBERS = frozenset({
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "slice", "squeeze", "transpose",
})
_MOVE = (SAME_NUMBERS | {"rev"}) - {"convert_element_type", "copy"}
_EACH_ALONE = frozenset({
    "abs", "add", "add_any", "convert_element_type", "copy", "cos", "div", "exp", "exp2", "expm1", "integer_pow",
    "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt", "sin", "sqrt", "square", "sub", "tanh",
})
_REDUCE = frozenset({"reduce_max", "reduce_min", "reduce_prod", "reduce_sum"})
_CHOOSE = frozenset({"max", "min", "reduce_max", "reduce_min"})
# fmt: on


def nonfinite(x: Any) -> np.ndarray:
    """Where an array is inf or NaN."""
    return ~np.isfinite(np.asarray(x))


def blamed(eqn: JaxprEqn, inputs: Sequence[Any], outputs: Sequence[Any], wanted: Any) -> list[np.ndarray]:
    """Where each input made elements of the outputs inf or NaN, as masks like the inputs.

    Args:
      eqn: the operation.
      inputs, outputs: its arrays.
      wanted: for each output which of its elements are asked after, as a mask.

    An element that is NaN is made so by the NaNs that it is of, and by an inf only where there is none. Of
    operations that are not known here all inputs' elements that are inf or NaN are taken.
    """
    name = eqn.primitive.name
    bad = [_bad(x) for x in inputs]
    if name == "select_n":
        chosen = np.asarray(inputs[0]).astype(np.int32)
        return [bad[0], *(b & (chosen == i) & wanted[0] for i, b in enumerate(bad[1:]))]
    if name in _EACH_ALONE:
        return _of_each(name, inputs, bad, outputs[0], wanted[0])
    if name in _REDUCE:
        axes = eqn.params["axes"]
        any_nan = np.asarray(_nan(inputs[0]).any(axes, keepdims=True))
        out, want = (np.expand_dims(np.asarray(a), axes) for a in (outputs[0], wanted[0]))
        return [_responsible(name, inputs[0], bad[0] & want, out, any_nan)]
    if name in _MOVE and len(inputs) == 1:
        places = np.arange(np.size(inputs[0]), dtype=np.int32).reshape(np.shape(inputs[0]))
        params = eqn.primitive.get_bind_params(eqn.params)
        moved = np.asarray(eqn.primitive.bind(jnp.asarray(places), **params))
        found = np.zeros(places.size, bool)
        found[moved[wanted[0]]] = True
        return [bad[0] & found.reshape(places.shape)]
    return bad


def _of_each(
    name: str, inputs: Sequence[Any], bad: list[np.ndarray], out: Any, want: Any
) -> list[np.ndarray]:
    any_nan = np.zeros(np.shape(out), bool)
    for x in inputs:
        any_nan |= _nan(x)
    found = []
    for x, b in zip(inputs, bad, strict=True):
        here = _responsible(name, x, b & want, np.asarray(out), any_nan)
        found.append(here if here.shape == b.shape else np.asarray(here.any()))  # a scalar, for each element
    return found


def _responsible(name: str, x: Any, bad: np.ndarray, out: np.ndarray, any_nan: np.ndarray) -> np.ndarray:
    here = bad & (_nan(x) | ~any_nan)
    return here & (_nan(x) | (np.asarray(x) == out)) if name in _CHOOSE else here


def _bad(x: Any) -> np.ndarray:
    return nonfinite(x) if _may_be(x) else np.zeros(np.shape(x), bool)


def _nan(x: Any) -> np.ndarray:
    return np.isnan(np.asarray(x)) if _may_be(x) else np.zeros(np.shape(x), bool)


def _may_be(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
