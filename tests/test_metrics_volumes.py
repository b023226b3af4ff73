"""Metrics of nodules as volumes, by hand-computed numbers."""

import numpy as np
import pytest

from probabilistic_sam.metrics import NODULE_METRICS, functional, nodule_metrics, summarize_nodules, volumes
from probabilistic_sam.metrics.per_nodule import NODULE_COUNTS, NODULE_MEANS

EMPTY = np.zeros((3, 8, 8), bool)


def block(first: int, last: int, side: int = 4) -> np.ndarray:
    """A volume of 3 slices of 8x8 with a square on slices `first` to `last`."""
    volume = EMPTY.copy()
    volume[first : last + 1, 2 : 2 + side, 2 : 2 + side] = True
    return volume


def test_ged_3d_of_blocks_that_share_one_of_three_slices():
    # 32 voxels each, 16 in common, 48 in the union: IoU 1/3
    score = volumes.ged_3d(block(0, 1)[None], block(1, 2)[None])
    assert score.ged == pytest.approx(2 * (1 - 1 / 3)) and score.cross_distance == pytest.approx(2 / 3)
    # Slice by slice the IoU would be 0, 1 and 0; the voxels of a nodule count together
    two = np.stack([block(0, 1), EMPTY])
    assert volumes.ged_3d(two, two) == pytest.approx((0.0, 0.5, 0.5, 0.5))


def test_ged_3d_is_ged_of_one_tall_image():
    rng = np.random.default_rng(0)
    samples, readers = rng.random((5, 4, 9, 7)) < 0.2, rng.random((3, 4, 9, 7)) < 0.2
    tall = [array.reshape(len(array), 36, 7) for array in (samples, readers)]
    assert volumes.ged_3d(samples, readers) == pytest.approx(functional.ged(*tall))
    one = volumes.ged_3d(samples[:, :1], readers[:, :1])
    assert one == functional.ged(samples[:, 0], readers[:, 0])


def test_volume_crps_by_hand():
    # Samples 1, 3; readers 0 and 4. mean |x - y| = (1 + 3 + 3 + 1) / 4 = 2; mean |x - x'| = 4 / 4 = 1; reference 4
    assert volumes.volume_crps(np.array([1.0, 3.0]), np.array([0.0, 4.0])) == pytest.approx((2 - 0.5) / 4)
    # One sample: the absolute error; the unit does not matter
    assert volumes.volume_crps(np.array([6.0]), np.array([4.0])) == pytest.approx(0.5)
    assert volumes.volume_crps(np.array([60.0]), np.array([40.0])) == pytest.approx(0.5)
    assert volumes.volume_crps(np.array([5.0, 5.0]), np.array([5.0])) == 0


def test_crps_is_the_integral_of_its_definition():
    """CRPS(F, y) = integral of (F(t) - 1[t >= y])^2."""
    rng = np.random.default_rng(1)
    sampled, readers = rng.uniform(0, 10, 7), np.array([0.0, 4.0, 8.0])
    steps = np.linspace(-1, 12, 130_001)
    distribution = (sampled[:, None] <= steps).mean(axis=0)
    integrals = [np.square(distribution - (steps >= reader)).sum() * (steps[1] - steps[0]) for reader in readers]
    assert volumes.volume_crps(sampled, readers) == pytest.approx(np.mean(integrals) / 6, abs=1e-3)


def test_coverage_counts_annotating_readers_within_the_quantiles():
    sampled = np.concatenate([np.zeros(50), np.arange(1.0, 102)])  # non-empty 1..101: quantiles 6 and 96
    assert volumes.coverage(sampled, np.array([0.0, 5.9, 6.0, 50.0, 96.0, 96.1])) == (3, 5)
    assert volumes.coverage(np.zeros(4), np.array([0.0, 3.0])) == (0, 1)
    assert volumes.coverage(np.array([3.0]), np.array([3.0])) == (1, 1)


def test_volume_error_without_a_sample_is_one():
    assert volumes.volume_error(np.array([0.0, 2.0, 4.0, 9.0]), np.array([0.0, 4.0, 6.0])) == pytest.approx(0.2)
    assert volumes.volume_error(np.zeros(3), np.array([5.0])) == 1


