"""Splits, prompts, rows, builds and cards, by hand-computed numbers and properties."""

import errno
import hashlib
import io
import json
import os
import re
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from deep_colour import rgb16_png, rgb16_tiff

from probabilistic_sam.data import PROMPTS, make_prompt, patient_bucket, row_seed, split_of
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.card import CARD_NOTES, BuildReport, Note, Origin, dataset_card
from probabilistic_sam.data.format import (
    FEATURES,
    decode_image,
    decode_masks,
    decode_row,
    encode_png,
    image_row,
    load_split,
    split_content,
)
from probabilistic_sam.errors import UserError

VALIDATION = "LIDC-IDRI-0080"
SEED = 0x5FA881D581D6D810
IDENTITY = {"patient_id": "LIDC-IDRI-0001", "scan_id": 12, "nodule_id": 0, "slice_index": 3, "source": "slices"}


def block(top: int, left: int, bottom: int, right: int, size: int = 64) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


# Two readers whose union covers rows 20-31 and columns 30-49, and one whose mask is empty
UNDECODED = FEATURES.copy() | {"image": datasets.Image(decode=False)}  # of an opened split
MASKS = np.stack([block(20, 30, 32, 44), block(22, 36, 30, 50), np.zeros((64, 64), dtype=bool)])


def make_row(
    patient_id: str = "LIDC-IDRI-0001", slice_index: int = 0, masks: np.ndarray = MASKS, grey: int = 0
) -> dict:
    image = np.full(masks.shape[1:], grey, dtype=np.uint8)
    image[0] = np.arange(image.shape[1])
    columns = {**IDENTITY, "patient_id": patient_id, "slice_index": slice_index}
    return image_row(
        encode_png(image), [encode_png(mask) for mask in masks], "image", ["mask"] * len(masks), **columns
    )


# Splits


@pytest.mark.parametrize(
    ("patient_id", "bucket", "split"),
    # Computed with sha256sum and bc: the last two decimal digits of the hash read as one number.
    [
        ("LIDC-IDRI-0116", 0, "train"),
        ("LIDC-IDRI-0001", 27, "train"),
        ("LIDC-IDRI-0093", 69, "train"),
        ("LIDC-IDRI-0080", 70, "validation"),
        ("LIDC-IDRI-0091", 79, "validation"),
        ("LIDC-IDRI-0101", 80, "test"),
        ("LIDC-IDRI-0072", 99, "test"),
    ],
)
def test_split_follows_the_documented_rule(patient_id, bucket, split):
    assert patient_bucket(patient_id) == bucket
    assert split_of(patient_id) == split


# Prompts


class Middle:
    """A generator without jitter: every uniform number is the middle of its range."""

    def uniform(self, low, high, size):
        return np.full(size, (low + high) / 2)


def test_union_box_is_the_tight_box_at_pixel_edges():
    assert make_prompt(MASKS, "union_box", Middle()) == {"input_boxes": [30.0, 20.0, 50.0, 32.0]}


def test_reader_box_is_the_tight_box_of_that_reader():
    assert make_prompt(MASKS, "reader_box", Middle(), reader=1) == {"input_boxes": [36.0, 22.0, 50.0, 30.0]}


def test_reader_box_of_an_empty_mask_is_the_center_box():
    reader_box = make_prompt(MASKS, "reader_box", np.random.default_rng(5), reader=2)
    assert reader_box == make_prompt(MASKS, "center_box", np.random.default_rng(5))


def test_center_prompts_sit_on_the_centroid_of_pixel_centers():
    masks = block(20, 30, 24, 40)[None]  # centroid: x 30..40 -> 35, y 20..24 -> 22
    assert make_prompt(masks, "center_point", Middle()) == {"input_points": [35.0, 22.0], "input_labels": 1}
    assert make_prompt(masks, "center_box", Middle()) == {"input_boxes": [19.0, 6.0, 51.0, 38.0]}
    one_pixel = block(7, 9, 8, 10)[None]
    assert make_prompt(one_pixel, "center_point", Middle())["input_points"] == [9.5, 7.5]


