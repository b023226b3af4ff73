"""Scans are read with the right values at the right place in the patient, or refused in one line."""

import gzip
import itertools
import re
import zipfile

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from small_scans import ORIGIN, SHAPE, SPACING, STEP, hounsfield, write_nifti, write_series

from probabilistic_sam import scans
from probabilistic_sam.errors import UserError
from probabilistic_sam.images import is_scan
from probabilistic_sam.scans import SeveralSeries, box_in_patient, box_in_pixels, open_scan
from probabilistic_sam.segment_scan import Nodule, prompt_line

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # between LPS and RAS


def check_values(scan, values, affine_lps):
    """Every voxel of a scan has the value that an array with that affine matrix has at the same place."""
    read = scan.read(0, scan.shape[0] - 1)
    index = np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), -1).reshape(-1, 3)
    places = np.c_[index, np.ones(len(index))] @ scan.geometry.affine.T
    stored = places @ np.linalg.inv(affine_lps).T
    assert np.abs(stored - stored.round()).max() < 1e-4
    i, j, k = stored[:, :3].round().astype(int).T
    np.testing.assert_array_equal(read[tuple(index.T)], values[i, j, k])


@pytest.mark.parametrize("step", [2.5, -2.5])
def test_some_slices_of_a_stack_in_either_direction(tmp_path, step):
    values = hounsfield((4, 5, 6)).astype(np.int16)
    with open_scan(write_nifti(tmp_path / "scan.nii", values, np.diag([-0.7, -0.7, step, 1]))) as scan:
        np.testing.assert_array_equal(scan.read(1, 2), scan.read(0, 5)[1:3])
        np.testing.assert_array_equal(scan.read(5, 5)[0], values[:, :, 5 if step > 0 else 0].T)


# ------------------------------------------------------------------------------------------------------------ DICOM


def test_a_series_is_found_among_other_files_and_its_slices_ascend(tmp_path):
    hu = hounsfield()
    write_series(tmp_path / "a" / "b", hu, descending=True)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICMxxxx")
    assert is_scan(tmp_path)
    with open_scan(tmp_path) as scan:
        assert (scan.shape, scan.kind, scan.modality, scan.warnings) == (SHAPE, "DICOM series", "CT", [])
        assert scan.spacing_mm == pytest.approx((STEP, *SPACING))
        assert scan.voxel_mm3 == pytest.approx(2.5 * 0.7 * 0.8)
        np.testing.assert_allclose(scan.geometry.affine @ [2, 3, 4, 1], [-20 + 3.2, -30 + 2.1, 105, 1])
        np.testing.assert_array_equal(scan.read(0, 5), hu)
        np.testing.assert_array_equal(scan.read(2, 3), hu[2:4])
        assert scan.read(2, 3).dtype == np.float32


