"""The transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnkit.checks import LayerError
from nnkit.layers.activation import gelu
from nnkit.layers.attention import Attend, multi_head_attention
from nnkit.layers.combine import serial
from nnkit.layers.dense import dense
from nnkit.layers.dropout import dropout
from nnkit.layers.layer_norm import layer_norm
from nnkit.layers.lift import positive_int
from nnkit.layers.positions import sequence_input
from nnkit.layers.shape_dependent import shape_dependent
from nnkit.layers.wire import Net, wire
from nnkit.ops.attention import Implementation
from nnkit.types import Array, Layer, Spec

__all__ = ["transformer_block"]


def transformer_block(
    num_heads: int,
    *,
    mlp_features: int | None = None,
    norm_first: bool = True,
    norm: Callable[[], Layer] = layer_norm,
    activation: Layer = gelu,
    dropout_rate: float | Array = 0.0,
    causal: bool = False,
    rotary: Callable[[Array, Array], Array] | None = None,
    num_key_value_heads: int | None = None,
    normalize_qk: bool = False,
    broadcast_dropout: bool = True,
    use_bias: bool = True,
    cache_length: int | None = None,
    implementation: Implementation = "matmul",
) -> Layer:
    """Self-attention and an MLP at each position, each with a way around it and a normalisation.

    ``x ← x + attention(norm(x)); y = x + mlp(norm(x))``, or with ``norm_first=False`` the paper's
    ``x ← norm(x + attention(x)); y = norm(x + mlp(x))``. The MLP is dense, activation, dense. Dropout is on the
    attention weights, behind the activation and on both branches, as in PyTorch.

    Shapes: x and y (batch, time, features); with a mask x is ``layers.Attend(x, mask=mask)``, and y the
    array alone. Parameters are those of ``attention_norm``, ``attention``, ``mlp_norm`` and ``mlp``
    (``dense_0``, ``dense_1``). A stack of blocks is ``serial``; behind the last pre-norm block belongs one
    more norm. With ``cache_length`` the block decodes, see :func:`multi_head_attention`.

    Args:
      num_heads: attention heads.
      mlp_features: width of the MLP; 4 times the features by default.
      norm_first: whether the norms stand before attention and MLP or behind the sums.
      norm: makes a norm: ``layers.rms_norm``, or ``functools.partial(layers.layer_norm, epsilon=1e-5)``, which
        is PyTorch's.
      activation: a layer; ``layers.relu`` is PyTorch's.
      dropout_rate: the probability of dropping.
      causal, rotary, num_key_value_heads, normalize_qk, broadcast_dropout, cache_length, implementation: of the
        attention.
      use_bias: whether attention and MLP have biases.

    Raises:
      LayerError: where x comes with keys or values; these are for ``multi_head_attention``.

    Source: Vaswani et al. 2017, "Attention is all you need"; Radford et al. 2019 (GPT-2) for norms first.

    >>> encoder = layers.serial(*(layers.transformer_block(2) for _ in range(3)), layers.layer_norm())
    >>> params, state = encoder.init(jax.random.key(0), jnp.zeros((1, 5, 8)))
    >>> sorted(params["transformer_block_0"])
    ['attention', 'attention_norm', 'mlp', 'mlp_norm']
    >>> encoder.apply(params, state, jnp.ones((2, 5, 8)), train=False)[0].shape
    (2, 5, 8)

    With a mask for each block:

    >>> def forward(net, given):
    ...     x, lengths = given
    ...     mask = ops.padding_mask(lengths, x.shape[1])
    ...     return net.second(layers.Attend(net.first(layers.Attend(x, mask=mask)), mask=mask))
    >>> blocks = layers.wire(forward, first=layers.transformer_block(2), second=layers.transformer_block(2))
    >>> given = jnp.ones((2, 5, 8)), jnp.array([5, 3])
    >>> params, state = blocks.init(jax.random.key(0), given)
    >>> blocks.apply(params, state, given, train=False)[0].shape
    (2, 5, 8)
    """
    if mlp_features is not None:
        positive_int(mlp_features, "transformer_block(mlp_features=...)")
    attention = multi_head_attention(
        num_heads,
        num_key_value_heads=num_key_value_heads,
        causal=causal,
        rotary=rotary,
        normalize_qk=normalize_qk,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        use_bias=use_bias,
        cache_length=cache_length,
        implementation=implementation,
    )

    def forward(net: Net, given: Any) -> Array:
        x = _inputs(given)

        def attend(h: Array) -> Array:
            return net.attention_dropout(net.attention(x._replace(query=h)))

        if norm_first:
            h = x.query + attend(net.attention_norm(x.query))
            return h + net.mlp(net.mlp_norm(h))
        h = net.attention_norm(x.query + attend(x.query))
        return net.mlp_norm(h + net.mlp(h))

    def block(given: Spec) -> Layer:
        features = sequence_input("transformer_block", _inputs(given).query).shape[-1]
        mlp = serial(
            dense(mlp_features or 4 * features, use_bias=use_bias),
            activation,
            dropout(dropout_rate),
            dense(features, use_bias=use_bias),
            dropout(dropout_rate),
        )
        return wire(
            forward,
            attention_norm=norm(),
            attention=attention,
            attention_dropout=dropout(dropout_rate),
            mlp_norm=norm(),
            mlp=mlp,
        )

    return shape_dependent(block, name="transformer_block_")


def _inputs(x: Any) -> Attend:
    x = Attend(*x) if isinstance(x, tuple) else Attend(x)
    if not (x.key is None and x.value is None):
        raise LayerError(
            "transformer_block",
            "attends to its own sequence and got keys: build a block with wire around multi_head_attention",
        )
    return x