def test_union_box_jitter_fills_its_range():
    rng = np.random.default_rng(0)
    boxes = np.array([make_prompt(MASKS, "union_box", rng)["input_boxes"] for _ in range(4000)])
    shift = np.abs(boxes - [30, 20, 50, 32]).max(axis=0)
    bound = np.array([20, 12, 20, 12]) * 0.1 + 1.5
    assert (shift <= bound).all() and (shift > 0.9 * bound).all()
    correlation = np.corrcoef((boxes - [30, 20, 50, 32]).T) - np.eye(4)
    assert np.abs(correlation).max() < 0.08  # sides move independently


def test_center_jitter_fills_its_range():
    rng = np.random.default_rng(0)
    masks = block(20, 30, 24, 40)[None]
    boxes = np.array([make_prompt(masks, "center_box", rng)["input_boxes"] for _ in range(2000)])
    points = np.array([make_prompt(masks, "center_point", rng)["input_points"] for _ in range(2000)])
    assert 3.9 < np.abs(boxes - [19, 6, 51, 38]).max() <= 4
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], 32)
    assert 2.9 < np.abs(points - [35, 22]).max() <= 3


@pytest.mark.parametrize("corner", [(0, 0), (0, 63), (63, 0), (63, 63)])
def test_boxes_of_one_pixel_keep_their_size_and_stay_in_the_image(corner):
    row, column = corner
    masks = block(row, column, row + 1, column + 1)[None]
    rng = np.random.default_rng(0)
    boxes = np.array([make_prompt(masks, "union_box", rng)["input_boxes"] for _ in range(500)])
    boxes = np.concatenate([boxes, [make_prompt(masks, "center_box", rng)["input_boxes"] for _ in range(500)]])
    points = np.array([make_prompt(masks, "center_point", rng)["input_points"] for _ in range(500)])
    assert (boxes >= 0).all() and (boxes <= 64).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1 - 1e-9).all()
    assert (points >= 0.5).all() and (points <= 63.5).all()


def test_prompts_of_a_row_are_the_same_in_every_process():
    # Computed with sha256sum: the first eight bytes for "union_box|12|0|3|LIDC-IDRI-0001|slices".
    assert row_seed(IDENTITY, "union_box") == SEED
    assert len({row_seed(IDENTITY, prompt) for prompt in PROMPTS}) == len(PROMPTS)
    assert row_seed({**IDENTITY, "slice_index": 4}, "union_box") != row_seed(IDENTITY, "union_box")
    assert row_seed({**IDENTITY, "image_id": None}, "union_box") == SEED
    assert len({row_seed({**IDENTITY, "image_id": name}, "union_box") for name in (None, "a", "b")}) == 3
    first, second = (make_prompt(MASKS, "union_box", np.random.default_rng(SEED)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("masks", "prompt", "reader", "message"),
    [
        (MASKS, "ellipse", None, "accepted: union_box"),
        (MASKS[0], "union_box", None, "accepted: \\(readers, height, width\\)"),
        (MASKS[2:], "union_box", None, "all masks are empty"),
        (MASKS, "reader_box", None, "accepts 0..2"),
        (MASKS, "reader_box", 3, "accepts 0..2"),
    ],
)
def test_impossible_prompts_are_refused(masks, prompt, reader, message):
    with pytest.raises(ValueError, match=message):
        make_prompt(masks, prompt, np.random.default_rng(0), reader)


# Rows


def test_row_keeps_the_image_bytes_and_every_mask():
    row = make_row(grey=7)
    assert set(row) == {*FEATURES, "pixels_sha256"}
    assert row["num_nonempty"] == 2
    assert row["malignancy"] is None
    np.testing.assert_array_equal(decode_masks(row), MASKS)
    assert decode_image(row).dtype == np.uint8
    assert PIL.Image.open(io.BytesIO(row["masks"][0]["bytes"])).mode == "1"


def test_sixteen_bit_images_are_kept():
    image = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    png = encode_png(image)
    row = image_row(png, [], "image", [])
    assert row["image"]["bytes"] == png
    assert decode_image(row).dtype == np.uint16
    np.testing.assert_array_equal(decode_image(row), image)


def test_masks_of_another_value_or_size_are_named():
    image = encode_png(np.zeros((8, 8), dtype=np.uint8))
    row = image_row(image, [encode_png(np.eye(8, dtype=np.uint8))], "image", ["mask"])  # 0 and 1 instead of 0 and 255
    np.testing.assert_array_equal(decode_masks(row)[0], np.eye(8, dtype=bool))
    with pytest.raises(UserError, match="mask-0: mask has grey levels"):
        image_row(image, [encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))], "image", ["mask-0"])
    with pytest.raises(UserError, match="mask-0: mask is 9x8 pixels; accepted: 8x8"):
        image_row(image, [encode_png(np.zeros((8, 9), dtype=bool))], "image", ["mask-0"])
    with pytest.raises(UserError, match="image: PNG of mode RGBA, 8 bits; accepted: 8 or 16 bit grey, or 8 bit RGB"):
        image_row(encode_png(np.zeros((8, 8, 4), dtype=np.uint8)), [], "image", [])


