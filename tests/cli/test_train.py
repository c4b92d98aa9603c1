"""``nnkit train``, ``resume`` and ``eval``: a run, the same run again, and the same run in two parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnkit import cli, train
from nnkit.cli import leaving, recipe
from nnkit.cli.settings import Config
from tests.cli.conftest import SMALL

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _no_pictures(finished, monkeypatch) -> None:
    """After the first run, whose files are looked at: drawing takes longer than training here."""
    monkeypatch.setattr(recipe, "draw", lambda *_: None)


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs came to the same numbers, to the last bit."""
    names = ["model.npz", "metrics.csv", "model.json"]
    results = [{**train.read_result(folder), "seconds": 0} for folder in (a, b)]
    return results[0] == results[1] and all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


def test_a_run_leaves_its_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "metrics.csv", "metrics.jsonl", "checkpoints", "result.json", "model.npz", "model.json",
        "curves.png", "confusion.png", "mistakes.png",
    }  # fmt: skip
    rows = train.read_metrics(finished)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["learning_rate"] == pytest.approx(3e-3 * 0.93)
    assert [row["step"] for row in train.read_records(finished)] == [row["step"] for row in rows]
    assert train.read_result(finished)["test_examples"] == 359


def test_one_command_repeats_a_run_from_its_folder(finished, capsys):
    """Beside the first, under the next free name, with the same numbers."""
    assert cli.main(["train", "--config", str(finished), "--runs", str(finished.parent)]) == 0
    again = finished.parent / f"{finished.name}-2"
    assert f"in {again}" in capsys.readouterr().out
    assert same_run(finished, again)


def test_the_settings_as_a_file_and_back(finished, tmp_path, capsys):
    assert cli.main(["train", *SMALL, "--l2", "1e-4", "--show-config"]) == 0
    text = capsys.readouterr().out
    assert "batch_size = 32\n" in text  # the digits' own, spelled out
    (tmp_path / "mine.toml").write_text(text)
    assert cli.main(["train", "--config", str(tmp_path / "mine.toml"), "--show-config", "--epochs", "7"]) == 0
    assert capsys.readouterr().out == text.replace("epochs = 2", "epochs = 7")
    # A run's config.json gives the same settings, without its name.
    assert cli.main(["train", f"--config={finished}/config.json", "--show-config"]) == 0
    recorded = capsys.readouterr().out
    assert recorded == text.replace("l2 = 0.0001", "l2 = 0.0").replace(
        'runs = "runs"', f'runs = "{finished.parent}"'
    )


def interrupt_in(epoch: int, number: signal.Signals, monkeypatch) -> None:
    """Has the process sent itself a signal in an epoch."""
    whole = recipe._rate_of

    def rate_of(rate):
        callback = whole(rate)

        def also(event, view):
            if event == "epoch" and view.epoch == epoch:
                os.kill(os.getpid(), number)
            return callback(event, view)

        return also

    monkeypatch.setattr(recipe, "_rate_of", rate_of)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_goes_on_to_the_same_numbers(
    finished, tmp_path, capsys, monkeypatch, number, status
):
    monkeypatch.setattr(signal, "getsignal", _default(signal.getsignal))
    with monkeypatch.context() as patch:
        interrupt_in(1, number, patch)
        assert cli.main(["train", *SMALL, "--runs", str(tmp_path)]) == status
    run = tmp_path / finished.name
    err = capsys.readouterr().err
    assert f"interrupted: the epochs so far are in {run}/metrics.csv\n" in err
    assert err.endswith(f"go on with: nnkit resume {run}\n")
    assert not (run / "result.json").exists()
    assert len(train.read_metrics(run)) == 1
    assert cli.main(["resume", str(run)]) == 0
    assert "seed 3" in capsys.readouterr().out
    assert same_run(finished, run)
    assert [row["epoch"] for row in train.read_records(run)] == [1, 2]


def _default(getsignal):
    """Whatever the test runner ignores is not ignored here."""
    return lambda number: signal.SIG_DFL if getsignal(number) == signal.SIG_IGN else getsignal(number)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(finished, copy, capsys):
    for name in ("metrics.csv", "metrics.jsonl", "model.npz", "model.json", "result.json"):
        (copy / name).unlink()
    assert cli.main(["resume", str(copy)]) == 0
    assert same_run(finished, copy)


