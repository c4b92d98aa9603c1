"""The data set that is always there: scikit-learn's scanned digits."""

from __future__ import annotations

import numpy as np

from nnkit.data.dataset import Dataset, Splits

__all__ = ["load_digits"]


def load_digits() -> Splits:
    """1,797 handwritten digits of 8x8 pixels, 0..16, bundled with scikit-learn; no network.

    They are published without a split and are all in ``train``; cut them with ``split``. (The
    test set of the UCI "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak 1998.)

    Raises:
      ImportError: scikit-learn is not installed.

    >>> load_digits().train
    Dataset(digits: 1797 of (8, 8, 1) uint8, 10 classes)
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("digits come with scikit-learn: pip install nnkit[experiments]") from error
    images, labels = bundled(return_X_y=True)
    x = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    return Splits(Dataset(x, labels.astype(np.int32), "digits", tuple("0123456789")))
