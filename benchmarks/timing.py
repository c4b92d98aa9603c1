"""Fair timing: everything in one process, in turns, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Comparison", "Times", "compare", "environment", "interleaved", "table"]


class Times(NamedTuple):
    """How long one contender took, in seconds.

    Attributes:
      first: the first call, compilation included.
      rounds: each call after it.
    """

    first: float
    rounds: list[float]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)


def interleaved(
    work: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Times]:
    """Each of ``work`` once to warm up, then ``rounds`` times in turns: A B C, B C A, C A B, ...

    The order rotates, so that none always runs behind the same neighbour and the caches it leaves.

    Args:
      work: what to time by name; a call returns when its work is done.
      rounds: how often.
      clock: what tells the time.
      report: is told of the progress.

    >>> said = []
    >>> times = interleaved({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, rounds=2)
    >>> "".join(said), len(times["a"].rounds)
    ('ababba', 2)
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")

    def timed(name: str) -> float:
        gc.collect()
        start = clock()
        work[name]()
        return clock() - start

    names = list(work)
    times = {}
    for name in names:
        times[name] = Times(timed(name), [])
        report(f"{name}: first epoch {times[name].first:.2f} s")
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            times[name].rounds.append(timed(name))
        report(f"round {turn + 1}/{rounds}: " + ", ".join(f"{n} {times[n].rounds[-1]:.3f}" for n in names))
    return times


class Comparison(NamedTuple):
    """One row of the table; seconds, and factors above 1 where it is faster than the best peer.

    Attributes:
      name: whose row it is.
      median: of the rounds.
      fastest: round.
      slowest: round.
      compile: the first call less the fastest one: compilation and the first step.
      gain: the best peer's median over this median.
      paired: the median over the rounds of the best peer's time over this one's in the same round,
        which a machine that slows down and speeds up disturbs less.
    """

    name: str
    median: float
    fastest: float
    slowest: float
    compile: float
    gain: float
    paired: float


def compare(times: Mapping[str, Times], ours: str = "nnkit") -> list[Comparison]:
    """The rows of the table. The best peer is the one of the smallest median that is not ``ours``.

    >>> times = {"nnkit": Times(3.0, [1.0, 2.0, 1.0]), "a": Times(4.0, [2.0, 5.0, 3.0]), "b": Times(4.0, [9.0] * 3)}
    >>> [(row.name, row.gain, row.paired) for row in compare(times)]
    [('nnkit', 3.0, 2.5), ('a', 1.0, 1.0), ('b', 0.333..., 0.333...)]
    """
    peers = [name for name in times if name != ours] or [ours]
    best = min(peers, key=lambda name: times[name].median)
    return [
        Comparison(
            name=name,
            median=t.median,
            fastest=min(t.rounds),
            slowest=max(t.rounds),
            compile=t.first - min(t.rounds),
            gain=times[best].median / t.median,
            paired=statistics.median(b / own for b, own in zip(times[best].rounds, t.rounds, strict=True)),
        )
        for name, t in times.items()
    ]


def table(rows: Sequence[Comparison], per_second: float = 1.0, unit: str = "s") -> str:
    """The rows as text, times in ``unit``, of which a second has ``per_second``.

    >>> print(table([Comparison("nnkit", 0.5, 0.4, 0.75, 2.0, 1.5, 1.25)]))
                           median s   min s   max s  compile s   gain  paired
    nnkit                     0.500   0.400   0.750       2.00   1.50    1.25
    """
    widths = (20, 10, 7, 7, 10, 6, 7)
    heads = ("", f"median {unit}", f"min {unit}", f"max {unit}", "compile s", "gain", "paired")
    lines: list[tuple[str, ...]] = [heads]
    for r in rows:
        seconds = (f"{x * per_second:.3f}" for x in (r.median, r.fastest, r.slowest))
        lines.append((r.name, *seconds, f"{r.compile:.2f}", f"{r.gain:.2f}", f"{r.paired:.2f}"))
    return "\n".join(
        " ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """What a reader must know of the machine and the versions to make anything of the numbers."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