def test_a_run_that_has_ended_goes_on_only_for_more_epochs(finished, tmp_path, capsys):
    assert cli.main(["resume", str(finished)]) == 0
    assert "has had its 2 epochs: --epochs gives it more" in capsys.readouterr().out
    assert cli.main(["train", *SMALL, "--epochs", "1", "--runs", str(tmp_path)]) == 0
    run = tmp_path / finished.name
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0
    assert same_run(finished, run)
    assert train.read_config(run)["config"]["epochs"] == 2
    capsys.readouterr()
    assert cli.main(["resume", str(run), "--epochs", "1"]) == 1
    assert "the saved run has taken 68 steps" in capsys.readouterr().err


def test_a_longer_run_that_is_interrupted_goes_on_with_its_new_settings(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(signal, "getsignal", _default(signal.getsignal))
    run = tmp_path / finished.name
    shutil.copytree(finished, run)
    result = (run / "result.json").read_bytes()
    # What is refused leaves the run as it was.
    assert cli.main(["resume", str(run), "--epochs", "1"]) == 1
    assert "go on with" not in capsys.readouterr().err
    assert (run / "result.json").read_bytes() == result
    assert train.read_config(run) == train.read_config(finished)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "build_model", _interrupted)
        assert cli.main(["resume", str(run), "--epochs", "4"]) == 130
    assert capsys.readouterr().err.endswith(f"\ngo on with: nnkit resume {run} --epochs 4\n")
    assert (run / "result.json").read_bytes() == result
    with monkeypatch.context() as patch:
        interrupt_in(3, signal.SIGINT, patch)
        assert cli.main(["resume", str(run), "--epochs", "4"]) == 130
    assert f"\ngo on with: nnkit resume {run}" in capsys.readouterr().err
    assert train.read_config(run)["config"]["epochs"] == 4
    assert cli.main(["eval", str(run)]) == 1
    assert "no result.json" in capsys.readouterr().err
    assert cli.main(["resume", str(run)]) == 0
    assert [row["epoch"] for row in train.read_metrics(run)] == [1, 2, 3, 4]
    assert cli.main(["eval", str(run)]) == 0


def _interrupted(*_):
    raise KeyboardInterrupt


