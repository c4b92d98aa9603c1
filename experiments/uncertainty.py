"""What a network does not know: Monte-Carlo dropout on rotated digits, calibration, and dropout's averages.

    python experiments/uncertainty.py                                          # the bundled digits
    python experiments/uncertainty.py --dataset mnist --data-dir DIR           # a folder of IDX files

prints three tables and writes rotation-<dataset>.png: a 1 turned by up to 180 degrees, as in figure 4 of Gal &
Ghahramani 2016, "Dropout as a Bayesian approximation".
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from uncertainty_plots import Rotation, plot_rotation

from nnkit import data, layers, losses, metrics, models, optim, train
from nnkit.modes import SAMPLING
from nnkit.types import Layer


@dataclasses.dataclass(frozen=True)
class Config:
    """Monte-Carlo dropout on rotated digits, calibration, and dropout's averages."""

    dataset: str = "digits"
    """digits (bundled), or mnist, fashion_mnist with --data-dir."""
    data_dir: Path | None = None
    """A folder of IDX files."""
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the hidden layers, each with dropout behind it."""
    dropout: float = 0.5
    """The probability of dropping a hidden unit."""
    epochs: int = 40
    """Passes over the training part."""
    batch_size: int = 64
    """Examples in a step."""
    learning_rate: float = 1e-3
    """Adam's."""
    examples: int | None = None
    """How many training examples to use; all of them by default."""
    samples: int = 100
    """Samples of Monte-Carlo dropout."""
    digit: int = 1
    """What is turned."""
    seed: int = 0
    """Decides split, initialisation, order and dropout."""
    out: Path = Path("runs/uncertainty")
    """Where the figure goes."""


class Trained(NamedTuple):
    """A network with what it has learnt."""

    model: Layer
    params: Any
    state: Any

    def logits(self, x: Any) -> np.ndarray:
        return train.predict(self.model, self.params, self.state, x)

    def doubts(self, x: Any, samples: int, key: Any) -> train.Uncertain:
        return train.predict(self.model, self.params, self.state, x, samples=samples, key=key)


def load_splits(config: Config) -> data.Splits:
    """Training, validation and test part, standardised by the training part."""
    splits = data.load(config.dataset, data_dir=config.data_dir)
    if splits.test is None:
        splits = data.split(splits.train, (0.6, 0.2, 0.2), seed=config.seed, stratify=True)
    else:
        splits = data.hold_out(splits, 0.1, seed=config.seed, stratify=True)
    return data.standardize(splits)


def fitted(model: Layer, config: Config, x: np.ndarray, y: np.ndarray) -> Trained:
    """The model after training on (x, y)."""
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(config.learning_rate))
    key = jax.random.key(config.seed)
    ts, _ = train.fit(
        trainer, (x, y), epochs=config.epochs, key=key, batch_size=config.batch_size, progress=False
    )
    return Trained(model, ts.params, ts.state)


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    """An image (height, width, channels) turned clockwise about its middle; beyond its border it is dark."""
    height, width = image.shape[:2]
    angle = np.deg2rad(degrees)
    rows, columns = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    at = [
        np.cos(angle) * rows - np.sin(angle) * columns + (height - 1) / 2,
        np.sin(angle) * rows + np.cos(angle) * columns + (width - 1) / 2,
    ]
    turn = lambda plane: jax.scipy.ndimage.map_coordinates(plane, at, order=1, cval=plane.min())
    return np.stack([turn(image[..., c]) for c in range(image.shape[-1])], axis=-1)


def turn(network: Trained, x: np.ndarray, label: int, samples: int, key: Any, several: int = 50) -> Rotation:
    """Turns the first of ``x``, images of the class ``label``, and the mean over ``several`` of them.

    The first is the one of which the network is surest.
    """
    x = x[np.argsort(network.doubts(x, samples, key).entropy, stable=True)]
    angles = np.arange(0, 181, 15)
    images = np.stack([[rotated(image, float(a)) for image in x[:several]] for a in angles])
    draw = jax.jit(
        jax.vmap(
            lambda s, x: network.model.apply(
                network.params, network.state, x, key=jax.random.fold_in(key, s), train=SAMPLING
            )[0],
            in_axes=(0, None),
        )
    )
    logits = np.asarray(draw(jnp.arange(samples), images[:, 0])).swapaxes(0, 1)
    found = network.doubts(images.reshape(-1, *images.shape[2:]), samples, key)
    over = lambda values: np.asarray(values).reshape(len(angles), -1).mean(axis=1)
    right = np.asarray(found.mean).argmax(-1) == label
    return Rotation(
        angles, images[:, 0], logits, over(found.entropy), over(found.mutual_information), over(right)
    )


class Quality(NamedTuple):
    """How good probabilities are."""

    error: float
    loss: float
    calibration: float


def quality(probabilities: Any, labels: Any) -> Quality:
    p = jnp.asarray(probabilities)
    bins = metrics.calibration_bins(p, labels, from_logits=False)
    right = jnp.take_along_axis(p, jnp.asarray(labels)[:, None], axis=-1)[:, 0]
    return Quality(
        error=1 - float(metrics.accuracy(p, labels).mean()),
        loss=float(-jnp.log(jnp.maximum(right, 1e-12)).mean()),
        calibration=float(metrics.expected_calibration_error(bins)),
    )


