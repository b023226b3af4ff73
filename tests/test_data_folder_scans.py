"""Source `folder` with scans: axial slices of NIfTI and DICOM with one mask volume per reader, and their objects."""

import importlib.util
import re

import nibabel
import numpy as np
import pytest
from datasets import load_dataset
from small_scans import SHAPE, SPACING, STEP, hounsfield, write_nifti, write_series
from test_data_folder import TRAIN, VALIDATION, build  # noqa: F401

from probabilistic_sam.data.folder import FolderSource
from probabilistic_sam.data.format import decode_image, decode_masks, load_split
from probabilistic_sam.data.volumes import group_nodules, stack_masks
from probabilistic_sam.errors import UserError

SQUARE = np.diag([-0.5, -0.5, 2.0, 1.0])  # RAS: columns to the left, rows to the back, slices to the head
NAMES = (TRAIN[0], VALIDATION[0])


def block(slices, rows, columns, shape=SHAPE, value=1):
    """A mask (slices, rows, columns) with a block."""
    mask = np.zeros(shape, dtype=np.uint8)
    mask[slice(*slices), slice(*rows), slice(*columns)] = value
    return mask


def write(path, volume, affine=SQUARE):
    """Write a volume (slices, rows, columns) as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_nifti(path, volume.transpose(2, 1, 0), affine)


def make_scans(root, names=NAMES):
    """In each scan one reader annotated slices 1 to 3, the other slice 2."""
    for name in names:
        write(root / f"scans/{name}.nii.gz", hounsfield().astype(np.int16))
        write(root / f"masks/ann/{name}.nii.gz", block((1, 4), (5, 9), (7, 12)))
        write(root / f"masks/bob/{name}.nii", block((2, 3), (6, 9), (8, 11), value=255))
    return root


def rows_of(root, **options):
    return {(row["image_id"], row["nodule_id"], row["slice_index"]): row for row in FolderSource(root, **options)}


def test_annotated_slices_become_rows(tmp_path):
    rows = rows_of(make_scans(tmp_path))
    assert list(rows) == [(name, 1, index) for name in NAMES for index in (1, 2, 3)]
    for (name, _, index), row in rows.items():
        np.testing.assert_array_equal(decode_image(row), hounsfield()[index] + 1024)
        expected = [block((1, 4), (5, 9), (7, 12))[index], block((2, 3), (6, 9), (8, 11))[index]]
        np.testing.assert_array_equal(decode_masks(row), np.array(expected) > 0)
        known = {key: value for key, value in row.items() if value is not None and key not in ("image", "masks")}
        del known["pixels_sha256"]
        assert known == {
            "patient_id": name,
            "scan_id": NAMES.index(name) + 1,
            "nodule_id": 1,
            "slice_index": index,
            "image_id": name,
            "reader_ids": ["ann", "bob"],
            "z_mm": 2.0 * index,
            "pixel_spacing_mm": 0.5,
            "slice_thickness_mm": 2.0,
            "crop_row": 0,
            "crop_col": 0,
            "num_nonempty": 1 + (index == 2),
            "source": "folder",
        }


@pytest.mark.parametrize(
    "affine, flipped",  # axes (slices, rows, columns) that the file stores the other way round
    [(np.diag([0.5, 0.5, -2.0, 1.0]), (0, 1, 2)), (np.diag([0.5, -0.5, 2.0, 1.0]), (2,))],
)
def test_orientations_of_the_file_do_not_matter(tmp_path, affine, flipped):
    volume, mask = hounsfield().astype(np.int16), block((1, 4), (5, 9), (7, 12))
    write(make_scans(tmp_path) / f"scans/{TRAIN[0]}.nii.gz", volume, affine)
    for reader, name in (("ann", "nii.gz"), ("bob", "nii")):
        write(tmp_path / f"masks/{reader}/{TRAIN[0]}.{name}", mask, affine)
    rows = {key: row for key, row in rows_of(tmp_path).items() if key[0] == TRAIN[0]}
    assert len(rows) == 3
    for (_, _, index), row in rows.items():
        np.testing.assert_array_equal(decode_image(row), np.flip(volume, flipped)[index] + 1024)
        np.testing.assert_array_equal(decode_masks(row)[0], np.flip(mask, flipped)[index] > 0)


def write_slice(path, values, unit="mm", sides=(0.5, 0.5)):
    """Write an array in the order of the file (columns, rows, ...) as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, None)
    zooms = iter(sides)
    image.header.set_zooms([1.0 if length == 1 else next(zooms, 1.0) for length in values.shape])
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.arange(48, dtype=np.int16).reshape(8, 6), np.arange(48)),
        (np.arange(48, dtype=np.int16).reshape(8, 6, 1) - 1000, np.arange(48) + 24),  # Hounsfield units
        (np.arange(48, dtype=np.float32).reshape(8, 6, 1, 1) / 94, np.round(np.arange(48) * (65535 / 47))),
        (np.full((1, 8, 6), 0.5), np.zeros(48)),
    ],
    ids=["whole", "hounsfield", "fractions", "constant"],
)
def test_nifti_of_one_slice_is_an_image(tmp_path, values, expected):
    mask = np.zeros((8, 6, 1), np.uint8)
    mask[2:5, 1:3] = 1  # columns 2 to 4, rows 1 and 2
    for name in NAMES:
        write_slice(tmp_path / f"images/{name}.nii.gz", values)
        write_slice(tmp_path / f"masks/ann/{name}.nii", mask)
        write_slice(tmp_path / f"masks/bob/{name}.nii.gz", np.zeros((8, 6), np.float32))
    for row in FolderSource(tmp_path):
        np.testing.assert_array_equal(decode_image(row), expected.reshape(8, 6).T)
        ann, bob = decode_masks(row)
        assert ann[1:3, 2:5].all() and ann.sum() == 6 and not bob.any()
        assert (row["pixel_spacing_mm"], row["nodule_id"], row["reader_ids"]) == (0.5, None, ["ann", "bob"])
    write_slice(tmp_path / f"images/{TRAIN[0]}.nii.gz", values, unit="unknown")
    write_slice(tmp_path / f"images/{VALIDATION[0]}.nii.gz", values, sides=(0.5, 0.6))
    assert {row["pixel_spacing_mm"] for row in FolderSource(tmp_path)} == {None}


