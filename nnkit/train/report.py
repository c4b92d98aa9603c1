"""What is said of the first inf or NaN of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nnkit.train.history import Turn

__all__ = ["Report", "Statistics"]


class Statistics(NamedTuple):
    """An array in numbers; min to std are of its finite entries, NaN where there are none.

    >>> print(Statistics.of(jnp.array([1.0, 3.0, jnp.inf])))
    float32(3,) min 1 max 3 mean 2 std 1, 0 nan, 1 inf
    """

    shape: tuple[int, ...]
    dtype: str
    min: float
    max: float
    mean: float
    std: float
    nan: int
    inf: int

    @classmethod
    def of(cls, x: Any) -> Statistics:
        """The statistics of an array; of a complex one those of its magnitudes."""
        x = np.asarray(x)
        dtype, shape = x.dtype.name, x.shape
        x = np.abs(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
        x = x.astype(np.float64)
        finite = x[np.isfinite(x)]
        low, high, mean, std = (
            float(f(finite)) if finite.size else np.nan for f in (np.min, np.max, np.mean, np.std)
        )
        return cls(shape, dtype, low, high, mean, std, int(np.isnan(x).sum()), int(np.isinf(x).sum()))

    def __str__(self) -> str:
        return (
            f"{self.dtype}{self.shape} min {self.min:.4g} max {self.max:.4g} mean {self.mean:.4g} "
            f"std {self.std:.4g}, {self.nan} nan, {self.inf} inf"
        )


class Report(NamedTuple):
    """What :func:`explain` found.

    Attributes:
      step: the number of the step, the first being 0.
      kind: what was wrong first. "batch", "params", "state", "opt_state": it was not finite when it came
        in, or the batch is what the trainer's check refuses, see ``problem``; "constant": so was an array
        that the program holds; "forward": a layer or the loss gave what is not finite for what is;
        "gradient": the loss is finite, a gradient is not; "update": gradients are finite, what the
        optimizer made of them is not; "finite": nothing was wrong.
      path: the layer, "" outside of all layers; the parameter of an update; the leaf of what came in.
      rows: which rows of the batch are concerned, or None where what went wrong has no batch axis, or none that can
        be told, as in many a batch of one example.
      examples: the numbers of these rows in the data, where ``rows`` was given.
      operation: the operation that did it, ``log``.
      line: where that is written, ``nnkit/layers/dense.py:40``.
      turns: of the loops around it, the outermost first.
      output: what the operation gave.
      inputs: what it was made of: what came into the layer from outside, and the operation's operands.
      params: the layer's parameters.
      leaves: the parameters that the step made inf or NaN; of "batch" and the like, the leaves that came
        in so.
      problem: what the trainer's check says against the batch, a label out of range, or "".
    """

    step: int
    kind: str
    path: str = ""
    rows: tuple[int, ...] | None = None
    examples: tuple[int, ...] | None = None
    operation: str = ""
    line: str = ""
    turns: tuple[Turn, ...] = ()
    output: Statistics | None = None
    inputs: Mapping[str, Statistics] = {}
    params: Mapping[str, Statistics] = {}
    leaves: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        lines = [f"step {self.step} (the first is 0): {self._says()}"]
        if self.problem:
            lines.append(f"  the batch: {self.problem}")
        if self.operation:
            turns = "".join(
                f", turn {t.number}{'' if t.length is None else f' of {t.length}'}" for t in self.turns
            )
            lines.append(f"  operation: {self.operation}{turns}, {self.line or 'at an unknown line'}")
        if self.rows is not None:
            examples = "" if self.examples is None else f", examples {_listed(self.examples)} of the data"
            lines.append(f"  rows of the batch: {_listed(self.rows)}{examples}")
        shown = {} if self.output is None else {"result": self.output}
        shown |= {**self.inputs, **self.params}
        width = max(map(len, shown), default=0)
        lines += [f"  {name.ljust(width)}  {numbers}" for name, numbers in shown.items()]
        if self.leaves and self.kind in ("gradient", "update"):
            lines.append(f"  parameters inf or NaN after the step: {_listed(self.leaves)}")
        return "\n".join(lines)

    def _says(self) -> str:
        made = "NaN" if self.output is not None and self.output.nan else "inf"
        layer = f"layer {self.path}" if self.path else "what is outside of all layers (loss, penalty)"
        return {
            "batch": f"the batch came in with inf or NaN in {_listed(self.leaves)}"
            if not self.problem
            else "the batch came in with what the trainer cannot take",
            "params": f"the parameters came in with inf or NaN in {_listed(self.leaves)}",
            "state": f"the layers' state came in with inf or NaN in {_listed(self.leaves)}",
            "opt_state": f"the optimizer's state came in with inf or NaN in {_listed(self.leaves)}",
            "constant": f"the forward pass of {layer} made {made} of a constant that is inf or NaN",
            "forward": f"the forward pass of {layer} made {made} of finite numbers",
            "gradient": f"the loss is finite, the gradient became {made} in {layer}",
            "update": f"loss and gradients are finite, the optimizer's update of {self.path} is not",
            "finite": "all is finite",
        }[self.kind]


def _listed(items: Sequence[Any], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
