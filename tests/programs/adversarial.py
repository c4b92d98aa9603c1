"""Two networks trained against each other, each with its own optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, optim, train

critic = layers.serial(layers.dense(32), layers.relu, layers.dense(1))
generator = layers.serial(layers.dense(32), layers.relu, layers.dense(2))
cross_entropy = losses.binary_cross_entropy_with_logits


def critic_loss(params, state, batch, *, key, train):
    real, noise, generator_params = batch
    fake, _ = generator.apply(generator_params, {}, noise, train=train)
    on_real, _ = critic.apply(params, state, real, train=train)
    on_fake, _ = critic.apply(params, state, fake, train=train)
    loss = cross_entropy(on_real, jnp.ones_like(on_real)) + cross_entropy(on_fake, jnp.zeros_like(on_fake))
    return loss.mean(), (state, {})


def generator_loss(params, state, batch, *, key, train):
    noise, critic_params = batch
    fake, _ = generator.apply(params, state, noise, train=train)
    on_fake, _ = critic.apply(critic_params, {}, fake, train=train)
    return cross_entropy(on_fake, jnp.ones_like(on_fake)).mean(), (state, {})


def main() -> jax.Array:
    """The mean of what is generated; the real points lie around (2, -1)."""
    d = train.trainer(critic_loss, init=critic.init, optimizer=optim.adam(3e-3, b1=0.5))
    g = train.trainer(generator_loss, init=generator.init, optimizer=optim.rmsprop(1e-3))
    d_key, g_key, data_key = jax.random.split(jax.random.key(0), 3)

    def step(states, key):
        d_state, g_state = states
        real_key, noise_key = jax.random.split(key)
        real = jnp.array([2.0, -1.0]) + 0.3 * jax.random.normal(real_key, (64, 2))
        noise = jax.random.normal(noise_key, (64, 4))
        d_state, d_metrics = d.step(d_state, (real, noise, g_state.params))
        g_state, g_metrics = g.step(g_state, (noise, d_state.params))
        return (d_state, g_state), (d_metrics["loss"], g_metrics["loss"])

    states = d.init(d_key, jnp.zeros((1, 2))), g.init(g_key, jnp.zeros((1, 4)))
    (_, g_state), _ = jax.jit(lambda s, ks: jax.lax.scan(step, s, ks))(
        states, jax.random.split(data_key, 1500)
    )
    noise = jax.random.normal(jax.random.key(1), (500, 4))
    return generator.apply(g_state.params, g_state.state, noise, train=False)[0].mean(axis=0)
