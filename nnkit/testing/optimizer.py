"""``check_optimizer``: what a transformation of gradients promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.testing.compare import check_close, check_form
from nnkit.testing.equivalent import assert_equivalent, of_transformation
from nnkit.testing.optimizer_subject import OptimizerSubject
from nnkit.testing.report import Check, NotApplicable, Report, check, fail, run_checks
from nnkit.testing.shared import EXTREMES, check_buffers, check_no_nan, check_pure, check_saved, extreme
from nnkit.testing.trees import (
    map_floats,
    random_tree,
    rough_gradients,
    stack,
)
from nnkit.types import GradientTransformation, PyTree

__all__ = ["CHECKS", "OptimizerSubject", "check_optimizer"]


optimizer_check = partial(check, subject=OptimizerSubject)


@optimizer_check("signature")
def signature(s: OptimizerSubject) -> None:
    """``init(params)`` and ``update(updates, state, params=None, **extra)``, optax's protocol."""
    for name in ("init", "update"):
        if not callable(getattr(s.tx, name, None)):
            fail("the protocol", expected=f"a function .{name}", arrived=type(s.tx).__name__, path=name)
    try:
        inspect.signature(s.tx.update).bind({}, {}, {})
    except TypeError as error:
        fail(
            "update's parameters",
            expected="update(updates, state, params=None)",
            arrived=error,
            path="update",
        )


@optimizer_check("shapes as eval_shape says")
def shapes(s: OptimizerSubject) -> None:
    """Updates have the parameters' form, the new state has the old one's, traced or not."""
    check_form("the updates", s.params, s.step(s.params, s.state, s.grads[0])["updates"],
               "updates are added to the parameters: cast them to the parameters' dtypes")  # fmt: skip
    likely = "a scan cannot carry a state that changes its form: cast to the dtypes that init made"
    check_form("the new state", s.state, jax.eval_shape(s.step, s.params, s.state, s.grads[0])["state"], likely,
               weak=True)  # fmt: skip


@optimizer_check("purity")
def purity(s: OptimizerSubject) -> None:
    """The same call twice gives the same bits, and nothing that goes in changes."""
    copied = jax.tree.map(lambda a: a, (s.params, s.state, s.grads[0]))
    check_pure("update", s.step, *copied)
    check_pure("init", s.tx.init, copied[0])


@optimizer_check("jit")
def jit(s: OptimizerSubject) -> None:
    """Two steps compiled equal two steps not compiled, and all steps in one scan the loop."""
    eager = found = {"params": s.params, "state": s.state}
    for grads in s.grads[:2]:
        eager = s.step(eager["params"], eager["state"], grads)
        found = s.compiled(found["params"], found["state"], grads)
    likely = "something beside the arguments enters while tracing: a counter or a clock in Python"
    check_close("a compiled step", eager, found, likely, rtol=s.rtol)
    scan = jax.jit(partial(s.scanned, s.tx))(s.params, stack(s.grads))
    check_close("all steps in one scan", s.trajectory, scan, likely, rtol=s.rtol)


@optimizer_check("vmap")
def vmap(s: OptimizerSubject) -> None:
    """Two populations at once equal one after the other."""
    members = [
        (scaled(s.params), scaled(stack(s.grads)))
        for f in (0.5, 1.0)
        for scaled in [partial(map_floats, lambda a, f=f: a * jnp.asarray(f, a.dtype))]
    ]
    run = partial(s.scanned, s.tx)
    one = jax.jit(run)
    check_close(
        "vmap over two populations",
        stack([one(*member) for member in members]),
        jax.jit(jax.vmap(run))(*stack(members)),
        "a batching rule of its own is wrong (jax.custom_batching), or numbers of one member reach another's",
        rtol=s.rtol,
    )


@optimizer_check("one compilation")
def one_compilation(s: OptimizerSubject) -> None:
    """A jitted step is traced once, whatever the step number."""
    s.compiled(s.params, s.state, s.grads[0])
    before, found = s.traces, {"params": s.params, "state": s.state}
    for grads in s.grads:
        found = s.compiled(found["params"], found["state"], grads)
    if s.traces != before:
        fail("a step that carries the state compiles again", expected="1 trace",
             arrived=f"{1 + s.traces - before} traces", path="state",
             likely="a leaf changes its dtype or its weak type: give init's constants a dtype")  # fmt: skip


@optimizer_check("donation")
def donation(s: OptimizerSubject) -> None:
    """Parameters and state may both be donated: no leaf of the state is a parameter or another leaf."""

    def make() -> PyTree:
        params = jax.tree.map(lambda a: jnp.array(a, copy=True), s.params)
        return {"params": params, "state": s.tx.init(params)}

    check_buffers("parameters and optimizer state", make)


@optimizer_check("serialisation")
def serialisation(s: OptimizerSubject) -> None:
    """A run saved after its steps and loaded goes on as if nothing had happened, to the bit."""
    loaded = check_saved("the optimizer's state", s.trajectory["state"])
    before, after = (s.compiled(s.params, state, s.grads[0]) for state in (s.trajectory["state"], loaded))
    check_close("the step after loading", before, after, rtol=0.0, atol=0.0)


