"""nnkit: a network, an optimizer and a whole training run are plain functions."""

from nnkit import (
    activations,
    data,
    diagnose,
    initializers,
    interop,
    layers,
    losses,
    metrics,
    models,
    ops,
    optim,
    record,
    regularizers,
    search,
    train,
    tree,
    types,
)
from nnkit.types import GradientTransformation, Layer, Trainer, TrainState

__version__ = "0.1.0"

__all__ = [
    "GradientTransformation",
    "Layer",
    "TrainState",
    "Trainer",
    "activations",
    "data",
    "diagnose",
    "initializers",
    "interop",
    "layers",
    "losses",
    "metrics",
    "models",
    "ops",
    "optim",
    "record",
    "regularizers",
    "search",
    "train",
    "tree",
    "types",
]
