"""Read a scan, a stack of evenly spaced slices, with its position in the patient. Needs the extra `scan`.

    with open_scan("series") as scan:  # folder, zip, multi-frame DICOM, .nii or .nii.gz
        print(scan.geometry.affine, scan.spacing_mm)
        slices = scan.read(12, 20)  # (9, rows, columns)

Axes of a `Scan` are slices, rows and columns. Slices ascend from the feet to the head. Rows and columns are those that
a viewer shows: of DICOM with axial slices as they are stored, otherwise those of the closest axial plane, with rows
from anterior to posterior and columns from the patient's right to left. An oblique scan keeps its own slices.

Patient coordinates are DICOM's, in mm (LPS: x to the patient's left, y to the back, z to the head). The affine matrix
maps the centre of voxel (slice, row, column) to them. Boxes are measured at pixel edges: pixel (row, column) covers x
in [column, column + 1] and y in [row, row + 1].
"""

import math
import os
import shutil
import tempfile
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
from highdicom.spatial import PATIENT_ORIENTATION_OPPOSITES
from highdicom.volume import VolumeGeometry

from .dicom_slice import read_dicom, read_full_header, read_header
from .errors import UserError
from .images import NIFTI, SCANS, is_dicom

MAX_VOXELS = 2**29  # of a scan; 2,000 slices of 512 x 512
MAX_READ_VOXELS = 2**27  # held at a time, in four bytes each
MAX_FILES = 20_000
MAX_BYTES = 2**31  # of all files of a scan
MAX_OBLIQUE = 30.0  # degrees between the normal of the slices and the patient's long axis
MAX_TILT = 0.1  # degrees between the normal of the slices and the direction in which they are stacked
GAP_TOLERANCE = 0.01  # of the distance between slices
ROUNDED_MM = 0.021  # by which two distances may differ, because positions may have two decimals
END_TOLERANCE = 0.25  # of the distance between slices; coordinates may be rounded, or those of the slices' faces
AXIAL = "HPL"  # slices to the head, rows to the back, columns to the left
KNOWN_SPACING_MM = (0.46, 0.98)  # of the pixels of LIDC-IDRI
KNOWN_DISTANCE_MM = (0.5, 5.0)  # between the slices of LIDC-IDRI
SPACING_MARGIN = 1.25  # factor from which either is far outside
NOT_SCANS = ("SEG", "RTSTRUCT", "RTDOSE", "SR", "PR", "KO", "REG")  # modalities without slices to annotate
SHOWN_SERIES = 8
ACCEPTED = f"accepted: {SCANS}"
_TAGS = ["SeriesInstanceUID", "Modality", "NumberOfFrames", "Rows", "Columns", "SeriesDescription"]
_SAME = ("Rows", "Columns", "Modality", "FrameOfReferenceUID", "SOPClassUID")

Bounds = tuple[slice, slice, slice]


class SeveralSeries(UserError):
    """A folder or zip holds several series, and none of them was chosen.

    Args:
        message: one line.
        series: words about each series by its UID.
    """

    def __init__(self, message: str, series: dict[str, str]):
        super().__init__(message)
        self.series = series


