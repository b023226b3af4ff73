"""Nodules as volumes: which rows of a dataset are the slices of one nodule, and what they have in common.

A nodule is all slices with the same `patient_id`, `scan_id` and `nodule_id`, in order of `z_mm`. Masks are decoded
only when they are asked for.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from .format import decode_masks

_IDENTITY = ("patient_id", "scan_id", "nodule_id")
_GEOMETRY = ("z_mm", "pixel_spacing_mm", "crop_row", "crop_col")


@dataclass(frozen=True)
class NoduleSlices:
    """The slices of one nodule.

    Attributes:
        patient_id: of its rows.
        scan_id: of its rows.
        nodule_id: of its rows.
        rows: positions of its slices in the dataset, in order of z.
        slice_distance_mm: median distance between the positions of its slices; of a single slice, its thickness.
        pixel_spacing_mm: side of a pixel.
    """

    patient_id: str
    scan_id: int
    nodule_id: int
    rows: tuple[int, ...]
    slice_distance_mm: float
    pixel_spacing_mm: float

    def __str__(self) -> str:
        return f"{self.patient_id} scan {self.scan_id} nodule {self.nodule_id}"

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel: the area of a pixel times the distance of the slices."""
        return self.pixel_spacing_mm**2 * self.slice_distance_mm


def group_nodules(dataset: datasets.Dataset) -> tuple[list[NoduleSlices], int]:
    """Group the rows of a split into nodules.

    Args:
        dataset: as returned by `load_split`.

    Returns:
        The nodules in the order of patient, scan and nodule, and the number of those left out because position,
        spacing or crop of a slice is unknown.

    Raises:
        UserError: slices of a nodule at one position, with different spacing or crops, or without a positive volume.
    """
    groups: dict[tuple, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    columns = dataset.select_columns([*_IDENTITY, *_GEOMETRY, "slice_thickness_mm"])
    for position, row in enumerate(columns):
        groups[tuple(row[name] for name in _IDENTITY)].append((position, row))
    nodules, left_out = [], 0
    for key, slices in sorted(groups.items(), key=lambda item: [-1 if part is None else part for part in item[0]]):
        if any(row[name] is None for _, row in slices for name in (*_IDENTITY, *_GEOMETRY)):
            left_out += 1
            continue
        where = f"{key[0]} scan {key[1]} nodule {key[2]}"
        slices.sort(key=lambda item: item[1]["z_mm"])
        for name in ("pixel_spacing_mm", "crop_row", "crop_col"):
            found = sorted({row[name] for _, row in slices})
            if len(found) > 1:
                raise UserError(f"{where}: its slices have {name} {found[0]:g} and {found[1]:g}; accepted: one value")
        distances = np.diff([row["z_mm"] for _, row in slices])
        if not distances.all():
            raise UserError(f"{where}: two slices at one position; accepted: one slice for each position")
        distance = float(np.median(distances)) if len(distances) else slices[0][1]["slice_thickness_mm"]
        if distance is None:
            left_out += 1
            continue
        rows, first = tuple(position for position, _ in slices), slices[0][1]
        identity = {name: first[name] for name in _IDENTITY}
        spacing = first["pixel_spacing_mm"]
        nodule = NoduleSlices(**identity, rows=rows, slice_distance_mm=distance, pixel_spacing_mm=spacing)
        if not (spacing > 0 and 0 < nodule.voxel_mm3 < math.inf):
            raise UserError(
                f"{where}: pixel_spacing_mm is {spacing:g}, the distance of its slices {distance:g} mm; accepted: "
                "positive numbers"
            )
        nodules.append(nodule)
    return nodules, left_out


def stack_masks(nodule: NoduleSlices, rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Masks of all readers on all slices of a nodule: (readers, slices, H, W) bool. A reader keeps their index.

    Readers are told apart by `reader_ids`, or by their place in the list of masks where these are unknown.

    Args:
        nodule: the nodule.
        rows: its rows in order of z.

    Raises:
        UserError: a reader who is absent on some of the slices, or masks of different sizes.
    """
    slices = [dict(zip(present_readers(row, nodule), decode_masks(row), strict=True)) for row in rows]
    readers = list(slices[0])
    for masks in slices:
        if different := sorted(map(str, masks.keys() ^ slices[0].keys())):
            raise UserError(
                f"{nodule}: reader {different[0]} is absent on some slices; accepted: the same readers on all slices"
            )
    shapes = sorted({mask.shape for masks in slices for mask in masks.values()})
    if len(shapes) > 1:
        raise UserError(f"{nodule}: masks of shapes {shapes[0]} and {shapes[1]}; accepted: one size on all slices")
    return np.stack([[masks[reader] for masks in slices] for reader in readers])


def present_readers(row: Mapping[str, Any], nodule: NoduleSlices) -> list[str | int]:
    """Names of the readers of a row who are not absent, or their places in the list of masks."""
    places: list[str | int] = [place for place, mask in enumerate(row["masks"]) if mask is not None]
    names = row.get("reader_ids")
    if names is None:
        return places
    if len(names) == len(row["masks"]):
        names = [names[place] for place in places]
    if len(names) != len(places) or len(set(names)) < len(names):
        raise UserError(
            f"{nodule}: reader_ids {names} of {len(places)} masks; accepted: a different name for each mask"
        )
    return list(names)
