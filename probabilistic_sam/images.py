"""Read one image from PNG, JPEG, TIFF, DICOM or NIfTI: its pixels and their spacing."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UserError
from .processing_image_files import IMAGE_FORMATS, MAX_PIXELS, open_image

NIFTI = (".nii", ".nii.gz")
SCANS = "a folder or zip with a DICOM series, a multi-frame DICOM file, .nii or .nii.gz"


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Read one image. The processor reads the same pixels from the file.

    Returns:
        Grey (H, W): uint8, uint16, int32 or float32; colour (H, W, 3): uint8.

    Raises:
        UserError: no such file, not an image, truncated, several frames, or more than 64 million pixels.
    """
    if not Path(path).is_file():
        raise UserError(f"no image file at {path}; accepted: {', '.join(IMAGE_FORMATS)}")
    try:
        image = open_image(Path(path), f"image {path}")
    except ValueError as error:
        raise UserError(str(error)) from error
    array = np.asarray(image)
    if not np.isfinite(array).all():
        raise UserError(f"image {path} holds NaN or infinite values; accepted: finite grey values")
    return array


def load_slice(path: str | os.PathLike) -> tuple[np.ndarray, float | None]:
    """Read one slice: a DICOM or NIfTI file, or an image as in `load_image`.

    Returns:
        The pixels, as in `load_image`, or (H, W) float32 from DICOM (Hounsfield units for CT) and NIfTI; and the side
        of a pixel in mm if the file is DICOM or NIfTI and states it, otherwise None.

    Raises:
        UserError: as `load_image`; a file that `read_dicom` or `read_nifti_slice` refuses, or what reads it is not
            installed.
    """
    if is_nifti(path) and Path(path).is_file():
        try:
            from .nifti_slice import read_nifti_slice
        except ModuleNotFoundError as error:
            raise UserError(
                f"{path} is NIfTI; to read it, pip install 'probabilistic-sam[scan]' ({error.name} is missing)"
            ) from error
        values, side = read_nifti_slice(Path(path), MAX_PIXELS)
        return values.astype(np.float32), side
    if not is_dicom(path):
        return load_image(path), None
    try:
        from .dicom_slice import read_dicom
    except ModuleNotFoundError as error:
        raise UserError(f"{path} is a DICOM file; to read it, pip install pydicom") from error
    try:
        values, side = read_dicom(path, MAX_PIXELS)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"DICOM file {path} cannot be read: {error}") from error
    return values.astype(np.float32), side


def is_scan(path: str | os.PathLike) -> bool:
    """Whether a path is a scan rather than a single image: a folder, a zip, or NIfTI or DICOM with several slices."""
    if Path(path).is_dir() or str(path).lower().endswith(".zip"):
        return True
    if is_nifti(path):
        try:
            from .nifti_slice import is_nifti_slice
        except ModuleNotFoundError:
            return True  # opening it as a scan says what is missing
        return not is_nifti_slice(Path(path))
    if not Path(path).is_file() or not is_dicom(path):
        return False
    try:
        from .dicom_slice import read_header

        return (read_header(path, ["NumberOfFrames"], os.path.getsize(path))["NumberOfFrames"] or 1) > 1
    except (ModuleNotFoundError, ValueError, TypeError):
        return False  # reading it as an image says what is wrong


def is_nifti(path: str | os.PathLike) -> bool:
    """Whether a file has a name of NIfTI."""
    return str(path).lower().endswith(NIFTI)


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file starts like DICOM: with a preamble, or directly with the first tag."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return False
    if start[128:] == b"DICM":
        return True
    group, element = start[:2], int.from_bytes(start[2:4], "little")
    if start[4:6].isalpha() and start[4:6].isupper():  # explicit value representation
        return group in (b"\2\0", b"\10\0", b"\0\10")
    # Implicit: the length follows, and a file starts with one of the first tags of a group
    return group in (b"\2\0", b"\10\0") and element <= 0x18 and int.from_bytes(start[4:8], "little") <= 256


def luminance(image: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of a grey (H, W) or colour (H, W, 3) image."""
    return image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))
