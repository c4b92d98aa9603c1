"""Choosing: the statistics are scipy's, the test set is used once, the boundary is seen."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from nnkit import search
from nnkit.search.boundary import boundary_warnings
from nnkit.search.choose import best_of, check_selection, compare
from nnkit.search.final import final_test, final_tests
from nnkit.search.intervals import interval_of
from nnkit.search.study import open_study
from tests.search.told import Told, told_study

LR = {"lr": search.log_uniform(1e-5, 1.0)}


def made(rows, space=LR, **options):
    """A study whose trials have these hyper-parameters and values, one for each seed (and fold)."""
    metric, shape = options.get("metric", "val_loss"), np.shape(rows[0][1])
    folds = shape[1] if len(shape) > 1 else None
    told = [Told(flat, {metric: values}) for flat, values in rows]
    return told_study(told, space, seeds=range(shape[0]), folds=folds, **options)


def lrs(*rows, **options):
    return made([({"lr": 10.0 ** -(i + 1)}, row) for i, row in enumerate(rows)], **options)


# ------------------------------------------------------------------ intervals


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_an_interval_is_scipys(n, confidence):
    values = np.random.default_rng(n).normal(0.3, 2, n)
    found = interval_of(values, confidence)
    expected = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    t = stats.ttest_1samp(values, 0)
    np.testing.assert_allclose([found.t, found.p], [t.statistic, t.pvalue], rtol=1e-11)
    np.testing.assert_allclose([found.mean, found.spread], [values.mean(), stats.tstd(values)], rtol=1e-12)


def test_folds_widen_an_interval_as_nadeau_and_bengio_say():
    values = np.random.default_rng(0).normal(size=(3, 5))
    found, plain = interval_of(values), interval_of(values.ravel())
    ratio = math.sqrt((1 / 15 + 1 / 4) / (1 / 15))
    assert math.isclose(found.high - found.mean, ratio * (plain.high - plain.mean))
    assert math.isclose(found.t, plain.t / ratio)
    # One seed: the folds alone.
    assert interval_of(values[:1]).high > interval_of(values[0]).high


def test_the_share_of_intervals_with_the_true_mean_is_the_confidence():
    """2,000 intervals of three seeds: 1,900 have it, give or take five standard errors of 9.7."""
    draws = np.random.default_rng(0).normal(1.0, 0.5, (2000, 3))
    hits = sum(found.low < 1 < found.high for found in map(interval_of, draws))
    assert abs(hits - 1900) < 49
    # Intervals with the normal distribution's 1.96 have far fewer.
    normal = 1.96 * draws.std(1, ddof=1) / math.sqrt(3)
    assert (abs(draws.mean(1) - 1) < normal).sum() < 1700


def test_one_value_has_no_interval_and_equal_ones_have_a_point():
    one = interval_of([0.5])
    assert one.mean == 0.5
    assert all(map(math.isnan, one[1:]))
    assert interval_of([0.5, 0.5])[:4] == (0.5, 0, 0.5, 0.5)
    assert interval_of([0.0, 0.0]).t == 0
    assert interval_of([0.0, 0.0]).p == 1
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        interval_of([1.0, 2.0], 95)
    with pytest.raises(ValueError, match=r"needs finite values, got \[1.0, nan\]"):
        interval_of([1.0, math.nan])


# ------------------------------------------------------------------ the best


def test_the_best_are_ranked_with_their_distance_to_the_first():
    luck = np.array([0.0, 0.3, -0.3])  # what a seed does to every trial
    study = lrs(0.5 + luck, [math.nan] * 3, 0.2 + luck, 0.21 + luck + [0.02, -0.03, 0.01])
    found = best_of(study, 3)
    assert [row.trial.number for row in found] == [2, 3, 0]
    assert [row.level for row in found] == [True, True, False]
    assert found[0].behind is None
    t = stats.ttest_rel(study.trials[3].values, study.trials[2].values)
    np.testing.assert_allclose([found[1].behind.t, found[1].behind.p], [t.statistic, t.pvalue], rtol=1e-9)
    assert math.isclose(found[2].behind.mean, 0.3)
    text = str(found)
    assert text.splitlines()[0].split("  ")[0] == "trial"
    assert "lr=0.001" in text
    assert "(level)" in text
    assert "1 of the 2 others cannot be told from the first by these seeds" in text
    assert "report what the final test gives" in text
    assert len(best_of(study, 10)) == 3  # not the one that diverged


def test_of_high_metrics_the_best_is_the_highest():
    study = lrs([0.7, 0.72], [0.9, 0.91], [0.8, 0.83], metric="val_accuracy", mode="max")
    found = best_of(study)
    assert [row.trial.number for row in found] == [1, 2, 0]
    assert all(row.behind.mean > 0 for row in found.rows[1:])


def test_one_seed_says_that_it_cannot_tell():
    found = best_of(lrs([0.5], [0.4]))
    assert math.isnan(found[0].interval.low)
    assert found[1].level
    assert "one seed" in str(found)
    assert "nothing here tells luck from merit. Search again with 5 seeds" in str(found)


def test_best_of_needs_something_to_rank():
    with pytest.raises(ValueError, match="no trial with a finite val_loss"):
        best_of(lrs([math.nan, math.nan]))
    with pytest.raises(ValueError, match=r"best_of\(k=0\) needs a number from 1 on"):
        best_of(lrs([0.1, 0.2]), 0)


# ------------------------------------------------------------------ two of them


def test_a_comparison_is_scipys_paired_test():
    draw = np.random.default_rng(1)
    luck = draw.normal(size=5)
    a, b = 1 + luck + 0.01 * draw.normal(size=5), 1.1 + luck + 0.01 * draw.normal(size=5)
    study = lrs(a, b)
    found = compare(study, 0, 1, 0.9)
    paired = stats.ttest_rel(a, b)
    np.testing.assert_allclose(
        [found.interval.t, found.interval.p], [paired.statistic, paired.pvalue], rtol=1e-9
    )
    between = paired.confidence_interval(0.9)
    np.testing.assert_allclose(
        [found.interval.low, found.interval.high], [between.low, between.high], rtol=1e-9
    )
    np.testing.assert_array_equal(found.differences, a - b)
    assert found.better == 0
    assert "trial 0 is better than trial 1 by" in str(found)
    # Seen unpaired, the same numbers say nothing: the pairs are what tells.
    assert stats.ttest_ind(a, b).pvalue > 0.5
    back = compare(study, 1, 0)
    assert (back.better, back.interval.t) == (0, -found.interval.t)


def test_a_high_metric_is_better():
    study = lrs([0.5, 0.52, 0.51], [0.7, 0.73, 0.7], metric="val_accuracy", mode="max")
    assert compare(study, 0, 1).better == 1
    assert compare(study, 1, 0).better == 1


def test_luck_is_called_luck_and_one_seed_is_said():
    level = compare(lrs([0.5, 0.4, 0.6], [0.45, 0.5, 0.5]), 0, 1)
    assert level.better is None
    assert "over 3 seeds, and luck makes as much" in str(level)
    one = compare(lrs([0.5], [0.4]), 0, 1)
    assert one.better is None
    assert math.isnan(one.interval.low)
    assert "on the one seed they were trained with" in str(one)
    assert "search again with 5 seeds" in str(one)
    folds = compare(lrs([[0.5, 0.4], [0.6, 0.5]], [[0.5, 0.5], [0.7, 0.5]]), 0, 1)
    assert folds.differences.shape == (2, 2)
    assert "over 4 seeds and folds" in str(folds)


def test_what_cannot_be_compared_is_refused():
    study = lrs([0.5, 0.4], [math.nan, 0.4])
    with pytest.raises(ValueError, match="compare needs two trials, and got number 0 twice"):
        compare(study, 0, 0)
    with pytest.raises(ValueError, match="the study has no trial 7: it has 2"):
        compare(study, 0, 7)
    with pytest.raises(ValueError, match="trial 1 is diverged: take one that is complete"):
        compare(study, 0, 1)
    others = [SimpleNamespace(number=i, state="complete", seeds=(i,), values=[0.5]) for i in range(2)]
    with pytest.raises(
        ValueError, match=r"no seed in common \(\[0\] and \[1\]\): only runs of the same seed"
    ):
        compare(SimpleNamespace(trials=others, mode="min", metric="val_loss"), 0, 1)
    shared = [
        SimpleNamespace(number=0, state="complete", seeds=(0, 1, 2), values=[1.0, 2.0, 3.0]),
        SimpleNamespace(number=1, state="complete", seeds=(2, 1), values=[2.5, 1.0]),
    ]
    found = compare(SimpleNamespace(trials=shared, mode="min", metric="val_loss"), 0, 1)
    assert found.seeds == (1, 2)
    assert found.differences.tolist() == [1.0, 0.5]


# ------------------------------------------------------------------ the test set


def test_the_test_set_is_used_once_and_marked_in_the_record(tmp_path):
    study = lrs([0.5, 0.6], [0.3, 0.4], run_dir=tmp_path)
    seen = []

    def test_fn(trial):
        seen.append(trial.number)
        return {"test_loss": np.float32(0.25), "test_accuracy": np.array([0.9, 0.7])}

    tested = final_test(study, test_fn)
    assert (tested.trial, tested.again) == (1, False)
    assert tested.numbers == {"test_loss": 0.25, "test_accuracy": [0.9, 0.7]}
    # Another process finds it, and is refused.
    study = open_study(tmp_path)
    assert final_tests(study) == [tested]
    assert study.trials[1].tested == tested.numbers
    assert study.trials[0].tested is None
    for number in (None, 1, 0):
        with pytest.raises(
            ValueError, match=r"the test set was used: trial 1 on .* by .*@.*: test_loss 0.25, test_acc"
        ):
            final_test(study, test_fn, number)
    assert seen == [1]
    second = final_test(study, test_fn, 0, again=True)
    assert (second.trial, second.again) == (0, True)
    assert seen == [1, 0]
    assert "(again: the test set had been used before)" in str(second)
    assert final_tests(open_study(tmp_path)) == [tested, second]


def test_a_test_that_fails_marks_nothing():
    study = lrs([0.5], [math.nan])

    def broken(trial):
        raise RuntimeError("no test set")

    with pytest.raises(RuntimeError, match="no test set"):
        final_test(study, broken)
    with pytest.raises(TypeError, match="a mapping from names to numbers, and 'test' is a str"):
        final_test(study, lambda trial: "0.5")
    with pytest.raises(TypeError, match="'loss' is a NoneType"):
        final_test(study, lambda trial: {"loss": None})
    with pytest.raises(TypeError, match="and gave none"):
        final_test(study, lambda trial: {})
    with pytest.raises(ValueError, match="trial 1 is diverged: take one that is complete"):
        final_test(study, lambda trial: 0.5, 1)
    assert final_tests(study) == []
    nothing = final_test(study, lambda trial: math.nan, again=True)  # again, where there was none before
    assert nothing.again is False
    assert "test nan" in str(nothing)


def test_the_test_set_does_not_choose():
    with pytest.raises(
        ValueError, match="metric is 'test_loss': choosing by the test set makes it a validation set"
    ):
        final_test(lrs([0.5], metric="test_loss"), lambda trial: 0.1)
    check_selection("val_loss")


# ------------------------------------------------------------------ the boundary


def instead(dimension, best, worse):
    """What is said where ``best`` is the best value of a dimension."""
    study = made([({"a": best}, [0.1]), ({"a": worse}, [0.2])], {"a": dimension})
    return [(found.end, found.instead) for found in boundary_warnings(study)]


@pytest.mark.parametrize(
    ("dimension", "best", "worse", "expected"),
    [
        (search.log_uniform(1e-5, 1.0), 1.0, 0.1, ("upper", "log_uniform(0.00316, 316)")),
        (search.log_uniform(1e-4, 1e-2), 1.1e-4, 1e-3, ("lower", "log_uniform(1.1e-05, 0.0011)")),
        (search.log_uniform(1e-5, 1.0), 0.5, 0.1, None),  # In the uppermost 6% of the decades.
        (
            search.log_uniform(1e-5, 1.0),
            0.04,
            0.1,
            None,
        ),  # By differences it would be close to the lower end.
        (search.integer(1, 1000, log=True), 30, 100, None),
        (search.uniform(-1, 1), 0.98, 0, ("upper", "uniform(-0.02, 1.98)")),
        (search.uniform(0, 10), 0.2, 5, ("lower", "uniform(0, 5.2)")),
        (search.uniform(0, 1), 1.0, 0.5, ("upper", "uniform(0.5, 1)")),
        (search.uniform(0, 0.98), 0.97, 0.5, ("upper", "uniform(0.48, 0.99)")),
        (search.uniform(0, 10), 1.0, 5, None),
        (search.uniform(0, 2, step=0.5), 2.0, 1.0, ("upper", "uniform(1, 3, step=0.5)")),
        (search.integer(1, 9), 9, 5, ("upper", "integer(5, 13)")),
        (search.integer(2, 10), 2, 5, ("lower", "integer(1, 6)")),
        (search.integer(-4, 4), -4, 0, ("lower", "integer(-8, 0)")),
        (search.integer(16, 256, log=True), 256, 64, ("upper", "integer(64, 1024, log=True)")),
        (search.integer(32, 128, step=32), 128, 64, ("upper", "integer(96, 192, step=32)")),
        (search.integer(1, 9), 8, 5, None),
        (search.choice([64, 32, 128]), 128, 32, ("upper", "choice([32, 64, 128, 256])")),
        (search.choice([0.0, 0.1, 0.2]), 0.2, 0.1, ("upper", "choice([0.0, 0.1, 0.2, 0.3])")),
        (search.choice([0.0, 0.1, 0.2]), 0.0, 0.1, None),  # There is nothing below.
        (search.choice([1, 2, 3]), 1, 2, None),
        (search.choice([32, 64]), 64, 32, None),  # Every one of two is at an end.
        (search.choice(["a", "b", "c"]), "c", "a", None),
        (search.choice([False, True]), True, False, None),
    ],
)
def test_a_best_value_on_the_boundary_is_warned_of(dimension, best, worse, expected):
    assert instead(dimension, best, worse) == ([] if expected is None else [expected])


def test_the_warning_names_what_to_write():
    space = {
        "lr": search.log_uniform(1e-4, 1e-2),
        "optimizer": search.conditional({"sgd": {"momentum": search.uniform(0, 0.99)}, "adam": {}}),
    }
    best = {"lr": 1e-2, "optimizer/kind": "sgd", "optimizer/sgd/momentum": 0.5}
    study = made([(best, [0.1]), ({"lr": 1e-3, "optimizer/kind": "adam"}, [0.2])], space)
    (found,) = boundary_warnings(study)
    assert str(found) == (
        "the best lr is 0.01, at the upper end of log_uniform(0.0001, 0.01): the optimum may lie beyond. "
        "Search log_uniform(0.001, 0.1)"
    )
    (closer,) = boundary_warnings(
        made([({"p": 0.1}, [0.1]), ({"p": 1.0}, [0.2])], {"p": search.uniform(0, 10)})
    )
    assert str(closer).endswith(
        "uniform(0.0, 10.0): it hides what is close to that end. Search uniform(0, 5.1)"
    )
    assert [w.path for w in boundary_warnings(study, margin=0.49)] == ["lr"]
    assert [w.path for w in boundary_warnings(study, margin=0.499)] == ["lr", "optimizer/sgd/momentum"]
    with pytest.raises(ValueError, match=r"margin must be from 0 to below 0\.5, got 0\.5"):
        boundary_warnings(study, margin=0.5)