def test_rgb_images_are_kept_and_those_of_16_bits_refused():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    row = image_row(encode_png(image), [encode_png(np.ones((2, 3), dtype=bool))], "image", ["mask"])
    np.testing.assert_array_equal(decode_image(row), image)
    assert decode_masks(row).shape == (1, 2, 3)
    with pytest.raises(UserError, match="deep: PNG of mode RGB, 16 bits; accepted: 8 or 16 bit grey, or 8 bit RGB"):
        image_row(png_rgb16(2, 3), [], "deep", [])


def png_rgb16(height: int, width: int) -> bytes:
    """A PNG of 16-bit RGB, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(6 * width)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_build_opens_with_datasets_and_with_load_split(tmp_path):
    import datasets

    rows = [make_row("LIDC-IDRI-0001", index) for index in (1, 0)] + [make_row(VALIDATION, 0, grey=9)]
    rows.append(make_row("LIDC-IDRI-0001", 2, np.zeros_like(MASKS)))
    report = write_dataset(rows, tmp_path / "build", "Made up.")
    assert (report.slices["train"], report.slices["validation"]) == (2, 1)
    assert report.left_out == {"slices without any mask dropped": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build"]

    opened = datasets.load_dataset(str(tmp_path / "build"))
    assert {name: len(split) for name, split in opened.items()} == {"train": 2, "validation": 1}
    train = load_split(tmp_path / "build", "train")
    assert train["slice_index"] == [0, 1]
    np.testing.assert_array_equal(decode_masks(train[0]), MASKS)
    np.testing.assert_array_equal(decode_image(train[0]), decode_image(rows[1]))
    assert train.features == UNDECODED


def test_build_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [make_row(patient, index) for patient in ("LIDC-IDRI-0001", VALIDATION) for index in range(130)]
    write_dataset(rows, tmp_path / "a", "Made up.")
    write_dataset(reversed(rows), tmp_path / "b", "Made up.")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_large_splits_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("probabilistic_sam.data.build.SHARD_BYTES", 20_000)
    write_dataset([make_row(slice_index=index) for index in range(120)], tmp_path / "build", "Made up.")
    names = sorted(path.name for path in (tmp_path / "build" / "data").iterdir())
    assert len(names) > 1 and names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert load_split(tmp_path / "build", "train")["slice_index"] == list(range(120))


def test_large_images_are_written_in_row_groups_of_bounded_size(tmp_path, monkeypatch):
    """Twenty large images beside many small ones: all of them are among the rows of one file."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64), dtype=np.uint8)
    rows = [
        image_row(
            encode_png(noise[index] if index < 20 else noise[0] * 0),
            [encode_png(MASKS[0])],
            "image",
            ["mask"],
            patient_id="LIDC-IDRI-0001",
            nodule_id=0,
            slice_index=index,
            source="test",
        )
        for index in range(400)
    ]
    monkeypatch.setattr("probabilistic_sam.data.build.SHARD_BYTES", 60_000)
    write_dataset(rows, tmp_path / "build", "Made up.")
    paths = sorted((tmp_path / "build" / "data").iterdir())
    groups = [pq.ParquetFile(path).metadata for path in paths]
    sizes = [data.row_group(index).total_byte_size for data in groups for index in range(data.num_row_groups)]
    assert groups[0].num_rows > 20 and groups[0].num_row_groups > 1  # the large images are in the first file
    assert max(sizes) < 60_000 + 2 * len(rows[0]["image"]["bytes"])
    assert load_split(tmp_path / "build", "train")["slice_index"] == list(range(400))


