"""``nnkit search`` as processes that are interrupted, killed and joined by others."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnkit import cli, search

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
OPTIONS = ["--hidden", "8", "--epochs", "6", "--space", "lr=log:1e-4:1,l2=log:1e-6:1e-2", "--batch", "4"]


def begun(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nnkit.cli", "search", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def values(study: search.Study) -> list[list[float]]:
    assert [trial.state for trial in study.trials] == ["complete"] * len(study.trials)
    return [trial.values.tolist() for trial in study.trials]


def wait_for(storage: str, trials: int) -> None:
    """Until the study has so many that have ended."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if sum(trial.finished for trial in search.open_study(storage=storage).trials) >= trials:
                return
        except (ValueError, OSError):  # it is not there yet, or not whole
            pass
        time.sleep(0.05)
    raise AssertionError(f"no {trials} trials in {storage}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[list[float]]:
    """What nothing has stopped gives."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.main(["search", *OPTIONS, "--trials", "24", "--runs", str(runs)]) == 0
    return values(search.open_study(runs / "digits-mlp-search"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_process_and_its_resumption_are_the_search(tmp_path, whole, number, status):
    run = tmp_path / "digits-mlp-search"
    process = begun(*OPTIONS, "--trials", 5000, "--runs", tmp_path)
    try:
        wait_for(str(run / "study.db"), 3)
        process.send_signal(number)
        sent = time.monotonic()
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (
        time.monotonic() - sent < 20
    )  # a trial takes milliseconds; what is long is the end of the interpreter
    assert process.returncode == status
    assert err.endswith(f"kept in {run}\ngo on with: nnkit search resume {run}\n")
    assert "Traceback" not in err
    study = search.open_study(run)
    done = sum(trial.finished for trial in study.trials)
    assert cli.main(["search", "resume", str(run), "--trials", str(max(24, done))]) == 0
    found = values(search.open_study(run))
    assert found[:24] == whole


@pytest.mark.parametrize("scheme", ["", "journal:"])
def test_a_killed_worker_loses_nothing_that_another_does_not_make_good(tmp_path, whole, scheme):
    place = f"{scheme}{tmp_path / 'studies'}"
    storage = ["--storage", place, "--study", "mine"]
    workers = [begun(*storage, *OPTIONS, "--trials", 24)]
    try:
        wait_for(place, 0)
        workers += [
            begun(*storage, *more) for more in ([], OPTIONS)
        ]  # by the name alone, and by the same settings
        wait_for(place, 1)
        workers[0].kill()
        ends = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers[1:]] == [0, 0], ends
    assert workers[0].returncode == -signal.SIGKILL
    assert values(search.open_study(storage=place)) == whole
