from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers, models, ops
from nnkit.checks import LayerError
from tests.properties import made

KEY = jax.random.key(0)
LENGTHS = np.asarray([3, 5])


def array(*shape, seed=0, dtype=np.float32):
    return np.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(ours, theirs, dtype):
    """Within the project's bounds, of the largest value: 1e-5 in float32 and 1e-10 in float64.

    The gradient of the key's bias is 0 in exact arithmetic, since it moves all logits of a query alike; what
    rounding leaves of it is compared with the gradient of the query's bias, which is a sum of the same size.
    """
    bound = 1e-10 if dtype == np.float64 else 1e-5
    ours, theirs = (
        {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for path, a in ours.items():
        b = theirs[path]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        scale = theirs[path.replace("'key']['bias'", "'query']['bias'")]
        assert abs(a - b).max() <= bound * abs(scale).max(), path


def with_gradients(run, params, inputs):
    """The output, the gradients of the parameters and those of the inputs, in one compilation."""

    def value(params, inputs):
        y = run(params, inputs)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, inputs)
    return {"y": y, "params": grads[0], "inputs": grads[1]}


def ours(layer, params, inputs, mask=None, key=None):
    def run(params, inputs):
        given = layers.Attend(**inputs, mask=mask)
        return layer.apply(params, {}, given, key=key, train=True)[0]

    return with_gradients(run, params, inputs)


# ---- Flax --------------------------------------------------------------------------------------

SELF = {"query": (2, 5, 8)}
CROSS = {"query": (2, 4, 8), "key": (2, 5, 6), "value": (2, 5, 3)}


def _before():
    return ops.causal_mask(5, 5)


def _padding():
    return ops.padding_mask(jnp.asarray(LENGTHS), 5)


def _nothing():
    return None


FLAX = {
    "causal": (SELF, {"causal": True}, {}, _nothing, _before),
    "padding": (SELF, {"normalize_qk": True}, {"normalize_qk": True}, _padding, _padding),
    "cross": (
        CROSS,
        {"qkv_features": 4, "out_features": 7, "use_bias": False},
        {"qkv_features": 4, "out_features": 7, "use_bias": False},
        _padding,
        _padding,
    ),
}


def equals_flax(case, dtype):
    shapes, kwargs, flax_kwargs, mask, flax_mask = case
    with jax.enable_x64(dtype == np.float64):
        layer = layers.multi_head_attention(2, **kwargs)
        inputs = {name: array(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
        params, _ = made(layer, layers.Attend(**inputs))
        peer = nn.MultiHeadDotProductAttention(2, dtype=dtype, param_dtype=dtype, **flax_kwargs)

        def run(params, inputs):
            given = [inputs.get(name) for name in layers.Attend._fields[:3]]
            with jax.numpy_dtype_promotion("standard"):  # Flax's layer norm mixes dtypes in float64
                return peer.apply({"params": params}, *given, mask=flax_mask())

        close(ours(layer, params, inputs, mask()), with_gradients(run, params, inputs), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", FLAX.values(), ids=FLAX)
def test_equals_flax_with_the_same_parameters(case, dtype):
    equals_flax(case, dtype)


RIGHT = ops.dot_product_attention


def _strict(q, k, v, *, causal, mask, **kwargs):
    mask = ops.causal_mask(q.shape[1], k.shape[1], offset=-1) if causal else mask
    return RIGHT(q, k, v, mask=mask, **kwargs)


WRONG = {
    "mask_ignored": (lambda q, k, v, *, mask, **kwargs: RIGHT(q, k, v, **kwargs), "padding"),
    "mask_inverted": (lambda q, k, v, *, mask, **kwargs: RIGHT(q, k, v, mask=~mask, **kwargs), "cross"),
    "itself_unseen": (_strict, "causal"),
    "unscaled": (lambda *args, **kwargs: RIGHT(*args, scale=1.0, **kwargs), "causal"),
    "keys_for_values": (lambda q, k, v, **kwargs: RIGHT(q, k, k, **kwargs), "causal"),
    "heads_exchanged": (lambda q, k, v, **kwargs: RIGHT(q, k, v[:, :, ::-1], **kwargs), "cross"),
    "no_gradient_to_keys": (lambda q, k, v, **kw: RIGHT(q, jax.lax.stop_gradient(k), v, **kw), "padding"),
}


@pytest.mark.parametrize(("wrong", "case"), WRONG.values(), ids=WRONG)
def test_a_wrong_attention_is_told_from_flaxs(monkeypatch, wrong, case):
    monkeypatch.setattr(ops, "dot_product_attention", wrong)
    with pytest.raises(AssertionError):
        equals_flax(FLAX[case], np.float32)


def test_draws_as_flax_does():
    """The fans are those of the matrices (in, out), which Flax too takes before it cuts them into heads."""
    x = jnp.zeros((1, 1, 128))
    params, _ = layers.multi_head_attention(8, qkv_features=256).init(KEY, x)
    flax = nn.MultiHeadDotProductAttention(8, qkv_features=256).init(KEY, x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, flax)
    for name in params:
        # 32768 draws: the standard error of their deviation is 0.4 %, and of a difference 0.6 %.
        spread, theirs = (float(p[name]["kernel"].std()) for p in (params, flax))
        assert spread == pytest.approx(theirs, rel=0.03)
        assert not params[name]["bias"].any()
    kernels = [np.asarray(p["kernel"]).ravel()[:100] for p in params.values()]
    assert len({kernel.tobytes() for kernel in kernels}) == 4


# ---- PyTorch -----------------------------------------------------------------------------------


def torch_attention(params, features, kdim, vdim, heads, dtype):
    peer = torch.nn.MultiheadAttention(features, heads, batch_first=True, kdim=kdim, vdim=vdim).to(dtype)
    with torch.no_grad():
        for name, weight in zip(("query", "key", "value"), weights_of(peer), strict=True):
            weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).reshape(-1, features).T))
        bias = [np.asarray(params[name]["bias"]).ravel() for name in ("query", "key", "value")]
        peer.in_proj_bias.copy_(torch.tensor(np.concatenate(bias)))
        peer.out_proj.weight.copy_(torch.tensor(np.asarray(params["out"]["kernel"]).reshape(features, -1).T))
        peer.out_proj.bias.copy_(torch.tensor(np.asarray(params["out"]["bias"])))
    return peer


def weights_of(peer):
    if peer.in_proj_weight is not None:
        return peer.in_proj_weight.chunk(3)
    return peer.q_proj_weight, peer.k_proj_weight, peer.v_proj_weight


def gradients_of(peer, params):
    """The gradients of PyTorch's attention in the form of ours."""
    if peer.in_proj_weight is not None:
        weights = peer.in_proj_weight.grad.chunk(3)
    else:
        weights = [w.grad for w in weights_of(peer)]
    grads = {
        name: {"kernel": w.numpy().T, "bias": b.numpy()}
        for name, w, b in zip(
            ("query", "key", "value"), weights, peer.in_proj_bias.grad.chunk(3), strict=True
        )
    }
    grads["out"] = {"kernel": peer.out_proj.weight.grad.numpy().T, "bias": peer.out_proj.bias.grad.numpy()}
    return jax.tree.map(lambda g, p: g.reshape(p.shape), grads, dict(params))


def equals_torch(shapes, mask, torch_kwargs, dtype, *, swap=False):
    with jax.enable_x64(dtype == np.float64):
        layer = layers.multi_head_attention(2)
        inputs = {name: array(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
        params, _ = made(layer, layers.Attend(**inputs))
        kdim, vdim = (inputs.get(name, inputs["query"]).shape[-1] for name in ("key", "value"))
        peer = torch_attention(
            params, 8, kdim, vdim, 2, torch.float64 if dtype == np.float64 else torch.float32
        )
        leaves = {name: torch.tensor(a, requires_grad=True) for name, a in inputs.items()}
        q, k, v = (leaves.get(name, leaves["query"]) for name in ("query", "key", "value"))
        y, _ = peer(q, k, v, need_weights=False, **torch_kwargs)
        torch.sin(y).sum().backward()
        theirs = {
            "y": y.detach().numpy(),
            "params": gradients_of(peer, params),
            "inputs": {name: leaf.grad.numpy() for name, leaf in leaves.items()},
        }
        if swap:
            params = {**params, "query": params["key"], "key": params["query"]}
        close(ours(layer, params, inputs, mask()), theirs, dtype)


TORCH = {
    "key_padding": (SELF, _padding, {"key_padding_mask": torch.tensor(np.arange(5) >= LENGTHS[:, None])}),
    "attn_mask": (SELF, _before, {"attn_mask": torch.tensor(np.triu(np.ones((5, 5), bool), 1))}),
    "cross": (CROSS, _nothing, {}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", TORCH.values(), ids=TORCH)
def test_equals_pytorch_with_the_same_parameters(case, dtype):
    equals_torch(*case, dtype)


def test_queries_in_the_place_of_keys_are_told_from_pytorchs():
    with pytest.raises(AssertionError):
        equals_torch(*TORCH["attn_mask"], np.float32, swap=True)


# ---- what neither has --------------------------------------------------------------------------


def test_grouped_queries_are_heads_with_equal_keys_and_values():
    x = {"query": array(2, 5, 8)}
    grouped, full = (layers.multi_head_attention(4, num_key_value_heads=n, rotary=ops.rotary) for n in (2, 4))
    params, _ = made(grouped, layers.Attend(**x))
    assert params["key"]["kernel"].shape == (8, 2, 2)

    def repeated(params):
        return {
            name: jax.tree.map(lambda a: jnp.repeat(a, 2, axis=-2), part)
            if name in ("key", "value")
            else part
            for name, part in params.items()
        }

    theirs = with_gradients(
        lambda p, x: full.apply(repeated(p), {}, layers.Attend(**x), train=True)[0], params, x
    )
    close(ours(grouped, params, x), theirs, np.float32)


def test_rotary_turns_queries_and_keys():
    x = array(1, 5, 8)
    turned = partial(ops.rotary, interleaved=True, base=10.0)
    layer = layers.multi_head_attention(2, rotary=turned)
    params, _ = made(layer, x)
    y, _ = layer.apply(params, {}, x, train=False)
    q, k, v = (
        jnp.einsum("btf,fnh->btnh", x, params[n]["kernel"]) + params[n]["bias"]
        for n in ("query", "key", "value")
    )
    z = ops.dot_product_attention(turned(q, jnp.arange(5)), turned(k, jnp.arange(5)), v)
    z = jnp.einsum("btnh,nhf->btf", z, params["out"]["kernel"]) + params["out"]["bias"]
    close({"y": y}, {"y": z}, np.float32)


def test_a_query_that_may_see_nothing_gets_the_bias_of_the_output():
    x = {"query": array(2, 5, 8)}
    layer = layers.multi_head_attention(2, normalize_qk=True)
    params, _ = made(layer, layers.Attend(**x))
    got = ours(layer, params, x, ops.padding_mask(jnp.array([0, 4]), 5))
    np.testing.assert_array_equal(got["y"][0], np.broadcast_to(params["out"]["bias"], (5, 8)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))
    assert not got["inputs"]["query"][0].any()
    assert got["inputs"]["query"][1].any()


def test_dropout_keeps_the_mean_and_is_drawn_for_all_examples_or_for_each():
    """All queries and keys are 0, so that weights are 1/64, and values 1: y counts the kept weights."""
    x = jnp.ones((16, 64, 2))
    for shared in (True, False):
        layer = layers.multi_head_attention(1, dropout_rate=0.25, broadcast_dropout=shared, use_bias=False)
        params, _ = layer.init(KEY, x)
        params = {name: {"kernel": jnp.zeros_like(part["kernel"])} for name, part in params.items()}
        params |= {"value": {"kernel": jnp.full((2, 1, 2), 0.5)}, "out": {"kernel": jnp.eye(2)[None]}}
        y = np.asarray(jax.jit(partial(layer.apply, train=True))(params, {}, x, key=KEY)[0])[..., 0]
        kept = y * 64 * 0.75
        np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
        # The deviation of the mean of 4096 draws of 1/0.75 with probability 0.75, of 65536 a quarter of that.
        assert abs(y.mean() - 1) < 4 * (0.25 / 0.75 / 4096) ** 0.5 / (1 if shared else 4)
        assert (y == y[0]).all() == shared
        np.testing.assert_allclose(layer.apply(params, {}, x, train=False)[0], 1, rtol=1e-6)


# ---- decoding ----------------------------------------------------------------------------------


def decodes_as_the_whole(pieces, **kwargs):
    """The parameters of the layer without a cache, decoded in pieces, against the whole sequence at once."""
    x = array(2, 6, 8)
    trained = layers.multi_head_attention(2, causal=True, **kwargs)
    decoder = layers.multi_head_attention(2, causal=True, cache_length=6, **kwargs)
    params, _ = made(trained, x)
    fresh, state = decoder.init(KEY, x[:, :1])
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    whole, _ = trained.apply(params, {}, x, train=False)
    step = jax.jit(partial(decoder.apply, train=False))
    got = []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        y, after = step(params, state, piece)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        got.append(y)
        state = after
    close({"y": jnp.concatenate(got, 1)}, {"y": whole}, np.float32)
    assert int(state["index"]) == 6
    np.testing.assert_array_equal(decoder.apply(params, state, x, train=True)[0], whole)
    return decoder, params, state, x


def test_piece_by_piece_is_the_whole_sequence_and_a_full_cache_raises():
    decoder, params, state, x = decodes_as_the_whole([3, 2, 1], num_key_value_heads=1, rotary=ops.rotary)
    assert decoder.apply(params, state, x, train=True)[1] is state
    with pytest.raises(
        LayerError, match="has room for 6 positions and got 1 after 6: make it larger, or start"
    ):
        decoder.apply(params, state, x[:, :1], train=False)
    y, _ = jax.jit(partial(decoder.apply, train=False))(params, state, x[:, :1])
    assert bool(jnp.isnan(y).all())
    with pytest.raises(LayerError, match="has room for 6 positions and got 7 after 0"):
        jax.jit(partial(decoder.apply, train=False))(params, state, array(2, 7, 8))


@pytest.mark.parametrize("wrong", ["rotary_from_0", "mask_from_0", "appended_at_0"])
def test_wrong_decoding_is_told_from_the_whole(monkeypatch, wrong):
    rotary, causal_mask, update = ops.rotary, ops.causal_mask, jax.lax.dynamic_update_slice_in_dim
    if wrong == "mask_from_0":
        monkeypatch.setattr(ops, "causal_mask", lambda q, k, offset=0: causal_mask(q, k))
    if wrong == "appended_at_0":
        monkeypatch.setattr(
            jax.lax, "dynamic_update_slice_in_dim", lambda a, b, i, axis: update(a, b, 0 * i, axis)
        )
    turned = (lambda x, t: rotary(x, t - t[0])) if wrong == "rotary_from_0" else rotary
    with pytest.raises(AssertionError):
        decodes_as_the_whole([5, 1], rotary=turned)


def test_decodes_as_flax_does():
    x = array(2, 3, 8)
    decoder = layers.multi_head_attention(2, causal=True, cache_length=3)
    params, state = made(decoder, x)
    peer = nn.MultiHeadDotProductAttention(2, decode=True)
    cache = peer.init(KEY, jnp.asarray(x))["cache"]
    step = jax.jit(lambda cache, x: peer.apply({"params": params, "cache": cache}, x, mutable="cache"))
    ours_step = jax.jit(partial(decoder.apply, train=False))
    for t in range(3):
        y, state = ours_step(params, state, x[:, t : t + 1])
        z, variables = step(cache, x[:, t : t + 1])
        cache = variables["cache"]
        close({"y": y}, {"y": z}, np.float32)
    close(
        {name: state[name] for name in ("cached_key", "cached_value")},
        {name: cache[name] for name in ("cached_key", "cached_value")},
        np.float32,
    )
    assert int(state["index"]) == int(cache["cache_index"])


def test_a_mask_hides_cached_positions():
    """Two prompts of lengths 2 and 3, padded on the left, go on as each would alone."""
    decoder = layers.multi_head_attention(2, causal=True, cache_length=4)
    x = array(2, 4, 8)
    params, state = made(decoder, x)
    hidden = jnp.asarray([[False, True, True, True], [True] * 4])[:, None, None]
    step = jax.jit(partial(decoder.apply, train=False))
    _, state = step(params, state, layers.Attend(x[:, :3], mask=hidden))
    y, _ = step(params, state, layers.Attend(x[:, 3:], mask=hidden))
    alone = layers.multi_head_attention(2, causal=True).apply(params, {}, x[:1, 1:], train=False)[0]
    close({"y": y[:1]}, {"y": alone[:, 2:]}, np.float32)


def test_a_cache_keeps_its_dtype_under_a_policy():
    lm = models.transformer_lm(11, features=8, num_layers=1, num_heads=2, max_length=6, cache=True)
    mixed = layers.policy(lm, param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, output_dtype=jnp.float32)
    tokens = jnp.arange(6)[None] % 11
    params, state = mixed.init(KEY, tokens)
    step = jax.jit(partial(mixed.apply, train=False))
    first, new = step(params, state, tokens[:, :3])
    last, new = step(params, new, tokens[:, 3:])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    want = lm.apply(params, state, tokens, train=False)[0]
    # bfloat16 rounds each of some ten operations in turn to 2⁻⁹.
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, atol=0.03 * abs(want).max())


@pytest.mark.parametrize("cross", [False, True])
def test_what_a_mask_hides_may_be_nan(cross):
    """The outputs at what it shows, and all gradients, are those with zeros in its place."""
    layer = layers.multi_head_attention(2, causal=not cross)
    x, hidden = jnp.asarray(array(2, 5, 8)), jnp.arange(5)[:, None] >= LENGTHS[:, None, None]
    params, _ = made(layer, x)

    def loss(params, x, other):
        given = layers.Attend(x, other if cross else None, mask=ops.padding_mask(LENGTHS, 5))
        y = layer.apply(params, {}, given, train=True)[0]
        return jnp.sum(jnp.sin(y) if cross else jnp.where(hidden, 0, jnp.sin(y)))

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    results = []
    for filler in (jnp.nan, 0):
        padded = jnp.where(hidden, filler, x)
        results.append(gradients(params, x if cross else padded, padded))
    jax.tree.map(np.testing.assert_array_equal, *results)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 0}, r"multi_head_attention\(num_heads\) must be at least 1, got 0"),
        ({"num_key_value_heads": 3}, r"\(num_key_value_heads=3\) must divide num_heads=4"),
        ({"qkv_features": 6}, r"\(qkv_features=6\) must be a multiple of num_heads=4"),
        ({"cache_length": 3}, r"\(cache_length=3\) needs causal=True"),
        ({"dropout_rate": 1.5}, r"dropout_rate=...\) must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layers.multi_head_attention(**{"num_heads": 4, **kwargs})


X = jnp.zeros((2, 5, 8))


@pytest.mark.parametrize(
    ("kwargs", "x", "message"),
    [
        ({}, X[0], r"takes \(batch, time, features\), got shape \(5, 8\)"),
        ({}, X.astype(int), "takes floating-point input, got int32"),
        ({}, X[..., :7], r"has 2 heads and input of shape \(2, 5, 7\), .*: pass qkv_features=8"),
        (
            {},
            X[..., :6],
            r"has a kernel of shape \(8, 2, 4\) and needs \(6, 2, 3\): that of 'query', whose input",
        ),
        (
            {},
            layers.Attend(X, X[:1]),
            r"got query \(2, 5, 8\), key \(1, 5, 8\) and value \(1, 5, 8\): batches",
        ),
        ({}, layers.Attend(X, X, X[:, :4]), "keys as many as values"),
        ({}, layers.Attend(X, value=X), r"got values without keys: pass Attend\(query, key, value\)"),
        (
            {},
            layers.Attend(X, mask=jnp.ones((2, 1, 1, 5))),
            "takes a boolean mask, .* got float32: write mask > 0",
        ),
        ({}, (X, jnp.ones((2, 5), bool)), r"got a boolean key: .* layers.Attend\(x, mask=mask\)"),
        (
            {"cache_length": 5, "causal": True},
            layers.Attend(X[:, :2], mask=jnp.ones((2, 1, 1, 2), bool)),
            r"has cache_length=5 and got a mask of shape \(2, 1, 1, 2\): .* over all 5 keys of the cache",
        ),
        (
            {"cache_length": 5, "causal": True},
            layers.Attend(X, X),
            "decodes its own sequence alone and got keys",
        ),
        (
            {"cache_length": 5, "causal": True},
            X[:1],
            r"has a cache \(2, 5, 2, 4\) and got \(1, 5, 2, 4\) to append",
        ),
    ],
)
def test_bad_input(kwargs, x, message):
    layer = layers.multi_head_attention(2, **kwargs)
    params, state = layer.init(KEY, X)
    model = layers.serial(attention=layer)
    with pytest.raises(LayerError, match="attention " + (message if message[0] != "k" else ".*" + message)):
        model.apply({"attention": params}, {"attention": state} if state else {}, x, train=False)


def test_dropout_needs_a_key():
    layer = layers.multi_head_attention(2, dropout_rate=0.5)
    params, state = layer.init(KEY, X)
    with pytest.raises(LayerError, match="attention weights and needs a key when train=True: pass apply"):
        layer.apply(params, state, X, train=True)
