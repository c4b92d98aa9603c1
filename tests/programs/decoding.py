"""A transformer that is trained on whole sequences and decodes one token at a time from a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, ops, optim, train

VOCABULARY, FEATURES, LENGTH = 12, 32, 24


def transformer(cache: int | None = None):
    def block():
        return layers.transformer_block(
            4, mlp_features=64, causal=True, rotary=ops.rotary, cache_length=cache
        )

    return layers.serial(
        layers.embedding(VOCABULARY, FEATURES),
        block(),
        block(),
        layers.layer_norm(),
        layers.dense(VOCABULARY),
    )


def main() -> tuple[jax.Array, jax.Array]:
    """What follows a prompt that counts round, decoded from the cache, and without one."""
    starts = jax.random.randint(jax.random.key(1), (256, 1), 0, VOCABULARY)
    text = (starts + jnp.arange(LENGTH + 1)) % VOCABULARY
    model = transformer()
    trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(3e-3))
    ts, _ = train.fit(trainer, (text[:, :-1], text[:, 1:]), epochs=10, key=jax.random.key(0), batch_size=32)

    decoder = transformer(cache=LENGTH)
    _, empty = decoder.init(jax.random.key(0), text[:1, :1])

    def next_token(carry, given):
        state, last = carry
        token = jnp.where(given >= 0, given, last)
        logits, state = decoder.apply(ts.params, state, token[None, None], train=False)
        return (state, jnp.argmax(logits[0, 0]).astype(token.dtype)), token

    prompt = jnp.array([7, 8, 9] + [-1] * (LENGTH - 3), text.dtype)
    _, tokens = jax.lax.scan(next_token, (empty, prompt[0]), prompt)

    def next_of_whole(i, whole):
        logits, _ = model.apply(ts.params, ts.state, whole[None], train=False)
        return whole.at[i].set(jnp.argmax(logits[0, i - 1]).astype(whole.dtype))

    return tokens, jax.lax.fori_loop(3, LENGTH, next_of_whole, jnp.maximum(prompt, 0))
