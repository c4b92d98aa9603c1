"""Conformance: what a user's own layer, optimizer, loss, schedule or trainer is checked with."""

from nnkit.testing.adapters import (
    of_flax,
    of_layer,
    of_torch_module,
    of_torch_optimizer,
)
from nnkit.testing.equivalent import (
    Distance,
    EquivalenceError,
    Steps,
    assert_equivalent,
    compare_steps,
    of_transformation,
)
from nnkit.testing.layer import check_layer
from nnkit.testing.loss import check_loss
from nnkit.testing.optimizer import check_optimizer
from nnkit.testing.report import ConformanceError, Failure, Report, Result
from nnkit.testing.schedule import check_schedule
from nnkit.testing.trainer import check_trainer
from nnkit.testing.ulp import ulp_distance, ulps

__all__ = [
    "ConformanceError",
    "Distance",
    "EquivalenceError",
    "Failure",
    "Report",
    "Result",
    "Steps",
    "assert_equivalent",
    "check_layer",
    "check_loss",
    "check_optimizer",
    "check_schedule",
    "check_trainer",
    "compare_steps",
    "of_flax",
    "of_layer",
    "of_torch_module",
    "of_torch_optimizer",
    "of_transformation",
    "ulp_distance",
    "ulps",
]
