"""Nodules as volumes: grouping of rows, geometry, and the prompt of all slices."""

import math

import datasets
import numpy as np
import pytest

from probabilistic_sam.data import NODULE_BOX, make_prompt, nodule_prompt, row_seed
from probabilistic_sam.data.format import FEATURES, encode_png, image_row
from probabilistic_sam.data.volumes import group_nodules, stack_masks
from probabilistic_sam.errors import UserError

SIDE = 32


def make_slice(slice_index: int, z_mm: float | None, masks: np.ndarray | None = None, **changes) -> dict:
    masks = np.ones((2, SIDE, SIDE), bool) if masks is None else masks
    columns = {"patient_id": "p", "scan_id": 3, "nodule_id": 1, "slice_index": slice_index, "z_mm": z_mm}
    columns |= {"pixel_spacing_mm": 0.5, "slice_thickness_mm": 3.0, "crop_row": 7, "crop_col": 9, "source": "slices"}
    png = encode_png(np.zeros((SIDE, SIDE), np.uint8))
    return image_row(png, [encode_png(mask) for mask in masks], "i", ["m"] * len(masks), **columns | changes)


def make_dataset(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row[name] for name in FEATURES} for row in rows], features=FEATURES)


def test_slices_are_grouped_in_order_of_z():
    dataset = make_dataset(
        make_slice(2, 4.0),
        make_slice(0, -1.0),
        make_slice(0, 0.0, patient_id="q", scan_id=1, nodule_id=0),
        make_slice(1, 1.0),
        make_slice(0, -1.0, nodule_id=0),
    )
    nodules, left_out = group_nodules(dataset)
    assert left_out == 0
    assert [(nodule.patient_id, nodule.nodule_id) for nodule in nodules] == [("p", 0), ("p", 1), ("q", 0)]
    assert [nodule.rows for nodule in nodules] == [(4,), (1, 3, 0), (2,)]
    # Distances 2 and 3 mm, median 2.5; a single slice has its thickness
    assert [nodule.slice_distance_mm for nodule in nodules] == [3.0, 2.5, 3.0]
    assert nodules[1].voxel_mm3 == 0.5 * 0.5 * 2.5


@pytest.mark.parametrize("column", ["z_mm", "pixel_spacing_mm", "crop_row", "crop_col", "scan_id", "nodule_id"])
def test_nodules_without_geometry_are_left_out_and_counted(column):
    known = [make_slice(0, 0.0, nodule_id=2), make_slice(1, 1.0, nodule_id=2)]
    nodules, left_out = group_nodules(make_dataset(*known, make_slice(0, 0.0, nodule_id=5, **{}) | {column: None}))
    assert ([nodule.nodule_id for nodule in nodules], left_out) == ([2], 1)


def test_a_single_slice_of_unknown_thickness_is_left_out():
    assert group_nodules(make_dataset(make_slice(0, 0.0, slice_thickness_mm=None))) == ([], 1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (make_slice(1, 1.0, crop_col=10), "p scan 3 nodule 1: its slices have crop_col 9 and 10; accepted: one value"),
        (make_slice(1, 1.0, pixel_spacing_mm=0.75), "have pixel_spacing_mm 0.5 and 0.75; accepted: one value"),
        (
            make_slice(1, math.nan),
            "p scan 3 nodule 1: pixel_spacing_mm is 0.5, the distance of its slices nan mm; acc",
        ),
        (make_slice(1, 0.0), "p scan 3 nodule 1: two slices at one position; accepted"),
    ],
)
def test_slices_that_are_no_volume_are_refused(second, message):
    with pytest.raises(UserError, match=message):
        group_nodules(make_dataset(make_slice(0, 0.0), second))


@pytest.mark.parametrize("column", ["pixel_spacing_mm", "slice_thickness_mm"])
def test_a_volume_is_positive(column):
    with pytest.raises(UserError, match=r"p scan 3 nodule 1: .* mm; accepted: positive numbers"):
        group_nodules(make_dataset(make_slice(0, 0.0, **{column: -1.0})))


def test_masks_and_box_are_those_of_all_slices():
    low, high = np.zeros((2, 2, SIDE, SIDE), bool)
    low[0, 4:10, 6:12] = True
    high[1, 8:14, 5:9] = True
    dataset = make_dataset(make_slice(5, 2.0, high), make_slice(4, 1.0, low))
    (nodule,), _ = group_nodules(dataset)
    masks = stack_masks(nodule, dataset.select(nodule.rows))
    np.testing.assert_array_equal(masks, np.stack([low, high], axis=1))  # (readers, slices, H, W)
    union = masks.any(axis=(0, 1))

    first = dataset[1]
    assert nodule.rows == (1, 0)
    rng = np.random.default_rng(row_seed(first, NODULE_BOX))
    box = nodule_prompt(first, union)
    assert box == make_prompt(union[None], "union_box", rng)
    # Tight box x 5..12, y 4..14; a side moves by at most a tenth of the length + 1.5 px
    assert (np.abs(np.array(box["input_boxes"]) - [5, 4, 12, 14]) < [2.2, 2.5, 2.2, 2.5]).all()
    assert box != nodule_prompt(make_dataset(make_slice(3, 1.0, low))[0], union)  # other seed


def test_a_reader_who_is_absent_on_some_slices_is_refused():
    dataset = make_dataset(make_slice(0, 0.0), make_slice(1, 1.0, np.ones((3, SIDE, SIDE), bool)))
    (nodule,), _ = group_nodules(dataset)
    with pytest.raises(UserError, match="p scan 3 nodule 1: reader 2 is absent on some slices; accepted: the same"):
        stack_masks(nodule, dataset.select(nodule.rows))


def test_readers_of_a_nodule_are_told_apart_by_name_or_place():
    (nodule,), _ = group_nodules(make_dataset(make_slice(0, 0.0), make_slice(1, 1.0)))
    a, b, c = np.eye(3, dtype=bool)[:, None]  # masks of one row, each with another pixel

    def rows(*slices):
        return [{"masks": masks, "reader_ids": names} for masks, names in slices]

    stacked = stack_masks(nodule, rows(([a, b], ["ann", "bob"]), ([b, a], ["bob", "ann"])))
    np.testing.assert_array_equal(stacked, [[a, a], [b, b]])
    stacked = stack_masks(nodule, rows(([a, None, c], ["ann", "bob", "cy"]), ([c, a], ["cy", "ann"])))
    np.testing.assert_array_equal(stacked, [[a, a], [c, c]])
    stacked = stack_masks(nodule, rows(([a, None, c], None), ([a, None, c], None)))
    np.testing.assert_array_equal(stacked, [[a, a], [c, c]])
    for slices, reader in (
        ((([a, c], ["ann", "cy"]), ([a, b], ["ann", "bob"])), "bob"),
        ((([a, None, c], None), ([a, b, None], None)), "1"),
    ):
        with pytest.raises(UserError, match=f"p scan 3 nodule 1: reader {reader} is absent on some slices"):
            stack_masks(nodule, rows(*slices))
    for names in (["ann"], ["ann", "ann"]):
        with pytest.raises(UserError, match=r"reader_ids .* of 2 masks; accepted: a different name for each mask"):
            stack_masks(nodule, rows(([a, b], names), ([a, b], names)))
