"""nnkit's pytest plugin: ``--nnkit-seed``, ``--nnkit-devices`` and fixtures around ``nnkit.testing``.

It stands outside the package, and imports nothing but pytest and the standard library: a plugin is loaded
before any conftest.py, and importing nnkit would import JAX then, which reads JAX_PLATFORMS, XLA_FLAGS and its
other variables once and for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["nnkit_key", "nnkit_mesh", "nnkit_seed"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nnkit", "nnkit's conformance checks")
    group.addoption(
        "--nnkit-seed",
        type=int,
        default=0,
        metavar="N",
        help="what the fixtures nnkit_key and nnkit_rng are drawn from, beside the test's name (default 0)",
    )
    group.addoption(
        "--nnkit-devices",
        type=int,
        default=None,
        metavar="N",
        help="run on so many virtual CPU devices, for nnkit_mesh and the checks' own 'mesh'",
    )


def pytest_configure(config: pytest.Config) -> None:
    devices = config.getoption("--nnkit-devices")
    if devices is None:
        return
    if devices < 1:
        raise pytest.UsageError(f"--nnkit-devices must be at least 1, got {devices}")
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise pytest.UsageError(
            "--nnkit-devices comes too late: a conftest.py or a plugin has already run something on JAX "
            f"({error})"
        ) from None


def pytest_report_header(config: pytest.Config) -> str | None:
    """Silent where no option is given: the plugin is loaded in projects that do not use it."""
    seed, devices = (config.getoption(name) for name in ("--nnkit-seed", "--nnkit-devices"))
    if not seed and devices is None:
        return None
    return f"nnkit: --nnkit-seed={seed}" + (f", {devices} virtual devices" if devices else "")


@pytest.fixture
def nnkit_seed(request: pytest.FixtureRequest) -> int:
    """A number made of ``--nnkit-seed`` and of the test's id: another in each test, the same in each run."""
    return zlib.crc32(f"{request.config.getoption('--nnkit-seed')}:{request.node.nodeid}".encode())


@pytest.fixture
def nnkit_key(nnkit_seed: int) -> Any:
    """A typed PRNG key of the test's own."""
    import jax

    return jax.random.key(nnkit_seed)


@pytest.fixture
def nnkit_rng(nnkit_seed: int) -> Any:
    """A numpy generator of the test's own."""
    import numpy as np

    return np.random.default_rng(nnkit_seed)


@pytest.fixture
def nnkit_mesh() -> Any:
    """A mesh of up to 8 devices with the axis ``batch``; the test is skipped where there is one device."""
    from nnkit.testing.report import NotApplicable
    from nnkit.testing.shared import mesh_of

    try:
        return mesh_of()
    except NotApplicable as why:
        pytest.skip(str(why))


def _check(name: str) -> Any:
    @pytest.fixture(name=name)
    def fixture() -> Callable[..., Any]:
        from nnkit import testing

        return getattr(testing, name)

    fixture.__doc__ = f"``nnkit.testing.{name}``."
    return fixture


check_layer = _check("check_layer")
check_optimizer = _check("check_optimizer")
check_loss = _check("check_loss")
check_schedule = _check("check_schedule")
check_trainer = _check("check_trainer")
assert_equivalent = _check("assert_equivalent")
