"""An epoch streamed from the disk beside one on data that lie on the device: ``python -m benchmarks.streaming``.

60,000 examples of 784 numbers in batches of 64, 784-256-128-10 with ReLU, Adam. ``resident`` gathers its
batches from arrays on the device, the others take them from a memory-mapped file through
``data.stream`` and ``train.Streaming``: ``float32``, and ``uint8`` with a ``map`` that scales them to float32. All go
through the same compiled steps (``train.epochs.dispatch``) and end with the same parameters, which is checked.
The files are in the page cache after the first epoch. Nothing is read ahead across epochs, so that no turn
does another's work: each epoch starts its thread, draws its order and fills its first chunk within its time.
``cpu`` is the ratio of the processor time of all threads, which other programs on the machine disturb least.

Then the same data through ``train.fit``: the mean time of the epochs after the first of a run, where a stream is
read ahead into the next epoch, as it is in use.

Then a source of known delay: each batch takes ``delay`` ms to make and each step twice as long to compute. A
feed that reads ahead makes such an epoch as long as its steps; ``waited`` is what the loop stood still for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.task import random_data
from benchmarks.timing import environment, interleaved
from nnkit import data, layers, losses, optim, train
from nnkit.train.epochs import STEPS_PER_CALL, Means, dispatch
from nnkit.train.feed import Feed, Resident
from nnkit.types import Trainer

__all__ = ["Config", "main"]

BOUND = 1.1
"""How many times as long as a resident epoch a streamed one may take."""


@dataclasses.dataclass(frozen=True)
class Config:
    """An epoch streamed from the disk beside one on data that lie on the device."""

    rounds: int = 11
    """Timed epochs of each, after the one that compiles."""
    examples: int = 60_000
    """How many examples an epoch has."""
    batch_size: int = 64
    """Examples in a step."""
    steps_per_call: int = STEPS_PER_CALL
    """The most steps in a chunk."""
    delay: float = 10.0
    """Milliseconds that the slow source takes for a batch; its steps take twice as long."""
    folder: Path | None = None
    """Where to put the files, 235 MB; a temporary folder by default."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    found = environment(("nnkit", "jax", "jaxlib", "numpy"))
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        found |= _streamed(config, Path(folder))
    found |= _delayed(config.delay / 1e3)
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _streamed(config: Config, folder: Path) -> dict[str, Any]:
    x, y = random_data(config.examples)
    raw = np.round(x * 255).astype(np.uint8)
    scaled = raw / np.float32(255)
    np.save(folder / "x.npy", scaled)
    np.save(folder / "raw.npy", raw)
    on_disk = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "raw")}
    scale: Callable[[Any], Any] = lambda batch: (batch[0] / np.float32(255), batch[1])
    options: dict[str, Any] = {"steps_per_call": config.steps_per_call}
    resident = Resident(
        (jnp.asarray(scaled), jnp.asarray(y)), config.batch_size, shuffle=True, drop_last=False, **options
    )
    feeds: dict[str, Feed] = {
        "resident": resident,
        "float32": train.Streaming(data.stream((on_disk["x"], y), config.batch_size), **options),
        "uint8": train.Streaming(data.stream((on_disk["raw"], y), config.batch_size, map=scale), **options),
    }
    runs = {name: _Run(feed) for name, feed in feeds.items()}
    times = interleaved({name: run.epoch for name, run in runs.items()}, config.rounds)
    for name, run in runs.items():
        for a, b in zip(
            jax.tree.leaves(runs["resident"].ts.params), jax.tree.leaves(run.ts.params), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)
    print(f"\n{config.examples} x {x.shape[1]}, {resident.steps} steps an epoch, {config.rounds} rounds")
    heads = ("median s", "min s", "max s", "ratio", "paired", "cpu", "waited s")
    print(" " * 10 + "".join(f"{head:>10s}" for head in heads))
    rows = {}
    ours = times["resident"]
    for name, t in times.items():
        rows[name] = row = {
            "median": t.median,
            "fastest": min(t.rounds),
            "slowest": max(t.rounds),
            "ratio": t.median / ours.median,
            "paired": statistics.median(a / b for a, b in zip(t.rounds, ours.rounds, strict=True)),
            "cpu": statistics.median(
                a / b for a, b in zip(runs[name].cpu, runs["resident"].cpu, strict=True)
            ),
            "waited": statistics.median(runs[name].waited[1:]),
        }
        print(f"{name:10s}" + "".join(f"{value:10.3f}" for value in row.values()))
    print(f"wanted: a ratio of at most {BOUND}; all ended with the same parameters")
    sources = {
        "resident": (scaled, y),
        "float32": data.stream((on_disk["x"], y), config.batch_size),
        "uint8": data.stream((on_disk["raw"], y), config.batch_size, map=scale),
    }
    return {
        "epochs": rows,
        "rounds": {name: t.rounds for name, t in times.items()},
        "fit": _in_fit(config, sources),
    }


