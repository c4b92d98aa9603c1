"""Recurrent layers: a cell scanned over time."""

from __future__ import annotations

from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError, check_key, check_probability, is_static_number
from nnkit.layers.children import floating
from nnkit.layers.dropout import dropout
from nnkit.layers.lift import positive_int
from nnkit.layers.scanning import Cell, Loop, scan_affine, scan_steps
from nnkit.layers.sequence import (
    as_sequence,
    last_valid,
    reverse_valid,
    valid_steps,
    zero_padding,
)
from nnkit.modes import draws
from nnkit.tree import wide
from nnkit.types import Array, Layer, Params, PyTree, Spec, State

__all__ = ["Scan", "recurrent"]


class Scan(TypedDict, total=False):
    """The keywords of :func:`recurrent`, which ``simple_rnn``, ``lstm`` and ``gru`` take as well."""

    reverse: bool
    keep_order: bool
    return_carry: bool
    last_only: bool
    mask_outputs: bool
    recurrent_dropout: float | Array
    unroll: int


def recurrent(
    cell: Cell,
    *,
    reverse: bool = False,
    keep_order: bool = False,
    return_carry: bool = False,
    last_only: bool = False,
    mask_outputs: bool = True,
    recurrent_dropout: float | Array = 0.0,
    unroll: int = 1,
) -> Layer:
    """A cell run over time: ``carry_t, y_t = step(params, carry_{t-1}, x_t)``.

    Shapes: x (batch, time, ...), or ``layers.Sequence(x, lengths, carry)``; y (batch, time, features).
    With ``lengths`` a sequence ends at its own length: y is 0 beyond it and the final carry is that of
    its last step (its initial carry where the length is 0), as PyTorch's packed sequences give; what the
    padding holds, NaN included, has no influence. A 0 comes out where there is no step at all.

    The carry goes in through ``Sequence.carry`` and out with ``return_carry``, so a long sequence can be
    learned in pieces, each starting where the one before ended (truncated backpropagation, Keras'
    ``stateful``). Jit it: an eager call compiles the loop over time anew:

    >>> layer = layers.lstm(3, return_carry=True)
    >>> long = jnp.ones((2, 12, 4))
    >>> params, state = layer.init(jax.random.key(0), long)
    >>> def loss(params, carry, x):
    ...     (y, carry), _ = layer.apply(params, state, layers.Sequence(x, carry=carry), train=True)
    ...     return jnp.mean(y**2), jax.lax.stop_gradient(carry)
    >>> gradient, carry = jax.jit(jax.grad(loss, has_aux=True)), None
    >>> for piece in jnp.split(long, 3, axis=1):
    ...     grads, carry = gradient(params, carry, piece)
    >>> jax.tree.map(jnp.shape, carry)
    ((2, 3), (2, 3))

    Args:
      cell: one step: ``lstm_cell``, ``gru_cell``, ``simple_cell`` or a :class:`Cell` of one's own. Where the
        memory for its gradient is too much, ``cell._replace(step=jax.checkpoint(cell.step), affine=None)``
        computes each step twice instead.
      reverse: from the last step to the first, within each sequence's length. y is then in the order in
        which it was computed, unless ``keep_order``.
      keep_order: with ``reverse``, whether y_t stands where x_t stood (Flax's argument).
      return_carry: whether the output is (y, final carry). (Flax: (carry, y).)
      last_only: whether y is the last computed output alone, (batch, features) (Keras:
        ``return_sequences=False``).
      mask_outputs: whether y is 0 beyond a sequence's length. False is Flax's ``RNN``, whose cell runs on
        over the padding; its final carry is the same.
      recurrent_dropout: the probability of dropping an element of what is fed back, by one mask for all
        steps of a sequence (Gal & Ghahramani 2016, "A theoretically grounded application of dropout in
        recurrent neural networks"). It may be traced. For the input, drop before the layer.
      unroll: how many steps one turn of the compiled loop holds (``jax.lax.scan``).

    Raises:
      LayerError: for lengths beyond the time axis, of another shape or not whole numbers; for a carry
        that is not the cell's; without a key where dropout needs one.

    A cell of one's own, the running mean of its input:

    >>> def step(params, carry, x):
    ...     count, mean = carry
    ...     mean = mean + (x - mean) / (count + 1)
    ...     return (count + 1, mean), mean
    >>> start = lambda params, x: (jnp.zeros((x.shape[0], 1)), jnp.zeros(x.shape))
    >>> means = layers.recurrent(layers.Cell(lambda key, x: {}, step, start))
    >>> means.apply({}, {}, jnp.array([[[1.0], [3.0], [8.0]]]), train=False)[0].ravel().tolist()
    [1.0, 2.0, 4.0]
    """
    if not isinstance(cell, Cell):
        what = getattr(cell, "name", type(cell).__name__)
        raise TypeError(f"recurrent(cell) takes a layers.Cell, as lstm_cell(features) gives, got {what}")
    if keep_order and not reverse:
        raise ValueError(
            "recurrent(keep_order=True) is of use with reverse=True only: drop it, or add reverse=True"
        )
    check_probability(recurrent_dropout, "recurrent(recurrent_dropout=...)")
    positive_int(unroll, "recurrent(unroll=...)")
    loop, name = Loop(not mask_outputs, unroll), cell.name.rstrip("_")
    drops = not (is_static_number(recurrent_dropout) and float(recurrent_dropout) == 0.0)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        return cell.init(key, _one_step(as_sequence(name, x).x)), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        x, lengths, carry = as_sequence(name, x)
        carry = _initial_carry(name, cell, params, x, carry)
        time = x.shape[1]
        if mask_outputs:
            x = zero_padding(x, lengths)  # so that no padding, were it NaN, reaches a gradient
        if reverse:
            x = reverse_valid(x, lengths)
        xs = jnp.swapaxes(x, 0, 1)
        valid = None if lengths is None else jnp.swapaxes(valid_steps(lengths, time), 0, 1)
        mask = _mask(name, cell, params, carry, x, recurrent_dropout, key) if drops and draws(train) else None
        if cell.affine is not None:
            carry, ys = scan_affine(loop, cell.affine, params, carry, xs, mask, valid)
        else:
            extra = {} if mask is None else {"mask": mask}
            # The derivative adds up the parameters' gradients step by step, in the dtype that they have here.
            summed = jax.tree.map(lambda p: p.astype(wide(p.dtype)) if floating(p) else p, params)

            def step(carry: PyTree, x: Array) -> tuple[PyTree, Array]:
                own = jax.tree.map(lambda s, p: s.astype(p.dtype) if floating(p) else s, summed, params)
                return cell.step(own, carry, x, **extra)

            carry, ys = scan_steps(loop, step, carry, xs, valid)
        y = jnp.swapaxes(ys, 0, 1)
        if last_only:
            y = last_valid(y, lengths)
        else:
            if mask_outputs:
                y = zero_padding(y, lengths)
            if reverse and keep_order:
                y = reverse_valid(y, lengths)
        return ((y, carry) if return_carry else y), state

    return Layer(init, apply, cell.name)


