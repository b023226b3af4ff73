"""All metrics of one slice, in the three columns of a results file."""

from typing import Any

import numpy as np

from . import functional

COLUMNS = ("all", "four_readers", "shape")
# Defined for each slice, and averaged over slices
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
# Not defined for every slice: each is a pair of numbers, whose sums over slices are divided
RATIO_METRICS = ("ged_unbiased", "stray_pieces", "stray_pieces_readers", "rank_correlation")
# The same in every column: of all samples and all readers
OF_ALL_MASKS = ("empty_rate_samples", "empty_rate_readers", *RATIO_METRICS[1:])
# Defined over many slices only
POOLED_METRICS = ("ece", "empty_ece", "empty_correlation")
METRICS = SLICE_METRICS + RATIO_METRICS + POOLED_METRICS


def slice_metrics(
    samples: np.ndarray,
    probabilities: np.ndarray,
    readers: np.ndarray,
    owners: np.ndarray | None = None,
    independent: bool = False,
    iou_scores: np.ndarray | None = None,
    outside: tuple[int, float] = (0, 0.0),
) -> dict[str, dict[str, Any] | None]:
    """All metrics of one slice, in three columns.

    - `all`: slices with at least one annotated mask.
    - `four_readers`: slices with four readers or more, all of whose masks are annotated.
    - `shape`: slices with at least two annotated masks. Only non-empty samples and annotated masks are compared. If
      all samples are empty, one empty mask of probability zero is scored: cross distance 1, sample diversity 0,
      HM-IoU 0, Dice 0.

    The empty rates, stray pieces, the rank correlation, `readers_annotated` and `reader_area` refer to all samples and
    all readers in every column; for `shape` they say how much was left out.

    Args:
        samples: (N, H, W) bool.
        probabilities: (N, H, W) float, the probability maps of which `samples` are the thresholded ones.
        readers: (M, H, W) bool, with the empty masks.
        owners: (N,) int, for samples prompted with a reader's own box: the index of that reader.
            `dice_max_per_reader`, `dice_mean` and `iou_mean` then compare each reader only with the samples of their
            own box; the other metrics score the union of all samples. `shape` leaves out the samples of empty readers.
        independent: the samples are independent of each other and have one prompt, so `ged_unbiased` is defined.
        iou_scores: (N,) float, by which the model ranks the samples, or None.
        outside: number of pixels of the image that the arrays leave out, further than `functional.DILATION_PX` from
            every reader, and their probability; they belong to no mask. Only `ncc` depends on them.

    Returns:
        For each name of `COLUMNS` None if the slice is not in the column, else a dictionary with

        - a float for each name of `SLICE_METRICS`;
        - a pair (numerator, denominator) for each name of `RATIO_METRICS`: `ged_unbiased` and 1, or (0, 0) where it is
          not defined; of the samples (`stray_pieces`) and of the readers (`stray_pieces_readers`) the number of masks
          with more than one piece, see `functional.count_pieces`, and of masks that are not empty;
          `rank_correlation` and 1, see `functional.rank_correlation`, or (0, 0) where it is not defined;
        - `readers_annotated`, the number of annotated masks, and `reader_area`, their mean area in pixels;
        - `calibration`, the (3, bins) array of `functional.calibration_bins`.

    Raises:
        ValueError: shapes that do not match, masks that are not boolean, or no mask.
    """
    if probabilities.shape != samples.shape:
        raise ValueError(f"probabilities {probabilities.shape} and samples {samples.shape} must have one shape")
    if owners is not None and len(owners) != len(samples):
        raise ValueError(f"owners must name a reader for each of the {len(samples)} samples, got {len(owners)}")
    functional.check_masks(samples=samples, readers=readers)

    columns: dict[str, dict[str, Any] | None] = dict.fromkeys(COLUMNS)
    annotated, visible = functional.nonempty(readers), functional.nonempty(samples)
    region = functional.scored_region(readers)  # empty masks do not change it, so it is the same in all columns
    if not annotated.any():
        return columns
    whole = {
        "empty_rate_samples": float(1 - visible.mean()),
        "empty_rate_readers": float(1 - annotated.mean()),
        "readers_annotated": int(annotated.sum()),
        "reader_area": float(readers.sum() / annotated.sum()),
        "stray_pieces": _stray_pieces(samples),
        "stray_pieces_readers": _stray_pieces(readers),
        "rank_correlation": _rank_correlation(iou_scores, samples, readers),
    }
    columns["all"] = _score(samples, probabilities, readers, owners, region, independent, outside) | whole
    if len(readers) >= 4 and annotated.all():
        columns["four_readers"] = columns["all"]
    if annotated.sum() >= 2:
        kept = visible if owners is None else visible & annotated[owners]
        if kept.all() and annotated.all():
            columns["shape"] = columns["all"]
        else:
            # Indices among the annotated masks only
            kept_owners = None if owners is None else (np.cumsum(annotated) - 1)[owners[kept]]
            columns["shape"] = (
                _score(
                    samples[kept], probabilities[kept], readers[annotated], kept_owners, region, independent, outside
                )
                | whole
            )
    return columns


