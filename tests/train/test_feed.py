"""Feeding from a source: bit for bit the training on resident data, whatever the cuts, and threads that end."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import data, layers, losses, metrics, optim, train, tree
from nnkit.train import streaming
from nnkit.train.epochs import Means, dispatch
from nnkit.train.feed import Resident
from nnkit.train.streaming import Streaming

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 103).astype(np.int32)
KEY = jax.random.key(0)
MODEL = layers.serial(layers.dense(8), layers.dropout(0.5), layers.dense(3))
TRAINER = train.trainer(
    MODEL, losses.softmax_cross_entropy, optim.adam(1e-2), metrics={"accuracy": metrics.accuracy}
)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t.name == "nnkit-streaming"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def trained(feed, epochs=2, stop=None, ts=None):
    """The state and the means of each epoch, as ``fit`` would have them."""
    ts = TRAINER.init(KEY, X[:1]) if ts is None else ts
    rows = []
    while int(ts.step) < (epochs * feed.steps if stop is None else stop):
        means, waiting = Means(), None
        for chunk in feed.chunks(ts.key, *divmod(int(ts.step), feed.steps)):
            ts, found, _ = dispatch(TRAINER, ts, chunk)
            if waiting is not None:
                means.add(*waiting)
            waiting = chunk, found
            if stop is not None and int(ts.step) >= stop:
                break
        means.add(*waiting)
        rows.append(means.values())
    return ts, rows


def same(a, b):
    a, b = (tree.flatten(t._replace(key=jax.random.key_data(t.key))) for t in (a, b))
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


@pytest.fixture(scope="module")
def resident():
    feed = Resident((jnp.asarray(X), jnp.asarray(Y)), 16, shuffle=True, drop_last=False, steps_per_call=3)
    return trained(feed)


def source(size=16, **options):
    return data.stream((X, Y), size, **options)


@pytest.mark.parametrize("steps_per_call", [1, 100])
@pytest.mark.parametrize("epochs", [2, None])
def test_a_streamed_run_is_the_resident_run_to_the_last_bit(steps_per_call, epochs, resident):
    with Streaming(source(), steps_per_call=steps_per_call, epochs=epochs) as feed:
        ts, rows = trained(feed)
    same(ts, resident[0])
    assert rows == resident[1]


@pytest.mark.parametrize("stop", [1, 3, 6, 7, 9])
def test_a_run_is_taken_up_in_the_middle_of_an_epoch(stop, resident):
    """Stopped within and at the ends of chunks; the rest is fed by another feed, cut otherwise."""
    with Streaming(source(), steps_per_call=1, epochs=2) as feed:
        part, _ = trained(feed, stop=stop)
    assert int(part.step) == stop
    with Streaming(source(), steps_per_call=100, epochs=2) as feed:
        same(trained(feed, ts=part)[0], resident[0])


def taken(feed, key=KEY, epoch=0, start=0):
    """The batches of an epoch as the compiled steps see them, copied at once."""
    found = []
    for chunk in feed.chunks(key, epoch, start):
        assert chunk.order is None
        for i in range(chunk.steps):
            at = chunk.offset + i * chunk.batch_size
            found.append(jax.tree.map(lambda a, at=at: np.array(a[at : at + chunk.batch_size]), chunk.arrays))  # noqa: B023
    return found


def batches(epoch, start=0, key=KEY):
    return list(data.batches((X, Y), 16, order=data.shuffled_indices(key, epoch, len(X))))[start:]


def equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


MUTANTS = {
    "none": lambda monkeypatch: None,
    "another key": lambda monkeypatch: monkeypatch.setattr(
        streaming, "_on_host", lambda key: jax.random.fold_in(key, 1)
    ),
    "starts one late": lambda monkeypatch: _reads(monkeypatch, lambda epoch, start: (epoch, start + 1)),
    "another epoch": lambda monkeypatch: _reads(monkeypatch, lambda epoch, start: (epoch + 1, start)),
    "memory used again at once": lambda monkeypatch: monkeypatch.setattr(
        streaming._Plan, "_borrow", _borrow_the_same
    ),
}


def _reads(monkeypatch, change):
    right = streaming._Reader.__init__

    def wrong(self, plan, key, epoch, start):
        right(self, plan, key, *change(epoch, start))

    monkeypatch.setattr(streaming._Reader, "__init__", wrong)


def _borrow_the_same(plan, leaf, examples):
    free = plan._free[leaf, examples]
    if not free:
        shape, dtype = plan.rows[leaf]
        free.append(streaming._aligned((examples, *shape), dtype))
    return free[0]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_feed_that_gives_other_batches_is_found(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)

    def run():
        with Streaming(source(), steps_per_call=2, epochs=3) as feed:
            for epoch in range(3):
                held = list(feed.chunks(KEY, epoch, 0))  # all of an epoch, while the next is being read
                found = [
                    jax.tree.map(lambda a, c=c, i=i: a[i * c.batch_size : (i + 1) * c.batch_size], c.arrays)
                    for c in held
                    for i in range(c.steps)
                ]
                equal(found, batches(epoch))

    if mutant == "none":
        run()
    else:
        with pytest.raises((AssertionError, ValueError)):
            run()


def test_memory_is_used_again_and_bounded():
    """A loop that lets go of its chunks: some few buffers, each leaf of them made once."""
    made = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        aligned = streaming._aligned
        monkeypatch.setattr(streaming, "_aligned", lambda *a: made.append(a) or aligned(*a))
        with Streaming(source(4), steps_per_call=3, epochs=8) as feed:
            for epoch in range(8):
                for chunk in feed.chunks(KEY, epoch, 0):
                    jnp.sum(chunk.arrays[0]).block_until_ready()
    # Of two leaves and two sizes (the last batch has its own): at most four of each, as the docstring says.
    assert len(made) <= 2 * 2 * 4
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        memory = streaming._aligned((8, 4), np.float32)
        assert (
            jax.device_put(memory).unsafe_buffer_pointer() == memory.ctypes.data
        )  # or it would prove nothing


def test_memory_that_a_program_still_reads_is_not_used_again():
    """The array is gone from Python while the program that reads it has not even begun."""
    spec = jax.ShapeDtypeStruct((256, 64), np.float32)
    feed = Streaming(
        data.from_iterator(
            lambda epoch: (np.full((256, 64), i, np.float32) for i in range(40)), steps=40, spec=spec
        ),
        steps_per_call=1,
    )

    @jax.jit
    def late(a, busy):
        """The sum of ``a``, after some milliseconds of work that it has to wait for."""
        busy = jax.lax.fori_loop(0, 30, lambda i, b: jnp.tanh(b @ b), busy)
        return jnp.sum(a + 0 * busy[0, 0])

    busy = jnp.eye(64)
    with feed:
        sums = [late(chunk.arrays, busy) for chunk in feed.chunks(KEY, 0, 0)]
    assert [float(s) for s in sums] == [256 * 64 * i for i in range(40)]


def test_chunks_are_short_at_first_and_alike_later_and_an_uneven_last_batch_has_its_own():
    made = lambda steps_per_call, **o: [
        [(c.steps, c.batch_size, c.capacity) for c in feed.chunks(KEY, epoch, 0)]
        for feed in [Streaming(source(2), steps_per_call=steps_per_call, epochs=2, **o)]
        for epoch in range(2)
    ]
    first, second = made(20)
    assert first == [(n, 2, 17) for n in (1, 2, 3, 5, 8, 12, 17, 3)] + [(1, 1, 1)]
    assert second == [(n, 2, 17) for n in (5, 8, 12, 17, 9)] + [(1, 1, 1)]
    # 2 x 4 float32 and 2 int32 are 40 bytes.
    assert made(20, chunk_bytes=90)[1] == [(2, 2, 2)] * 25 + [(1, 2, 2), (1, 1, 1)]
    assert made(20, chunk_bytes=1)[0] == [(1, 2, 1)] * 51 + [(1, 1, 1)]


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_an_epoch_begins_anywhere(start):
    with Streaming(source(), steps_per_call=4) as feed:
        assert feed.steps == 7
        equal(taken(feed, epoch=3, start=start), batches(3, start))
        equal(taken(feed, epoch=1, start=0), batches(1))  # back
        equal(taken(feed, key=jax.random.key(5), epoch=2), batches(2, key=jax.random.key(5)))  # another run
        assert [t.name for t in threading.enumerate()].count("nnkit-streaming") == 0  # it reads no further


def test_what_was_read_ahead_is_taken_only_where_it_is_right():
    asked = []

    def make(epoch, start):
        asked.append((epoch, start))
        return (np.full((2, 2), 10 * epoch + i, np.float32) for i in range(start, 4))

    endless = data.from_iterator(make, steps=4)
    with Streaming(endless, steps_per_call=2, epochs=9) as feed:
        for epoch, start in [(0, 0), (1, 0), (2, 0), (1, 2), (2, 0), (5, 1)]:
            values = [batch[0, 0] for batch in taken(feed, epoch=epoch, start=start)]
            assert values == [10 * epoch + i for i in range(start, 4)]
    used = asked[1:]
    assert used[:3] == [(0, 0), (1, 0), (2, 0)]  # one thread, which went on
    assert (1, 2) in used[3:]
    assert (5, 1) in used


def test_the_settings_of_the_loop_are_those_of_the_thread():
    doubles = data.stream((X.astype(np.float64), Y.astype(np.int64)), 16)
    for x64, wanted in ((True, (jnp.float64, jnp.int64)), (False, (jnp.float32, jnp.int32))):
        with jax.enable_x64(x64), Streaming(doubles, steps_per_call=3) as feed:
            found = taken(feed)
            assert tuple(leaf.dtype for leaf in found[0]) == wanted
            equal(found, batches(0))


def test_other_generators_of_random_numbers():
    key = jax.random.key(3, impl="rbg")
    with Streaming(source(), steps_per_call=3) as feed:
        equal(taken(feed, key=key), batches(0, key=key))


# Errors of the source arise in the loop.


def failing():
    def make(epoch):
        for number in range(4):
            if (epoch, number) == (1, 2):
                raise OSError("the disk is on fire")
            yield np.full((2, 2), number, np.float32)

    return data.from_iterator(make, steps=4)


def test_an_error_of_the_source_arises_in_the_loop_with_its_place():
    feed = Streaming(failing(), steps_per_call=1, epochs=3)
    assert len(taken(feed)) == 4
    got = []
    with pytest.raises(OSError, match="the disk is on fire") as caught:
        got.extend(float(chunk.arrays[0, 0]) for chunk in feed.chunks(KEY, 1, 0))
    assert got == [0, 1]  # the batches before it are trained on
    assert caught.value.__notes__ == ["in batch 2 of epoch 1 (both from 0) of the data source"]
    equal(taken(feed, epoch=2), [np.full((2, 2), i, np.float32) for i in range(4)])  # it can be used on


@pytest.mark.parametrize("what", ["early", "shape", "dtype", "nan"])
def test_a_source_that_changes_is_an_error_with_its_place(what):
    good = np.ones((2, 2), np.float32)
    wrong = {"shape": good[:, :1], "dtype": good.astype(np.int32), "nan": good * np.nan}
    made = [good, good] if what == "early" else [good, good, wrong[what], good]
    feed = Streaming(
        data.from_iterator(lambda epoch: made, steps=4, spec=jax.ShapeDtypeStruct((2, 2), np.float32)),
        steps_per_call=4,
    )
    with pytest.raises(ValueError, match=re.escape("batch 2 of epoch 0 (both from 0)")):
        taken(feed)


def test_numbers_that_do_not_agree_are_an_error_before_the_run():
    wrong = source()
    wrong.examples = 90
    with pytest.raises(ValueError, match="the source says that an epoch has 7 batches of 16 and 90 examples"):
        Streaming(wrong, steps_per_call=3)
    with pytest.raises(
        ValueError, match=re.escape("Streaming(steps_per_call=...) must be a whole number of at")
    ):
        Streaming(source(), steps_per_call=0)
    with pytest.raises(
        ValueError, match=re.escape("Streaming(chunk_bytes=...) must be a whole number of at")
    ):
        Streaming(source(), steps_per_call=1, chunk_bytes=1e6)


def test_evaluation_looks_at_the_labels_of_the_first_batch():
    ts = TRAINER.init(KEY, X[:1])
    wrong = data.stream((X, Y + 3), 16)
    with pytest.raises(ValueError, match="label") as caught:
        train.evaluate(TRAINER, ts, wrong)
    assert caught.value.__notes__ == ["in the first batch of the data"]


# Threads end.


def endless(closed, wait=0.0):
    def make(epoch):
        try:
            for _ in range(10**6):
                time.sleep(wait)
                yield np.ones((2, 2), np.float32)
        finally:
            closed.append(epoch)

    return data.from_iterator(make, steps=10**6, spec=jax.ShapeDtypeStruct((2, 2), np.float32))


def threads():
    return [t for t in threading.enumerate() if t.name == "nnkit-streaming"]


@pytest.mark.parametrize("way", ["break", "error", "interrupt", "close", "with", "dropped"])
def test_a_loop_that_leaves_early_ends_the_thread(way):
    closed = []
    feed = Streaming(endless(closed), steps_per_call=10, epochs=2)

    def loop():
        for number, _ in enumerate(feed.chunks(KEY, 0, 0)):
            if number == 3:
                assert len(threads()) == 1
                if way == "error":
                    raise ZeroDivisionError
                if way == "interrupt":
                    raise KeyboardInterrupt
                return

    if way in ("break", "error", "interrupt"):
        with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt):
            loop()
    elif way == "with":
        with feed:
            chunks = feed.chunks(KEY, 0, 0)
            next(chunks)
        with pytest.raises(
            RuntimeError, match="these chunks are closed: the feed was closed, or asked for others"
        ):
            list(chunks)
    elif way == "close":
        chunks = feed.chunks(KEY, 0, 0)
        next(chunks)
        feed.close()
        feed.close()
        chunks.close()
    else:
        next(feed.chunks(KEY, 0, 0))
        del feed
        gc.collect()
    assert closed == [0]
    assert not threads()


def test_two_epochs_at_once_are_refused_and_not_mixed():
    with Streaming(source(), steps_per_call=1, epochs=2) as feed:
        taken(feed)
        older = feed.chunks(KEY, 1, 0)  # what was read ahead, and is not there a second time
        next(older)
        equal(taken(feed, epoch=1), batches(1))
        with pytest.raises(RuntimeError, match="these chunks are closed"):
            next(older)


def test_a_thread_that_reads_ahead_ends_with_the_feed():
    """After an epoch the next one's first chunk lies ready, and nobody comes for it: early stopping."""
    feed = Streaming(source(), steps_per_call=3, epochs=100)
    taken(feed)
    assert len(threads()) == 1
    del feed
    gc.collect()
    assert not threads()


