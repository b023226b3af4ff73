"""Reading image files from paths, bytes, binary files and base64, with bounds on their size."""

import base64
import contextlib
import io
import os
import warnings
from typing import Any

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 2**29  # of an image as bytes or base64; the largest uncompressed image has 4 bytes per pixel
MAX_QUOTED = 80  # characters of an argument that an error message repeats


def open_image(image: Any, name: str | None = None, max_pixels: int = MAX_PIXELS, paths: bool = True) -> Any:
    """Decode one image of any kind. The size is checked first, so an image that is too large is never decoded.

    Args:
        image: a path; bytes or a binary file; text with base64 of a file or a data URL; a PIL image. Anything else,
            such as an array, is returned unchanged.
        name: the subject of error messages, such as "image slice.png".
        max_pixels: largest accepted width times height.
        paths: whether text may be a path; must be false for untrusted text.

    Returns:
        `PIL.Image.Image`, upright by its orientation tag, grey (`L`, `I`, `I;16`, `F`) or `RGB`: palettes and other
        colour spaces become RGB, transparency is dropped.

    Raises:
        ValueError: not an image, truncated, several frames, more than `max_pixels`, 16 bits in colour or with
            transparency, or a URL.
    """
    is_pil = hasattr(image, "getbands")
    if not is_pil and not isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        if not hasattr(image, "read"):
            return image
        if isinstance(image, io.TextIOBase):
            raise ValueError(f"{name or 'the image'} is a file opened as text; accepted: one opened with mode 'rb'")
    try:  # imported here: transformers would require Pillow to load this file, though arrays do not need it
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError("reading image files needs Pillow, which is not installed: pip install pillow") from error

    if isinstance(image, str) and not (paths and os.path.isfile(image)):
        image = decode_base64(image, name, paths)
    if isinstance(image, (str, os.PathLike)):
        name = name or f"image {shorten(str(image))}"
    name, accepted = name or "the image", accepted_images(max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        if len(image) > MAX_FILE_BYTES:
            raise ValueError(f"{name} has more than {MAX_FILE_BYTES >> 20} MiB")
        image = io.BytesIO(image)
    try:
        with contextlib.ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = image if is_pil else stack.enter_context(Image.open(image, formats=IMAGE_FORMATS))
            frames = num_frames(opened)
            if opened.width * opened.height > max_pixels:
                problem = f"has {opened.width} x {opened.height} pixels"
            elif frames > 1:
                problem = f"holds {frames} frames"
            elif loses_bits(opened):
                problem = "has more than 8 bits per channel in colour or with transparency"
                accepted = "accepted: grey of 8 or 16 bits, colour of 8 bits per channel"
            else:
                return plain_mode(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        problem = f"is too large ({error})"
    except UnidentifiedImageError:
        problem = "is not an image"
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        problem = f"cannot be read ({getattr(error, 'strerror', None) or str(error)[:MAX_QUOTED]})"
    raise ValueError(f"{name} {problem}; {accepted}")


def num_frames(image: Any) -> int:
    """Number of frames of an open file. Further pictures in a JPEG (MPO) are a camera's previews and do not count."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def loses_bits(image: Any) -> bool:
    """Whether Pillow reads only 8 bits of each channel of an open file (not of a loaded PNG or PPM)."""
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA", "CMYK"):
        return False
    bits = getattr(image, "tag_v2", {}).get(258) or (8,)  # BitsPerSample of a TIFF file
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    raw_modes = [item if isinstance(item, str) else item[0] for item in arguments if item]
    largest = [item[1] for item in arguments if image.format == "PPM" and isinstance(item, tuple)]
    return max(bits) > 8 or any(";16" in str(mode) for mode in raw_modes) or max(largest, default=255) > 255


def accepted_images(max_pixels: int = MAX_PIXELS) -> str:
    """What is accepted, for messages about image files."""
    formats = ", ".join(IMAGE_FORMATS)
    return f"accepted: {formats} of at most {max_pixels // 10**6} million pixels, one slice per file"


def decode_base64(text: str, name: str | None, paths: bool) -> bytes:
    """Bytes of text that is a data URL or base64."""
    if text[:5].lower() == "data:":
        head, _, content = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError(
                f"{name or 'the image'} is a data URL without base64; accepted: data:image/png;base64,..."
            )
    elif "://" in text[:16]:
        raise ValueError(f"{name or 'the image'} is a URL, which is not fetched; {accepted_images()}")
    else:
        content = text
    try:
        if len(content) > MAX_FILE_BYTES // 3 * 4:
            raise ValueError(f"more than {MAX_FILE_BYTES >> 20} MiB")
        if paths and content is text and len(text) < MAX_QUOTED:  # too short for an image
            raise ValueError("no such file")
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        if paths and content is text:
            problem = f"{name or 'image ' + shorten(text)} cannot be read (no such file, and not base64)"
        else:
            problem = f"{name or 'the image'} is not valid base64 ({error})"
        raise ValueError(f"{problem}; {accepted_images()}") from error


def plain_mode(image: Any) -> Any:
    """A PIL image in grey or RGB."""
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return image
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")  # from palettes, transparency, CMYK and others


def shorten(text: str) -> str:
    """The beginning of a text: one line of at most 80 characters."""
    text = " ".join(text[: 2 * MAX_QUOTED].split())
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."
