"""The four types that everything else is made of, and the protocols of their functions.

A layer, an optimizer and a training run are each a NamedTuple of pure functions over pytrees.
Learn one and you know three: ``init`` makes the numbers, the other functions take the numbers
and return new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

__all__ = [
    "ApplyFn",
    "Array",
    "CheckFn",
    "EvaluateFn",
    "GradientTransformation",
    "InitFn",
    "Initializer",
    "Layer",
    "LossFn",
    "Objective",
    "Params",
    "PyTree",
    "ScalarOrSchedule",
    "Schedule",
    "Spec",
    "State",
    "StepFn",
    "TrainState",
    "Trainer",
    "TrainerInitFn",
    "TransformInitFn",
    "TransformUpdateFn",
]

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = Mapping[str, Any]
"""Nested dicts of arrays, ``{"dense_0": {"kernel": ..., "bias": ...}}``."""
State: TypeAlias = Mapping[str, Any]
"""What a layer carries from call to call beside its parameters, in the same nested form."""
Spec: TypeAlias = Any
"""What stands for an input where only its shape and dtype matter: an array, a
``jax.ShapeDtypeStruct``, or a tuple or dict of them."""


class InitFn(Protocol):
    """``init(key, x) -> (params, state)``: the layer's numbers for inputs shaped like ``x``.

    ``x`` is an array or a ``jax.ShapeDtypeStruct`` with a leading batch axis; its values are
    never looked at.
    """

    def __call__(self, key: Array, x: Spec, /) -> tuple[Params, State]: ...


class ApplyFn(Protocol):
    """``apply(params, state, x, *, key=None, train) -> (y, state)``: the forward pass.

    Args:
      params: what ``init`` returned, or a tree of the same structure.
      state: likewise; the returned state has the same structure, shapes and dtypes.
      x: the input, batch first, channels last.
      key: a typed PRNG key; needed only where the layer draws random numbers in training.
      train: the mode. Static, and always spelled out: training and inference never mix silently.
    """

    def __call__(
        self, params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]: ...


class Layer(NamedTuple):
    """A layer, a block or a whole network: two pure functions and a name.

    Attributes:
      init: see :class:`InitFn`.
      apply: see :class:`ApplyFn`.
      name: the layer's place in paths, errors and tables. A name that ends in ``_`` is a kind,
        which the enclosing combinator completes by counting (``dense_`` becomes ``dense_0``,
        ``dense_1``, ...); any other name is used as it is.
    """

    init: InitFn
    apply: ApplyFn
    name: str = "layer_"


class TransformInitFn(Protocol):
    """``init(params) -> opt_state``."""

    def __call__(self, params: PyTree, /) -> PyTree: ...


class TransformUpdateFn(Protocol):
    """``update(updates, opt_state, params=None, **extra) -> (updates, opt_state)``.

    ``updates`` come in as gradients and go out as what is to be added to the parameters.
    """

    def __call__(
        self, updates: PyTree, state: PyTree, /, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]: ...


class GradientTransformation(NamedTuple):
    """An optimizer or a part of one, in optax's protocol.

    Anything with these two functions is accepted wherever nnkit takes an optimizer, and
    ``optax.chain`` accepts nnkit's.
    """

    init: TransformInitFn
    update: TransformUpdateFn


class TrainState(NamedTuple):
    """All that a training run is at one moment; save this pytree and the run can go on.

    Attributes:
      params: the parameters.
      state: the layers' state (running statistics, ...).
      opt_state: the optimizer's state.
      key: the run's root key. It never changes: the key of step ``n`` is ``fold_in(key, n)``.
      step: how many steps were taken, an int32 scalar.
      stopping: what early stopping remembers from epoch to epoch, the best parameters among it; ()
        without early stopping. Steps hand it on as it is.
    """

    params: Params
    state: State
    opt_state: PyTree
    key: Array
    step: Array
    stopping: PyTree = ()


class TrainerInitFn(Protocol):
    """``init(key, x) -> TrainState``; ``x`` is an example input, an array or a spec."""

    def __call__(self, key: Array, x: Spec, /) -> TrainState: ...


class StepFn(Protocol):
    """``step(train_state, batch) -> (train_state, metrics)``: one update of the parameters."""

    def __call__(self, train_state: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]: ...


class EvaluateFn(Protocol):
    """``evaluate(train_state, batch) -> metrics``, the means over the examples of the batch."""

    def __call__(self, train_state: TrainState, batch: Any, /) -> dict[str, Array]: ...


class CheckFn(Protocol):
    """``check(train_state, data)``: raises where host arrays are no data for this run."""

    def __call__(self, train_state: TrainState, data: Any, /) -> None: ...


def _accept(train_state: TrainState, data: Any, /) -> None:
    """The check of a trainer that knows nothing of its data."""


class Trainer(NamedTuple):
    """A whole training run as pure functions.

    Attributes:
      init: see :class:`TrainerInitFn`.
      step: see :class:`StepFn`.
      evaluate: see :class:`EvaluateFn`.
      check: what a training loop calls on the host before it starts, since compiled code cannot
        raise: whether the values of the targets suit the loss.
      skipping: the step that leaves everything but ``step`` as it was where the loss or a gradient is
        not finite, and says so in the metric ``skipped`` (0 or 1); None where the trainer has none.
    """

    init: TrainerInitFn
    step: StepFn
    evaluate: EvaluateFn
    check: CheckFn = _accept
    skipping: StepFn | None = None


class Objective(Protocol):
    """``objective(params, state, batch, *, key, train) -> (loss, (state, metrics))``.

    The most general thing that a trainer minimises: any scalar of the parameters.
    """

    def __call__(
        self, params: Any, state: Any, batch: Any, *, key: Array | None, train: bool
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]: ...


class LossFn(Protocol):
    """``loss(predictions, targets) -> (batch,)``: one value for each example."""

    def __call__(self, predictions: Any, targets: Any, /) -> Array: ...


class Initializer(Protocol):
    """``initializer(key, shape, dtype) -> array``."""

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any = ..., /) -> Array: ...


Schedule: TypeAlias = Callable[[Any], Any]
"""``schedule(step) -> value``; ``step`` is an int32 scalar and may be traced."""
ScalarOrSchedule: TypeAlias = float | Array | Schedule