SCRIPT = """
import sys, time, jax, numpy as np
from nnkit import data, train
way = sys.argv[1]
def make(epoch):
    for i in range(10**6):
        if way == "stuck" and i == 3:
            time.sleep(600)
        if way == "slow":
            time.sleep(0.01)
        yield np.ones((2, 2), np.float32)
source = data.from_iterator(make, steps=10**6, spec=jax.ShapeDtypeStruct((2, 2), np.float32))
feed = train.Streaming(source, steps_per_call=5, epochs=1)
chunks = feed.chunks(jax.random.key(0), 0, 0)
next(chunks)
if way == "interrupt":
    import _thread, threading
    threading.Timer(0.3, _thread.interrupt_main).start()
    try:
        for _ in chunks: time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted")
print("end", flush=True)
"""


@pytest.mark.parametrize("way", ["slow", "interrupt", pytest.param("stuck", marks=pytest.mark.slow)])
def test_a_process_ends_though_its_feed_was_left_open(way):
    """A source that is stuck is waited for some seconds, and no longer."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["interrupted", "end"] if way == "interrupt" else ["end"])


# The next chunk is on its way while this one computes.


def test_the_device_never_waits_for_a_source_that_is_fast_enough():
    """2 ms a batch under steps of 6 ms: after the first batch the loop finds every chunk ready.

    The bound: the first batch's time, and 12 ms for 42 chunks on a busy machine, where without reading ahead the
    loop would wait 120 batches of 2 ms, 240 ms (which is the mutant below).
    """

    def make(epoch, start):
        for number in range(start, 40):
            time.sleep(0.002)
            yield np.full((2, 2), number, np.float32)

    slow = data.from_iterator(make, steps=40, spec=jax.ShapeDtypeStruct((2, 2), np.float32))

    def waited(feed):
        for epoch in range(3):
            for chunk in feed.chunks(KEY, epoch, 0):
                time.sleep(0.006 * chunk.steps)
        return feed.waited

    with Streaming(slow, steps_per_call=8, epochs=3) as feed:
        ahead = waited(feed)

    class InTurn:
        waited = 0.0

        def chunks(self, key, epoch, start):
            batches = slow.batches(key, epoch, start)
            for _ in range(5):
                began = time.perf_counter()
                held = [next(batches) for _ in range(8)]
                self.waited += time.perf_counter() - began
                yield streaming.Chunk(held, None, 0, 8, 2, 8)

    in_turn = waited(InTurn())
    assert in_turn >= 0.24
    assert ahead < in_turn / 4


def test_evaluation_over_a_source_is_evaluation_over_the_arrays():
    ts = TRAINER.init(KEY, X[:1])
    found = train.evaluate(TRAINER, ts, source(40, shuffle=False))  # 40, 40 and 23
    assert found == train.evaluate(TRAINER, ts, (X, Y), batch_size=40)
    whole = TRAINER.evaluate(ts, (jnp.asarray(X), jnp.asarray(Y)))
    assert found["accuracy"] == pytest.approx(float(whole["accuracy"]), abs=1e-6)


ON_A_MESH = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nnkit import data, layers, losses, optim, train
from nnkit.train.epochs import dispatch
assert len(jax.devices()) == 4
rng = np.random.default_rng(0)
x, y = rng.normal(size=(38, 4)).astype("f"), rng.integers(0, 3, 38).astype("i")
mesh = jax.make_mesh((4,), ("batch",))
by_batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
trainer = train.trainer(layers.dense(3), losses.softmax_cross_entropy, optim.sgd(0.1))
def trained(sharding, where):
    ts = jax.device_put(trainer.init(jax.random.key(0), x[:1]), where)
    source = data.stream((x, y), 8, drop_last=True)
    with train.Streaming(source, steps_per_call=3, epochs=2, sharding=sharding) as feed:
        for epoch in range(2):
            for chunk in feed.chunks(ts.key, epoch, 0):
                if sharding is not None:
                    assert chunk.arrays[0].sharding == sharding and chunk.capacity == 1
                ts, metrics, _ = dispatch(trainer, ts, chunk)
                jax.block_until_ready(metrics)
    return ts
sharded, alone = trained(by_batch, everywhere), trained(None, jax.devices()[0])
assert int(sharded.step) == int(alone.step) == 8
for a, b in zip(jax.tree.leaves(sharded.params), jax.tree.leaves(alone.params)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # sums over 2 + 2 + 2 + 2 rows and over 8
for size, words in ((6, "a batch has 6"), (8, "the last batch of each epoch has 6")):
    try:
        train.Streaming(data.stream((x, y), size), steps_per_call=3, sharding=by_batch)
    except ValueError as error:
        assert words in str(error) and "cannot be divided among 4 devices" in str(error), error
    else:
        raise AssertionError("no error")
print("done")
"""


