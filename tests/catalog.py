"""One row for each layer; every property test runs over every row. Optimizers: tests/optim/rows.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit import initializers, layers
from nnkit.types import Layer

F32 = jnp.float32


class LayerRow(NamedTuple):
    """A layer, an input for it, and what it promises."""

    name: str
    layer: Layer
    x: Any
    random: bool = False
    """Whether training draws random numbers."""
    mixes_batch: bool = False
    """Whether an example's output depends on the other examples when training."""


def _x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(42), shape, F32)


_block = layers.serial(layers.dense(4), layers.batch_norm(), layers.relu, layers.dropout(0.5))

LAYERS = [
    LayerRow("dense", layers.dense(3), _x(6, 4)),
    LayerRow("dense_without_bias", layers.dense(3, use_bias=False), _x(6, 4)),
    LayerRow("dense_with_random_bias", layers.dense(3, bias_init=initializers.normal(1.0)), _x(6, 4)),
    LayerRow("dense_on_sequences", layers.dense(3), _x(6, 5, 4)),
    LayerRow("dropout", layers.dropout(0.5), _x(6, 4), random=True),
    LayerRow("dropout_32_bits", layers.dropout(0.3), _x(6, 4), random=True),
    LayerRow("dropout_scaled_at_test", layers.dropout(0.25, scale_at="test"), _x(6, 4), random=True),
    LayerRow("batch_norm", layers.batch_norm(), _x(6, 4), mixes_batch=True),
    LayerRow(
        "batch_norm_torch", layers.batch_norm(momentum=0.9, unbiased=True), _x(6, 3, 3, 4), mixes_batch=True
    ),
    LayerRow(
        "batch_norm_random",
        layers.batch_norm(scale_init=initializers.normal(1.0), bias_init=initializers.normal(1.0)),
        _x(6, 4),
        mixes_batch=True,
    ),
    LayerRow("flatten", layers.flatten, _x(6, 2, 2, 3)),
    *(
        LayerRow(layer.name.rstrip("_"), layer, _x(6, 4))
        for layer in (
            layers.relu,
            layers.sigmoid,
            layers.tanh,
            layers.softmax,
            layers.log_softmax,
            layers.leaky_relu,
            layers.elu,
            layers.gelu,
            layers.silu,
            layers.softplus,
            layers.identity,
        )
    ),
    LayerRow("prelu", layers.prelu(), _x(6, 4)),
    LayerRow("prelu_per_channel", layers.prelu(per_channel=True), _x(6, 4)),
    LayerRow("stateless", layers.stateless(jnp.square), _x(6, 4)),
    LayerRow("serial", layers.serial(_block, head=layers.dense(2)), _x(6, 4), random=True, mixes_batch=True),
    LayerRow("parallel", layers.parallel(layers.dense(2), _block), (_x(6, 4), _x(6, 5)), True, True),
    LayerRow("branch", layers.branch(layers.dense(2), layers.tanh), _x(6, 4)),
    LayerRow("concatenate", layers.concatenate(), (_x(6, 4), _x(6, 2))),
    LayerRow("add", layers.add, (_x(6, 4), _x(6, 4))),
    LayerRow("residual", layers.residual(_block), _x(6, 4), random=True, mixes_batch=True),
    LayerRow("residual_with_shortcut", layers.residual(layers.dense(3), layers.dense(3)), _x(6, 4)),
    LayerRow("frozen", layers.serial(layers.frozen(layers.dense(4)), layers.dense(2)), _x(6, 4)),
    LayerRow("named", layers.named("mine", layers.serial(layers.dense(2))), _x(6, 4)),
    LayerRow(
        "wire",
        layers.wire(lambda net, x: net.head(net.block(net.block(x)) + x), block=_block, head=layers.dense(2)),
        _x(6, 4),
        random=True,
        mixes_batch=True,
    ),
]
