"""Recurrent layers on top of each other."""

from __future__ import annotations

from typing import Any

import jax

from nnkit.checks import LayerError, check_probability, is_static_number
from nnkit.layers.children import Children, inferring, merge, name_children
from nnkit.layers.dropout import dropout as dropout_layer
from nnkit.layers.sequence import Sequence, as_sequence
from nnkit.modes import draws
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["stacked"]


def stacked(*layers: Layer, dropout: float | Array = 0.0, **named_layers: Layer) -> Layer:
    """Recurrent layers one after the other, each given the lengths and its own carry.

    Shapes: x (batch, time, in), or ``layers.Sequence(x, lengths, carries)`` with one carry for each
    layer; y is the last layer's. Where the layers ``return_carry`` the output is (y, carries), a tuple.
    Without lengths and carries ``serial`` does the same; to mix in layers that take arrays only, call
    them in ``wire``: ``net.rnn(layers.Sequence(net.embed(tokens), lengths))``.

    Args:
      layers: layers of a Sequence; only the last may be ``last_only``.
      dropout: the probability of dropping an element of a layer's output on the way to the next
        (PyTorch's ``dropout``); it may be traced.
      named_layers: further layers, under names of the user's.

    Raises:
      LayerError: for a carry that is not one for each layer, and where some layers return their carry and
        others do not.

    PyTorch's ``LSTM(3, 4, num_layers=2, dropout=0.5)``:

    >>> layer = layers.stacked(layers.lstm(4), layers.lstm(4), dropout=0.5)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 5, 3)))
    >>> sorted(params)
    ['lstm_0', 'lstm_1']
    >>> x = layers.Sequence(jnp.ones((2, 5, 3)), lengths=jnp.array([5, 2]))
    >>> layer.apply(params, state, x, train=False)[0][1, 2:].any().item()
    False
    """
    if not layers and not named_layers:
        raise ValueError("stacked() needs at least one layer")
    check_probability(dropout, "stacked(dropout=...)")
    children = Children("stacked", name_children("stacked", layers, named_layers))
    names, n = list(children.layers), len(children.layers)
    between = None if is_static_number(dropout) and float(dropout) == 0 else dropout_layer(dropout)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        sequence = as_sequence("stacked", x)
        params: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for i, carry in enumerate(_carries(sequence, n)):
            here = sequence._replace(carry=carry)
            child_params, child_state = children.init(names[i], key, here, i)
            merge(names[i], child_params, params)
            merge(names[i], child_state, state)
            if i < n - 1:
                with inferring():
                    spec = jax.eval_shape(
                        lambda params, state, x, key, i=i: one(params, state, x, key, False, i)[0],
                        params,
                        state,
                        here,
                        key,
                    )
                sequence = sequence._replace(x=spec)
        return params, state

    def one(
        params: Params, state: State, x: Sequence, key: Array | None, train: bool, i: int
    ) -> tuple[Any, tuple[Any, ...], State]:
        """Layer i: its output, its carry in a tuple that is empty where there is none, its state."""
        y, child = children.apply(names[i], params, state, x, key=key, train=train, position=i)
        carry = ()
        if isinstance(y, tuple):
            y, *carry = y
        if i < n - 1 and len(y.shape) != len(x.x.shape):
            raise LayerError(
                "stacked", f"has {names[i]} before its end, which gives {y.shape} where {names[i + 1]} needs all "
                "time steps: pass last_only=True to the last layer only"
            )  # fmt: skip
        return y, tuple(carry), child

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        children.check(params, state, key)
        sequence = as_sequence("stacked", x)
        y, lengths, _ = sequence
        carries: list[Any] = []
        new_state: dict[str, Any] = {}
        for i, carry in enumerate(_carries(sequence, n)):
            if i and between is not None and draws(train):
                y = _dropped(between, y, key, n + i)
            y, final, child = one(params, state, Sequence(y, lengths, carry), key, train, i)
            merge(names[i], child, new_state)
            carries.extend(final)
        if carries and len(carries) != n:
            raise LayerError(
                "stacked", f"has {len(carries)} layers of {n} that return their carry: pass return_carry=True to all"
            )  # fmt: skip
        return ((y, tuple(carries)) if carries else y), new_state

    return Layer(init, apply, "stacked_")


def _dropped(between: Layer, y: Array, key: Array | None, position: int) -> Array:
    if key is None:
        raise LayerError("stacked", "has dropout and needs a key when train=True: pass apply(..., key=key)")
    return between.apply({}, {}, y, key=jax.random.fold_in(key, position), train=True)[0]


def _carries(sequence: Sequence, n: int) -> tuple[Any, ...]:
    carries = sequence.carry
    if carries is None:
        return (None,) * n
    if not isinstance(carries, tuple | list) or len(carries) != n:
        got = f"{len(carries)} of them" if isinstance(carries, tuple | list) else type(carries).__name__
        raise LayerError(
            "stacked", f"has {n} layers and takes a tuple of {n} carries, got {got}: pass what it returns where its "
            "layers have return_carry=True"
        )  # fmt: skip
    return tuple(carries)