def test_stored_columns_of_a_patient_on_the_belly_stay_as_a_viewer_shows_them(tmp_path):
    hu = hounsfield((3, 8, 9))
    write_series(tmp_path, hu, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    with open_scan(tmp_path) as scan:
        np.testing.assert_array_equal(scan.read(0, 2), hu)
        np.testing.assert_allclose(scan.geometry.affine @ [0, 0, 1, 1], [ORIGIN[0] - 0.8, ORIGIN[1], 100, 1])


def test_axial_slices_are_found_in_a_coronal_series(tmp_path):
    hu = hounsfield((5, 6, 7))
    write_series(tmp_path, hu, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], positions=np.full(5, 100.0), tilt=STEP)
    affine = np.eye(4)
    affine[:3] = [[0, 0, 0.8, ORIGIN[0]], [STEP, 0, 0, ORIGIN[1]], [0, -0.7, 0, 100]]
    with open_scan(tmp_path) as scan:
        assert scan.shape == (6, 5, 7)
        check_values(scan, hu, affine)


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    write_series(tmp_path / "a", hounsfield((3, 8, 9)), "1.2.3.1")
    write_series(tmp_path / "b", hounsfield((4, 8, 9)), "1.2.3.2", SeriesDescription="Lung 1.0")
    write_series(tmp_path / "seg", hounsfield((4, 8, 9)), "1.2.3.3", Modality="SEG")
    with pytest.raises(SeveralSeries, match=r"2 series; accepted: --series with one of 1.2.3.1 \(CT, 3 ") as caught:
        open_scan(tmp_path).__enter__()
    assert caught.value.series == {"1.2.3.1": "CT, 3 files", "1.2.3.2": "CT, 4 files, Lung 1.0"}
    with pytest.raises(UserError, match="no series 7"):
        open_scan(tmp_path, "7").__enter__()
    with open_scan(tmp_path, "1.2.3.2") as scan:
        assert scan.shape == (4, 8, 9)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"positions": [0, 1, 2, 4, 5, 6]}, "uneven or missing slices: most of 6 slices are 1 mm apart, but 2 mm"),
        ({"positions": [0, 1, 2, 3, 4.1, 5]}, "uneven or missing"),
        ({"positions": [0, 1, 2, 2, 3, 4]}, r"slices at one position \(-20 -30 2 mm\)"),
        ({"tilt": STEP * np.tan(np.radians(15))}, "gantry tilt of 15.0 degrees"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 1]}, "orientation .* invalid"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "no valid ImageOrientationPatient"),
        ({"PixelSpacing": [0, 1]}, "pixel spacing 0 1 .* invalid"),
    ],
)
def test_irregular_series_are_refused(tmp_path, tags, message):
    write_series(tmp_path, hounsfield((6, 8, 9)), **tags)
    with pytest.raises(UserError, match=message):
        open_scan(tmp_path).__enter__()


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"PixelSpacing": [0.7, 0.9]}, "differ in pixel spacing"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "differ in orientation"),
        ({"FrameOfReferenceUID": "1.2.3.8"}, "differ in FrameOfReferenceUID"),
        ({"Modality": "MR"}, r"differ in Modality \(CT, MR\)"),
    ],
)
def test_mixed_series_are_refused(tmp_path, tags, message):
    write_series(tmp_path / "a", hounsfield((3, 8, 9)))
    write_series(tmp_path / "b", hounsfield((3, 8, 9)), positions=[200, 202.5, 205], **tags)
    with pytest.raises(UserError, match=message):
        open_scan(tmp_path).__enter__()


def test_one_slice_no_slice_and_too_many_voxels_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no scan at"):
        open_scan(tmp_path / "missing").__enter__()
    with pytest.raises(UserError, match="holds no DICOM images"):
        open_scan(tmp_path).__enter__()
    write_series(tmp_path, hounsfield((1, 8, 9)))
    with pytest.raises(UserError, match="one slice"):
        open_scan(tmp_path).__enter__()
    monkeypatch.setattr(scans, "MAX_VOXELS", 71)
    with pytest.raises(UserError, match="million voxels"):
        open_scan(tmp_path).__enter__()


def test_slices_outside_the_scan_and_too_many_at_once_are_refused(tmp_path, monkeypatch):
    write_series(tmp_path, hounsfield((4, 8, 9)))
    monkeypatch.setattr(scans, "MAX_READ_VOXELS", 3 * 72)
    with open_scan(tmp_path) as scan:
        for slices, message in (((2, 1), "turned around"), ((0, 4), "accepted: 0 to 3"), ((0, 3), "at most 3")):
            with pytest.raises(UserError, match=message):
                scan.read(*slices)


@pytest.mark.parametrize("step", [0.3125, 0.625, 2 / 3, 1.25])
def test_positions_with_two_decimals_are_a_regular_stack(tmp_path, step):
    positions = (-158.125 + step * np.arange(40)).round(2)
    write_series(tmp_path, hounsfield((40, 8, 9)), positions=positions)
    with open_scan(tmp_path) as scan:
        assert scan.spacing_mm[0] == pytest.approx(step, abs=1e-3)
    (tmp_path / "020.dcm").unlink()
    with pytest.raises(UserError, match="uneven or missing slices"), open_scan(tmp_path):
        pass


