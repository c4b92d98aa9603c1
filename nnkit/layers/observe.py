"""Looking into a network: every layer's output by path, and the table of its layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from nnkit import tree
from nnkit.layers.children import Visit, inferring, visiting
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["Row", "observe", "rows", "summary"]


def observe(
    model: Layer, params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
) -> tuple[Any, State, dict[str, Any]]:
    """``model.apply``, and beside its results the output of every layer inside by path.

    Pure: it may be jitted, mapped and differentiated. Layers made of layers are there too; a
    path that is called twice keeps its last output.

    >>> model = layers.serial(layers.dense(3), layers.relu)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> y, state, outputs = layers.observe(model, params, state, jnp.ones((5, 2)), train=False)
    >>> {path: output.shape for path, output in outputs.items()}
    {'dense_0': (5, 3), 'relu_0': (5, 3)}
    """
    outputs: dict[str, Any] = {}

    def visit(call: Visit) -> None:
        outputs[call.path] = call.y

    with visiting(visit):
        y, state = model.apply(params, state, x, key=key, train=train)
    return y, state, outputs


class Row(NamedTuple):
    """One line of :func:`summary`."""

    path: str
    layer: str
    output: str
    params: int
    state: int
    bytes: int


def rows(model: Layer, x: Spec) -> list[Row]:
    """The innermost layers of ``model`` for input like ``x``, in the order in which they run.

    A layer made of layers has a row where it has parameters or state beside theirs.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(model.init, key, x)
    visits: list[Visit] = []

    def run(params: Params, state: State, x: Any, key: Array) -> Any:
        with visiting(visits.append):
            y, _ = model.apply(params, state, x, key=key, train=False)
        visits.append(Visit("", model, x, y, params, state))
        return y

    with inferring():
        jax.eval_shape(run, params, state, x, key)
    found: dict[str, Row] = {}
    for v in visits:
        found.setdefault(v.path, _row(v))
    inside: dict[str, list[Row]] = {}
    for path, row in found.items():
        if path:
            inside.setdefault(path.rpartition("/")[0], []).append(row)
    own = {path: _own(row, inside.get(path, [])) for path, row in found.items()}
    return [row for path, row in own.items() if path not in inside or row.params or row.state]


def _own(row: Row, inside: list[Row]) -> Row:
    """The row without what the rows inside it count."""
    less = {name: sum(getattr(r, name) for r in inside) for name in ("params", "state", "bytes")}
    return row._replace(**{name: getattr(row, name) - n for name, n in less.items()})


def _row(v: Visit) -> Row:
    kind = v.layer.name.rstrip("_")
    size = tree.nbytes(v.params) + tree.nbytes(v.state)
    return Row(v.path or kind, kind, _shape(v.y), tree.count(v.params), tree.count(v.state), size)


def _shape(y: Any) -> str:
    shapes = [str(leaf.shape).replace(" ", "") for leaf in jax.tree.leaves(y)]
    return shapes[0] if len(shapes) == 1 else " ".join(shapes)


def summary(model: Layer, x: Spec) -> str:
    """A table of the layers of ``model`` for input like ``x``; nothing is computed.

    Args:
      model: any layer.
      x: an array or ``jax.ShapeDtypeStruct`` with its batch axis.

    >>> model = layers.serial(layers.dense(3), layers.batch_norm(), layers.relu)
    >>> print(layers.summary(model, jnp.zeros((1, 2))))
    path          layer       output  params  state  bytes
    ------------  ----------  ------  ------  -----  -----
    dense_0       dense       (1,3)        9      0     36
    batch_norm_0  batch_norm  (1,3)        6      6     48
    relu_0        relu        (1,3)        0      0      0
    ------------  ----------  ------  ------  -----  -----
    total                                 15      6     84
    """
    body = rows(model, x)
    sums = (sum(r.params for r in body), sum(r.state for r in body), sum(r.bytes for r in body))
    total = Row("total", "", "", *sums)
    lines = [[f if isinstance(f, str) else f"{f:,}" for f in row] for row in (*body, total)]
    heads = list(Row._fields)
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    rule = "  ".join("-" * w for w in widths)

    def show(line: list[str]) -> str:
        cells = [
            f.ljust(w) if i < 3 else f.rjust(w) for i, (f, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([show(heads), rule, *(show(line) for line in lines[:-1]), rule, show(lines[-1])])
