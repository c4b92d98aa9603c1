"""The figure of experiments/uncertainty.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np


class Rotation(NamedTuple):
    """What was seen while a digit was turned."""

    angles: np.ndarray  # (angles,)
    images: np.ndarray  # (angles, height, width, channels)
    logits: np.ndarray  # (angles, samples, classes), of one digit
    entropy: np.ndarray  # (angles,), the mean over several digits
    information: np.ndarray
    accuracy: np.ndarray


def plot_rotation(rotation: Rotation, path: Path) -> None:
    """Softmax inputs and outputs of the samples at each angle, and what is uncertain of them."""
    import matplotlib.figure

    chances = np.asarray(jax.nn.softmax(rotation.logits))
    shown = sorted(np.argsort(chances.mean(axis=1).max(axis=0))[::-1][:4])
    figure = matplotlib.figure.Figure(figsize=(9, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    axes = [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])]
    jitter = np.random.default_rng(0).uniform(-1.2, 1.2, chances.shape[1])
    for axis, values, title in zip(
        axes, (rotation.logits, chances), ("softmax input", "softmax output"), strict=True
    ):
        for place, c in enumerate(shown):
            at = rotation.angles[:, None] + jitter + 3 * (place - 1.5)
            axis.plot(
                at.ravel(), values[..., c].ravel(), ".", markersize=1.5, color=f"C{place}", label=f"class {c}"
            )
        axis.set(title=f"{title}, {chances.shape[1]} samples of one image", xticks=rotation.angles[::2])
    axes[0].legend(markerscale=6, fontsize=8)
    below = figure.add_subplot(grid[1, 0])
    below.plot(rotation.angles, rotation.entropy, "o-", label="predictive entropy")
    below.plot(rotation.angles, rotation.information, "s-", label="mutual information")
    below.plot(rotation.angles, rotation.accuracy, "k:", label="accuracy")
    below.set(
        xlabel="degrees",
        ylabel="nats",
        title="mean over test images of the class",
        xticks=rotation.angles[::2],
    )
    below.set_ylim(top=1.3 * below.get_ylim()[1])
    below.legend(fontsize=8, ncols=3, loc="upper center")
    strip = figure.add_subplot(grid[1, 1])
    planes = [image[..., 0] for image in rotation.images]
    empty = np.full_like(planes[0], planes[0].min())
    strip.imshow(np.block([planes[:7], planes[7:] + [empty] * (14 - len(planes))]), cmap="gray")
    strip.set(title="the image at 0, 15, ... 180 degrees", xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
