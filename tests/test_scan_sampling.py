"""Samples of a nodule: one reader through all slices, and presence apart from extent."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from small_scans import hounsfield, write_series
from tiny import SIZE, tiny_model

from probabilistic_sam import ProbabilisticSamProcessor, scan_sampling
from probabilistic_sam.baselines.ellipse import EllipseConfig, EllipseModel
from probabilistic_sam.errors import UserError
from probabilistic_sam.scan_files import FORMATS, measures, result_line, summary_row, write_scan_result
from probabilistic_sam.scan_sampling import SampledScan, longest_diameter, sample_scan
from probabilistic_sam.scans import open_scan

BOX = [12, 10, 26, 24]


@pytest.fixture
def scan(tmp_path):
    write_series(tmp_path, hounsfield((12, 40, 48)))
    with open_scan(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def processor():
    return ProbabilisticSamProcessor(SIZE, crop_size=24)


def test_equal_slices_have_equal_samples(tmp_path, processor, monkeypatch):
    write_series(tmp_path, hounsfield((1, 40, 48)).repeat(3, 0))
    monkeypatch.setattr(scan_sampling, "BATCH_SLICES", 2)
    with open_scan(tmp_path) as scan:
        sampled = sample_scan(tiny_model(), processor, scan, BOX, (0, 2), 6)
    assert sampled.masks.shape == (6, 3, 24, 24) and sampled.corner == (5, 7)
    assert sampled.masks.any()
    for index in range(1, 3):
        np.testing.assert_array_equal(sampled.masks[:, index], sampled.masks[:, 0])
        np.testing.assert_allclose(sampled.mean[index], sampled.mean[0], atol=1e-5)


def prior_means(model, processor, scan, slices):
    values = scan.read(*slices)
    inputs = processor(images=list(values), input_boxes=[[BOX]] * len(values))
    with torch.no_grad():
        return model.sample(**inputs, num_samples=1).prior_mean[:, 0, 0]


def with_presence(mean):
    """A tiny model with all masks full and a presence mean that is shifted by `mean`."""
    model = tiny_model()
    with torch.no_grad():
        model.prior.lin2.bias[0] += mean
    return model


def test_presence_is_that_of_the_most_certain_slice_and_every_sample_given_presence_has_the_nodule(scan, processor):
    model = with_presence(-1)
    means = prior_means(model, processor, scan, (0, 4))
    state = torch.get_rng_state()
    sampled = sample_scan(model, processor, scan, BOX, (0, 4), 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled.presence == pytest.approx(norm.cdf(float(means.max())), abs=1e-5)
    assert 0 < sampled.presence < 0.9 and means.std() > 0.01
    assert sampled.masks.any(axis=(2, 3))[:, means.argmax()].all()
    every = sample_scan(model, processor, scan, BOX, (0, 4), 16, given_presence=False)
    assert every.masks.any(axis=(1, 2, 3)).mean() == pytest.approx(sampled.presence, abs=1 / 16)
    # A slice is empty where its mean plus the noise is not positive
    expected = 1 - norm.cdf(means.double().numpy()) / norm.cdf(float(means.max()))
    np.testing.assert_allclose(sampled.empty_shares, expected, atol=1.5 / 16)


def test_samples_do_not_depend_on_batches_and_repeat_with_the_seed(scan, processor, monkeypatch):
    model = tiny_model()
    first = sample_scan(model, processor, scan, BOX, (2, 4), 2, seed=3)
    monkeypatch.setattr(scan_sampling, "BATCH_SLICES", 2)
    again = sample_scan(model, processor, scan, BOX, (2, 4), 2, seed=3)
    np.testing.assert_array_equal(first.masks, again.masks)
    other = sample_scan(model, processor, scan, BOX, (2, 4), 2, seed=4)
    assert (first.mean != other.mean).any()


def test_a_window_beyond_the_edge_is_clipped(scan, processor):
    sampled = sample_scan(tiny_model(), processor, scan, [0, 0, 10, 8], (0, 1), 3)
    assert sampled.corner == (0, 0) and sampled.masks.shape == (3, 2, 16, 17)


def test_a_model_without_presence_gives_the_samples_that_are_not_empty(scan, processor):
    torch.manual_seed(0)
    model = EllipseModel(EllipseConfig(image_size=SIZE)).eval()
    with torch.no_grad():
        model.probability_of_empty.fill_(0.4)
    every = sample_scan(model, processor, scan, BOX, (0, 2), 8, given_presence=False)
    given = sample_scan(model, processor, scan, BOX, (0, 2), 8)
    outlined = every.masks.any(axis=(1, 2, 3))
    assert len(every.masks) == 8 and 0 < given.presence == outlined.mean() < 1
    np.testing.assert_array_equal(given.masks, every.masks[outlined])
    np.testing.assert_allclose(given.mean, given.masks.mean(axis=0), atol=1e-6)


def test_a_lower_threshold_gives_larger_masks(scan, processor):
    model = tiny_model()
    half, low = (sample_scan(model, processor, scan, BOX, (0, 1), 8, threshold=value).masks for value in (0.5, 0.2))
    assert (low >= half).all() and low.sum() > half.sum()


@pytest.mark.parametrize("box", [BOX, [0, 0, 10, 8]])
def test_masks_lie_where_those_of_the_slice_alone_lie(scan, processor, box):
    model, (_, height, width) = tiny_model(), scan.shape
    sampled = sample_scan(model, processor, scan, box, (1, 1), 4, given_presence=False)
    inputs = processor(list(scan.read(1, 1)), input_boxes=[[box]])
    logits = model.sample(**inputs, num_samples=4, generator=torch.Generator().manual_seed(0)).pred_masks
    (result,) = processor.post_process_samples(logits, inputs["windows"], inputs["original_sizes"])
    whole = np.zeros((4, height, width), bool)
    (top, left), (rows, columns) = sampled.corner, sampled.masks.shape[2:]
    whole[:, top : top + rows, left : left + columns] = sampled.masks[:, 0]
    np.testing.assert_array_equal(whole, result["masks"].numpy())
    assert whole.any()


def test_too_many_samples_and_prompts_outside_are_refused(scan, processor, monkeypatch):
    monkeypatch.setattr(scan_sampling, "MAX_SAMPLED_VOXELS", 10 * 2 * 24 * 24)
    for box, slices, count, message in (
        (BOX, (0, 1), 11, "at most 10 samples"),
        ([0, 0, 60, 9], (0, 1), 1, "reaches outside the image"),
        (BOX, (0, 12), 1, "outside the scan"),
    ):
        with pytest.raises(UserError, match=message):
            sample_scan(tiny_model(), processor, scan, box, slices, count)


def test_volumes_and_diameters_of_boxes():
    masks = np.zeros((2, 3, 8, 8), bool)
    masks[0, 0, 1:4, 2:6] = True  # 3 rows of 4 pixels: 3 x 0.5 mm by 4 x 1 mm
    masks[0, 2, 5, 5] = True
    sampled = SampledScan(masks, masks.mean(0), 1.0, True, (0, 0, 8, 8), (0, 2), (0, 0), (2.0, 0.5, 1.0), 0, 0.5)
    np.testing.assert_allclose(sampled.volumes_mm3, [13 * 1.0, 0])
    np.testing.assert_allclose(sampled.diameters_mm, [np.hypot(1.5, 4), 0])
    np.testing.assert_allclose(sampled.empty_shares, [0.5, 1, 0.5])


def test_longest_diameter_is_between_points_of_the_outline():
    assert longest_diameter(np.ones((1, 1), bool), (1, 1)) == pytest.approx(np.sqrt(2))
    two = np.zeros((4, 9), bool)
    two[0, 0] = two[3, 8] = True  # two parts: from one corner to the opposite one
    assert longest_diameter(two, (1, 1)) == pytest.approx(np.hypot(4, 9))
    y, x = np.mgrid[:61, :61]
    disc = np.hypot(y - 30, x - 30) <= 20
    assert longest_diameter(disc, (0.5, 0.5)) == pytest.approx(20.5, abs=0.3)


def test_quantiles_of_all_readers_count_those_who_do_not_outline_the_nodule_as_zero():
    result = measures(np.linspace(0, 100, 101), np.full(101, 8.0), presence=0.5)
    given = result["volume_mm3_given_presence"]
    assert given["mean"] == 50 and given["quantiles"] == {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95}
    assert given["samples"] == list(range(101))
    # Half of the readers are at 0; the level .75 of all is the median of the others, .95 their level .9
    every = {"0.05": 0, "0.25": 0, "0.5": 0, "0.75": 50, "0.95": 90}
    assert result["volume_mm3"] == {"mean": 25, "quantiles": every}
    assert result["longest_diameter_mm_given_presence"]["quantiles"]["0.05"] == 8
    assert result["longest_diameter_mm"]["quantiles"] == {"0.05": 0, "0.25": 0, "0.5": 0, "0.75": 8, "0.95": 8}


def test_below_a_presence_of_one_percent_no_extent_is_reported(scan, processor, tmp_path):
    sampled = sample_scan(with_presence(-20), processor, scan, BOX, (0, 2), 4)
    assert sampled.presence < 0.01 and sampled.masks.shape == (0, 3, 24, 24) and not sampled.mean.any()
    (tmp_path / "out").mkdir()
    result = write_scan_result(tmp_path / "out", scan, sampled, FORMATS, "model")
    assert result["volume_mm3_given_presence"] is result["longest_diameter_mm_given_presence"] is None
    assert result["volume_mm3"]["mean"] is None and result["volume_mm3"]["quantiles"]["0.95"] == 0
    assert result_line(result) == "presence below 1 %; too few readers would outline a nodule to say how large"
    assert set(result["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"result.json"}
    assert not any("samples" in name for name in result["files"]) and "" in summary_row(result)
