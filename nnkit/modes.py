"""The mode between training and test: dropout draws, everything else is as at test time."""

from __future__ import annotations

import enum
from typing import cast

__all__ = ["SAMPLING", "draws"]


class _Mode(enum.Enum):
    SAMPLING = "sampling"

    def __bool__(self) -> bool:
        return False


SAMPLING = cast(bool, _Mode.SAMPLING)
"""What ``train=`` takes for Monte-Carlo dropout: ``model.apply(params, state, x, key=key, train=SAMPLING)``.

It is false, so a layer that asks ``if train`` is as at test time, and it is handed on like any mode: batch
normalisation keeps its statistics, a state that training changes stays. The layers that drop ask
:func:`draws`. A layer that is compiled with ``train`` static compiles anew for it, since it equals neither
True nor False.
"""


def draws(train: bool) -> bool:
    """Whether dropout draws in this mode: in training and in :data:`SAMPLING`.

    >>> draws(True), draws(False), draws(SAMPLING), bool(SAMPLING)
    (True, False, True, False)
    """
    return bool(train) or train is SAMPLING
