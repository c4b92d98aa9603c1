"""The executables that take a member of a :class:`Training` on, from any epoch to any other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from nnkit.search.hoisting import Hoisted, hoisted
from nnkit.search.member import Member, advance, begin, history_of
from nnkit.search.space import Space
from nnkit.search.training import Training
from nnkit.train.epochs import compiler_options
from nnkit.types import Array, PyTree

__all__ = ["Segments", "Stages"]


class Stages(NamedTuple):
    """A group's executables on one device; several threads may call them at once.

    Attributes:
      begin: ``begin(key, numbers, fold) -> member``.
      advance: ``advance(member, numbers, until) -> (member, ended)``, and whether it has come to its end by
        itself. The buffers of the member that it gets are given up.
      close: ``close(member, numbers) -> (result, history)``.
    """

    begin: Callable[[Array, Mapping[str, Any], Any], Member]
    advance: Callable[[Member, Mapping[str, Any], int], tuple[Member, Array]]
    close: Callable[[Member, Mapping[str, Any]], tuple[PyTree, dict[str, Array]]]


class Segments:
    """The programs of one static group of a :class:`Training`, traced once, compiled once a device.

    A run that is never stopped and one that is held up after each epoch are made by the same executables, of
    which the epochs are arguments; so their numbers are the same, bit for bit.

    Args:
      training: the training.
      space: of its hyper-parameters.
      static: the values that all members of the group share.
      numbers: the traced ones, by path, of some member: Python's numbers, of which the type alone matters.
      fold: whether ``start`` is given the number of a fold.
      shared: data that other programs have on the device already, see :func:`hoisted`.
    """

    def __init__(
        self,
        training: Training,
        space: Space,
        static: Any,
        numbers: Mapping[str, Any],
        *,
        fold: bool = False,
        shared: dict[int, tuple[Any, Array]] | None = None,
    ):
        self._fold, self._numbers, self.epochs = fold, dict(numbers), training.epochs

        def begun(key: Array, numbers: Any, fold: Any) -> Member:
            folded = {"fold": fold} if self._fold else {}
            return begin(training, key, space.hparams(static, numbers), **folded)

        def advanced(member: Member, numbers: Any, until: Any) -> tuple[Member, Array]:
            member = advance(training, member, space.hparams(static, numbers), until)
            return member, training.ended(member.carry)

        def closed(member: Member, numbers: Any) -> tuple[PyTree, dict[str, Array]]:
            return training.result(member.carry, space.hparams(static, numbers)), history_of(member)

        number = np.int32(0) if fold else None
        self._begin = hoisted(begun, jax.random.key(0), self._numbers, number, shared=shared)
        self.member: Member = self._begin.like
        self._advance = hoisted(advanced, self.member, self._numbers, np.int32(0), shared=shared)
        self._close = hoisted(closed, self.member, self._numbers, shared=shared)
        self._stages: dict[Any, Stages] = {}
        self._lock = threading.Lock()

    def on(self, device: Any) -> Stages:
        """The executables on ``device``, compiled by whichever thread needs them first."""
        with self._lock:
            if device not in self._stages:
                self._stages[device] = self._compiled(device)
            return self._stages[device]

    def exact(
        self, device: Any
    ) -> Callable[[Array, Mapping[str, Any], Any], tuple[PyTree, dict[str, Array]]]:
        """``(key, numbers, fold) -> (result, history)``: the whole run of one member on ``device``."""
        stages = self.on(device)

        def member(key: Array, numbers: Mapping[str, Any], fold: Any) -> tuple[PyTree, dict[str, Array]]:
            begun = stages.begin(key, numbers, fold)
            member, _ = stages.advance(begun, numbers, self.epochs)
            return stages.close(member, numbers)

        return member

    def _compiled(self, device: Any) -> Stages:
        place = jax.sharding.SingleDeviceSharding(device)

        def compiled(f: Hoisted, *args: Any, donated: tuple[int, ...] = ()) -> Callable[..., Any]:
            constants = jax.device_put(f.constants, device)
            options: Any = {"compiler_options": compiler_options(device.platform), "donate_argnums": donated}
            program = jax.jit(f.apply, in_shardings=place, out_shardings=place, **options)
            program = program.lower(constants, *args).compile()
            return lambda *args: program(constants, *args)

        begun = compiled(self._begin, jax.random.key(0), self._numbers, np.int32(0) if self._fold else None)
        # A member's buffers are given up: memory for new ones costs more than an epoch of a small network.
        advanced = compiled(self._advance, self.member, self._numbers, np.int32(0), donated=(1,))
        closed = compiled(self._close, self.member, self._numbers)

        def typed(numbers: Mapping[str, Any]) -> dict[str, Any]:
            # A program keeps Python's int and float apart.
            return {path: type(self._numbers[path])(number) for path, number in numbers.items()}

        def start(key: Array, numbers: Mapping[str, Any], fold: Any) -> Member:
            fold = np.int32(fold) if self._fold else None
            return begun(jax.device_put(key, device), typed(numbers), fold)

        def go_on(member: Member, numbers: Mapping[str, Any], until: int) -> tuple[Member, Array]:
            return advanced(_on(device, member), typed(numbers), np.int32(until))

        def close(member: Member, numbers: Mapping[str, Any]) -> tuple[PyTree, dict[str, Array]]:
            return closed(_on(device, member), typed(numbers))

        return Stages(start, go_on, close)


def _on(device: Any, member: Member) -> Member:
    """The member there, which costs more than a look where it is there already."""
    return member if member.had.devices() == {device} else jax.device_put(member, device)
