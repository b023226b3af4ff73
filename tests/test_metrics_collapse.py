"""The state of a latent space, with numbers computed by hand."""

import json

import numpy as np
import pytest

from probabilistic_sam.metrics import slice_collapse, summarize_collapse


def masks(*rows):
    """Masks of one row of pixels each."""
    return np.array(rows, dtype=bool)[:, None]


def make_slice(kl, means, reconstructions, targets, annotated=None):
    arrays = (np.array(kl, dtype=np.float32), np.array(means, dtype=np.float32))
    annotated = np.any(targets, axis=1) if annotated is None else np.array(annotated)
    return slice_collapse(*arrays, masks(*reconstructions), masks(*targets), annotated)


# Two readers, three coordinates; in the first slice the mask of the second reader is empty
FIRST = make_slice(
    kl=[[0.5, 2, 0], [1.5, 9, 9]], means=[[1, 0, 5], [-1, 7, 7]],
    reconstructions=[[1, 1, 0, 0], [1, 1, 1, 1]], targets=[[1, 1, 1, 1], [0, 0, 0, 0]],
)  # fmt: skip
SECOND = make_slice(
    kl=[[0, 4, 0], [0, 2, 0]], means=[[1, 2, 5], [1, 4, 5.1]],
    reconstructions=[[1, 0, 0, 0], [0, 0, 0, 0]], targets=[[1, 0, 0, 0], [1, 0, 0, 0]],
)  # fmt: skip


def test_one_slice():
    assert FIRST["annotated"].tolist() == [True, False]
    assert FIRST["iou"].tolist() == [0.5]
    assert SECOND["iou"].tolist() == [1.0, 0.0]


def test_summary_counts_outlines_of_annotated_masks_only():
    state = summarize_collapse([FIRST, SECOND])
    # Coordinate 0: (0.5 + 1.5) / 2 and 0. Coordinate 1: 2 and (4 + 2) / 2; the 9 of the empty mask does not count.
    assert state["kl_per_dimension"] == [0.5, 2.5, 0.0]
    # Coordinate 0: 1, -1, 1, 1; coordinate 1: 0, 2, 4; coordinate 2: 5, 5, 5.1
    assert state["posterior_mean_variance"] == pytest.approx([0.75, 8 / 3, 0.01 * 2 / 9], abs=1e-6)
    assert state["active_outline_units"] == 1  # coordinate 1; the presence does not count
    assert summarize_collapse([FIRST, SECOND], has_presence=False)["active_outline_units"] == 2
    assert state["posterior_iou"] == 0.5
    assert json.loads(json.dumps(state, allow_nan=False)) == state


def test_mask_that_vanishes_when_it_is_resized_is_annotated():
    targets = [[0, 0], [0, 0], [0, 0]]  # the first two readers annotated a pixel, which is lost at this resolution
    state = make_slice(np.ones((3, 2)), np.ones((3, 2)), [[0, 0], [1, 0], [0, 0]], targets, [True, True, False])
    assert state["annotated"].tolist() == [True, True, False]
    assert state["iou"].tolist() == [1, 0]  # both masks are empty; only one is
    assert summarize_collapse([state])["posterior_iou"] == 0.5


def test_collapsed_posterior_has_no_active_unit_though_it_varies_with_the_image():
    """Its mean is that of the prior, which depends on the image."""
    slices = [
        make_slice(np.zeros((2, 3)), np.full((2, 3), mean), [[1, 0], [1, 0]], [[1, 0], [0, 1]]) for mean in (-1, 1)
    ]
    state = summarize_collapse(slices)
    assert (state["active_outline_units"], state["kl_per_dimension"]) == (0, [0, 0, 0])
    assert state["posterior_mean_variance"] == [1, 1, 1]


def test_outline_is_unknown_if_all_masks_are_empty():
    nobody = make_slice([[0.25, 1], [0.75, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]])
    assert summarize_collapse([nobody]) == {
        "kl_per_dimension": [0.5, None],
        "posterior_mean_variance": [0.25, None],
        "active_outline_units": None,
        "posterior_iou": None,
    }


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="must have one shape"):
        make_slice(np.zeros((2, 3)), np.zeros((2, 2)), [[1]] * 2, [[1]] * 2)
    with pytest.raises(ValueError, match=r"must be \(R, h, w\)"):
        make_slice(np.zeros((2, 3)), np.zeros((2, 3)), [[1]], [[1]])
    with pytest.raises(ValueError, match=r"annotated must be bool \(1,\), got int64 \(1,\)"):
        make_slice(np.zeros((1, 3)), np.zeros((1, 3)), [[1]], [[1]], [1])
    with pytest.raises(ValueError, match="no slice"):
        summarize_collapse([])
