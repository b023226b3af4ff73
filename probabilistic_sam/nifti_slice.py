"""Read a NIfTI file that holds one slice. Needs the extra `scan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from .errors import UserError
from .scans import one_line_errors, square_side


def is_nifti_slice(path: Path) -> bool:
    """Whether a file is NIfTI with one slice, by its header."""
    try:
        with one_line_errors(path):
            image: Any = nibabel.load(path)
            return plane(image.shape) is not None
    except UserError:
        return False  # reading it as a scan says what is wrong


def plane(shape: Sequence[int]) -> tuple[int, int] | None:
    """The two axes of a slice, of which all others have one voxel; None if it is a volume."""
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    return (axes[0], axes[1]) if len(axes) == 2 and axes[1] <= 2 else None


def read_nifti_slice(path: Path, max_pixels: int) -> tuple[np.ndarray, float | None]:
    """A NIfTI file with one slice: values (H, W), and the side of a pixel.

    The axes with one voxel are dropped; columns follow the first of the other two, rows the second. The side is None
    where pixels are not square or the file does not say that its unit is mm.

    Raises:
        UserError: a file that does not open, or holds something else.
    """
    with one_line_errors(path):
        image: Any = nibabel.load(path)
        shape, kind, axes = image.shape, image.get_data_dtype(), plane(image.shape)
        if axes is None:
            raise UserError(f"{path}: has the shape {' x '.join(map(str, shape))}; accepted: one slice")
        columns, rows = (shape[axis] for axis in axes)
        if rows * columns > max_pixels:
            raise UserError(f"{path}: has {rows * columns:,} pixels; accepted: at most {max_pixels:,}")
        if kind.kind not in "iuf":
            raise UserError(f"{path}: holds {kind}; accepted: integer or floating-point values")
        values = np.asarray(image.dataobj).reshape(columns, rows).T
        if not np.isfinite(values).all():
            raise UserError(f"{path}: holds NaN or infinite values; accepted: finite values")
        width, height = (float(image.header.get_zooms()[axis]) for axis in axes)
        return values, square_side(height, width) if image.header.get_xyzt_units()[0] == "mm" else None
