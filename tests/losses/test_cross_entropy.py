"""Cross-entropy and the likelihood of labels, against PyTorch, optax, finite differences and closed forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from nnkit import losses

CROSS_ENTROPY = losses.softmax_cross_entropy
N, C = 7, 5
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0])


def problem(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, C)) * 3
    if kind == "labels":
        return logits, rng.integers(0, C, N)
    probabilities = rng.dirichlet(np.ones(C), N)
    probabilities[0] = np.eye(C)[1]
    return logits, probabilities


def torch_value_and_grad(f: Callable[[Any], Any], z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of f(z), and the gradient of their sum weighted by 1, 2, 3, ..."""
    leaf = torch.tensor(z, requires_grad=True)
    values = f(leaf)
    (values * torch.arange(1.0, len(z) + 1, dtype=values.dtype)).sum().backward()
    return values.detach().numpy(), leaf.grad.numpy()


def value_and_grad(f: Callable[[Any], Any], z: Any) -> tuple[Any, Any]:
    def weighed(z):
        values = f(z)
        return jnp.sum(values * jnp.arange(1.0, len(z) + 1, dtype=values.dtype)), values

    slope, values = jax.jit(jax.grad(weighed, has_aux=True))(jnp.asarray(z))
    return values, slope


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"class_weights": WEIGHTS},
    {"label_smoothing": 0.3, "class_weights": WEIGHTS},
    {"ignore_label": 1},
    {"label_smoothing": 0.3, "class_weights": WEIGHTS, "ignore_label": 1},
    {"label_smoothing": 1.0},
]
NAMES = {"class_weights": "weight", "ignore_label": "ignore_index"}


def to_torch(options: dict[str, Any]) -> dict[str, Any]:
    arrays = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return {NAMES.get(k, k): v for k, v in arrays.items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("labels", o) for o in OPTIONS] + [("probabilities", o) for o in OPTIONS if "ignore_label" not in o],
    ids=str,
)
def test_cross_entropy_is_pytorchs(kind, options):
    logits, targets = problem(kind)
    theirs = torch_value_and_grad(
        lambda z: torch.nn.functional.cross_entropy(
            z, torch.tensor(targets), reduction="none", **to_torch(options)
        ),
        logits,
    )
    with jax.enable_x64(True):
        ours = value_and_grad(functools.partial(CROSS_ENTROPY, targets=targets, **options), logits)
        assert ours[0].dtype == jnp.float64
    # float64 of numbers up to 30 or so: a few hundred roundings of 1e-16.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"class_weights": WEIGHTS}, {"ignore_label": 1}], ids=str)
def test_negative_log_likelihood_is_pytorchs(options):
    logits, labels = problem("labels")
    log_probs = np.array(jax.nn.log_softmax(logits))
    theirs = torch_value_and_grad(
        lambda z: torch.nn.functional.nll_loss(
            z,
            torch.tensor(labels),
            reduction="none",
            **{k: v.float() if k == "weight" else v for k, v in to_torch(options).items()},
        ),
        log_probs,
    )
    ours = value_and_grad(
        functools.partial(losses.negative_log_likelihood, labels=labels, **options), log_probs
    )
    np.testing.assert_array_equal(ours[0], theirs[0])  # a choice and a product, so exact
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_cross_entropy_is_optaxs_in_float32():
    logits, labels = problem("labels")
    logits = jnp.asarray(logits)
    np.testing.assert_allclose(
        CROSS_ENTROPY(logits, labels),
        optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)),
        rtol=1e-6,
    )
    soft = optax.smooth_labels(jax.nn.one_hot(labels, C), 0.2)
    np.testing.assert_allclose(
        CROSS_ENTROPY(logits, labels, label_smoothing=0.2),
        optax.softmax_cross_entropy(logits, soft),
        rtol=1e-6,
    )
    log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(
        losses.negative_log_likelihood(log_probs, labels), CROSS_ENTROPY(logits, labels), rtol=1e-6
    )


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, losses.negative_log_likelihood])
@pytest.mark.parametrize("ignore", [-1, -100, 2])
def test_ignored_rows_have_neither_loss_nor_gradient_whatever_they_hold(loss, ignore):
    logits, labels = problem("labels")
    logits = np.array(jax.nn.log_softmax(logits))
    labels[labels == 2] = 3
    labels[[1, 4]] = ignore
    poisoned = logits.copy()
    poisoned[1], poisoned[4] = np.nan, np.inf
    value, slope = value_and_grad(lambda z: loss(z, labels, ignore_label=ignore), poisoned)
    keep = np.setdiff1d(np.arange(N), [1, 4])
    clean = value_and_grad(lambda z: loss(z, np.where(labels == ignore, 0, labels)), logits)
    np.testing.assert_array_equal(value[jnp.array([1, 4])], 0)
    np.testing.assert_array_equal(slope[jnp.array([1, 4])], 0)
    np.testing.assert_array_equal(value[keep], clean[0][keep])
    np.testing.assert_array_equal(slope[keep], clean[1][keep])


