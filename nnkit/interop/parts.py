"""What a model consists of: its layers that hold arrays, in the order in which they run.

A layer is a pair of functions and says nothing of its structure. So the model is traced on a spec, which
costs no arithmetic: the parameter tree says which layers hold arrays, the trace in which order they run and
on inputs of which shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nnkit.interop.flattening import Layout, Layouts, Shape, factory
from nnkit.layers.children import Visit, visiting
from nnkit.packing import unpack
from nnkit.tree import flatten
from nnkit.types import Layer, Params, Spec, State

__all__ = ["Part", "leaf_of", "parts"]

_Leaves = dict[str, tuple[bool, Shape]]


class Part(NamedTuple):
    """One layer that holds arrays.

    Attributes:
      path: where it stands, ``encoder/dense_0``; of a repeated block, with its number behind the name.
      names: the same without numbers: where its arrays are in the trees.
      turn: which repetition it is, of each ``repeat`` around it.
      kind: ``dense``, ``conv``, ``conv_transpose``, ``batch_norm``, ``norm``, ``embedding``, ``prelu``,
        ``attention``, ``lstm``, ``gru``, ``rnn``, ``cache`` for a state of ours alone, or ``other`` for a
        layer of the user's.
      shapes: of its parameters and state by their names within it, ``query/kernel``.
      state: which of these are state.
      layout: what PyTorch's counterpart of its input looks like.
      layer: the layer, where the trace has seen it.
      x: its input.
      y: its output.
    """

    path: str
    names: tuple[str, ...]
    turn: tuple[int, ...]
    kind: str
    shapes: dict[str, Shape]
    state: frozenset[str]
    layout: Layout
    layer: Layer | None
    x: Any
    y: Any

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"{self.path!r} ({self.kind}: {shapes})"


def parts(model: Layer, x: Spec, flattened: Mapping[str, Sequence[int] | None] | None = None) -> list[Part]:
    """The layers of ``model`` that hold arrays, for input like ``x``, in the order of their first calls.

    Args:
      model: any layer.
      x: an array or ``jax.ShapeDtypeStruct`` with its batch axis.
      flattened: see :func:`nnkit.interop.from_torch`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    trees = jax.eval_shape(model.init, key, x)
    units = dict(_units((), unpack(trees[0]), unpack(trees[1])))
    visits = _visits(model, trees, x, key, train=False)
    if any(_not_called(names, visits) for names in units):
        visits += _visits(model, trees, x, key, train=True)
    first = _first_calls(visits)
    seen = {visit.path: visit for visit in reversed(visits)}
    layouts = Layouts(visits, flattened or {})
    found = []
    for place, (names, leaves) in enumerate(units.items()):
        repeats = [i for i in range(len(names)) if (v := seen.get(_path(names[:i]))) and _is_repeat(v.layer)]
        visit = seen.get(_path(names))
        lengths = next(iter(leaves.values()))[1][: len(repeats)]
        for index in itertools.product(*map(range, lengths)):
            order = [n for i, k in zip(repeats, index, strict=True) for n in (_call(names[:i], first), k)]
            part = _part(names, leaves, repeats, index, visit, layouts)
            found.append(((*order, _call(names, first), place), part))
    layouts.check_all_used()
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]


