"""Layers beside Flax's and PyTorch's: output, state and the gradients of parameters and input.

A row is one line of TABLE: our layer, an input, Flax's module of the module ``flax.linen``, and a function of
PyTorch's module ``torch``, our parameters and state and x. Modes follow from the layer: one whose state
moves is compared in training and at test time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import layers
from nnkit.testing.adapters import of_flax, of_layer, of_torch_module
from nnkit.testing.equivalent import Distance, compare_steps
from nnkit.testing.table.row import Bound, Row
from nnkit.testing.trees import cast, map_floats, noise
from nnkit.types import Layer

__all__ = ["TABLE", "Case", "rows"]


class Case(NamedTuple):
    """A layer and its counterparts.

    Attributes:
      layer: ours.
      shape: of a normal input, or the input itself.
      flax: of ``flax.linen``, the module; its parameters have our names unless ``names`` says which.
      torch: of ``(torch, params, state, x)``, the output, or the output and the new state; of ``train`` too
        where there are two modes.
      train: the modes to compare.
      names: from our parameters to Flax's.
      moved: whether Flax's module takes ``use_running_average``.
    """

    layer: Layer
    shape: Any
    flax: Callable[[Any], Any] | None = None
    torch: Callable[..., Any] | None = None
    train: tuple[bool, ...] = (False,)
    names: Callable[[Any], Any] = lambda params: params
    moved: bool = False


def _first(x: Any) -> Any:
    """Channels first, for PyTorch."""
    return x.movedim(-1, 1)


def _last(x: Any) -> Any:
    return x.movedim(1, -1)


def _kernel(kernel: Any) -> Any:
    """(..., in, out) to PyTorch's (out, in, ...)."""
    return kernel.movedim(-1, 0).movedim(-1, 1)


def _torch_conv(T: Any, p: Any, x: Any, **more: Any) -> Any:
    conv = getattr(T.nn.functional, f"conv{x.ndim - 2}d")
    return _last(conv(_first(x), _kernel(p["kernel"]), p.get("bias"), **more))


def _torch_pool(T: Any, kind: str, x: Any, *args: Any, **more: Any) -> Any:
    return _last(getattr(T.nn.functional, f"{kind}_pool{x.ndim - 2}d")(_first(x), *args, **more))


def _torch_norm(T: Any, p: Any, s: Any, x: Any, train: bool) -> Any:
    mean, var = s["mean"].clone(), s["var"].clone()
    y = T.nn.functional.batch_norm(_first(x), mean, var, p["scale"], p["bias"], train, 0.1, 1e-5)
    return _last(y), {"mean": mean, "var": var}


def _torch_recurrent(kind: str, T: Any, p: Any, s: Any, x: Any) -> Any:
    module = getattr(T.nn, kind)(x.shape[-1], p["recurrent_kernel"].shape[0], batch_first=True, dtype=x.dtype)
    columns, bias = p["kernel"].shape[-1], p["bias"]
    # GRU's last block of biases is added to what is fed back.
    fed_back = T.cat([T.zeros_like(bias[: 2 * columns - len(bias)]), bias[columns:]])
    weights = {
        "weight_ih_l0": p["kernel"].T,
        "weight_hh_l0": p["recurrent_kernel"].T,
        "bias_ih_l0": bias[:columns],
        "bias_hh_l0": fed_back,
    }
    return T.func.functional_call(module, weights, (x,))[0]


