"""All metrics of one nodule as a volume, and their means over nodules with intervals over patients."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import volumes
from .bootstrap import summarize_sums

# Defined for each nodule, and averaged over nodules
NODULE_MEANS = (
    "ged_3d",
    "cross_distance",
    "sample_diversity",
    "reader_diversity",
    "volume_crps",
    "volume_error",
    "empty_rate_samples",
    "empty_rate_readers",
)
# Counted for each nodule; `coverage_90` is their ratio over all nodules
NODULE_COUNTS = ("readers_covered", "readers_annotated")
NODULE_METRICS = (*NODULE_MEANS, "coverage_90")


def nodule_metrics(samples: np.ndarray, readers: np.ndarray, voxel_mm3: float) -> dict[str, float]:
    """All metrics of one nodule.

    Args:
        samples: (N, slices, H, W) bool.
        readers: (M, slices, H, W) bool; those who annotated the nodule on no slice are empty volumes. At least one
            annotated it.
        voxel_mm3: volume of a voxel.

    Returns:
        A number for each name of `NODULE_MEANS` and `NODULE_COUNTS`, see `metrics.volumes`. The empty rates are the
        shares of samples and of readers without any voxel.

    Raises:
        ValueError: shapes that do not match, arrays that are not boolean, no sample, no reader who annotated, or a
            volume of a voxel that is not positive.
    """
    if not 0 < voxel_mm3 < np.inf:
        raise ValueError(f"voxel_mm3 must be a positive number, got {voxel_mm3}")
    distances = volumes.ged_3d(samples, readers)
    sampled, annotated = (array.sum(axis=(1, 2, 3)) * float(voxel_mm3) for array in (samples, readers))
    covered, annotating = volumes.coverage(sampled, annotated)
    return {
        "ged_3d": distances.ged,
        "cross_distance": distances.cross_distance,
        "sample_diversity": distances.sample_diversity,
        "reader_diversity": distances.reader_diversity,
        "volume_crps": volumes.volume_crps(sampled, annotated),
        "volume_error": volumes.volume_error(sampled, annotated),
        "empty_rate_samples": float((sampled == 0).mean()),
        "empty_rate_readers": float((annotated == 0).mean()),
        "readers_covered": covered,
        "readers_annotated": annotating,
    }


def summarize_nodules(
    runs: Sequence[Sequence[dict[str, float]]], patient_ids: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Means over nodules with 95 % intervals from a bootstrap over patients, as `bootstrap.summarize_seeds`.

    `coverage_90` is the number of readers covered over the number of readers who annotated, each summed over nodules,
    both in the estimate and in every resample.

    Args:
        runs: for each run (sampling seed), what `nodule_metrics` returned for each nodule, the nodules in one order.
        patient_ids: the patient of each nodule.
        seed: of the bootstrap.

    Returns:
        `{"count": nodules, "num_patients": patients, metric: {"mean": x, "ci95": [lo, hi]}}` with every name of
        `NODULE_METRICS`; with more than one run each metric also has `std`. Without a nodule the numbers are None.

    Raises:
        ValueError: the lists differ in length.
    """
    if any(len(run) != len(patient_ids) for run in runs):
        raise ValueError(f"got {[len(run) for run in runs]} nodules and {len(patient_ids)} patients; they must match")
    names = (*NODULE_MEANS, *NODULE_COUNTS)
    summands = [[[1.0, *(nodule[name] for name in names)] for nodule in run] for run in runs]
    return summarize_sums(summands, patient_ids, _statistics, NODULE_METRICS, seed)


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """All `NODULE_METRICS` from sums (..., 1 + means + counts), each of shape (...)."""
    count, means, covered, annotating = np.split(sums, np.cumsum([1, len(NODULE_MEANS), 1]), axis=-1)
    return dict(zip(NODULE_MEANS, np.moveaxis(means / count, -1, 0), strict=True)) | {
        "coverage_90": (covered / annotating)[..., 0]
    }
