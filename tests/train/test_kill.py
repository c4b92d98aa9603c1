"""A few kills of ``tests.train.kill``, and that its comparison sees what it is there for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.kill import Run, compare, kill_and_compare


def _bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return act


def _last(run: Run) -> Path:
    return sorted((run.run_dir / "checkpoints").iterdir())[-1]


def _metrics(run: Run) -> Path:
    return run.run_dir / "metrics.csv"


_twice = _lines(lambda rows: [*rows, rows[-1]])
DAMAGES: dict[str, tuple[Callable[[Run], Path], Callable[[Path], object], str]] = {
    "what fit returned": (lambda run: run.final, _bit, "fit returned another state"),
    "a lost row": (_metrics, _lines(lambda rows: rows[:-1]), "metrics.csv"),
    "a row twice": (_metrics, _twice, "metrics.csv"),
    "a line twice": (lambda run: run.run_dir / "metrics.jsonl", _twice, "metrics.jsonl"),
    "a bit of the state": (lambda run: _last(run) / "state.npz", _bit, "another step_"),
    "a checkpoint": (_last, shutil.rmtree, "another last checkpoint"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_leave_the_bits_of_undisturbed_ones(tmp_path):
    counts = kill_and_compare(3, 0, tmp_path, tell=lambda *_, **__: None)
    assert counts.kills == 3
    undisturbed, killed = (Run(tmp_path / kind / "0", 0) for kind in ("undisturbed", "killed"))
    for name, (file, damage, message) in DAMAGES.items():
        other = Run(tmp_path / name, 0)
        shutil.copytree(killed.run_dir, other.run_dir)
        shutil.copy(killed.final, other.final)
        compare(undisturbed, other)
        damage(file(other))
        with pytest.raises(AssertionError, match=message):
            compare(undisturbed, other)
