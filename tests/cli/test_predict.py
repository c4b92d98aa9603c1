"""``nnkit predict``: an image in a file gets the very answer that the training's image would get."""

from __future__ import annotations

import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from nnkit import cli, data
from nnkit.cli.images import read_images
from nnkit.cli.trained import Card, load_run

CARD = Card(("a", "b"), (4, 4, 1), 16.0, (8.0,), (4.0,))
COLOUR = Card(("a", "b"), (4, 4, 3), 255.0, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17  # 0 ... 255


def only(path, card=CARD, **options) -> np.ndarray:
    ((name, image),) = read_images(path, card, **options)
    assert name == str(path)
    assert image.dtype == np.float32
    return image


def saved(tmp_path, image, name="a.png", **options):
    Image.fromarray(image).save(tmp_path / name, **options)
    return tmp_path / name


def test_digits_from_files_are_the_digits(finished, tmp_path, capsys):
    """From 0 to 16 in the data, and to 255 in the file: what comes out of the network is the same."""
    digits = data.load("digits").train
    images = digits.x[:20]
    np.save(tmp_path / "all.npy", images / 16)
    assert cli.main(["predict", str(finished), str(tmp_path / "all.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = load_run(finished)
    x = trained.card.normalization.apply(images)
    logits, _ = trained.model.apply(trained.params, trained.state, x, train=False)
    shares = np.asarray(jax.nn.softmax(logits))
    assert [one["file"] for one in found] == [f"{tmp_path}/all.npy[{i}]" for i in range(20)]
    assert [one["label"] for one in found] == [str(i) for i in shares.argmax(-1)]
    for one, row in zip(found, shares, strict=True):
        np.testing.assert_allclose(list(one["probabilities"].values()), row, rtol=1e-4)
        assert one["confidence"] == max(one["probabilities"].values())
    # As pictures, which have 256 steps where the data have 17, and 255 / 16 is no whole number.
    path = saved(tmp_path, np.rint(images[3, :, :, 0] / 16 * 255).astype(np.uint8))
    assert cli.main(["predict", str(finished), str(path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(list(one["probabilities"].values()), shares[3], atol=0.02)


def test_the_table(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = saved(tmp_path, RAMP, "[red]a.png")
    assert cli.main(["predict", str(finished), str(path), str(path), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("[red]a.png") == 2
    assert len(re.findall(r"\d+\.\d\d%", out)) == 4
    assert cli.main(["predict", str(finished), str(path), "--top", "1"]) == 0
    assert len(re.findall(r"\d+\.\d\d%", capsys.readouterr().out)) == 1


def test_grey_is_scaled_as_in_training(tmp_path):
    image = only(saved(tmp_path, RAMP))
    np.testing.assert_allclose(image[..., 0], (RAMP / 255 * 16 - 8) / 4, atol=1e-6)
    inverted = only(saved(tmp_path, RAMP), invert=True)
    np.testing.assert_allclose(inverted[..., 0], -image[..., 0], atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_colours_become_grey_and_grey_becomes_colours(tmp_path, suffix):
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours).save(path) if suffix == "png" else np.save(path, colours)
    grey = only(path)[..., 0] * 4 + 8
    np.testing.assert_allclose(grey, colours @ [0.299, 0.587, 0.114] / 255 * 16, atol=1e-5)
    np.testing.assert_allclose(only(path, COLOUR), colours / 255, atol=1e-6)
    np.testing.assert_allclose(
        only(saved(tmp_path, RAMP), COLOUR), np.repeat(RAMP[..., None] / 255, 3, -1), atol=1e-6
    )


def test_another_size_is_brought_to_the_networks(tmp_path):
    large = np.kron(RAMP, np.ones((3, 5), np.uint8))  # 12 × 20
    image = only(saved(tmp_path, large), COLOUR)
    assert image.shape == (4, 4, 3)
    # Far from edges an average of equal pixels; bilinear windows are two new pixels wide.
    np.testing.assert_allclose(image[..., 0], RAMP / 255, atol=0.07)
    assert only(saved(tmp_path, RAMP[:2, :2]), COLOUR).shape == (4, 4, 3)


def test_what_is_transparent_is_white(tmp_path):
    glass = np.zeros((4, 4, 4), np.uint8)
    glass[0, 0] = (0, 0, 0, 255)
    image = only(saved(tmp_path, glass), COLOUR)
    np.testing.assert_allclose(image[0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(image[1:], 1, atol=1e-6)


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path):
    deep = RAMP.astype(np.uint16) * 257
    np.testing.assert_allclose(only(saved(tmp_path, deep), COLOUR)[..., 0], RAMP / 255, atol=1e-6)


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    wide = np.kron(np.array([[0, 255], [0, 255]], np.uint8), np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright = only(saved(tmp_path, wide, "a.jpg", quality=100), COLOUR)[..., 0]
    turned = only(saved(tmp_path, wide, "b.jpg", quality=100, exif=exif), COLOUR)[..., 0]
    np.testing.assert_allclose(turned, np.rot90(upright, -1), atol=0.05)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (1, 4, 4, 1)])
def test_arrays_of_one_image(tmp_path, shape):
    np.save(tmp_path / "a.npy", (RAMP / 255).reshape(shape))
    np.testing.assert_allclose(only(tmp_path / "a.npy", COLOUR)[..., 0], RAMP / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 4, 3)])
def test_arrays_of_several_images(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    assert [name for name, _ in read_images(tmp_path / "a.npy", CARD)] == [
        f"{tmp_path}/a.npy[{i}]" for i in range(3)
    ]


def content(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "cut png":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)).save(out, "PNG")
        return out.getvalue()[:1000]
    arrays = {
        "range": np.full((4, 4), 2.0), "integers": np.zeros((4, 4), np.int64), "shape": np.zeros((2, 4, 4, 2)),
        "empty": np.zeros((0, 4, 4)), "nan": np.full((4, 4), np.nan), "objects": np.array([[None]]),
    }  # fmt: skip
    arrays |= {"texts": np.array(["a", "b"]), "records": np.zeros((4, 4), [("x", "f4")])}
    arrays |= {"times": np.zeros((4, 4), "M8[s]"), "truths": np.ones((4, 4), bool)}
    if kind == "npz":
        np.savez(out, a=np.zeros((4, 4)))
    if kind == "cut npz":
        return b"PK\x03\x04 and no more"
    if kind in arrays:
        np.save(out, arrays[kind], allow_pickle=True)
    return out.getvalue() or b"no image"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.txt", "", "is no image: pass files that end in .png, .jpg, .jpeg, .npy"),
        ("a.png", "", "cannot be read as an image: cannot identify image file"),
        ("a.png", "cut png", "cannot be read as an image: "),
        ("a.npy", "", "is no array: "),
        ("a.npy", "objects", "is no array: "),
        ("a.npy", "npz", "is an .npz file: pass one of the arrays in it, as .npy"),
        ("a.npy", "cut npz", "is no array: "),
        ("a.npy", "texts", "has <U1: pass uint8, or floats from 0 to 1"),
        ("a.npy", "records", "has [('x', '<f4')]: pass uint8, or floats from 0 to 1"),
        ("a.npy", "times", "has datetime64[s]: pass uint8, or floats from 0 to 1"),
        ("a.npy", "truths", "has bool from True to True: pass uint8"),
        ("a.npy", "range", "has float64 from 2.0 to 2.0: pass uint8, or floats from 0 to 1"),
        ("a.npy", "nan", "has float64 from nan to nan: pass uint8"),
        ("a.npy", "integers", "has int64 from 0 to 0: pass uint8"),
        ("a.npy", "shape", "has shape (2, 4, 4, 2): pass (height, width)"),
        ("a.npy", "empty", "has shape (0, 4, 4): pass (height, width)"),
    ],
)
def test_files_that_are_no_images(tmp_path, name, kind, message):
    (tmp_path / name).write_bytes(content(kind))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_images(tmp_path / name, CARD)
    assert str(tmp_path / name) in str(error.value)


def test_errors_of_the_command(finished, copy, tmp_path, capsys):
    path = str(saved(tmp_path, RAMP))
    wrong = {
        "no file '/nowhere.png'": ["predict", str(finished), path, "/nowhere.png"],
        "top must be at least 1, got 0": ["predict", str(finished), path, "--top", "0"],
        "predict needs an image": ["predict", str(finished)],
    }
    for message, arguments in wrong.items():
        assert cli.main(arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    (copy / "model.npz").write_bytes((finished / "model.npz").read_bytes()[:-100])
    assert cli.main(["predict", str(copy), path]) == 1
    assert "model.npz' is cut off, damaged" in capsys.readouterr().err
    (copy / "model.json").write_text('{"classes": []}')
    assert cli.main(["predict", str(copy), path]) == 1
    assert "model.json' is damaged" in capsys.readouterr().err
