"""Trains a language model of characters on plain text, and lets it write.

    python experiments/text.py FILE [FILE ...]                  # a transformer
    python experiments/text.py FILE --model lstm                # two LSTMs of about as many parameters

A character that has a number of its own is one that the text holds. The last tenth of the text is held
out. ``runs/<name>/`` then holds config.json, metrics.csv, result.json, the parameters and sample.txt, which
the transformer writes from its key-value cache and the LSTM from its carry, one character at a time.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import data, layers, losses, models, optim, train, tree
from nnkit.types import Layer

try:
    from tyro.conf import Positional
except ImportError:
    sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a language model of characters."""

    files: Annotated[tuple[Path, ...], Positional]
    """Plain text in UTF-8, read in this order."""
    model: Literal["transformer", "lstm"] = "transformer"
    """Which network."""
    features: int | None = None
    """Width of the transformer's residual stream, or of each LSTM. [transformer 128; lstm 240]"""
    num_layers: int | None = None
    """Blocks, or LSTMs. [transformer 4; lstm 2]"""
    num_heads: int = 4
    """Of the transformer's attention."""
    context: int = 128
    """Characters in an example; the transformer sees no further back."""
    dropout: float = 0.1
    """Probability of dropping."""
    epochs: int = 4
    """Passes over the text."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 2e-3
    """AdamW's highest, which is reached after a twentieth of the steps and falls to 0 along a cosine."""
    prompt: str = "The "
    """How the sample begins."""
    sample: int = 100
    """How many characters are written."""
    temperature: float = 0.8
    """Logits are divided by it before a character is drawn."""
    seed: int = 0
    """Decides initialisation, order, dropout and the sample."""
    name: str | None = None
    """The run's folder in --runs; by default text, model and seed."""
    runs: Path = Path("runs")
    """Where run folders go."""
    overwrite: bool = False
    """Replace a run of the same name."""


class Text(NamedTuple):
    """A text as numbers."""

    ids: np.ndarray
    alphabet: str


def read(files: tuple[Path, ...]) -> Text:
    """All files as one text, line ends as they are on Unix."""
    if not files:
        raise ValueError("no text was given: name at least one file")
    whole = "\n".join(path.read_text(encoding="utf-8-sig") for path in files)
    points = np.frombuffer(whole.encode("utf-32-le"), np.uint32)
    alphabet, ids = np.unique(points, return_inverse=True)
    return Text(ids.astype(np.int32), "".join(map(chr, alphabet)))


