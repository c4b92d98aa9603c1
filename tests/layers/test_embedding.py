from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from nnkit.checks import LayerError

KEY = jax.random.key(0)
IDS = jnp.asarray([[0, 3, 3], [4, 1, 0]])


def close(ours, theirs, dtype):
    """Within the project's bounds, of the largest value: 1e-5 in float32 and 1e-10 in float64."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert abs(a - b).max() <= (1e-10 if dtype == jnp.float64 else 1e-5) * abs(b).max()


def looked_up_and_attended(embed, attend, table, x):
    """Rows and logits, and their gradients with respect to the table and the input of ``attend``."""

    def value(table, x):
        y, z = embed(table), attend(table, x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(z)), (y, z)

    (_, outputs), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(table, x)
    return [*outputs, *grads]


def equals_flax(dtype, attend=layers.attend, ids=IDS):
    with jax.enable_x64(dtype == jnp.float64):
        layer = layers.embedding(5, 4, dtype=dtype)
        table = layer.init(KEY, IDS)[0]["embedding"]
        assert table.dtype == dtype
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), dtype)
        peer = nn.Embed(5, 4, dtype=dtype, param_dtype=dtype)
        ours = looked_up_and_attended(
            lambda t: layer.apply({"embedding": t}, {}, ids, train=True)[0],
            lambda t, x: attend({"embedding": t}, x),
            table,
            x,
        )
        theirs = looked_up_and_attended(
            lambda t: peer.apply({"params": {"embedding": t}}, IDS),
            lambda t, x: peer.apply({"params": {"embedding": t}}, x, method=peer.attend),
            table,
            x,
        )
        close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_equals_flax_forward_and_gradients(dtype):
    equals_flax(dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": IDS[::-1]},
        {"attend": lambda params, x: layers.attend(params, x) / 2},
        {"attend": lambda params, x: layers.attend(jax.lax.stop_gradient(params), x)},
    ],
    ids=["other_rows", "scaled", "no_gradient"],
)
def test_a_wrong_embedding_is_told_from_flaxs(wrong):
    with pytest.raises(AssertionError):
        equals_flax(jnp.float32, **wrong)


def test_draws_as_flax_does():
    ours = layers.embedding(200, 100).init(KEY, IDS)[0]["embedding"]
    theirs = nn.Embed(200, 100).init(KEY, IDS)["params"]["embedding"]
    # 20000 draws each of deviation 1/√100: the standard error of a deviation is 0.5 %.
    for table in (ours, theirs):
        assert float(table.std()) == pytest.approx(0.1, rel=0.02)
        assert float(abs(table).max()) > 0.3  # neither is truncated at two deviations


def test_padding_is_pytorchs():
    layer = layers.embedding(5, 4, padding_idx=3)
    params, _ = layer.init(KEY, IDS)
    assert not params["embedding"][3].any()
    params = {"embedding": params["embedding"] + 1}
    peer = torch.nn.Embedding(5, 4, padding_idx=3)
    with torch.no_grad():
        peer.weight.copy_(torch.tensor(np.asarray(params["embedding"])))
    y = peer(torch.tensor(np.asarray(IDS)))
    torch.sin(y).sum().backward()

    def value(params):
        y, _ = layer.apply(params, {}, IDS, train=True)
        return jnp.sum(jnp.sin(y)), y

    (_, z), grads = jax.value_and_grad(value, has_aux=True)(params)
    close([z, grads["embedding"]], [y.detach().numpy(), peer.weight.grad.numpy()], jnp.float32)
    assert not grads["embedding"][3].any()


def test_unknown_ids_raise_and_are_nan_in_compiled_code():
    layer = layers.embedding(5, 2)
    params, _ = layer.init(KEY, IDS)
    model = layers.serial(embed=layer)
    for bad, found in (([[1, 5]], 5), ([[-1, 0]], -1)):
        ids = jnp.asarray(bad)
        with pytest.raises(
            LayerError,
            match=rf"embed got the id {found} and has a table of 5 rows, 0 to 4: pass a larger num_emb",
        ):
            model.apply({"embed": params}, {}, ids, train=False)
    ids = jnp.asarray([[1, 5, -1, -5]])
    grads = jax.jit(jax.grad(lambda p, ids: jnp.nansum(layer.apply(p, {}, ids, train=True)[0])))(params, ids)
    y = jax.jit(partial(layer.apply, train=True))(params, {}, ids)[0]
    np.testing.assert_array_equal(jnp.isnan(y)[0].all(-1), [False, True, True, True])
    np.testing.assert_array_equal(grads["embedding"][:, 0], [0, 1, 0, 0, 0])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_ids_of_any_integer_dtype(dtype):
    layer = layers.embedding(300, 2)
    params, _ = layer.init(KEY, IDS)
    ids = jnp.asarray([[0, 127]], dtype)
    y = jax.jit(partial(layer.apply, train=True))(params, {}, ids)[0]
    np.testing.assert_array_equal(y[0], params["embedding"][jnp.asarray([0, 127])])
    assert layer.apply(params, {}, np.zeros((0, 2), dtype), train=False)[0].shape == (0, 2, 2)


def test_half_precision_logits_are_summed_in_float32():
    ones = {"embedding": jnp.ones((3, 4096), jnp.bfloat16)}
    y = layers.attend(ones, jnp.ones((1, 4096), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 4096)


PARAMS = {"embedding": jnp.zeros((5, 2))}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layers.embedding(0, 2), ValueError, r"embedding\(num_embeddings\) must be at least 1"),
        (lambda: layers.embedding(5, 0), ValueError, r"embedding\(features\) must be at least 1"),
        (lambda: layers.embedding(5, 2, dtype=jnp.int32), TypeError, "must be floating-point, got int32"),
        (
            lambda: layers.embedding(5, 2, padding_idx=5),
            ValueError,
            r"padding_idx=...\) must be in \[0, 5\), got 5",
        ),
        (
            lambda: layers.embedding(5, 2).init(KEY, jnp.zeros((1, 3))),
            LayerError,
            r"takes whole numbers, got float32 of shape \(1, 3\): write x.astype\(jnp.int32\)",
        ),
        (lambda: layers.embedding(5, 2).init(KEY, "abc"), LayerError, "takes whole numbers, got str"),
        (
            lambda: layers.embedding(6, 2).apply(PARAMS, {}, IDS, train=False),
            LayerError,
            r"has a embedding of shape \(5, 2\) and needs \(6, 2\): it was made as embedding\(6, 2\)",
        ),
        (
            lambda: layers.attend(PARAMS, jnp.zeros((1, 3))),
            LayerError,
            r"attend has a embedding of shape \(5, 2\) and needs \(5, 3\): its input has shape \(1, 3\)",
        ),
        (
            lambda: layers.attend({"kernel": 0}, jnp.zeros((1, 3))),
            LayerError,
            r"no 'embedding' among \['kernel'\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
