"""Real images for the programs: 1,797 scanned digits of 8×8, as rows of floats."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    order = np.random.default_rng(0).permutation(
        len(x)
    )  # as published they are in the order of their writers
    x, y = x[order], y[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]