def _in_fit(config: Config, sources: dict[str, Any], epochs: int = 4) -> dict[str, Any]:
    """Epochs of whole runs, the first of each left out, interleaved run by run."""
    trainer = _shared()
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(config.rounds + 1):
        for name, source in sources.items():
            size = config.batch_size if name == "resident" else None
            _, history = train.fit(trainer, source, epochs=epochs, key=jax.random.key(0), batch_size=size)
            if turn:  # the first run compiles
                seconds[name].append(statistics.mean(row["seconds"] for row in history[1:]))
    print(f"\nepochs 2 to {epochs} of fit, {config.rounds} runs of each")
    ours = seconds["resident"]
    rows = {}
    for name, found in seconds.items():
        rows[name] = {
            "median": statistics.median(found),
            "ratio": statistics.median(found) / statistics.median(ours),
            "paired": statistics.median(a / b for a, b in zip(found, ours, strict=True)),
        }
        print(f"{name:10s}" + "".join(f"{value:10.3f}" for value in rows[name].values()))
    return rows


class _Run:
    """A training that goes on by an epoch at each call."""

    def __init__(self, feed: Feed):
        self.feed, self.number = feed, 0
        self.cpu: list[float] = []
        self.waited: list[float] = []
        self.trainer = _shared()
        self.ts = self.trainer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 784), np.float32))

    def epoch(self) -> None:
        began, waited = time.process_time(), getattr(self.feed, "waited", 0.0)
        means, waiting = Means(), None
        for chunk in self.feed.chunks(self.ts.key, self.number, 0):
            self.ts, metrics, _ = dispatch(self.trainer, self.ts, chunk)
            if waiting is not None:
                means.add(*waiting)
            waiting = chunk, metrics
        if waiting is not None:
            means.add(*waiting)
        jax.block_until_ready(self.ts)
        self.number += 1
        self.cpu.append(time.process_time() - began)
        self.waited.append(getattr(self.feed, "waited", 0.0) - waited)


@functools.cache
def _shared() -> Trainer:
    """One trainer for all, so that all run the same program."""
    model = layers.serial(layers.dense(256), layers.relu, layers.dense(128), layers.relu, layers.dense(10))
    return train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-3))


def _delayed(delay: float, steps: int = 60) -> dict[str, Any]:
    """A source of a known delay under steps of twice that, on the host and so of known length too."""

    def batches(epoch: int, start: int) -> Iterator[np.ndarray]:
        for number in range(start, steps):
            time.sleep(delay)
            yield np.full((8, 4), number, np.float32)

    spec = jax.ShapeDtypeStruct((8, 4), np.float32)
    source = data.from_iterator(batches, steps=steps, spec=spec)
    alone = steps * 2 * delay
    rows = {}
    for epochs in (1, 3):
        with train.Streaming(source, steps_per_call=STEPS_PER_CALL, epochs=epochs) as feed:
            start = time.perf_counter()
            for epoch in range(epochs):
                for chunk in feed.chunks(jax.random.key(0), epoch, 0):
                    time.sleep(chunk.steps * 2 * delay)
            took = time.perf_counter() - start
        rows[f"{epochs} epochs"] = {"took": took, "steps_alone": epochs * alone, "waited": feed.waited}
        print(
            f"\nsource of {delay * 1e3:g} ms a batch under steps of {2e3 * delay:g} ms, {epochs} epochs of {steps}: "
            f"took {took:.3f} s, the steps alone {epochs * alone:.3f} s; waited {feed.waited * 1e3:.1f} ms"
        )
    return {"delayed": rows}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
