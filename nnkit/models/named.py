"""Networks of images by name, for scripts and command lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from nnkit.checks import unknown_name
from nnkit.models.convolutional import cnn, lenet
from nnkit.models.perceptron import mlp, mlp_bn_dropout
from nnkit.models.residual import resnet18, resnet20, resnet50
from nnkit.types import Layer

__all__ = ["MODELS", "build"]

MODELS: dict[str, Callable[..., Layer]] = {
    "mlp": mlp,
    "mlp_bn_dropout": mlp_bn_dropout,
    "cnn": cnn,
    "lenet": lenet,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
}
"""What :func:`build` knows: each takes images (batch, height, width, channels) and gives logits."""


def build(name: str, classes: int, **options: object) -> Layer:
    """The network called ``name`` for so many classes.

    Args:
      name: one of :data:`MODELS`.
      classes: how many logits.
      options: the network's own settings; None stands for its default.

    Raises:
      ValueError: for an unknown name, with the nearest known ones, or an option that the network has not.

    >>> build("mpl", 10)
    Traceback (most recent call last):
    ...
    ValueError: unknown model 'mpl'; did you mean 'mlp'? Known: cnn, lenet, mlp, mlp_bn_dropout, ...
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    given = {option: value for option, value in options.items() if value is not None}
    known = [*inspect.signature(MODELS[name]).parameters][1:]
    for option in given:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"the model {name!r} has no option {option!r}: {has}")
    return MODELS[name](classes, **given)
