"""Early stopping against Keras' loop, written down by hand."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import train
from nnkit.train import stopping
from nnkit.types import TrainState

NAN = math.nan


def _keras(values, *, patience, min_delta, mode, start_from_epoch, baseline):
    """on_epoch_end of Keras 3's EarlyStopping, epoch by epoch, until it stops.

    Returns how many epochs ran, the best epoch from 1 on (0 for none), the best value and wait. Keras with
    restore_best_weights calls the first watched epoch best where none is; here there is none then.
    """
    sign = 1 if mode == "min" else -1

    def improves(value, reference):
        return sign * value < sign * reference - min_delta

    best, best_epoch, wait = sign * math.inf, 0, 0
    for epoch, value in enumerate(values):
        if epoch < start_from_epoch:
            continue
        wait += 1
        if improves(value, best):
            best, best_epoch = value, epoch + 1
            if baseline is None or improves(value, baseline):
                wait = 0
            continue
        if wait >= patience and epoch > 0:
            return epoch + 1, best_epoch, best, wait
    return len(values), best_epoch, best, wait


def _state(epoch):
    return TrainState(
        {"w": jnp.float32(epoch)}, {"mean": jnp.float32(10 * epoch)}, (), jax.random.key(0), jnp.int32(0)
    )


def _ours(values, update=stopping.update, **rule):
    rule = train.early_stopping("val_loss", **rule)
    s = stopping.start(rule, _state(0))
    for epoch, value in enumerate(values, 1):
        s = update(rule, s, _state(epoch), {"loss": 0.0, "val_loss": value})
        if s.stopped:
            break
    return int(s.epoch), int(s.best_epoch), float(s.best), int(s.wait)


def _sequences():
    rng = np.random.default_rng(0)
    drawn = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, NAN, math.inf, -math.inf], size=(24, 9))
    made = [
        [4, 3, 2, 1, 0.5, 0.25],
        [1, 1, 1, 1, 1, 1],
        [NAN] * 6,
        [NAN, 1, NAN, 2, NAN, 0.5, NAN, NAN, NAN],
        [1, NAN, NAN, NAN, 0.5],
        [math.inf, 1, 2, 3],
        [-1, -1.5, -1.25, -2, 0],
        [1, 0.9, 0.8, 0.7, 0.65, 0.6],
    ]
    exact = [np.float32(values).tolist() for values in made]
    return exact + drawn.tolist()


RULES = [
    {
        "patience": patience,
        "min_delta": min_delta,
        "mode": mode,
        "start_from_epoch": first,
        "baseline": baseline,
    }
    for (patience, first), min_delta, mode, baseline in itertools.product(
        [(0, 0), (1, 0), (2, 0), (4, 0), (1, 2), (2, 3)], [0.0, 0.25], ["min", "max"], [None, 0.5]
    )
]


def _mapped(rules, sequences, update=stopping.update):
    """All sequences under all rules that differ in numbers alone, in one program with traced numbers."""
    first = rules[0]

    def one(values, patience, min_delta, start_from_epoch):
        rule = train.early_stopping(
            patience=patience,
            min_delta=min_delta,
            start_from_epoch=start_from_epoch,
            mode=first["mode"],
            baseline=first["baseline"],
            restore_best=True,
        )

        def body(s, epoch_and_value):
            epoch, value = epoch_and_value
            new = update(rule, s, _state(epoch), {"val_loss": value})
            # What a run under masks does: nothing is remembered after the stop.
            return jax.tree.map(lambda n, o: jnp.where(s.stopped, o, n), new, s), None

        epochs = 1.0 + jnp.arange(len(values), dtype=jnp.float32)
        s, _ = jax.lax.scan(body, stopping.start(rule, _state(0)), (epochs, values))
        return s, stopping.restored(rule, s, _state(100))

    numbers = [
        jnp.asarray([r[name] for r in rules]) for name in ("patience", "min_delta", "start_from_epoch")
    ]
    width = max(map(len, sequences))
    padded = jnp.asarray([[*v, *[NAN] * (width - len(v))] for v in sequences], jnp.float32)
    over_rules = jax.vmap(one, (None, 0, 0, 0))
    return jax.device_get(jax.jit(jax.vmap(over_rules, (0, None, None, None)))(padded, *numbers)), width


def _check_all(update=stopping.update):
    """Against Keras' loop: 32 sequences under 48 rules."""
    sequences = _sequences()
    groups = itertools.groupby(sorted(RULES, key=_choices), key=_choices)
    count = 0
    for _, group in groups:
        rules = list(group)
        (s, ts), width = _mapped(rules, sequences, update)
        for (i, values), (j, rule) in itertools.product(enumerate(sequences), enumerate(rules)):
            epochs, best_epoch, best, wait = _keras([*values, *[NAN] * (width - len(values))], **rule)
            got = (s.epoch[i, j], s.best_epoch[i, j], s.best[i, j], s.wait[i, j])
            assert got == (epochs, best_epoch, best, wait), (values, rule)
            # The best epoch's numbers, or the last's where there is none.
            assert ts.params["w"][i, j] == (best_epoch or 100)
            assert ts.state["mean"][i, j] == 10 * (best_epoch or 100)
            count += 1
    assert count == 32 * 48


def _choices(rule):
    return rule["mode"], -math.inf if rule["baseline"] is None else rule["baseline"]


def test_every_sequence_is_counted_as_keras_counts_it():
    _check_all()


def test_on_the_host_the_same():
    rng = np.random.default_rng(1)
    sequences = _sequences()
    for rule in [RULES[i] for i in rng.permutation(len(RULES))[:12]]:
        for values in [sequences[i] for i in rng.permutation(len(sequences))[:3]]:
            assert _ours(values, **rule) == _keras(values, **rule), (values, rule)


