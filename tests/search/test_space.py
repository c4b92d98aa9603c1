"""Spaces: dimensions on their scales, paths, conditionals, the text form, and what cannot be meant."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import search

FULL = {
    "lr": search.log_uniform(1e-5, 1.0),
    "rate": search.uniform(0, 0.5, step=0.1),
    "model": {"width": search.integer(16, 256, log=True), "hidden": search.choice([(64,), (64, 64)])},
    "optimizer": search.conditional(
        {
            "sgd": {
                "momentum": search.uniform(0, 0.99),
                "nesterov": search.conditional({"on": {"blend": search.uniform(0, 1)}, "off": {}}),
            },
            "adam": {"betas": {"b1": search.uniform(0.8, 0.99)}},
        }
    ),
    "depth": search.integer(1, 10, step=4),
    "patience": search.integer(1, 9, static=False),
    "smoothing": search.choice([0.0, 0.1], static=False),
}
DIMENSIONS = list(search.as_space(FULL).dimensions.values())


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def suggestions(space, n, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(n):
        trial = study.ask()
        yield space.suggest(trial), trial


# ----- one dimension


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=str)
@given(u=st.floats(0, 1))
def test_a_value_is_found_again_at_its_position(dimension, u):
    value = dimension.at(u)
    assert dimension.check(value, "x") == value
    again = dimension.at(dimension.position(value))
    if isinstance(value, float) and dimension.step is None and dimension.options is None:
        assert again == pytest.approx(value, rel=1e-12, abs=1e-15)
        # A position is reckoned in float64 from logarithms of size 12 at most.
        assert dimension.position(value) == pytest.approx(u, abs=1e-14)
    else:
        assert again == value
        assert type(again) is type(value)


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=str)
def test_the_ends_are_the_ends_and_the_scale_goes_up(dimension):
    values = [dimension.at(u) for u in np.linspace(0, 1, 301)]
    if dimension.options is not None:
        assert [values[0], values[-1]] == [dimension.options[0], dimension.options[-1]]
        return
    assert values == sorted(values)
    assert [values[0], values[-1]] == [dimension.low, dimension.high]
    inexact = search.log_uniform(2e-3, 5)  # exp(log(x)) is x of neither
    assert [inexact.at(0), inexact.at(1)] == [2e-3, 5]
    assert dimension.at(-1) == dimension.low
    assert dimension.at(2) == dimension.high


def test_counted_values_have_equal_shares():
    drawn = [search.integer(1, 10, step=4).at(u) for u in (np.arange(300) + 0.5) / 300]
    assert [drawn.count(v) for v in (1, 5, 9)] == [100, 100, 100]
    assert search.integer(1, 10, step=4).high == 9
    # On a log scale each has what rounds to it: 1 the part from log(0.5) to log(1.5) of log(0.5) to log(3.5).
    drawn = [search.integer(1, 3, log=True).at(u) for u in (np.arange(1000) + 0.5) / 1000]
    assert abs(drawn.count(1) - 1000 * np.log(3) / np.log(7)) <= 1


def test_grids():
    assert search.uniform(0, 1).grid(5) == [0, 0.25, 0.5, 0.75, 1]
    assert search.log_uniform(1e-5, 1.0).grid(6) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert search.uniform(0, 0.5, step=0.1).grid(99) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert search.uniform(0, 0.5, step=0.1).grid(3) == [0, 0.2, 0.5]
    assert search.integer(1, 100, log=True).grid(3) == [1, 10, 100]
    assert search.integer(1, 3, log=True).grid(9) == [1, 2, 3]
    assert search.choice(["a", None]).grid(1) == ["a", None]
    assert search.log_uniform(1e-4, 1).grid(1) == [pytest.approx(0.01)]


def test_counts_and_dtypes():
    count = {str(d): d.count for d in DIMENSIONS}
    assert count["uniform(0.0, 0.5, step=0.1)"] == 6
    assert count["integer(16, 256, log=True)"] == 241
    assert count["log_uniform(1e-05, 1.0)"] is None
    assert search.integer(1, 9).dtype == np.int32
    assert search.choice([1, 0.5], static=False).dtype == np.float32
    assert search.choice([1, 2], static=False).dtype == np.int32
    assert search.uniform(0, 1).dtype == np.float32


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=str)
def test_what_is_written_down_is_read_back(dimension):
    spec = json.loads(json.dumps(dimension.spec()))
    assert search.Dimension.from_spec(spec) == dimension


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=str)
def test_optuna_has_the_same_values(dimension):
    distribution = dimension.distribution()
    for u in np.linspace(0, 1, 50):
        stored = dimension.stored(dimension.at(u))
        assert distribution._contains(distribution.to_internal_repr(stored))
        assert dimension.restored(stored) == dimension.at(u)


# ----- a space


def test_what_is_suggested_is_active_and_in_order_and_of_the_space():
    space = search.as_space(FULL)
    kinds = set()
    for flat, trial in suggestions(space, 60):
        assert tuple(flat) == space.active(flat)
        assert space.check(flat) == flat
        assert list(flat) == list(trial.params)
        kinds.add((flat["optimizer/kind"], flat.get("optimizer/sgd/nesterov/kind")))
        assert ("optimizer/sgd/momentum" in flat) == (flat["optimizer/kind"] == "sgd")
        assert ("optimizer/sgd/nesterov/on/blend" in flat) == (
            flat.get("optimizer/sgd/nesterov/kind") == "on"
        )
        assert isinstance(flat["model/hidden"], tuple)
    assert kinds == {("sgd", "on"), ("sgd", "off"), ("adam", None)}


def test_steps_are_the_decimal_numbers_that_were_meant():
    space = search.as_space({"x": search.uniform(0, 1, step=0.1)})
    found = {flat["x"] for flat, _ in suggestions(space, 200)}
    assert found == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}  # 0.1 * 3 is 0.30000000000000004


FLAT = {
    "lr": 0.01,
    "rate": 0.1,
    "model/width": 32,
    "model/hidden": (64, 64),
    "optimizer/kind": "sgd",
    "optimizer/sgd/momentum": 0.9,
    "optimizer/sgd/nesterov/kind": "off",
    "depth": 5,
    "patience": 3,
    "smoothing": 0.1,
}


def test_nested():
    assert search.as_space(FULL).nested(FLAT) == {
        "lr": 0.01,
        "rate": 0.1,
        "model": {"width": 32, "hidden": (64, 64)},
        "optimizer": {"kind": "sgd", "momentum": 0.9, "nesterov": {"kind": "off"}},
        "depth": 5,
        "patience": 3,
        "smoothing": 0.1,
    }


def test_static_values_group_and_traced_ones_do_not():
    space = search.as_space(FULL)
    static, traced = space.split(FLAT)
    assert dict(static) == {
        "model/width": 32,
        "model/hidden": (64, 64),
        "optimizer/kind": "sgd",
        "optimizer/sgd/nesterov/kind": "off",
        "depth": 5,
    }
    assert traced == {
        "lr": 0.01, "rate": 0.1, "optimizer/sgd/momentum": 0.9, "patience": 3, "smoothing": 0.1
    }  # fmt: skip
    assert hash(static) == hash(space.split({**FLAT, "lr": 0.5})[0])
    assert static != space.split({**FLAT, "model/width": 64})[0]


def test_a_space_is_read_back_from_its_spec():
    space = search.as_space(FULL)
    again = search.space_of(json.loads(json.dumps(space.spec())))
    assert again == space
    assert hash(again) == hash(space)
    assert again.nested(FLAT) == space.nested(FLAT)
    assert space.difference(space.spec()) is None


def test_in_what_spaces_differ():
    space = search.as_space(FULL)

    def said(**changes):
        tree = {name: value for name, value in {**FULL, **changes}.items() if value is not None}
        return space.difference(search.as_space(tree).spec())

    assert said(lr=search.log_uniform(1e-3, 1.0)) == (
        "'lr' is log_uniform(0.001, 1.0) there and log_uniform(1e-05, 1.0) here"
    )
    assert said(lr=None) == "'lr' is here and not there"
    assert said(wd=search.uniform(0, 1)) == "'wd' is there and not here"
    assert said(patience=search.integer(1, 9)) == "'patience' is static there and traced here"
    plain = search.as_space({"o": {"kind": search.choice(["a", "b"])}})
    opened = search.as_space({"o": search.conditional({"a": {}, "b": {}})})
    assert plain.difference(opened.spec()) == "'o/kind' is a conditional in one and a choice in the other"
    reordered = search.as_space(dict(reversed(FULL.items())))
    assert space.difference(reordered.spec()) is None


def test_a_space_does_not_change():
    tree = {"lr": search.uniform(0, 1), "model": {"width": search.choice([1, 2])}}
    space = search.as_space(tree)
    tree["model"]["depth"] = search.choice([1])
    assert list(space.nested({"lr": 0, "model/width": 1})["model"]) == ["width"]
    with pytest.raises(AttributeError, match="a Space is immutable: make another"):
        space.dimensions = {}
    with pytest.raises(TypeError):
        space.dimensions["x"] = tree["lr"]
    assert search.as_space(space) is space


def test_values_get_their_types():
    space = search.as_space(FULL)
    found = space.check(
        {**FLAT, "lr": 1, "patience": 3.0, "model/hidden": [64, 64], "rate": 0.30000000000000004}
    )
    assert (found["lr"], type(found["lr"])) == (1.0, float)
    assert (found["patience"], type(found["patience"])) == (3, int)
    assert found["model/hidden"] == (64, 64)
    assert found["rate"] == 0.3
    assert space.check({**FLAT, "depth": np.int64(5)})["depth"] == 5
    assert repr(space.check({**FLAT, "smoothing": 0})["smoothing"]) == "0.0"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 2.0}, r"'lr' is 2.0, which is not in \[1e-05, 1.0\]"),
        ({"lr": "a"}, r"'lr' must be a number in \[1e-05, 1.0\], got 'a'"),
        ({"lr": True}, r"'lr' must be a number in .*, got True"),
        ({"lr": float("nan")}, "'lr' is nan, which is not in"),
        ({"rate": 0.15}, "'rate' is 0.15, which is not 0.0 and a multiple of 0.1"),
        ({"patience": 1.5}, "'patience' must be a whole number"),
        ({"model/hidden": (1,)}, r"'model/hidden' is \(1,\), which is none of its options"),
        ({"smoothing": False}, "'smoothing' is False, which is none of its options"),
        ({"lt": 1}, "unknown hyper-parameter 'lt'; did you mean 'lr'"),
        ({"optimizer/adam/betas/b1": 0.9}, "is there only where 'optimizer/kind' is 'adam': leave it out"),
        ({"optimizer/kind": "adam"}, "no value for 'optimizer/adam/betas/b1', which is uniform"),
    ],
)
def test_values_that_are_not_of_the_space(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        search.as_space(FULL).check({**FLAT, **change})


# ----- what cannot be meant


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: search.uniform(1, 0), r"uniform\(1, 0\) is inverted: write uniform\(0, 1\)"),
        (lambda: search.uniform(1, 1), r"uniform\(1, 1\) is empty: give two bounds, or choice\(\[1\]\)"),
        (lambda: search.uniform("a", 1), r"uniform\(low=\.\.\.\) must be a number, got 'a'"),
        (lambda: search.uniform(0, True), r"uniform\(high=\.\.\.\) must be a number, got True"),
        (lambda: search.uniform(0, float("inf")), r"uniform\(0, inf\) is not finite"),
        (lambda: search.uniform(0, 1, step=0), "needs a step above 0"),
        (lambda: search.uniform(0, 1, step=2), "is empty, since the step is longer than the range"),
        (
            lambda: search.log_uniform(0, 1),
            r"log_uniform\(0, 1\) goes through zero.*say at 0.0001, or use uniform",
        ),
        (lambda: search.log_uniform(-1, 1), "goes through zero, where there is no logarithm"),
        (lambda: search.log_uniform(1, 1e-3), r"is inverted: write log_uniform\(0.001, 1\)"),
        (lambda: search.log_uniform(1e-50, 1), "begins below what float32 has: begin at 1e-37"),
        (
            lambda: search.integer(1.5, 3),
            r"integer\(low=\.\.\.\) must be a whole number, got 1.5: use uniform",
        ),
        (lambda: search.integer(3, 3), r"integer\(3, 3\) is empty"),
        (
            lambda: search.integer(0, 3, log=True),
            "goes through zero, where there is no logarithm: begin at 1",
        ),
        (lambda: search.integer(1, 9, step=2, log=True), "has a step on a log scale: leave out one"),
        (lambda: search.integer(0, 2**31, static=False), "does not fit into int32"),
        (lambda: search.choice([]), r"choice\(\[\]\) has no options"),
        (
            lambda: search.choice("adam"),
            r"choice takes a list of options, got 'adam': write choice\(\[\.\.\.\]\)",
        ),
        (lambda: search.choice([1, True]), "choice has 1 and True, which are equal"),
        (lambda: search.choice([(1,), "(1,)"]), "which are equal: leave one out"),
        (lambda: search.choice([float("nan")]), "choice has nan among its options: use finite numbers"),
        (lambda: search.choice([print]), "takes strings, numbers, bools, None and tuples of them"),
        (
            lambda: search.choice(["a", "b"], static=False),
            "'a' is a str; leave out static=False, and a program",
        ),
        (lambda: search.choice([True, False], static=False), "True is a bool; leave out static=False"),
        (lambda: search.conditional({}), r"conditional\(\{\}\) has no kinds"),
        (lambda: search.conditional(["a"]), "conditional takes hyper-parameters by name for each kind"),
        (
            lambda: search.conditional({"a": search.uniform(0, 1)}),
            "takes hyper-parameters by name for each kind",
        ),
        (lambda: search.conditional({"a/b": {}}), "has the kind 'a/b': use a text without '/'"),
        (
            lambda: search.conditional({"a": {"kind": search.uniform(0, 1)}}),
            "a hyper-parameter 'kind': rename",
        ),
        (lambda: search.as_space({}), "the space is empty: write what is searched"),
        (lambda: search.as_space({"m": {}}), "the space at 'm' is empty"),
        (lambda: search.as_space([1]), "a space is a mapping from names to dimensions, got list"),
        (lambda: search.as_space({"lr": 0.1}), "the space has 0.1 at 'lr': write uniform"),
        (lambda: search.as_space({"l r": search.uniform(0, 1)}), "the name 'l r': names are identifiers"),
        (lambda: search.as_space({"a/b": search.uniform(0, 1)}), "groups are mappings within the mapping"),
    ],
)
def test_spaces_that_cannot_be_meant(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


# ----- as text


def test_a_space_as_text():
    text = (
        "lr=log:1e-5:1, rate=uniform:0:0.5:0.1, model/width=int:16:256:log, model/hidden=64x|64x64,"
        "optimizer=sgd{momentum=uniform:0:0.99,nesterov=on{blend=uniform:0:1}|off{}}|adam{betas/b1=uniform:0.8:0.99},"
        "depth=int:1:10:4,patience=int:1:9:traced,smoothing=0.0|0.1:traced"
    )
    assert search.parse_space(text) == search.as_space(FULL)
    options = search.parse_space("x=true|none|2|1.5|-3|adam|0x10").dimensions["x"].options
    assert options == (True, None, 2, 1.5, -3, "adam", (0, 10))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "'lr' is no hyper-parameter: write name=log:1e-5:1 or name=a|b"),
        ("lr=log:1", "lr=log:1: 1 numbers where log:LOW:HIGH is meant"),
        ("lr=log:1:0.1", r"lr=log:1:0.1: log_uniform\(1, 0.1\) is inverted"),
        ("lr=log:a:1", "lr=log:a:1: 'a' is no number"),
        ("lr=lgo:1:2", "unknown scale 'lgo'; did you mean 'log'"),
        ("n=int:1:2.5", "n=int:1:2.5: .*must be a whole number, got 2.5"),
        ("a=1|2,a=3", "'a' is written twice"),
        ("a=1|2,a/b=1|2", "'a/b' is within 'a', which is a hyper-parameter itself"),
        ("o=sgd{mu=uniform:0:1", "has a brace that is not closed"),
        ("o=sgd}", "closes a brace that is not open"),
        ("o=sgd{}x|b{}", "has a brace that is not closed at its end"),
    ],
)
def test_text_that_is_no_space(text, said):
    with pytest.raises((ValueError, TypeError), match=said):
        search.parse_space(text)


def test_spaces_of_equal_numbers_of_other_types_differ():
    # Failed where Python's equality of 1, 1.0 and True decided.
    whole, half = (search.as_space({"n": search.choice(options)}) for options in ([1, 2], [1.0, 2.0]))
    assert whole != half
    assert whole.difference(half.spec()) == "'n' is choice([1.0, 2.0]) there and choice([1, 2]) here"
