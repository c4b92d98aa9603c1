"""Rules that stop trials early, as pure functions over the arrays of a cohort."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nnkit.checks import unknown_name
from nnkit.train.preflight import whole

__all__ = ["Pruner", "curves", "decided", "median", "successive_halving"]


class Pruner(NamedTuple):
    """A rule that stops trials early: when it is asked, and which trials it keeps.

    Trials are compared within their cohort, the batch that was asked for together, all of which have had the
    same number of epochs. ``keep`` is pure and compilable: the same function decides on the host and within a
    compiled program.

    Attributes:
      decisions: ``decisions(epochs)``: after how many epochs it is asked, increasing numbers below ``epochs``.
      keep: ``keep(values, alive, done) -> keep``, with the metric's curves ``values``, (trials, epochs), where
        small is good; who is left, (trials,); and the number of epochs so far, traced. A trial that was stopped
        is NaN from there on, and one that has diverged is NaN throughout and goes whatever is returned.
      sizes: ``sizes(trials, epochs)``: how many trials can be left, descending; a mapped program has a
        batch of each of these sizes.
    """

    decisions: Callable[[int], tuple[int, ...]]
    keep: Callable[
        [Float[Array, "trials epochs"], Bool[Array, " trials"], Int[Array, ""]], Bool[Array, " trials"]
    ]
    sizes: Callable[[int, int], tuple[int, ...]]


def successive_halving(*, first: int = 1, factor: int = 3) -> Pruner:
    """After ``first·factorⁱ`` epochs the best ``⌊n/factorⁱ⁺¹⌋`` of a cohort of n go on, and at least one.

    So each rung has ``factor`` times the epochs of the one before for one ``factor``-th of the trials, and all
    rungs cost about the same (Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and
    hyperparameter optimization"). Trials are ranked by the metric of the last epoch; of equal ones the first
    go on.

    Args:
      first: epochs before the first decision.
      factor: of how many trials one goes on.

    Raises:
      ValueError: for ``first`` below 1 or ``factor`` below 2.

    Of 27 trials of 27 epochs 9, 3 and 1 are left, and 81 of 729 epochs are computed:

    >>> pruner = search.successive_halving(first=1, factor=3)
    >>> pruner.decisions(27), pruner.sizes(27, 27)
    ((1, 3, 9), (27, 9, 3, 1))
    >>> values = jnp.array([[0.3], [0.1], [jnp.nan], [0.2]])
    >>> pruner.keep(values, jnp.ones(4, bool), 1).tolist()
    [False, True, False, False]
    """
    first = whole(first, "successive_halving(first=...)")
    factor = whole(factor, "successive_halving(factor=...)", 2)
    return _successive_halving(first, factor)


@functools.cache  # so that the same rule is the same object, for which there is a compiled one
def _successive_halving(first: int, factor: int) -> Pruner:
    def decisions(epochs: int) -> tuple[int, ...]:
        found, at = [], first
        while at < epochs:
            found.append(at)
            at *= factor
        return tuple(found)

    def keep(values: Array, alive: Array, done: Any) -> Array:
        here = jnp.where(alive, _at(values, done), jnp.nan)
        rank = jnp.argsort(jnp.argsort(here))  # NaN is last; of equal ones the first
        # Whole numbers, so that no rung depends on how a power or a logarithm is rounded.
        rungs = jnp.asarray(decisions(values.shape[1] + 1), jnp.int32)
        left = jnp.asarray([_left(len(values), i + 1) for i in range(len(rungs))], jnp.int32)
        return alive & (rank < left[jnp.searchsorted(rungs, jnp.asarray(done, jnp.int32))])

    def _left(trials: int, decided: int) -> int:
        return max(1, trials // factor**decided)

    def sizes(trials: int, epochs: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys([trials, *(_left(trials, i + 1) for i in range(len(decisions(epochs))))]))

    return Pruner(decisions, keep, sizes)


def median(*, warmup: int = 1, every: int = 1) -> Pruner:
    """A trial is stopped when its best value so far is worse than the median of the running averages.

    The running average of a trial is the mean of its values over the epochs that it has had; the median is
    that of all trials of the cohort, those among them that were stopped with the average they had then, and
    without those that diverged. It is Google Vizier's rule (Golovin et al. 2017, "Google Vizier: a service for
    black-box optimization", 3.2.2), for trials that run side by side.

    Args:
      warmup: epochs before the first decision.
      every: epochs from one decision to the next.

    Raises:
      ValueError: for numbers below 1.

    The averages are 1.5, 2.5 and 3.5; the last trial's best is 3, which is worse than 2.5:

    >>> pruner = search.median(warmup=2)
    >>> pruner.decisions(5)
    (2, 3, 4)
    >>> pruner.keep(jnp.array([[2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]), jnp.ones(3, bool), 2).tolist()
    [True, True, False]
    """
    warmup = whole(warmup, "median(warmup=...)")
    every = whole(every, "median(every=...)")
    return _median(warmup, every)


@functools.cache
def _median(warmup: int, every: int) -> Pruner:
    def decisions(epochs: int) -> tuple[int, ...]:
        return tuple(range(warmup, epochs, every))

    def keep(values: Array, alive: Array, done: Any) -> Array:
        so_far = jnp.where(jnp.arange(values.shape[1]) < done, values, jnp.nan)
        best = jnp.nanmin(so_far, axis=1)
        average = jnp.nanmean(so_far, axis=1)
        return alive & ~(best > jnp.nanmedian(average))

    return Pruner(decisions, keep, _halves)


def curves(
    rows: Float[Array, "trials members epochs"], had: Int[Array, "trials members"], ended: Any, mode: str
) -> Float[Array, "trials epochs"]:
    """The metric's curves that a rule sees: means over a trial's seeds and folds, small is good.

    Where a member has ended by itself its last value stands for the epochs after. A trial has diverged where
    the last value of one of its members is not finite: it is NaN throughout, and goes as a whole.

    >>> rows = jnp.array([[[0.5, 0.75], [0.5, 0.25]], [[0.5, jnp.nan], [0.5, 0.25]]])
    >>> curves(rows, jnp.full((2, 2), 2), jnp.zeros((2, 2), bool), "max").tolist()
    [[-0.5, -0.5], [nan, nan]]
    """
    if mode not in ("min", "max"):
        raise unknown_name("mode", mode, ("min", "max"))
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    epoch = jnp.arange(rows.shape[-1])
    last = jnp.maximum(had - 1, 0)[..., None]
    values = jnp.take_along_axis(rows, jnp.minimum(epoch, last), axis=-1)
    diverged = ~jnp.isfinite(jnp.take_along_axis(rows, last, axis=-1))
    known = (epoch < had[..., None]) | ended[..., None]
    values = jnp.mean(jnp.where(known & ~diverged, values, jnp.nan), axis=1)
    return values if mode == "min" else -values


def decided(
    pruner: Pruner, values: Float[Array, "trials epochs"], alive: Bool[Array, " trials"], done: Any
) -> Bool[Array, " trials"]:
    """Who is left after a decision: of those who were, whom the rule keeps and who has not diverged."""
    return alive & ~jnp.isnan(_at(values, done)) & pruner.keep(values, alive, done)


def _at(values: Array, done: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(values, jnp.asarray(done, jnp.int32) - 1, axis=1, keepdims=False)


def _halves(trials: int, epochs: int) -> tuple[int, ...]:
    """Batches of all, a half, a quarter and an eighth of the trials: each has to be compiled."""
    del epochs
    sizes = [trials]
    while sizes[-1] > 1 and len(sizes) < 4:
        sizes.append(-(-sizes[-1] // 2))
    return tuple(sizes)
