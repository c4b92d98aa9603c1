"""Coarse to fine: never outside the space, finds optima to a stated precision, and knows only the study."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import search
from nnkit.search.coarse_to_fine import Rules, Tried, moved, whole
from nnkit.search.windowed import CoarseToFine

RATE = search.as_space({"lr": search.log_uniform(1e-5, 1.0)})
PLANE = search.as_space({"x": search.uniform(0, 1), "y": search.uniform(0, 1)})
MIXED = search.as_space(
    {
        "lr": search.log_uniform(1e-5, 1.0),
        "model": {"width": search.integer(4, 256, log=True), "depth": search.integer(1, 5)},
        "drop": search.uniform(0, 0.6, step=0.1),
        "act": search.choice(["relu", "tanh", (1, 2)]),
        "optimizer": search.conditional(
            {
                "sgd": {"momentum": search.uniform(0, 0.99), "nesterov": search.choice([False, True])},
                "adam": {},
            }
        ),
    }
)


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def begun(sampler, storage=None, direction="minimize"):
    return optuna.create_study(
        sampler=sampler, storage=storage, study_name="s", load_if_exists=True, direction=direction
    )


def go(study, space, objective, trials, batch=8):
    """Asks and tells in batches until the study has as many trials; their values by path."""
    flats = []
    while (done := len(study.trials)) < trials:
        asked = [study.ask() for _ in range(min(batch, trials - done))]
        here = [space.suggest(trial) for trial in asked]
        for trial, flat in zip(asked, here, strict=True):
            study.tell(trial, objective(flat))
        flats += here
    return flats


def error_of(space, study, optimum):
    """How far the best is from where it should be, in shares of the scale."""
    dimension = space.dimensions["lr"]
    return abs(dimension.position(study.best_params["lr"]) - optimum)


def bowl(space, optimum):
    return lambda flat: abs(space.dimensions["lr"].position(flat["lr"]) - optimum) ** 2


@given(st.integers(0, 99), st.integers(1, 13), st.integers(2, 9), st.floats(0.2, 0.9), st.floats(0, 0.4))
@settings(max_examples=15)
def test_it_never_leaves_the_space_nor_its_windows(seed, batch, points, shrink, margin):
    sampler = search.coarse_to_fine(MIXED, points=points, shrink=shrink, margin=margin, seed=seed)
    study, values = begun(sampler), np.random.default_rng(seed)
    flats = go(study, MIXED, lambda flat: values.choice([values.random(), math.inf]), 30, batch)
    for round_ in sampler.windows(study):
        for number in round_.trials:
            MIXED.check(flats[number])
            for path, value in flats[number].items():
                side = round_.window[path]
                if MIXED.dimensions[path].options is None:
                    assert side[0] <= value <= side[1]
                else:
                    assert value in side


@pytest.mark.parametrize("optimum", [0.0, 0.03, 0.31, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("points", [8, 11])
def test_the_optimum_of_a_bowl_is_found_to_the_precision_that_the_docstring_states(optimum, points):
    for seed in range(3):
        sampler = search.coarse_to_fine(RATE, points=points, seed=seed)
        study = begun(sampler)
        for rounds in range(1, 8):
            go(study, RATE, bowl(RATE, optimum), rounds * points, points)
            assert error_of(RATE, study, optimum) < 0.5 ** (rounds - 1) / points
        low, high = sampler.window(study)["lr"]
        tiny = 1e-9  # 1e-5 and 1 as what their logarithms lead back to
        assert low * (1 - tiny) <= RATE.dimensions["lr"].at(optimum) <= high * (1 + tiny)


def test_the_lectures_learning_rate_is_found_within_a_factor_of_1_05():
    study = begun(search.coarse_to_fine(RATE))
    go(study, RATE, lambda flat: (math.log10(flat["lr"]) + 2.5) ** 2, 48)
    assert max(study.best_params["lr"] / 10**-2.5, 10**-2.5 / study.best_params["lr"]) < 1.05


def test_it_maximizes_too():
    study = begun(search.coarse_to_fine(RATE), direction="maximize")
    go(study, RATE, lambda flat: -bowl(RATE, 0.3)(flat), 40)
    assert error_of(RATE, study, 0.3) < 0.5**4 / 8


def ridge(flat):
    """A narrow valley along the diagonal, with its bottom near a corner."""
    return (10 * (flat["x"] - flat["y"])) ** 2 + (flat["x"] - 0.9) ** 2


def test_the_window_moves_to_an_optimum_that_was_outside_of_it():
    """With four points a round and a fifth of the width after it, the optimum is often outside.

    The best point is then the last or the last but one on its side, so a margin of 0.3 sees it.
    """
    dimension = RATE.dimensions["lr"]
    outside, missed = 0, {0.3: 0, -math.inf: 0}
    for optimum in np.linspace(0.05, 0.95, 19):
        for margin in missed:  # the second never moves
            sampler = CoarseToFine(RATE, Rules(points=4, shrink=0.2, margin=margin, seed=1))
            study = begun(sampler)
            go(study, RATE, bowl(RATE, optimum), 40, 4)
            low, high = map(dimension.position, sampler.windows(study)[1].window["lr"])
            if not low <= optimum <= high:
                outside += margin > 0
                missed[margin] += error_of(RATE, study, optimum) > 1e-3
    assert outside >= 5
    assert missed == {0.3: 0, -math.inf: outside}


def test_near_an_end_it_moves_and_keeps_its_width_else_it_shrinks():
    rules, window = Rules(points=4, shrink=0.5, margin=0.1, seed=0), {"x": (0.2, 0.6), "y": (0.0, 0.4)}

    def after(x, y):
        tried = [Tried({"x": x, "y": y}, 0.0, window)] + 3 * [Tried({"x": 0.4, "y": 0.2}, 1.0, window)]
        return {path: pytest.approx(side) for path, side in moved(PLANE, window, tried, rules).items()}

    assert after(0.4, 0.2) == {"x": (0.3, 0.5), "y": (0.1, 0.3)}
    assert after(0.57, 0.37) == {"x": (0.37, 0.77), "y": (0.17, 0.57)}
    assert after(0.23, 0.3) == {"x": (0.03, 0.43), "y": (0.2, 0.4)}
    # Outside of the window, as what somebody enqueued can be.
    assert after(0.9, 0.99) == {"x": (0.6, 1.0), "y": (0.6, 1.0)}
    # Where the space ends nothing is missed.
    assert after(0.4, 0.01) == {"x": (0.3, 0.5), "y": (0.0, 0.2)}


def test_every_round_has_one_point_in_each_part_of_each_scale():
    sampler = search.coarse_to_fine(PLANE, points=10, seed=3)
    study = begun(sampler)
    flats = go(study, PLANE, ridge, 60, 5)
    assert [len(round_.trials) for round_ in sampler.windows(study)] == 6 * [10]
    for round_ in sampler.windows(study):
        for path, (low, high) in round_.window.items():
            parts = [int(10 * (flats[n][path] - low) / (high - low)) for n in round_.trials]
            assert sorted(parts) == list(range(10))


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_how_a_round_is_batched_changes_nothing(batch):
    def points(batch):
        return go(begun(search.coarse_to_fine(MIXED, points=8, seed=1)), MIXED, lambda f: f["lr"], 40, batch)

    assert points(batch) == points(8)


def test_batches_beyond_a_round_are_more_points_on_the_same_window():
    sampler = search.coarse_to_fine(RATE, points=4)
    study = begun(sampler)
    flats = go(study, RATE, bowl(RATE, 0.3), 24, 12)
    assert [round_.trials for round_ in sampler.windows(study)] == [list(range(12)), list(range(12, 24))]
    assert len({flat["lr"] for flat in flats}) == 24


def test_a_kill_at_any_point_changes_nothing(tmp_path):
    def sampler():
        return search.coarse_to_fine(MIXED, points=4, seed=5)

    alone = go(begun(sampler()), MIXED, lambda f: f["lr"], 12, 4)
    storage = search.open_storage(tmp_path / "study.db")
    for told in (1, 6):  # as many are told, then the process dies amid the batch
        study = begun(sampler(), storage)
        go(study, MIXED, lambda f: f["lr"], told - told % 4, 4)
        asked = [study.ask() for _ in range(4)]
        flats = [MIXED.suggest(trial) for trial in asked[:3]]  # the last one had no values yet
        for trial, flat in zip(asked[: told % 4], flats, strict=False):
            study.tell(trial, flat["lr"])
        for trial in asked[told % 4 :]:  # what reclaiming does
            storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)
        study = begun(sampler(), storage)
        for _ in asked[told % 4 :]:
            trial = study.ask()
            study.tell(trial, MIXED.suggest(trial)["lr"])
    study = begun(sampler(), storage)
    go(study, MIXED, lambda f: f["lr"], 12, 4)
    assert [known_of(trial) for trial in study.trials] == alone


def known_of(trial):
    return {p: MIXED.dimensions[p].restored(trial.params[p]) for p in MIXED.dimensions if p in trial.params}


def test_two_processes_that_share_a_study_draw_what_one_draws(tmp_path):
    space = RATE
    alone = go(begun(search.coarse_to_fine(space, points=3)), space, bowl(space, 0.4), 9, 3)
    storages = [search.open_storage(tmp_path / "study.db") for _ in range(2)]
    workers = [begun(search.coarse_to_fine(space, points=3), storage) for storage in storages]
    flats = []
    for turn in range(3):
        asked = [workers[(turn + i) % 2].ask() for i in range(3)]
        flats += (here := [space.suggest(trial) for trial in asked])
        for trial, flat in reversed(list(zip(asked, here, strict=True))):
            trial.study.tell(trial, bowl(space, 0.4)(flat))
    assert flats == alone
    windows = [search.coarse_to_fine(space, points=3).window(worker) for worker in workers]
    assert windows[0] == windows[1] != {"lr": (1e-5, 1.0)}


def test_workers_that_do_not_wait_for_each_other_draw_different_points():
    study = begun(search.coarse_to_fine(PLANE, points=4, seed=2))
    running, drawn = [], []
    for i in range(40):
        trial = study.ask()
        running.append((trial, PLANE.suggest(trial)))
        drawn.append(tuple(running[-1][1].items()))
        if i % 3 == 2:  # the oldest is told last
            trial, flat = running.pop()
            study.tell(trial, ridge(flat))
    assert len(set(drawn)) == 40


def test_what_diverged_or_failed_is_done_and_never_the_best():
    sampler = search.coarse_to_fine(RATE, points=4)
    study = begun(sampler)
    for _ in range(4):
        study.tell(study.ask({"lr": RATE.dimensions["lr"].distribution()}), math.inf)
    for _ in range(4):
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    assert sampler.window(study) == {"lr": (1e-5, 1.0)}
    go(study, RATE, lambda f: bowl(RATE, 0.2)(f) if f["lr"] < 1e-3 else math.inf, 40, 4)
    assert sampler.window(study)["lr"][0] < 1e-4 < sampler.window(study)["lr"][1] < 1e-3


def test_a_point_that_was_enqueued_is_learnt_from_and_shifts_no_draw():
    def points(guess):
        sampler = search.coarse_to_fine(RATE, points=8)
        study = begun(sampler)
        if guess is not None:
            study.enqueue_trial({"lr": guess})
        flats = go(study, RATE, bowl(RATE, 0.9), 16 + (guess is not None), 8 + (guess is not None))
        return flats, sampler.windows(study)

    alone, windows = points(None)
    guided, moved_windows = points(0.2)
    assert guided[1:9] == alone[:8]
    low, high = moved_windows[1].window["lr"]
    assert math.sqrt(low * high) != pytest.approx(0.2)  # clipped: the window ends where the space does
    assert high == 1.0
    assert windows[0].window == moved_windows[0].window


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_a_round_with_an_enqueued_trial_has_all_its_points(batch):
    # Fails where what was enqueued counts: the round then ends before each part of the scale was tried.
    sampler = search.coarse_to_fine(RATE, points=8)
    study = begun(sampler)
    study.enqueue_trial({"lr": 0.5})
    flats = go(study, RATE, bowl(RATE, 0.2), 10, batch)
    parts = [int(8 * RATE.dimensions["lr"].position(flat["lr"])) for flat in flats[1:9]]
    assert sorted(parts) == list(range(8))
    assert flats[0]["lr"] == 0.5
    if batch != 4:  # of fours, twelve are asked for before the ninth is told
        assert len(sampler.windows(study)) == 2


def test_what_was_pruned_is_done_and_never_the_best():
    sampler = search.coarse_to_fine(RATE, points=8)
    study = begun(sampler)
    for _ in range(4):
        for trial in [study.ask() for _ in range(8)]:
            rate = RATE.suggest(trial)["lr"]
            if rate > 1e-3:
                trial.report(-1.0, 1)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)  # its value is the one reported
            else:
                study.tell(trial, bowl(RATE, 0.3)({"lr": rate}))
    assert [len(round_.trials) for round_ in sampler.windows(study)] == 4 * [8]
    low, high = map(RATE.dimensions["lr"].position, sampler.window(study)["lr"])
    assert low < 0.3 < high
    assert high - low == pytest.approx(0.5**4)


def test_whole_numbers_are_found_and_their_neighbours_stay_in_sight():
    space = search.as_space({"n": search.integer(1, 200), "lr": search.log_uniform(1e-4, 1)})
    sampler = search.coarse_to_fine(space, points=12)
    study = begun(sampler)
    flats = go(study, space, lambda f: abs(f["n"] - 141) + 0.1 * abs(math.log10(f["lr"]) + 1), 144, 12)
    assert study.best_params["n"] == 141
    assert sampler.window(study)["n"] == (140, 142)
    assert {flat["n"] for flat in flats[-12:]} == {140, 141, 142}


def test_of_a_choice_the_better_part_stays():
    space = search.as_space({"act": search.choice(list("abcd")), "lr": search.log_uniform(1e-4, 1)})
    worth = {"a": 2.0, "b": 0.0, "c": 3.0, "d": 1.0}
    sampler = search.coarse_to_fine(space, points=8)
    study = begun(sampler)
    seen = []
    for rounds in range(1, 5):
        go(study, space, lambda f: worth[f["act"]] + 0.1 * abs(math.log10(f["lr"]) + 2), 8 * rounds)
        seen.append(sampler.window(study)["act"])
    # Two of each in a round, and it takes four of each.
    assert seen == [tuple("abcd"), ("b", "d"), ("b",), ("b",)]


def test_a_kinds_own_window_waits_for_its_trials():
    kinds = {"sgd": {"momentum": search.uniform(0, 1)}, "adam": {"b1": search.uniform(0, 1)}}
    space = search.as_space({"optimizer": search.conditional(kinds)})
    sampler = search.coarse_to_fine(space, points=8)
    study = begun(sampler)
    go(study, space, lambda f: f.get("optimizer/sgd/momentum", 2.0), 8)
    # Four of each kind: enough to choose, and not to narrow what is within.
    assert sampler.window(study) == {
        "optimizer/kind": ("sgd",),
        "optimizer/sgd/momentum": (0.0, 1.0),
        "optimizer/adam/b1": (0.0, 1.0),
    }
    go(study, space, lambda f: f.get("optimizer/sgd/momentum", 2.0), 16)
    window = sampler.window(study)
    assert window["optimizer/sgd/momentum"] == pytest.approx((0.0, 0.5), abs=0.07)
    assert window["optimizer/adam/b1"] == (0.0, 1.0)


def test_more_parameters_are_found_better_than_at_random():
    """Of eight bowls in three dimensions, coarse to fine is nearer than random search in seven at least."""
    space = search.as_space({name: search.uniform(0, 1) for name in "abc"})
    nearer = 0
    for seed in range(8):
        at = np.random.default_rng(seed).uniform(0.1, 0.9, 3)
        ends = []
        for name in ("coarse-to-fine", "random"):
            study = begun(search.make_sampler(name, space, seed=seed))
            go(study, space, lambda f: float(((np.array(list(f.values())) - at) ** 2).sum()), 48)  # noqa: B023
            ends.append(study.best_value)
        nearer += ends[0] < ends[1]
    assert nearer >= 7


def test_the_first_window_is_the_space():
    assert search.coarse_to_fine(MIXED).window(begun(None)) == {
        "lr": (1e-5, 1.0),
        "model/width": (4, 256),
        "model/depth": (1, 5),
        "drop": (0.0, 0.6),
        "act": ("relu", "tanh", (1, 2)),
        "optimizer/kind": ("sgd", "adam"),
        "optimizer/sgd/momentum": (0.0, 0.99),
        "optimizer/sgd/nesterov": (False, True),
    }
    assert whole(RATE) == {"lr": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, r"coarse_to_fine\(points=...\) must be a whole number from 2 on, got 1"),
        ({"points": 2.5}, r"coarse_to_fine\(points=...\) must be a whole number from 2 on, got 2.5"),
        ({"seed": -1}, r"coarse_to_fine\(seed=...\) must be a whole number from 0 on, got -1"),
        ({"shrink": 1.0}, r"shrink=...\) must be in \(0, 1\), got 1.0: 0.5 halves the window"),
        ({"shrink": math.nan}, r"shrink=...\) must be in \(0, 1\), got nan"),
        ({"margin": 0.5}, r"margin=...\) must be in \[0, 0.5\), got 0.5: it is the share of the window"),
    ],
)
def test_numbers_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        search.coarse_to_fine(RATE, **options)


def test_a_sampler_of_another_space_says_so():
    study = begun(search.coarse_to_fine(RATE))
    with pytest.raises(ValueError, match="'coarse-to-fine' was made for another space, which has no 'width'"):
        study.ask().suggest_int("width", 1, 9)