def test_only_an_earlier_build_is_replaced(tmp_path):
    output = tmp_path / "build"
    write_dataset([make_row()], output, "Made up.")
    write_dataset([make_row(VALIDATION)], output, "Made up.")
    assert [path.name for path in (output / "data").iterdir()] == ["validation-00000-of-00001.parquet"]

    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than a build"):
        write_dataset([make_row()], output, "Made up.")
    assert (output / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        write_dataset([make_row()], output / "notes.txt", "Made up.")


def test_a_failed_build_leaves_the_earlier_one(tmp_path):
    output = tmp_path / "build"
    write_dataset([make_row()], output, "Made up.")
    before = (output / "README.md").read_bytes()

    def failing():
        yield make_row(slice_index=5)
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        write_dataset(failing(), output, "Made up.")
    with pytest.raises(UserError, match="two rows"):
        write_dataset([make_row(), make_row()], output, "Made up.")
    with pytest.raises(UserError, match="nothing to write"):
        write_dataset([], output, "Made up.")
    assert (output / "README.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build"]


def test_full_disk_leaves_the_earlier_build(tmp_path, monkeypatch):
    output = tmp_path / "build"
    write_dataset([make_row()], output, "Made up.")
    before = {path: path.read_bytes() for path in output.rglob("*.*")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("probabilistic_sam.data.build.pq.ParquetWriter.write_table", full)
    for path in (output, tmp_path / "other"):
        with pytest.raises(UserError, match=f"{path} cannot be written: No space left"):
            write_dataset([make_row(VALIDATION)], path, "Made up.")
    assert [path.name for path in tmp_path.iterdir()] == ["build"]
    assert {path: path.read_bytes() for path in output.rglob("*.*")} == before


# Manifest and card


def manifest_splits(path) -> dict:
    return json.loads((path / "manifest.json").read_text())["splits"]


def test_manifest_hash_is_computed_as_documented(tmp_path):
    row = make_row(slice_index=3, grey=7)
    write_dataset([row], tmp_path / "build", "Made up.")

    def array(kind: str, pixels: np.ndarray) -> bytes:
        return hashlib.sha256(f"{kind} (64, 64)\n".encode() + pixels.tobytes()).digest()

    image = np.full((64, 64), 7, dtype=np.uint8)
    image[0] = np.arange(64)
    pixels = hashlib.sha256(array("uint8", image) + b"".join(array("bool", mask) for mask in MASKS)).digest()
    later = ("image_id", "reader_ids")  # hashed only where they are known
    columns = dict.fromkeys(name for name in FEATURES if name not in ("image", "masks", *later)) | IDENTITY
    text = json.dumps(columns | {"num_nonempty": 2}, sort_keys=True)
    content = hashlib.sha256(text.encode() + pixels).digest()
    expected = {"train": {"rows": 1, "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = json.loads((tmp_path / "build/manifest.json").read_text())
    assert (manifest["format"], manifest["sources"], manifest["splits"]) == (1, ["slices"], expected)
    assert manifest["versions"]["numpy"] == np.__version__
    assert {"train": split_content(load_split(tmp_path / "build", "train"))} == expected


def test_manifest_depends_on_content_only(tmp_path, monkeypatch):
    rows = [make_row(patient, index) for patient in ("LIDC-IDRI-0001", VALIDATION) for index in range(5)]
    write_dataset(rows, tmp_path / "build", "Made up.")
    splits = manifest_splits(tmp_path / "build")
    assert {name: split["rows"] for name, split in splits.items()} == {"train": 5, "validation": 5}

    def again(png: bytes) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.open(io.BytesIO(png)).save(buffer, format="PNG", compress_level=0)
        assert buffer.getvalue() != png
        return buffer.getvalue()

    def copies(**changes):
        for row in reversed(rows):
            masks = [again(mask["bytes"]) for mask in row["masks"]]
            columns = {name: row[name] for name in IDENTITY} | changes
            yield image_row(again(row["image"]["bytes"]), masks, "image", ["mask"] * len(masks), **columns)

    monkeypatch.setattr("probabilistic_sam.data.build.SHARD_BYTES", 5_000)
    write_dataset(copies(), tmp_path / "other", "Made up elsewhere.")
    assert len(list((tmp_path / "other/data").iterdir())) > 2
    assert manifest_splits(tmp_path / "other") == splits
    for name in splits:
        assert split_content(load_split(tmp_path / "other", name)) == splits[name]

    hashes = {splits["train"]["sha256"]}
    for changed in ({"grey": 1}, {"masks": MASKS[[1, 0, 2]]}):
        write_dataset([make_row(**changed), *rows[1:]], tmp_path / "changed", "Made up.")
        hashes.add(manifest_splits(tmp_path / "changed")["train"]["sha256"])
    for columns in ({"z_mm": 0.1}, {"malignancy": [1, None, None]}):
        write_dataset(copies(**columns), tmp_path / "changed", "Made up.")
        hashes.add(manifest_splits(tmp_path / "changed")["train"]["sha256"])
    assert len(hashes) == 5


def test_card_counts_by_split_reader_and_source_and_lists_what_was_left_out(tmp_path):
    notes: list[Note] = []

    def source():
        yield make_row("LIDC-IDRI-0001", 0)
        yield make_row("LIDC-IDRI-0001", 1, MASKS[:1])
        yield make_row(VALIDATION, 0) | {"source": "dicom"}
        yield make_row("LIDC-IDRI-0001", 2, np.zeros_like(MASKS))
        notes.extend(Note("rows left out, damaged", 2, f"slice {number}: {'x' * 900}") for number in range(60))
        notes.append(Note("files passed over", 1000))

    write_dataset(source(), tmp_path / "build", "Made up.", notes)
    card = (tmp_path / "build/README.md").read_text()
    for line in (
        "| split | patients | scans | nodules | slices |",
        "| train | 1 | 1 | 1 | 2 |",
        "| split | 1 | 2 | 3 |",  # rows have one mask or three
        "| train | 1 | 1 | 0 |",
        "| validation | 0 | 1 | 0 |",
        "| split | dicom | slices |",
        "| train | 0 | 2 |",
        "| validation | 1 | 0 |",
        "- 1 slices without any mask dropped",
        "- 120 rows left out, damaged",
        "- 1,000 files passed over",
        "- and 10 more",
    ):
        assert f"\n{line}\n" in card, line
    assert card.count("- slice ") == CARD_NOTES and max(map(len, card.splitlines())) < 310


def card_of(rows, path, origin="Made up.") -> str:
    write_dataset(rows, path, origin)
    return (path / "README.md").read_text()


def test_card_has_a_column_for_every_number_of_readers(tmp_path):
    five = np.repeat(MASKS[:1], 5, axis=0)
    rows = [make_row(slice_index=0), *(make_row(slice_index=index, masks=five) for index in (1, 2))]
    card = card_of(rows, tmp_path / "build")
    assert "\n| split | 1 | 2 | 3 | 4 | 5 |\n" in card and "\n| train | 0 | 1 | 0 | 0 | 2 |\n" in card
    assert "masks of its readers: 3 to 5 per row" in card and "four" not in card
    with pytest.raises(UserError, match="image: 128 masks; accepted: at most 127"):
        make_row(masks=np.repeat(MASKS[:1], 128, axis=0))


def test_card_of_other_data_makes_no_claim_about_lidc(tmp_path):
    card = card_of([make_row() | {"source": "mine"}], tmp_path / "build", "Slices of ours.")
    assert "Slices of ours." in card and "masks of its readers: 3 per row" in card
    assert "\nThe source of these rows states neither a licence nor a citation.\n" in card
    for claim in ("license:", "LIDC", "CC BY", "Armato", "pylidc", "nodule\n", "lung", "- ct"):
        assert claim not in card, claim
    card = card_of([make_row()], tmp_path / "lidc", Origin("Real CT.", "LIDC-IDRI slices", is_lidc=True))
    for claim in ("license: cc-by-3.0", "pretty_name: LIDC-IDRI slices", "# LIDC-IDRI slices\n", "Armato", "- ct\n"):
        assert claim in card, claim


def test_card_counts_only_known_identities(tmp_path):
    rows = [make_row(slice_index=index) | {"scan_id": scan} for index, scan in enumerate((12, 12, 13))]
    assert "\n| train | 1 | 2 | 1 | 3 |\n" in card_of(rows, tmp_path / "all")
    rows[1]["scan_id"] = None
    assert "\n| train | 1 | at least 2 | 1 | 3 |\n" in card_of(rows, tmp_path / "some")
    rows = [row | {"scan_id": None} for row in rows]
    card = card_of(rows, tmp_path / "none", Origin("Crops.", has_nodules=False))
    assert "\n| train | 1 | unknown | unknown | 3 |\n" in card
    assert "| `nodule_id` | int32 | part of the identity of the row; the nodule is not known |" in card


@pytest.mark.parametrize(
    ("count", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (2_000_000, "n>1M")]
)
def test_card_names_the_size(count, category):
    report = BuildReport(Origin("Made up."))
    report.add({**IDENTITY, "num_nonempty": 1, "masks": [None]})
    report.slices["train"] = count
    assert dataset_card(report).data.size_categories == [category]


def test_load_split_errors_list_what_is_accepted(tmp_path):
    write_dataset([make_row()], tmp_path / "build", "Made up.")
    with pytest.raises(UserError, match="has no split 'test'; accepted: train"):
        load_split(tmp_path / "build", "test")
    with pytest.raises(UserError, match="no such directory"):
        load_split(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="holds no data"):
        load_split(tmp_path, "train")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; accepted: the output of"):
        load_split(tmp_path / "file", "train")
    (tmp_path / "build" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(UserError, match="does not open as Parquet"):
        load_split(tmp_path / "build", "train")


def test_incomplete_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("probabilistic_sam.data.build.SHARD_BYTES", 20_000)
    write_dataset([make_row(slice_index=index) for index in range(120)], tmp_path / "build", "Made up.")
    shards = sorted((tmp_path / "build" / "data").iterdir())
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"split 'train' is incomplete or mixes several builds: {len(shards) - 1}"):
        load_split(tmp_path / "build", "train")


def test_columns_of_another_type_are_refused(tmp_path):
    import datasets

    write_dataset([make_row()], tmp_path / "build", "Made up.")
    path = tmp_path / "build" / "data" / "train-00000-of-00001.parquet"
    rows = load_split(tmp_path / "build", "train")
    rows.cast_column("nodule_id", datasets.Value("string")).to_parquet(path)
    with pytest.raises(UserError, match=r"column 'nodule_id' is Value\('string'\); accepted: Value\('int32'\)"):
        load_split(tmp_path / "build", "train")
    rows.remove_columns("masks").to_parquet(path)
    with pytest.raises(UserError, match="has no column 'masks'; accepted: the output of training/build_dataset"):
        load_split(tmp_path / "build", "train")


@pytest.mark.parametrize("saved", [False, True])
def test_builds_of_other_software_need_three_columns(tmp_path, saved):
    first = make_row(grey=3)
    columns = {"image": [first["image"]] * 2, "masks": [first["masks"], first["masks"][:1]], "patient_id": ["a", "b"]}
    features = datasets.Features({name: FEATURES[name] for name in columns} | {"mine": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns | {"mine": ["x", "y"]}, features=features)
    if saved:
        datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path)
    else:
        (tmp_path / "data").mkdir()
        rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    train = load_split(tmp_path, "train")
    assert train.features == UNDECODED and train["patient_id"] == ["a", "b"]
    assert {name for name, value in train[0].items() if value is not None} == {*columns, "image_id"}
    np.testing.assert_array_equal(decode_image(train[1]), decode_image(first))
    assert [len(decode_masks(row)) for row in train] == [3, 1]
    assert row_seed(train[0], "union_box") != row_seed(train[1], "union_box")
    assert split_content(train)["rows"] == 2
    with pytest.raises(UserError, match="has no split 'test'; accepted: train"):
        load_split(tmp_path, "test")


def hand_made(path, columns, **types):
    """A saved `DatasetDict` with one split `train`, as other software makes it."""
    features = datasets.Features({name: types.get(name) or FEATURES[name] for name in columns})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=features)}).save_to_disk(path)
    return path


def pngs(*arrays):
    return [{"bytes": encode_png(array), "path": None} for array in arrays]


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)
CORNER, NOTHING = np.zeros((2, 3, 4), dtype=bool)
CORNER[0, 0] = True


