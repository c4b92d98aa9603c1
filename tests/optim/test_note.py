"""Named tuples with a note: like optax's everywhere that a state goes, and the note comes along."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit.optim.note import attach, note_of, with_note


@with_note
class CountState(NamedTuple):
    """A count and a sum."""

    count: Any
    total: Any = 0.0


class Rule(NamedTuple):
    factor: Any
    mode: str


class _Plain(NamedTuple):
    count: Any
    total: Any = 0.0


Called = with_note(_Plain)
Compared = with_note(_Plain, compare=True)


def _state(note: Any = None, kind: Any = CountState) -> Any:
    return attach(kind(count=jnp.int32(3), total=jnp.ones(2)), note)


def _half(step: Any) -> Any:
    return 0.5**step


NOTES = [
    None,
    "a name",
    3,
    _half,
    lambda step: step,
    Rule(0.5, "min"),
    Rule(jnp.float32(0.5), "max"),
    {"a": 1},
]


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [CountState, Called, Compared])
def test_it_is_the_named_tuple(kind: Any) -> None:
    plain = _Plain(jnp.int32(3), jnp.ones(2))
    assert isinstance(_state("note", kind), tuple)
    assert isinstance(_state("note", kind), kind)
    state: Any = _state("note", kind)
    assert len(state) == 2
    assert state._fields == plain._fields == kind._fields
    assert kind.__name__ in ("CountState", "_Plain")
    assert state[0] is state.count
    assert state[1] is state.total
    count, total = state
    assert (count, total) == (state.count, state.total)
    assert state._asdict().keys() == plain._asdict().keys()
    assert kind(1) == (1, 0.0)
    assert kind(count=1)._replace(total=2) == (1, 2)
    assert kind._make([1, 2]) == (1, 2)
    assert repr(kind(1, 2)) == f"{kind.__name__}(count=1, total=2)"
    assert hash(kind(1, 2)) == hash((1, 2))
    with pytest.raises((ValueError, TypeError), match="unexpected field names"):
        state._replace(other=1)
    with pytest.raises(AttributeError):
        state.count = 1


def test_paths_leaves_and_optax_see_the_fields() -> None:
    state, plain = _state(_half, Called), _Plain(jnp.int32(3), jnp.ones(2))
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [p for p, _ in jax.tree_util.tree_leaves_with_path(plain)]
    same(jax.tree.leaves(state), jax.tree.leaves(plain))
    assert optax.tree_utils.tree_get((state, {"a": jnp.ones(1)}), "count") == 3
    replaced = optax.tree_utils.tree_set((state,), count=jnp.int32(7))
    assert replaced[0].count == 7
    assert note_of(replaced[0]) is _half


def test_arrays_of_the_note_are_leaves() -> None:
    state = _state(Rule(jnp.float32(0.5), "min"))
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths == ["count", "total", "note/factor"]
    doubled = jax.tree.map(lambda x: x * 2, state)
    assert (float(doubled.note.factor), doubled.note.mode) == (1.0, "min")

    traces = 0

    @jax.jit
    def read(state: Any) -> Any:
        nonlocal traces
        traces += 1
        return note_of(state).factor * state.count.astype(float)

    assert float(read(state)) == 1.5
    other = attach(state, Rule(jnp.float32(2.0), "min"))
    assert float(read(other)) == 6.0
    assert traces == 1


@pytest.mark.parametrize("note", NOTES, ids=range(len(NOTES)))
@pytest.mark.parametrize("kind", [CountState, Called, Compared])
def test_the_note_comes_along(note: Any, kind: Any) -> None:
    state = _state(note, kind)

    def check(new: Any) -> None:
        assert type(new) is kind
        assert note_of(new) == note
        assert new.note == note
        assert jax.tree.structure(new) == jax.tree.structure(state)

    check(state)
    check(state._replace(count=5))
    check(copy.copy(state))
    check(copy.deepcopy(state))
    check(jax.tree.map(lambda x: x, state))
    check(jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)))
    check(jax.jit(lambda s: s._replace(count=s.count + 1))(state))
    check(jax.lax.scan(lambda s, _: (s._replace(count=s.count + 1), None), state, None, 3)[0])
    check(jax.lax.cond(True, lambda s: s._replace(count=s.count + 1), lambda s: s, state))
    check(jax.tree.map(lambda *x: jnp.stack(x)[0], state, state))
    nested = {"a": (state, [state])}
    same(jax.tree.map(lambda x: x, nested), nested)


def test_deepcopy_copies_the_arrays() -> None:
    state = CountState(np.zeros(2))
    copied = copy.deepcopy(state)
    copied.count[0] = 1
    assert state.count[0] == 0
    assert copy.copy(state).count is state.count


@pytest.mark.parametrize("kind", [CountState, Called, Compared])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling(kind: Any, protocol: int) -> None:
    for note, expected in (("name", "name"), (_half, _half), (lambda step: step, None), (None, None)):
        state = pickle.loads(pickle.dumps(_state(note, kind), protocol))
        assert type(state) is kind
        assert note_of(state) == expected
        same(list(state), list(_state(note, kind)))
        if kind is not Compared:
            same(state, _state(note, kind))
    state = pickle.loads(pickle.dumps(_state(Rule(jnp.float32(0.5), "min"), kind), protocol))
    same(state, _state(Rule(jnp.float32(0.5), "min"), kind))


def test_vmap_makes_a_stack_and_takes_it_apart() -> None:
    states: Any = jax.vmap(lambda x: attach(CountState(x, x), Rule(x, "min")))(jnp.arange(3.0))
    assert states.count.shape == states.note.factor.shape == (3,)
    out = jax.vmap(lambda s: s.note.factor + s.count)(states)
    assert out.tolist() == [0.0, 2.0, 4.0]
    out = jax.vmap(lambda s: s._replace(count=-s.count), in_axes=(CountState(0, 0),))  # a spec without a note
    plain = jax.vmap(lambda x: attach(CountState(x, x), "name"))(jnp.arange(3.0))
    assert out(plain).count.tolist() == [0.0, -1.0, -2.0]


def test_static_notes_are_equal_unless_compared() -> None:
    """What the docstring promises, and the price that it names."""
    traces = []

    @jax.jit
    def read(state: Any) -> Any:
        traces.append(1)
        return state.note * state.count

    assert jax.tree.structure(_state(2)) == jax.tree.structure(_state(3)) == jax.tree.structure(_state())
    assert [int(read(_state(n))) for n in (2, 3)] == [6, 6]
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), _state(2), _state(_half))
    assert stacked.count.shape == (2,)
    jax.lax.scan(lambda s, _: (attach(s, object()), None), _state(_half), None, 2)

    structures = [jax.tree.structure(_state(n, Compared)) for n in (2, 3, None, 2)]
    assert structures[0] == structures[3]
    assert structures[0] != structures[1]
    assert structures[0] != structures[2]
    assert structures[2] != structures[0]
    assert [int(read(_state(n, Compared))) for n in (2, 3, 2)] == [6, 9, 6]
    assert len(traces) == 3


def test_other_states_take_no_note() -> None:
    plain = _Plain(1)
    assert attach(plain, "note") is plain
    assert note_of(plain) is None
    assert note_of(None) is None


def test_structures_show_the_note() -> None:
    assert "note='a name'" in str(jax.tree.structure(_state("a name")))
    assert "note=Rule(factor=Ellipsis, mode='min')" in str(
        jax.tree.structure(_state(Rule(jnp.ones(()), "min")))
    )


def test_errors() -> None:
    class Noted(NamedTuple):
        note: Any

    with pytest.raises(ValueError, match=r"^Noted has a field called note already: give it another name$"):
        with_note(Noted)
    with pytest.raises(
        TypeError, match=r"^with_note takes a class made with NamedTuple, got <class 'dict'>$"
    ):
        with_note(dict)  # pyright: ignore[reportArgumentType]


def test_a_plain_subclass_would_forget() -> None:
    """Without the registration and the methods the note is lost on the way: the tests would see it."""

    class Naive(_Plain):
        note: Any = None

    state = Naive(1, 2)
    state.note = "name"
    for new in (state._replace(count=2), jax.tree.map(lambda x: x, state)):
        assert new.note is None
