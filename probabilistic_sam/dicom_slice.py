"""Read one DICOM file as grey values. Needs pydicom (extra `data`).

Stored pixels become grey values in these steps, in the order of the standard (PS3.4 N.2):

1. Stored values: the bits of a pixel, without overlays in unused bits (BitsAllocated, BitsStored, HighBit,
   PixelRepresentation), or FloatPixelData or DoubleFloatPixelData.
2. Modality transformation: RescaleSlope and RescaleIntercept, in the header or in the functional groups of an enhanced
   image, or ModalityLUTSequence. For CT the result is in Hounsfield units.
3. Direction of the grey scale: PresentationLUTShape or PhotometricInterpretation.

Steps that are not supported are refused by name. These tags are deliberately ignored:

- VOI windows and tables (WindowCenter, VOILUTSequence) are for display; the processor scales grey values itself.
- RealWorldValueMappingSequence is an additional scale, often one of several, and not part of the grey-scale pipeline
  (PS3.3 C.7.6.16.2.11).
- PixelPaddingValue marks pixels outside the field of view. They keep their value and are scaled like all others.
- RescaleType only names the unit.
- ImagerPixelSpacing and NominalScannedPixelSpacing refer to the detector or the film, not to the patient, and the
  magnification is usually unknown. PixelAspectRatio has no unit. Without PixelSpacing the spacing is unknown.
"""

import logging
import math
import os
import threading
import warnings
from collections.abc import Container, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_fragments, generate_frames
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from .errors import UserError

