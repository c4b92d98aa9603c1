"""Activation functions: plain functions of an array, elementwise or over an axis.

They keep the dtype of ``x``, which must be floating-point (TypeError), and stay finite, with their first
and second derivatives, wherever that is what the mathematics says: at ±1e4 in float16, at ±inf where
there is a limit. The formulas are those of ``jax.nn``; where libraries disagree at a kink the docstring
says what the derivative there is.

Why the derivatives are listed: backpropagation multiplies by f'(x) once a layer. Where |f'| is below 1
(sigmoid: at most 1/4; tanh: 1 only at 0) the gradient shrinks with depth; where it is 1 on a half-line
(ReLU and its relatives) it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "celu",
    "elu",
    "exp",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "identity",
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
    "swish",
    "tanh",
]

Scalar: TypeAlias = float | Float[Array, ""]
Axis: TypeAlias = int | Sequence[int] | None


def identity(x: Any) -> Any:
    """f(x) = x, f'(x) = 1, for an output layer whose loss does the rest; takes any dtype.

    >>> identity(jnp.array([-1.0, 2.0]))
    Array([-1.,  2.], dtype=float32)
    """
    return x


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = max(x, 0), in [0, ∞).

    f'(x) = 1 for x > 0, else 0; at the kink 0, as in JAX and PyTorch (``jnp.maximum(x, 0)`` has 0.5).
    (Nair and Hinton 2010.)

    >>> relu(jnp.array([-1.0, 0.0, 2.0]))
    Array([0., 0., 2.], dtype=float32)
    >>> float(jax.grad(relu)(0.0))
    0.0
    """
    return jax.nn.relu(_floating("relu", x))


def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = min(max(x, 0), 6), in [0, 6].

    f'(x) = 1 for 0 < x < 6, else 0; at both kinks 0, as in JAX and PyTorch. (Krizhevsky 2010.)

    >>> relu6(jnp.array([-1.0, 2.0, 8.0]))
    Array([0., 2., 6.], dtype=float32)
    """
    return jax.nn.relu6(_floating("relu6", x))


def leaky_relu(x: Float[Array, "*shape"], negative_slope: Scalar = 0.01) -> Float[Array, "*shape"]:
    """f(x) = x for x ≥ 0, else a·x, with a = ``negative_slope``; in (-∞, ∞) for a > 0.

    f'(x) = 1 for x ≥ 0, else a. At the kink 1, as in JAX and Flax; PyTorch has a. ``negative_slope``
    may be traced. (Maas et al. 2013.)

    >>> leaky_relu(jnp.array([-1.0, 0.0, 2.0]), 0.125)
    Array([-0.125,  0.   ,  2.   ], dtype=float32)
    """
    return _two_slopes(_floating("leaky_relu", x), negative_slope)


def prelu(x: Float[Array, "*shape"], slope: float | Float[Array, "*slope"]) -> Float[Array, "*shape"]:
    """f(x) = x for x ≥ 0, else a·x, with a learned a = ``slope``.

    ∂f/∂x = 1 for x ≥ 0, else a (at the kink 1, as in Flax; PyTorch has a); ∂f/∂a = min(x, 0). The
    slope is a number or broadcasts to the shape of ``x``, (channels,) for one a channel; ValueError if
    it does not. (He et al. 2015, arXiv:1502.01852, where a starts at 0.25 as in PyTorch; Flax: 0.01.)

    >>> prelu(jnp.array([[-1.0, -1.0], [2.0, 2.0]]), jnp.array([0.25, 0.5]))
    Array([[-0.25, -0.5 ],
           [ 2.  ,  2.  ]], dtype=float32)
    """
    x, given = _floating("prelu", x), jnp.shape(slope)
    if len(given) > x.ndim or any(
        g not in (1, n) for g, n in zip(reversed(given), reversed(x.shape), strict=False)
    ):
        raise ValueError(
            f"prelu got a slope of shape {given} for x of shape {x.shape}: pass a number, or one slope a "
            f"channel in the shape {x.shape[-1:]}"
        )
    return _two_slopes(x, slope)


def elu(x: Float[Array, "*shape"], alpha: Scalar = 1.0) -> Float[Array, "*shape"]:
    """f(x) = x for x > 0, else α(eˣ - 1), in (-α, ∞).

    f'(x) = 1 for x > 0, else α·eˣ = f(x) + α. At 0 it is α, as in JAX and PyTorch: a kink unless
    α = 1. ``alpha`` may be traced. (Clevert et al. 2016, arXiv:1511.07289.)

    >>> elu(jnp.array([-1e4, 0.0, 2.0]))
    Array([-1.,  0.,  2.], dtype=float32)
    """
    x = _floating("elu", x)
    return jax.nn.elu(x, jnp.asarray(alpha, x.dtype))


def celu(x: Float[Array, "*shape"], alpha: Scalar = 1.0) -> Float[Array, "*shape"]:
    """f(x) = x for x > 0, else α(exp(x/α) - 1), in (-α, ∞): elu without its kink.

    f'(x) = 1 for x > 0, else exp(x/α), continuous at 0 for every α > 0; α = 1 is ``elu``. ``alpha`` may
    be traced. (Barron 2017, arXiv:1704.07483.)

    >>> celu(jnp.array([-1e4, 0.0, 2.0]), 0.5)
    Array([-0.5,  0. ,  2. ], dtype=float32)
    """
    x = _floating("celu", x)
    a = jnp.asarray(alpha, x.dtype)
    return jnp.where(x > 0, x, a * jnp.expm1(jnp.where(x > 0, 0, x) / a))


def selu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = λ·elu(x, α) with λ = 1.05070, α = 1.67326, in (-1.758, ∞).

    f'(x) = λ for x > 0, else λα·eˣ; at the kink λα = 1.758, as in JAX and PyTorch. The constants keep
    mean 0 and variance 1 from layer to layer under ``lecun_normal`` kernels. (Klambauer et al. 2017,
    arXiv:1706.02515.)

    >>> print(f"{selu(jnp.array(1.0)):.4f}")
    1.0507
    """
    return jax.nn.selu(_floating("selu", x))


