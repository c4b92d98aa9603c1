"""Regression: a sine from noisy samples, with a penalty on the weights."""

from __future__ import annotations

import jax
import numpy as np

from nnkit import layers, losses, optim, regularizers, train


def main() -> float:
    rng = np.random.default_rng(0)
    x = rng.uniform(-np.pi, np.pi, (400, 1)).astype(np.float32)
    y = np.sin(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    model = layers.serial(layers.dense(32), layers.tanh, layers.dense(32), layers.tanh, layers.dense(1))
    trainer = train.trainer(
        model, losses.mean_squared_error, optim.adam(1e-2), regularizer=regularizers.l2(1e-5)
    )
    ts, _ = train.fit(trainer, (x, y), epochs=60, key=jax.random.key(0), batch_size=50)
    grid = np.linspace(-3, 3, 100, dtype=np.float32)[:, None]
    return float(np.mean((train.predict(model, ts.params, ts.state, grid) - np.sin(grid)) ** 2))
