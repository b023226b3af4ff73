"""Write the samples of one nodule: NIfTI, DICOM SEG, a figure and `result.json`.

All files are about readers who outline the nodule (see `scan_sampling`); `presence` in `result.json` is their share.
Names and paths of the input are not written: they may contain the name of a patient. DICOM SEG takes patient and study
from the headers of the input.
"""

import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import torch
import transformers
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.volume import Volume
from pydicom.sr.codedict import codes

from . import __version__
from .errors import UserError
from .plotting import save_figure, scan_figure
from .processing_probabilistic_sam import QUANTILES, binary_entropy
from .results import measure_words, presence_words, shortened, value_summary
from .scan_sampling import SampledScan
from .scans import Scan, box_in_patient, one_line_errors, orientation

FORMATS = ("nifti", "dicom-seg", "dicom-seg-samples", "png")
LEVELS = (0.25, 0.5, 0.75)  # probabilities whose outlines DICOM SEG holds
MAX_SEGMENT_VOXELS = 2**28  # segments x voxels of the slices in a DICOM SEG, one byte each
NIFTI_FILES = ("probability.nii.gz", "entropy.nii.gz", "samples.nii.gz")
SEG_FILES = ("probability.dcm", "levels.dcm", "samples.dcm")
SCAN_RESULT_FILES = (*NIFTI_FILES, *SEG_FILES, "figure.png", "result.json")
SERIES_NUMBER = 9000
# That DICOM SEG refers to, and that it may leave empty (type 2), though highdicom asks for them
REFERENCED_UIDS = ("StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber",
)  # fmt: skip
MEASURES = ("volume_mm3", "longest_diameter_mm")  # in result.json, each also with `_given_presence`
COLUMN_LEVELS = {"median": "0.5", "q05": "0.05", "q95": "0.95"}  # in summary.csv and in result.json
SUMMARY_COLUMNS = (
    "presence",
    *(f"{name}{kind}_{level}" for name in MEASURES for kind in ("_given_presence", "") for level in COLUMN_LEVELS),
)
LARGEST_MM = 30.0  # nodules of LIDC-IDRI


