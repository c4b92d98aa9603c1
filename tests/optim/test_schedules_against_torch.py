"""Schedules beside PyTorch's schedulers, and those that no library has beside their papers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import optim
from nnkit.testing.table.schedules import compiled, in_torch

STEPS = np.arange(70, dtype=np.int32)


def check(schedule: Any, expected: np.ndarray) -> None:
    """float32 beside the largest value; PyTorch multiplies up its rates in float64, a few 1e-16 a step."""
    steps = np.arange(len(expected), dtype=np.int32)
    np.testing.assert_allclose(compiled(schedule, steps), expected, rtol=1e-6, atol=2.0**-23 * expected.max())
    with jax.enable_x64(True):
        np.testing.assert_allclose(compiled(schedule, steps), expected, rtol=1e-13, atol=1e-16)


CYCLES = [
    {"step_size_up": 8},
    {"step_size_up": 5, "step_size_down": 3},
    {"step_size_up": 1},
    {"step_size_up": 11, "step_size_down": 1},
]


def _cyclic_in_torch(**arguments: Any) -> np.ndarray:
    return in_torch(
        lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.1, 0.7, cycle_momentum=False, **arguments)
    )


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("sizes", CYCLES, ids=str)
def test_cyclic_triangular_is_cyclic_lr(sizes: Any, mode: str) -> None:
    arguments = sizes | {"mode": mode} | ({"gamma": 0.97} if mode == "exp_range" else {})
    schedule = optim.cyclic_triangular_schedule(0.1, 0.7, **arguments)
    expected = _cyclic_in_torch(**arguments)
    np.testing.assert_allclose(compiled(schedule, STEPS), expected, rtol=2e-6)
    with jax.enable_x64(True):
        # PyTorch's height is 1 + t/n - floor(1 + t/n), which loses 1e-15.
        np.testing.assert_allclose(compiled(schedule, STEPS), expected, rtol=1e-12, atol=1e-14)


def test_exp_range_after_very_many_steps() -> None:
    """0.99994 in float32 is 0.2% off after 100,000 steps; its logarithm in float64 is not."""
    schedule = optim.cyclic_triangular_schedule(0.0, 1.0, 2000, mode="exp_range", gamma=0.99994)
    top = 25 * 4000 + 2000
    assert float(schedule(jnp.int32(top))) == pytest.approx(0.99994**top, rel=1e-6)
    assert abs(float(jnp.float32(0.99994) ** jnp.float32(top)) / 0.99994**top - 1) > 1e-4


@pytest.mark.parametrize(("step_size", "gamma"), [(1, 0.9), (3, 0.5), (30, 0.1), (7, 0.0), (5, 1.2)])
def test_step_decay_is_step_lr(step_size: int, gamma: float) -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size, gamma))
    check(optim.step_decay(0.3, step_size, gamma), expected)
    by_step = optim.step_decay(0.3, step_size, gamma, steps_per_epoch=4)
    np.testing.assert_array_equal(
        compiled(by_step, np.arange(280))[::4], compiled(by_step, np.arange(280))[3::4]
    )
    check(lambda epoch: by_step(4 * epoch + 3), expected)


@pytest.mark.parametrize(
    ("milestones", "gamma"), [([30, 50], 0.1), ([0, 1, 69], 0.5), ([5], 0.0), ([200], 0.1)]
)
def test_multi_step_decay_is_multi_step_lr(milestones: Any, gamma: float) -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, milestones, gamma))
    check(optim.multi_step_decay(0.3, milestones, gamma), expected)
    by_step = optim.multi_step_decay(0.3, milestones, gamma, steps_per_epoch=4)
    check(lambda epoch: by_step(4 * epoch + 3), expected)
    check(lambda epoch: by_step(4 * epoch), expected)


def test_steps_at_boundaries_of_every_length() -> None:
    """Compiled, 47/47 must not be 0.99999994: at n epochs of any length the factor has been applied."""
    lengths = jnp.arange(1, 3000)

    @jax.jit
    @jax.vmap
    def values(n: Any) -> Any:
        single, several = optim.step_decay(1.0, n, 0.5), optim.multi_step_decay(1.0, [1, 3], 0.5, n)
        return jnp.stack(
            [single(n - 1), single(n), single(3 * n - 1), several(n - 1), several(n), several(3 * n)]
        )

    np.testing.assert_array_equal(values(lengths), [[1, 0.5, 0.25, 1, 0.5, 0.25]] * len(lengths))


def test_exponential_decay_is_exponential_lr() -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9))
    np.testing.assert_allclose(compiled(optim.exponential_decay(0.3, 1, 0.9), STEPS), expected, rtol=3e-6)


def test_polynomial_is_polynomial_lr() -> None:
    for power in (0.5, 1.0, 2.0):
        expected = in_torch(lambda opt, power=power: torch.optim.lr_scheduler.PolynomialLR(opt, 47, power))
        schedule = optim.polynomial_schedule(0.3, 0.0, power, 47)
        np.testing.assert_allclose(compiled(schedule, STEPS), expected, rtol=2e-6, atol=1e-12)


def test_cosine_is_cosine_annealing_lr() -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 69, 0.03))
    np.testing.assert_allclose(
        compiled(optim.cosine_decay_schedule(0.3, 69, 0.1), STEPS), expected, rtol=1e-6, atol=1e-9
    )


def test_sgdr_is_cosine_annealing_warm_restarts() -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 10, 2, 0.03))
    cycle = {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0, "end_value": 0.03}
    check(optim.sgdr_schedule([cycle | {"decay_steps": n} for n in (10, 20, 40)]), expected)


@pytest.mark.parametrize("total", [10, 47])
def test_cosine_onecycle_is_onecycle_lr(total: int) -> None:
    """With what PyTorch counts otherwise: the largest value at pct·total − 1, the last at total − 1."""

    def scheduler(opt: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(opt, 0.3, total, pct_start=0.4, cycle_momentum=False)

    expected = in_torch(scheduler, total - 1)
    at = 0.4 * total - 1
    mine = optim.cosine_onecycle_schedule(total - 1, 0.3, pct_start=at / (total - 1))
    if at == int(at):
        check(mine, expected)
    else:
        assert float(mine(0)) == pytest.approx(expected[0])


@pytest.mark.parametrize("width", [64, 512])
def test_inverse_square_root_is_the_papers(width: int) -> None:
    warmup = 40
    schedule = optim.inverse_square_root_schedule(0.0, (width * warmup) ** -0.5, warmup)
    numbers = np.arange(1, 500)
    paper = width**-0.5 * np.minimum(numbers**-0.5, numbers * warmup**-1.5)
    np.testing.assert_allclose(compiled(schedule, numbers), paper, rtol=5e-7)
    assert int(np.argmax(compiled(schedule, numbers))) + 1 == warmup


def test_inverse_square_root_warms_up_from_a_value() -> None:
    """fairseq's formula, with its warmup_init_lr."""
    steps = np.arange(100)
    expected = np.where(
        steps < 10, 0.1 + steps * (0.3 - 0.1) / 10, 0.3 * 10**0.5 / np.sqrt(np.maximum(steps, 1))
    )
    np.testing.assert_allclose(
        compiled(optim.inverse_square_root_schedule(0.1, 0.3, 10), steps), expected, rtol=5e-7
    )


