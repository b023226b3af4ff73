"""Files of a nodule open in other software with the geometry of the scan, and the command writes them."""

import csv
import json
import re
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from small_scans import ORIGIN, SHAPE, SPACING, STEP, hounsfield, samples_of, whole, write_nifti, write_series
from tiny import SIZE, tiny_model

from probabilistic_sam import ProbabilisticSamProcessor, cli, scan_files
from probabilistic_sam.errors import UserError
from probabilistic_sam.files import TEMPORARY
from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.images import load_image
from probabilistic_sam.scan_files import (
    FORMATS,
    LEVELS,
    NIFTI_FILES,
    SEG_FILES,
    TYPE_2,
    choose_formats,
    write_scan_result,
)
from probabilistic_sam.scans import box_in_pixels, open_scan

SHIPPED = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def itk_affine(image):
    """Affine matrix of a SimpleITK image: index (i, j, k) to LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection()[:9], (3, 3)) * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return affine


def check_nifti(folder, scan, sampled, affine_lps, shape):
    """The files have the affine matrix and shape of the input, and every voxel lies where it was sampled."""
    probability, entropy, samples = (nibabel.load(folder / name) for name in NIFTI_FILES)
    for image in (probability, entropy, samples):
        assert image.shape[:3] == shape
        np.testing.assert_allclose(RAS @ image.affine, affine_lps, atol=1e-4)
        np.testing.assert_allclose(image.header.get_qform(), image.header.get_sform(), atol=1e-4)
    assert probability.get_data_dtype() == np.float32 and samples.get_data_dtype() == np.uint8
    assert samples.shape[3] == len(sampled.masks)
    # From the scan's voxels to those of the file through patient coordinates
    index = np.stack(np.nonzero(np.ones(scan.shape, bool)))
    places = scan.geometry.affine @ np.concatenate([index, np.ones((1, index.shape[1]))])
    i, j, k = (np.linalg.inv(affine_lps) @ places)[:3].round().astype(int)
    np.testing.assert_array_equal(
        np.asarray(probability.dataobj)[i, j, k], whole(scan, sampled, sampled.mean)[tuple(index)]
    )
    np.testing.assert_array_equal(
        np.asarray(samples.dataobj)[i, j, k].T, whole(scan, sampled, sampled.masks)[:, *index]
    )
    p = np.clip(probability.get_fdata(), 1e-12, 1 - 1e-12)
    np.testing.assert_allclose(entropy.get_fdata(), -p * np.log2(p) - (1 - p) * np.log2(1 - p), atol=1e-5)
    second = SimpleITK.ReadImage(folder / NIFTI_FILES[0])
    assert second.GetSize() == shape
    np.testing.assert_allclose(itk_affine(second), affine_lps, atol=1e-4)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(second).T, np.asarray(probability.dataobj))


def check_segmentations(folder, scan, sampled):
    """The three DICOM SEG files hold the samples at the place of the source, read by highdicom and by pydicom."""
    expected = {
        SEG_FILES[0]: sampled.mean[None],
        SEG_FILES[1]: np.stack([sampled.mean >= level for level in (0.25, 0.5, 0.75)]),
        SEG_FILES[2]: sampled.masks,
    }
    first, last = sampled.slices
    tracking = set()
    for name, blocks in expected.items():
        values = whole(scan, sampled, blocks)
        tolerance = 0.5 / 255 if name == SEG_FILES[0] else 0
        segmentation = highdicom.seg.segread(folder / name)
        volume = segmentation.get_volume(combine_segments=False, rescale_fractional=True)
        volume = volume.to_patient_orientation(scan.geometry.get_closest_patient_orientation())
        start = np.linalg.inv(scan.geometry.affine) @ volume.affine[:, 3]
        np.testing.assert_allclose(start[:3], [first, 0, 0], atol=1e-4)
        np.testing.assert_allclose(volume.affine[:3, :3], scan.geometry.affine[:3, :3], atol=1e-4)
        read = np.moveaxis(volume.array, -1, 0)
        np.testing.assert_allclose(read, values[:, first : last + 1], atol=tolerance + 1e-6)

        plain = pydicom.dcmread(folder / name)  # frame by frame, through position and reference to the source
        frames = plain.pixel_array / (255 if name == SEG_FILES[0] else 1)
        for frame, groups in zip(frames, plain.PerFrameFunctionalGroupsSequence, strict=True):
            position = groups.PlanePositionSequence[0].ImagePositionPatient
            index = (np.linalg.inv(scan.geometry.affine) @ [*position, 1])[:3]
            np.testing.assert_allclose(index, index.round(), atol=1e-4)
            source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            assert source == scan.headers[round(index[0])].SOPInstanceUID
            shared = plain.SharedFunctionalGroupsSequence[0]
            place = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
            segment = place[0].ReferencedSegmentNumber - 1
            np.testing.assert_allclose(frame, values[segment, round(index[0])], atol=tolerance + 1e-6)
        for item in plain.SegmentSequence:
            assert item.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
            assert item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Nodule"
            assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "Probabilistic SAM"
            tracking.add((item.TrackingID, item.TrackingUID))
        header = scan.headers[0]
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert plain.get(keyword) == header.get(keyword)
        assert plain.ReferencedSeriesSequence[0].SeriesInstanceUID == header.SeriesInstanceUID
    assert len(tracking) == 1


# --------------------------------------------------------------------------------------------------------------- files


def test_a_series_comes_back_with_its_geometry(tmp_path):
    write_series(tmp_path / "in", hounsfield(), ImageOrientationPatient=[0.8, 0.6, 0, -0.6, 0.8, 0])
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "in") as scan:
        sampled = samples_of(scan)
        result = write_scan_result(tmp_path / "out", scan, sampled, FORMATS, "model")
        affine = scan.geometry.affine[:, [2, 1, 0, 3]]
        check_nifti(tmp_path / "out", scan, sampled, affine, SHAPE[::-1])
        check_segmentations(tmp_path / "out", scan, sampled)
        assert [item["sop_instance_uid"] for item in result["slices"]] == [
            header.SOPInstanceUID for header in scan.headers[1:4]
        ]
    assert set(result["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"result.json"}
    volumes = sampled.masks.sum((1, 2, 3)) * STEP * SPACING[0] * SPACING[1]
    np.testing.assert_allclose(result["volume_mm3_given_presence"]["samples"], volumes, atol=1e-4)
    assert result["presence"] == 0.75 and result["scan"]["SeriesInstanceUID"] == "1.2.3.1"
    # The name of the patient is in the same field of DICOM only
    for path in (tmp_path / "out").iterdir():
        assert (b"Roe" in path.read_bytes()) == path.name.endswith(".dcm"), path.name
    assert str(tmp_path) not in (tmp_path / "out" / "result.json").read_text()


def test_slices_stored_from_head_to_feet_keep_their_order_in_the_files(tmp_path):
    # Rows to the right and columns to the back: the normal of the slices points to the feet
    write_series(tmp_path / "in", hounsfield(), ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "in") as scan:
        sampled = samples_of(scan)
        np.testing.assert_array_equal(scan.read(0, 5), hounsfield())
        write_scan_result(tmp_path / "out", scan, sampled, ["dicom-seg-samples", "nifti"], "model")
        frames = highdicom.seg.segread(tmp_path / "out" / SEG_FILES[1]).get_volume(combine_segments=False)
        place = np.linalg.inv(scan.geometry.affine) @ frames.affine @ [*np.argwhere(frames.array.any(-1))[0], 1]
        k, y, x = place[:3].round().astype(int)
        assert whole(scan, sampled, sampled.mean)[k, y, x] >= 0.25
        check_nifti(tmp_path / "out", scan, sampled, scan.stored.affine[:, [2, 1, 0, 3]], SHAPE[::-1])


@pytest.mark.parametrize("kind", ["flipped", "oblique"])
def test_a_nifti_comes_back_with_its_geometry(tmp_path, kind):
    values = hounsfield((20, 6, 24)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -0.7], [0.8, 0, 0], [0, -2.0, 0]])  # i: anterior, j: feet, k: left
    affine[:3, 3] = [12.5, -7.25, 300.125]
    if kind == "oblique":
        cosine, sine = np.cos(0.3), np.sin(0.3)
        affine[:3] = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]) @ affine[:3]
    (tmp_path / "out").mkdir()
    with open_scan(write_nifti(tmp_path / "scan.nii.gz", values, affine)) as scan:
        assert scan.shape == (6, 20, 24)
        sampled = samples_of(scan)
        result = write_scan_result(tmp_path / "out", scan, sampled, ["nifti"], "model")
        check_nifti(tmp_path / "out", scan, sampled, RAS @ affine, values.shape)
        assert choose_formats(scan, 2, 2) == (["nifti", "png"], [])
        with pytest.raises(
            UserError, match="dicom-seg cannot be written: it refers to the DICOM images .* NIfTI; acc"
        ):
            choose_formats(scan, 2, 2, ["nifti", "dicom-seg"])
    assert "SeriesInstanceUID" not in result["scan"] and result["slices"][0]["sop_instance_uid"] is None


JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"
KOREAN = "Hong^Gildong=洪^吉洞=홍^길동"


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": JAPANESE}, JAPANESE),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 149"], "PatientName": KOREAN}, KOREAN),
        ({"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"}, "Müller^Jörg"),
        ({"without": [*TYPE_2, "SliceThickness"]}, ""),
        ({"SliceThickness": None}, "Roe^Jane"),
    ],
)
def test_dicom_seg_of_any_alphabet_and_of_a_de_identified_series(tmp_path, tags, name):
    write_series(tmp_path / "in", hounsfield(), **tags)
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "in") as scan:
        assert choose_formats(scan, 2, 2) == (["nifti", "dicom-seg", "png"], [])
        before = [header.to_json_dict() for header in scan.headers]
        sampled = samples_of(scan)
        write_scan_result(tmp_path / "out", scan, sampled, ["dicom-seg"], "model")
        assert [header.to_json_dict() for header in scan.headers] == before
        written = pydicom.dcmread(tmp_path / "out" / SEG_FILES[1])
        assert str(written.PatientName or "") == name and written.SpecificCharacterSet == "ISO_IR 192"
        volume = highdicom.seg.segread(tmp_path / "out" / SEG_FILES[1]).get_volume(combine_segments=False)
        volume = volume.to_patient_orientation(scan.geometry.get_closest_patient_orientation())
        levels = whole(scan, sampled, sampled.mean)[1:4] >= 0.5
        np.testing.assert_array_equal(volume.array[..., 1], levels)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"without": ["StudyInstanceUID"]}, "a file of the scan has no StudyInstanceUID"),
        ({"FrameOfReferenceUID": ""}, "a file of the scan has no FrameOfReferenceUID"),
        ({"without": ["SOPInstanceUID"]}, "a file of the scan has no SOPInstanceUID"),
        # The last slice only, which is no part of the nodule
        ({"last": {"SOPInstanceUID": None}}, "a file of the scan has no SOPInstanceUID"),
        ({"last": {"StudyInstanceUID": "1.2.4"}}, "a header of the scan cannot be used (.*)"),
        ({"PatientSex": "unknown"}, "a header of the scan cannot be used (.*unknown.*)"),
        ({"StudyDate": "2020"}, "a header of the scan cannot be used (.*)"),
    ],
)
def test_where_dicom_seg_cannot_be_written_it_is_left_out_or_refused(tmp_path, tiny_dir, capsys, tags, message):
    write_series(tmp_path / "in", hounsfield(), **{name: value for name, value in tags.items() if name != "last"})
    change_last_slice(tmp_path / "in", **tags.get("last", {}))
    common = ["segment", tmp_path / "in", "--box", 10, 8, 20, 18, "--slices", 1, 2, "--model", tiny_dir]
    common = [str(word) for word in [*common, "--num-samples", 2, "--output", tmp_path / "out"]]
    with pytest.raises(UserError, match=f"dicom-seg cannot be written: {message}; accepted: --format nifti png"):
        cli.main([*common, "--format", "dicom-seg", "nifti"])
    assert not (tmp_path / "out").exists()
    cli.main(common)
    assert re.search(f"^warning: DICOM SEG is left out: {message}$", capsys.readouterr().out, re.M)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*NIFTI_FILES, "figure.png", "result.json"}


def change_last_slice(folder, **tags):
    path = sorted(folder.iterdir())[-1]
    header = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path)


def test_dicom_seg_of_slices_whose_orientations_differ_by_rounding(tmp_path):
    write_series(tmp_path / "in", hounsfield())
    change_last_slice(tmp_path / "in", ImageOrientationPatient=[1, 0.00002, 0, 0, 1, 0])
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "in") as scan:
        assert choose_formats(scan, 2, 2) == (["nifti", "dicom-seg", "png"], [])
        sampled = samples_of(scan)
        write_scan_result(tmp_path / "out", scan, sampled, ["dicom-seg"], "model")
        levels = whole(scan, sampled, sampled.mean)[1:4] >= 0.5
    volume = highdicom.seg.segread(tmp_path / "out" / SEG_FILES[1]).get_volume(combine_segments=False)
    volume = volume.to_patient_orientation(scan.geometry.get_closest_patient_orientation())
    np.testing.assert_array_equal(volume.array[..., 1], levels)


@pytest.mark.parametrize("right", [[1, 0, 0], [0, 1, 0]])  # coronal and sagittal
def test_dicom_seg_of_slices_that_are_not_axial_has_the_frames_of_the_source(tmp_path, right):
    across = np.cross(right, [0, 0, -1])  # in which the slices are stacked
    positions = [[ORIGIN[0], ORIGIN[1], 100.0] + STEP * index * across for index in range(8)]
    write_series(
        tmp_path / "in", hounsfield((8, 14, 20)), positions=positions, ImageOrientationPatient=[*right, 0, 0, -1]
    )
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "in") as scan:
        assert scan.shape[0] == 14
        sampled = samples_of(scan, slices=(3, 7), corner=(2, 1), size=(5, 6))
        write_scan_result(tmp_path / "out", scan, sampled, FORMATS, "model")
        sources = {header.SOPInstanceUID: header for header in scan.headers}
        expected = np.stack([sampled.mean >= level for level in LEVELS])
        placed, corner = zip(*[scan.in_stored_order(block, 3, (2, 1)) for block in expected], strict=True)
        full = np.zeros((len(LEVELS), *scan.stored.spatial_shape), bool)
        (k, i, j), (frames, height, width) = corner[0], placed[0].shape
        full[:, k : k + frames, i : i + height, j : j + width] = placed
    written = pydicom.dcmread(tmp_path / "out" / SEG_FILES[1])
    assert (written.Rows, written.Columns) == (14, 20)
    found = np.zeros_like(full)
    for frame, groups in zip(written.pixel_array, written.PerFrameFunctionalGroupsSequence, strict=True):
        (reference,) = groups.DerivationImageSequence[0].SourceImageSequence
        source = sources[reference.ReferencedSOPInstanceUID]
        assert reference.SpatialLocationsPreserved == "YES"
        assert groups.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
        segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1
        found[segment, [*sources].index(source.SOPInstanceUID)] = frame
    np.testing.assert_array_equal(found, full)
    fractional = highdicom.seg.segread(tmp_path / "out" / SEG_FILES[0])
    assert (fractional.Rows, fractional.Columns) == (14, 20)


def test_dicom_seg_that_needs_too_much_memory(tmp_path, monkeypatch):
    write_series(tmp_path / "axial", hounsfield((5, 6, 7)))
    write_series(
        tmp_path / "coronal",
        hounsfield((5, 6, 7)),
        positions=[[0, y, 0] for y in range(5)],
        ImageOrientationPatient=[1, 0, 0, 0, 0, -1],
    )
    monkeypatch.setattr(scan_files, "MAX_SEGMENT_VOXELS", 3 * 5 * 6 * 7)
    with open_scan(tmp_path / "axial") as axial, open_scan(tmp_path / "coronal") as coronal:
        assert choose_formats(axial, 2, 7, ["dicom-seg-samples"]) == (["dicom-seg-samples"], [])
        message = "dicom-seg-samples cannot be written: 8 segments of 2 slices need too much memory, at most 7 fit"
        with pytest.raises(UserError, match=f"{message}; accepted: --format nifti png"):
            choose_formats(axial, 2, 8, ["dicom-seg", "dicom-seg-samples"])
        # Two axial slices take part of all the five coronal ones
        with pytest.raises(UserError, match="7 segments of 5 slices need too much memory, at most 3 fit"):
            choose_formats(coronal, 2, 7, ["dicom-seg-samples"])
        assert choose_formats(coronal, 2, 7)[1] == []
        monkeypatch.setattr(scan_files, "MAX_SEGMENT_VOXELS", 3 * 5 * 6 * 7 - 1)
        assert choose_formats(coronal, 2, 7) == (
            ["nifti", "png"],
            ["DICOM SEG is left out: 3 segments of 5 slices need too much memory, at most 2 fit"],
        )
        assert choose_formats(axial, 5, 7)[0] == ["nifti", "png"]
        assert choose_formats(axial, 4, 7)[0] == ["nifti", "dicom-seg", "png"]


def test_an_enhanced_ct_comes_back_with_its_geometry(tmp_path):
    write_series(tmp_path / "series", hounsfield())
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "series").iterdir())]
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, "1.2.4", 1, "1.2.4.1", 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    (tmp_path / "out").mkdir()
    with open_scan(tmp_path / "enhanced.dcm") as scan:
        sampled = samples_of(scan)
        write_scan_result(tmp_path / "out", scan, sampled, ["dicom-seg", "nifti"], "model")
        check_nifti(tmp_path / "out", scan, sampled, scan.geometry.affine[:, [2, 1, 0, 3]], SHAPE[::-1])
        volume = highdicom.seg.segread(tmp_path / "out" / SEG_FILES[1]).get_volume(combine_segments=False)
        volume = volume.to_patient_orientation(scan.geometry.get_closest_patient_orientation())
        levels = whole(scan, sampled, sampled.mean)[1:4] >= 0.5
        np.testing.assert_array_equal(volume.array[..., 1], levels)
        np.testing.assert_allclose(volume.affine, scan.geometry[1:4].affine, atol=1e-4)


def test_a_real_series_has_the_same_geometry_for_a_second_reader(shared_dir, tmp_path):
    archive = shared_dir / "data" / "lung-ct-series.tar.gz"
    if not archive.exists():
        pytest.skip("the real series is not in the shared data")
    import tarfile

    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (tmp_path / "out").mkdir()
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "lung-ct-series" / "dicom"))
    second = SimpleITK.ReadImage(names)
    with open_scan(tmp_path / "lung-ct-series") as scan:
        np.testing.assert_allclose(scan.geometry.affine[:, [2, 1, 0, 3]], itk_affine(second), atol=1e-4)
        np.testing.assert_array_equal(scan.read(12, 14), SimpleITK.GetArrayFromImage(second)[12:15])
        boxes = list(csv.DictReader((tmp_path / "lung-ct-series" / "boxes.csv").open()))
        sampled = samples_of(scan, slices=(12, 14), corner=(253, 139), size=(60, 70), count=2)
        result = write_scan_result(tmp_path / "out", scan, sampled, ["dicom-seg-samples", "nifti"], "model")
        by_uid = {row["sop_instance_uid"]: float(row["z_mm"]) for row in boxes}
        for item in result["slices"]:
            assert item["centre_mm_lps"][2] == by_uid[item["sop_instance_uid"]]
        check_segmentations(tmp_path / "out", scan, sampled)
        written = SimpleITK.ReadImage(tmp_path / "out" / NIFTI_FILES[0])
        np.testing.assert_allclose(itk_affine(written), itk_affine(second), atol=1e-4)
        values = SimpleITK.GetArrayFromImage(written)
        np.testing.assert_array_equal(values, whole(scan, sampled, sampled.mean))


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Three slices of the packaged phantom."""
    grey = load_image(EXAMPLES / "phantom-1.png").astype(float)
    return write_series(tmp_path_factory.mktemp("scan") / "Roe_Jane", np.stack([grey] * 3) * 5 - 1000)


