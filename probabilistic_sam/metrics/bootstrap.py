"""Means over slices with confidence intervals over patients: the `results` of a results file.

The input is a list of what `slice_metrics` returned, which is small enough to be gathered from many processes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import functional
from .per_slice import COLUMNS, METRICS, RATIO_METRICS, SLICE_METRICS

# Of a group of slices: GED, its terms, and the shares of empty masks
GROUP_METRICS = (*functional.GeneralizedEnergyDistance._fields, "empty_rate_samples", "empty_rate_readers")
AREA_GROUPS = {"below 25": 25, "25 to 100": 100, "100 to 400": 400, "400 or more": np.inf}  # upper ends in pixels

NUM_RESAMPLES = 1000
DECIMALS = 6


def summarize(per_slice: Sequence[dict], patient_ids: Sequence[str], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Means over slices with 95 % intervals from a bootstrap over patients.

    Patients, not slices, are resampled with replacement (`NUM_RESAMPLES` times), since the slices of a patient are not
    independent. The calibration errors are computed from the summed bins of all slices, the correlation from the pairs
    of empty shares of all slices, both in the estimate and in every resample.

    Args:
        per_slice: what `slice_metrics` returned for each slice.
        patient_ids: the patient of each slice.
        seed: of the bootstrap.

    Returns:
        For each name of `COLUMNS` `{"count": slices, "num_patients": patients, metric: {"mean": x, "ci95": [lo, hi]}}`
        with every name of `METRICS`. A number that is not defined (no slice, a correlation without variance) is None.
        Those of `RATIO_METRICS` also have `count`: slices with a value of `ged_unbiased` or `rank_correlation`, or
        masks that are not empty; the mean over runs.

    Raises:
        ValueError: the two lists differ in length.
    """
    return summarize_seeds([per_slice], patient_ids, seed)


