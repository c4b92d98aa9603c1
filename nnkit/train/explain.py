"""``explain``: where in a training step the first inf or NaN arose, and what it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import tree
from nnkit.train.elements import nonfinite
from nnkit.train.history import History, Operation, Value, is_bad
from nnkit.train.refused import refused, refused_rows
from nnkit.train.replay import Replay, alike
from nnkit.train.report import Report, Statistics
from nnkit.types import PyTree, Trainer, TrainState

__all__ = ["explain"]


def explain(trainer: Trainer, ts: TrainState, batch: Any, *, rows: Any = None) -> Report:
    """Takes one step from ``ts`` on ``batch``, operation by operation, and says where an inf or NaN arose.

    What is looked for is what the loss or, where that is finite, the new parameters were made of: an inf
    that a mask or a ``where`` puts away again is none. The first operation that gave what is not finite
    for what is names layer, line and rows. Nothing need be prepared: any trainer, any layers, any code.

    The step is run as it is, uncompiled, which takes from a part of a second to a few, and half a minute
    the first time for a deep network; memory is that of a step without fusion. A number close to the
    largest may be inf compiled and finite here, or the reverse: the report then says ``finite``.

    Args:
      trainer: whose ``step`` is taken.
      ts: the state before the step; it stays usable.
      batch: the step's batch.
      rows: for each row of the batch its number in the data, (batch,), which the report then tells.

    Raises:
      TypeError, ValueError: for a ts that is no TrainState, rows that are not as many as the batch's.

    >>> model = layers.serial(layers.dense(2), log=layers.stateless(jnp.log))
    >>> trainer = train.trainer(model, losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 1)))
    >>> report = train.explain(trainer, ts, (jnp.array([[0.0], [1.0]]), jnp.ones((2, 2))))
    >>> report.step, report.kind, report.path, report.operation
    (0, 'forward', 'log', 'log')
    """
    if not isinstance(ts, TrainState):
        raise TypeError(f"explain takes the TrainState before the step and got {type(ts).__name__}")
    batch = jax.tree.map(jnp.asarray, batch)
    size = _batch_size(batch)
    rows = None if rows is None else np.asarray(rows)
    if rows is not None and rows.shape != (size,):
        raise ValueError(
            f"explain(rows=...) takes one number for each row of the batch, of shape ({size},), and got {rows.shape}"
        )
    run = _Step(trainer, ts, batch, size)
    report = run.report()
    if report.kind in ("constant", "forward", "gradient"):
        report = _checked(report, trainer, ts, batch, size)
    if rows is None or report.rows is None:
        return report
    return report._replace(examples=tuple(int(rows[i]) for i in report.rows))


def _batch_size(batch: PyTree) -> int | None:
    lengths = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(batch)}
    return lengths.pop() if len(lengths) == 1 else None


def _checked(report: Report, trainer: Trainer, ts: TrainState, batch: Any, size: int | None) -> Report:
    """The report with what the trainer has against the batch, which is to blame where a constant would be.

    A loss gives NaN, a constant, for a label that is none; that cannot be an error in compiled code.
    """
    if not (problem := refused(trainer, ts, batch)) or report.kind != "constant":
        return report._replace(problem=problem)
    return Report(report.step, "batch", "batch", refused_rows(trainer, ts, batch, size), problem=problem)


_LARGER = range(2, 9)
"""How many times as large a batch may be for the trace that tells which axis is the batch's."""


