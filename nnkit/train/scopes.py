"""Where an equation of a traced program stands: its layer, its pass and its line of code."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn

__all__ = ["Scope", "line_of", "scope_of", "stack_of"]


class Scope(NamedTuple):
    """Where in the program an operation stands.

    Attributes:
      path: the layer's, ``encoder/dense_0``; "" outside of all layers.
      backward: whether it belongs to the backward pass.
      differentiated: whether it belongs to what a gradient is taken of.
    """

    path: str
    backward: bool
    differentiated: bool


def stack_of(eqn: JaxprEqn) -> tuple[Any, ...]:
    """The names and transformations around an equation, the outermost first."""
    return tuple(eqn.source_info.name_stack.stack)


_NO_LAYER = re.compile(r"rematted_computation|checkpoint|.*->.*")  # JAX's own scopes, einsum's "ij,jk->ik"


def scope_of(stack: Sequence[Any]) -> Scope:
    """Reads a name stack, ``transpose(jvp(encoder))/dense_0``.

    A derivative of a derivative has the scopes twice over: those behind the second one then begin anew.
    """
    done: list[str] = []
    names: list[str] = []
    backward = differentiated = False
    for element in stack:
        name = element.name
        if type(element).__name__ == "Transform":
            if name in ("jvp", "transpose"):
                differentiated, backward = True, backward or name == "transpose"
                done, names = _joined(done, names), []
        elif name == "rematted_computation":
            backward = False  # the forward pass, computed again in the backward one
        elif not _NO_LAYER.fullmatch(name):
            names += name.split("/")
    return Scope("/".join(_joined(done, names)), backward, differentiated)


def _joined(done: list[str], names: list[str]) -> list[str]:
    return names if names[: len(done)] == done else [*done, *names]


_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_NNKIT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep


def line_of(eqn: JaxprEqn) -> str:
    """The innermost line of code outside of JAX, without the machine's path to it."""
    traceback = eqn.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        file = frame.file_name
        if file.startswith((_JAX, "<")) or file.endswith(("functools.py", "contextlib.py")):
            continue
        short = file.removeprefix(_NNKIT) if file.startswith(_NNKIT + "nnkit") else os.path.basename(file)
        return f"{short}:{frame.line_num}"
    return ""
