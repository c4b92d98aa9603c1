"""The simple (Elman) recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import jax.numpy as jnp

from nnkit import activations, initializers
from nnkit.layers.gates import add_bias, bias_of, gate_params, input_product, recurrent_product
from nnkit.layers.lift import positive_int
from nnkit.layers.recurrent import Scan, recurrent
from nnkit.layers.scanning import Affine, Cell, affine_cell
from nnkit.types import Array, Initializer, Layer, Params, Spec

__all__ = ["simple_cell", "simple_rnn"]


def simple_rnn(
    features: int,
    *,
    activation_fn: Callable[[Array], Array] = activations.tanh,
    use_bias: bool = True,
    residual: bool = False,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    recurrent_kernel_init: Initializer = initializers.orthogonal(),  # noqa: B008
    bias_init: Initializer = initializers.zeros,
    **scan: Unpack[Scan],
) -> Layer:
    """:func:`simple_cell` over time: ``h_t = tanh(x_t W + h_{t-1} R + b)``, y_t = h_t.

    Shapes: x (batch, time, in), or ``layers.Sequence(x, lengths, carry)``; y (batch, time, features). The
    further keywords are those of ``recurrent``.

    >>> layer = layers.simple_rnn(8, activation_fn=jax.nn.relu, last_only=True)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 5, 3)))
    >>> layer.apply(params, state, jnp.ones((4, 5, 3)), train=False)[0].shape
    (4, 8)
    """
    cell = simple_cell(
        features, activation_fn=activation_fn, use_bias=use_bias, residual=residual, kernel_init=kernel_init,
        recurrent_kernel_init=recurrent_kernel_init, bias_init=bias_init,
    )  # fmt: skip
    return recurrent(cell, **scan)


def simple_cell(
    features: int,
    *,
    activation_fn: Callable[[Array], Array] = activations.tanh,
    use_bias: bool = True,
    residual: bool = False,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008
    recurrent_kernel_init: Initializer = initializers.orthogonal(),  # noqa: B008
    bias_init: Initializer = initializers.zeros,
) -> Cell:
    """``h' = tanh(x W + h R + b)``, the output and the carry; with ``residual`` h is added in the brackets.

    Parameters: ``kernel`` W (in, features), ``recurrent_kernel`` R (features, features), ``bias`` b
    (features,). The carry is h (batch, features), 0 at first.

    Source: Elman 1990, "Finding structure in time"; defaults of Flax's ``SimpleCell``: W, b are its
    ``i/kernel, i/bias`` and R its ``h/kernel``. PyTorch's ``RNN``: W = weight_ih_l0.T, R = weight_hh_l0.T,
    b = bias_ih_l0 + bias_hh_l0.

    >>> cell = layers.simple_cell(1)
    >>> params = {"kernel": jnp.ones((1, 1)), "recurrent_kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    >>> carry, y = cell.step(params, jnp.array([[0.25]]), jnp.array([[0.25]]))
    >>> print(f"{y[0, 0]:.4f}")
    0.4621
    """
    features, name = positive_int(features, "simple_cell(features=...)"), "simple_rnn"

    def init(key: Array, x: Spec) -> Params:
        biases = [bias_init] if use_bias else []
        return gate_params(name, key, x, features, 1, kernel_init, recurrent_kernel_init, biases)

    def mix(params: Params, x: Array, h: Array) -> Array:
        z = recurrent_product(name, params, h, x.dtype, features)
        if use_bias:
            z = add_bias(z, bias_of(name, params, features, f"it has {features} features"))
        z = input_product(name, params, x, features) + z
        return z + h if residual else z

    def pointwise(carry: Array, z: Array) -> tuple[Array, Array]:
        h = activation_fn(z)
        return h, h

    def initial_carry(params: Params, x: Spec) -> Array:
        return jnp.zeros((x.shape[0], features), x.dtype)

    return affine_cell(init, initial_carry, Affine(mix, pointwise, lambda h: h), f"{name}_")
