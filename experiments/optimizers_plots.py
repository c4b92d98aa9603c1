"""The pictures of experiments/optimizers.py; an optimizer has one colour in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from optimizers_paths import SURFACES, Surface, Walk
from optimizers_race import Sweep, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAMILIES", "animate", "plot_momentum", "plot_paths", "plot_race", "plot_rates"]

# The lecture's six from Okabe and Ito's colours, which the colour-blind can tell apart; relatives near them.
COLOURS = {
    "sgd": "#000000",
    "momentum": "#0072B2",
    "nesterov": "#56B4E9",
    "adagrad": "#009E73",
    "adadelta": "#9ACD32",
    "rmsprop": "#E69F00",
    "adam": "#D55E00",
    "adamw": "#F4A582",
    "nadam": "#7B1E02",
    "nadamw": "#B8860B",
    "adamax": "#999933",
    "amsgrad": "#E7298A",
    "radam": "#5E5E5E",
    "lion": "#AA44AA",
    "lamb": "#44AA99",
    "muon": "#332288",
}
FAMILIES = {
    "one rate for all": ("sgd", "momentum", "nesterov"),
    "a rate for each parameter": ("adagrad", "adadelta", "rmsprop"),
    "Adam and relatives": ("adam", "adamw", "nadam", "nadamw", "adamax", "amsgrad", "radam"),
    "sign, layer, matrix": ("lion", "lamb", "muon"),
}
_GREY, _PALE = "#777777", "#dddddd"


def plot_paths(walks: Mapping[str, Mapping[str, Walk]], path: Path) -> None:
    """A panel for each surface: heights in grey, every optimizer's walk, its end as a dot."""
    figure = _figure(10, 7.8)
    panels = figure.subplots(2, 2)
    for ax, (name, walked) in zip(panels.flat, walks.items(), strict=True):
        surface = SURFACES[name]
        _draw_surface(ax, surface)
        for optimizer, one in walked.items():
            _draw_walk(ax, one, COLOURS[optimizer], optimizer)
        ax.set_title(f"{name}, {_length(walked.values())} steps", fontsize=11)
    lines = {line.get_label(): line for ax in panels.flat for line in ax.lines if line.get_gid() == "walk"}
    _legend_below(figure, lines, columns=8)
    _save(figure, path)


def plot_momentum(
    walks: Mapping[float, Walk], surface: Surface, path: Path, *, reached: float = 1e-2
) -> None:
    """A panel for each decay, and below how the height falls."""
    figure = _figure(12, 6.2)
    grid = figure.add_gridspec(2, len(walks), height_ratios=[1, 1])
    heights = figure.add_subplot(grid[1, :])
    colours = ("#9ecae1", "#4292c6", COLOURS["momentum"], "#08306b")
    for i, (decay, one) in enumerate(walks.items()):
        ax = figure.add_subplot(grid[0, i])
        _draw_surface(ax, surface._replace(x=(-10, 10)))
        _draw_walk(ax, one, COLOURS["momentum"], "")
        ax.set_title(f"μ = {decay:g}", fontsize=11)
        above = np.flatnonzero(~(one.values <= reached))
        last = int(above[-1]) + 1 if len(above) else 0
        when = f"from step {last}" if last < len(one.values) else "not yet"
        label = f"μ = {decay:g}: below {reached:g} {when}"
        heights.plot(
            np.maximum(one.values, 1e-12), color=colours[i % len(colours)], label=label, linewidth=1.8
        )
    heights.axhline(reached, color=_GREY, linestyle=":", linewidth=1)
    heights.set(yscale="log", xlabel="step", ylabel="f − minimum", xlim=(0, _length(walks.values())))
    heights.set_ylim(bottom=1e-8)
    _tidy(heights)
    heights.legend(frameon=False, loc="lower left")
    _save(figure, path)


