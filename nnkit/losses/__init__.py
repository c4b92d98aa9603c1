"""Losses: ``loss(predictions, targets, *, options) -> (batch, ...)``, one value an example.

What becomes of the values (mean, weights, sums) is the trainer's business. Everything runs under
jit, vmap and any order of differentiation, and its options may be traced. Half-precision inputs
are computed in float32 and give float32; float64 gives float64.
"""

from nnkit.losses.binary import binary_cross_entropy_with_logits, hinge
from nnkit.losses.cross_entropy import (
    label_weights,
    negative_log_likelihood,
    normalize,
    softmax_cross_entropy,
)
from nnkit.losses.regression import half_squared_error, huber, mean_absolute_error, mean_squared_error
from nnkit.losses.similarity import cosine_distance, cosine_similarity, kl_divergence
from nnkit.losses.targets import check_targets

__all__ = [
    "binary_cross_entropy_with_logits",
    "check_targets",
    "cosine_distance",
    "cosine_similarity",
    "half_squared_error",
    "hinge",
    "huber",
    "kl_divergence",
    "label_weights",
    "mean_absolute_error",
    "mean_squared_error",
    "negative_log_likelihood",
    "normalize",
    "softmax_cross_entropy",
]