@pytest.mark.parametrize(
    "options", [{k: v for k, v in o.items() if k != "ignore_label"} for o in OPTIONS[:4]], ids=str
)
def test_normalized_mean_is_pytorchs(options):
    logits, labels = problem("labels")
    labels[[0, 5]] = -100
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), ignore_index=-100, **to_torch(options)
    )
    with jax.enable_x64(True):
        values = CROSS_ENTROPY(logits, labels, ignore_label=-100, **options)
        weights = losses.label_weights(
            labels, ignore_label=-100, class_weights=options.get("class_weights")
        ).astype(values.dtype)
        np.testing.assert_allclose(losses.normalize(values, weights).mean(), theirs, rtol=1e-13)
        np.testing.assert_allclose(values.sum() / weights.sum(), theirs, rtol=1e-13)


def test_normalize_of_nothing_is_zero_with_a_finite_gradient():
    weights = losses.label_weights(jnp.array([-1, -1]), ignore_label=-1)
    loss = lambda z: losses.normalize(CROSS_ENTROPY(z, jnp.array([-1, -1]), ignore_label=-1), weights).mean()
    value, slope = jax.value_and_grad(loss)(jnp.ones((2, 3)))
    assert value == 0
    np.testing.assert_array_equal(slope, np.zeros((2, 3)))


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, losses.negative_log_likelihood])
@pytest.mark.parametrize(
    ("bad", "options"),
    [(-1, {}), (C, {}), (-100, {"class_weights": WEIGHTS}), (2**31 - 1, {"ignore_label": 3})],
    ids=str,
)
def test_labels_out_of_range(loss, bad, options):
    logits, labels = problem("labels")
    labels[2] = bad
    f = lambda z, y: loss(z, y, **options)
    with pytest.raises(ValueError, match=rf"targets\[2\] is {bad} .* 5 classes have labels 0\.\.4"):
        f(logits, labels)
    with pytest.raises(ValueError, match=rf"targets\[2\] is {bad} "):
        f(logits, jnp.asarray(labels))
    values, vjp = jax.vjp(jax.jit(lambda z, y: f(z, y)), jnp.asarray(logits), labels)
    slope, _ = vjp(jnp.ones(N))
    assert values[2] == np.inf
    assert np.isfinite(np.delete(values, 2)).all()
    assert np.isfinite(slope).all()
    assert not slope[2].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.uint32])
def test_labels_of_every_integer_type(dtype):
    logits, labels = np.zeros((2, 300)), np.array([3, 100])
    for ignore in (None, -1, 3):
        got = jax.jit(lambda y, i=ignore: CROSS_ENTROPY(jnp.asarray(logits), y, ignore_label=i))(
            labels.astype(dtype)
        )
        np.testing.assert_allclose(got, [0 if ignore == 3 else math.log(300), math.log(300)], rtol=1e-6)
    with jax.enable_x64(True):
        assert CROSS_ENTROPY(logits, labels.astype(dtype)).shape == (2,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_half_precision_is_computed_in_float32(dtype, options):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3000)), dtype)
    labels = jnp.array([0, 1, 2999])
    f = lambda z: CROSS_ENTROPY(z, labels, **options)
    assert f(logits).dtype == jnp.float32
    np.testing.assert_array_equal(f(logits), f(logits.astype(jnp.float32)))
    assert jax.grad(lambda z: f(z).sum())(logits).dtype == dtype


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_label": 2}], ids=str)
def test_leading_axes_jit_and_vmap_agree(options):
    rng = np.random.default_rng(1)
    z, y = jnp.asarray(rng.normal(size=(2, 3, C)), jnp.float32), jnp.asarray(rng.integers(0, C, (2, 3)))
    f = functools.partial(CROSS_ENTROPY, **options)
    whole = f(z, y)
    assert whole.shape == (2, 3)
    np.testing.assert_allclose(jax.jit(f)(z, y), whole, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(jax.vmap(f))(z, y), whole, rtol=1e-6, atol=1e-7)
    grads = jax.vmap(jax.vmap(jax.grad(f)))(z, y)
    np.testing.assert_allclose(grads, jax.grad(lambda z: f(z, y).sum())(z), rtol=1e-6, atol=1e-7)


