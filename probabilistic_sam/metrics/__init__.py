"""Metrics of a set of sampled masks against a set of readers' masks.

`functional` and `volumes` have the formulas, `per_slice` and `per_nodule` all metrics of one slice and of one nodule,
`bootstrap` means over slices with intervals over patients, `collapse` the state of a latent space. `ged.py` and
`hm_iou.py` are modules for the `evaluate` library: `evaluate.load(path)`.
"""

from .bootstrap import breakdown, calibration_sums, paired_difference, patient_sums, summarize, summarize_seeds
from .collapse import active_outline_units, slice_collapse, summarize_collapse
from .per_nodule import NODULE_METRICS, nodule_metrics, summarize_nodules
from .per_slice import COLUMNS, METRICS, OF_ALL_MASKS, slice_metrics

__all__ = [
    "COLUMNS",
    "METRICS",
    "NODULE_METRICS",
    "OF_ALL_MASKS",
    "active_outline_units",
    "breakdown",
    "calibration_sums",
    "paired_difference",
    "nodule_metrics",
    "patient_sums",
    "slice_collapse",
    "slice_metrics",
    "summarize",
    "summarize_collapse",
    "summarize_nodules",
    "summarize_seeds",
]
