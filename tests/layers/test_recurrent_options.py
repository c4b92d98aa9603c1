"""Carries, padding, dropout, cells of one's own, derivatives of every kind, edge cases and errors."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import initializers, layers
from nnkit.checks import LayerError
from tests import properties

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)), jnp.float32)
LENGTHS = jnp.array([4, 0, 2])
KEY = jax.random.key(3)


def run(layer, params, x, **options):
    return layer.apply(params, {}, x, **{"train": False, **options})[0]


def check_padding(gru):
    """NaN in the padding reaches nothing; what is valid is as in Flax's convention; lengths of 0."""
    padded = jnp.where(jnp.arange(4)[:, None] < LENGTHS[:, None, None], X, jnp.nan)
    layer = gru(2, return_carry=True)
    params, _ = properties.made(layer, X)
    start = jnp.ones((3, 2))

    def loss(params, x, start):
        y, final = run(layer, params, layers.Sequence(x, LENGTHS, start))
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final)), (y, final)

    grads, (y, final) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, padded, start)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert not grads[1][1].any()
    assert not grads[1][2, 2:].any()
    assert not y[1].any()
    assert not y[2, 2:].any()
    np.testing.assert_array_equal(final[1], start[1])
    np.testing.assert_array_equal(final[2], y[2, 1])
    on, on_final = run(
        gru(2, return_carry=True, mask_outputs=False), params, layers.Sequence(X, LENGTHS, start)
    )
    valid = (jnp.arange(4) < LENGTHS[:, None])[..., None]
    np.testing.assert_allclose(y, jnp.where(valid, on, 0), rtol=1e-6)
    np.testing.assert_allclose(final, on_final, rtol=1e-6)
    assert on[1].any()


def test_padding_has_no_influence(monkeypatch):
    check_padding(layers.gru)
    recurrent, scanning = (sys.modules[f"nnkit.layers.{name}"] for name in ("recurrent", "scanning"))
    for module, name, wrong in [
        (recurrent, "zero_padding", lambda x, lengths: x),
        (scanning, "_where", lambda ok, new, old: new),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            with pytest.raises(AssertionError):
                check_padding(layers.gru)


def test_the_last_output_alone():
    params, _ = layers.gru(2).init(KEY, X)
    x = layers.Sequence(X, LENGTHS)
    y = run(layers.gru(2, reverse=True), params, x)
    last = run(layers.gru(2, reverse=True, keep_order=True, last_only=True), params, x)
    np.testing.assert_array_equal(last, jnp.stack([y[0, 3], jnp.zeros(2), y[2, 1]]))
    both = layers.bidirectional(layers.gru(2, last_only=True))
    params, _ = both.init(KEY, X)
    ahead = run(layers.gru(2, last_only=True), params["forward"], x)
    back = run(layers.gru(2, reverse=True, last_only=True), params["backward"], x)
    np.testing.assert_allclose(run(both, params, x), jnp.concatenate([ahead, back], -1), rtol=1e-6)


def test_pieces_of_a_sequence_equal_the_whole():
    layer = layers.stacked(*(layers.lstm(2, return_carry=True) for _ in range(2)))
    params, _ = properties.made(layer, X)
    whole, final = run(layer, params, X)
    first, carry = run(layer, params, X[:, :3])
    second, carry = run(layer, params, layers.Sequence(X[:, 3:], carry=carry))
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-6)
    properties.close(carry, final)


def test_the_two_ways_of_scanning_agree_in_every_derivative():
    """The affine rule against plain differentiation: forward, reverse, second order, mapped, and dropout."""
    cell = layers.lstm_cell(2)
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        tangent = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        results = []
        for form in (cell, cell._replace(affine=None)):
            layer = layers.recurrent(form, recurrent_dropout=0.5)
            params, _ = properties.made(layer, x)

            def f(rate, params, x, form=form):
                layer = layers.recurrent(form, recurrent_dropout=rate)
                return jnp.sum(jnp.sin(run(layer, params, layers.Sequence(x, LENGTHS), key=KEY, train=True)))

            @jax.jit
            def derivatives(params, x, f=f):
                gradient = jax.grad(f, argnums=(0, 1, 2))
                direction = jax.tree.map(jnp.ones_like, params)
                second = jax.jvp(gradient, (0.5, params, x), (1.0, direction, tangent))
                twice = jax.grad(
                    lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(0.5, p, x)[1]))
                )
                mapped = jax.vmap(lambda s: f(0.5, params, s * x))(jnp.array([1.0, 2.0]))
                return second, twice(params), mapped

            results.append(derivatives(params, x))
        properties.close(*results, rtol=1e-9, atol=1e-12)


