"""What users get wrong about data, by the text that they see."""

from __future__ import annotations

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2], np.int32)


def put(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, None),
        (X, Y),
        (jnp.asarray(X), jnp.asarray(Y)),
        (X.astype(jnp.bfloat16), Y.astype(np.uint8)),
        (X.astype(np.float16), Y.astype(np.int64)),
        (X.astype(np.complex64), Y),
        (np.arange(18).reshape(6, 3), Y),
        (X > 0, Y),
        ((X > 0).astype(np.uint8), Y),
        ({"image": X, "mask": X[:, 0] > 0}, Y),
        (X, np.eye(3, dtype=np.float32)[Y]),
        (X, np.stack([Y, Y], axis=1)),
        (X[::-1, ::2], Y[::-1]),
        (np.asfortranarray(X), Y),
    ],
)
def test_sound_data_pass_in_silence(x, y):
    data.check_data(x, y, num_classes=3)


def test_targets_of_a_regression_are_no_labels():
    data.check_data(X, X[:, :1] * 100 - 7)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, put(Y, 4, 3), ValueError, r"data.y holds the label 3 at index 4: with num_classes=3 the labels are 0 to 2"),
        (X, put(Y, 1, -1), ValueError, r"data.y holds the label -1 at index 1"),
        (X, np.stack([Y, Y + 1], 1), ValueError, r"data.y holds the label 3 at index \(2, 1\)"),
        (X, Y.astype(np.float32), ValueError, r"data.y is float32 and labels are integers: pass y.astype\(np.int32\)"),
        (X, Y > 0, ValueError, r"data.y is bool and labels are integers"),
        (X, 3 * np.eye(3, dtype=np.float32)[Y], ValueError, r"taken for probabilities of classes and go from 0 to 3"),
        (put(X, (2, 1), np.nan), Y, ValueError,
         r"data.x holds NaN or Inf in 1 of 18 places, the first nan at index \(2, 1\): drop or fill"),
        (put(X, slice(3, 5), -np.inf), Y, ValueError, r"in 6 of 18 places, the first -inf at index \(3, 0\)"),
        (put(X[:, 0], 5, np.inf), Y, ValueError, r"data.x holds NaN or Inf in 1 of 6 places, the first inf at index 5"),
        (put(X.astype(jnp.bfloat16), (0, 0), np.nan), Y, ValueError, r"data.x holds NaN or Inf in 1 of 18 places"),
        (X[:0], Y[:0], ValueError, r"data.x is empty, its shape is \(0, 3\)"),
        (X[:, :0], Y, ValueError, r"data.x is empty, its shape is \(6, 0\)"),
        (X, Y[:5], ValueError, r"data.x has 6 examples and data.y has 5: every array needs one entry for each example"),
        ({"a": X, "b": X[:4]}, Y, ValueError, r"data.x/a has 6 examples and data.x/b has 4"),
        (X, np.int32(3), ValueError, r"data.y is a single number and must be an array"),
        (X.astype(object), Y, TypeError, r"data.x has dtype object: it must hold numbers, and all"),
        (X, np.array(list("abcabc")), TypeError, r"data.y has dtype <U1: number the classes with np.unique"),
        ([[1.0, 2.0]], Y, TypeError, r"data.x/0/0 is of type float and must be an array: pass np.asarray\(...\)"),
        ({}, Y, ValueError, r"data.x has no arrays in it: \{\}"),
        (X, put(Y.astype(np.int64), 0, 2**31), ValueError, r"is int64 with values from 0 to 2147483648, which int32"),
        (put(X.astype(np.float64), 0, 1e39), Y, ValueError, r"data.x is float64 .* which float32 cannot hold: resc"),
        (put(X.astype(np.float64), 0, -1e39), Y, ValueError, r"float32 cannot hold"),
        (put(X.astype(np.complex128), 0, 1e39j), Y, ValueError, r"complex64 cannot hold"),
    ],
)  # fmt: skip
def test_mistakes_are_named(x, y, error, message):
    with pytest.raises(error, match=message) as caught:
        data.check_data(x, y, num_classes=3)
    assert "\n" not in str(caught.value)


