"""A search of 64 trials in nnkit and in its peers, side by side: ``python -m benchmarks.search``.

The work: 32 learning rates × 2 weight decays, an MLP 64-64-10 with ReLU on the bundled digits, 20 epochs of 22
batches of 64 with AdamW, and the loss on 359 held-out digits after each epoch. All trials have one seed.

- nnkit: ``search.sweep`` over the grid, in memory, as a user calls it: arguments checked, the function
  traced and compiled, 64 records. ``nnkit, Engine`` is what of it trains, compiled already.
- linen: Flax linen and optax, a Python loop over a jitted, donated step, compiled once for all trials.
- linen.scan: a whole training in one jitted function, looped over trials.
- pytorch: eager, in the fastest of six forms, see ``benchmarks.search_peers``.

The peers are given the first parameters and the orders, which nnkit draws in each trial. That all train the same
is tested in float64 (tests/benchmarks), and looked at here for the smallest rates.

``whole`` is a search from nothing: what is compiled is compiled anew in each round. ``trained`` is without that,
for nnkit the Engine's part. All run in one process in turns whose order rotates, after a search of each that
is thrown away; gains are ratios of medians, ``paired`` the median of the ratio round by round. Close everything
else first. On two idle cores it takes some five minutes.

With ``--members 1024``: so many trials in one mapped program, on whatever device JAX has, and no peers;
``--modes exact mapped`` to see both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.search_task import Nnkit, Task, digits
from benchmarks.timing import Times, environment, interleaved
from nnkit.checks import unknown_name

__all__ = ["Config", "main", "run"]

PACKAGES = ("nnkit", "jax", "jaxlib", "optuna", "numpy")
PEERS = ("optax", "flax", "torch")
TARGETS = {"linen": 10.0, "pytorch": 20.0, "linen.scan": 2.0}
"""How many times as fast as each peer nnkit is to be."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A search of 64 trials in nnkit and its peers, side by side."""

    peers: tuple[str, ...] = tuple(TARGETS)
    """Which peers: linen, linen.scan, pytorch."""
    rounds: int = 5
    """Timed searches of each, after one that is thrown away."""
    rates: int = 32
    """How many learning rates; each is tried with two decays."""
    members: int | None = None
    """Trains so many trials in one program each of --modes instead, without peers; an even number."""
    modes: tuple[str, ...] = ("mapped",)
    """With --members: exact, mapped or both."""
    json: Path | None = None
    """Where to write all numbers."""


