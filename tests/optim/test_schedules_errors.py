"""Bad arguments of schedules: each error, by its text."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import pytest

from nnkit import optim as _optim

optim: Any = _optim  # whose types forbid what is tried here


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def _warmup(**changed: Any) -> Any:
    return optim.warmup_cosine_decay_schedule(
        **{"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 5, "decay_steps": 9} | changed
    )


COUNTS = "it counts steps"
HELD = "it is how many steps init_value is held first"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optim.constant_schedule(float("nan")), "value must be in (-inf, inf), got nan"),
        (lambda: optim.linear_schedule(0.1, float("inf"), 10), "end_value must be in (-inf, inf), got inf"),
        (
            lambda: optim.linear_schedule(0.1, 0.0, 10, -1),
            f"transition_begin must be in [0, inf), got -1: {HELD}",
        ),
        (
            lambda: optim.polynomial_schedule(0.1, 0.0, -1, 10),
            "power must be in [0, inf), got -1: 1 is a line",
        ),
        (
            lambda: optim.exponential_decay(0.1, 10, 0.9, -3),
            f"transition_begin must be in [0, inf), got -3: {HELD}",
        ),
        (lambda: optim.exponential_decay(0.1, 10, -0.9), "decay_rate must be in [0, inf), got -0.9"),
        (
            lambda: optim.inverse_square_root_schedule(0.0, 0.1, 0),
            "warmup_steps must be in (0, inf), got 0: the decay begins at √(warmup_steps/t)",
        ),
        (
            lambda: optim.warmup_constant_schedule(0.0, 0.1, -1),
            f"warmup_steps must be in [0, inf), got -1: {COUNTS}",
        ),
        (
            lambda: optim.warmup_exponential_decay_schedule(0.0, 0.1, -1, 5, 0.9),
            f"warmup_steps must be in [0, inf), got -1: {COUNTS}",
        ),
        (
            lambda: optim.cosine_decay_schedule(0.1, 0),
            f"decay_steps must be in (0, inf), got 0: {COUNTS}",
        ),
        (
            lambda: optim.cosine_decay_schedule(0.1, 10, exponent=-1),
            "exponent must be in [0, inf), got -1: 1 is the plain cosine",
        ),
        (
            lambda: _warmup(decay_steps=5),
            "decay_steps must be above warmup_steps, got 5 and 5: it counts the steps of the warm-up, too",
        ),
        (
            lambda: _warmup(warmup_steps=-5),
            f"warmup_steps must be in [0, inf), got -5: {COUNTS}",
        ),
        (
            lambda: optim.linear_onecycle_schedule(0, 0.1),
            f"transition_steps must be in (0, inf), got 0: {COUNTS}",
        ),
        (
            lambda: optim.cosine_onecycle_schedule(-10, 0.1),
            f"transition_steps must be in (0, inf), got -10: {COUNTS}",
        ),
        (
            lambda: optim.cosine_onecycle_schedule(10, 0.1, 30),
            "pct_start must be in [0, 1], got 30: it is a part of the steps",
        ),
        (
            lambda: optim.linear_onecycle_schedule(10, 0.1, 0.5, 0.4),
            "pct_final must be at least pct_start, got 0.4 and 0.5: it is the part of the steps after which "
            "the last phase begins",
        ),
        (
            lambda: optim.linear_onecycle_schedule(10, 0.1, div_factor=0),
            "div_factor must be in (0, inf), got 0",
        ),
        (
            lambda: optim.cyclic_triangular_schedule(0.1, 0.2, 10, mode="triangle"),
            "unknown mode 'triangle'; did you mean 'triangular' or 'triangular2'? Known: exp_range, triangular, "
            "triangular2",
        ),
        (
            lambda: optim.cyclic_triangular_schedule(0.1, 0.2, 0),
            f"step_size_up must be in (0, inf), got 0: {COUNTS}",
        ),
        (
            lambda: optim.cyclic_triangular_schedule(0.1, 0.2, 5, -1),
            f"step_size_down must be in (0, inf), got -1: {COUNTS}",
        ),
        (
            lambda: optim.cyclic_triangular_schedule(0.1, 0.2, 5, gamma=-1.0),
            "gamma must be in [0, inf), got -1.0: it is the factor a step of exp_range",
        ),
        (
            lambda: optim.step_decay(0.1, 0),
            "step_size must be in (0, inf), got 0: it counts epochs",
        ),
        (
            lambda: optim.step_decay(0.1, 1, steps_per_epoch=0),
            f"steps_per_epoch must be in (0, inf), got 0: {COUNTS}",
        ),
        (lambda: optim.step_decay(0.1, 1, -0.1), "gamma must be in [0, inf), got -0.1"),
        (
            lambda: optim.multi_step_decay(0.1, []),
            "milestones must hold at least one epoch, got none: write milestones=[30, 80]",
        ),
        (
            lambda: optim.multi_step_decay(0.1, [80, 30]),
            "milestones must increase, got 30 after 80: write milestones=[30, 80]",
        ),
        (
            lambda: optim.multi_step_decay(0.1, [30, 30]),
            "milestones must increase, got 30 after 30: write milestones=[30, 80]",
        ),
        (
            lambda: optim.multi_step_decay(0.1, [-1, 30]),
            f"milestones[0] must be in [0, inf), got -1: {COUNTS}",
        ),
        (
            lambda: optim.piecewise_constant_schedule(0.1, {5: -1.0}),
            "boundaries_and_scales[5] must be in [0, inf), got -1.0: it is a factor",
        ),
        (
            lambda: optim.piecewise_constant_schedule(0.1, {-5: 1.0}),
            f"a step in boundaries_and_scales must be in [0, inf), got -5: {COUNTS}",
        ),
        (
            lambda: optim.piecewise_interpolate_schedule("linar", 0.1),
            "unknown interpolate_type 'linar'; did you mean 'linear'? Known: cosine, linear",
        ),
        (
            lambda: optim.sgdr_schedule([]),
            "cosine_kwargs must hold at least one cycle's arguments, got none",
        ),
        (
            lambda: optim.sgdr_schedule(
                [{"init_value": 0, "peak_value": 1, "warmup_step": 2, "decay_steps": 9}]
            ),
            "unknown argument in cosine_kwargs[0] 'warmup_step'; did you mean 'warmup_steps' or 'decay_steps'? "
            "Known: decay_steps, end_value, exponent, init_value, peak_value, warmup_steps",
        ),
        (
            lambda: optim.join_schedules([], []),
            "schedules must hold at least one function of the step, got none",
        ),
        (
            lambda: optim.join_schedules([optim.constant_schedule(1)] * 3, [5]),
            "boundaries must be one fewer than the schedules, got 1 for 3: each is the step at which the next "
            "schedule begins",
        ),
        (
            lambda: optim.join_schedules([optim.constant_schedule(1)] * 3, [5, 5]),
            "boundaries must increase, got 5 after 5: write boundaries=[100, 200]",
        ),
        (
            lambda: optim.join_schedules([optim.constant_schedule(1)] * 2, [-5]),
            f"boundaries[0] must be in [0, inf), got -5: {COUNTS}",
        ),
    ],
)
def test_bad_values(make: Any, text: str) -> None:
    with raises(ValueError, text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: optim.linear_schedule(0.1, 0.0, "10"),
            f"transition_steps must be a number or a scalar array, got '10': {COUNTS}",
        ),
        (
            lambda: optim.linear_schedule(None, 0.0, 10),
            "init_value must be a number or a scalar array, got None",
        ),
        (
            lambda: optim.exponential_decay(0.1, None, 0.9),
            f"transition_steps must be a number or a scalar array, got None: {COUNTS}",
        ),
        (
            lambda: optim.cosine_decay_schedule(0.1, True),
            f"decay_steps must be a number or a scalar array, got True: {COUNTS}",
        ),
        (
            lambda: optim.piecewise_constant_schedule(0.1, [5, 0.1]),
            "boundaries_and_scales must be a dict, got [5, 0.1]: write {step: factor}",
        ),
        (
            lambda: optim.piecewise_constant_schedule(0.1, {"5": 0.1}),
            "boundaries_and_scales must have steps for keys, got '5': write {100: 0.1}",
        ),
        (
            lambda: optim.piecewise_interpolate_schedule("linear", 0.1, {5: None}),
            "boundaries_and_scales[5] must be a number or a scalar array, got None: it is a factor",
        ),
        (
            lambda: optim.multi_step_decay(0.1, 30),
            "milestones must be a list of steps, got 30: write milestones=[30, 80]",
        ),
        (
            lambda: optim.multi_step_decay(0.1, ["30"]),
            f"milestones[0] must be a number or a scalar array, got '30': {COUNTS}",
        ),
        (
            lambda: optim.sgdr_schedule({"init_value": 0}),
            "cosine_kwargs must be a list of dicts, one a cycle, got one dict",
        ),
        (lambda: optim.sgdr_schedule(3), "cosine_kwargs must be a list of dicts, one a cycle, got 3"),
        (
            lambda: optim.sgdr_schedule([100]),
            "cosine_kwargs[0] must be a dict of a cycle's arguments, got 100",
        ),
        (
            lambda: optim.sgdr_schedule([{"init_value": 0, "peak_value": 1}]),
            "cosine_kwargs[0] lacks warmup_steps, decay_steps: every cycle needs its own",
        ),
        (
            lambda: optim.join_schedules([0.1, optim.constant_schedule(1)], [5]),
            "schedules[0] must be a function of the step, got 0.1: for a number write constant_schedule(number)",
        ),
        (
            lambda: optim.join_schedules(3, [5]),
            "schedules must be a list of functions of the step, got 3",
        ),
        (
            lambda: optim.join_schedules([optim.constant_schedule(1)] * 2, 5),
            "boundaries must be a list of steps, got 5: write boundaries=[100, 200]",
        ),
        (
            lambda: optim.join_schedules([optim.constant_schedule(1)] * 2, ["5"]),
            f"boundaries[0] must be a number or a scalar array, got '5': {COUNTS}",
        ),
    ],
)
def test_bad_types(make: Any, text: str) -> None:
    with raises(TypeError, text):
        make()


def test_one_function_for_a_list_of_them() -> None:
    with pytest.raises(TypeError, match=r"^schedules must be a list of functions of the step, got <function"):
        optim.join_schedules(optim.constant_schedule(1), [5])


def test_numbers_that_are_no_scalars() -> None:
    text = "decay_steps must be a scalar, got an array of shape (2,): map over its values with jax.vmap"
    with raises(ValueError, text):
        optim.cosine_decay_schedule(0.1, jnp.array([10, 20]))
