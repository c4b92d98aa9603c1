"""Studies of trials whose histories are written down, for what is made of a study once it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nnkit.search import Finished, Study, begin_study, tell


class Told(NamedTuple):
    flat: Mapping[str, Any]
    history: Mapping[str, Any]
    stopped: int | None = None


def told_study(trials: Sequence[Told], space: Any, *, metric: str = "val_loss", **options: Any) -> Study:
    """A study with these trials, in memory or where the options say; nothing is trained."""
    study = begin_study(space, metric=metric, **options)
    origin = {"device": {}, "versions": {}, "git": {}}
    for number, (flat, history, stopped) in enumerate(trials):
        study.optuna.enqueue_trial({k: study.space.dimensions[k].stored(v) for k, v in flat.items()})
        trial = study.optuna.ask()
        arrays = {name: np.asarray(values, np.float64) for name, values in history.items()}
        finished = Finished(number, arrays, 1.0, stopped, "exact")
        tell(study, trial, study.space.suggest(trial), finished, provenance=origin)
    return study