def test_a_kernels_gradient_is_no_part_of_the_loop():
    layer = layers.lstm(2)
    params, _ = layer.init(KEY, X)
    text = str(jax.make_jaxpr(jax.grad(lambda p: run(layer, p, X).sum()))(params))
    plain = layers.recurrent(layers.lstm_cell(2)._replace(affine=None))
    slow = str(jax.make_jaxpr(jax.grad(lambda p: run(plain, p, X).sum()))(params))

    def adds(text):
        """Sums of the recurrent kernel's shape, which the loop makes where it adds the products up."""
        return text.count(":f32[2,8] = add_any")

    assert adds(slow) > adds(text)


def test_recurrent_dropout_has_one_mask_for_all_steps():
    layer = layers.simple_rnn(2, recurrent_dropout=0.5)
    params, _ = properties.made(layer, X)
    y = run(layer, params, X, key=KEY, train=True)
    mask, _ = layers.dropout(0.5).apply({}, {}, jnp.ones((3, 2)), key=KEY, train=True)
    h = jnp.zeros((3, 2))
    for t in range(4):
        h = jnp.tanh(X[:, t] @ params["kernel"] + (h * mask) @ params["recurrent_kernel"] + params["bias"])
        np.testing.assert_allclose(y[:, t], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run(layer, params, X), run(layers.simple_rnn(2), params, X))


def test_gru_with_its_reset_gate_before_the_product():
    layer = layers.gru(2, reset_after=False)
    params, _ = properties.made(layer, X)
    kernels, recurrent, biases = (
        np.split(np.asarray(params[k]), 3, -1) for k in ("kernel", "recurrent_kernel", "bias")
    )
    h = np.zeros((3, 2))
    for t in range(4):
        x = np.asarray(X[:, t])
        r, z = (1 / (1 + np.exp(-(x @ kernels[i] + h @ recurrent[i] + biases[i]))) for i in (0, 1))
        n = np.tanh(x @ kernels[2] + (r * h) @ recurrent[2] + biases[2])
        h = (1 - z) * n + z * h
        np.testing.assert_allclose(run(layer, params, X)[:, t], h, rtol=1e-5, atol=1e-6)


def test_initial_values():
    def pytorchs(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -1, 1) * shape[-1] ** -0.5

    params, _ = layers.lstm(16, forget_bias_init=initializers.ones).init(KEY, X)
    np.testing.assert_array_equal(params["bias"].reshape(4, 16), [[0] * 16, [1] * 16, [0] * 16, [0] * 16])
    for block in jnp.split(params["recurrent_kernel"], 4, -1):
        np.testing.assert_allclose(block.T @ block, np.eye(16), atol=1e-5)
    options = dict.fromkeys(("kernel_init", "recurrent_kernel_init", "bias_init"), pytorchs)
    for leaf in jax.tree.leaves(layers.gru(16, **options).init(KEY, X)[0]):
        assert 0.2 < abs(leaf).max() <= 0.25
    assert "bias" not in layers.simple_rnn(3, use_bias=False).init(KEY, X)[0]
    assert run(layers.gru(3, use_bias=False), layers.gru(3, use_bias=False).init(KEY, X)[0], X).shape == (
        3,
        4,
        3,
    )


