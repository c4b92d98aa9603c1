"""A variational autoencoder: random numbers in the forward pass, a loss of several terms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, optim, train
from tests.programs import digits


def forward(net, x):
    mean, log_var = jnp.split(net.encoder(x), 2, axis=-1)
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(net.key(), mean.shape)
    return net.decoder(z), mean, log_var


model = layers.wire(
    forward,
    encoder=layers.serial(layers.dense(64), layers.relu, layers.dense(2 * 8)),
    decoder=layers.serial(layers.dense(64), layers.relu, layers.dense(64)),
)


def elbo(params, state, x, *, key, train):
    (logits, mean, log_var), state = model.apply(params, state, x, key=key, train=train)
    reconstruction = losses.binary_cross_entropy_with_logits(logits, x, reduce="sum").mean()
    divergence = -0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), axis=-1).mean()
    return reconstruction + divergence, (state, {"reconstruction": reconstruction, "divergence": divergence})


def main() -> list[float]:
    x_train, _, x_test, _ = digits.arrays()
    trainer = train.trainer(elbo, init=model.init, optimizer=optim.adam(3e-3))
    _, history = train.fit(trainer, x_train, epochs=15, key=jax.random.key(0), validation=x_test)
    return [row["val_loss"] for row in history]
