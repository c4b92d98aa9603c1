"""The classic trap: PyTorch flattens (channels, height, width), we (height, width, channels)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from nnkit import interop, layers, models
from tests.interop.oracle import channels_first, check_torch, close, draw, randomise


def run(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(channels_first(x)).detach().numpy()


def sequence(module: nn.Module, x: np.ndarray) -> np.ndarray:
    return module(torch.tensor(x)).detach().numpy()


reshape = layers.stateless(lambda x: x.reshape(x.shape[0], -1))
wired = layers.wire(
    lambda net, x: net.head(net.conv(x).reshape(x.shape[0], -1)), conv=layers.conv(5, 3), head=layers.dense(2)
)
conv = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(60, 2))

CASES = {
    "directly": (layers.serial(layers.conv(5, 3), layers.flatten, layers.dense(2)), (2, 4, 3, 3), conv),
    "by a function": (layers.serial(layers.conv(5, 3), reshape, layers.dense(2)), (2, 4, 3, 3), conv),
    "of the input": (
        layers.serial(layers.flatten, layers.dense(2)),
        (2, 4, 3, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 2)),
    ),
    "in nested combinators": (
        layers.serial(
            features=layers.serial(layers.conv(5, 3), layers.relu),
            rest=layers.serial(layers.serial(layers.flatten), head=layers.serial(layers.dense(2))),
        ),
        (2, 4, 3, 3),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(60, 2)),
    ),
    "behind it a norm, a slope and an activation": (
        layers.serial(
            layers.conv(5, 3), layers.flatten, layers.batch_norm(), layers.prelu(per_channel=True),
            layers.tanh, layers.dropout(0.5), layers.dense(4), layers.relu, layers.dense(2),
        ),
        (2, 4, 3, 3),
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.BatchNorm1d(60), nn.PReLU(60), nn.Tanh(),
            nn.Dropout(0.5), nn.Linear(60, 4), nn.ReLU(), nn.Linear(4, 2),
        ),
    ),
    "two heads": (
        layers.serial(
            layers.conv(5, 3), layers.flatten, layers.branch(layers.dense(2), layers.dense(3)),
            layers.concatenate(),
        ),
        (2, 4, 3, 3),
        None,
    ),
    "in one dimension": (
        layers.serial(layers.conv(5, 3), layers.flatten, layers.dense(2)),
        (2, 4, 3),
        nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(20, 2)),
    ),
    "in three dimensions": (
        layers.serial(layers.conv(5, 1), layers.flatten, layers.dense(2)),
        (2, 2, 3, 2, 3),
        nn.Sequential(nn.Conv3d(3, 5, 1), nn.Flatten(), nn.Linear(60, 2)),
    ),
    "normalised kernels": (
        layers.serial(
            layers.flatten,
            layers.weight_norm(layers.dense(4)),
            layers.spectral_norm(layers.dense(2), convention="pytorch"),
        ),
        (2, 4, 3, 3),
        nn.Sequential(
            nn.Flatten(),
            nn.utils.parametrizations.weight_norm(nn.Linear(36, 4)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)),
        ),
    ),
}  # fmt: skip


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(60, 2), nn.Linear(60, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).flatten(1)
        return torch.cat([self.a(h), self.b(h)], 1)


@pytest.mark.parametrize("case", CASES)
def test_a_flattened_image_is_found(case):
    model, shape, module = CASES[case]
    check_torch(model, draw(0, *shape), randomise(module or TwoHeads()), run)


def test_a_spectral_norm_of_flattened_features():
    model = layers.serial(layers.flatten, layers.spectral_norm(layers.dense(2), convention="pytorch"))
    module = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(36, 2)))
    x, module = draw(0, 3, 4, 3, 3), randomise(module).eval()
    params, state = interop.from_torch(model, x, module.state_dict())
    close(model.apply(params, state, x, train=False)[0], run(module, x))
    # A step of the power iteration, whose vectors are state, is the same too.
    y, state = model.apply(params, state, x, train=True)
    close(y, run(module.train(), x))
    close(model.apply(params, state, x, train=False)[0], run(module.eval(), x))


def test_lenets_features():
    model = models.lenet(10)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip
    check_torch(model, draw(0, 2, 28, 28, 1), randomise(module), run)


def test_sequences_flatten_to_the_same_order():
    model = layers.serial(layers.dense(5), layers.layer_norm(epsilon=1e-5), layers.flatten, layers.dense(2))
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(20, 2))
    check_torch(model, draw(0, 2, 4, 3), randomise(module), sequence)
    # What the first convolution has made channels-last stays so through whatever keeps the axes.
    model = layers.serial(
        layers.conv(5, 1), layers.relu, layers.max_pool((2,)), layers.flatten, layers.dense(2)
    )
    module = nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(10, 2))
    check_torch(model, draw(0, 2, 4, 3), randomise(module), run)


def test_a_residual_block_of_convolutions_in_one_dimension():
    """The sum is an operation of the combinator's: like what was computed last, it has channels."""
    model = layers.serial(layers.residual(layers.conv(3, 1)), layers.flatten, layers.dense(2))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(3, 3, 1), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x + self.conv(x)).flatten(1))

    check_torch(model, draw(0, 2, 4, 3), randomise(Residual()), run)