@optimizer_check("dtypes")
def dtypes(s: OptimizerSubject) -> None:
    """Updates have the parameters' dtype, half precision and float64 too."""
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            like = lambda tree, d=dtype: map_floats(lambda a: jax.ShapeDtypeStruct(a.shape, d), tree)
            params, grads = like(s.params), like(s.grads[0])
            before = jax.eval_shape(s.tx.init, params)
            updates, after = jax.eval_shape(lambda g, st, p: s.tx.update(g, st, p), grads, before, params)
            what = f"for {jnp.dtype(dtype)} parameters"
            check_form(f"the updates {what}", params, updates, "cast the updates to the parameters' dtype")
            check_form(f"the state {what}", before, after, "cast the new state to the old one's dtypes")


@optimizer_check("extremes")
def extremes(s: OptimizerSubject) -> None:
    """No NaN after two steps of gradients that are zeros, a constant, 1e-30 and 1e4."""
    for name in EXTREMES:
        found = {"params": s.params, "state": s.state}
        for _ in range(2):
            found = s.compiled(found["params"], found["state"], extreme(s.grads[0], name))
        check_no_nan(f"after gradients of {name} ({EXTREMES[name]:g})", found)


@optimizer_check("finite differences")
def gradients(s: OptimizerSubject) -> None:
    """The derivative of a short run with respect to parameters and gradients."""
    s.derivatives.check_reverse("a stop_gradient or a hand-written rule hides a dependence of the step")


@optimizer_check("forward mode")
def forward_mode(s: OptimizerSubject) -> None:
    """The same in forward mode."""
    s.derivatives.check_forward("a jax.custom_jvp rule is wrong or leaves an argument's tangent out")


@optimizer_check("second derivatives")
def second_derivatives(s: OptimizerSubject) -> None:
    """The derivative's derivative."""
    s.derivatives.check_second("a hand-written rule is not differentiable itself")


@optimizer_check("hyper-parameters")
def hyperparameters(s: OptimizerSubject) -> str:
    """Made of traced numbers inside jit, a run equals that of plain numbers, and maps over a grid."""
    if s.factory is None:
        raise NotApplicable("no factory= and hyperparameters= were given")
    factory, grads = s.factory, stack(s.grads)

    def run(numbers: Mapping[str, Any]) -> PyTree:
        return s.scanned(factory(**numbers), s.params, grads)

    traced = {name: jnp.float32(value) for name, value in s.hyperparameters.items()}
    try:
        once = jax.jit(run)(traced)
        mapped = jax.jit(jax.vmap(run))({name: jnp.stack([v, v]) for name, v in traced.items()})
    except jax.errors.ConcretizationTypeError as error:
        fail(
            f"a traced {' or '.join(traced)}",
            expected="an optimizer",
            arrived=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            likely="a hyper-parameter is compared or converted in Python: use jnp.where",
        )
    # 1 - b2 of the float32 0.999 is 1.3e-5 off 0.001.
    plain = jax.jit(lambda: run(s.hyperparameters))()
    what = f"the run with traced {', '.join(traced)}"
    check_close(what, plain, once, rtol=max(s.rtol, 1e-4), atol=1e-4)
    check_close(f"{what} under vmap", stack([once, once]), mapped, rtol=s.rtol)
    return ", ".join(traced)


@optimizer_check("reference")
def reference(s: OptimizerSubject) -> str:
    """Each step from the reference's own state gives its update and its next state."""
    if s.reference is None:
        raise NotApplicable("no reference was given")
    params, grads = (s.params, s.grads) if s.given is not None else (random_tree(), rough_gradients(steps=50))
    found = assert_equivalent(
        of_transformation(s.tx),
        of_transformation(s.reference, strict=False),
        params,
        grads,
        max_ulps=s.max_ulps,
        from_theirs=True,
    )
    return f"at most {found.ulps} ulp"


CHECKS: tuple[Check[OptimizerSubject], ...] = (
    signature, shapes, dtypes, purity, jit, vmap, one_compilation, donation, serialisation, extremes,
    gradients, forward_mode, second_derivatives, hyperparameters, reference,
)  # fmt: skip


def check_optimizer(
    transformation: GradientTransformation,
    reference: Any = None,
    *,
    params: PyTree = None,
    grads: Sequence[PyTree] | None = None,
    max_ulps: int = 2,
    factory: Callable[..., Any] | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    rtol: float = 1e-5,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Puts an optimizer, or a part of one, to every check of ``nnkit.testing.optimizer``.

    Args:
      transformation: nnkit's, optax's or one's own; anything with ``init`` and ``update``.
      reference: another that it must equal within ``max_ulps`` at every step, from each of the
        reference's states, over 50 rough gradients; their states must have equally many leaves.
      params: parameters to try it on, where it suits not any tree; by default nested, with scalar,
        empty and None leaves.
      grads: with ``params``, a few gradients of their form.
      max_ulps: see ``reference``.
      factory: makes the optimizer of ``hyperparameters``, which are then traced and mapped over.
      hyperparameters: the numbers by name, ``{"learning_rate": 0.1}``.
      rtol: how far two programs that sum in another order may part in float32.
      skip: checks to leave out, by title, each with the reason.

    Raises:
      ConformanceError: with every check that failed.

    >>> from nnkit import testing
    >>> report = testing.check_optimizer(optim.sgd(0.1, 0.9), factory=optim.sgd,
    ...                                  hyperparameters={"learning_rate": 0.1, "momentum": 0.9})
    >>> report.status("donation"), report.status("reference")
    ('passed', 'not applied')
    """
    __tracebackhide__ = True
    subject = partial(
        OptimizerSubject,
        transformation,
        reference,
        params=params,
        grads=grads,
        max_ulps=max_ulps,
        factory=factory,
        hyperparameters=hyperparameters,
        rtol=rtol,
    )
    return run_checks("the optimizer", subject, CHECKS, skip)
