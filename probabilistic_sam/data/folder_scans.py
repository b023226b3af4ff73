"""Annotated slices of scans with one mask volume per reader, for the source `folder`. Needs the extra `scan`."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from ..errors import UserError
from ..scans import Scan, SeveralSeries, open_scan, square_side
from .format import HU_OFFSET

BLOCK_VOXELS = 2**25  # read at a time
GRID_TOLERANCE = 0.1  # of a voxel's shortest side, by which a mask may be shifted against its scan
ACCEPTED_MASK = "accepted: 0, and 1 or 255 where the reader annotated"


class ScanSlice(NamedTuple):
    """One slice of a scan, and what the readers annotated on it.

    Attributes:
        slice_index: of the slice in the scan, from the feet.
        pixels: (H, W) uint16.
        objects: masks (R, H, W) bool of each object on this slice, by the number of the object; readers as given.
        z_mm: position along the normal of the slices.
        step_mm: distance between the slices of the scan.
        spacing_mm: side of a pixel, None if pixels are not square.
    """

    slice_index: int
    pixels: np.ndarray
    objects: dict[int, np.ndarray]
    z_mm: float
    step_mm: float
    spacing_mm: float | None


def annotated_slices(
    path: Path, mask_paths: Mapping[str, Path], components: bool, max_components: int
) -> Iterator[ScanSlice]:
    """The slices of a scan that at least one reader annotated, from the feet to the head.

    Grey values are whole numbers from 0 on: Hounsfield units + 1024, or those of the file. If they have fractions or
    do not fit, the range from lowest to highest of these slices is stretched to 0..65535.

    Args:
        path: as in `open_scan`; of DICOM one series.
        mask_paths: NIfTI file of each reader, with the voxels of the scan; without any, the scan has no readers.
        components: each connected component (in 3D, with diagonals) of the union of the masks is an object, numbered
            from 1. Otherwise all masks are one object, number 1.
        max_components: of a scan.

    Raises:
        UserError: files that do not open, masks with other values or voxels, or too many components.
    """
    with _opened(path) as scan:
        slices, rows, columns = scan.shape
        masks: dict[int, dict[str, np.ndarray]] = defaultdict(dict)  # packed bits, by slice and reader
        for reader, mask_path in mask_paths.items():
            with _opened(mask_path) as volume:
                _check_grid(scan, volume, mask_path, path)
                for start, values in _blocks(volume, 0, slices - 1):
                    _check_values(values, mask_path)
                    for index in np.flatnonzero(values.any(axis=(1, 2))).tolist():
                        masks[start + index][reader] = np.packbits(values[index] > 0)
        if not masks:
            return
        first, last = min(masks), max(masks)

        def unpacked(index: int) -> np.ndarray:
            """Masks of all readers on a slice: (R, H, W)."""
            found = np.zeros((len(mask_paths), rows, columns), dtype=bool)
            for place, reader in enumerate(mask_paths):
                if reader in masks.get(index, {}):
                    bits = np.unpackbits(masks[index][reader], count=rows * columns)
                    found[place] = bits.reshape(rows, columns)
            return found

        union = np.stack([unpacked(index).any(axis=0) for index in range(first, last + 1)])
        labels, count = scipy.ndimage.label(union, np.ones((3, 3, 3))) if components else (union, 1)
        if count > max_components:
            raise UserError(f"{path}: its masks have {count:,} components; accepted: at most {max_components:,}")

        offset, factor = _grey_scale(*_range_of(scan, first, last))
        affine, (step, height, width) = scan.geometry.affine, scan.spacing_mm
        normal = affine[:3, 0] / step
        for start, block in _blocks(scan, first, last):
            for index in range(start, start + len(block)):
                if index not in masks:
                    continue
                label, given = labels[index - first], unpacked(index)
                yield ScanSlice(
                    slice_index=index,
                    pixels=_scaled(block[index - start], offset, factor),
                    objects={int(number): given & (label == number) for number in np.unique(label[label > 0])},
                    z_mm=float((affine[:3, 3] + index * affine[:3, 0]) @ normal),
                    step_mm=step,
                    spacing_mm=square_side(height, width),
                )


def fit_16_bits(values: np.ndarray) -> np.ndarray:
    """Grey values as uint16, by the rule of `annotated_slices`."""
    are_whole = bool((values == np.round(values)).all())
    return _scaled(values, *_grey_scale(float(values.min()), float(values.max()), are_whole))


@contextmanager
def _opened(path: Path) -> Iterator[Scan]:
    """`open_scan`, with the path in every message."""
    try:
        with open_scan(path) as scan:
            yield scan
    except SeveralSeries as error:
        raise UserError(f"{path}: holds {len(error.series)} series; accepted: one series per scan") from error
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _blocks(scan: Scan, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first slice, and voxels, of consecutive blocks of slices."""
    count = max(1, BLOCK_VOXELS // (scan.shape[1] * scan.shape[2]))
    for start in range(first, last + 1, count):
        yield start, scan.read(start, min(last, start + count - 1))


def _check_grid(scan: Scan, mask: Scan, mask_path: Path, path: Path) -> None:
    """Refuse a mask whose voxels are not those of the scan."""
    if mask.shape != scan.shape:
        found, wanted = (" x ".join(map(str, item.shape)) for item in (mask, scan))
        raise UserError(f"{mask_path}: {found} slices, rows and columns; accepted: {wanted}, those of {path.name}")
    corners = np.stack(np.meshgrid(*((0, length - 1) for length in scan.shape), [1], indexing="ij"), -1).reshape(-1, 4)
    gap = np.linalg.norm((corners @ (mask.geometry.affine - scan.geometry.affine).T)[:, :3], axis=1).max()
    if gap > GRID_TOLERANCE * min(scan.spacing_mm):
        raise UserError(
            f"{mask_path}: its voxels lie up to {gap:.3g} mm beside those of {path.name}; accepted: the position, "
            "spacing and orientation of its scan"
        )


def _check_values(values: np.ndarray, path: Path) -> None:
    """Refuse anything but a binary mask."""
    highest = values.max()
    if highest not in (0, 1, 255) or not ((values == 0) | (values == highest)).all():
        levels = np.unique(values)
        shown = ", ".join(f"{level:g}" for level in levels[:5]) + (", ..." if len(levels) > 5 else "")
        raise UserError(f"{path}: mask with the values {shown}; {ACCEPTED_MASK}, one structure at a time")


def _range_of(scan: Scan, first: int, last: int) -> tuple[float, float, bool]:
    """Lowest and highest grey value of these slices, and whether all are whole numbers."""
    low, high, are_whole = np.inf, -np.inf, True
    for _, values in _blocks(scan, first, last):
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        are_whole = are_whole and bool((values == np.round(values)).all())
    return low, high, are_whole


def _grey_scale(low: float, high: float, are_whole: bool) -> tuple[float, float]:
    """What is added to grey values from `low` to `high`, and what they are multiplied with then, to fit in 16 bits."""
    most = np.iinfo(np.uint16).max
    offset = 0.0 if low >= 0 else HU_OFFSET if low >= -HU_OFFSET else -low
    if are_whole and high + offset <= most:
        return float(offset), 1.0
    return -low, most / (high - low) if high > low else 1.0


def _scaled(values: np.ndarray, offset: float, factor: float) -> np.ndarray:
    """Grey values as uint16."""
    return np.round((values.astype(np.float64) + offset) * factor).astype(np.uint16)