def test_an_average_over_all_pixels_needs_nothing():
    model = layers.serial(layers.conv(5, 3), layers.avg_pool((4, 3)), layers.flatten, layers.dense(2))
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.AvgPool2d((4, 3)), nn.Flatten(), nn.Linear(5, 2))
    check_torch(model, draw(0, 2, 4, 3, 3), randomise(module), run)


def test_where_it_cannot_be_told_it_must_be_said():
    x, module = draw(0, 2, 4, 3, 3), randomise(conv)
    message = (
        r"'head' has 60 input features, and they may be those of a flattened image, which PyTorch has in another "
        r"order: pass flattened=\{'head': \(height, width, channels\)\}, or None"
    )
    with pytest.raises(ValueError, match=message):
        interop.from_torch(wired, x, module.state_dict())
    check_torch(wired, x, module, run, flattened={"head": (4, 3, 5)})
    params, state = interop.from_torch(wired, x, module.state_dict(), flattened={"head": None})
    y = wired.apply(params, state, x, train=False)[0]
    assert float(abs(y - run(module, x)).max()) > 0.1
    with pytest.raises(
        ValueError, match=r"flattened\['head'\] is \(4, 3, 6\), which are 72 features, .* has 60"
    ):
        interop.from_torch(wired, x, module.state_dict(), flattened={"head": (4, 3, 6)})
    with pytest.raises(ValueError, match=r"flattened names \['haed'\], which are no layers with parameters"):
        interop.from_torch(wired, x, module.state_dict(), flattened={"head": (4, 3, 5), "haed": (4, 3, 5)})


@pytest.mark.parametrize(
    "body",
    [
        layers.residual(layers.dense(60)),
        layers.serial(layers.branch(layers.identity, layers.relu), layers.concatenate()),
        layers.wire(lambda net, x: net.a(x) + x, a=layers.dense(60)),
    ],
    ids=["residual", "concatenate", "wire"],
)
def test_features_of_two_orders_are_not_guessed(body):
    """A sum of flattened features with those of a dense layer has the order of neither library."""
    model = layers.serial(layers.conv(5, 3), layers.flatten, body, head=layers.dense(2))
    x = jnp.zeros((1, 4, 3, 3))
    params, state = model.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match=r"'head' has .* input features, and they may be those of a flattened image"
    ):
        interop.to_torch(model, x, params, state)


def test_a_reshape_of_each_step_is_told():
    """Only the flatten of all axes is found; for others the argument is there."""
    video = layers.stateless(lambda x: x.reshape(*x.shape[:2], -1), name="frames_")
    model = layers.serial(video, head=layers.dense(2))
    module = randomise(nn.Linear(24, 2))
    x = draw(0, 2, 3, 2, 4, 3)
    theirs = torch.tensor(np.moveaxis(x, -1, 2).copy()).flatten(2)
    params, state = interop.from_torch(
        model, x, module.state_dict(), names={"head": ""}, flattened={"head": (2, 4, 3)}
    )
    close(model.apply(params, state, x, train=False)[0], module(theirs).detach())


def test_a_function_that_flattens_is_asked_what_it_does():
    x, module = draw(0, 2, 4, 3, 3), randomise(conv)
    as_pytorch = layers.stateless(lambda x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1))
    check_torch(layers.serial(layers.conv(5, 3), as_pytorch, layers.dense(2)), x, module, run)
    other = layers.stateless(lambda x: jnp.moveaxis(x, 1, 2).reshape(x.shape[0], -1))
    with pytest.raises(
        ValueError, match="'dense_0' has 60 input features, and they may be those of a flattened"
    ):
        interop.from_torch(layers.serial(layers.conv(5, 3), other, layers.dense(2)), x, module.state_dict())
    hidden = layers.wire(lambda net, x: net.conv(x)[:, :2].reshape(x.shape[0], -1), conv=layers.conv(5, 3))
    model = layers.serial(hidden, head=layers.dense(2))
    params, state = model.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match="'head' has 30 input features, and they may be those of a flattened"
    ):
        interop.to_torch(model, x, params, state)
    pooled = layers.wire(lambda net, x: net.conv(x).mean((1, 2)), conv=layers.conv(5, 3))
    model = layers.serial(pooled, layers.residual(layers.dense(5)), head=layers.dense(2))
    params, state = model.init(jax.random.key(0), x)
    assert interop.to_torch(model, x, params, state)["head.weight"].shape == (2, 5)
