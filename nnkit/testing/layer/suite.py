"""``check_layer``: everything that a layer promises, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nnkit.testing.layer import calls, form, keys, numbers
from nnkit.testing.layer.subject import LayerSubject
from nnkit.testing.report import Check, Report, run_checks
from nnkit.types import Layer

__all__ = ["CHECKS", "check_layer"]

CHECKS: tuple[Check[LayerSubject], ...] = (
    form.signature,
    form.init,
    form.paths,
    form.state,
    form.test_state,
    form.dtypes,
    keys.key_reuse,
    keys.randomness,
    form.shapes,
    calls.purity,
    calls.jit,
    calls.vmap,
    calls.one_compilation,
    calls.donation,
    calls.serialisation,
    numbers.examples,
    numbers.extremes,
    numbers.gradients,
    numbers.forward_mode,
    numbers.second_derivatives,
    calls.hyperparameters,
    calls.mesh,
)


def check_layer(
    layer: Layer,
    x: Any,
    *,
    random: bool | None = None,
    mixes_batch: bool = False,
    factory: Callable[..., Layer] | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    rtol: float = 1e-5,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Puts a layer to every check of ``nnkit.testing.layer`` and reports what was found.

    Args:
      layer: the layer.
      x: an input: an array, or a tuple, NamedTuple or dict of arrays whose first array has the batch
        axis first. Only floating leaves are cast, perturbed and differentiated. Small is quick.
      random: whether training draws random numbers; by default those that refuse to train without a
        key do.
      mixes_batch: whether an example's output in training depends on the others, as in batch_norm.
      factory: makes the layer from ``hyperparameters``, which are then traced and mapped over.
      hyperparameters: the numbers by name, ``{"rate": 0.3}``.
      rtol: how far two programs that sum in another order may part in float32.
      skip: checks to leave out, by title, each with the reason: ``{"finite differences": "rounds"}``.

    Returns:
      The report, which prints as a table.

    Raises:
      ConformanceError: with every check that failed: what was expected, what arrived, where, and
        the likely cause. Where ``init`` raises it is all that is told.
      TypeError: what is no Layer, or one of ``factory`` and ``hyperparameters`` without the other.

    >>> from nnkit import testing
    >>> report = testing.check_layer(layers.dense(2), jnp.linspace(-1, 1, 6).reshape(2, 3))
    >>> report.status("jit")
    'passed'
    """
    __tracebackhide__ = True
    subject = partial(
        LayerSubject,
        layer,
        x,
        random=random,
        mixes_batch=mixes_batch,
        factory=factory,
        hyperparameters=hyperparameters,
        rtol=rtol,
    )
    return run_checks(getattr(layer, "name", type(layer).__name__).rstrip("_"), subject, CHECKS, skip)
