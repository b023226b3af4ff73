"""Metrics of a set of sampled masks against a set of readers' masks: pure functions of arrays.

Conventions of this module:

- `samples` is (N, H, W) bool, `readers` is (M, H, W) bool, `probabilities` is (N, H, W) float in [0, 1], and
  `probability` (H, W) is their mean over samples.
- Two empty masks have IoU 1 and Dice 1; an empty and a non-empty mask have 0. The distance is d = 1 - IoU.
- The mask of a mean probability is where it exceeds 1/2. The majority of the readers is where strictly more than half
  of them annotated, so two of four is background.
- N or M of zero, masks of another dtype than bool, and different image sizes raise `ValueError`.
"""

import struct
from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, label
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

NUM_BINS = 10
PACKED_SIZE = struct.Struct(">II")  # height and width, the header of a packed mask
DILATION_PX = 4
NCC_EPSILON = 1e-8  # inside the logarithm of S_NCC, as in the public evaluation code of PHiSeg


class GeneralizedEnergyDistance(NamedTuple):
    """Squared generalised energy distance and the three mean distances that it consists of, see `ged`."""

    ged: float
    cross_distance: float
    sample_diversity: float
    reader_diversity: float


def check_masks(**masks: np.ndarray) -> None:
    """Raise `ValueError` unless every argument is boolean (masks, H, W), with at least one mask and a common size."""
    sizes = set()
    for name, array in masks.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} must be a NumPy array, got {type(array).__name__}; a tensor has .cpu().numpy()")
        if array.ndim != 3 or array.dtype != bool or len(array) == 0:
            raise ValueError(
                f"{name} must be a bool array (masks, H, W) with at least one mask, got {array.dtype} {array.shape}"
            )
        sizes.add(array.shape[1:])
    if len(sizes) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in masks.items())
        raise ValueError(f"masks must have one size, got {shapes}")


def nonempty(masks: np.ndarray) -> np.ndarray:
    """Whether each of the masks (N, H, W) has a pixel: (N,) bool."""
    return np.asarray(masks.any(axis=(1, 2)))


def union_mask(masks: np.ndarray) -> np.ndarray:
    """Where at least one of the masks (N, H, W) has a pixel: (H, W) bool."""
    return np.asarray(masks.any(axis=0))


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the tight box of a mask (H, W), enlarged by `margin` px and clipped to the image.

    The box of an empty mask is the first pixel, so that a crop is never empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return slice(0, 1), slice(0, 1)
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + 1 + margin),
        slice(max(columns[0] - margin, 0), columns[-1] + 1 + margin),
    )


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every mask of `a` with every mask of `b`: |a & b| / |a | b|.

    Args:
        a: (N, H, W) bool.
        b: (M, H, W) bool.

    Returns:
        (N, M) float64; 1 where both masks are empty, 0 where only one is.

    >>> left, right = np.array([[[True, True, False]]]), np.array([[[False, True, True]], [[False, False, False]]])
    >>> iou_matrix(left, right).round(3).tolist()
    [[0.333, 0.0]]
    """
    check_masks(a=a, b=b)
    rows, columns = bounding_box(union_mask(a) | union_mask(b))
    a, b = a[:, rows, columns], b[:, rows, columns]
    # Counts up to 2**24 are exact in float32, and its matrix product is several times faster than that of integers
    dtype: type = np.float32 if a[0].size < 2**24 else np.float64
    flat_a: np.ndarray = a.reshape(len(a), -1).astype(dtype)
    flat_b: np.ndarray = b.reshape(len(b), -1).astype(dtype)
    intersection = np.matmul(flat_a, flat_b.T).astype(np.float64)
    area_a, area_b = np.count_nonzero(a, axis=(1, 2)), np.count_nonzero(b, axis=(1, 2))
    union = area_a[:, None] + area_b[None, :] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def dice_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dice coefficient of every mask of `a` with every mask of `b`: 2 |a & b| / (|a| + |b|) = 2 IoU / (1 + IoU).

    Args:
        a: (N, H, W) bool.
        b: (M, H, W) bool.

    Returns:
        (N, M) float64; 1 where both masks are empty, 0 where only one is.

    >>> left, right = np.array([[[True, True, False]]]), np.array([[[False, True, True]], [[False, False, False]]])
    >>> dice_matrix(left, right).tolist()
    [[0.5, 0.0]]
    """
    iou = iou_matrix(a, b)
    return 2 * iou / (1 + iou)


