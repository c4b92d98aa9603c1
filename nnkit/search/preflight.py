"""What a search makes sure of before it trains: its settings, and that the training function suits the space."""

from __future__ import annotations

import linecache
import math
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import nnkit
from nnkit.checks import unknown_name
from nnkit.search.dimension import Dimension
from nnkit.search.pool import available_cores
from nnkit.search.program import Program
from nnkit.search.space import Space
from nnkit.train.preflight import whole

__all__ = ["How", "check_seeds", "check_training", "how_to_run"]

Trace = Callable[..., Program]
"""``trace(flat, python=frozenset())``: see :meth:`Engine.traced`."""


class How(NamedTuple):
    """How members are run, and a sentence that says so and why."""

    members: str
    workers: int
    devices: list[Any]
    choice: str


def how_to_run(members: str | None, workers: int | None, devices: Sequence[Any] | None) -> How:
    """What the engine does on this machine, of what it was asked for.

    Raises:
      ValueError, TypeError: for arguments of which one cannot be meant.
    """
    if members is not None and members not in ("exact", "mapped"):
        raise unknown_name("members", members, ["exact", "mapped"])
    if workers is not None:
        workers = whole(workers, "workers")
    found = _devices(devices)
    on_cpu = found[0].platform == "cpu"
    mode = members or ("exact" if on_cpu else "mapped")
    if mode == "mapped":
        if workers is not None:
            raise ValueError(
                f"workers={workers} are threads, and mapped members run side by side in one: leave out workers=, "
                "or pass members='exact'"
            )
        why = "a default for accelerators, which one member does not fill" if members is None else "as asked"
        said = f"mapped ({why}): members side by side by vmap on {_named(found)}, equal to exact ones to rounding"
        return How(mode, 1, found, said)
    if on_cpu and devices is None:
        found = found[:1]
    workers = workers or max(available_cores() if on_cpu else 1, len(found))
    threads = "1 thread calls" if workers == 1 else f"{workers} threads call"
    why = "as asked"
    if members is None:
        why = "a default for CPUs, where small products are slower side by side"
    said = (
        f"exact ({why}): {threads} a compiled training of one member on {_named(found)}, "
        "so that each is bit for bit what it is alone"
    )
    return How(mode, workers, found, said)


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """``seeds`` as a tuple of whole numbers, no two equal.

    Raises:
      ValueError, TypeError: for anything else.
    """
    if isinstance(seeds, str) or not isinstance(seeds, Sequence | np.ndarray | range):
        raise TypeError(f"seeds must be a list of whole numbers, got {seeds!r}: write seeds=range(3)")
    found = []
    for seed in seeds:
        if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer):
            raise TypeError(f"seeds must be whole numbers, got {seed!r}")
        if not 0 <= seed < 2**32:  # jax.random.key takes a seed's last 32 bits: 2**32 would be 0 again
            raise ValueError(f"seeds must be from 0 to 2**32 - 1, got {seed}")
        if seed in found:
            raise ValueError(f"seeds has {seed} twice: its members would be the same training")
        found.append(operator.index(seed))
    if not found:
        raise ValueError("seeds is empty: pass at least one, seeds=[0]")
    return tuple(found)


def check_training(space: Space, trace: Trace, metric: str | None) -> None:
    """Traces the training function for examples of the space, and raises what there is to say."""
    unread = set(space.dimensions)
    fixed = list(_kinds(space))
    for kinds in fixed:
        program = _traced(space, trace, flat := _example(space, kinds))
        _check_history(program, metric)
        unread -= set(flat).difference(program.hparams.unread())
    for flat in _others(space, fixed, unread):
        unread -= set(flat).difference(_traced(space, trace, flat).hparams.unread())
        if not unread:
            return
    for path in space.dimensions:
        if path in unread:
            raise ValueError(
                f"the space has {path!r}, which train_fn does not read: use {_access(path)} in it, or take "
                f"{path!r} out of the space"
            )


def _devices(devices: Sequence[Any] | None) -> list[Any]:
    if isinstance(devices, str) or not isinstance(devices, Iterable | None):
        raise TypeError(f"devices must be a list of devices of JAX, got {devices!r}: write jax.devices()[:1]")
    found = list(jax.local_devices() if devices is None else devices)
    if not found:
        raise ValueError("devices is empty: leave it out, or pass some of jax.devices()")
    for device in found:
        if not isinstance(device, jax.Device):
            raise TypeError(f"devices must be devices of JAX, got {device!r}: pass some of jax.devices()")
    if len({device.platform for device in found}) > 1:
        raise ValueError(f"devices are of several platforms, {_named(found)}: pass those of one")
    if len(set(found)) < len(found):
        raise ValueError("devices has one twice: pass each once")
    return found


def _named(devices: Sequence[Any]) -> str:
    kinds = list(dict.fromkeys(device.device_kind for device in devices))
    return f"{len(devices)} {' and '.join(kinds)} device{'s' if len(devices) > 1 else ''}"


