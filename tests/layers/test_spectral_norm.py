"""Spectral normalisation: Flax's and PyTorch's trajectories, and the singular value itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from nnkit.checks import LayerError
from tests.layers.normalization_oracles import DTYPES, close, draw, flax_apply, precision

KEY = jax.random.key(0)
STEPS = 8


def _moved(params, i):
    """Parameters that differ from step to step, as in training."""
    return {name: p + jnp.asarray(draw(p.shape, i), p.dtype) / 10 for name, p in params.items()}


def _run(layer, params, state, x, train=True):
    """The output and its gradients by parameters and input, and the new state."""

    @jax.jit
    def run(params, state, x):
        y, back, new = jax.vjp(lambda p, x: layer.apply(p, state, x, train=train), params, x, has_aux=True)
        return (y, *back(jnp.cos(y))), new

    return run(params, state, x)


def _check_against_flax(layer, dtype, n_steps=2):
    theirs = nn.SpectralNorm(nn.Dense(3), n_steps=n_steps)
    with precision(dtype):
        x = jnp.asarray(draw((5, 4)), dtype)
        params, state = layer.init(KEY, x)
        name = "layer_instance/kernel"
        stats = {
            f"{name}/u": state["spectral_norm"]["kernel"]["u"][None],
            f"{name}/sigma": jnp.ones((), dtype),
        }
        for i in range(STEPS):
            now, train = _moved(params, i), i < STEPS - 1  # the last as at test time

            def flax(p, x, stats=stats, train=train):
                variables = {"params": {"layer_instance": p}, "batch_stats": stats}
                return flax_apply(theirs, variables, x, update_stats=train, mutable=["batch_stats"])

            want_y, back, new = jax.jit(lambda p, x, f=flax: jax.vjp(f, p, x, has_aux=True))(now, x)
            got, state = _run(layer, now, state, x, train)
            close(got, (want_y, *back(jnp.cos(want_y))), dtype)
            stats = new["batch_stats"]
            close(state["spectral_norm"]["kernel"]["u"], stats[f"{name}/u"][0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectory_equals_flax(dtype):
    _check_against_flax(layers.spectral_norm(layers.dense(3), n_steps=2), dtype)


def _check_against_pytorch(layer, dtype, n_steps=2):
    with precision(dtype):
        x = jnp.asarray(draw((5, 4)), dtype)
        params, state = layer.init(KEY, x)
        linear = torch.nn.Linear(4, 3, dtype=getattr(torch, dtype))
        theirs = torch.nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=n_steps)
        own, original = theirs.parametrizations.weight[0], theirs.parametrizations.weight.original
        for name in "uv":
            getattr(own, f"_{name}").copy_(torch.tensor(np.asarray(state["spectral_norm"]["kernel"][name])))
        for i in range(STEPS):
            now, train = _moved(params, i), i < STEPS - 1
            theirs.train(train)
            with torch.no_grad():
                original.copy_(torch.tensor(np.asarray(now["kernel"]).T))
                theirs.bias.copy_(torch.tensor(np.asarray(now["bias"])))
            theirs.zero_grad()
            tx = torch.tensor(np.asarray(x), requires_grad=True)
            y = theirs(tx)
            y.backward(y.detach().cos())
            got, state = _run(layer, now, state, x, train)
            grads = {"bias": theirs.bias.grad.numpy(), "kernel": original.grad.numpy().T}
            close(got, (y.detach().numpy(), grads, tx.grad.numpy()), dtype)
            close(state["spectral_norm"]["kernel"], {n: getattr(own, f"_{n}").numpy() for n in "uv"}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectory_equals_pytorch(dtype):
    _check_against_pytorch(layers.spectral_norm(layers.dense(3), n_steps=2, convention="pytorch"), dtype)


def _vectors_differentiated(layer):
    """σ by the singular value decomposition, whose derivative goes through the vectors' convergence."""

    def apply(params, state, x, *, key=None, train):
        kernel = params["kernel"] / jnp.linalg.svd(params["kernel"], compute_uv=False).max()
        return layers.dense(3).apply({**params, "kernel": kernel}, {}, x, train=train)[0], state

    return layer._replace(apply=apply)


def test_a_wrong_normalisation_is_caught():
    right = layers.spectral_norm(layers.dense(3), n_steps=2)
    wrong = [
        layers.spectral_norm(layers.dense(3), n_steps=1),
        right._replace(apply=lambda p, s, x, *, train, **k: (right.apply(p, s, x, train=train)[0], s)),
        right._replace(apply=lambda p, s, x, *, train, **k: right.apply(p, s, x, train=True)),
        _vectors_differentiated(right),
    ]
    for layer in wrong:
        with pytest.raises(AssertionError):
            _check_against_flax(layer, "float64")
    pytorchs = layers.spectral_norm(layers.dense(3), n_steps=2, convention="pytorch")
    for layer in (
        layers.spectral_norm(layers.dense(3), n_steps=3, convention="pytorch"),
        pytorchs._replace(apply=lambda p, s, x, *, train, **k: pytorchs.apply(p, s, x, train=True)),
    ):
        with pytest.raises(AssertionError):
            _check_against_pytorch(layer, "float64")


