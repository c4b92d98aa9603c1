"""The pictures say what the numbers say, whatever the numbers are."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnkit.diagnose import plot_confusion, plot_curves, plot_examples

HISTORY = [
    {
        "epoch": 1,
        "step": 10,
        "loss": 2.0,
        "accuracy": 0.5,
        "val_loss": 2.1,
        "val_accuracy": 0.45,
        "seconds": 1.0,
    },
    {
        "epoch": 2,
        "step": 20,
        "loss": 0.9,
        "accuracy": 0.8,
        "val_loss": 1.0,
        "val_accuracy": 0.75,
        "seconds": 1.0,
    },
    {
        "epoch": 3,
        "step": 30,
        "loss": 0.1,
        "accuracy": 0.9,
        "val_loss": 1.1,
        "val_accuracy": 0.75,
        "seconds": 1.0,
    },
]


def drawn(figure: Figure) -> np.ndarray:
    """The figure as an image: drawing is where matplotlib complains."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return matplotlib.image.imread(io.BytesIO(png.getvalue()))


def lines(ax: Any) -> dict[str, np.ndarray]:
    """Each curve of a panel that has a name, as an array of (x, y)."""
    return {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}


def legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts(ax: Any) -> dict[tuple[int, int], str]:
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts}


# ------------------------------------------------------------------ curves


def test_curves_show_both_parts_of_each_metric_and_the_best_epoch():
    figure = plot_curves(HISTORY, title="digits")
    loss, accuracy = figure.axes
    assert figure.get_suptitle() == "digits"
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "accuracy"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["epoch", "epoch"]
    # Of the two epochs with the highest validation accuracy the first.
    assert legend(loss) == ["training", "validation", "best, epoch 2: 1"]
    assert legend(accuracy) == ["training", "validation", "best, epoch 2: 75.00%"]
    np.testing.assert_array_equal(lines(loss)["training"], [[1, 2.0], [2, 0.9], [3, 0.1]])
    np.testing.assert_array_equal(lines(loss)["validation"], [[1, 2.1], [2, 1.0], [3, 1.1]])
    np.testing.assert_array_equal(lines(accuracy)["training"], [[1, 0.5], [2, 0.8], [3, 0.9]])
    np.testing.assert_array_equal(lines(accuracy)["validation"], [[1, 0.45], [2, 0.75], [3, 0.75]])
    assert [line[0, 0] for name, line in lines(loss).items() if name.startswith("best")] == [2]
    # The curves are told apart without their colours as well.
    assert len({(line.get_linestyle(), line.get_marker()) for line in loss.lines[:2]}) == 2
    drawn(figure)


def test_scales():
    def scales(rows: list[dict[str, float]]) -> list[str]:
        return [ax.get_yscale() for ax in plot_curves(rows).axes]

    assert scales(HISTORY) == ["log", "linear"]  # The loss spans 0.1 to 2.1.
    assert scales(HISTORY[:2]) == ["linear", "linear"]
    assert scales([{"loss": 100.0}, {"loss": 0.0}]) == ["linear"]
    assert scales([{"loss": 100.0}, {"loss": -1.0}]) == ["linear"]
    assert scales([{"accuracy": 0.01}, {"accuracy": 0.9}]) == ["linear"]


@pytest.mark.parametrize("low", [1.9, 0.06, 1e-3, 1e-12])
def test_a_logarithmic_panel_has_at_least_two_numbers_within_it(low):
    ax = plot_curves([{"loss": 20.0}, {"loss": low}]).axes[0]
    ax.figure.canvas.draw()
    bottom, top = ax.get_ylim()
    shown = [float(t.get_text()) for t in ax.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert len(shown) >= 2


def test_the_learning_rate_has_a_panel_where_there_is_one():
    rows = [{**row, "learning_rate": 10.0 ** -row["epoch"]} for row in HISTORY]
    figure = plot_curves(rows)
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "accuracy", "learning rate"]
    np.testing.assert_allclose(lines(figure.axes[2])["learning_rate"], [[1, 0.1], [2, 0.01], [3, 0.001]])
    assert figure.axes[2].get_yscale() == "log"
    drawn(figure)


