"""What checkpoints cost: ``python -m benchmarks.checkpoints``.

784-1024-320-10 with batch normalisation, ReLU and Adam: 13.7 MB of state, in batches of which a step takes
about 10 ms on two cores. A round is ``chunks`` dispatches of 100 steps. ``none`` saves nothing, ``asynchronous``
saves after each dispatch as ``fit`` does, ``synchronous`` writes before it goes on. The last write of a round
is waited for within its time, which in a run only happens at the end. ``cost`` is the median over the rounds
of a round's time over that of ``none`` in the same round, less 1; ``of cpu`` the same of the processors' time,
which other programs on the machine disturb less.

Then one save at a time: how long ``save`` blocks once the state is computed, how long it takes until all is
on the disk, and how much of that the processor works. The rest is waiting for the disk.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.task import random_data
from benchmarks.timing import environment, interleaved
from nnkit import layers, losses, optim, train, tree
from nnkit.types import TrainState

__all__ = ["Config", "main"]

BOUND = 0.05
"""The part of a run's time that checkpoints every 100 steps may cost at most."""
STEPS = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """What checkpoints cost."""

    rounds: int = 11
    """Timed rounds of each, after the one that compiles."""
    chunks: int = 5
    """Checkpoints in a round."""
    batch_size: int = 384
    """Examples in a step, by which its time is set."""
    saves: int = 30
    """Saves that are looked at one by one."""
    folder: Path | None = None
    """Where to save, for instance on a certain disk; a temporary folder by default."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    found = environment(("nnkit", "jax", "jaxlib", "numpy"))
    print(f"{found['cores']} cores, load {found['load']}")
    model = layers.serial(
        layers.dense(1024), layers.batch_norm(), layers.relu, layers.dense(320), layers.relu, layers.dense(10)
    )
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-3))
    x, y = random_data(STEPS * config.batch_size)
    arrays = (jnp.asarray(x), jnp.asarray(y))
    ts = jax.jit(trainer.init)(jax.random.key(0), arrays[0][:1])
    size = tree.nbytes(ts._replace(key=jax.random.key_data(ts.key)))

    def chunk(ts: TrainState) -> TrainState:
        order = jnp.arange(len(x), dtype=jnp.int32)
        rows = {"batch_size": config.batch_size, "capacity": STEPS}
        return train.train_steps(trainer, ts, arrays, order, jnp.int32(0), jnp.int32(STEPS), **rows)[0]

    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        stores = {
            "none": None,
            "asynchronous": train.Checkpoints(f"{folder}/asynchronous"),
            "synchronous": train.Checkpoints(f"{folder}/synchronous", asynchronous=False),
        }
        busy: dict[str, list[float]] = {name: [] for name in stores}
        work = {name: _round(chunk, ts, store, config.chunks, busy[name]) for name, store in stores.items()}
        times = interleaved(work, config.rounds)
        alone = _saves(chunk, ts, f"{folder}/alone", config.saves)
    found |= {"bytes": size, "alone_ms": alone}
    print(f"{size / 1e6:.1f} MB of state, a checkpoint every {STEPS} steps")
    print(f"{'':<14}{'ms a step':>10}{'cost':>8}{'of cpu':>8}")
    for name, t in times.items():
        cost, of_cpu = _cost(t.rounds, times["none"].rounds), _cost(busy[name][1:], busy["none"][1:])
        step = 1e3 * t.median / (STEPS * config.chunks)
        found[name] = {
            "ms_a_step": step,
            "cost": cost,
            "of_cpu": of_cpu,
            "rounds": t.rounds,
            "cpu": busy[name],
        }
        print(f"{name:<14}{step:>10.2f}{cost:>8.1%}{of_cpu:>8.1%}")
    print(f"one save, median of {config.saves}, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in alone.items()))
    print(f"the aim is at most {BOUND:.0%} asynchronously")
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1))
    return found


def _cost(own: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, base, strict=True)) - 1


def _round(
    chunk: Any, ts: Any, store: train.Checkpoints | None, chunks: int, busy: list[float]
) -> Callable[[], None]:
    state, done = jax.tree.map(jnp.copy, ts), 0

    def work() -> None:
        nonlocal state, done
        worked = time.process_time()
        for _ in range(chunks):
            state, done = chunk(state), done + STEPS
            if store is not None:
                store.save(done, state, {"step": done})
        jax.block_until_ready(state)
        if store is not None:
            store.wait()
        busy.append(time.process_time() - worked)

    return work


def _saves(chunk: Any, ts: Any, folder: str, count: int) -> dict[str, float]:
    blocked, whole, busy = [], [], []
    state = jax.tree.map(jnp.copy, ts)
    with train.Checkpoints(folder) as store:
        for step in range(count):
            state = jax.block_until_ready(chunk(state) if step == 0 else jax.tree.map(jnp.copy, state))
            started, worked = time.perf_counter(), time.process_time()
            store.save(step, state, {"step": step})
            blocked.append(time.perf_counter() - started)
            store.wait()
            whole.append(time.perf_counter() - started)
            busy.append(time.process_time() - worked)
    numbers = {"blocked": blocked, "until on the disk": whole, "of it working": busy}
    return {name: 1e3 * float(np.median(values[1:])) for name, values in numbers.items()}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
