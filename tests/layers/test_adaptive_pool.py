"""Adaptive and global pooling against PyTorch and Flax, and masks against what they cut out."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnkit import layers
from nnkit.checks import LayerError
from nnkit.layers import adaptive_pool
from tests.layers.spatial_oracles import check_layer, data

KINDS = {
    "avg": (layers.adaptive_avg_pool, {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}),
    "max": (layers.adaptive_max_pool, {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}),
}  # fmt: skip
CASES = {
    "1d_divides": ((2, 12, 3), 4),
    "1d_does_not": ((2, 11, 3), 4),
    "1d_grows": ((2, 3, 2), 7),
    "2d_one_axis_divides": ((2, 8, 7, 3), (4, 3)),
    "2d_as_it_is": ((2, 5, 7, 2), (None, 2)),
    "2d_to_one": ((2, 5, 7, 2), 1),
    "3d": ((1, 5, 4, 7, 2), (2, 3, 4)),
}


def check(kind: str, name: str) -> None:
    shape, size = CASES[name]
    ours, theirs = KINDS[kind]
    pool = theirs[len(shape) - 2]
    check_layer(ours(size), data(*shape), in_torch=lambda _, x: pool(x, size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_adaptive_pooling_equals_pytorch(name, kind):
    check(kind, name)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_do_not_overlap_are_caught(kind, monkeypatch):
    monkeypatch.setattr(
        adaptive_pool,
        "_windows",
        lambda n, m: (
            np.arange(m) * n // m,
            np.maximum((np.arange(m) + 1) * n // m, np.arange(m) * n // m + 1),
        ),
    )
    with pytest.raises(AssertionError):
        check(kind, "1d_does_not")


def test_the_first_of_equal_elements_gets_the_gradient_as_in_pytorch():
    x = np.zeros((1, 5, 7, 1))
    x[0, 1, 2], x[0, 2, 1] = 1, 1  # in row-major order the first of these
    for size in ((2, 3), 1):
        check_layer(
            layers.adaptive_max_pool(size), x, in_torch=lambda _, x, size=size: F.adaptive_max_pool2d(x, size)
        )
    check_layer(layers.global_max_pool(keepdims=True), x, in_torch=lambda _, x: F.adaptive_max_pool2d(x, 1))


def test_global_pooling_equals_flax_and_pytorch():
    for shape in ((2, 7, 3), (2, 4, 5, 3), (2, 2, 3, 2, 3)):
        window, axes = shape[1:-1], tuple(range(1, len(shape) - 1))
        x = data(*shape)

        def mean(_: Any, x: Any, window: Any = window) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                return nn.avg_pool(x, window)

        check_layer(
            layers.global_avg_pool(keepdims=True),
            x,
            in_jax=mean,
            in_torch=lambda _, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
        )
        check_layer(
            layers.global_max_pool(keepdims=True),
            x,
            in_jax=lambda _, x, window=window: nn.max_pool(x, window),
            in_torch=lambda _, x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
        )
        check_layer(layers.global_avg_pool(), x, in_jax=lambda _, x, axes=axes: x.mean(axes))
        check_layer(layers.global_max_pool(), x, in_jax=lambda _, x, axes=axes: x.max(axes))


POOLS = {"avg": (layers.global_avg_pool, np.mean), "max": (layers.global_max_pool, np.max)}


def check_mask(kind: str, pool: Any) -> None:
    """Each example's result and gradient are those of its marked elements alone, and nothing else counts."""
    reduce = POOLS[kind][1]
    x = data(4, 6, 3).astype(np.float32)
    mask = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
    x[~mask] = np.nan
    y, back = jax.vjp(lambda x: pool.apply({}, {}, (x, jnp.asarray(mask)), train=True)[0], jnp.asarray(x))
    expected = [reduce(e[m], 0) if m.any() else np.zeros(3) for e, m in zip(x, mask, strict=True)]
    np.testing.assert_allclose(y, np.stack(expected), rtol=1e-6)
    (dx,) = back(jnp.ones_like(y))
    assert not dx[~mask].any()
    np.testing.assert_allclose(dx.sum(1), np.array([[1], [1], [1], [0]]) * np.ones((1, 3)), rtol=1e-6)


