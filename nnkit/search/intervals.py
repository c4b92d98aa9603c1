"""How sure a mean over seeds is: Student's t, and what folds that share training data take from it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Interval", "interval_of"]


class Interval(NamedTuple):
    """A mean and between what it lies; of one number alone nothing is known but the number."""

    mean: float
    spread: float
    """The sample's standard deviation (n - 1); NaN for one number."""
    low: float
    high: float
    t: float
    """The mean in standard errors, Student's t against 0."""
    p: float
    """How often chance alone makes |t| as large, were the mean 0."""


def interval_of(values: Any, confidence: float = 0.95) -> Interval:
    """The mean of the values and its confidence interval, ``mean ± t(n - 1) sqrt(c) s``.

    One value a seed, (seeds,): c = 1 / n. Of values (seeds, folds) the folds share training data and are
    not independent: c = 1 / n + 1 / (folds - 1), the share of held-out to training examples (C. Nadeau and
    Y. Bengio, Machine Learning 52, 2003; for repeated folds R. Bouckaert and E. Frank, PAKDD 2004).

    Raises:
      ValueError: a confidence that is not between 0 and 1, no values, or some that are not finite.
    """
    from scipy.special import stdtr, stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}: 0.95 is usual")
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, got {values.tolist()}")
    n, mean = values.size, float(values.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, math.nan, math.nan, math.nan)
    spread = float(values.std(ddof=1))
    share = 1 / n + (1 / (values.shape[1] - 1) if values.ndim == 2 and values.shape[1] > 1 else 0)
    error = math.sqrt(share) * spread
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    p = 2 * float(stdtr(n - 1, -abs(t)))
    return Interval(mean, spread, mean - half, mean + half, t, p)
