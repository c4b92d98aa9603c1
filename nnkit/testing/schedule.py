"""``check_schedule``: what a function of the step number promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_close
from nnkit.testing.report import Check, NotApplicable, Report, check, fail, run_checks
from nnkit.testing.shared import check_pure
from nnkit.types import Schedule

__all__ = ["CHECKS", "ScheduleSubject", "check_schedule"]

STEPS = (*range(12), 50, 99, 100, 101, 999, 1000, 10**5, 2**31 - 1)


class ScheduleSubject:
    """A schedule and the steps to try it at; arguments as ``check_schedule``'s."""

    def __init__(
        self,
        schedule: Schedule,
        reference: Callable[[int], Any] | None = None,
        *,
        steps: Sequence[int] = STEPS,
        factory: Callable[..., Schedule] | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        rtol: float = 2e-6,
    ) -> None:
        if (factory is None) != (hyperparameters is None):
            raise TypeError(
                "factory= and hyperparameters= go together: factory(**hyperparameters) is a schedule"
            )
        self.schedule, self.reference, self.rtol = schedule, reference, rtol
        self.steps = jnp.asarray(np.array(steps, np.int32))
        self.factory, self.hyperparameters = factory, dict(hyperparameters or {})

    def values(self, call: Callable[[Any], Any]) -> np.ndarray:
        """Of ``call`` at every step, one by one."""
        return np.array([np.asarray(call(step)) for step in self.steps])

    @cached_property
    def compiled(self) -> Callable[[Any], Any]:
        return jax.jit(self.schedule)

    @cached_property
    def one_by_one(self) -> np.ndarray:
        return self.values(self.compiled)


schedule_check = partial(check, subject=ScheduleSubject)


@schedule_check("a scalar of the step")
def scalar(s: ScheduleSubject) -> None:
    """An int32 scalar in, traced or not, a floating scalar out."""
    got = jax.eval_shape(s.schedule, jax.ShapeDtypeStruct((), jnp.int32))
    spec = (jnp.shape(got), jnp.result_type(got))
    if spec[0] != () or not jnp.issubdtype(spec[1], jnp.floating):
        fail("the value's form", expected="a floating scalar", arrived=f"{spec[1]} of shape {spec[0]}",
             likely="integers are divided with // or an axis is added")  # fmt: skip


@schedule_check("purity")
def purity(s: ScheduleSubject) -> None:
    """The same step twice gives the same value: nothing is counted."""
    check_pure("the schedule", lambda step: jnp.asarray(s.schedule(step)), s.steps[3])


@schedule_check("jit")
def jit(s: ScheduleSubject) -> None:
    """Compiled and not compiled, the values agree at every step."""
    expected = s.values(s.schedule).astype(np.float32)
    check_close("jit(schedule)", {"values": expected}, {"values": s.one_by_one.astype(np.float32)},
                "the step is looked at in Python: use jnp.where(step < n, ...)", rtol=s.rtol)  # fmt: skip


@schedule_check("vmap")
def vmap(s: ScheduleSubject) -> None:
    """All steps at once give the values one by one."""
    mapped = jax.jit(jax.vmap(lambda step: jnp.asarray(s.schedule(step))))(s.steps)
    check_close("vmap(schedule)", {"values": s.one_by_one}, {"values": np.asarray(mapped)},
                "the step is looked at in Python: use jnp.where(step < n, ...)", rtol=s.rtol)  # fmt: skip


@schedule_check("kinds of step")
def kinds(s: ScheduleSubject) -> None:
    """A Python int and numpy's integers count as JAX's do."""
    for kind in (int, np.int32, np.int64, np.uint8):
        got = np.asarray(s.schedule(kind(7)), np.float32)
        check_close(f"the value at {kind.__name__}(7)", np.asarray(s.schedule(jnp.int32(7)), np.float32), got,
                    "convert the step first: jnp.asarray(step)", rtol=s.rtol)  # fmt: skip


