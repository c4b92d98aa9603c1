"""What looking for inf and NaN costs an epoch: ``python -m benchmarks.guards``.

``train.fit`` with ``guard`` None, "explain" and "skip" on the task of ``benchmarks.epoch``, variant ``mlp``:
60,000 images of 784 numbers in batches of 64, 784-256-128-10 with ReLU, Adam; random data of that shape.
An epoch's time is the one that ``fit`` reports for it, so what a run does once is not in it. All run in
one process, in turns whose order rotates. ``cost`` is the row's median over that of None, ``paired`` the
median of that ratio round by round, which a busy machine disturbs less.

Whether a chunk is finite is computed without a guard too, so its cost is in all rows. It is shown apart: the
time of ``train.chunk_is_finite`` in a program of its own, dispatch included, once for each chunk of an epoch,
as a part of the epoch of None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.task import random_data
from benchmarks.timing import Times, environment, interleaved
from nnkit import layers, losses, optim, train
from nnkit.train.epochs import STEPS_PER_CALL
from nnkit.types import Trainer

__all__ = ["Config", "main"]

PACKAGES = ("nnkit", "jax", "jaxlib", "numpy")
BATCH_SIZE = 64
GUARDS: dict[str, float | None] = {"None": None, "explain": 1.03, "skip": 1.15}
"""The guards, and the most that each may cost, as a factor."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What looking for inf and NaN costs an epoch."""

    rounds: int = 15
    """Timed fits of each, after the one that compiles."""
    epochs: int = 2
    """Epochs in a fit, of which the last is timed."""
    examples: int = 60_000
    """How many examples an epoch has."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, writes ``config.json`` and returns what is in it."""
    found = environment(PACKAGES)
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}")
    times = _times(config)
    plain = times["None"]
    rows = {}
    print(f"{'guard':<10} {'median s':>9} {'min s':>7} {'max s':>7} {'cost':>7} {'paired':>7}  wanted")
    for name, t in times.items():
        paired = statistics.median(a / b for a, b in zip(t.rounds, plain.rounds, strict=True))
        cost, most = t.median / plain.median, GUARDS[name]
        rows[name] = {"cost": cost, "paired": paired, "wanted": most, **t._asdict()}
        wanted = "" if most is None else f"at most {most}"
        print(
            f"{name:<10} {t.median:9.3f} {min(t.rounds):7.3f} {max(t.rounds):7.3f} {cost:7.3f} {paired:7.3f}  {wanted}"
        )
    steps = config.examples // BATCH_SIZE
    flag = _flag() * math.ceil(steps / STEPS_PER_CALL) / plain.median
    print(f"chunk_is_finite, once in {STEPS_PER_CALL} steps: {flag:.4f} of an epoch")
    found |= {"examples": config.examples, "rows": rows, "flag": flag}
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _trainer() -> Trainer:
    model = layers.serial(layers.dense(256), layers.relu, layers.dense(128), layers.relu, layers.dense(10))
    return train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-3))


def _flag(calls: int = 200) -> float:
    """The median time of one look at a chunk's end, in seconds."""
    ts = _trainer().init(jax.random.key(0), jax.ShapeDtypeStruct((1, 784), jnp.float32))
    look, metrics = jax.jit(train.chunk_is_finite), {"loss": jnp.ones(STEPS_PER_CALL)}
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        look(ts, metrics).block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _times(config: Config) -> dict[str, Times]:
    x, y = random_data(config.examples)
    trainer = _trainer()
    arrays = jnp.asarray(x), jnp.asarray(y)
    total = 0.0

    def epoch(guard: str | None) -> None:
        nonlocal total
        _, history = train.fit(
            trainer,
            arrays,
            epochs=config.epochs,
            key=jax.random.key(0),
            batch_size=BATCH_SIZE,
            drop_last=True,
            progress=False,
            guard=guard,
        )
        total += history[-1]["seconds"]

    work = {name: (lambda guard=None if name == "None" else name: epoch(guard)) for name in GUARDS}
    return interleaved(work, config.rounds, clock=lambda: total)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