def test_another_modality_is_a_warning(tmp_path):
    write_series(tmp_path, hounsfield((3, 8, 9)), Modality="MR")
    with open_scan(tmp_path) as scan:
        assert scan.warnings == ["the modality of this scan is MR; the released weights were trained on CT only"]


@pytest.mark.parametrize(
    ("spacing", "is_known"), [(0.46, True), (0.98, True), (1.0, True), (0.3, False), (1.5, False)]
)
def test_a_pixel_spacing_far_from_that_of_the_training_data_is_a_warning(tmp_path, spacing, is_known):
    write_series(tmp_path, hounsfield((3, 8, 9)), PixelSpacing=[spacing, spacing])
    known = "the released weights were trained on 0.46 to 0.98 mm"
    text = f"the pixel spacing of this scan is {spacing:g} x {spacing:g} mm; {known}"
    with open_scan(tmp_path) as scan:
        assert scan.warnings == ([] if is_known else [text])


@pytest.mark.parametrize(("step", "is_known"), [(0.5, True), (5.0, True), (6.0, True), (0.3, False), (9.0, False)])
@pytest.mark.parametrize("is_nifti", [False, True])
def test_a_distance_of_slices_far_from_that_of_the_training_data_is_a_warning(tmp_path, step, is_known, is_nifti):
    hu = hounsfield((3, 8, 9))
    if is_nifti:
        values = hu.transpose(2, 1, 0).astype(np.int16)
        path = write_nifti(tmp_path / "scan.nii.gz", values, np.diag([-0.7, -0.7, step, 1]))
    else:
        path = write_series(tmp_path, hu, positions=step * np.arange(3), PixelSpacing=[0.7, 0.7])
    with open_scan(path) as scan:
        text = f"the slices of this scan are {step:g} mm apart; the released weights were trained on 0.5 to 5 mm"
        assert scan.warnings == ([] if is_known else [text])


def test_an_enhanced_ct_has_the_values_of_its_series(tmp_path):
    hu = hounsfield((4, 8, 9))
    write_series(tmp_path / "series", hu)
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "series").iterdir(), reverse=True)]
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, "1.2.4", 1, "1.2.4.1", 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    assert is_scan(tmp_path / "enhanced.dcm") and not is_scan(tmp_path / "series" / "000.dcm")
    with open_scan(tmp_path / "enhanced.dcm") as scan, open_scan(tmp_path / "series") as series:
        assert scan.kind == "multi-frame DICOM"
        np.testing.assert_allclose(scan.geometry.affine, series.geometry.affine)
        np.testing.assert_array_equal(scan.read(1, 3), hu[1:])


# -------------------------------------------------------------------------------------------------------------- zip


def zip_folder(path, folder, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


def test_a_zip_is_read_like_its_folder_and_writes_nowhere_else(tmp_path):
    hu = hounsfield((3, 8, 9))
    write_series(tmp_path / "in" / "series", hu)
    path = zip_folder(tmp_path / "in" / "scan.zip", tmp_path / "in" / "series", prefix="../../")
    before = sorted(tmp_path.rglob("*"))
    with open_scan(path) as scan:
        np.testing.assert_array_equal(scan.read(0, 2), hu)
        inside = scan.headers[0].filename
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError):
        open(inside, "rb").close()


def test_zip_bombs_and_damaged_zips_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", b"\0" * 2**20)
    monkeypatch.setattr(scans, "MAX_BYTES", 2**19)
    with pytest.raises(UserError, match="1 MiB unpacked; accepted"):
        open_scan(tmp_path / "bomb.zip").__enter__()
    (tmp_path / "damaged.zip").write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(UserError, match="damaged.zip cannot be read"):
        open_scan(tmp_path / "damaged.zip").__enter__()


