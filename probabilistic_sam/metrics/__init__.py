"""Metrics of a set of sampled masks against a set of readers' masks.

`functional` has the formulas, `per_slice` all metrics of one slice, `bootstrap` means over slices with intervals over
patients, `collapse` the state of a latent space. `ged.py` and `hm_iou.py` are modules for the `evaluate` library:
`evaluate.load(path)`.
"""

from .bootstrap import breakdown, calibration_sums, paired_difference, patient_sums, summarize, summarize_seeds
from .collapse import active_outline_units, slice_collapse, summarize_collapse
from .per_slice import COLUMNS, METRICS, OF_ALL_MASKS, slice_metrics

__all__ = [
    "COLUMNS",
    "METRICS",
    "OF_ALL_MASKS",
    "active_outline_units",
    "breakdown",
    "calibration_sums",
    "paired_difference",
    "patient_sums",
    "slice_collapse",
    "slice_metrics",
    "summarize",
    "summarize_collapse",
    "summarize_seeds",
]