def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = 1/(1 + e⁻ˣ), in (0, 1).

    f'(x) = f(x)(1 - f(x)), at most 1/4 (at 0): through n layers the gradient shrinks at least as 4⁻ⁿ
    times the kernels.

    >>> sigmoid(jnp.array([-1e4, 0.0, 1e4]))
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    return jax.nn.sigmoid(_floating("sigmoid", x))


def hard_sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = relu6(x + 3)/6, piecewise linear in [0, 1].

    f'(x) = 1/6 for -3 < x < 3, else 0, at both kinks too: the convention of JAX, PyTorch and Keras 3
    (older Keras: 0.2·x + 0.5).

    >>> hard_sigmoid(jnp.array([-4.0, 0.0, 4.0]))
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    return jax.nn.hard_sigmoid(_floating("hard_sigmoid", x))


def log_sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = log(1/(1 + e⁻ˣ)) = -softplus(-x), in (-∞, 0).

    f'(x) = sigmoid(-x), which log(sigmoid(x)) loses for large negative ``x``.

    >>> log_sigmoid(jnp.array([-1e4, 1e4]))
    Array([-10000.,     -0.], dtype=float32)
    """
    return jax.nn.log_sigmoid(_floating("log_sigmoid", x))


def exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = f'(x) = eˣ, in (0, ∞): positive outputs, such as a rate or a variance.

    It overflows to inf from 88.8 on in float32 and from 11.1 on in float16: ``softplus`` does not.

    >>> print(f"{exp(jnp.array(1.0)):.4f}")
    2.7183
    """
    return jnp.exp(_floating("exp", x))


def tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = (eˣ - e⁻ˣ)/(eˣ + e⁻ˣ), in (-1, 1).

    f'(x) = 1 - f(x)², at most 1 (at 0): unlike the sigmoid's it does not shrink the gradient of small
    signals, but it vanishes for large ones as well.

    >>> tanh(jnp.array([-1e4, 0.0, 1e4]))
    Array([-1.,  0.,  1.], dtype=float32)
    """
    return jnp.tanh(_floating("tanh", x))


def hard_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = min(max(x, -1), 1), piecewise linear in [-1, 1].

    f'(x) = 1 for -1 ≤ x ≤ 1, else 0; at both kinks 1, as in JAX and Flax, where PyTorch has 0.

    >>> hard_tanh(jnp.array([-4.0, 0.5, 4.0]))
    Array([-1. ,  0.5,  1. ], dtype=float32)
    """
    return jax.nn.hard_tanh(_floating("hard_tanh", x))


def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = log(1 + eˣ), in (0, ∞), a smooth ReLU.

    f'(x) = sigmoid(x). Computed as log(e⁰ + eˣ) with the larger exponent taken out, so it neither
    overflows nor, as PyTorch's above 20, becomes x itself. (Dugas et al. 2001.)

    >>> softplus(jnp.array([-1e4, 1e4]))
    Array([    0., 10000.], dtype=float32)
    """
    return jax.nn.softplus(_floating("softplus", x))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = x·s(x) with s the sigmoid, in [-0.2785, ∞); also called swish.

    f'(x) = s(x) + x·s(x)(1 - s(x)), between -0.0998 and 1.0998. At ±inf it is its limit, where JAX and
    PyTorch have NaN. (Elfwing et al. 2017, arXiv:1702.03118; Ramachandran et al. 2017.)

    >>> print(f"{silu(jnp.array(1.0)):.4f}")
    0.7311
    """
    # The sigmoid of -1000 is 0 in every dtype.
    return _between(jax.nn.silu, _floating("silu", x), 1000)


swish = silu


