"""A layer's random numbers: where they come from and that no key is used twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from nnkit.testing.compare import check_same_bits
from nnkit.testing.layer.subject import LayerSubject
from nnkit.testing.report import check, fail

__all__ = ["key_reuse", "randomness"]

layer_check = partial(check, subject=LayerSubject)


@layer_check("randomness")
def randomness(s: LayerSubject) -> str:
    """Training draws from its key and from nothing else; test time needs no key and does not see one."""

    def run(seed: int, train: bool = True) -> Any:
        return s.compiled(train)(s.params, s.state, s.x, jax.random.key(seed))["y"]

    check_same_bits("the output of the same key", run(1), run(1), "it draws from something beside its key")
    differ = any(
        not np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(run(1)), jax.tree.leaves(run(2)), strict=True)
    )
    told = "was said" if s._told_random is not None else "needs a key in training"
    if s.random and not differ:
        fail(
            "two keys with train=True",
            expected="two outputs",
            arrived="the same output",
            path="y",
            likely=f"the layer {told} to draw, and its key does not reach the draw: a constant key, or one of its own",
        )
    if not s.random and differ:
        fail(
            "two keys with train=True",
            expected="one output, since no random numbers are promised",
            arrived="two outputs",
            path="y",
            likely="it draws where it gets a key and not where it gets none: raise a LayerError for key=None when "
            "train=True, and pass random=True",
        )
    if s.needs_key and not s.random:
        fail(
            "apply(..., train=True) without a key",
            expected="an output, since no random numbers are promised",
            arrived="an error",
            likely="a key is asked for that is not used: drop it, or pass random=True",
        )
    s.shapes(train=False, key=None)
    check_same_bits(
        "the output with train=False and another key",
        run(1, train=False),
        run(2, train=False),
        "random numbers are drawn at test time: return the expectation where train is False",
    )
    return "draws in training" if s.random else "draws nothing"


@layer_check("key reuse")
def key_reuse(s: LayerSubject) -> None:
    """No key is consumed twice, under ``jax.debug_key_reuse``, in init or in apply."""
    initial, modes = s.initial, s.modes  # made before keys are watched
    with jax.debug_key_reuse(True):
        for what, trace in (
            ("init", lambda: jax.jit(s.layer.init).trace(jax.random.key(5), s.x)),
            *((f"apply with train={train}", partial(_trace, s, initial, train)) for train in modes),
        ):
            try:
                trace()
            except jax.errors.KeyReuseError as error:
                fail(
                    f"{what} uses a key twice",
                    expected="each key consumed once",
                    arrived=f"KeyReuseError: {str(error).splitlines()[0]}",
                    likely="draws that should be independent are the same numbers: jax.random.split the key, or "
                    "fold_in a number for each draw",
                )


def _trace(s: LayerSubject, initial: Any, train: bool) -> None:
    jax.jit(partial(s.call, train=train)).trace(*initial, s.x, jax.random.key(6))
