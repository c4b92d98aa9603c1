"""The pictures of a study say what its trials say, whatever those are."""

from __future__ import annotations

import io
import math
from datetime import datetime, timedelta
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from nnkit import search
from tests.search.told import Told, told_study

LR = {"lr": search.log_uniform(1e-4, 1.0)}
TWO = {"lr": search.log_uniform(1e-4, 1.0), "mu": search.uniform(0, 1)}


def drawn(figure, tmp_path):
    """The figure's pixels: drawing is where matplotlib complains."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return matplotlib.image.imread(io.BytesIO(png.getvalue()))


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def errorbars(ax):
    """Of each curve with a name: its points, and from where to where the bars reach."""
    found = {}
    for container in ax.containers:
        line, _, bars = container.lines
        reach = [segment[:, 1].tolist() for segment in bars[0].get_segments()] if bars else None
        found[container.get_label()] = (line.get_xdata(), line.get_ydata(), reach, line.get_linestyle())
    return found


def line(ax, label):
    (found,) = [one for one in ax.lines if one.get_label().startswith(label)]
    return found


def rates(rows, **options):
    return told_study(rows, LR, seeds=range(2), **options)


# ------------------------------------------------------------------ the learning rate


def test_the_rate_against_both_errors_with_spread_stops_and_divergence(tmp_path):
    rows = [
        Told({"lr": 0.1}, {"loss": [[9.0, 0.1], [9.0, 0.3]], "val_loss": [[9.0, 0.4], [9.0, 0.5]]}),
        Told({"lr": 0.001}, {"loss": [[9.0, 0.6], [9.0, 0.8]], "val_loss": [[9.0, 0.7], [9.0, 0.8]]}),
        Told({"lr": 1.0}, {"loss": [[1.0, np.nan], [1.0, 2.0]], "val_loss": [[1.0, np.nan], [1.0, 2.0]]}),
        Told({"lr": 0.0001}, {"loss": [[3.0, np.nan]] * 2, "val_loss": [[2.0, np.nan]] * 2}, stopped=1),
    ]
    study = rates(rows)
    assert [t.state for t in study.trials] == ["complete", "complete", "diverged", "pruned"]
    figure = search.plot_rate(study, tmp_path / "rate.png", title="digits")
    (ax,) = figure.axes
    assert figure.get_suptitle() == "digits"
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "learning rate", "loss")
    x, y, reach, style = errorbars(ax)["training"]
    np.testing.assert_allclose(x, [0.001, 0.1])  # by the rate, so that the line does not go back
    np.testing.assert_allclose(y, [0.7, 0.2])
    np.testing.assert_allclose(reach, [[0.6, 0.8], [0.1, 0.3]])
    assert style == "-"
    _, y, reach, _ = errorbars(ax)["validation"]
    np.testing.assert_allclose(y, [0.75, 0.45])
    np.testing.assert_allclose(reach, [[0.7, 0.8], [0.4, 0.5]])
    assert line(ax, "diverged").get_xdata().tolist() == [1.0]
    np.testing.assert_allclose(line(ax, "stopped early").get_xydata(), [[0.0001, 2.0]])
    assert line(ax, "best").get_xdata() == [0.1, 0.1]
    assert legend(ax) == [
        "training", "validation", "stopped early (1)", "diverged (1)", "best: lr = 0.1, loss 0.45",
    ]  # fmt: skip
    low, high = ax.get_xlim()
    assert low < 1e-4  # the whole range of the space is seen, tried or not
    assert high > 1
    assert ax.get_yscale() == "log"  # 0.1 to 2
    assert matplotlib.image.imread(tmp_path / "rate.png").shape == drawn(figure, tmp_path).shape


def test_the_training_error_is_that_of_the_epoch_that_is_judged():
    history = {"loss": [[0.5, 0.4, 0.1]], "val_loss": [[0.9, 0.2, 0.7]]}
    study = told_study([Told({"lr": 0.1}, history)], LR, seeds=[0], at="best")
    _, y, _, _ = errorbars(search.plot_rate(study).axes[0])["training"]
    assert y.tolist() == [0.4]
    # After a stop the epochs that were not trained count for nothing.
    history = {"step": [[5, 10, 10]], "loss": [[0.5, 0.4, np.nan]], "val_loss": [[0.9, 0.2, np.nan]]}
    study = told_study([Told({"lr": 0.1}, history)], LR, seeds=[0])
    _, y, reach, _ = errorbars(search.plot_rate(study).axes[0])["training"]
    assert y.tolist() == [0.4]
    assert reach is None  # one seed has no spread


def test_an_accuracy_is_drawn_as_errors():
    rows = [Told({"lr": 10.0**-i}, {"accuracy": [0.9], "val_accuracy": [0.5 + 0.1 * i]}) for i in range(4)]
    study = told_study(rows, LR, seeds=[0], metric="val_accuracy", mode="max")
    (ax,) = search.plot_rate(study).axes
    np.testing.assert_allclose(errorbars(ax)["validation"][1], [0.2, 0.3, 0.4, 0.5])
    assert ax.get_ylabel() == "error"
    assert legend(ax)[-1] == "best: lr = 0.001, error 20%"
    ax.figure.canvas.draw()
    assert all(text.get_text().endswith("%") for text in ax.get_yticklabels())


def test_other_parameters_leave_points_without_a_line():
    rows = [Told({"lr": 10.0**-i, "mu": i / 4}, {"val_loss": [0.1 * i + 0.1]}) for i in range(4)]
    study = told_study(rows, TWO, seeds=[0])
    assert errorbars(search.plot_rate(study).axes[0])["validation"][3] == "None"
    (ax,) = search.plot_rate(study, parameter="mu").axes
    assert (ax.get_xlabel(), ax.get_xscale()) == ("mu", "linear")
    np.testing.assert_allclose(errorbars(ax)["validation"][0], [0, 0.25, 0.5, 0.75])
    assert "training" not in errorbars(ax)  # the history has no loss


# ------------------------------------------------------------------ several parameters


SPACE = {
    "lr": search.log_uniform(1e-4, 1.0),
    "optimizer": search.conditional({"sgd": {"mu": search.uniform(0, 1)}, "adam": {}}),
    "width": search.integer(1, 8),
}


def conditional_study():
    flats = [
        {"lr": 0.01, "optimizer/kind": "sgd", "optimizer/sgd/mu": 0.25, "width": 8},
        {"lr": 1.0, "optimizer/kind": "adam", "width": 1},
        {"lr": 0.1, "optimizer/kind": "adam", "width": 4},
    ]
    values = [[0.2], [math.nan], [0.4]]
    rows = [Told(flat, {"val_loss": value}) for flat, value in zip(flats, values, strict=True)]
    return told_study(rows, SPACE, seeds=[0])


def test_parallel_coordinates_lead_through_every_value(tmp_path):
    ax = search.plot_parallel(study := conditional_study()).axes[0]
    paths = ["lr", "optimizer/kind", "optimizer/sgd/mu", "width", "val_loss"]
    assert [text.get_text() for text in ax.get_xticklabels()] == paths
    runs = {tuple(one.get_ydata().round(4)): one for one in ax.lines if len(one.get_xdata()) == len(paths)}
    # Of equal shares of a count or a choice the middle; below the axis what a trial does not have.
    assert sorted(runs) == sorted([
        (0.5, 0.25, 0.25, 0.9375, 0.0),
        (1.0, 0.75, -0.12, 0.0625, 1.12),
        (0.75, 0.75, -0.12, 0.4375, 1.0),
    ])  # fmt: skip
    assert runs[(1.0, 0.75, -0.12, 0.0625, 1.12)].get_linestyle() == "--"  # diverged, beyond the worst
    best, worst = runs[(0.5, 0.25, 0.25, 0.9375, 0.0)], runs[(0.75, 0.75, -0.12, 0.4375, 1.0)]
    assert best.get_zorder() > worst.get_zorder()
    assert best.get_linewidth() > worst.get_linewidth()
    texts = {
        (round(t.get_position()[0] + 0.04), round(t.get_position()[1], 4)): t.get_text() for t in ax.texts
    }
    assert texts[0, 0.5] == "0.01"
    assert texts[1, 0.25] == "sgd"
    assert texts[3, 0.9375] == "8"
    assert texts[4, 0.0] == "0.2"
    assert texts[4, 1.12] == "diverged"
    assert texts[2, -0.12] == "none"
    assert all(-0.2 < at < 1.2 for _, at in texts)
    short = search.plot_parallel(study, parameters=["width", "lr"])
    assert [text.get_text() for text in short.axes[0].get_xticklabels()] == ["width", "lr", "val_loss"]
    drawn(short, tmp_path)


def test_a_high_metric_has_its_best_on_top():
    rows = [Told({"lr": 10.0**-i}, {"val_accuracy": [v]}) for i, v in enumerate([0.5, 0.9, math.nan, 0.7])]
    ax = search.plot_parallel(told_study(rows, LR, seeds=[0], metric="val_accuracy", mode="max")).axes[0]
    runs = sorted(
        (one.get_zorder(), *one.get_ydata().round(4)) for one in ax.lines if one.get_color() != "black"
    )
    assert [run[1:] for run in runs] == [(0.5, -0.12), (1.0, 0.0), (0.25, 0.5), (0.75, 1.0)]


def test_contours_are_of_the_trials_and_hold_to_them(tmp_path):
    grid = [(10.0**-i, j / 4) for i in range(5) for j in range(5)]
    value = lambda lr, mu: 1 + (math.log10(lr) + 2) + 2 * mu  # linear on the scales: interpolation is exact
    rows = [Told({"lr": lr, "mu": mu}, {"val_loss": [5 + value(lr, mu)]}) for lr, mu in grid]
    rows.append(Told({"lr": 0.02, "mu": 0.3}, {"val_loss": [math.nan]}))
    figure = search.plot_contour(study := told_study(rows, TWO, seeds=[0]), "lr", "mu")
    ax = figure.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()) == (
        "lr",
        "mu",
        "log",
        "linear",
    )
    filled, points, lost = ax.collections
    np.testing.assert_allclose(points.get_offsets(), grid)
    np.testing.assert_allclose(points.get_array(), [5 + value(*at) for at in grid])
    np.testing.assert_allclose(lost.get_offsets(), [[0.02, 0.3]])
    # The first band is what is below all levels. Of the others each lies between its two levels, up to what
    # the metric (it spans 6) changes within a cell of the mesh, of which there are 300 a side.
    bands = filled.get_paths()[1:-1]
    for low, high, band in zip(filled.levels, filled.levels[1:], bands, strict=False):
        found = [5 + value(*corner) for corner in band.vertices]
        assert low - 6 / 300 < min(found)
        assert max(found) < high + 6 / 300
    assert len(bands) == 12
    best = line(ax, "best")
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (1e-4, 0.0)
    assert best.get_label() == "best: 0.0001, 0"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["diverged (1)", "best: 0.0001, 0"]
    drawn(figure, tmp_path)
    assert study.best.number == 20


def test_contours_need_points_off_a_line_and_numbers(tmp_path):
    rows = [Told({"lr": 10.0**-i, "mu": i / 4}, {"val_loss": [0.1 * i + 0.1]}) for i in range(4)]
    ax = search.plot_contour(told_study(rows, TWO, seeds=[0]), "lr", "mu").axes[0]
    assert len(ax.collections) == 1
    figure = search.plot_contour(conditional_study(), "lr", "optimizer/kind")
    points, lost = figure.axes[0].collections
    np.testing.assert_allclose(points.get_offsets(), [[0.01, 0], [0.1, 1]])
    np.testing.assert_allclose(lost.get_offsets(), [[1.0, 1]])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["sgd", "adam"]
    drawn(figure, tmp_path)


# ------------------------------------------------------------------ importance


@pytest.fixture(scope="module")
def lopsided():
    """40 trials in which lr is all that matters, one of them lost."""
    draw = np.random.default_rng(0)
    flats = [
        {"lr": float(10**-u), "mu": float(m)}
        for u, m in zip(4 * draw.random(40), draw.random(40), strict=True)
    ]
    loss = lambda flat: (math.log10(flat["lr"]) + 2) ** 2 + 0.01 * flat["mu"]
    rows = [Told(flat, {"val_loss": [loss(flat)]}) for flat in flats]
    return told_study([*rows, Told({"lr": 1.0, "mu": 0.5}, {"val_loss": [math.inf]})], TWO, seeds=[0])


@pytest.mark.parametrize("evaluator", ["ped-anova", "fanova", "impurity"])
def test_importance_finds_what_matters(lopsided, evaluator):
    found = search.importances(lopsided, evaluator)
    assert list(found) == ["lr", "mu"]
    assert math.isclose(sum(found.values()), 1)
    assert found["lr"] > 0.85
    assert search.importances(lopsided, evaluator) == found


def test_importance_is_optunas(lopsided):
    import optuna

    optunas = optuna.importance.FanovaImportanceEvaluator(seed=0)
    expected = optuna.importance.get_param_importances(lopsided.optuna, evaluator=optunas)
    assert search.importances(lopsided, "fanova") == expected
    (ax,) = search.plot_importance(lopsided, evaluator=optunas).axes
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], list(expected.values()))
    assert [text.get_text() for text in ax.get_yticklabels()] == list(expected)
    assert ax.yaxis_inverted()  # the first on top
    assert ax.get_xlabel() == "share of the importance for val_loss (FanovaImportanceEvaluator)"
    assert ax.texts[0].get_text() == f"{100 * expected['lr']:.0f}%"


# ------------------------------------------------------------------ progress


def course(values, seconds, *, mode="min", name="s", metric="val_loss"):
    """What plot_progress reads of a study, with times that are known."""
    begun = datetime(2026, 1, 1)
    trials = [
        SimpleNamespace(
            number=i,
            state="complete" if math.isfinite(v) else "diverged",
            value=v,
            started=begun,
            ended=begun + timedelta(seconds=s),
        )
        for i, (v, s) in enumerate(zip(values, seconds, strict=True))
    ]
    running = SimpleNamespace(number=9, state="running", value=None, started=begun, ended=None)
    return SimpleNamespace(trials=[*trials, running], mode=mode, metric=metric, name=name)


def test_progress_is_the_best_so_far_in_the_order_of_arrival(tmp_path):
    study = course([math.inf, 0.5, 0.7, 0.2], [1, 4, 2, 8])
    by_trials, by_seconds = search.plot_progress(study).axes
    curve = by_trials.lines[0]
    assert curve.get_drawstyle() == "steps-post"
    np.testing.assert_array_equal(curve.get_xydata(), [[1, math.nan], [2, 0.7], [3, 0.5], [4, 0.2]])
    np.testing.assert_array_equal(
        by_seconds.lines[0].get_xydata(), [[1, math.nan], [2, 0.7], [4, 0.5], [8, 0.2]]
    )
    assert (by_trials.get_xlabel(), by_seconds.get_xlabel()) == ("trials", "seconds")
    assert by_trials.get_ylabel() == "best loss so far"
    assert by_seconds.get_xlim()[0] == 0
    assert by_seconds.get_legend() is None


def test_progress_of_several_is_a_median_and_its_quartiles(tmp_path):
    several = [course(v, [1, 2]) for v in ([0.8, 0.4], [0.6, 0.6], [0.9, 0.2])]
    figure = search.plot_progress({"random": several, "tpe": course([0.5], [3])})
    by_trials, by_seconds = figure.axes
    np.testing.assert_allclose(line(by_trials, "random").get_xydata(), [[1, 0.8], [2, 0.4]])
    np.testing.assert_allclose(line(by_seconds, "tpe").get_xydata(), [[3, 0.5]])
    (band,) = by_trials.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.3)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.85)
    assert legend(by_seconds) == ["random", "tpe"]
    drawn(figure, tmp_path)


def test_progress_of_accuracies_falls():
    study = course([0.5, 0.4, 0.9], [1, 2, 3], mode="max", metric="val_accuracy")
    np.testing.assert_allclose(search.plot_progress(study).axes[0].lines[0].get_ydata(), [0.5, 0.5, 0.1])


# ------------------------------------------------------------------ grid and random


def test_grid_and_random_with_their_projections(tmp_path):
    at = {"grid": [(10.0**-i, j / 2) for i in (0, 2, 4) for j in range(3)]}
    draw = np.random.default_rng(0)
    at["random"] = [(float(10 ** (-4 * u)), float(v)) for u, v in draw.random((9, 2))]
    loss = lambda lr, mu: 1 + (math.log10(lr) + 1) ** 2 + 0.01 * mu
    studies = [
        told_study(
            [Told({"lr": a, "mu": b}, {"val_loss": [loss(a, b)]}) for a, b in at[name]], TWO, seeds=[0]
        )
        for name in ("grid", "random")
    ]
    figure = search.plot_grid_and_random(*studies, "lr", "mu", tmp_path / "grid.png")
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["grid: 9 trials, 3 values of lr", "random: 9 trials, 9 values of lr"]
    for name, study, (square, above, beside) in zip(
        at, studies, (figure.axes[:3], figure.axes[3:]), strict=True
    ):
        np.testing.assert_allclose(line(square, "trials").get_xydata(), at[name])
        values = [loss(*place) for place in at[name]]
        x, y = np.transpose(at[name])
        np.testing.assert_allclose(above.lines[0].get_xydata(), np.transpose([x, values]))
        np.testing.assert_allclose(beside.lines[0].get_xydata(), np.transpose([values, y]))
        across = square.collections[0].get_segments()
        np.testing.assert_allclose([segment[0, 0] for segment in across], x)
        assert legend(square)[-1] == f"best: {study.best.value:.3g}"
        assert above.get_xscale() == "log"
        assert above.get_xlim() == square.get_xlim()
    assert figure.axes[1].get_ylim() == figure.axes[4].get_ylim()  # one scale for both
    assert matplotlib.image.imread(tmp_path / "grid.png").size


# ------------------------------------------------------------------ errors


def test_what_cannot_be_drawn_is_refused():
    one = rates([Told({"lr": 0.1}, {"val_loss": [0.5, 0.6]})])
    lost = rates([Told({"lr": 0.1}, {"val_loss": [math.nan, 0.6]})])
    kinds = conditional_study()
    nothing = "nothing to plot: no trial of the study has a finite val_loss yet"
    for plot in (search.plot_rate, search.plot_parallel, search.importances):
        with pytest.raises(ValueError, match=nothing):
            plot(lost)
    with pytest.raises(ValueError, match="unknown hyper-parameter 'lrr'; did you mean 'lr'"):
        search.plot_rate(one, parameter="lrr")
    with pytest.raises(ValueError, match="unknown hyper-parameter 'depth'"):
        search.plot_parallel(one, parameters=["depth"])
    with pytest.raises(ValueError, match="needs two hyper-parameters, and got 'lr' twice"):
        search.plot_contour(one, "lr", "lr")
    only = told_study(
        [Told({"lr": 0.1, "optimizer/kind": "adam", "width": 1}, {"val_loss": [0.5]})], SPACE, seeds=[0]
    )
    with pytest.raises(ValueError, match="no complete trial has both 'lr' and 'optimizer/sgd/mu'"):
        search.plot_contour(only, "lr", "optimizer/sgd/mu")
    with pytest.raises(ValueError, match="no complete trial has 'optimizer/sgd/mu'"):
        search.plot_rate(only, parameter="optimizer/sgd/mu")
    with pytest.raises(ValueError, match="needs 10 complete trials, better 50, and there are 2"):
        search.importances(kinds)
    with pytest.raises(ValueError, match="got none"):
        search.plot_progress({})
    with pytest.raises(ValueError, match="of one metric, and got max of a and min of val_loss"):
        search.plot_progress({"a": course([1.0], [1]), "b": course([1.0], [1], mode="max", metric="a")})
    with pytest.raises(ValueError, match="no trial of 's' has a finite val_loss yet"):
        search.plot_progress(course([math.inf], [1]))
    with pytest.raises(ValueError, match="two searches of one space, and these differ: 'lr' is"):
        search.plot_grid_and_random(one, told_study([], {"lr": search.uniform(0, 1)}), "lr", "lr")
    with pytest.raises(ValueError, match="compares one metric, and got val_loss and loss"):
        search.plot_grid_and_random(one, told_study([], LR, metric="loss"), "lr", "lr")


def test_an_unknown_evaluator_is_named(lopsided):
    with pytest.raises(ValueError, match="unknown evaluator 'anova'; did you mean 'fanova' or 'ped-anova'"):
        search.importances(lopsided, "anova")


@pytest.mark.parametrize(("evaluator", "package"), [("fanova", "scikit-learn")])
def test_a_missing_package_is_named(lopsided, monkeypatch, evaluator, package):
    import optuna

    def absent(seed):
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setattr(optuna.importance, "FanovaImportanceEvaluator", absent)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install nnkit\[search\]"):
        search.importances(lopsided, evaluator)
