"""Samplers by name: in the space, a function of seed and study, and each as good as its name."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter

import numpy as np
import optuna
import pytest

from nnkit import search
from nnkit.search import sampling
from nnkit.search.samplers import SAMPLERS

RATE = search.as_space({"lr": search.log_uniform(1e-5, 1.0)})
NUMBERS = search.as_space(
    {
        "lr": search.log_uniform(1e-5, 1.0),
        "drop": search.uniform(0, 0.6),
        "width": search.integer(4, 64, log=True),
    }
)
MIXED = search.as_space(
    {
        "lr": search.log_uniform(1e-5, 1.0),
        "model": {"depth": search.integer(1, 5), "act": search.choice(["relu", "tanh", (1, 2)])},
        "optimizer": search.conditional(
            {
                "sgd": {"momentum": search.uniform(0, 0.99), "nesterov": search.choice([False, True])},
                "adam": {"b1": search.uniform(0.8, 0.99, step=0.01)},
            }
        ),
        "fixed": search.choice([3]),
    }
)
RANDOM_3 = [
    {"lr": 0.6747103456185033, "model/width": 0.890963204782342},
    {"lr": 0.7152233547359702, "model/width": 0.43947559105502165},
]
"""What seed 3 draws, noted from one process."""
QUICK = [name for name in SAMPLERS if name != "gp"]
BLIND = ["random", "quasi-random", "grid"]


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def space_for(name):
    return NUMBERS if name == "cma-es" else MIXED


def begun(name, space, storage=None, direction="minimize", **options):
    sampler = search.make_sampler(name, space, **{"trials": 40, **options})
    return optuna.create_study(
        sampler=sampler, storage=storage, study_name="s", load_if_exists=True, direction=direction
    )


def bowl(flat):
    return (math.log10(flat["lr"]) + 2.5) ** 2 + sum(
        (value - 0.3) ** 2 for path, value in flat.items() if path != "lr" and isinstance(value, float)
    )


def go(study, space, trials, batch=8, objective=bowl):
    """Asks, each after the other as a sweep does, and tells in batches; the values by path."""
    flats = []
    while len(flats) < trials:
        asked = []
        for _ in range(min(batch, trials - len(flats))):
            trial = study.ask()
            asked.append((trial, space.suggest(trial)))
        for trial, flat in asked:
            study.tell(trial, objective(flat))
        flats += [flat for _, flat in asked]
    return flats


@pytest.mark.parametrize("name", QUICK)
def test_every_draw_is_in_the_space_and_the_same_for_the_same_seed(name):
    space = space_for(name)
    flats = go(begun(name, space), space, 30)
    for flat in flats:
        assert space.check(flat) == flat
    assert go(begun(name, space), space, 30) == flats
    assert go(begun(name, space, seed=1), space, 30) != flats


@pytest.mark.parametrize("name", BLIND)
def test_samplers_that_do_not_look_at_results_draw_the_same_however_batched(name):
    flats = go(begun(name, MIXED), MIXED, 24)
    for batch in (1, 5, 24):
        assert go(begun(name, MIXED), MIXED, 24, batch, lambda flat: -flat["lr"]) == flats


@pytest.mark.parametrize("name", QUICK)
def test_workers_that_share_a_study_draw_what_one_draws(name):
    space = space_for(name)
    alone = go(begun(name, space), space, 30, 3)
    storage = search.open_storage()
    workers = [begun(name, space, storage) for _ in range(3)]
    flats = []
    for _ in range(10):
        asked = []
        for worker in workers:
            asked.append((worker, worker.ask()))
            flats.append(space.suggest(asked[-1][1]))
        for (worker, trial), flat in zip(asked, flats[-3:], strict=True):
            worker.tell(trial, bowl(flat))
    assert flats == alone


@pytest.mark.parametrize("name", QUICK)
def test_what_was_enqueued_is_kept_and_shifts_no_draw(name):
    space = space_for(name)
    alone = go(begun(name, space), space, 4)
    study = begun(name, space)
    kinds = ["sgd", "sgd", "adam", "adam"]  # of which some are not what would have been drawn
    for kind in kinds:
        study.enqueue_trial({"lr": 0.1, "optimizer/kind": kind})
    flats = go(study, space, 8)
    for flat, kind in zip(flats[:4], kinds, strict=True):
        assert space.check(flat) == flat
        assert flat["lr"] == 0.1
        assert flat.get("optimizer/kind", kind) == kind
    assert flats[4:] == alone


def test_what_is_drawn_is_the_same_in_every_process():
    # Fails where Python's own hash of a name is in it, which is another in each process.
    space = search.as_space({"lr": search.uniform(0, 1), "model": {"width": search.uniform(0, 1)}})
    drawn = go(begun("random", space, seed=3), space, 2)
    assert drawn == RANDOM_3


@pytest.mark.parametrize("name", ["tpe", "cma-es", "coarse-to-fine"])
def test_infinite_values_are_learnt_from_as_the_worst(name):
    """Where half of the space diverges, no more than half as many draws as at random fall there at the end."""

    def objective(flat):
        return math.inf if flat["lr"] > 10**-2.5 else (math.log10(flat["lr"]) + 4) ** 2

    study = begun(name, NUMBERS)
    flats = go(study, NUMBERS, 64, 8, objective)
    assert sum(flat["lr"] > 10**-2.5 for flat in flats[32:]) <= 8
    assert math.isfinite(study.best_value)


@pytest.mark.parametrize("name", ["tpe", "cma-es"])
def test_an_adaptive_sampler_finds_more_than_random_draws_do(name):
    """Of eight bowls in three dimensions the end is nearer to the optimum in seven at least."""
    space = search.as_space({name: search.uniform(0, 1) for name in "abc"})
    nearer = 0
    for seed in range(8):
        at = np.random.default_rng(seed).uniform(0.1, 0.9, 3)
        ends = []
        for which in (name, "random"):
            study = begun(which, space, seed=seed)
            go(study, space, 64, 8, lambda f: float(((np.array(list(f.values())) - at) ** 2).sum()))  # noqa: B023
            ends.append(study.best_value)
        nearer += ends[0] < ends[1]
    assert nearer >= 7


def test_a_models_choice_of_kind_and_what_is_within_are_both_learnt():
    kinds = {"sgd": {"momentum": search.uniform(0, 1)}, "adam": {}}
    space = search.as_space({"optimizer": search.conditional(kinds)})
    study = begun("tpe", space)
    flats = go(study, space, 80, 4, lambda f: abs(f.get("optimizer/sgd/momentum", 2.0) - 0.7))
    last = flats[-32:]
    chosen = [f["optimizer/sgd/momentum"] for f in last if f["optimizer/kind"] == "sgd"]
    assert len(chosen) >= 24
    assert np.median(np.abs(np.array(chosen) - 0.7)) < 0.1  # 0.25 and more without having learnt


def test_random_draws_are_even_on_each_hyper_parameters_own_scale():
    flats = go(begun("random", MIXED), MIXED, 400, 400)
    places = np.sort([MIXED.dimensions["lr"].position(flat["lr"]) for flat in flats])
    # The bound of Kolmogorov's test that one seed in a thousand exceeds.
    assert np.abs(places - (np.arange(400) + 0.5) / 400).max() < 1.95 / math.sqrt(400)
    kinds = Counter(flat["optimizer/kind"] for flat in flats)
    assert abs(kinds["sgd"] - 200) < 3.3 * 10  # 10 is the standard deviation
    other = [flat["model/depth"] for flat in flats]
    assert abs(np.corrcoef([MIXED.dimensions["lr"].position(f["lr"]) for f in flats], other)[0, 1]) < 3.3 / 20


def test_quasi_random_points_leave_no_hole():
    for seed in range(3):
        flats = go(begun("quasi-random", NUMBERS, seed=seed), NUMBERS, 32)
        for path in ("lr", "drop"):
            parts = sorted(int(32 * NUMBERS.dimensions[path].position(flat[path])) for flat in flats)
            assert parts == list(range(32))


# Grids


def test_a_grid_has_every_point_once_then_halves_the_distances_and_ends_without_an_error():
    space = search.as_space({"lr": search.log_uniform(1e-4, 1.0), "drop": search.uniform(0, 0.5)})
    study = begun("grid", space, trials=9)
    flats = [tuple(flat.values()) for flat in go(study, space, 25)]
    rates = [1e-4, 1e-2, 1.0]
    assert sorted(flats[:9]) == [(r, d) for r in rates for d in (0.0, 0.25, 0.5)]
    finer = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert sorted(flats[:15]) == [(r, d) for r in finer for d in (0.0, 0.25, 0.5)]
    assert sorted(flats) == [(r, d) for r in finer for d in (0.0, 0.125, 0.25, 0.375, 0.5)]
    assert flats[:9] != sorted(flats[:9])


@pytest.mark.parametrize(
    ("trials", "sizes"),
    [(1, [1, 1, 1]), (8, [2, 2, 2]), (12, [3, 2, 2]), (32, [3, 3, 3]), (64, [4, 4, 4]), (200, [6, 6, 5])],
)
def test_a_grid_is_as_fine_as_the_trials_allow(trials, sizes):
    space = search.as_space(
        {"lr": search.log_uniform(1e-4, 1), "l2": search.log_uniform(1e-6, 1), "n": search.integer(1, 5)}
    )
    flats = go(begun("grid", space, trials=trials), space, math.prod(sizes))
    assert [len({flat[path] for flat in flats}) for path in space.dimensions] == sizes
    assert len({tuple(flat.values()) for flat in flats}) == math.prod(sizes)


def test_a_grid_of_a_conditional_space_has_each_kinds_own_points():
    kinds = {"sgd": {"momentum": search.uniform(0, 1)}, "adam": {}}
    space = search.as_space({"lr": search.log_uniform(1e-4, 1.0), "optimizer": search.conditional(kinds)})
    flats = go(begun("grid", space, trials=20), space, 20)
    # 4 rates with 4 momenta, and with Adam; 5 rates would take 25.
    counts = Counter(flat["optimizer/kind"] for flat in flats)
    assert counts == {"sgd": 16, "adam": 4}
    assert len({tuple(flat.items()) for flat in flats}) == 20


def test_a_grid_starts_over_where_there_are_no_more_values():
    space = search.as_space({"act": search.choice(["a", "b"]), "n": search.integer(1, 3)})
    flats = go(begun("grid", space, trials=6), space, 12, objective=lambda flat: 0.0)
    assert flats[6:] == flats[:6]
    assert len({tuple(flat.values()) for flat in flats}) == 6


def test_a_study_with_more_trials_than_at_first_keeps_its_grid():
    storage = search.open_storage()
    first = go(begun("grid", RATE, storage, trials=5), RATE, 5)
    more = go(begun("grid", RATE, storage, trials=9), RATE, 4)
    assert sorted(flat["lr"] for flat in first + more) == RATE.dimensions["lr"].grid(9)


def test_a_grid_with_sizes_or_values_that_are_given():
    sampler = search.grid(
        MIXED, {"lr": [1e-3, 1e-1], "optimizer/sgd/momentum": 3, "optimizer/adam/b1": 2, "model/depth": [2]}
    )
    flats = go(begun(sampler, MIXED), MIXED, 48)
    assert {flat["lr"] for flat in flats} == {1e-3, 1e-1}
    assert {flat["model/depth"] for flat in flats} == {2}
    # 2 rates, 3 activations, and 3 momenta with nesterov or not, or 2 values of b1
    assert len({tuple(flat.items()) for flat in flats}) == 2 * 3 * (3 * 2 + 2)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"rl": 3}, ValueError, "unknown hyper-parameter 'rl'; did you mean 'lr'"),
        ({}, ValueError, r"grid needs a size for 'lr', which is log_uniform\(1e-05, 1.0\): write {'lr': 8}"),
        ({"lr": 0}, ValueError, "grid needs at least one value for 'lr', got 0"),
        ({"lr": []}, ValueError, "grid needs at least one value for 'lr', got none"),
        ({"lr": 2.5}, TypeError, "grid needs a whole number or a list of values for 'lr', got 2.5"),
        ({"lr": [2.0]}, ValueError, r"'lr' is 2.0, which is not in \[1e-05, 1.0\]"),
    ],
)
def test_grids_that_cannot_be_meant(sizes, error, message):
    with pytest.raises(error, match=message):
        search.grid(RATE, sizes)


def test_a_study_that_was_begun_with_another_given_grid_says_so():
    storage = search.open_storage()
    go(begun(search.grid(RATE, {"lr": 4}), RATE, storage), RATE, 1)
    with pytest.raises(ValueError, match=r"begun with the grid \{'lr': 4\}, and this one is \{'lr': 5\}"):
        go(begun(search.grid(RATE, {"lr": 5}), RATE, storage), RATE, 1)


# Samplers that are given


def test_a_function_of_a_seed_is_called_for_each_trial():
    def make(seed):
        return optuna.samplers.TPESampler(seed=seed)

    flats = go(begun(make, MIXED), MIXED, 24, 4)
    storage = search.open_storage()
    halves = [go(begun(make, MIXED, storage), MIXED, 12, 4) for _ in range(2)]
    assert halves[0] + halves[1] == flats
    assert len({flat["lr"] for flat in flats}) == 24


def test_what_a_function_makes_draws_each_value_by_itself():
    # Fails where it is made anew for each value: both would be its first random number.
    space = search.as_space({"x": search.uniform(0, 1), "y": search.uniform(0, 1)})
    flats = go(
        begun(lambda seed: optuna.samplers.RandomSampler(seed=seed), space),
        space,
        6,
        objective=lambda f: f["x"],
    )
    assert all(flat["x"] != flat["y"] for flat in flats)
    assert len({value for flat in flats for value in flat.values()}) == 12


def test_a_sampler_of_optunas_is_taken_as_it_is():
    sampler = optuna.samplers.RandomSampler(seed=0)
    assert search.make_sampler(sampler, MIXED) is sampler


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("tep", MIXED), {}, ValueError, "unknown sampler 'tep'; did you mean 'tpe'"),
        (
            (3, MIXED),
            {},
            TypeError,
            r"sampler must be a name \(random, .*\), a sampler of Optuna's, or .* got 3",
        ),
        (
            (optuna.samplers.TPESampler, MIXED),
            {},
            TypeError,
            r"such as lambda seed: TPESampler\(seed=seed\), got",
        ),
        (
            ("tpe", MIXED),
            {"seed": -1},
            ValueError,
            r"make_sampler\(seed=...\) must be a whole number from 0 on",
        ),
        (
            ("tpe", MIXED),
            {"trials": 0},
            ValueError,
            r"make_sampler\(trials=...\) must be a whole number from 1",
        ),
        (
            ("tpe", MIXED),
            {"batch": 1.5},
            ValueError,
            r"make_sampler\(batch=...\) must be a whole number from 1",
        ),
        (("grid", MIXED), {}, ValueError, r"'grid' needs the number of trials .* sampler=search.grid\(space"),
        (
            ("grid", MIXED),
            {"trials": 8},
            ValueError,
            "cannot try all 9 combinations of the choices: give it 9",
        ),
        (
            ("cma-es", MIXED),
            {},
            ValueError,
            r"'cma-es' knows numbers alone, and 'model/act' is choice\(.*take 'tpe'",
        ),
        (("tpe", {}), {}, ValueError, "the space is empty"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_runs(arguments, options, error, message):
    with pytest.raises(error, match=message):
        search.make_sampler(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("gp", "torch", r"the sampler 'gp' needs PyTorch: pip install 'nnkit\[gp\]'"),
        ("cma-es", "cmaes", r"the sampler 'cma-es' needs cmaes: pip install 'nnkit\[search\]'"),
        ("tpe", "optuna", r"nnkit.search needs Optuna: pip install 'nnkit\[search\]'"),
    ],
)
def test_a_package_that_is_missing_is_one_line(monkeypatch, name, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        search.make_sampler(name, NUMBERS)


@pytest.mark.parametrize(("batch", "generation"), [(None, 7), (4, 7), (16, 16)])
def test_cma_es_has_a_generation_as_large_as_a_batch(monkeypatch, batch, generation):
    made, original = [], optuna.samplers.CmaEsSampler

    def noted(**options):
        made.append(options["popsize"])
        return original(**options)

    monkeypatch.setattr(optuna.samplers, "CmaEsSampler", noted)
    go(begun("cma-es", NUMBERS, batch=batch), NUMBERS, 3)
    assert made == 3 * [generation]


# What Optuna's samplers see of a study


def test_a_model_sees_the_trials_with_its_parameters_and_no_infinite_value():
    kinds = {"sgd": {"momentum": search.uniform(0, 1)}, "adam": {}}
    space = search.as_space({"optimizer": search.conditional(kinds)})
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        study = optuna.create_study(direction=direction)
        given = [("sgd", 1.0), ("adam", 2.0), ("sgd", math.inf), ("sgd", 3.0), ("sgd", 1e6), ("sgd", 2.0)]
        for kind, value in given:
            params = {"optimizer/kind": kind} | ({"optimizer/sgd/momentum": 0.5} if kind == "sgd" else {})
            known = {path: space.dimensions[path].distribution() for path in params}
            stored = {path: space.dimensions[path].stored(value) for path, value in params.items()}
            study.add_trial(optuna.create_trial(params=stored, distributions=known, value=sign * value))

        def seen(paths, robust, study=study, sign=sign):
            found = sampling._Seen(study, paths, robust=robust).get_trials()
            return [sign * trial.value for trial in found]

        assert seen(["optimizer/kind"], False) == [1, 2, 1e6, 3, 1e6, 2]
        assert seen(["optimizer/kind", "optimizer/sgd/momentum"], False) == [1, 1e6, 3, 1e6, 2]
        # Quartiles of 1, 2, 2, 3, 1e6 are 2 and 3, and the fence is 1.5 times their distance beyond.
        assert seen(["optimizer/kind"], True) == [1, 2, 4.5, 3, 4.5, 2]
        assert [t.value for t in study.trials] == [sign * value for _, value in given]


# Gaussian processes: a second for each draw


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_a_gaussian_process_is_a_function_of_the_study_and_finds_the_optimum_beside_huge_values():
    def objective(flat):
        away = math.log10(flat["lr"]) + 2.5
        return 1e12 if away > 1.5 else math.inf if away < -2 else away**2

    alone = begun("gp", RATE)
    flats = go(alone, RATE, 20, 4, objective)
    assert abs(math.log10(alone.best_params["lr"]) + 2.5) < 0.05
    storage = search.open_storage()
    halves = [go(begun("gp", RATE, storage), RATE, 10, 4, objective) for _ in range(2)]
    assert halves[0] == flats[:10]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_a_gaussian_process_draws_in_a_conditional_space():
    flats = go(begun("gp", MIXED), MIXED, 16, 4)
    for flat in flats:
        MIXED.check(flat)
    assert len({flat["lr"] for flat in flats}) == 16
