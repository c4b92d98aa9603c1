"""What the documents say runs, what they link to exists, and every public name is in them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnkit
from nnkit import testing
from tests.catalog import LAYERS

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def namespace() -> dict[str, object]:
    return {"jax": jax, "jnp": jnp, "np": np, **{name: getattr(nnkit, name) for name in nnkit.__all__}}


def test_the_readmes_program_reaches_its_accuracy(capsys):
    names: dict[str, object] = {}
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 95
    assert len(blocks) == 2


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in {"README.md", "adding.md"}], ids=lambda p: p.name
)
def test_examples_run(page):
    names = namespace()
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)


def test_the_layer_of_adding_md_has_every_property():
    names = namespace()
    exec(compile(BLOCK.findall((ROOT / "docs/adding.md").read_text())[0], "adding.md", "exec"), names)
    testing.check_layer(names["scale_shift"](), LAYERS[0].x, skip={"mesh": "one device"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


PAGE_OF = {
    "record": "records",
    "layers": "layers",
    "losses": "losses",
    "metrics": "losses",
    "regularizers": "losses",
    "initializers": "initializers",
    "interop": "interop",
    "activations": "initializers",
    "ops": "numerics",
    "optim": "optimizers",
    "testing": "testing",
    "train": "training",
    "data": "data",
    "diagnose": "results",
    "models": "models",
    "search": "search",
}


@pytest.mark.parametrize("part", sorted(PAGE_OF))
def test_every_public_name_is_in_the_documents(part):
    text = (ROOT / "docs" / f"{PAGE_OF[part]}.md").read_text()
    missing = [
        name
        for name in importlib.import_module(f"nnkit.{part}").__all__
        if not re.search(rf"\b{name}\b", text)
    ]
    assert not missing, f"docs/{PAGE_OF[part]}.md does not mention {missing}"


def test_every_part_has_a_page():
    # nnkit.testing is imported by those who test.
    parts = {name for name in nnkit.__all__ if name.islower()} | {"testing"}
    assert set(PAGE_OF) | {"tree", "types"} == parts
