"""Imports point one way, and importing nnkit brings in nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnkit

ROOT = Path(nnkit.__file__).parent

# Each part may import the parts named here and itself; a part of a package counts as the package.
MAY_IMPORT = {
    "types": set(),
    "checks": set(),
    "modes": set(),
    "packing": {"types"},
    "tree": {"types", "packing"},
    "initializers": {"types", "checks"},
    "activations": {"types", "checks"},
    "losses": {"types", "checks", "tree"},
    "metrics": {"types", "checks", "losses"},
    "regularizers": {"types", "checks", "tree"},
    "ops": {"types", "checks", "tree"},
    "layers": {"types", "checks", "modes", "tree", "initializers", "activations", "ops"},
    "optim": {"types", "checks", "packing", "tree"},
    "data": {"types", "checks", "tree"},
    "train": {"types", "checks", "modes", "packing", "tree", "losses", "optim", "data"},
    "record": {"types", "checks", "tree", "train"},
    "interop": {"types", "checks", "packing", "tree", "layers", "train"},
    "diagnose": {"types", "checks", "tree", "metrics", "train"},
    "search": {"types", "checks", "tree", "train", "diagnose"},
    "testing": {
        "types",
        "checks",
        "packing",
        "tree",
        "activations",
        "layers",
        "losses",
        "optim",
        "train",
        "interop",
    },
    "models": {"types", "checks", "initializers", "layers"},
    "cli": {
        "types",
        "checks",
        "data",
        "models",
        "losses",
        "metrics",
        "regularizers",
        "optim",
        "train",
        "record",
        "interop",
        "diagnose",
        "search",
        "testing",
    },
}


def imports(path: Path) -> set[str]:
    """The parts of nnkit that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nnkit":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nnkit.")}
    return found


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_stands_above_it(part):
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        extra = imports(path) - MAY_IMPORT[part] - {part}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_every_part_is_listed_and_the_order_has_no_cycle():
    parts = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert parts - {"__init__"} == set(MAY_IMPORT)
    done: set[str] = set()
    while done != set(MAY_IMPORT):
        ready = {part for part, above in MAY_IMPORT.items() if part not in done and above <= done}
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_importing_nnkit_brings_in_nothing_heavy():
    """What `import nnkit` costs beside `import jax` is measured in benchmarks/import_time.py."""
    heavy = {
        "optax", "flax", "equinox", "chex", "torch", "tensorflow", "tensorflow_datasets", "sklearn", "scipy.stats",
        "matplotlib", "rich", "tyro", "pandas", "PIL", "optuna",
    }  # fmt: skip
    code = (
        "import jax, sys; before = set(sys.modules); import nnkit; print(*sorted(set(sys.modules) - before))"
    )
    new = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nnkit.layers.dense" in new
    assert not heavy & set(new)
    assert not heavy & {name.split(".")[0] for name in new}


def test_every_module_says_what_it_exports():
    for path in sorted(ROOT.rglob("*.py")):
        if path.name == "__main__.py":
            continue  # what python -m runs is not imported
        module = ast.parse(path.read_text())
        assigned = [
            target.id
            for node in module.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        assert "__all__" in assigned, path
        assert ast.get_docstring(module), path


def test_the_tests_that_are_listed_as_slow_exist():
    lines = (Path(__file__).parent / "slow.txt").read_text().splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        path, name = line.split("::", 1)
        source = (Path(__file__).parent.parent / path).read_text()
        assert f"def {name.split('[')[0]}(" in source, line