def _off_by_one(rule, s, ts, metrics):
    return stopping.update(rule._replace(patience=rule.patience + 1), s, ts, metrics)


def _either_epoch(rule, s, ts, metrics):
    """Forgets that the first epoch never ends a run."""
    shifted = s._replace(epoch=s.epoch + 1)
    rule = rule._replace(start_from_epoch=rule.start_from_epoch + 1)
    new = stopping.update(rule, shifted, ts, metrics)
    return new._replace(
        epoch=new.epoch - 1, best_epoch=jnp.where(new.best != s.best, new.best_epoch - 1, s.best_epoch)
    )


def _nan_is_best(rule, s, ts, metrics):
    value = metrics["val_loss"]
    return stopping.update(rule, s, ts, {"val_loss": jnp.where(jnp.isnan(value), -9.0, value)})


def _delta_of_the_other_sign(rule, s, ts, metrics):
    return stopping.update(rule._replace(min_delta=-rule.min_delta), s, ts, metrics)


def _no_baseline(rule, s, ts, metrics):
    return stopping.update(rule._replace(baseline=None), s, ts, metrics)


def _watches_at_once(rule, s, ts, metrics):
    return stopping.update(rule._replace(start_from_epoch=0), s, ts, metrics)


def _keeps_the_last(rule, s, ts, metrics):
    return stopping.update(rule, s, ts, metrics)._replace(params=ts.params)


def _keeps_old_statistics(rule, s, ts, metrics):
    return stopping.update(rule, s, ts, metrics)._replace(state=s.state)


def _goes_on(rule, s, ts, metrics):
    return stopping.update(rule, s, ts, metrics)._replace(stopped=jnp.bool_(False))


MUTANTS = [
    _off_by_one,
    _either_epoch,
    _nan_is_best,
    _delta_of_the_other_sign,
    _no_baseline,
    _watches_at_once,
    _keeps_the_last,
    _keeps_old_statistics,
    _goes_on,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_a_wrong_rule_is_found(mutant):
    with pytest.raises(AssertionError):
        _check_all(mutant)


def test_a_run_that_had_epochs_before_counts_them():
    rule = train.early_stopping(patience=1, start_from_epoch=3)
    s = stopping.start(rule, _state(0), epoch=2)
    s = stopping.update(rule, s, _state(3), {"val_loss": 0.0})
    assert (int(s.epoch), int(s.wait)) == (3, 0)
    s = stopping.update(rule, s, _state(4), {"val_loss": 1.0})
    assert (int(s.best_epoch), float(s.best)) == (4, 1.0)


def test_what_is_kept_survives_the_donation_of_the_run():
    rule = train.early_stopping(restore_best=True)
    ts = _state(1)
    s = stopping.start(rule, ts)
    better = stopping.update(rule, s, ts, {"val_loss": 1.0})
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)((ts.params, ts.state))
    assert ts.params["w"].is_deleted()
    assert float(s.params["w"]) == float(better.params["w"]) == 1.0
    ts = _state(2)
    worse = stopping.update(rule, better, ts, {"val_loss": 2.0})
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)((better.params, better.state))
    assert float(worse.params["w"]) == 1.0


def test_nothing_is_kept_that_is_not_asked_for():
    s = stopping.start(train.early_stopping(), _state(0))
    assert s.params == s.state == ()
    ts = _state(5)
    assert stopping.restored(train.early_stopping(), s, ts) is ts


def test_its_shapes_and_dtypes_never_change():
    for rule in (train.early_stopping(), train.early_stopping(baseline=1, restore_best=True)):
        s = stopping.start(rule, _state(0))
        after = jax.eval_shape(
            functools.partial(stopping.update, rule), s, _state(1), {"val_loss": jnp.int32(1)}
        )
        assert jax.tree.map(lambda a: (a.shape, a.dtype), s) == jax.tree.map(
            lambda a: (a.shape, a.dtype), after
        )
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(s))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"monitor": 3}, TypeError, "monitor must be a metric's name, got 3: write monitor='val_loss'"),
        ({"mode": "auto"}, ValueError, "unknown mode 'auto'"),
        ({"patience": -1}, ValueError, r"patience must be in \[0, inf\), got -1"),
        ({"patience": 2.5}, ValueError, "patience must be a whole number, got 2.5"),
        ({"patience": "3"}, TypeError, "patience must be a number or a scalar array, got '3'"),
        ({"patience": jnp.ones(2)}, ValueError, "patience must be a scalar, got an array of shape"),
        ({"min_delta": -0.1}, ValueError, r"min_delta must be in \[0, inf\), got -0.1: it is how much"),
        ({"min_delta": NAN}, ValueError, r"min_delta must be in \[0, inf\), got nan"),
        ({"start_from_epoch": 1.5}, ValueError, "start_from_epoch must be a whole number, got 1.5"),
        ({"baseline": NAN}, ValueError, r"baseline must be in \(-inf, inf\), got nan"),
        ({"baseline": "x"}, TypeError, "baseline must be a number or a scalar array, got 'x'"),
        ({"restore_best": 1}, TypeError, "restore_best must be True or False, got 1"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        train.early_stopping(**arguments)


def test_a_metric_that_the_run_does_not_compute():
    rule = train.early_stopping("val_loss")
    s = stopping.start(rule, _state(0))
    with pytest.raises(
        ValueError, match=r"monitors 'val_loss'.*pass validation=\.\.\.; its metrics are loss"
    ):
        stopping.update(rule, s, _state(1), {"loss": 1.0})
    with pytest.raises(ValueError, match=r"monitors 'val_los', which .* its metrics are loss, val_loss"):
        stopping.check_monitor(rule._replace(monitor="val_los"), ["loss", "val_loss"])
