"""``nnkit export``: the program takes pictures and says what the run's network says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nnkit import cli, data
from nnkit.cli.export import on_images
from nnkit.cli.trained import Card, load_run


def test_pictures_are_scaled_as_in_training(finished):
    trained = load_run(finished)
    images = data.load("digits").train.x[:5]
    theirs, _ = trained.model.apply(
        trained.params, trained.state, trained.card.normalization.apply(images), train=False
    )
    model = on_images(trained.model, trained.card)
    ours, _ = model.apply(trained.params, trained.state, (images / 16).astype("f"), train=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_channel_that_never_varied_is_0():
    from nnkit import layers

    card = Card(("a", "b"), (1, 1, 2), 255.0, (51.0, 7.0), (25.5, 0.0))
    model = on_images(layers.identity, card)
    y, _ = model.apply({}, {}, np.full((1, 1, 1, 2), 0.4, np.float32), train=False)
    np.testing.assert_allclose(y[0, 0, 0], [2.0, 0.0], rtol=1e-6)


def test_the_program_runs_without_nnkit_on_any_number_of_images(finished, tmp_path, capsys):
    pytest.importorskip("flatbuffers")  # jax.export writes with it
    from nnkit.interop.export import READER

    folder = tmp_path / "program"
    assert cli.main(["export", str(finished), str(folder), "--platforms", "cpu"]) == 0
    assert f"{folder}: README.md there says how it is run" in capsys.readouterr().out
    names: dict[str, object] = {}
    exec(READER, names)
    predict = names["load_predict"](folder)
    images = (data.load("digits").train.x[:7] / 16).astype(np.float32)
    np.save(tmp_path / "all.npy", images)
    assert cli.main(["predict", str(finished), str(tmp_path / "all.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for count in (7, 1):
        logits = np.asarray(predict(images[:count]), np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for one, row in zip(found, shares, strict=False):
            np.testing.assert_allclose(list(one["probabilities"].values()), row, rtol=1e-4)


def test_a_folder_with_something_else_in_it(finished, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["export", str(finished), str(tmp_path)]) == 1
    assert "mine.txt" in capsys.readouterr().err