def _kinds(space: Space) -> Iterator[dict[str, Any]]:
    """Choices of kinds such that each kind of each conditional is in one of them."""
    yield {}
    waiting, seen = [dict[str, Any]()], set()
    while waiting:
        kinds = waiting.pop(0)
        flat = _example(space, kinds)
        for path in flat:
            if path.endswith("/kind"):
                for option in space.dimensions[path].options or ():
                    if (path, option) not in seen:
                        seen.add((path, option))
                        waiting.append(more := {**kinds, path: option})
                        if option != flat[path]:
                            yield more


def _others(space: Space, fixed: list[dict[str, Any]], unread: set[str]) -> Iterator[dict[str, Any]]:
    """Examples with other static values: what is not read with one may be with another."""
    for kinds in fixed:
        flat = _example(space, kinds)
        for path, value in flat.items():
            d = space.dimensions[path]
            if d.static and path not in kinds and not path.endswith("/kind") and not unread.isdisjoint(flat):
                for other in d.grid(len(d.options) if d.options else 2):
                    if other != value:
                        yield _example(space, {**kinds, path: other})


def _example(space: Space, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Values from the middle of each dimension, but for the fixed ones."""
    values = {path: dimension.at(0.5) for path, dimension in space.dimensions.items()} | dict(fixed)
    return space.check({path: values[path] for path in space.active(values)})


def _traced(space: Space, trace: Trace, flat: dict[str, Any]) -> Program:
    try:
        return trace(flat)
    except Exception as error:
        traced = [path for path in flat if not space.dimensions[path].static]
        try:
            trace(flat, frozenset(traced))
        except Exception as own:
            # It is wrong with values too, and says so better than with tracers.
            own.add_note(f"train_fn was traced with {flat}")
            raise own from None
        raise _not_static(space, trace, flat, traced, error) from error


def _not_static(
    space: Space, trace: Trace, flat: dict[str, Any], traced: list[str], error: Exception
) -> TypeError:
    """The error for traced hyper-parameters whose values are needed: each is traced alone to find which."""
    said = []
    for path in traced:
        try:
            trace(flat, frozenset(traced) - {path})
        except Exception as alone:
            said.append(
                f"{path!r} is traced, and train_fn needs its value: {_reason(alone)}. Write "
                f"{_static(path, space.dimensions[path])} in the space, and a program is compiled for each value"
            )
    if said:
        return TypeError("\n".join(said))
    names = " and ".join(repr(path) for path in traced)
    return TypeError(
        f"{names} are traced, and train_fn needs the values of several of them together: {_reason(error)}. Make "
        "them static in the space (static=True), and a program is compiled for each value"
    )


def _reason(error: Exception) -> str:
    """Why a value is needed and on which line of the user's, from what tracing raised."""
    reasons = {
        jax.errors.TracerBoolConversionError: "Python decides by it (if, while, and, or, min, max)",
        jax.errors.TracerIntegerConversionError: "Python counts or indexes with it",
        jax.errors.TracerArrayConversionError: "NumPy calculates with it, where jax.numpy would do",
        jax.errors.ConcretizationTypeError: "it is made a number of Python's or the size of an array",
    }
    why = next((text for kind, text in reasons.items() if isinstance(error, kind)), None)
    if why is None:
        first = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {first[0].rstrip('.') if first else 'without a word'}"
        if "Shapes must be" in why:
            why = "it is the size of an array"
    ours = [Path(module.__file__ or "").parent for module in (jax, jaxlib, np, nnkit)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
        and "<" not in frame.filename
    ]
    if not frames:
        return why
    file, line = frames[-1].filename, frames[-1].lineno or 0
    return f"{why}, in {Path(file).name}, line {line}: {linecache.getline(file, line).strip()}"


def _static(path: str, dimension: Dimension) -> str:
    """How to write the dimension such that it is static."""
    written = f"{str(dimension)[:-1]}, static=True)"
    if dimension.count is None and dimension.kind != "integer":
        # Of a continuous one hardly two trials share a program.
        written = f"choice({[float(f'{value:.3g}') for value in dimension.grid(3)]})"
    return f"{path.rpartition('/')[2]}=search.{written}"


def _access(path: str) -> str:
    return "hparams" + "".join(f"[{name!r}]" for name in path.split("/"))


def _check_history(program: Program, metric: str | None) -> None:
    if not program.history:
        raise ValueError(
            "train_fn returned a history without metrics: return a dict such as {'val_loss': loss}"
        )
    if metric is None:
        return
    if metric not in program.history:
        raise ValueError(
            f"train_fn's history has no {metric!r}: {unknown_name('metric', metric, program.history)}"
        )
    found = program.history[metric]
    if not math.prod(found.shape) or jnp.issubdtype(found.dtype, jnp.complexfloating):
        raise ValueError(
            f"train_fn's history has {metric!r} as an array of {found.dtype}{list(found.shape)}: a metric is an "
            "array of (epochs,) or a scalar, of real numbers"
        )
