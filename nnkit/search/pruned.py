"""``run_pruned``: trains a batch of trials, of which a rule stops some early."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnkit.checks import unknown_name
from nnkit.search.asked import Asked
from nnkit.search.engine import Engine, Finished
from nnkit.search.pruned_exact import exact
from nnkit.search.pruned_mapped import mapped
from nnkit.search.pruning import Pruner
from nnkit.search.training import Training

__all__ = ["run_pruned"]


def run_pruned(
    engine: Engine,
    training: Training,
    flats: Sequence[Mapping[str, Any]],
    pruner: Pruner,
    *,
    metric: str = "val_loss",
    mode: str = "min",
) -> Iterator[Finished]:
    """Trains the trials as one cohort, and stops those early that the rule does not keep.

    A trial is kept or stopped as a whole, by the mean of the metric over its seeds and folds, and ranked among
    all trials of the cohort, whichever program they are in. One that has diverged, a member's metric being NaN or
    infinite, is stopped at the next decision; one that has ended by itself goes on to compete with its last
    value, and is not called stopped.

    Exact: threads train one member at a time up to the next decision, which the rule makes on the host
    when all are there. A member goes on in the executables that train it in one go, so a survivor's history
    is bit for bit that of its solo, unpruned run. Mapped: training and decisions are one compiled program, whose
    cost falls with the survivors; see :func:`nnkit.search.cohort.cohort`.

    Args:
      engine: how members are run, ``Engine(training, space, ...)``.
      training: from :func:`training`.
      flats: of each trial the values by path, those that are active.
      pruner: from :func:`successive_halving` or :func:`median`.
      metric: a name of the history.
      mode: whether small ("min") or large ("max") is good.

    Returns:
      An iterator over the trials as they are finished or stopped. Of one that was stopped, ``stopped`` is how many
      epochs it has had, and its history is NaN after them, whole numbers staying as they were.

    Raises:
      TypeError: for a training function that is not a Training, or something else for a rule.
      ValueError: for another mode, a metric that the history does not have, values that the space does not have.

    >>> halving = search.Training(
    ...     start=lambda key, hparams: jnp.float32(1.0),
    ...     epoch=lambda x, hparams, number: (x * hparams["rate"], {"loss": x * hparams["rate"]}),
    ...     epochs=4,
    ... )
    >>> engine = search.Engine(halving, {"rate": search.uniform(0, 1)}, seeds=[0], workers=1)
    >>> rates = [{"rate": rate} for rate in (0.1, 0.9, 0.5)]
    >>> rule = search.successive_halving(first=1, factor=3)
    >>> trials = search.run_pruned(engine, halving, rates, rule, metric="loss")
    >>> [(trial.index, trial.stopped) for trial in trials]
    [(1, 1), (2, 1), (0, None)]
    """
    _check(engine, training, pruner, mode)
    groups = engine.groups([engine.space.check(flat) for flat in flats])
    segments = [engine.segments(flats[group.indices[0]]) for group in groups]
    for one in segments:
        if metric not in one.member.history:
            raise unknown_name("metric", metric, one.member.history)
    asked = Asked(pruner, metric, mode)
    if engine.members == "exact":
        return exact(engine, list(zip(groups, segments, strict=True)), training.epochs, asked)
    return mapped(engine, training, groups, asked)


def _check(engine: Engine, training: Any, pruner: Any, mode: str) -> None:
    if not isinstance(training, Training):
        raise TypeError(
            f"a search that prunes has to leave a run and go on with it, and got {type(training).__name__} for a "
            "training: write search.training(make, data, epochs), or a search.Training of your own"
        )
    if training is not engine.train_fn:
        raise ValueError("run_pruned got an engine of another training function: pass Engine(training, ...)")
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"pruner takes a rule and got {pruner!r}: pass search.successive_halving() or search.median()"
        )
    if mode not in ("min", "max"):
        raise unknown_name("mode", mode, ("min", "max"))