def choose_formats(
    scan: Scan, num_slices: int, num_samples: int, asked: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The formats to write, and warnings about those left out.

    Args:
        scan: an open scan.
        num_slices: of the largest nodule.
        num_samples: of each nodule.
        asked: some of `FORMATS`; None takes all that the scan allows, except the samples as DICOM SEG.

    Raises:
        UserError: DICOM SEG was asked for and cannot be written for this scan.
    """
    wanted = [name for name in asked or ["dicom-seg"] if name.startswith("dicom-seg")]
    if asked and not wanted or not asked and not scan.headers:
        return list(asked or ["nifti", "png"]), []
    segments = num_samples if "dicom-seg-samples" in wanted else len(LEVELS)
    problem = segmentation_problem(scan, num_slices, segments)
    if not problem:
        return list(asked or ["nifti", "dicom-seg", "png"]), []
    if asked:
        raise UserError(f"{wanted[-1]} cannot be written: {problem}; accepted: --format nifti png")
    return ["nifti", "png"], [f"DICOM SEG is left out: {problem}"]


def segmentation_problem(scan: Scan, num_slices: int, num_segments: int) -> str:
    """Why no DICOM SEG can be written for a scan; empty if it can.

    Args:
        scan: an open scan.
        num_slices: of a nodule.
        num_segments: of one file.
    """
    if not scan.headers:
        return f"it refers to the DICOM images of the scan, but this is {scan.kind}"
    for name in REFERENCED_UIDS:
        if not all(header.get(name) for header in scan.headers):
            return f"a file of the scan has no {name}"
    frames, rows, columns = scan.stored.spatial_shape
    count = num_slices if is_stored_axially(scan) else frames
    most = MAX_SEGMENT_VOXELS // (count * rows * columns)
    if num_segments > most:
        return f"{num_segments} segments of {count} slices need too much memory, at most {most} fit"
    try:
        with one_line_errors("a header of the scan", "used"):
            headers = source_headers(scan.headers, scan.stored.spacing[0])
            blank = segment_volume(scan, 0, np.zeros((1, *scan.stored.spatial_shape[1:], 1), np.uint8))
            tracking, series = ("Nodule", highdicom.UID()), highdicom.UID()
            segmentation = segments(headers, blank, ["Nodule"], tracking, "LEVELS", series, 1)
            segmentation.save_as(io.BytesIO())
    except UserError as error:
        return str(error)
    return ""


def is_stored_axially(scan: Scan) -> bool:
    """Whether the slices of the file are those of the scan."""
    return orientation(scan.stored)[0] in "HF"


def write_scan_result(
    folder: Path, scan: Scan, sampled: SampledScan, formats: Sequence[str], model: str
) -> dict[str, Any]:
    """Write the files of one nodule into `folder`.

    Args:
        folder: new or empty.
        scan: an open scan.
        sampled: from `sample_scan` with this scan, given presence.
        formats: some of `FORMATS`; `result.json` is always written.
        model: folder or owner/name.

    Returns:
        The content of `result.json`.
    """
    result = scan_result(scan, sampled, model)
    files: dict[str, str] = {}
    if "nifti" in formats:
        files |= write_nifti_files(folder, scan, sampled)
    if "dicom-seg" in formats or "dicom-seg-samples" in formats:
        files |= write_segmentations(folder, scan, sampled, "dicom-seg-samples" in formats)
    if "png" in formats:
        files["figure.png"] = "slices with the outlines of the samples, mean probability, volumes"
        write_figure(folder / "figure.png", scan, sampled, result)
    result["files"] = files
    (folder / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


# --------------------------------------------------------------------------------------------------------- result.json


def scan_result(scan: Scan, sampled: SampledScan, model: str) -> dict[str, Any]:
    """The numbers of one nodule, for JSON."""
    first, last = sampled.slices
    header = scan.headers[0] if scan.headers else None
    uids = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    return {
        "presence": round(sampled.presence, 6),
        **measures(sampled.volumes_mm3, sampled.diameters_mm, sampled.presence),
        "prompt": {
            "box": list(sampled.box),
            "slices": [first, last],
            "box_mm_lps": [round(value, 4) for value in box_in_patient(scan, sampled.box, first, last)],
        },
        "slices": [
            {
                "index": index,
                "centre_mm_lps": slice_centre(scan, index),
                "sop_instance_uid": slice_uid(scan, index),
                "empty_share": round(float(share), 6) if len(sampled.masks) else None,
            }
            for index, share in zip(range(first, last + 1), sampled.empty_shares, strict=True)
        ],
        "scan": {
            "kind": scan.kind,
            "modality": scan.modality,
            "shape": list(scan.shape),
            "spacing_mm": [round(value, 6) for value in scan.spacing_mm],
            "affine_lps": scan.geometry.affine.round(6).tolist(),
            **{name: str(header.get(name) or "") or None for name in uids if header is not None},
        },
        "warnings": [*scan.warnings, *box_warnings(scan, sampled.box)],
        "model": model,
        "num_samples": len(sampled.masks),
        "seed": sampled.seed,
        "threshold": sampled.threshold,
        "versions": {
            "probabilistic_sam": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "highdicom": highdicom.__version__, "nibabel": nibabel.__version__,
        },
    }  # fmt: skip


def measures(volumes: np.ndarray, diameters: np.ndarray, presence: float) -> dict[str, Any]:
    """Volume and longest diameter, given presence and of all readers, as `area_px` of an image.

    Args:
        volumes: of the samples given presence (N,), in mm^3.
        diameters: the same in mm.
        presence: share of the readers who outline the nodule.
    """
    pairs = list(zip(MEASURES, (volumes, diameters), strict=True))
    given = {f"{name}_given_presence": value_summary(values) for name, values in pairs}
    return given | {name: all_readers_summary(values, presence) for name, values in pairs}


def all_readers_summary(values: np.ndarray, presence: float) -> dict[str, Any]:
    """Mean and quantiles of all readers, of whom a share of 1 - presence has the value 0.

    Args:
        values: of readers who outline the nodule. Without them the mean is None.
        presence: their share.
    """
    absent = 1 - presence

    def quantile(level: float) -> float:
        if level <= absent or not len(values):
            return 0.0
        return float(np.quantile(values, min(1.0, (level - absent) / presence)))

    return {
        "mean": shortened(presence * values.mean()) if len(values) else None,
        "quantiles": {str(level): shortened(quantile(level)) for level in QUANTILES},
    }


def box_warnings(scan: Scan, box: Sequence[float]) -> list[str]:
    """What the user should know about a box in pixels."""
    width, height = (box[2] - box[0]) * scan.spacing_mm[2], (box[3] - box[1]) * scan.spacing_mm[1]
    if max(width, height) <= LARGEST_MM:
        return []
    largest = f"the released weights were trained on nodules of up to {LARGEST_MM:.0f} mm"
    return [f"the box is {width:.0f} x {height:.0f} mm; {largest}"]


def slice_centre(scan: Scan, index: int) -> list[float]:
    """Patient coordinates of the centre of a slice."""
    _, rows, columns = scan.shape
    centre = scan.geometry.affine @ [index, (rows - 1) / 2, (columns - 1) / 2, 1]
    return [round(float(value), 4) for value in centre[:3]]


def slice_uid(scan: Scan, index: int) -> str | None:
    """SOP instance UID of a slice; None unless the scan has one file per axial slice, and where a file has none."""
    if len(scan.headers) != scan.shape[0]:
        return None
    point = np.linalg.inv(scan.stored.affine) @ scan.geometry.affine @ [index, 0, 0, 1]
    corner = np.linalg.inv(scan.stored.affine) @ scan.geometry.affine @ [0, 0, 0, 1]
    if scan.shape[0] > 1 and abs((point - corner)[0]) < index - 0.5:
        return None  # slices of the file are not axial
    return str(scan.headers[round(float(point[0]))].get("SOPInstanceUID") or "") or None


# --------------------------------------------------------------------------------------------------------------- NIfTI


def write_nifti_files(folder: Path, scan: Scan, sampled: SampledScan) -> dict[str, str]:
    """Write probability, entropy and samples on the grid of the scan; returns what each file holds."""
    entropy = binary_entropy(torch.from_numpy(sampled.mean)).numpy()
    probability_file, entropy_file, samples_file = NIFTI_FILES
    write_nifti(folder / probability_file, scan, [sampled.mean], sampled, np.float32)
    write_nifti(folder / entropy_file, scan, [entropy], sampled, np.float32)
    files = {
        probability_file: "share of the readers who outline the nodule that include a voxel",
        entropy_file: "entropy of that probability in bits",
    }
    if len(sampled.masks):
        write_nifti(folder / samples_file, scan, sampled.masks, sampled, np.uint8)
        files[samples_file] = "masks of the samples along the last axis, 0 or 1"
    return files


def write_nifti(
    path: Path, scan: Scan, volumes: Sequence[np.ndarray] | np.ndarray, sampled: SampledScan, kind: type
) -> None:
    """Write blocks (K, h, w) of the window as volumes of the whole grid, plane by plane to save memory.

    The grid is that of the input file: i, j and k of NIfTI; columns, rows and slices of DICOM.
    """
    shape, affine = list(scan.stored.spatial_shape), scan.stored.affine
    reverse = bool(scan.headers)
    if reverse:
        shape, affine = shape[::-1], affine[:, [2, 1, 0, 3]]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS
    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape([*shape, len(volumes)] if path.name == NIFTI_FILES[2] else shape)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        file.write(header.binaryblock + b"\0" * 4)
        for values in volumes:
            block, start = scan.in_stored_order(values, sampled.slices[0], sampled.corner)
            if reverse:
                block, start = block.transpose(2, 1, 0), start[::-1]
            for plane in range(shape[2]):
                full: np.ndarray = np.zeros(shape[:2], kind)
                if 0 <= plane - start[2] < block.shape[2]:
                    part = full[start[0] : start[0] + block.shape[0], start[1] : start[1] + block.shape[1]]
                    part[:] = block[:, :, plane - start[2]]
                file.write(full.tobytes(order="F"))


# ----------------------------------------------------------------------------------------------------------- DICOM SEG


def write_segmentations(folder: Path, scan: Scan, sampled: SampledScan, with_samples: bool) -> dict[str, str]:
    """Write the mean, its outlines and on request the samples as DICOM SEG; returns what each file holds."""
    series, tracking = highdicom.UID(), (f"Nodule {highdicom.UID()}"[:64], highdicom.UID())
    probability_file, levels_file, samples_file = SEG_FILES
    levels = np.stack([sampled.mean >= level for level in LEVELS])
    parts: list[tuple[str, str, np.ndarray, list[str]]] = [
        (probability_file, "PROBABILITY", sampled.mean[None], ["Nodule, probability"]),
        (levels_file, "LEVELS", levels, [f"Nodule, {level:.0%} of readers" for level in LEVELS]),
    ]
    if with_samples and len(sampled.masks):
        names = [f"Nodule, sample {index + 1}" for index in range(len(sampled.masks))]
        parts.append((samples_file, "SAMPLES", sampled.masks, names))
    with one_line_errors("DICOM SEG", "written"):
        headers = source_headers(scan.headers, scan.stored.spacing[0])
        for number, (file, label, values, names) in enumerate(parts, start=1):
            volume = source_frames(scan, sampled, values)
            segments(headers, volume, names, tracking, label, series, number).save_as(folder / file)
    return {
        probability_file: "FRACTIONAL segment: share of the readers who outline the nodule that include a voxel",
        levels_file: "BINARY segments: voxels that at least 25, 50 and 75 % of those readers include",
    } | ({samples_file: "one overlapping BINARY segment per sample"} if len(parts) == 3 else {})


def source_headers(originals: Sequence[pydicom.Dataset], step_mm: float) -> list[pydicom.Dataset]:
    """Headers of a scan as highdicom takes them: text in UTF-8, and an empty value for a missing tag of type 2.

    highdicom also wants the very same orientation in all files, so they get that of the first one; `open_scan` has
    checked that they agree up to rounding.

    Args:
        originals: headers, which do not change.
        step_mm: distance between slices, for a missing slice thickness; highdicom could not read the file without.
    """
    headers = []
    for original in originals:
        header = pydicom.Dataset()
        header.update(original)
        header.decode()
        # add_new replaces the element, which the original shares
        header.add_new("SpecificCharacterSet", "CS", "ISO_IR 192")
        for keyword in TYPE_2:
            if keyword not in header:
                setattr(header, keyword, None)
        if not header.get("SliceThickness"):
            header.add_new("SliceThickness", "DS", round(step_mm, 6))
        if "ImageOrientationPatient" in header:
            header.add_new("ImageOrientationPatient", "DS", list(originals[0].ImageOrientationPatient))
        headers.append(header)
    return headers


def source_frames(scan: Scan, sampled: SampledScan, values: np.ndarray) -> Volume:
    """Blocks (S, K, h, w) of the window, probabilities or masks, in whole frames of the source."""
    kind: type = np.uint8 if values.dtype == bool else np.float32
    blocks = [scan.in_stored_order(value, sampled.slices[0], sampled.corner) for value in values]
    (first, top, left), (frames, height, width) = blocks[0][1], blocks[0][0].shape
    full: np.ndarray = np.zeros((frames, *scan.stored.spatial_shape[1:], len(values)), kind)
    for index, (block, _) in enumerate(blocks):
        full[:, top : top + height, left : left + width, index] = block
    return segment_volume(scan, first, full)


def segment_volume(scan: Scan, first: int, values: np.ndarray) -> Volume:
    """Segments (K, rows, columns, S) of the frames of the source from `first` on."""
    channels: Any = {"SegmentNumber": range(1, values.shape[-1] + 1)}
    return scan.stored[first : first + len(values)].with_array(values, channels=channels)


def segments(
    headers: Sequence[pydicom.Dataset],
    volume: Volume,
    names: Sequence[str],
    tracking: tuple[str, str],
    label: str,
    series: str,
    number: int,
) -> Segmentation:
    """One DICOM SEG of a volume from `segment_volume`."""
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="Probabilistic SAM", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    described = [
        SegmentDescription(
            segment_number=index,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Nodule,
            algorithm_type="SEMIAUTOMATIC",  # a person gives the box and the range of slices
            algorithm_identification=algorithm,
            tracking_id=tracking[0],
            tracking_uid=tracking[1],
        )
        for index, name in enumerate(names, start=1)
    ]
    return Segmentation(
        source_images=list(headers),
        pixel_array=volume,
        segmentation_type="BINARY" if volume.dtype == np.uint8 else "FRACTIONAL",
        segment_descriptions=described,
        series_instance_uid=series,
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=number,
        manufacturer="Probabilistic SAM",
        manufacturer_model_name="probabilistic-sam segment",
        software_versions=__version__,
        device_serial_number="none",
        content_label=label,
        content_description="For research only, not for diagnosis",
        omit_empty_frames=bool(volume.array.any()),
        series_description="Probabilistic SAM, research only",
    )


# -------------------------------------------------------------------------------------------------------------- figure


def write_figure(path: Path, scan: Scan, sampled: SampledScan, result: dict[str, Any]) -> None:
    """Write the figure of one nodule."""
    first, last = sampled.slices
    (top, left), (height, width) = sampled.corner, sampled.mean.shape[1:]
    slices = scan.read(first, last)[:, top : top + height, left : left + width]
    names = [f"slice {item['index']}, z {item['centre_mm_lps'][2]:.5g} mm" for item in result["slices"]]
    x1, y1, x2, y2 = sampled.box
    box = (x1 - left, y1 - top, x2 - left, y2 - top)
    title = result_line(result).replace("; longest", "\nlongest")
    figure = scan_figure(slices, sampled.masks, sampled.mean, sampled.volumes_mm3, names, box, title)
    save_figure(figure, path)


def result_line(result: dict[str, Any]) -> str:
    """Presence, volume and longest diameter of a result in one line."""
    volume, diameter = (result[f"{name}_given_presence"] for name in MEASURES)
    if volume is None:
        return f"{presence_words(result['presence'])}; too few readers would outline a nodule to say how large"
    levels = ("0.5", "0.05", "0.95")
    median, low, high = (measure_words(volume["quantiles"][level], 0) for level in levels)
    middle, shortest, longest = (measure_words(diameter["quantiles"][level], 1) for level in levels)
    return (
        f"{presence_words(result['presence'])}; volume if outlined: median {median} mm3 (90 % interval {low} to "
        f"{high}); longest diameter: median {middle} mm ({shortest} to {longest})"
    )


def summary_row(result: dict[str, Any]) -> Iterable[object]:
    """Cells of `SUMMARY_COLUMNS`; those given presence stay empty where there are no outlines."""
    yield result["presence"]
    for name in MEASURES:
        for values in (result[f"{name}_given_presence"], result[name]):
            yield from (values["quantiles"][level] if values else "" for level in COLUMN_LEVELS.values())
