"""What check_targets refuses before a run, and what it lets pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nnkit import losses

CE, NLL = losses.softmax_cross_entropy, losses.negative_log_likelihood
BCE, HINGE, MSE = losses.binary_cross_entropy_with_logits, losses.hinge, losses.mean_squared_error
KL, COSINE = losses.kl_divergence, losses.cosine_distance
ALL = [getattr(losses, name) for name in losses.__all__]
LABELS = np.arange(100) % 10
PROBABILITIES = np.full((100, 10), 0.1, np.float32)
partial = functools.partial


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def put(array: np.ndarray, index, value) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


def test_good_targets_pass():
    wide = spec(64, 10)
    for dtype in (np.uint8, np.int32, np.int64):
        losses.check_targets(CE, wide, LABELS.astype(dtype))
    for targets in (LABELS, np.eye(10)[LABELS], PROBABILITIES, PROBABILITIES.astype(ml_dtypes.bfloat16)):
        losses.check_targets(CE, wide, targets)
    losses.check_targets(CE, wide, jnp.asarray(LABELS))
    losses.check_targets(CE, jnp.zeros((64, 10)), LABELS)
    losses.check_targets(CE, spec(4, 7, 10), np.zeros((100, 7), int))
    losses.check_targets(partial(CE, ignore_label=-1), wide, put(LABELS, 3, -1))
    losses.check_targets(NLL, wide, LABELS)
    losses.check_targets(KL, wide, PROBABILITIES)
    losses.check_targets(COSINE, wide, PROBABILITIES)
    for y in (LABELS > 4, (LABELS > 4).astype(np.uint8), LABELS / 9):
        losses.check_targets(BCE, spec(64), y)
    losses.check_targets(HINGE, spec(64), np.where(LABELS > 4, 1, -1))
    losses.check_targets(MSE, spec(64, 3), np.ones((100, 3)))
    losses.check_targets(CE, wide, LABELS[:0])


def test_unknown_losses_pass_whatever_comes():
    for loss in (lambda p, t: p, partial(lambda p, t, x: p, x=1), partial(CE, jnp.zeros((4, 3))), [1]):
        losses.check_targets(loss, spec(64, 10), np.array(["a"]))


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "error", "text"),
    [
        (CE, (64, 10), put(LABELS, 17, 10), ValueError, r"targets\[17\] is 10 \(1 of 100 .* labels 0\.\.9"),
        (
            CE,
            (64, 10),
            put(LABELS, [5, 9], -1),
            ValueError,
            r"targets\[5\] is -1 \(2 of 100 .* ignore_label=",
        ),
        (CE, (64, 10), put(LABELS, 3, 2**40), ValueError, rf"targets\[3\] is {2**40} "),
        (NLL, (64, 10), LABELS + 1, ValueError, r"negative_log_likelihood: label targets\[9\] is 10"),
        (CE, (4, 7, 10), put(np.zeros((9, 7), int), (3, 4), 11), ValueError, r"targets\[3, 4\] is 11"),
        (CE, (64, 10), LABELS.astype(float), TypeError, r"labels must be integers: write targets.astype"),
        (
            NLL,
            (64, 10),
            LABELS.astype(float),
            TypeError,
            r"integer labels: write targets.astype\(jnp.int32\)",
        ),
        (CE, (64, 10), LABELS.astype(str), TypeError, r"dtype <U21, not numbers: .* np.unique"),
        (CE, (64, 10), LABELS.astype(object), TypeError, r"dtype object, not numbers"),
        (CE, (64, 10), LABELS[:, None], ValueError, r"write targets\[:, 0\]"),
        (CE, (64, 10), np.eye(10, dtype=int)[LABELS], ValueError, r"write targets.astype\(jnp.float32\)"),
        (CE, (64, 10), np.array(3), ValueError, "got one target, a scalar"),
        (CE, (64, 10), put(PROBABILITIES, (7, 2), np.nan), ValueError, r"targets\[7, 2\] is nan .* finite"),
        (
            CE,
            (64, 10),
            put(PROBABILITIES, (7, 2), 0.5),
            ValueError,
            r"targets.sum\(-1\)\[7\] is 1.4.* sums to 1",
        ),
        (
            KL,
            (64, 10),
            put(PROBABILITIES, (7, 2), -0.1),
            ValueError,
            r"targets\[7, 2\] is -0.1 .* not negative",
        ),
        (KL, (64, 10), PROBABILITIES * 2, ValueError, r"kl_divergence: .* divide by the sum"),
        (BCE, (64,), np.where(LABELS > 4, 1, -1), ValueError, r"is -1 .* \[0, 1\]: .* \(targets \+ 1\) / 2"),
        (BCE, (64,), put(LABELS / 9, 2, np.nan), ValueError, r"targets\[2\] is nan"),
        (BCE, (64,), np.full((9, 1), 0.5), ValueError, r"write predictions\[:, None\] or targets\[:, 0\]"),
        (HINGE, (64,), (LABELS > 4).astype(int), ValueError, r"targets\[0\] is 0 .* write 2 \* targets - 1"),
        (MSE, (64, 1), LABELS / 9, ValueError, r"write predictions\[:, 0\] or targets\[:, None\]"),
        (MSE, (64,), put(LABELS / 9, 4, np.inf), ValueError, r"targets\[4\] is inf .* drop or repair"),
        (COSINE, (64, 10), put(PROBABILITIES, (7, 2), np.nan), ValueError, r"targets\[7, 2\] is nan"),
    ],
)
def test_bad_targets_are_named(loss, shape, targets, error, text):
    for wrapped in (loss, jax.jit(loss), partial(jax.jit(partial(loss)))):
        with pytest.raises(error, match=text):
            losses.check_targets(wrapped, spec(*shape), targets)


def test_options_inside_partials_count():
    inner = partial(CE, ignore_label=-1)
    with pytest.raises(ValueError, match=r"is -1 .* \(or ignore_label=-100\)"):
        losses.check_targets(partial(jax.jit(inner), ignore_label=-100), spec(64, 10), put(LABELS, 0, -1))
    losses.check_targets(partial(jax.jit(inner), label_smoothing=0.1), spec(64, 10), put(LABELS, 0, -1))


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_every_loss_is_known(loss):
    if loss in (losses.check_targets, losses.label_weights, losses.normalize):
        return
    with pytest.raises((TypeError, ValueError)):
        losses.check_targets(loss, spec(4, 10), np.full((4, 10), np.nan))


def test_what_the_check_lets_pass_gives_finite_losses():
    """The other half: nothing that passes makes a loss that is not finite."""
    rng = np.random.default_rng(0)
    for loss, targets in [
        (CE, LABELS[:8]),
        (CE, PROBABILITIES[:8]),
        (BCE, rng.uniform(size=(8, 10))),
        (HINGE, rng.choice([-1, 1], (8, 10))),
        (MSE, rng.normal(size=(8, 10))),
    ]:
        predictions = jnp.asarray(rng.normal(size=(8, 10)))
        losses.check_targets(loss, predictions, targets)
        assert np.isfinite(loss(predictions, jnp.asarray(targets))).all()
