"""Trains a variational autoencoder on small images and draws what it makes of them.

    python experiments/vae.py                                   # the bundled digits
    python experiments/vae.py --dataset mnist --data-dir DIR    # a folder of IDX files

``runs/<name>/`` then holds config.json, metrics.csv, result.json, the parameters, reconstructions.png
(test images above what the network makes of them) and samples.png (images that never were).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import data, layers, losses, optim, train, tree
from nnkit.types import Layer, Objective


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a variational autoencoder on small images."""

    dataset: str = "digits"
    """digits (bundled); mnist, fashion_mnist with --data-dir; or any set of TensorFlow Datasets."""
    data_dir: Path | None = None
    """A folder of IDX files, or TensorFlow Datasets' own."""
    latent: int = 16
    """Numbers in the code of an image."""
    channels: tuple[int, int] = (32, 64)
    """Of the encoder's two convolutions, and in reverse of the decoder's."""
    hidden: int = 256
    """Width of the dense layer on both sides of the code."""
    epochs: int | None = None
    """Passes over the training part. [20; digits 120]"""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 2e-3
    """Adam's, which falls to 0 along a cosine."""
    samples: int = 64
    """Of the code for each test image, for the estimate of its likelihood."""
    seed: int = 0
    """Decides initialisation, order and codes."""
    name: str | None = None
    """The run's folder in --runs; by default vae, data set and seed."""
    runs: Path = Path("runs")
    """Where run folders go."""
    overwrite: bool = False
    """Replace a run of the same name."""