def leaf_of(tree: Any, names: Sequence[str]) -> Any:
    """What is in a nested dict at a path, or None."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _units(names: tuple[str, ...], *nodes: Any) -> Iterator[tuple[tuple[str, ...], _Leaves]]:
    """The innermost dicts that are one layer, and the leaves in each: whether state, and their shapes."""
    children = {k: None for node in nodes if isinstance(node, Mapping) for k in node}
    below = {k: [leaf_of(node, (k,)) for node in nodes] for k in children}
    own = any(_is_array(child) for pair in below.values() for child in pair)
    if own or {"query", "key", "value", "out"} <= below.keys():
        leaves = [(bool(i), flatten(node or {})) for i, node in enumerate(nodes)]
        found = {k: (in_state, a.shape) for in_state, flat in leaves for k, a in flat.items()}
        yield names, {k: v for k, v in found.items() if not k.startswith("probe/")}
        return
    for k, pair in below.items():
        if not (k == "probe" and pair[0] is None):  # what layers.probe records is ours alone
            yield from _units((*names, k), *pair)


def _is_array(node: Any) -> bool:
    """Whether it is an array, or of a normalised kernel what stands in its place."""
    return node is not None and (not isinstance(node, Mapping) or {*node} == {"direction", "scale"})


def _visits(model: Layer, trees: tuple[Any, Any], x: Spec, key: Any, *, train: bool) -> list[Visit]:
    visits: list[Visit] = []

    def run(params: Params, state: State, x: Any, key: Any) -> Any:
        with visiting(visits.append):
            y, _ = model.apply(params, state, x, key=key, train=train)
        visits.append(Visit("", model, x, y, params, state))
        return y

    jax.eval_shape(run, *trees, x, key)
    return visits


def _path(names: Sequence[str]) -> str:
    return "/".join(names)


def _first_calls(visits: list[Visit]) -> dict[str, int]:
    """By path, when it or anything in it was first called."""
    first: dict[str, int] = {}
    for i, visit in enumerate(visits):
        names = visit.path.split("/") if visit.path else []
        for depth in range(len(names) + 1):
            first.setdefault(_path(names[:depth]), i)
    return first


def _call(names: Sequence[str], first: Mapping[str, int]) -> int:
    """When it was first called, or the nearest layer around it that was seen."""
    return next(first[p] for i in range(len(names), -1, -1) if (p := _path(names[:i])) in first)


def _not_called(names: tuple[str, ...], visits: list[Visit]) -> bool:
    """Whether a combinator that calls others has not called this one (it does in training, then)."""
    first = _first_calls(visits)
    depth = next(i for i in range(len(names), -1, -1) if _path(names[:i]) in first)
    around = _path((*names[:depth], ""))
    return depth < len(names) and any(path.startswith(around) and path for path in first)


def _is_repeat(layer: Layer) -> bool:
    return factory(layer) == "repeat"


def _part(
    names: tuple[str, ...],
    leaves: _Leaves,
    repeats: list[int],
    index: tuple[int, ...],
    visit: Visit | None,
    layouts: Layouts,
) -> Part:
    shown = list(names)
    for i, k in reversed(list(zip(repeats, index, strict=True))):
        shown.insert(i + 1, str(k))
    path = _path(shown)
    shapes = {name: shape[len(index) :] for name, (_, shape) in leaves.items()}
    layer, x, y, layout = None, None, None, Layout()
    if visit is not None:
        layer, layout = visit.layer, layouts.of(visit, path)
        x, y = (
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[len(index) :], a.dtype), array)
            for array in (visit.x, visit.y)
        )
    state = frozenset(name for name, (in_state, _) in leaves.items() if in_state)
    return Part(path, names, index, _kind(shapes, layer), shapes, state, layout, layer, x, y)


_CACHE = {"index", "cached_key", "cached_value"}
"""State of decoding, which starts anew in every library."""
_CONVOLUTIONS = {"conv", "conv_layer", "depthwise_conv", "patch_embed"}


def _kind(shapes: dict[str, Shape], layer: Layer | None) -> str:
    """What the layer is, by its arrays; where these do not tell, by the function that made it."""
    made_by = "" if layer is None else factory(layer)
    leaves = shapes.keys() - _CACHE
    kernel = shapes.get("kernel", shapes.get("kernel/direction"))
    if not leaves:
        return "cache"
    if "query/kernel" in shapes:
        return "attention"
    if {"kernel", "recurrent_kernel"} <= leaves:
        gates = shapes["kernel"][-1] // shapes["recurrent_kernel"][0]
        return {1: "rnn", 3: "gru", 4: "lstm"}.get(gates, "other")
    if {"mean", "var"} <= leaves <= {"mean", "var", "scale", "bias"}:
        return "batch_norm"
    if kernel is not None and leaves <= _OF_A_KERNEL:
        if len(kernel) == 2:
            return "dense"
        return (
            "conv_transpose"
            if made_by == "conv_transpose"
            else "conv"
            if made_by in _CONVOLUTIONS
            else "other"
        )
    if leaves <= {"scale", "bias"}:
        return "norm"
    return "embedding" if leaves == {"embedding"} else "prelu" if leaves == {"slope"} else "other"


_OF_A_KERNEL = {
    "kernel", "bias", "kernel/direction", "kernel/scale", "spectral_norm/kernel/u", "spectral_norm/kernel/v",
}  # fmt: skip
