"""Transformations one after the other, and what those that hold others share."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from nnkit.types import GradientTransformation, PyTree, TransformUpdateFn

__all__ = ["chain", "check_transformation", "extra_arguments", "named_chain", "tolerant"]


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
    members = [
        tolerant(
            f"chain: member {i}",
            member,
            "pass transformations one by one, chain(scale_by_adam(), scale(-0.1))",
        )
        for i, member in enumerate(transforms)
    ]

    def init(params: PyTree) -> tuple[PyTree, ...]:
        return tuple(member.init(params) for member in members)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if not isinstance(state, tuple) or len(state) != len(members):
            got = f"{len(state)} states" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(
                f"chain has {len(members)} members and got {got}: pass what its own init or update returned"
            )
        new_state = []
        for member, inner in zip(members, state, strict=True):
            updates, inner = member.update(updates, inner, params, **extra_args)
            new_state.append(inner)
        return updates, tuple(new_state)

    return GradientTransformation(init, update)


def named_chain(*args: tuple[str, GradientTransformation]) -> GradientTransformation:
    """A :func:`chain` whose members have names (optax's ``named_chain``).

    The state is an ``OrderedDict`` of the members' states by name, in the order of the chain.

    Args:
      *args: pairs of a name and a transformation.

    Raises:
      TypeError: for anything else than such a pair.
      ValueError: for a name that is used twice; at an update, for a state with other names.

    >>> tx = optim.named_chain(("momentum", optim.trace(0.5)), ("step", optim.scale(-0.1)))
    >>> updates, state = tx.update({"w": jnp.array(3.0)}, tx.init({"w": jnp.array(0.0)}))
    >>> round(float(updates["w"]), 6), float(state["momentum"].trace["w"])
    (-0.3, 3.0)
    """
    pair = 'pass pairs of a name and a transformation, named_chain(("adam", scale_by_adam()))'
    members: dict[str, GradientTransformation] = {}
    for i, arg in enumerate(args):
        if not (isinstance(arg, tuple) and len(arg) == 2 and isinstance(arg[0], str)):
            raise TypeError(f"named_chain: member {i} is not a name and a transformation: {pair}")
        name, member = arg
        if name in members:
            raise ValueError(f"named_chain: the name {name!r} is used twice: every member needs its own")
        members[name] = tolerant(f"named_chain: member {name!r}", member, pair)

    def init(params: PyTree) -> OrderedDict[str, PyTree]:
        return OrderedDict((name, member.init(params)) for name, member in members.items())

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if not isinstance(state, Mapping) or set(state) != set(members):
            got = (
                f"states of {sorted(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            )
            raise ValueError(
                f"named_chain has the members {sorted(members)} and got {got}: "
                "pass what its own init or update returned"
            )
        new_state = OrderedDict()
        for name, member in members.items():
            updates, new_state[name] = member.update(updates, state[name], params, **extra_args)
        return updates, new_state

    return GradientTransformation(init, update)


def check_transformation(what: str, transform: Any, advice: str) -> None:
    """Raises TypeError unless ``transform`` has ``init`` and ``update``; ``what`` begins the message."""
    if not (callable(getattr(transform, "init", None)) and callable(getattr(transform, "update", None))):
        raise TypeError(f"{what} must have init and update, got {type(transform).__name__}: {advice}")


def tolerant(
    what: str, transform: GradientTransformation, advice: str = "pass a transformation, sgd(0.1) for instance"
) -> GradientTransformation:
    """``transform`` with an update that takes any further argument and passes on those it knows.

    Its signature is read here, once, and not at every update.

    Raises:
      TypeError: for anything without ``init`` and ``update``; ``what`` begins the message.

    >>> tx = optim.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, state))
    >>> tolerant("inner", tx).update(1.0, (), value=2.0)
    (1.0, ())
    """
    check_transformation(what, transform, advice)
    names = extra_arguments(transform.update)
    if names is None:
        return transform

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        known = {name: value for name, value in extra_args.items() if name in names}
        return transform.update(updates, state, params, **known)

    return GradientTransformation(transform.init, update)


def extra_arguments(update: TransformUpdateFn) -> frozenset[str] | None:
    """The names that ``update`` takes beyond (updates, state, params), or None if it takes any.

    >>> extra_arguments(optim.adam(0.1).update) is None
    True
    >>> sorted(extra_arguments(lambda updates, state, params=None, *, value: (updates, state)))
    ['value']
    """
    try:
        parameters = [*inspect.signature(update).parameters.values()]
    except (TypeError, ValueError):  # a function written in C that does not tell
        return frozenset()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters[3:])
