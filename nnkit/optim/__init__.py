"""Optimizers: pure transformations of gradients in optax's protocol, under optax's names."""

from nnkit.optim.adagrad import ScaleByRssState, adagrad, scale_by_rss
from nnkit.optim.adam import ScaleByAdamState, adam, adamw, scale_by_adam
from nnkit.optim.combine import chain
from nnkit.optim.rmsprop import (
    ScaleByRmsState,
    ScaleByRmsWithCountState,
    ScaleByRStdDevState,
    ScaleByRStdDevWithCountState,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)
from nnkit.optim.schedules import constant_schedule, exponential_decay
from nnkit.optim.sgd import TraceState, look_ahead, momentum, nesterov, sgd, trace
from nnkit.optim.transform import (
    EmptyState,
    ScaleByScheduleState,
    WeightDecaySchedule,
    add_decayed_weights,
    identity,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
from nnkit.optim.update import apply_updates
from nnkit.types import GradientTransformation

__all__ = [
    "EmptyState",
    "GradientTransformation",
    "ScaleByAdamState",
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "ScaleByRssState",
    "ScaleByScheduleState",
    "TraceState",
    "WeightDecaySchedule",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "constant_schedule",
    "exponential_decay",
    "identity",
    "look_ahead",
    "momentum",
    "nesterov",
    "rmsprop",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_stddev",
    "sgd",
    "trace",
]
