"""Lookahead: slow parameters that follow fast ones every few steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nnkit.optim.combine import tolerant
from nnkit.optim.conditional import check_count, of_dtype
from nnkit.optim.leafwise import check_state, leafwise
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.packing import packed_like, unpack
from nnkit.types import GradientTransformation, PyTree

__all__ = ["LookaheadParams", "LookaheadState", "lookahead"]


class LookaheadParams(NamedTuple):
    """Two sets of parameters.

    Attributes:
      fast: where gradients are taken.
      slow: the better ones to test and to use.
    """

    fast: PyTree
    slow: PyTree

    @classmethod
    def init_synced(cls, params: PyTree) -> LookaheadParams:
        """Both at the same point; to donate the buffers of one, copy it first."""
        return cls(fast=params, slow=params)


class LookaheadState(NamedTuple):
    """The fast optimizer's state, and how many steps it took since the two sets met, an int32 scalar."""

    fast_state: PyTree
    steps_since_sync: Any


def lookahead(
    fast_optimizer: GradientTransformation,
    sync_period: Any,
    slow_step_size: Scalar,
    reset_state: bool = False,
) -> GradientTransformation:
    """k steps forward, 1 step back (optax's ``lookahead``).

    The fast optimizer makes sync_period steps φ; then the slow parameters go part of the way to where
    it got, ``θ ← θ + α·(φ − θ)``, and it goes on from there, ``φ ← θ``. The parameters are
    :class:`LookaheadParams`, gradients are those at ``params.fast``, and so are the updates of both,
    which are not to be changed on their way to :func:`apply_updates`. Further arguments go to the fast
    optimizer, which in optax get lost.

    Args:
      fast_optimizer: any optimizer, nnkit's or optax's.
      sync_period: after how many fast steps the slow one follows, at least 1.
      slow_step_size: α, in [0, 1].
      reset_state: whether the fast optimizer starts with a new state then.

    Raises:
      ValueError: for a sync_period below 1, a slow_step_size outside [0, 1]; at an update, without
        parameters.
      TypeError: for a fast_optimizer that is no transformation; at an update, for other parameters.

    Zhang et al., 2019, https://arxiv.org/abs/1907.08610.

    By hand: two steps of −1 from 4, then half of the way back.

    >>> tx = optim.lookahead(optim.sgd(1.0), sync_period=2, slow_step_size=0.5)
    >>> params = optim.LookaheadParams.init_synced({"w": jnp.array(4.0)})
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update({"w": jnp.array(1.0)}, state, params)
    ...     params = optim.apply_updates(params, updates)
    ...     print(float(params.fast["w"]), float(params.slow["w"]))
    3.0 4.0
    3.0 3.0
    """
    fast_optimizer = tolerant("lookahead: fast_optimizer", fast_optimizer)
    period = check_count(sync_period, "sync_period", 1)
    alpha = as_scalar(slow_step_size, "slow_step_size", "[0, 1]", "it is the part of the way to go")

    def init(params: PyTree) -> LookaheadState:
        """Also of the fast parameters alone, as in optax."""
        fast = params.fast if _is_pair(params) else params
        return LookaheadState(fast_state=fast_optimizer.init(fast), steps_since_sync=jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state("lookahead", state, LookaheadState)
        advice = "call update(grads, opt_state, params) with params = LookaheadParams.init_synced(...)"
        if params is None:
            raise ValueError(f"lookahead needs the parameters: {advice}")
        if not _is_pair(params):
            raise TypeError(
                f"lookahead needs fast and slow parameters, got {type(params).__name__}: {advice}"
            )
        updates, fast_state = fast_optimizer.update(updates, state.fast_state, params.fast, **extra_args)
        steps = state.steps_since_sync + 1
        with jax.numpy_dtype_promotion("standard"):  # a traced period may be of another integer dtype
            sync = steps >= period

        def leaf(u: Array | None, fast: Any, slow: Any) -> tuple[Any, Any]:
            if u is None:
                return None, None
            way = fast + u - slow
            # By selection: away from a synchronisation an inf on the way is nobody's business.
            slow_update = jnp.where(sync, alpha * way, 0)
            fast_update = jnp.where(sync, u - (1 - alpha) * way, u)
            return fast_update.astype(u.dtype), slow_update.astype(slow.dtype)

        trees = {"updates": updates}, {"params.fast": params.fast}, {"params.slow": params.slow}
        fast_update, slow_update = leafwise("lookahead", leaf, *trees, none=True)
        if reset_state:
            start = fast_optimizer.init(params.fast)
            renewed = lambda new, old: jnp.where(sync, of_dtype(old, new), new)
            plain = jax.tree.map(renewed, unpack(fast_state), unpack(start))
            fast_state = packed_like(plain, fast_state)
        new_state = state._replace(fast_state=fast_state, steps_since_sync=jnp.where(sync, 0, steps))
        return LookaheadParams(fast=fast_update, slow=slow_update), new_state

    return GradientTransformation(init, update)


def _is_pair(params: Any) -> bool:
    return hasattr(params, "fast") and hasattr(params, "slow")
