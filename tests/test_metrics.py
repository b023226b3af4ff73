"""The metrics against numbers computed by hand and against plain loops over pixels."""

import itertools
import json
import math

import numpy as np
import pytest

from probabilistic_sam.metrics import (
    COLUMNS,
    METRICS,
    breakdown,
    calibration_sums,
    functional,
    paired_difference,
    patient_sums,
    slice_metrics,
    summarize,
    summarize_seeds,
)


def square(top, left, side=4, size=16):
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


EMPTY = np.zeros((16, 16), bool)
A = square(2, 2)  # 16 px
B = square(2, 4)  # 16 px, 8 of them in A: IoU 8 / 24
C = square(10, 10)  # apart from both


def random_masks(count, seed, size=8, empty=0.3):
    rng = np.random.default_rng(seed)
    masks = rng.random((count, size, size)) < 0.4
    return masks & (rng.random(count) > empty)[:, None, None]


def loop_iou(a, b):
    """The definition, pixel by pixel."""
    inside = both = 0
    for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        inside += x or y
        both += x and y
    return both / inside if inside else 1.0


# ------------------------------------------------------------------------------------------------------ IoU and Dice


def test_iou_and_dice_by_hand():
    iou = functional.iou_matrix(np.stack([A, C, EMPTY]), np.stack([A, B, EMPTY]))
    np.testing.assert_allclose(iou, [[1, 1 / 3, 0], [0, 0, 0], [0, 0, 1]])
    dice = functional.dice_matrix(np.stack([A, C, EMPTY]), np.stack([A, B, EMPTY]))
    np.testing.assert_allclose(dice, [[1, 1 / 2, 0], [0, 0, 0], [0, 0, 1]])


def test_iou_of_large_masks_is_exact():
    a = np.zeros((1, 100, 100), bool)
    b = a.copy()
    a[0, :70], b[0, :71] = True, True
    a[0, 0, 0] = False
    assert functional.iou_matrix(a, b).item() == 6999 / 7100


