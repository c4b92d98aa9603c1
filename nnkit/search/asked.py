"""What a pruned batch is asked, and how its trials are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from nnkit.search.engine import Engine, Finished
from nnkit.search.pruning import Pruner
from nnkit.types import Array

__all__ = ["Asked", "finished", "keys_and_folds"]


class Asked(NamedTuple):
    """Who is stopped: the rule, the metric that it sees, and whether "min" or "max" is good."""

    pruner: Pruner
    metric: str
    mode: str


def keys_and_folds(engine: Engine) -> tuple[list[Array], list[int] | None]:
    """The keys and folds of a trial's members, seed by seed."""
    keys = [jax.random.key(seed) for seed in engine.seeds for _ in range(engine.folds or 1)]
    return keys, None if engine.folds is None else [*range(engine.folds)] * len(engine.seeds)


def finished(
    engine: Engine, trial: int, columns: Mapping[str, np.ndarray], seconds: float, stopped: int | None
) -> Finished:
    """The trial whose members are the rows of the columns."""
    first = (len(engine.seeds),) if engine.folds is None else (len(engine.seeds), engine.folds)
    history = {name: np.reshape(column, (*first, *column.shape[1:])) for name, column in columns.items()}
    return Finished(trial, history, seconds, stopped, engine.members)
