"""Where a run begins: from a key, or from the state of another."""

from __future__ import annotations

from functools import partial

import jax

from nnkit.checks import check_key
from nnkit.types import Array, PyTree, Trainer, TrainState

__all__ = ["check_beginning", "first_state"]


def check_beginning(key: Array | None, state: TrainState | None, *, name: str, write: str) -> None:
    """Raises unless there is either a key or a state; ``write`` is the call that the message gives."""
    if state is not None:
        if key is not None:
            raise TypeError(
                f"{name} got both a key and state=: the state carries its own key, pass one of them"
            )
        if not isinstance(state, TrainState):
            raise TypeError(
                f"{name}(state=...) takes a TrainState and got {type(state).__name__}: pass what fit or run returned"
            )
    elif key is None:
        raise TypeError(f"{name} needs a key: pass {write}")
    else:
        check_key(key, name)


@partial(jax.jit, static_argnums=0)
def first_state(trainer: Trainer, key: Array, x: PyTree) -> TrainState:
    """``trainer.init`` as one program: op by op it would compile some thirty, and might round differently."""
    return trainer.init(key, x)
