"""The pytest plugin in a pytest of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent.parent
INSTALLED = any(p.value == "pytest_nnkit" for p in importlib.metadata.entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "pytest_nnkit")


@pytest.fixture
def run(pytester, monkeypatch):
    """A pytest in a process of its own, since devices are counted once a process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return lambda *arguments: pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", *arguments)


def test_fixtures_seed_and_header(pytester, run):
    pytester.makepyfile(
        """
        import jax

        def test_key(nnkit_key, nnkit_rng, nnkit_seed):
            print("numbers", nnkit_seed, jax.random.key_data(nnkit_key)[-1], nnkit_rng.integers(10**6))

        def test_other(nnkit_seed):
            print("other", nnkit_seed)

        def test_mesh(nnkit_mesh):
            pass
        """
    )
    found = run("-s", "-rs")
    found.assert_outcomes(passed=2, skipped=1)
    found.stdout.fnmatch_lines(["*one device is visible: start pytest with --nnkit-devices 8*"])
    other = run("-s", "--nnkit-seed", "5", "--nnkit-devices", "4")
    other.assert_outcomes(passed=3)
    other.stdout.fnmatch_lines(["nnkit: --nnkit-seed=5, 4 virtual devices"])
    numbers = [
        next(line for line in out.outlines if "numbers" in line).split("numbers")[1] for out in (found, other)
    ]
    assert numbers[0] != numbers[1]
    assert next(line for line in found.outlines if "other" in line).split()[-1] not in numbers[0]


def test_checks_as_fixtures_and_the_text_of_a_failure(pytester, run):
    pytester.makepyfile(
        """
        import jax.numpy as jnp
        from nnkit import layers, testing

        def test_right(check_layer, nnkit_mesh):
            assert check_layer(layers.relu, jnp.linspace(-1, 1, 12).reshape(6, 2)).status("mesh") == "passed"

        def test_wrong(check_layer):
            check_layer(layers.stateless(lambda x: x - x.mean(0)), jnp.linspace(-1, 1, 12).reshape(6, 2))
        """
    )
    found = run("--nnkit-devices", "2")
    found.assert_outcomes(passed=1, failed=1)
    text = "\n".join(found.outlines)
    assert "E           independence of examples" in text or "independence of examples: the output" in text
    assert "def run_checks" not in text


def test_devices_that_come_too_late(pytester, run):
    pytester.makeconftest("import jax\njax.devices()\n")
    pytester.makepyfile("def test_nothing(): pass")
    found = run("--nnkit-devices", "2")
    found.stderr.fnmatch_lines(["*--nnkit-devices comes too late*"])
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert run("--nnkit-devices", "0").ret == pytest.ExitCode.USAGE_ERROR


def test_the_plugin_imports_neither_jax_nor_nnkit():
    code = "import sys, pytest_nnkit; print({'jax', 'numpy', 'nnkit'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_it_is_declared_and_in_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_nnkit": "pytest_nnkit"}
    assert "pytest_nnkit.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
