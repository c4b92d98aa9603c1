"""Image files as what a network was trained on."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nnkit.cli.trained import Card

__all__ = ["read_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")


def read_images(
    path: Path, card: Card, *, invert: bool = False
) -> list[tuple[str, Float[np.ndarray, "h w channels"]]]:
    """The images in a file, each with its name, as inputs of the network.

    Each is brought to the network's height and width (bilinear, the proportions are not kept) and to its
    number of channels (grey is 0.299 R + 0.587 G + 0.114 B), black to 0, white to the brightest value of the
    training images, and then standardised by their mean and deviation.

    Args:
      path: .png, .jpg, or .npy: an array (height, width), (height, width, channels) or several of the latter,
        uint8 or floats from 0 to 1. Where an image is transparent, it is white.
      card: of the network.
      invert: whether black and white change places.

    Raises:
      FileNotFoundError, ValueError: no such file, or no such image in it; the message names it.
      ImportError: pillow is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is no image: pass files that end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("reading images needs pillow: pip install nnkit[tfds]") from None
    if path.suffix.lower() == ".npy":
        images = _of_array(path)
    else:
        try:
            with Image.open(path) as image:
                images = [(str(path), ImageOps.exif_transpose(image))]
                images[0][1].load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from None
    found = []
    for name, image in images:
        pixels = _resized(image, card.shape)
        share = 1 - pixels if invert else pixels
        found.append((name, card.normalization.apply(share[None] * card.top)[0]))
    return found


def _of_array(path: Path) -> list[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is no array: {error}") from None
    if not isinstance(array, np.ndarray):  # what it is goes by the contents
        raise ValueError(f"{str(path)!r} is an .npz file: pass one of the arrays in it, as .npy")
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise ValueError(f"{str(path)!r} has {array.dtype}: pass uint8, or floats from 0 to 1")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3)):
        array = array[None]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"{str(path)!r} has shape {np.shape(np.load(path))}: pass (height, width), (n, height, width), or "
            "these with a last axis of 1 or 3 channels"
        )
    if array.dtype == np.uint8:
        array = array / 255
    elif not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"{str(path)!r} has {array.dtype} from {array.min()} to {array.max()}: pass uint8, or floats from 0 to 1"
        )
    several = len(array) > 1
    return [(f"{path}[{i}]" if several else str(path), image) for i, image in enumerate(array)]


def _resized(image: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The image from 0 to 1 in the shape of an input."""
    from PIL import Image

    height, width, channels = shape
    if not isinstance(image, np.ndarray):
        image = _array(image, Image)
    if image.shape[-1] != channels:
        grey = image if image.shape[-1] == 1 else image @ np.array([[0.299], [0.587], [0.114]])
        image = np.repeat(grey, channels, axis=-1)
    # A channel at a time as float32: pillow would round to 256 steps in between.
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., i], np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        for i in range(channels)
    ]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0, 1)


def _array(image: Any, library: Any) -> np.ndarray:
    """A picture of pillow's as an array (height, width, 1 or 3) from 0 to 1."""
    if image.mode.startswith("I"):  # 16 bits of grey, which a conversion would cut off at 255
        return np.asarray(image, np.float64)[..., None] / 65535
    if image.has_transparency_data:
        page = library.new("RGBA", image.size, "white")
        image = library.alpha_composite(page, image.convert("RGBA"))
    grey = image.mode in ("1", "L")
    pixels = np.asarray(image.convert("L" if grey else "RGB"), np.float64) / 255
    return pixels[..., None] if grey else pixels
