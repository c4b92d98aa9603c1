from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers, ops
from nnkit.checks import LayerError
from tests.properties import made

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(2, 5, 8))
HIDDEN = np.arange(5) >= np.asarray([[3], [5]])
NAMES = {"attention_norm": "norm1", "mlp_norm": "norm2"}


def torch_layer(params, norm_first, dtype):
    """PyTorch's encoder layer with our parameters."""
    peer = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    peer = peer.to(torch.float64 if dtype == np.float64 else torch.float32)
    attention, mlp = params["attention"], params["mlp"]
    qkv = [attention[name] for name in ("query", "key", "value")]
    state = {
        "self_attn.in_proj_weight": np.concatenate([np.asarray(p["kernel"]).reshape(8, 8).T for p in qkv]),
        "self_attn.in_proj_bias": np.concatenate([np.asarray(p["bias"]).ravel() for p in qkv]),
        "self_attn.out_proj.weight": np.asarray(attention["out"]["kernel"]).reshape(8, 8).T,
        "self_attn.out_proj.bias": attention["out"]["bias"],
        "linear1.weight": np.asarray(mlp["dense_0"]["kernel"]).T,
        "linear1.bias": mlp["dense_0"]["bias"],
        "linear2.weight": np.asarray(mlp["dense_1"]["kernel"]).T,
        "linear2.bias": mlp["dense_1"]["bias"],
    }
    for ours, theirs in NAMES.items():
        state |= {f"{theirs}.weight": params[ours]["scale"], f"{theirs}.bias": params[ours]["bias"]}
    peer.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})
    return peer


def gradients_of(peer):
    grad = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    weights, biases = (
        np.split(grad["self_attn.in_proj_weight"], 3),
        np.split(grad["self_attn.in_proj_bias"], 3),
    )
    attention = {
        name: {"kernel": w.T.reshape(8, 2, 4), "bias": b.reshape(2, 4)}
        for name, w, b in zip(("query", "key", "value"), weights, biases, strict=True)
    }
    out = grad["self_attn.out_proj.weight"].T.reshape(2, 4, 8)
    attention["out"] = {"kernel": out, "bias": grad["self_attn.out_proj.bias"]}
    mlp = {
        f"dense_{i}": {"kernel": grad[f"linear{i + 1}.weight"].T, "bias": grad[f"linear{i + 1}.bias"]}
        for i in (0, 1)
    }
    norms = {
        ours: {"scale": grad[f"{theirs}.weight"], "bias": grad[f"{theirs}.bias"]}
        for ours, theirs in NAMES.items()
    }
    return {"attention": attention, "mlp": mlp, **norms}


def close(ours, theirs, dtype):
    """Within the project's bounds, of the largest value in each half: 1e-5 in float32, 1e-10 in float64.

    The gradients of the parameters are taken together: that of the key's bias is 0 but for rounding.
    """
    bound = 1e-10 if dtype == np.float64 else 1e-5
    for a, b in zip(ours, theirs, strict=True):
        assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
        scale = max(abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(b))
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert abs(np.asarray(left) - np.asarray(right)).max() <= bound * scale


def equals_pytorch(norm_first, dtype, *, masked=True, **wrong):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(X, dtype)
        kwargs = {
            "mlp_features": 12,
            "norm_first": norm_first,
            "norm": partial(layers.layer_norm, epsilon=1e-5),
            "activation": layers.relu,
        }
        layer = layers.transformer_block(2, **{**kwargs, **wrong})
        params, state = made(layer, x)
        mask = jnp.asarray(~HIDDEN)[:, None, None] if masked else None

        def value(params, x):
            y, _ = layer.apply(params, state, layers.Attend(x, mask=mask), train=True)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, x)
        peer = torch_layer(params, norm_first, dtype)
        leaf = torch.tensor(np.asarray(x), requires_grad=True)
        z = peer(leaf, src_key_padding_mask=torch.tensor(HIDDEN))
        torch.sin(z).sum().backward()
        close((y, *grads), (z.detach().numpy(), gradients_of(peer), leaf.grad.numpy()), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_pytorchs_encoder_layer(norm_first, dtype):
    equals_pytorch(norm_first, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": layers.gelu},
        {"norm": partial(layers.layer_norm, epsilon=1e-3)},
        {"masked": False},
        {"causal": True},
    ],
    ids=["activation", "epsilon", "mask", "causal"],
)
def test_a_wrong_block_is_told_from_pytorchs(wrong):
    with pytest.raises(AssertionError):
        equals_pytorch(True, np.float32, **wrong)


def test_a_decoder_of_blocks_is_the_trained_one_piece_by_piece():
    """With every option of the attention, tokens, positions and tied weights."""

    def model(length=None):
        options = {"num_key_value_heads": 1, "rotary": ops.rotary, "normalize_qk": True, "dropout_rate": 0.5}
        blocks = (
            layers.transformer_block(2, causal=True, norm=layers.rms_norm, cache_length=length, **options)
            for _ in range(2)
        )

        def forward(net, ids):
            h = net.norm(net.blocks(net.positions(net.embed(ids))))
            return layers.attend(net.embed.params, h)

        return layers.wire(
            forward,
            embed=layers.embedding(7, 8),
            positions=layers.learned_positions(6, cache=length is not None),
            blocks=layers.serial(*blocks),
            norm=layers.layer_norm(),
        )

    ids = jax.random.randint(KEY, (2, 6), 0, 7)
    params, _ = made(model(), ids)
    whole = jax.jit(partial(model().apply, train=False))(params, {}, ids)[0]
    decoder = model(length=6)
    _, state = decoder.init(KEY, ids)
    step = jax.jit(partial(decoder.apply, train=False))
    logits, state = step(params, state, ids[:, :4])

    def next_token(state, token):
        logits, state = decoder.apply(params, state, token[:, None], train=False)
        return state, logits[:, 0]

    _, rest = jax.jit(lambda state, tokens: jax.lax.scan(next_token, state, tokens))(state, ids[:, 4:].T)
    close((jnp.concatenate([logits, rest.swapaxes(0, 1)], 1),), (whole,), np.float32)


def test_dropout_needs_a_key():
    layer = layers.transformer_block(2, dropout_rate=0.5)
    params, state = layer.init(KEY, jnp.asarray(X, jnp.float32))
    assert params["mlp"]["dense_0"]["kernel"].shape == (8, 32)
    with pytest.raises(LayerError, match="attention drops attention weights and needs a key"):
        layer.apply(params, state, jnp.asarray(X, jnp.float32), train=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.transformer_block(2, mlp_features=0),
            ValueError,
            r"mlp_features=...\) must be at least 1",
        ),
        (
            lambda: layers.transformer_block(2).init(KEY, jnp.zeros((2, 8))),
            LayerError,
            r"transformer_block takes \(batch, time, features\), got shape \(2, 8\)",
        ),
        (
            lambda: layers.transformer_block(2).init(
                KEY, layers.Attend(jnp.zeros((2, 5, 8)), jnp.zeros((2, 5, 8)))
            ),
            LayerError,
            "attends to its own sequence and got keys: build a block with wire",
        ),
        (
            lambda: layers.transformer_block(3).init(KEY, jnp.zeros((2, 5, 8))),
            LayerError,
            "attention has 3 heads and input of shape .*: pass qkv_features=9",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
