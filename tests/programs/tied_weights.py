"""Tied weights: the matrix that embeds a character also scores the next one."""

from __future__ import annotations

import jax
import numpy as np

from nnkit import layers, losses, optim, train

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
LETTERS = sorted(set(TEXT))


def forward(net, ids):
    h = net.body(net.embed(ids))
    return layers.attend(net.embed.params, h)


def main() -> tuple[list[str], float]:
    ids = np.array([LETTERS.index(c) for c in TEXT], np.int32)
    model = layers.wire(
        forward,
        embed=layers.embedding(len(LETTERS), 32),
        body=layers.residual(layers.serial(layers.dense(64), layers.relu, layers.dense(32))),
    )
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-2))
    ts, history = train.fit(trainer, (ids[:-1], ids[1:]), epochs=10, key=jax.random.key(0))
    return sorted(ts.params), history[-1]["loss"]