def test_rows_without_an_identity_are_numbered(tmp_path):
    columns = {"image": pngs(GREY) * 3, "masks": [pngs(CORNER)] * 3, "patient_id": ["a"] * 3}
    train = load_split(hand_made(tmp_path / "none", columns), "train")
    assert train["image_id"] == ["0", "1", "2"]
    assert len({row_seed(row, "union_box") for row in train}) == 3
    some = columns | {"image_id": ["x", None, None], "slice_index": [None, 7, None]}
    assert load_split(hand_made(tmp_path / "some", some), "train")["image_id"] == ["x", None, "2"]


def test_absent_readers_may_be_null_and_rows_nobody_annotated_are_left_out(tmp_path, capsys):
    masks = [[None, *pngs(CORNER, NOTHING)], [*pngs(NOTHING), None], [], [None, *pngs(CORNER)], [None, None]]
    columns = {"image": pngs(GREY) * 5, "masks": masks, "patient_id": list("abcde")}
    train = load_split(hand_made(tmp_path / "data", columns), "train")
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'data'}: split 'train': 3 of 5 rows left out, which no reader annotated\n"
    )
    encoded = train.with_format("arrow")[:].to_pylist()
    assert [(row["patient_id"], row["image_id"]) for row in encoded] == [("a", "0"), ("d", "3")]
    np.testing.assert_array_equal(decode_masks(encoded[0]), [CORNER, NOTHING])
    np.testing.assert_array_equal(decode_masks(encoded[1]), [CORNER])
    columns["masks"] = masks[1:3] * 2 + masks[4:]
    with pytest.raises(UserError, match="'train': no reader annotated any of its 5 rows; accepted: at least one mask"):
        load_split(hand_made(tmp_path / "nobody", columns), "train")


