"""Losses beside optax's and PyTorch's, one value an example, with the gradients of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nnkit import losses
from nnkit.testing.equivalent import Distance
from nnkit.testing.table.functions import compare_functions, of_jax, of_torch
from nnkit.testing.table.row import Bound, Row

__all__ = ["TABLE", "Loss", "rows"]

RNG = np.random.default_rng(0)
P, T, LOGITS = RNG.normal(size=(8, 5)) * 2, RNG.normal(size=(8, 5)), RNG.normal(size=(8, 5)) * 4
LABELS, YES = RNG.integers(0, 5, 8), (RNG.random((8, 5)) < 0.5) * 1.0
SOFT = np.exp(T) / np.exp(T).sum(-1, keepdims=True)
SIGNS = 2 * YES - 1


class Loss(NamedTuple):
    """Ours, the arguments, and the peers' as functions of their modules."""

    ours: Callable[..., Any]
    arguments: tuple[Any, ...]
    optax: Callable[[Any], Callable[..., Any]] | None
    torch: Callable[[Any], Callable[..., Any]] | None


TABLE = {
    "mean_squared_error": Loss(
        losses.mean_squared_error,
        (P, T),
        lambda o: lambda p, t: o.squared_error(p, t).mean(1),
        lambda F: lambda p, t: F.mse_loss(p, t, reduction="none").mean(1),
    ),
    "half_squared_error": Loss(
        losses.half_squared_error,
        (P, T),
        lambda o: lambda p, t: o.l2_loss(p, t).mean(1),
        lambda F: lambda p, t: F.mse_loss(p, t, reduction="none").mean(1) / 2,
    ),
    "mean_absolute_error": Loss(
        losses.mean_absolute_error,
        (P, T),
        lambda o: lambda p, t: jnp.abs(p - t).mean(1),
        lambda F: lambda p, t: F.l1_loss(p, t, reduction="none").mean(1),
    ),
    "huber": Loss(
        partial(losses.huber, delta=0.5),
        (P, T),
        lambda o: lambda p, t: o.huber_loss(p, t, delta=0.5).mean(1),
        lambda F: lambda p, t: F.huber_loss(p, t, reduction="none", delta=0.5).mean(1),
    ),
    "softmax_cross_entropy": Loss(
        losses.softmax_cross_entropy,
        (LOGITS, LABELS),
        lambda o: o.softmax_cross_entropy_with_integer_labels,
        lambda F: lambda p, t: F.cross_entropy(p, t.long(), reduction="none"),
    ),
    "softmax_cross_entropy (probabilities)": Loss(
        losses.softmax_cross_entropy,
        (LOGITS, SOFT),
        lambda o: o.softmax_cross_entropy,
        lambda F: lambda p, t: F.cross_entropy(p, t, reduction="none"),
    ),
    "softmax_cross_entropy (smoothing)": Loss(
        partial(losses.softmax_cross_entropy, label_smoothing=0.1),
        (LOGITS, LABELS),
        None,
        lambda F: lambda p, t: F.cross_entropy(p, t.long(), reduction="none", label_smoothing=0.1),
    ),
    "binary_cross_entropy_with_logits": Loss(
        losses.binary_cross_entropy_with_logits,
        (LOGITS, YES),
        lambda o: lambda p, t: o.sigmoid_binary_cross_entropy(p, t).mean(1),
        lambda F: lambda p, t: F.binary_cross_entropy_with_logits(p, t, reduction="none").mean(1),
    ),
    "hinge": Loss(losses.hinge, (P, SIGNS), lambda o: lambda p, t: o.hinge_loss(p, t).mean(1), None),
    "kl_divergence": Loss(
        losses.kl_divergence,
        (np.log(SOFT[::-1]), SOFT),
        lambda o: o.kl_divergence,
        lambda F: lambda p, t: F.kl_div(p, t, reduction="none").sum(1),
    ),
    "cosine_similarity": Loss(
        losses.cosine_similarity, (P, T), None, lambda F: lambda p, t: F.cosine_similarity(p, t, -1)
    ),
}


def rows() -> Iterator[Row]:
    """Each loss in float32 and float64; the bounds are of the largest value, or slope, of the batch."""
    for name, loss in TABLE.items():
        for dtype, bound in ((jnp.float32, 1e-6), (jnp.float64, 1e-14)):
            for oracle, measure in (("optax", _optax), ("torch", _torch)):
                if getattr(loss, oracle) is not None:
                    kind = jnp.dtype(dtype).name
                    yield Row(
                        "losses", name, oracle, kind, Bound(relative=bound), partial(measure, loss, dtype)
                    )


def _optax(loss: Loss, dtype: Any) -> Distance:
    import optax

    assert loss.optax is not None
    return compare_functions(of_jax(loss.ours), of_jax(loss.optax(optax)), lambda: loss.arguments, dtype)


def _torch(loss: Loss, dtype: Any) -> Distance:
    import torch

    assert loss.torch is not None
    theirs = of_torch(loss.torch(torch.nn.functional))
    return compare_functions(of_jax(loss.ours), theirs, lambda: loss.arguments, dtype)