@pytest.mark.parametrize("convention", ["flax", "pytorch"])
def test_one_step_at_a_time_finds_the_largest_singular_value(convention):
    """Of a convolution's kernel, taken as a matrix; the ratio of the first two values squared is 0.9 or less."""
    layer = layers.spectral_norm(layers.conv(5, (3, 3), use_bias=False), convention=convention)
    params, state = layer.init(KEY, jnp.zeros((1, 4, 4, 2)))
    step = jax.jit(lambda s: layer.apply(params, s, jnp.ones((1, 4, 4, 2)), train=True)[1])
    for _ in range(200):
        state = step(state)
    seen = []
    bare = layers.conv(5, (3, 3), use_bias=False)
    spy = bare._replace(apply=lambda p, s, x, **k: (seen.append(p["kernel"]), bare.apply(p, s, x, **k))[1])
    layers.spectral_norm(spy, convention=convention).apply(params, state, jnp.ones((1, 4, 4, 2)), train=False)
    values = np.linalg.svd(np.asarray(seen[0]).reshape(-1, 5), compute_uv=False)
    assert values[0] == pytest.approx(1, abs=1e-5)


def test_a_network_with_a_state_of_its_own():
    net = layers.serial(layers.dense(4), layers.batch_norm(), layers.dense(2))
    layer = layers.spectral_norm(net)
    x = jnp.asarray(draw((5, 3)), jnp.float32)
    with jax.debug_key_reuse(True):
        params, state = layer.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, state) == {
        "batch_norm_0": {"mean": (4,), "var": (4,)},
        "spectral_norm": {"dense_0": {"kernel": {"u": (4,)}}, "dense_1": {"kernel": {"u": (2,)}}},
    }
    np.testing.assert_array_equal(
        params["dense_0"]["kernel"], net.init(jax.random.key(1), x)[0]["dense_0"]["kernel"]
    )
    y, new = layer.apply(params, state, x, train=True)
    assert y.shape == (5, 2)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True))
    assert layer.name == net.name


def test_the_summary_shows_the_state_inside_and_each_repetition_has_vectors_of_its_own():
    block = layers.serial(layers.dense(3), layers.batch_norm())
    for around in (lambda layer: layer, lambda layer: layers.policy(layer, compute_dtype=jnp.bfloat16)):
        table = layers.summary(layers.serial(body=around(layers.spectral_norm(block))), jnp.zeros((1, 3)))
        rows = [line.split() for line in table.splitlines()]
        assert {row[0]: row[4] for row in rows if row[0].startswith("body")} == {
            "body/dense_0": "0", "body/batch_norm_0": "6", "body": "3"
        }  # fmt: skip
    stack = layers.repeat(layers.spectral_norm(block), 2)
    assert stack.init(KEY, jnp.zeros((1, 3)))[1]["block"]["spectral_norm"]["dense_0"]["kernel"][
        "u"
    ].shape == (2, 3)
    model = layers.serial(layers.dense(3), layers.named("stack", layers.repeat(block, 2)))
    message = (
        r"^stack stacks the block/dense_0/kernel of all its repetitions in one array, which spectral_norm around it "
        r"would take as one: wrap the block, not the stack, repeat\(spectral_norm\(block\), n\)"
    )
    with pytest.raises(LayerError, match=message):
        layers.spectral_norm(model).init(KEY, jnp.zeros((1, 3)))
    plain = layers.serial(layers.dense(3), layers.repeat(layers.layer_norm(), 2))
    layers.spectral_norm(plain, names="kernel").init(
        KEY, jnp.zeros((1, 3))
    )  # nothing to normalise in the stack


def test_a_kernel_of_zeros_stays_finite_and_keeps_the_vector():
    layer = layers.spectral_norm(layers.dense(3))
    params, state = layer.init(KEY, jnp.zeros((1, 4)))
    params = {**params, "kernel": jnp.zeros((4, 3))}
    (y, *grads), new = _run(layer, params, state, jnp.ones((2, 4)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, grads)))
    np.testing.assert_array_equal(new["spectral_norm"]["kernel"]["u"], state["spectral_norm"]["kernel"]["u"])


X = jnp.zeros((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.spectral_norm(layers.dense(3), n_steps=0),
            ValueError,
            r"spectral_norm\(n_steps=...\) must be at least 1, got 0",
        ),
        (
            lambda: layers.spectral_norm(layers.dense(3), convention="keras"),
            ValueError,
            r"spectral_norm\(convention=...\) must be 'flax' or 'pytorch', got 'keras'",
        ),
        (
            lambda: layers.spectral_norm(layers.batch_norm(), names=("scale",)).init(KEY, X),
            LayerError,
            r"spectral_norm takes matrices and got shape \(4,\) for scale",
        ),
        (
            lambda: layers.spectral_norm(layers.relu).init(KEY, X),
            LayerError,
            r"spectral_norm finds no parameter called 'kernel' in relu, only \[\]",
        ),
        (
            lambda: layers.spectral_norm(
                layers.serial(spectral_norm=layers.batch_norm(), a=layers.dense(2))
            ).init(KEY, X),
            LayerError,
            r"is around a layer that has a state called 'spectral_norm': one with names=\[...\] is enough",
        ),
        (
            lambda: layers.spectral_norm(layers.dense(3)).apply(
                layers.dense(3).init(KEY, X)[0], {}, X, train=True
            ),
            LayerError,
            r"spectral_norm has no vectors for kernel in its state: pass the state that this model's init made",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
