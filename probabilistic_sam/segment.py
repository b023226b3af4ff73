"""The work of `probabilistic-sam segment`: result folders for the prompts of one image or of a table.

Everything is checked before the model is loaded, and the output folder is written whole or not at all.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .errors import UserError
from .files import replaced_directory
from .images import is_nifti, load_slice, luminance
from .inference import check_num_samples, check_prompt, load_model, sample_image
from .results import RESULT_FILES, area_unit, result_words, write_result

COLUMNS = ("image", "x1", "y1", "x2", "y2")
LEVELS = {"median": "0.5", "q05": "0.05", "q95": "0.95"}  # in summary.csv and in result.json
SUMMARY_COLUMNS = (
    "row", *COLUMNS, "presence", *(f"area_given_presence_{level}" for level in LEVELS),
    *(f"area_{level}" for level in LEVELS), "area_unit", "empty_share",
)  # fmt: skip
MAX_BOXES = 100
MAX_ROWS = 10_000
MAX_TABLE_BYTES = 2**24


@dataclass(frozen=True)
class Options:
    """Options that all prompts of a call share.

    Args:
        model: folder or owner/name.
        device: where the model runs.
        num_samples: masks per prompt.
        seed: of the noise; every prompt is sampled with the same seed.
        threshold: probability above which a pixel belongs to a mask.
        pixel_spacing: side of a pixel in mm; None takes it from DICOM.
        runtime: as in `load_model`.
    """

    model: str
    device: torch.device
    num_samples: int
    seed: int
    threshold: float
    pixel_spacing: float | None
    runtime: str = "torch"


@dataclass(frozen=True)
class Request:
    """One prompt for one image, with a result folder of its own.

    Args:
        image: file of the image.
        prompt: as in `sample_image`, without the mask.
        mask: file of the mask prompt.
        folder: below the output folder.
        place: start of error messages, such as "table.csv, line 3: ".
        cells: of the table's row, in the order of `COLUMNS`.
    """

    image: str
    prompt: dict[str, Any]
    mask: str | None = None
    folder: str = "."
    place: str = ""
    cells: tuple[str, ...] = ()


def segment_image(
    image: str,
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    negative_points: Sequence[Sequence[float]],
    mask: str | None,
    output: str,
    options: Options,
) -> list[str]:
    """Sample masks in one image and write one result per box, or a single one for at most one box.

    Returns:
        One line per result.

    Raises:
        UserError: bad input, or a folder that cannot be written.
    """
    refined = points or negative_points or mask
    if len(boxes) > 1 and refined:
        raise UserError(f"{len(boxes)} boxes with points or a mask; accepted: points and a mask with at most one box")
    if len(boxes) > MAX_BOXES:
        raise UserError(f"{len(boxes)} boxes; accepted: at most {MAX_BOXES}, or a table with --prompts")
    if len(boxes) > 1:
        requests = [Request(image, {"box": box}, folder=f"box-{index}") for index, box in enumerate(boxes)]
        owned, folders = [f"box-[0-9]*/{name}" for name in RESULT_FILES], "box-*"
    else:
        given = {"box": boxes[0] if boxes else None, "points": points, "negative_points": negative_points}
        requests = [Request(image, {key: value for key, value in given.items() if value}, mask)]
        owned, folders = list(RESULT_FILES), "."
    _check(requests, options)
    with replaced_directory(output, owned, folders) as folder:
        results = _write_results(requests, folder, options, "box")
    return [
        f"wrote {Path(output) / request.folder}: {result_words(result)}; see figure.png, result.json"
        for request, result in zip(requests, results, strict=True)
    ]


def segment_table(table: str, output: str, options: Options) -> str:
    """Sample masks for each row of a table of images and boxes; write one result per row and `summary.csv`.

    Returns:
        One line that says what was written.

    Raises:
        UserError: bad input, with the file and the line of the table, or a folder that cannot be written.
    """
    requests = read_table(table)
    _check(requests, options)
    owned = (*(f"row-[0-9]*/{name}" for name in RESULT_FILES), "summary.csv")
    with replaced_directory(output, owned, "row-*") as folder:
        results = _write_results(requests, folder, options, "row")
        _write_summary(folder / "summary.csv", requests, results)
    images = len({request.image for request in requests})
    return (
        f"wrote {output}: {len(requests)} rows of {images} images, {options.num_samples} samples each; see "
        "summary.csv, row-*/figure.png, row-*/result.json"
    )


def read_table(path: str) -> list[Request]:
    """Read a CSV file with the columns image, x1, y1, x2, y2 in any order, one box per row.

    Paths of images are relative to the folder of the table. The first row gets the folder `row-0`.

    Raises:
        UserError: see `table_rows`; or a row without an image and four finite numbers.
    """
    requests: list[Request] = []
    for place, row in table_rows(path, COLUMNS, MAX_ROWS):
        if not row["image"]:
            raise UserError(f"{place}no image; accepted: a path relative to the folder of the table")
        requests.append(
            Request(
                str(Path(path).parent / row["image"]),
                {"box": [finite_number(row[column], f"{place}{column} is ") for column in COLUMNS[1:]]},
                folder=f"row-{len(requests)}",
                place=place,
                cells=tuple(row[column] for column in COLUMNS),
            )
        )
    return requests


def table_rows(path: str, columns: Sequence[str], most: int) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file: the start of error messages about a row, and its cells by column.

    Args:
        path: of the file, in UTF-8.
        columns: that it must have, in any order.
        most: rows.

    Raises:
        UserError: no such table, too large, other columns, no rows or too many, or a row of another length.
    """
    file, accepted = Path(path), f"accepted: a CSV file in UTF-8 with the columns {','.join(columns)}"
    if not file.is_file():
        raise UserError(f"no table at {path}; {accepted}")
    try:
        if file.stat().st_size > MAX_TABLE_BYTES:
            raise UserError(f"table {path} has more than {MAX_TABLE_BYTES >> 20} MiB; {accepted}")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"table {path} cannot be read ({error}); {accepted}") from error
    reader = csv.reader(io.StringIO(text), strict=True)
    count = 0
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if sorted(header) != sorted(columns):
            raise UserError(f"table {path} has the columns {','.join(header)[:80] or '(none)'}; {accepted}")
        for cells in reader:
            if not cells:
                continue
            if count == most:
                raise UserError(f"table {path} has more than {most} rows; accepted: at most {most}")
            place = f"{path}, line {reader.line_num}: "
            if len(cells) != len(header):
                raise UserError(f"{place}{len(cells)} cells; accepted: {len(header)}, one per column")
            yield place, dict(zip(header, (cell.strip() for cell in cells), strict=True))
            count += 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; {accepted}") from error
    if not count:
        raise UserError(f"table {path} has no rows; {accepted}")