class Clocked(NamedTuple):
    """What one contender took, in seconds.

    Attributes:
      whole: searches from nothing.
      trained: of each the part after compilation.
    """

    whole: Times
    trained: list[float]


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    for peer in config.peers:
        if peer not in TARGETS:
            raise unknown_name("peer", peer, TARGETS)
    if config.members is not None and (config.members < 2 or config.members % 2):
        raise ValueError(f"members must be an even number, half of it rates, got {config.members}")
    found = environment(PACKAGES + (PEERS if config.members is None else ()))
    found["device"] = jax.devices()[0].device_kind
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}; {found['device']}")
    print(f"python {found['python']}, " + ", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    if found["load"] is not None and found["load"] > 0.5:
        print(f"the load was {found['load']} before the start: close other programs, or expect noise")
    if config.members is not None:
        task = digits(rates=config.members // 2)
        found["members"] = {mode: _members(task, mode, config.rounds) for mode in config.modes}
    else:
        found |= _compared(digits(rates=config.rates), config)
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def run(task: Task, peers: tuple[str, ...], rounds: int) -> tuple[dict[str, Clocked], list[dict[str, float]]]:
    """Times the search in nnkit and the peers.

    Returns:
      Times by label, ``nnkit`` first; and of each of nnkit's whole searches the parts.

    Raises:
      ValueError: a peer's losses at small rates are not nnkit's.
    """
    parts: list[dict[str, float]] = []
    trained: dict[str, list[float]] = {"nnkit": []}
    ours = Nnkit(task)
    ours.compile()
    wanted = ours.run(task.trials)

    def engine() -> None:
        begun = time.perf_counter()
        ours.run(task.trials)
        trained["nnkit"].append(time.perf_counter() - begun)

    def against(name: str, peer: Any) -> None:
        peer.compile()
        begun = time.perf_counter()
        losses = peer.run(task.trials)
        trained[name].append(time.perf_counter() - begun)
        _check_same(name, task, losses, wanted)

    work: dict[str, Callable[[], None]] = {"nnkit": lambda: parts.append(_swept(ours)), "engine": engine}
    for name in peers:
        from benchmarks.search_peers import PEERS as KINDS

        peer = KINDS[name](task)
        label = getattr(peer, "label", name)
        trained[label] = []
        work[label] = lambda label=label, peer=peer: against(label, peer)
    show = (lambda line: print(f"  {line}", file=sys.stderr, flush=True)) if sys.stderr.isatty() else None
    times = interleaved({name: _said(name, f, show) for name, f in work.items()}, rounds)
    # The first of each is thrown away.
    return {name: Clocked(times[name], seconds[1:]) for name, seconds in trained.items()}, parts[1:]


def _compared(task: Task, config: Config) -> dict[str, Any]:
    clocked, parts = run(task, config.peers, config.rounds)
    ours = clocked["nnkit"]
    wanted = dict(zip(clocked, (None, *(TARGETS[peer] for peer in config.peers)), strict=True))
    print(
        f"\n{len(task.trials)} trials of {task.epochs} epochs of {task.steps} steps, {config.rounds} rounds"
    )
    heads = ("trained s", "whole s", "gain", "paired", "gain whole", "paired", "wanted")
    print(" " * 28 + "".join(f"{head:>11s}" for head in heads))
    rows = {}
    for name, c in clocked.items():
        trained, whole = _gain(c.trained, ours.trained), _gain(c.whole.rounds, ours.whole.rounds)
        rows[name] = {
            "trained": statistics.median(c.trained),
            "whole": c.whole.median,
            "gain_trained": trained[0],
            "paired_trained": trained[1],
            "gain_whole": whole[0],
            "paired_whole": whole[1],
        }
        goal = "" if wanted[name] is None else f"{wanted[name]:g}"
        print(f"{name:28s}" + "".join(f"{number:11.3f}" for number in rows[name].values()) + f"{goal:>11s}")
    said = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    print("of nnkit's whole: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in said.items()) + " s")
    numbers = {name: {"whole": c.whole._asdict(), "trained": c.trained} for name, c in clocked.items()}
    return {"rows": rows, "rounds": numbers, "parts": parts}


def _gain(theirs: list[float], ours: list[float]) -> tuple[float, float]:
    """How many times as long: of medians, and the median round by round."""
    paired = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return statistics.median(theirs) / statistics.median(ours), paired


def _swept(ours: Nnkit) -> dict[str, float]:
    """One whole sweep, and how long it took until each of its events."""
    at = {"begun": time.perf_counter()}
    ours.sweep(lambda event, view: at.setdefault(event, time.perf_counter()))
    at["returned"] = time.perf_counter()
    return {
        "checks, tracing and study": at["start"] - at["begun"],
        "64 trials asked": at["batch"] - at["start"],
        "compiling and the first trial": at["trial"] - at["batch"],
        "the other trials": at["returned"] - at["trial"],
    }


def _check_same(name: str, task: Task, found: np.ndarray, wanted: np.ndarray) -> None:
    """At a rate of 1e-3 and below rounding has no part in how low the losses are."""
    small = [i for i, (rate, _) in enumerate(task.trials) if rate <= 1e-3]
    if not np.allclose(found[small], wanted[small], rtol=0.01):
        raise ValueError(f"{name} trains something else than nnkit: its losses at small rates differ")


def _said(name: str, f: Callable[[], None], show: Callable[[str], None] | None) -> Callable[[], None]:
    def work() -> None:
        begun = time.perf_counter()
        f()
        if show is not None:
            show(f"{name}: {time.perf_counter() - begun:.2f} s")

    return work


def _members(task: Task, mode: str, rounds: int) -> dict[str, Any]:
    """All trials of the task in one program of the Engine's, without peers."""
    ours = Nnkit(task, members=mode)
    begun = time.perf_counter()
    losses = ours.run(task.trials)
    first = time.perf_counter() - begun
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        losses = ours.run(task.trials)
        seconds.append(time.perf_counter() - begun)
    members, median = len(task.trials), statistics.median(seconds)
    print(f"\n{ours.engine.choice}")
    print(
        f"{members} members of {task.epochs} epochs of {task.steps} steps: {median:.3f} s "
        f"({min(seconds):.3f} to {max(seconds):.3f} in {rounds} rounds), {1e3 * median / members:.3f} ms a trial, "
        f"{members / median:.1f} members a second; the first time {first:.2f} s, compilation with it"
    )
    best = task.trials[int(np.nanargmin(losses[:, 1, -1]))]
    print(f"the best at the end: rate {best[0]:.3g}, decay {best[1]:g}")
    return {
        "seconds": seconds,
        "first": first,
        "choice": ours.engine.choice,
        "members_per_second": members / median,
    }


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