def test_encrypted_zips_and_too_many_files_are_refused(tmp_path, monkeypatch):
    write_series(tmp_path / "series", hounsfield((3, 8, 9)))
    with zipfile.ZipFile(tmp_path / "open.zip", "w") as archive:
        for file in sorted((tmp_path / "series").iterdir()):
            archive.write(file, file.name)
    content = bytearray((tmp_path / "open.zip").read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flags of each header, whose first bit is encryption
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + offset] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(UserError, match="locked.zip is encrypted; accepted: a zip without a password"):
        open_scan(tmp_path / "locked.zip").__enter__()
    monkeypatch.setattr(scans, "MAX_FILES", 2)
    for name, message in (("series", "more than 2 files"), ("open.zip", "3 files of .* accepted: at most 2")):
        with pytest.raises(UserError, match=message):
            open_scan(tmp_path / name).__enter__()


def test_small_tilts_and_zigzags_are_refused(tmp_path):
    write_series(tmp_path / "tilted", hounsfield((6, 8, 9)), tilt=STEP * np.tan(np.radians(0.5)))
    with pytest.raises(UserError, match="gantry tilt of 0.5 degrees"):
        open_scan(tmp_path / "tilted").__enter__()
    positions = [(-20, -30 + 3 * (index % 2), STEP * index) for index in range(5)]
    write_series(tmp_path / "zigzag", hounsfield((5, 8, 9)), positions=positions)
    with pytest.raises(UserError, match="beside a regular stack"):
        open_scan(tmp_path / "zigzag").__enter__()


# ------------------------------------------------------------------------------------------------------------ NIfTI


