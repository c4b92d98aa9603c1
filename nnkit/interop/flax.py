"""Parameters and state from and to Flax: the variables of linen's modules and the states of nnx's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.interop.dialect import Dialect
from nnkit.interop.flattening import Shape
from nnkit.interop.flax_forms import flax_forms
from nnkit.interop.matching import invented, match
from nnkit.interop.names import Names
from nnkit.interop.parts import parts
from nnkit.interop.trees import read_all, write_all
from nnkit.tree import path_str
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["flax_names", "from_flax", "to_flax"]

_FLAX = Dialect("Flax", "/", flax_forms, ordered=False)
_COLLECTIONS = ("params", "batch_stats")
_STATISTICS = ("mean", "var")


def from_flax(
    model: Layer,
    x: Spec,
    variables: Any,
    *,
    names: Names | None = None,
    ignore: str | None = None,
    key: Array | None = None,
) -> tuple[Params, State]:
    """``(params, state)`` of a model with the numbers of a Flax module.

    Kernels, scales, embeddings and projections are Flax's as they are; the gates of recurrent cells are
    joined. Every number keeps its bits and its dtype; the variables are left as they are.

    Which layer is which of theirs is told by ``names``. The layers that it does not tell are theirs of the
    same paths, if each has one (so :func:`to_flax` is undone), and otherwise found by kind and number:
    ``dense_0`` is ``Dense_0``, or the first by number where they are called otherwise (``linear1``,
    ``linear2``). Flax's trees are sorted by name, so where names of one kind do not count, or count
    otherwise than ours, ``names`` must tell.

    Args:
      model: the counterpart of the module.
      x: an array or ``jax.ShapeDtypeStruct`` like its input, with a batch axis.
      variables: linen's ``{"params": ..., "batch_stats": ...}``, other collections left aside, or nnx's
        ``nnx.state(module)``, keys of random streams left aside, or a nested dict of it.
      names: from the path of a layer of ours to theirs, with ``/``: a dict, in which a path also stands
        for all beneath it, or for all layers a function or rules ``[(regular expression, replacement)]``.
      ignore: a regular expression: layers of ours (by path) that keep initial values, and arrays of
        theirs (by path) that are left out.
      key: for the initial values of what is ignored, ``jax.random.key(0)`` by default.

    Raises:
      TypeError: an argument of another kind.
      ValueError: what has no counterpart or another shape, on both sides, by name.

    >>> import flax.linen as nn
    >>> theirs = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    >>> variables = theirs.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model = layers.serial(layers.dense(8), layers.relu, layers.dense(2))
    >>> params, state = interop.from_flax(model, jnp.zeros((1, 4)), variables)
    >>> y, _ = model.apply(params, state, jnp.ones((5, 4)), train=False)
    >>> bool((abs(y - theirs.apply(variables, jnp.ones((5, 4)))) < 1e-6).all())
    True
    """
    arrays = _flat(variables)
    pairs = match(parts(model, x), _shapes(arrays), _FLAX, names, ignore)
    return read_all(model, x, pairs, arrays, jax.random.key(0) if key is None else key)


def to_flax(
    model: Layer,
    x: Spec,
    params: Params,
    state: State,
    like: Any = None,
    *,
    names: Names | None = None,
    ignore: str | None = None,
) -> Any:
    """What a Flax module needs to compute what ``model`` does; what :func:`from_flax` undoes.

    Args:
      model, x, names, ignore: see :func:`from_flax`.
      params, state: the model's numbers.
      like: the module's own variables, or ``nnx.state(module)``: the result has its structure, and its
        values where it holds what is not ours (other collections, random streams, what is ignored). Without
        it, linen's two collections, named by ``names`` or by our paths.

    Returns:
      linen's variables, or for ``nnx.update(module, ...)`` a state.

    Raises:
      ValueError: as :func:`from_flax` does, and for arrays that are not this model's.

    >>> model = layers.serial(layers.dense(2), layers.batch_norm())
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> tree.flatten(interop.to_flax(model, jnp.zeros((1, 4)), params, state)).keys()
    dict_keys(['batch_stats/batch_norm_0/mean', 'batch_stats/batch_norm_0/var', 'params/batch_norm_0/bias', ...])
    """
    ours = parts(model, x)
    if like is None:
        written = write_all(model, x, invented(ours, _FLAX, names, ignore), params, state)
        return _collected(written)
    pairs = match(ours, _shapes(_flat(like)), _FLAX, names, ignore)
    written = {name: jnp.array(a) for name, a in write_all(model, x, pairs, params, state).items()}
    return _filled(like, written)


def flax_names(
    model: Layer, x: Spec, variables: Any, *, names: Names | None = None, ignore: str | None = None
) -> dict[str, str]:
    """Which module each layer with arrays is paired with by :func:`from_flax`: to look at, correct and pass on.

    >>> variables = {"params": {"Dense_0": {"kernel": np.zeros((4, 2)), "bias": np.zeros(2)}}}
    >>> interop.flax_names(layers.serial(layers.relu, head=layers.dense(2)), jnp.zeros((1, 4)), variables)
    {'head': 'Dense_0'}
    """
    pairs = match(parts(model, x), _shapes(_flat(variables)), _FLAX, names, ignore)
    return {pair.part.path: pair.prefix for pair in pairs}


def _flat(variables: Any) -> dict[str, Any]:
    """Arrays by their paths within the modules."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"takes linen's variables or nnx.state(module), got {type(variables).__name__}: pass one of them"
        )
    leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_variable)
    names = {_within(path, variables): leaf for path, leaf in leaves if not _is_random(path, leaf)}
    return {name: leaf for name, leaf in names.items() if name is not None}


def _is_variable(leaf: Any) -> bool:
    """Whether it is an array of nnx's, or one of linen's that has the names of mesh axes."""
    return hasattr(leaf, "get_value") or hasattr(leaf, "unbox")


def _within(path: tuple[Any, ...], variables: Any) -> str | None:
    """The path within the modules: linen keeps parameters and statistics apart, nnx side by side."""
    collections = [name for name in _COLLECTIONS if isinstance(variables.get(name), Mapping)]
    first, _, rest = path_str(path).partition("/")
    if not collections:
        return path_str(path)
    return rest if first in collections else None


def _is_random(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether it belongs to a stream of random numbers, which nnx keeps in the module's state."""
    return "rngs" in path_str(path).split("/") or type(leaf).__name__ in ("RngKey", "RngCount")


def _shapes(flat: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(np.shape(_value(leaf))) for name, leaf in flat.items()}


def _value(leaf: Any) -> Any:
    return leaf.unbox() if hasattr(leaf, "unbox") else leaf


def _collected(written: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """linen's collections of arrays by path."""
    collections: dict[str, Any] = {"params": {}}
    for path, array in written.items():
        *parents, name = path.split("/")
        node = collections.setdefault("batch_stats" if name in _STATISTICS else "params", {})
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.array(array)
    return collections


def _filled(like: Any, written: Mapping[str, Array]) -> Any:
    """``like`` with the arrays in their places; a new tree with new leaves there."""

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        array = written.get(_within(path, like) or "")
        if array is None:
            return leaf
        if hasattr(leaf, "replace_boxed"):
            return leaf.replace_boxed(array)
        return leaf.replace(array) if hasattr(leaf, "get_value") else array

    return jax.tree_util.tree_map_with_path(fill, like, is_leaf=_is_variable)