MAX_FILE_BYTES = 64 * 2**20  # a CT slice has 0.5 MB
LONG_VALUE = 2**16  # bytes; longer values of a header are not kept in memory
MAX_MESSAGE = 500
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
BITS = {"PixelData": (1, 8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}
# Tags, with the values concerned, that require further steps: the scale of a radiotherapy dose, and colours for the
# highest values of a grey image
NOT_SUPPORTED = {"DoseGridScaling": (), "PixelPresentation": ("COLOR", "MIXED", "TRUE_COLOR")}
_IMAGE_STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51")  # JPEG and JPEG-LS, JPEG 2000
_QUIET = threading.Lock()  # warning filters are global, and the app reads files in threads

# pydicom also logs what it raises; without a handler Python prints that to stderr
logging.getLogger("pydicom").addHandler(logging.NullHandler())


def read_dicom(path: str | os.PathLike, max_pixels: int, invert: bool = True) -> tuple[np.ndarray, float | None]:
    """Read one slice.

    Args:
        path: path of the file.
        max_pixels: maximum number of pixels to decode.
        invert: invert the grey scale within its range if the header displays higher values darker (MONOCHROME1,
            PresentationLUTShape INVERSE). False keeps the values in their unit.

    Returns:
        Grey values (H, W), float64 within the range of float32, for CT in Hounsfield units; and the side of a pixel in
        mm (of a square of the same area if row and column spacing differ), or None if unknown.

    Raises:
        UserError: the pixels are compressed and no decoder for them is installed.
        ValueError: not DICOM, damaged, too large, several frames, colour, or a step that is not supported.
    """
    try:
        with _quiet(), np.errstate(all="ignore"):
            return _read(path, max_pixels, invert)
    except Exception as error:  # pydicom raises almost anything for a damaged file
        raise _refusal(path, error) from error


def read_header(path: str | os.PathLike, tags: list[str], max_bytes: int | None = None) -> dict[str, Any]:
    """Read some tags of a file, without its pixels; the value is None if a tag is absent, empty or invalid.

    Raises:
        ValueError: not DICOM, damaged, larger than `max_bytes` (default: `MAX_FILE_BYTES`), or deflated.
    """
    try:
        with _quiet():
            header = _open(path, max_bytes, stop_before_pixels=True, specific_tags=tags)
            return {name: _value_or_none(header, name) for name in tags}
    except Exception as error:
        raise _refusal(path, error) from error


def read_full_header(path: str | os.PathLike, max_bytes: int | None = None) -> pydicom.Dataset:
    """Read all tags of a file but its pixels; long values stay in the file until they are used.

    Raises:
        ValueError: as in `read_header`.
    """
    try:
        with _quiet():
            return _open(path, max_bytes, stop_before_pixels=True, defer_size=LONG_VALUE)
    except Exception as error:
        raise _refusal(path, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress pydicom's warnings; what matters is checked here."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refusal(path: str | os.PathLike, error: Exception) -> ValueError:
    """An error of one printable line, whatever the values in the file are."""
    text = " ".join((str(error) or type(error).__name__).split())[:MAX_MESSAGE]
    text = "".join(character if character.isprintable() else "?" for character in text)
    if isinstance(error, UserError):
        return UserError(f"{path}: {text}")
    return ValueError(text if isinstance(error, ValueError) else f"does not decode ({text}); accepted: complete DICOM")


def _open(path: str | os.PathLike, max_bytes: int | None = None, **options: Any) -> pydicom.Dataset:
    """Open a DICOM file, with or without preamble and file meta information."""
    max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
    if os.path.getsize(path) > max_bytes:
        raise ValueError(f"more than {max_bytes // 2**20} MB")
    with open(path, "rb") as file:
        # A deflated file would have to be unpacked completely, to any size, before its header can be read
        read_preamble(file, force=True)
        meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise ValueError("a deflated file; accepted: no compression, or compressed pixels only")
        file.seek(0)
        return pydicom.dcmread(file, force=True, **options)


def _read(path: str | os.PathLike, max_pixels: int, invert: bool) -> tuple[np.ndarray, float | None]:
    dataset = _open(path)
    keywords = [name for name in PIXELS if name in dataset]
    if len(keywords) != 1:
        kind = _value_or_none(dataset, "SOPClassUID")
        of = f" (SOPClassUID: {UID(str(kind)).name})" if kind else ""
        found = " and ".join(keywords) or "no PixelData"
        raise ValueError(f"{found}{of}; accepted: a complete image with one of {_listed(PIXELS)}")
    height, width = (_whole(dataset, name, range(2**16), "1 to 65535") for name in ("Rows", "Columns"))
    channels = _whole(dataset, "SamplesPerPixel", range(2**16), "1", default=1)
    frames = _whole(dataset, "NumberOfFrames", range(2**31), "1", default=1) or 1
    if channels != 1 or frames != 1 or not 0 < height * width <= max_pixels:
        raise ValueError(
            f"{width} x {height} pixels, {frames} frames, {channels} channels; accepted: one grey frame of at "
            f"most {max_pixels:,} pixels"
        )
    photometric = _choice(dataset, "PhotometricInterpretation", ("MONOCHROME1", "MONOCHROME2"))
    for name, refused in NOT_SUPPORTED.items():
        value = _value(dataset, name)
        if value is not None and (not refused or str(value).strip() in refused):
            raise ValueError(f"{name} {value} is not supported; accepted: a grey image without it")

    values = _modality_values(dataset, keywords[0], _stored_values(dataset, keywords[0], height, width))
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError("NaN or infinite grey values, or some beyond the range of 32-bit numbers")
    if invert and _is_inverse(dataset, photometric):
        values = values.max() + values.min() - values
    return values, _spacing(dataset)


# Step 1: stored values


def _stored_values(dataset: pydicom.Dataset, keyword: str, height: int, width: int) -> np.ndarray:
    """Stored pixel values (H, W): integers of BitsStored bits, or floating-point values."""
    bits = _whole(dataset, "BitsAllocated", BITS[keyword], _listed(BITS[keyword]))
    layout: dict[str, Any] = {"rows": height, "columns": width, "samples_per_pixel": 1, "number_of_frames": 1}
    layout |= {"bits_allocated": bits, "photometric_interpretation": "MONOCHROME2", "pixel_keyword": keyword}
    stored, low, high = bits, -math.inf, math.inf
    if keyword == "PixelData":
        stored = _whole(dataset, "BitsStored", range(1, bits + 1), f"1 to BitsAllocated, {bits}")
        _whole(dataset, "HighBit", (stored - 1,), f"BitsStored - 1, {stored - 1}", default=stored - 1)
        signed = _whole(dataset, "PixelRepresentation", (0, 1), "0 or 1")
        low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
        layout |= {"bits_stored": stored, "pixel_representation": signed}

    element = dataset[keyword]
    layout["pixel_vr"] = element.VR
    data = bytes(element.value or b"")
    syntax = _transfer_syntax(dataset, element)
    decoder = get_decoder(syntax)
    if syntax.is_encapsulated:
        if keyword != "PixelData":
            raise ValueError(f"{keyword} is compressed ({syntax.name}); accepted: uncompressed")
        if not decoder.is_available:
            raise UserError(
                f"its pixels are compressed ({syntax.name}) and do not decode; accepted: install a decoder, pip "
                f"install python-gdcm, or pip install pylibjpeg pylibjpeg-libjpeg"
            )
        _check_code(data, syntax, height, width)
    else:
        size = math.ceil(height * width * bits / 8)
        # Padding is shorter than a row or a column; a longer remainder means that Rows or Columns are wrong
        longest = max(1, math.ceil(min(height, width) * bits / 8) - 1)
        if not size <= len(data) <= size + longest:
            raise ValueError(
                f"{keyword} has {len(data):,} bytes; accepted: {size:,} for {height}x{width} pixels of {bits} bits"
            )
        data = data[:size]
    try:
        stored_values, _ = decoder.as_array(data, **layout)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if not syntax.is_encapsulated or (low <= stored_values.min() and stored_values.max() <= high):
        return stored_values
    raise ValueError(f"{keyword} decodes to {stored_values.min()} to {stored_values.max()}; BitsStored is {stored}")


def _transfer_syntax(dataset: pydicom.Dataset, element: pydicom.DataElement) -> UID:
    """Encoding of the pixels; without a TransferSyntaxUID, that of the rest of the file."""
    syntax = _value(dataset.file_meta, "TransferSyntaxUID")
    if syntax is None:
        if element.is_undefined_length:
            raise ValueError("no TransferSyntaxUID, but compressed pixels; accepted without it: uncompressed pixels")
        implicit, little = dataset.original_encoding
        return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    try:
        get_decoder(UID(syntax))
    except NotImplementedError as error:
        raise ValueError(f"TransferSyntaxUID is {UID(syntax).name}, which pydicom does not decode") from error
    if UID(syntax).is_encapsulated != element.is_undefined_length:
        how = ("not ", "")[element.is_undefined_length]
        raise ValueError(f"TransferSyntaxUID is {UID(syntax).name}, but the pixels are {how}compressed")
    return UID(syntax)


def _check_code(data: bytes, syntax: UID, height: int, width: int) -> None:
    """Refuse compressed pixels that are not a single frame of this size, before decoding them."""
    _, *fragments = generate_fragments(data)  # the first is the offset table
    if syntax == RLELossless:  # does not contain a size; each fragment is a frame
        frames = len(fragments)
    else:
        frames = max(1, sum(fragment.startswith(_IMAGE_STARTS) for fragment in fragments))
    if frames != 1:
        raise ValueError(f"PixelData has {frames} compressed frames; accepted: one")
    if syntax == RLELossless:
        return
    size = _code_size(next(generate_frames(data, number_of_frames=1)))
    if size is None:
        raise ValueError(f"PixelData is not {syntax.name}, as TransferSyntaxUID says")
    if size != (height, width):
        raise ValueError(f"{height}x{width} pixels in its header, {size[0]}x{size[1]} in its compressed PixelData")


def _code_size(code: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS or JPEG 2000 image, None if it is none of these."""

    def number(place: int, size: int) -> int:
        return int.from_bytes(code[place : place + size], "big")

    if not code.startswith(_IMAGE_STARTS[0]):
        start = code.find(_IMAGE_STARTS[1])  # after the boxes of a JP2 file
        if start < 0:
            return None
        width, height, left, top = (number(start + place, 4) for place in (8, 12, 16, 20))
        return height - top, width - left
    place = 2
    while place + 9 <= len(code):
        marker = number(place, 2)
        # Start of frame; three markers of the range are tables and conditions. 0xFFF7 is JPEG-LS
        if (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)) or marker == 0xFFF7:
            return number(place + 5, 2), number(place + 7, 2)
        place += 1 if marker == 0xFFFF else 2 + number(place + 2, 2)
    return None


# Step 2: modality transformation


def _modality_values(dataset: pydicom.Dataset, keyword: str, stored: np.ndarray) -> np.ndarray:
    """Stored values in the unit of the modality, float64."""
    places = [dataset, *_of_frame(dataset, "PixelValueTransformationSequence")]
    slope, intercept = _agreed(places, "RescaleSlope", 1.0), _agreed(places, "RescaleIntercept", 0.0)
    if slope == 0:
        raise ValueError("RescaleSlope is 0; accepted: any other number")
    tables = _items(dataset, "ModalityLUTSequence")
    if not tables:
        return stored.astype(np.float64) * slope + intercept
    if (slope, intercept) != (1, 0) or keyword != "PixelData" or len(tables) != 1:
        raise ValueError("ModalityLUTSequence; accepted: one table, for integers, and no rescaling in addition")
    descriptor = _value(tables[0], "LUTDescriptor")
    try:
        count, _, bits = (int(value) for value in descriptor)
        entries = _value(tables[0], "LUTData")
        length = len(entries) // (2 if isinstance(entries, bytes) else 1)
    except (TypeError, ValueError) as error:
        raise ValueError("ModalityLUTSequence is invalid; accepted: LUTDescriptor of 3 numbers, LUTData") from error
    count = count or 2**16
    if bits not in (8, 16) or length != count:
        raise ValueError(
            f"ModalityLUTSequence has {length} entries in 16 bits each, LUTDescriptor says {count} of {bits} bits; "
            f"accepted: the same number, of 8 or 16 bits"
        )
    # pydicom subtracts the first mapped value in the type of the pixels, which may overflow
    return apply_modality_lut(stored.astype(np.int64), dataset).astype(np.float64)


def _of_frame(dataset: pydicom.Dataset, macro: str) -> list[pydicom.Dataset]:
    """Items of a macro in the functional groups of the only frame: shared groups first, then per-frame groups."""
    found = []
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = _items(dataset, groups)
        if len(items) > 1:
            raise ValueError(f"{groups} has {len(items)} items; accepted: one, for one frame")
        found += [place for item in items for place in _items(item, macro)]
    return found


def _agreed(places: list[pydicom.Dataset], name: str, default: float) -> float:
    """A number that may be given in several places of a header, where all must agree."""
    found = set()
    for place in places:
        value = _value(place, name)
        try:
            number = default if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name} is {value}; accepted: a finite number")
        if value is not None:
            found.add(number)
    if len(found) > 1:
        raise ValueError(f"{name} is {' and '.join(f'{number:g}' for number in sorted(found))}; accepted: one of them")
    return found.pop() if found else default


# Step 3: direction


def _is_inverse(dataset: pydicom.Dataset, photometric: str) -> bool:
    """Whether the highest value is displayed darkest.

    MONOCHROME1 and INVERSE mean the same, and radiographs must have both (PS3.3 C.8.11.3.1): one inversion, not two.
    """
    if _items(dataset, "PresentationLUTSequence"):
        raise ValueError("PresentationLUTSequence is not supported; accepted: PresentationLUTShape or none")
    accepted = ("INVERSE",) if photometric == "MONOCHROME1" else ("IDENTITY", "INVERSE")
    return _choice(dataset, "PresentationLUTShape", accepted, default=accepted[0]) == "INVERSE"


def _spacing(dataset: pydicom.Dataset) -> float | None:
    """Side of a pixel in mm, None if it is unknown, invalid or contradictory."""
    try:
        values = [_value(place, "PixelSpacing") for place in (dataset, *_of_frame(dataset, "PixelMeasuresSequence"))]
        ((row, column),) = {tuple(float(side) for side in value) for value in values if value is not None}
    except (TypeError, ValueError):
        return None
    return math.sqrt(row * column) if all(0 < side <= 1000 for side in (row, column)) else None


# Tags


def _value(dataset: pydicom.Dataset, name: str) -> Any:
    """Value of a tag, None if it is absent or empty; an error if it cannot be read."""
    try:
        value = dataset.get(name)
        if isinstance(value, Sized):
            return value if len(value.strip() if isinstance(value, str) else value) else None
        return value
    except Exception as error:  # pydicom converts values on access, and raises almost anything
        raise ValueError(f"{name} cannot be read ({error})") from error


def _value_or_none(dataset: pydicom.Dataset, name: str) -> Any:
    try:
        return _value(dataset, name)
    except ValueError:
        return None


def _items(dataset: pydicom.Dataset, name: str) -> list[pydicom.Dataset]:
    value = _value(dataset, name)
    if value is None:
        return []
    if not isinstance(value, pydicom.Sequence):
        raise ValueError(f"{name} is not a sequence")
    return list(value)


def _whole(
    dataset: pydicom.Dataset, name: str, accepted: Container[int], words: str, default: int | None = None
) -> int:
    value = _value(dataset, name)
    value = default if value is None else value
    if not isinstance(value, int) or int(value) not in accepted:
        raise ValueError(f"{'no ' + name if value is None else f'{name} is {value}'}; accepted: {words}")
    return int(value)


def _choice(dataset: pydicom.Dataset, name: str, accepted: tuple[str, ...], default: str | None = None) -> str:
    value = _value(dataset, name)
    text = default if value is None else str(value).strip().upper()
    if text not in accepted:
        raise ValueError(f"{'no ' + name if text is None else f'{name} is {text}'}; accepted: {_listed(accepted)}")
    return text


def _listed(values: tuple) -> str:
    return ", ".join(map(str, values))