class _Step:
    """A traced step, and what its outputs are called."""

    def __init__(self, trainer: Trainer, ts: TrainState, batch: PyTree, size: int | None):
        self.ts, self.batch, self.size = ts, batch, size
        self.jaxpr, out = jax.make_jaxpr(trainer.step, return_shape=True)(ts, batch)
        self.twin = self._larger(trainer)
        self.outputs = _names(*out, last="metrics")

    def _larger(self, trainer: Trainer) -> Any:
        """The same program for a larger batch; one in parts of unequal size needs a certain size for that."""
        if self.size is None:
            return None
        for factor in _LARGER:
            n = factor * self.size
            batch = jax.tree.map(lambda x, n=n: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), self.batch)
            try:
                twin = jax.make_jaxpr(trainer.step)(self.ts, batch)
            except (TypeError, ValueError):
                return None  # a step for this batch size alone
            if alike(self.jaxpr.jaxpr, twin.jaxpr):
                return twin
        return None

    def run(self, wanted: Iterable[str]) -> dict[str, Value]:
        """The outputs of the given names that are not finite."""
        wanted = set(wanted)
        args = [
            Value(x, name, is_bad(x), rows=self._rows_of(name, x)) for name, x in _named(self.ts, self.batch)
        ]
        which = [name in wanted for name in self.outputs]
        values = Replay().run(self.jaxpr, self.twin, args, which)
        return {name: v for name, v in zip(self.outputs, values, strict=True) if v.bad}

    def _rows_of(self, name: str, x: Any) -> Any:
        """Each number's row in an array like ``x``, of the batch; None where its dtype has not so many numbers."""
        if self.size is None or not name.startswith("batch/") or _largest_count(x.dtype) < self.size:
            return None
        return jnp.broadcast_to(
            jnp.arange(self.size).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), x.shape
        )

    def report(self) -> Report:
        bad = self.run(["metrics/loss"])  # what is not needed for it is not computed
        if bad:
            return self._forward(bad.values(), ())
        bad = self.run(self.outputs)
        before = {name for name, x in _named(self.ts, self.batch) if is_bad(x)}
        params = [name for name in bad if name.startswith("params/")]
        if params:
            return self._backward([bad[name] for name in params], tuple(map(_path, params)))
        others = [
            name for part in ("state/", "opt_state/", "metrics/") for name in bad if name.startswith(part)
        ]
        # What an optimizer remembers may be inf and mean it: the best loss so far.
        others = [name for name in others if name not in before or name.startswith("state/")]
        if not others:
            return Report(int(self.ts.step), "finite")
        if others[0].startswith("opt_state/"):
            return self._update([bad[others[0]]], (others[0],))
        return self._forward([bad[others[0]]], ())

    def _forward(self, values: Iterable[Value], leaves: tuple[str, ...]) -> Report:
        history = History(values)
        return self._came_in(history) or self._made("forward", history, leaves)

    def _backward(self, values: Iterable[Value], leaves: tuple[str, ...]) -> Report:
        history = History(values)
        if (came_in := self._came_in(history)) is not None:
            return came_in
        first = history.first_backward()
        if first is None:
            return self._update(values, leaves)
        return self._made("gradient", history, leaves, at=first)

    def _update(self, values: Iterable[Value], leaves: tuple[str, ...]) -> Report:
        history = History(values)
        report = self._came_in(history) or self._made("update", history, leaves)
        return report._replace(path=leaves[0]) if report.kind == "update" else report

    def _came_in(self, history: History) -> Report | None:
        for part in ("batch", "params", "state", "opt_state"):
            found = [v for v in history.incoming if v.name and v.name.startswith(f"{part}/")]
            if not found:
                continue
            leaves = [str(v.name) for v in found]
            rows = None
            if part == "batch":
                rows = tuple(sorted({int(i) for v in found for i in _positions(v.x, 0)}))
            if part == "opt_state":  # a packed one is read as the tree that it is
                whole = tree.flatten(self.ts.opt_state)
                leaves = [f"opt_state/{path}" for path, x in whole.items() if is_bad(x)]
            leaves = [leaf if part in ("batch", "opt_state") else _path(leaf) for leaf in leaves]
            inputs = {str(v.name): Statistics.of(v.x) for v in found[:8]}
            step = int(self.ts.step)
            return Report(step, part, leaves[0], rows, inputs=inputs, leaves=tuple(leaves))
        return None

    def _made(
        self, kind: str, history: History, leaves: tuple[str, ...], at: Operation | None = None
    ) -> Report:
        """The report on the first operation, and on the layer of ``at``, where the gradient went wrong by it."""
        before = history if at is None else History(at.outputs)
        op = before.birth()
        if op is None:
            return Report(int(self.ts.step), "constant", leaves=leaves)
        at = at or op
        path = _place(op, at.scope.path)
        causes = bool(before.causes(op))
        if kind == "forward" and causes:
            kind = "constant"
        births = [
            o
            for o in history.operations
            if o is op or (_same_code(o, op) and bool(history.causes(o)) == causes)
        ]
        inputs: dict[str, Statistics] = {}
        shown = [("input", v) for v in op.entering] + [("operand", v) for v in op.inputs]
        if at is not op:
            shown = [("gradient", v) for v in at.entering] + shown
        seen: set[int] = set()
        for what, v in shown:
            if id(v) in seen or not _has_numbers(v.x) or (v.name or "").startswith("params/"):
                continue
            seen.add(id(v))
            inputs[_unused(v.name or what, inputs)] = Statistics.of(v.x)
        own = {
            name: Statistics.of(x)
            for name, x in tree.flatten(self.ts.params).items()
            if path and name.startswith(f"{path}/")
        }
        bad = next(v for v in op.outputs if v.bad)
        return Report(
            step=int(self.ts.step),
            kind=kind,
            path=path,
            rows=self._rows(births),
            operation=op.name,
            line=op.line,
            turns=op.turns,
            output=Statistics.of(bad.x),
            inputs=inputs,
            params=own,
            leaves=leaves,
        )

    def _rows(self, births: Iterable[Operation]) -> tuple[int, ...] | None:
        found: set[int] = set()
        for op in births:
            for v in op.outputs:
                if v.bad and v.axis is None and op.row is not None:
                    found.add(op.row)
                if not v.bad or v.axis is None:
                    continue
                length = v.x.shape[v.axis]
                if length == self.size:
                    rows = np.arange(length)
                elif length in op.parts:
                    rows = op.parts[length]  # a micro-batch
                else:
                    return None
                found |= {int(rows[i]) for i in _positions(v.x, v.axis)}
        return tuple(sorted(found)) or None


