"""Scaling, against scikit-learn and NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from nnkit import data

EPS32 = np.finfo(np.float32).eps


def images(n=40, channels=3, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 6, 5, channels)).astype(dtype)


def splits(x_train, *others) -> data.Splits:
    return data.Splits(*(data.Dataset(x, np.zeros(len(x), np.int32)) for x in (x_train, *others)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.float16])
def test_statistics_are_numpys_in_float64(channels, dtype):
    x = images(channels=channels, dtype=dtype)
    statistics = data.channel_statistics(x)
    exact = x.astype(np.float64)
    # Sums of 1,200 numbers in another order: some ten units in the last place.
    np.testing.assert_allclose(statistics.mean, exact.mean((0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(statistics.std, exact.std((0, 1, 2)), rtol=1e-14)


def test_statistics_of_integers_are_exact():
    x = np.random.default_rng(0).integers(0, 256, (20_000, 7, 7, 1), dtype=np.uint8)
    n, total, squares = x.size, int(x.sum(dtype=np.int64)), int(np.square(x, dtype=np.int64).sum())
    statistics = data.channel_statistics(x)
    np.testing.assert_allclose(statistics.mean, total / n, rtol=2e-16)
    # n * squares - total**2 in Python's integers has no rounding at all.
    np.testing.assert_allclose(statistics.std**2, (n * squares - total**2) / n**2, rtol=1e-12)


def test_a_table_is_standardised_as_scikit_learn_does_it():
    rng = np.random.default_rng(1)
    train, test = rng.normal(3, 5, (50, 4)), rng.normal(3, 5, (20, 4))
    ours = data.standardize(splits(train, test))
    oracle = StandardScaler().fit(train)
    np.testing.assert_allclose(ours.train.x, oracle.transform(train), rtol=2 * EPS32, atol=1e-7)
    np.testing.assert_allclose(ours.validation.x, oracle.transform(test), rtol=2 * EPS32, atol=1e-7)


def test_a_table_is_rescaled_as_scikit_learn_does_it():
    rng = np.random.default_rng(1)
    train, test = rng.normal(3, 5, (50, 4)), rng.normal(3, 5, (20, 4))
    ours = data.rescale(splits(train, test))
    oracle = MinMaxScaler().fit(train)
    np.testing.assert_allclose(ours.train.x, oracle.transform(train), rtol=2 * EPS32, atol=1e-7)
    np.testing.assert_allclose(ours.validation.x, oracle.transform(test), rtol=2 * EPS32, atol=1e-7)


def check_standardisation(standardize) -> None:
    """What any standardisation has to do; the wrong ones below fail here."""
    rng = np.random.default_rng(2)
    # A large mean beside a small deviation, and a channel that does not vary.
    train = np.stack([rng.normal(1e4, 1, 400), rng.normal(0, 1e-3, 400), np.full(400, 0.1)], axis=-1)
    test = train[:50] + 2
    ours = standardize(splits(train.astype(np.float32), test.astype(np.float32)))
    for part in (ours.train, ours.validation):
        assert part.x.dtype == np.float32
        assert np.isfinite(part.x).all()
        np.testing.assert_array_equal(part.x[:, 2], 0)
    # float32 inputs near 1e4 are themselves rounded to 5e-4; the statistics are of what is given.
    np.testing.assert_allclose(ours.train.x[:, :2].mean(0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(ours.train.x[:, :2].std(0, dtype=np.float64), 1, atol=1e-6)
    exact = train.astype(np.float32).astype(np.float64)
    shifted = test.astype(np.float32).astype(np.float64)
    expected = (shifted[:, :2] - exact[:, :2].mean(0)) / exact[:, :2].std(0)
    np.testing.assert_allclose(ours.validation.x[:, :2], expected, rtol=1e-6)


def test_standardisation():
    check_standardisation(data.standardize)


def _scaled(parts, mean, std):
    return parts.map(lambda part: data.Dataset(((part.x - mean) / std).astype(np.float32), part.y))


def _one_pass(parts):
    x = parts.train.x
    return _scaled(parts, x.mean(0), np.sqrt(np.maximum((x**2).mean(0) - x.mean(0) ** 2, 1e-12)))


def _of_all_parts(parts):
    x = np.concatenate([parts.train.x, parts.validation.x]).astype(np.float64)
    return _scaled(parts, x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1))


def _of_each_part(parts):
    return parts.map(lambda part: data.standardize(data.Splits(part)).train)


def _without_care_for_constants(parts):
    x = parts.train.x.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _scaled(parts, x.mean(0), x.std(0))


def _of_the_sample(parts):
    x = parts.train.x.astype(np.float64)
    return _scaled(parts, x.mean(0), np.where(x.std(0) > 1e-9, x.std(0, ddof=1), np.inf))


def _of_the_whole_image(parts):
    x = parts.train.x.astype(np.float64)
    return _scaled(parts, x.mean(), x.std())


@pytest.mark.parametrize(
    "mutant",
    [
        _one_pass,
        _of_all_parts,
        _of_each_part,
        _without_care_for_constants,
        _of_the_sample,
        _of_the_whole_image,
    ],
)
def test_wrong_standardisations_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_standardisation(mutant)


@pytest.mark.parametrize("scale", [data.standardize, data.rescale])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_the_map_is_remembered_and_can_be_inverted(scale, dtype):
    raw = splits(images(dtype=dtype), images(10, dtype=dtype, seed=1))
    scaled = scale(raw)
    for before, after in zip(raw[:2], scaled[:2], strict=True):
        normalization = after.normalization
        np.testing.assert_array_equal(normalization.apply(before.x), after.x)
        # One rounding to float32 of numbers up to 4 deviations of 75.
        np.testing.assert_allclose(normalization.invert(after.x), before.x, atol=255 * EPS32)
    assert "normalised" in repr(scaled.train)
    assert raw.train.normalization is None


def test_a_constant_channel_has_no_deviation_at_all():
    """1001 times 0.1, summed and divided by 1001, is not 0.1; a deviation of 1e-17 would be divided by."""
    constants = np.array([0.1, 1 / 3, 1e10 / 3, -np.pi])
    assert (np.full((1001, 4), constants).mean(0) != constants).any()
    statistics = data.channel_statistics(np.full((1001, 4), constants))
    np.testing.assert_array_equal(statistics.std, 0)
    np.testing.assert_array_equal(statistics.mean, constants)


def test_a_constant_channel_comes_back():
    x = np.full((3, 2), 7.25)
    scaled = data.standardize(splits(x)).train
    np.testing.assert_array_equal(scaled.x, 0)
    np.testing.assert_array_equal(scaled.normalization.invert(scaled.x), x)


def test_digits_become_numbers_from_0_to_1():
    x = data.rescale(data.load("digits")).train.x
    assert (x.min(), x.max(), x.dtype) == (0, 1, np.float32)


def test_a_memory_map_is_read_as_any_array(tmp_path):
    x = images(100)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        data.standardize(splits(mapped)).train.x, data.standardize(splits(x)).train.x
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (splits(np.zeros((0, 2))), "has an empty training part"),
        (splits(np.array([[1.0], [np.nan]])), "holds NaN or Inf: data.check_data says where"),
        (splits(np.array([[1.0], [np.inf]])), "holds NaN or Inf"),
        (splits(np.zeros(4)), r"without a channel axis: pass x\[:, None\]"),
        (splits(images(4), images(4, channels=1)), "has 3 channels and got an array of shape"),
    ],
)
@pytest.mark.parametrize("scale", [data.standardize, data.rescale])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_cannot_be_scaled(scale, parts, message):
    with pytest.raises(ValueError, match=message):
        scale(parts)


def test_twice_is_a_mistake():
    with pytest.raises(
        ValueError, match="is normalised already: normalise the splits as they were loaded, once"
    ):
        data.standardize(data.rescale(splits(images())))