def test_columns_are_cast_where_nothing_is_lost(tmp_path):
    value, of = datasets.Value, datasets.List
    columns = {
        "image": pngs(GREY) * 2,
        "masks": [pngs(CORNER)] * 2,
        "patient_id": [7, 8],
        "image_id": ["x", "y"],
        "scan_id": [1.0, None],
        "nodule_id": [3, None],
        "z_mm": [5, 6],
        "malignancy": [[1], [None]],
        "source": [None, None],
        "reader_ids": [["r"], ["r"]],
    }
    types = {
        "image": datasets.Image(mode="L"),
        "masks": of(datasets.Image(mode="L")),
        "patient_id": value("int64"),
        "image_id": value("large_string"),
        "scan_id": value("float64"),
        "nodule_id": value("int64"),
        "z_mm": value("int32"),
        "malignancy": of(value("int64")),
        "source": value("null"),
        "reader_ids": of(value("large_string")),
    }
    train = load_split(hand_made(tmp_path / "data", columns, **types), "train")
    assert train.features == UNDECODED
    expected = columns | {"patient_id": ["7", "8"]}
    for name in types.keys() - {"image", "masks"}:
        assert train[name] == expected[name], name
    np.testing.assert_array_equal(decode_row(train[0])[0], GREY)
    for number, (name, kind, values) in enumerate(
        [
            ("nodule_id", value("int64"), [2**40, 1]),
            ("nodule_id", value("float64"), [0.5, 1]),
            ("image_id", value("float64"), [1.0, 2.0]),
            ("source", value("bool"), [True, False]),
            ("patient_id", datasets.ClassLabel(names=["a", "b"]), [0, 1]),
            ("image", value("string"), ["a.png", "b.png"]),
        ]
    ):
        path = hand_made(tmp_path / str(number), columns | {name: values}, **types | {name: kind})
        with pytest.raises(UserError, match=rf"column '{name}' is {re.escape(str(kind))}; accepted: ") as error:
            load_split(path, "train")
        assert "\n" not in str(error.value)