def hard_silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = x·relu6(x + 3)/6, in [-0.375, ∞); also called hard swish.

    f'(x) = (2x + 3)/6 for -3 < x < 3, 0 below and 1 above, at the kinks too as in JAX and PyTorch.
    (Howard et al. 2019, arXiv:1905.02244.)

    >>> hard_silu(jnp.array([-4.0, 0.0, 4.0]))
    Array([-0.,  0.,  4.], dtype=float32)
    """
    return _between(jax.nn.hard_silu, _floating("hard_silu", x), 1000)


def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """f(x) = x·tanh(softplus(x)), in [-0.3088, ∞), a smoother silu.

    f'(x) = t + x·(1 - t²)·sigmoid(x) with t = tanh(softplus(x)), between -0.1125 and 1.0885.
    (Misra 2019, arXiv:1908.08681.)

    >>> print(f"{mish(jnp.array(1.0)):.4f}")
    0.8651
    """
    return _between(jax.nn.mish, _floating("mish", x), 1000)


def glu(x: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*half"]:
    """f(a, b) = a·sigmoid(b), with a the first half of ``axis`` and b the second: a learned gate.

    ValueError where the axis does not have two halves. (Dauphin et al. 2016, arXiv:1612.08083; the same
    in JAX and PyTorch.)

    >>> glu(jnp.array([2.0, 4.0, 0.0, 1e4]))
    Array([1., 4.], dtype=float32)
    """
    x = _floating("glu", x)
    if x.ndim == 0 or x.shape[axis] % 2:
        raise ValueError(
            f"glu halves axis {axis} and got shape {x.shape}: give it an even number of elements"
        )
    return jax.nn.glu(x, axis)


def gelu(x: Float[Array, "*shape"], approximate: bool = True) -> Float[Array, "*shape"]:
    """f(x) = x·Φ(x) with Φ the normal distribution function, in [-0.17, ∞).

    f'(x) = Φ(x) + x·φ(x), between -0.129 and 1.129, with φ the normal density. As JAX and Flax do,
    Φ(x) ≈ (1 + tanh(√(2/π)(x + 0.044715·x³)))/2, at most 5e-4 from f; ``approximate=False``
    is the exact form, (1 + erf(x/√2))/2, PyTorch's default. Large ``x`` give the limits x and 0, where
    ``jax.nn.gelu`` in float16 has NaN gradients from |x| = 148 on. (Hendrycks and Gimpel 2016,
    arXiv:1606.08415.)

    >>> one = jnp.array(1.0)
    >>> print(f"{gelu(one):.5f} {gelu(one, approximate=False):.5f}")
    0.84119 0.84134
    """
    # At -40 both forms of Φ are 0 in every dtype, and 40³ is still a float16.
    return _between(lambda x: jax.nn.gelu(x, approximate), _floating("gelu", x), 40)


def softmax(x: Float[Array, "*shape"], axis: Axis = -1) -> Float[Array, "*shape"]:
    """fᵢ(x) = exp(xᵢ)/Σⱼ exp(xⱼ) over ``axis``: positive numbers that sum to 1.

    ∂fᵢ/∂xⱼ = fᵢ(δᵢⱼ - fⱼ). The largest xⱼ is subtracted first, so no exp overflows. An entry of -inf
    gets 0; +inf, or nothing but -inf, gives NaN. For a cross-entropy take ``log_softmax``.

    >>> softmax(jnp.array([0.0, 1e4, 1e4]))
    Array([0. , 0.5, 0.5], dtype=float32)
    """
    return jax.nn.softmax(_floating("softmax", x), axis)


def log_softmax(x: Float[Array, "*shape"], axis: Axis = -1) -> Float[Array, "*shape"]:
    """fᵢ(x) = xᵢ - log Σⱼ exp(xⱼ) over ``axis``, in (-∞, 0].

    ∂fᵢ/∂xⱼ = δᵢⱼ - softmax(x)ⱼ: no factor that vanishes, which log(softmax(x)) has. Infinities as in
    ``softmax``.

    >>> log_softmax(jnp.array([0.0, 1e4]))
    Array([-10000.,      0.], dtype=float32)
    """
    return jax.nn.log_softmax(_floating("log_softmax", x), axis)


def _floating(name: str, x: Any) -> Array:
    """``x`` as an array, or the error for one that is not of real floating-point numbers."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} needs floating-point numbers and got {dtype} of shape {jnp.shape(x)}: write "
            f"{name}(x.astype(jnp.float32)), for images of 0..255 {name}(x.astype(jnp.float32) / 255)"
        )
    return jnp.asarray(x)


def _two_slopes(x: Array, slope: Any) -> Array:
    # The inner where keeps x = inf away from the slope's gradient, which would be 0·inf.
    return jnp.where(x >= 0, x, jnp.asarray(slope, x.dtype) * jnp.where(x >= 0, 0, x))


def _between(f: Callable[[Array], Array], x: Array, bound: float) -> Array:
    """``f`` for |x| < ``bound`` and its asymptote, ReLU, outside, in values and all derivatives."""
    inside = jnp.abs(x) < bound
    return jnp.where(inside, f(jnp.where(inside, x, 0)), jax.nn.relu(x))
