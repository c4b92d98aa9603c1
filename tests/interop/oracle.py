"""What the tests of nnkit.interop share: random arrays, PyTorch's outputs, and one comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from nnkit import interop, tree
from nnkit.types import Layer

# Of the largest output. Both sides sum the same products in another order: some ten roundings of 6e-8
# for these sizes in float32, of 1e-16 in float64, times the depth of what is compared.
BOUNDS = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}


def draw(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """All parameters and statistics away from where they start, which would hide what is swapped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, array in [*module.named_parameters(), *module.named_buffers()]:
            if not array.is_floating_point() or name.endswith(("_u", "_v")):
                continue
            if "var" in name:
                array.uniform_(0.5, 2.0, generator=generator)
            elif array.ndim < 2:
                array.uniform_(-1.0, 1.0, generator=generator).add_(0.1)
            else:
                array.normal_(0.0, array[0].numel() ** -0.5, generator=generator)
    return module


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.moveaxis(x, -1, 1).copy()) if x.ndim > 2 else torch.tensor(x)


def channels_last(y: torch.Tensor) -> np.ndarray:
    return np.moveaxis(y.detach().numpy(), 1, -1) if y.ndim > 2 else y.detach().numpy()


def close(ours: Any, theirs: Any) -> float:
    """Asserts that two arrays are equal within the bound of their dtype; returns how far apart they are."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert apart <= BOUNDS[ours.dtype], apart
    return apart


def same_bits(ours: Any, theirs: Any) -> None:
    """Asserts that two trees are equal in structure, dtype and every bit."""
    a, b = tree.flatten(ours), tree.flatten(theirs)
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def check_torch(
    model: Layer,
    x: np.ndarray,
    module: torch.nn.Module,
    run: Callable[[torch.nn.Module, np.ndarray], np.ndarray],
    *,
    train: bool = False,
    jit: bool = False,
    **options: Any,
) -> float:
    """From PyTorch the model computes what the module does; back and forth no bit is lost."""
    module = module.to(torch.float64 if x.dtype == np.float64 else torch.float32).train(train)
    theirs = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in theirs.items()}
    params, state = interop.from_torch(model, x, theirs, **options)
    made = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.structure((params, state)) == jax.tree.structure(made)
    wanted = run(module, x)
    forward = lambda params, state, x: model.apply(params, state, x, train=train)[0]
    apart = close((jax.jit(forward) if jit else forward)(params, state, x), wanted)
    back = interop.to_torch(model, x, params, state, theirs, **options)
    assert list(back) == list(theirs)
    again = interop.from_torch(model, x, back, **options)
    same_bits(again, (params, state))
    assert all(torch.equal(theirs[name], before[name]) for name in before)
    module.load_state_dict(back)
    close(run(module.train(train), x), wanted)
    return apart
