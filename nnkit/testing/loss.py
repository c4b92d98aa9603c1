"""``check_loss``: what a loss or a metric of (predictions, targets) promises."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_close, check_form, check_same_bits
from nnkit.testing.derivatives import Derivatives
from nnkit.testing.report import Check, NotApplicable, Report, check, fail, run_checks
from nnkit.testing.shared import EXTREMES, FAST, check_no_nan, check_pure, extreme
from nnkit.testing.trees import cast, is_float, map_floats, sum_of_sines
from nnkit.types import LossFn

__all__ = ["CHECKS", "LossSubject", "check_loss"]


class LossSubject:
    """A loss with predictions and targets; arguments as ``check_loss``'s."""

    def __init__(self, loss: LossFn, predictions: Any = None, targets: Any = None, *, rtol: float = 1e-5):
        if (predictions is None) != (targets is None):
            raise TypeError("predictions= and targets= go together")
        for name, given in (("predictions", predictions), ("targets", targets)):
            if given is not None and not jax.tree_util.all_leaves([given]):
                raise TypeError(
                    f"{name} is one array, got {type(given).__name__}: make it one, or check a function of one array "
                    "that puts the others in"
                )
        rng = np.random.default_rng(0)
        draw = lambda: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
        self.loss, self.rtol = loss, rtol
        self.predictions = draw() if predictions is None else jnp.asarray(predictions)
        self.targets = draw() if targets is None else jnp.asarray(targets)

    @cached_property
    def compiled(self) -> Any:
        return jax.jit(self.loss)

    @cached_property
    def values(self) -> jax.Array:
        return self.loss(self.predictions, self.targets)

    @cached_property
    def derivatives(self) -> Derivatives:
        sizes = self.values

        def value(tree: Any) -> jax.Array:
            values = self.loss(tree["predictions"], tree["targets"])
            return sum_of_sines(values, sizes)

        def tree() -> Any:
            return {"predictions": self.predictions, "targets": cast(self.targets, jnp.float64)}

        return Derivatives(value, tree, held={"targets"})


loss_check = partial(check, subject=LossSubject)


@loss_check("one value an example")
def shape(s: LossSubject) -> None:
    """The values have the leading axes of the predictions, the batch's at least; nothing is averaged."""
    got, whole = jnp.shape(s.values), s.predictions.shape
    if not got or got != whole[: len(got)]:
        fail("the values' shape", expected=f"{whole[:1]}, or more of {whole}'s leading axes",
             arrived=got, path="values",
             likely="a mean over the batch hides single examples, and an outer difference makes (n, n): return "
             "one value an example and leave the mean to the trainer")  # fmt: skip


@loss_check("shapes as eval_shape says")
def shapes(s: LossSubject) -> None:
    """Traced and not traced, shape and dtype agree."""
    check_form("the values", jax.eval_shape(s.loss, s.predictions, s.targets), s.values)


@loss_check("purity")
def purity(s: LossSubject) -> None:
    """The same call twice gives the same bits."""
    check_pure("the loss", s.loss, s.predictions, s.targets)


@loss_check("jit")
def jit(s: LossSubject) -> None:
    """Compiled and not compiled, the values agree."""
    check_close("jit(loss)", s.values, s.compiled(s.predictions, s.targets),
                "something beside the arguments enters while tracing", rtol=s.rtol)  # fmt: skip


@loss_check("vmap")
def vmap(s: LossSubject) -> None:
    """Mapped over batches of one example, it gives what it gives for the batch."""
    one = jax.vmap(lambda p, t: s.loss(p[None], t[None])[0])
    check_close("vmap(loss) over single examples", s.values, one(s.predictions, s.targets),
                "an axis is counted from the front or the batch's size enters", rtol=s.rtol)  # fmt: skip


@loss_check("independence of examples")
def examples(s: LossSubject) -> None:
    """Another first example leaves the values of the others as they are, to the bit."""
    moved = s.predictions.at[0].set(2 * s.predictions[-1] + 1)
    before, after = (s.compiled(p, s.targets)[1:] for p in (s.predictions, moved))
    check_same_bits("the values of the other examples, after the first was exchanged,",
                    {"values[1:]": before}, {"values[1:]": after},
                    "a mean, a maximum or a normalisation runs over the batch axis")  # fmt: skip