@pytest.mark.parametrize(
    "image, mask, message",
    [
        (np.zeros((8, 6, 2)), np.zeros((8, 6)), "has the shape 8 x 6 x 2; accepted: one slice"),
        (np.full((8, 6), np.nan), np.zeros((8, 6)), "holds NaN or infinite values; accepted: finite values"),
        (np.zeros((8, 6), np.complex64), np.zeros((8, 6)), "holds complex64; accepted: integer or floating-point"),
        (np.zeros((8, 6)), np.full((8, 6), 2.0), "mask has values 2; accepted: "),
        (np.zeros((8, 6)), np.zeros((8, 6, 2)), "has the shape 8 x 6 x 2; accepted: one slice"),
        (np.zeros((8, 6)), np.zeros((6, 8)), "mask is 6x8 pixels; accepted: 8x6, the size of its image"),
        (b"no NIfTI", np.zeros((8, 6)), "cannot be read"),
        (np.zeros((8, 6)), b"png", "accepted: NIfTI masks of NIfTI images, PNG or TIFF of others"),
    ],
)
def test_nifti_that_is_no_image_is_refused(tmp_path, image, mask, message):
    for name in NAMES:
        for place, content in (("images", image), ("masks/ann", mask)):
            path = tmp_path / place / (name + (".png" if isinstance(content, bytes) and content == b"png" else ".nii"))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                write_slice(path, content)
    with pytest.raises(UserError) as error:
        list(FolderSource(tmp_path))
    assert (
        message in str(error.value)
        and NAMES[0] in str(error.value)
        and str(error.value).count(f"{NAMES[0]}.nii:") <= 1
    )


def test_absent_and_empty_readers_and_scans(tmp_path):
    make_scans(tmp_path)
    (tmp_path / f"masks/bob/{TRAIN[0]}.nii").unlink()
    write(tmp_path / f"masks/bob/{VALIDATION[0]}.nii", np.zeros(SHAPE, np.uint8))
    make_scans(tmp_path, [TRAIN[1]])
    for path in tmp_path.glob(f"masks/*/{TRAIN[1]}.*"):
        write(path, np.zeros(SHAPE, np.uint8))
    notes = []
    rows = list(FolderSource(tmp_path, notes=notes))
    assert {(row["patient_id"], *row["reader_ids"]) for row in rows} == {
        (TRAIN[0], "ann"),
        (VALIDATION[0], "ann", "bob"),
    }
    assert {len(row["masks"]) for row in rows if row["patient_id"] == VALIDATION[0]} == {2}
    assert [(note.kind, note.number) for note in notes] == [("scans without any mask left out", 1)]
    assert TRAIN[1] in notes[0].detail


