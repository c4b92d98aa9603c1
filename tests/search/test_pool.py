"""Threads that take items in turn, and can be left at any time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from nnkit.search import Workers


def test_every_item_is_done_once_and_begun_in_order():
    begun = []

    def f(item, device):
        begun.append(item)
        return 10 * item

    with Workers(1) as workers:
        assert list(workers.map(f, range(5))) == [(i, 10 * i) for i in range(5)]
    assert begun == list(range(5))


def test_all_threads_work_at_once_and_results_come_as_they_are_done():
    together = threading.Barrier(3, timeout=30)
    release = threading.Event()

    def f(item, device):
        together.wait()  # broken unless three threads are here
        if item == 0:
            release.wait(30)
        return item

    with Workers(3) as workers:
        found = workers.map(f, range(3))
        assert {next(found)[0], next(found)[0]} == {1, 2}
        release.set()
        assert next(found) == (0, 0)
        assert list(found) == []


def test_workers_can_map_again_and_again():
    with Workers(2) as workers:
        for n in (3, 0, 5):
            assert sorted(workers.map(lambda item, _: item, range(n))) == [(i, i) for i in range(n)]


def test_each_thread_has_its_device():
    together = threading.Barrier(3, timeout=30)

    def f(item, device):
        together.wait()
        return device

    with Workers(3, devices=["a", "b"]) as workers:
        assert sorted(device for _, device in workers.map(f, range(3))) == ["a", "a", "b"]


def test_the_first_error_is_raised_and_the_rest_is_dropped():
    begun = []

    def f(item, device):
        begun.append(item)
        if item == 2:
            raise ValueError("item 2 is wrong")
        return item

    with Workers(1) as workers:
        with pytest.raises(ValueError, match="item 2 is wrong"):
            list(workers.map(f, range(1000)))
        # The threads are there for more.
        assert list(workers.map(f, [7])) == [(0, 7)]
    # Were it for the caller to say so, a thread would begin more items before the caller has looked.
    assert begun == [0, 1, 2, 7]


def test_items_are_taken_when_it_is_their_turn():
    taken, done = [], []

    def items():
        for i in range(1000):
            taken.append(i)
            assert len(taken) - len(done) <= 2 * 32
            yield i

    with Workers(2) as workers:
        for index, _ in workers.map(lambda item, _: item, items()):
            done.append(index)
    assert sorted(done) == taken == list(range(1000))


def test_an_iterator_that_is_closed_drops_what_has_not_begun():
    begun, gate = [], threading.Event()

    def f(item, device):
        begun.append(item)
        if item > 0:
            gate.wait(30)
        return item

    with Workers(1) as workers:
        found = workers.map(f, range(100))
        next(found)
        found.close()
        gate.set()
        assert list(workers.map(lambda item, _: item, [1])) == [(0, 1)]
    assert len(begun) <= 2


def test_items_are_made_by_the_caller_while_threads_work():
    maker, seen = [], []

    def items():
        for i in range(3):
            maker.append(threading.current_thread())
            while len(seen) < i:  # ends because the item before is done meanwhile
                time.sleep(0.001)
            yield i

    with Workers(1) as workers:
        for _, result in workers.map(lambda item, _: seen.append(item), items()):
            assert result is None
    assert set(maker) == {threading.current_thread()}
    assert seen == [0, 1, 2]


def test_threads_have_the_settings_of_whoever_opens_them():
    def f(item, device):
        drawn = jax.random.bits(jax.random.key(0), (3,)).tolist()
        return jnp.asarray(0.1).dtype, jax.config.jax_numpy_dtype_promotion, drawn

    here = f(0, None)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.threefry_partitionable(False):
        there = f(0, None)
        with Workers(1) as workers:
            ((_, found),) = workers.map(f, [0])
    assert found == there == (jnp.float64, "standard", there[2])
    assert there[2] != here[2]


def test_left_by_an_error_nobody_waits_for_the_device():
    class Never:
        """What a device never finishes."""

        def is_ready(self):
            return False

    started = threading.Event()

    def f(item, device):
        started.set()
        return workers.wait(Never())

    def items():
        yield 0
        started.wait(30)
        raise RuntimeError("enough")

    before = threading.active_count()
    begun = time.monotonic()
    workers = Workers(2)
    with pytest.raises(RuntimeError, match="enough"), workers:
        list(workers.map(f, items()))
    assert time.monotonic() - begun < 4  # _PATIENCE would be 5
    assert threading.active_count() == before


def test_wait_gives_back_what_it_was_given_and_computed():
    @jax.jit
    def slow(key):  # long enough that it is not done at once
        x = jax.lax.fori_loop(0, 20, lambda i, x: jnp.tanh(x @ x), jax.random.uniform(key, (512, 512)))
        return {"key": jax.random.split(key), "nothing": None, "x": x}

    with Workers(1) as workers:
        tree = slow(jax.random.key(0))
        assert workers.wait(tree) is tree
        assert tree["x"].is_ready()
        assert workers.wait(()) == ()


LONG = """
import signal
import jax, jax.numpy as jnp
from nnkit import search
# A shell that starts the tests in the background has its children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
x, begun = jnp.ones((512, 512)), []
f = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, lambda i, x: jnp.tanh(x @ x), x)).lower(x).compile()
def train(item, device):
    begun.append(f(x))
    print("go\\n", end="", flush=True)
    return workers.wait(begun[-1])
try:
    with search.Workers(1) as workers:
        list(workers.map(train, [0, 1]))
except KeyboardInterrupt:
    print("stopped", len(begun), begun[0].is_ready(), flush=True)
    raise
"""


def test_ctrl_c_does_not_wait_for_the_device_and_begins_nothing_more():
    process = subprocess.Popen(
        [sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = threading.Timer(60, process.kill)
    killed.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate()
    finally:
        killed.cancel()
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130)
    assert printed == "stopped 1 False\n"
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "FATAL" not in said


def test_wrong_uses_are_said():
    with pytest.raises(ValueError, match=r"Workers\(n\) must be a whole number of at least 1, got 0"):
        Workers(0)
    workers = Workers(1)
    with pytest.raises(RuntimeError, match="no threads are there: write with Workers"):
        workers.map(lambda item, device: item, [1])
    with workers:
        pass
    with pytest.raises(RuntimeError, match="used before: make others"), workers:
        pass
