"""Layers that know no space and no time: dense ones, embeddings, dropout, normalisations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from nnkit import layers
from nnkit.testing.table.layers_case import Case
from nnkit.testing.table.layers_oracles import (
    ByHand,
    channels_first,
    linen,
    nnx,
    torch_function,
    torch_module,
)
from nnkit.types import Layer

__all__ = ["TABLE"]

IMAGE = (2, 8, 8, 4)
IDS = np.array([[0, 3, 5], [3, 3, 1]], np.int32)


def _running(f: Any, x: Any, train: bool) -> Any:
    return f(x, use_running_average=not train)


def _updating(f: Any, x: Any, train: bool) -> Any:
    return f(x, update_stats=train)


# Flax's wrappers name the arrays by the path of what they normalise.
WEIGHT_NORM = ByHand(
    lambda params, state: {
        "params/layer_instance/kernel": params["kernel"]["direction"],
        "params/layer_instance/bias": params["bias"],
        "params/layer_instance/kernel/scale": params["kernel"]["scale"],
    }
)
SPECTRAL_NORM = ByHand(
    lambda params, state: {
        "params/layer_instance/kernel": params["kernel"],
        "params/layer_instance/bias": params["bias"],
        "batch_stats/layer_instance/kernel/u": state["spectral_norm"]["kernel"]["u"][None],
        "batch_stats/layer_instance/kernel/sigma": jnp.ones((), params["kernel"].dtype),
    },
    lambda theirs: {"spectral_norm": {"kernel": {"u": theirs["batch_stats/layer_instance/kernel/u"][0]}}},
)
WEIGHT_NORM_NNX = ByHand(
    lambda params, state: {
        "layer_instance/kernel": params["kernel"]["direction"],
        "layer_instance/bias": params["bias"],
        "scales/('kernel',)": params["kernel"]["scale"],
    }
)
SPECTRAL_NORM_NNX = ByHand(
    lambda params, state: {
        "layer_instance/kernel": params["kernel"],
        "layer_instance/bias": params["bias"],
        "batch_stats/('kernel', 'u')": state["spectral_norm"]["kernel"]["u"][None],
        "batch_stats/('kernel', 'sigma')": jnp.ones((), params["kernel"].dtype),
    },
    lambda theirs: {"spectral_norm": {"kernel": {"u": theirs["batch_stats/('kernel', 'u')"][0]}}},
)

# Logits by an embedding's own table.
TIED = Layer(
    lambda key, x, /: layers.embedding(7, 3).init(key, IDS),
    lambda params, state, x, *, key=None, train: (layers.attend(params, x), state),
    "attend_",
)

TABLE: dict[str, Case] = {
    "dense": Case(
        layers.dense(3),
        (5, 4),
        linen(lambda nn: nn.Dense(3)),
        nnx(lambda nnx, rngs: nnx.Linear(4, 3, rngs=rngs)),
        torch_module(lambda T: T.nn.Linear(4, 3)),
    ),
    # nnx computes in what it was made in, float32, and not in its table's dtype; `float` follows JAX's setting.
    "embedding": Case(
        layers.embedding(7, 3),
        IDS,
        linen(lambda nn: nn.Embed(7, 3)),
        nnx(lambda nnx, rngs: nnx.Embed(7, 3, param_dtype=float, rngs=rngs)),
        torch_module(lambda T: T.nn.Embedding(7, 3)),
    ),
    "embedding (padding_idx)": Case(
        layers.embedding(7, 3, padding_idx=3),
        IDS,
        torch=torch_module(lambda T: T.nn.Embedding(7, 3, padding_idx=3)),
    ),
    "attend": Case(
        TIED,
        (5, 3),
        linen(lambda nn: nn.Embed(7, 3), lambda f, x, train: f(x, method="attend")),
        nnx(lambda nnx, rngs: nnx.Embed(7, 3, param_dtype=float, rngs=rngs), lambda f, x, train: f.attend(x)),  # pyright: ignore
        torch_function(lambda T, p, s, x: T.nn.functional.linear(x, p["embedding"])),
    ),
    "prelu": Case(
        layers.prelu(),
        (5, 4),
        linen(lambda nn: nn.PReLU()),
        nnx(lambda nnx, rngs: nnx.PReLU()),
        torch_module(lambda T: T.nn.PReLU()),
    ),
    "dropout (test time)": Case(
        layers.dropout(0.5),
        (5, 4),
        linen(lambda nn: nn.Dropout(0.5, deterministic=True)),
        nnx(lambda nnx, rngs: nnx.Dropout(0.5, rngs=rngs)),
        torch_module(lambda T: T.nn.Dropout(0.5)),
    ),
    "spatial_dropout (test time)": Case(
        layers.spatial_dropout(0.5),
        IMAGE,
        linen(lambda nn: nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=True)),
        nnx(lambda nnx, rngs: nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)),
        torch_module(lambda T: T.nn.Dropout2d(0.5), channels_first),
    ),
    "alpha_dropout (test time)": Case(
        layers.alpha_dropout(0.5), (5, 4), torch=torch_module(lambda T: T.nn.AlphaDropout(0.5))
    ),
    "batch_norm (50 batches)": Case(
        layers.batch_norm(),
        (6, 3, 3, 4),
        linen(lambda nn: nn.BatchNorm(use_fast_variance=False), _running),
        nnx(lambda nnx, rngs: nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs)),
        train=(True, False),
        steps=50,
    ),
    "batch_norm (PyTorch's, 50 batches)": Case(
        layers.batch_norm(momentum=0.9, unbiased=True),
        (6, 3, 3, 4),
        torch=torch_module(lambda T: T.nn.BatchNorm2d(4), channels_first),
        train=(True, False),
        steps=50,
    ),
    "layer_norm": Case(
        layers.layer_norm(),
        (5, 6),
        linen(lambda nn: nn.LayerNorm(use_fast_variance=False)),
        nnx(lambda nnx, rngs: nnx.LayerNorm(6, use_fast_variance=False, rngs=rngs)),
        torch_module(lambda T: T.nn.LayerNorm(6, 1e-6)),
    ),
    "layer_norm (several axes)": Case(
        layers.layer_norm(reduction_axes=(-2, -1), feature_axes=(-2, -1), epsilon=1e-5),
        (5, 3, 4),
        linen(
            lambda nn: nn.LayerNorm(
                reduction_axes=(-2, -1), feature_axes=(-2, -1), epsilon=1e-5, use_fast_variance=False
            )
        ),
        torch=torch_function(
            lambda T, p, s, x: T.nn.functional.layer_norm(x, (3, 4), p["scale"], p["bias"], 1e-5)
        ),
    ),
    "group_norm": Case(
        layers.group_norm(2),
        IMAGE,
        linen(lambda nn: nn.GroupNorm(2, use_fast_variance=False)),
        nnx(lambda nnx, rngs: nnx.GroupNorm(4, 2, use_fast_variance=False, rngs=rngs)),
        torch_module(lambda T: T.nn.GroupNorm(2, 4, 1e-6), channels_first),
    ),
    "instance_norm": Case(
        layers.instance_norm(),
        IMAGE,
        linen(lambda nn: nn.InstanceNorm(use_fast_variance=False)),
        nnx(lambda nnx, rngs: nnx.InstanceNorm(4, use_fast_variance=False, rngs=rngs)),
        torch_module(lambda T: T.nn.InstanceNorm2d(4, 1e-6, affine=True), channels_first),
    ),
    "rms_norm": Case(
        layers.rms_norm(),
        (5, 6),
        linen(lambda nn: nn.RMSNorm()),
        nnx(lambda nnx, rngs: nnx.RMSNorm(6, rngs=rngs)),
        torch_module(lambda T: T.nn.RMSNorm(6, 1e-6)),
    ),
    "weight_norm": Case(
        layers.weight_norm(layers.dense(3)),
        (5, 4),
        linen(lambda nn: nn.WeightNorm(nn.Dense(3)), by_hand=WEIGHT_NORM),
        nnx(
            lambda nnx, rngs: nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs), by_hand=WEIGHT_NORM_NNX
        ),
        torch_module(lambda T: T.nn.utils.parametrizations.weight_norm(T.nn.Linear(4, 3))),
    ),
    "spectral_norm": Case(
        layers.spectral_norm(layers.dense(3)),
        (5, 4),
        linen(lambda nn: nn.SpectralNorm(nn.Dense(3)), _updating, SPECTRAL_NORM),
        nnx(
            lambda nnx, rngs: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
            _updating,
            SPECTRAL_NORM_NNX,
        ),
        train=(True, False),
        steps=8,
    ),
    "spectral_norm (PyTorch's)": Case(
        layers.spectral_norm(layers.dense(3), convention="pytorch"),
        (5, 4),
        torch=torch_module(lambda T: T.nn.utils.parametrizations.spectral_norm(T.nn.Linear(4, 3))),
        train=(True, False),
        steps=8,
    ),
}
