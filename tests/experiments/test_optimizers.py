"""The walks and the race: what they compute, what a run leaves, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, losses, metrics, models, optim, train

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "experiments/optimizers.py"
FILES = {
    "config.json", "result.json", "paths.csv", "paths.png", "beale.gif", "momentum.png",
    "race.csv", "race.png", "race_epochs.csv", "rates.csv", "rates.png",
}  # fmt: skip
TINY = (
    *("--optimizers", "sgd", "adam", "--epochs", 2, "--hidden", 8, "--repeats", 2, "--rates", 0.001, 0.1),
    *("--rates-per-decade", 1, "--path-steps", 3, "--frames", 2),
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # where it finds its parts when it is run
    spec = importlib.util.spec_from_file_location("optimizers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["optimizers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def paths(script) -> ModuleType:
    return sys.modules["optimizers_paths"]


@pytest.fixture(scope="module")
def race(script) -> ModuleType:
    return sys.modules["optimizers_race"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(SCRIPT), *map(str, TINY), "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("figures and tables are in ")
    return runs / "optimizers", done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def by_hand(name: str, gradient: Any, start: Any, rate: float, steps: int) -> np.ndarray:
    """The textbook's loops in float64."""
    point, velocity, square = np.array(start, float), np.zeros(2), np.zeros(2)
    for step in range(1, steps + 1):
        g = gradient(point)
        if name == "sgd":
            point = point - rate * g
        elif name == "momentum":
            velocity = 0.9 * velocity - rate * g
            point = point + velocity
        elif name == "nesterov":
            velocity = 0.9 * velocity - rate * g
            point = point + 0.9 * velocity - rate * g
        elif name == "adagrad":
            square = square + g**2
            point = point - rate * g / np.sqrt(square + 1e-7)
        elif name == "rmsprop":
            square = 0.9 * square + 0.1 * g**2
            point = point - rate * g / np.sqrt(square + 1e-8)
        elif name == "adam":
            velocity, square = 0.9 * velocity + 0.1 * g, 0.999 * square + 0.001 * g**2
            mean, scale = velocity / (1 - 0.9**step), np.sqrt(square / (1 - 0.999**step))
            point = point - rate * mean / (scale + 1e-8)
    return point


def rosenbrock_gradient(p: np.ndarray) -> np.ndarray:
    x, y = p
    return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])


GRADIENTS = {
    "narrow valley": lambda p: p * np.array([1.0, 40.0]),
    "saddle": lambda p: np.array([p[0], -p[1] + p[1] ** 3 / 2]),
    "Rosenbrock": rosenbrock_gradient,
}