def summarize_seeds(
    runs: Sequence[Sequence[dict]], patient_ids: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`summarize` for several runs over the same slices, such as several sampling seeds.

    Each number is computed in every run and then averaged; all runs share the resampled patients. With more than one
    run each metric also has `std`, the standard deviation over runs (`runs - 1` in the denominator).

    Args:
        runs: for each run, what `slice_metrics` returned for each slice, the slices in the same order.
        patient_ids: the patient of each slice.
        seed: of the bootstrap.
    """
    if any(len(run) != len(patient_ids) for run in runs):
        raise ValueError(f"got {[len(run) for run in runs]} slices and {len(patient_ids)} patients; they must match")
    return {column: _summarize_column(column, runs, patient_ids, seed) for column in COLUMNS}


def patient_sums(
    runs: Sequence[Sequence[dict]], patient_ids: Sequence[str], metric: str = "ged"
) -> dict[str, dict[str, list[float]]]:
    """For each column and patient, the number of slices and the sum of a metric: the input of `paired_difference`.

    Args:
        runs: see `summarize_seeds`; the sum is averaged over runs.
        patient_ids: the patient of each slice.
        metric: one of `SLICE_METRICS`.
    """
    result: dict[str, dict[str, list[float]]] = {column: {} for column in COLUMNS}
    for number, patient in enumerate(patient_ids):
        for column, sums in result.items():
            if runs[0][number][column] is not None:
                value = float(np.mean([run[number][column][metric] for run in runs]))
                count, total = sums.get(patient, [0, 0.0])
                sums[patient] = [count + 1, round(total + value, DECIMALS)]
    return result


def calibration_sums(runs: Sequence[Sequence[dict]], column: str = "all") -> dict[str, list[list[float]]]:
    """The sums of two reliability diagrams over slices and runs, (3, bins) each: see `functional.bin_sums`.

    Returns:
        `pixels`: the mean probability of a pixel against the share of readers who annotated it, over the pixels of
        `functional.scored_region`. `emptiness`: the share of empty samples of a slice against that of empty masks.
    """
    scores = [slice_[column] for run in runs for slice_ in run if slice_[column] is not None]
    samples, readers = (
        np.array([item[name] for item in scores]) for name in ("empty_rate_samples", "empty_rate_readers")
    )
    pixels = np.sum([item["calibration"] for item in scores], axis=0)
    return {"pixels": pixels.round(3).tolist(), "emptiness": functional.bin_sums(samples, readers).round(3).tolist()}


def breakdown(runs: Sequence[Sequence[dict]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Error by number of readers who annotated (`readers_annotated`) and by lesion size (`reader_area`).

    Args:
        runs: see `summarize_seeds`.

    Returns:
        For both ways of grouping, for each group and for the columns `all` and `shape`: the `count` of slices, the
        mean of each of `GROUP_METRICS` over slices and runs, and `ged_share`, the group's share of the summed GED of
        the column. A number that is not defined is None. Areas are grouped by `AREA_GROUPS`.
    """
    slices = [slice_ for run in runs for slice_ in run if slice_["all"] is not None]
    names: dict[str, Callable[[float], str]] = {
        "readers_annotated": str,
        "reader_area": lambda area: next(name for name, end in AREA_GROUPS.items() if area < end),
    }
    ged = {column: sum(s[column]["ged"] for s in slices if s[column] is not None) for column in ("all", "shape")}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for way, name in names.items():
        groups: dict[str, list[dict]] = {}
        for slice_ in sorted(slices, key=lambda slice_: slice_["all"][way]):
            groups.setdefault(name(slice_["all"][way]), []).append(slice_)
        result[way] = {
            group: {column: _group_means(members, column, len(runs), total) for column, total in ged.items()}
            for group, members in groups.items()
        }
    return result


def _group_means(slices: Sequence[dict], column: str, num_runs: int, total_ged: float) -> dict[str, Any]:
    scores = [slice_[column] for slice_ in slices if slice_[column] is not None]
    means = {name: np.mean([item[name] for item in scores]) if scores else np.nan for name in GROUP_METRICS}
    share = sum(item["ged"] for item in scores) / total_ged if scores and total_ged else np.nan
    return {"count": len(scores) // num_runs} | {k: _number(v) for k, v in (means | {"ged_share": share}).items()}


def paired_difference(
    first: dict[str, list[float]], second: dict[str, list[float]], seed: int = 0
) -> tuple[float, float, float]:
    """Difference between two models' means over slices, with the 95 % interval of a bootstrap over patients.

    The difference is first minus second. Both models are scored on the same resampled patients, so the interval does
    not contain the variation between patients that affects both models equally.

    Args:
        first: one column of `patient_sums`.
        second: the same column for another model.
        seed: of the bootstrap.

    Returns:
        Difference, lower and upper end of the interval.

    Raises:
        ValueError: the two were not scored on the same slices.

    >>> paired_difference({"a": [2, 1.0], "b": [1, 0.5]}, {"a": [2, 0.8], "b": [1, 0.4]})
    (0.1, 0.1, 0.1)
    """
    if {key: value[0] for key, value in first.items()} != {key: value[0] for key, value in second.items()}:
        raise ValueError("the two models were not scored on the same slices")
    patients = sorted(first)
    counts = np.array([first[patient][0] for patient in patients], dtype=float)
    gaps = np.array([first[patient][1] - second[patient][1] for patient in patients])
    resampled = np.random.default_rng(seed).integers(len(patients), size=(NUM_RESAMPLES, len(patients)))
    replicates = gaps[resampled].sum(axis=1) / counts[resampled].sum(axis=1)
    low, high = np.quantile(replicates, [0.025, 0.975])
    return round(float(gaps.sum() / counts.sum()), DECIMALS), round(float(low), DECIMALS), round(float(high), DECIMALS)


def _summarize_column(
    column: str, runs: Sequence[Sequence[dict]], patient_ids: Sequence[str], seed: int
) -> dict[str, Any]:
    # The readers decide which slices are in a column, so they are the same in every run
    inside = [index for index, slice_ in enumerate(runs[0]) if slice_[column] is not None]
    summands = [[_slice_sums(run[index][column]) for index in inside] for run in runs]
    result = summarize_sums(summands, [patient_ids[index] for index in inside], _statistics, METRICS, seed)
    for metric in RATIO_METRICS:
        count = np.mean([sum(run[index][column][metric][1] for index in inside) for run in runs])
        result[metric]["count"] = _number(count)
    return result


def summarize_sums(
    runs: Sequence[Sequence[Sequence[float] | np.ndarray]],
    patient_ids: Sequence[str],
    statistics: Callable[[np.ndarray], dict[str, np.ndarray]],
    metrics: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Statistics of summed items, such as slices, with 95 % intervals from a bootstrap over patients.

    Args:
        runs: for each run, the summands of each item.
        patient_ids: the patient of each item.
        statistics: the metrics from sums over items (..., summands), each of shape (...).
        metrics: names of the metrics.
        seed: of the bootstrap.

    Returns:
        As one column of `summarize_seeds`.
    """
    patients, patient_index = np.unique(patient_ids, return_inverse=True)
    result: dict[str, Any] = {"count": len(patient_ids), "num_patients": len(patients)}
    if not len(patients):
        return result | {metric: {"mean": None, "ci95": [None, None]} for metric in metrics}

    resampled = np.random.default_rng(seed).integers(len(patients), size=(NUM_RESAMPLES, len(patients)))
    weights = np.stack([np.bincount(row, minlength=len(patients)) for row in resampled]).astype(float)
    estimates, resamples = [], []
    for run in runs:
        summands = np.asarray(run, dtype=float)
        sums = np.zeros((len(patients), summands.shape[1]))
        np.add.at(sums, patient_index, summands)
        estimates.append(statistics(sums.sum(axis=0)))
        resamples.append(statistics(weights @ sums))

    for metric in metrics:
        values = np.array([estimate[metric] for estimate in estimates])
        replicates = np.mean([resample[metric] for resample in resamples], axis=0)
        replicates = replicates[np.isfinite(replicates)]
        interval = np.quantile(replicates, [0.025, 0.975]) if len(replicates) else [np.nan, np.nan]
        result[metric] = {"mean": _number(values.mean()), "ci95": [_number(end) for end in interval]}
        if len(runs) > 1:
            result[metric]["std"] = _number(values.std(ddof=1))
    return result


def _number(value: float) -> float | None:
    """A rounded float for JSON; None for nan."""
    return round(float(value), DECIMALS) + 0.0 if np.isfinite(value) else None  # + 0.0 turns -0.0 into 0.0


# Every statistic is a function of sums over slices, so a resample is a row of weights times the sums of all patients.
# The sums: 1 per slice, the slice metrics, numerators and denominators of the ratios, two sets of calibration bins,
# and the moments of the two empty shares
_BINS = 3 * functional.NUM_BINS


def _slice_sums(scores: dict[str, Any]) -> np.ndarray:
    """The summands of one slice."""
    samples, readers = scores["empty_rate_samples"], scores["empty_rate_readers"]
    return np.concatenate(
        [
            [1.0],
            [scores[metric] for metric in SLICE_METRICS],
            *(scores[metric] for metric in RATIO_METRICS),
            scores["calibration"].ravel(),
            functional.bin_sums(np.array([samples]), np.array([readers])).ravel(),
            [samples * samples, samples * readers, readers * readers],
        ]
    )


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """All `METRICS` from sums (..., summands), each of shape (...); nan where one is not defined."""
    count, scalars, ratios, calibration, empties, moments = np.split(
        sums, np.cumsum([1, len(SLICE_METRICS), 2 * len(RATIO_METRICS), _BINS, _BINS]), axis=-1
    )
    means = dict(zip(SLICE_METRICS, np.moveaxis(scalars / count, -1, 0), strict=True))
    x, y = means["empty_rate_samples"], means["empty_rate_readers"]
    xx, xy, yy = np.moveaxis(moments / count, -1, 0)
    variances = np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0)
    by_bin = (*sums.shape[:-1], 3, functional.NUM_BINS)
    numerators, denominators = np.moveaxis(ratios, -1, 0)[0::2], np.moveaxis(ratios, -1, 0)[1::2]
    quotients = np.divide(numerators, denominators, out=np.full(numerators.shape, np.nan), where=denominators > 0)
    return (
        means
        | dict(zip(RATIO_METRICS, quotients, strict=True))
        | {
            "ece": functional.calibration_error(calibration.reshape(by_bin)),
            "empty_ece": functional.calibration_error(empties.reshape(by_bin)),
            "empty_correlation": np.divide(
                xy - x * y, np.sqrt(variances), out=np.full(x.shape, np.nan), where=variances > 1e-16
            ),
        }
    )