def _largest_count(dtype: Any) -> int:
    """How far whole numbers are exact in a dtype."""
    if jnp.issubdtype(dtype, jnp.floating):
        return 2 ** (jnp.finfo(dtype).nmant + 1)
    return int(jnp.iinfo(dtype).max) if jnp.issubdtype(dtype, jnp.integer) else 0


def _same_code(a: Operation, b: Operation) -> bool:
    """Whether two operations are one of the program's, in another turn or another part of the batch."""
    return a.equation is b.equation or (a.name, a.line, a.scope) == (b.name, b.line, b.scope)


def _place(op: Operation, path: str) -> str:
    """The operation's layer, or that of the parameter that it casts before the layer runs."""
    if op.name == "convert_element_type" and (name := op.inputs[0].name or "").startswith("params/"):
        owner = _path(name).rpartition("/")[0]
        return owner if f"{owner}/".startswith(f"{path}/" if path else "") else path
    return path


def _positions(x: Any, axis: int) -> np.ndarray:
    """Where along an axis an array is inf or NaN anywhere."""
    return np.unique(np.nonzero(nonfinite(x))[axis])


def _has_numbers(x: Any) -> bool:
    dtype = jnp.result_type(x)
    return np.size(x) > 0 and any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    return next(n for n in (name, *(f"{name} {i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _named(ts: TrainState, batch: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves((ts, batch))
    return list(zip(_names(ts, batch, last="batch"), leaves, strict=True))


def _names(ts: TrainState, other: PyTree, *, last: str) -> list[str]:
    """``params/dense_0/kernel``, ..., ``batch/0``, ... for the leaves of both."""
    parts = [*ts._asdict().items(), (last, other)]
    paths = [(name, path) for name, part in parts for path, _ in jax.tree_util.tree_leaves_with_path(part)]
    return [f"{name}/{tree.path_str(path)}" for name, path in paths]


def _path(name: str) -> str:
    """``dense_0/kernel`` of ``params/dense_0/kernel``."""
    return name.partition("/")[2]
