"""Sixteen seeds trained by one program: initialisation, steps and evaluation are mapped over keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, metrics, optim, train
from tests.programs import digits


def main() -> jax.Array:
    x, y, x_test, y_test = map(jnp.asarray, digits.arrays())
    model = layers.serial(
        layers.dense(32), layers.batch_norm(), layers.relu, layers.dropout(0.25), layers.dense(10)
    )
    trainer = train.trainer(
        model, losses.softmax_cross_entropy, optim.adam(1e-2), metrics={"accuracy": metrics.accuracy}
    )

    def run(key):
        ts = trainer.init(key, x[:1])
        batches = (
            jnp.tile(x[:1280].reshape(20, 64, -1), (5, 1, 1)),
            jnp.tile(y[:1280].reshape(20, 64), (5, 1)),
        )
        ts, _ = jax.lax.scan(trainer.step, ts, batches)
        return trainer.evaluate(ts, (x_test, y_test))["accuracy"]

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 16))
