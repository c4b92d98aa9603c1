"""Convolution and pooling, in a loop and outside, in nnkit, XLA and PyTorch: ``python -m benchmarks.convolution``.

Each row is one layer, forward and backward, or one of its three parts. ``nnkit`` and ``lax`` take their
steps within a ``lax.scan``, as nnkit trains; ``nnkit call`` and ``lax call`` are one jitted call a step.
The inputs change from step to step, which costs a pass over them: with the same ones XLA would compute
the gradient once and hoist it out of the loop. ``torch`` is PyTorch's own, channels last (oneDNN). All run
in one process, in turns whose order rotates; ``gain`` is how many times as long as nnkit's loop a row takes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Times, environment, interleaved
from nnkit import ops
from nnkit.checks import unknown_name

__all__ = ["LAYERS", "Config", "Layer", "main"]

PACKAGES = ("nnkit", "jax", "jaxlib", "torch", "numpy")
OPTIONS = {"xla_cpu_prefer_vector_width": 512}  # as nnkit's compiled loop asks for


class Layer(NamedTuple):
    """A convolution of square images, or a pool where there is no output.

    Attributes:
      batch: examples.
      size: of each side.
      inputs: channels.
      outputs: channels, or 0 for a max-pool.
      window: size of each side.
      strides: along each side.
      groups: of the channels.
    """

    batch: int
    size: int
    inputs: int
    outputs: int
    window: int = 3
    strides: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        """As many zeros on each side."""
        return (self.window - 1) // 2 if self.outputs else 0

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of the output."""
        side = (self.size + 2 * self.padding - self.window) // self.strides + 1
        return (self.batch, side, side, self.outputs or self.inputs)


