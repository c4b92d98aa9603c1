"""A classifier with batch normalisation and dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, metrics, optim, train
from tests.programs import digits


def main() -> float:
    x_train, y_train, x_test, y_test = digits.arrays()
    model = layers.serial(
        layers.dense(64), layers.batch_norm(momentum=0.9), layers.relu, layers.dropout(0.25), layers.dense(10)
    )
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(3e-3))
    ts, _ = train.fit(trainer, (x_train, y_train), epochs=10, key=jax.random.key(0))
    logits, _ = model.apply(ts.params, ts.state, jnp.asarray(x_test), train=False)
    return float(metrics.accuracy(logits, jnp.asarray(y_test)).mean())
