"""Layers and what they are combined with."""

from nnkit.layers.activation import (
    celu,
    elu,
    exp,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_tanh,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    mish,
    prelu,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from nnkit.layers.adaptive_pool import adaptive_avg_pool, adaptive_max_pool, global_avg_pool, global_max_pool
from nnkit.layers.alpha_dropout import alpha_dropout
from nnkit.layers.attention import Attend, multi_head_attention
from nnkit.layers.batch_norm import batch_norm
from nnkit.layers.bidirectional import bidirectional
from nnkit.layers.combine import add, branch, concatenate, frozen, named, parallel, residual, serial
from nnkit.layers.conv import conv
from nnkit.layers.conv_transpose import conv_transpose
from nnkit.layers.dense import dense
from nnkit.layers.dropout import dropout
from nnkit.layers.embedding import attend, embedding
from nnkit.layers.gaussian_dropout import gaussian_dropout, gaussian_noise
from nnkit.layers.group_norm import group_norm, instance_norm
from nnkit.layers.gru import gru, gru_cell
from nnkit.layers.layer_norm import layer_norm
from nnkit.layers.lift import flatten, identity, stateless
from nnkit.layers.lstm import lstm, lstm_cell
from nnkit.layers.observe import observe, summary
from nnkit.layers.patch_embed import patch_embed
from nnkit.layers.perturb import activation_gradients
from nnkit.layers.pixel_shuffle import pixel_shuffle, pixel_unshuffle
from nnkit.layers.pooling import avg_pool, max_pool, min_pool, sum_pool
from nnkit.layers.positions import learned_positions, sinusoidal_positions
from nnkit.layers.precision import policy, with_dtype
from nnkit.layers.probe import probe
from nnkit.layers.recurrent import recurrent
from nnkit.layers.remat import remat
from nnkit.layers.repeat import repeat
from nnkit.layers.resize import resize, upsample
from nnkit.layers.rms_norm import rms_norm
from nnkit.layers.scanning import Cell
from nnkit.layers.separable import depthwise_conv, separable_conv
from nnkit.layers.sequence import Sequence
from nnkit.layers.shape_dependent import shape_dependent
from nnkit.layers.share import share
from nnkit.layers.simple_rnn import simple_cell, simple_rnn
from nnkit.layers.spatial_dropout import spatial_dropout
from nnkit.layers.spectral_norm import spectral_norm
from nnkit.layers.stacked import stacked
from nnkit.layers.stochastic_depth import stochastic_depth
from nnkit.layers.transformer import transformer_block
from nnkit.layers.weight_norm import weight_norm
from nnkit.layers.wire import wire

__all__ = [
    "Attend",
    "Cell",
    "Sequence",
    "activation_gradients",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "add",
    "alpha_dropout",
    "attend",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "branch",
    "celu",
    "concatenate",
    "conv",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "dropout",
    "elu",
    "embedding",
    "exp",
    "flatten",
    "frozen",
    "gaussian_dropout",
    "gaussian_noise",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "group_norm",
    "gru",
    "gru_cell",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "identity",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "learned_positions",
    "log_sigmoid",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "max_pool",
    "min_pool",
    "mish",
    "multi_head_attention",
    "named",
    "observe",
    "parallel",
    "patch_embed",
    "pixel_shuffle",
    "pixel_unshuffle",
    "policy",
    "prelu",
    "probe",
    "recurrent",
    "relu",
    "relu6",
    "remat",
    "repeat",
    "residual",
    "resize",
    "rms_norm",
    "selu",
    "separable_conv",
    "serial",
    "shape_dependent",
    "share",
    "sigmoid",
    "silu",
    "simple_cell",
    "simple_rnn",
    "sinusoidal_positions",
    "softmax",
    "softplus",
    "spatial_dropout",
    "spectral_norm",
    "stacked",
    "stateless",
    "stochastic_depth",
    "sum_pool",
    "summary",
    "tanh",
    "transformer_block",
    "upsample",
    "weight_norm",
    "wire",
    "with_dtype",
]
