"""One short run that the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnkit import cli

SMALL = ["--hidden", "16", "--epochs", "2", "--seed", "3"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a run on the digits that has ended."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *SMALL, "--runs", str(runs)]) == 0
    return runs / "digits-mlp-seed3"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    folder = tmp_path / finished.name
    folder.mkdir()
    for path in filter(Path.is_file, finished.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
