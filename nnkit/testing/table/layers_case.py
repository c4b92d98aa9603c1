"""What a row of layers compares, and how: our layer, its inputs, and a counterpart for each oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.adapters import of_layer
from nnkit.testing.equivalent import Distance, Steps, compare_steps
from nnkit.testing.trees import cast, is_float, map_floats, noise
from nnkit.types import Layer, PyTree

__all__ = ["Case", "Oracle", "Setting", "measure", "spec"]


class Setting(NamedTuple):
    """What a counterpart is made for.

    Attributes:
      layer: ours, from whose structure the parameters' names there follow.
      x: one input.
      start: our parameters and state.
      train: the mode.
    """

    layer: Layer
    x: PyTree
    start: tuple[PyTree, PyTree]
    train: bool


Oracle = Callable[[Setting], Steps]


class Case(NamedTuple):
    """A layer and its counterparts.

    Attributes:
      layer: ours.
      x: the shape of a normal input, or an input whose floating arrays are drawn anew for each step.
      flax: Flax linen's, made in ``layers_oracles`` as the two others.
      nnx: Flax nnx's.
      torch: PyTorch's.
      train: the modes, one after the other on the state that the one before left.
      steps: how many inputs, through which a state is carried.
    """

    layer: Layer
    x: Any
    flax: Oracle | None = None
    nnx: Oracle | None = None
    torch: Oracle | None = None
    train: tuple[bool, ...] = (False,)
    steps: int = 3


def measure(case: Case, oracle: str, dtype: Any, layer: Layer | None = None) -> Distance:
    """The largest distance over a case's modes and steps: output, state, gradients of parameters and input.

    Args:
      case: which.
      oracle: "flax", "nnx" or "torch".
      dtype: of the floating inputs and parameters.
      layer: measured in the place of the case's own, from whose parameters both start.
    """
    with jax.enable_x64(dtype == jnp.float64):
        inputs = [_input(case.x, dtype, seed) for seed in range(case.steps)]
        # An embedding's parameters do not follow from its input; noise makes sure that no bias is 0.
        params, state = cast(case.layer.init(jax.random.key(0), inputs[0]), dtype)
        start = map_floats(jnp.add, params, noise(params, 1, 0.3)), state
        found = []
        for train in case.train:
            ours = _ours(case.layer if layer is None else layer, train)
            theirs = getattr(case, oracle)(Setting(case.layer, inputs[0], start, train))
            found.append(compare_steps(ours, theirs, start, inputs))
            if train is not case.train[-1]:
                for x in inputs:
                    start, _ = _ours(case.layer, train).step(start, x)
    return Distance(max(d.ulps for d in found), *max((d[1:] for d in found), key=lambda d: d[0]))


@lru_cache(maxsize=8)
def _ours(layer: Layer, train: bool) -> Steps:
    """Compiled once for all oracles."""
    return of_layer(layer, train=train)


def spec(*shape: int) -> np.ndarray:
    """Stands for a normal array within an input that is a tree."""
    return np.zeros(shape)


def _input(x: Any, dtype: Any, seed: int) -> PyTree:
    if type(x) is tuple and all(isinstance(n, int) for n in x):
        x = spec(*x)
    rng = np.random.default_rng(seed)
    floats = map_floats(lambda a: rng.normal(size=np.shape(a)), x)
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype if is_float(a) else bool if a.dtype == bool else jnp.int32), floats
    )
