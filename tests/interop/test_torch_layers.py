"""Every layer with a counterpart in PyTorch, by itself: outputs from its numbers, and the numbers back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from torch import nn

from nnkit import layers
from nnkit.types import Layer
from tests.interop.oracle import channels_first, channels_last, check_torch, draw, randomise

parametrizations = nn.utils.parametrizations


class Case(NamedTuple):
    name: str
    model: Layer
    shape: tuple[int, ...]
    module: Callable[[], nn.Module]
    run: Callable[[nn.Module, np.ndarray], np.ndarray]


def image(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return channels_last(module(channels_first(x)))


def sequence(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(torch.tensor(x)).detach().numpy()


def recurrent(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(torch.tensor(x))[0].detach().numpy()


def one_step(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(torch.tensor(x[:, 0]))[0].detach().numpy()[:, None]


def self_attention(module: nn.Module, x: np.ndarray) -> np.ndarray:
    x = torch.tensor(x)
    return module(x, x, x, need_weights=False)[0].detach().numpy()


def cross(model: Layer, key: int, value: int) -> Layer:
    """Attention to keys and values that are the first features of the queries."""
    return layers.wire(
        lambda net, x: net.attention(layers.Attend(x, x[..., :key], x[..., :value])), attention=model
    )


class Cross(nn.Module):
    def __init__(self, key: int, value: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=key, vdim=value, batch_first=True)
        self.key, self.value = key, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x[..., : self.key], x[..., : self.value])[0]


def torch_block(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, activation="gelu", **options
    )


def block(**options: Any) -> Layer:
    return layers.transformer_block(
        2,
        mlp_features=16,
        norm=lambda: layers.layer_norm(epsilon=1e-5),
        activation=layers.stateless(lambda x: jax.nn.gelu(x, approximate=False)),
        **options,
    )


# PyTorch registers a block's attention, two dense layers and two norms in this order, whatever comes first.
CASES = [
    Case("dense", layers.dense(5), (3, 4), lambda: nn.Linear(4, 5), sequence),
    Case(
        "dense without bias",
        layers.dense(5, use_bias=False),
        (3, 4),
        lambda: nn.Linear(4, 5, bias=False),
        sequence,
    ),
    Case("conv 1d", layers.conv(5, 3, padding=1), (2, 7, 4), lambda: nn.Conv1d(4, 5, 3, padding=1), image),
    Case(
        "conv 2d",
        layers.conv(5, (3, 2), strides=2, padding=0),
        (2, 7, 6, 4),
        lambda: nn.Conv2d(4, 5, (3, 2), 2),
        image,
    ),
    Case(
        "conv 3d",
        layers.conv(3, (1, 2, 3), padding=0),
        (2, 3, 4, 5, 2),
        lambda: nn.Conv3d(2, 3, (1, 2, 3)),
        image,
    ),
    Case(
        "conv groups",
        layers.conv(6, 3, padding=1, feature_group_count=2),
        (2, 5, 5, 4),
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        image,
    ),
    Case(
        "depthwise",
        layers.depthwise_conv(3, channel_multiplier=2, padding=1),
        (2, 5, 5, 4),
        lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
        image,
    ),
    Case(
        "separable",
        layers.separable_conv(3, 3, padding=1),
        (2, 5, 5, 4),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 3, 1)),
        image,
    ),
    Case(
        "conv_transpose as PyTorch's",
        layers.conv_transpose(6, 3, strides=2, padding=1, feature_group_count=2, convention="torch"),
        (2, 4, 4, 4),
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2),
        image,
    ),
    Case(
        "conv_transpose as Flax's",
        layers.conv_transpose(6, (3, 2), strides=2, padding="VALID", feature_group_count=2),
        (2, 4, 4, 4),
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), 2, groups=2),
        image,
    ),
    Case(
        "square conv_transpose as PyTorch's",
        layers.conv_transpose(4, 3, strides=2, padding=0, convention="torch"),
        (2, 4, 4),
        lambda: nn.ConvTranspose1d(4, 4, 3, 2),
        image,
    ),
    Case(
        "square conv_transpose as Flax's",
        layers.conv_transpose(4, 3, strides=2, padding="VALID"),
        (2, 4, 4),
        lambda: nn.ConvTranspose1d(4, 4, 3, 2),
        image,
    ),
    Case("batch_norm", layers.batch_norm(), (2, 3, 3, 4), lambda: nn.BatchNorm2d(4), image),
    Case(
        "batch_norm without scale",
        layers.batch_norm(use_scale=False, use_bias=False),
        (5, 4),
        lambda: nn.BatchNorm1d(4, affine=False),
        image,
    ),
    Case("layer_norm", layers.layer_norm(epsilon=1e-5), (2, 3, 4), lambda: nn.LayerNorm(4), sequence),
    Case(
        "layer_norm of images",
        layers.layer_norm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
        (2, 3, 2, 4),
        lambda: nn.LayerNorm((4, 3, 2)),
        image,
    ),
    Case("rms_norm", layers.rms_norm(epsilon=1e-5), (2, 3, 4), lambda: nn.RMSNorm(4, eps=1e-5), sequence),
    Case("group_norm", layers.group_norm(2, epsilon=1e-5), (2, 3, 3, 4), lambda: nn.GroupNorm(2, 4), image),
    Case(
        "instance_norm",
        layers.instance_norm(epsilon=1e-5),
        (2, 3, 3, 4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        image,
    ),
    Case("prelu", layers.prelu(), (3, 4), lambda: nn.PReLU(), sequence),
    Case("prelu per channel", layers.prelu(per_channel=True), (2, 3, 3, 4), lambda: nn.PReLU(4), image),
    Case(
        "patch_embed",
        layers.patch_embed(5, 2),
        (2, 4, 6, 3),
        lambda: nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.Flatten(2)),
        image,
    ),
    Case(
        "attention",
        layers.multi_head_attention(2),
        (2, 3, 8),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        self_attention,
    ),
    Case(
        "attention without bias",
        layers.multi_head_attention(2, use_bias=False),
        (2, 3, 8),
        lambda: nn.MultiheadAttention(8, 2, bias=False, batch_first=True),
        self_attention,
    ),
    Case(
        "cross-attention",
        cross(layers.multi_head_attention(2), 5, 3),
        (2, 3, 8),
        lambda: Cross(5, 3),
        sequence,
    ),
    Case("block, norms last", block(norm_first=False), (2, 3, 8), torch_block(), sequence),
    Case("block, norms first", block(), (2, 3, 8), torch_block(norm_first=True), sequence),
    Case(
        "weight_norm",
        layers.weight_norm(layers.conv(5, 3, padding=0)),
        (2, 5, 5, 4),
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 5, 3)),
        image,
    ),
    Case(
        "weight_norm of the whole, without bias",
        layers.weight_norm(layers.dense(5, use_bias=False), feature_axes=None),
        (3, 4),
        lambda: parametrizations.weight_norm(nn.Linear(4, 5, bias=False), dim=None),
        sequence,
    ),
    Case("simple_rnn", layers.simple_rnn(5), (2, 6, 3), lambda: nn.RNN(3, 5, batch_first=True), recurrent),
    Case("lstm", layers.lstm(5), (2, 6, 3), lambda: nn.LSTM(3, 5, batch_first=True), recurrent),
    Case("gru", layers.gru(5), (2, 6, 3), lambda: nn.GRU(3, 5, batch_first=True), recurrent),
    Case(
        "gru without bias",
        layers.gru(5, use_bias=False),
        (2, 6, 3),
        lambda: nn.GRU(3, 5, bias=False, batch_first=True),
        recurrent,
    ),
    Case(
        "two lstms in both directions",
        layers.stacked(*[layers.bidirectional(layers.lstm(4))] * 2),
        (2, 6, 3),
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        recurrent,
    ),
    Case("lstm cell", layers.lstm(5), (2, 1, 3), lambda: nn.LSTMCell(3, 5), one_step),
    Case(
        "spectral_norm",
        layers.spectral_norm(layers.conv(5, 3, padding=0), convention="pytorch"),
        (2, 5, 5, 4),
        lambda: parametrizations.spectral_norm(nn.Conv2d(4, 5, 3)),
        image,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pytorchs_layers_are_ours(case):
    """In float64, whose bound no wrong order could meet; float32 is that of test_mutants and test_flattening."""
    with jax.enable_x64(True):
        x = draw(0, *case.shape, dtype=np.float64)
        check_torch(case.model, x, randomise(case.module()), case.run)
