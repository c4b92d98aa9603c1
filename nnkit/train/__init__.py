"""From a model, a loss and an optimizer to a trained network and a record of how it got there."""

from nnkit.train.epochs import run_epoch, train_steps
from nnkit.train.evaluate import evaluate, predict
from nnkit.train.fit import fit
from nnkit.train.runs import (
    create_run,
    read_config,
    read_metrics,
    read_result,
    write_metrics,
    write_result,
)
from nnkit.train.saving import DamagedFileError, load_tree, save_tree
from nnkit.train.trainer import supervised, trainer

__all__ = [
    "DamagedFileError",
    "create_run",
    "evaluate",
    "fit",
    "load_tree",
    "predict",
    "read_config",
    "read_metrics",
    "read_result",
    "run_epoch",
    "save_tree",
    "supervised",
    "train_steps",
    "trainer",
    "write_metrics",
    "write_result",
]