def ged(samples: np.ndarray, readers: np.ndarray) -> GeneralizedEnergyDistance:
    """Squared generalised energy distance between samples and readers (Kohl et al. 2018, arXiv 1806.05034).

        GED^2 = 2 mean d(s, y) - mean d(s, s') - mean d(y, y'), with d = 1 - IoU

    The means are over all pairs, including each mask with itself (V-statistic). The expectation falls with N, so
    values for different N are not comparable. Two sets of empty masks have distance 0.

    Args:
        samples: (N, H, W) bool.
        readers: (M, H, W) bool.

    Returns:
        `ged` in [0, 2], `cross_distance` = mean d(s, y), `sample_diversity` = mean d(s, s'), `reader_diversity` =
        mean d(y, y').

    >>> one, other = np.array([[[True, False]]]), np.array([[[False, True]]])
    >>> ged(one, other).ged
    2.0
    """
    check_masks(samples=samples, readers=readers)
    masks = np.concatenate([samples, readers])
    return ged_from_iou(iou_matrix(masks, masks), len(samples))


def ged_from_iou(iou: np.ndarray, num_samples: int) -> GeneralizedEnergyDistance:
    """`ged` from the IoU matrix (N + M, N + M) of the concatenated samples and readers."""
    distance = 1 - iou
    cross = float(distance[:num_samples, num_samples:].mean())
    within_samples = float(distance[:num_samples, :num_samples].mean())
    within_readers = float(distance[num_samples:, num_samples:].mean())
    return GeneralizedEnergyDistance(
        2 * cross - within_samples - within_readers, cross, within_samples, within_readers
    )


def ged_unbiased(samples: np.ndarray, readers: np.ndarray) -> float:
    """Squared generalised energy distance from pairs of different masks only (Szekely and Rizzo 2013).

        2 mean_{s, y} d(s, y) - mean_{s != s'} d(s, s') - mean_{y != y'} d(y, y'), with d = 1 - IoU

    The means are U-statistics (doi 10.1016/j.jspi.2013.03.018). For independent samples the expectation does not
    depend on N, unlike that of `ged`, and is 0 if samples and readers have one distribution; the value may be
    negative. Samples that were spread evenly over a distribution are not independent and do not have this property.

    Args:
        samples: (N, H, W) bool, independent of each other.
        readers: (M, H, W) bool.

    Returns:
        A number in [-2, 2]; nan with fewer than two samples or fewer than two readers.

    Two samples A and B of IoU 1/3 and the readers A and A: 2 (0 + 2/3) / 2 - 2/3 - 0.

    >>> a, b = np.array([[[True, True, False]]]), np.array([[[False, True, True]]])
    >>> ged_unbiased(np.concatenate([a, b]), np.concatenate([a, a])).__round__(6)
    0.0
    >>> ged_unbiased(np.concatenate([a, a]), np.concatenate([b, b])).__round__(6)
    1.333333
    """
    check_masks(samples=samples, readers=readers)
    masks = np.concatenate([samples, readers])
    return ged_unbiased_from_iou(iou_matrix(masks, masks), len(samples))


def ged_unbiased_from_iou(iou: np.ndarray, num_samples: int) -> float:
    """`ged_unbiased` from the IoU matrix (N + M, N + M) of the concatenated samples and readers."""
    num_readers = len(iou) - num_samples
    if min(num_samples, num_readers) < 2:
        return float("nan")
    _, cross, within_samples, within_readers = ged_from_iou(iou, num_samples)
    # A mask has distance 0 to itself, so leaving these pairs out only changes the number of pairs
    return float(
        2 * cross - within_samples * num_samples / (num_samples - 1) - within_readers * num_readers / (num_readers - 1)
    )


