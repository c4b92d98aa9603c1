"""docs/peers.md names every layer of the peers that are installed, and nothing of nnkit that is not there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from nnkit import layers, ops

PAGE = (Path(__file__).parent.parent / "docs" / "peers.md").read_text()
WORDS = set(re.findall(r"\w+", PAGE))


def classes(module: str, base: str) -> set[str]:
    """The public subclasses of a module's base class, all of them layers."""
    library = importlib.import_module(module)
    kind = getattr(library, base)
    found = {name: getattr(library, name) for name in dir(library) if not name.startswith("_")}
    return {name for name, value in found.items() if isinstance(value, type) and issubclass(value, kind)}


def stax() -> set[str]:
    library = importlib.import_module("jax.example_libraries.stax")
    helpers = {"elementwise", "parallel", "serial", "shape_dependent"}
    return helpers | {name for name in dir(library) if name[0].isupper()}


def equinox() -> set[str]:
    library = importlib.import_module("equinox.nn")
    return {name for name in dir(library) if name[0].isupper()}


PEERS = {
    "stax": stax,
    "flax.linen": lambda: classes("flax.linen", "Module"),
    "flax.nnx": lambda: classes("flax.nnx", "Module"),
    "equinox": equinox,
    "haiku": lambda: classes("haiku", "Module"),
    "torch": lambda: classes("torch.nn", "Module"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("peer", PEERS)
def test_every_layer_of_a_peer_is_on_the_page(peer):
    if peer != "stax":
        pytest.importorskip(peer)
    names = PEERS[peer]()
    assert len(names) > 10
    assert not names - WORDS


def test_what_the_page_says_is_here_is_here():
    cells = re.findall(r"^\|(.*?)\|", PAGE.split("## Left out")[0], re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`([\w.]+)(?:\(\w*\))?`", cell)}
    assert len(names) > 60
    public = {*layers.__all__, *(f"ops.{name}" for name in ops.__all__)}
    assert not names - public
    kinds = {name for name in layers.__all__ if name[0].islower()}
    assert (
        not kinds
        - names
        - {"activation_gradients", "frozen", "named", "observe", "probe", "residual", "summary"}
    )
