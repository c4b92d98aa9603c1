"""``nnkit search`` from its beginning to the run folder of the best trial."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from nnkit import cli, search, train
from nnkit.cli import recipe, search_live, search_retrain
from nnkit.cli.search_live import Board
from nnkit.cli.search_program import Program
from nnkit.search.records import Trial

SMALL = ["--hidden", "4", "--epochs", "1", "--batch-size", "539", "--dropout", "0"]
SPACE = ["--space", "lr=log:1e-3:1,l2=log:1e-6:1e-2"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(recipe, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """The folder of a search that has ended, trained in earnest."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = [
        "search",
        *SMALL,
        *SPACE,
        "--trials",
        "3",
        "--seeds",
        "2",
        "--seed",
        "5",
        "--runs",
        str(runs),
    ]
    assert cli.main(arguments) == 0
    return runs / "digits-mlp-search"


@pytest.fixture
def copy(searched, tmp_path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "copy"))


@pytest.fixture
def quick(monkeypatch) -> None:
    """Searches that compile in no time: a formula in the place of a training."""

    def whole(self, key, hparams):
        settings = self.settings(hparams)
        noise = 0.01 * jax.random.uniform(key)
        return None, {"val_loss": jnp.log10(settings.learning_rate) ** 2 + noise + settings.l2}

    monkeypatch.setattr(Program, "_whole", whole)


def values(folder: Path) -> list[list[float]]:
    return [trial.values.tolist() for trial in search.open_study(folder).trials]


def test_a_search_leaves_a_study_in_its_folder(searched):
    study = search.open_study(searched)
    assert (study.metric, study.mode, study.at, study.seeds, study.sampler) == (
        "val_loss", "min", "last", (5, 6), "random"
    )  # fmt: skip
    assert [trial.state for trial in study.trials] == ["complete"] * 3
    assert list(study.trials[0].params) == ["lr", "l2"]
    record = train.read_config(searched)
    assert record["config"]["search"]["space"] == SPACE[1]
    assert record["config"]["search"]["trials"] == 3
    assert record["versions"]["jax"]


def test_what_is_there_is_not_begun_again(searched, capsys):
    assert cli.main(["search", *SMALL, *SPACE, "--runs", str(searched.parent)]) == 1
    err = capsys.readouterr().err
    assert (
        f"error: there is a search in {str(searched)!r}: 'nnkit search resume {searched}' goes on with it"
        in err
    )
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_keeps_everything_and_resume_goes_on(quick, tmp_path, capsys, monkeypatch, number, status):
    """To the numbers of a search that nothing has stopped, whatever the batch and the number of threads."""
    arguments = ["search", *SMALL, *SPACE, "--seeds", "2", "--runs", str(tmp_path)]
    assert cli.main([*arguments, "--name", "whole", "--trials", "9", "--batch", "9", "--workers", "1"]) == 0
    getsignal = signal.getsignal  # what the test runner ignores is not ignored here
    monkeypatch.setattr(
        signal, "getsignal", lambda n: signal.SIG_DFL if getsignal(n) == signal.SIG_IGN else getsignal(n)
    )
    with monkeypatch.context() as patch:
        told = search_live._Lines.__call__

        def also(self, event, view):
            told(self, event, view)
            if event == "trial" and view.done == 2:
                os.kill(os.getpid(), number)

        patch.setattr(search_live._Lines, "__call__", also)
        assert cli.main([*arguments, "--name", "parts", "--trials", "6", "--batch", "4"]) == status
    run = tmp_path / "parts"
    err = capsys.readouterr().err
    assert err == (
        f"interrupted: 2 of 6 done, all of them kept in {run}\ngo on with: nnkit search resume {run}\n"
    )
    states = [trial.state for trial in search.open_study(run).trials]
    assert (states.count("complete"), states.count("waiting")) == (2, 2)
    assert cli.main(["search", "resume", str(run), "--trials", "7"]) == 0
    assert "digits, mlp: 7 trials of 1 epochs drawn by random from lr=log:1e-3:1" in capsys.readouterr().out
    assert cli.main(["search", "resume", str(run)]) == 0  # 7 are what it is to have now
    assert "7 of 7 done" in capsys.readouterr().out
    assert cli.main(["search", "resume", str(run), "--trials", "9", "--workers", "2"]) == 0
    assert values(run) == values(tmp_path / "whole")


