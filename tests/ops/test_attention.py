from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from nnkit import ops

SHARED_HEADS = {"q": (2, 5, 4, 3), "k": (2, 7, 2, 3), "v": (2, 7, 2, 3)}
OWN_HEADS = {"q": (2, 5, 2, 3), "k": (2, 7, 2, 3), "v": (2, 7, 2, 6)}
PADDING = np.asarray([4, 7])


def arrays(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [np.asarray(rng.normal(size=shape), dtype) for shape in shapes.values()]


def close(ours, theirs, dtype):
    """Within the project's bounds, of the largest value: 1e-5 in float32 and 1e-10 in float64."""
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert abs(a - b).max() <= (1e-10 if dtype == np.float64 else 1e-5) * abs(b).max()


def ours_and_gradients(attention, q, k, v, **kwargs):
    def value(q, k, v):
        y = attention(q, k, v, **kwargs)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [y, *grads]


def torchs_and_gradients(q, k, v, **kwargs):
    leaves = [torch.tensor(a.swapaxes(1, 2), requires_grad=True) for a in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True, **kwargs)
    torch.sin(y).sum().backward()
    return [a.detach().numpy().swapaxes(1, 2) for a in (y, *(leaf.grad for leaf in leaves))]


CASES = [
    (SHARED_HEADS, {"causal": True}, {"is_causal": True}),
    (SHARED_HEADS, {"scale": 0.7}, {"scale": 0.7}),
    (
        OWN_HEADS,
        {"mask": ops.padding_mask(jnp.asarray(PADDING), 7)},
        {"attn_mask": torch.tensor(np.arange(7) < PADDING[:, None])[:, None, None]},
    ),
]


def equals_pytorch(attention, case, dtype):
    shapes, kwargs, torch_kwargs = case
    with jax.enable_x64(dtype == np.float64):
        q, k, v = arrays(shapes, dtype)
        ours = ours_and_gradients(attention, q, k, v, **kwargs)
        close(ours, torchs_and_gradients(q, k, v, **torch_kwargs), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=["causal", "scale", "padding"])
def test_equals_pytorch_forward_and_gradients(case, dtype):
    equals_pytorch(ops.dot_product_attention, case, dtype)


def _later(q, k, v, *, causal=False, mask=None, **kwargs):
    late = ops.causal_mask(q.shape[1], k.shape[1], offset=1) if causal else mask
    return ops.dot_product_attention(q, k, v, mask=late, **kwargs)


def _heads_interleaved(q, k, v, **kwargs):
    k, v = (jnp.tile(a, (1, 1, q.shape[2] // k.shape[2], 1)) for a in (k, v))
    return ops.dot_product_attention(q, k, v, **kwargs)


def _own_scale(q, k, v, *, scale=None, **kwargs):
    return ops.dot_product_attention(q, k, v, scale=0.5, **kwargs)


def _unmasked(q, k, v, *, mask=None, **kwargs):
    return ops.dot_product_attention(q, k, v, **kwargs)


def _attached(q, k, v, **kwargs):
    """The gradient of k is doubled."""
    return ops.dot_product_attention(q, 2 * k - jax.lax.stop_gradient(k), v, **kwargs)


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (_later, CASES[0]),
        (_heads_interleaved, CASES[0]),
        (_own_scale, CASES[1]),
        (_unmasked, CASES[2]),
        (_attached, CASES[2]),
    ],
)
def test_a_wrong_attention_is_told_from_pytorchs(wrong, case):
    with pytest.raises(AssertionError):
        equals_pytorch(wrong, case, np.float32)


def test_the_implementations_agree():
    q, k, v = arrays(SHARED_HEADS)
    mask = ops.padding_mask(jnp.array([0, 6]), 7)
    ours, xla = (
        ours_and_gradients(ops.dot_product_attention, q, k, v, mask=mask, causal=True, implementation=which)
        for which in ("matmul", "xla")
    )
    close(ours, xla, np.float32)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("matmul", jnp.float32),
        ("matmul", jnp.float16),
        ("matmul", jnp.bfloat16),
        ("xla", jnp.float32),  # in half precision its derivative mixes dtypes, which strict promotion forbids
    ],
)
def test_a_query_that_may_see_nothing_gets_zero_and_gives_no_gradient(implementation, dtype):
    q, k, v = (jnp.asarray(a, dtype) for a in arrays(SHARED_HEADS))
    mask = jnp.ones((2, 1, 5, 7), bool).at[1, :, 2].set(False).at[0].set(False)
    y, *grads = ours_and_gradients(
        ops.dot_product_attention, q, k, v, mask=mask, implementation=implementation
    )
    assert all(bool(jnp.isfinite(a).all()) and a.dtype == dtype for a in (y, *grads))
    for a in (y, *grads):
        assert not np.asarray(a[0], np.float32).any()
    for a in (y, grads[0]):
        assert not np.asarray(a[1, 2], np.float32).any()
        assert np.asarray(a[1, 1], np.float32).any()