IMAGE = (2, 8, 8, 4)
TABLE: dict[str, Case] = {
    "dense": Case(
        layers.dense(3),
        (5, 4),
        lambda nn: nn.Dense(3),
        lambda T, p, s, x: T.nn.functional.linear(x, p["kernel"].T, p["bias"]),
    ),
    "batch_norm": Case(
        layers.batch_norm(),
        (6, 3, 3, 4),
        lambda nn: nn.BatchNorm(use_fast_variance=False),
        train=(True, False),
        moved=True,
    ),
    "batch_norm (PyTorch's)": Case(
        layers.batch_norm(momentum=0.9, unbiased=True), (6, 3, 3, 4), torch=_torch_norm, train=(True, False)
    ),
    "dropout (test time)": Case(
        layers.dropout(0.5),
        (5, 4),
        lambda nn: nn.Dropout(0.5, deterministic=True),
        lambda T, p, s, x: T.nn.functional.dropout(x, 0.5, training=False),
    ),
    "prelu": Case(
        layers.prelu(), (5, 4), torch=lambda T, p, s, x: T.nn.functional.prelu(x, p["slope"].reshape(1))
    ),
    "layer_norm": Case(
        layers.layer_norm(),
        (5, 6),
        lambda nn: nn.LayerNorm(use_fast_variance=False),
        lambda T, p, s, x: T.nn.functional.layer_norm(x, (6,), p["scale"], p["bias"], 1e-6),
    ),
    "group_norm": Case(
        layers.group_norm(2),
        IMAGE,
        lambda nn: nn.GroupNorm(2, use_fast_variance=False),
        lambda T, p, s, x: _last(T.nn.functional.group_norm(_first(x), 2, p["scale"], p["bias"], 1e-6)),
    ),
    "instance_norm": Case(
        layers.instance_norm(),
        IMAGE,
        lambda nn: nn.InstanceNorm(use_fast_variance=False),
        lambda T, p, s, x: _last(
            T.nn.functional.instance_norm(_first(x), weight=p["scale"], bias=p["bias"], eps=1e-6)
        ),
    ),
    "rms_norm": Case(
        layers.rms_norm(),
        (5, 6),
        lambda nn: nn.RMSNorm(),
        lambda T, p, s, x: T.nn.functional.rms_norm(x, (6,), p["scale"], 1e-6),
    ),
    "conv": Case(
        layers.conv(3, (3, 3)),
        IMAGE,
        lambda nn: nn.Conv(3, (3, 3)),
        lambda T, p, s, x: _torch_conv(T, p, x, padding="same"),
    ),
    "conv (strides, dilation, VALID)": Case(
        layers.conv(3, (3, 2), strides=2, padding="VALID", kernel_dilation=2),
        IMAGE,
        lambda nn: nn.Conv(3, (3, 2), strides=2, padding="VALID", kernel_dilation=2),
        lambda T, p, s, x: _torch_conv(T, p, x, stride=2, dilation=2),
    ),
    "conv (groups, one dimension)": Case(
        layers.conv(4, (3,), feature_group_count=2),
        (2, 9, 4),
        lambda nn: nn.Conv(4, (3,), feature_group_count=2),
        lambda T, p, s, x: _torch_conv(T, p, x, padding="same", groups=2),
    ),
    "conv_transpose": Case(
        layers.conv_transpose(3, (3, 3), strides=2), IMAGE, lambda nn: nn.ConvTranspose(3, (3, 3), (2, 2))
    ),
    "max_pool": Case(
        layers.max_pool((2, 2), strides=(2, 2)),
        IMAGE,
        torch=lambda T, p, s, x: _torch_pool(T, "max", x, 2),
    ),
    "avg_pool": Case(
        layers.avg_pool((3, 3), strides=(2, 2)),
        IMAGE,
        torch=lambda T, p, s, x: _torch_pool(T, "avg", x, 3, 2),
    ),
    "embedding": Case(
        layers.embedding(7, 3),
        np.arange(6).reshape(2, 3),
        lambda nn: nn.Embed(7, 3),
        lambda T, p, s, x: T.nn.functional.embedding(x, p["embedding"]),
    ),
    "lstm": Case(layers.lstm(3), (2, 5, 4), torch=partial(_torch_recurrent, "LSTM")),
    "gru": Case(layers.gru(3), (2, 5, 4), torch=partial(_torch_recurrent, "GRU")),
    "simple_rnn": Case(layers.simple_rnn(3), (2, 5, 4), torch=partial(_torch_recurrent, "RNN")),
    "multi_head_attention": Case(
        layers.multi_head_attention(num_heads=2),
        (2, 5, 4),
        lambda nn: nn.MultiHeadDotProductAttention(num_heads=2),
    ),
}


def rows() -> Iterator[Row]:
    """Each layer and oracle in float32 and float64, the largest over its modes."""
    for name, case in TABLE.items():
        for oracle in ("flax", "torch"):
            if getattr(case, oracle) is not None:
                for dtype, bound in ((jnp.float32, 1e-5), (jnp.float64, 1e-10)):
                    measure = partial(_measure, case, oracle, dtype)
                    yield Row("layers", name, oracle, jnp.dtype(dtype).name, Bound(relative=bound), measure)


def _measure(case: Case, oracle: str, dtype: Any) -> Distance:
    with jax.enable_x64(dtype == jnp.float64):
        if isinstance(case.shape, tuple):
            inputs = [jnp.asarray(np.random.default_rng(i).normal(size=case.shape), dtype) for i in range(3)]
        else:
            inputs = [jnp.asarray(case.shape, jnp.int32)]
        params, state = case.layer.init(jax.random.key(0), inputs[0])
        start = map_floats(jnp.add, params, noise(params, 1, 0.3)), state
        start = cast(start, dtype)
        found = []
        for train in case.train:
            theirs = _flax(case, train) if oracle == "flax" else _torch(case, train)
            found.append(compare_steps(of_layer(case.layer, train=train), theirs, start, inputs))
    return Distance(max(d.ulps for d in found), *max((d[1:] for d in found), key=lambda d: d[0]))


def _flax(case: Case, train: bool) -> Any:
    import flax.linen as nn

    assert case.flax is not None
    return of_flax(case.flax(nn), train=train if case.moved else None, params=case.names)


def _torch(case: Case, train: bool) -> Any:
    import torch

    assert case.torch is not None
    call = partial(case.torch, torch)
    return of_torch_module(partial(call, train=train) if len(case.train) > 1 else call)
