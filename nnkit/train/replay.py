"""A function run again operation by operation, remembering what each non-finite number was made of.

The function is traced to its jaxpr and evaluated equation by equation. An equation knows its layer, since
combinators run their children under ``jax.named_scope``, whether it belongs to a derivative, and the line
of code that it was written in. Functions and loops inside are evaluated whole, and entered only where they
give an inf or a NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

from nnkit.train.elements import SAME_NUMBERS
from nnkit.train.history import Operation, Turn, Value, is_bad
from nnkit.train.levels import Level
from nnkit.train.scopes import line_of, stack_of

__all__ = ["Replay", "alike"]


# fmt: off
_CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint",
})
# fmt: on
_REARRANGE = SAME_NUMBERS | {"dynamic_slice", "gather", "rev"}


class _At(NamedTuple):
    """An equation in evaluation; ``twin`` is the same one for a larger batch."""

    level: Level
    i: int
    twin: JaxprEqn | None
    turns: tuple[Turn, ...]

    @property
    def eqn(self) -> JaxprEqn:
        return self.level.jaxpr.eqns[self.i]

    @property
    def wanted(self) -> list[bool]:
        return [v in self.level.last for v in self.eqn.outvars]


class Replay:
    """Evaluates a jaxpr on values, and numbers the operations that give an inf or a NaN.

    Its twin is the jaxpr for a larger batch: an axis that is longer there is the batch's.
    """

    def __init__(self) -> None:
        self._operations = 0
        self._parts: dict[int, np.ndarray] = {}
        self._row: int | None = None

    def run(
        self, closed: ClosedJaxpr, twin: ClosedJaxpr | None, args: Sequence[Value], wanted: Sequence[bool]
    ) -> list[Value]:
        """The values of the outputs; empty ones where they are not ``wanted``."""
        level = Level(closed.jaxpr, (), None, wanted)
        return self._run(level, closed.consts, None if twin is None else twin.jaxpr, args, wanted, ())

    def _run(
        self,
        level: Level,
        consts: Sequence[Any],
        twin: Jaxpr | None,
        args: Sequence[Value],
        wanted: Sequence[bool],
        turns: tuple[Turn, ...],
    ) -> list[Value]:
        jaxpr = level.jaxpr
        for v, x in zip(jaxpr.constvars, consts, strict=True):
            level.values[v] = Value(x, bad=is_bad(x), constant=True)
        level.values.update(zip(jaxpr.invars, args, strict=True))
        twins: Sequence[JaxprEqn | None] = [None] * len(jaxpr.eqns)
        if twin is not None and alike(jaxpr, twin):
            twins = twin.eqns
        for i in range(len(jaxpr.eqns)):
            if level.needed[i]:
                level.write(i, self._evaluate(_At(level, i, twins[i], turns)))
        return [level.read(v) if want else Value(None) for v, want in zip(jaxpr.outvars, wanted, strict=True)]

    def _evaluate(self, at: _At) -> list[Value]:
        eqn, inputs = at.eqn, [at.level.read(v) for v in at.eqn.invars]
        if eqn.primitive.name in ("jit", "pjit") and any(v.rows is not None for v in inputs):
            return self._enter(at, inputs, []) or []  # not evaluated whole: where the rows go is to be seen
        outputs = [Value(x, bad=is_bad(x)) for x in _bind(eqn, [v.x for v in inputs])]
        names = {v.name for v in inputs if not v.constant}
        if eqn.primitive.name in SAME_NUMBERS and len(names) == 1:
            outputs[0].name = names.pop()
        if any(v.bad for v in outputs):
            inside = self._enter(at, inputs, outputs)
            if inside is not None and any(v.bad for v in inside):
                outputs = inside
            else:
                self._record(at, inputs, outputs)
        if at.twin is not None:
            for v, here, there in zip(outputs, eqn.outvars, at.twin.outvars, strict=True):
                v.axis = _axis(here.aval, there.aval)
        if _rearranges(eqn, inputs):
            outputs[0].rows = _bind(eqn, [v.x if v.rows is None else v.rows for v in inputs])[0]
            self._note_part(outputs[0])
        return outputs

    def _note_part(self, value: Value) -> None:
        """Remembers which rows a part of the batch has, for what is computed of it."""
        if value.axis is None:
            return
        rows = np.moveaxis(np.asarray(value.rows), value.axis, 0)
        rows = rows.reshape(len(rows), -1)
        if rows.size and (rows == rows[:, :1]).all():
            self._parts[len(rows)] = rows[:, 0].astype(np.int64)

    def _record(self, at: _At, inputs: list[Value], outputs: list[Value]) -> None:
        scope = at.level.scopes[at.i]
        op = Operation(
            order=self._operations,
            name=at.eqn.primitive.name,
            line=_line(at.level, at.i),
            scope=scope,
            turns=at.turns,
            inputs=inputs,
            outputs=outputs,
            entering=[],
            equation=at.eqn,
            parts=dict(self._parts),
            row=self._row,
        )
        self._operations += 1
        for value in outputs:
            value.made = op
        if scope.path and not any(v.made is not None or v.parts for v in inputs if v.bad):
            op.entering = at.level.entering(at.i, scope)

    def _enter(self, at: _At, inputs: list[Value], outputs: list[Value]) -> list[Value] | None:
        """The outputs of a function or loop, evaluated from within; None where it cannot be entered."""
        name, params = at.eqn.primitive.name, at.eqn.params
        twin = {} if at.twin is None else at.twin.params

        def run(jaxpr: Any, twin: Any, args: Sequence[Value], *turn: Turn) -> list[Value]:
            consts = getattr(jaxpr, "consts", ())
            jaxpr, twin = getattr(jaxpr, "jaxpr", jaxpr), getattr(twin, "jaxpr", twin)
            wanted = [True] * len(jaxpr.outvars) if turn else at.wanted
            inner = Level(jaxpr, (*at.level.stack, *stack_of(at.eqn)), (at.level, at.i), wanted)
            before, self._row = self._row, _only_row(args, self._row) if turn else self._row
            try:
                return self._run(inner, consts, twin, args, wanted, (*at.turns, *turn))
            finally:
                self._row = before

        if name in _CALLS:
            key = "jaxpr" if "jaxpr" in params else "call_jaxpr"
            return run(params[key], twin.get(key), inputs)
        if name == "cond":
            branches = params["branches"]
            which = int(np.clip(int(inputs[0].x), 0, len(branches) - 1))
            return run(branches[which], twin["branches"][which] if twin else None, inputs[1:])
        if name == "scan":
            body, other = params["jaxpr"], twin.get("jaxpr")
            return _scan(at.eqn, inputs, outputs, lambda args, turn: run(body, other, args, turn))
        if name == "while":
            body, other = params["body_jaxpr"], twin.get("body_jaxpr")
            return _while(at.eqn, inputs, lambda args, turn: run(body, other, args, turn))
        return None


def _line(level: Level, i: int) -> str:
    """Where an equation was written, or the call around it: jitted functions of JAX's own have no line."""
    line = line_of(level.jaxpr.eqns[i])
    return _line(*level.outer) if not line and level.outer is not None else line


