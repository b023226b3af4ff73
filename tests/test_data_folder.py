"""Source `folder`: own images and masks as files, their table and splits, and one line for each kind of bad input."""

import io
import json
import struct
import sys
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from deep_colour import rgb16_png, rgb16_tiff
from tiny import evaluate_rows, load_script

from probabilistic_sam import processing_probabilistic_sam
from probabilistic_sam.data import split_of
from probabilistic_sam.data.folder import PROMPT_SHARE, FolderSource, suggested_crop_size
from probabilistic_sam.data.format import decode_image, decode_masks, encode_png, image_row, load_split
from probabilistic_sam.errors import UserError, run

CELLS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cells-several-readers.tar.gz"
# Names whose hash puts them in these splits
TRAIN, VALIDATION = (
    [name for name in map("case-{}".format, range(60)) if split_of(name) == split] for split in ("train", "validation")
)
GREY = (np.arange(48) * 5).reshape(6, 8).astype(np.uint8)


def square(top: int, left: int, side: int, shape=(6, 8)) -> np.ndarray:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + side, left : left + side] = 255
    return mask


def save(path: Path, pixels, **options) -> Path:
    """Write an array as the kind of image that the suffix names, or bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, bytes):
        path.write_bytes(pixels)
    else:
        PIL.Image.fromarray(pixels).save(path, **options)
    return path


def make_folder(root: Path, images=(TRAIN[0], VALIDATION[0])) -> Path:
    """Two readers; each annotated a square in each image, the second of another size."""
    for name in images:
        save(root / f"images/{name}.png", GREY)
        save(root / f"masks/ann/{name}.png", square(1, 2, 2))
        save(root / f"masks/bob/{name}.png", square(1, 2, 4))
    return root


def rows_of(root: Path, **options) -> dict[str, dict]:
    return {row["image_id"]: row for row in FolderSource(root, **options)}


def test_rgb_rows_are_evaluated_like_grey_ones():
    from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor

    weights = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
    model, processor = (kind.from_pretrained(weights) for kind in (ProbabilisticSamModel, ProbabilisticSamProcessor))
    grey = np.random.default_rng(0).integers(0, 255, size=(70, 90), dtype=np.uint8)
    masks = [encode_png(square(20, 30, side, grey.shape) > 0) for side in (12, 20)]
    rows = [
        image_row(encode_png(image), masks, "image", ["a", "b"], patient_id="p", image_id="x", source="folder")
        for image in (grey, np.stack([grey] * 3, axis=-1), np.stack([grey, 255 - grey, grey], axis=-1))
    ]
    scores = [one[0]["all"]["ged"] for one in evaluate_rows(model.eval(), processor, rows, "union_box", 4, [0])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and scores[0] != scores[2]


@pytest.fixture
def build(monkeypatch, capsys):
    """Run `build_dataset.py folder` in this process; returns exit code, stdout and stderr."""
    module = load_script("build_dataset")
    monkeypatch.setattr(module, "tqdm", lambda rows, **_: rows)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["build_dataset.py", "folder", *map(str, arguments)])
        try:
            run(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_absent_readers_are_left_out_and_empty_masks_are_kept(tmp_path):
    make_folder(tmp_path)
    (tmp_path / f"masks/ann/{TRAIN[0]}.png").unlink()
    save(tmp_path / f"masks/bob/{VALIDATION[0]}.png", np.zeros((6, 8), dtype=np.uint8))
    rows = rows_of(tmp_path)
    first, second = rows[TRAIN[0]], rows[VALIDATION[0]]
    assert first["reader_ids"] == ["bob"] and second["reader_ids"] == ["ann", "bob"]
    np.testing.assert_array_equal(decode_masks(first), [square(1, 2, 4) > 0])
    np.testing.assert_array_equal(decode_masks(second), [square(1, 2, 2) > 0, np.zeros((6, 8), dtype=bool)])
    assert (first["num_nonempty"], second["num_nonempty"]) == (1, 1)
    assert first["patient_id"] == TRAIN[0] and first["source"] == "folder"
    assert first["pixel_spacing_mm"] is None and first["nodule_id"] is None


def test_images_of_every_kind_keep_their_pixels(tmp_path):
    deep, colour = GREY.astype(np.uint16) * 200, np.stack([GREY, GREY // 2, GREY // 3], axis=-1)
    smooth = np.full((6, 8), 90, dtype=np.uint8)  # survives JPEG
    files = {
        "a.b.png": GREY, "c.tif": deep, "d.png": deep, "e.tiff": colour, "f.PNG": colour, "g.jpg": smooth,
        "h.tif": GREY.astype(np.float32),
    }  # fmt: skip
    for name, pixels in files.items():
        save(tmp_path / "images" / name, pixels)
        save(tmp_path / f"masks/ann/{name.rsplit('.', 1)[0]}.tif", square(0, 0, 2) > 0)
    (tmp_path / "table.csv").write_text("id,split\na.b,validation\n" + "".join(f"{name},train\n" for name in "cdefgh"))
    rows = rows_of(tmp_path)
    assert list(rows) == ["a.b", "c", "d", "e", "f", "g", "h"]
    for row, expected in zip(rows.values(), files.values(), strict=True):
        np.testing.assert_array_equal(decode_image(row), expected)
        assert decode_image(row).dtype == (np.uint8 if expected.dtype == np.uint8 else np.uint16)


def test_photos_are_larger_than_slices(tmp_path):
    photo, mask = np.zeros((2049, 2048), np.uint8), np.zeros((2049, 2048), np.uint8)
    mask[5:9, 5:9] = 255
    save(tmp_path / f"images/{TRAIN[0]}.png", photo)
    save(tmp_path / f"masks/ann/{TRAIN[0]}.png", mask)
    (row,) = FolderSource(tmp_path)._rows(TRAIN[0], tmp_path / f"images/{TRAIN[0]}.png")
    assert decode_image(row).shape == (2049, 2048) and decode_masks(row).sum() == 16
    with pytest.raises(UserError, match="2048x2049 pixels; accepted: at most 4,194,304"):  # those of an archive
        image_row(row["image"]["bytes"], [], "image", [])


@pytest.mark.parametrize("low", [-2000, 0])
def test_dicom_files_keep_their_values_and_spacing(tmp_path, low):
    from dicom_files import write_slice

    make_folder(tmp_path, [TRAIN[0], VALIDATION[0]])
    values = np.arange(36).reshape(6, 6) + 7
    values[0, 0] = low
    (tmp_path / f"images/{TRAIN[0]}.png").unlink()
    write_slice(
        tmp_path / f"images/{TRAIN[0]}.dcm",
        values,
        "1.2.3",
        0.0,
        "1.2.3.4",
        PixelRepresentation=1,
        PixelSpacing=[0.5, 0.5],
    )
    for reader in ("ann", "bob"):
        save(tmp_path / f"masks/{reader}/{TRAIN[0]}.png", square(1, 2, 2, (6, 6)))
    row = rows_of(tmp_path)[TRAIN[0]]
    # As in the source `dicom`: 1024 is added where there are negative values, and lower ones become 0
    expected = np.maximum(values + 1024, 0) if low < 0 else values
    np.testing.assert_array_equal(decode_image(row), expected)
    assert row["pixel_spacing_mm"] == 0.5
    (tmp_path / "table.csv").write_text(f"id,spacing_mm\n{TRAIN[0]},0.25\n")
    assert rows_of(tmp_path)[TRAIN[0]]["pixel_spacing_mm"] == 0.25


def test_components_are_rows_of_their_own(tmp_path):
    make_folder(tmp_path)
    left, right = square(0, 0, 2), square(3, 5, 3)
    save(tmp_path / f"masks/ann/{TRAIN[0]}.png", left | right)
    save(tmp_path / f"masks/bob/{TRAIN[0]}.png", square(3, 5, 2))
    source = FolderSource(tmp_path, objects="components")
    rows = {row["image_id"]: row for row in source}
    empty = np.zeros_like(left)
    assert list(rows) == [f"{TRAIN[0]}:1", f"{TRAIN[0]}:2", f"{VALIDATION[0]}:1"]
    np.testing.assert_array_equal(decode_masks(rows[f"{TRAIN[0]}:1"]), np.array([left, empty]) > 0)
    np.testing.assert_array_equal(decode_masks(rows[f"{TRAIN[0]}:2"]), np.array([right, square(3, 5, 2)]) > 0)
    assert {rows[name]["patient_id"] for name in list(rows)[:2]} == {TRAIN[0]}
    assert source.sizes == [2, 3, 4]
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.parametrize(
    ("sizes", "shorter", "expected"),
    [
        # 90th percentile: rank .9 * 10 = 9, so 27; 27 / .75 = 36 is more than 2 * 11, and 64 the next multiple of 32
        ([4, 6, 7, 9, 11, 11, 15, 18, 22, 27, 90], [512], 64),
        # 2 * 100 = 200 is more than 120 / .75 = 160; the next multiple of 32 is 224
        ([100] * 9 + [120] * 2, [512], 224),
        # 300 / .75 = 400, but half of the images have at most 350 rows
        ([300] * 5, [350, 350, 512], 350),
        ([2, 2], [6], 6),
    ],
)
def test_crop_size_suits_most_objects(sizes, shorter, expected):
    assert suggested_crop_size(sizes, shorter) == expected


def test_suggested_crop_size_is_explained(tmp_path):
    source = FolderSource(make_folder(tmp_path))
    source.sizes, source.shorter_sides = [100] * 9 + [160, 200], [512]
    # 90th percentile 160 (rank 9 of 0 to 10), 160 / .75 = 213 < 224; 100 / 224 = 45 %; 168 = .75 * 224: 10 of 11 fit
    assert source.size_line() == (
        "larger side of the objects: median 100, 90th percentile 160 pixels; suggested crop_size: 224 (the median "
        "object takes 45% of a window's side; 91% of the windows have this side, those of larger objects grow with "
        "them)"
    )
    assert PROMPT_SHARE == processing_probabilistic_sam.PROMPT_SHARE


def test_command_writes_a_build_with_what_the_user_states(build, tmp_path):
    make_folder(tmp_path / "in", [*TRAIN[:2], VALIDATION[0], TRAIN[2]])
    for reader in ("ann", "bob"):
        save(tmp_path / f"in/masks/{reader}/{TRAIN[2]}.png", np.zeros((6, 8), dtype=np.uint8))
    output = tmp_path / "out"
    arguments = ("--input", tmp_path / "in", "--output", output)
    code, out, err = build(*arguments, "--license", "cc-by-4.0", "--source-name", "My cells")
    assert code == 0, err
    assert "1 images without any mask dropped" in out
    assert "median 4, 90th percentile 4 pixels; suggested crop_size: 6 (the median object takes 67% of" in out
    assert "train 2 groups, 2 images; validation 1 groups, 1 images" in out
    train = load_split(output, "train")
    assert train["image_id"] == sorted(TRAIN[:2]) and train["reader_ids"][0] == ["ann", "bob"]
    card = (output / "README.md").read_text()
    for line in ("license: cc-by-4.0", "# My cells", "| split | groups | images |", "| train | 2 | 2 |"):
        assert f"\n{line}\n" in card
    assert "Licence, as stated when this dataset was built: cc-by-4.0." in card and "One row is one image" in card
    for claim in ("LIDC", "nodule", "patients", "slice", "pylidc", "Armato", "lung"):
        assert claim not in card, claim
    first = json.loads((output / "manifest.json").read_text())["splits"]
    assert json.loads((output / "manifest.json").read_text())["truth"] is None
    assert build(*arguments)[0] == 0
    assert json.loads((output / "manifest.json").read_text())["splits"] == first
    assert "states neither a licence nor a citation" in (output / "README.md").read_text()


def test_table_gives_groups_spacing_and_splits(build, tmp_path):
    make_folder(tmp_path / "in", ["a", "b", "c"])
    table = tmp_path / "in/table.csv"
    table.write_text(f"id,group,spacing_mm\na,{TRAIN[0]},0.5\nb, {TRAIN[0]} ,\nc,{VALIDATION[0]},2\n")
    assert build("--input", tmp_path / "in", "--output", tmp_path / "hash")[0] == 0
    train = load_split(tmp_path / "hash", "train")
    assert train["patient_id"] == [TRAIN[0]] * 2 and train["pixel_spacing_mm"] == [0.5, None]
    assert load_split(tmp_path / "hash", "validation")["pixel_spacing_mm"] == [2.0]

    table.write_text("id,split\na,validation\nb,train\nc,test\n", encoding="utf-8-sig")
    code, _, err = build("--input", tmp_path / "in", "--output", tmp_path / "table")
    assert code == 0, err
    found = [load_split(tmp_path / "table", split)["image_id"] for split in ("train", "validation", "test")]
    assert found == [["b"], ["a"], ["c"]]
    assert "as the table of the source states" in (tmp_path / "table/README.md").read_text()


def test_names_with_accents_in_two_spellings_are_one(tmp_path):
    """macOS decomposes them, other systems do not."""
    composed, decomposed = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFC", "NFD"))
    make_folder(tmp_path)
    save(tmp_path / f"images/{decomposed}.png", GREY)
    save(tmp_path / f"masks/ann/{composed}.png", square(1, 2, 2))
    (tmp_path / "table.csv").write_text(f"id,spacing_mm\n{decomposed},0.5\n", encoding="utf-8")
    assert rows_of(tmp_path)[composed]["pixel_spacing_mm"] == 0.5


def test_empty_splits_are_refused_with_the_ways_out(build, tmp_path):
    make_folder(tmp_path / "in", TRAIN[:2])
    code, _, err = build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists()
    assert "the split validation would be empty (groups: train 2, validation 0, test 0)" in err
    assert "accepted: more groups" in err and "a column split in table.csv" in err and err.count("\n") == 1


def test_folder_that_nobody_annotated_is_refused(build, tmp_path):
    for name in (TRAIN[0], VALIDATION[0]):
        save(tmp_path / f"in/images/{name}.png", GREY)
        save(tmp_path / f"in/masks/ann/{name}.png", np.zeros((6, 8), dtype=np.uint8))
    code, _, err = build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 2 and "nothing to write, the source has no image that a reader annotated" in err


def tiff(pixels) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="TIFF")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG: its size, and no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"
    written = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


FIRST = TRAIN[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            f"masks/ann/{FIRST}.png",
            square(0, 0, 2, (6, 9)),
            "mask is 9x6 pixels; accepted: 8x6, the size of its image",
        ),
        (f"masks/ann/{FIRST}.png", square(0, 0, 2) // 2, "mask has values 127; accepted: 1 bit, or grey with values"),
        (f"masks/ann/{FIRST}.png", GREY, "mask has values 5, 10, 15, 20; accepted: 1 bit"),
        (
            f"masks/ann/{FIRST}.png",
            np.stack([GREY] * 3, axis=-1),
            "mask in colours or with transparency; accepted: 1 bit",
        ),
        (f"masks/ann/{FIRST}.tif", square(0, 0, 2), f"same id as {FIRST}.png; accepted: one file per id"),
        ("masks/ann/other.png", square(0, 0, 2), "other.png: no image has the id 'other'; accepted: images/ID"),
        ("masks/eve/other.png", square(0, 0, 2), "eve: none of its 1 files has the id of an image"),
        ("masks/stray.png", square(0, 0, 2), "stray.png: is not in the folder of a reader"),
        (f"images/{FIRST}.tif", GREY, f"{FIRST}.tif: same id as {FIRST}.png; accepted: one file per id"),
        ("images/unannotated.png", GREY, "unannotated.png: no reader has a mask of it; accepted: at least one mask"),
        ("images/notes.txt", b"x", "notes.txt: unexpected; accepted: files of the kinds .png"),
        (f"images/{FIRST}.png", b"x", f"{FIRST}.png: the image is not an image; accepted: PNG"),
        (
            f"images/{FIRST}.png",
            rgb16_png(),
            "more than 8 bits per channel in colour or with transparency; accepted: grey of 8 or",
        ),
        (
            f"images/{FIRST}.png",
            rgb16_tiff(),
            "more than 8 bits per channel in colour or with transparency; accepted: grey of 8 or",
        ),
        (f"images/{FIRST}.png", tiff(np.full((6, 8), np.nan, dtype=np.float32)), "NaN or infinite grey values"),
        (f"images/{FIRST}.png", tiff(np.full((6, 8), 0.5, dtype=np.float32)), "grey values with fractions; accepted"),
        (f"images/{FIRST}.png", tiff(np.full((6, 8), -3, dtype=np.int32)), "grey values from -3 to -3; accepted"),
        (f"images/{FIRST}.png", GREY[:1, :1], "image of 1x1 pixels; accepted: at least 2x2"),
        (f"images/{FIRST}.png", png_header(8001, 8000), "has 8001 x 8000 pixels; accepted: .* 64 million pixels"),
        (f"masks/ann/{FIRST}.png", np.stack([GREY, square(1, 2, 2)], axis=-1), "mask with transparency; accepted: 1"),
        ("table.csv", b"id,group\nzz,a\n", "line 2: no image has the id 'zz'; accepted: ids of files in images/"),
        ("table.csv", f"id\n{FIRST}\n{FIRST}\n".encode(), "line 3: id .* is repeated; accepted: one line per image"),
        ("table.csv", b"name\n", "columns name; accepted: id, and any of group, spacing_mm, split"),
        ("table.csv", b"", "columns .none.; accepted: id, and any of group"),
        ("table.csv", b"id,spacing\n", "columns id, spacing; accepted: id, and any of group"),
        ("table.csv", f"id,spacing_mm\n{FIRST},-1\n".encode(), "line 2: spacing_mm is '-1'; accepted: a number of mm"),
        ("table.csv", f"id,spacing_mm\n{FIRST},nan\n".encode(), "line 2: spacing_mm is 'nan'; accepted: a number"),
        (
            "table.csv",
            f"id,split\n{FIRST},dev\n".encode(),
            "line 2: split is 'dev'; accepted: train, validation, test",
        ),
        ("table.csv", b"id\n\xff\n", "does not open as CSV in UTF-8"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    make_folder(tmp_path)
    save(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        list(FolderSource(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_groups_in_two_splits_and_missing_splits_are_refused(tmp_path):
    make_folder(tmp_path, ["a", "b"])
    (tmp_path / "table.csv").write_text("id,group,split\na,g,train\nb,g,validation\n")
    with pytest.raises(UserError, match="group 'g' is in train and, with 'b', in validation; accepted: one split per"):
        FolderSource(tmp_path)
    (tmp_path / "table.csv").write_text("id,group\na,g\nb,\n")
    with pytest.raises(UserError, match="no group for 'b', one of 1 such images; accepted: a group for every image"):
        FolderSource(tmp_path)
    (tmp_path / "table.csv").write_text("id,split\na,train\n")
    with pytest.raises(UserError, match="no split for 'b'; accepted: a split for every image, or for none"):
        FolderSource(tmp_path)


def test_missing_folders_are_refused(build, tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path / "nowhere" / "images", tmp_path / "nowhere" / "masks"):
        code, _, err = build("--input", tmp_path / "nowhere", "--output", tmp_path / "out")
        assert code == 2 and f"{missing}: no such directory; accepted: images/ID.EXT" in err and err.count("\n") == 1
        missing.mkdir()
        if missing.name == "images":
            save(missing / "a.png", GREY)
    with pytest.raises(UserError, match="masks: holds no folder of a reader"):
        FolderSource(tmp_path / "nowhere")


def test_cells_of_thirteen_readers(build, tmp_path):
    if not CELLS.is_file():
        pytest.skip("needs cells-several-readers.tar.gz, phase-contrast images of cells with the masks of 13 readers")
    with tarfile.open(CELLS) as archive:
        archive.extractall(tmp_path, filter="data")
    every = FolderSource(tmp_path / "cells")
    assert len(every.images) == 104 and len(every.masks) == 13
    numbers = [sum(image_id in masks for masks in every.masks.values()) for image_id in every.images]
    assert (min(numbers), max(numbers)) == (8, 10)

    kept = sorted(every.images)[::6]
    for folder in (tmp_path / "cells/images", *(tmp_path / "cells/masks").iterdir()):
        for path in folder.iterdir():
            if path.stem not in kept:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    code, out, err = build("--input", tmp_path / "cells", "--output", tmp_path / "out")
    assert code == 0, err
    rows = [row for split in ("train", "validation", "test") for row in load_split(tmp_path / "out", split)]
    assert sorted(row["image_id"] for row in rows) == kept
    for row in rows:
        assert 8 <= len(row["reader_ids"]) == len(decode_masks(row)) <= 10
        assert decode_image(row).shape in ((405, 512), (515, 650))
