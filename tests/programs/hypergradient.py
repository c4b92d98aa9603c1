"""The derivative of a validation loss with respect to the learning rate, through 20 steps of training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, optim, train
from tests.programs import digits

model = layers.serial(layers.dense(32), layers.tanh, layers.dense(10))


def validation_loss(learning_rate, batches, held_out):
    optimizer = optim.sgd(learning_rate, momentum=0.9)
    trainer = train.trainer(model, losses.softmax_cross_entropy, optimizer)
    ts = trainer.init(jax.random.key(0), held_out[0])
    ts, _ = jax.lax.scan(trainer.step, ts, batches)
    return trainer.evaluate(ts, held_out)["loss"]


def main() -> tuple[float, float]:
    """The gradient, and the same by central differences."""
    x, y, x_test, y_test = map(jnp.asarray, digits.arrays())
    batches = x[:1280].reshape(20, 64, -1), y[:1280].reshape(20, 64)
    value = jax.jit(lambda rate: validation_loss(rate, batches, (x_test, y_test)))
    h = 1e-3
    return float(jax.grad(value)(0.05)), float(value(0.05 + h) - value(0.05 - h)) / (2 * h)
