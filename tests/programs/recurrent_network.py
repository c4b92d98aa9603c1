"""A recurrent network over long sequences in pieces: its carry goes from batch to batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import layers, losses, optim, train
from nnkit.types import Layer


def kept(layer: Layer) -> Layer:
    """A recurrent layer that begins each call where it ended the last: its carry is the layer's state."""

    def init(key, x):
        params, state = layer.init(key, x)
        (_, carry), _ = jax.eval_shape(lambda p, x: layer.apply(p, state, x, train=False), params, x)
        return params, {"carry": jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), carry)}

    def apply(params, state, x, *, key=None, train):
        start = layers.Sequence(x, carry=jax.lax.stop_gradient(state["carry"]))
        (y, carry), _ = layer.apply(params, {}, start, key=key, train=train)
        return y, {"carry": carry}

    return Layer(init, apply, layer.name)


def main() -> tuple[float, float]:
    """The error with the carry kept from piece to piece, and with it set to zero for each."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (32, 200)).astype(np.float32)
    x = jnp.asarray(bits[:, :, None])
    y = jnp.roll(x, 4, axis=1)  # say what came four steps ago: at a piece's start only the carry knows
    model = layers.serial(kept(layers.simple_rnn(48, return_carry=True)), layers.dense(1))
    trainer = train.trainer(model, losses.binary_cross_entropy_with_logits, optim.adam(3e-3))

    def mean_loss(keep_carry: bool) -> float:
        ts = trainer.init(jax.random.key(0), x[:, :5])
        empty = ts.state
        step = jax.jit(trainer.step)
        for _ in range(25):
            seen = []
            for t in range(0, 200, 5):
                if t == 0 or not keep_carry:
                    ts = ts._replace(state=empty)
                ts, m = step(ts, (x[:, t : t + 5], y[:, t : t + 5]))
                seen.append(m["loss"])
        return float(np.mean(seen[1:]))

    return mean_loss(keep_carry=True), mean_loss(keep_carry=False)