def animate(walks: Mapping[str, Walk], surface: Surface, path: Path, *, frames: int) -> None:
    """The walks of one surface as a GIF: where each optimizer is, and how high."""
    from matplotlib.animation import PillowWriter

    figure = _figure(8.4, 4.3, dpi=72)
    plane, heights = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _draw_surface(plane, surface)
    last = _length(walks.values())
    heights.set(yscale="log", xlim=(0, last), ylim=(1e-6, None), xlabel="step", ylabel="f − minimum")
    moving = []
    for name, one in walks.items():
        style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.6}
        (dot,) = plane.plot([], [], "o", markersize=8, markeredgecolor="white", color=COLOURS[name], zorder=4)
        (tail,), (fall,) = plane.plot([], [], **style), heights.plot([], [], label=name, **style)
        moving.append((one, np.maximum(one.values, 1e-12), dot, tail, fall))
    heights.set_ylim(1e-6, 3 * max(float(one.values[0]) for one in walks.values()))
    _tidy(heights)
    _legend_below(figure, {line.get_label(): line for line in heights.lines}, columns=4, size=9)
    plane.set_title("step 0", fontsize=11)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, so that nothing trembles
    writer = PillowWriter(fps=12)
    with writer.saving(figure, str(path), dpi=72):
        for at in [*np.linspace(0, last, frames).round().astype(int), *[last] * 12]:  # a second at the end
            for one, values, dot, tail, fall in moving:
                dot.set_data(one.points[at : at + 1].T)
                tail.set_data(one.points[: at + 1].T)
                fall.set_data(np.arange(at + 1), values[: at + 1])
            plane.set_title(f"step {at}", fontsize=11)
            writer.grab_frame()


