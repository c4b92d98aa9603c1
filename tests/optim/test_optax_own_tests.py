"""optax's own tests, which its wheel brings along, with nnkit's functions in the place of optax's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

OWN_TYPE = "asserts that the result is of optax's own class; any pair of init and update serves here"
UNPATCHED = "fails with optax itself on JAX 0.10.2 too"

# What is not to pass, and why. docs/proofs.md shows this table.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "optax._src.alias_test": {},
    "optax._src.combine_test": {
        "test_extra_args": OWN_TYPE,
        "test_extra_args_chaining": OWN_TYPE,
    },
    "optax._src.lookahead_test": {},
    "optax._src.sharding_test": {},
    "optax._src.transform_test": {
        "test_lion_invalid_mode_raises": "expects the error at the update; here it comes when Lion is built",
    },
    "optax._src.update_test": {},
    "optax.contrib._common_test": {},
    "optax.contrib._muon_test": {},
    "optax.contrib._reduce_on_plateau_test": {},
    "optax.schedules._inject_test": {
        "test_hyperparam_default_dtype_bf16": "asserts bfloat16 hyper-parameters for bfloat16 parameters, "
        "in which a decay of 0.999 is 1; here they are float32",
        "test_inject_hyperparams_starts_with_step_count_zero": "scales integer updates, which are refused here",
    },
    "optax.schedules._join_test": {},
    "optax.schedules._schedule_test": {},
    "optax.transforms._accumulation_test": {},
    "optax.transforms._adding_test": {},
    "optax.transforms._clipping_test": {"test_clip_by_block_rms": UNPATCHED},
    "optax.transforms._combining_test": {
        "test_extra_args": OWN_TYPE,
        "test_extra_args_chaining": OWN_TYPE,
    },
    "optax.transforms._conditionality_test": {},
    "optax.transforms._freezing_test": {
        "test_bad_structure_raises": UNPATCHED,
        "test_selective_bad_structure": UNPATCHED,
    },
    "optax.transforms._masking_test": {},
}
SLOW = {
    "optax._src.alias_test",
    "optax._src.transform_test",
    "optax.contrib._common_test",
    "optax.contrib._muon_test",
    "optax.transforms._accumulation_test",
    "optax.transforms._clipping_test",
}
FAILURE = re.compile(r"^(?:FAILED|ERROR|SUBFAIL\S*).*::(\w+)", re.MULTILINE)


def run(module: str, *plugins: str) -> tuple[int, set[str]]:
    """How many of a module's tests passed, and which did not, in a process of their own."""
    root = Path(__file__).parent.parent.parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=no",
        "-rfE",
        "--noconftest",
        "-p",
        "no:cacheprovider",
    ]
    command += [part for plugin in plugins for part in ("-p", plugin)]
    command += ["-o", "addopts=", "-o", "filterwarnings=", "--pyargs", module]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert re.search(r"\d+ (passed|failed).* in ", found.stdout), found.stdout[-2000:] + found.stderr[-2000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    return int(passed[1]) if passed else 0, set(FAILURE.findall(found.stdout))


@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in EXCEPTIONS],
)
def test_they_pass_but_for_the_exceptions(module: str) -> None:
    passed, failed = run(module, "tests.optim.in_optax_place")
    assert passed
    assert failed == EXCEPTIONS[module].keys()


@pytest.mark.parametrize(
    "module", sorted(m for m, found in EXCEPTIONS.items() if UNPATCHED in found.values() and m not in SLOW)
)
def test_what_fails_with_optax_itself_does(module: str) -> None:
    _, failed = run(module)
    assert failed == {test for test, why in EXCEPTIONS[module].items() if why == UNPATCHED}


def test_the_functions_are_really_replaced() -> None:
    """The tests of schedules fail when a schedule of nnkit's is wrong."""
    passed, failed = run("optax.schedules._join_test", "tests.optim.in_optax_place")
    assert (passed, failed) == (1, set())
    _, failed = run("optax.schedules._join_test", "tests.optim.in_optax_place", "tests.optim.a_wrong_join")
    assert failed == {"test_join_schedules"}
