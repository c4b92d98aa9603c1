"""``nnkit search best``, ``export`` and ``plot``: what is read from a study."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nnkit import search
from nnkit.cli.search_place import Place, place_of
from nnkit.search.boundary import boundary_warnings
from nnkit.search.choose import best_of
from nnkit.search.final import final_tests
from nnkit.search.study import Study

__all__ = ["Best", "SearchExport", "SearchPlot", "print_best"]


@dataclasses.dataclass(frozen=True)
class Best:
    """The best trials of a search, with intervals over their seeds, and the command that retrains and tests the best.

    It warns where the best value of a hyper-parameter lies at an end of its range.
    """

    run: str
    """The search's folder, or the storage that it is in."""
    study: str | None = None
    """The study's name, where a storage has several."""
    top: int = 5
    """How many trials are shown."""

    def __call__(self) -> int:
        place = place_of(self.run, self.study)
        return print_best(place.open(), place, self.top)


@dataclasses.dataclass(frozen=True)
class SearchExport:
    """Write all trials of a search to a table: hyper-parameters, values, histories, origin."""

    run: str
    """The search's folder, or the storage that it is in."""
    file: Path
    """A .csv or .parquet file."""
    study: str | None = None
    """The study's name, where a storage has several."""

    def __call__(self) -> int:
        study = place_of(self.run, self.study).open()
        print(f"{study.export(self.file)}: {len(study.trials)} trials")
        return 0


@dataclasses.dataclass(frozen=True)
class SearchPlot:
    """Draw a search: rate.png (the learning rate against training and validation error), parallel.png (each trial a
    line through its hyper-parameters), progress.png (the best so far against trials and seconds), importance.png
    and, of two numbers that were searched, contour.png."""

    run: str
    """The search's folder, or the storage that it is in."""
    folder: Path | None = None
    """Where the figures go. [the search's folder]"""
    study: str | None = None
    """The study's name, where a storage has several."""

    def __call__(self) -> int:
        place = place_of(self.run, self.study)
        study = place.open()
        study.best  # noqa: B018  # refused where there is nothing to draw
        folder = self.folder or dataclasses.replace(place, name=study.name).home
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in _figures(study).items():
            try:
                draw(folder / f"{name}.png")
            except ValueError as error:
                print(f"{name}.png is not drawn: {error}", file=sys.stderr)
            else:
                print(folder / f"{name}.png")
        return 0


def _figures(study: Study) -> dict[str, Callable[[Path], object]]:
    """What there is to draw of a study, by the file's name."""
    rates = [name for name in ("lr", "learning_rate") if name in study.space.dimensions]
    ranges = [name for name, d in study.space.dimensions.items() if d.options is None]
    found: dict[str, Callable[[Path], object]] = {}
    for rate in rates:
        found["rate"] = partial(search.plot_rate, study, parameter=rate)
    found["parallel"] = partial(search.plot_parallel, study)
    found["progress"] = partial(search.plot_progress, study)
    found["importance"] = partial(search.plot_importance, study)
    if len(ranges) > 1:
        found["contour"] = partial(search.plot_contour, study, ranges[0], ranges[1])
    return found


def print_best(study: Study, place: Place, top: int) -> int:
    """Prints the best trials, what is to be known of them, and the command for the first; returns the status.

    Raises:
      ValueError: no trial has a finite value.
    """
    ranking = best_of(study, top)
    states = Counter(trial.state for trial in study.trials)
    print(f"{place}: {', '.join(f'{n} {state}' for state, n in states.items())}")
    print(ranking)
    for warning in boundary_warnings(study):
        print(f"warning: {warning}", file=sys.stderr)
    for test in (tests := final_tests(study)):
        print(f"tested: {test}")
    words = ["nnkit", "search", "retrain", *place.words, "--trial", str(ranking[0].trial.number)]
    print(f"retrain and test it with: {shlex.join([*words, *(['--again'] if tests else [])])}")
    return 0
