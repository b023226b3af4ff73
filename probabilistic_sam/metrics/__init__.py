"""Metrics of a set of sampled masks against a set of readers' masks.

The formulas are in `probabilistic_sam.metrics.functional`, the tables over slices and patients in `summary`, the state
of a latent space in `collapse`. `ged.py` and `hm_iou.py` are modules for the `evaluate` library, to be opened with
`evaluate.load(path)`.
"""

from .bootstrap import breakdown, calibration_sums, paired_difference, patient_sums, summarize, summarize_seeds
from .collapse import active_outline_units, slice_collapse, summarize_collapse
from .slice_metrics import COLUMNS, METRICS, slice_metrics

__all__ = [
    "COLUMNS",
    "METRICS",
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
