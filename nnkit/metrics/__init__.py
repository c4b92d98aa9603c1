"""Metrics: what one reports, and does not differentiate.

Those that are means are given example by example, so that a mean over a data set with an uneven
last batch stays exact: add up the values, divide once (:func:`masked_mean`). Those that are not
means are split in two: sums over a batch that add up over batches (:func:`confusion_matrix`,
:func:`calibration_bins`), and the score of the total (:func:`f1`,
:func:`expected_calibration_error`). All run under jit and vmap.

Predictions are scores with the classes on the last axis, of which the largest, among equals the
first, is the predicted class; targets are integer labels or one-hot rows. A row of scores with NaN
predicts no class.
"""

from nnkit.metrics.calibration import CalibrationBins, calibration_bins, expected_calibration_error
from nnkit.metrics.confusion import confusion_matrix, f1, precision, recall
from nnkit.metrics.means import accuracy, masked_mean, perplexity, top_k_accuracy

__all__ = [
    "CalibrationBins",
    "accuracy",
    "calibration_bins",
    "confusion_matrix",
    "expected_calibration_error",
    "f1",
    "masked_mean",
    "perplexity",
    "precision",
    "recall",
    "top_k_accuracy",
]