@schedule_check("finite everywhere")
def finite(s: ScheduleSubject) -> None:
    """Neither NaN nor infinite at any step up to the largest int32."""
    wrong = ~np.isfinite(s.one_by_one)
    if wrong.any():
        step = int(np.asarray(s.steps)[np.argmax(wrong)])
        fail(f"the value at step {step}", expected="a finite number", arrived=s.one_by_one[np.argmax(wrong)],
             path=f"step {step}", likely="a division by 0 steps, a power of a negative number after the last step, "
             "or an int32 that overflows: clip the step first")  # fmt: skip


@schedule_check("hyper-parameters")
def hyperparameters(s: ScheduleSubject) -> str:
    """Made of traced numbers inside jit, the values are those of plain numbers."""
    if s.factory is None:
        raise NotApplicable("no factory= and hyperparameters= were given")
    factory = s.factory
    traced = {name: jnp.float32(v) for name, v in s.hyperparameters.items()}
    run = jax.jit(lambda numbers, step: jnp.asarray(factory(**numbers)(step)))
    try:
        got = s.values(lambda step: run(traced, step))
    except jax.errors.ConcretizationTypeError as error:
        fail(f"a traced {' or '.join(traced)}", expected="a schedule",
             arrived=f"{type(error).__name__}: {str(error).splitlines()[0]}",
             likely="a hyper-parameter is compared or converted in Python: use jnp.where")  # fmt: skip
    plain = s.values(jax.jit(factory(**s.hyperparameters)))
    check_close("the values of traced numbers", {"values": plain}, {"values": got}, rtol=max(s.rtol, 1e-5))
    return ", ".join(traced)


@schedule_check("reference")
def reference(s: ScheduleSubject) -> None:
    """The values are the reference's, within ``rtol`` of each or 4 float32 roundings of the largest."""
    if s.reference is None:
        raise NotApplicable("no reference was given")
    expected = np.array([float(s.reference(int(step))) for step in s.steps])
    off = np.abs(s.one_by_one - expected)
    wrong = ~(off <= np.maximum(s.rtol * np.abs(expected), 4 * 2.0**-24 * np.abs(expected).max()))
    if wrong.any():
        i = int(np.argmax(wrong))
        step = int(s.steps[i])
        near = [
            int(t) for t, v in zip(s.steps, expected, strict=True) if np.isclose(v, s.one_by_one[i], 1e-5)
        ]
        hint = f"it is the reference's value at step {near[0]}: the count is off" if near else ""
        fail(f"the value at step {step}", expected=f"{expected[i]:.8g} within {s.rtol:g} of it",
             arrived=f"{s.one_by_one[i]:.8g}; {wrong.sum()} of {len(expected)} steps differ",
             path=f"step {step}", likely=hint)  # fmt: skip


CHECKS: tuple[Check[ScheduleSubject], ...] = (
    scalar, purity, jit, vmap, kinds, finite, hyperparameters, reference,
)  # fmt: skip


def check_schedule(
    schedule: Schedule,
    reference: Callable[[int], Any] | None = None,
    *,
    steps: Sequence[int] = STEPS,
    factory: Callable[..., Schedule] | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    rtol: float = 2e-6,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Puts a schedule to every check of ``nnkit.testing.schedule``.

    Args:
      schedule: a function of the step number.
      reference: another one of a Python int, whose values it must have: a formula, or optax's.
      steps: where to look; by default the first twelve, some later ones and the largest int32.
      factory: makes the schedule from ``hyperparameters``, which are then traced.
      hyperparameters: the numbers by name.
      rtol: 2e-6 are 32 roundings of float32.
      skip: checks to leave out, by title, each with the reason.

    Raises:
      ConformanceError: with every check that failed.

    >>> from nnkit import testing
    >>> decay = optim.exponential_decay(0.1, 10, 0.5)
    >>> testing.check_schedule(decay, lambda step: 0.1 * 0.5 ** (step / 10)).status("reference")
    'passed'
    """
    __tracebackhide__ = True
    subject = partial(
        ScheduleSubject, schedule, reference, steps=steps, factory=factory,
        hyperparameters=hyperparameters, rtol=rtol,
    )  # fmt: skip
    return run_checks(getattr(schedule, "__name__", "the schedule"), subject, CHECKS, skip)
