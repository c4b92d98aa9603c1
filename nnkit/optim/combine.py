"""Transformations one after the other."""

from __future__ import annotations

import inspect
from typing import Any

from nnkit.types import GradientTransformation, PyTree, TransformUpdateFn

__all__ = ["chain"]


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Applies transformations in order, each to what the one before returned (optax's ``chain``).

    The state is the tuple of their states. Further arguments of the update (``value=loss``, ...) go to
    those members whose update takes ``**kwargs`` or names them. Members may be optax's, and a chain
    may be a member of ``optax.chain``; there, as with any transformation that is not optax's own,
    optax keeps the further arguments to itself.

    Raises:
      TypeError: for a member without ``init`` and ``update``.
      ValueError: at an update, for a state with another number of members.

    >>> tx = optim.chain(optim.scale(2.0), optim.scale_by_learning_rate(0.1))
    >>> updates, _ = tx.update({"w": 1.0}, tx.init({"w": 5.0}))
    >>> round(float(updates["w"]), 6)
    -0.2
    """
    for i, member in enumerate(transforms):
        if not (callable(getattr(member, "init", None)) and callable(getattr(member, "update", None))):
            raise TypeError(
                f"chain: member {i} must have init and update, got {type(member).__name__}: pass "
                "transformations one by one, chain(scale_by_adam(), scale(-0.1))"
            )
    accepted = [_extra_arguments(member.update) for member in transforms]

    def init(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(member.init(params) for member in transforms)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if not isinstance(state, tuple) or len(state) != len(transforms):
            got = f"{len(state)} states" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(
                f"chain has {len(transforms)} members and got {got}: pass what its own init or update returned"
            )
        new_state = []
        for member, names, inner in zip(transforms, accepted, state, strict=True):
            extra = extra_args if names is None else {k: v for k, v in extra_args.items() if k in names}
            updates, inner = member.update(updates, inner, params, **extra)
            new_state.append(inner)
        return updates, tuple(new_state)

    return GradientTransformation(init, update)


def _extra_arguments(update: TransformUpdateFn) -> frozenset[str] | None:
    """The names that ``update`` takes beyond (updates, state, params), or None if it takes any."""
    try:
        parameters = [*inspect.signature(update).parameters.values()]
    except (TypeError, ValueError):  # a function written in C that does not tell
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters[3:])
