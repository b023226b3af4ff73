"""Small scans for tests: a DICOM series, NIfTI files, and samples without a model."""

import nibabel
import numpy as np
from dicom_files import write_slice
from pydicom.uid import generate_uid

from probabilistic_sam.scan_sampling import SampledScan

SPACING = [0.7, 0.8]  # mm, between rows and between columns
STEP = 2.5  # mm, between slices
ORIGIN = (-20.0, -30.0, 100.0)
SHAPE = (6, 40, 48)


def hounsfield(shape=SHAPE):
    """Different values in every voxel, between -1000 and 1000."""
    return np.random.default_rng(0).integers(-1000, 1000, shape)


def write_series(folder, hu, series="1.2.3.1", tilt=0.0, positions=None, descending=False, **tags):
    """Write a series with one file per slice; `tilt` shifts each slice by so many mm in y.

    `positions` are heights, or points (x, y, z).
    """
    given = {
        "StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.3.9", "PatientName": "Roe^Jane", "PatientID": "P1",
        "PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "", "StudyID": "", "SeriesNumber": 1,
        "AccessionNumber": "", "ReferringPhysicianName": "", "PixelSpacing": SPACING, "Manufacturer": "X",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "KVP": 120,
        "AcquisitionNumber": 1, "SliceThickness": STEP, "PositionReferenceIndicator": "",
    } | tags  # fmt: skip
    heights = ORIGIN[2] + STEP * np.arange(len(hu)) if positions is None else positions
    for index, (values, z) in enumerate(zip(hu, heights, strict=True)):
        name = f"{len(hu) - index if descending else index:03d}.dcm"
        position = [ORIGIN[0], ORIGIN[1] + tilt * index, float(z)] if np.ndim(z) == 0 else [float(p) for p in z]
        write_slice(
            folder / name, values, series, position[2], generate_uid(),
            **given | {"ImagePositionPatient": position, "InstanceNumber": index + 1},
        )  # fmt: skip
    return folder


def write_nifti(path, values, affine_ras, code=1):
    """Write an array (i, j, k) as NIfTI."""
    image = nibabel.Nifti1Image(values, affine_ras)
    image.set_sform(affine_ras, code=code)
    image.set_qform(affine_ras, code=code)
    image.to_filename(path)
    return path


def samples_of(scan, slices=(1, 3), corner=(5, 7), size=(10, 12), count=4):
    """Random samples in a window, as `sample_scan` would return them."""
    rng = np.random.default_rng(1)
    masks = rng.random((count, slices[1] - slices[0] + 1, *size)) < 0.4
    (y, x), (height, width) = corner, size
    return SampledScan(
        masks, masks.mean(axis=0, dtype=np.float32), 0.75, True, (x, y, x + width, y + height), slices, corner,
        scan.spacing_mm, 0, 0.5,
    )  # fmt: skip


def whole(scan, sampled, values):
    """Blocks (..., K, h, w) of the window in arrays of the whole scan (..., slices, rows, columns)."""
    full = np.zeros((*values.shape[:-3], *scan.shape), values.dtype)
    (top, left), (height, width) = sampled.corner, values.shape[-2:]
    first, last = sampled.slices
    full[..., first : last + 1, top : top + height, left : left + width] = values
    return full
