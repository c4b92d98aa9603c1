from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from nnkit.checks import LayerError
from nnkit.layers.children import inferring
from tests.layers.normalization_oracles import DTYPES, affine, close, draw, flax_apply, precision

RNG = np.random.default_rng(0)
N_BATCHES = 50
BATCHES = np.stack([draw((6, 3, 3, 4), i, mean=0.2 * i, spread=1 + i / 10) for i in range(N_BATCHES)])
MASK = np.arange(6 * 3).reshape(6, 3, 1) % 4 != 1  # of (batch, height, width)
KEY = jax.random.key(0)


def _trajectory(layer, params, batches, mask=None):
    """Each batch's output and gradients, then the state and the output at test time."""

    @jax.jit
    def run(params, state, batches):
        def step(state, x):
            def f(params, x):
                return layer.apply(params, state, x if mask is None else (x, mask), train=True)

            y, back, state = jax.vjp(f, params, x, has_aux=True)
            return state, (y, *back(jnp.cos(y)))

        state, outputs = jax.lax.scan(step, state, batches)
        return outputs, state, layer.apply(params, state, batches[0], train=False)[0]

    return run(params, layer.init(KEY, batches[0])[1], batches)


def _flax_trajectory(params, batches, mask=None):
    # use_fast_variance=False: Flax's default variance E[x²] - m² has other rounding.
    theirs = nn.BatchNorm(use_fast_variance=False)

    @jax.jit
    def run(params, stats, batches):
        def step(stats, x):
            def f(params, x):
                variables = {"params": params, "batch_stats": stats}
                return flax_apply(
                    theirs, variables, x, use_running_average=False, mutable=["batch_stats"], mask=mask
                )

            y, back, new = jax.vjp(f, params, x, has_aux=True)
            return new["batch_stats"], (y, *back(jnp.cos(y)))

        stats, outputs = jax.lax.scan(step, stats, batches)
        variables = {"params": params, "batch_stats": stats}
        return outputs, stats, flax_apply(theirs, variables, batches[0], use_running_average=True)

    dtype = batches.dtype
    return run(params, {"mean": jnp.zeros(4, dtype), "var": jnp.ones(4, dtype)}, batches)


def _torch_trajectory(params, batches, mask=None):
    """With a mask the batch is the list of the positions that count."""
    theirs = torch.nn.BatchNorm1d(4, dtype=getattr(torch, str(batches.dtype)))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        theirs.bias.copy_(torch.tensor(np.asarray(params["bias"])))
    outputs = []
    for x in np.asarray(batches):
        theirs.zero_grad()
        tx = torch.tensor(x, requires_grad=True)
        counted = tx.reshape(-1, 4) if mask is None else tx[torch.tensor(np.broadcast_to(mask, x.shape[:-1]))]
        y = theirs(counted)
        y.backward(y.detach().cos())
        grads = {"bias": theirs.bias.grad.numpy().copy(), "scale": theirs.weight.grad.numpy().copy()}
        outputs.append((y.detach().numpy(), grads, tx.grad.numpy()))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)
    stats = {"mean": theirs.running_mean.numpy(), "var": theirs.running_var.numpy()}
    theirs.eval()
    at_test = theirs(torch.tensor(np.asarray(batches[0])).reshape(-1, 4)).detach().numpy()
    return stacked, stats, at_test.reshape(batches[0].shape)


def _check_against_flax(layer, dtype, mask=None):
    with precision(dtype):
        batches, params = jnp.asarray(BATCHES, dtype), affine((4,), dtype)
        theirs = None if mask is None else jnp.asarray(mask)[..., None]  # Flax's wants the channels' axis
        ours = _trajectory(layer, params, batches, None if mask is None else jnp.asarray(mask))
        close(ours, _flax_trajectory(params, batches, theirs), dtype)


