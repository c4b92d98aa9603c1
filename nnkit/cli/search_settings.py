"""What can be set of a search, and how it is kept in the study for those who join it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from nnkit.cli.search_space import read_space
from nnkit.cli.settings import Config, settings_from
from nnkit.search.space import Space
from nnkit.train.runs import plain

__all__ = ["OfASearch", "SearchSettings", "check_search", "joined", "of_record", "record_of"]

Sampler = Literal["random", "coarse-to-fine", "grid", "quasi-random", "tpe", "gp", "cma-es"]


@dataclasses.dataclass(frozen=True)
class OfASearch:
    """What a search has beside the settings of its trainings. None is the default or, in a study that is there, its."""

    space: str | None = None
    """What is searched, as lr=log:1e-5:1,l2=uniform:0:0.01,width=int:16:256:log,optimizer=adam|sgd.
    All values share one program of learning_rate (or lr), decay, l1, l2, dropout, label_smoothing;
    each has a program of its own of batch_size, epochs, model, optimizer, hidden (64|128x64),
    or width and depth of equal hidden layers."""
    trials: int | None = None
    """How many configurations are tried. [64]"""
    sampler: Sampler | None = None
    """How they are drawn. [random]"""
    seeds: int | None = None
    """Each is trained with so many seeds, from --seed up, the same for all. [1]"""
    folds: int | None = None
    """Cross-validation: all but the test part is cut into so many folds, and each trial trained without each of them.
    [none: --validation is one part]"""
    metric: Literal["val_loss", "val_accuracy"] | None = None
    """What is best on the validation part. [val_loss]"""
    at: Literal["last", "best"] | None = None
    """Of which epoch: the last, or the best one. [last]"""
    pruner: Literal["successive-halving", "median"] | None = None
    """Ends trials early that are behind the others of their batch. [none]"""
    batch: int | None = None
    """How many trials are drawn and run together. [as many as the workers and the sampler want]"""
    members: Literal["exact", "mapped"] | None = None
    """One training after another in each thread, bit for bit what it is alone; or all side by side,
    and equal to rounding. [exact on a CPU, mapped on an accelerator]"""


@dataclasses.dataclass(frozen=True)
class SearchSettings(Config, OfASearch):
    """A search, without what is of one worker alone."""

    guard: Literal["explain", "skip", "roll_back"] = "explain"
    """Not of a search: a trial whose loss becomes inf or NaN is recorded as diverged, and never the best."""
    checkpoint_every: int | None = None
    """Not of a search: trials that are missing are trained by "nnkit search resume"."""
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Not of a search: its record is the study, which optuna-dashboard shows."""
    fold: int = 0
    """Not of a search: every trial is trained on all of its --folds."""
    repeats: int = 1
    """Not of a search: --seeds trains each trial with several."""
    seed: int = 0
    """Decides the split, what is drawn, and the first of --seeds: same seed, same search, to the last bit."""
    name: str | None = None
    """The search's folder in --runs; by default data set, model and "search"."""
    overwrite: bool = False
    """Replace a search of the same name."""

    @property
    def config(self) -> Config:
        """The settings of training alone."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})

    @property
    def seed_list(self) -> list[int]:
        """The seeds that each trial is trained with."""
        return [self.seed + i for i in range(self.seeds or 1)]


DEFAULTS = {"trials": 64, "sampler": "random", "seeds": 1, "metric": "val_loss", "at": "last"}
# What two workers of one study may have differently.
_OF_A_WORKER = ("data_dir", "runs", "name", "overwrite", "trials", "batch", "members")
_NOT_SEARCHING: dict[str, str] = {
    "guard": "a trial whose loss becomes inf or NaN is recorded as diverged",
    "checkpoint_every": "nnkit search resume trains the trials that are missing",
    "log": "its record is the study, which optuna-dashboard shows",
    "fold": "every trial is trained on all of its --folds",
    "repeats": "--seeds trains each trial with several",
}


def check_search(settings: SearchSettings) -> Space:
    """The space, after everything that can be said of the settings without data.

    Raises:
      ValueError, TypeError: in one line.
    """
    for name, why in _NOT_SEARCHING.items():
        if getattr(settings, name) != Config.__dataclass_fields__[name].default:
            raise ValueError(f"a search has no --{name.replace('_', '-')}: {why}")
    for name in ("trials", "seeds", "batch"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if settings.seed < 0 or settings.seed_list[-1] >= 2**32:
        raise ValueError(f"seeds must be whole numbers from 0 to 2**32 - 1, got {settings.seed} and up")
    if settings.folds is not None and settings.validation is not None:
        raise ValueError(
            f"--folds {settings.folds} shares out all but the test part, which leaves --validation "
            f"{settings.validation:g} nothing to say: leave one of them out"
        )
    if not settings.space:
        raise ValueError("a search needs --space, as lr=log:1e-5:1,l2=log:1e-6:1e-2")
    space = read_space(settings.space, settings.config)
    if "label_smoothing" in space.dimensions and settings.metric != "val_accuracy":
        raise ValueError(
            "in --space: label_smoothing changes what val_loss measures, so trials cannot be compared by it: choose by "
            "--metric val_accuracy"
        )
    if settings.pruner is not None and "epochs" in space.dimensions:
        raise ValueError(
            "in --space: a pruner compares trials after the same epochs, and epochs differ here: leave one of them out"
        )
    return space


def record_of(settings: SearchSettings) -> dict[str, Any]:
    """The settings as plain values: what the study keeps."""
    return plain({**DEFAULTS, **_given(settings)}, "settings")


def of_record(found: Any) -> SearchSettings:
    """The settings that a study keeps.

    Raises:
      ValueError: they are of no search on the command line.
    """
    if not isinstance(found, Mapping) or "space" not in found:
        raise ValueError(
            "the study was not begun by 'nnkit search': its training function is in some program; go on with it there"
        )
    own = {f.name for f in dataclasses.fields(SearchSettings)} - {f.name for f in dataclasses.fields(Config)}
    config = settings_from({n: v for n, v in found.items() if n not in own}, "the study's settings")
    return SearchSettings(**config, **{name: found[name] for name in own & found.keys()})


def joined(settings: SearchSettings, study: SearchSettings, name: str) -> SearchSettings:
    """The study's settings with those of a worker, after checking that nothing contradicts.

    Raises:
      ValueError: another value was given than the study has; the message names both.
    """
    given = _given(settings)
    for field, value in given.items():
        there = getattr(study, field)
        if field in _OF_A_WORKER or field == "space" or value == there:
            continue
        shown = f"--{field.replace('_', '-')}"
        raise ValueError(
            f"the study {name!r} has {field} {there!r}, and {shown} {value!r} was given: leave it out to join the "
            "study, or begin another one"
        )
    if settings.space is not None and study.space is not None:
        here, there = read_space(settings.space, settings.config), read_space(study.space, study.config)
        if (difference := here.difference(there.spec())) is not None:
            raise ValueError(
                f"the study {name!r} has another space: {difference}; leave out --space to join the study, or begin "
                "another one"
            )
    return dataclasses.replace(study, **{name: given[name] for name in _OF_A_WORKER if name in given})


def _given(settings: SearchSettings) -> dict[str, Any]:
    """What differs from a search of which nothing was said."""
    fields = dataclasses.fields(SearchSettings)
    return {f.name: value for f in fields if (value := getattr(settings, f.name)) != f.default}
