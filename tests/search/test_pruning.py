"""Stopping trials early: the rules against plain Python and Optuna, and what is trained against what is not."""

from __future__ import annotations

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from nnkit import search
from nnkit.search import cohort as cohort_module
from nnkit.search import pruned_exact
from nnkit.search.pruning import curves, decided

optuna.logging.set_verbosity(optuna.logging.WARNING)


# --- the rules ---------------------------------------------------------------------------------------


def _halving_in_python(values, alive, done, *, first, factor):
    """Who is left, from the definition: of n trials the best n // factor^(i+1) after the decision i."""
    decided = round(math.log(done / first, factor)) + 1
    left = max(1, len(values) // factor**decided)
    ranked = sorted(
        (i for i in range(len(values)) if alive[i]), key=lambda i: (_worst(values[i][done - 1]), i)
    )
    return [i in ranked[:left] and not math.isnan(values[i][done - 1]) for i in range(len(values))]


def _median_in_python(values, alive, done, **_):
    had = [[v for v in row[:done] if not math.isnan(v)] for row in values]
    averages = [statistics.fmean(row) for row in had if row]
    middle = statistics.median(averages) if averages else math.nan
    return [
        bool(alive[i] and not math.isnan(values[i][done - 1]) and not min(had[i]) > middle)
        for i in range(len(values))
    ]


def _worst(value):
    return math.inf if math.isnan(value) else value


RULES = {
    "halving": (
        search.successive_halving(first=1, factor=3),
        functools.partial(_halving_in_python, first=1, factor=3),
    ),
    "halving by two": (
        search.successive_halving(first=2, factor=2),
        functools.partial(_halving_in_python, first=2, factor=2),
    ),
    "median": (search.median(warmup=2, every=3), _median_in_python),
}
EPOCHS = 12


def _cohort(rng, trials):
    """Falling curves in eighths, so that there are ties and sums are exact; some diverge."""
    start, slope = rng.integers(0, 40, (trials, 1)), rng.integers(0, 4, (trials, 1))
    values = (start - slope * np.arange(EPOCHS) + rng.integers(0, 3, (trials, EPOCHS))) / 8
    values[rng.random(trials) < 0.15] = np.nan
    return values.astype(np.float32)


def _follow(keep, pruner, values):
    """Who is left after each decision where those that were stopped get no more values."""
    alive, shown, found = np.ones(len(values), bool), np.full_like(values, np.nan), []
    before = 0
    for done in pruner.decisions(values.shape[1]):
        shown[alive, before:done], before = values[alive, before:done], done
        alive = np.asarray(keep(shown, alive, done), bool)
        found.append(alive.tolist())
    return found


def _check_rule(pruner, reference):
    keep = jax.jit(functools.partial(decided, pruner))
    rng = np.random.default_rng(0)
    for trials in (1, 2, 7, 27):
        for _ in range(15):
            values = _cohort(rng, trials)
            assert _follow(keep, pruner, values) == _follow(reference, pruner, values)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_decides_as_plain_python_does(name):
    _check_rule(*RULES[name])


def _halving_that(change):
    """Successive halving with something wrong in it."""
    return RULES["halving"][0]._replace(keep=change), RULES["halving"][1]


def _median_that(change):
    return RULES["median"][0]._replace(keep=change), RULES["median"][1]


def _so_far(values, done):
    return jnp.where(jnp.arange(values.shape[1]) < done, values, jnp.nan)


def _here(values, done):
    return jnp.take(values, done - 1, axis=1)


WRONG = {
    "ranks those that were stopped": _halving_that(
        lambda v, a, d: search.successive_halving().keep(jnp.where(a[:, None], v, 0.0), jnp.ones_like(a), d)
    ),
    "keeps the worst": _halving_that(lambda v, a, d: search.successive_halving().keep(-v, a, d)),
    "counts from the survivors of the first rung": _halving_that(
        lambda v, a, d: search.successive_halving(first=1, factor=3).keep(v, a, jnp.maximum(d // 3, 1))
    ),
    "compares the last value and not the best": _median_that(
        lambda v, a, d: a & ~(_here(v, d) > jnp.nanmedian(jnp.nanmean(_so_far(v, d), axis=1)))
    ),
    "takes the median of those that are left": _median_that(
        lambda v, a, d: (
            a
            & ~(
                jnp.nanmin(_so_far(v, d), axis=1)
                > jnp.nanmedian(jnp.where(a, jnp.nanmean(_so_far(v, d), axis=1), jnp.nan))
            )
        )
    ),
    "stops who is at the median": _median_that(
        lambda v, a, d: (
            a & (jnp.nanmin(_so_far(v, d), axis=1) < jnp.nanmedian(jnp.nanmean(_so_far(v, d), axis=1)))
        )
    ),
    "takes the median of the last values": _median_that(
        lambda v, a, d: a & ~(jnp.nanmin(_so_far(v, d), axis=1) > jnp.nanmedian(_here(v, d)))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found(name):
    with pytest.raises(AssertionError):
        _check_rule(*WRONG[name])


@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
def test_halving_decides_as_optuna_does_for_a_trial_that_reports_last(mode):
    """Optuna's rule knows of the others that came before, and the last one of a cohort knows them all."""
    values = np.random.default_rng(1).permutation(11) / 8
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=3, min_early_stopping_rate=0
    )
    kept = []
    for last in range(len(values)):
        study = optuna.create_study(direction="minimize" if mode == "min" else "maximize", pruner=pruner)
        for value in [*np.delete(values, last), values[last]]:
            trial = study.ask()
            trial.report(float(value), 1)
            stopped = trial.should_prune()
        kept.append(not stopped)
    seen = jnp.asarray((values if mode == "min" else -values)[:, None], jnp.float32)
    ours = decided(search.successive_halving(), seen, jnp.ones(11, bool), 1)
    assert ours.tolist() == kept
    assert sum(kept) == 3


def test_the_median_decides_as_optunas_does_where_the_two_rules_agree():
    """On flat curves a running average is a value; of an even cohort it does not matter who is counted."""
    values = np.random.default_rng(2).permutation(8) / 8
    kept = []
    for last in range(len(values)):
        study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
        for value in [*np.delete(values, last), values[last]]:
            trial = study.ask()
            for step in (1, 2):
                trial.report(float(value), step)
            stopped = trial.should_prune()
            study.tell(trial, float(value))
        kept.append(not stopped)
    flat = jnp.asarray(np.repeat(values[:, None], 2, axis=1), jnp.float32)
    assert decided(search.median(), flat, jnp.ones(8, bool), 2).tolist() == kept
    assert sum(kept) == 4


def test_what_a_rule_sees_is_the_mean_over_members_and_the_last_value_of_those_that_ended():
    rows = np.full((3, 2, 4), np.nan, np.float32)
    rows[0, 0, :2], rows[0, 1, :3] = (4, 2), (2, 2, 1)  # the first ended after two epochs
    rows[1, :, :3] = [[3, 2, 1], [5, 4, np.inf]]
    rows[2, :, :1] = 7  # was stopped after one
    had, ended = np.array([[2, 3], [3, 3], [1, 1]]), np.array([[True, False], [False] * 2, [False] * 2])
    seen = curves(jnp.asarray(rows), jnp.asarray(had), jnp.asarray(ended), "min")
    nan = np.nan
    np.testing.assert_array_equal(seen, [[3, 2, 1.5, nan], [nan] * 4, [7, nan, nan, nan]])


def test_a_rule_that_is_asked_never_or_at_the_end_stops_nobody():
    assert search.successive_halving(first=5).decisions(5) == ()
    assert search.median(warmup=5).decisions(5) == ()
    assert search.median(warmup=1, every=4).decisions(10) == (1, 5, 9)
    assert search.successive_halving().sizes(2, 27) == (2, 1)
    assert search.median().sizes(27, 27) == (27, 14, 7, 4)
    assert search.median(warmup=2) is search.median(warmup=2)  # of which there is a compiled one


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: search.successive_halving(factor=1),
            r"successive_halving\(factor=...\) must be a whole number of at",
        ),
        (
            lambda: search.successive_halving(first=0),
            r"successive_halving\(first=...\) must be a whole number of at",
        ),
        (
            lambda: search.median(warmup=0),
            r"median\(warmup=...\) must be a whole number of at least 1, got 0",
        ),
        (
            lambda: search.median(every=1.5),
            r"median\(every=...\) must be a whole number of at least 1, got 1.5",
        ),
    ],
)
def test_numbers_that_no_rule_can_have_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# --- a cohort ----------------------------------------------------------------------------------------

COMPUTED: list[int] = []
"""An entry for each epoch of each member that is computed, whether it is thrown away or not."""


@functools.cache  # so that an engine finds what it has compiled
def _toy(epochs=9, *, noise=0.0, diverges=False, ends=False, counts=False):
    """Curves a + b·epoch, and noise for each seed, of which nothing but the numbers is interesting."""

    def start(key, hparams, fold=0):
        key = jax.random.fold_in(key, jnp.int32(1e6 * hparams["a"]))  # seeds are the same for all trials
        return hparams["a"] + noise * jax.random.uniform(key) + jnp.float32(fold), jnp.int32(0)

    def epoch(carry, hparams, number):
        level, had = carry
        loss = level + hparams["b"] * number.astype(jnp.float32)
        if "shift" in hparams:
            loss = loss + hparams["shift"]
        if diverges:  # from the second epoch on
            loss = jnp.where((level > 0.8) & (number > 0), jnp.nan, loss)
        if counts:
            jax.debug.callback(lambda level: COMPUTED.append(1), level)
        return (level, had + 1), {"loss": loss, "step": had + 1}

    def ended(carry):
        return carry[1] >= jnp.where(carry[0] < 0.5, 2, epochs)

    return search.Training(start, epoch, epochs, **({"ended": ended} if ends else {}))


SPACE = {"a": search.uniform(0, 1), "b": search.uniform(-0.1, 0.1)}
SHIFTED = SPACE | {"shift": search.choice([0.0, 2.0])}


@functools.cache
def _engine(members, training, seeds=(0,), folds=None, shifted=False):
    space = SHIFTED if shifted else SPACE
    return search.Engine(training, space, seeds=seeds, folds=folds, members=members)


def _flats(n):
    rng = np.random.default_rng(0)
    return [{"a": float(rng.uniform()), "b": float(rng.uniform(-0.1, 0.1))} for _ in range(n)]


def _run(engine, flats, pruner, **options):
    found = list(search.run_pruned(engine, engine.train_fn, flats, pruner, metric="loss", **options))
    assert sorted(trial.index for trial in found) == list(range(len(flats)))
    assert all(trial.seconds > 0 and trial.how == engine.members for trial in found)
    return sorted(found, key=lambda trial: trial.index)


def _check(members, flats, rule, sign=1, **options):
    """A cohort against the same trials without a rule, of which plain Python says when they are stopped."""
    pruner, reference = rule if isinstance(rule, tuple) else RULES[rule]
    training = options.pop("training", _toy())
    whole = sorted(_engine("exact", training, **options).run(flats))
    engine = _engine(members, training, **options)
    found = _run(engine, flats, pruner, mode="min" if sign == 1 else "max")
    assert [trial.stopped for trial in found] == _expected(whole, reference, pruner, sign)
    for mine, theirs in zip(found, whole, strict=True):
        had = mine.stopped or 9
        assert mine.history["epoch"].tolist() == theirs.history["epoch"].tolist()
        assert (mine.history["step"] == np.minimum(theirs.history["step"], had)).all()
        here, there = (trial.history["loss"] for trial in (mine, theirs))
        # Mapped, XLA may contract a product and a sum into one rounding of them: one unit in the last place.
        rtol = 0.0 if members == "exact" else 2.0**-23
        np.testing.assert_allclose(here[..., :had], there[..., :had], rtol)
        assert np.isnan(here[..., had:]).all()
        assert here.shape == there.shape
    return found


def _expected(whole, reference, pruner, sign):
    """After how many epochs each trial is stopped."""
    values = sign * np.stack([t.history["loss"].reshape(-1, 9).mean(axis=0, dtype=np.float32) for t in whole])
    kept = _follow(reference, pruner, values)
    done = [*pruner.decisions(9)]
    return [next((d for d, k in zip(done, kept, strict=True) if not k[i]), None) for i in range(len(whole))]


CASES = {
    "27 trials": (27, "halving"),
    "a cohort that is smaller than the factor": (2, "halving"),
    "one trial": (1, "halving"),
    "the median": (7, "median"),
}


SLOW = pytest.param("mapped", marks=pytest.mark.slow)


@pytest.mark.parametrize("members", ["exact", SLOW])
@pytest.mark.parametrize("case", CASES)
def test_a_cohort_is_stopped_as_plain_python_says(case, members):
    n, rule = CASES[case]
    _check(members, _flats(n), rule)


@pytest.mark.parametrize("members", ["exact", "mapped"])
def test_a_trial_is_kept_or_stopped_as_a_whole_by_its_mean(members):
    """Two seeds and two folds; the metric is good where it is large."""
    found = _check(members, _flats(6), "halving", -1, training=_toy(noise=5.0), seeds=(3, 8), folds=2)
    assert found[0].history["loss"].shape == (2, 2, 9)


@pytest.mark.parametrize("members", ["exact", SLOW])
def test_a_cohort_is_ranked_over_all_its_groups(members):
    flats = [flat | {"shift": 2.0 * (i % 3 == 0)} for i, flat in enumerate(_flats(5))]
    found = _check(members, flats, "halving", shifted=True)
    assert [trial.stopped for trial in found[::3]] == [1, 1]


@pytest.mark.parametrize("members", ["exact", SLOW])
def test_members_that_diverged_go_first(members):
    """Halving would have room for more than are left; where all have diverged none is."""
    flats = [{"a": a, "b": 0.0} for a in (0.9, 0.1, 0.95, 1.0)]
    engine = _engine(members, _toy(diverges=True))
    rule = search.successive_halving(first=2, factor=2)
    found = _run(engine, flats, rule)
    assert [trial.stopped for trial in found] == [2, None, 2, 2]
    assert np.isnan(found[0].history["loss"]).tolist() == [[False] + [True] * 8]
    lost = _run(engine, [flats[0]] * 4, rule)
    assert [trial.stopped for trial in lost] == [2, 2, 2, 2]


@pytest.mark.parametrize("members", ["exact", SLOW])
def test_a_trial_that_has_ended_competes_with_its_last_value_and_is_not_called_stopped(members):
    """Those that start below a half end after two epochs, before the first decision, and are the best."""
    flats = [{"a": a, "b": b} for a, b in ((0.0, 0.0), (0.1, 0.1), (0.6, -0.05), (0.7, 0.05))]
    engine = _engine(members, _toy(ends=True))
    found = _run(engine, flats, search.successive_halving(first=3, factor=2))
    had = np.isfinite([trial.history["loss"][0] for trial in found]).sum(axis=1)
    assert [trial.stopped for trial in found] == [None, None, 3, 3]
    assert had.tolist() == [2, 2, 3, 3]
    assert found[0].history["step"].tolist() == [[1, 2] + [2] * 7]


# --- what is stopped costs nothing -------------------------------------------------------------------


def _computed(members, flats, pruner, **options):
    engine = _engine(members, _toy(counts=True, **options))
    COMPUTED.clear()
    _run(engine, flats, pruner)
    jax.effects_barrier()
    return len(COMPUTED)


def _check_cost(members):
    """Nine trials of nine epochs: 9·1 + 3·2 + 1·6 epochs are computed, and not 81."""
    assert _computed(members, _flats(9), search.successive_halving()) == 21


@pytest.mark.parametrize("members", ["exact", "mapped"])
def test_what_was_stopped_is_not_computed(members):
    _check_cost(members)


@pytest.mark.slow
def test_what_has_ended_by_itself_is_not_computed_mapped():
    """Two of four end after two epochs, and a batch of two is left: 4·2 + 2·7 epochs."""
    flats = [{"a": a, "b": 0.0} for a in (0.0, 0.1, 0.6, 0.7)]
    assert _computed("mapped", flats, search.median(warmup=9), ends=True) == 4 * 2 + 2 * 7


@pytest.mark.slow
def test_a_program_that_only_masks_is_found(monkeypatch):
    class Masked(cohort_module._Group):
        def __init__(self, *args, sizes):
            super().__init__(*args, sizes=[max(sizes)])

    monkeypatch.setattr(cohort_module, "_Group", Masked)
    _engine.cache_clear()
    with pytest.raises(AssertionError):
        _check_cost("mapped")


# --- wrong cohorts -----------------------------------------------------------------------------------

ONE_SIZE = RULES["median"][0]._replace(sizes=lambda trials, epochs: (trials,)), RULES["median"][1]
"""A rule whose batch is always filled up with members that were stopped."""


@pytest.mark.slow
def test_a_batch_that_trains_those_that_fill_it_up_is_found(monkeypatch):
    _check("mapped", _flats(7), ONE_SIZE)
    monkeypatch.setattr(cohort_module, "_where", lambda taken, new, old: new)
    _engine.cache_clear()
    with pytest.raises(AssertionError):
        _check("mapped", _flats(7), ONE_SIZE)


@pytest.mark.parametrize(
    "module",
    [pruned_exact, pytest.param(cohort_module, marks=pytest.mark.slow)],
    ids=["exact", "mapped"],
)
def test_a_cohort_that_looks_at_one_seed_is_found(module, monkeypatch):
    def one_seed(rows, had, ended, mode):
        return curves(rows[:, :1], had[:, :1], ended[:, :1], mode)

    monkeypatch.setattr(module, "curves", one_seed)
    pruned_exact._decided.clear_cache()  # of the right one
    _engine.cache_clear()
    with pytest.raises(AssertionError):
        test_a_trial_is_kept_or_stopped_as_a_whole_by_its_mean(
            "exact" if module is pruned_exact else "mapped"
        )
    pruned_exact._decided.clear_cache()


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"training": lambda key, hparams: {}},
            TypeError,
            "has to leave a run and go on with it, and got function",
        ),
        (
            {"training": _toy(5)},
            ValueError,
            r"an engine of another training function: pass Engine\(training, ...\)",
        ),
        (
            {"pruner": "median"},
            TypeError,
            r"pruner takes a rule and got 'median': pass search.successive_halving\(\)",
        ),
        ({"mode": "least"}, ValueError, "unknown mode 'least'"),
        ({"metric": "los"}, ValueError, "unknown metric 'los'; did you mean 'loss'"),
        ({"flats": [{"a": 0.5}]}, ValueError, "no value for 'b'"),
    ],
    ids=["training", "engine", "pruner", "mode", "metric", "flats"],
)
def test_what_cannot_be_meant_is_refused_at_the_call(change, kind, text):
    asked = {"training": _toy(), "flats": _flats(1), "pruner": search.median(), "metric": "loss"} | change
    with pytest.raises(kind, match=text):
        search.run_pruned(_engine("exact", _toy()), **asked)
