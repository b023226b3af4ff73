"""The work of `probabilistic-sam segment SCAN`: result folders for the nodules of one scan.

Everything is checked before the model is loaded, and the output folder is written whole or not at all.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import UserError
from .files import replaced_directory
from .inference import check_prompt, load_model
from .scan_files import (
    SCAN_RESULT_FILES,
    SUMMARY_COLUMNS,
    box_warnings,
    choose_formats,
    result_line,
    summary_row,
    write_scan_result,
)
from .scan_sampling import sample_scan
from .scans import Scan, box_in_patient, box_in_pixels, check_slices, is_oblique, open_scan
from .segment import Options, finite_number, table_rows

COLUMNS = ("x1", "y1", "x2", "y2", "first", "last")
MAX_NODULES = 1_000


@dataclass(frozen=True)
class Nodule:
    """Box in pixels and range of slices of one nodule, with the start of error messages about it."""

    box: list[float]
    first: int
    last: int
    place: str = ""


def segment_scan(
    path: str,
    box: Sequence[float] | None,
    slices: Sequence[int] | None,
    box_mm: Sequence[float] | None,
    table: str | None,
    series: str | None,
    formats: Sequence[str] | None,
    output: str,
    options: Options,
) -> list[str]:
    """Sample masks of one nodule or of a table of nodules in a scan and write one result each.

    Args:
        path: of the scan, as in `open_scan`.
        box: in pixels, with `slices`.
        slices: first and last slice.
        box_mm: in patient coordinates, instead of `box` and `slices`.
        table: CSV file with the columns `COLUMNS`, instead of both.
        series: series instance UID, if there are several.
        formats: some of `FORMATS`; None writes all but the samples as DICOM SEG, as far as the scan allows.
        output: folder of the result.
        options: as for images.

    Returns:
        Lines that say what was understood and written.

    Raises:
        UserError: bad input, or a folder that cannot be written.
    """
    with open_scan(path, series) as scan:
        nodules = find_nodules(scan, box, slices, box_mm, table)
        for nodule in nodules:
            check_nodule(scan, nodule)
        num_slices = max(nodule.last - nodule.first + 1 for nodule in nodules)
        formats, left_out = choose_formats(scan, num_slices, options.num_samples, formats)
        lines = [f"warning: {warning}" for warning in (*scan.warnings, *left_out)]
        folders = ["."] if table is None else [f"nodule-{index}" for index in range(len(nodules))]
        owned = list(SCAN_RESULT_FILES)
        if table is not None:
            owned = [*(f"nodule-[0-9]*/{name}" for name in owned), "summary.csv"]
        with replaced_directory(output, owned, "." if table is None else "nodule-*") as folder:
            model, processor = load_model(options.model)
            model = model.to(options.device)
            results = []
            pairs = list(zip(nodules, folders, strict=True))
            for nodule, name in tqdm(pairs, unit="nodule", disable=True if table is None else None):
                sampled = sample_scan(
                    model, processor, scan, nodule.box, (nodule.first, nodule.last), options.num_samples,
                    options.seed, options.threshold,
                )  # fmt: skip
                (folder / name).mkdir(exist_ok=True)
                result = write_scan_result(folder / name, scan, sampled, formats, options.model)
                lines += [prompt_line(scan, nodule), *(f"warning: {text}" for text in box_warnings(scan, nodule.box))]
                lines.append(f"wrote {Path(output) / name}: {result_line(result)}; {files_words(result)}")
                results.append(result)
            if table is not None:
                write_summary(folder / "summary.csv", nodules, results)
    return lines


def find_nodules(
    scan: Scan,
    box: Sequence[float] | None,
    slices: Sequence[int] | None,
    box_mm: Sequence[float] | None,
    table: str | None,
) -> list[Nodule]:
    """The nodules of a call; arguments as in `segment_scan`."""
    kinds = [box is not None or slices is not None, box_mm is not None, table is not None]
    if sum(kinds) != 1 or (box is None) != (slices is None):
        raise UserError("a scan needs one kind of prompt; accepted: --box with --slices, or --box-mm, or --prompts")
    if table is not None:
        return read_nodules(table)
    if box_mm is not None:
        found, first, last = box_in_pixels(scan, box_mm)
        return [Nodule(found, first, last)]
    assert box is not None and slices is not None
    return [Nodule(list(box), slices[0], slices[1])]


def read_nodules(path: str) -> list[Nodule]:
    """Read a CSV file with the columns x1, y1, x2, y2, first, last in any order, one nodule per row.

    Raises:
        UserError: see `table_rows`; or a row without four finite numbers and two whole numbers.
    """
    nodules: list[Nodule] = []
    for place, row in table_rows(path, COLUMNS, MAX_NODULES):
        box = [finite_number(row[column], f"{place}{column} is ") for column in COLUMNS[:4]]
        try:
            nodules.append(Nodule(box, int(row["first"]), int(row["last"]), place))
        except ValueError as error:
            raise UserError(f"{place}{error}; accepted: whole numbers for first and last") from error
    return nodules


def check_nodule(scan: Scan, nodule: Nodule) -> None:
    """Raise `UserError` for a nodule outside the scan."""
    try:
        check_prompt({"box": nodule.box}, scan.shape[2], scan.shape[1])
        check_slices(nodule.first, nodule.last, scan)
    except UserError as error:
        raise UserError(f"{nodule.place}{error}") from error


def prompt_line(scan: Scan, nodule: Nodule) -> str:
    """The prompt in pixels and in patient coordinates."""
    x1, y1, z1, x2, y2, z2 = (f"{value:.2f}" for value in box_in_patient(scan, nodule.box, nodule.first, nodule.last))
    pixels = " ".join(f"{value:g}" for value in nodule.box)
    return (
        f"box {pixels} on slices {nodule.first} to {nodule.last} of 0 to {scan.shape[0] - 1}: patient x {x1} to {x2}, "
        f"y {y1} to {y2}, z {z1} to {z2} mm (LPS{', a larger box, because the slices are oblique' * is_oblique(scan)})"
    )


def files_words(result: dict[str, Any]) -> str:
    """The files to look at first."""
    return "see figure.png, result.json" if "figure.png" in result["files"] else "see result.json"


def write_summary(path: Path, nodules: Sequence[Nodule], results: Sequence[dict[str, Any]]) -> None:
    """Write one row per nodule: its prompt, presence, volume and longest diameter."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("nodule", *COLUMNS, *SUMMARY_COLUMNS))
        for index, (nodule, result) in enumerate(zip(nodules, results, strict=True)):
            writer.writerow([index, *nodule.box, nodule.first, nodule.last, *summary_row(result)])
