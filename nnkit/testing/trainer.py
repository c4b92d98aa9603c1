"""``check_trainer``: what a whole training run as pure functions promises."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_close, check_form, check_same_bits
from nnkit.testing.report import Check, NotApplicable, Report, check, fail, run_checks
from nnkit.testing.shared import (
    check_buffers,
    check_no_nan,
    check_pure,
    check_saved,
    extreme,
    mesh_of,
    sharded,
    tiled,
)
from nnkit.testing.trees import batch_of, is_float, stack
from nnkit.types import Trainer, TrainState

__all__ = ["CHECKS", "TrainerSubject", "check_trainer"]


class TrainerSubject:
    """A trainer and a batch for it; arguments as ``check_trainer``'s."""

    def __init__(self, trainer: Trainer, batch: Any, *, x: Any = None, rtol: float = 1e-4):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"a trainer is checked, got {type(trainer).__name__}: pass a nnkit.Trainer")
        self.trainer, self.rtol = trainer, rtol
        self.batch = jax.tree.map(jnp.asarray, batch)
        self.x = self.batch[0] if x is None and isinstance(self.batch, tuple | list) else x
        if self.x is None:
            raise TypeError("x= is needed where batches are no pairs (x, y): what trainer.init takes")
        self.traces = 0

    def init(self, seed: int = 0) -> TrainState:
        return self.trainer.init(jax.random.key(seed), self.x)

    @cached_property
    def start(self) -> TrainState:
        return self.init()

    def step(self, ts: TrainState, batch: Any) -> dict[str, Any]:
        ts, metrics = self.trainer.step(ts, batch)
        return {"train_state": ts, "metrics": metrics}

    @cached_property
    def compiled(self) -> Any:
        def step(ts: TrainState, batch: Any) -> dict[str, Any]:
            self.traces += 1
            return self.step(ts, batch)

        return jax.jit(step)

    @cached_property
    def step_metrics(self) -> Any:
        return self.compiled(self.start, self.batch)["metrics"]

    @cached_property
    def evaluate(self) -> Any:
        return jax.jit(self.trainer.evaluate)

    @cached_property
    def after(self) -> TrainState:
        """The state after two steps."""
        ts = self.start
        for _ in range(2):
            ts = self.compiled(ts, self.batch)["train_state"]
        return ts


trainer_check = partial(check, subject=TrainerSubject)


