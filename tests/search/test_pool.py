"""Threads that take items in turn, and can be left at any time."""

from __future__ import annotations

import os
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

    before = threading.active_count()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="enough"), Workers(2) as workers:
        for item in workers.map(f, (i for i in range(1))):
            assert item is None
            break
        raise RuntimeError("enough")
    assert time.monotonic() - begun < 60
    assert threading.active_count() == before


def test_wait_gives_back_what_it_was_given():
    with Workers(1) as workers:
        tree = {"a": jnp.arange(3.0), "key": jax.random.key(0)}
        assert workers.wait(tree) is tree


LONG = """
import jax, jax.numpy as jnp, sys
from nnkit import search
f = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x), x)).lower(jnp.ones(1000)).compile()
with search.Workers(2) as workers:
    def train(item, device):
        out = f(jnp.ones(1000))
        print("go", flush=True)
        return workers.wait(out)
    list(workers.map(train, [0, 1]))
"""


def test_ctrl_c_ends_the_process_though_the_devices_compute_on():
    process = subprocess.Popen(
        [sys.executable, "-c", LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        # What it computes would take hours.
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130)
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
