"""Transformations for some of the parameters only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from nnkit.optim.combine import tolerant
from nnkit.optim.leafwise import check_state
from nnkit.optim.transform import is_function
from nnkit.tree import path_str
from nnkit.types import GradientTransformation, PyTree

__all__ = ["MaskedNode", "MaskedState", "PartitionState", "masked", "partition"]


class MaskedState(NamedTuple):
    """The state of the transformation inside, with a :class:`MaskedNode` for what it does not see."""

    inner_state: PyTree


class MaskedNode(NamedTuple):
    """What stands in a tree for a masked part of it: a node without leaves, which maps pass by."""


class PartitionState(NamedTuple):
    """The states of the transformations by label, each a :class:`MaskedState`."""

    inner_states: Mapping[Hashable, MaskedState]


def masked(
    inner: GradientTransformation,
    mask: PyTree | Callable[[PyTree], PyTree],
    *,
    mask_compatible_extra_args: bool = False,
) -> GradientTransformation:
    """``inner`` for the selected parameters; the updates of the others pass unchanged (optax's ``masked``).

    ``inner`` sees a :class:`MaskedNode` in place of the others and keeps no state for them. To keep
    parameters as they are, say so: ``chain(adam(0.1), masked(set_to_zero(), frozen))``.

    Args:
      inner: a transformation or a whole optimizer, nnkit's or optax's.
      mask: a tree of bools shaped like the parameters or a prefix of them, or a function from the
        parameters (from the updates where an update gets no parameters) to one. ``nnkit.tree.mask``
        makes one from names.
      mask_compatible_extra_args: whether further arguments shaped like the updates are masked too.

    Raises:
      TypeError: for an inner that is no transformation, a mask that holds something else than bools, or
        traced ones.
      ValueError: for a mask of another form than the parameters.

    >>> tx = optim.masked(optim.scale(10.0), lambda params: tree.mask(params, ".*kernel"))
    >>> grads = {"kernel": jnp.array(1.0), "bias": jnp.array(2.0)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> float(updates["kernel"]), float(updates["bias"])
    (10.0, 2.0)
    """
    inner = tolerant("masked: inner", inner)

    def init(params: PyTree) -> MaskedState:
        try:
            return MaskedState(inner_state=inner.init(_hide(_evaluated(mask, params), params)))
        except _OtherForm:
            # Nothing to mask: optax.tree.map_params asks with a single placeholder what the state is like.
            if jax.tree.leaves(params) or jax.tree.structure(params).num_nodes != 1:
                raise
            return MaskedState(inner_state=inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("masked", state, MaskedState)
        flags = _evaluated(mask, updates if params is None else params)
        if mask_compatible_extra_args:
            form = jax.tree.structure(updates)
            extra_args = {
                name: _hide(flags, value) if jax.tree.structure(value) == form else value
                for name, value in extra_args.items()
            }
        seen = None if params is None else _hide(flags, params)
        new, inner_state = inner.update(_hide(flags, updates), state.inner_state, seen, **extra_args)
        merged = jax.tree.map(lambda keep, u, old: u if keep else old, flags, new, updates, is_leaf=_is_none)
        return merged, state._replace(inner_state=inner_state)

    return GradientTransformation(init, update)


def partition(
    transforms: Mapping[Hashable, GradientTransformation],
    param_labels: PyTree | Callable[[PyTree], PyTree],
    *,
    mask_compatible_extra_args: bool = False,
) -> GradientTransformation:
    """Each parameter's update by the transformation of its label (optax's ``partition``, ``multi_transform``).

    Args:
      transforms: the transformations by label, nnkit's or optax's; :func:`set_to_zero` for parameters
        that are to stay as they are.
      param_labels: a tree of labels shaped like the parameters or a prefix of them, or a function from
        the parameters (from the updates where an update gets no parameters) to one.
      mask_compatible_extra_args: whether further arguments shaped like the updates are parted too.

    Raises:
      TypeError: for a transforms that is no mapping of transformations.
      ValueError: for a label without a transformation, for labels of another form than the parameters;
        at an update, for a state with other labels.

    >>> label = lambda params: {name: "slow" if name == "bias" else "fast" for name in params}
    >>> tx = optim.partition({"fast": optim.sgd(1.0), "slow": optim.sgd(0.1)}, label)
    >>> grads = {"kernel": jnp.array(1.0), "bias": jnp.array(1.0)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> round(float(updates["kernel"]), 6), round(float(updates["bias"]), 6)
    (-1.0, -0.1)
    """
    advice = 'pass transformations by label, partition({"a": adam(0.1), "b": sgd(0.1)}, labels)'
    if not isinstance(transforms, Mapping):
        raise TypeError(f"partition: transforms must be a dict, got {type(transforms).__name__}: {advice}")
    members = {
        label: tolerant(f"partition: the transformation of {label!r}", member, advice)
        for label, member in transforms.items()
    }

    def parts(params: PyTree) -> dict[Hashable, GradientTransformation]:
        labels = param_labels(params) if is_function(param_labels) else param_labels
        for path, label in jax.tree_util.tree_leaves_with_path(labels):
            if label not in members:
                raise ValueError(
                    f"partition: no transformation for the label {label!r} at {path_str(path) or 'the root'}; "
                    f"there are those of {', '.join(sorted(map(repr, members)))}"
                )
        return {
            group: masked(
                member,
                jax.tree.map(lambda label, group=group: bool(label == group), labels),
                mask_compatible_extra_args=mask_compatible_extra_args,
            )
            for group, member in members.items()
        }

    def init(params: PyTree) -> PartitionState:
        return PartitionState({label: part.init(params) for label, part in parts(params).items()})

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("partition", state, PartitionState)
        if set(state.inner_states) != set(members):
            raise ValueError(
                f"partition has the labels {sorted(map(repr, members))} and got states of "
                f"{sorted(map(repr, state.inner_states))}: pass what its own init or update returned"
            )
        new = {}
        for label, part in parts(updates if params is None else params).items():
            updates, new[label] = part.update(updates, state.inner_states[label], params, **extra_args)
        return updates, state._replace(inner_states=new)

    return GradientTransformation(init, update)


class _OtherForm(ValueError):
    """A mask or labels that do not fit the parameters."""


def _evaluated(mask: PyTree | Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The mask for ``params``, of Python bools."""
    return jax.tree.map(_flag, mask(params) if is_function(mask) else mask)


def _flag(keep: Any) -> bool:
    if isinstance(keep, Tracer):
        raise TypeError("masked: a mask must be known when compiling, got a traced array")
    if not isinstance(keep, bool | np.bool_) and getattr(keep, "dtype", None) != np.bool_:
        raise TypeError(f"masked: a mask must hold True and False, got {type(keep).__name__}")
    return bool(keep)


def _hide(flags: PyTree, tree: PyTree) -> PyTree:
    """``tree`` with a MaskedNode where the flags say False."""
    try:
        return jax.tree.map(lambda keep, part: part if keep else MaskedNode(), flags, tree)
    except ValueError as error:
        raise _OtherForm(
            "masked: the mask must be a tree of bools like the parameters or a prefix of them, "
            f"got {jax.tree.structure(flags)} for {jax.tree.structure(tree)}"
        ) from error


def _is_none(x: Any) -> bool:
    return x is None
