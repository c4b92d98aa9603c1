"""What non-finite numbers were made of: values, operations, and the search for the first of them."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from nnkit.train.elements import SAME_NUMBERS, blamed, nonfinite
from nnkit.train.scopes import Scope

__all__ = ["History", "Operation", "Turn", "Value", "is_bad"]


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

    def causes(self, wanted: Iterable[np.ndarray]) -> list[tuple[Value, np.ndarray]]:
        """The inputs that made the ``wanted`` elements of the outputs bad, and which elements of them did."""
        if not any(v.bad for v in self.inputs):
            return []
        masks = blamed(self.equation, [v.x for v in self.inputs], [v.x for v in self.outputs], list(wanted))
        return [(v, mask) for v, mask in zip(self.inputs, masks, strict=True) if v.bad and mask.any()]

    def rows(self, wanted: Iterable[np.ndarray]) -> tuple[int, frozenset[int]] | None:
        """How long the batch's axis is, and where along it elements are wanted; None where there is none."""
        for v, mask in zip(self.outputs, wanted, strict=True):
            if v.axis is not None and mask.any():
                return mask.shape[v.axis], frozenset(np.nonzero(mask)[v.axis].tolist())
        return None


def is_bad(x: Any) -> bool:
    """Whether an array has an inf or a NaN."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return False
    if isinstance(x, jax.Array) and (not x.is_fully_addressable or x.platform() != "cpu"):
        return not bool(jnp.isfinite(x).all())  # there, not copied here
    return bool(nonfinite(x).any())


class History:
    """All that bad values were made of, element by element as far as the operations are known.

    Attributes:
      operations: the operations that made what is not finite.
      incoming: values that were not finite from the start, constants included.
    """

    def __init__(self, values: Iterable[Value]):
        self.operations: list[Operation] = []
        self.incoming: list[Value] = []
        self._wanted: dict[int, np.ndarray] = {}
        self._causes: dict[int, list[tuple[Value, np.ndarray]]] = {}
        self._waiting: list[tuple[int, Operation]] = []  # the last one first: all that is made of it is known
        for v in values:
            self._want(v, None)
        while self._waiting:
            op = heapq.heappop(self._waiting)[1]
            self.operations.append(op)
            self._causes[id(op)] = op.causes(self._wanted_of(op))
            for v, mask in self._causes[id(op)]:
                self._want(v, mask)
        self.operations.reverse()

    def _want(self, v: Value, mask: np.ndarray | None) -> None:
        """Follows the elements of a value that are bad and in the mask."""
        if not v.bad:
            return
        mask = _bad_in(v.x) if mask is None else mask
        before = self._wanted.get(id(v))
        if before is not None and not (mask & ~before).any():
            return
        self._wanted[id(v)] = mask if before is None else mask | before
        stacked = mask.ndim > 0 and [np.shape(p.x) for p in v.parts] == [mask.shape[1:]] * len(mask)
        for i, part in enumerate(v.parts):
            if not stacked or mask[i].any():
                self._want(part, mask[i] if stacked else None)
        if v.made is not None:
            if id(v.made) not in self._causes:
                self._causes[id(v.made)] = []
                heapq.heappush(self._waiting, (-v.made.order, v.made))
        elif not v.parts and before is None:
            self.incoming.append(v)

    def _wanted_of(self, op: Operation) -> list[np.ndarray]:
        return [self._wanted.get(id(v), np.zeros(np.shape(v.x), bool)) for v in op.outputs]

    def causes(self, op: Operation) -> list[Value]:
        """The bad inputs that made bad what is asked after."""
        return [v for v, _ in self._causes.get(id(op), [])]

    def birth(self) -> Operation | None:
        """The first operation that made what is not finite of what is; None where there is no operation.

        Of several that whose rows are those in which a NaN first arose: a mask of -inf is harmless until
        what it is added to is +inf. Where there is none, a constant is to blame: the first that made a NaN
        of an inf, or else the first that made it part of the batch, or the first of all.
        """
        births = [op for op in self.operations if not self.causes(op)]
        made_nan = next((op for op in self.operations if self._makes_nan(op)), None)
        if births:
            rows = None if made_nan is None else made_nan.rows([_nan_in(v.x) for v in made_nan.outputs])
            same = [op for op in births if rows and op.rows([_bad_in(v.x) for v in op.outputs]) == rows]
            return (same or births)[0]
        in_batch = (
            op for op in self.operations if op.name not in SAME_NUMBERS and op.rows(self._wanted_of(op))
        )
        return made_nan or next(in_batch, None) or next(iter(self.operations), None)

    def _makes_nan(self, op: Operation) -> bool:
        return any(_nan_in(v.x).any() for v in op.outputs) and not any(
            _nan_in(v.x).any() for v in self.causes(op)
        )

    def first_backward(self) -> Operation | None:
        """The first operation of the backward pass that was handed a finite gradient, if there is any."""
        for op in self.operations:
            if op.scope.backward and not any(m.scope.backward for v in self.causes(op) for m in _makers(v)):
                return op
        return None


def _makers(value: Value) -> list[Operation]:
    if value.made is not None:
        return [value.made]
    return [op for part in value.parts if part.bad for op in _makers(part)]


def _bad_in(x: Any) -> np.ndarray:
    return nonfinite(x) if is_bad(x) else np.zeros(np.shape(x), bool)


def _nan_in(x: Any) -> np.ndarray:
    return np.isnan(np.asarray(x)) if is_bad(x) else np.zeros(np.shape(x), bool)
