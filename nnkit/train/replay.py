"""A function run again operation by operation, remembering what each non-finite number was made of.

The function is traced to its jaxpr and evaluated equation by equation. An equation knows its layer, since
combinators run their children under ``jax.named_scope``, whether it belongs to a derivative, and the line
of code that it was written in. Functions and loops inside are evaluated whole, and entered only where they
give an inf or a NaN.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

__all__ = ["Operation", "Replay", "Scope", "Turn", "Value", "alike", "is_bad", "nonfinite"]


class Scope(NamedTuple):
    """Where in the program an operation stands.

    Attributes:
      path: the layer's, ``encoder/dense_0``; "" outside of all layers.
      backward: whether it belongs to the backward pass.
      differentiated: whether it belongs to what a gradient is taken of.
    """

    path: str
    backward: bool
    differentiated: bool


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


class _Level:
    """One jaxpr in evaluation: the values of its variables, as long as they are needed.

    A layer's inputs are kept until its last operation, so that they can be shown.
    """

    def __init__(
        self, jaxpr: Jaxpr, scope: tuple[Any, ...], outer: tuple[_Level, int] | None, wanted: Sequence[bool]
    ):
        self.jaxpr, self.outer, self.stack = jaxpr, outer, scope
        self.scope = _scope(scope)
        self.values: dict[Any, Value] = {}
        self.scopes = [_scope((*scope, *_stack(eqn))) for eqn in jaxpr.eqns]
        self.needed = [False] * len(jaxpr.eqns)
        last_of = {scope: i for i, scope in enumerate(self.scopes)}
        last: dict[Any, int] = {}
        end = len(jaxpr.eqns)
        for v, want in zip(jaxpr.outvars, wanted, strict=True):
            if want and not isinstance(v, Literal):
                last[v] = end
        for i in reversed(range(end)):
            eqn = jaxpr.eqns[i]
            if not any(v in last for v in eqn.outvars):
                continue
            self.needed[i] = True
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    last[v] = max(last.get(v, 0), last_of[self.scopes[i]])
        self.ends: dict[int, list[Any]] = {}
        for v, i in last.items():
            self.ends.setdefault(i, []).append(v)
        self.last = last

    def read(self, v: Any) -> Value:
        if isinstance(v, Literal):
            return Value(v.val, bad=is_bad(v.val), constant=True)
        return self.values[v]

    def write(self, i: int, outputs: Sequence[Value]) -> None:
        for v, value in zip(self.jaxpr.eqns[i].outvars, outputs, strict=True):
            if v in self.last:
                self.values[v] = value
        for v in self.ends.get(i, ()):
            self.values.pop(v, None)

    def entering(self, at: int, scope: Scope) -> list[Value]:
        """What came into the layer ``scope.path`` up to equation ``at``, in the order of its use."""
        level: _Level = self
        while level.scope.path == scope.path and level.outer is not None:
            level, at = level.outer
        inside = [
            eqn
            for eqn, s in zip(level.jaxpr.eqns[: at + 1], level.scopes, strict=False)
            if s.backward == scope.backward and (s.path == scope.path or s.path.startswith(scope.path + "/"))
        ]
        own = {v for eqn in inside for v in eqn.outvars}
        used = dict.fromkeys(v for eqn in inside for v in eqn.invars if not isinstance(v, Literal))
        return [level.values[v] for v in used if v not in own and v in level.values]


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"}
)
_SAME_NUMBERS = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "expand_dims",
        "reshape",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)  # fmt: skip


class Replay:
    """Evaluates a jaxpr on values, and numbers the operations that give an inf or a NaN.

    Its twin is the jaxpr for a larger batch: an axis that is longer there is the batch's.
    """

    def __init__(self) -> None:
        self._operations = 0
        self._parts: dict[int, np.ndarray] = {}

    def run(
        self, closed: ClosedJaxpr, twin: ClosedJaxpr | None, args: Sequence[Value], wanted: Sequence[bool]
    ) -> list[Value | None]:
        """The values of the outputs that are ``wanted``; None for others."""
        level = _Level(closed.jaxpr, (), None, wanted)
        return self._run(level, closed.consts, None if twin is None else twin.jaxpr, args, wanted, ())

    def _run(
        self,
        level: _Level,
        consts: Sequence[Any],
        twin: Jaxpr | None,
        args: Sequence[Value],
        wanted: Sequence[bool],
        turns: tuple[Turn, ...],
    ) -> list[Value | None]:
        jaxpr = level.jaxpr
        for v, x in zip(jaxpr.constvars, consts, strict=True):
            level.values[v] = Value(x, bad=is_bad(x), constant=True)
        level.values.update(zip(jaxpr.invars, args, strict=True))
        twins: Sequence[JaxprEqn | None] = [None] * len(jaxpr.eqns)
        if twin is not None and alike(jaxpr, twin):
            twins = twin.eqns
        for i, eqn in enumerate(jaxpr.eqns):
            if level.needed[i]:
                level.write(i, self._evaluate(level, i, eqn, twins[i], turns))
        return [level.read(v) if want else None for v, want in zip(jaxpr.outvars, wanted, strict=True)]

    def _evaluate(
        self, level: _Level, i: int, eqn: JaxprEqn, twin: JaxprEqn | None, turns: tuple[Turn, ...]
    ) -> list[Value]:
        inputs = [level.read(v) for v in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit") and any(v.rows is not None for v in inputs):
            wanted = [v in level.last for v in eqn.outvars]
            inside = self._enter(level, i, eqn, twin, inputs, [], wanted, turns) or []
            return [Value(None) if v is None else v for v in inside]
        arrays = _bind(eqn, [v.x for v in inputs])
        outputs = [Value(x, bad=is_bad(x)) for x in arrays]
        names = {v.name for v in inputs if not v.constant}
        if eqn.primitive.name in _SAME_NUMBERS and len(names) == 1:
            outputs[0].name = names.pop()
        if any(v.bad for v in outputs):
            wanted = [v in level.last for v in eqn.outvars]
            inside = self._enter(level, i, eqn, twin, inputs, outputs, wanted, turns)
            if inside is not None and any(v is not None and v.bad for v in inside):
                outputs = [out if v is None else v for v, out in zip(inside, outputs, strict=True)]
            else:
                self._record(level, i, eqn, inputs, outputs, turns)
        if twin is not None:
            for v, here, there in zip(outputs, eqn.outvars, twin.outvars, strict=True):
                v.axis = _axis(here.aval, there.aval)
        if _rearranges(eqn, inputs):
            moved = outputs[0]
            moved.rows = _bind(eqn, [v.x if v.rows is None else v.rows for v in inputs])[0]
            if moved.axis is not None:
                of_axis = np.moveaxis(np.asarray(moved.rows), moved.axis, 0).reshape(
                    moved.x.shape[moved.axis], -1
                )
                if of_axis.size and (of_axis == of_axis[:, :1]).all():
                    self._parts[len(of_axis)] = of_axis[:, 0].astype(np.int64)
        return outputs

    def _record(
        self,
        level: _Level,
        i: int,
        eqn: JaxprEqn,
        inputs: list[Value],
        outputs: list[Value],
        turns: tuple[Turn, ...],
    ) -> None:
        scope = level.scopes[i]
        op = Operation(
            self._operations,
            eqn.primitive.name,
            _line(eqn),
            scope,
            turns,
            inputs,
            outputs,
            [],
            eqn,
            dict(self._parts),
        )
        self._operations += 1
        for value in outputs:
            value.made = op
        if not any(v.made is not None or v.parts for v in op.causes()) and scope.path:
            op.entering = level.entering(i, scope)

    def _enter(
        self,
        level: _Level,
        i: int,
        eqn: JaxprEqn,
        twin: JaxprEqn | None,
        inputs: list[Value],
        outputs: list[Value],
        wanted: list[bool],
        turns: tuple[Turn, ...],
    ) -> list[Value | None] | None:
        """The outputs of a function or loop, evaluated from within; None where it cannot be entered."""
        name, params = eqn.primitive.name, eqn.params
        of_twin = {} if twin is None else twin.params

        def run(
            key: str, args: Sequence[Value], wanted: Sequence[bool], turns: Any, at: int | None = None
        ) -> Any:
            jaxpr, other = (p.get(key) if at is None else p.get(key, ())[at:][:1] for p in (params, of_twin))
            if at is not None:
                jaxpr, other = jaxpr[0], (other[0] if other else None)
            consts = getattr(jaxpr, "consts", ())
            jaxpr, other = getattr(jaxpr, "jaxpr", jaxpr), getattr(other, "jaxpr", other)
            inner = _Level(jaxpr, (*level.stack, *_stack(eqn)), (level, i), wanted)
            return self._run(inner, consts, other, args, wanted, turns)

        if name in _CALLS:
            return run("jaxpr" if "jaxpr" in params else "call_jaxpr", inputs, wanted, turns)
        if name == "cond":
            which = int(np.clip(int(inputs[0].x), 0, len(params["branches"]) - 1))
            return run("branches", inputs[1:], wanted, turns, at=which)
        if name == "scan":
            return _scan(
                eqn,
                inputs,
                outputs,
                lambda args, turn: run("jaxpr", args, _all(params["jaxpr"]), (*turns, turn)),
            )
        if name == "while":
            return _while(
                eqn,
                inputs,
                lambda args, turn: run("body_jaxpr", args, _all(params["body_jaxpr"]), (*turns, turn)),
            )
        return None


def _scan(eqn: JaxprEqn, inputs: list[Value], outputs: list[Value], turn: Any) -> list[Value]:
    params = eqn.params
    fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
    consts, carry, xs = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    stacked: list[list[Value]] = []
    for i in reversed(range(length)) if params["reverse"] else range(length):
        found = turn([*consts, *carry, *(_cut(x, i) for x in xs)], Turn(i, length))
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
    if value.parts and len(value.parts) == np.shape(value.x)[0]:
        return value.parts[i]
    x = value.x[i]
    bad = value.bad and is_bad(x)
    return Value(x, value.name, bad, parts=(value,) if bad else (), constant=value.constant)


def _while(eqn: JaxprEqn, inputs: list[Value], turn: Any) -> list[Value]:
    params = eqn.params
    a, b = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body, carry = inputs[:a], inputs[a : a + b], inputs[a + b :]
    goes_on = jax.jit(jaxpr_as_fun(params["cond_jaxpr"]))
    i = 0
    while bool(goes_on(*(v.x for v in (*of_cond, *carry)))[0]):
        carry = turn([*of_body, *carry], Turn(i, None))
        i += 1
    return list(carry)


def _axis(here: Any, there: Any) -> int | None:
    """The axis in which two shapes differ."""
    a, b = getattr(here, "shape", ()), getattr(there, "shape", ())
    grown = [i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
    return grown[0] if len(a) == len(b) and len(grown) == 1 else None


_REARRANGE = frozenset({"dynamic_slice", "gather", "rev", *_SAME_NUMBERS})


def _rearranges(eqn: JaxprEqn, inputs: list[Value]) -> bool:
    """Whether it puts the numbers of the batch in other places and does no more."""
    if eqn.primitive.name == "concatenate":
        return all(v.rows is not None for v in inputs)
    return eqn.primitive.name in _REARRANGE and bool(inputs) and inputs[0].rows is not None


def _all(closed: ClosedJaxpr) -> list[bool]:
    return [True] * len(closed.jaxpr.outvars)


def alike(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two jaxprs are the same operations, on other shapes perhaps."""
    return len(a.eqns) == len(b.eqns) and all(
        x.primitive is y.primitive and len(x.outvars) == len(y.outvars)
        for x, y in zip(a.eqns, b.eqns, strict=True)
    )


