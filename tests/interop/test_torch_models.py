"""Whole networks of PyTorch's and the same here: a residual one, transformers, recurrent ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from nnkit import interop, layers, models, tree
from tests.interop.oracle import channels_first, check_torch, close, draw, randomise, same_bits


class BasicBlock(nn.Module):
    """torchvision's, whose names are those of published weights."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride > 1 or channels != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, width: int = 64, classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for i in range(4):
            features = width * 2**i
            first = BasicBlock(channels, features, 1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(first, BasicBlock(features, features, 1)))
            channels = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


# From our paths to torchvision's names; what is left of a path then has / for its dots.
TORCHVISION = [
    (r"^head$", "fc"),
    (r"^stem/conv_0$", "conv1"),
    (r"^stem/batch_norm_0$", "bn1"),
    *((rf"^stage_{i}/block_(\d)/residual/", rf"layer{i + 1}/\1/") for i in range(4)),
    (r"body/conv_0$", "conv1"),
    (r"body/conv_1$", "conv2"),
    (r"body/batch_norm_0$", "bn1"),
    (r"body/batch_norm_1$", "bn2"),
    (r"shortcut/conv_0$", "downsample/0"),
    (r"shortcut/batch_norm_0$", "downsample/1"),
]


def run_image(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(channels_first(x)).detach().numpy()


def test_a_resnet_18_of_torchvision():
    module = randomise(ResNet18())
    assert sum(p.numel() for p in module.parameters()) == 11_689_512
    model, x = models.resnet18(1000), draw(0, 2, 64, 64, 3)
    theirs = module.state_dict()
    params, state = interop.from_torch(model, x, theirs)
    assert tree.count(params) == 11_689_512
    same_bits(interop.from_torch(model, x, theirs, names=TORCHVISION), (params, state))
    names = interop.torch_names(model, x, theirs)
    assert names["stage_3/block_0/residual/shortcut/batch_norm_0"] == "layer4.0.downsample.1"
    module.eval()
    close(jax.jit(lambda *a: model.apply(*a, train=False)[0])(params, state, x), run_image(module, x))
    back = interop.to_torch(model, x, params, state, theirs)
    assert list(back) == list(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    same_bits(interop.from_torch(model, x, back), (params, state))
    unguided = interop.to_torch(model, x, params, state, names=TORCHVISION)
    assert unguided.keys() == theirs.keys()
    assert all(torch.equal(unguided[name], theirs[name]) for name in theirs if "num_batches" not in name)
    twin = ResNet18()
    twin.load_state_dict(unguided)
    assert np.array_equal(run_image(twin.eval(), x), run_image(module, x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("width", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_a_resnet_18_in_both_modes_and_precisions(train, width):
    model = models.resnet(10, stages=(2, 2, 2, 2), width=width)
    for dtype in (np.float32, np.float64) if train or width == 64 else (np.float64,):
        with jax.enable_x64(dtype == np.float64):
            # In training the last statistics are those of 4·2·2 values; not of fewer, since the division by a
            # deviation near 0 multiplies every rounding.
            x = draw(0, 4, 64, 64, 3, dtype=dtype)
            module = randomise(ResNet18(width, 10))
            check_torch(model, x, module, run_image, train=train, jit=True, names=TORCHVISION)


def transformer(depth: int, *, repeated: bool) -> Any:
    block = layers.transformer_block(2, mlp_features=16, activation=layers.relu, norm=norm)
    body = layers.repeat(block, depth) if repeated else layers.serial(*[block] * depth)
    return layers.serial(embedding=layers.embedding(11, 8), body=body, norm=norm(), head=layers.dense(3))


def norm() -> Any:
    return layers.layer_norm(epsilon=1e-5)


class Transformer(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids)))


TRANSFORMER = [
    (r"^body/(transformer_block_|block/)(\d)", r"encoder/layers/\2"),
    (r"^norm$", "encoder/norm"),
    (r"attention_norm$", "norm1"),
    (r"mlp_norm$", "norm2"),
    (r"attention$", "self_attn"),
    (r"mlp/dense_0$", "linear1"),
    (r"mlp/dense_1$", "linear2"),
]


@pytest.mark.parametrize("repeated", [False, True])
def test_a_transformer(repeated):
    """PyTorch defines a block's attention before its norms and calls it after: kinds are ordered by themselves."""
    module, model = randomise(Transformer(3)), transformer(3, repeated=repeated)
    ids = np.random.default_rng(0).integers(0, 11, (2, 5))
    for x64 in (False, True):
        with jax.enable_x64(x64):
            module.to(torch.float64 if x64 else torch.float32).eval()
            x = jnp.asarray(ids, jnp.int32)
            theirs = module.state_dict()
            params, state = interop.from_torch(model, x, theirs)
            same_bits(interop.from_torch(model, x, theirs, names=TRANSFORMER), (params, state))
            close(model.apply(params, state, x, train=False)[0], module(torch.tensor(ids)).detach())
            for back in (
                interop.to_torch(model, x, params, state, theirs),
                interop.to_torch(model, x, params, state, names=TRANSFORMER),
            ):
                assert back.keys() == theirs.keys()
                assert all(torch.equal(back[name], theirs[name]) for name in theirs)


class Classifier(nn.Module):
    """Stacked recurrent layers over ragged sequences, the last state classified."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.rnn = kind(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), lengths, batch_first=True, enforce_sorted=False
        )
        _, carry = self.rnn(packed)
        last = carry[0] if isinstance(carry, tuple) else carry
        return self.head(last[-1])


def classifier(kind: Any) -> Any:
    def forward(net: Any, given: Any) -> Any:
        ids, lengths = given
        return net.head(net.rnn(layers.Sequence(net.embedding(ids), lengths)))

    rnn = layers.stacked(kind(5), kind(5, last_only=True))
    return layers.wire(forward, embedding=layers.embedding(11, 4), rnn=rnn, head=layers.dense(3))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(layers.lstm, nn.LSTM), (layers.gru, nn.GRU), (layers.simple_rnn, nn.RNN)]
)
def test_a_classifier_of_ragged_sequences(ours, theirs):
    model, module = classifier(ours), randomise(Classifier(theirs))
    ids, lengths = np.random.default_rng(0).integers(0, 11, (4, 6)), np.array([6, 1, 3, 5])
    for x64 in (False, True):
        with jax.enable_x64(x64):
            module.to(torch.float64 if x64 else torch.float32)
            x = jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32)
            numbers = module.state_dict()
            params, state = interop.from_torch(model, x, numbers)
            names = [(r"^rnn/.*_(\d)$", r"rnn:l\1")]
            same_bits(interop.from_torch(model, x, numbers, names=names), (params, state))
            wanted = module(torch.tensor(ids), torch.tensor(lengths)).detach()
            close(model.apply(params, state, x, train=False)[0], wanted)
            back = interop.to_torch(model, x, params, state, numbers)
            same_bits(interop.from_torch(model, x, back), (params, state))
            module.load_state_dict(back)
            close(module(torch.tensor(ids), torch.tensor(lengths)).detach(), wanted)
            assert interop.to_torch(model, x, params, state, names=names).keys() == numbers.keys()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.dense = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.dense(self.embedding(ids)))


def test_tied_weights():
    body = layers.serial(layers.embedding(7, 4), layers.dense(4), head=layers.dense(7, use_bias=False))
    model = layers.share(body, {"head/kernel": ("embedding_0/embedding", jnp.transpose)})
    module, ids = randomise(Tied()), jnp.array([[1, 2, 6]])
    numbers = module.state_dict()
    params, state = interop.from_torch(model, ids, numbers, ignore=r"head\.weight")
    wanted = module(torch.tensor(np.asarray(ids))).detach()
    close(model.apply(params, state, ids, train=False)[0], wanted)
    back = interop.to_torch(model, ids, params, state, numbers, ignore=r"head\.weight")
    twin = randomise(Tied(), seed=1)
    twin.load_state_dict(back, strict=False)
    assert torch.equal(twin(torch.tensor(np.asarray(ids))), wanted)