LAYERS = {
    "64 channels": Layer(32, 32, 64, 64),
    "small cnn 1": Layer(128, 28, 1, 32),
    "small cnn 2": Layer(128, 14, 32, 64),
    "pool 1": Layer(128, 28, 32, 0, 2, 2),
    "pool 2": Layer(128, 14, 64, 0, 2, 2),
    "overlapping pool": Layer(32, 56, 64, 0, 3, 2),
    "resnet stem": Layer(32, 32, 3, 64),
    "resnet 2": Layer(32, 16, 128, 128),
    "resnet 3": Layer(32, 8, 256, 256),
    "resnet 4": Layer(32, 4, 512, 512),
    "resnet halving": Layer(32, 32, 64, 128, 3, 2),
    "resnet shortcut": Layer(32, 32, 64, 128, 1, 2),
    "bottleneck": Layer(32, 16, 256, 64, 1),
    "depthwise": Layer(32, 32, 64, 64, 3, 1, 64),
}
PARTS = ("both", "forward", "input", "kernel")
KINDS = ("nnkit", "nnkit call", "lax", "lax call", "torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """Convolution and pooling, in a loop and outside, in nnkit, XLA and PyTorch."""

    layers: tuple[str, ...] = ("64 channels", "small cnn 1", "small cnn 2", "pool 1")
    """Which layers."""
    parts: tuple[str, ...] = ("both",)
    """Forward and backward, or which of forward, gradient of the input and gradient of the kernel."""
    kinds: tuple[str, ...] = KINDS
    """Which implementations."""
    rounds: int = 9
    """How many turns each takes."""
    steps: int = 3
    """Steps in a turn."""
    json: Path | None = None
    """Where to write all numbers."""


def main(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, writes ``config.json`` and returns what is in it."""
    for names, known, what in (
        (config.layers, LAYERS, "layer"),
        (config.parts, PARTS, "part"),
        (config.kinds, KINDS, "implementation"),
    ):
        for name in names:
            if name not in known:
                raise unknown_name(what, name, known)
    found = environment(PACKAGES) | {"steps": config.steps, "rows": []}
    print(f"{found['date']}  {found['cpu']}, {found['cores']} cores, load {found['load']}")
    print(f"python {found['python']}, " + ", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    for name in config.layers:
        for part in config.parts:
            if part == "kernel" and not LAYERS[name].outputs:
                continue
            work = {kind: _work(kind, LAYERS[name], part, config.steps) for kind in config.kinds}
            times = interleaved(work, config.rounds)
            print(f"\n{name}, {part}: {tuple(LAYERS[name])}")
            for kind, t in times.items():
                row = _row(name, part, kind, t, times, config.steps)
                found["rows"].append(row)
                print(
                    f"  {kind:12s} {row['median_ms']:9.2f} ms  min {row['fastest_ms']:9.2f}  gain {row['gain']:6.2f}"
                )
    if config.json is not None:
        config.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _row(name: str, part: str, kind: str, t: Times, times: dict[str, Times], steps: int) -> dict[str, Any]:
    ours = times.get("nnkit", t)
    return {
        "layer": name,
        "part": part,
        "kind": kind,
        "median_ms": t.median / steps * 1e3,
        "fastest_ms": min(t.rounds) / steps * 1e3,
        "gain": t.median / ours.median,
    }


def _arrays(layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    kernel = (layer.window, layer.window, layer.inputs // layer.groups, max(layer.outputs, 1))
    shapes = ((layer.batch, layer.size, layer.size, layer.inputs), kernel, layer.output)
    x, w, y = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return x, w / np.float32(math.sqrt(math.prod(kernel[:-1]))), y


def _work(kind: str, layer: Layer, part: str, steps: int) -> Callable[[], Any]:
    if kind == "torch":
        return _torch(layer, part, steps)
    operands = tuple(map(jnp.asarray, _arrays(layer)))
    step = functools.partial(_step, _function(kind.split()[0], layer), part, bool(layer.outputs))

    def advance(operands: Any) -> Any:
        results = step(*operands)
        change = sum(r[(-1,) * r.ndim] for r in results) * 1e-30  # so that nothing can leave the loop
        return tuple(v + change for v in operands), results

    if kind.endswith("call"):
        call, now = jax.jit(advance, compiler_options=OPTIONS, donate_argnums=0), operands

        def calls() -> None:
            nonlocal now
            for _ in range(steps):
                now, results = call(now)
                jax.block_until_ready(results)

        return calls

    def loop(operands: Any) -> Any:
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, *operands))
        return jax.lax.scan(
            lambda carry, _: (advance(carry[0]), None), (operands, start), None, length=steps
        )[0][1]

    run = jax.jit(loop, compiler_options=OPTIONS)
    return lambda: jax.block_until_ready(run(operands))


def _step(f: Callable[..., Any], part: str, has_kernel: bool, x: Any, w: Any, y: Any) -> tuple[Any, ...]:
    if part == "forward":
        return (f(x, w),)
    if part == "input" or not has_kernel:
        result, back = jax.vjp(lambda x: f(x, w), x)
        return back(y) if part == "input" else (result, *back(y))
    if part == "kernel":
        return jax.vjp(lambda w: f(x, w), w)[1](y)
    result, back = jax.vjp(f, x, w)
    return result, *back(y)


def _function(module: str, layer: Layer) -> Callable[..., Any]:
    strides, padding = (layer.strides,) * 2, ((layer.padding, layer.padding),) * 2
    if module == "nnkit" and layer.outputs:
        return lambda x, w: ops.conv(x, w, strides=strides, padding=padding, feature_group_count=layer.groups)
    if module == "nnkit":
        return lambda x, w: ops.max_pool(x, (layer.window,) * 2, strides=strides, padding=padding)
    if layer.outputs:
        return lambda x, w: jax.lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer.groups,
        )
    window = (1, layer.window, layer.window, 1)
    return lambda x, w: jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, (1, *strides, 1), "VALID")


def _torch(layer: Layer, part: str, steps: int) -> Callable[[], Any]:
    import torch

    x, w, y = (torch.from_numpy(v) for v in _arrays(layer))
    # Channels last in memory, channels second in the shape.
    x, y, w = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1)
    w = w.contiguous(memory_format=torch.channels_last)
    wanted = {"both": (x, w), "forward": (), "input": (x,), "kernel": (w,)}[part]
    wanted = tuple(v for v in wanted if v is not w or layer.outputs)
    for leaf in wanted:
        leaf.requires_grad_()

    def forward() -> Any:
        if layer.outputs:
            return torch.nn.functional.conv2d(x, w, None, layer.strides, layer.padding, 1, layer.groups)
        return torch.nn.functional.max_pool2d(x, layer.window, layer.strides)

    result = forward()

    def work() -> None:
        nonlocal result
        for _ in range(steps):
            if part in ("both", "forward"):
                result = forward()
            if wanted:
                torch.autograd.grad(result, wanted, y, retain_graph=part != "both")

    return work


if __name__ == "__main__":
    import tyro

    start = time.perf_counter()
    main(tyro.cli(Config, description=__doc__))
    print(f"\n{time.perf_counter() - start:.0f} s")
