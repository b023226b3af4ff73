"""What the tabs of the page share: a slice to mark in the browser, checks of what the browser sends, zip files."""

import base64
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .errors import UserError
from .inference import MAX_POINTS, check_prompt

MAX_SAMPLES = 64  # the gallery shows each of them
MAX_SHOWN_SIDE = 1024  # pixels of the picture in the browser; prompts and masks use the pixels of the slice
SHOWN_PERCENTILES = (0.5, 99.5)  # shown as black and white

# The slice with the prompt on top. `value` is the prompt, {"box": [x1, y1, x2, y2]} or {"points": [[x, y], ...]} in
# pixels of the slice, or {"corner": [x, y]} after the first of two clicks; Python sets the other properties. Each
# rendering replaces the children of `element` but not `element` itself. So the listeners belong to `element`, and the
# script updates the box while it is dragged.
CANVAS = """
<div class="stage" style="display: ${src ? "block" : "none"}">
  <img src="${src}" alt="the slice" draggable="false" style="aspect-ratio: ${ratio || width / height}">
  <svg viewBox="0 0 ${width} ${height}" preserveAspectRatio="none">
    ${value && value.box ? `<rect x="${value.box[0]}" y="${value.box[1]}" width="${value.box[2] - value.box[0]}"
      height="${value.box[3] - value.box[1]}"/>` : ""}
    ${((value && (value.points || value.corner && [value.corner])) || []).map(([x, y]) =>
      `<path d="M${x - width / 50} ${y}h${width / 25}M${x} ${y - width / 50}v${width / 25}"/>`).join("")}
  </svg>
</div>
<p class="words">${!src ? nothing : value && value.box ?
  `Box ${value.box.join(", ")}: ${value.box[2] - value.box[0]} x ${value.box[3] - value.box[1]} px` :
  value && value.points ? `${value.points.length} point${value.points.length > 1 ? "s" : ""} inside: ` +
  value.points.map(p => p.join(", ")).join("; ") :
  value && value.corner ? `Corner ${value.corner.join(", ")}: click the opposite corner` :
  `${asked} ${width} x ${height} px`}</p>
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
  const corner = props.value && props.value.corner;
  if (dragged(event)) {
    props.value = x1 < x2 && y1 < y2 ? {box: [x1, y1, x2, y2]} : {};
  } else if (props.box_only && corner) {
    const [x3, y3, x4, y4] = box(corner, start.at);
    props.value = x3 < x4 && y3 < y4 ? {box: [x3, y3, x4, y4]} : {};
  } else if (props.box_only) {
    props.value = {corner: start.at.map(Math.round)};
  } else {
    const points = (props.value && props.value.points) || [];
    props.value = {points: [...points, start.at.map(v => Math.round(v * 10) / 10)].slice(-MAX_POINTS)};
  }
  start = null;
  trigger("input");
});
element.addEventListener("pointercancel", () => { start = null; });
""".replace("MAX_POINTS", str(MAX_POINTS))


def prompt_canvas(elem_id: str, nothing: str, asked: str, box_only: bool = False) -> gr.HTML:
    """A slice to mark.

    Args:
        elem_id: of the element.
        nothing: words while there is no slice.
        asked: words while there is no prompt.
        box_only: two clicks are opposite corners of a box, instead of points.
    """
    return gr.HTML(
        value={}, html_template=CANVAS, css_template=CANVAS_STYLE, js_on_load=CANVAS_SCRIPT, src="", width=1, height=1,
        ratio=0, nothing=nothing, asked=asked, box_only=box_only, elem_id=elem_id, elem_classes="canvas",
    )  # fmt: skip


def picture(image: np.ndarray, limits: tuple[float, float] | None = None) -> str:
    """Return a data URL of an image, at most 1024 pixels per side.

    Args:
        image: grey (H, W) is stretched, RGB (H, W, 3) is not.
        limits: grey values shown as black and white; by default percentiles of the image.
    """
    if image.ndim == 2:
        low, high = limits or np.percentile(image, SHOWN_PERCENTILES)
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


def check_numbers(num_samples: Any, seed: Any) -> None:
    """Raise `UserError` for a number of samples or a seed that is not accepted."""
    if not (is_whole(num_samples) and 1 <= num_samples <= MAX_SAMPLES):
        raise UserError(f"{num_samples} samples; accepted: a whole number from 1 to {MAX_SAMPLES}")
    if not (is_whole(seed) and 0 <= seed < 2**53):  # JavaScript represents larger whole numbers inexactly
        raise UserError(f"the seed is {seed}; accepted: a whole number from 0 to 2^53 - 1")


def is_whole(value: Any) -> bool:
    """Whether a value of the browser is a whole number."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)


def zip_of(write: Callable[[Path], Any], name: str) -> tuple[str, Any]:
    """Write files into a folder and pack them into a zip in the temporary folder of the page.

    Args:
        write: writes into a new folder.
        name: of the zip without its ending.

    Returns:
        Path of the zip, and what `write` returned.
    """
    parent = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"], prefix="result-"))
    folder = parent / "files"
    folder.mkdir()
    returned = write(folder)
    archive = shutil.make_archive(str(parent / name), "zip", folder)
    shutil.rmtree(folder)
    return archive, returned