@loss_check("broadcasting")
def broadcasting(s: LossSubject) -> None:
    """Predictions (n, 1) against targets (n,) are refused; they would make an (n, n) matrix."""
    if s.predictions.shape != s.targets.shape or s.predictions.ndim < 2:
        raise NotApplicable("predictions and targets have not one shape of two axes or more")
    flat = s.predictions.reshape(-1)
    for p, t in ((flat[:, None], flat), (flat, flat[:, None])):
        try:
            values = s.loss(p, t)
        except (TypeError, ValueError):
            continue
        fail(f"predictions of shape {p.shape} against targets of shape {t.shape}", expected="a ValueError",
             arrived=f"values of shape {jnp.shape(values)}", path="values",
             likely="the two broadcast against each other: compare their shapes and raise")  # fmt: skip


@loss_check("dtypes")
def dtypes(s: LossSubject) -> None:
    """Half precision gives values of float32 or its own, float64 of float64."""
    for dtype, allowed in (
        (jnp.bfloat16, (jnp.bfloat16, jnp.float32)),
        (jnp.float16, (jnp.float16, jnp.float32)),
        (jnp.float32, (jnp.float32,)),
        (jnp.float64, (jnp.float64,)),
    ):
        with jax.enable_x64(dtype == jnp.float64):
            like = lambda tree, d=dtype: map_floats(lambda a: jax.ShapeDtypeStruct(a.shape, d), tree)
            got = jax.eval_shape(s.loss, like(s.predictions), like(s.targets)).dtype
            if got not in [jnp.dtype(d) for d in allowed]:
                fail(f"the values for {jnp.dtype(dtype)} predictions",
                     expected=" or ".join(str(jnp.dtype(d)) for d in allowed), arrived=got, path="values",
                     likely="a constant widens or narrows them: jnp.asarray(c, x.dtype)")  # fmt: skip


@loss_check("extremes")
def extremes(s: LossSubject) -> None:
    """No NaN in values or gradients for predictions of zeros, a constant, 1e-30 and 1e4."""

    def run(predictions: Any) -> Any:
        def total(p: Any) -> Any:
            values = s.loss(p, s.targets)
            return jnp.sum(values), values

        gradient, values = jax.grad(total, has_aux=True)(predictions)
        return {"values": values, "gradient": gradient}

    if not is_float(s.predictions):
        raise NotApplicable("the predictions are not floating")
    compiled = jax.jit(run, compiler_options=FAST)
    for name in EXTREMES:
        check_no_nan(f"predictions of {name} ({EXTREMES[name]:g})", compiled(extreme(s.predictions, name)))


@loss_check("finite differences")
def gradients(s: LossSubject) -> None:
    """The gradient with respect to the predictions against central differences in float64."""
    s.derivatives.check_reverse("a hand-written derivative rule is wrong, or a stop_gradient hides a term")


@loss_check("forward mode")
def forward_mode(s: LossSubject) -> None:
    """The same in forward mode."""
    s.derivatives.check_forward("a jax.custom_jvp rule is wrong or leaves an argument's tangent out")


@loss_check("second derivatives")
def second_derivatives(s: LossSubject) -> None:
    """The gradient's gradient, which Newton's method and curvature estimates take."""
    s.derivatives.check_second("a derivative rule is not differentiable itself, or jnp.abs hides a curvature")


CHECKS: tuple[Check[LossSubject], ...] = (
    shape, shapes, purity, jit, vmap, examples, broadcasting, dtypes, extremes,
    gradients, forward_mode, second_derivatives,
)  # fmt: skip


def check_loss(
    loss: LossFn,
    predictions: Any = None,
    targets: Any = None,
    *,
    rtol: float = 1e-5,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Puts a loss of (predictions, targets) to every check of ``nnkit.testing.loss``.

    Args:
      loss: gives one value an example.
      predictions, targets: by default normal numbers of shape (6, 4); pass integer labels or
        probabilities where the loss takes those.
      rtol: how far two programs that sum in another order may part in float32.
      skip: checks to leave out, by title, each with the reason.

    Raises:
      ConformanceError: with every check that failed.

    >>> from nnkit import testing
    >>> testing.check_loss(losses.huber).status("second derivatives")
    'passed'
    """
    __tracebackhide__ = True
    subject = partial(LossSubject, loss, predictions, targets, rtol=rtol)
    return run_checks(getattr(loss, "__name__", "the loss"), subject, CHECKS, skip)
