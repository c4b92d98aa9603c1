"""nnkit: a network, an optimizer and a whole training run are plain functions."""

from nnkit import (
    activations,
    initializers,
    layers,
    tree,
    types,
)

__version__ = "0.1.0"

__all__ = [
    "activations",
    "initializers",
    "layers",
    "tree",
    "types",
]
