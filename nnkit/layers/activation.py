"""Activation functions as layers; the functions themselves are in ``nnkit.activations``.

Each is a layer already, not a function that makes one: ``serial(dense(8), relu)``. An activation
with another parameter is lifted: ``stateless(lambda x: activations.leaky_relu(x, 0.2))``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from nnkit import activations, initializers
from nnkit.layers.lift import float_input, param, stateless
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = [
    "celu",
    "elu",
    "exp",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]

relu = stateless(activations.relu)
"""max(x, 0)."""
sigmoid = stateless(activations.sigmoid)
"""1 / (1 + exp(-x))."""
tanh = stateless(activations.tanh)
"""The hyperbolic tangent."""
softmax = stateless(activations.softmax)
"""exp(x) / sum of exp(x) over the last axis. Losses take logits: do not put it before one."""
log_softmax = stateless(activations.log_softmax)
"""The logarithm of softmax, over the last axis."""
leaky_relu = stateless(activations.leaky_relu)
"""x where x > 0, else 0.01 x."""
elu = stateless(activations.elu)
"""x where x > 0, else exp(x) - 1."""
gelu = stateless(activations.gelu)
"""x Phi(x) in its tanh approximation, JAX's default."""
silu = stateless(activations.silu)
"""x sigmoid(x), also called swish."""
softplus = stateless(activations.softplus)
"""log(1 + exp(x))."""
exp = stateless(activations.exp)
"""exp(x), for positive outputs."""
relu6 = stateless(activations.relu6)
"""min(max(x, 0), 6)."""
selu = stateless(activations.selu)
"""The scaled elu that keeps mean 0 and variance 1 under ``lecun_normal`` kernels."""
celu = stateless(activations.celu)
"""x where x > 0, else exp(x) - 1: elu, until lifted with another ``alpha``."""
mish = stateless(activations.mish)
"""x tanh(softplus(x))."""
glu = stateless(activations.glu)
"""The first half of the channels times the sigmoid of the second."""
log_sigmoid = stateless(activations.log_sigmoid)
"""The logarithm of the sigmoid."""
hard_tanh = stateless(activations.hard_tanh)
"""min(max(x, -1), 1)."""
hard_sigmoid = stateless(activations.hard_sigmoid)
"""relu6(x + 3) / 6."""
hard_silu = stateless(activations.hard_silu)
"""x relu6(x + 3) / 6, also called hard swish."""


def prelu(slope: float | Array = 0.25, *, per_channel: bool = False) -> Layer:
    """A leaky ReLU whose slope is learned: x where x > 0, else a x.

    Shapes: parameter ``slope`` a is a scalar, or (channels,) with ``per_channel``. Weight decay
    leaves it alone. The initial slope is the paper's and PyTorch's 0.25 (Flax: 0.01).

    Source: He et al. 2015, "Delving deep into rectifiers".

    >>> layer = layers.prelu()
    >>> params, _ = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> layer.apply(params, {}, jnp.array([[-4.0, 0.0, 2.0]]), train=False)[0].tolist()
    [[-1.0, 0.0, 2.0]]
    """

    def shape_for(x: Any) -> tuple[int, ...]:
        return (x.shape[-1],) if per_channel else ()

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        float_input("prelu", x)
        return {"slope": initializers.constant(slope)(key, shape_for(x), x.dtype)}, {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        float_input("prelu", x)
        a = param("prelu", params, "slope", shape_for(x), f"its input has shape {x.shape}")
        return activations.prelu(x, jnp.asarray(a)), state

    return Layer(init, apply, "prelu_")
