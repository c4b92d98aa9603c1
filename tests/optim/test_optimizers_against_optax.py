"""Every optimizer beside optax's, each step from optax's own state, over 200 steps of rough gradients."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import optax
import pytest

from nnkit import optim
from tests.optim.oracle import check_against_optax, fields_of, parameters
from tests.optim.rows import IGNORE, ROWS


@pytest.mark.parametrize("name", ROWS)
def test_float32_within_2_ulp_a_step(name: str) -> None:
    check_against_optax(ROWS[name](optim), ROWS[name](optax), jnp.float32, ignore=IGNORE.get(name))


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"adamw_mask", "decayed_sgd"}))
def test_states_have_optax_names(name: str) -> None:
    params = parameters(jnp.float32)
    assert fields_of(ROWS[name](optim).init(params)) == fields_of(ROWS[name](optax).init(params))


@pytest.mark.parametrize("name", [n for n in optim.__all__ if n in dir(optax) and n[0].islower()])
def test_signatures_are_optax_with_keywords_added(name: str) -> None:
    ours = [*inspect.signature(getattr(optim, name)).parameters.values()]
    theirs = [*inspect.signature(getattr(optax, name)).parameters.values()]
    assert [(p.name, p.kind, p.default) for p in ours if p.name in {q.name for q in theirs}] == [
        (p.name, p.kind, p.default) for p in theirs
    ] or (name == "chain" and ours[0].kind == theirs[0].kind)
    for p in ours:
        if p.name not in {q.name for q in theirs} and name != "chain":
            assert p.kind is p.KEYWORD_ONLY
            assert p.default is not p.empty
