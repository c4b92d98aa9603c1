from __future__ import annotations

import functools
import inspect
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, train
from nnkit.modes import SAMPLING
from nnkit.train import uncertainty
from tests.catalog import LAYERS

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 4)).astype(np.float32)
MODEL = layers.serial(
    layers.dense(16), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3)
)
PARAMS, _ = MODEL.init(KEY, X[:1])
# Statistics unlike those of any batch of X, and a spread of logits that leaves doubts of every size.
STATE = {"batch_norm_0": {"mean": jnp.full(16, 0.3), "var": jnp.linspace(0.05, 2.0, 16)}}


@jax.jit
def _dropped(x, key):
    """The network written out: statistics of the test, and a mask under the key of the fourth child."""
    p, s = PARAMS, STATE["batch_norm_0"]
    y = x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]
    y = jax.nn.relu((y - s["mean"]) / jnp.sqrt(s["var"] + 1e-5))
    y, _ = layers.dropout(0.5).apply({}, {}, y, key=jax.random.fold_in(key, 3), train=True)
    return y @ p["dense_1"]["kernel"] + p["dense_1"]["bias"]


def entropy(p):
    return -(p * np.log(p)).sum(-1)


@functools.cache
def by_hand():
    """Each of 7 samples of batches of 4 on its own under the documented key; float64's means of all at once."""
    found = []
    for b, start in enumerate((0, 4, 8)):
        rows = np.minimum(start + np.arange(4), 10)
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, b), s) for s in range(7)]
        logits = [_dropped(X[rows], k) for k in keys]
        found.append(np.float64(np.stack(logits))[:, : 11 - start])
    z = np.concatenate(found, axis=1)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    mean = p.mean(0)
    return train.Uncertain(mean, p.std(0, ddof=1), entropy(mean), entropy(mean) - entropy(p).mean(0))


def check(sample, at_once=3):
    """Against ``by_hand``, in batches of 4 with a last one of 3; at 3 at once there are 2 samples too many."""
    rows = [np.minimum(4 * b + np.arange(4), 10) for b in range(3)]
    options = {"at_once": at_once, "outputs": "logits"}
    parts = [sample(MODEL, PARAMS, STATE, X[r], KEY, b, jnp.int32(7), **options) for b, r in enumerate(rows)]
    for found, expected in zip(zip(*parts, strict=True), by_hand(), strict=True):
        # Probabilities are below 1 and entropies near log 3: a few roundings of float32.
        np.testing.assert_allclose(np.concatenate(found)[:11], expected, atol=2e-6)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_samples_are_what_the_documentation_says(at_once):
    check(uncertainty.sample, at_once)
    found = train.predict(MODEL, PARAMS, STATE, X, batch_size=4, samples=7, key=KEY, samples_at_once=at_once)
    assert isinstance(found, train.Uncertain)
    for part, expected in zip(found, by_hand(), strict=True):
        np.testing.assert_allclose(part, expected, atol=2e-6)


MUTANTS = {
    "training mode": ("train=SAMPLING)[0]\n        return", "train=True)[0]\n        return"),
    "one mask for all samples": ("jax.random.fold_in(key, s)", "key"),
    "the same masks in every batch": ("key = jax.random.fold_in(key, batch)", "key = jax.random.fold_in(key, 0)"),
    "the population's deviation": ("(samples - 1).astype", "samples.astype"),
    "all of the last chunk": ("drawn=numbers < samples", "drawn=numbers >= 0"),
    "chunks weigh the same": ("share = count / (old + count)", "share = 1 / (1 + old / ys.shape[0])"),
    "bits": ("p * jnp.log(", "p * jnp.log2("),
    "no entropy of the samples": ("entropy_of(s.mean) - s.entropy", "entropy_of(s.mean)"),
    "logits are averaged": ("jax.nn.softmax(y) if", "y if"),
    "the spread within chunks only": (" + jnp.square(apart) * old * share", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_samples_are_noticed(name):
    right, wrong = MUTANTS[name]
    source = inspect.getsource(uncertainty)
    assert source.count(right) == 1
    module = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), module.__dict__)
    with pytest.raises(AssertionError):
        check(module.sample)


def test_mean_and_variance_of_one_linear_layer_are_the_closed_ones():
    """y = sum w m x / q + b has mean w x + b and variance sum (w x)² rate / q.

    The mean of S draws is off by sd / sqrt(S), and their variance by at most var sqrt(2 / S) or so, since
    a sum of bounded draws of which none prevails has no excess kurtosis above 0: 6 of each for 33 numbers.
    """
    rate, samples = 0.3, 4000
    model = layers.serial(layers.dropout(rate), layers.dense(3))
    params, state = model.init(KEY, X[:1])
    kernel, bias = params["dense_0"]["kernel"], jnp.arange(3.0)
    params = {"dense_0": {"kernel": kernel, "bias": bias}}
    found = train.predict(
        model, params, state, X, batch_size=11, samples=samples, key=KEY, outputs="values", samples_at_once=50
    )
    variance = np.square(X) @ np.square(kernel) * rate / (1 - rate)
    np.testing.assert_array_less(np.abs(found.mean - (X @ kernel + bias)), 6 * np.sqrt(variance / samples))
    np.testing.assert_array_less(np.abs(found.spread**2 / variance - 1), 6 * np.sqrt(2 / samples))
    assert found.entropy is None
    assert found.mutual_information is None


