"""From a model, a loss and an optimizer to a trained network and a record of how it got there."""

from nnkit.train.averaging import AveragedState, average_params, averaged, reestimate
from nnkit.train.calibration import fit_temperature
from nnkit.train.checkpoints import Checkpoint, CheckpointError, Checkpoints, restore
from nnkit.train.ensemble import ensemble, predict_ensemble
from nnkit.train.epochs import run_epoch, train_steps
from nnkit.train.evaluate import evaluate
from nnkit.train.events import View
from nnkit.train.explain import explain
from nnkit.train.finite import chunk_is_finite, scaled
from nnkit.train.fit import fit
from nnkit.train.guard import BadStep, NotFiniteError, find_step
from nnkit.train.objective import supervised
from nnkit.train.predict import predict
from nnkit.train.records import append_records, cut_records, read_records
from nnkit.train.report import Report, Statistics
from nnkit.train.run import run
from nnkit.train.runs import (
    create_run,
    read_config,
    read_metrics,
    read_result,
    write_metrics,
    write_result,
)
from nnkit.train.saving import DamagedFileError, load_tree, save_tree
from nnkit.train.skipping import skip_nonfinite
from nnkit.train.stopping import EarlyStopping, Stopping, early_stopping
from nnkit.train.streaming import Streaming
from nnkit.train.trainer import trainer
from nnkit.train.uncertainty import Uncertain

__all__ = [
    "AveragedState",
    "BadStep",
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "DamagedFileError",
    "EarlyStopping",
    "NotFiniteError",
    "Report",
    "Statistics",
    "Stopping",
    "Streaming",
    "Uncertain",
    "View",
    "append_records",
    "average_params",
    "averaged",
    "chunk_is_finite",
    "create_run",
    "cut_records",
    "early_stopping",
    "ensemble",
    "evaluate",
    "explain",
    "find_step",
    "fit",
    "fit_temperature",
    "load_tree",
    "predict",
    "predict_ensemble",
    "read_config",
    "read_metrics",
    "read_records",
    "read_result",
    "reestimate",
    "restore",
    "run",
    "run_epoch",
    "save_tree",
    "scaled",
    "skip_nonfinite",
    "supervised",
    "train_steps",
    "trainer",
    "write_metrics",
    "write_result",
]
