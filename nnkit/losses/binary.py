"""Losses of yes-or-no questions, one output for each."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from nnkit.losses import inputs

__all__ = ["binary_cross_entropy_with_logits", "hinge"]


def binary_cross_entropy_with_logits(
    logits: Float[Array, "batch ..."],
    targets: Float[Array, "batch ..."] | Int[Array, "batch ..."] | Bool[Array, "batch ..."],
    *,
    reduce: Literal["mean", "sum"] = "mean",
) -> Float[Array, " batch"]:
    """Cross-entropy of sigmoid(logits) against targets in [0, 1], one value an example.

    Each output asks a question of its own (labels that do not exclude each other, pixels)::

        loss = mean over the outputs of  log(1 + exp(z)) - y z          d loss / dz = sigmoid(z) - y

    The elements are those of optax's ``sigmoid_binary_cross_entropy`` and of PyTorch's and Keras's
    function; no logit overflows, and ±inf gives 0 or inf. Half precision is computed, and the loss
    returned, in float32.

    Args:
      logits: one logit for each question; axes after the first belong to the example.
      targets: 0 or 1 (any dtype) or probabilities, of the same shape. -1 and 1 belong to
        :func:`hinge`; :func:`nnkit.losses.check_targets` finds them before a run.
      reduce: over an example's outputs. "sum" is the negative log-likelihood of a Bernoulli model
        of all outputs, as in the bound of a variational autoencoder.

    Raises:
      ValueError: shapes that differ, (batch, 1) against (batch,) among them.

    >>> logits = jnp.array([[0.0], [2.0], [-1e30]])
    >>> print(binary_cross_entropy_with_logits(logits, jnp.array([[1], [1], [0]])).round(4))
    [0.6931 0.1269 0.    ]
    """
    name = "binary_cross_entropy_with_logits"
    z = inputs.as_float(logits, "logits")
    inputs.check_same_shape(name, z, targets)
    return inputs.mean_over_examples(name, _bce(z, jnp.asarray(targets).astype(z.dtype)), reduce)


@jax.custom_jvp
def _bce(z: Array, y: Array) -> Array:
    # max(z, 0) - y z without the difference of two large numbers; infinity times weight 0 is 0.
    weight = jnp.where(z >= 0, 1 - y, y)
    linear = weight * jnp.where((weight == 0) & jnp.isinf(z), 0, jnp.abs(z))
    return linear + jnp.log1p(jnp.exp(-jnp.abs(z)))


# By hand, because autodiff through |z| has second derivative 0 at z = 0, where a new network starts.
def _bce_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (z, y), (dz, dy) = primals, tangents
    tangent = jnp.zeros_like(z)
    if not isinstance(dz, SymbolicZero):
        tangent = (jax.nn.sigmoid(z) - y) * dz
    if not isinstance(dy, SymbolicZero):
        tangent = tangent - z * dy
    return _bce(z, y), tangent


_bce.defjvp(_bce_jvp, symbolic_zeros=True)


def hinge(
    predictions: Float[Array, "batch ..."],
    targets: Float[Array, "batch ..."] | Int[Array, "batch ..."],
) -> Float[Array, " batch"]:
    """max(0, 1 - targets * predictions) for targets -1 and 1, the mean over each example.

    The elements are those of optax's ``hinge_loss``; at the kink, margin 1, the slope is 0 (optax:
    half of -targets). Keras also takes 0 and 1 and converts them; here they are an error of
    :func:`nnkit.losses.check_targets`, because a target 0 gives the constant 1. This is the form
    for two classes and one output; for C classes optax's ``multiclass_hinge_loss`` takes logits and
    integer labels, max over c of (logits_c + [c != label]) - logits_label.

    Raises:
      TypeError: bool or unsigned targets, which cannot be -1.
      ValueError: shapes that differ.

    >>> print(hinge(jnp.array([0.3, -2.0, 1.5]), jnp.array([1, 1, 1])).round(4))
    [0.7 3.  0. ]
    """
    p = inputs.as_float(predictions, "predictions")
    inputs.check_same_shape("hinge", p, targets)
    dtype = jnp.result_type(targets)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.signedinteger)):
        raise TypeError(
            f"hinge takes targets -1 and 1, which {dtype} cannot hold: "
            "write 2 * targets.astype(jnp.float32) - 1 for targets 0 and 1"
        )
    margin = p * jnp.asarray(targets).astype(p.dtype)
    return inputs.mean_over_examples("hinge", jax.nn.relu(1 - margin))
