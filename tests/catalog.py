"""One row for each layer; every property test runs over every row. Optimizers: tests/optim/rows.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit import initializers, layers, ops
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
    decodes: bool = False
    """Whether its state is a cache, which changes at test time and in training does not."""
    rounds: bool = False
    """Whether it computes in a dtype of its own, so that float64 differences see its rounding."""
    skip: dict[str, str] | None = None
    """Further checks of ``testing.check_layer`` that do not hold, each with the reason."""


def _x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(42), shape, F32)


def _ids(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(43), shape, 0, 7)


def _masked(shape: tuple[int, ...], layer: Layer) -> Layer:
    """The layer on its input and a mask that leaves none of the examples empty."""
    mask = jnp.arange(math.prod(shape)).reshape(shape) % 3 != 1
    return layers.serial(layers.stateless(lambda x: (x, mask), name="masked_"), layer)


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
    LayerRow("embedding", layers.embedding(7, 4), _ids(6, 5)),
    LayerRow("learned_positions", layers.learned_positions(6), _x(6, 5, 4)),
    LayerRow("learned_positions_cached", layers.learned_positions(6, cache=True), _x(6, 5, 4), decodes=True),
    LayerRow("sinusoidal_positions", layers.sinusoidal_positions(), _x(6, 5, 4)),
    LayerRow(
        "multi_head_attention",
        layers.multi_head_attention(2, dropout_rate=0.25, broadcast_dropout=False),
        layers.Attend(_x(4, 3, 4), _x(4, 5, 6), _x(4, 5, 2), ops.padding_mask(jnp.arange(4) + 1, 5)),
        random=True,
    ),
    LayerRow(
        "multi_head_attention_cached",
        layers.multi_head_attention(
            4, num_key_value_heads=2, causal=True, rotary=ops.rotary, normalize_qk=True, cache_length=5
        ),
        _x(4, 5, 8),
        decodes=True,
    ),
    LayerRow(
        "transformer_block", layers.transformer_block(2, causal=True, dropout_rate=0.25), _x(4, 5, 4), True
    ),
    LayerRow("dropout_broadcast", layers.dropout(0.5, broadcast_dims=(1,)), _x(6, 5, 4), random=True),
    LayerRow("spatial_dropout", layers.spatial_dropout(0.25), _x(6, 2, 2, 4), random=True),
    LayerRow("stochastic_depth", layers.stochastic_depth(0.5), _x(6, 4), random=True),
    LayerRow("gaussian_dropout", layers.gaussian_dropout(0.25), _x(6, 4), random=True),
    LayerRow("gaussian_noise", layers.gaussian_noise(0.5), _x(6, 4), random=True),
    LayerRow("alpha_dropout", layers.alpha_dropout(0.25), _x(6, 4), random=True),
    LayerRow("batch_norm_masked", _masked((6, 3), layers.batch_norm()), _x(6, 3, 4), mixes_batch=True),
    LayerRow("batch_norm_frozen", layers.batch_norm(use_running_average=True), _x(6, 4)),
    LayerRow("layer_norm", layers.layer_norm(), _x(6, 3, 4)),
    LayerRow(
        "layer_norm_over_positions",
        layers.layer_norm(reduction_axes=(1, 2), feature_axes=(-2, -1)),
        _x(6, 3, 4),
    ),
    LayerRow("group_norm", layers.group_norm(2), _x(6, 3, 4)),
    LayerRow("group_norm_masked", _masked((6, 3), layers.group_norm(None, group_size=2)), _x(6, 3, 4)),
    LayerRow("instance_norm", layers.instance_norm(), _x(6, 3, 4)),
    LayerRow("rms_norm", layers.rms_norm(), _x(6, 4)),
    LayerRow("weight_norm", layers.weight_norm(layers.dense(3)), _x(6, 4)),
    LayerRow(
        "spectral_norm",
        layers.spectral_norm(layers.serial(layers.dense(3)), n_steps=100),
        _x(6, 4),
        skip={"second derivatives": "the singular vectors are constants, as in Flax: right at first order"},
    ),
    LayerRow(
        "spectral_norm_pytorch",
        layers.spectral_norm(layers.dense(3), n_steps=100, convention="pytorch"),
        _x(6, 4),
        skip={
            "second derivatives": "the singular vectors are constants, as in PyTorch: right at first order"
        },
    ),
    LayerRow("simple_rnn", layers.simple_rnn(3, residual=True), _x(4, 3, 2)),
    LayerRow("lstm", layers.lstm(3), _x(4, 3, 2)),
    LayerRow("gru", layers.gru(3), _x(4, 3, 2)),
    LayerRow("recurrent", layers.recurrent(layers.gru_cell(3, reset_after=False), reverse=True), _x(4, 3, 2)),
    LayerRow("lstm_dropout", layers.lstm(3, recurrent_dropout=0.5, last_only=True), _x(4, 3, 2), random=True),
    LayerRow(
        "bidirectional",
        layers.wire(
            lambda net, x: net.rnn(layers.Sequence(x, jnp.array([3, 0, 1, 2]))),
            rnn=layers.bidirectional(layers.lstm(2), layers.gru(2), merge="sum"),
        ),
        _x(4, 3, 2),
    ),
    LayerRow(
        "stacked", layers.stacked(layers.gru(3), layers.lstm(2), dropout=0.25), _x(4, 3, 2), random=True
    ),
    LayerRow("conv", layers.conv(3, 3, strides=2), _x(4, 5, 4, 2)),
    LayerRow(
        "conv_in_groups",
        layers.conv(4, (3,), padding="CAUSAL", kernel_dilation=2, feature_group_count=2, use_bias=False),
        _x(4, 6, 4),
    ),
    LayerRow("depthwise_conv", layers.depthwise_conv(3, channel_multiplier=2), _x(4, 4, 3, 2)),
    LayerRow("separable_conv", layers.separable_conv(3, 3), _x(4, 4, 3, 2)),
    LayerRow("conv_transpose", layers.conv_transpose(3, 3, strides=2), _x(4, 3, 2, 2)),
    LayerRow(
        "conv_transpose_torch",
        layers.conv_transpose(3, 3, strides=2, padding=1, output_padding=1, convention="torch"),
        _x(4, 3, 2),
    ),
    *(
        LayerRow(layer.name.rstrip("_"), layer, _x(4, 5, 4, 2))
        for layer in (
            layers.max_pool(2, strides=1, padding="SAME"),
            layers.min_pool(2, ceil_mode=True),
            layers.sum_pool(2),
            layers.avg_pool(3, strides=2, padding=1, count_include_pad=False),
            layers.adaptive_avg_pool(3),
            layers.adaptive_max_pool((3, 2)),
            layers.global_avg_pool(),
            layers.global_max_pool(keepdims=True),
            layers.resize((3, 6)),
            layers.upsample(2),
        )
    ),
    LayerRow("global_avg_pool_masked", layers.global_avg_pool(), (_x(4, 5, 2), _x(4, 5) > 0)),
    LayerRow("global_max_pool_masked", layers.global_max_pool(), (_x(4, 5, 2), _x(4, 5) > 0)),
    LayerRow("patch_embed", layers.patch_embed(3, 2), _x(4, 4, 2, 2)),
    LayerRow("pixel_shuffle", layers.pixel_shuffle(2), _x(4, 2, 3, 8)),
    LayerRow("pixel_unshuffle", layers.pixel_unshuffle(2), _x(4, 2, 4, 2)),
    *(
        LayerRow(layer.name.rstrip("_"), layer, _x(6, 4))
        for layer in (
            layers.celu,
            layers.exp,
            layers.glu,
            layers.hard_sigmoid,
            layers.hard_silu,
            layers.hard_tanh,
            layers.log_sigmoid,
            layers.mish,
            layers.relu6,
            layers.selu,
        )
    ),
    LayerRow("repeat", layers.repeat(_block, 3), _x(6, 4), random=True, mixes_batch=True),
    LayerRow(
        "repeat_of_remat",
        layers.repeat(layers.remat(layers.residual(layers.dense(4))), 2, unroll=2),
        _x(6, 4),
    ),
    LayerRow("remat", layers.remat(_block), _x(6, 4), random=True, mixes_batch=True),
    LayerRow(
        "share",
        layers.share(
            layers.serial(code=_block, back=layers.dense(4)),
            {"back/kernel": ("code/dense_0/kernel", jnp.transpose)},
        ),
        _x(6, 4),
        random=True,
        mixes_batch=True,
    ),
    LayerRow(
        "shape_dependent", layers.shape_dependent(lambda spec: layers.dense(spec.shape[-1] + 1)), _x(6, 4)
    ),
    LayerRow(
        "policy",
        layers.policy(_block, param_dtype=F32, compute_dtype=F32),
        _x(6, 4),
        random=True,
        mixes_batch=True,
        rounds=True,
    ),
    LayerRow("with_dtype", layers.with_dtype(layers.dense(3), F32), _x(6, 4), rounds=True),
    LayerRow("probe", layers.probe(_block), _x(6, 4), random=True, mixes_batch=True),
]