def test_all_masks_of_a_small_network_give_what_the_samples_tend_to():
    """Of 6 hidden units there are 64 masks, so that mean, entropy and information are finite sums."""
    rate, samples = 0.4, 20_000
    model = layers.serial(layers.dense(6), layers.relu, layers.dropout(rate), layers.dense(3))
    params, state = model.init(KEY, X[:1])
    params = jax.tree.map(lambda p: 2 * p, params)
    hidden = np.maximum(np.float64(X @ params["dense_0"]["kernel"]), 0)
    masks = np.array(list(itertools.product([0, 1], repeat=6)))
    weights = np.prod(np.where(masks, 1 - rate, rate), axis=1)
    z = (masks[:, None] * hidden / (1 - rate)) @ np.float64(params["dense_1"]["kernel"])
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    mean = np.tensordot(weights, p, 1)
    spread = np.sqrt(np.tensordot(weights, (p - mean) ** 2, 1))
    mean_entropy = np.tensordot(weights, entropy(p), 1)
    found = train.predict(
        model, params, state, X, batch_size=11, samples=samples, key=KEY, samples_at_once=100
    )
    # Probabilities deviate by at most 1/2, entropies by at most log(3)/2: 5 standard errors of either; the
    # squares of deviations, in [0, 1], likewise.
    error = 5 * 0.5 / np.sqrt(samples)
    np.testing.assert_allclose(found.mean, mean, atol=error)
    np.testing.assert_allclose(found.spread**2, spread**2, atol=error)
    # H is Lipschitz where p is bounded from below: |dH| <= sum |log p + 1| |dp|.
    slope = np.abs(np.log(mean) + 1).sum(-1).max()
    np.testing.assert_allclose(found.entropy, entropy(mean), atol=slope * error)
    information = entropy(mean) - mean_entropy
    np.testing.assert_allclose(found.mutual_information, information, atol=(slope + np.log(3)) * error)
    assert information.max() > 2 * (slope + np.log(3)) * error  # the test would notice its absence


def test_samples_are_independent():
    """The mean of S draws spreads by 1/sqrt(S) of one's: 100 keys, whose deviation is known to 7%."""
    model = layers.serial(layers.dropout(0.5), layers.dense(1))
    params = {"dense_0": {"kernel": jnp.ones((50, 1)), "bias": jnp.zeros(1)}}
    x = np.ones((2, 50), np.float32)

    def mean(key):
        return train.predict(model, params, {}, x, samples=25, key=key, outputs="values").mean

    means = jax.jit(jax.vmap(mean))(jax.random.split(KEY, 200))[..., 0]
    # Variance of one draw is 50 * rate / (1 - rate) = 50; the deviation of 200 is known to 1/20, 4 of which are 0.2.
    np.testing.assert_allclose(np.std(means, axis=0), np.sqrt(50 / 25), rtol=0.2)
    # Two rows of one batch have masks of their own: correlations of 200 pairs spread by 0.07.
    assert abs(np.corrcoef(means.T)[0, 1]) < 0.28


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    run = lambda key, x: train.predict(MODEL, PARAMS, STATE, x, batch_size=4, samples=5, key=key)
    first, again, other = run(KEY, X), run(KEY, X), run(jax.random.key(1), X)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.mean != other.mean).all()
    on_device = run(KEY, jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, first, on_device)


def test_equal_rows_of_two_batches_have_masks_of_their_own():
    x = np.repeat(X[:1], 8, axis=0)
    found = train.predict(MODEL, PARAMS, STATE, x, batch_size=4, samples=5, key=KEY)
    assert len(np.unique(found.mean[:, 0])) == 8


STATEFUL = [
    row for row in LAYERS if row.mixes_batch or row.decodes or "spectral" in row.name or "probe" in row.name
]
RANDOM = [row for row in LAYERS if row.random]


@pytest.mark.parametrize(
    "row", {row.name: row for row in STATEFUL + RANDOM}.values(), ids=lambda row: row.name
)
def test_layers_other_than_dropout_are_as_at_test_time(row):
    key = jax.random.key(3)
    params, state = row.layer.init(KEY, row.x)
    run = lambda p, s, x: [row.layer.apply(p, s, x, key=key, train=mode) for mode in (SAMPLING, False)]
    sampled, tested = jax.jit(run)(params, state, row.x)
    jax.tree.map(np.testing.assert_array_equal, sampled[1], tested[1])
    same = all(map(np.array_equal, jax.tree.leaves(sampled[0]), jax.tree.leaves(tested[0])))
    assert same or row.random
    assert same == (not row.random or row.name in NOT_SAMPLED)


