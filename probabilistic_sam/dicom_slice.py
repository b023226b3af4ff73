"""One DICOM file as grey values: for the command, the page and the builder of LIDC. Needs pydicom, extra `data`."""

import math
import os

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from .errors import UserError

MAX_FILE_BYTES = 64 * 2**20  # a CT slice has 0.5 MB


def read_dicom(path: str | os.PathLike, max_pixels: int) -> tuple[np.ndarray, float | None]:
    """Read one slice: stored value x rescale slope + intercept, for CT Hounsfield units.

    Returns:
        (H, W) float64, bright where MONOCHROME1 says dark; and the side of a pixel in mm (of a square of the same area
        when rows and columns differ), None when the file does not say.

    Raises:
        UserError: the pixels are compressed and no decoder for that is installed.
        ValueError: not DICOM, damaged, too large, several frames, or colour.
    """
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES // 2**20} MB")
        # Such a file unpacks as a whole, to any size, before its header can be read
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise ValueError("a deflated file; accepted: pixels that are compressed by themselves, or not at all")
        dataset = pydicom.dcmread(path)
        height, width, channels = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
        frames = int(dataset.get("NumberOfFrames") or 1)
        if channels != 1 or frames != 1 or not 0 < height * width <= max_pixels:
            raise ValueError(
                f"{width} x {height} pixels, {frames} frames, {channels} channels; accepted: one grey frame of at "
                f"most {max_pixels:,} pixels"
            )
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        syntax = dataset.file_meta.TransferSyntaxUID
        values = dataset.pixel_array * slope + intercept
        if values.shape != (height, width):
            raise ValueError(f"{height}x{width} pixels in its header, {values.shape} in its data")
        if not np.isfinite(values).all():
            raise ValueError("NaN or infinite grey values")
        if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
            values = values.max() + values.min() - values
        sides = [float(side) for side in dataset.get("PixelSpacing") or ()]
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # pydicom lists its decoders line by line
        if "missing dependencies" in reason or "unable to decompress" in reason.lower():
            raise UserError(
                f"{path}: its pixels are compressed ({syntax.name}) and do not decode ({reason}); accepted: install "
                f"a decoder, pip install python-gdcm, or pip install pylibjpeg pylibjpeg-libjpeg"
            ) from error
        raise ValueError(reason) from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file makes pydicom raise almost anything
        raise ValueError(f"does not decode ({error})") from error
    known = len(sides) == 2 and all(0 < side <= 1000 for side in sides)
    return values, math.sqrt(sides[0] * sides[1]) if known else None