@pytest.mark.parametrize("implementation", ["matmul", "xla"])
def test_a_key_that_no_query_may_see_may_be_nan(implementation):
    q, k, v = (jnp.asarray(a) for a in arrays(SHARED_HEADS))
    mask = ops.padding_mask(jnp.asarray([4, 7]), 7) & (jnp.arange(5) > 0)[:, None]
    nan, zero = (
        ours_and_gradients(
            ops.dot_product_attention, q, k.at[0, 4:].set(filler), v.at[0, 5].set(filler), mask=mask,
            implementation=implementation,
        )
        for filler in (jnp.nan, 0)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, nan, zero)


def test_half_precision_is_summed_in_float32():
    """Logits of 1.3e6 / √32 overflow float16, and 4096 equal weights are not summed by counting in bfloat16."""
    big = jnp.full((1, 2, 1, 32), 200, jnp.float16)
    v = jnp.asarray(np.arange(2).reshape(1, 2, 1, 1), jnp.float16)
    y = ops.dot_product_attention(big, big.at[:, 1].set(-200), v)
    np.testing.assert_array_equal(np.asarray(y), 0)
    many = jnp.zeros((1, 4096, 1, 1), jnp.bfloat16)
    y = ops.dot_product_attention(many[:, :1], many, many + 1)
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1)
    rng = np.random.default_rng(1)
    low = [jnp.asarray(rng.normal(size=(1, 64, 2, 8)), jnp.bfloat16) for _ in range(3)]
    exact = ops.dot_product_attention(*(a.astype(jnp.float32) for a in low))
    error = abs(ops.dot_product_attention(*low).astype(jnp.float32) - exact).max()
    # Weights and output are each rounded once to 8 bits: 2⁻⁹ of weights that sum to 1, times |v|, and of |y|.
    assert error <= 2.0**-9 * (abs(low[2].astype(jnp.float32)).max() + abs(exact).max())


def test_dropout_multiplies_the_weights():
    q, k, v = arrays(SHARED_HEADS)
    factors = jax.random.uniform(jax.random.key(0), (2, 4, 5, 7))
    y = ops.dot_product_attention(q, k, v, dropout=factors)
    k, v = (np.repeat(a, 2, axis=2) for a in (k, v))
    weights = jax.nn.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(3**0.5))
    close([y], [np.einsum("bhqk,bkhd->bqhd", weights * factors, v)], np.float32)


def test_second_derivatives_are_right():
    with jax.enable_x64(True):
        q, k, v = arrays({"q": (1, 3, 2, 2), "k": (1, 3, 1, 2), "v": (1, 3, 1, 2)}, np.float64)
        mask = jnp.ones((1, 1, 3, 3), bool).at[:, :, 1].set(False)
        f = jax.jit(lambda q, k, v: ops.dot_product_attention(q, k, v, mask=mask))
        check_grads(f, (q, k, v), order=2, modes=["fwd", "rev"])


def test_jaxs_own_kernels_get_what_was_asked(monkeypatch):
    asked = []

    def kernel(q, *args, **kwargs):
        asked.append(kwargs)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = (jnp.asarray(a) for a in arrays({"q": (1, 2, 1, 4), "k": (1, 2, 1, 4), "v": (1, 2, 1, 4)}))
    ops.dot_product_attention(q, k, v)
    assert asked == []
    ops.dot_product_attention(q, k, v, causal=True, implementation="cudnn")
    assert asked == [{"mask": None, "scale": 0.5, "is_causal": True, "implementation": "cudnn"}]


def test_masks():
    before = np.arange(6) <= np.arange(4)[:, None]
    np.testing.assert_array_equal(ops.causal_mask(4, 6)[0, 0], before)
    np.testing.assert_array_equal(ops.causal_mask(2, 6, offset=jnp.int32(2))[0, 0], before[2:])
    np.testing.assert_array_equal(ops.padding_mask(jnp.array([0, 2, 9]), 3)[:, 0, 0].sum(-1), [0, 2, 3])


# ---- rotary and sinusoidal positions -----------------------------------------------------------


