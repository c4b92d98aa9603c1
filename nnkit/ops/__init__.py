"""The numerics that are worth writing by hand: functions of arrays, without parameters or state."""

from nnkit.ops.attention import causal_mask, dot_product_attention, padding_mask
from nnkit.ops.convolution import Algorithms, conv, conv_algorithm, conv_algorithms, conv_transpose
from nnkit.ops.linear import linear
from nnkit.ops.moments import moments
from nnkit.ops.normalize import normalize
from nnkit.ops.pooling import avg_pool, max_pool, min_pool, sum_pool
from nnkit.ops.positions import rotary, sinusoidal

__all__ = [
    "Algorithms",
    "avg_pool",
    "causal_mask",
    "conv",
    "conv_algorithm",
    "conv_algorithms",
    "conv_transpose",
    "dot_product_attention",
    "linear",
    "max_pool",
    "min_pool",
    "moments",
    "normalize",
    "padding_mask",
    "rotary",
    "sinusoidal",
    "sum_pool",
]
