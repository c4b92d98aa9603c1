"""Recurrent layers: carries in and out, padded sequences, both directions, stacks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import layers
from nnkit.testing.table.layers_case import Case, Oracle, spec
from nnkit.testing.table.layers_oracles import ByHand, linen, nnx, torch_module
from nnkit.types import Layer

__all__ = ["TABLE"]

BATCH, TIME, IN, FEATURES = 4, 5, 3, 2
LENGTHS = np.array([5, 1, 3, 4], np.int32)
H = spec(BATCH, FEATURES)
KINDS: dict[str, tuple[Any, Any, str, str]] = {  # ours, its carry, Flax's cell, PyTorch's module
    "lstm": (layers.lstm, (H, H), "LSTMCell", "LSTM"),
    "gru": (layers.gru, H, "GRUCell", "GRU"),
    "simple_rnn": (layers.simple_rnn, H, "SimpleCell", "RNN"),
}
BOTH_WAYS = {"forward": "forward_rnn", "backward": "backward_rnn"}
# Flax runs on over the padding, PyTorch's outputs there are 0.
FLAXS: dict[str, Any] = {"return_carry": True, "mask_outputs": False}


def _given(carry: Any, ragged: bool = True) -> layers.Sequence:
    return layers.Sequence(spec(BATCH, TIME, IN), LENGTHS if ragged else None, carry)


def _with_carry(f: Any, s: layers.Sequence, train: bool) -> Any:
    """Flax's order is (carry, outputs)."""
    carry, y = f(s.x, initial_carry=s.carry, seq_lengths=s.lengths)
    return y, carry


def _valid_alone(f: Any, s: layers.Sequence, train: bool) -> Any:
    """With 0 on the padding, from which Flax's backward direction starts and ours does not."""
    y, carry = _with_carry(f, s, train)
    assert s.lengths is not None
    return jnp.where((jnp.arange(TIME) < s.lengths[:, None])[..., None], y, jnp.zeros((), y.dtype)), carry


def _linen_cell(nn: Any, kind: str) -> Any:
    return getattr(nn, KINDS[kind][2])(FEATURES)


def _nnx_cell(nnx: Any, kind: str, rngs: Any) -> Any:
    return getattr(nnx, KINDS[kind][2])(IN, FEATURES, dtype=None, rngs=rngs)


def _linen_rnn(kind: str, **options: Any) -> Oracle:
    return linen(lambda nn: nn.RNN(_linen_cell(nn, kind), return_carry=True, **options), _with_carry)


def _nnx_rnn(kind: str, by_hand: ByHand | None = None, **options: Any) -> Oracle:
    return nnx(
        lambda nnx, rngs: nnx.RNN(_nnx_cell(nnx, kind, rngs), return_carry=True, **options),
        _with_carry,
        by_hand,
    )


def _torch_rnn(kind: str, **options: Any) -> Oracle:
    make: Any = lambda T: getattr(T.nn, KINDS[kind][3])(IN, FEATURES, batch_first=True, **options)
    return torch_module(make, partial(_packed, kind))


def _packed(kind: str, f: Any, s: layers.Sequence, train: bool) -> Any:
    """Outputs and final carries; of a packed sequence where there are lengths.

    PyTorch has the carries of all layers and directions in one array; an LSTM's are (h, c), ours (c, h).
    """
    import torch
    from torch.nn.utils import rnn

    n = 2 if kind == "lstm" else 1
    carries, structure = jax.tree.flatten(s.carry)
    start = tuple(torch.stack(carries[i::n]) for i in reversed(range(n)))
    x = s.x
    if s.lengths is not None:
        x = rnn.pack_padded_sequence(x, s.lengths.long(), batch_first=True, enforce_sorted=False)
    y, last = f(x, start if n == 2 else start[0])
    if s.lengths is not None:
        y, _ = rnn.pad_packed_sequence(y, batch_first=True, total_length=TIME)
    last = tuple(reversed(last)) if n == 2 else (last,)
    leaves = [one for position in zip(*last, strict=True) for one in position]
    return y, jax.tree.unflatten(structure, leaves)


def _gru_of_nnx() -> Layer:
    """A GRU without the bias of the state, which nnx's has not."""
    whole = layers.gru(FEATURES, **FLAXS)

    def init(key: Any, x: Any, /) -> Any:
        params, state = whole.init(key, x)
        return {**params, "bias": params["bias"][: 3 * FEATURES]}, state

    def apply(params: Any, state: Any, x: Any, *, key: Any = None, train: bool) -> Any:
        bias = jnp.pad(params["bias"], (0, FEATURES))
        return whole.apply({**params, "bias": bias}, state, x, key=key, train=train)

    return Layer(init, apply, "gru_")


GRU_OF_NNX = ByHand(
    lambda params, state: {
        "cell/dense_h/kernel": params["recurrent_kernel"],
        "cell/dense_i/bias": params["bias"],
        "cell/dense_i/kernel": params["kernel"],
    }
)


def _recurrent() -> dict[str, Case]:
    table = {}
    for kind, (ours, carry, _, _) in KINDS.items():
        table[f"{kind} (Flax's padding)"] = Case(
            ours(FEATURES, **FLAXS),
            _given(carry),
            _linen_rnn(kind),
            None if kind == "gru" else _nnx_rnn(kind),
        )
        table[kind] = Case(ours(FEATURES, return_carry=True), _given(carry), torch=_torch_rnn(kind))
        one = layers.bidirectional(ours(FEATURES, return_carry=True))
        pair = (carry, carry)
        table[f"stacked, bidirectional ({kind})"] = Case(
            layers.stacked(one, one),
            _given((pair, pair)),
            torch=_torch_rnn(kind, num_layers=2, bidirectional=True),
        )
    table["gru (nnx's, no bias of the state)"] = Case(
        _gru_of_nnx(), _given(H), nnx=_nnx_rnn("gru", GRU_OF_NNX)
    )
    table["gru (reversed, order kept)"] = Case(
        layers.gru(FEATURES, reverse=True, keep_order=True, **FLAXS),
        _given(H),
        _linen_rnn("gru", reverse=True, keep_order=True),
    )
    table["lstm (no padding)"] = Case(
        layers.lstm(FEATURES, return_carry=True),
        _given((H, H), ragged=False),
        _linen_rnn("lstm"),
        _nnx_rnn("lstm"),
        _torch_rnn("lstm"),
    )
    table["bidirectional"] = Case(
        layers.bidirectional(layers.lstm(FEATURES, return_carry=True)),
        _given(((H, H), (H, H))),
        linen(
            lambda nn: nn.Bidirectional(
                nn.RNN(_linen_cell(nn, "lstm")), nn.RNN(_linen_cell(nn, "lstm")), return_carry=True
            ),
            _valid_alone,
            names=BOTH_WAYS,
        ),
        nnx(
            lambda nnx, rngs: nnx.Bidirectional(
                nnx.RNN(_nnx_cell(nnx, "lstm", rngs)),
                nnx.RNN(_nnx_cell(nnx, "lstm", rngs)),
                return_carry=True,
            ),
            _valid_alone,
            names=BOTH_WAYS,
        ),
    )
    return table


TABLE: dict[str, Case] = _recurrent()
