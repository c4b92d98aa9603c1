"""The benchmark runs, and what it compares is one and the same training in every library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tyro

from benchmarks import epoch
from benchmarks.peers import DEFAULT, KNOWN, find
from benchmarks.task import VARIANTS, Arrays, Implementation, Task, mnist, random_data
from benchmarks.timing import Times, compare, interleaved
from nnkit import data

# Five libraries compile the same networks: minutes on two cores.
pytestmark = pytest.mark.slow


def names(*extra: str) -> list:
    """All peers as parameters; the forms that are not compared by default are slow."""
    found = []
    for name in [*extra, *(name for name in KNOWN if name != "nnkit")]:
        marks = [] if name in DEFAULT else [pytest.mark.slow]
        if name == "torch.compile":  # imports modules of PyTorch's that PyTorch itself deprecates
            marks.append(pytest.mark.filterwarnings("ignore:.*torch:DeprecationWarning"))
        found.append(pytest.param(name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def _promotion_as_the_peers_need_it() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


def implementation(name: str) -> type[Implementation]:
    if name.startswith("equinox"):
        pytest.importorskip("equinox")
    return find(name)


STEPS = 6


def task(dtype: type = np.float32, **changes) -> Task:
    """784-256-128-10 on a few batches and some examples too few for one more."""
    x, y = random_data(64 * STEPS + 9)
    return Task(x.astype(dtype), y, **changes)


def orders(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.permutation(n) for _ in range(3)]


class Run(NamedTuple):
    first: Arrays
    losses: list[float]
    last: Arrays


def trained(kind: type[Implementation], on: Task, in_order: list[np.ndarray]) -> Run:
    run = kind(on)
    first = run.parameters()
    return Run(first, [run.epoch(order) for order in in_order], run.parameters())


def assert_same(found: Run, wanted: Run) -> None:
    """The same parameters at first; the mean losses of three epochs and the last parameters agree."""
    shapes = {path: (a.shape, a.dtype) for path, a in wanted.first.items()}
    assert {path: (a.shape, a.dtype) for path, a in found.first.items()} == shapes
    for path, value in wanted.first.items():
        np.testing.assert_array_equal(found.first[path], value, err_msg=path)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-12)
    for path, value in wanted.last.items():
        # A bias before batch norm has a gradient of 0 up to rounding, which Adam scales up; the
        # others agree to 2e-14.
        np.testing.assert_allclose(found.last[path], value, atol=1e-10, err_msg=path)


# Not in float32. There a unit within 1e-6 of the kink of its ReLU falls on either side (seen once in
# some ten steps, where PyTorch and XLA were compared with a float64 run), Adam moves its weights by
# its whole rate, and losses are 1e-3 apart after twenty steps of the same training.
WITHOUT_DROPOUT = {"mlp": {}, "batch norm": {"batch_norm": True}, "cnn": VARIANTS["cnn"]}


@pytest.fixture(scope="module")
def ours() -> dict[str, Run]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        on = {name: task(np.float64, **changes) for name, changes in WITHOUT_DROPOUT.items()}
        return {name: trained(find("nnkit"), t, orders(len(t.x))) for name, t in on.items()}


# nnx keeps its running statistics in float32.
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("variant", WITHOUT_DROPOUT)
@pytest.mark.parametrize("name", names())
def test_every_peer_trains_the_network_that_nnkit_trains(name, variant, ours):
    with jax.enable_x64(True):
        on = task(np.float64, **WITHOUT_DROPOUT[variant])
        found = trained(implementation(name), on, orders(len(on.x)))
    assert_same(found, ours[variant])
    # The statement's own numbers of parameters: 784-256-128-10; a scale and a bias a hidden unit; the
    # convolutions' 320 and 18,496, and (7·7·64)-128-10.
    counts = {"mlp": 235_146, "batch norm": 235_914, "cnn": 421_642}
    assert sum(a.size for a in found.first.values()) == counts[variant]


MUTANTS = {
    "learning rate": {"learning_rate": 1.001e-3},
    "first parameters": {"seed": 1},
    "batch norm": {"batch_norm": True},
    "dropout": {"rate": 0.01},
    "batch size": {"batch_size": 32},
    "width": {"hidden": (256, 127)},
    "float32": {"dtype": np.float32},
}


@pytest.mark.parametrize("changes", MUTANTS.values(), ids=MUTANTS)
def test_a_network_that_differs_in_anything_is_found(changes, ours):
    with jax.enable_x64(True):
        on = task(**{"dtype": np.float64, **changes})
        found = trained(find("linen"), on, orders(len(on.x)))
    with pytest.raises(AssertionError):
        assert_same(found, ours["mlp"])


def test_another_order_of_the_examples_is_found(ours):
    with jax.enable_x64(True):
        on = task(np.float64)
        first, second, third = orders(len(on.x))
        found = trained(find("linen"), on, [first, third, second])
    with pytest.raises(AssertionError):
        assert_same(found, ours["mlp"])


@pytest.mark.slow
@pytest.mark.parametrize("name", names("nnkit"))
def test_each_shuffles_for_itself_and_takes_every_example_once(name):
    kind = implementation(name)
    # With a rate of 0 nothing is learned: the mean loss is that of the examples that were taken.
    whole = Task(*random_data(64 * STEPS), learning_rate=0.0)
    run = kind(whole)
    in_order = run.epoch(np.arange(len(whole.x)))
    np.testing.assert_allclose([run.epoch(), run.epoch()], in_order, rtol=1e-6)
    # 9 examples are left out each time, and not the same ones.
    run = kind(task(learning_rate=0.0))
    assert len({round(run.epoch(), 6) for _ in range(3)}) == 3


@pytest.fixture(scope="module")
def by_rate() -> dict[float, float]:
    """The mean loss of a network that does not learn, by the rate of its dropout; Flax's."""
    with jax.numpy_dtype_promotion("standard"):
        return {rate: without_learning(find("linen"), rate) for rate in (0.0, 0.4, 0.5, 0.6)}