def _turned(x, positions, pairs, base):
    """RoPE written as the multiplication of complex numbers, in NumPy and float64."""
    d = x.shape[-1]
    angles = positions[..., None] * base ** (-2 * np.arange(d // 2) / d)
    i, j = pairs
    z = (x[..., i] + 1j * x[..., j]) * np.exp(1j * angles)[..., None, :]
    y = np.empty_like(x)
    y[..., i], y[..., j] = z.real, z.imag
    return y


@pytest.mark.parametrize(
    ("interleaved", "pairs"),
    [(False, (np.arange(3), np.arange(3, 6))), (True, (np.arange(0, 6, 2), np.arange(1, 6, 2)))],
)
def test_rotary_is_a_multiplication_of_complex_numbers(interleaved, pairs):
    with jax.enable_x64(True):
        (x,) = arrays({"x": (2, 5, 3, 6)}, np.float64)
        for positions in (np.arange(5) + 3, np.arange(10).reshape(2, 5)):
            y = ops.rotary(jnp.asarray(x), jnp.asarray(positions), base=100.0, interleaved=interleaved)
            close([y], [_turned(x, positions, pairs, 100.0)], np.float64)
            traced = jax.jit(lambda x, p, b: ops.rotary(x, p, base=b, interleaved=interleaved))
            close([traced(x, positions, 100.0)], [y], np.float64)
        part = ops.rotary(jnp.concatenate([x, x], -1), jnp.arange(5), interleaved=interleaved, features=6)
        close([part], [np.concatenate([_turned(x, np.arange(5), pairs, 1e4), x], -1)], np.float64)
        with pytest.raises(AssertionError):
            close(
                [ops.rotary(jnp.asarray(x), jnp.arange(5), interleaved=not interleaved)],
                [part[..., :6]],
                np.float64,
            )


def test_rotary_makes_products_depend_on_the_distance_alone():
    q, k = arrays({"q": (1, 1, 1, 8), "k": (1, 1, 1, 8)})
    products = [
        float(jnp.sum(ops.rotary(q, jnp.array([i + 3])) * ops.rotary(k, jnp.array([i])))) for i in (0, 5, 40)
    ]
    # Angles of up to 43 are float32 numbers of spacing 4e-6, and the product has 8 terms of order 1.
    np.testing.assert_allclose(products, products[0], atol=3e-5)
    assert ops.rotary(jnp.ones((1, 1, 1, 2), jnp.bfloat16), jnp.array([1])).dtype == jnp.bfloat16


@pytest.mark.parametrize("features", [6, 5])
def test_sinusoids_are_the_papers(features):
    with jax.enable_x64(True):
        y = ops.sinusoidal(jnp.arange(4), features, dtype=jnp.float64)
    y = np.asarray(y)
    for t in range(4):
        for i in range(features):
            angle = t / 10000 ** ((i - i % 2) / features)
            assert abs(y[t, i] - (np.cos(angle) if i % 2 else np.sin(angle))) < 1e-14


# ---- errors ------------------------------------------------------------------------------------

Q = jnp.zeros((2, 5, 4, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (Q, Q[..., :2], Q),
            {},
            r"key \(batch, k, kv_heads, dim\) and .* got \(2, 5, 4, 3\), \(2, 5, 4, 2\) and",
        ),
        ((Q, Q[:, :, :3], Q[:, :, :3]), {}, "attention's 4 query heads cannot share 3 key heads evenly"),
        ((Q, Q, Q), {"mask": jnp.ones((1, 1, 5, 5))}, "mask is boolean, .* got float32: write mask > 0"),
        (
            (Q, Q, Q),
            {"mask": jnp.ones((2, 5), bool)},
            r"mask has shape \(2, 5\) and must broadcast to \(batch, heads, q, k\) = \(2, 4, 5, 5\): write m\[:, None",
        ),
        ((Q, Q, Q), {"dropout": jnp.ones((1, 1, 5, 4))}, r"dropout has shape \(1, 1, 5, 4\) and must"),
        ((Q, Q, Q), {"implementation": "flash"}, "unknown implementation of attention 'flash'"),
        (
            (Q, Q, Q),
            {"implementation": "xla", "dropout": jnp.ones((1, 1, 5, 5))},
            "implementation='xla' has no dropout: pass implementation='matmul'",
        ),
    ],
)
def test_bad_input_to_attention(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.padding_mask(jnp.ones(3), 3),
            r"one whole number for each example, got lengths of shape \(3,\) and dtype float32",
        ),
        (lambda: ops.rotary(Q, jnp.arange(5)), "rotary turns pairs of features and got 3 of 3"),
        (lambda: ops.rotary(Q, jnp.arange(5), features=4), "got 4 of 3"),
    ],
)
def test_bad_input_to_masks_and_positions(call, message):
    with pytest.raises(ValueError, match=message):
        call()