def test_half_precision_adds_up_in_float32():
    """An LSTM that counts: c grows by 1/64 a step, which bfloat16 loses from 4 on."""
    layer = layers.lstm(1, return_carry=True, gate_fn=jnp.ones_like, activation_fn=lambda x: x)
    x = jnp.full((1, 512, 1), 1 / 64, jnp.bfloat16)
    params = {"kernel": jnp.ones((1, 4)), "recurrent_kernel": jnp.zeros((1, 4)), "bias": jnp.zeros(4)}
    y, (c, h) = run(layer, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x)
    assert (float(c[0, 0]), float(h[0, 0])) == (8.0, 8.0)
    assert (y.dtype, c.dtype, h.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def check_half_precision_gradients():
    """Those of 1024 steps that all pull the same way, against float32 on the same numbers."""
    cells = [
        layers.lstm_cell(2),
        layers.lstm_cell(2)._replace(affine=None),
        layers.gru_cell(2, reset_after=False),
        layers.Cell(
            lambda key, x: {"kernel": jnp.ones((2, 2), x.dtype)},
            lambda params, carry, x: (carry, x @ params["kernel"]),
            lambda params, x: jnp.zeros((x.shape[0], 2), x.dtype),
        ),
    ]
    x = (jax.random.uniform(KEY, (1, 1024, 2)) + 0.5).astype(jnp.bfloat16)
    for cell in cells:
        layer = layers.recurrent(cell)
        params, _ = layer.init(KEY, x)
        gradient = jax.jit(jax.grad(lambda p, x, layer=layer: run(layer, p, x).astype(jnp.float32).mean()))
        ours = gradient(params, x)
        want = gradient(*jax.tree.map(lambda a: a.astype(jnp.float32), (params, x)))
        assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
            # Each step's share is rounded to 2⁻⁹ some five times; summed in bfloat16 they miss by a third.
            assert abs(a.astype(jnp.float32) - b).max() <= 0.01 * abs(b).max()


def test_half_precision_gradients_add_up_in_float32(monkeypatch):
    check_half_precision_gradients()
    monkeypatch.setattr(sys.modules["nnkit.layers.recurrent"], "wide", lambda dtype: dtype)
    with pytest.raises(AssertionError):
        check_half_precision_gradients()


@pytest.mark.parametrize("time", [0, 1])
@pytest.mark.parametrize("lengths", [None, jnp.zeros(3, jnp.int32)])
def test_no_time_and_little(time, lengths):
    layer = layers.stacked(layers.bidirectional(layers.lstm(2)), layers.gru(2, last_only=True))
    params, _ = layer.init(KEY, X)
    x = layers.Sequence(X[:, :time], lengths)
    grads = jax.grad(lambda p, x: run(layer, p, x).sum(), allow_int=True)(params, x)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    y = run(layer, params, x)
    assert y.shape == (3, 2)
    assert bool(y.any()) == (time == 1 and lengths is None)


def test_an_activation_may_close_over_a_traced_value():
    params, _ = properties.made(layers.simple_rnn(2), X)

    def f(slope):
        layer = layers.simple_rnn(2, activation_fn=lambda x: jnp.where(x > 0, x, slope * x))
        return run(layer, params, X).sum()

    slopes, h = jnp.array([0.1, 0.2]), 1e-2
    grads = jax.vmap(jax.grad(f))(slopes)
    np.testing.assert_allclose(grads, [(f(s + h) - f(s - h)) / (2 * h) for s in slopes], rtol=1e-2)


def test_stacked_dropout_is_between_the_layers():
    layer = layers.stacked(layers.gru(2), layers.gru(2), dropout=0.5)
    params, _ = layer.init(KEY, X)
    single = layers.stacked(layers.gru(2), dropout=0.5)
    first = run(single, {"gru_0": params["gru_0"]}, X, key=KEY, train=True)
    np.testing.assert_array_equal(first, run(single, {"gru_0": params["gru_0"]}, X))
    dropped, _ = layers.dropout(0.5).apply({}, {}, first, key=jax.random.fold_in(KEY, 3), train=True)
    y = run(layer, params, X, key=KEY, train=True)
    np.testing.assert_allclose(y, run(layers.gru(2), params["gru_1"], dropped), rtol=1e-6)


LSTM, CARRYING = layers.lstm(2), layers.lstm(2, return_carry=True)


@pytest.mark.parametrize(
    ("layer", "x", "options", "message"),
    [
        (LSTM, X[0, 0], {}, r"lstm takes an array \(batch, time, ...\), got shape \(2,\)"),
        (LSTM, (X, LENGTHS), {}, r"lstm takes an array or layers.Sequence\(x, lengths, carry\), got tuple"),
        (LSTM, X[..., None], {}, r"takes \(batch, channels\) at each time step, got \(3, 2, 1\)"),
        (LSTM, X.astype(int), {}, "takes floating-point input, got int32"),
        (LSTM, layers.Sequence(X, jnp.array([5, 1, 1])), {}, r"got lengths from 1 to 5 for 4 time steps"),
        (LSTM, layers.Sequence(X, np.array([-1, 1, 1])), {}, r"got lengths from -1 to 1"),
        (LSTM, layers.Sequence(X, LENGTHS[:2]), {}, r"got lengths of shape \(2,\) .* one for each sequence, \(3,\)"),
        (LSTM, layers.Sequence(X, LENGTHS.astype(float)), {}, "lengths as an array of whole numbers, got float32"),
        (LSTM, layers.Sequence(X, [4, 0, 2]), {}, r"whole numbers, got list: pass jnp.array\(\[...\]\)"),
        (LSTM, layers.Sequence(X, None, jnp.zeros((3, 2))), {}, r"takes a carry of shapes \(\(3, 2\), \(3, 2\)\)"),
        (layers.gru(2, recurrent_dropout=0.5), X, {"train": True}, "gru has recurrent dropout and needs a key"),
        (layers.stacked(LSTM, LSTM, dropout=0.5), X, {"train": True}, "stacked has dropout and needs a key"),
        (layers.stacked(LSTM, CARRYING), X, {}, "has 1 layers of 2 that return their carry"),
        (layers.stacked(LSTM, LSTM), layers.Sequence(X, carry=(1,)), {}, "takes a tuple of 2 carries, got 1 of them"),
        (layers.stacked(layers.gru(2, last_only=True), LSTM), X, {}, r"has gru_0 before its end, which gives \(3, 2\)"),
        (layers.bidirectional(LSTM, CARRYING), X, {}, "has one layer that returns its carry"),
        (layers.bidirectional(LSTM, layers.gru(2, last_only=True)), X, {}, "pass last_only=True to both or to neither"),
        (layers.bidirectional(LSTM), layers.Sequence(X, carry=1), {}, r"takes a carry \(forward, backward\), got int"),
    ],
)  # fmt: skip
def test_errors(layer, x, options, message):
    with pytest.raises(LayerError, match=message):
        run(layer, layer.init(KEY, x)[0], x, **options)


def test_errors_of_parameters_and_arguments():
    params, _ = LSTM.init(KEY, X)
    with pytest.raises(
        LayerError, match=r"lstm has a kernel of shape \(2, 8\) and needs \(3, 8\): its input at one"
    ):
        run(LSTM, params, jnp.ones((1, 4, 3)))
    with pytest.raises(LayerError, match=r"gru has a recurrent_kernel of shape \(2, 8\) and needs \(2, 6\)"):
        run(
            layers.gru(2),
            {"kernel": jnp.ones((2, 6)), "recurrent_kernel": jnp.ones((2, 8)), "bias": jnp.ones(8)},
            X,
        )
    with pytest.raises(TypeError, match=r"recurrent\(cell\) takes a layers.Cell, .* got lstm_"):
        layers.recurrent(LSTM)
    with pytest.raises(ValueError, match=r"keep_order=True\) is of use with reverse=True only"):
        layers.gru(2, keep_order=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_cary'"):
        layers.gru(2, return_cary=True)
    with pytest.raises(ValueError, match="must be in"):
        layers.gru(2, recurrent_dropout=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        layers.simple_rnn(2, unroll=0)
    with pytest.raises(
        ValueError, match=r"merge=...\) must be 'concatenate', 'sum' or a function, got 'mean'"
    ):
        layers.bidirectional(LSTM, merge="mean")
    with pytest.raises(ValueError, match="needs at least one layer"):
        layers.stacked()