@trainer_check("the train state")
def train_state(s: TrainerSubject) -> None:
    """``init`` gives a TrainState with step 0 and a typed key, the same bits for the same key."""
    if not isinstance(s.start, TrainState):
        fail("what init returns", expected="a TrainState", arrived=type(s.start).__name__)
    step, key = s.start.step, s.start.key
    if jnp.shape(step) != () or jnp.result_type(step) != jnp.int32 or int(step) != 0:
        fail(
            "the first step's number",
            expected="int32 0",
            arrived=f"{jnp.result_type(step)} {step}",
            path="step",
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        fail("the root key", expected="a typed key", arrived=key.dtype, path="key",
             likely="jax.random.key(seed), not PRNGKey")  # fmt: skip
    check_same_bits("init of the same key", s.start, s.init(), "init draws from something beside its key")


@trainer_check("a step")
def step(s: TrainerSubject) -> None:
    """A step keeps the state's form and the root key, and adds 1 to the number of steps."""
    found = jax.eval_shape(s.step, s.start, s.batch)["train_state"]
    check_form("the train state after a step", s.start, found,
               "a scan over steps cannot carry it: return params, state and opt_state in the dtypes they came in",
               weak=True)  # fmt: skip
    after = s.after
    if int(after.step) != 2:
        fail("the number of steps after two", expected=2, arrived=int(after.step), path="step",
             likely="step + 1 is not returned: randomness and schedules would stand still")  # fmt: skip
    check_same_bits("the root key after two steps", s.start.key, after.key,
                    "the key is split as the run goes: fold the step's number into a key that stays, so that a "
                    "run can be resumed at any step")  # fmt: skip
    pairs = zip(jax.tree.leaves(s.start.params), jax.tree.leaves(after.params), strict=True)
    if all(np.array_equal(a, b) for a, b in pairs):
        fail("the parameters after two steps", expected="other numbers", arrived="the same bits", path="params",
             likely="the updates are not applied, or no gradient reaches the parameters")  # fmt: skip


@trainer_check("metrics")
def metrics(s: TrainerSubject) -> None:
    """``step`` and ``evaluate`` return dicts of scalars with a finite ``loss``."""
    for name, found in (
        ("step", s.compiled(s.start, s.batch)["metrics"]),
        ("evaluate", s.trainer.evaluate(s.start, s.batch)),
    ):
        if not isinstance(found, dict) or "loss" not in found:
            arrived = sorted(found) if isinstance(found, dict) else type(found).__name__
            fail(f"the metrics of {name}", expected="a dict with 'loss'", arrived=arrived)
        for key, value in found.items():
            if jnp.shape(value) != ():
                fail(f"a metric of {name}", expected="one number", arrived=f"shape {jnp.shape(value)}", path=key,
                     likely="return the mean over the examples")  # fmt: skip
        if not np.isfinite(float(found["loss"])):
            fail(f"the loss of {name}", expected="a finite number", arrived=found["loss"], path="loss")


@trainer_check("purity")
def purity(s: TrainerSubject) -> None:
    """The same step twice gives the same bits, and neither state nor batch changes."""
    copied = jax.tree.map(lambda a: a, (s.start, s.batch))
    check_pure("step", s.step, *copied)
    check_pure("evaluate", s.trainer.evaluate, *copied)


@trainer_check("jit")
def jit(s: TrainerSubject) -> None:
    """A compiled step is the step, and evaluate compiled is evaluate."""
    check_close("jit(step)", s.step(s.start, s.batch), s.compiled(s.start, s.batch),
                "something beside the arguments enters while tracing: a clock, a counter, numpy's random numbers",
                rtol=s.rtol, atol=s.rtol)  # fmt: skip
    check_close("jit(evaluate)", s.trainer.evaluate(s.start, s.batch), s.evaluate(s.start, s.batch),
                "something beside the arguments enters while tracing", rtol=s.rtol, atol=s.rtol)  # fmt: skip


@trainer_check("vmap")
def vmap(s: TrainerSubject) -> None:
    """Two seeds at once equal one after the other."""
    run = lambda key: s.step(s.trainer.init(key, s.x), s.batch)
    keys = jax.random.split(jax.random.key(3), 2)
    check_close("vmap over two seeds", stack([jax.jit(run)(key) for key in keys]), jax.jit(jax.vmap(run))(keys),
                "an axis or a shape is taken by position: a stacked run has one axis more",
                rtol=s.rtol, atol=s.rtol)  # fmt: skip


@trainer_check("one compilation")
def one_compilation(s: TrainerSubject) -> None:
    """A jitted step is traced once."""
    ts = s.compiled(s.start, s.batch)["train_state"]
    before = s.traces
    s.compiled(s.compiled(ts, s.batch)["train_state"], s.batch)
    if s.traces != before:
        fail("a step compiles again", expected="1 trace", arrived=f"{1 + s.traces - before} traces",
             path="train_state", likely="a leaf changes its dtype or its weak type from step to step")  # fmt: skip


@trainer_check("donation")
def donation(s: TrainerSubject) -> None:
    """The train state may be donated to each step: every leaf is a buffer of its own."""
    check_buffers("the train state", s.init)


@trainer_check("serialisation")
def serialisation(s: TrainerSubject) -> None:
    """A run saved, loaded and continued is the run that was never stopped, to the bit."""
    loaded = check_saved("the train state", s.after)
    check_same_bits("the step after loading", s.compiled(s.after, s.batch), s.compiled(loaded, s.batch))


@trainer_check("key reuse")
def key_reuse(s: TrainerSubject) -> None:
    """No key is consumed twice in a step or in evaluate."""
    start = s.start  # made before keys are watched
    with jax.debug_key_reuse(True):
        for name, function in (("a step", s.step), ("evaluate", s.trainer.evaluate)):
            try:
                jax.jit(lambda ts, batch, f=function: f(ts, batch)).trace(start, s.batch)
            except jax.errors.KeyReuseError as error:
                fail(f"{name} uses a key twice", expected="each key consumed once",
                     arrived=f"KeyReuseError: {str(error).splitlines()[0]}", path="key",
                     likely="fold the step's number into the root key, then split")  # fmt: skip


@trainer_check("randomness")
def randomness(s: TrainerSubject) -> str:
    """Where the loss depends on the key, steps 0 and 1 draw other numbers from the same state."""
    loss = lambda ts: np.asarray(s.compiled(ts, s.batch)["metrics"]["loss"])
    if "loss" not in s.step_metrics:
        raise NotApplicable("the metrics of a step have no loss")
    first = loss(s.start)
    if np.array_equal(first, loss(s.start._replace(key=jax.random.key(12345))), equal_nan=True):
        raise NotApplicable("the loss of a step does not depend on the key")
    if np.array_equal(first, loss(s.start._replace(step=s.start.step + 1))):
        fail("the losses of step 0 and of step 1 from the same state", expected="two losses",
             arrived=f"{first} twice", path="key",
             likely="each step draws the same numbers, one dropout mask for ever: "
             "jax.random.fold_in(ts.key, ts.step)")  # fmt: skip
    return "another draw each step"


@trainer_check("what is carried")
def carried(s: TrainerSubject) -> None:
    """Statistics and moments move: two steps do not leave all numbers of state or opt_state as they were."""
    for part in ("state", "opt_state"):
        trees = (jax.tree.leaves(getattr(ts, part)) for ts in (s.start, s.after))
        # Scalars may be hyper-parameters.
        pairs = [(a, b) for a, b in zip(*trees, strict=True) if is_float(a) and jnp.ndim(a) and a.size]
        if pairs and all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            fail(f"{part} after two steps", expected="other numbers in one leaf at least",
                 arrived="the same bits in all", path=part,
                 likely=f"the step returns the {part} it got: put the new one into the train state; where it is a "
                 "table that stays, skip this check")  # fmt: skip


@trainer_check("extremes")
def extremes(s: TrainerSubject) -> None:
    """No NaN after a step, or from evaluate, on inputs of zeros or of a constant."""
    if not any(map(is_float, jax.tree.leaves(s.x))) or not isinstance(s.batch, tuple | list):
        raise NotApplicable("batches are no pairs (x, y) with floating x")
    for name in ("zeros", "constant"):
        batch = (extreme(s.batch[0], name), s.batch[1])
        check_no_nan(f"a step on inputs of {name}", s.compiled(s.start, batch))
        check_no_nan(f"evaluate on inputs of {name}", s.evaluate(s.start, batch))


@trainer_check("mesh")
def mesh(s: TrainerSubject) -> str:
    """A step with the batch split over up to 8 devices is the step on one."""
    devices = mesh_of()
    batch = tiled(s.batch, devices.size)
    spread = sharded(s.start, devices, None), sharded(batch, devices, batch_of(batch))
    run = jax.jit(s.step)
    check_close(f"a step on {devices.size} devices", run(s.start, batch), run(*spread),
                "the loss or a statistic is made of one device's part of the batch",
                rtol=s.rtol, atol=s.rtol)  # fmt: skip
    return f"{devices.size} devices"


CHECKS: tuple[Check[TrainerSubject], ...] = (
    train_state, step, carried, metrics, purity, key_reuse, randomness, jit, vmap, one_compilation, donation,
    serialisation, extremes, mesh,
)  # fmt: skip


def check_trainer(
    trainer: Trainer,
    batch: Any,
    *,
    x: Any = None,
    rtol: float = 1e-4,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Puts a training run to every check of ``nnkit.testing.trainer``.

    Args:
      trainer: made by ``train.trainer`` or by hand.
      batch: what a step takes, small.
      x: what ``trainer.init`` takes; by default the first of the batch.
      rtol: how far two programs that sum in another order may part, relative to the largest number
        of a leaf too: an optimizer such as Adam makes a difference of 1e-7 in a small gradient larger.
      skip: checks to leave out, by title, each with the reason.

    Raises:
      ConformanceError: with every check that failed.

    >>> from nnkit import testing
    >>> run = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> testing.check_trainer(run, (jnp.ones((4, 2)), jnp.ones((4, 1)))).status("serialisation")
    'passed'
    """
    __tracebackhide__ = True
    subject = partial(TrainerSubject, trainer, batch, x=x, rtol=rtol)
    return run_checks("the trainer", subject, CHECKS, skip)
