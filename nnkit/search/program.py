"""One group of members as programs: traced once, compiled to be called member by member or mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nnkit.search.hoisting import hoisted
from nnkit.search.hparams import Hparams
from nnkit.search.space import Space
from nnkit.train.epochs import compiler_options
from nnkit.types import Array, PyTree

__all__ = ["Program", "Static", "trace"]

Static = tuple[tuple[str, Any], ...]
"""The static values by path, by which members are grouped into programs."""


class Program(NamedTuple):
    """The training of one member as a function of arrays, with what is static in it fixed.

    Attributes:
      apply: ``apply(constants, key, numbers, fold) -> (result, history)``, to be transformed and compiled.
      constants: the data, see :func:`hoisted`.
      numbers: for each traced path, a value of the type that the program takes.
      fold: likewise; None without folds.
      history: shapes and dtypes of one member's history.
      hparams: what the training function was given, which knows what was read of it.
    """

    apply: Callable[..., tuple[PyTree, dict[str, Array]]]
    constants: tuple[Any, ...]
    numbers: dict[str, Any]
    fold: Any
    history: dict[str, Any]
    hparams: Hparams

    def exact(
        self, device: Any
    ) -> Callable[[Array, Mapping[str, Any], Any], tuple[PyTree, dict[str, Array]]]:
        """``(key, numbers, fold) -> (result, history)``, compiled for one member on ``device``.

        Compiled ahead, it may be called by several threads at once, and each call gives the same bits.
        """
        constants = jax.device_put(self.constants, device)
        compiled = jax.jit(self.apply, compiler_options=compiler_options(device.platform))
        key = jax.device_put(jax.random.key(0), device)
        compiled = compiled.lower(constants, key, self.numbers, self.fold).compile()

        def member(key: Array, numbers: Mapping[str, Any], fold: Any) -> tuple[PyTree, dict[str, Array]]:
            # A program keeps Python's int and float apart.
            numbers = {path: type(self.numbers[path])(number) for path, number in numbers.items()}
            fold = None if self.fold is None else np.int32(fold)
            return compiled(constants, jax.device_put(key, device), numbers, fold)

        return member

    def mapped(
        self, devices: Sequence[Any], members: int
    ) -> Callable[[Array, PyTree, Any], dict[str, Array]]:
        """``(keys, numbers, folds) -> history``, arrays with ``members`` rows, compiled for them side by side.

        Each device has its share of the members and knows nothing of the others', so that none waits.

        Args:
          devices: of one platform.
          members: a multiple of the number of devices.
        """
        mesh = Mesh(np.asarray(devices), ("members",))
        everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P("members"))

        def one(constants: Any, *member: Any) -> dict[str, Array]:
            return self.apply(constants, *member)[1]

        program = jax.vmap(one, (None, 0, 0, None if self.fold is None else 0))
        if len(devices) > 1:
            specs = (P(), P("members"), P("members"), P("members"))
            program = jax.shard_map(
                program, mesh=mesh, in_specs=specs, out_specs=P("members"), check_vma=False
            )

        def placed(keys: Array, numbers: PyTree, folds: Any) -> PyTree:
            numbers = {path: _column(column, self.numbers[path]) for path, column in numbers.items()}
            folds = None if self.fold is None else np.asarray(folds, np.int32)
            return jax.device_put((keys, numbers, folds), shared)

        constants = jax.device_put(self.constants, everywhere)
        keys = jax.random.split(jax.random.key(0), members)
        example = placed(
            keys, {path: [n] * members for path, n in self.numbers.items()}, np.zeros(members, np.int32)
        )
        compiled = jax.jit(program, compiler_options=compiler_options(devices[0].platform))
        compiled = compiled.lower(constants, *example).compile()
        return lambda keys, numbers, folds: compiled(constants, *placed(keys, numbers, folds))


def trace(
    call: Callable[[Any, Hparams, Any], Any],
    space: Space,
    static: Static,
    numbers: Mapping[str, Any],
    *,
    fold: bool = False,
    shared: dict[int, tuple[Any, Array]] | None = None,
) -> Program:
    """Traces the training function for one member of a group; nothing is computed.

    Args:
      call: the training function as :func:`adapt` gives it.
      space: of its hyper-parameters.
      static: the values that all members of the group share.
      numbers: the traced ones, by path, of some member: Python's numbers, of which the type alone matters.
      fold: whether it is given the number of a fold.
      shared: data that other programs have on the device already, see :func:`hoisted`.

    Raises:
      Whatever the training function raises; and what :func:`outcome` says of what it returns.
    """
    seen: list[Hparams] = []

    def member(key: Array, numbers: Any, fold: Any) -> tuple[PyTree, dict[str, Array]]:
        hparams = space.hparams(static, numbers)
        seen.append(hparams)
        return outcome(call(key, hparams, fold))

    numbers, number = dict(numbers), np.int32(0) if fold else None
    found = hoisted(member, jax.random.key(0), numbers, number, shared=shared)
    return Program(found.apply, found.constants, numbers, number, found.like[1], seen[-1])


def outcome(returned: Any) -> tuple[PyTree, dict[str, Array]]:
    """What a training function returned, as ``(result, history)``, with None where there is no result.

    Raises:
      TypeError, ValueError: where there is no history, or it is not one of numbers.
    """
    result, history = None, returned
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        result, history = returned
    if not isinstance(history, Mapping):
        raise TypeError(
            f"train_fn returned {_kind(returned)} and no history: return a dict of metrics by name, arrays of "
            "(epochs,) or scalars, as train.run's history is; or (anything, history)"
        )
    return _result(result), {name: _metric(name, value) for name, value in history.items()}


def _metric(name: Any, value: Any) -> Array:
    if not isinstance(name, str):
        raise TypeError(f"the history has the name {name!r}: metrics are named by strings")
    if not isinstance(value, _NUMBERS) or jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        raise TypeError(
            f"the history has {_kind(value)} for {name!r}: return an array of (epochs,) or a scalar"
        )
    if jnp.ndim(value) > 1:
        raise ValueError(
            f"the history has an array of shape {jnp.shape(value)} for {name!r}: return an array of (epochs,), or "
            "a scalar; what is larger belongs into the result, (result, history)"
        )
    return jnp.asarray(value)


def _result(result: PyTree) -> PyTree:
    for path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:
        if not isinstance(leaf, _NUMBERS):
            raise TypeError(
                f"train_fn's result has {_kind(leaf)} at {jax.tree_util.keystr(path) or 'its root'}: a compiled "
                "program returns arrays; return (a pytree of arrays, history)"
            )
    return result


_NUMBERS = (jax.Array, np.ndarray, np.number, np.bool_, bool, int, float, complex)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "None"


def _column(column: Any, like: Any) -> np.ndarray:
    return np.asarray(column, jax.dtypes.canonicalize_dtype(type(like)))