def _score(
    samples: np.ndarray,
    probabilities: np.ndarray,
    readers: np.ndarray,
    owners: np.ndarray | None,
    region: np.ndarray,
    independent: bool,
    outside: tuple[int, float],
) -> dict[str, Any]:
    """The metrics of one column; no samples count as one empty sample."""
    if len(samples) == 0:
        outside = (outside[0], 0.0)
        samples, probabilities = np.zeros((1, *readers.shape[1:]), bool), np.zeros((1, *readers.shape[1:]), np.float32)
        owners = None
    probability = probabilities.mean(axis=0)
    # One IoU matrix has every pair of samples, readers, mask of the mean probability, and majority
    mean, majority = functional.mean_mask(probability), functional.majority_mask(readers)
    masks = np.concatenate([samples, readers, mean[None], majority[None]])
    iou = functional.iou_matrix(masks, masks)
    pairs, iou_mean, iou_majority = iou[:-2, :-2], iou[-2, len(samples) : -2], float(iou[-2, -1])
    cross = pairs[: len(samples), len(samples) :]
    unbiased = functional.ged_unbiased_from_iou(pairs, len(samples)) if independent and owners is None else np.nan
    scores = functional.ged_from_iou(pairs, len(samples))._asdict() | {
        "ged_unbiased": (unbiased, 1) if np.isfinite(unbiased) else (0.0, 0),
        "hm_iou": functional.hm_iou_from_iou(cross),
        "dice_majority": _dice(iou_majority),
        "iou_majority": iou_majority,
        "brier": functional.brier(probability, readers, region),
        "ncc": functional.ncc(probabilities, readers, outside),
        "calibration": functional.calibration_bins(probability, readers, region),
    }
    if owners is None:
        return scores | {
            "dice_max_per_reader": float(_dice(cross).max(axis=0).mean()),
            "dice_mean": float(_dice(iou_mean).mean()),
            "iou_mean": float(iou_mean.mean()),
        }
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


def _dice(iou: Any) -> Any:
    """Dice from IoU, numbers or arrays: see `functional.dice_matrix`."""
    return 2 * iou / (1 + iou)


def _stray_pieces(masks: np.ndarray) -> tuple[int, int]:
    """How many masks have more than one piece, and how many are not empty."""
    pieces = functional.count_pieces(masks)
    return int((pieces > 1).sum()), int((pieces > 0).sum())


def _rank_correlation(iou_scores: np.ndarray | None, samples: np.ndarray, readers: np.ndarray) -> tuple[float, int]:
    """`functional.rank_correlation` and 1, or (0, 0) where it is not defined."""
    value = np.nan if iou_scores is None else functional.rank_correlation(iou_scores, samples, readers)
    return (value, 1) if np.isfinite(value) else (0.0, 0)


def _reader_by_reader(samples: np.ndarray, probability: np.ndarray, readers: np.ndarray) -> dict[str, float]:
    return {
        "dice_max_per_reader": functional.dice_max_per_reader(samples, readers),
        "dice_mean": functional.dice_mean(probability, readers),
        "iou_mean": functional.iou_mean(probability, readers),
    }