def calibrated(
    networks: dict[str, Trained], splits: data.Splits, samples: int, key: Any
) -> dict[str, Quality]:
    """Each network's test probabilities as they are, at the validation part's temperature, and by samples."""
    validation, test = splits.validation, splits.test
    assert validation is not None
    assert test is not None
    found: dict[str, Quality] = {}
    for name, network in networks.items():
        temperature = train.fit_temperature(network.logits(validation.x), validation.y)
        logits = network.logits(test.x)
        found[name] = quality(jax.nn.softmax(logits), test.y)
        found[f"{name}, temperature {temperature:.2f}"] = quality(
            jax.nn.softmax(logits / temperature), test.y
        )
    name = "dropout"
    doubts = networks[name].doubts(test.x, samples, key)
    found[f"{name}, mean of {samples} samples"] = quality(doubts.mean, test.y)
    return found


def averages(config: Config, splits: data.Splits, units: int = 10) -> dict[str, tuple[float, Quality]]:
    """A small network's ways to average over dropout's masks, beside all 2^units of them.

    Returns for each way the mean distance of its probabilities from the true average (half the sum of
    absolute differences) and their quality, on the test part.
    """
    assert splits.test is not None
    x, y = splits.test.x, splits.test.y
    rows: dict[str, tuple[float, Quality]] = {}
    for form in ("train", "test"):
        model = layers.serial(
            layers.flatten, layers.dense(units), layers.relu, layers.dropout(config.dropout, scale_at=form),
            layers.dense(len(splits.train.classes)),
        )  # fmt: skip
        network = fitted(model, config, splits.train.x, splits.train.y)
        exact = exact_average(
            network, x, config.dropout, 1 / (1 - config.dropout) if form == "train" else 1.0
        )
        key = jax.random.key(config.seed + 1)
        ways: dict[str, Callable[[], Any]] = {
            "all masks": lambda exact=exact: exact,
            "the whole network, scaled": lambda n=network: jax.nn.softmax(n.logits(x)),
            **{f"{s} samples": lambda n=network, s=s, k=key: n.doubts(x, s, k).mean for s in (10, 100, 1000)},
        }
        for name, way in ways.items():
            p = np.asarray(way())
            rows[f'scale_at="{form}", {name}'] = float(np.abs(p - exact).sum(-1).mean() / 2), quality(p, y)
    return rows


def exact_average(network: Trained, x: np.ndarray, rate: float, scale: float) -> np.ndarray:
    """The mean of the probabilities over all masks of the one hidden layer, each as likely as dropout draws it."""
    first, last = network.params["dense_0"], network.params["dense_1"]
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ first["kernel"] + first["bias"])
    units = hidden.shape[1]

    def add(total: Any, mask: Any) -> tuple[Any, None]:
        p = jax.nn.softmax((hidden * mask * scale) @ last["kernel"] + last["bias"])
        kept = mask.sum()
        return total + p * (1 - rate) ** kept * rate ** (units - kept), None

    masks = jnp.asarray(list(itertools.product([0.0, 1.0], repeat=units)), hidden.dtype)
    zeros = jnp.zeros((len(x), last["bias"].shape[0]), hidden.dtype)
    return np.asarray(jax.jit(lambda: jax.lax.scan(add, zeros, masks)[0])())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(q: Quality) -> list[str]:
    return [f"{q.error:.2%}", f"{q.loss:.4f}", f"{q.calibration:.4f}"]


def main(config: Config) -> int:
    try:
        splits = load_splits(config)
        x, y = (a[: config.examples] for a in (splits.train.x, splits.train.y))
        classes = len(splits.train.classes)
        if not 0 <= config.digit < classes:
            raise ValueError(f"digit must be one of the {classes} classes, got {config.digit}")
        plain = fitted(models.mlp(classes, hidden=config.hidden), config, x, y)
        dropped = fitted(models.mlp(classes, hidden=config.hidden, dropout=config.dropout), config, x, y)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    key = jax.random.key(config.seed + 1)
    assert splits.test is not None
    turned = turn(dropped, splits.test.x[splits.test.y == config.digit], config.digit, config.samples, key)
    path = config.out / f"rotation-{config.dataset}.png"
    plot_rotation(turned, path)
    print(
        f"{config.dataset}, {len(x)} training examples, hidden {config.hidden}, dropout {config.dropout:g}\n"
    )
    columns = zip(turned.angles, turned.accuracy, turned.entropy, turned.information, strict=True)
    print(
        table(
            ["degrees", "accuracy", "entropy", "mutual information"],
            [[str(a), f"{c:.0%}", f"{h:.3f}", f"{i:.3f}"] for a, c, h, i in columns],
        )
    )
    rows = calibrated({"no dropout": plain, "dropout": dropped}, splits, config.samples, key)
    header = ["test error", "negative log-likelihood", "calibration error"]
    print("\n" + table(["", *header], [[name, *shown(q)] for name, q in rows.items()]))
    small = dataclasses.replace(config, learning_rate=3 * config.learning_rate)
    ways = averages(small, splits._replace(train=dataclasses.replace(splits.train, x=x, y=y)))
    print(
        "\n"
        + table(
            ["", "distance from all masks", *header],
            [[name, f"{d:.4f}", *shown(q)] for name, (d, q) in ways.items()],
        )
    )
    print(f"\nthe figure is {path}")
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