def test_split_of_another_name_is_named_with_the_way_to_rename_it(tmp_path):
    columns = {"image": pngs(GREY), "masks": [pngs(CORNER)], "patient_id": ["a"]}
    hand_made(tmp_path, columns)
    (tmp_path / "train").rename(tmp_path / "val")
    message = (
        r"has no split 'validation'; to rename one in Python: data\['validation'\] = data.pop\('val'\); accepted: "
    )
    with pytest.raises(UserError, match=message + "a dataset with train, validation, test"):
        load_split(tmp_path, "validation")


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_images_and_masks_are_upright(orientation, turns):
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation

    def turned(array):
        buffer = io.BytesIO()
        PIL.Image.fromarray(array).save(buffer, format="PNG", exif=exif)
        return {"bytes": buffer.getvalue(), "path": None}

    for image in (GREY, GREY.astype(np.uint16) * 300, np.stack([GREY, GREY + 1, GREY + 2], axis=-1)):
        row = {"image": turned(image), "masks": [turned(CORNER), *pngs(np.rot90(CORNER, turns))]}
        pixels, masks = decode_row(row)
        np.testing.assert_array_equal(pixels, np.rot90(image, turns))
        np.testing.assert_array_equal(masks, [np.rot90(CORNER, turns)] * 2)
        opened = {"image": PIL.Image.open(io.BytesIO(row["image"]["bytes"]))}
        np.testing.assert_array_equal(decode_image(opened), np.rot90(image, turns))


