"""Layers and what they are combined with."""

from nnkit.layers.activation import (
    elu,
    gelu,
    leaky_relu,
    log_softmax,
    prelu,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from nnkit.layers.batch_norm import batch_norm
from nnkit.layers.combine import add, branch, concatenate, frozen, named, parallel, residual, serial
from nnkit.layers.dense import dense
from nnkit.layers.dropout import dropout
from nnkit.layers.lift import flatten, identity, stateless
from nnkit.layers.observe import observe, summary
from nnkit.layers.wire import wire

__all__ = [
    "add",
    "batch_norm",
    "branch",
    "concatenate",
    "dense",
    "dropout",
    "elu",
    "flatten",
    "frozen",
    "gelu",
    "identity",
    "leaky_relu",
    "log_softmax",
    "named",
    "observe",
    "parallel",
    "prelu",
    "relu",
    "residual",
    "serial",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "stateless",
    "summary",
    "tanh",
    "wire",
]
