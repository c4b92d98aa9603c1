"""Gradients gathered over several small batches for one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nnkit.optim.combine import tolerant
from nnkit.optim.conditional import check_count, update_if
from nnkit.optim.leafwise import check_params, check_state, filled, leafwise
from nnkit.optim.scalars import Scalar, as_scalar, check_dtype, increment
from nnkit.tree import sum_of_squares
from nnkit.types import GradientTransformation, PyTree

__all__ = [
    "MultiSteps",
    "MultiStepsState",
    "ShouldSkipUpdateFunction",
    "skip_large_updates",
    "skip_not_finite",
]


class MultiStepsState(NamedTuple):
    """What :class:`MultiSteps` has gathered.

    Attributes:
      mini_step: how many gradients, an int32 scalar.
      gradient_step: how many steps of the optimizer there were, an int32 scalar.
      inner_opt_state: the optimizer's state.
      acc_grads: the gradients' mean or sum so far.
      skip_state: what ``should_skip_update_fn`` told at the last call.
    """

    mini_step: Any
    gradient_step: Any
    inner_opt_state: PyTree
    acc_grads: PyTree
    skip_state: PyTree = ()


class ShouldSkipUpdateFunction(Protocol):
    """``should_skip(updates, gradient_step, params) -> (skip, skip_state)``.

    ``skip`` is a bool scalar, ``skip_state`` any tree of arrays of the same form every time.
    """

    def __call__(
        self, updates: PyTree, gradient_step: Array, params: PyTree | None, /
    ) -> tuple[Array, PyTree]: ...


class MultiSteps:
    """An optimizer that steps once in k calls, with the mean of k gradients (optax's ``MultiSteps``).

    With losses that are means over batches of one size this is the step of the k batches taken as one.
    The other calls return zeros. ``init`` and ``update`` are as of any transformation; what takes
    functions wants :meth:`gradient_transformation`.

    Further arguments of a call go to the optimizer if it is the one that steps. The optimizer is not
    run in other calls: what it would make of half-gathered gradients is never seen, and an inf or NaN
    ends with its step. In optax it turns the zeros and the next sum into NaN.

    Args:
      opt: the optimizer, nnkit's or optax's.
      every_k_schedule: k, a whole number of at least 1, or a function of the number of steps so far
        that gives it. A function's value below 1 counts as 1.
      use_grad_mean: whether the optimizer gets the gradients' mean, or their sum.
      should_skip_update_fn: says of each gradient whether it is left out, as if the call had not been:
        :func:`skip_not_finite`, ``functools.partial(skip_large_updates, max_squared_norm=100.0)``, or a
        function like them.
      accumulator_dtype: the dtype of the mean or sum. That of float64 and complex parameters is their
        own, since it would lose digits or parts, which it does in optax.

    Raises:
      TypeError: for an opt that is no transformation, a k that is neither a whole number nor a function;
        at an update, for a should_skip_update_fn that does not say a bool.
      ValueError: for a k below 1.

    >>> optimizer = optim.MultiSteps(optim.sgd(1.0), every_k_schedule=2)
    >>> params = {"w": jnp.array(0.0)}
    >>> opt_state = optimizer.init(params)
    >>> for grad in (1.0, 3.0):
    ...     updates, opt_state = optimizer.update({"w": jnp.array(grad)}, opt_state, params)
    ...     print(float(updates["w"]), bool(optimizer.has_updated(opt_state)))
    0.0 False
    -2.0 True
    """

    def __init__(
        self,
        opt: GradientTransformation,
        every_k_schedule: int | Array | Callable[[Array], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: ShouldSkipUpdateFunction | None = None,
        accumulator_dtype: Any = jnp.float32,
    ):
        self._opt = tolerant("MultiSteps: opt", opt)
        if callable(every_k_schedule):
            self._k = every_k_schedule
        else:
            k = check_count(every_k_schedule, "every_k_schedule", 1)
            self._k = lambda step: k
        self._use_grad_mean = use_grad_mean
        self._should_skip = should_skip_update_fn or (lambda updates, step, params: (jnp.array(False), ()))
        self._accumulator_dtype = check_dtype(accumulator_dtype, "accumulator_dtype")

    @property
    def inner_opt(self) -> GradientTransformation:
        """The optimizer that makes the steps."""
        return self._opt

    def init(self, params: PyTree) -> MultiStepsState:
        """The state before the first gradient."""
        check_params("MultiSteps", params)
        like = jax.tree.map(lambda p: jnp.zeros_like(p, self._dtype(p)), params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MultiStepsState(
            mini_step=jnp.zeros([], jnp.int32),  # not the buffer of gradient_step: both may be donated
            gradient_step=jnp.zeros([], jnp.int32),
            inner_opt_state=self._opt.init(params),
            acc_grads=filled(like),
            skip_state=self._should_skip(zeros, jnp.zeros([], jnp.int32), params)[1],
        )

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MultiStepsState]:
        """Gathers the gradients, and makes a step of every k of them."""
        state = check_state("MultiSteps", state, MultiStepsState)
        skip, skip_state = self._should_skip(updates, state.gradient_step, params)
        if jnp.shape(skip) != () or jnp.result_type(skip) != jnp.bool_:
            raise TypeError(
                "should_skip_update_fn must return a bool scalar first, got "
                f"{jnp.result_type(skip)} of shape {jnp.shape(skip)}"
            )
        gathered = increment(state.mini_step)
        number = gathered.astype(jnp.float32)

        def leaf(u: Array, acc: Array) -> tuple[Array, Array]:
            # The mean as a running one: a sum of gradients may overflow.
            new = acc + (u - acc) / number if self._use_grad_mean else acc + u
            return new.astype(u.dtype), jnp.where(skip, acc, new)

        trees = {"updates": updates}, {}, {"acc_grads": state.acc_grads}
        gradients, acc = leafwise("MultiSteps", leaf, *trees)
        with jax.numpy_dtype_promotion("standard"):  # a schedule may give k in any dtype
            emit = (gathered >= self._k(state.gradient_step)) & jnp.logical_not(skip)
        updates, inner = update_if(emit, self._opt, gradients, state.inner_opt_state, params, extra_args)
        return updates, state._replace(
            mini_step=jnp.where(emit, 0, jnp.where(skip, state.mini_step, gathered)),
            gradient_step=jnp.where(emit, increment(state.gradient_step), state.gradient_step),
            inner_opt_state=inner,
            acc_grads=jax.tree.map(lambda a: jnp.where(emit, 0, a), acc),
            skip_state=skip_state,
        )

    def has_updated(self, state: MultiStepsState) -> Bool[Array, ""]:
        """Whether the call that returned this state made a step, or none was made since one."""
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> GradientTransformation:
        """This optimizer as its two functions."""
        return GradientTransformation(self.init, self.update)

    def _dtype(self, p: Any) -> Any:
        dtype = jnp.result_type(p)
        exact = jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64
        return dtype if exact else self._accumulator_dtype


def skip_not_finite(
    updates: PyTree, gradient_step: Int[Array, ""], params: PyTree | None
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """Whether there is an inf or a NaN among the updates (optax's ``skip_not_finite``).

    Returns:
      That, and a dict of it, ``should_skip``, and of how many there are, ``num_not_finite``.

    >>> skip, told = optim.skip_not_finite({"w": jnp.array([1.0, jnp.nan, jnp.inf])}, jnp.array(0), None)
    >>> bool(skip), int(told["num_not_finite"])
    (True, 2)
    """
    counts = [jnp.sum(~jnp.isfinite(u), dtype=jnp.int32) for u in jax.tree.leaves(updates)]
    number = sum(counts, start=jnp.zeros([], jnp.int32))
    return number > 0, {"should_skip": number > 0, "num_not_finite": number}


def skip_large_updates(
    updates: PyTree, gradient_step: Int[Array, ""], params: PyTree | None, max_squared_norm: Scalar
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """Whether the updates' squared norm, Σ|u|², is not below a bound, or NaN (optax's ``skip_large_updates``).

    Give it its bound: ``functools.partial(skip_large_updates, max_squared_norm=100.0)``. In half
    precision the squares are summed in float32; optax's, in float16, overflow at 255². For complex
    numbers |u|² is right here.

    Raises:
      ValueError: for a negative or NaN bound.

    Returns:
      That, and a dict of it, ``should_skip``, and of the squared norm, ``norm_squared``.

    >>> skip, told = optim.skip_large_updates({"w": jnp.array([3.0, 4.0])}, jnp.array(0), None, 20.0)
    >>> bool(skip), float(told["norm_squared"])
    (True, 25.0)
    """
    bound = as_scalar(max_squared_norm, "max_squared_norm", "[0, inf]")
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype
        sums = [sum_of_squares(u) for u in jax.tree.leaves(updates)]
        squared = sum(sums[1:], start=sums[0]) if sums else jnp.zeros([], jnp.float32)
        skip = ~(squared < bound)
    return skip, {"should_skip": skip, "norm_squared": squared}