def _cyclic(step: Any, change: Any) -> Any:
    arguments = {"step_size_up": 5, "step_size_down": 3, "mode": "triangular2"} | change
    return optim.cyclic_triangular_schedule(0.1, 0.7, **arguments)(step)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda step: _cyclic(step + 1, {}),
        lambda step: _cyclic(step, {"mode": "triangular"}),
        lambda step: _cyclic(step, {"step_size_down": 5}),
        lambda step: _cyclic(step, {"mode": "exp_range", "gamma": 0.5 ** (1 / 8)}),
        lambda step: _cyclic(step, {"step_size_up": 3, "step_size_down": 5}),
    ],
)
def test_wrong_cycles_are_caught(mutant: Any) -> None:
    expected = _cyclic_in_torch(step_size_up=5, step_size_down=3, mode="triangular2")
    check(lambda step: _cyclic(step, {}), expected)
    with pytest.raises(AssertionError):
        check(mutant, expected)


@pytest.mark.parametrize(
    "mutant",
    [
        optim.step_decay(0.3, 4, 0.5),
        optim.step_decay(0.3, 5, 0.4),
        optim.exponential_decay(0.3, 5, 0.5),
        lambda step: optim.step_decay(0.3, 5, 0.5)(step - 1),
        optim.multi_step_decay(0.3, [5], 0.5),
    ],
)
def test_wrong_steps_are_caught(mutant: Any) -> None:
    expected = in_torch(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 5, 0.5))
    with pytest.raises(AssertionError):
        check(mutant, expected)
