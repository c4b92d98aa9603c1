"""Two recurrent layers over the same sequence, one in each direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.layers import children as kids
from nnkit.layers.sequence import Sequence, as_sequence, reverse_valid, zero_padding
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["bidirectional"]

_MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concatenate": lambda forward, backward: jnp.concatenate([forward, backward], axis=-1),
    "sum": jnp.add,
}


def bidirectional(
    forward: Layer,
    backward: Layer | None = None,
    *,
    merge: Literal["concatenate", "sum"] | Callable[[Array, Array], Array] = "concatenate",
) -> Layer:
    """A layer over the sequence and another over its reverse: ``y_t = merge(forward_t, backward_t)``.

    Shapes: x (batch, time, ...), or ``layers.Sequence(x, lengths, carry)``, which is reversed within each
    length; y (batch, time, 2·features) where the outputs are concatenated. With layers that
    ``return_carry`` the output is (y, (forward's carry, backward's carry)), and such a pair is what
    ``Sequence.carry`` takes. With ``last_only`` layers y is (batch, 2·features), what each has after all
    steps.

    Args:
      forward: any layer of a Sequence; this one sees the first step first.
      backward: sees the last step first: bidirectional reverses its input and its output itself.
        By default a second layer like ``forward``, with parameters of its own.
      merge: how the two outputs become one (Flax: ``merge_fn``).

    Raises:
      LayerError: where only one of the layers returns its carry, or the outputs differ in shape.

    Source: Schuster & Paliwal 1997, "Bidirectional recurrent neural networks"; the same as Flax's
    ``Bidirectional`` and PyTorch's ``bidirectional=True``.

    >>> layer = layers.bidirectional(layers.lstm(4))
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 5, 3)))
    >>> sorted(params), params["backward"]["kernel"].shape
    (['backward', 'forward'], (3, 16))
    >>> layer.apply(params, state, jnp.ones((2, 5, 3)), train=False)[0].shape
    (2, 5, 8)
    """
    if not callable(merge) and merge not in _MERGES:
        raise ValueError(
            f"bidirectional(merge=...) must be 'concatenate', 'sum' or a function, got {merge!r}"
        )
    combine = merge if callable(merge) else _MERGES[merge]
    both = {"forward": forward, "backward": forward if backward is None else backward}
    children = kids.Children("bidirectional", kids.name_children("bidirectional", (), both))

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        sequence = as_sequence("bidirectional", x)
        params: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for i, (name, carry) in enumerate(zip(both, _carries(sequence), strict=True)):
            child_params, child_state = children.init(name, key, sequence._replace(carry=carry), i)
            kids.merge(name, child_params, params)
            kids.merge(name, child_state, state)
        return params, state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        children.check(params, state, key)
        sequence = as_sequence("bidirectional", x)
        x, lengths, _ = sequence
        inputs = (x, reverse_valid(zero_padding(x, lengths), lengths))
        outputs, carries = [], []
        new_state: dict[str, Any] = {}
        for i, (name, carry) in enumerate(zip(both, _carries(sequence), strict=True)):
            y, child = children.apply(
                name, params, state, Sequence(inputs[i], lengths, carry), key=key, train=train, position=i
            )
            kids.merge(name, child, new_state)
            if isinstance(y, tuple):
                y, carry = y
                carries.append(carry)
            outputs.append(y)
        if len(carries) == 1:
            raise LayerError(
                "bidirectional", "has one layer that returns its carry: pass return_carry=True to both"
            )
        ahead, back = outputs
        if ahead.shape[:-1] != back.shape[:-1]:
            raise LayerError(
                "bidirectional", f"has layers whose outputs have shapes {ahead.shape} and {back.shape}: "
                "pass last_only=True to both or to neither"
            )  # fmt: skip
        if back.ndim == x.ndim:
            back = reverse_valid(back, lengths)
        y = combine(ahead, back)
        return ((y, tuple(carries)) if carries else y), new_state

    return Layer(init, apply, "bidirectional_")


def _carries(sequence: Sequence) -> tuple[Any, Any]:
    carry = sequence.carry
    if carry is None:
        return None, None
    if not isinstance(carry, tuple | list) or len(carry) != 2:
        raise LayerError(
            "bidirectional", f"takes a carry (forward, backward), got {type(carry).__name__}: pass the pair that "
            "it returns where its layers have return_carry=True"
        )  # fmt: skip
    return carry[0], carry[1]