@dataclass(frozen=True)
class Scan:
    """A scan whose voxels are read when they are needed.

    Args:
        geometry: shape (slices, rows, columns) and affine matrix in the order described at the top of this module.
        stored: the same in the order of the file: slices, rows and columns of DICOM; i, j and k of NIfTI.
        kind: "DICOM series", "multi-frame DICOM" or "NIfTI".
        modality: as DICOM states it; None for NIfTI.
        headers: DICOM headers without pixels, in the order of `stored`; one for a multi-frame file, none for NIfTI.
        read_stored: reads a block, given as a slice along each axis of `stored`.
    """

    geometry: VolumeGeometry
    stored: VolumeGeometry
    kind: str
    modality: str | None
    headers: tuple[pydicom.Dataset, ...]
    read_stored: Callable[[Bounds], np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of slices, rows and columns."""
        slices, rows, columns = self.geometry.spatial_shape
        return slices, rows, columns

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns."""
        slices, rows, columns = (float(value) for value in self.geometry.spacing)
        return slices, rows, columns

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return math.prod(self.spacing_mm)

    @property
    def warnings(self) -> list[str]:
        """What the user should know about this scan."""
        texts = []
        if self.modality not in (None, "CT"):
            texts.append(f"the modality of this scan is {self.modality}; the released weights were trained on CT only")
        slices, rows, columns = self.spacing_mm
        for text, values, (low, high) in (
            (f"the pixel spacing of this scan is {rows:.3g} x {columns:.3g} mm", (rows, columns), KNOWN_SPACING_MM),
            (f"the slices of this scan are {slices:.3g} mm apart", (slices,), KNOWN_DISTANCE_MM),
        ):
            if min(values) < low / SPACING_MARGIN or max(values) > high * SPACING_MARGIN:
                texts.append(f"{text}; the released weights were trained on {low:g} to {high:g} mm")
        return texts

    def read(self, first: int, last: int) -> np.ndarray:
        """Grey values of the slices from `first` to `last`, in Hounsfield units for CT: (K, rows, columns) float32.

        Raises:
            UserError: slices outside the scan, too many, damaged pixels, or values that are not finite.
        """
        check_slices(first, last, self)
        count = last - first + 1
        if count * self.shape[1] * self.shape[2] > MAX_READ_VOXELS:
            most = MAX_READ_VOXELS // (self.shape[1] * self.shape[2])
            raise UserError(f"{count} slices need too much memory; accepted: at most {most} of this scan at a time")
        letters = orientation(self.stored)
        target = orientation(self.geometry)
        bounds = [slice(0, length) for length in self.stored.spatial_shape]
        axis = next(axis for axis in range(3) if letters[axis] in (target[0], opposite(target[0])))
        if letters[axis] != target[0]:
            first, last = self.shape[0] - 1 - last, self.shape[0] - 1 - first
        bounds[axis] = slice(first, last + 1)
        block: Any = tuple(bounds)
        with one_line_errors("the scan"):
            values = self.read_stored(block)
        if not np.isfinite(values).all():
            raise UserError("the scan holds NaN or infinite values in these slices; accepted: finite values")
        return self.stored[block].with_array(values).to_patient_orientation(target).array

    def in_stored_order(
        self, values: np.ndarray, first: int, corner: tuple[int, int] = (0, 0)
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        """A block of voxels (K, h, w) in the order of `stored`, and the index of its first voxel there.

        Args:
            values: the block.
            first: slice of its first voxel.
            corner: row and column of its first voxel.
        """
        ends = [slice(start, start + length) for start, length in zip((first, *corner), values.shape, strict=True)]
        block: Any = tuple(ends)
        turned = self.geometry[block].with_array(values).to_patient_orientation(orientation(self.stored))
        position = np.linalg.inv(self.stored.affine) @ turned.affine[:, 3]
        i, j, k = (round(float(index)) for index in position[:3])
        return turned.array, (i, j, k)


# ------------------------------------------------------------------------------------------------------------- opening


@contextmanager
def open_scan(path: str | os.PathLike, series: str | None = None) -> Iterator[Scan]:
    """Open a scan; its voxels can be read until the context ends.

    Args:
        path: folder or zip with a DICOM series among other files, a multi-frame DICOM file, `.nii` or `.nii.gz`. The
            DICOM files of a zip are unpacked into a temporary folder.
        series: series instance UID, if there are several.

    Raises:
        UserError: no scan, several series, a damaged or too large file, or slices that are not a regular stack:
            uneven, missing or repeated positions, gantry tilt, different sizes or orientations.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no scan at {path}; {ACCEPTED}")
    if path.name.lower().endswith(NIFTI):
        if series is not None:
            raise UserError("a NIfTI file has no series; accepted: --series with DICOM")
        yield read_nifti(path)
    elif path.name.lower().endswith(".zip") and path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            unpack(path, Path(folder))
            yield read_series(sorted(Path(folder).iterdir()), path, series)
    else:
        yield read_series(files_below(path) if path.is_dir() else [path], path, series)


@contextmanager
def one_line_errors(name: object, what: str = "read") -> Iterator[None]:
    """Turn any error of the libraries into a `UserError`, and suppress their warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise almost anything for a damaged file
        text = " ".join((str(error) or type(error).__name__).split())[:300]
        text = "".join(character if character.isprintable() else "?" for character in text)
        raise UserError(f"{name} cannot be {what} ({text})") from error


def unpack(path: Path, folder: Path) -> None:
    """Unpack the DICOM files of a zip into a folder, under names of our own."""
    with one_line_errors(path), zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        size = sum(member.file_size for member in members)
        if len(members) > MAX_FILES or size > MAX_BYTES:
            raise UserError(
                f"{path} holds {len(members):,} files of {size / 2**20:,.0f} MiB unpacked; accepted: at most "
                f"{MAX_FILES:,} files and {MAX_BYTES >> 20:,} MiB"
            )
        for index, member in enumerate(members):
            if member.flag_bits & 1:
                raise UserError(f"{path} is encrypted; accepted: a zip without a password")
            target = folder / f"{index:06d}"
            # zipfile stops at the size that the directory of the archive states
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if not is_dicom(target):
                target.unlink()


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, without following links to folders."""
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        paths += [Path(place, name) for name in sorted(names)]
        if len(paths) > MAX_FILES:
            raise UserError(f"{folder} holds more than {MAX_FILES:,} files; accepted: the folder of one scan")
    return paths


# --------------------------------------------------------------------------------------------------------------- DICOM


def read_series(paths: Sequence[Path], name: Path, series: str | None) -> Scan:
    """The scan of one DICOM series among files; `name` is the place to mention in errors."""
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for path in paths:
        if not path.is_file() or not is_dicom(path):
            continue
        try:
            header = read_header(path, _TAGS, MAX_BYTES)
        except ValueError:
            continue
        if header["SeriesInstanceUID"] and header["Rows"] and header["Modality"] not in NOT_SCANS:
            found[str(header["SeriesInstanceUID"])].append((path, header))
    if not found:
        raise UserError(f"{name} holds no DICOM images among {len(paths)} files; {ACCEPTED}")
    if series is None and len(found) > 1 or series is not None and series not in found:
        words = {uid: series_words(files) for uid, files in sorted(found.items())}
        listed = [f"{uid} ({text})" for uid, text in words.items()][:SHOWN_SERIES]
        more = f" and {len(words) - SHOWN_SERIES} more" if len(words) > SHOWN_SERIES else ""
        what = f"{len(found)} series" if series is None else f"no series {series}"
        raise SeveralSeries(f"{name} holds {what}; accepted: --series with one of {', '.join(listed)}{more}", words)
    files = found[series or next(iter(found))]
    frames = [whole(header["NumberOfFrames"], 1) for _, header in files]
    pixels = sum(
        count * whole(header["Rows"], 0) * whole(header["Columns"], 0)
        for count, (_, header) in zip(frames, files, strict=True)
    )
    size = sum(path.stat().st_size for path, _ in files)
    if pixels > MAX_VOXELS or size > MAX_BYTES:
        raise UserError(
            f"the series has {pixels / 1e6:,.0f} million voxels in {size / 2**20:,.0f} MiB; accepted: at most "
            f"{MAX_VOXELS / 1e6:,.0f} million in {MAX_BYTES >> 20:,} MiB"
        )
    with one_line_errors(name):
        if max(frames) == 1:
            return single_frames([path for path, _ in files])
        if len(files) > 1:
            raise UserError(f"the series has {len(files)} multi-frame files; accepted: one")
        return multi_frame(files[0][0])


def series_words(files: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """Modality, number of files and description of a series."""
    header = files[0][1]
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    description = "".join(letter for letter in str(header["SeriesDescription"] or "") if letter.isprintable())
    return ", ".join(filter(None, [str(header["Modality"] or "unknown")[:16], count, description[:64]]))


def single_frames(paths: Sequence[Path]) -> Scan:
    """The scan of a series with one slice per file."""
    headers = [read_full_header(path) for path in paths]
    for keyword in _SAME:
        values = sorted({str(header.get(keyword, "none")) for header in headers})
        if len(values) > 1:
            raise UserError(
                f"the slices of the series differ in {keyword} ({', '.join(values[:4])}); accepted: one stack"
            )
    affine, order = stack(
        [numbers(header, "ImagePositionPatient", 3) for header in headers],
        [numbers(header, "ImageOrientationPatient", 6) for header in headers],
        [numbers(header, "PixelSpacing", 2) for header in headers],
    )
    headers, paths = [headers[index] for index in order], [paths[index] for index in order]
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)

    def read(bounds: Bounds) -> np.ndarray:
        block = [slice(*bound.indices(length)) for bound, length in zip(bounds, stored.spatial_shape, strict=True)]
        values = np.empty([bound.stop - bound.start for bound in block], np.float32)
        for index, place in enumerate(range(block[0].start, block[0].stop)):
            try:
                slice_values, _ = read_dicom(paths[place], rows * columns, invert=False)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"slice {place} of the scan ({paths[place].name}): {error}") from error
            if slice_values.shape != (rows, columns):
                raise UserError(f"slice {place} of the scan changed while it was read")
            values[index] = slice_values[block[1], block[2]]
        return values

    stored = VolumeGeometry(
        affine, (len(paths), rows, columns), "PATIENT", headers[0].get("FrameOfReferenceUID") or None
    )
    return Scan(upright(stored, is_dicom=True), stored, "DICOM series", modality(headers[0]), tuple(headers), read)


def multi_frame(path: Path) -> Scan:
    """The scan of an enhanced DICOM image."""
    header = read_full_header(path, MAX_BYTES)
    count, rows, columns = int(header.NumberOfFrames), int(header.Rows), int(header.Columns)
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count or not header.get("SharedFunctionalGroupsSequence"):
        raise UserError(
            f"a multi-frame file of {pydicom.uid.UID(str(header.get('SOPClassUID', ''))).name} states no position for "
            "each of its frames; accepted: an enhanced image such as Enhanced CT"
        )
    shared = header.SharedFunctionalGroupsSequence[0]

    def values(macro: str, keyword: str, length: int) -> list[np.ndarray]:
        items = [(group.get(macro) or shared.get(macro) or [pydicom.Dataset()])[0] for group in groups]
        return [numbers(item, keyword, length) for item in items]

    affine, order = stack(
        values("PlanePositionSequence", "ImagePositionPatient", 3),
        values("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        values("PixelMeasuresSequence", "PixelSpacing", 2),
    )
    stored = VolumeGeometry(affine, (count, rows, columns), "PATIENT", header.get("FrameOfReferenceUID") or None)
    image = highdicom.imread(path, lazy_frame_retrieval=True)
    if image.SamplesPerPixel != 1:
        raise UserError(f"the frames have {image.SamplesPerPixel} channels; accepted: grey frames")

    def read(bounds: Bounds) -> np.ndarray:
        frames = [
            image.get_frame(
                int(frame) + 1, dtype=np.float32, apply_real_world_transform=False, apply_voi_transform=False,
                apply_presentation_lut=False,
            )[bounds[1], bounds[2]]
            for frame in order[bounds[0]]
        ]  # fmt: skip
        return np.stack(frames)

    return Scan(upright(stored, is_dicom=True), stored, "multi-frame DICOM", modality(header), (header,), read)


def stack(
    positions: Sequence[np.ndarray], orientations: Sequence[np.ndarray], spacings: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Affine matrix (4, 4) and order of slices that form a regular stack.

    Args:
        positions: of the centre of the first pixel of each slice (3,), in mm.
        orientations: direction of its rows and of its columns (6,).
        spacings: distance of its rows and of its columns (2,), in mm.

    Raises:
        UserError: the slices are not a regular stack; the message says what was found.
    """
    if len(positions) < 2:
        raise UserError("the scan has one slice; accepted: at least 2, or a single slice as an image")
    for name, values, tolerance in (("orientation", orientations, 1e-3), ("pixel spacing", spacings, 1e-4)):
        differences = np.abs(np.stack(values) - values[0]).max(axis=1)
        other = values[int(differences.argmax())]
        if differences.max() > tolerance:
            raise UserError(
                f"the slices of the scan differ in {name} ({brief(values[0])} and {brief(other)}); accepted: one "
                "stack of slices"
            )
    right, down = orientations[0][:3], orientations[0][3:]
    lengths = np.linalg.norm([right, down], axis=1)
    if (np.abs(lengths - 1) > 1e-2).any() or abs(right @ down) > 1e-3 or not (spacings[0] > 0).all():
        raise UserError(
            f"orientation {brief(orientations[0])} and pixel spacing {brief(spacings[0])} of the slices are invalid; "
            "accepted: two perpendicular directions and positive distances"
        )
    right = right / lengths[0]
    down = down - (down @ right) * right
    down = down / np.linalg.norm(down)
    normal = np.cross(right, down)
    heights = np.stack(positions) @ normal
    order = np.argsort(heights, kind="stable")
    heights, places = heights[order], np.stack(positions)[order]
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    if gaps.min() < 1e-3:
        where = places[int(gaps.argmin())]
        raise UserError(
            f"{int((gaps < 1e-3).sum()) + 1} or more slices at one position ({brief(where)} mm); accepted: one slice "
            "per position"
        )
    shift = places[-1] - places[0]
    tilt = math.degrees(math.acos(min(1.0, float(shift @ normal / np.linalg.norm(shift)))))
    if tilt > MAX_TILT:
        raise UserError(
            f"the slices are shifted against each other, as by a gantry tilt of {tilt:.1f} degrees; accepted: slices "
            "stacked along their normal"
        )
    worst = int(np.abs(gaps - step).argmax())
    if abs(gaps[worst] - step) > max(GAP_TOLERANCE * step, ROUNDED_MM):
        raise UserError(
            f"uneven or missing slices: most of {len(places)} slices are {step:g} mm apart, but {gaps[worst]:g} mm "
            f"between {brief(places[worst])} and {brief(places[worst + 1])}; accepted: one distance"
        )
    affine = np.eye(4)
    mean_gap = (heights[-1] - heights[0]) / (len(heights) - 1)
    affine[:3, :3] = np.stack([normal * mean_gap, down * spacings[0][0], right * spacings[0][1]], axis=1)
    affine[:3, 3] = places[0]
    off = np.abs(places - (places[0] + np.outer(np.arange(len(places)), affine[:3, 0]))).max()
    if off > 0.1 * mean_gap:
        raise UserError(f"slices lie up to {off:g} mm beside a regular stack; accepted: one line of slices")
    return affine, order


def modality(header: pydicom.Dataset) -> str:
    """Modality of a DICOM header."""
    return str(header.get("Modality") or "unknown")[:16]


def numbers(header: pydicom.Dataset, keyword: str, count: int) -> np.ndarray:
    """A tag of `count` finite numbers."""
    try:
        values = np.array([float(value) for value in header.get(keyword)], dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise UserError(f"a slice of the scan has no valid {keyword}; accepted: {count} numbers in every slice")
    return values


def square_side(height: float, width: float) -> float | None:
    """Side of a pixel with these sides, None if they differ by more than 1 %."""
    return (height + width) / 2 if abs(height - width) <= 0.01 * min(height, width) else None


def whole(value: Any, default: int) -> int:
    """A whole number of a header, or the default if it is absent or invalid."""
    return int(value) if isinstance(value, int) and value > 0 else default


# --------------------------------------------------------------------------------------------------------------- NIfTI


def read_nifti(path: Path) -> Scan:
    """The scan of a NIfTI file."""
    with one_line_errors(path):
        image: Any = nibabel.load(path)
        header, shape = image.header, image.shape
        if not isinstance(image, nibabel.Nifti1Image):
            raise UserError(f"{path} is {type(image).__name__}, not NIfTI; {ACCEPTED}")
        if len(shape) > 3 and set(shape[3:]) == {1}:
            shape = shape[:3]
        if len(shape) != 3 or min(shape) < 2:
            found = " x ".join(map(str, shape))
            raise UserError(
                f"{path} has the shape {found}; accepted: three axes of 2 or more, or a single slice as an image"
            )
        if math.prod(shape) > MAX_VOXELS:
            raise UserError(
                f"{path} has {math.prod(shape) / 1e6:,.0f} million voxels; accepted: at most {MAX_VOXELS / 1e6:,.0f} "
                "million"
            )
        if header.get_data_dtype().kind not in "iuf":
            raise UserError(f"{path} holds {header.get_data_dtype()}; accepted: integer or floating-point grey values")
        if header["sform_code"] == 0 and header["qform_code"] == 0:
            raise UserError(f"{path} states no orientation (sform_code and qform_code are 0); accepted: one of them")
        unit = header.get_xyzt_units()[0]
        if unit not in ("mm", "unknown"):
            raise UserError(f"{path} is measured in {unit}; accepted: mm")
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # RAS to LPS
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
            raise UserError(f"the affine matrix of {path} is not invertible; accepted: one that is")
        try:
            stored = VolumeGeometry(affine, shape, "PATIENT")
        except ValueError as error:
            raise UserError(
                f"the axes of {path} are not perpendicular (sheared affine matrix); accepted: perpendicular axes"
            ) from error

        def read(bounds: Bounds) -> np.ndarray:
            block = image.dataobj[bounds + (0,) * (len(image.shape) - 3)]
            return np.asarray(block, dtype=np.float32)

        return Scan(upright(stored, is_dicom=False), stored, "NIfTI", None, (), read)


# ------------------------------------------------------------------------------------------------------------ geometry


def orientation(geometry: VolumeGeometry) -> str:
    """Direction of each axis in the patient, such as HPL: to the head, to the back, to the left."""
    return "".join(item.value for item in geometry.get_closest_patient_orientation())


def opposite(letter: str) -> str:
    """The opposite direction: L and R, P and A, H and F."""
    pairs = {key.value: value.value for key, value in PATIENT_ORIENTATION_OPPOSITES.items()}
    return pairs[letter]


def upright(stored: VolumeGeometry, is_dicom: bool) -> VolumeGeometry:
    """The geometry of a `Scan` from that of its file: ascending axial slices as a viewer shows them.

    Raises:
        UserError: the slices are too oblique to be called axial.
    """
    letters = orientation(stored)
    target = "H" + letters[1:] if is_dicom and letters[0] in "HF" else AXIAL
    geometry = stored.to_patient_orientation(target)
    direction = geometry.affine[:3, 0] / np.linalg.norm(geometry.affine[:3, 0])
    angle = math.degrees(math.acos(min(1.0, float(direction[2]))))
    if angle > MAX_OBLIQUE:
        raise UserError(
            f"the slices closest to axial are inclined by {angle:.0f} degrees; accepted: at most {MAX_OBLIQUE:g}"
        )
    return geometry


def check_slices(first: int, last: int, scan: Scan) -> None:
    """Raise `UserError` for a range of slices that is turned around or outside the scan."""
    count = scan.shape[0]
    if first > last:
        raise UserError(f"slices {first} to {last} are turned around; accepted: FIRST <= LAST")
    if first < 0 or last >= count:
        raise UserError(f"slices {first} to {last} reach outside the scan of {count}; accepted: 0 to {count - 1}")


def is_oblique(scan: Scan) -> bool:
    """Whether the axes of a scan are not those of the patient, by more than a milliradian."""
    directions = np.abs(scan.geometry.affine[:3, :3]) / np.linalg.norm(scan.geometry.affine[:3, :3], axis=0)
    return bool((np.sort(directions, axis=0)[1] > 1e-3).any())


def box_in_patient(scan: Scan, box: Sequence[float], first: int, last: int) -> list[float]:
    """Extent of a box in patient coordinates: x1, y1, z1, x2, y2, z2 in mm.

    In an oblique scan this is a larger box, from which `box_in_pixels` does not lead back.

    Args:
        scan: the scan.
        box: x1, y1, x2, y2 in pixels.
        first: first slice.
        last: last slice; the extent in z is that of the centres of the slices.
    """
    corners = np.array(
        [[k, y - 0.5, x - 0.5] for k in (first, last) for y in (box[1], box[3]) for x in (box[0], box[2])]
    )
    points = corners @ scan.geometry.affine[:3, :3].T + scan.geometry.affine[:3, 3]
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def box_in_pixels(scan: Scan, box_mm: Sequence[float]) -> tuple[list[float], int, int]:
    """Box in pixels, first and last slice of a box in patient coordinates x1, y1, z1, x2, y2, z2.

    The box contains all corners. The slices are those whose centre it contains, or misses by at most `END_TOLERANCE`;
    Z1 and Z2 may be equal, as in `box_in_patient` of one slice.

    Raises:
        UserError: no area, no slice in it, or outside the scan.
    """
    low, high = np.array(box_mm[:3], dtype=float), np.array(box_mm[3:], dtype=float)
    if not (low[:2] < high[:2]).all() or low[2] > high[2]:
        raise UserError(
            f"box {brief(np.array(box_mm))} mm has no area or is turned around; accepted: X1 < X2, Y1 < Y2, Z1 <= Z2"
        )
    ends = np.stack([low, high])
    corners = np.array([[ends[a, 0], ends[b, 1], ends[c, 2]] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    index = (corners - scan.geometry.affine[:3, 3]) @ np.linalg.inv(scan.geometry.affine[:3, :3]).T
    (slice1, y1, x1), (slice2, y2, x2) = index.min(axis=0), index.max(axis=0)
    first, last = math.ceil(slice1 - END_TOLERANCE), math.floor(slice2 + END_TOLERANCE)
    if first > last:
        raise UserError(
            f"box {brief(np.array(box_mm))} mm lies between two slices, which are {scan.spacing_mm[0]:g} mm apart; "
            "accepted: a box that contains the centre of a slice"
        )
    check_slices(first, last, scan)
    return [float(x1 + 0.5), float(y1 + 0.5), float(x2 + 0.5), float(y2 + 0.5)], first, last


def brief(values: np.ndarray) -> str:
    """Numbers of a message."""
    return " ".join(f"{value:.6g}" for value in values)