def test_the_command_writes_a_nodule_of_the_shipped_model(series, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["segment", series, "--box", 52, 50, 78, 80, "--slices", 0, 2, "--output", out, "--num-samples", 3]
    cli.main([str(word) for word in [*words, "--model", SHIPPED]])
    assert {path.name for path in out.iterdir()} == {*NIFTI_FILES, *SEG_FILES[:2], "figure.png", "result.json"}
    prompt, wrote = capsys.readouterr().out.splitlines()
    assert prompt.startswith(
        "box 52 50 78 80 on slices 0 to 2 of 0 to 2: patient x 21.20 to 42.00, y 4.65 to 25.65, z 100.00 to "
    )
    result = json.loads((out / "result.json").read_text())
    median = result["volume_mm3_given_presence"]["quantiles"]["0.5"]
    assert f"presence {result['presence'] * 100:.0f} %; volume if outlined: median {median:,.0f} mm3 (90 %" in wrote
    assert "; longest diameter: median " in wrote and wrote.endswith("; see figure.png, result.json")
    volumes = np.asarray(nibabel.load(out / NIFTI_FILES[2]).dataobj).sum((0, 1, 2)) * STEP * SPACING[0] * SPACING[1]
    np.testing.assert_allclose(result["volume_mm3_given_presence"]["samples"], volumes, atol=1e-3)
    assert volumes.min() > 0 and len({item["empty_share"] for item in result["slices"]}) == 1
    assert all("Roe" not in path.read_bytes().decode("latin1") for path in out.iterdir() if path.suffix != ".dcm")


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(path)
    ProbabilisticSamProcessor(SIZE, crop_size=24).save_pretrained(path)
    return path


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_table_and_patient_coordinates(series, tiny_dir, tmp_path):
    (tmp_path / "nodules.csv").write_text("first,last,x1,y1,x2,y2\n0,1,52,50,78,80\n1,1,10,12,30,33.5\n")
    common = ["--model", tiny_dir, "--num-samples", 2, "--format", "nifti"]
    cli.main([str(word) for word in ["segment", series, "--prompts", tmp_path / "nodules.csv",
                                     "--output", tmp_path / "table", *common]])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "table" / "summary.csv").open()))
    assert [row["first"] for row in rows] == ["0", "1"] and float(rows[0]["volume_mm3_given_presence_median"]) > 0
    assert float(rows[0]["longest_diameter_mm_q95"]) >= 0
    for index, slices in enumerate(([0, 1], [1, 1])):
        box_mm = result_of(tmp_path / "table" / f"nodule-{index}")["prompt"]["box_mm_lps"]
        with open_scan(series) as scan:
            box, *found = box_in_pixels(scan, box_mm)
        assert found == slices and box == pytest.approx(list(map(float, list(rows[index].values())[1:5])), abs=1e-3)
    result = result_of(tmp_path / "table" / "nodule-0")
    cli.main([str(word) for word in ["segment", series, "--box-mm", *result["prompt"]["box_mm_lps"],
                                     "--output", tmp_path / "mm", *common]])  # fmt: skip
    again = result_of(tmp_path / "mm")
    assert again["prompt"]["box"] == pytest.approx([52, 50, 78, 80]) and again["prompt"]["slices"] == [0, 1]
    assert again["volume_mm3_given_presence"] == result["volume_mm3_given_presence"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--box", 1, 1, 9, 9], "accepted: --box with --slices"),
        (["--slices", 0, 1], "accepted: --box with --slices"),
        (["--box", 1, 1, 9, 9, "--slices", 0, 1, "--box-mm", 0, 0, 0, 1, 1, 1], "one kind of prompt"),
        (["--box", 1, 1, 9, 999, "--slices", 0, 1], "reaches outside the image of 128 x 128"),
        (["--box", 1, 1, 9, 9, "--slices", 0, 3], "outside the scan of 3"),
        (
            ["--box", 1, 1, 9, 9, "--slices", 0, 1, "--runtime", "onnx"],
            "with torch only; accepted: no --runtime",
        ),
        (["--box", 1, 1, 9, 9, "--slices", 0, 1, "--point", 3, 3], "is a scan; accepted: the command without --point"),
        (["--box", 1, 1, 9, 9, "--box", 1, 1, 9, 9], "2 boxes in a scan"),
        (["--box", 1, 1, 9, 9, "--slices", 0, 1, "--series", "9"], "no series 9"),
        (["--prompts", "missing.csv"], "no table at missing.csv"),
    ],
)
def test_bad_prompts_of_a_scan_are_one_line_and_write_nothing(series, tmp_path, words, message):
    arguments = ["segment", series, *words, "--output", tmp_path / "out", "--model", SHIPPED]
    with pytest.raises(UserError, match=message):
        cli.main([str(word) for word in arguments])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(f"{TEMPORARY}*"))


