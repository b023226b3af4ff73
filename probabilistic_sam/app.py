"""The page of `probabilistic-sam demo`: open a slice or a scan, mark a lesion, and see sampled masks.

The page is served on the loopback address and contacts no other server. Uploads and results are kept in a temporary
folder that is deleted when the command ends. Handlers of slices keep no state: each reads the uploaded file again.
The other tab is `app_scan`.
"""

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from .app_canvas import MAX_SAMPLES, check_numbers, picture, prompt_canvas, read_prompt, zip_of
from .errors import UserError
from .images import is_scan, load_slice
from .inference import check_num_samples, sample_image
from .modeling_probabilistic_sam import ProbabilisticSamModel
from .plotting import area_figure, contour_figure, figure_pixels, map_figure, zoom_window
from .processing_image_files import IMAGE_FORMATS
from .processing_probabilistic_sam import ProbabilisticSamProcessor
from .results import result_words, write_result

HOST = "127.0.0.1"
MAX_UPLOAD = 2**31  # bytes, as in `scans.MAX_BYTES`
MAX_WAITING = 16  # requests in the queue
KEPT_SECONDS = 3600
EXAMPLES = 3
START = "### Open a slice, drag a box around the lesion, and sample masks"
STYLE = """
.gradio-container { max-width: 1500px !important; }
#gallery, #gallery .grid-wrap { min-height: 0; max-height: none; height: auto; overflow: visible; }
#gallery .caption-label { font-size: 12px; max-width: 100%; padding: 2px 6px; }
.canvas { padding: 0; }
#scan-line th { word-break: normal; }
@media (max-width: 700px) {
  #scan-figure { overflow-x: auto; }
  #scan-figure * { justify-content: flex-start !important; }
  #scan-figure img { width: 900px; max-width: none; }
}
footer { display: none !important; }
"""


def open_file(path: str | None) -> tuple[np.ndarray, float | None]:
    """Read an uploaded slice. Error messages give its name, not its temporary path."""
    if not path:
        raise UserError("no slice yet; drop a file: " + ", ".join(IMAGE_FORMATS) + ", DICOM or NIfTI")
    if is_scan(path):
        raise UserError(f"{Path(path).name} is a scan, not one slice; open it in the tab Scan")
    try:
        return load_slice(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), Path(path).name)) from error


def show(path: str | None, side: float | None = None, prompt: dict[str, Any] | None = None) -> list[Any]:
    """Show a new slice: its picture with a prompt, its pixel spacing, the next step, and no results.

    Args:
        path: of the uploaded file; None shows nothing.
        side: of a pixel in mm; replaces the one in the file.
        prompt: as the browser sends it; none by default.
    """
    rest = [START, gr.Column(visible=False)]
    nothing = [gr.HTML(value={}, src="", width=1, height=1), None, *rest]
    if path is None:
        return nothing
    try:
        image, found = open_file(path)
    except UserError as error:
        gr.Warning(str(error), title="This file was not accepted", duration=None)
        return nothing
    height, width = image.shape[:2]
    return [gr.HTML(value=prompt or {}, src=picture(image), width=width, height=height), side or found, *rest]


def sample(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    name: str,
    path: str | None,
    prompt: Any,
    num_samples: float,
    seed: float,
    side: float | None,
) -> list[Any]:
    """Sample masks; return summary, maps, areas, gallery and a zip of what `probabilistic-sam segment` writes.

    Areas and gallery show samples given presence.

    Args:
        model: on any device.
        processor: the one saved with the model.
        name: of the model.
        path: of the uploaded file.
        prompt: as the browser sent it.
        num_samples: 1 to 64.
        seed: of the noise.
        side: of a pixel in mm; None or 0 reports areas in pixels.

    Raises:
        UserError: an input that is not accepted.
    """
    image, _ = open_file(path)
    read = read_prompt(prompt, image.shape[1], image.shape[0])
    check_numbers(num_samples, seed)
    if side and not 0 < side <= 1000:
        raise UserError(f"the pixel spacing is {side} mm; accepted: more than 0, at most 1000, or nothing")
    check_num_samples(int(num_samples), image)
    sampled = sample_image(model, processor, image, read, int(num_samples), int(seed))

    def write(folder: Path) -> dict[str, Any]:
        return write_result(folder, image, sampled, Path(str(path)).name, name, side or None)

    archive, result = zip_of(write, f"{Path(str(path)).stem}-masks")

    unit, scale = ("mm²", side**2) if side else ("px", 1.0)
    box, points = read.get("box"), np.array(read["points"]) if "points" in read else None
    zoom = zoom_window((image.shape[0], image.shape[1]), box, points, sampled.shown)
    gallery = []
    for index, mask in enumerate(sampled.shown, start=1):
        area = mask.sum() * scale
        words = f"{area:.{0 if area >= 100 else 1}f} {unit}" if area else "empty"
        gallery.append((figure_pixels(contour_figure(image, mask, zoom)), f"{index}: {words}"))
    return [
        f"### {result_words(result).replace('mm2', 'mm²')}",
        gr.Column(visible=True),
        figure_pixels(map_figure(image, sampled.mean, sampled.entropy, zoom, box, points)),
        figure_pixels(area_figure(sampled.outlines.sum(axis=(1, 2)) * scale, unit)),
        gallery,
        archive,
    ]