def test_the_message_says_which_data():
    with pytest.raises(ValueError, match=r"^validation.x is empty"):
        data.check_data(X[:0], name="validation")


def test_nan_in_targets():
    with pytest.raises(ValueError, match=r"data.y holds NaN or Inf in 1 of 6 places"):
        data.check_data(X, put(X[:, 0], 2, np.nan))


def test_an_ignored_label_may_be_out_of_range():
    data.check_data(X, put(Y, 3, -1), num_classes=3, ignored_label=-1)
    with pytest.raises(ValueError, match="the label -2 at index 3"):
        data.check_data(X, put(Y, 3, -2), num_classes=3, ignored_label=-1)


def test_the_first_bad_place_is_found_in_every_piece():
    """Larger than one piece, so that places have to be counted across them."""
    x = np.zeros((300, 1000), np.float32)
    x[[70, 200, 299], [5, 6, 7]] = np.nan
    with pytest.raises(ValueError, match=r"in 3 of 300000 places, the first nan at index \(70, 5\)"):
        data.check_data(x)


def test_unscaled_images_are_warned_of_where_the_user_called():
    images = data.load("digits").train
    with pytest.warns(
        UserWarning, match=r"data.x is unscaled, uint8 of up to 16: call data.standardize\(splits\)"
    ) as seen:
        data.check_data(*images.arrays, num_classes=10)
    assert [warning.filename for warning in seen] == [__file__]
    for scale in (data.standardize, data.rescale):
        data.check_data(*scale(data.Splits(images)).train.arrays, num_classes=10)


def test_float64_becomes_float32_and_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"data.x is float64 and JAX will make it float32: pass it as .astype\(np.float32\)"
    ) as seen:
        data.check_data(X.astype(np.float64), Y)
    assert [warning.filename for warning in seen] == [__file__]
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check_data(put(X.astype(np.float64), 0, 1e39), Y.astype(np.int64) + 2**40)


def test_the_check_costs_little():
    """A pass at memory's speed: 40 ms for 188 MB; a copy or a loop over examples takes ten times that."""
    x = np.zeros((60_000, 28, 28, 1), np.float32)
    x[:] = 0.5
    times = []
    for _ in range(3):
        start = time.perf_counter()
        data.check_data(x)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


@pytest.mark.parametrize(
    ("batch_size", "error", "message"),
    [
        (
            101,
            ValueError,
            "batch_size is 101 and there are 100 examples: a batch cannot be larger than the data",
        ),
        (0, ValueError, "batch_size must be 1 or more, got 0"),
        (-5, ValueError, "batch_size must be 1 or more, got -5"),
        (12.5, TypeError, "batch_size must be an integer, got 12.5"),
        (32.0, TypeError, "batch_size must be an integer, got 32.0"),
        ("32", TypeError, "batch_size must be an integer, got '32'"),
        (True, TypeError, "batch_size must be an integer, got True"),
        (None, TypeError, "batch_size must be an integer, got None"),
    ],
)
def test_batch_sizes(batch_size, error, message):
    with pytest.raises(error, match=message):
        data.check_batch_size(batch_size, 100)


@pytest.mark.parametrize("batch_size", [1, 100, np.int64(7), np.uint8(7)])
def test_sound_batch_sizes(batch_size):
    data.check_batch_size(batch_size, 100)


def test_bytes_that_became_floats_are_warned_of_too():
    images = np.arange(256, dtype=np.float32).reshape(4, 64)
    with pytest.warns(UserWarning, match=r"data.x is unscaled, float32 of up to 255: call data.standardize"):
        data.check_data(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.check_data(images / 255)
        data.check_data(images - 100)
        data.check_data(images[:1, :3])  # a few small counts are no image
