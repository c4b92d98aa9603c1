"""The checks of a layer, each of which can be called alone: ``layer.jit(dense(3), x)``."""

from nnkit.testing.layer.calls import (
    donation,
    hyperparameters,
    jit,
    mesh,
    one_compilation,
    purity,
    serialisation,
    vmap,
)
from nnkit.testing.layer.form import dtypes, init, paths, shapes, signature, state, test_state
from nnkit.testing.layer.keys import key_reuse, randomness
from nnkit.testing.layer.numbers import examples, extremes, forward_mode, gradients, second_derivatives
from nnkit.testing.layer.suite import CHECKS, check_layer

__all__ = [
    "CHECKS",
    "check_layer",
    "donation",
    "dtypes",
    "examples",
    "extremes",
    "forward_mode",
    "gradients",
    "hyperparameters",
    "init",
    "jit",
    "key_reuse",
    "mesh",
    "one_compilation",
    "paths",
    "purity",
    "randomness",
    "second_derivatives",
    "serialisation",
    "shapes",
    "signature",
    "state",
    "test_state",
    "vmap",
]
