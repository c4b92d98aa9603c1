"""Weight normalisation against Flax and PyTorch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers, tree
from nnkit.checks import LayerError
from tests.layers.normalization_oracles import (
    DTYPES,
    close,
    draw,
    flax_apply,
    precision,
    torch_value_and_gradients,
    value_and_gradients,
)

KEY = jax.random.key(0)


def _params(dtype, scale_shape=(3,)):
    return {
        "kernel": {
            "direction": jnp.asarray(draw((4, 3), 1), dtype),
            "scale": jnp.asarray(draw(scale_shape, 2), dtype),
        },
        "bias": jnp.asarray(draw((3,), 3), dtype),
    }


def _check_against_flax(layer, axes, dtype):
    theirs = nn.WeightNorm(nn.Dense(3), feature_axes=axes)

    def flax(p, x):
        inside = {"kernel": p["kernel"]["direction"], "bias": p["bias"]}
        scale = {"layer_instance/kernel/scale": p["kernel"]["scale"]}
        return flax_apply(theirs, {"params": {"layer_instance": inside, **scale}}, x)

    with precision(dtype):
        x = jnp.asarray(draw((5, 4)), dtype)
        params = _params(dtype, () if axes is None else (3,) if axes == -1 else (4,))
        want = value_and_gradients(flax, params, x)
        close(value_and_gradients(lambda p, x: layer.apply(p, {}, x, train=True)[0], params, x), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [-1, 0, None])
def test_equals_flax(axes, dtype):
    _check_against_flax(layers.weight_norm(layers.dense(3), feature_axes=axes), axes, dtype)


def _check_against_pytorch(layer, dim, dtype):
    def theirs(p, x):
        scale = p["scale"] if dim is None else p["scale"][:, None]
        kernel = torch._weight_norm(p["direction"].T, scale, -1 if dim is None else dim)
        return torch.nn.functional.linear(x, kernel, p["bias"])

    with precision(dtype):
        x, params = jnp.asarray(draw((5, 4)), dtype), _params(dtype, () if dim is None else (3,))
        flat = {name.rsplit("/", 1)[-1]: np.asarray(p) for name, p in tree.flatten(params).items()}
        y, grads, dx = torch_value_and_gradients(theirs, flat, x)
        kernel = {"direction": grads["direction"], "scale": grads["scale"]}
        got = value_and_gradients(lambda p, x: layer.apply(p, {}, x, train=True)[0], params, x)
        close(got, (y, {"kernel": kernel, "bias": grads["bias"]}, dx), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("axes", "dim"), [(-1, 0), (None, None)])
def test_equals_pytorch(axes, dim, dtype):
    _check_against_pytorch(layers.weight_norm(layers.dense(3), feature_axes=axes), dim, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        layers.weight_norm(layers.dense(3), epsilon=1e-3),
        layers.weight_norm(layers.dense(3, use_bias=False)),
        layers.dense(3)._replace(
            apply=lambda p, s, x, **k: (x @ (p["kernel"]["direction"] * p["kernel"]["scale"]) + p["bias"], s)
        ),
    ],
)
def test_a_wrong_normalisation_is_caught(wrong):
    with pytest.raises(AssertionError):
        _check_against_flax(wrong, -1, "float64")
    with pytest.raises(AssertionError):
        _check_against_pytorch(wrong, 0, "float64")


def test_it_starts_with_columns_of_length_1_or_as_the_bare_layer():
    x = jnp.asarray(draw((5, 4)), jnp.float32)
    bare_params, _ = layers.dense(3).init(KEY, x)
    bare, _ = layers.dense(3).apply(bare_params, {}, x, train=True)

    flaxs, _ = layers.weight_norm(layers.dense(3)).init(KEY, x)
    np.testing.assert_array_equal(flaxs["kernel"]["direction"], bare_params["kernel"])
    np.testing.assert_array_equal(flaxs["kernel"]["scale"], 1)

    layer = layers.weight_norm(layers.dense(3), scale_init="norm")
    params, _ = layer.init(KEY, x)
    np.testing.assert_allclose(layer.apply(params, {}, x, train=True)[0], bare, rtol=1e-5, atol=1e-6)
    torchs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    with torch.no_grad():
        torchs.weight = torch.tensor(np.asarray(bare_params["kernel"]).T)
    np.testing.assert_allclose(
        params["kernel"]["scale"], torchs.parametrizations.weight.original0.detach()[:, 0], rtol=1e-6
    )


def test_a_network_a_mask_and_names():
    net = layers.serial(layers.dense(4), layers.batch_norm(), layers.prelu(), layers.dense(2))
    x = jnp.asarray(draw((5, 4)), jnp.float32)
    layer = layers.weight_norm(net)
    params, state = layer.init(KEY, x)
    flat = tree.flatten(params)
    assert {"dense_0/kernel/direction", "dense_0/kernel/scale", "dense_1/kernel/scale"} < set(flat)
    assert not tree.flatten(tree.decayed(params))["dense_0/kernel/scale"]
    y, new = layer.apply(params, state, x, train=True)
    assert y.shape == (5, 2)
    assert jax.tree.structure(new) == jax.tree.structure(state)

    both = layers.weight_norm(net, names=("kernel", "slope"), feature_axes=None)
    assert both.init(KEY, x)[0]["prelu_0"]["slope"]["scale"].shape == ()
    bare = layers.weight_norm(layers.dense(3), use_scale=False)
    params, _ = bare.init(KEY, x)
    y, _ = bare.apply(params, {}, jnp.eye(4), train=True)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=0), 1, rtol=1e-6)
    assert layer.name == net.name


def test_a_layer_called_kernel_one_name_and_a_stack():
    x = jnp.asarray(draw((2, 3)), jnp.float32)
    layer = layers.weight_norm(layers.serial(kernel=layers.dense(3)), names="kernel", scale_init="norm")
    params, _ = layer.init(KEY, x)
    assert jax.tree.map(jnp.shape, params) == {
        "kernel": {"bias": (3,), "kernel": {"direction": (3, 3), "scale": (3,)}}
    }
    bare = layers.serial(kernel=layers.dense(3))
    want = bare.apply(bare.init(KEY, x)[0], {}, x, train=True)[0]
    np.testing.assert_allclose(layer.apply(params, {}, x, train=True)[0], want, rtol=1e-5, atol=1e-6)
    layers.repeat(layers.weight_norm(layers.dense(3)), 2).init(KEY, x)
    with pytest.raises(
        LayerError, match=r"^repeat stacks the block/kernel .* which weight_norm around it would take"
    ):
        layers.weight_norm(layers.repeat(layers.dense(3), 2)).init(KEY, x)
    twice = layers.weight_norm(layers.serial(layers.weight_norm(layers.dense(3)), layers.dense(3)))
    with pytest.raises(
        LayerError, match="weight_norm is around a layer that normalises dense_0/kernel already"
    ):
        twice.init(KEY, x)


def test_scales_drawn_at_random_differ():
    layer = layers.weight_norm(layers.serial(layers.dense(3), layers.dense(3)), scale_init=jax.random.normal)
    with jax.debug_key_reuse(True):
        params, _ = layer.init(jax.random.key(1), jnp.zeros((1, 3)))
    assert (params["dense_0"]["kernel"]["scale"] != params["dense_1"]["kernel"]["scale"]).all()


def test_a_direction_of_zeros_has_a_finite_gradient():
    params = {"kernel": {"direction": jnp.zeros((4, 3)), "scale": jnp.ones(3)}, "bias": jnp.zeros(3)}
    layer = layers.weight_norm(layers.dense(3))
    grads = jax.grad(lambda p: layer.apply(p, {}, jnp.ones((2, 4)), train=True)[0].sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


X = jnp.zeros((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.weight_norm(layers.dense(3), scale_init="norms"),
            ValueError,
            r"weight_norm\(scale_init=...\) must be an initializer or 'norm', got 'norms'",
        ),
        (
            lambda: layers.weight_norm(layers.dense(3), epsilon=-1.0),
            ValueError,
            r"weight_norm\(epsilon=...\) must not be negative",
        ),
        (
            lambda: layers.weight_norm(layers.batch_norm()).init(KEY, X),
            LayerError,
            r"weight_norm finds no parameter called 'kernel' in batch_norm, only \['bias', 'scale'\]: write "
            r"weight_norm\(..., names=",
        ),
        (
            lambda: layers.weight_norm(layers.dense(3), feature_axes=2).init(KEY, X),
            LayerError,
            r"weight_norm has feature_axes=2 for a parameter of shape \(4, 3\)",
        ),
        (
            lambda: layers.weight_norm(layers.dense(3)).apply(
                layers.dense(3).init(KEY, X)[0], {}, X, train=True
            ),
            LayerError,
            r"weight_norm takes direction and scale for kernel and got one array: pass the parameters",
        ),
        (
            lambda: layers.weight_norm(layers.dense(3), use_scale=False).apply(
                _params("float32"), {}, X, train=True
            ),
            LayerError,
            r"weight_norm takes one array for kernel and got \['direction', 'scale'\]: pass the parameters",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
