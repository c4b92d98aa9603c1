"""Adam's update alone, in nnkit, optax and PyTorch, side by side: ``python -m benchmarks.optimizers``.

Three trees: ``resnet50``, the 161 tensors of a ResNet-50, 25.6 million numbers; ``small``, 2,000 small
tensors of the few sizes that biases and scales of networks have; ``different``, 2,000 small tensors of
as many sizes as there are from 1 to 300. Each call updates and applies: jitted with donated buffers in
nnkit and optax, in place in PyTorch with its ``foreach`` and ``fused`` forms. The gradients are fixed.
All run in one process, in turns whose order rotates. ``gain`` is the best peer's median over the row's;
``compile s`` of nnkit and optax is the time that XLA takes, tracing not included.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import compare, environment, interleaved, table
from nnkit import optim
from nnkit.checks import unknown_name

__all__ = ["TREES", "Config", "main", "resnet50"]

PACKAGES = ("nnkit", "jax", "jaxlib", "optax", "torch", "numpy")


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of a ResNet-50's parameters, kernels (height, width, in, out).

    >>> shapes = resnet50()
    >>> len(shapes), sum(math.prod(s) for s in shapes)
    (161, 25557032)
    """
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                convolutions.append((1, 1, inputs, 4 * width))
            for shape in convolutions:
                shapes += [shape, (shape[-1],), (shape[-1],)]
            inputs = 4 * width
    return [*shapes, (inputs, 1000), (1000,)]


def small() -> list[tuple[int, ...]]:
    """2,000 vectors of five sizes."""
    sizes = itertools.cycle((64, 128, 256, 512, 10))
    return [(next(sizes),) for _ in range(2000)]


def different() -> list[tuple[int, ...]]:
    """2,000 vectors of sizes drawn from 1 to 300."""
    return [(int(n),) for n in np.random.default_rng(0).integers(1, 301, 2000)]


TREES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet50": resnet50,
    "small": small,
    "different": different,
}
KINDS = ("nnkit", "optax", "torch.foreach", "torch.fused")


@dataclasses.dataclass(frozen=True)
class Config:
    """Adam's update alone, in nnkit and its peers, side by side."""

    trees: tuple[str, ...] = tuple(TREES)
    """Which trees of parameters."""
    kinds: tuple[str, ...] = KINDS
    """Which implementations."""
    rounds: int = 9
    """How many turns each takes."""
    updates: int = 10
    """Updates in a turn."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    for names, known, what in ((config.trees, TREES, "tree"), (config.kinds, KINDS, "implementation")):
        for name in names:
            if name not in known:
                raise unknown_name(what, name, known)
    found = environment(PACKAGES) | {"updates": config.updates, "trees": {}}
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}")
    print(f"python {found['python']}, " + ", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    for name in config.trees:
        shapes = TREES[name]()
        compiled: dict[str, float] = {}
        work = {kind: _work(kind, shapes, config.updates, compiled) for kind in config.kinds}
        times = interleaved(work, config.rounds)
        rows = [row._replace(compile=compiled.get(row.name, 0.0)) for row in compare(times)]
        count = sum(map(math.prod, shapes))
        print(f"\n{name}: {len(shapes)} tensors, {count:,} numbers, {config.rounds} rounds")
        print(table(rows, 1000 / config.updates, "ms"))
        found["trees"][name] = [row._asdict() for row in rows]
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _work(kind: str, shapes: list[Any], updates: int, compiled: dict[str, float]) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    params = [rng.normal(size=s).astype(np.float32) for s in shapes]
    grads = [rng.normal(size=s).astype(np.float32) for s in shapes]
    if kind.startswith("torch"):
        return _torch(kind.partition(".")[2], params, grads, updates)
    return _jax(kind, params, grads, updates, compiled)


def _jax(kind: str, params: Any, grads: Any, updates: int, compiled: dict[str, float]) -> Callable[[], None]:
    import optax

    module: Any = {"nnkit": optim, "optax": optax}[kind]
    tx = module.adam(1e-3)

    def step(params: Any, state: Any, grads: Any) -> Any:
        changes, state = tx.update(grads, state, params)
        return module.apply_updates(params, changes), state

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    now = (params, tx.init(params))
    run = jax.jit(step, donate_argnums=(0, 1))
    lowered = run.lower(*now, grads)
    start = time.perf_counter()
    lowered.compile()
    compiled[kind] = time.perf_counter() - start

    def work() -> None:
        nonlocal now
        for _ in range(updates):
            now = run(*now, grads)
        jax.block_until_ready(now)

    return work


def _torch(form: str, params: Any, grads: Any, updates: int) -> Callable[[], None]:
    import torch

    leaves = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = torch.from_numpy(grad)
    forms: dict[str, Any] = {form: True}
    optimizer = torch.optim.Adam(leaves, lr=1e-3, **forms)

    def work() -> None:
        for _ in range(updates):
            optimizer.step()

    return work


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