def _bind(eqn: JaxprEqn, arrays: list[Any]) -> list[Any]:
    if eqn.primitive.name.startswith("debug_"):  # a print or callback of the user's has had its turn
        return []
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*arrays, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def _stack(eqn: JaxprEqn) -> Iterator[Any]:
    return iter(eqn.source_info.name_stack.stack)


_NO_LAYER = re.compile(r"rematted_computation|checkpoint|.*->.*")  # JAX's own scopes, einsum's "ij,jk->ik"


def _scope(stack: Sequence[Any]) -> Scope:
    """Reads a name stack, ``transpose(jvp(encoder))/dense_0``.

    A derivative of a derivative has the scopes twice over: those behind the second one then begin anew.
    """
    done: list[str] = []
    names: list[str] = []
    backward = differentiated = False
    for element in stack:
        name = element.name
        if type(element).__name__ == "Transform":
            if name in ("jvp", "transpose"):
                differentiated, backward = True, backward or name == "transpose"
                done, names = _joined(done, names), []
        elif name == "rematted_computation":
            backward = False  # the forward pass, computed again in the backward one
        elif not _NO_LAYER.fullmatch(name):
            names += name.split("/")
    return Scope("/".join(_joined(done, names)), backward, differentiated)


def _joined(done: list[str], names: list[str]) -> list[str]:
    return names if names[: len(done)] == done else [*done, *names]


_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_NNKIT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep


def _line(eqn: JaxprEqn) -> str:
    """The innermost line of code outside of JAX, without the machine's path to it."""
    traceback = eqn.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        file = frame.file_name
        if file.startswith((_JAX, "<")) or file.endswith(("functools.py", "contextlib.py")):
            continue
        short = file.removeprefix(_NNKIT) if file.startswith(_NNKIT + "nnkit") else os.path.basename(file)
        return f"{short}:{frame.line_num}"
    return ""
