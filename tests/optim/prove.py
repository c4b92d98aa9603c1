"""How far the optimizers are from optax and PyTorch, and which wrong ones are caught, as a document.

    python -m tests.optim.prove docs/proofs.md

Everything in the tables is computed when the command runs, by the functions that the tests assert with;
without a path it is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from nnkit import optim
from nnkit.testing.table.optimizers_torch import torch_gradients
from tests.optim import test_optimizers_against_torch as against_torch
from tests.optim.oracle import (
    beside,
    check_against_optax,
    parameters,
    rough_gradients,
    trajectory,
    ulps,
)
from tests.optim.rows import IGNORE, LOW, ROWS
from tests.optim.test_optax_own_tests import EXCEPTIONS
from tests.optim.test_optimizer_mutants import MUTANTS

HEAD = """# Proofs of the optimizers

Written by `python -m tests.optim.prove docs/proofs.md`; the tests assert the same with the bounds named here.
The options of each line are in nnkit/testing/table/optimizers.py and optimizers_torch.py.
"""


def main(path: str | None = None) -> None:
    text = "\n".join([HEAD, *_optax(), *_torch(), *_mutants(), *_own_tests()]) + "\n"
    if path is None:
        print(text)
    else:
        Path(path).write_text(text)


def _optax() -> list[str]:
    lines = [
        "## Against optax",
        "",
        "200 steps of rough gradients (eight decades, zeros, 1e-20, 1e20, sign flips, sparse) on a tree with",
        "nested, scalar, empty and None leaves. float32 and bfloat16: each step from optax's own state, the",
        "largest distance of an update or a state in units in the last place (asserted: 2 in float32).",
        "float64: both go their own way, the largest relative difference of any parameter or state after 200",
        "steps (asserted: 1e-12).",
        "",
        "| | float32, ulp | float64, relative | bfloat16, ulp |",
        "|---|---|---|---|",
    ]
    for name in ROWS:
        _tell(name)
        half = _ulp(name, jnp.bfloat16) if name in LOW else ""
        lines.append(f"| {name} | {_ulp(name, jnp.float32)} | {_relative(name)} | {half} |")
    return [*lines, ""]


def _ulp(name: str, dtype: Any) -> int:
    ours, theirs = ROWS[name](optim), ROWS[name](optax)
    got, want, states, their_states = beside(ours, theirs, parameters(dtype), rough_gradients(dtype))
    skipped = IGNORE[name](their_states) if name in IGNORE else None
    return max(ulps(got, want, skipped), ulps(states, their_states))


def _relative(name: str) -> str:
    if name in IGNORE:
        return "rounding noise"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, grads = parameters(jnp.float64), rough_gradients(jnp.float64)
        ours = trajectory(ROWS[name](optim), optim.apply_updates, params, grads)
        theirs = trajectory(ROWS[name](optax), optax.apply_updates, params, grads)
    worst = 0.0
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = np.where(y == 0, 1.0, np.abs(y))
        worst = max(worst, float(np.max(np.abs(x - y) / scale, initial=0.0)))
    return f"{worst:.0e}" if worst else "0"


def _torch() -> list[str]:
    lines = [
        "## Against PyTorch",
        "",
        "Trajectories of 200 steps in float64, PyTorch's conventions reached through arguments: the largest",
        "difference of any parameter at any step, relative to the largest parameter (asserted: 1e-13).",
        "",
        "| | difference |",
        "|---|---|",
    ]
    grads = torch_gradients(np.float64)
    torch.set_default_dtype(torch.float64)
    for name, (ours, theirs) in against_torch.ROWS.items():
        _tell(f"PyTorch: {name}")
        with jax.enable_x64(True):
            mine = against_torch._ours(ours, grads)
        expected = against_torch._theirs(theirs, grads)
        difference = np.abs(mine - expected).max() / np.abs(expected).max()
        lines.append(f"| {name} | {difference:.0e} |")
    torch.set_default_dtype(torch.float32)
    return [*lines, ""]


def _mutants() -> list[str]:
    lines = [
        "## Wrong optimizers, and the check that catches them",
        "",
        "Each was put in the place of the right one in the comparison with optax above, for 20 steps. What it",
        "is caught by is the first comparison that fails. Schedules, wrappers, Muon and the conventions of",
        "PyTorch have mutants of their own in tests/optim, which run with the tests.",
        "",
        "| mutant | in the place of | caught by |",
        "|---|---|---|",
    ]
    theirs = {row: ROWS[row](optax) for row, _ in MUTANTS.values()}
    for name, (row, mutant) in MUTANTS.items():
        _tell(f"mutant: {name}")
        try:
            check_against_optax(mutant, theirs[row], jnp.float32, steps=20)
        except AssertionError as error:
            said = str(error)
            caught = (
                "updates" if said.startswith("updates") else "states" if said.startswith("states") else ""
            )
            caught = caught or ("counts" if "not equal" in said else "the first state or NaN")
        else:
            caught = "**nothing**"
        lines.append(f"| {name} | {row} | {caught} |")
    return [*lines, ""]


def _own_tests() -> list[str]:
    lines = [
        "## optax's own tests",
        "",
        "The tests that optax's wheel brings along, run by pytest with nnkit's functions in optax's place",
        "(tests/optim/in_optax_place.py), pass but for these:",
        "",
        "| tests | does not pass | why |",
        "|---|---|---|",
    ]
    for module, found in EXCEPTIONS.items():
        lines += [f"| {module} | {test} | {why} |" for test, why in found.items()]
    whole = ", ".join(f"`{module.split('.')[-1]}`" for module, found in EXCEPTIONS.items() if not found)
    return [*lines, "", f"Without exception: {whole}."]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