def windows(ids: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples (n, context) that follow each other in the text, and for each character the next."""
    n = (len(ids) - 1) // context
    if n < 1:
        raise ValueError(f"a part of the text has {len(ids)} characters, fewer than context={context} + 1")
    return ids[: n * context].reshape(n, context), ids[1 : n * context + 1].reshape(n, context)


def build(config: Config, vocabulary: int, *, writes: bool = False) -> Layer:
    """The network; with ``writes`` the form that goes on where it was, which has the same parameters."""
    given = {"features": config.features, "num_layers": config.num_layers}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["dropout"] = config.dropout
    if config.model == "lstm":
        return models.lstm_lm(vocabulary, **options, return_carry=writes)
    return models.transformer_lm(
        vocabulary, num_heads=config.num_heads, max_length=config.context, cache=writes, **options
    )


def writer(config: Config, vocabulary: int, length: int) -> Callable[..., Any]:
    """``write(params, prompt, key) -> ids``: ``length`` characters after the prompt, compiled as one program."""
    model = build(config, vocabulary, writes=True)

    def start(params: Any) -> Any:
        if config.model == "lstm":
            return None
        spec = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        state = jax.eval_shape(model.init, jax.random.key(0), spec)[1]
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)

    def read_on(params: Any, memory: Any, tokens: Any) -> tuple[Any, Any]:
        """The logits after the last of ``tokens``, and what is to be remembered."""
        if config.model == "lstm":
            given = layers.Sequence(tokens, carry=memory)
            (logits, memory), _ = model.apply(params, {}, given, train=False)
        else:
            logits, memory = model.apply(params, memory, tokens, train=False)
        return logits[:, -1], memory

    def write(params: Any, prompt: Any, key: Any) -> Any:
        def one(carry: Any, key: Any) -> Any:
            logits, memory = carry
            token = jax.random.categorical(key, logits / config.temperature).astype(jnp.int32)
            return read_on(params, memory, token[:, None]), token

        first = read_on(params, start(params), prompt[None])
        return jax.lax.scan(one, first, jax.random.split(key, length))[1][:, 0]

    return jax.jit(write)


def run(config: Config) -> dict[str, Any]:
    """One training run: everything from the text to the folder."""
    text = read(config.files)
    if len(text.ids) < 2:
        raise ValueError(f"the text has {len(text.ids)} characters: give files with some text in them")
    unknown = sorted(set(config.prompt) - set(text.alphabet))
    if unknown or not config.prompt:
        raise ValueError(f"the prompt must be of the text's characters and not empty; unknown: {unknown}")
    room = config.context - len(config.prompt)
    if config.model == "transformer" and room < 1:
        raise ValueError(
            f"the prompt has {len(config.prompt)} characters and context={config.context} leaves no room: shorten it"
        )
    if config.model == "transformer" and config.sample > room:
        raise ValueError(
            f"sample={config.sample} and the prompt's {len(config.prompt)} characters exceed "
            f"context={config.context}, which is all that the cache has room for: at most {room}"
        )
    if not config.temperature > 0:
        raise ValueError(f"temperature must be positive, got {config.temperature:g}")
    held_out = len(text.ids) // 10
    parts = (text.ids[:-held_out], text.ids[-held_out:])
    train_set, validation_set = (windows(ids, config.context) for ids in parts)
    data.check_batch_size(config.batch_size, len(train_set[0]))
    steps = data.num_batches(len(train_set[0]), config.batch_size) * config.epochs
    rate = optim.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, steps // 20), max(2, steps))
    trainer = train.trainer(
        build(config, len(text.alphabet)),
        losses.softmax_cross_entropy,
        optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(rate, weight_decay=0.01)),
    )
    name = config.name or f"text-{config.model}-seed{config.seed}"
    folder = train.create_run(config.runs / name, config, seed=config.seed, overwrite=config.overwrite)

    def bits(event: str, view: train.View) -> dict[str, float] | None:
        return {"val_bits": view.metrics["val_loss"] / math.log(2)} if event == "epoch" else None

    started = time.perf_counter()
    ts, rows = train.fit(
        trainer,
        train_set,
        epochs=config.epochs,
        key=jax.random.key(config.seed),
        batch_size=config.batch_size,
        validation=validation_set,
        callbacks=bits,
        run_dir=folder,
    )
    seconds = time.perf_counter() - started
    train.save_tree(folder / "model.npz", {"params": ts.params, "state": ts.state})
    prompt = jnp.asarray([text.alphabet.index(c) for c in config.prompt], jnp.int32)
    write = writer(config, len(text.alphabet), config.sample)
    key = jax.random.key(config.seed)
    ids = np.asarray(write(ts.params, prompt, key))
    started = time.perf_counter()
    write(ts.params, prompt, key).block_until_ready()
    written = config.prompt + "".join(text.alphabet[i] for i in ids)
    found = {
        "characters": len(text.ids),
        "alphabet": len(text.alphabet),
        "parameters": tree.count(ts.params),
        "bits_per_character": rows[-1]["val_bits"],
        "seconds": seconds,
        "written_per_second": config.sample / (time.perf_counter() - started),
    }
    train.write_result(folder, found)
    (folder / "sample.txt").write_text(written + "\n", encoding="utf-8")
    return {**found, "sample": written}


def main(config: Config) -> int:
    try:
        found = run(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{found['characters']:,} characters, {found['alphabet']} different; {found['parameters']:,} parameters; "
        f"{found['bits_per_character']:.3f} bits a character on the held-out tenth; trained {found['seconds']:.0f} s, "
        f"writes {found['written_per_second']:.0f} characters a second\n\n{found['sample']}"
    )
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Config, description=__doc__)))