def _check_against_pytorch(layer, dtype):
    with precision(dtype):
        batches, params = jnp.asarray(BATCHES, dtype), affine((4,), dtype)
        (y, grads, dx), state, at_test = _trajectory(layer, params, batches)
        want, stats, want_at_test = _torch_trajectory(params, batches)
        close((y.reshape(N_BATCHES, -1, 4), grads, dx), want, dtype)
        close((state, at_test), (stats, want_at_test), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_trajectory_equals_flax(mask, dtype):
    _check_against_flax(layers.batch_norm(), dtype, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectory_equals_pytorch(dtype):
    _check_against_pytorch(layers.batch_norm(momentum=0.9, unbiased=True), dtype)


def test_a_masked_batch_is_pytorchs_batch_of_what_counts():
    """Statistics, the gradients of a loss that looks at what counts, and the unbiased variance's count."""
    layer = layers.batch_norm(momentum=0.9, unbiased=True)
    with jax.enable_x64(True):
        batches, params = jnp.asarray(BATCHES[:5]), affine((4,), "float64")
        where = np.broadcast_to(MASK, (6, 3, 3))
        want, stats, _ = _torch_trajectory(params, batches, MASK)

        @jax.jit
        def run(params, state, x):
            def f(params, x):
                y, new = layer.apply(params, state, (x, jnp.asarray(MASK)), train=True)
                return y[where], new

            y, back, new = jax.vjp(f, params, x, has_aux=True)
            return (y, *back(jnp.cos(y))), new

        state = layer.init(KEY, batches[0])[1]
        for i, x in enumerate(batches):
            got, state = run(params, state, x)
            close(got, jax.tree.map(lambda a, i=i: a[i], want), "float64")
        close(state, stats, "float64")


def _with(change, **options):
    """A batch normalisation whose apply is changed."""
    layer = layers.batch_norm(**options)

    def apply(params, state, x, *, key=None, train):
        return change(layer, params, state, x, train)

    return layer._replace(apply=apply)


def _mask_in_the_mean_alone(layer, params, state, x, train):
    if not isinstance(x, tuple):
        return layer.apply(params, state, x, train=train)
    x, mask = x
    mean = jnp.mean(x, (0, 1, 2), where=jnp.broadcast_to(mask[..., None], x.shape))
    y, new = layer.apply(params, state, x - mean, train=train)
    return y, {**new, "mean": 0.99 * state["mean"] + 0.01 * mean}


def _mask_ignored(layer, params, state, x, train):
    return layer.apply(params, state, x[0] if isinstance(x, tuple) else x, train=train)


@pytest.mark.parametrize(
    ("wrong", "mask"),
    [
        (layers.batch_norm(momentum=0.01), None),
        (layers.batch_norm(unbiased=True), None),
        (layers.batch_norm(epsilon=1e-3), None),
        (layers.batch_norm(use_running_average=True), None),
        (_with(lambda layer, p, s, x, train: layer.apply(p, s, x, train=True)), None),
        (_with(lambda layer, p, s, x, train: layer.apply(p, s, jax.lax.stop_gradient(x), train=train)), None),
        (_with(_mask_ignored), MASK),
        (_with(_mask_in_the_mean_alone), MASK),
    ],
)
def test_a_wrong_layer_is_caught(wrong, mask):
    with pytest.raises(AssertionError):
        _check_against_flax(wrong, "float64", mask)


def test_flaxs_layer_is_not_pytorchs():
    for wrong in (layers.batch_norm(unbiased=True), layers.batch_norm(momentum=0.9)):
        with pytest.raises(AssertionError):
            _check_against_pytorch(wrong, "float64")


@pytest.mark.parametrize(
    ("shape", "like"),
    [((6,), (6, 1, 1, 1)), ((6, 3), (6, 3, 1, 1)), ((6, 1, 3), (6, 1, 3, 1)), ((6, 3, 3, 4), (6, 3, 3, 4))],
)
def test_masks_of_any_number_of_axes(shape, like):
    mask = np.arange(np.prod(shape)).reshape(shape) % 3 != 1
    full = jnp.asarray(np.broadcast_to(mask.reshape(like), BATCHES[0].shape))
    layer = layers.batch_norm()
    x = jnp.asarray(BATCHES[0], jnp.float32)
    params, state = layer.init(KEY, (x, full))

    @jax.jit
    def run(x, *masks):
        return [layer.apply(params, state, (x, m), train=True) for m in masks]

    want, got = run(x, full, jnp.asarray(mask))
    close(got, want, "float32")


@pytest.mark.parametrize("options", [{"train": False}, {"train": True, "use_running_average": True}])
def test_what_is_masked_may_be_nan_where_the_running_statistics_normalise(options):
    train = options.pop("train")
    layer = layers.batch_norm(**options)
    x, mask = jnp.asarray(BATCHES[0], jnp.float32), jnp.arange(6) > 1
    params, state = affine((4,), "float32"), {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 2}

    def loss(params, x):
        y, _ = layer.apply(params, state, (x, mask), train=train)
        return jnp.sum(jnp.where(mask[:, None, None, None], jnp.sin(y), 0))

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    got, want = gradients(params, x.at[0, 1].set(jnp.nan)), gradients(params, x.at[0, 1].set(0))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_initialises_outside_of_its_axis():
    """Also a model that trains on one example a member, and one that is traced in training mode."""
    layer = layers.batch_norm(axis_name="data")
    model = layers.serial(layer, layers.layer_norm(axis_name="data"), layers.dense(2))
    params, state = model.init(KEY, jnp.zeros((1, 4)))
    run = jax.vmap(lambda x: model.apply(params, state, x, train=True)[0], axis_name="data")
    assert run(jnp.asarray(BATCHES[0][:3, :1, 0], jnp.float32)).shape == (3, 1, 2)
    params, state = layer.init(KEY, jnp.zeros((1, 4)))
    with inferring():
        assert layer.apply(params, state, jnp.zeros((1, 4)), train=True)[0].shape == (1, 4)
    with pytest.raises(LayerError, match="not inside an axis of that name"):
        layer.apply(params, state, jnp.zeros((1, 4)), train=True)


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_mask_of_zeros_leaves_the_statistics_and_makes_no_nan(unbiased):
    layer = layers.batch_norm(unbiased=unbiased)
    x = jnp.asarray(BATCHES[0], jnp.float32).at[0].set(jnp.nan)  # padding may hold anything
    params, state = affine((4,), "float32"), {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 2}

    @jax.jit
    def run(mask):
        def loss(params, x):
            y, new = layer.apply(params, state, (x, mask), train=True)
            return jnp.sum(jnp.where(mask[:, None, None, None], jnp.sin(y), 0)), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return grads, y, new

    for mask in (jnp.zeros(6, bool), jnp.arange(6) == 3):  # none, and one without a NaN
        grads, y, new = run(mask)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, y, new)))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new, state)
        assert all(same.values()) == (not mask.any())


