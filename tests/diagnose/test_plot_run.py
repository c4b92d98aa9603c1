"""A run's curves from the files that it left, alone or beside others."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from nnkit import train
from nnkit.diagnose import plot_run
from nnkit.diagnose.figure import COLOURS

ROWS = [
    {
        "epoch": i,
        "step": 10 * i,
        "loss": 1 / i,
        "f1": 0.5 + i / 10,
        "val_loss": 1.1 / i,
        "learning_rate": 0.1 * 0.9**i,
    }
    for i in range(1, 4)
]


@pytest.fixture
def run(tmp_path):
    def make(name: str, rows: Any = ROWS) -> str:
        (tmp_path / name).mkdir(parents=True)
        train.write_metrics(tmp_path / name, rows)
        return str(tmp_path / name)

    return make


def lines(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float], str]]:
    figure.savefig(io.BytesIO(), format="png")  # drawing is where matplotlib complains
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()), str(line.get_color()))
        for line in figure.axes[panel].get_lines()
    }


def panels(figure: Figure) -> list[str]:
    return [ax.get_ylabel() for ax in figure.axes]


def test_one_run_has_a_panel_for_every_metric(run, tmp_path):
    figure = plot_run(run("first"), tmp_path / "curves.png")
    assert panels(figure) == ["loss", "f1", "learning rate"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = lines(figure, 0)
    assert found["training"][:2] == ([1, 2, 3], [row["loss"] for row in ROWS])
    assert found["validation"][1] == [row["val_loss"] for row in ROWS]
    assert panels(plot_run(run("second"), metrics=["f1"])) == ["f1", "learning rate"]


def test_several_runs_share_the_panels_and_have_a_colour_each(run):
    longer = [*ROWS, {"epoch": 4, "step": 40, "loss": 0.1, "val_accuracy": 0.9}]
    figure = plot_run([run("first"), run("second", longer)])
    assert panels(figure) == ["loss", "f1", "accuracy", "learning rate"]
    found = lines(figure, 0)
    assert found["first"] == ([1, 2, 3], [row["val_loss"] for row in ROWS], COLOURS[0])
    assert found["_first, training"] == ([1, 2, 3], [row["loss"] for row in ROWS], COLOURS[0])
    assert found["_second, training"] == ([1, 2, 3, 4], [row["loss"] for row in longer], COLOURS[1])
    assert found["second"][2] == COLOURS[1]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["first", "second"]
    assert lines(figure, 2) == {"second": ([4], [0.9], COLOURS[1])}
    # Where there is no validation the line of the training is the one with the name.
    assert set(lines(figure, 1)) == {"first", "second"}


def test_what_is_not_finite_is_said_under_the_runs_name(run):
    diverged = [{"epoch": 1, "loss": 1.0, "val_loss": 1.0}, {"epoch": 2, "loss": np.inf, "val_loss": 2.0}]
    figure = plot_run([run("good"), run("bad", diverged)])
    assert figure.axes[0].get_title() == "bad, training: not finite, first in epoch 2"


def test_runs_of_one_name_are_told_apart(run):
    paths = [run("a/seed0"), run("b/seed0"), run("_c")]
    labels = [text.get_text() for text in plot_run(paths).axes[0].get_legend().get_texts()]
    assert labels == [f"{i}: {path}" for i, path in enumerate(paths, 1)]
    labels = [text.get_text() for text in plot_run(paths[1:]).axes[0].get_legend().get_texts()]
    assert labels == ["seed0", "c"]


def test_more_runs_than_colours(run):
    figure = plot_run([run(f"run{i}") for i in range(9)])
    assert lines(figure, 0)["run7"][2] == COLOURS[0]


def test_errors(run, tmp_path):
    with pytest.raises(ValueError, match="plot_run needs a run folder, got none"):
        plot_run([])
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv in .*nowhere'"):
        plot_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nothing to plot: none of the runs has any of \['accuracy'\]"):
        plot_run([run("a"), run("b")], metrics=["accuracy"])
    with pytest.raises(ValueError, match="nothing to plot: the history has the columns"):
        plot_run(run("c"), metrics=["accuracy"])