def test_iou_matrix_agrees_with_loops():
    a, b = random_masks(5, 0), random_masks(4, 1)
    expected = [[loop_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(functional.iou_matrix(a, b), expected)


def test_masks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size, got a .*16, 16.* b .*8, 8"):
        functional.iou_matrix(A[None], np.zeros((1, 8, 8), bool))
    with pytest.raises(ValueError, match="samples must be a bool array .*float64"):
        functional.ged(A[None].astype(float), A[None])
    with pytest.raises(ValueError, match="at least one mask"):
        functional.hm_iou(np.zeros((0, 16, 16), bool), A[None])


def test_bounding_box_is_tight_and_clipped():
    assert functional.bounding_box(A) == (slice(2, 6), slice(2, 6))
    rows, columns = functional.bounding_box(A, margin=3)
    assert (rows.start, rows.stop) == (columns.start, columns.stop) == (0, 9)


# --------------------------------------------------------------------------------------------------------------- GED


def test_ged_of_equal_sets_is_zero():
    masks = np.stack([A, B, EMPTY])
    assert functional.ged(masks, masks).ged == pytest.approx(0)
    assert functional.ged(np.concatenate([masks, masks]), masks[::-1]).ged == pytest.approx(0)


def test_ged_of_shifted_squares():
    result = functional.ged(A[None], B[None])  # one of each: only the cross term, 2 (1 - 1/3)
    assert result.ged == pytest.approx(4 / 3)
    assert result.cross_distance == pytest.approx(2 / 3)
    assert result.sample_diversity == result.reader_diversity == 0


@pytest.mark.parametrize(
    ("samples", "readers", "cross", "within_samples", "within_readers"),
    [
        ([EMPTY], [EMPTY], 0, 0, 0),
        ([EMPTY], [A], 1, 0, 0),
        ([A], [EMPTY], 1, 0, 0),
        ([A, EMPTY], [EMPTY], 1 / 2, 1 / 2, 0),
        ([EMPTY, EMPTY], [A, EMPTY], 1 / 2, 0, 1 / 2),
        ([A, EMPTY], [A, EMPTY], 1 / 2, 1 / 2, 1 / 2),
        ([A, A, EMPTY], [A, EMPTY], 1 / 2, 4 / 9, 1 / 2),
        ([A, EMPTY, EMPTY], [B, C], (2 / 3 + 1 + 4) / 6, 4 / 9, 1 / 2),
    ],
)
def test_ged_with_empty_masks(samples, readers, cross, within_samples, within_readers):
    result = functional.ged(np.stack(samples), np.stack(readers))
    assert result == pytest.approx(
        (2 * cross - within_samples - within_readers, cross, within_samples, within_readers), abs=1e-12
    )


def test_ged_agrees_with_loops():
    samples, readers = random_masks(6, 2), random_masks(4, 3)

    def mean_distance(first, second):
        return sum(1 - loop_iou(a, b) for a in first for b in second) / (len(first) * len(second))

    expected = 2 * mean_distance(samples, readers) - mean_distance(samples, samples) - mean_distance(readers, readers)
    assert functional.ged(samples, readers).ged == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ HM-IoU


def test_unbiased_ged_does_not_depend_on_the_number_of_samples():
    # All pairs with replacement of A and C, which are apart: E d = 1/2 between and within, so the expectation is 0
    masks = np.stack([A, C])
    for count in (2, 3):
        sets = [masks[list(picked)] for picked in itertools.product((0, 1), repeat=count)]
        values = [functional.ged_unbiased(samples, readers) for samples in sets for readers in sets[:4]]
        pairs = [functional.ged_unbiased(samples, masks[list(picked)]) for samples in sets
                 for picked in itertools.product((0, 1), repeat=2)]  # fmt: skip
        assert np.mean(pairs) == pytest.approx(0) and min(values) < 0
    # Samples A, A, B, readers A, C: cross (0 + 0 + 2/3 + 1 + 1 + 1) / 6, within (0 + 2/3 + 2/3) / 3 and 1
    by_hand = 2 * (11 / 3) / 6 - 4 / 9 - 1
    assert functional.ged_unbiased(np.stack([A, A, B]), np.stack([A, C])) == pytest.approx(by_hand)
    assert math.isnan(functional.ged_unbiased(A[None], masks)) and math.isnan(functional.ged_unbiased(masks, A[None]))


@pytest.mark.parametrize(("num_samples", "num_readers"), [(3, 2), (2, 3), (4, 2), (1, 4), (4, 4), (2, 1)])
def test_hm_iou_agrees_with_all_permutations(num_samples, num_readers):
    samples, readers = random_masks(num_samples, 4), random_masks(num_readers, 5)
    length = math.lcm(num_samples, num_readers)
    left = [mask for mask in samples for _ in range(length // num_samples)]
    right = [mask for mask in readers for _ in range(length // num_readers)]
    iou = [[loop_iou(a, b) for b in right] for a in left]
    best = max(sum(iou[i][j] for i, j in enumerate(order)) for order in itertools.permutations(range(length)))
    assert functional.hm_iou(samples, readers) == pytest.approx(best / length)


def test_hm_iou_uses_every_sample():
    # Two of the four samples are right; matching only the best two of them would give 1.
    assert functional.hm_iou(np.stack([A, C, EMPTY, EMPTY]), np.stack([A, C])) == pytest.approx(0.5)
    assert functional.hm_iou(np.stack([A, EMPTY]), np.stack([EMPTY, A])) == 1


# ------------------------------------------------------------------------------------- one mask against the readers


def test_dice_max_per_reader():
    # Best for A is B (1/2), for C is C (1), for the empty reader nothing (0).
    assert functional.dice_max_per_reader(np.stack([B, C]), np.stack([A, C, EMPTY])) == pytest.approx(0.5)


def test_mean_mask_against_each_reader():
    probability = np.where(A, 0.6, 0.5)  # one half is not enough
    readers = np.stack([A, B, EMPTY, EMPTY])
    assert functional.dice_mean(probability, readers) == pytest.approx((1 + 1 / 2) / 4)
    assert functional.iou_mean(probability, readers) == pytest.approx((1 + 1 / 3) / 4)
    assert functional.dice_mean(np.zeros((16, 16)), readers) == pytest.approx(0.5)


def test_majority_is_more_than_half():
    np.testing.assert_array_equal(functional.majority_mask(np.stack([A, A, EMPTY, EMPTY])), EMPTY)
    np.testing.assert_array_equal(functional.majority_mask(np.stack([A, A, B, EMPTY])), A & B)
    np.testing.assert_array_equal(functional.majority_mask(np.stack([A, B, B])), B)
    assert functional.dice_majority(A.astype(float), np.stack([B, B, EMPTY])) == pytest.approx(1 / 2)
    assert functional.iou_majority(A.astype(float), np.stack([B, B, EMPTY])) == pytest.approx(1 / 3)
    assert functional.dice_majority(np.zeros((16, 16)), np.stack([A, EMPTY])) == 1


# -------------------------------------------------------------------------------------------------------- calibration


def test_scored_region_is_a_disc_around_the_union():
    point = np.zeros((16, 16), bool)
    point[8, 8] = True
    region = functional.scored_region(point[None])
    y, x = np.mgrid[:16, :16]
    np.testing.assert_array_equal(region, (y - 8) ** 2 + (x - 8) ** 2 <= 16)
    np.testing.assert_array_equal(functional.scored_region(np.stack([EMPTY, point])), region)
    assert not functional.scored_region(EMPTY[None]).any()


def test_brier_and_calibration_on_four_pixels():
    # An image of four pixels lies within the dilation of any mask in it.
    readers = np.array([[[True, True], [False, False]], [[True, False], [False, False]]])  # mean 1, .5, 0, 0
    probability = np.array([[0.95, 0.35], [0.3, 0.0]])
    assert functional.brier(probability, readers) == pytest.approx((0.05**2 + 0.15**2 + 0.3**2) / 4)

    bins = functional.calibration_bins(probability, readers)
    assert bins.shape == (3, 10)
    np.testing.assert_array_equal(bins[0], [1, 0, 0, 2, 0, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(bins[1], [0, 0, 0, 0.65, 0, 0, 0, 0, 0, 0.95])
    np.testing.assert_allclose(bins[2], [0, 0, 0, 0.5, 0, 0, 0, 0, 0, 1])
    assert functional.calibration_error(bins) == pytest.approx((0 + 0.15 + 0.05) / 4)


def test_calibration_edges_and_nothing_to_score():
    np.testing.assert_array_equal(functional.bin_sums(np.array([0.0, 1.0]), np.array([0.0, 1.0]))[0][[0, 9]], [1, 1])
    assert math.isnan(functional.brier(np.zeros((16, 16)), EMPTY[None]))
    assert math.isnan(functional.calibration_error(functional.calibration_bins(np.zeros((16, 16)), EMPTY[None])))


# ---------------------------------------------------------------------------------------------------------------- NCC


def loop_ncc(samples, readers, eps=1e-8):
    """S_NCC as the paper writes it: every pair of reader and sample, every class."""

    def cross_entropy(target, sample):
        return -(target * np.log(sample + eps) + (1 - target) * np.log(1 - sample + eps))

    mean = samples.mean(axis=0)
    uncertainty = np.mean([cross_entropy(mean, sample) for sample in samples], axis=0)
    errors = [np.mean([cross_entropy(reader, sample) for sample in samples], axis=0) for reader in readers]
    return np.mean([np.corrcoef(uncertainty.ravel(), error.ravel())[0, 1] for error in errors])


def test_ncc_agrees_with_the_definition():
    samples = np.random.default_rng(6).uniform(0.01, 0.99, size=(5, 8, 8))
    readers = random_masks(3, 7, empty=0)
    assert functional.ncc(samples, readers) == pytest.approx(loop_ncc(samples, readers.astype(float)), abs=1e-5)


def test_ncc_of_constant_maps_is_zero():
    assert functional.ncc(np.full((3, 16, 16), 0.3), np.stack([A, B])) == 0
    assert functional.ncc(np.zeros((3, 16, 16), np.float32), np.stack([A])) == 0
    # Samples that are sure of A everywhere have an uncertainty of zero, whatever the readers think.
    assert abs(functional.ncc(np.stack([A, A]).astype(np.float32), np.stack([B]))) < 1e-6


def test_ncc_is_high_where_samples_are_uncertain_and_readers_disagree():
    samples = np.where(np.stack([A, B]), 0.95, 0.05)
    assert functional.ncc(samples, np.stack([A, B])) > 0.5
    assert functional.ncc(samples, np.stack([A, B])) > functional.ncc(samples, np.stack([C, C]))


# ------------------------------------------------------------------------------------------------------------- packing


def test_packed_masks_keep_size_and_pixels():
    masks = random_masks(4, 8, size=7)[:, :5]  # 5 x 7 = 35 bits do not fill bytes
    packed = functional.pack_masks(masks)
    assert [len(item) for item in packed] == [8 + 5] * 4  # two numbers of 4 bytes and 35 bits
    np.testing.assert_array_equal(functional.unpack_masks(packed), masks)


def test_packed_masks_of_another_format_are_refused():
    tall, wide = (functional.pack_masks(np.ones((1, *size), dtype=bool)) for size in ((16, 8), (8, 16)))
    with pytest.raises(ValueError, match=r"must have one size, got \[\(8, 16\), \(16, 8\)\]"):
        functional.unpack_masks(tall + wide)
    with pytest.raises(ValueError, match="one or more"):
        functional.unpack_masks([])
    bits_alone = np.zeros(8, dtype=np.uint8).tobytes()  # of 64 pixels, without their size
    for damaged in (b"a", bits_alone, tall[0][:-1], tall[0] + b"a", b"\xff" * 8):
        with pytest.raises(ValueError, match=f"got {len(damaged)} bytes of another format"):
            functional.unpack_masks([damaged])
    with pytest.raises(ValueError, match="must have pixels"):
        functional.pack_masks(np.zeros((2, 0, 5), dtype=bool))


# -------------------------------------------------------------------------------------------------- columns of a slice


def score(samples, readers, **kwargs):
    samples = np.stack(samples)
    return slice_metrics(samples, samples.astype(np.float32), np.stack(readers), **kwargs)


def test_slice_columns_depend_on_who_annotated():
    def columns(*readers):
        scores = score([A], readers)
        return [name for name in COLUMNS if scores[name] is not None]

    assert columns(EMPTY, EMPTY) == []
    assert columns(A, EMPTY, EMPTY, EMPTY) == ["all"]
    assert columns(A, B, EMPTY, EMPTY) == ["all", "shape"]
    assert columns(A, B, A, B) == ["all", "four_readers", "shape"]
    assert columns(A, B, A) == ["all", "shape"]  # every reader annotated, but there are only three


def test_slice_metrics_are_the_functions():
    samples, readers = random_masks(5, 9), random_masks(4, 10, empty=0.5)
    probabilities = np.clip(samples * 0.8 + 0.1, 0, 1)
    scores = slice_metrics(samples, probabilities, readers)["all"]
    mean = probabilities.mean(axis=0)
    for name, value in functional.ged(samples, readers)._asdict().items():
        assert scores[name] == pytest.approx(value)
    assert scores["hm_iou"] == pytest.approx(functional.hm_iou(samples, readers))
    assert scores["dice_max_per_reader"] == pytest.approx(functional.dice_max_per_reader(samples, readers))
    for name in ("dice_mean", "iou_mean", "dice_majority", "iou_majority", "brier"):
        assert scores[name] == pytest.approx(getattr(functional, name)(mean, readers)), name
    assert scores["ncc"] == pytest.approx(functional.ncc(probabilities, readers))
    np.testing.assert_allclose(scores["calibration"], functional.calibration_bins(mean, readers))
    assert scores["empty_rate_samples"] == 1 - functional.nonempty(samples).mean()
    assert scores["empty_rate_readers"] == 1 - functional.nonempty(readers).mean()


def test_unbiased_ged_is_for_independent_samples_of_one_prompt():
    samples, readers = [A, A, B, EMPTY], [A, C, EMPTY]
    scores = score(samples, readers, independent=True)
    assert scores["all"]["ged_unbiased"] == (functional.ged_unbiased(np.stack(samples), np.stack(readers)), 1)
    assert scores["shape"]["ged_unbiased"] == (pytest.approx(11 / 9 - 4 / 9 - 1), 1)  # of the three and two masks
    assert score(samples, readers)["all"]["ged_unbiased"] == (0, 0)
    owned = score(samples, readers, independent=True, owners=np.array([0, 0, 1, 2]))
    assert owned["all"]["ged_unbiased"] == (0, 0)
    one = score([A, EMPTY], [A, C], independent=True)
    assert (one["all"]["ged_unbiased"][1], one["shape"]["ged_unbiased"]) == (1, (0, 0))  # one sample is not empty

    results = summarize([scores, one, score([A], [A, C])], ["one", "two", "three"])
    assert results["all"]["ged_unbiased"]["count"] == 2 and results["all"]["count"] == 3
    mean = np.mean([item["all"]["ged_unbiased"][0] for item in (scores, one)])
    assert results["all"]["ged_unbiased"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert results["shape"]["ged_unbiased"]["count"] == 1
    assert results["four_readers"]["ged_unbiased"] == {"mean": None, "ci95": [None, None], "count": 0}


def test_rank_correlation_of_scores_with_the_mean_iou():
    samples = np.stack([A, B, EMPTY, C, square(2, 3)])  # mean IoU with A and B: 2 / 3, 2 / 3, -, 0, 12 / 20
    readers = np.stack([A, EMPTY, B])
    # Ranks of the IoU 3.5, 3.5, 1, 2; Spearman's is Pearson's correlation of the ranks
    for scores, ranks in (([0.9, 0.8, 5.0, 0.1, 0.7], [4, 3, 1, 2]), ([0.1, 0.2, 0.0, 0.9, 0.5], [1, 2, 4, 3])):
        expected = np.corrcoef(ranks, [3.5, 3.5, 1, 2])[0, 1]
        assert functional.rank_correlation(np.array(scores), samples, readers) == pytest.approx(expected)
    assert np.isnan(functional.rank_correlation(np.ones(5), samples, readers))
    assert np.isnan(functional.rank_correlation(np.arange(3.0), np.stack([A, A, A]), readers))  # equal IoUs
    three, two = np.stack([A, square(2, 3), EMPTY, C]), np.stack([A, C, EMPTY])
    assert functional.rank_correlation(np.array([3.0, 2.0, 0.0, 1.0]), three, readers) == pytest.approx(1)
    assert np.isnan(functional.rank_correlation(np.array([3.0, 1.0, 0.0]), two, readers))  # two that are not empty
    first = score([A, B, C], [A, EMPTY], iou_scores=np.array([0.9, 0.5, 0.1]))["all"]
    without = score([A, B, C], [A, EMPTY])["all"]
    assert first["rank_correlation"] == (pytest.approx(1), 1) and without["rank_correlation"] == (0, 0)


def test_stray_pieces_are_counted_among_masks_that_are_not_empty():
    diagonal = square(2, 2) | square(6, 6)  # touch at a corner: one piece
    assert functional.count_pieces(np.stack([A | C, EMPTY, A, diagonal, A | C | square(2, 10)])).tolist() == [
        2, 0, 1, 1, 3
    ]  # fmt: skip
    assert functional.count_pieces(EMPTY[None]).tolist() == [0]
    first, second = score([A, A | C, EMPTY], [A, B]), score([A, A, A], [A | C, EMPTY])
    assert (first["all"]["stray_pieces"], first["all"]["stray_pieces_readers"]) == ((1, 2), (0, 2))
    pooled = summarize([first, second], ["one", "two"])["all"]
    assert (pooled["stray_pieces"]["mean"], pooled["stray_pieces"]["count"]) == (0.2, 5)
    assert (pooled["stray_pieces_readers"]["mean"], pooled["stray_pieces_readers"]["count"]) == (0.333333, 3)


def test_shape_column_leaves_out_empty_masks():
    mixed = score([A, EMPTY, B, EMPTY], [A, B, EMPTY, EMPTY])
    clean = score([A, B], [A, B])
    for name in ("ged", "cross_distance", "hm_iou", "dice_max_per_reader", "dice_mean", "brier", "ncc"):
        assert mixed["shape"][name] == pytest.approx(clean["all"][name]), name
    assert mixed["shape"]["ged"] == pytest.approx(0)
    assert mixed["all"]["ged"] == pytest.approx(0)
    assert mixed["shape"]["empty_rate_samples"] == mixed["shape"]["empty_rate_readers"] == 0.5


def test_shape_column_without_a_sample_to_score():
    shape = score([EMPTY, EMPTY], [A, B, EMPTY, EMPTY])["shape"]
    assert (shape["cross_distance"], shape["sample_diversity"], shape["hm_iou"]) == (1, 0, 0)
    assert shape["ged"] == pytest.approx(2 - 0 - 1 / 3)  # d(A, B) = 2/3, half of the reader pairs
    assert shape["dice_mean"] == shape["dice_max_per_reader"] == 0


def test_samples_of_a_readers_box_are_compared_with_that_reader():
    # The box of the first reader gave A, that of the second C: each correct for its own reader
    own = score([A, A, C, C], [A, C], owners=np.array([0, 0, 1, 1]))["all"]
    assert own["dice_max_per_reader"] == own["dice_mean"] == own["iou_mean"] == 1
    swapped = score([C, C, A, A], [A, C], owners=np.array([0, 0, 1, 1]))["all"]
    assert swapped["dice_max_per_reader"] == swapped["dice_mean"] == 0
    # The union of the samples does not know whose they are.
    assert own["ged"] == swapped["ged"] == pytest.approx(0)
    # In `shape` a sample for the empty reader 1 is gone, and reader 2 becomes the second.
    shape = score([A, A, C], [A, EMPTY, C], owners=np.array([0, 1, 2]))["shape"]
    assert shape["dice_mean"] == 1
    assert shape["ged"] == pytest.approx(0)
    # A reader whose own samples are all empty gets 0.
    assert score([A, EMPTY], [A, C], owners=np.array([0, 1]))["shape"]["dice_mean"] == 0.5


def test_slice_metrics_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match="must have one shape"):
        slice_metrics(A[None], np.zeros((2, 16, 16)), A[None])
    with pytest.raises(ValueError, match="a reader for each of the 1 samples, got 2"):
        score([A], [A], owners=np.array([0, 0]))


# ------------------------------------------------------------------------------------------------------------- summary


def many_slices(count, seed=0):
    rng = np.random.default_rng(seed)
    per_slice, patients = [], []
    for index in range(count):
        samples, readers = random_masks(4, seed + 2 * index), random_masks(4, seed + 2 * index + 1)
        readers[0, 0, 0] = True
        probabilities = np.clip(samples * 0.7 + rng.uniform(0, 0.3), 0, 1)
        per_slice.append(slice_metrics(samples, probabilities, readers, independent=True, iou_scores=rng.random(4)))
        patients.append(f"patient-{index // 3}")
    return per_slice, patients


def test_summary_of_two_slices_by_hand():
    per_slice = [score([A], [A, A, A, A]), score([EMPTY], [A, EMPTY, EMPTY, EMPTY])]
    results = summarize(per_slice, ["one", "two"])
    everything = results["all"]
    assert (everything["count"], everything["num_patients"]) == (2, 2)
    # GED: 0 and 2 * 1/4 - 0 - 6/16 = 1/8
    assert everything["ged"]["mean"] == pytest.approx(1 / 16)
    assert everything["ged"]["ci95"] == pytest.approx([0, 1 / 8])
    assert everything["empty_rate_samples"]["mean"] == 0.5
    assert everything["empty_rate_readers"]["mean"] == pytest.approx(3 / 8)
    assert everything["empty_ece"]["mean"] == pytest.approx((0 + 1 / 4) / 2)
    assert everything["empty_correlation"]["mean"] == pytest.approx(1)
    assert (results["four_readers"]["count"], results["shape"]["count"]) == (1, 1)
    assert results["four_readers"]["ged"] == {"mean": 0, "ci95": [0, 0]}
    assert results["four_readers"]["empty_correlation"] == {"mean": None, "ci95": [None, None]}


def test_calibration_errors_pool_all_slices():
    per_slice, patients = many_slices(9)
    results = summarize(per_slice, patients)["all"]
    pooled = sum(slice_["all"]["calibration"] for slice_ in per_slice)
    assert results["ece"]["mean"] == pytest.approx(functional.calibration_error(pooled), abs=1e-6)
    shares = np.array([[s["all"]["empty_rate_samples"], s["all"]["empty_rate_readers"]] for s in per_slice])
    assert results["empty_ece"]["mean"] == pytest.approx(
        functional.calibration_error(functional.bin_sums(*shares.T)), abs=1e-6
    )
    assert results["empty_correlation"]["mean"] == pytest.approx(np.corrcoef(shares.T)[0, 1], abs=1e-6)


def test_bootstrap_resamples_patients():
    per_slice, patients = many_slices(30)
    results = summarize(per_slice, patients, seed=3)
    assert results == summarize(per_slice, patients, seed=3)
    assert results["all"]["ged"]["ci95"] != summarize(per_slice, patients, seed=4)["all"]["ged"]["ci95"]
    for metric in METRICS:
        low, high = results["all"][metric]["ci95"]
        assert low <= results["all"][metric]["mean"] <= high, metric
    # One patient leaves nothing to resample.
    low, high = summarize(per_slice, ["same"] * 30)["all"]["ged"]["ci95"]
    assert low == high == results["all"]["ged"]["mean"]

    # The definition by loops, with other random numbers: the same interval up to the noise of 1,000 resamples
    rng = np.random.default_rng(5)
    ged = {name: [] for name in patients}
    for slice_, name in zip(per_slice, patients, strict=True):
        ged[name].append(slice_["all"]["ged"])
    names = sorted(ged)
    means = [np.mean(np.concatenate([ged[name] for name in rng.choice(names, len(names))])) for _ in range(1000)]
    np.testing.assert_allclose(results["all"]["ged"]["ci95"], np.quantile(means, [0.025, 0.975]), atol=0.015)


def test_summary_over_seeds():
    (first, patients), (second, _) = many_slices(9), many_slices(9)
    for slice_ in second:
        slice_["all"] = slice_["all"] | {"ged": slice_["all"]["ged"] + 0.2}
    once, twice = summarize(first, patients)["all"], summarize_seeds([first, second], patients)["all"]
    assert twice["count"] == once["count"] == 9
    assert twice["ged"]["mean"] == pytest.approx(once["ged"]["mean"] + 0.1, abs=1e-5)
    assert twice["ged"]["ci95"] == pytest.approx([end + 0.1 for end in once["ged"]["ci95"]], abs=1e-5)
    assert twice["ged"]["std"] == pytest.approx(0.2 / math.sqrt(2), abs=1e-5)
    assert twice["hm_iou"]["std"] == 0
    assert "std" not in once["ged"]


def test_summary_of_nothing_and_of_lists_that_differ():
    results = summarize([score([A], [EMPTY])], ["one"])
    for column in COLUMNS:
        assert results[column]["count"] == 0
        assert results[column]["ged"] == {"mean": None, "ci95": [None, None]}
    json.dumps(results, allow_nan=False)
    with pytest.raises(ValueError, match="must match"):
        summarize([score([A], [A])], ["one", "two"])


def test_sums_by_patient_and_their_paired_difference():
    def run(*values):
        inside = [None if value is None else {"ged": value} for value in values]
        return [{"all": item, "four_readers": None, "shape": item} for item in inside]

    patients = ["a", "a", "b", "c"]
    first = patient_sums([run(0.5, 0.3, 0.4, None), run(0.7, 0.3, 0.4, None)], patients)
    assert first == {
        "all": {"a": [2, 0.9], "b": [1, 0.4]},
        "four_readers": {},
        "shape": {"a": [2, 0.9], "b": [1, 0.4]},
    }
    second = patient_sums([run(0.5, 0.4, 0.1, None)], patients)["all"]
    mean, low, high = paired_difference(first["all"], second)
    assert mean == pytest.approx(0.3 / 3)  # (0.9 - 0.9 + 0.4 - 0.1) over three slices
    assert (low, high) == (0.0, pytest.approx(0.3))  # only a, only b
    with pytest.raises(ValueError, match="not scored on the same slices"):
        paired_difference(first["all"], {"a": [2, 0.9]})


def test_calibration_sums_count_pixels_and_slices():
    scores = {"empty_rate_samples": 0.25, "empty_rate_readers": 0.5, "calibration": np.ones((3, 10))}
    sums = calibration_sums([[{"all": scores}, {"all": None}], [{"all": scores}, {"all": None}]])
    assert sums["pixels"] == np.full((3, 10), 2.0).tolist()
    assert [row[2] for row in sums["emptiness"]] == [2.0, 0.5, 1.0] and np.sum(sums["emptiness"]) == 3.5


def test_breakdown_groups_the_error_by_readers_and_area():
    large = np.ones_like(A)
    slices = [
        slice_metrics(np.stack([A, A]), np.stack([A, A]).astype(float), np.stack([A, EMPTY])),  # one reader, 16 px
        slice_metrics(np.stack([A, B]), np.stack([A, B]).astype(float), np.stack([A, A])),  # d(A, B) = 2 / 3
        slice_metrics(np.stack([large]), np.stack([large]).astype(float), np.stack([large, large])),  # 256 px, exact
        slice_metrics(np.stack([A]), np.stack([A]).astype(float), np.stack([EMPTY])),  # empty: in no column
    ]
    assert (slices[0]["all"]["readers_annotated"], slices[0]["all"]["reader_area"]) == (1, 16.0)
    groups = breakdown([slices, slices])  # two runs: as many slices
    one, two = groups["readers_annotated"]["1"], groups["readers_annotated"]["2"]
    assert list(groups["readers_annotated"]) == ["1", "2"] and list(groups["reader_area"]) == [
        "below 25",
        "100 to 400",
    ]
    # 2 * 1 / 2 - 0 - 1 / 2 and 2 * (0 + 2 / 3) / 2 - (2 / 3) / 2 - 0
    assert one["all"]["ged"] == 0.5 and two["all"]["ged"] == pytest.approx((1 / 3 + 0) / 2, abs=1e-6)
    assert one["all"]["count"] == 1 and two["all"]["count"] == two["shape"]["count"] == 2
    assert one["all"]["ged_share"] == pytest.approx(0.6, abs=1e-6) and two["shape"]["ged_share"] == 1
    assert one["shape"] == dict.fromkeys(one["shape"], None) | {"count": 0}
    assert one["all"]["empty_rate_readers"] == 0.5 and one["all"]["empty_rate_samples"] == 0
    assert groups["reader_area"]["100 to 400"]["all"]["ged_share"] == 0
    assert breakdown([[slices[3]]]) == {"readers_annotated": {}, "reader_area": {}}