def test_bad_tables_name_the_line(series, tmp_path):
    table = tmp_path / "table.csv"
    for text, message in (
        ("a,b\n1,2\n", "has the columns a,b; accepted: a CSV file in UTF-8 with the columns x1,y1,x2,y2,first,last"),
        ("x1,y1,x2,y2,first,last\n", "no rows"),
        ("x1,y1,x2,y2,first,last\n1,1,9,9,0,1\n1,1,9,9,0,1.5\n", "line 3: .*whole numbers"),
        ("x1,y1,x2,y2,first,last\n1,1,9,9,0\n", "line 2: 5 cells; accepted: 6"),
        ("x1,y1,x2,y2,first,last\n1,1,9,9,0,1,2\n", "line 2: 7 cells; accepted: 6"),
        ("x1,y1,x2,y2,first,last\n1,1,nan,9,0,1\n", "line 2: x2 is 'nan'; accepted: a finite number"),
        ("x1,y1,x2,y2,first,last\n1,1,9,9,0,7\n", "line 2: slices 0 to 7 reach outside"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            cli.main(["segment", str(series), "--prompts", str(table), "--output", str(tmp_path / "out"),
                      "--model", str(SHIPPED)])  # fmt: skip


def test_options_of_scans_say_what_is_wrong_with_the_path(series, tmp_path):
    accepted = "accepted: a folder or zip with a DICOM series, .*, or the command without --slices"
    for path, message in (
        (tmp_path / "missing", f"^no scan at .*missing; {accepted}$"),
        (EXAMPLES / "phantom-1.png", f"phantom-1.png is not a scan; {accepted}$"),
        (series / "000.dcm", "000.dcm is a single slice; accepted: the folder of its series, or the command without"),
    ):
        words = ["segment", path, "--box", 52, 50, 78, 80, "--slices", 0, 1, "--output", tmp_path / "out"]
        with pytest.raises(UserError, match=message):
            cli.main([str(word) for word in [*words, "--model", SHIPPED]])