def test_components_are_objects_in_3d(tmp_path):
    make_scans(tmp_path)
    # One object on slices 1 and 2, which touch at a corner only, and another on slices 2 to 4
    mask = block((1, 2), (5, 9), (7, 12)) | block((2, 3), (9, 12), (12, 15)) | block((2, 5), (20, 30), (30, 40))
    write(tmp_path / f"masks/ann/{TRAIN[0]}.nii.gz", mask)
    write(tmp_path / f"masks/bob/{TRAIN[0]}.nii", block((3, 4), (20, 26), (30, 40)))
    rows = {key[1:]: row for key, row in rows_of(tmp_path, objects="components").items() if key[0] == TRAIN[0]}
    assert sorted(rows) == [(1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]
    np.testing.assert_array_equal(decode_masks(rows[1, 2])[0], block((2, 3), (9, 12), (12, 15))[2] > 0)
    np.testing.assert_array_equal(decode_masks(rows[2, 2])[0], block((2, 5), (20, 30), (30, 40))[2] > 0)
    assert rows[2, 3]["num_nonempty"] == 2 and rows[1, 2]["num_nonempty"] == 1
    source = FolderSource(tmp_path, objects="components")
    assert len(list(source)) == 8 and max(source.sizes) == 10


def test_numbers_of_objects_are_unique_within_a_group(tmp_path):
    make_scans(tmp_path, [*NAMES, "second"])
    lines = [f"{TRAIN[0]},one,train", "second,one,train", f"{VALIDATION[0]},two,validation"]
    (tmp_path / "table.csv").write_text("\n".join(["id,group,split", *lines]))
    source = FolderSource(tmp_path)
    keys = {(row["patient_id"], row["image_id"], row["scan_id"], row["nodule_id"]) for row in source}
    assert {row["nodule_id"] for row in source} == {1, 2}  # also when it is read again
    assert keys == {("one", TRAIN[0], 1, 1), ("two", VALIDATION[0], 2, 1), ("one", "second", 3, 2)}


def test_dicom_series_with_masks_in_nifti(tmp_path):
    make_scans(tmp_path)
    (tmp_path / f"scans/{TRAIN[0]}.nii.gz").unlink()
    write_series(tmp_path / f"scans/{TRAIN[0]}", hounsfield())
    affine = np.diag([-SPACING[1], -SPACING[0], STEP, 1.0])
    affine[:3, 3] = (20, 30, 100)  # of the series, in RAS
    for reader, name in (("ann", "nii.gz"), ("bob", "nii")):
        write(tmp_path / f"masks/{reader}/{TRAIN[0]}.{name}", block((1, 4), (5, 9), (7, 12)), affine)
    rows = {key[2]: row for key, row in rows_of(tmp_path).items() if key[0] == TRAIN[0]}
    assert sorted(rows) == [1, 2, 3]
    np.testing.assert_array_equal(decode_image(rows[2]), hounsfield()[2] + 1024)
    np.testing.assert_array_equal(decode_masks(rows[2])[0], block((1, 4), (5, 9), (7, 12))[2] > 0)
    assert rows[2]["z_mm"] == pytest.approx(100 + 2 * STEP)
    assert rows[2]["pixel_spacing_mm"] is None  # 0.7 x 0.8 mm


def test_a_folder_of_several_series_is_refused(tmp_path):
    make_scans(tmp_path)
    (tmp_path / f"scans/{TRAIN[0]}.nii.gz").unlink()
    for number in (1, 2):
        write_series(tmp_path / f"scans/{TRAIN[0]}" / str(number), hounsfield(), series=f"1.2.{number}")
    with pytest.raises(UserError, match=f"{TRAIN[0]}: holds 2 series; accepted: one series per scan"):
        list(FolderSource(tmp_path))


@pytest.mark.parametrize(
    "values, expected",
    [
        (lambda hu: hu / 1000, lambda low, high, v: (v - low) / (high - low) * 65535),  # fractions
        (lambda hu: hu - 2000, lambda low, high, v: v - low),  # below air
        (lambda hu: (hu + 1000) * 40, lambda low, high, v: (v - low) / (high - low) * 65535),  # up to 80,000
        (lambda hu: hu + 1000, lambda low, high, v: v),
        (lambda hu: hu * 0 + 0.5, lambda low, high, v: v * 0),  # constant, with a fraction
    ],
)
def test_grey_values_fit_in_16_bits(tmp_path, values, expected):
    make_scans(tmp_path)
    volume = values(hounsfield().astype(np.float64)).astype(np.float32)
    write(tmp_path / f"scans/{TRAIN[0]}.nii.gz", volume)
    low, high = volume[1:4].min(), volume[1:4].max()  # of the annotated slices
    for (name, _, index), row in rows_of(tmp_path).items():
        if name == TRAIN[0]:
            np.testing.assert_allclose(decode_image(row), expected(low, high, volume[index]), atol=0.51)


def test_blocks_do_not_change_the_rows(tmp_path, monkeypatch):
    from probabilistic_sam.data import folder_scans

    expected = rows_of(make_scans(tmp_path))
    monkeypatch.setattr(folder_scans, "BLOCK_VOXELS", 2 * 40 * 48)
    assert rows_of(tmp_path) == expected


def test_build_has_nodules_as_volumes(tmp_path, build):  # noqa: F811
    code, out, _ = build("--input", make_scans(tmp_path / "in"), "--output", tmp_path / "out")
    assert code == 0 and "train 1 patients, 3 slices; validation 1 patients, 3 slices" in out
    nodules, left_out = group_nodules(load_split(tmp_path / "out", "validation"))
    assert left_out == 0 and [(len(item.rows), item.voxel_mm3) for item in nodules] == [(3, 0.5)]
    rows = load_split(tmp_path / "out", "validation")
    masks = stack_masks(nodules[0], [rows[index] for index in nodules[0].rows])
    np.testing.assert_array_equal(masks[0], block((1, 4), (5, 9), (7, 12))[1:4] > 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "one row per annotated axial slice of each scan" in card and "name of the scan" in card
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 3


def shifted(volume_path, affine):
    return lambda root: write(root / volume_path, block((1, 4), (5, 9), (7, 12)), affine)


MOVED = SQUARE.copy()
MOVED[0, 3] = 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: (root / "images").mkdir(), "has both images and scans; accepted: images/ID.EXT and"),
        (shifted(f"masks/ann/{TRAIN[0]}.nii.gz", MOVED), "its voxels lie up to 0.2 mm beside those of"),
        (shifted(f"masks/ann/{TRAIN[0]}.nii.gz", np.diag([-0.5, -0.5, 2.5, 1])), "lie up to 2.5 mm beside"),
        (
            lambda root: write(root / f"masks/ann/{TRAIN[0]}.nii.gz", block((0, 1), (0, 1), (0, 1), (5, 40, 48))),
            "5 x 40 x 48 slices, rows and columns; accepted: 6 x 40 x 48, those of",
        ),
        (
            lambda root: write(root / f"masks/ann/{TRAIN[0]}.nii.gz", block((1, 2), (5, 9), (7, 12)) * 2),
            "mask with the values 0, 2; accepted: 0, and 1 or 255 where the reader annotated, one structure at a time",
        ),
        (lambda root: (root / f"masks/ann/{TRAIN[0]}.nii.gz").write_bytes(b"no scan"), r"\.nii\.gz cannot be read"),
        (lambda root: (root / f"scans/{TRAIN[0]}.nii.gz").write_bytes(b"no scan"), r"\.nii\.gz cannot be read"),
        (lambda root: (root / "masks/ann/other.png").write_bytes(b""), r"unexpected; accepted: files of"),
        (lambda root: write(root / "masks/ann/other.nii", block((1, 2), (5, 9), (7, 12))), "no image has the id"),
        (lambda root: write(root / f"scans/{TRAIN[0]}.nii", hounsfield().astype(np.int16)), "same id as"),
        (lambda root: (root / "table.csv").write_text(f"id,spacing_mm\n{TRAIN[0]},0.5\n"), "has a spacing_mm, which"),
        (lambda root: [path.unlink() for path in root.glob(f"masks/*/{TRAIN[0]}.*")], "no reader has a mask of it"),
    ],
)
def test_bad_input_is_one_line(tmp_path, build, change, message):  # noqa: F811
    change(make_scans(tmp_path / "in"))
    code, _, err = build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 2 and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert re.search(message, err)


def test_too_many_components_are_refused(tmp_path, monkeypatch):
    from probabilistic_sam.data import folder

    make_scans(tmp_path)
    write(tmp_path / f"masks/ann/{TRAIN[0]}.nii.gz", block((1, 4), (5, 9), (7, 12)) | block((1, 4), (20, 29), (7, 12)))
    monkeypatch.setattr(folder, "MAX_COMPONENTS", 1)
    with pytest.raises(UserError, match="its masks have 2 components; accepted: at most 1"):
        list(FolderSource(tmp_path, objects="components"))


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highdicom" else find(name))
    with pytest.raises(UserError, match=r"scans and NIfTI need highdicom and nibabel; accepted: pip install"):
        FolderSource(make_scans(tmp_path))
