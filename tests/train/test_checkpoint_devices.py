"""Checkpoints of arrays on several devices and of several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from nnkit.train import Checkpoints
from tests.train.test_checkpoints import run_python, tree

DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nnkit.train import Checkpoints, restore

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
x = jnp.arange(32.0).reshape(4, 8)
tree = {"replicated": put(x), "sharded": put(x, "a", "b"), "partly": put(x, None, "b"), "single": x,
        "other": jax.device_put(x, jax.devices()[3]), "key": put(jax.random.key(1)),
        "keys": put(jax.random.split(jax.random.key(1), 4), "a")}
with Checkpoints(sys.argv[1]) as store:
    store.save(1, tree, {})
for like in (tree, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)):
    found = restore(sys.argv[1], like).tree
    for name, leaf in tree.items():
        assert found[name].sharding == leaf.sharding, (name, found[name].sharding)
        assert (found[name] == leaf).all(), name
print("same", end="")
"""


def test_arrays_on_several_devices(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    assert run_python(DEVICES, tmp_path, JAX_PLATFORMS="cpu", XLA_FLAGS=flags) == "same"


PROCESSES = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

address, number, shared, own = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, number, initialization_timeout=60, heartbeat_timeout_seconds=10,
                           coordinator_bind_address=address)
from nnkit.train import Checkpoints, restore

opened = []
def watch(event, args):
    if event in ("os.mkdir", "os.rename", "os.remove"):
        opened.append(args[0])
sys.addaudithook(watch)
mesh = Mesh(np.array(jax.devices()), ("a",))
def put(x, *spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
def tree(step):
    key = jax.random.wrap_key_data(put(np.uint32([step, 2])))
    return {"replicated": put(x + step), "sharded": put(x + step, "a"), "local": np.float32(step), "key": key}
with Checkpoints(shared, keep_last=1) as store:
    for step in (1, 2):
        store.save(step, tree(step), {"step": step})
assert bool(opened) == (number == 0), opened
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("written")
like = tree(0)
found = restore(shared, like)
assert (found.step, found.record) == (2, {"step": 2})
for name, leaf in tree(2).items():
    here = found.tree[name]
    if name == "local":
        assert here == leaf
        continue
    assert here.sharding == like[name].sharding, (name, here.sharding)
    data = jax.random.key_data if name == "key" else (lambda a: a)
    for a, b in zip(data(here).addressable_shards, data(leaf).addressable_shards, strict=True):
        assert (np.asarray(a.data) == np.asarray(b.data)).all(), name
with Checkpoints(own) as store:
    store.save(7, tree(7), {})
multihost_utils.sync_global_devices("written")
try:
    restore(own, like)
except RuntimeError as error:
    print(error, end="")
"""


@pytest.mark.slow
def test_two_processes_of_which_the_first_writes(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "JAX_PLATFORMS": "cpu",
    }
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROCESSES,
                address,
                str(i),
                str(tmp_path / "shared"),
                str(tmp_path / str(i)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    for i, (process, (out, err)) in enumerate(zip(processes, said, strict=True)):
        assert process.returncode == 0, err
        assert out.endswith(  # gloo has its say first
            f"the processes found different newest checkpoints in '{tmp_path}/{i}' (steps 7, none): "
            "put the run where all of them see the same files"
        )
    assert os.listdir(tmp_path / "shared") == ["step_000000002"]
    assert sorted(os.listdir(tmp_path)) == ["0", "shared"]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Checkpoints(tmp_path / "run") as store:
        store.save(1, tree(1), {})
    assert os.listdir(tmp_path) == []
