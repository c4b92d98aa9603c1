"""Every layer of the catalog through ``testing.check_layer``; tests/testing has a wrong layer for each check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnkit import layers, testing
from tests.catalog import LAYERS, LayerRow

DERIVATIVES = ("finite differences", "forward mode", "second derivatives")


def skipped(row: LayerRow) -> dict[str, str]:
    """The checks that do not hold for a layer by its nature, with the reason."""
    skip = {"mesh": "on_a_mesh.py runs it in a process with 8 devices"}
    if row.decodes:
        skip["state at test time"] = "a cache grows; test_attention.py and test_positions.py hold it to how"
    if row.rounds:
        why = "it rounds to a dtype of its own; test_precision.py compares its gradients"
        skip |= dict.fromkeys(DERIVATIVES, why)
    if row.name == "frozen":
        why = "its gradient is 0 by definition; test_combine.py holds it to that"
        skip |= dict.fromkeys(DERIVATIVES, why)
    return skip | (row.skip or {})


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_layer(row: LayerRow):
    testing.check_layer(row.layer, row.x, random=row.random, mixes_batch=row.mixes_batch, skip=skipped(row))


def test_the_catalog_has_every_layer():
    named = {row.name for row in LAYERS}
    cells = {"Cell", "Sequence", "gru_cell", "lstm_cell", "simple_cell"}  # inside of the recurrent rows
    helpers = {"Attend", "activation_gradients", "attend", "observe", "summary"} | cells
    assert set(layers.__all__) - helpers <= named


@pytest.mark.slow
def test_every_layer_on_a_mesh():
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "tests.layers.on_a_mesh"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