NOT_SAMPLED = {"gaussian_noise"}


@pytest.mark.parametrize(
    "layer",
    [
        layers.multi_head_attention(2, dropout_rate=0.5),
        layers.lstm(8, recurrent_dropout=0.5),
        layers.stacked(layers.gru(8), layers.gru(8), dropout=0.5),
        layers.transformer_block(2, dropout_rate=0.5),
        layers.repeat(layers.serial(layers.dense(8), layers.dropout(0.5)), 2),
        layers.remat(layers.serial(layers.dense(8), layers.dropout(0.5))),
    ],
    ids=lambda layer: layer.name,
)
def test_dropout_inside_of_layers_draws(layer):
    x = RNG.normal(size=(3, 5, 8)).astype(np.float32)
    params, state = layer.init(KEY, x)
    found = train.predict(layer, params, state, x, batch_size=3, samples=4, key=KEY, outputs="values")
    assert (found.spread[:, 1:] > 0).any()


def test_a_layer_that_compiles_its_own_forward_pass_draws_too():
    inner = layers.serial(layers.dense(3), layers.dropout(0.5))
    compiled = inner._replace(apply=jax.jit(inner.apply, static_argnames="train"))
    params, state = compiled.init(KEY, X)
    compiled.apply(params, state, X, key=KEY, train=False)
    found = train.predict(compiled, params, state, X, batch_size=11, samples=4, key=KEY)
    assert (found.spread > 0).any()


def test_a_frozen_part_does_not_draw():
    part = layers.serial(layers.dense(5), layers.dropout(0.5))
    model = layers.serial(layers.frozen(part), layers.dropout(0.5), layers.dense(3))
    params, state = model.init(KEY, X)
    head = layers.serial(layers.dropout(0.5), layers.dense(3))
    y, _ = model.apply(params, state, X, key=KEY, train=SAMPLING)
    features = X @ params["serial_0"]["dense_0"]["kernel"] + params["serial_0"]["dense_0"]["bias"]
    dropped, _ = layers.dropout(0.5).apply({}, {}, features, key=jax.random.fold_in(KEY, 1), train=True)
    expected, _ = head.apply({"dense_0": params["dense_0"]}, {}, dropped, train=False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_traced_rate_and_a_tree_of_outputs():
    def spread(rate):
        model = layers.serial(layers.dropout(rate), layers.branch(a=layers.dense(2), b=layers.dense(3)))
        params, state = model.init(KEY, X)
        return train.predict(model, params, state, X, samples=4, key=KEY, outputs="values").spread

    a, b = jax.jit(spread)(jnp.float32(0.5))
    assert a.shape == (11, 2)
    assert b.shape == (11, 3)
    assert (np.asarray(b) > 0).all()


def test_certain_and_impossible_classes_have_finite_entropy():
    model = layers.serial(layers.dropout(0.5), layers.stateless(lambda x: x * jnp.array([1e4, 0.0])))
    x = np.ones((3, 2), np.float32)
    found = train.predict(model, {}, {}, x, samples=16, key=KEY)
    assert all(np.isfinite(part).all() for part in found)
    assert (found.mutual_information <= found.entropy).all()
    assert (found.entropy <= np.log(2) + 1e-6).all()


def test_half_precision_is_averaged_in_single():
    model = layers.serial(layers.dense(3), layers.dropout(0.5))
    x = jnp.asarray(X, jnp.bfloat16)
    params, state = model.init(KEY, x)
    found = train.predict(model, params, state, x, samples=64, key=KEY)
    assert {a.dtype for a in found} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found.mean.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (layers.dense(3), {}, ValueError, "of a model that draws nothing: all samples are equal"),
        (layers.serial(layers.dense(3), layers.dropout(0.0)), {}, ValueError, "draws nothing"),
        (layers.frozen(layers.serial(layers.dense(3), layers.dropout(0.5))), {}, ValueError, "is not frozen"),
        (layers.serial(layers.dense(3), layers.gaussian_noise(0.5)), {}, ValueError, "draws nothing"),
        (layers.serial(layers.dense(1), layers.dropout(0.5)), {}, ValueError, r"output of shape \(11, 1\) and needs"),
        (
            layers.serial(layers.dropout(0.5), layers.stateless(lambda x: jnp.argmax(x, -1))),
            {"outputs": "values"},
            TypeError,
            r"predict\(samples=...\) takes the mean of floating outputs, got int32",
        ),
    ],
)  # fmt: skip
def test_what_has_no_samples_is_said(model, options, error, message):
    params, state = model.init(KEY, X)
    with pytest.raises(error, match=message):
        train.predict(model, params, state, X, batch_size=11, samples=4, key=KEY, **options)
