"""Data: sources by name, splits, scaling, batches, and checks of what goes in.

splits = data.hold_out(data.load("mnist", data_dir="..."), 0.1)
splits = data.standardize(splits)
for x, y in data.batches(splits.train.arrays, 64, order=data.shuffled_indices(key, epoch, len(splits.train))):
    ...
"""

from nnkit.data.batch_source import Source
from nnkit.data.batching import batches, num_batches, shuffled_indices
from nnkit.data.checks import check_batch_size, check_data
from nnkit.data.dataset import Dataset, Normalization, Splits
from nnkit.data.idx import read_idx, write_idx
from nnkit.data.iterators import from_grain, from_iterator
from nnkit.data.normalize import channel_range, channel_statistics, rescale, standardize
from nnkit.data.sources import load
from nnkit.data.splits import hold_out, split
from nnkit.data.stream import from_records, stream

__all__ = [
    "Dataset",
    "Normalization",
    "Source",
    "Splits",
    "batches",
    "channel_range",
    "channel_statistics",
    "check_batch_size",
    "check_data",
    "from_grain",
    "from_iterator",
    "from_records",
    "hold_out",
    "load",
    "num_batches",
    "read_idx",
    "rescale",
    "shuffled_indices",
    "split",
    "standardize",
    "stream",
    "write_idx",
]
