"""Optimizers in runs: stopped and resumed, over several devices, with very many parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim, train
from tests.optim.oracle import parameters, smooth_gradients, ulps
from tests.optim.rows import ROWS

RUNS = {
    **{
        name: ROWS[name]
        for name in (
            "sgd_nesterov",
            "adagrad_from_0",
            "rmsprop_centered",
            "adamw_mask",
            "radam",
            "lamb",
            "lion",
        )
    },
    "injected": lambda m: m.inject_hyperparams(m.adam)(m.exponential_decay(0.1, 3, 0.5)),
    "accumulated": lambda m: m.MultiSteps(m.adam(1e-2), 3),
    "lookahead of a chain": lambda m: m.chain(m.clip_by_global_norm(1.0), m.ema(0.9), m.adam(1e-2)),
    "plateau": lambda m: m.chain(m.adam(1e-2), m.reduce_on_plateau(patience=2, monitor="loss")),
}


def _steps(tx: Any, params: Any, state: Any, grads: list[Any]) -> Any:
    @jax.jit
    def step(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return optim.apply_updates(params, updates), state

    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_state_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    tx, grads = RUNS[name](optim), smooth_gradients(jnp.float32, 10)
    start = parameters(jnp.float32)
    expected = _steps(tx, start, tx.init(start), grads)
    halfway = _steps(tx, start, tx.init(start), grads[:5])
    train.save_tree(tmp_path / "state.npz", halfway)
    like = jax.eval_shape(lambda p: (p, tx.init(p)), start)
    again = RUNS[name](optim)  # another object, as in another process
    got = _steps(again, *train.load_tree(tmp_path / "state.npz", like=like), grads[5:])
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert ulps(got, expected) == 0


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nnkit import optim
from tests.optim.oracle import ulps
from tests.optim.rows import ROWS
from tests.optim.test_optimizer_runs import _steps

assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
rng = np.random.default_rng(0)
make = lambda: {"kernel": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
                "bias": jnp.asarray(rng.normal(size=6), jnp.float32)}
params, grads = make(), [make() for _ in range(4)]
specs = {"kernel": NamedSharding(mesh, P("data", "model")), "bias": NamedSharding(mesh, P("model"))}
put = lambda tree: jax.device_put(tree, specs)
for name in ("sgd_nesterov", "adagrad", "rmsprop_centered", "adam", "adamw", "adamax", "amsgrad", "lion", "adadelta"):
    tx = ROWS[name](optim)
    want = _steps(tx, params, tx.init(params), grads)
    got = _steps(tx, put(params), tx.init(put(params)), [put(g) for g in grads])
    assert got[0]["kernel"].sharding.is_equivalent_to(specs["kernel"], 2), name
    assert all(x.sharding.is_equivalent_to(specs["kernel"], 2)
               for x in jax.tree.leaves(got[1]) if x.shape == (8, 6)), name
    assert ulps(got, want) <= 4, name  # four steps, a rounding of a multiply and add in each
    print(name)
# Norms over all leaves are sums across devices, in another order.
tx = optim.chain(optim.clip_by_global_norm(0.5), optim.lamb(1e-2))
want = _steps(tx, params, tx.init(params), grads)
got = _steps(tx, put(params), tx.init(put(params)), [put(g) for g in grads])
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
print("norms")
"""


def test_sharded_parameters_stay_sharded_and_give_the_same_numbers() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "sgd_nesterov", "lion"])
def test_thousands_of_parameters(name: str) -> None:
    """2,000 leaves; as many states, and the same numbers as each leaf by itself."""
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": {"bias": jnp.asarray(rng.normal(size=i % 7), jnp.float32)} for i in range(2000)}
    grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    tx = ROWS[name](optim)
    after, state = _steps(tx, params, tx.init(params), [grads] * 3)
    for i in (0, 1, 6, 999, 1999):
        leaf = params[f"layer_{i}"], [grads[f"layer_{i}"]] * 3
        alone, _ = _steps(tx, leaf[0], tx.init(leaf[0]), leaf[1])
        np.testing.assert_allclose(after[f"layer_{i}"]["bias"], alone["bias"], rtol=1e-6, atol=1e-7)
    assert len(jax.tree.leaves(state)) < 10