@pytest.mark.parametrize("surface", sorted(GRADIENTS))
def test_walks_end_where_a_loop_by_hand_ends(script, paths, surface):
    names = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam")
    where = paths.SURFACES[surface]
    for name, one in paths.walks(where, {n: script.OPTIMIZERS[n] for n in names}, steps=12).items():
        assert one.points.shape == (13, 2)
        ends = by_hand(name, GRADIENTS[surface], where.start, one.rate, 12)
        # Twelve steps in float32, on slopes that multiply a difference by at most 2 a step.
        np.testing.assert_allclose(one.points[-1], ends, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("wrong", ["nesterov", "sgd"])
def test_the_loop_by_hand_tells_optimizers_apart(script, paths, wrong):
    where = paths.SURFACES["narrow valley"]
    one = paths.walks(where, {"momentum": script.OPTIMIZERS["momentum"]}, steps=12)["momentum"]
    ends = by_hand(wrong, GRADIENTS["narrow valley"], where.start, one.rate, 12)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(one.points[-1], ends, rtol=2e-4, atol=2e-5)


def test_beale_and_the_others_are_lowest_where_they_say(paths):
    for name, where in paths.SURFACES.items():
        for minimum in where.minima:
            slope = jax.grad(where.f)(jnp.array(minimum))
            np.testing.assert_allclose(slope, 0, atol=1e-5, err_msg=name)
        limits = [np.linspace(*side, 60) for side in (where.x, where.y)]
        grid = jnp.array(np.stack(np.meshgrid(*limits), axis=-1), jnp.float32)
        assert where.f(jnp.array(where.minima[0])) <= jax.vmap(jax.vmap(where.f))(grid).min() + 1e-6
    assert paths.SURFACES["Beale"].f(jnp.array([1.0, 2.0])) == 2.5**2 + 5.25**2 + 9.625**2


@pytest.mark.parametrize(("surface", "right"), [("Rosenbrock", 1.6), ("narrow valley", 0.5)])
def test_the_rate_of_a_walk_is_one_that_an_eye_can_follow(script, paths, surface, right):
    where = paths.SURFACES[surface]
    where = where._replace(x=(where.x[0], right))
    lowest, highest = np.array([where.x, where.y]).T
    for one in paths.walks(where, {n: script.OPTIMIZERS[n] for n in ("momentum", "adam")}, steps=40).values():
        assert ((one.points >= lowest) & (one.points <= highest)).all()
        steps = np.linalg.norm(np.diff(one.points, axis=0), axis=1)
        assert steps.max() <= 0.15 * np.linalg.norm(highest - lowest)
        assert one.values[-1] < one.values[0]


def test_momentum_at_each_decay_is_the_walk_at_that_decay(paths):
    where = paths.SURFACES["narrow valley"]
    walked = paths.momentum_walks(where, 0.01, 20)
    assert tuple(walked) == (0.2, 0.7, 0.9, 0.99)
    for decay, one in walked.items():
        alone = paths.walk(where.f, optim.momentum(0.01, decay), jnp.array(where.start), 20)
        np.testing.assert_allclose(one.points, alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small() -> data.Splits:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    parts = [data.Dataset(x[a:b], y[a:b], ("no", "yes")) for a, b in ((0, 30), (30, 45), (45, 60))]
    return data.Splits(*parts)


def test_a_training_of_the_sweep_is_a_training_step_by_step(race, small):
    model = models.mlp(2, hidden=(5,))
    rates = np.array([0.05, 0.5])
    found = race.sweep(optim.sgd, model, small, rates, [3, 4], epochs=2, batch_size=8)
    assert found.train_loss.shape == found.test_accuracy.shape == (2, 2, 3)
    run = train.trainer(
        model, losses.softmax_cross_entropy, optim.sgd(0.5), metrics={"accuracy": metrics.accuracy}
    )
    ts, step = run.init(jax.random.key(4), small.train.x[:1]), jax.jit(run.step)
    for epoch in range(3):
        measured = run.evaluate(ts, small.train.arrays)
        np.testing.assert_allclose(found.train_loss[1, 1, epoch], measured["loss"], rtol=1e-5)
        tested = run.evaluate(ts, small.test.arrays)
        np.testing.assert_allclose(found.test_accuracy[1, 1, epoch], tested["accuracy"], rtol=1e-6)
        order = data.shuffled_indices(ts.key, epoch, 30)
        for batch in data.batches(small.train.arrays, 8, order=order, drop_last=True):
            ts, _ = step(ts, batch)


def test_diverged_trainings_are_kept_and_not_chosen(race, small):
    growing = lambda rate: optim.scale(rate)  # uphill; the product of two such kernels is infinite
    model = models.mlp(2, hidden=(5,))
    found = race.sweep(growing, model, small, np.array([1e-3, 1e36]), [0, 1], epochs=1, batch_size=10)
    assert found.diverged.tolist() == [[False, False], [True, True]]
    assert found.chosen == 0
    only = race.sweep(growing, model, small, np.array([1e36, 1e37]), [0, 1], epochs=1, batch_size=10)
    assert only.diverged.all()
    assert not np.isfinite(race.summary(only).train_loss)


def test_the_chosen_rate_has_the_best_validation_accuracy_then_the_lowest_loss(race):
    # The fourth diverged, whatever its accuracy.
    accuracy, loss = np.array([0.5, 0.9, 0.9, 0.95, 0.7]), np.array([1.0, 0.3, 0.2, np.nan, 0.1])
    shaped = [a[:, None, None] for a in (loss, accuracy, 1 - accuracy)]
    found = race.Sweep(np.logspace(-3, 1, 5), [0], *shaped)
    assert found.chosen == 2
    assert race.summary(found)[:2] == (0.1, 0.2)


def test_plots_show_what_diverged(script, race, tmp_path):
    plots = sys.modules["optimizers_plots"]
    loss = np.array([[2.0, 2.1], [0.1, 0.2], [1e6, 1e7], [np.nan, 0.5], [np.nan, np.inf]])[:, :, None]
    loss = np.concatenate([np.full_like(loss, 2.3), loss], axis=2)
    some = race.Sweep(np.logspace(-3, 1, 5), [0, 1], loss, np.ones_like(loss), np.ones_like(loss))
    lost = some._replace(train_loss=np.full_like(loss, np.inf))
    plots.plot_rates({"sgd": some, "lamb": lost}, tmp_path / "rates.png", classes=10)
    plots.plot_race({"sgd": some, "lamb": lost}, tmp_path / "race.png")
    assert {path.name for path in tmp_path.iterdir()} == {"rates.png", "race.png"}


def test_every_optimizer_has_a_colour_and_a_family(script):
    plots = sys.modules["optimizers_plots"]
    assert set(script.OPTIMIZERS) == set(plots.COLOURS)
    assert sorted(script.OPTIMIZERS) == sorted(name for names in plots.FAMILIES.values() for name in names)
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
    assert set(script.WALKERS) <= set(script.OPTIMIZERS)


def test_a_run_leaves_its_files(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (folder / "beale.gif").read_bytes().startswith(b"GIF89a")
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["batch_size"] == 32  # the digits' own, spelled out
    assert config["seed"] == 0
    walked = rows_of(folder / "paths.csv")
    assert [row["optimizer"] for row in walked] == ["sgd", "adam"] * 4
    assert {row["steps"] for row in walked} == {"3"}


def test_the_table_shows_what_is_recorded(finished):
    folder, shown = finished
    race, trainings, epochs = (rows_of(folder / f"{name}.csv") for name in ("race", "rates", "race_epochs"))
    result = json.loads((folder / "result.json").read_text())["race"]
    assert [row["optimizer"] for row in race] == ["sgd", "adam"]
    assert len(trainings) == 2 * 3 * 2
    for row in race:
        name = row["optimizer"]
        rate, loss, accuracy = (float(row[c]) for c in ("learning_rate", "train_loss", "test_accuracy"))
        spread = float(row["test_accuracy_std"])
        [line] = [line for line in shown.splitlines() if line.startswith(f"│ {name} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[:2] == [name, f"{rate:.2g}"]
        assert cells[2].startswith(f"{loss:.2e} ± ")
        assert cells[3] == f"{accuracy:.2%} ± {100 * spread:.2f}"
        assert result[name]["test_accuracy"] == accuracy
        # The same again from the single trainings.
        mine = [r for r in trainings if r["optimizer"] == name]
        validation = np.array([float(r["validation_accuracy"]) for r in mine]).reshape(3, 2).mean(axis=1)
        at = [float(r["learning_rate"]) for r in mine[::2]].index(rate)
        assert validation[at] == validation.max()
        chosen = [float(r["test_accuracy"]) for r in mine[2 * at : 2 * at + 2]]
        assert np.mean(chosen) == pytest.approx(accuracy, abs=1e-12)
        assert np.std(chosen, ddof=1) == pytest.approx(spread, abs=1e-12)
        last = [float(e["train_loss"]) for e in epochs if e["optimizer"] == name and e["epoch"] == "2"]
        assert np.mean(last) == pytest.approx(loss, rel=1e-12)


def test_a_run_is_not_overwritten_unless_asked(finished, script, capsys):
    folder, _ = finished
    before = (folder / "result.json").read_bytes()
    assert script.main(script.Config(runs=folder.parent)) == 1
    assert "is not empty: choose another name" in capsys.readouterr().err
    assert (folder / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": ("sdg",)}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"optimizers": ()}, "optimizers must be different names, got []"),
        ({"optimizers": ("sgd", "sgd")}, "optimizers must be different names, got ['sgd', 'sgd']"),
        ({"dataset": "digist"}, "unknown data set 'digist'; did you mean 'digits'"),
        ({"rates": (1.0, 0.1)}, "rates must be two positive numbers, the lowest first, got 1 and 0.1"),
        ({"rates": (0.0, 0.1)}, "rates must be two positive numbers, the lowest first, got 0 and 0.1"),
        ({"rates_per_decade": 0}, "rates_per_decade must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"path_steps": 0}, "path_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 5000}, "5000"),
        ({"validation": 0.0}, "test and validation must be shares between 0 and 1, got 0.2 and 0"),
        ({"test": 1.0}, "test and validation must be shares between 0 and 1, got 1 and 0.2"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2**31 - repeats, got -1"),
        ({"hidden": (0,)}, "dense(features=...) must be at least 1, got 0"),
        ({"data_dir": Path("/nowhere"), "dataset": "mnist"}, "data_dir /nowhere is not a folder"),
        ({"runs": Path(__file__)}, "test_optimizers.py"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(script, tmp_path, capsys, changes, message):
    config = dataclasses.replace(script.Config(epochs=1, runs=tmp_path / "runs"), **changes)
    assert script.main(config) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert len(stderr.strip().splitlines()) == 1
    assert message in stderr
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_help_explains():
    command = [sys.executable, str(SCRIPT), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    for words in ("race.csv", "--rates-per-decade", "learning rate of the grid", "--data-dir"):
        assert words in " ".join(shown.split())
