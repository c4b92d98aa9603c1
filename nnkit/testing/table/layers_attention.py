"""Attention with every mask, and the transformer's block."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from nnkit import layers
from nnkit.testing.table.layers_case import Case, spec
from nnkit.testing.table.layers_oracles import linen, nnx, torch_function, torch_module

__all__ = ["TABLE"]

SELF = (2, 5, 8)
CROSS = layers.Attend(spec(2, 4, 8), spec(2, 5, 6), spec(2, 5, 6))
BEFORE = np.tril(np.ones((1, 1, 5, 5), bool))
PADDING = (np.arange(5) < np.array([[3], [5]]))[:, None, None]
ANY = (np.random.default_rng(0).random((2, 2, 5, 5)) < 0.5) | np.eye(5, dtype=bool)


def _attend(f: Any, s: layers.Attend, train: bool, causal: bool = False) -> Any:
    """Flax's."""
    mask = s.mask if not causal else BEFORE if s.mask is None else BEFORE & s.mask
    return f(s.query, s.key, s.value, mask=mask)


def _nnx_attention(nnx: Any, rngs: Any, heads: int, **options: Any) -> Any:
    """With dropout, which does nothing at test time: without, its softmax is in float32 whatever the input."""
    return nnx.MultiHeadAttention(heads, 8, dropout_rate=0.5, decode=False, rngs=rngs, **options)


def _torch_attend(f: Any, s: layers.Attend, train: bool, causal: bool = False) -> Any:
    """A mask says there what is hidden: keys, or a matrix for each example and head."""
    import torch

    options: dict[str, Any] = {"need_weights": False}
    if causal:
        options["attn_mask"] = torch.tensor(~BEFORE[0, 0])
    if s.mask is not None and s.mask.shape[1:3] == (1, 1):
        options["key_padding_mask"] = ~s.mask[:, 0, 0]
    elif s.mask is not None:
        options["attn_mask"] = ~s.mask.reshape(-1, *s.mask.shape[2:])
    key, value = (s.query if a is None else a for a in (s.key, s.value))
    return f(s.query, key, value, **options)[0]


def _grouped(T: Any, p: Any, s: Any, x: layers.Attend) -> Any:
    """PyTorch's kernel for grouped queries; its module has none."""
    q, k, v = (
        T.einsum("btf,fhd->bhtd", x.query, p[name]["kernel"]) + p[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    y = T.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return T.einsum("bhtd,hdf->btf", y, p["out"]["kernel"]) + p["out"]["bias"]


def _attention(given: layers.Attend, causal: bool = False) -> Case:
    inner = None if given.key is None else given.key.shape[-1]
    return Case(
        layers.multi_head_attention(2, causal=causal),
        given,
        linen(lambda nn: nn.MultiHeadDotProductAttention(2), partial(_attend, causal=causal)),
        nnx(
            lambda nnx, rngs: _nnx_attention(nnx, rngs, 2, in_kv_features=inner),
            partial(_attend, causal=causal),
        ),
        torch_module(
            lambda T: T.nn.MultiheadAttention(8, 2, batch_first=True, kdim=inner, vdim=inner),
            partial(_torch_attend, causal=causal),
        ),
    )


ATTENTION: dict[str, Case] = {
    "multi_head_attention": _attention(layers.Attend(spec(*SELF))),
    "multi_head_attention (causal)": _attention(layers.Attend(spec(*SELF)), causal=True),
    "multi_head_attention (padding)": _attention(layers.Attend(spec(*SELF), mask=PADDING)),
    "multi_head_attention (causal, padding)": _attention(
        layers.Attend(spec(*SELF), mask=PADDING), causal=True
    ),
    "multi_head_attention (any mask)": _attention(layers.Attend(spec(*SELF), mask=ANY)),
    "multi_head_attention (cross)": _attention(CROSS),
    "multi_head_attention (cross, padding)": _attention(CROSS._replace(mask=PADDING)),
    "multi_head_attention (normalize_qk)": Case(
        layers.multi_head_attention(2, normalize_qk=True),
        layers.Attend(spec(*SELF)),
        linen(lambda nn: nn.MultiHeadDotProductAttention(2, normalize_qk=True), _attend),
        nnx(lambda nnx, rngs: _nnx_attention(nnx, rngs, 2, normalize_qk=True), _attend),
    ),
    "multi_head_attention (grouped, causal)": Case(
        layers.multi_head_attention(4, num_key_value_heads=2, causal=True),
        layers.Attend(spec(*SELF)),
        nnx=nnx(
            lambda nnx, rngs: _nnx_attention(nnx, rngs, 4, num_kv_heads=2),
            partial(_attend, causal=True),
        ),
        torch=torch_function(_grouped),
    ),
}


def _block(norm_first: bool, causal: bool = False) -> Case:
    """In training, where PyTorch takes no other way that has no gradients."""

    def call(f: Any, s: layers.Attend, train: bool) -> Any:
        import torch

        if causal:
            return f(s.query, src_mask=torch.tensor(~BEFORE[0, 0]), is_causal=True)
        return f(s.query, src_key_padding_mask=~s.mask[:, 0, 0])  # pyright: ignore

    return Case(
        layers.transformer_block(
            2,
            mlp_features=12,
            norm_first=norm_first,
            norm=partial(layers.layer_norm, epsilon=1e-5),
            activation=layers.relu,
            causal=causal,
        ),
        layers.Attend(spec(*SELF), mask=None if causal else PADDING),
        torch=torch_module(
            lambda T: T.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first),
            call,
        ),
        train=(True,),
    )


BLOCKS: dict[str, Case] = {
    "transformer_block (norm first, padding)": _block(True),
    "transformer_block (norm last, padding)": _block(False),
    "transformer_block (causal)": _block(True, causal=True),
}

TABLE: dict[str, Case] = {**ATTENTION, **BLOCKS}
