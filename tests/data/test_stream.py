"""Sources of batches: the order that training on the arrays has, from any batch on, and every error in words."""

from __future__ import annotations

import re
import sys

import jax
import numpy as np
import pytest

from nnkit import data
from nnkit.data import batch_source
from nnkit.data.batch_source import check_source, checked_batches

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 3)).astype(np.float32)
Y = RNG.integers(0, 5, 23).astype(np.int32)
KEY = jax.random.key(7)


def same(found, wanted):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def resident(epoch, size=4, key=KEY, drop_last=False):
    order = data.shuffled_indices(key, epoch, len(X))
    return list(data.batches((X, Y), size, order=order, drop_last=drop_last))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The arrays as .npy files and as raw bytes."""
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "x.npy", X)
    np.save(folder / "big_endian.npy", X.astype(">f4"))
    X.tofile(folder / "x.raw")
    return folder


FORMS = {
    "npy": lambda f: (np.load(f / "x.npy", mmap_mode="r"), Y),
    "memmap": lambda f: (np.memmap(f / "x.raw", np.float32, "r", shape=X.shape), Y),
    "big endian": lambda f: (np.load(f / "big_endian.npy", mmap_mode="r"), Y),
    "list": lambda f: [X, Y],
    "data set": lambda f: data.Dataset(np.load(f / "x.npy", mmap_mode="r"), Y),
    "jax": lambda f: (jax.numpy.asarray(X), Y),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_order_is_that_of_training_on_the_arrays(form, files):
    source = data.stream(FORMS[form](files), 4)
    assert (source.steps, source.examples, isinstance(source, data.Source)) == (6, 23, True)
    assert [leaf.shape for leaf in source.spec] == [(4, 3), (4,)]
    for epoch in (0, 3):
        same(checked_batches(source, KEY, epoch), resident(epoch))


MUTANTS = {
    "another key": lambda source: source.batches(jax.random.key(8), 1),
    "another epoch": lambda source: source.batches(KEY, 2),
    "starts one late": lambda source: source.batches(KEY, 1, 1),
    "not shuffled": lambda source: data.stream((X, Y), 4, shuffle=False).batches(KEY, 1),
    "another size": lambda source: data.stream((X, Y), 5).batches(KEY, 1),
    "rows sorted": lambda source: (
        jax.tree.map(lambda a: np.sort(a, axis=0), b) for b in source.batches(KEY, 1)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_another_order_is_found(mutant):
    with pytest.raises(AssertionError):
        same(MUTANTS[mutant](data.stream((X, Y), 4)), resident(1))


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("read_ahead", [1, 2, 4, 50])
def test_an_epoch_is_taken_up_at_any_batch(start, read_ahead):
    """Read in sorted blocks too, whose bounds then fall elsewhere."""
    source = data.stream((X, Y), 4, read_ahead=read_ahead)
    same(source.batches(KEY, 2, start), resident(2)[start:])


def test_blocks_are_read_in_the_order_of_the_disk_where_the_arrays_fill_the_memory(monkeypatch):
    seen, module = [], sys.modules["nnkit.data.stream"]  # the package's attribute is the function
    take = np.take

    def watched(a, indices, **options):
        if a is X or a is Y:
            seen.append(np.asarray(indices).tolist())
        return take(a, indices, **options)

    monkeypatch.setattr(np, "take", watched)
    whole = X.nbytes + Y.nbytes
    for memory, blocks in ((2 * whole, 6), (2 * whole - 1, 1)):
        monkeypatch.setattr(module, "_memory", lambda memory=memory: memory)
        source = data.stream((X, Y), 4)
        seen.clear()
        same(source.batches(KEY, 0), resident(0))
        assert len(seen) == 2 * blocks  # of x and of y
        assert all(rows == sorted(rows) for rows in seen) == (blocks == 1)


def test_a_last_batch_can_be_left_out_and_shuffling_too():
    source = data.stream((X, Y), 4, drop_last=True)
    assert (source.steps, source.examples) == (5, 20)
    same(checked_batches(source, KEY, 1), resident(1, drop_last=True))
    same(data.stream((X, Y), 4, shuffle=False).batches(KEY, 1), data.batches((X, Y), 4))


def test_a_map_is_applied_to_each_batch_and_says_what_it_makes():
    raw = RNG.integers(0, 256, (23, 2, 2, 1), dtype=np.uint8)
    source = data.stream((raw, Y), 4, map=lambda b: {"image": b[0] / np.float32(255), "label": b[1]})
    assert source.spec["image"] == jax.ShapeDtypeStruct((4, 2, 2, 1), np.float32)
    order = np.asarray(data.shuffled_indices(KEY, 0, 23))
    wanted = (
        {"image": raw[order[i : i + 4]] / np.float32(255), "label": Y[order[i : i + 4]]}
        for i in range(0, 23, 4)
    )
    same(checked_batches(source, KEY, 0), wanted)


def test_batches_are_copies_that_a_loop_may_keep_and_change(files):
    source = data.stream(FORMS["npy"](files), 4, shuffle=False)
    kept = list(source.batches(KEY, 0))
    for x, _ in kept:
        x += 1
    np.testing.assert_array_equal(np.concatenate([x for x, _ in kept]), X + 1)
    same(source.batches(KEY, 0), data.batches((X, Y), 4))


class Records:
    """As TFDS's random-access data sources are: dicts by number, and many at once."""

    def __init__(self, several=True):
        self.asked = []
        if several:
            self.__getitems__ = lambda numbers: self.asked.append(numbers) or [self[i] for i in numbers]

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        assert isinstance(i, int)
        return {"image": X[i], "label": int(Y[i]), "name": f"example {i}"}


