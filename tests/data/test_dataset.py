"""Data sets, their parts and the map of their channels."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from nnkit import data
from nnkit.data.dataset import chunks


def dots(n: int = 5) -> data.Dataset:
    x = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2, 1)
    return data.Dataset(x, np.arange(n, dtype=np.int32) % 2, "dots", ("even", "odd"))


def test_a_data_set_is_frozen_and_says_what_it_is():
    dataset = dots()
    assert len(dataset) == 5
    assert repr(dataset) == "Dataset(dots: 5 of (2, 2, 1) uint8, 2 classes)"
    regression = data.Dataset(np.zeros((3, 2)), np.zeros((3, 1)))
    assert repr(regression) == "Dataset(data: 3 of (2,) float64, targets (1,) float64)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"  # type: ignore[misc]


def test_arrays_are_a_pytree_of_two():
    x, y = jax.tree.leaves(dots().arrays)
    assert x.shape == (5, 2, 2, 1)
    assert y.shape == (5,)


def test_take_keeps_what_the_data_mean():
    part = dots().take([4, 0])
    np.testing.assert_array_equal(part.y, [0, 0])
    np.testing.assert_array_equal(part.x, dots().x[[4, 0]])
    assert (part.name, part.classes) == ("dots", ("even", "odd"))


def test_a_slice_and_a_whole_data_set_copy_nothing():
    x = np.zeros((6, 3), np.float32)
    dataset = data.Dataset(x, np.zeros(6))
    assert np.shares_memory(dataset.x, x)
    assert np.shares_memory(dataset.take(slice(2, 4)).x, x)


def test_a_memory_map_stays_one(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2), np.uint8))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    dataset = data.Dataset(x, np.zeros(4, np.int32))
    assert isinstance(dataset.x, np.memmap)
    np.testing.assert_array_equal(dataset.take([1, 3]).x, np.ones((2, 2)))


@pytest.mark.parametrize(("x", "y"), [(np.zeros((3, 2)), np.zeros(2)), (np.zeros(()), np.zeros(()))])
def test_x_and_y_have_one_length(x, y):
    with pytest.raises(ValueError, match=r"dots has x of shape .* and y of shape .*: the first axis of both"):
        data.Dataset(x, y, "dots")


def test_map_leaves_out_what_is_not_there():
    parts = data.Splits(dots(), test=dots(3)).map(lambda part: part.take([0]))
    assert (len(parts.train), parts.validation, len(parts.test)) == (1, None, 1)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (1, 4, 4, 3), (5, 1000, 1), (0, 3)])
@pytest.mark.parametrize("size", [1, 10, 2**16])
def test_chunks_are_the_array(shape, size):
    x = np.random.default_rng(0).normal(size=shape)
    seen = np.full(shape, np.nan)
    for part, block in chunks(x, size):
        seen[part] = block
    np.testing.assert_array_equal(seen, x)
    assert all(block.size <= max(size, x[:1].size) for _, block in chunks(x, size))