def hm_iou(samples: np.ndarray, readers: np.ndarray) -> float:
    """Hungarian-matched IoU: the largest mean IoU of a matching that uses every mask equally often.

    With L = lcm(N, M), each sample is matched L / N times and each reader L / M times (Kohl et al. 2019,
    arXiv 1905.13077). Matching only the best M of N samples would give a different, higher number.

    Args:
        samples: (N, H, W) bool.
        readers: (M, H, W) bool.

    Returns:
        A number in [0, 1]; a match of two empty masks counts 1.

    >>> reader = np.array([[[True, True, False, False]]])
    >>> hm_iou(np.concatenate([reader, ~reader]), reader)
    0.5
    """
    return hm_iou_from_iou(iou_matrix(samples, readers))


def hm_iou_from_iou(iou: np.ndarray) -> float:
    """`hm_iou` from the IoU matrix (N, M) of samples and readers."""
    num_samples, num_readers = iou.shape
    length = lcm(num_samples, num_readers)
    repeated = iou.repeat(length // num_samples, axis=0).repeat(length // num_readers, axis=1)
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def dice_max_per_reader(samples: np.ndarray, readers: np.ndarray) -> float:
    """Mean over readers of the largest Dice of any sample with that reader: mean_y max_s Dice(s, y).

    Args:
        samples: (N, H, W) bool.
        readers: (M, H, W) bool. An empty mask has Dice 1 if any sample is empty, otherwise 0.
    """
    return float(dice_matrix(samples, readers).max(axis=0).mean())


def mean_mask(probability: np.ndarray) -> np.ndarray:
    """The mask of a mean probability (H, W): where it exceeds 1/2."""
    return probability > 0.5


def majority_mask(readers: np.ndarray) -> np.ndarray:
    """Where strictly more than half of the readers (M, H, W) annotated: (H, W) bool. A tie is background.

    >>> majority_mask(np.array([[[True, True]], [[True, False]], [[True, False]], [[False, True]]])).tolist()
    [[True, False]]
    """
    return 2 * np.count_nonzero(readers, axis=0) > len(readers)


def dice_mean(probability: np.ndarray, readers: np.ndarray) -> float:
    """Dice of the thresholded mean probability (H, W) with each reader, averaged over readers."""
    return float(dice_matrix(mean_mask(probability)[None], readers).mean())


def iou_mean(probability: np.ndarray, readers: np.ndarray) -> float:
    """IoU of the thresholded mean probability (H, W) with each reader, averaged over readers."""
    return float(iou_matrix(mean_mask(probability)[None], readers).mean())


def dice_majority(probability: np.ndarray, readers: np.ndarray) -> float:
    """Dice of the thresholded mean probability (H, W) with the majority of the readers (M, H, W)."""
    return float(dice_matrix(mean_mask(probability)[None], majority_mask(readers)[None])[0, 0])


def iou_majority(probability: np.ndarray, readers: np.ndarray) -> float:
    """IoU of the thresholded mean probability (H, W) with the majority of the readers (M, H, W)."""
    return float(iou_matrix(mean_mask(probability)[None], majority_mask(readers)[None])[0, 0])


def scored_region(readers: np.ndarray) -> np.ndarray:
    """The pixels on which calibration is scored: at most `DILATION_PX` (Euclidean) from the union of the readers.

    Over the whole image, the mean would be dominated by background that is easy to predict.

    Args:
        readers: (M, H, W) bool.

    Returns:
        (H, W) bool; empty if all masks are.
    """
    union = union_mask(readers)
    region = np.zeros_like(union)
    if union.any():
        window = bounding_box(union, DILATION_PX)
        region[window] = distance_transform_edt(~union[window]) <= DILATION_PX
    return region


def brier(probability: np.ndarray, readers: np.ndarray, region: np.ndarray | None = None) -> float:
    """Brier score: mean of (p - y)^2 over the scored region, where y is the share of readers who annotated a pixel.

    Args:
        probability: (H, W) mean probability p.
        readers: (M, H, W) bool.
        region: (H, W) bool; default `scored_region(readers)`.

    Returns:
        A number in [0, 1]; nan for an empty region.

    >>> brier(np.array([[0.5, 1.0]]), np.array([[[False, True]]]))
    0.125
    """
    region = scored_region(readers) if region is None else region
    if not region.any():
        return float("nan")
    return float(np.square(probability[region] - readers[:, region].mean(axis=0)).mean())


def calibration_bins(probability: np.ndarray, readers: np.ndarray, region: np.ndarray | None = None) -> np.ndarray:
    """`bin_sums` of one slice, which are added over slices before `calibration_error` is computed.

    Args:
        probability: (H, W) mean probability p.
        readers: (M, H, W) bool.
        region: (H, W) bool; default `scored_region(readers)`.

    Returns:
        (3, `NUM_BINS`) float64: for each bin of p the number of pixels of the region, the sum of p, and the sum of the
        share of readers who annotated the pixel.
    """
    region = scored_region(readers) if region is None else region
    return bin_sums(probability[region], readers[:, region].mean(axis=0))


def bin_sums(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Count, sum of `predicted` and sum of `observed` in `NUM_BINS` equal bins of `predicted`: (3, `NUM_BINS`).

    A bin contains its lower edge; the last one also contains 1.

    >>> bin_sums(np.array([0.05, 0.25, 0.25]), np.array([0.0, 0.5, 0.0]))[:, :3].tolist()
    [[1.0, 0.0, 2.0], [0.05, 0.0, 0.5], [0.0, 0.0, 0.5]]
    """
    index = np.minimum((predicted * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    sums = [np.bincount(index, weights, minlength=NUM_BINS) for weights in (None, predicted, observed)]
    return np.stack(sums).astype(np.float64)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error: sum over bins of |sum of p - sum of y|, divided by the number of pixels.

    Args:
        sums: (..., 3, bins) of `bin_sums`, possibly added over slices.

    Returns:
        (...) float64 in [0, 1]; nan without pixels.

    >>> calibration_error(bin_sums(np.array([0.25, 0.75]), np.array([0.5, 1.0]))).item()
    0.25
    """
    count, predicted, observed = np.moveaxis(sums, -2, 0)
    total = count.sum(axis=-1)
    return np.divide(
        np.abs(predicted - observed).sum(axis=-1), total, out=np.full(total.shape, np.nan), where=total > 0
    )


def ncc(probabilities: np.ndarray, readers: np.ndarray, outside: tuple[int, float] = (0, 0.0)) -> float:
    """S_NCC: whether the samples are uncertain where they disagree with the readers (Baumgartner et al. 2019).

        S_NCC = mean_j corr(E_s CE(m, s), E_s CE(y_j, s))

    CE is the cross-entropy per pixel, s are the probability maps of the samples, m is their mean, y_j are the readers,
    and corr is the Pearson correlation over all pixels (arXiv 1906.04045).

    Args:
        probabilities: (N, H, W) probability maps of the samples.
        readers: (M, H, W) bool.
        outside: number of further pixels of the image, in no reader's mask, and their probability in every sample.

    Returns:
        A number in [-1, 1]; a constant map has no correlation and counts 0.
    """
    # CE is linear in its first argument, so the expectations need only two mean logarithms
    probabilities = np.asarray(probabilities, dtype=np.float32).reshape(len(probabilities), -1)
    readers, weights = readers.reshape(len(readers), -1), None
    if outside[0]:  # one more pixel that counts as so many
        probabilities = np.pad(probabilities, ((0, 0), (0, 1)), constant_values=np.float32(outside[1]))
        readers = np.pad(readers, ((0, 0), (0, 1)))
        weights = np.append(np.ones(readers.shape[1] - 1), outside[0])
    log_inside = np.log(probabilities + np.float32(NCC_EPSILON)).mean(axis=0)
    log_outside = np.log(1 - probabilities + np.float32(NCC_EPSILON)).mean(axis=0)
    mean = probabilities.mean(axis=0)
    uncertainty = _standardized(-(mean * log_inside + (1 - mean) * log_outside), weights)
    if uncertainty is None:
        return 0.0
    correlations = []
    for reader in readers:
        error = _standardized(-np.where(reader, log_inside, log_outside), weights)
        correlations.append(0.0 if error is None else float(np.average(uncertainty * error, weights=weights)))
    return float(np.mean(correlations))


def _standardized(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
    """The map with zero mean and unit standard deviation, in float64; None for a constant map."""
    values = values.astype(np.float64)
    centred = values - np.average(values, weights=weights)
    deviation = np.sqrt(np.average(np.square(centred), weights=weights))
    return centred / deviation if deviation > 1e-12 else None


def rank_correlation(scores: np.ndarray, samples: np.ndarray, readers: np.ndarray) -> float:
    """How well scores rank samples: Spearman's correlation with the mean IoU of a sample with the annotated masks.

    Args:
        scores: (N,) float.
        samples: (N, H, W) bool; empty ones are left out.
        readers: (M, H, W) bool; empty ones are left out.

    Returns:
        From -1 to 1; NaN if fewer than three samples are not empty, no mask is annotated, or all scores or all IoUs
        are equal.
    """
    visible = nonempty(samples)
    if visible.sum() < 3 or not readers.any():
        return np.nan
    quality = iou_matrix(samples[visible], readers[nonempty(readers)]).mean(axis=1)
    if np.ptp(quality) == 0 or np.ptp(scores[visible]) == 0:
        return np.nan
    return float(spearmanr(scores[visible], quality).statistic)


def count_pieces(masks: np.ndarray) -> np.ndarray:
    """Number of connected components of each of the masks (N, H, W), with 8 neighbours: (N,) int; 0 if empty.

    >>> count_pieces(np.array([[[True, False, True]], [[True, True, False]], [[False, False, False]]])).tolist()
    [2, 1, 0]
    """
    check_masks(masks=masks)
    rows, columns = bounding_box(union_mask(masks))
    within_masks = np.zeros((3, 3, 3), dtype=int)
    within_masks[1] = 1
    labels, _ = label(masks[:, rows, columns], structure=within_masks)
    # Components are numbered in the order of the masks
    last = np.maximum.accumulate(labels.reshape(len(masks), -1).max(axis=1))
    return np.diff(last, prepend=0)


def pack_masks(masks: np.ndarray) -> list[bytes]:
    """Masks (N, H, W) as one bytes object each, the input of the `evaluate` modules.

    Height and width come first (`PACKED_SIZE`), then the pixels row by row, 8 per byte.

    Raises:
        ValueError: no mask, no pixel, or another dtype than bool.
    """
    check_masks(masks=masks)
    if masks.size == 0:
        raise ValueError(f"masks must have pixels, got shape {masks.shape}")
    size = PACKED_SIZE.pack(*masks.shape[1:])
    return [size + row.tobytes() for row in np.packbits(masks.reshape(len(masks), -1), axis=1)]


def unpack_masks(packed: Sequence[bytes]) -> np.ndarray:
    """Masks from `pack_masks` as (N, H, W) bool.

    >>> unpack_masks(pack_masks(np.ones((2, 3, 5), dtype=bool))).shape
    (2, 3, 5)

    Raises:
        ValueError: no mask, masks of different sizes, or bytes of another format.
    """
    if not packed:
        raise ValueError("packed masks must be one or more, got none")
    sizes = []
    for item in packed:
        height, width = PACKED_SIZE.unpack_from(item) if len(item) >= PACKED_SIZE.size else (0, 0)
        if not height * width or len(item) != PACKED_SIZE.size + (height * width + 7) // 8:
            raise ValueError(f"packed masks must be bytes from pack_masks, got {len(item)} bytes of another format")
        sizes.append((height, width))
    if len(set(sizes)) > 1:
        raise ValueError(f"packed masks must have one size, got {sorted(set(sizes))}")
    height, width = sizes[0]
    pixels = np.stack([np.frombuffer(item, dtype=np.uint8, offset=PACKED_SIZE.size) for item in packed])
    return np.unpackbits(pixels, axis=1, count=height * width).reshape(-1, height, width).astype(bool)