def _one_step(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)


def _initial_carry(name: str, cell: Cell, params: Params, x: Array, given: PyTree | None) -> PyTree:
    """The given carry in the cell's dtypes, or the cell's own where none is given."""
    own = cell.initial_carry(params, _one_step(x))
    if given is None:
        return own
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (own, given)]
    if shapes[0] != shapes[1]:
        raise LayerError(
            name, f"takes a carry of shapes {shapes[0]} for input of shape {x.shape}, got {shapes[1]}: pass the "
            "carry that the layer with return_carry=True returned for the same batch size"
        )  # fmt: skip
    return jax.tree.map(lambda mine, theirs: jnp.asarray(theirs).astype(mine.dtype), own, given)


def _mask(
    name: str, cell: Cell, params: Params, carry: PyTree, x: Array, rate: float | Array, key: Array | None
) -> Array:
    """Zeros with probability ``rate`` and 1/(1 - rate) elsewhere, one for each element of an output."""
    if key is None:
        raise LayerError(
            name, "has recurrent dropout and needs a key when train=True: pass apply(..., key=key)"
        )
    check_key(key, f"{name}.apply")
    y = jax.eval_shape(cell.step, params, carry, _one_step(x))[1]
    return dropout(rate).apply({}, {}, jnp.ones(y.shape, y.dtype), key=key, train=True)[0]