def test_nodule_metrics_by_hand():
    # Volumes of 16 voxels per slice at 0.5 mm^3: samples 8, 16, 0 mm^3; readers 16, 24, 0, 0
    samples, readers = np.stack([block(0, 0), block(0, 1), EMPTY]), np.stack([block(0, 1), block(0, 2), EMPTY, EMPTY])
    scores = nodule_metrics(samples, readers, 0.5)
    assert set(scores) == {*NODULE_MEANS, *NODULE_COUNTS}
    distances = volumes.ged_3d(samples, readers)
    assert (scores["ged_3d"], scores["reader_diversity"]) == (distances.ged, distances.reader_diversity)
    # mean |x - y|: of 16: (8 + 0 + 16) / 3; of 24: (16 + 8 + 24) / 3; of 0, twice: (8 + 16 + 0) / 3; mean 10
    # mean |x - x'|: 2 (8 + 8 + 16) / 9; reference 20
    assert scores["volume_crps"] == pytest.approx((10 - 32 / 9) / 20)
    assert scores["volume_error"] == pytest.approx(8 / 20)  # median 12, mean 20
    assert (scores["readers_covered"], scores["readers_annotated"]) == (0, 2)  # 8.4 to 15.6
    assert (scores["empty_rate_samples"], scores["empty_rate_readers"]) == (pytest.approx(1 / 3), 0.5)


def test_nodule_metrics_of_empty_samples_and_of_one_reader():
    scores = nodule_metrics(np.stack([EMPTY, EMPTY]), block(0, 1)[None], 1.0)
    assert scores["ged_3d"] == 2 and scores["volume_crps"] == 1 and scores["volume_error"] == 1
    assert (scores["readers_covered"], scores["readers_annotated"]) == (0, 1)
    perfect = nodule_metrics(block(0, 1)[None], block(0, 1)[None], 1.0)
    assert [perfect[name] for name in ("ged_3d", "volume_crps", "volume_error", "readers_covered")] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("samples", "readers", "voxel", "message"),
    [
        (EMPTY[None, 0], EMPTY[None], 1.0, r"samples must be bool \(volumes, slices, H, W\), got bool \(1, 8, 8\)"),
        (EMPTY[None, :0], EMPTY[None, :0], 1.0, r"samples must be bool .* got bool \(1, 0, 8, 8\)"),
        (EMPTY[None, :2], EMPTY[None], 1.0, "volumes must have one size"),
        (EMPTY[:0, None], EMPTY[None, :1], 1.0, "at least one mask"),
        (EMPTY[None].astype(float), EMPTY[None], 1.0, "samples must be a bool array"),
        (EMPTY[None], EMPTY[None], 1.0, "all readers' volumes are empty"),
        (EMPTY[None], EMPTY[None], 0.0, "voxel_mm3 must be a positive number, got 0.0"),
    ],
)
def test_impossible_volumes_are_refused(samples, readers, voxel, message):
    with pytest.raises(ValueError, match=message):
        nodule_metrics(samples, readers, voxel)


def nodule(covered: int, annotated: int, value: float) -> dict:
    return dict.fromkeys(NODULE_MEANS, value) | {"readers_covered": covered, "readers_annotated": annotated}


def test_coverage_is_pooled_over_nodules_and_resampled_by_patient():
    nodules, patients = [nodule(4, 4, 0.0), nodule(0, 1, 1.0), nodule(1, 1, 0.5)], ["a", "b", "b"]
    result = summarize_nodules([nodules], patients)
    assert (result["count"], result["num_patients"]) == (3, 2)
    assert result["ged_3d"]["mean"] == 0.5
    assert result["coverage_90"]["mean"] == pytest.approx(5 / 6, abs=1e-6)  # the mean of the ratios would be 2/3
    # Resamples are aa, ab and bb: coverage 1, 5/6 and 1/2
    assert result["coverage_90"]["ci95"] == [0.5, 1.0]
    assert set(result) == {"count", "num_patients", *NODULE_METRICS}


def test_summary_of_nodules_over_seeds_and_of_none():
    runs = [[nodule(1, 1, 1.0)], [nodule(0, 1, 3.0)]]
    result = summarize_nodules(runs, ["a"])
    assert result["volume_crps"] == {"mean": 2.0, "ci95": [2.0, 2.0], "std": pytest.approx(2**0.5, abs=1e-6)}
    assert result["coverage_90"]["mean"] == 0.5
    assert summarize_nodules([[]], [])["ged_3d"] == {"mean": None, "ci95": [None, None]}
    with pytest.raises(ValueError, match="got \\[1, 1\\] nodules and 2 patients"):
        summarize_nodules(runs, ["a", "b"])