@pytest.mark.parametrize("several", [True, False])
def test_records_are_stacked_in_the_same_order(several):
    records = Records(several)
    cast = lambda b: (b[0], b[1].astype(np.int32))
    source = data.from_records(records, 4, fields=("image", "label"), map=cast)
    same(checked_batches(source, KEY, 1, 2), resident(1)[2:])
    assert bool(records.asked) == several
    pairs = data.from_records(list(zip(X, Y, strict=True)), 4)
    same(checked_batches(pairs, KEY, 1), resident(1))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):  # of a TensorFlow data set, prepared here
    import tensorflow_datasets as tfds
    from PIL import Image

    folder = tmp_path_factory.mktemp("png")

    class NnkitStreamed(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(2, 2, 1)),
                "label": tfds.features.ClassLabel(num_classes=5),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(23):
                path = folder / f"{i}.png"  # TFDS encodes arrays with TensorFlow alone
                Image.fromarray(np.full((2, 2), i, np.uint8)).save(path)
                yield i, {"image": path, "label": i % 5}

    builder = NnkitStreamed(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder


def test_a_prepared_set_is_streamed_without_conversion(builder):
    records = builder.as_data_source("train")
    numbers = [int(record["image"][0, 0, 0]) for record in records]
    source = data.from_records(records, 4, fields=("image", "label"))
    assert source.spec[0] == jax.ShapeDtypeStruct((4, 2, 2, 1), np.uint8)
    order = np.asarray(data.shuffled_indices(KEY, 0, 23))
    found = list(checked_batches(source, KEY, 0, 1))
    np.testing.assert_array_equal(
        np.concatenate([image[:, 0, 0, 0] for image, _ in found]), np.asarray(numbers)[order[4:]]
    )
    for image, label in found:
        np.testing.assert_array_equal(image[:, 0, 0, 0] % 5, label)


def counting(steps=4, size=2):
    """``make(epoch)`` of batches that tell where they are from, and the list of what was read."""
    read = []

    def make(epoch):
        for number in range(steps):
            read.append((epoch, number))
            yield np.full((size, 3), 10 * epoch + number, np.float32)

    return make, read


def values(batches):
    return [batch[0, 0].item() for batch in batches]


def test_an_iterator_is_made_for_each_epoch_and_skipped_to_its_place():
    make, read = counting()
    source = data.from_iterator(make, steps=4)
    assert (source.steps, source.examples, source.spec.shape) == (4, 8, (2, 3))
    read.clear()
    assert values(checked_batches(source, KEY, 3, 2)) == [32, 33]
    assert read == [(3, 0), (3, 1), (3, 2), (3, 3)]


def test_an_iterator_that_can_seek_is_not_skipped():
    asked = []

    def make(start, key, epoch):
        asked.append((start, epoch, jax.random.key_data(key).tolist()))
        return (np.full((2, 3), 10 * epoch + number, np.float32) for number in range(start, 4))

    source = data.from_iterator(make, steps=4)
    assert values(checked_batches(source, KEY, 3, 2)) == [32, 33]
    assert asked[1:] == [(2, 3, [0, 7])]


def test_what_an_iterator_has_too_much_is_left_and_it_is_closed():
    closed = []

    def make(epoch):
        try:
            for number in range(100):
                yield [np.full((2, 3), number, np.float32)]  # a list is taken for a tuple
        finally:
            closed.append(epoch)

    source = data.from_iterator(make, steps=3)
    assert [batch[0][0, 0] for batch in checked_batches(source, KEY, 5)] == [0, 1, 2]
    assert closed[-1] == 5


def test_an_iterator_may_have_a_smaller_last_batch_if_it_says_so():
    make = lambda epoch: iter([np.zeros((4, 1), np.float32), np.zeros((3, 1), np.float32)])
    source = data.from_iterator(make, steps=2, examples=7)
    assert [len(batch) for batch in checked_batches(source, KEY, 0)] == [4, 3]
    with pytest.raises(
        ValueError, match=re.escape("batch 1 of epoch 0 (both from 0): shape (3, 1) where (4, 1)")
    ):
        list(checked_batches(data.from_iterator(make, steps=2), KEY, 0))


def spoiled(batch, at=1):
    """A source of three good batches whose number ``at`` is another."""
    good = np.ones((4, 2), np.float32)
    spec = jax.ShapeDtypeStruct((4, 2), np.float32)
    return data.from_iterator(
        lambda epoch: iter([batch if i == at else good for i in range(3)]), steps=3, spec=spec
    )


NAN = np.ones((4, 2), np.float32)
NAN[2, 1] = np.nan
INF = np.ones((4, 2), np.float32)
INF[0, 0] = -np.inf
BATCHES = {
    "shape": (
        np.ones((4, 3), np.float32),
        "batch 1 of epoch 6 (both from 0): shape (4, 3) where (4, 2) was expected",
    ),
    "fewer": (
        np.ones((3, 2), np.float32),
        "batch 1 of epoch 6 (both from 0): shape (3, 2) where (4, 2) was expected",
    ),
    "dtype": (
        np.ones((4, 2)),
        "dtype float64 where float32 was expected; convert it with .astype(np.float32)",
    ),
    "nan": (
        NAN,
        "batch 1 of epoch 6 (both from 0): NaN or Inf in 1 of 8 places, the first nan at index (2, 1)",
    ),
    "inf": (INF, "the first -inf at index (0, 0): drop or fill those examples"),
    "tuple": (
        (np.ones((4, 2), np.float32),),
        "batch 1 of epoch 6 (both from 0) is a PyTreeDef((*,)) and the source's",
    ),
}


@pytest.mark.parametrize("what", BATCHES)
def test_a_wrong_batch_is_an_error_with_its_place(what):
    batch, message = BATCHES[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        list(checked_batches(spoiled(batch), KEY, 6))
    # A run that is taken up behind it does not see it.
    assert len(list(checked_batches(spoiled(batch), KEY, 6, 2))) == 1


def test_large_numbers_are_no_infinities():
    """Their squares overflow in the sum that is looked at first."""
    source = spoiled(np.full((4, 2), 3e38, np.float32))
    assert len(list(checked_batches(source, KEY, 0))) == 3
    for dtype in (np.float16, jax.numpy.bfloat16, np.complex64):
        bad = np.ones((4, 2), dtype)
        bad[3, 0] = np.nan
        source = data.from_iterator(
            lambda epoch, bad=bad: [bad], steps=1, spec=jax.ShapeDtypeStruct((4, 2), dtype)
        )
        with pytest.raises(ValueError, match=re.escape("NaN or Inf in 1 of 8 places")):
            list(checked_batches(source, KEY, 0))


def test_integers_that_32_bits_cannot_hold():
    source = data.stream((X, Y.astype(np.int64) + 2**31), 4)
    with pytest.raises(
        ValueError, match=r"batch 0 of epoch 0 .*, 1: int64 with values from \d+ to \d+, which int32"
    ):
        list(checked_batches(source, KEY, 0))


def test_a_source_that_ends_early():
    make, _ = counting(steps=3)
    source = data.from_iterator(make, steps=5)
    with pytest.raises(
        ValueError, match=re.escape("ended early, before batch 3 of epoch 2 (both from 0): an epoch")
    ):
        list(checked_batches(source, KEY, 2))
    with pytest.raises(
        ValueError, match=re.escape("before batch 4 of epoch 2 (both from 0), skipping to batch 4")
    ):
        list(checked_batches(source, KEY, 2, 4))
    once = iter([np.ones((2, 2), np.float32)] * 3)
    source = data.from_iterator(lambda epoch: once, steps=3, spec=jax.ShapeDtypeStruct((2, 2), np.float32))
    assert len(list(checked_batches(source, KEY, 0))) == 3
    with pytest.raises(
        ValueError, match=re.escape("before batch 0 of epoch 1 (both from 0): an epoch should have 3")
    ):
        list(checked_batches(source, KEY, 1))


def test_what_the_source_raises_says_where():
    def make(epoch):
        yield np.ones((2, 2), np.float32)
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="the disk is on fire") as caught:
        list(checked_batches(data.from_iterator(make, steps=2), KEY, 4))
    assert caught.value.__notes__ == ["in batch 1 of epoch 4 (both from 0) of the data source"]


ERRORS = {
    "splits": (
        lambda: data.stream(data.Splits(data.Dataset(X, Y)), 4),
        "stream got all the splits of a data set: pass one of them, splits.train for instance",
    ),
    "path": (lambda: data.stream("x.npy", 4), 'got a str: open a file with np.load(path, mmap_mode="r")'),
    "leaf": (lambda: data.stream((X, Y.tolist()), 4), "stream takes arrays and got a int at 1/0"),
    "strings": (
        lambda: data.stream((X, Y.astype(str)), 4),
        "stream takes arrays of numbers and got <U11 at 1",
    ),
    "lengths": (
        lambda: data.stream((X, Y[1:]), 4),
        "stream needs arrays with one common, non-empty leading axis, got lengths [22, 23]",
    ),
    "batch size": (lambda: data.stream((X, Y), 24), "batch_size is 24 and there are 23 examples"),
    "no batch size": (lambda: data.stream((X, Y), 4.0), "batch_size must be an integer, got 4.0"),
    "read ahead": (
        lambda: data.stream((X, Y), 4, read_ahead=0),
        "read_ahead must be a whole number of batches",
    ),
    "map": (
        lambda: data.stream((X, Y), 4, map=lambda b: b[0].sum(axis=0)),
        "map made a batch of 4 examples into arrays of shapes [(3,)]: it must keep the first axis",
    ),
    "no records": (
        lambda: data.from_records(iter([1]), 1),
        "from_records needs len(records) and records[i], which a list_iterator does not have",
    ),
    "field": (
        lambda: data.from_records(Records(), 4, fields=("image", "labels")),
        "record 0 has not all of the fields ('image', 'labels'): it has image, label, name",
    ),
    "fields of a tuple": (
        lambda: data.from_records(list(zip(X, Y, strict=True)), 4, fields=("image",)),
        "record 0 has not all of the fields ('image',): it is a tuple",
    ),
    "ragged": (
        lambda: data.from_records([np.zeros(i) for i in range(5)], 2),
        "the records 0 ... 1 cannot be stacked to a batch",
    ),
    "an iterator": (
        lambda: data.from_iterator(iter([X]), steps=1),
        "takes a function that makes an iterator and got a list_iterator, which can be read once: pass lambda epoch",
    ),
    "arguments": (
        lambda: data.from_iterator(lambda e: [X], steps=1),
        "named key, epoch and start, as many of them as it has, and it needs e: write def make(key, epoch)",
    ),
    "empty": (
        lambda: data.from_iterator(lambda epoch: [], steps=1),
        "the iterator of epoch 0 is empty: there must be at least one batch",
    ),
    "examples": (
        lambda: data.from_iterator(lambda epoch: [X], steps=2, examples=99),
        "the source says that an epoch has 2 batches of 23 and 99 examples, which make 5: give it the numbers of one",
    ),
    "no batches": (
        lambda: data.from_iterator(lambda epoch: [X], steps=0),
        "an epoch has 0 batches of 23 and 0 examples, which make 0",
    ),
    "axes": (
        lambda: data.from_iterator(lambda epoch: [(X, Y[1:])], steps=1),
        "a batch of the source must be arrays with one common leading axis, its spec has [22, 23]",
    ),
    "scalar": (
        lambda: data.from_iterator(lambda epoch: [np.float32(3)], steps=1),
        "leading axis, its spec has [0]",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_every_wrong_argument_is_an_error_in_words(what):
    call, message = ERRORS[what]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


def test_the_quick_look_for_nan_finds_all_that_the_slow_one_finds(monkeypatch):
    """A mutant that trusts its sum of squares blindly, and one that does not look, are found by the above."""
    assert batch_source.is_finite(X)
    for place in range(X.size):
        for value in (np.nan, np.inf, -np.inf):
            spoilt = X.copy()
            spoilt.flat[place] = value
            assert not batch_source.is_finite(spoilt)
            assert not batch_source.is_finite(np.asfortranarray(spoilt))
    with pytest.raises(ValueError, match="which make 2"):
        check_source(
            type("Wrong", (), {"steps": 3, "examples": 8, "spec": jax.ShapeDtypeStruct((4,), np.float32)})
        )


@pytest.fixture(scope="module")
def grain():
    return pytest.importorskip("grain")


def grain_loader(grain):
    sampler = grain.samplers.IndexSampler(
        20, num_epochs=None, shard_options=grain.sharding.NoSharding(), shuffle=True, seed=3
    )
    operations = [grain.transforms.Batch(4)]
    return grain.DataLoader(data_source=np.arange(20), sampler=sampler, operations=operations, worker_count=0)


def grain_stream(grain):
    return grain.MapDataset.source(np.arange(20)).seed(1).shuffle().repeat().batch(4).to_iter_dataset()


def test_a_grain_map_dataset_is_read_from_any_position_on(grain):
    dataset = grain.MapDataset.source(np.arange(22)).seed(1).shuffle().batch(4)
    source = data.from_grain(dataset)
    assert (source.steps, source.examples) == (6, 22)
    epochs = [[dataset[6 * epoch + i] for i in range(6)] for epoch in range(3)]
    assert sorted(np.concatenate(epochs[1]).tolist()) == list(range(22))
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
    for epoch, start in [(0, 0), (2, 3), (1, 5), (1, 6)]:
        same(checked_batches(source, KEY, epoch, start), epochs[epoch][start:])


KINDS = {"loader": grain_loader, "stream": grain_stream}


@pytest.mark.parametrize("kind", KINDS)
def test_a_grain_stream_goes_on_and_back_to_any_position(grain, kind):
    endless = iter(KINDS[kind](grain))
    whole = [next(endless) for _ in range(40)]
    source = data.from_grain(KINDS[kind](grain), steps=4)
    # On, into the middle, back within an epoch, far on, back over epochs that are forgotten, to the start.
    for epoch, start in [(0, 0), (1, 0), (2, 2), (2, 1), (9, 3), (3, 2), (0, 1)]:
        same(checked_batches(source, KEY, epoch, start), whole[4 * epoch + start : 4 * epoch + 4])
    for epoch in range(1, 8):
        batches = source.batches(KEY, epoch)
        same([next(batches), next(batches)], whole[4 * epoch : 4 * epoch + 2])  # and leave early
    assert len(source._states) <= 6


def test_a_wrong_grain_loader_is_an_error_in_words(grain):
    with pytest.raises(
        TypeError, match=r"takes a grain\.MapDataset, IterDataset or DataLoader and got a list"
    ):
        data.from_grain([1])
    with pytest.raises(
        TypeError, match=re.escape("a grain.DataLoader has no length: pass from_grain(..., steps")
    ):
        data.from_grain(grain_loader(grain))
    dataset = grain.MapDataset.source(np.arange(8)).batch(4)
    with pytest.raises(ValueError, match="has 2 batches an epoch and steps= says 3: leave steps out"):
        data.from_grain(dataset, steps=3)
    source = data.from_grain(dataset.to_iter_dataset(), steps=2)  # ends after an epoch
    assert len(list(checked_batches(source, KEY, 0))) == 2
    with pytest.raises(ValueError, match=re.escape("ended early, before batch 0 of epoch 1")):
        list(checked_batches(source, KEY, 1))
    with pytest.raises(ValueError, match="the Grain loader is empty"):
        data.from_grain(dataset.slice(slice(0, 0)).to_iter_dataset(), steps=1)


def test_grain_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=re.escape("from_grain needs Grain: pip install nnkit[grain]")):
        data.from_grain([1])