_Body = Callable[[Sequence[Value], Turn], list[Value]]


def _scan(eqn: JaxprEqn, inputs: list[Value], outputs: list[Value], body: _Body) -> list[Value]:
    params = eqn.params
    fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
    consts, carry, xs = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    stacked: list[list[Value]] = []
    for i in reversed(range(length)) if params["reverse"] else range(length):
        found = body([*consts, *carry, *(_cut(x, i) for x in xs)], Turn(i, length))
        carry = found[:carried]
        stacked.append(found[carried:])
    if params["reverse"]:
        stacked.reverse()
    whole = outputs[carried:]
    for k, value in enumerate(whole):
        value.parts = tuple(turn[k] for turn in stacked)
        value.bad = any(part.bad for part in value.parts)
    return [*carry, *whole]


def _cut(value: Value, i: int) -> Value:
    """What turn ``i`` is given of a value, the one that an earlier loop put there if there was one."""
    if len(value.parts) == len(value.x) and np.shape(value.parts[i].x) == np.shape(value.x)[1:]:
        return value.parts[i]
    x, rows = value.x[i], None if value.rows is None else value.rows[i]
    bad = value.bad and is_bad(x)
    parts = (value,) if bad else ()
    return Value(x, value.name, bad, parts=parts, constant=value.constant, rows=rows)


def _while(eqn: JaxprEqn, inputs: list[Value], body: _Body) -> list[Value]:
    params = eqn.params
    a, b = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body, carry = inputs[:a], inputs[a : a + b], inputs[a + b :]
    goes_on = jax.jit(jaxpr_as_fun(params["cond_jaxpr"]))
    i = 0
    while bool(goes_on(*(v.x for v in (*of_cond, *carry)))[0]):
        carry = body([*of_body, *carry], Turn(i, None))
        i += 1
    return list(carry)


def _only_row(args: Sequence[Value], otherwise: int | None) -> int | None:
    """The row of the batch that a turn is given, where it is given one."""
    for v in args:
        if v.rows is not None and np.size(v.rows) and np.ptp(np.asarray(v.rows, np.float64)) == 0:
            return int(np.asarray(v.rows).flat[0])
    return otherwise


def _axis(here: Any, there: Any) -> int | None:
    """The axis in which two shapes differ."""
    a, b = getattr(here, "shape", ()), getattr(there, "shape", ())
    grown = [i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
    return grown[0] if len(a) == len(b) and len(grown) == 1 else None


def _rearranges(eqn: JaxprEqn, inputs: list[Value]) -> bool:
    """Whether it puts the numbers of the batch in other places and does no more."""
    if eqn.primitive.name == "concatenate":
        return all(v.rows is not None for v in inputs)
    return eqn.primitive.name in _REARRANGE and bool(inputs) and inputs[0].rows is not None


def alike(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two jaxprs are the same operations, on other shapes perhaps."""
    return len(a.eqns) == len(b.eqns) and all(
        x.primitive is y.primitive and len(x.outvars) == len(y.outvars)
        for x, y in zip(a.eqns, b.eqns, strict=True)
    )


def _bind(eqn: JaxprEqn, arrays: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*arrays, **params)
    return list(found) if eqn.primitive.multiple_results else [found]