def test_a_run_that_would_come_to_the_same_nan_is_not_to_be_resumed(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    error = train.NotFiniteError(3, 1, None)
    assert leaving.going_on(error, folder) == 1
    assert capsys.readouterr().err == f"error: {error}\n"
    with train.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(2, {"w": np.zeros(2)}, {})
    assert leaving.going_on(error, folder) == 1
    assert capsys.readouterr().err.endswith(f"go on with: nnkit resume {folder}\n")


def test_what_was_noted_of_an_error_is_printed_too(tmp_path, capsys, monkeypatch):
    """Among it where fit saved the run."""

    def rate_of(rate):
        def fails(event, view):
            if event == "epoch":
                raise ValueError("of mine")

        return fails

    monkeypatch.setattr(recipe, "_rate_of", rate_of)
    assert cli.main(["train", *SMALL, "--runs", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    run = tmp_path / "digits-mlp-seed3"
    assert err.startswith(
        "error: of mine\nraised by the callback 'fails' at 'epoch'\nthe run is saved at step "
    )
    assert "JAX has removed" not in err
    assert err.endswith(f"\ngo on with: nnkit resume {run}\n")


def test_a_note_on_jaxs_frames_is_left_out(capsys):
    error = ValueError("wrong")
    error.add_note("----\nFor simplicity, JAX has removed its internal frames from the traceback ...")
    assert leaving.refused(error) == 1
    assert capsys.readouterr().err == "error: wrong\n"


@pytest.mark.parametrize("command", ["eval", "predict", "resume", "export"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged (Expecting property name"),
        (b"\xff", "is damaged ('utf-8' codec"),
        ("[]", "is damaged (a list, no object)"),
        ("{}", "has no settings under 'config'"),
        ('{"config": 5}', "has no settings under 'config'"),
    ],
)
def test_a_config_that_is_none(finished, tmp_path, capsys, command, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    more = {"predict": ["a.png"], "export": [str(tmp_path / "out")]}.get(command, [])
    assert cli.main([command, str(tmp_path), *more]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {str(path)!r} {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("text", "message"), [("[]", "(a list, no object)"), ("{", "(Expecting")])
def test_a_result_that_is_none(copy, capsys, text, message):
    (copy / "result.json").write_text(text)
    assert cli.main(["eval", str(copy)]) == 1
    assert f"{str(copy / 'result.json')!r} is damaged {message}" in capsys.readouterr().err


def test_patience_a_guard_checkpoints_and_a_tracker(tmp_path, capsys):
    options = ["--patience", "0", "--guard", "skip", "--checkpoint-every", "10", "--learning-rate", "100"]
    assert cli.main(["train", *SMALL, "--epochs", "9", *options, "--runs", str(tmp_path)]) == 0
    run = tmp_path / "digits-mlp-seed3"
    rows = train.read_metrics(run)
    assert len(rows) < 9  # far too large a rate: the loss does not fall
    assert "skipped" in rows[0]
    assert train.read_config(run)["config"]["patience"] == 0
    assert cli.main(["eval", str(run)]) == 0
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        assert (
            cli.main(["train", *SMALL, "--log", "tensorboard", "--name", "a", "--runs", str(tmp_path)]) == 1
        )
        assert "pip install nnkit[tensorboard]" in capsys.readouterr().err
        assert not (tmp_path / "a").exists()
    else:
        assert (
            cli.main(["train", *SMALL, "--log", "tensorboard", "--name", "a", "--runs", str(tmp_path)]) == 0
        )
        assert list((tmp_path / "a/tensorboard").glob("*tfevents*"))


def test_eval_compares_with_what_is_recorded(finished, copy, capsys):
    assert cli.main(["eval", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    recorded = train.read_result(finished)
    assert found == {
        "part": "test",
        "examples": 359,
        **{n: recorded[n] for n in ("loss", "accuracy", "macro_f1", "calibration_error")},
    }
    assert cli.main(["eval", str(finished), "--part", "validation"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    train.write_result(copy, {**recorded, "accuracy": 0.5})
    assert cli.main(["eval", str(copy)]) == 1
    assert "accuracy was recorded as 0.5 and is now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--runs", __file__], "test_train.py"),
        (["train", "--config", "/nowhere.toml"], "no file '/nowhere.toml': pass a run folder"),
        (["eval", "/nowhere"], "no config.json in '/nowhere': it is not a run folder"),
        (["resume", "/nowhere"], "no config.json in '/nowhere'"),
        (["predict", "/nowhere", "a.png"], "no config.json in '/nowhere'"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_1(arguments, message, capsys):
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_a_run_that_has_not_ended_cannot_be_used_yet(copy, capsys):
    for name in ("result.json", "model.json"):
        (copy / name).unlink()
    assert cli.main(["eval", str(copy)]) == 1
    assert "no result.json" in capsys.readouterr().err
    assert cli.main(["predict", str(copy), "a.png"]) == 1
    assert f"the run has not ended ('nnkit resume {copy}' goes on with it)" in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path, capsys):
    train.create_run(tmp_path / "other", {"seed": 0, "dataset": "text"})
    for command in ("eval", "resume"):
        assert cli.main([command, str(tmp_path / "other")]) == 1
        assert "is no run of 'nnkit train': its configuration has no hidden, model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "--epochs", "ten"], ["trian"], ["eval"], []])
def test_wrong_options_are_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2


@pytest.mark.parametrize("command", ["train", "eval", "predict", "resume", "export", "info", "version"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: nnkit {command}" in capsys.readouterr().out


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.slow
def test_a_terminated_process_and_its_resumption_are_the_run(tmp_path):
    def nnkit(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "nnkit.cli", *map(str, arguments)]

    small = ["--hidden", 16, "--checkpoint-every", 20, "--runs", tmp_path]
    process = subprocess.Popen(
        nnkit("train", "--epochs", 100_000, *small), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    run = tmp_path / "digits-mlp-seed0"
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert err.endswith(f"go on with: nnkit resume {run}\n")
    assert "Traceback" not in err
    epochs = len(train.read_metrics(run)) + 2
    resumed = subprocess.run(
        nnkit("resume", run, "--epochs", epochs), capture_output=True, text=True, cwd=ROOT
    )
    assert resumed.returncode == 0, resumed.stderr
    whole = nnkit("train", "--epochs", epochs, "--name", "whole", *small)
    subprocess.run(whole, check=True, capture_output=True, cwd=ROOT)
    assert same_run(run, tmp_path / "whole")