def test_the_best_names_the_command_that_retrains_it_to_the_bit(copy, capsys):
    study = search.open_study(copy)
    best = study.best
    assert cli.main(["search", "best", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"{copy}: 3 complete\n" in out
    assert "95% interval" in out
    command = out.splitlines()[-1].removeprefix("retrain and test it with: ")
    assert command == f"nnkit search retrain {copy} --trial {best.number}"
    assert cli.main(shlex.split(command)[1:]) == 0
    out = capsys.readouterr().out
    value = best.values[0]
    assert f"val_loss {float(value)!r}, recorded {float(value)!r}\n" in out
    run = copy / f"trial-{best.number}-seed5"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.csv", "metrics.jsonl", "result.json", "model.npz", "model.json", "search.json"
    }  # fmt: skip
    (row,) = train.read_metrics(run)
    assert row["val_loss"] == value
    assert all(row[name] == best.history[name][0, 0] for name in best.history)
    assert row["learning_rate"] == pytest.approx(best.params["lr"])
    # It is a run like others.
    config = train.read_config(run)
    assert (config["seed"], config["config"]["seed"], config["config"]["hidden"]) == (5, 5, [4])
    assert config["config"]["learning_rate"] == best.params["lr"]
    # The test part was used once, and is used again only on demand.
    (tested,) = search.final_tests(search.open_study(copy))
    assert (tested.trial, tested.again) == (best.number, False)
    assert tested.numbers["accuracy"] == train.read_result(run)["accuracy"]
    capsys.readouterr()
    other = (best.number + 1) % 3
    again = ["search", "retrain", str(copy), "--trial", str(other), "--seed", "6"]
    assert cli.main(again) == 1
    assert f"error: the test part was used: trial {best.number} on " in capsys.readouterr().err
    assert not (copy / f"trial-{other}-seed6").exists()


@pytest.mark.slow
def test_another_trial_and_seed_are_tested_again_only_on_demand(copy, capsys):
    assert cli.main(["search", "retrain", str(copy), "--trial", "0"]) == 0
    again = ["search", "retrain", str(copy), "--trial", "1", "--seed", "6", "--again"]
    assert cli.main(again) == 0
    recorded = values(copy)[1][1]
    assert f"val_loss {recorded!r}, recorded {recorded!r}\n" in capsys.readouterr().out
    # The split is the search's, whatever the seed: the test part is the same.
    run = copy / "trial-1-seed6"
    assert (train.read_config(run)["seed"], train.read_config(run)["config"]["seed"]) == (6, 5)
    assert cli.main(["eval", str(run)]) == 0
    np.save(copy / "a.npy", np.zeros((8, 8), np.float32))
    assert cli.main(["predict", str(run), str(copy / "a.npy")]) == 0
    assert [test.again for test in search.final_tests(search.open_study(copy))] == [False, True]
    capsys.readouterr()
    assert cli.main(["search", "best", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "tested: trial 1 on " in out
    assert out.endswith(" --again\n")


@pytest.fixture
def retrained(copy, monkeypatch):
    """Gives every retraining the recorded history, with what it is to be changed by."""

    def with_changes(**changes) -> None:
        def retrain(study, train_fn, number, seed, fold):
            assert fold is None
            trial = study.trials[number]
            at = trial.seeds.index(seed) if seed in trial.seeds else 0
            history = {name: np.asarray(a[at], np.float32) for name, a in trial.history.items()}
            return None, {**history, **changes}

        def leave(folder, *rest):
            train.write_result(folder, {})
            return recipe.Outcome(0.5, 0.5, 0.5, 0.5)

        monkeypatch.setattr(search, "retrain", retrain)
        monkeypatch.setattr(search_retrain, "leave", leave)

    return with_changes


def test_a_number_that_does_not_come_back_is_status_1(copy, capsys, retrained):
    """As on another machine."""
    retrained(val_loss=np.float32([1.5]))
    assert cli.main(["search", "retrain", str(copy), "--folder", str(copy / "run")]) == 1
    out = capsys.readouterr()
    assert "val_loss 1.5, recorded " in out.out
    assert "val_loss differ from what was recorded: with the same versions\n" in out.err
    assert train.read_metrics(copy / "run")[0]["val_loss"] == 1.5


def test_another_seed_has_nothing_to_be_compared_with(copy, capsys, retrained):
    retrained()
    assert cli.main(["search", "retrain", str(copy), "--seed", "9", "--folder", str(copy / "run")]) == 0
    assert "with seed 9, which was not among the search's [5, 6]" in capsys.readouterr().out
    for seed, message in (("-1", "seed must be a whole number from 0 to 2**32 - 1, got -1"),):
        assert cli.main(["search", "retrain", str(copy), "--seed", seed, "--again"]) == 1
        assert message in capsys.readouterr().err
    # What is there is not written over, and not tested for nothing.
    assert cli.main(["search", "retrain", str(copy), "--again", "--folder", str(copy / "run")]) == 1
    assert "is not empty: choose another name" in capsys.readouterr().err
    assert len(search.final_tests(search.open_study(copy))) == 1


def test_rows_end_with_the_training():
    """Of a training that was stopped early the history goes on with NaN."""
    history = {"step": np.int32([3, 6, 6]), "val_loss": np.float32([2, 1, np.nan])}
    rows = list(search_retrain._rows(history, lambda step: 0.1 * step))
    assert [(row["step"], row["val_loss"], round(row["learning_rate"], 3)) for row in rows] == [
        (3, 2, 0.2),
        (6, 1, 0.5),
    ]


def test_a_fold_of_a_search_that_has_none(copy, capsys):
    assert cli.main(["search", "retrain", str(copy), "--fold", "1"]) == 1
    assert "--fold 1 is of a search with folds, and this one has none" in capsys.readouterr().err


def test_a_retraining_that_fails_leaves_no_folder(copy, capsys, monkeypatch):
    monkeypatch.setattr(search, "retrain", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["search", "retrain", str(copy)])
    assert not list(copy.glob("trial-*"))
    assert search.final_tests(search.open_study(copy)) == []


def test_all_trials_as_a_table(searched, tmp_path, capsys):
    file = tmp_path / "trials.csv"
    assert cli.main(["search", "export", str(searched), str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 3 trials\n"
    assert [row["values"] for row in search.read_table(file)] == values(searched)


@pytest.mark.slow
def test_figures(copy, capsys):
    assert cli.main(["search", "plot", str(copy), "--folder", str(copy / "figures")]) == 0
    assert {path.name for path in (copy / "figures").iterdir()} == {
        "rate.png",
        "parallel.png",
        "progress.png",
        "contour.png",
    }
    assert "importance.png is not drawn: the importance of hyper-parameters needs" in capsys.readouterr().err


def test_workers_join_by_storage_and_name(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = ["--storage", str(tmp_path / "studies.db"), "--study", "mine"]
    assert cli.main(["search", *storage]) == 1
    assert "there is no study in" in capsys.readouterr().err
    assert cli.main(["search", *storage, *SMALL, *SPACE, "--trials", "2", "--max-time", "1e-9"]) == 1
    assert capsys.readouterr().err == (
        f"0 of 2 done\ngo on with: nnkit search resume {storage[1]} --study mine\n"
        "error: the study 'mine' has no trial with a finite val_loss yet: no trials\n"
    )
    # What is contradicted is refused, what is left out is the study's.
    for wrong, message in (
        (["--epochs", "3"], "the study 'mine' has epochs 1, and --epochs 3 was given"),
        (["--space", "lr=log:1e-3:1"], "the study 'mine' has another space: 'l2' is there and not here"),
    ):
        assert cli.main(["search", *storage, *wrong]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert cli.main(["search", *storage]) == 0
    out = capsys.readouterr().out
    assert "2 trials of 1 epochs" in out
    assert f"retrain and test it with: nnkit search retrain {storage[1]} --study mine --trial " in out
    assert cli.main(["search", "best", storage[1]]) == 0
    assert not list(Path(tmp_path).glob("runs"))


def test_a_study_of_another_program(tmp_path, capsys):
    search.sweep(
        lambda key, hparams: {"val_loss": hparams["lr"]},
        {"lr": search.uniform(0, 1)},
        trials=1,
        run_dir=tmp_path,
    )
    for command in (["resume"], ["retrain"]):
        assert cli.main(["search", *command, str(tmp_path)]) == 1
        assert "error: the study was not begun by 'nnkit search'" in capsys.readouterr().err
    assert cli.main(["search", "best", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_trial_that_diverges_is_never_the_best(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--space", "lr=1e-2|1e30:traced", "--sampler", "grid", "--trials", "2"]
    assert cli.main(["search", *SMALL, *options, "--epochs", "2", "--runs", str(tmp_path)]) == 0
    assert "2 of 2 done, 1 diverged" in capsys.readouterr().out
    study = search.open_study(tmp_path / "digits-mlp-search")
    assert {trial.params["lr"]: trial.state for trial in study.trials} == {1e-2: "complete", 1e30: "diverged"}
    assert cli.main(["search", "retrain", str(study.folder), "--trial", str(1 - study.best.number)]) == 1
    assert "is diverged: take one that is complete" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--pruner", "successive-halving", "--seeds", "2"],
        ["--members", "mapped"],
        ["--folds", "3", "--seeds", "2"],
        ["--folds", "3", "--pruner", "median"],
        ["--sampler", "coarse-to-fine", "--metric", "val_accuracy", "--at", "best", "--patience", "1"],
        ["--dropout", "0.1", "--optimizer", "momentum"],
    ],
)
def test_the_number_comes_back_however_it_was_searched(tmp_path, capsys, options):
    space = ["--space", "lr=log:1e-4:1,decay=uniform:0.5:1,l1=log:1e-6:1e-2,width=4|8"]
    run = tmp_path / "digits-mlp-search"
    arguments = ["search", "--hidden", "4", "--epochs", "3", *space, "--trials", "9", "--runs", str(tmp_path)]
    assert cli.main([*arguments, *options]) == 0
    best = search.open_study(run).best
    assert cli.main(["search", "retrain", str(run)]) == 0
    out = capsys.readouterr()
    if "mapped" in options:
        assert float(out.out.split(", recorded ")[0].split()[-1]) == pytest.approx(best.value, rel=1e-3)
    else:
        assert f", recorded {float(best.values.flat[0])!r}\n" in out.out
        assert out.err == ""
    fold = "-fold0" if "--folds" in options else ""
    assert cli.main(["eval", str(run / f"trial-{best.number}-seed0{fold}")]) == 0
    if fold:
        assert cli.main(["search", "retrain", str(run), "--fold", "2", "--seed", "0", "--again"]) == 0
        value = float(best.values[0, 2])
        assert f"val_loss of fold 2 {value!r}, recorded {value!r}\n" in capsys.readouterr().out
        assert train.read_config(run / f"trial-{best.number}-seed0-fold2")["config"]["fold"] == 2
        assert cli.main(["search", "retrain", str(run), "--fold", "3", "--again"]) == 1
        assert "fold must be from 0 to 2, got 3" in capsys.readouterr().err


def board(target: int = 8, **options) -> Board:
    study = SimpleNamespace(mode="min", metric="val_loss", trials=[])
    return Board(study, "here", target, **options)


def ended(number: int, value: float, **more) -> Trial:
    return Trial(number, **{"state": "complete", "hparams": {}, "params": {"lr": 0.1, "hidden": (8, 4)}, "value": value,
                            "values": np.array([value, value + 0.2]), **more})  # fmt: skip


def test_the_table_of_the_best_trials():
    shown = board()
    shown.add(
        [ended(0, 0.5), ended(1, 0.25), ended(2, np.inf, state="diverged"), ended(3, 0.1, state="pruned")]
    )
    shown.add(
        [ended(4, 0.25, repeat_of=1), ended(5, 0.75, params={"lr": 1e-3}), ended(6, 1, state="running")]
    )
    shown.running = 1
    console = Console(width=80, force_terminal=False, file=io.StringIO())
    console.print(shown.rendered())
    lines = console.file.getvalue().splitlines()
    assert lines[0].strip() == "here"
    assert [line.split("│")[1:-1] for line in lines if line.startswith("│")] == [
        [f" {cell} " for cell in row]
        for row in (
            ("    1", "0.25 ± 0.14", "  0.1", "   8x4"),
            ("    0", " 0.5 ± 0.14", "  0.1", "   8x4"),
            ("    5", "0.75 ± 0.14", "0.001", "      "),
        )
    ]
    assert lines[-1].startswith("6 of 8 done, 1 diverged, 1 pruned, 1 running")
    shown.study.mode = "max"
    assert [trial.number for trial in shown.top] == [5, 0, 1]


def test_the_time_left_is_that_of_the_trials_after_the_first(monkeypatch):
    """Before the first one there was a compilation, which does not come again."""
    now = [100.0]
    monkeypatch.setattr(search_live.time, "monotonic", lambda: now[0])
    shown, hurried = board(), board(max_time=50)
    assert (shown.left(), hurried.left()) == (None, 50)
    for number, at in enumerate((130.0, 132.0, 134.0)):
        now[0] = at
        shown.add([ended(number, 0.5)])
        hurried.add([ended(number, 0.5)])
    assert shown.left() == 5 * 2
    assert shown.status() == "3 of 8 done, 0:10 left"
    now[0] = 145.0
    assert (round(shown.left(), 1), hurried.left()) == (5 * 7.5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "a search needs --space, as lr=log:1e-5:1"),
        (["search", "--space", "epoch=2|3"], "in --space: unknown setting 'epoch'; did you mean 'epochs'"),
        (["search", *SPACE, "--study", "a"], "--study names a study within --storage"),
        (
            ["search", *SPACE, "--storage", "mongodb://here"],
            "storage='mongodb://here' is of no kind that is known",
        ),
        (
            ["search", *SPACE, "--storage", "postgresql://nobody@127.0.0.1:1/none"],
            "cannot reach the storage postgresql+psycopg://nobody@127.0.0.1:1/none",
        ),
        (["search", *SPACE, "--dataset", "mnist", "--data-dir", "/nowhere"], "/nowhere"),
        (["search", *SPACE, "--workers", "0"], "workers"),
        (
            ["search", *SPACE, "--folds", "1"],
            "needs from 2 folds to as many as there are examples (1438), got 1",
        ),
        (["search", "best", "/nowhere"], "there is no study in '/nowhere'"),
        (["search", "resume", "/nowhere"], "there is no study in '/nowhere'"),
        (["search", "plot", "/nowhere"], "there is no study in '/nowhere'"),
        (["search", "retrain", "/nowhere"], "there is no study in '/nowhere'"),
        (["search", "export", "/nowhere", "a.csv"], "there is no study in '/nowhere'"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert list(tmp_path.glob("runs/*")) == []


def test_without_optuna(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["search", *SMALL, *SPACE, "--runs", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: nnkit.search needs Optuna: pip install 'nnkit[search]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_only_asks_for_help_does_not_load_what_a_search_needs():
    """Optuna alone would take half as long again as everything else."""
    code = (
        "import contextlib, sys\nfrom nnkit import cli\n"
        "with contextlib.suppress(SystemExit):\n    cli.main(['search', '--help'])\n"
        "print(sorted({'optuna', 'scipy', 'sqlalchemy', 'sklearn', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [[], ["resume"], ["best"], ["retrain"], ["export"], ["plot"]])
def test_every_command_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["search", *words, "--help"])
    assert left.value.code == 0
    assert f"usage: {' '.join(['nnkit', 'search', *words])} " in capsys.readouterr().out


def test_wrong_options_are_status_2(capsys):
    for arguments in (["search", "bets"], ["search", "--trials", "many"], ["search", "best"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