def test_best_can_be_given_and_is_else_the_lowest_validation_loss():
    without = [{k: v for k, v in row.items() if "accuracy" not in k} for row in HISTORY]
    assert legend(plot_curves(without).axes[0])[-1] == "best, epoch 2: 1"
    assert legend(plot_curves(without, best=3).axes[0])[-1] == "best, epoch 3: 1.1"
    assert legend(plot_curves([{"loss": 1.0}, {"loss": 0.5}], best=1).axes[0]) == [
        "training",
        "best, epoch 1: 1",
    ]
    # Training alone chooses no epoch.
    assert legend(plot_curves([{"loss": 1.0}, {"loss": 0.5}]).axes[0]) == ["training"]


def test_rows_may_lack_columns():
    rows = [{"loss": 3.0}, {"loss": 2.0, "val_loss": 2.5}, {"loss": 1.0}, {"loss": 1.0, "val_loss": None}]
    (ax,) = plot_curves(rows).axes
    np.testing.assert_array_equal(lines(ax)["training"][:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(lines(ax)["validation"], [[2, 2.5]])
    assert ax.get_xlim() == (0.5, 4.5)


def test_one_epoch_is_a_dot_over_its_number():
    for row in (HISTORY[0], {"epoch": 1, "loss": 2.0}):
        ax = plot_curves([row]).axes[0]
        ax.figure.canvas.draw()
        shown = [t.get_text() for t in ax.get_xticklabels() if 0.5 <= t.get_position()[0] <= 1.5]
        assert shown == ["1"]
        assert ax.lines[0].get_marker() == "o"
        assert ax.lines[0].get_markersize() >= 3


def test_a_history_that_goes_on_keeps_its_epochs():
    (ax,) = plot_curves([{"epoch": 5, "loss": 1.0}, {"epoch": 7, "loss": 0.5}]).axes
    np.testing.assert_array_equal(lines(ax)["training"], [[5, 1.0], [7, 0.5]])
    assert ax.get_xlim() == (4.5, 7.5)


def test_other_metrics_and_scalar_arrays():
    rows = [{"mean_absolute_error": jnp.float32(i), "loss": np.float32(i)} for i in range(1, 4)]
    figure = plot_curves(rows, metrics=["mean_absolute_error", "no_such"])
    assert [ax.get_ylabel() for ax in figure.axes] == ["mean absolute error"]


def test_values_that_are_not_finite_are_gaps_and_said():
    rows = [dict(row) for row in HISTORY]
    rows[1].update(loss=math.nan, val_loss=math.inf)
    rows[2].update(loss=-math.inf)
    figure = plot_curves(rows)
    loss, accuracy = figure.axes
    assert loss.get_title() == (
        "training: not finite, first in epoch 2\nvalidation: not finite, first in epoch 2"
    )
    assert accuracy.get_title() == ""
    np.testing.assert_array_equal(lines(loss)["training"][:, 1], [2.0, np.nan, np.nan])
    np.testing.assert_array_equal(lines(loss)["validation"][:, 1], [2.1, np.nan, 1.1])
    drawn(figure)


def test_a_best_epoch_is_never_one_that_is_not_finite():
    rows = [{"val_loss": math.nan}, {"val_loss": 2.0}, {"val_loss": -math.inf}, {"val_loss": 1.0}]
    assert legend(plot_curves(rows).axes[0])[-1] == "best, epoch 4: 1"


@pytest.mark.parametrize(
    "rows",
    [
        HISTORY[:1],
        [{"epoch": i, "loss": 1.0, "accuracy": 0.5, "val_loss": 1.0} for i in range(1, 5)],
        [{"epoch": i, "loss": 0.0, "accuracy": 1.0, "val_accuracy": 1.0} for i in range(1, 5)],
        [{"epoch": i, "loss": math.nan, "val_loss": math.nan, "accuracy": 0.1} for i in range(1, 5)],
        [{"epoch": 1, "loss": math.inf}],
        [{"epoch": 1, "loss": 1e-300}, {"epoch": 2, "loss": 1e300}],
        [{"epoch": 1, "loss": 0.0}, {"epoch": 2, "loss": 1.7e308}],
        [{"epoch": 7, "loss": 5e-324}, {"epoch": 8, "loss": 1.0}],
        [{"epoch": i, "loss": 1 / i} for i in range(1, 2001)],
    ],
    ids=[
        "one epoch",
        "constant",
        "perfect",
        "all NaN",
        "one Inf",
        "600 decades",
        "near overflow",
        "subnormal",
        "2000 epochs",
    ],
)
def test_histories_that_are_no_pleasure(rows):
    figure = plot_curves(rows)
    image = drawn(figure)
    assert image.shape[:2] == tuple(np.round(figure.get_size_inches() * 120)[::-1])


VALUES = st.floats() | st.none()


@given(
    st.lists(
        st.fixed_dictionaries({"loss": VALUES}, optional={"val_loss": VALUES, "accuracy": VALUES}), min_size=1
    )
)
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # Shrinking a drawing takes minutes.
def test_any_history_is_drawn(rows):
    drawn(plot_curves(rows))


@pytest.mark.parametrize(
    ("rows", "columns"), [([], []), ([{}], []), ([{"epoch": 1, "elbo": 2.0}], ["epoch", "elbo"])]
)
def test_nothing_to_plot(rows, columns):
    with pytest.raises(ValueError, match="nothing to plot") as caught:
        plot_curves(rows)
    assert str(caught.value) == (
        f"nothing to plot: the history has the columns {columns}, and curves are drawn of ['loss', 'accuracy']"
    )


# ------------------------------------------------------------------ confusion

MATRIX = np.array([[8, 2, 0], [1, 19, 0], [1, 2, 1]])
NAMES = ["cat", "dog", "cow"]


def check_confusion(figure: Figure) -> None:
    cells, bars, scale = figure.axes
    shares = MATRIX / MATRIX.sum(1, keepdims=True)
    assert figure.get_suptitle() == "accuracy 82.35% of 34 examples"
    assert (cells.get_xlabel(), cells.get_ylabel()) == ("predicted class", "true class")
    assert [t.get_text() for t in cells.get_xticklabels()] == NAMES
    assert [t.get_text() for t in cells.get_yticklabels()] == NAMES
    np.testing.assert_allclose(cells.images[0].get_array(), shares, rtol=1e-15)
    assert texts(cells) == {(i, j): str(MATRIX[i, j]) for i, j in np.argwhere(MATRIX)}
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], shares.diagonal(), rtol=1e-15)
    assert [t.get_text() for t in bars.texts] == ["80.0%", "95.0%", "25.0%"]
    assert bars.get_xlabel() == "accuracy of the class"
    assert scale.get_ylabel() == "share of the true class"
    # Rows are true classes from the top down, and the bars stand beside their rows.
    assert cells.get_ylim() == bars.get_ylim() == (2.5, -0.5)