@pytest.mark.parametrize("kind", POOLS)
def test_masks(kind):
    check_mask(kind, POOLS[kind][0]())
    images = jnp.asarray(data(2, 3, 4, 2), jnp.float32)
    mask = jnp.asarray(data(2, 3, 4) > 0)
    y, _ = POOLS[kind][0](keepdims=True).apply({}, {}, (images, mask), train=False)
    flat, _ = POOLS[kind][0]().apply({}, {}, (images.reshape(2, 12, 2), mask.reshape(2, 12)), train=False)
    np.testing.assert_array_equal(y, flat[:, None, None, :])


def test_wrong_masked_pools_are_caught():
    for kind in POOLS:
        ignoring = layers.stateless(
            lambda pair, kind=kind: getattr(jnp, {"avg": "mean", "max": "max"}[kind])(pair[0], 1)
        )
        with pytest.raises(AssertionError):
            check_mask(kind, ignoring)

    def by_product(pair):  # 0 * NaN
        x, mask = pair
        return (x * mask[..., None].astype(x.dtype)).sum(1) / jnp.maximum(mask.sum(1, jnp.float32), 1)[
            :, None
        ]

    with pytest.raises(AssertionError):
        check_mask("avg", layers.stateless(by_product))


@pytest.mark.parametrize("layer", [layers.global_avg_pool(), layers.adaptive_avg_pool(3)])
def test_half_precision_is_summed_in_float32(layer):
    x = jnp.asarray(1000 + data(2, 500, 2), jnp.float16)  # whose sum is not a float16
    y, _ = layer.apply({}, {}, x, train=False)
    wide, _ = layer.apply({}, {}, x.astype(jnp.float32), train=False)
    np.testing.assert_array_equal(y, wide.astype(jnp.float16))


def test_nan_is_not_hidden():
    x = jnp.asarray(data(1, 7, 1), jnp.float32).at[0, 3].set(jnp.nan)
    for layer in (layers.adaptive_max_pool(3), layers.global_max_pool()):
        y, _ = layer.apply({}, {}, x, train=False)
        assert bool(jnp.isnan(y).any())
    assert bool(torch.isnan(F.adaptive_max_pool1d(torch.tensor(np.asarray(x)).movedim(-1, 1), 3)).any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.adaptive_avg_pool(0), "adaptive_avg_pool(output_size=...) must be at least 1, got 0"),
        (
            lambda: layers.adaptive_max_pool((2, 2)).apply({}, {}, jnp.zeros((8, 28, 28)), train=False),
            "adaptive_max_pool takes (batch, height, width, channels), got shape (8, 28, 28): add a channel axis",
        ),
        (
            lambda: layers.global_avg_pool().apply({}, {}, jnp.zeros((8, 28)), train=False),
            "global_avg_pool takes (batch, *spatial, channels), got shape (8, 28)",
        ),
        (
            lambda: layers.global_max_pool().apply(
                {}, {}, (jnp.zeros((8, 5, 3)), jnp.ones((8, 5, 3), bool)), train=False
            ),
            "global_max_pool takes (x, mask) with a boolean mask of shape (8, 5), got bool of shape (8, 5, 3)",
        ),
        (
            lambda: layers.global_avg_pool().apply(
                {}, {}, (jnp.zeros((8, 5, 3)), jnp.ones((8, 5))), train=False
            ),
            "global_avg_pool takes (x, mask) with a boolean mask of shape (8, 5), got float32 of shape (8, 5)",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises((LayerError, ValueError)) as raised:
        make()
    assert message in str(raised.value)
