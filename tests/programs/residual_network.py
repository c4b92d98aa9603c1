"""A residual network of 20 layers that plain stacking of the same layers does not match."""

from __future__ import annotations

import jax

from nnkit import initializers, layers, losses, metrics, optim, train
from tests.programs import digits

he = initializers.he_normal()


def block(features: int):
    return layers.serial(
        layers.dense(features, kernel_init=he), layers.batch_norm(momentum=0.9), layers.relu,
        layers.dense(features, kernel_init=he), layers.batch_norm(momentum=0.9),
    )  # fmt: skip


def main() -> float:
    x_train, y_train, x_test, y_test = digits.arrays()
    model = layers.serial(
        layers.residual(block(48), shortcut=layers.dense(48)),
        layers.relu,
        *[layer for _ in range(9) for layer in (layers.residual(block(48)), layers.relu)],
        head=layers.dense(10),
    )
    trainer = train.trainer(
        model,
        losses.softmax_cross_entropy,
        optim.sgd(0.05, momentum=0.9),
        metrics={"accuracy": metrics.accuracy},
    )
    _, history = train.fit(
        trainer, (x_train, y_train), epochs=6, key=jax.random.key(0), validation=(x_test, y_test)
    )
    return history[-1]["val_accuracy"]