def test_confusion():
    figure = plot_confusion(MATRIX, NAMES)
    check_confusion(figure)
    drawn(figure)


@pytest.mark.parametrize("wrong", [MATRIX.T, MATRIX[::-1], MATRIX / MATRIX.sum(0), MATRIX / MATRIX.sum()])
def test_confusion_mutants(wrong):
    """Transposed, flipped, normalised by columns, by the whole."""
    with pytest.raises(AssertionError):
        check_confusion(plot_confusion(wrong, NAMES))


def test_confusion_of_a_jax_array_with_a_title():
    assert plot_confusion(jnp.asarray(MATRIX), title="digits").get_suptitle() == (
        "digits\naccuracy 82.35% of 34 examples"
    )


@pytest.mark.parametrize("n", [1, 2, 20, 21, 100])
def test_confusion_of_few_and_many_classes(n):
    counts = np.full((n, n), 2) + 100 * np.eye(n, dtype=int)
    figure = plot_confusion(counts, [f"a very long name of class {i}" for i in range(n)])
    cells = figure.axes[0]
    assert len(cells.texts) == (n * n if n <= 20 else 0)
    labels = [t.get_text() for t in cells.get_xticklabels()]
    assert labels[0] == "a very long name …"
    assert len(labels) == (n if n <= 60 else 50)
    image = drawn(figure)
    assert image.shape[0] < 1700
    assert image.shape[1] < 1700


def test_the_text_in_a_cell_stands_out_from_its_colour():
    cells = plot_confusion(np.array([[99, 1, 0], [30, 70, 0], [31, 0, 69]])).axes[0]
    for (i, j), text in zip(texts(cells), cells.texts, strict=True):
        red, green, blue, _ = cells.images[0].to_rgba(cells.images[0].get_array())[i, j]
        luminance = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
        ] @ np.array([0.2126, 0.7152, 0.0722])
        light, dark = (1.0, luminance) if text.get_color() == "white" else (luminance, 0.0)
        # WCAG's contrast ratio; 4.5 is what it asks of small text.
        assert (light + 0.05) / (dark + 0.05) > 4.5