def without_learning(kind: type[Implementation], rate: float) -> float:
    x, y = random_data(64 * 60)
    return kind(Task(x, y, batch_norm=True, rate=rate, learning_rate=0.0)).epoch(np.arange(len(x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("nnkit"))
def test_every_library_drops_half(name, by_rate):
    found = without_learning(implementation(name), 0.5)
    nearest = min(by_rate, key=lambda rate: abs(by_rate[rate] - found))
    assert nearest == 0.5, (found, by_rate)


@pytest.mark.parametrize("name", names("nnkit"))
def test_every_implementation_learns_with_batch_norm_and_dropout(name):
    x, y = random_data(64 * 20)
    run = implementation(name)(Task(x, y, **VARIANTS["mlp_bn_dropout"]))
    losses = [run.epoch() for _ in range(3)]
    assert losses[2] < 0.8 * losses[0]


def test_the_program_prints_a_table_and_writes_all_numbers(tmp_path, capsys):
    file = tmp_path / "epoch.json"
    config = epoch.Config(implementations=("nnkit", "linen", "pytorch.1"), rounds=2, examples=200, json=file)
    found = epoch.main(config)
    said = capsys.readouterr().out
    for word in ("random data, 200 x 784", "mlp:", "gain", "pytorch.1", "torch 2", "cores"):
        assert word in said
    assert json.loads(file.read_text()) == found
    assert len(found["variants"]["mlp"]["times"]["pytorch.1"]["rounds"]) == 2


def test_the_program_reads_mnist_from_idx_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = rng.integers(256, size=(130, 28, 28), dtype=np.uint8)
        data.write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        data.write_idx(tmp_path / f"{part}-labels-idx1-ubyte", rng.integers(10, size=130).astype(np.uint8))
    x, y = mnist(tmp_path)
    assert (x.shape, x.dtype, y.dtype) == ((130, 784), np.float32, np.int32)
    assert x.min() == 0
    assert x.max() == 1
    epoch.main(epoch.Config(("mlp",), ("nnkit",), rounds=1, data_dir=tmp_path))
    assert "MNIST, 130 x 784 float32" in capsys.readouterr().out


def test_names_that_are_not_known_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown implementation 'line'; did you mean 'linen'"):
        epoch.main(epoch.Config(implementations=("line",)))
    with pytest.raises(ValueError, match="unknown variant 'mpl'; did you mean 'mlp'"):
        epoch.main(epoch.Config(variants=("mpl",)))


def test_an_epoch_that_diverges_is_no_time():
    with pytest.raises(ValueError, match="linen diverged"):
        epoch.run(task(learning_rate=float("inf")), {"linen": find("linen")}, 1)


def test_the_command_line_knows_the_settings():
    config = tyro.cli(epoch.Config, args=["--rounds", "3", "--implementations", "nnkit", "linen"])
    assert config == dataclasses.replace(epoch.Config(), rounds=3, implementations=("nnkit", "linen"))
    assert set(DEFAULT) <= set(KNOWN)


def test_turns_rotate_and_are_timed_one_by_one():
    now, said = [0.0], []

    def work(name: str, seconds: float):
        def do():
            said.append(name)
            now[0] += seconds

        return do

    times = interleaved({"a": work("a", 1), "b": work("b", 2), "c": work("c", 4)}, 3, clock=lambda: now[0])
    assert "".join(said) == "abc" + "abc" + "bca" + "cab"
    assert times == {"a": Times(1, [1] * 3), "b": Times(2, [2] * 3), "c": Times(4, [4] * 3)}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleaved({}, 0)


def test_the_gain_is_over_the_best_peer():
    times = {"nnkit": Times(9, [2, 4, 2]), "slow": Times(9, [9, 9, 9]), "fast": Times(9, [3, 9, 4])}
    ours, _, fast = compare(times)
    assert (ours.gain, ours.paired) == (2.0, 2.0)
    assert (ours.median, ours.fastest, ours.slowest, ours.compile) == (2, 2, 4, 7)
    assert (fast.gain, fast.paired) == (1.0, 1.0)
