"""Which trial to take, and how sure that is: the best ones with intervals, and two side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.search.intervals import Interval, interval_of

if TYPE_CHECKING:
    from nnkit.search.study import Study, Trial

__all__ = ["Comparison", "Ranked", "Ranking", "best_of", "check_selection", "compare", "complete_trial"]


@dataclass(frozen=True)
class Ranked:
    """A trial's place among the best."""

    trial: Trial
    interval: Interval
    """Of its values over the seeds (and folds)."""
    behind: Interval | None
    """By how much it is worse than the first, seed by seed; None for the first."""

    @property
    def level(self) -> bool:
        """Whether the seeds do not tell it from the first: the interval of ``behind`` has 0 in it."""
        return self.behind is None or not self.behind.low > 0


@dataclass(frozen=True)
class Ranking:
    """The best trials of a study, the best first; printed it is a table."""

    rows: tuple[Ranked, ...]
    metric: str
    confidence: float
    note: str
    """What the numbers do not say."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> Ranked:
        return self.rows[place]

    def __str__(self) -> str:
        head = (
            "trial",
            self.metric,
            f"{self.confidence:.0%} interval",
            "behind the first",
            "hyper-parameters",
        )
        table = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, self.note])


def best_of(study: Study, k: int = 5, confidence: float = 0.95) -> Ranking:
    """The k best trials with Student's intervals over their seeds, and how far each is behind the first.

    ``behind`` compares seed by seed (:func:`compare`), which is sharper than two intervals side by side:
    what a seed does to both trials falls out. A trial that diverged, was stopped early, or repeats another
    one is not ranked.

    The intervals are about the seeds: they say how another training run would do on the same validation
    data. The best of many trials is besides the luckiest, so its own mean promises too much; a number to
    report comes from :func:`final_test`.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      k: at most how many.
      confidence: the share of such intervals that have the true mean in them, were the values normal.

    Raises:
      ValueError: no trial has a finite value, ``k`` is below 1, or a confidence outside 0 and 1.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["x"] - 1) ** 2 + 0.01 * jax.random.normal(key)}
    >>> space = {"x": search.uniform(0, 3)}
    >>> study = search.sweep(train_fn, space, trials=6, seeds=3)
    >>> first, second = search.best_of(study, k=2)
    >>> first.trial.number == study.best.number, first.interval.low < first.interval.mean < first.interval.high
    (True, True)
    """
    if k < 1:
        raise ValueError(f"best_of(k={k}) needs a number from 1 on")
    first, rows = study.best, []
    for trial in study.top(k):
        behind = None
        if trial.number != first.number:
            behind = interval_of(_sign(study) * _differences(trial, first)[1], confidence)
        rows.append(Ranked(trial, interval_of(trial.values, confidence), behind))
    return Ranking(tuple(rows), study.metric, confidence, _note(rows))


@dataclass(frozen=True)
class Comparison:
    """Two trials on the same seeds; printed it is a sentence."""

    a: int
    b: int
    metric: str
    seeds: tuple[int, ...]
    differences: np.ndarray
    """a's values less b's, (seeds,) or (seeds, folds)."""
    interval: Interval
    """Of the differences."""
    confidence: float
    better: int | None
    """The better trial, where the interval leaves 0 out."""

    def __str__(self) -> str:
        between, mean = f"trials {self.a} and {self.b}", abs(self.interval.mean)
        if self.differences.size == 1:
            return (
                f"{between} differ by {mean:.4g} in {self.metric} on the one seed they were trained with, which "
                "cannot tell a difference from luck: search again with 5 seeds"
            )
        how = (
            f"{len(self.seeds)} seeds"
            if self.differences.ndim == 1
            else f"{self.differences.size} seeds and folds"
        )
        low, high = sorted((abs(self.interval.low), abs(self.interval.high)))
        if self.better is None:
            return (
                f"{between} differ by {mean:.4g} in {self.metric} over {how}, and luck makes as much: the "
                f"difference lies between {self.interval.low:.4g} and {self.interval.high:.4g} "
                f"({self.confidence:.0%}; t = {self.interval.t:.2f}, p = {self.interval.p:.2g})"
            )
        worse = self.b if self.better == self.a else self.a
        return (
            f"trial {self.better} is better than trial {worse} by {mean:.4g} in {self.metric} over {how}, between "
            f"{low:.4g} and {high:.4g} ({self.confidence:.0%}; t = {self.interval.t:.2f}, p = {self.interval.p:.2g})"
        )


def compare(study: Study, a: int, b: int, confidence: float = 0.95) -> Comparison:
    """Two trials compared seed by seed: the mean difference, its interval, and Student's paired t.

    The differences d are taken between runs of the same seed (and fold), so what the seed does to both
    falls out: t = mean(d) / (s_d / sqrt(n)) with n - 1 degrees of freedom. With folds the standard error is
    larger, since folds share training data: see :func:`nnkit.search.intervals.interval_of`. Of one seed
    there is a difference and no interval: the numbers are NaN, and the text says so.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      a: the number of a trial.
      b: the number of another.
      confidence: of the interval.

    Raises:
      ValueError: a trial that there is not, that is not complete, or that diverged; the same one twice; no
        seed in common.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": hparams["x"] + jax.random.normal(key)}
    >>> study = search.sweep(train_fn, {"x": search.uniform(0, 1)}, trials=2, seeds=4)
    >>> found = search.compare(study, 0, 1)
    >>> found.seeds, found.better == study.best.number
    ((0, 1, 2, 3), True)
    """
    if a == b:
        raise ValueError(f"compare needs two trials, and got number {a} twice")
    seeds, differences = _differences(complete_trial(study, a), complete_trial(study, b))
    found = interval_of(differences, confidence)
    better = None
    if found.low > 0 or found.high < 0:
        better = b if _sign(study) * found.mean > 0 else a
    return Comparison(a, b, study.metric, seeds, differences, found, confidence, better)


def check_selection(metric: str) -> None:
    """Raises if trials would be chosen by a metric of the test set.

    >>> check_selection("val_loss")
    """
    if metric.lower().startswith("test"):
        raise ValueError(
            f"metric is {metric!r}: choosing by the test set makes it a validation set. Choose by a metric of "
            "held-out data (say val_loss), and use search.final_test once for the chosen trial"
        )


def complete_trial(study: Study, number: int) -> Trial:
    """The trial of this number, or an error where there is none, or none with finite numbers to its end."""
    trials = {trial.number: trial for trial in study.trials}
    if number not in trials:
        raise ValueError(f"the study has no trial {number}: it has {len(trials)}, see study.trials")
    if (state := trials[number].state) != "complete":
        raise ValueError(f"trial {number} is {state}: take one that is complete")
    return trials[number]


def _sign(study: Study) -> int:
    return -1 if study.mode == "max" else 1


def _differences(a: Trial, b: Trial) -> tuple[tuple[int, ...], np.ndarray]:
    """The seeds in common, and how much larger a's values are."""
    seeds = tuple(seed for seed in a.seeds if seed in b.seeds)
    if not seeds:
        raise ValueError(
            f"trials {a.number} and {b.number} have no seed in common ({list(a.seeds)} and {list(b.seeds)}): "
            "only runs of the same seed make a pair"
        )
    of_a, of_b = (
        np.asarray(trial.values, float)[[list(trial.seeds).index(seed) for seed in seeds]] for trial in (a, b)
    )
    return seeds, of_a - of_b


def _cells(row: Ranked) -> tuple[str, ...]:
    mean, low, high = row.interval.mean, row.interval.low, row.interval.high
    behind = ""
    if row.behind is not None:
        half = row.behind.high - row.behind.mean
        behind = f"{row.behind.mean:.3g}" + ("" if math.isnan(half) else f" ± {half:.2g}")
        behind += " (level)" if row.level else ""
    between = "one seed" if math.isnan(low) else f"{low:.4g} to {high:.4g}"
    return str(row.trial.number), f"{mean:.4g}", between, behind, _settings(row.trial.params)


def _settings(params: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _note(rows: list[Ranked]) -> str:
    if any(math.isnan(row.interval.low) for row in rows):
        return "One seed a trial: nothing here tells luck from merit. Search again with 5 seeds."
    level = sum(row.level for row in rows[1:])
    said = (
        f"{level} of the {len(rows) - 1} others cannot be told from the first by these seeds.\n"
        if level
        else ""
    )
    return f"{said}The best of many owes some of its lead to luck: report what the final test gives."