def test_frozen_statistics():
    """In training as at test time; scale, bias and input still have their gradients."""
    x, params = jnp.asarray(BATCHES[5], jnp.float32), affine((4,), "float32")
    state = {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 2}
    frozen = layers.batch_norm(use_running_average=True)

    def run(layer, train):
        y, back, new = jax.vjp(
            lambda params, x: layer.apply(params, state, x, train=train), params, x, has_aux=True
        )
        return y, back(jnp.cos(y)), new

    got = run(frozen, True)
    jax.tree.map(np.testing.assert_array_equal, got, run(layers.batch_norm(), False))
    jax.tree.map(np.testing.assert_array_equal, got[2], state)
    assert all((g != 0).all() for g in jax.tree.leaves(got[1]))
    frozen.apply(params, state, x[:1, :1, :1], train=True)  # one value per channel is enough


# One of the first two examples counts, both of the next, none of the last.
UNEVEN = jnp.asarray([True, False, True, True, False, False])


def _check_axis_name(layer, mask, **options):
    """A batch cut in three under vmap against the whole: output, gradients and each member's state."""
    whole = layers.batch_norm(**options)

    def uncut(params, state, x):
        return whole.apply(params, state, x if mask is None else (x, mask), train=True)

    def cut(params, state, x):
        def member(x, mask):
            return layer.apply(params, state, x if mask is None else (x, mask), train=True)

        parts = [None if a is None else a.reshape(3, 2, *a.shape[1:]) for a in (x, mask)]
        y, new = jax.vmap(member, axis_name="data")(*parts)
        return y.reshape(x.shape), new

    with jax.enable_x64(True):
        x, params = jnp.asarray(BATCHES[3]), affine((4,), "float64")
        state = whole.init(KEY, x)[1]

        def run(f):
            y, back, new = jax.vjp(lambda p, x: f(p, state, x), params, x, has_aux=True)
            return (y, *back(jnp.cos(y))), new

        (want, statistics), (got, members) = jax.jit(lambda: (run(uncut), run(cut)))()
        close(got, want, "float64")
        close(members, jax.tree.map(lambda s: np.broadcast_to(s, (3, 4)), statistics), "float64")


@pytest.mark.parametrize("mask", [None, UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_over_a_mapped_axis_it_is_that_of_the_whole(unbiased, mask):
    _check_axis_name(layers.batch_norm(axis_name="data", unbiased=unbiased), mask, unbiased=unbiased)


@pytest.mark.parametrize(
    ("wrong", "mask", "options"),
    [
        (layers.batch_norm(), None, {}),
        (layers.batch_norm(), UNEVEN, {}),
        (layers.batch_norm(axis_name="data"), None, {"unbiased": True}),
        (_with(_mask_ignored, axis_name="data"), UNEVEN, {}),
    ],
)
def test_statistics_of_each_member_alone_are_caught(wrong, mask, options):
    with pytest.raises(AssertionError):
        _check_axis_name(wrong, mask, **options)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nnkit import layers

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (8, 3, 4)), jnp.float32)
whole, cut = layers.batch_norm(unbiased=True), layers.batch_norm(unbiased=True, axis_name="data")
params, state = whole.init(jax.random.key(0), x)

def run(layer, params, x, mask):
    def loss(params, x):
        y, new = layer.apply(params, state, x if mask is None else (x, mask), train=True)
        return jnp.sum(jnp.sin(y)), (y, new)
    return jax.grad(loss, (0, 1), has_aux=True)(params, x)

