"""A cohort as one compiled program, in which members that were stopped cost no more time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.search.member import Member, begin, history_of, one_epoch
from nnkit.search.pruning import Pruner, curves, decided
from nnkit.search.space import Space
from nnkit.search.training import Training
from nnkit.types import Array, PyTree

__all__ = ["Outcome", "cohort"]


class Outcome(NamedTuple):
    """What becomes of a cohort.

    Attributes:
      histories: of each group, arrays of (trials of the group, members of a trial, epochs).
      had: likewise, how many epochs each member had, (trials of the group, members of a trial).
      stopped: of each trial of the cohort, after how many epochs it was stopped, or 0, (trials,).
    """

    histories: list[dict[str, Array]]
    had: list[Array]
    stopped: Array


def cohort(
    training: Training,
    space: Space,
    statics: Sequence[Any],
    pruner: Pruner,
    *,
    trials: int,
    sizes: Sequence[Sequence[int]],
    metric: str,
    mode: str,
    fold: bool,
    axis: str | None = None,
) -> Callable[[Array, Any, Sequence[Mapping[str, Array]], Sequence[Array]], Outcome]:
    """The training of a cohort with its decisions, as one function of arrays.

    Between two decisions the members that still have something to do are gathered into the smallest batch that
    holds them, of a few static sizes; there they are trained side by side by ``jax.vmap`` until so few of them
    are left that a smaller batch would do. A mask alone would save nothing, since what it masks is computed.

    Args:
      training: the training.
      space: of its hyper-parameters.
      statics: of each group, the static values that its trials share.
      pruner: the rule, asked over all groups together.
      trials: how many the cohort has.
      sizes: of each group, the sizes of its batches in trials.
      metric: what it is asked about.
      mode: "min" or "max".
      fold: whether members have folds.
      axis: the name of the devices' axis where each has a share of every group's trials.

    Returns:
      ``program(keys, folds, numbers, places)``, for keys and folds of a trial's members, (members,), the
      traced values of each group's trials, and their places in the cohort, (trials of the group,). A
      place of ``trials`` is no trial, and is not trained.
    """
    decisions = pruner.decisions(training.epochs)
    bounds = jnp.asarray((*decisions, training.epochs), jnp.int32)

    def program(
        keys: Array, folds: Any, numbers: Sequence[Mapping[str, Array]], places: Sequence[Array]
    ) -> Outcome:
        each = len(keys)
        groups = [
            _Group(training, space, static, _repeated(n, each), sizes=[s * each for s in g])
            for static, n, g in zip(statics, numbers, sizes, strict=True)
        ]
        everywhere = [_gathered(p, axis) for p in places]

        def whole(of_groups: Sequence[Array], nothing: Any) -> Array:
            """Values of each group's trials in the order of the cohort."""
            values = [_gathered(v, axis) for v in of_groups]
            room = jnp.full((trials + 1, *values[0].shape[1:]), nothing, values[0].dtype)
            for place, value in zip(everywhere, values, strict=True):
                room = room.at[place].set(value)
            return room[:trials]

        def segment(i: Any, at: tuple[list[Member], Array, Array]) -> tuple[list[Member], Array, Array]:
            members, alive, stopped = at
            known = jnp.append(alive, False)
            on = [jnp.repeat(known[place], each) for place in places]
            members = [g.advance(m, o, bounds[i]) for g, m, o in zip(groups, members, on, strict=True)]
            had = [m.had.reshape(-1, each) for m in members]
            ended = [jax.vmap(training.ended)(m.carry).reshape(-1, each) for m in members]
            rows = [m.history[metric].reshape(-1, each, training.epochs) for m in members]
            seen = [curves(*parts, mode) for parts in zip(rows, had, ended, strict=True)]
            kept = alive
            if decisions:
                kept = decided(pruner, whole(seen, jnp.nan), alive, bounds[i])
                kept = jnp.where(i < len(decisions), kept, alive)
            over = whole([jnp.all(e, axis=1) for e in ended], False)
            return members, kept, jnp.where(alive & ~kept & ~over, bounds[i], stopped)

        at = [g.begin(keys, folds if fold else None) for g in groups], jnp.ones(trials, bool)
        members, _, stopped = jax.lax.fori_loop(0, len(bounds), segment, (*at, jnp.zeros(trials, jnp.int32)))
        histories = [
            {name: a.reshape(-1, each, training.epochs) for name, a in jax.vmap(history_of)(m).items()}
            for m in members
        ]
        return Outcome(histories, [m.had.reshape(-1, each) for m in members], stopped)

    return program


class _Group:
    """The members that share their static values, stacked."""

    def __init__(
        self,
        training: Training,
        space: Space,
        static: Any,
        numbers: Mapping[str, Array],
        *,
        sizes: Sequence[int],
    ):
        self.training, self.numbers = training, numbers
        self.hparams = functools.partial(space.hparams, static)
        self.sizes = sorted(set(sizes))

    def begin(self, keys: Array, folds: Array | None) -> Member:
        trials = self.sizes[-1] // len(keys)
        places = jnp.tile(jnp.arange(len(keys)), trials)

        def one(key: Array, numbers: Any, fold: Any) -> Member:
            folded = {} if fold is None else {"fold": fold}
            return begin(self.training, key, self.hparams(numbers), **folded)

        fold = None if folds is None else folds[places]
        return jax.vmap(one, (0, 0, None if folds is None else 0))(keys[places], self.numbers, fold)

    def advance(self, members: Member, on: Array, until: Array) -> Member:
        """Takes the members that are on to ``until`` epochs, or to where they end by themselves."""

        def due(members: Member, on: Array) -> Array:
            return on & (members.had < until) & ~jax.vmap(self.training.ended)(members.carry)

        def smallest_batch(members: Member) -> Member:
            have_more = due(members, on)
            batch = jnp.searchsorted(jnp.asarray(self.sizes), jnp.sum(have_more))
            return jax.lax.switch(batch, batches, members, jnp.argsort(~have_more))

        def train(size: int, smaller: int, members: Member, due_first: Array) -> Member:
            these = due_first[:size]
            some, numbers = jax.tree.map(lambda a: a[these], (members, self.numbers))

            def filled(some: Member) -> Array:
                return jnp.sum(due(some, on[these])) > smaller

            def after_an_epoch(some: Member) -> Member:
                new = jax.vmap(lambda m, n: one_epoch(self.training, m, self.hparams(n)))(some, numbers)
                return _where(due(some, on[these]), new, some)

            some = jax.lax.while_loop(filled, after_an_epoch, some)
            return jax.tree.map(lambda a, s: a.at[these].set(s), members, some)

        steps = zip(self.sizes, (0, *self.sizes[:-1]), strict=True)
        batches = [functools.partial(train, size, smaller) for size, smaller in steps]
        return jax.lax.while_loop(lambda m: jnp.any(due(m, on)), smallest_batch, members)


def _repeated(numbers: Mapping[str, Array], each: int) -> dict[str, Array]:
    """The values of trials as values of their members."""
    return {path: jnp.repeat(column, each) for path, column in numbers.items()}


def _gathered(values: Array, axis: str | None) -> Array:
    """What all devices have."""
    return values if axis is None else jax.lax.all_gather(values, axis, tiled=True)


def _where(taken: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(jnp.expand_dims(taken, range(1, n.ndim)), n, o), new, old)
