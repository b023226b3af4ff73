"""Metrics of one slice in the three columns of a report."""

from typing import Any

import numpy as np

from . import functional

COLUMNS = ("all", "four_readers", "shape")
# Means over slices; every one of these is a number in each slice's dictionary.
SLICE_METRICS = (
    "ged",
    "cross_distance",
    "sample_diversity",
    "reader_diversity",
    "hm_iou",
    "dice_max_per_reader",
    "dice_mean",
    "iou_mean",
    "dice_majority",
    "iou_majority",
    "brier",
    "ncc",
    "empty_rate_samples",
    "empty_rate_readers",
)


# Numbers that exist only over many slices.
POOLED_METRICS = ("ece", "empty_ece", "empty_correlation")
METRICS = SLICE_METRICS + POOLED_METRICS


def slice_metrics(
    samples: np.ndarray, probabilities: np.ndarray, readers: np.ndarray, owners: np.ndarray | None = None
) -> dict[str, dict[str, Any] | None]:
    """All metrics of one slice, in the three columns of the protocol.

    - `all`: at least one reader drew.
    - `four_readers`: there are four readers or more and every one drew.
    - `shape`: at least two readers drew; only non-empty samples against non-empty readers. Without a non-empty sample
      one empty mask of probability zero is scored: cross distance 1, sample diversity 0, HM-IoU 0, Dice 0.

    The empty rates are those of all samples and all readers in every column, `shape` included, where they tell how
    much was left out. So are `readers_annotated`, a count, and `reader_area`, the mean area in pixels of a
    mask that is not empty.

    Args:
        samples: (N, H, W) bool.
        probabilities: (N, H, W) float, the probability maps the samples were thresholded from.
        readers: (M, H, W) bool, empty masks kept.
        owners: (N,) int, when each sample was prompted with one reader's own box: the index of that reader. A sample
            then meets only its owner in the metrics taken reader by reader (`dice_max_per_reader`, `dice_mean`,
            `iou_mean`); all others score the union of the samples of all readers, and `shape` leaves out the samples
            of empty readers.

    Returns:
        For each name of `COLUMNS` None where the slice is not in the column, else a dictionary with a float for each
        name of `SLICE_METRICS`, with `readers_annotated`, `reader_area`, and with `calibration`, the (3, bins) array
        of `functional.calibration_bins`.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    if probabilities.shape != samples.shape:
        raise ValueError(f"probabilities {probabilities.shape} and samples {samples.shape} must have one shape")
    if owners is not None and len(owners) != len(samples):
        raise ValueError(f"owners must name a reader for each of the {len(samples)} samples, got {len(owners)}")
    functional.check_masks(samples=samples, readers=readers)

    columns: dict[str, dict[str, Any] | None] = dict.fromkeys(COLUMNS)
    annotated, visible = functional.nonempty(readers), functional.nonempty(samples)
    region = functional.scored_region(readers)  # empty readers do not change it, so all columns share it
    if not annotated.any():
        return columns
    whole = {
        "empty_rate_samples": float(1 - visible.mean()),
        "empty_rate_readers": float(1 - annotated.mean()),
        "readers_annotated": int(annotated.sum()),
        "reader_area": float(readers.sum() / annotated.sum()),
    }
    columns["all"] = _score(samples, probabilities, readers, owners, region) | whole
    if len(readers) >= 4 and annotated.all():
        columns["four_readers"] = columns["all"]
    if annotated.sum() >= 2:
        kept = visible if owners is None else visible & annotated[owners]
        if kept.all() and annotated.all():
            columns["shape"] = columns["all"]
        else:
            # Owners are counted among the non-empty readers only.
            kept_owners = None if owners is None else (np.cumsum(annotated) - 1)[owners[kept]]
            columns["shape"] = (
                _score(samples[kept], probabilities[kept], readers[annotated], kept_owners, region) | whole
            )
    return columns


def _score(
    samples: np.ndarray,
    probabilities: np.ndarray,
    readers: np.ndarray,
    owners: np.ndarray | None,
    region: np.ndarray,
) -> dict[str, Any]:
    """The metrics of one column; no sample at all counts as one empty sample."""
    if len(samples) == 0:
        samples, probabilities = np.zeros((1, *readers.shape[1:]), bool), np.zeros((1, *readers.shape[1:]), np.float32)
        owners = None
    masks = np.concatenate([samples, readers])
    iou = functional.iou_matrix(masks, masks)
    distances = functional.ged_from_iou(iou, len(samples))
    probability = probabilities.mean(axis=0)
    scores = distances._asdict() | {
        "hm_iou": functional.hm_iou_from_iou(iou[: len(samples), len(samples) :]),
        "dice_majority": functional.dice_majority(probability, readers),
        "iou_majority": functional.iou_majority(probability, readers),
        "brier": functional.brier(probability, readers, region),
        "ncc": functional.ncc(probabilities, readers),
        "calibration": functional.calibration_bins(probability, readers, region),
    }
    if owners is None:
        return scores | _reader_by_reader(samples, probability, readers)
    own = []
    for index, reader in enumerate(readers):
        mine = owners == index
        nothing = np.zeros((1, *reader.shape), bool)
        own.append(
            _reader_by_reader(
                samples[mine] if mine.any() else nothing,
                probabilities[mine].mean(axis=0) if mine.any() else nothing[0],
                reader[None],
            )
        )
    return scores | {name: float(np.mean([scores[name] for scores in own])) for name in own[0]}


def _reader_by_reader(samples: np.ndarray, probability: np.ndarray, readers: np.ndarray) -> dict[str, float]:
    return {
        "dice_max_per_reader": functional.dice_max_per_reader(samples, readers),
        "dice_mean": functional.dice_mean(probability, readers),
        "iou_mean": functional.iou_mean(probability, readers),
    }
