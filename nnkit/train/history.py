"""What non-finite numbers were made of: values, operations, and the search for the first of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from nnkit.train.scopes import Scope

__all__ = ["History", "Operation", "Turn", "Value", "is_bad", "nonfinite"]


class Turn(NamedTuple):
    """Which turn of a loop it was; the length is None where only the run tells it."""

    number: int
    length: int | None


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """A number or array on its way through the program.

    Attributes:
      x: the array.
      name: which of the function's arguments it is, casts and changes of shape aside.
      bad: whether it has an inf or a NaN.
      parts: what it was put together from, or cut out of, in a loop.
      made: the operation that made it, where it is bad.
      constant: whether it is a constant of the program.
      axis: the axis of the batch, where there is one.
      rows: of the batch, and of what is cut out of it or rearranged: each number's row, as an array like x.
    """

    x: Any
    name: str | None = None
    bad: bool = False
    parts: tuple[Value, ...] = ()
    made: Operation | None = None
    constant: bool = False
    axis: int | None = None
    rows: Any = None


@dataclasses.dataclass(eq=False, slots=True)
class Operation:
    """An operation that gave an inf or a NaN.

    Attributes:
      order: its number among them.
      name: the primitive's, ``log``.
      line: where it was written, ``nnkit/layers/dense.py:40``.
      scope: where it stands.
      turns: of the loops around it, the outermost first.
      inputs, outputs: what it took and gave.
      entering: what came into its layer from outside; only where no input was bad.
      equation: the same one for each turn of a loop.
      parts: the rows of the parts, by their length, into which the batch was cut.
      row: the only row that a loop over rows was at.
    """

    order: int
    name: str
    line: str
    scope: Scope
    turns: tuple[Turn, ...]
    inputs: list[Value]
    outputs: list[Value]
    entering: list[Value]
    equation: JaxprEqn
    parts: dict[int, np.ndarray]
    row: int | None

    def causes(self) -> list[Value]:
        """The bad inputs that can have made the output bad."""
        if self.name == "select_n":
            which, *cases = self.inputs
            chosen = np.asarray(which.x).astype(np.int32)
            return [v for i, v in enumerate(cases) if v.bad and np.any(nonfinite(v.x) & (chosen == i))]
        return [v for v in self.inputs if v.bad]


def nonfinite(x: Any) -> np.ndarray:
    """Where an array is inf or NaN."""
    return ~np.isfinite(np.asarray(x))


def is_bad(x: Any) -> bool:
    """Whether an array has an inf or a NaN."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return False
    if isinstance(x, jax.Array) and (not x.is_fully_addressable or x.platform() != "cpu"):
        return not bool(jnp.isfinite(x).all())  # there, not copied here
    return bool(nonfinite(x).any())


class History:
    """All that bad values were made of.

    Attributes:
      operations: the operations that made what is not finite.
      incoming: values that were not finite from the start, constants included.
    """

    def __init__(self, values: Iterable[Value]):
        self.operations: list[Operation] = []
        self.incoming: list[Value] = []
        seen: set[int] = set()
        waiting = list(values)
        while waiting:
            v = waiting.pop()
            if id(v) in seen or not v.bad:
                continue
            seen.add(id(v))
            waiting += v.parts
            if v.made is None:
                if not v.parts:
                    self.incoming.append(v)
            elif id(v.made) not in seen:
                seen.add(id(v.made))
                self.operations.append(v.made)
                waiting += v.made.causes()
        self.operations.sort(key=lambda op: op.order)

    def birth(self) -> Operation | None:
        """The first operation that made what is not finite of what is; None where there is no operation.

        Where there is none, a constant is to blame: the first that made a NaN of an inf, or the first of all.
        """
        for op in self.operations:
            if not op.causes():
                return op
        for op in self.operations:
            if any(_has_nan(v.x) for v in op.outputs) and not any(_has_nan(v.x) for v in op.causes()):
                return op
        return self.operations[0] if self.operations else None

    def first_backward(self) -> Operation | None:
        """The first operation of the backward pass that was handed a finite gradient, if there is any."""
        for op in self.operations:
            if op.scope.backward and not any(m.scope.backward for v in op.causes() for m in _makers(v)):
                return op
        return None


def _makers(value: Value) -> list[Operation]:
    if value.made is not None:
        return [value.made]
    return [op for part in value.parts if part.bad for op in _makers(part)]


def _has_nan(x: Any) -> bool:
    return bool(np.isnan(np.asarray(x)).any()) if is_bad(x) else False
