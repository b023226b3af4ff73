"""Source `slices`: a directory or archive of PNG crops in the layout of the public LIDC-IDRI-slices set.

    LIDC-IDRI-slices/LIDC-IDRI-dddd/nodule-n/{images,mask-0,mask-1,mask-2,mask-3}/slice-k.png

The first folder may be missing. An archive is read once, front to back, and never unpacked to disk.
"""

import csv
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..archives import Layout, NamedFile, read_files
from ..card import Origin
from ..format import NUM_READERS, image_row
from . import TITLE

ORIGIN = Origin(
    """\
Real CT: crops in the layout of the public LIDC-IDRI-slices set, unchanged. In that set a crop has 128x128 pixels
around a nodule at the scan's own pixel spacing. Its grey values are scaled from its own minimum and maximum to 0..255;
they are not Hounsfield units. Only slices that a reader annotated are included.""",
    TITLE,
    is_lidc=True,
)
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


def read_slices(path: str | os.PathLike[str], index: str | os.PathLike[str] | None = None) -> Iterator[dict]:
    """Yield a row for each slice of a directory or of a `.tar` / `.tar.gz` archive, in the order they are read.

    Args:
        path: the directory or archive.
        index: CSV with scan, position, spacing, annotations and malignancy of each slice; without it, these columns
            are null.

    Raises:
        UserError: a file or archive member that does not follow the layout (the message names it).
    """
    columns = read_index(index) if index is not None else None
    for (patient_id, nodule, place), files in read_files([path], LAYOUT):
        yield _row((patient_id, int(nodule), int(place)), files, columns)


def read_index(path: str | os.PathLike[str]) -> dict[SliceKey, dict[str, Any]]:
    """Read the index CSV: for each (patient, nodule, slice) the columns that are not in the PNG files.

    Unknown values become None: ids and ratings of 0 or less (no reader, or an annotation that was not found), `nan`,
    and empty fields.

    Raises:
        UserError: no such file, a missing column, a value that is not a number, or a repeated slice.
    """
    path = Path(path)
    readers = range(NUM_READERS)
    needed = ["patient", "nodule", "slice", "scan_id", "series_uid", "z_mm", "pixel_spacing_mm", "slice_thickness_mm"]
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
                        "scan_id": _positive(line["scan_id"]),
                        "series_uid": line["series_uid"] or None,
                        "z_mm": _finite(line["z_mm"]),
                        "pixel_spacing_mm": _finite(line["pixel_spacing_mm"]),
                        "slice_thickness_mm": _finite(line["slice_thickness_mm"]),
                        "annotation_ids": [_positive(line[f"ann{reader}"]) for reader in readers],
                        "malignancy": [_positive(line[f"mal{reader}"]) for reader in readers],
                    }
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}: line {lines.line_num}: {error}; accepted: numbers") from error
                if key in columns:
                    raise UserError(f"{path}: line {lines.line_num}: slice {key} is repeated")
                columns[key] = values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the index does not open as CSV: {error}") from error
    return columns


def _positive(text: str) -> int | None:
    value = int(text) if text else 0
    return value if value > 0 else None


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
