"""Language models: from tokens to the logits of the next one."""

from __future__ import annotations

from typing import Any

from nnkit import layers
from nnkit.types import Array, Layer

__all__ = ["lstm_lm", "transformer_lm"]


def transformer_lm(
    vocabulary: int,
    *,
    features: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    max_length: int = 128,
    dropout: float | Array = 0.0,
    cache: bool = False,
) -> Layer:
    """A causal transformer of the GPT-2 kind: integer tokens (batch, time) to logits (batch, time, vocabulary).

    Token and learned position embeddings, dropout, blocks with layer normalisation before attention and before
    an MLP of four times the width with GELU, a last layer normalisation, and the embedding's own table for
    the output (weights tied).

    Args:
      vocabulary: how many tokens there are.
      features: width of the residual stream.
      num_layers: blocks.
      num_heads: attention heads in each block.
      max_length: the longest sequence.
      dropout: on embeddings, attention weights and both branches of each block.
      cache: whether the state keeps keys and values, so that tokens may come one at a time at test time. The
        parameters are those of the model without.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    >>> model = transformer_lm(50257, features=768, num_layers=12, num_heads=12, max_length=1024)
    >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1024), jnp.int32))
    >>> sum(p.size for p in jax.tree.leaves(params))  # GPT-2 small
    124439808
    """
    length = max_length if cache else None

    def forward(net: Any, tokens: Array) -> Array:
        x = net.dropout(net.position(net.embedding(tokens)))
        x = net.norm(net.blocks(x))
        return layers.attend(net.embedding.params, x)

    blocks = {
        f"block_{i}": layers.transformer_block(
            num_heads, causal=True, dropout_rate=dropout, cache_length=length
        )
        for i in range(num_layers)
    }
    return layers.wire(
        forward,
        embedding=layers.embedding(vocabulary, features),
        position=layers.learned_positions(max_length, cache=cache),
        dropout=layers.dropout(dropout),
        blocks=layers.serial(**blocks),
        norm=layers.layer_norm(),
    )


def lstm_lm(
    vocabulary: int,
    *,
    features: int = 240,
    num_layers: int = 2,
    embedding: int = 128,
    dropout: float | Array = 0.0,
    return_carry: bool = False,
) -> Layer:
    """Stacked LSTMs: integer tokens (batch, time) to logits (batch, time, vocabulary).

    Args:
      vocabulary: how many tokens there are.
      features: of each LSTM.
      num_layers: LSTMs.
      embedding: the length of a token's vector.
      dropout: on the embeddings, between the LSTMs and behind the last.
      return_carry: whether the output is (logits, carries), and the input ``layers.Sequence(tokens,
        carry=carries)``, so that tokens may come one at a time. The parameters are the same.

    >>> model = lstm_lm(65, features=32, num_layers=1, embedding=16)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    >>> model.apply(params, state, jnp.zeros((2, 8), jnp.int32), train=False)[0].shape
    (2, 8, 65)
    """
    body = [layers.lstm(features, return_carry=return_carry) for _ in range(num_layers)]

    def forward(net: Any, given: Any) -> Any:
        tokens, lengths, carry = given if isinstance(given, layers.Sequence) else (given, None, None)
        x = net.dropout(net.embedding(tokens))
        y = net.body(layers.Sequence(x, lengths, carry))
        y, carry = y if return_carry else (y, None)
        logits = net.head(net.dropout(y))
        return (logits, carry) if return_carry else logits

    return layers.wire(
        forward,
        embedding=layers.embedding(vocabulary, embedding),
        dropout=layers.dropout(dropout),
        body=layers.stacked(*body, dropout=dropout),
        head=layers.dense(vocabulary),
    )