def test_a_class_without_examples_and_a_matrix_without_any():
    figure = plot_confusion(np.array([[3, 0], [0, 0]]))
    assert [t.get_text() for t in figure.axes[1].texts] == ["100.0%", "none"]
    drawn(figure)
    figure = plot_confusion(np.zeros((3, 3), int))
    assert figure.get_suptitle() == "no examples"
    drawn(figure)


def test_names_are_not_taken_for_formulas():
    drawn(plot_confusion(MATRIX, [r"$\frac{$", "$", "_^"], title="$x_$"))


def test_large_counts_keep_their_digits():
    figure = plot_confusion(np.array([[1234567, 0], [0, 2.5]]))
    assert [t.get_text() for t in figure.axes[0].texts] == ["1234567", "2.5"]


@pytest.mark.parametrize(
    ("matrix", "classes", "message"),
    [
        (np.ones((2, 3)), None, "matrix must be square, (classes, classes), got the shape (2, 3)"),
        (np.ones(4), None, "matrix must be square, (classes, classes), got the shape (4,)"),
        (np.ones((0, 0)), None, "matrix must be square, (classes, classes), got the shape (0, 0)"),
        (-np.eye(2), None, "matrix must hold counts, and some of its values are negative or not finite"),
        (
            np.eye(2) * np.nan,
            None,
            "matrix must hold counts, and some of its values are negative or not finite",
        ),
        (np.eye(2), ["a"], "classes has 1 names, and matrix has 2 classes"),
        (np.eye(2), ["a", "b", "c"], "classes has 3 names, and matrix has 2 classes"),
    ],
)
def test_what_is_no_confusion_matrix(matrix, classes, message):
    with pytest.raises(ValueError, match="matrix") as caught:
        plot_confusion(matrix, classes)
    assert str(caught.value) == message


# ------------------------------------------------------------------ examples


