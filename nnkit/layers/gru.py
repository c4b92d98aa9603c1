"""The gated recurrent unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from nnkit import activations, initializers
from nnkit.layers.gates import add_bias, bias_of, gate_params, input_product, recurrent_product
from nnkit.layers.lift import param, positive_int
from nnkit.layers.recurrent import Scan, recurrent
from nnkit.layers.scanning import Affine, Cell, affine_cell
from nnkit.tree import wide
from nnkit.types import Array, Initializer, Layer, Params, Spec

__all__ = ["gru", "gru_cell"]


def gru(
    features: int,
    *,
    gate_fn: Callable[[Array], Array] = activations.sigmoid,
    activation_fn: Callable[[Array], Array] = activations.tanh,
    use_bias: bool = True,
    reset_after: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    recurrent_kernel_init: Initializer = initializers.orthogonal(),  # noqa: B008
    bias_init: Initializer = initializers.zeros,
    **scan: Unpack[Scan],
) -> Layer:
    """:func:`gru_cell` over time.

    Shapes: x (batch, time, in), or ``layers.Sequence(x, lengths, carry)``; y (batch, time, features). The
    further keywords are those of ``recurrent``.

    >>> layer = layers.gru(8, return_carry=True)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 5, 3)))
    >>> (y, carry), _ = layer.apply(params, state, jnp.ones((4, 5, 3)), train=False)
    >>> bool((y[:, -1] == carry).all())
    True
    """
    cell = gru_cell(
        features, gate_fn=gate_fn, activation_fn=activation_fn, use_bias=use_bias, reset_after=reset_after,
        kernel_init=kernel_init, recurrent_kernel_init=recurrent_kernel_init, bias_init=bias_init,
    )  # fmt: skip
    return recurrent(cell, **scan)


def gru_cell(
    features: int,
    *,
    gate_fn: Callable[[Array], Array] = activations.sigmoid,
    activation_fn: Callable[[Array], Array] = activations.tanh,
    use_bias: bool = True,
    reset_after: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008
    recurrent_kernel_init: Initializer = initializers.orthogonal(),  # noqa: B008
    bias_init: Initializer = initializers.zeros,
) -> Cell:
    """The gated recurrent unit::

        r = σ(x W_r + h R_r + b_r)
        z = σ(x W_z + h R_z + b_z)
        n = tanh(x W_n + b_n + r (h R_n + b_h))       or, reset_after=False,
        n = tanh(x W_n + b_n + (r h) R_n)
        h' = (1 - z) n + z h

    Parameters: ``kernel`` W (in, 3·features) and ``recurrent_kernel`` R (features, 3·features), whose
    columns are r, z, n; ``bias`` (4·features,) with b_r, b_z, b_n, b_h, the last of which is left out without
    ``reset_after``. The carry is h (batch, features), 0 at first and float32 for half-precision input; y is h.

    Args:
      features: of h.
      gate_fn: σ.
      activation_fn: in place of tanh.
      use_bias: whether there are biases.
      reset_after: whether r is applied after the product with R_n, as in Flax and PyTorch, or before it, as
        in the paper and in Keras with ``reset_after=False``.
      kernel_init, recurrent_kernel_init, bias_init: of each block by itself.

    Source: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder for statistical
    machine translation". The formula is that of Flax and PyTorch, the defaults are Flax's. (Chung et al.
    2014 write 1 - z for z.) Flax's ``GRUCell``: for each k of "rzn", W_k is its ``i{k}/kernel``, b_k its
    ``i{k}/bias`` and R_k its ``h{k}/kernel``; b_h is ``hn/bias``. PyTorch's ``GRU``: W = weight_ih_l0.T, R =
    weight_hh_l0.T; b_r and b_z are the sums of the first two blocks of bias_ih_l0 and bias_hh_l0, b_n is the
    third block of bias_ih_l0 and b_h that of bias_hh_l0.

    >>> cell = layers.gru_cell(3)
    >>> params = cell.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (12,), 'kernel': (2, 9), 'recurrent_kernel': (3, 9)}
    """
    features, name = positive_int(features, "gru_cell(features=...)"), "gru"
    columns, two, biases = 3 * features, 2 * features, 4 if reset_after else 3
    standard = gate_fn is activations.sigmoid and activation_fn is activations.tanh

    def init(key: Array, x: Spec) -> Params:
        inits = [bias_init] * (biases if use_bias else 0)
        return gate_params(name, key, x, features, 3, kernel_init, recurrent_kernel_init, inits)

    def shift(params: Params, *sums: Array) -> list[Array]:
        """The sums in r and z, in n and in its h R_n, each with its block of the bias."""
        if not use_bias:
            return list(sums)
        b = bias_of(name, params, biases * features, f"it has {biases} blocks of {features} features")
        blocks = (b[:two], b[two:columns], b[columns:])
        return [add_bias(z, block) for z, block in zip(sums, blocks, strict=False)]

    def mix(params: Params, x: Array, h: Array) -> tuple[Array, ...]:
        from_x = input_product(name, params, x, columns)
        from_h = recurrent_product(name, params, h, x.dtype, columns)
        both, from_x_n, from_h_n = shift(params, from_h[..., :two], from_x[..., two:], from_h[..., two:])
        return from_x[..., :two] + both, from_x_n, from_h_n

    def pointwise(h: Array, mixed: tuple[Array, ...]) -> tuple[Array, Array]:
        parts = [part.astype(h.dtype) for part in mixed]
        h = _standard(h, *parts) if standard else _gated(gate_fn, activation_fn, h, *parts)
        return h, h.astype(mixed[0].dtype)

    def step_reset_before(
        params: Params, h: Array, x: Array, *, mask: Array | None = None
    ) -> tuple[Array, Array]:
        why = f"it feeds back {features} features"
        from_x = input_product(name, params, x, columns)
        kernel = param(name, params, "recurrent_kernel", (features, columns), why)
        fed = (h if mask is None else h * mask.astype(h.dtype)).astype(x.dtype)
        both, from_x_n = shift(params, jnp.matmul(fed, kernel[:, :two]), from_x[..., two:])
        r, z = jnp.split(gate_fn(from_x[..., :two] + both), 2, axis=-1)
        n = activation_fn(from_x_n + jnp.matmul(r * fed, kernel[:, two:]))
        h = _between(h, z.astype(h.dtype), n.astype(h.dtype))
        return h, h.astype(x.dtype)

    def initial_carry(params: Params, x: Spec) -> Array:
        return jnp.zeros((x.shape[0], features), wide(x.dtype))

    if not reset_after:
        return Cell(init, step_reset_before, initial_carry, f"{name}_")
    return affine_cell(init, initial_carry, Affine(mix, pointwise, lambda h: h), f"{name}_")


def _between(h: Array, z: Array, n: Array) -> Array:
    return (1 - z) * n + z * h


def _gated(gate_fn: Any, activation_fn: Any, h: Array, both: Array, from_x: Array, from_h: Array) -> Array:
    r, z = jnp.split(gate_fn(both), 2, axis=-1)
    return _between(h, z, activation_fn(from_x + r * from_h))


@jax.custom_jvp
def _standard(h: Array, both: Array, from_x: Array, from_h: Array) -> Array:
    return _gated(activations.sigmoid, activations.tanh, h, both, from_x, from_h)


@_standard.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    """The derivative by its five coefficients, which take less memory than its factors; see ``lstm``."""
    h, both, from_x, from_h = primals
    dh, dboth, dfrom_x, dfrom_h = tangents
    r, z = jnp.split(activations.sigmoid(both), 2, axis=-1)
    n = activations.tanh(from_x + r * from_h)
    by_n = (1 - z) * (1 - n * n)
    by_r, by_z, by_h = by_n * from_h * r * (1 - r), (h - n) * z * (1 - z), by_n * r
    dr, dz = jnp.split(dboth, 2, axis=-1)
    return _between(h, z, n), z * dh + by_z * dz + by_n * dfrom_x + by_h * dfrom_h + by_r * dr
