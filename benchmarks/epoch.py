"""One epoch of MNIST in nnkit and in its peers, side by side: ``python -m benchmarks.epoch``.

The work: 60,000 images of 784 numbers in batches of 64, 937 steps; 784-256-128-10 with ReLU, Adam.
Variants: ``mlp``; ``mlp_bn_dropout`` with batch norm and dropout 0.5 in each hidden layer; and ``cnn``, two
convolutions of 32 and 64 channels with max pooling before 128-10, in batches of 128 (an epoch of it takes the
peers half a minute: ``--variants cnn --examples 6400`` is enough).
Every implementation starts from the same parameters and minimises the same loss; that they train the
same network is tested (tests/benchmarks). Each is written as an expert of its library writes an
ordinary fast training loop, over data that are on the device before the clock starts:

- nnkit: ``train.run_epoch``, which ``train.fit`` repeats, shuffling and metrics included.
- linen: Flax linen and optax, a jitted step on a donated ``TrainState``.
- nnx: Flax nnx and optax through ``nnx.jit_partial``, its fastest form, donated.
- equinox: Equinox and optax, arrays flattened once and a jitted, donated step.
- pytorch: eager, Adam fused, with as many threads as PyTorch starts; pytorch.1: with one thread.

Further forms (``nnx.jit``, ``nnx.split``, ``equinox.filter_jit``, ``torch.compile``, and linen with a
scan written by its user) run where ``--implementations`` names them.

A peer shuffles by a permutation drawn on the host each epoch and gathers each step's examples inside
its compiled step, the fastest of the ways tried. Every epoch ends with the mean of its losses on
the host and all parameters computed. All run in one process, in turns whose order rotates, after a
first epoch that compiles. ``gain`` is the best peer's median over the row's, ``paired`` the median of
that ratio round by round. Close everything else first: PyTorch's threads wait for each other, and on
a busy machine its time can be tenfold.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import DEFAULT, find
from benchmarks.task import VARIANTS, Task, mnist, random_data
from benchmarks.timing import Times, compare, environment, interleaved, table
from nnkit.checks import unknown_name

__all__ = ["Config", "main", "run"]

PACKAGES = ("nnkit", "jax", "jaxlib", "optax", "flax", "equinox", "torch", "numpy")
JAX_PEERS = ("linen", "nnx", "equinox")
TARGETS: dict[str, dict[float, tuple[str, ...]]] = {
    "mlp": {1.3: (*JAX_PEERS, "pytorch", "pytorch.1")},
    "mlp_bn_dropout": {1.8: (*JAX_PEERS, "pytorch", "pytorch.1")},
    "cnn": {2.5: JAX_PEERS, 1.1: ("pytorch", "pytorch.1")},
}
"""The gains that nnkit is held to, and over the best of whom."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One epoch of MNIST in nnkit and its peers, side by side."""

    variants: tuple[str, ...] = ("mlp", "mlp_bn_dropout")
    """Which networks: mlp, mlp_bn_dropout, cnn."""
    implementations: tuple[str, ...] = DEFAULT
    """Which implementations; see benchmarks/peers for all names."""
    rounds: int = 5
    """Timed epochs of each, after the one that compiles."""
    data_dir: Path | None = None
    """A folder with MNIST's IDX files; without it, random data of the same shape."""
    examples: int = 60_000
    """How many examples an epoch has."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    for variant in config.variants:
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
    kinds = {name: find(name) for name in config.implementations}
    found = environment(PACKAGES)
    x, y = random_data(config.examples) if config.data_dir is None else mnist(config.data_dir)
    x, y = x[: config.examples], y[: config.examples]
    source = "random data" if config.data_dir is None else "MNIST"
    found |= {"data": source, "shape": list(x.shape), "variants": {}}
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}")
    print(f"python {found['python']}, " + ", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    print(f"{source}, {x.shape[0]} x {x.shape[1]} {x.dtype}")
    if found["load"] is not None and found["load"] > 0.5:
        print(f"the load was {found['load']} before the start: close other programs, or expect noise")
    for variant in config.variants:
        task = Task(x, y, **VARIANTS[variant])
        times = run(task, kinds, config.rounds)
        rows = compare(times)
        found["variants"][variant] = {
            "times": {name: t._asdict() for name, t in times.items()},
            "rows": [row._asdict() for row in rows],
        }
        print(f"\n{variant}: one epoch of {task.steps} steps, {config.rounds} rounds")
        print(table(rows))
        for wanted, peers in TARGETS[variant].items():
            among = [times[name].median for name in peers if name in times]
            if "nnkit" in times and among:
                gain = min(among) / times["nnkit"].median
                print(f"nnkit over the best of {', '.join(peers)}: {gain:.2f}; wanted: {wanted}")
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def run(task: Task, kinds: dict[str, Any], rounds: int) -> dict[str, Times]:
    """Times one epoch of ``task`` in every implementation."""
    built = {name: kind(task) for name, kind in kinds.items()}

    def epoch(name: str) -> None:
        loss = built[name].epoch()
        if not np.isfinite(loss):
            raise ValueError(f"{name} diverged: the epoch's mean loss is {loss}")

    work = {name: (lambda name=name: epoch(name)) for name in built}
    show = (lambda line: print(f"  {line}", file=sys.stderr, flush=True)) if sys.stderr.isatty() else None
    return interleaved(work, rounds, report=show or (lambda line: None))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