def write_examples(folder: Path) -> list[list[Any]]:
    """Write phantom slices of validation patients; return path, pixel spacing and prompt of each.

    There are none without pylidc. The box is the one of `make demo`.
    """
    examples: list[list[Any]] = []
    try:
        from .data import row_prompt
        from .data.format import decode_masks
        from .data.lidc.phantom import demo_nodules, phantom_row

        for number, nodule in enumerate(demo_nodules(EXAMPLES), start=1):
            row = phantom_row(nodule, nodule.middle)
            path = folder / f"phantom-{number}.png"
            path.write_bytes(row["image"]["bytes"])
            box = np.round(row_prompt(row, decode_masks(row), "union_box")["input_boxes"]).astype(int).tolist()
            examples.append([str(path), row["pixel_spacing_mm"], {"box": box}])
    except (ModuleNotFoundError, UserError):
        return []
    return examples


def build(model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, name: str) -> gr.Blocks:
    """Build the page. `GRADIO_TEMP_DIR` must name a folder.

    Args:
        model: on any device.
        processor: the one saved with the model.
        name: of the model: folder or owner/name.
    """
    with gr.Blocks(
        title="Probabilistic SAM", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)
    ) as page:
        gr.Markdown(
            "# Probabilistic SAM\nMark a lesion and sample masks: each is a plausible annotation by one more reader. "
            f"Model: {Path(name).name}. For research only, not a medical device. No data leaves this computer."
        )
        with gr.Tab("Slice"):
            add_slice_tab(model, processor, name)
        with gr.Tab("Scan", elem_id="scan-tab"):
            try:
                from .app_scan import add_scan_tab
            except ModuleNotFoundError as error:
                gr.Markdown(
                    f"Scans need {error.name}, which is not installed: `pip install 'probabilistic-sam[scan]'`, then "
                    "start the page again."
                )
            else:
                add_scan_tab(model, processor, name)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def add_slice_tab(model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, name: str) -> None:
    """Add the elements for one slice to the page; arguments as in `build`."""

    def sample_masks(*values: Any) -> list[Any]:
        try:
            return sample(model, processor, name, *values)
        except UserError as error:
            raise gr.Error(str(error), title="No masks sampled", duration=None, print_exception=False) from error

    examples = write_examples(Path(os.environ["GRADIO_TEMP_DIR"]))
    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            file = gr.File(
                label=f"Slice ({', '.join(IMAGE_FORMATS)}, DICOM or NIfTI; one slice per file)",
                height=160,
                elem_id="slice",
            )
            offered = gr.Column(visible=bool(examples))
            canvas = prompt_canvas(
                "canvas", "No slice yet: drop a file above.",
                "Drag a box around the lesion, or click points inside it.",
            )  # fmt: skip
            clear = gr.Button("Clear prompt", size="sm", elem_id="clear")
            number = gr.Slider(1, MAX_SAMPLES, 16, step=1, label="Number of samples", elem_id="number")
            with gr.Row():
                seed = gr.Number(
                    0, label="Seed", info="same seed, same samples", precision=0, minimum=0, elem_id="seed"
                )
                side = gr.Number(None, label="Pixel spacing (mm)", info="0: unknown, areas in px", elem_id="spacing")
            start = gr.Button("Sample masks", variant="primary", elem_id="sample")
        with gr.Column(scale=8, min_width=560):
            line = gr.Markdown(START, elem_id="line")
            results = gr.Column(visible=False, elem_id="results")
        with results:
            plain: dict[str, Any] = {"format": "png", "show_label": False, "container": False, "buttons": []}
            maps = gr.Image(elem_id="maps", interactive=False, **plain)
            areas = gr.Image(elem_id="areas", interactive=False, **plain)
            gallery = gr.Gallery(elem_id="gallery", interactive=False, columns=6, object_fit="contain", **plain)
            archive = gr.DownloadButton("Download masks, maps and areas (zip)", elem_id="download")
    shown: list[Any] = [canvas, side, line, results]
    inputs, outputs = [file, canvas, number, seed, side], [line, results, maps, areas, gallery, archive]
    with offered:
        if examples:
            example = gr.JSON(visible=False)  # its prompt
            offer = gr.Examples(
                examples, [file, side, example], cache_examples=False,
                label="Or open an example: simulated CT (phantom) of a real nodule", elem_id="examples",
                example_labels=[Path(path).stem.replace("-", " ") for path, *_ in examples],
            )  # fmt: skip
            opened = offer.load_input_event.then(show, [file, side, example], shown, api_visibility="private")
            opened.then(sample_masks, inputs, outputs, show_progress_on=line, api_visibility="private")
    gr.on([file.upload, file.clear], show, file, shown, api_visibility="private")
    clear.click(lambda: {}, None, canvas, api_visibility="private")
    start.click(sample_masks, inputs, outputs, show_progress_on=line, api_visibility="private")


def serve(model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, name: str, port: int) -> None:
    """Serve the page at http://127.0.0.1:`port` until interrupted or terminated.

    Raises:
        UserError: the port is taken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is deleted
    with tempfile.TemporaryDirectory(prefix="probabilistic-sam-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(model, processor, name)
        try:
            page.launch(
                server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                max_file_size=MAX_UPLOAD, css=STYLE, footer_links=[], enable_monitoring=False, pwa=False,
                theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"port {port} cannot be opened; accepted: --port with a free port") from error
        print(f"open http://{HOST}:{port} in a browser; stop with Ctrl-C", flush=True)
        page.block_thread()