def test_options_may_be_traced_without_a_second_compilation():
    logits, labels = problem("labels")
    f = jax.jit(lambda a, w: CROSS_ENTROPY(logits, labels, label_smoothing=a, class_weights=w))
    for a in (0.0, 0.1):
        np.testing.assert_allclose(
            f(a, WEIGHTS), CROSS_ENTROPY(logits, labels, label_smoothing=a, class_weights=WEIGHTS), rtol=1e-6
        )
    assert f._cache_size() == 1


@pytest.mark.parametrize(
    ("logits", "targets", "options", "error", "text"),
    [
        ((4, 5), np.zeros(4), {}, TypeError, r"labels must be integers: write targets.astype\(jnp.int32\)"),
        ((4, 5), np.zeros(4, bool), {}, TypeError, r"bool targets .* write targets.astype\(jnp.int32\)"),
        ((4, 5), np.zeros((4, 5), int), {}, ValueError, r"write targets.astype\(jnp.float32\)"),
        ((4, 5), np.zeros((4, 5), bool), {}, TypeError, r"write targets.astype\(jnp.float32\)"),
        ((4, 5), np.zeros((4, 1), int), {}, ValueError, r"shape \(4,\): write targets\[:, 0\]"),
        ((4, 5), np.zeros(3, int), {}, ValueError, r"\(4, 5\) .* \(3,\).* the batch sizes differ"),
        ((5, 4), np.zeros(4, int), {}, ValueError, r"write jnp.moveaxis\(predictions, 0, -1\)"),
        ((2, 5, 3, 4), np.zeros((2, 3, 4), int), {}, ValueError, r"jnp.moveaxis\(predictions, 1, -1\)"),
        ((4, 5), np.zeros((4, 6)), {}, ValueError, r"probabilities need the predictions' shape"),
        ((4, 5), np.zeros((2, 2), int), {}, ValueError, r"one label for each row"),
        ((4, 1), np.zeros(4, int), {}, ValueError, "use binary_cross_entropy_with_logits"),
        ((4,), np.zeros(4, int), {}, ValueError, "use binary_cross_entropy_with_logits"),
        ((), np.zeros((), int), {}, ValueError, "got a scalar for predictions"),
        ((4, 5), np.zeros(4, int), {"label_smoothing": 1.5}, ValueError, r"smoothing=1.5: .* in \[0, 1\]"),
        ((4, 5), np.zeros(4, int), {"label_smoothing": math.nan}, ValueError, r"in \[0, 1\]"),
        ((4, 5), np.zeros(4, int), {"label_smoothing": np.ones(4)}, ValueError, "must be one number"),
        ((4, 5), np.zeros(4, int), {"class_weights": np.ones(4)}, ValueError, r"for 5 classes: .*\(5,\)"),
        ((4, 5), np.ones((4, 5)) / 5, {"ignore_label": 0}, ValueError, "it goes with integer labels"),
    ],
)
def test_errors_say_what_arrived_and_what_to_write(logits, targets, options, error, text):
    z = jnp.zeros(logits)
    with pytest.raises(error, match=text):
        CROSS_ENTROPY(z, targets, **options)
    with pytest.raises(error, match=text):
        jax.eval_shape(functools.partial(CROSS_ENTROPY, **options), z, jnp.asarray(targets))


def test_other_errors():
    with pytest.raises(TypeError, match=r"logits must be floating, got int32: write logits.astype"):
        CROSS_ENTROPY(jnp.zeros((2, 3), int), jnp.zeros(2, int))
    with pytest.raises(TypeError, match=r"takes integer labels: write jnp.argmax\(targets, -1\)"):
        losses.negative_log_likelihood(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="label_weights takes integer labels, got float32"):
        losses.label_weights(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"values of shape \(3,\) and weights of shape \(2,\)"):
        losses.normalize(jnp.zeros(3), jnp.zeros(2))