def test_masks_have_two_values():
    for values in (CORNER, CORNER * 1, CORNER.astype(np.uint8) * 255, CORNER.astype(np.float32), NOTHING * 1.0):
        image = PIL.Image.fromarray(values) if values.dtype != int else values
        np.testing.assert_array_equal(decode_masks({"masks": [image]})[0], values > 0)
    labels = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    for values, found in (
        (labels, "1, 2, 3"),
        (labels // 2 * 2, "2"),
        (np.array([[1, 255]], np.uint8), "1, 255"),
        (labels * np.float32(0.25), "0.25, 0.5, 0.75"),
        (labels.astype(np.uint16) // 3 * 65535, "65535"),
    ):
        with pytest.raises(
            UserError, match=f"^patient_id p: mask has values .*{found}.*; accepted: 1 bit, or grey with"
        ):
            decode_masks({"masks": [PIL.Image.fromarray(values)], "patient_id": "p"})
    for mode in ("P", "RGB", "LA", "RGBA"):
        with pytest.raises(UserError, match="mask in colours or with transparency; accepted: 1 bit"):
            decode_masks({"masks": [PIL.Image.new(mode, (4, 3))]})


def unsafe_images(folder):
    """Images of a dataset by strangers, which Pillow would open, and why they are refused."""
    stack, wide, script = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pages = [PIL.Image.new("L", (8, 8), value) for value in (0, 1)]
    pages[0].save(stack, "TIFF", save_all=True, append_images=pages[1:])
    pages[0].save(wide, "PNG")
    pages[0].save(script, "EPS")  # Pillow would run Ghostscript
    os.mkfifo(folder / "endless.png")
    return [
        ({"bytes": stack.getvalue(), "path": None}, "2 frames"),
        ({"bytes": wide.getvalue(), "path": None}, "8x8 pixels"),
        ({"bytes": script.getvalue(), "path": None}, "cannot identify"),
        ({"bytes": None, "path": str(folder / "endless.png")}, "not a regular file"),
    ]


def test_rows_of_other_software_that_do_not_decode_are_named(tmp_path, monkeypatch):
    row = make_row() | {"image_id": "x"}
    for mode, value in (("RGBA", (0, 0, 0, 0)), ("I", 70_000), ("F", 0.5)):
        with pytest.raises(
            UserError, match=f"slice_index 0, image_id x: image of mode {mode}; accepted: 8 or 16 bit grey"
        ):
            decode_image(row | {"image": PIL.Image.new(mode, (2, 2), value)})
    for kind, deep in (("png", rgb16_png()), ("tiff", rgb16_tiff())):
        with pytest.raises(UserError, match="image_id x: image with more than 8 bits per channel in colour"):
            decode_image(row | {"image": {"bytes": deep, "path": f"a.{kind}"}})
    with pytest.raises(UserError, match="image_id x: no image"):
        decode_image(row | {"image": None})
    for name, decode in (("image", decode_image), ("mask", decode_masks)):
        for bad in ({"bytes": b"x", "path": None}, {"bytes": None, "path": str(tmp_path / "nowhere.png")}):
            with pytest.raises(UserError, match=f"image_id x: {name} does not decode"):
                decode(row | {"image": bad, "masks": [bad]})
    with monkeypatch.context() as patch:
        patch.setattr("probabilistic_sam.data.format.MAX_PIXELS", 63)
        for bad, why in unsafe_images(tmp_path):
            for name, decode in (("image", decode_image), ("mask", decode_masks)):
                with pytest.raises(UserError, match=f"image_id x: {name} does not decode .*{why}"):
                    decode(row | {"image": bad, "masks": [bad]})
    wide = row | {"image": {"bytes": encode_png(np.zeros((64, 65), np.uint8)), "path": None}}
    with pytest.raises(UserError, match="image_id x: image of 65x64 pixels and masks of 64x64; accepted: one size"):
        decode_row(wide)
    for masks in (None, [], [PIL.Image.new("1", (2, 2)), PIL.Image.new("1", (2, 3))]):
        with pytest.raises(UserError, match=r"image_id x: masks of shapes .*; accepted: one or more masks"):
            decode_masks(row | {"masks": masks})
