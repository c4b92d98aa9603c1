"""Arrays of another library into our two trees, and ours out of them, by the pairs that were found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnkit.interop.arrays import to_jax, to_numpy
from nnkit.interop.dialect import Match
from nnkit.interop.parts import leaf_of
from nnkit.packing import unpack
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["read_all", "write_all"]

_At = tuple[bool, tuple[str, ...]]  # whether in the state, and the path


def read_all(
    model: Layer, x: Spec, pairs: Sequence[Match], theirs: Mapping[str, Any], key: Array
) -> tuple[Params, State]:
    """The trees of ``model`` with their arrays; what they have not is as ``init`` makes it."""
    read: dict[_At, dict[tuple[int, ...], np.ndarray]] = defaultdict(dict)
    for part, _, form, keys in pairs:
        arrays = form.read({name: to_numpy(k, theirs[k]) for name, k in keys.items()})
        for leaf, array in arrays.items():
            read[leaf in part.state, (*part.names, *leaf.split("/"))][part.turn] = array
    shapes = [unpack(tree) for tree in jax.eval_shape(model.init, key, x)]
    all_leaves = {(bool(i), names): a.shape for i, tree in enumerate(shapes) for names, a in _leaves(tree)}
    whole = {at for at, shape in all_leaves.items() if _is_whole(read.get(at, {}), shape)}
    made = _made(model, x, key, [at for at in all_leaves if at not in whole])
    trees: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for at in all_leaves:
        in_state, names = at
        node = trees[in_state]
        for name in names[:-1]:
            node = node.setdefault(name, {})
        path = "/".join(names)
        node[names[-1]] = made[at] if at not in read else to_jax(path, _stacked(read[at], made.get(at)))
    return trees


def write_all(
    model: Layer, x: Spec, pairs: Sequence[Match], params: Params, state: State
) -> dict[str, np.ndarray]:
    """Their arrays, by their full names.

    Raises:
      ValueError: an array is missing, of another shape than the model's, or none of the model's.
    """
    trees, written = (unpack(params), unpack(state)), {}
    for part, _, form, keys in pairs:
        ours = {}
        for leaf in form.leaves:
            names = (*part.names, *leaf.split("/"))
            what, path = "state" if leaf in part.state else "params", "/".join(names)
            value = leaf_of(trees[leaf in part.state], names)
            if value is None:
                raise ValueError(f"{what} have no {path!r}: pass what this model's init made")
            array = to_numpy(path, value)
            if array.shape[len(part.turn) :] != part.shapes[leaf]:
                raise ValueError(
                    f"{path!r} has shape {array.shape} and the model needs {part.shapes[leaf]}"
                    + (", behind an axis for the repetitions" if part.turn else "")
                )
            ours[leaf] = array[part.turn]
        written |= {keys[name]: array for name, array in form.write(ours).items()}
    _check_no_more(model, x, trees)
    return written


def _check_no_more(model: Layer, x: Spec, trees: tuple[Any, Any]) -> None:
    made = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), x)
    for what, ours, wanted in zip(("params", "state"), trees, map(unpack, made), strict=True):
        known = {names for names, _ in _leaves(wanted)}
        extra = [repr("/".join(names)) for names, _ in _leaves(ours) if names not in known]
        if extra:
            more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
            raise ValueError(
                f"{what} have {', '.join(extra[:5])}{more}, which this model has not: pass what its init made"
            )


def _leaves(tree: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield names, tree
        return
    for name, child in tree.items():
        yield from _leaves(child, (*names, name))


def _is_whole(pieces: Mapping[tuple[int, ...], np.ndarray], shape: tuple[int, ...]) -> bool:
    depth = len(next(iter(pieces), ()))
    return bool(pieces) and len(pieces) == int(np.prod(shape[:depth], dtype=int))


def _made(model: Layer, x: Spec, key: Array, wanted: Sequence[_At]) -> dict[_At, Any]:
    """What ``init`` makes at some places; the rest of it is not computed."""
    if not wanted:
        return {}
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)

    def make(key: Array) -> list[Any]:
        trees = [unpack(tree) for tree in model.init(key, x)]
        return [leaf_of(trees[in_state], names) for in_state, names in wanted]

    return dict(zip(wanted, jax.jit(make)(key), strict=True))


def _stacked(pieces: Mapping[tuple[int, ...], np.ndarray], begun: Any) -> np.ndarray:
    """The pieces of a repeated block as one array, over what there was where some are left out."""
    if () in pieces:
        return pieces[()]
    if begun is None:
        first = next(iter(pieces.values()))
        whole = np.empty((*(i + 1 for i in max(pieces)), *first.shape), first.dtype)
    else:
        whole = np.array(begun)
    for index, piece in pieces.items():
        whole[index] = piece
    return whole