def plot_race(sweeps: Mapping[str, Sweep], path: Path) -> None:
    """Training loss by epoch, a panel for each family, and test accuracy with a dot for each seed."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = _figure(13, 7.2)
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 1.15])
    means = {name: found.train_loss[found.chosen].mean(axis=0) for name, found in sweeps.items()}
    first: Any = None
    for i, (family, members) in enumerate(FAMILIES.items()):
        ax = figure.add_subplot(grid[i // 2, i % 2], sharex=first, sharey=first)
        first = first or ax
        for name, found in sweeps.items():
            if name not in members:
                ax.plot(means[name], color=_PALE, linewidth=0.9, zorder=1)
                continue
            losses = found.train_loss[found.chosen]
            ax.plot(means[name], color=COLOURS[name], linewidth=2, label=name, zorder=3)
            ax.fill_between(
                np.arange(losses.shape[1]),
                losses.min(0),
                losses.max(0),
                color=COLOURS[name],
                alpha=0.18,
                lw=0,
            )
        ax.set(yscale="log", title=family)
        ax.set_xlabel("epoch" if i >= 2 else "")
        ax.set_ylabel("training loss" if i % 2 == 0 else "")
        _tidy(ax)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=9, loc="lower left")
    ax = figure.add_subplot(grid[:, 2])
    rows = {name: summary(found) for name, found in sweeps.items()}
    order = sorted(rows, key=lambda name: rows[name].test_accuracy)
    for at, name in enumerate(order):
        found, row, colour = sweeps[name], rows[name], COLOURS[name]
        accuracy = found.test_accuracy[found.chosen, :, -1]
        ax.plot(accuracy, np.full(len(accuracy), at), "o", color=colour, markersize=5, alpha=0.4, mew=0)
        ax.errorbar(
            row.test_accuracy, at, xerr=row.test_accuracy_std, fmt="D", color=colour, markersize=6, capsize=3
        )
    labels = [f"{name}  {rows[name].learning_rate:.2g}" for name in order]
    ax.set_yticks(range(len(order)), labels)
    for label, name in zip(ax.get_yticklabels(), order, strict=True):
        label.set_color(COLOURS[name])
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    ax.set(xlabel="test accuracy: seeds, mean, standard deviation", title="at the rate chosen on validation")
    _tidy(ax)
    _save(figure, path)


def plot_rates(sweeps: Mapping[str, Sweep], path: Path, *, classes: int) -> None:
    """Final training loss by learning rate; above the axes a cross where trainings diverged."""
    lecture = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam")
    others = ("adadelta", "nadam", "radam", "lion", "lamb", "muon")
    figure = _figure(12, 5.6)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    top = 100.0
    for ax, names in ((left, lecture), (right, others)):
        ax.axhline(np.log(classes), color=_GREY, linestyle=":", linewidth=1)
        shown = [name for name in names if name in sweeps]
        for name in shown:
            _draw_rates(ax, sweeps[name], COLOURS[name], name, top)
        crossed = [name for name in shown if sweeps[name].diverged.any()]
        for row, name in enumerate(reversed(crossed)):
            share = sweeps[name].diverged.mean(axis=1)
            high = np.full(int((share > 0).sum()), 1.04 + 0.035 * row)
            above = {"transform": ax.get_xaxis_transform(), "clip_on": False, "color": COLOURS[name]}
            ax.scatter(sweeps[name].rates[share > 0], high, 12 + 24 * share[share > 0], marker="x", **above)
        if crossed:
            ax.text(0, 1.03, "× diverged", transform=ax.transAxes, color=_GREY, fontsize=9)
        ax.set(xscale="log", yscale="log", xlabel="learning rate")
        _tidy(ax)
        if shown:
            ax.legend(frameon=False, fontsize=9, loc="lower left")
    left.set_ylim(top=top)
    left.set_ylabel("training loss after the last epoch")
    for ax in (left, right):
        place = {"transform": ax.get_yaxis_transform(), "color": _GREY, "fontsize": 8}
        ax.text(0.42, 1.15 * np.log(classes), "guessing", ha="center", **place)
    _save(figure, path)


def _draw_rates(ax: Axes, found: Sweep, colour: str, label: str, top: float) -> None:
    """Median and range of the trainings that did not diverge; what is above ``top`` is a triangle there."""
    losses = np.where(found.diverged, np.nan, found.train_loss[:, :, -1])
    middle, low, high = np.full((3, len(losses)), np.nan)
    some = ~found.diverged.all(axis=1)
    middle[some] = np.nanmedian(losses[some], axis=1)
    low[some], high[some] = np.nanmin(losses[some], axis=1), np.nanmax(losses[some], axis=1)
    ax.plot(found.rates, np.minimum(middle, top), "o-", color=colour, markersize=3.5, label=label)
    ax.fill_between(found.rates, np.minimum(low, top), np.minimum(high, top), color=colour, alpha=0.15, lw=0)
    over = middle > top
    edge = np.full(int(over.sum()), top)
    ax.plot(found.rates[over], edge, "^", color=colour, markersize=8, clip_on=False, in_layout=False)


def _draw_surface(ax: Axes, surface: Surface) -> None:
    x, y = (np.linspace(*limits, 240) for limits in (surface.x, surface.y))
    points = np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)
    heights = np.asarray(jax.jit(jax.vmap(jax.vmap(surface.f)))(jnp.asarray(points)))
    low = float(surface.f(jnp.array(surface.minima[0])))
    # The logarithm of the height spreads the lines evenly from the floor to the steep walls.
    scaled = np.log1p(20 * np.maximum(heights - low, 0))
    ax.contourf(x, y, scaled, levels=11, cmap="Greys", alpha=0.35, zorder=0)
    ax.contour(x, y, scaled, levels=11, colors="#aaaaaa", linewidths=0.5, zorder=1)
    for minimum in surface.minima:
        ax.plot(*minimum, "*", color="white", markeredgecolor="black", markersize=14, zorder=5)
    ax.plot(*surface.start, "s", color="white", markeredgecolor="black", markersize=7, zorder=5)
    ax.set(xlim=surface.x, ylim=surface.y)
    ax.tick_params(labelsize=8)


def _draw_walk(ax: Axes, one: Walk, colour: str, label: str) -> None:
    text = f"{label} {one.rate:.2g}" if label else ""
    ax.plot(*one.points.T, "-", color=colour, linewidth=1.3, zorder=3, label=label, gid="walk")
    ax.plot(*one.points[1:].T, ".", color=colour, markersize=2.5, zorder=3)
    ax.plot(*one.points[-1], "o", color=colour, markersize=6, markeredgecolor="white", zorder=6, label=text)


def _legend_below(figure: Figure, lines: Mapping[Any, Any], columns: int, size: int = 10) -> None:
    legend = figure.legend(
        list(lines.values()),
        list(map(str, lines)),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=size,
    )
    for handle in legend.get_lines():
        handle.set_linewidth(3)


def _length(walks: Iterable[Walk]) -> int:
    return max(len(one.points) for one in walks) - 1


def _tidy(ax: Axes) -> None:
    ax.grid(color="#ececec", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float, dpi: int = 100) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install nnkit[experiments]") from error
    figure = Figure((width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")