def finite_number(text: str, place: str) -> float:
    """The number in a cell; `place` starts the message of the `UserError` if there is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}{text[:80]!r}; accepted: a finite number")
    return value


def _opened(requests: Sequence[Request], options: Options) -> Iterator[tuple[np.ndarray, float | None, dict]]:
    """Image, pixel spacing and prompt of each request, checked. Successive requests share an image read once."""
    path, image, spacing = None, np.empty((0, 0)), None
    for request in requests:
        try:
            if request.image != path:
                image, spacing = load_slice(request.image)
                path = request.image
            prompt = dict(request.prompt)
            if request.mask is not None:
                if is_nifti(request.mask) != is_nifti(request.image):  # whose columns follow the first axis
                    raise UserError(f"{request.mask} is a mask of {request.image}; accepted: both NIfTI, or neither")
                prompt["mask"] = luminance(load_slice(request.mask)[0])
            check_prompt(prompt, image.shape[1], image.shape[0])
            check_num_samples(options.num_samples, image)
        except UserError as error:
            raise UserError(f"{request.place}{error}") from error
        yield image, options.pixel_spacing or spacing, prompt


def _check(requests: Sequence[Request], options: Options) -> None:
    for _ in _opened(requests, options):
        pass


def _write_results(requests: Sequence[Request], folder: Path, options: Options, unit: str) -> list[dict[str, Any]]:
    """Sample masks for all requests and write their folders; the progress bar shows on terminals only."""
    model, processor = load_model(options.model, runtime=options.runtime)
    model = model.to(options.device)
    results = []
    opened = zip(requests, _opened(requests, options), strict=True)
    hidden = True if len(requests) == 1 else None
    for request, (image, spacing, prompt) in tqdm(opened, total=len(requests), unit=unit, disable=hidden):
        sampled = sample_image(model, processor, image, prompt, options.num_samples, options.seed, options.threshold)
        target = folder / request.folder
        target.mkdir(exist_ok=True)
        results.append(write_result(target, image, sampled, request.image, options.model, spacing, request.mask))
    return results


def _write_summary(path: Path, requests: Sequence[Request], results: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SUMMARY_COLUMNS)
        for index, (request, result) in enumerate(zip(requests, results, strict=True)):
            unit = area_unit(result)
            summaries = (result[f"area_{unit}_given_presence"], result[f"area_{unit}"])
            # Cells stay empty where there are no outlines
            areas = [item["quantiles"][level] if item else "" for item in summaries for level in LEVELS.values()]
            writer.writerow([index, *request.cells, result["presence"], *areas, unit, result["empty_share"]])
