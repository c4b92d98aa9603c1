"""Language models of characters: reading, training, and writing from a cache or a carry."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import text

ROOT = Path(__file__).parent.parent.parent
FILES = (ROOT / "docs" / "design.md", ROOT / "docs" / "training.md")
SMALL = text.Config(
    FILES, features=16, num_layers=2, num_heads=2, context=32, sample=20, epochs=1, dropout=0.1
)


def test_a_text_is_read_and_cut_into_examples(tmp_path):
    (tmp_path / "a.txt").write_text("abca", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("\ufeffé\r\n".encode())
    found = text.read((tmp_path / "a.txt", tmp_path / "b.txt"))
    assert found.alphabet == "\nabcé"
    assert "".join(found.alphabet[i] for i in found.ids) == "abca\né\n"
    x, y = text.windows(np.arange(10), 3)
    np.testing.assert_array_equal(x, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_what_is_written_piece_by_piece_is_what_the_whole_network_says(model):
    """At a temperature near 0 each character is the likeliest after all before it."""
    config = dataclasses.replace(SMALL, model=model, temperature=1e-4)
    network = text.build(config, 11)
    params, state = jax.jit(network.init)(jax.random.key(3), jnp.zeros((1, 32), jnp.int32))
    # Far from its first values, where all logits are near 0 and ties are likely.
    params = jax.tree.map(lambda p: 3 * p, params)
    prompt = jnp.array([1, 5, 2], jnp.int32)
    written = text.writer(config, 11, 20)(params, prompt, jax.random.key(0))
    whole = jnp.concatenate([prompt, written])
    logits, _ = network.apply(params, state, whole[None], train=False)
    np.testing.assert_array_equal(jnp.argmax(logits[0, 2:-1], -1), written)
    assert len(set(written.tolist())) > 1


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_a_run_leaves_its_folder(model, tmp_path, capsys):
    config = dataclasses.replace(SMALL, model=model, runs=tmp_path)
    assert text.main(config) == 0
    said = capsys.readouterr().out
    folder = tmp_path / f"text-{model}-seed0"
    found = json.loads((folder / "result.json").read_text())
    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    assert len(sample) == len("The ") + 20 + 1
    assert sample.startswith("The ")
    assert sample in said
    # Below what every character alike would need: something was learned in these few steps.
    assert found["bits_per_character"] < np.log2(found["alphabet"])
    assert re.search(rf"{found['parameters']:,} parameters", said)
    assert (folder / "model.npz").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ()}, "no text was given"),
        ({"prompt": "\x07"}, "unknown: ['\\x07']"),
        ({"prompt": ""}, "not empty"),
        ({"sample": 29}, "at most 28"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"context": 100_000, "sample": 5}, "fewer than context=100000 + 1"),
        ({"prompt": "a" * 32}, "leaves no room"),
        ({"files": (Path("nowhere.txt"),)}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_no_folder(changes, message, tmp_path, capsys):
    assert text.main(dataclasses.replace(SMALL, runs=tmp_path / "runs", **changes)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