whole_run = jax.jit(lambda p, x, m: run(whole, p, x, m))
split = P("data")
mapped = jax.jit(jax.shard_map(
    lambda p, x, m: run(cut, p, x, m), mesh=mesh,
    in_specs=(P(), split, split), out_specs=((P(), split), (split, P())),
))
place = lambda a: jax.device_put(a, NamedSharding(mesh, split))
for mask in (None, jnp.arange(8) % 3 != 1):
    want = whole_run(params, x, mask)
    for got in (mapped(params, place(x), place(mask)), whole_run(params, place(x), place(mask))):
        # Sums in another order, of at most 24 numbers of size 1.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
        print("equal")
"""


def test_on_a_mesh_of_four_devices_it_is_that_of_one():
    """Under shard_map by its axis name, and under jit with sharded arrays of itself."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["equal"] * 4


def test_no_digits_are_lost_where_the_mean_is_large():
    """At mean 1e4 and spread 1 the one-pass variance E[x²] - m² has nothing left in float32."""
    x = jnp.asarray(RNG.normal(1e4, 1, (512, 1)), jnp.float32)
    y, _ = layers.batch_norm(use_scale=False, use_bias=False).apply(
        {}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, x, train=True
    )
    assert float(y.std()) == pytest.approx(1, abs=1e-3)
    one_pass = jnp.mean(x**2) - jnp.mean(x) ** 2
    assert abs(float(one_pass) - float(x.var())) > 0.5  # the check would see it


def test_half_precision_is_normalised_in_float32():
    x = jnp.asarray(RNG.normal(100, 1, (256, 2)), jnp.float16)
    layer = layers.batch_norm()
    params, state = layer.init(jax.random.key(0), x)
    assert state["var"].dtype == params["scale"].dtype == jnp.float32
    y, state = layer.apply(params, state, x, train=True)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32).std(axis=0), 1, atol=5e-3)
    assert state["mean"].dtype == jnp.float32


def test_options():
    key = jax.random.key(0)
    assert set(layers.batch_norm(use_scale=False).init(key, BATCHES[0])[0]) == {"bias"}
    assert set(layers.batch_norm(use_bias=False).init(key, BATCHES[0])[0]) == {"scale"}
    y, _ = layers.batch_norm(epsilon=3.0).apply(
        {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, jnp.ones((2, 1)),
        train=False,
    )  # fmt: skip
    np.testing.assert_allclose(y, 0.5)


def test_no_gradient_flows_into_the_running_statistics():
    layer, x = layers.batch_norm(), jnp.asarray(BATCHES[0], jnp.float32)
    params, state = layer.init(KEY, x)
    grad = jax.grad(lambda x: layer.apply(params, state, x, train=True)[1]["mean"].sum())(x)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("train", [True, False])
def test_an_array_of_numpys_is_taken_as_jax_takes_it(train):
    layer, x = layers.batch_norm(), BATCHES[0]  # float64, which JAX makes float32 here
    params, state = layer.init(KEY, x)
    y, _ = layer.apply(params, state, (x, MASK), train=train)
    want, _ = layer.apply(params, state, (jnp.asarray(x, jnp.float32), MASK), train=train)
    np.testing.assert_array_equal(y, want)
    assert y.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 4)])
def test_one_value_per_channel_is_an_error_in_training_only(shape):
    model = layers.serial(layers.dense(4), layers.batch_norm())
    params, state = model.init(jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(
        LayerError,
        match=r"batch_norm_0 got input of shape .* one value per channel, whose variance is 0: pass a larger",
    ):
        model.apply(params, state, jnp.zeros(shape), train=True)
    model.apply(params, state, jnp.zeros(shape), train=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.batch_norm(momentum=1.5), r"batch_norm\(momentum=...\) must be in \[0, 1\], got 1.5"),
        (lambda: layers.batch_norm(momentum=float("nan")), r"must be in \[0, 1\], got nan"),
        (
            lambda: layers.batch_norm(epsilon=-1.0),
            r"batch_norm\(epsilon=...\) must not be negative, got -1.0",
        ),
        (
            lambda: layers.batch_norm(axis_name="data", use_scale=False, use_bias=False).apply(
                {}, {"mean": jnp.zeros(4), "var": jnp.ones(4)}, jnp.asarray(BATCHES[0]), train=True
            ),
            r"batch_norm has axis_name='data' and is not inside an axis of that name: call it in jax.vmap\(\.\.\., "
            r"axis_name='data'\) or jax.shard_map, or leave axis_name out",
        ),
        (
            lambda: layers.batch_norm().init(KEY, (BATCHES[0], np.ones((3, 3), bool))),
            r"batch_norm got a mask of shape \(3, 3\) for input of shape \(6, 3, 3, 4\): its axes are those of x",
        ),
        (
            lambda: layers.batch_norm().apply({}, {}, BATCHES[0], train=False),
            r"batch_norm has no 'mean' among \[\]: pass the parameters and the state that this model's init made",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
