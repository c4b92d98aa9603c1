"""Differentially private SGD: each example's gradient is clipped before they are summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, metrics, optim, tree
from tests.programs import digits

model = layers.serial(layers.dense(32), layers.tanh, layers.dense(10))
optimizer = optim.sgd(0.5)


def loss(params, x, y):
    logits, _ = model.apply(params, {}, x[None], train=True)
    return losses.softmax_cross_entropy(logits, y[None])[0]


def private_gradient(params, x, y, key, clip=1.0, noise=0.5):
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)
    norms = jax.vmap(tree.global_norm)(grads)
    weights = jnp.minimum(1, clip / norms) / len(x)
    total = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)
    leaves, structure = jax.tree.flatten(total)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree.map(lambda g, k: g + noise * clip / len(x) * jax.random.normal(k, g.shape), total, keys)


def main() -> float:
    x_train, y_train, x_test, y_test = map(jnp.asarray, digits.arrays())
    params, _ = model.init(jax.random.key(0), x_train[:1])

    def step(carry, key):
        params, opt_state = carry
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(rows_key, len(x_train), (128,))
        grads = private_gradient(params, x_train[rows], y_train[rows], noise_key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optim.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), 200)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, optimizer.init(params)))
    logits, _ = model.apply(params, {}, x_test, train=False)
    return float(metrics.accuracy(logits, y_test).mean())
