"""The tables and the figure of experiments/search.py."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from uncertainty import table

from nnkit.diagnose.figure import COLOURS, new_figure, saved

__all__ = ["better", "plot", "put_into", "tables"]


def better(values: Sequence[float], others: Sequence[float]) -> float:
    """In which share of all pairs the first is lower; an equal pair is half a one.

    It is Mann and Whitney's U over its largest value: 1/2 for two samplers that are alike.

    >>> better([1.0, 2.0], [2.0, 3.0])
    0.875
    """
    first, second = np.asarray(values)[:, None], np.asarray(others)
    return float(np.mean((first < second) + 0.5 * (first == second)))


def tables(results: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """A table in Markdown for each data set, the lowest mean first."""
    header = [
        "sampler",
        "best validation loss",
        "lowest, highest",
        "better than random",
        "test accuracy, %",
        "seconds",
        "of them choosing",
    ]
    parts = []
    for dataset, by_sampler in results.items():
        rows = []
        for sampler, found in sorted(by_sampler.items(), key=lambda pair: np.mean(_losses(pair[1]))):
            values = _losses(found)
            beside = "random" in by_sampler and sampler != "random"
            rows.append(
                [
                    sampler,
                    _mean_and_spread(values, 4),
                    f"{min(values):.4f}, {max(values):.4f}",
                    f"{better(values, _losses(by_sampler['random'])):.0%}" if beside else "",
                    _mean_and_spread([100 * one.test_accuracy for one in found], 2),
                    f"{np.median([one.seconds for one in found]):.1f}",
                    f"{np.median([one.choosing for one in found]):.2f}",
                ]
            )
        counts = {len(found) for found in by_sampler.values()}
        few, many = min(counts), max(counts)
        trials = len(next(iter(by_sampler.values()))[0].so_far)
        title = f"{dataset}: {few if few == many else f'{few} to {many}'} searches each of {trials} trials"
        parts.append(f"**{title}**\n\n{table(header, rows)}\n")
    return "\n".join(parts)


def plot(results: Mapping[str, Mapping[str, Sequence[Any]]], path: Path) -> None:
    """For each data set the median of the best so far against trials, and where each search ended."""
    figure = new_figure(9.6, 3.7 * len(results))
    axes = figure.subplots(len(results), 2, squeeze=False, sharey="row", width_ratios=[3, 2])
    for (left, right), (dataset, by_sampler) in zip(axes, results.items(), strict=True):
        order = sorted(by_sampler, key=lambda name: np.median(_losses(by_sampler[name])))
        for place, name in enumerate(order):
            colour = COLOURS[sorted(by_sampler).index(name) % len(COLOURS)]
            paths = np.array([one.so_far for one in by_sampler[name]])
            middle = np.median(paths, axis=0)
            trials = np.arange(1, len(middle) + 1)
            left.step(trials, np.where(np.isfinite(middle), middle, math.nan), color=colour, label=name)
            ends = np.sort(paths[:, -1])
            across = place + np.linspace(-0.22, 0.22, len(ends))
            right.plot(across, ends, "o", color=colour, markersize=3.5)
            right.plot([place - 0.32, place + 0.32], 2 * [np.median(ends)], color=colour, linewidth=2)
        ends = [value for found in by_sampler.values() for value in _losses(found)]
        low, high = min(ends), max(ends)
        # The first trials are many times as bad as the last, and would hide what is between the samplers.
        left.set(ylim=(low - 0.1 * (high - low), high + 1.2 * (high - low) or None), xlabel="trials")
        left.set(ylabel="best validation loss so far", title=f"{dataset}: the median")
        right.set(title="where each search ended")
        right.set_xticks(range(len(order)), order, rotation=30, ha="right", fontsize=8)
        left.legend(frameon=False, fontsize=8)
        for ax in (left, right):
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    saved(figure, path)


def put_into(page: Path, text: str, figure: Path) -> None:
    """Puts the tables between the two marks of a Markdown page, and the figure into ``images/`` beside it.

    Raises:
      ValueError: the page lacks the marks.
    """
    first, last = "<!-- tables -->", "<!-- end of tables -->"
    before = page.read_text()
    if not re.search(f"^{first}$.*^{last}$", before, re.MULTILINE | re.DOTALL):
        raise ValueError(f"{page} needs the lines {first} and {last}, between which the tables go")
    head, rest = before.split(first, 1)
    tail = rest.split(last, 1)[1]
    (page.parent / "images").mkdir(exist_ok=True)
    shutil.copyfile(figure, page.parent / "images" / figure.name)
    page.write_text(f"{head}{first}\n{text}{last}{tail}")


def _losses(found: Sequence[Any]) -> list[float]:
    return [one.validation_loss for one in found]


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