def rotation(degrees):
    """Rotation about the x axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_axial_slices_are_found_in_any_orientation(tmp_path, order):
    values = hounsfield((4, 5, 6)).astype(np.int16)
    for signs in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, order] * np.array(signs) * [0.7, 0.8, 2.5]
        affine[:3, 3] = [10, -20, 30]
        with open_scan(write_nifti(tmp_path / "scan.nii", values, affine)) as scan:
            directions = scan.geometry.affine[:3, :3] / scan.geometry.spacing
            # slices to the head, rows to the back, columns to the left, in LPS
            np.testing.assert_allclose(directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-6)
            check_values(scan, values, RAS @ affine)


def test_an_oblique_nifti_keeps_its_own_slices_up_to_30_degrees(tmp_path):
    values = hounsfield((7, 6, 5)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = rotation(20) @ np.diag([0.7, 0.7, 2])
    with open_scan(write_nifti(tmp_path / "scan.nii.gz", values, affine)) as scan:
        assert scan.shape == (5, 6, 7) and scan.spacing_mm == pytest.approx((2, 0.7, 0.7))
        check_values(scan, values, RAS @ affine)
    affine[:3, :3] = rotation(40) @ np.diag([0.7, 0.7, 2])
    with pytest.raises(UserError, match="inclined by 40 degrees; accepted: at most 30"):
        open_scan(write_nifti(tmp_path / "scan.nii", values, affine)).__enter__()


def test_nifti_without_a_sound_geometry_is_refused(tmp_path, monkeypatch):
    values, affine, path = hounsfield((4, 5, 6)).astype(np.int16), np.eye(4), tmp_path / "scan.nii"
    sheared = np.eye(4)
    sheared[0, 2] = 0.3
    for array, matrix, code, message in (
        (values, affine, 0, "states no orientation"),
        (values, sheared, 1, "not perpendicular"),
        (values[..., None, None].repeat(2, 3), affine, 1, "4 x 5 x 6 x 2"),
        (values[0], affine, 1, "the shape 5 x 6"),
        (values.astype(np.complex64), affine, 1, "complex64"),
    ):
        with pytest.raises(UserError, match=message):
            open_scan(write_nifti(path, array, matrix, code)).__enter__()
    write_nifti(path, np.where(values > 0, np.nan, 1.0).astype(np.float32), affine)
    with open_scan(path) as scan, pytest.raises(UserError, match="NaN or infinite"):
        scan.read(0, 1)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "metres.nii")
    with pytest.raises(UserError, match="is measured in meter; accepted: mm"):
        open_scan(tmp_path / "metres.nii").__enter__()
    monkeypatch.setattr(scans, "MAX_VOXELS", 100)
    with pytest.raises(UserError, match="accepted: at most 0 million"):
        open_scan(path).__enter__()


def test_damaged_nifti_is_one_line(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.nii.gz cannot be read"):
        open_scan(tmp_path / "a.nii.gz").__enter__()
    path = write_nifti(tmp_path / "b.nii", hounsfield((4, 5, 6)).astype(np.int16), np.eye(4))
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(path.read_bytes()[:400]))
    with open_scan(tmp_path / "c.nii.gz") as scan, pytest.raises(UserError, match="cannot be read"):
        scan.read(0, 5)


# ------------------------------------------------------------------------------------------------------------ boxes


def test_boxes_in_pixels_and_in_patient_coordinates_agree(tmp_path):
    write_series(tmp_path, hounsfield())
    with open_scan(tmp_path) as scan:
        # Pixel 10 begins half a pixel before its centre: -20 + (10 - 0.5) * 0.8 = -12.4
        box_mm = box_in_patient(scan, [10, 12, 30, 28], 1, 4)
        assert box_mm == pytest.approx([-12.4, -21.95, 102.5, 3.6, -10.75, 110.0])
        box, first, last = box_in_pixels(scan, box_mm)
        assert (first, last) == (1, 4) and box == pytest.approx([10, 12, 30, 28])
        assert box_in_pixels(scan, [*box_mm[:2], 104.9, *box_mm[3:5], 108])[1:] == (2, 3)
        for changed, message in (
            ([0, 0, 0, 0, 1, 1], "no area"),
            ([0, 0, 103, 1, 1, 102], "turned around"),
            ([0, 0, 103.4, 1, 1, 104.1], "between two slices"),
            ([0, 0, 0, 1, 1, 900], "outside the scan"),
        ):
            with pytest.raises(UserError, match=message):
                box_in_pixels(scan, changed)


@pytest.mark.parametrize("step", [0.2, 0.625, 2.5])
def test_a_printed_box_chooses_the_same_slices_when_it_is_given_back(tmp_path, step):
    affine = np.diag([-0.7, -0.7, step, 1.0])
    affine[:3, 3] = [31.137, 22.751, 118.03]
    with open_scan(write_nifti(tmp_path / "scan.nii", hounsfield((30, 30, 20)).astype(np.int16), affine)) as scan:
        for first, last in [(0, 19), (2, 13), (7, 7), (3, 4)]:
            box = [4.5, 6, 20, 21.25]
            words = re.search(
                r"x (\S+) to (\S+), y (\S+) to (\S+), z (\S+) to (\S+) mm", printed(scan, box, first, last)
            )
            x1, x2, y1, y2, z1, z2 = map(float, words.groups())
            found, *slices = box_in_pixels(scan, [x1, y1, z1, x2, y2, z2])
            assert slices == [first, last] and found == pytest.approx(box, abs=0.01)
            # Also with the faces of the slices in place of their centres, and with less precise numbers
            edge, error = step / 2, 0.2 * step
            assert box_in_pixels(scan, [x1, y1, z1 - edge + error, x2, y2, z2 + edge - error])[1:] == (first, last)
            assert box_in_pixels(scan, [x1, y1, z1 - edge - error, x2, y2, z2 + edge + error])[1:] == (first, last)
            assert box_in_pixels(scan, [x1, y1, z1 - error, x2, y2, z2 + error])[1:] == (first, last)
            if first < last:
                assert box_in_pixels(scan, [x1, y1, z1 + error, x2, y2, z2 - error])[1:] == (first, last)


@pytest.mark.parametrize(("degrees", "is_oblique"), [(0, False), (0.01, False), (10, True)])
def test_the_line_of_an_oblique_scan_says_that_its_box_in_mm_is_larger(tmp_path, degrees, is_oblique):
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.diag([-0.7, -0.7, 1.25, 1.0])
    affine[:3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ affine[:3]
    with open_scan(write_nifti(tmp_path / "scan.nii", hounsfield((30, 30, 20)).astype(np.int16), affine)) as scan:
        assert ("a larger box, because the slices are oblique" in printed(scan, [4, 6, 20, 21], 3, 9)) == is_oblique


def printed(scan, box, first, last):
    return prompt_line(scan, Nodule(box, first, last))