def examples(n: int = 6, channels: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    images = np.arange(n * 16 * math.prod(channels), dtype=np.float32).reshape(n, 4, 4, *channels)
    labels = np.zeros(n, int)
    predictions = np.arange(n) % 3
    confidences = np.linspace(0.5, 0.95, n)
    return images, labels, predictions, confidences


def test_examples_are_the_mistakes_the_surest_first():
    images, labels, predictions, confidences = examples()
    figure = plot_examples(images, labels, predictions, confidences)
    assert [ax.get_title() for ax in figure.axes[:4]] == [
        "0 → 2\n95%",
        "0 → 1\n86%",
        "0 → 2\n68%",
        "0 → 1\n59%",
    ]
    assert figure.get_suptitle() == "4 wrong of 6, the surest 4: true → predicted"
    for ax, index in zip(figure.axes, [5, 4, 2, 1], strict=False):
        shown = ax.images[0].get_array()
        np.testing.assert_allclose(shown, (images[index] - images[index].min()) / 15, rtol=1e-6)
    drawn(figure)


def test_at_most_count_examples_and_names():
    names = ["cat", "dog", "an animal of another kind"]
    figure = plot_examples(*examples(), classes=names, count=2, title="zoo")
    shown = [ax.get_title() for ax in figure.axes if ax.images]
    assert shown == ["cat\n→ an animal of anot…\n95%", "cat\n→ dog\n86%"]
    assert figure.get_suptitle() == "zoo\n4 wrong of 6, the surest 2: true → predicted"


@pytest.mark.parametrize("count", [1, 8, 9, 24])
def test_every_example_has_its_place(count):
    n = 40
    figure = plot_examples(np.ones((n, 3, 3)), np.zeros(n, int), np.ones(n, int), np.ones(n), count=count)
    assert sum(bool(ax.images) for ax in figure.axes) == count
    assert len(figure.axes) - count < 4


def test_ties_stand_in_the_order_of_the_data_and_nan_comes_last():
    sure = np.array([0.5, np.nan, 0.9, 0.9, 0.5])
    images = np.stack([np.eye(5)[i].reshape(1, 5) for i in range(5)])
    figure = plot_examples(images, np.zeros(5, int), np.ones(5, int), sure)
    assert [int(ax.images[0].get_array().argmax()) for ax in figure.axes if ax.images] == [2, 3, 0, 4, 1]
    drawn(figure)


@pytest.mark.parametrize(
    ("channels", "shown", "dtype"),
    [
        ((), (4, 4), "float32"),
        ((1,), (4, 4), "bfloat16"),
        ((3,), (4, 4, 3), "uint8"),
        ((3,), (4, 4, 3), "float16"),
    ],
)
def test_kinds_of_images(channels, shown, dtype):
    images, *rest = examples(3, channels)
    figure = plot_examples(jnp.asarray(images).astype(dtype), *(jnp.asarray(a) for a in rest))
    assert figure.axes[0].images[0].get_array().shape == shown
    drawn(figure)


def test_ignored_examples_are_no_mistakes():
    images, _, predictions, confidences = examples()
    figure = plot_examples(images, np.array([0, -1, -1, 0, 0, -1]), predictions, confidences)
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["0 → 1\n86%"]
    assert figure.get_suptitle() == "1 wrong of 3, the surest 1: true → predicted"


def test_blank_and_damaged_images():
    values = [0.0, 7.0, np.nan, np.inf, [1.0, np.inf, -np.inf, np.nan]]
    images = np.stack([np.full((4, 4), value, float) for value in values])
    figure = plot_examples(images, np.zeros(5, int), np.ones(5, int), np.ones(5))
    assert [float(ax.images[0].get_array().max()) for ax in figure.axes[:5]] == [0.0, 0.0, 0.0, 0.0, 1.0]
    drawn(figure)


def test_no_mistakes():
    images, labels, _, confidences = examples()
    figure = plot_examples(images, labels, labels, confidences)
    assert figure.get_suptitle() == "0 wrong of 6"
    assert not any(ax.images for ax in figure.axes)
    drawn(figure)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"images": np.ones((6, 16))},
            "images must be (n, height, width), with 1 or 3 channels last or none, got the shape (6, 16): "
            "reshape them",
        ),
        (
            {"images": np.ones((6, 3, 4, 4))},
            "images must be (n, height, width), with 1 or 3 channels last or none, got the shape (6, 3, 4, 4): "
            "reshape them",
        ),
        ({"labels": np.zeros(5, int)}, "labels must have the shape (6,), got (5,)"),
        ({"predictions": np.zeros((6, 3))}, "predictions must have the shape (6,), got (6, 3)"),
        ({"confidences": np.zeros((6, 3))}, "confidences must have the shape (6,), got (6, 3)"),
        ({"classes": ["a", "b"]}, "classes has 2 names, and there is a class 2"),
    ],
)
def test_examples_that_do_not_fit(changed, message):
    arguments: dict[str, Any] = dict(
        zip(("images", "labels", "predictions", "confidences"), examples(), strict=True)
    )
    with pytest.raises(ValueError, match=r"must|classes") as caught:
        plot_examples(**(arguments | changed))
    assert str(caught.value) == message


# ------------------------------------------------------------------ files and imports


@pytest.mark.parametrize(
    "plot",
    [
        lambda path: plot_curves(HISTORY, path),
        lambda path: plot_confusion(MATRIX, NAMES, path),
        lambda path: plot_examples(*examples(), path),
    ],
    ids=["curves", "confusion", "examples"],
)
def test_the_file_is_a_png_of_the_size_of_the_figure(tmp_path, plot):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    figure = plot(path)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert os.listdir(tmp_path) == ["a.png"]
    image = matplotlib.image.imread(path)
    width, height = np.round(figure.get_size_inches() * 120)
    assert image.shape == (height, width, 4)
    assert 400 < width < 1600
    assert 200 < height < 1600
    # Something is drawn, and the margins are white: nothing sticks out.
    assert 0.002 < (image[..., :3] < 0.9).any(-1).mean() < 0.9
    for edge in (image[:1], image[-1:], image[:, :1], image[:, -1:]):
        assert (edge[..., :3] > 0.9).all()


def test_importing_diagnose_costs_no_matplotlib():
    code = "import sys, nnkit.diagnose; print([m for m in sys.modules if m.startswith('matplotlib')])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_plots_leave_pyplot_alone():
    code = (
        "import sys; from nnkit.diagnose import plot_curves; plot_curves([{'loss': 1.0}]);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for plot in (
        lambda: plot_curves(HISTORY),
        lambda: plot_confusion(MATRIX),
        lambda: plot_examples(*examples()),
    ):
        with pytest.raises(ImportError) as caught:
            plot()
        assert str(caught.value) == "plots need matplotlib: pip install nnkit[experiments]"
