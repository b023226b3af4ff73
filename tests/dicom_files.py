"""CT slices as DICOM files, for tests and for `training/report/bench_build.py`."""

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian


def write_slice(
    path: Path, hu: np.ndarray, series_uid: str, z: float, sop_uid: str, slope=1.0, without=(), **tags
) -> Path:
    """Write a CT slice as a DICOM file; `slope` is the rescale slope, the intercept is -1024.

    Finally `tags` are set, and the tags named in `without` are removed.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, sop_uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, sop_uid, series_uid
    data.Modality, data.InstanceNumber, data.ImagePositionPatient = "CT", 1, [0, 0, z]
    data.Rows, data.Columns = hu.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = slope, -1024
    data.PixelData = np.round((hu + 1024) / slope).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    for name in without:
        delattr(data, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path