def test_a_batch_is_divided_among_the_devices_of_a_mesh():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], capture_output=True, text=True, env=env)
    assert done.stdout == "done\n", done.stderr


IN_TWO_PROCESSES = """
import sys, jax, numpy as np
port, i = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, i, initialization_timeout=60)
from jax.sharding import NamedSharding, PartitionSpec as P
from nnkit import data, layers, losses, optim, train
from nnkit.train.epochs import dispatch
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 4)).astype("f"), rng.integers(0, 3, 32).astype("i")
mesh = jax.make_mesh((2,), ("batch",))
by_batch, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
def rows(epoch, n):
    return np.asarray(data.shuffled_indices(jax.random.key(5), epoch, 32))[8 * n : 8 * n + 8]
def make(epoch, start):  # each process has four rows of every batch of eight
    for n in range(start, 4):
        mine = rows(epoch, n)[4 * i : 4 * i + 4]
        yield x[mine], y[mine]
trainer = train.trainer(layers.dense(3), losses.softmax_cross_entropy, optim.sgd(0.1))
init = lambda: trainer.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 4), np.float32))
ts = jax.jit(init, out_shardings=everywhere)()
source = data.from_iterator(make, steps=4)
with train.Streaming(source, steps_per_call=10, epochs=2, sharding=by_batch) as feed:
    for epoch in range(2):
        for chunk in feed.chunks(jax.random.key(0), epoch, 0):
            assert chunk.batch_size == 8 and chunk.arrays[0].shape == (8, 4)
            ts, metrics, _ = dispatch(trainer, ts, chunk)
            jax.block_until_ready(metrics)
alone, step = init(), jax.jit(trainer.step)
for epoch in range(2):
    for n in range(4):
        alone, _ = step(alone, (x[rows(epoch, n)], y[rows(epoch, n)]))
for a, b in zip(jax.tree.leaves(ts.params), jax.tree.leaves(alone.params)):
    np.testing.assert_allclose(a.addressable_data(0), b, rtol=1e-5, atol=1e-6)
print("done")
"""


@pytest.mark.slow
def test_two_processes_each_give_their_part_of_a_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", IN_TWO_PROCESSES, port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert said.endswith("done\n"), said


def test_nan_in_arrays_that_are_read_a_chunk_at_once_is_said_with_its_batch():
    x = np.ones((64, 2), np.float32)
    x[37, 1] = np.nan
    source = data.stream((x, np.zeros(64, np.int32)), 4, shuffle=False)
    with (
        train.Streaming(source, steps_per_call=100) as feed,
        pytest.raises(ValueError, match=r"batch 9 of epoch 0 .*NaN or Inf in 1 of 8 places"),
    ):
        for _ in feed.chunks(jax.random.key(0), 0, 0):
            pass
