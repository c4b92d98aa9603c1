"""Parameters and state from and to the state dicts of PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnkit.interop.arrays import to_torch_tensor
from nnkit.interop.dialect import Dialect, Match
from nnkit.interop.flattening import Shape
from nnkit.interop.matching import invented, match
from nnkit.interop.names import Names
from nnkit.interop.parts import parts
from nnkit.interop.torch_forms import torch_forms
from nnkit.interop.trees import read_all, write_all
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["from_torch", "to_torch", "torch_names"]

_COUNTER = "num_batches_tracked"
_TORCH = Dialect("PyTorch", ".", torch_forms, ordered=True, numbered=True, left=rf"(.*\.)?{_COUNTER}")
_Flattened = Mapping[str, Sequence[int] | None] | None


def from_torch(
    model: Layer,
    x: Spec,
    state_dict: Mapping[str, Any],
    *,
    names: Names | None = None,
    flattened: _Flattened = None,
    ignore: str | None = None,
    key: Array | None = None,
) -> tuple[Params, State]:
    """``(params, state)`` of a model with the numbers of a PyTorch module's ``state_dict()``.

    What becomes of a layer's arrays follows from what it is: kernels are turned (a dense layer's (in, out)
    is (out, in) there, a convolution's (*window, in, out) is (out, in, *window)), the gates of recurrent
    layers and the projections of attention cut apart, LSTM's two biases added. A dense layer behind a
    flattened image has its rows permuted, since PyTorch flattens (channels, height, width). Every number
    keeps its bits and its dtype; the state dict is left as it is.

    Which layer is which of theirs is told by ``names``. The layers that it does not tell are theirs of the
    same paths, if each has one (so :func:`to_torch` is undone), and otherwise found by order: the n-th layer
    whose arrays have some names and numbers of axes is the n-th module with such, in the order in which ours
    is called and theirs was defined. See :func:`torch_names` for the result.

    Args:
      model: the counterpart of the module.
      x: an array or ``jax.ShapeDtypeStruct`` like its input, channels last, with a batch axis.
      state_dict: from names to tensors, or to arrays of numpy or JAX.
      names: from the path of a layer of ours to the name of their module: a dict
        (``{"stem": "features.0"}``, where a path stands for all beneath it too), or for all layers a
        function or rules ``[(regular expression, replacement)]``. Of a stacked recurrent module ``rnn:l1``
        is one layer, ``rnn:l1_reverse`` its backward direction.
      flattened: by the path of a dense layer, the shape (height, width, channels) that a flatten before
        it made its features of, or None where PyTorch has them in the same order. Found by itself where
        the flatten is a layer of the model.
      ignore: a regular expression: layers of ours (by path) that keep initial values, and arrays of
        theirs (by name) that are left out. ``num_batches_tracked`` always is.
      key: for the initial values of what is ignored, ``jax.random.key(0)`` by default.

    Raises:
      TypeError: an argument of another kind, as a module or a checkpoint around its state dict.
      ValueError: what has no counterpart or another shape, on both sides, by name; an array that JAX would
        cut to 32 bits.

    >>> import torch
    >>> theirs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = layers.serial(layers.dense(8), layers.relu, layers.dense(2))
    >>> params, state = interop.from_torch(model, jnp.zeros((1, 4)), theirs.state_dict())
    >>> y, _ = model.apply(params, state, jnp.ones((5, 4)), train=False)
    >>> bool(np.allclose(y, theirs(torch.ones(5, 4)).detach(), atol=1e-6))
    True
    """
    pairs = _pairs(model, x, _shapes(state_dict), names, flattened, ignore)
    return read_all(model, x, pairs, state_dict, jax.random.key(0) if key is None else key)


def to_torch(
    model: Layer,
    x: Spec,
    params: Params,
    state: State,
    like: Mapping[str, Any] | None = None,
    *,
    names: Names | None = None,
    flattened: _Flattened = None,
    ignore: str | None = None,
) -> dict[str, Any]:
    """The state dict with which a PyTorch module computes what ``model`` does; what :func:`from_torch` undoes.

    Args:
      model, x, names, flattened: see :func:`from_torch`.
      params, state: the model's numbers.
      like: the module's own ``state_dict()``, of which only names, shapes and counters of batches are used.
        Without it the modules are called as ``names`` says, or by our paths (``dense_0.weight``).
      ignore: as in :func:`from_torch`; what is ignored is not in the result.

    Returns:
      From names to new tensors, for ``module.load_state_dict``. An LSTM's second bias is 0.

    Raises:
      ImportError: PyTorch is not installed.
      ValueError: as :func:`from_torch` does, and for arrays that are not this model's.

    >>> model = layers.serial(layers.dense(2), layers.batch_norm())
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> theirs = interop.to_torch(model, jnp.zeros((1, 4)), params, state)
    >>> {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    {'dense_0.weight': (2, 4), 'dense_0.bias': (2,), 'batch_norm_0.weight': (2,), ...}
    """
    torch = _torch()
    shapes = None if like is None else _shapes(like)
    written = write_all(model, x, _pairs(model, x, shapes, names, flattened, ignore), params, state)
    tensors = {name: to_torch_tensor(array) for name, array in written.items()}
    for name in written:
        if name.endswith("running_var"):
            counter = name.removesuffix("running_var") + _COUNTER
            if like is None:
                tensors[counter] = torch.zeros((), dtype=torch.int64)
            elif counter in like:
                tensors[counter] = torch.as_tensor(like[counter]).clone()
    return tensors if like is None else {name: tensors[name] for name in like if name in tensors}


def torch_names(
    model: Layer,
    x: Spec,
    state_dict: Mapping[str, Any],
    *,
    names: Names | None = None,
    flattened: _Flattened = None,
    ignore: str | None = None,
) -> dict[str, str]:
    """Which module each layer with arrays is paired with by :func:`from_torch`: to look at, correct and pass on.

    >>> import torch
    >>> theirs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = layers.serial(layers.dense(8), layers.relu, head=layers.dense(2))
    >>> interop.torch_names(model, jnp.zeros((1, 4)), theirs.state_dict())
    {'dense_0': '0', 'head': '2'}
    """
    pairs = _pairs(model, x, _shapes(state_dict), names, flattened, ignore)
    return {pair.part.path: pair.prefix for pair in pairs}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("to_torch makes PyTorch's tensors: pip install torch") from error
    return torch


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, Shape]:
    if hasattr(state_dict, "state_dict"):
        raise TypeError(
            f"takes the state dict of a module, got a {type(state_dict).__name__}: pass module.state_dict()"
        )
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"takes a state dict, arrays by name, got a {type(state_dict).__name__}: pass module.state_dict()"
        )
    around = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
    if around:
        inner = [name for name in around if any(hasattr(a, "shape") for a in state_dict[name].values())]
        passed = " or ".join(f"checkpoint[{name!r}]" for name in inner) or "the state dict in it"
        raise TypeError(
            f"takes a state dict, arrays by name, got a dict with dicts in {around}: pass {passed}"
        )
    return {name: tuple(np.shape(value)) for name, value in state_dict.items()}


def _pairs(
    model: Layer,
    x: Spec,
    theirs: Mapping[str, Shape] | None,
    names: Names | None,
    flattened: _Flattened,
    ignore: str | None,
) -> list[Match]:
    ours = parts(model, x, flattened)
    if theirs is not None:
        return match(ours, theirs, _TORCH, names, ignore)
    return invented(ours, _TORCH, names, ignore)