def autoencoder(image: tuple[int, int, int], config: Config) -> dict[str, Layer]:
    """Encoder and decoder: images to the mean and log-variance of their code, codes to logits of pixels."""
    height, width, depth = image
    if height % 4 or width % 4:
        raise ValueError(f"the images must have sides that 4 divides, got {height} by {width}")
    first, second = config.channels

    def shrink(features: int) -> Layer:
        return layers.conv(features, (3, 3), strides=(2, 2))

    def grow(features: int) -> Layer:
        return layers.conv_transpose(features, (3, 3), strides=(2, 2))

    small = (height // 4, width // 4, second)
    return {
        "encoder": layers.serial(
            shrink(first), layers.relu, shrink(second), layers.relu, layers.flatten,
            layers.dense(config.hidden), layers.relu,
            layers.branch(mean=layers.dense(config.latent), log_var=layers.dense(config.latent)),
        ),
        "decoder": layers.serial(
            layers.dense(config.hidden), layers.relu, layers.dense(int(np.prod(small))), layers.relu,
            layers.stateless(lambda h: h.reshape(-1, *small), name="image"),
            grow(first), layers.relu, grow(depth),
        ),
    }  # fmt: skip


def bound(nets: dict[str, Layer], params: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """Both parts of the evidence lower bound of each image, for one code drawn by the encoder.

    With pixels x as probabilities, code z = m + s e, e ~ N(0, 1)::

        -log p(x | z) = sum of the pixels' cross-entropies
        KL(q(z | x) || N(0, 1)) = sum (m² + s² - 1 - log s²) / 2
    """
    (mean, log_var), _ = nets["encoder"].apply(params["encoder"], {}, x, train=True)
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
    logits, _ = nets["decoder"].apply(params["decoder"], {}, z, train=True)
    kl = (mean**2 + jnp.exp(log_var) - 1 - log_var).sum(-1) / 2
    return _pixels(logits, x), kl


def _pixels(logits: Any, x: Any) -> Any:
    return losses.binary_cross_entropy_with_logits(logits, x, reduce="sum")


def objective_of(nets: dict[str, Layer]) -> Objective:
    """The negative bound, averaged over the batch."""

    def objective(params: Any, state: Any, batch: Any, *, key: Any, train: bool) -> Any:
        reconstruction, kl = bound(nets, params, batch, key)
        loss = jnp.mean(reconstruction + kl)
        return loss, (state, {"reconstruction": reconstruction.mean(), "kl": kl.mean()})

    return objective


def log_likelihood(nets: dict[str, Layer], params: Any, x: Any, key: Any, samples: int) -> Any:
    """The importance-weighted estimate of log p(x), a lower bound that is tighter with more samples.

    ``log mean_k p(x | z_k) p(z_k) / q(z_k | x)`` with z_k from the encoder (Burda et al. 2015).
    """
    (mean, log_var), _ = nets["encoder"].apply(params["encoder"], {}, x, train=False)

    def weight(key: Any) -> Any:
        e = jax.random.normal(key, mean.shape)
        z = mean + jnp.exp(log_var / 2) * e
        logits, _ = nets["decoder"].apply(params["decoder"], {}, z, train=False)
        return -_pixels(logits, x) + ((e**2 + log_var - z**2) / 2).sum(-1)

    weights = jax.lax.map(weight, jax.random.split(key, samples))
    return jax.nn.logsumexp(weights, axis=0) - jnp.log(samples)


def run(config: Config) -> dict[str, float]:
    """One training run: everything from the data to the folder."""
    epochs = config.epochs
    if epochs is None:
        epochs = 120 if config.dataset == "digits" else 20
    for name, value in (("epochs", epochs), ("samples", config.samples), ("latent", config.latent)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    splits = data.load(config.dataset, data_dir=config.data_dir)
    if splits.test is None:
        splits = data.split(splits.train, (0.8, 0.0, 0.2), seed=config.seed)
    train_set, test_set = splits.train, splits.test
    assert test_set is not None
    top = float(train_set.x.max())
    x, x_test = (np.asarray(part.x, np.float32) / top for part in (train_set, test_set))
    nets = autoencoder(x.shape[1:], config)

    def init(key: Any, x: Any) -> Any:
        codes = jax.ShapeDtypeStruct((1, config.latent), jnp.float32)
        keys = dict(zip(nets, jax.random.split(key), strict=True))
        inputs = {"encoder": x, "decoder": codes}
        return {name: nets[name].init(keys[name], inputs[name])[0] for name in nets}, {}

    data.check_batch_size(config.batch_size, len(x))
    steps = data.num_batches(len(x), config.batch_size) * epochs
    trainer = train.trainer(
        objective_of(nets),
        optimizer=optim.adam(optim.cosine_decay_schedule(config.learning_rate, steps)),
        init=init,
    )
    name = config.name or f"vae-{config.dataset.replace('/', '-')}-seed{config.seed}"
    folder = train.create_run(config.runs / name, config, seed=config.seed, overwrite=config.overwrite)
    started = time.perf_counter()
    ts, rows = train.fit(
        trainer, x, epochs=epochs, key=jax.random.key(config.seed),
        batch_size=config.batch_size, validation=x_test, run_dir=folder,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    estimate = jax.jit(lambda params, x, key: log_likelihood(nets, params, x, key, config.samples))
    pieces = [x_test[i : i + 100] for i in range(0, len(x_test), 100)]
    keys = jax.random.split(jax.random.key(config.seed), len(pieces))
    parts = [estimate(ts.params, piece, key) for piece, key in zip(pieces, keys, strict=True)]
    found = {
        "test_bound": -rows[-1]["val_loss"],
        "test_log_likelihood": float(np.concatenate(parts).mean()),
        "parameters": tree.count(ts.params),
    }
    train.save_tree(folder / "model.npz", {"params": ts.params, "state": ts.state})
    train.write_result(folder, {**found, "seconds": seconds})
    draw(nets, ts.params, x_test[:: max(1, len(x_test) // 12)][:12], folder, config)
    return found


def draw(nets: dict[str, Layer], params: Any, x: np.ndarray, folder: Path, config: Config) -> None:
    """reconstructions.png and samples.png."""

    def decoded(codes: Any) -> np.ndarray:
        logits, _ = nets["decoder"].apply(params["decoder"], {}, codes, train=False)
        return np.asarray(jax.nn.sigmoid(logits))

    (means, _), _ = nets["encoder"].apply(params["encoder"], {}, jnp.asarray(x), train=False)
    codes = jax.random.normal(jax.random.key(config.seed), (5 * 12, config.latent))
    plot_grid(np.stack([x, decoded(means)]), folder / "reconstructions.png")
    plot_grid(decoded(codes).reshape(5, 12, *x.shape[1:]), folder / "samples.png")


def plot_grid(images: np.ndarray, path: Path) -> None:
    """Images (rows, columns, height, width, channels) with values from 0 to 1, side by side."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    rows, columns, height, width, depth = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    whole = padded.swapaxes(1, 2).reshape(rows * (height + 2), columns * (width + 2), depth)
    whole = whole.repeat(3, 0).repeat(3, 1)
    plt.imsave(path, np.broadcast_to(whole, (*whole.shape[:2], 3)) if depth == 1 else whole)


def main(config: Config) -> int:
    try:
        found = run(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{found['parameters']:,} parameters; test: evidence lower bound {found['test_bound']:.2f}, log-likelihood "
        f"{found['test_log_likelihood']:.2f} nats an image"
    )
    return 0


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
