"""Prompts simulated from the union of all readers' masks (`reader_box`: from the mask that is scored).

Coordinates are (x, y), i.e. column before row, in pixels of the image, measured at pixel *edges*: the pixel in row 0
and column 0 covers 0..1 in both directions and its centre is (0.5, 0.5).
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

PROMPTS = ("union_box", "center_box", "center_point", "reader_box")
NODULE_BOX = "nodule_box"  # of all slices of a nodule: `nodule_prompt`

CENTER_BOX_SIDE = 32.0  # px
CENTER_BOX_SHIFT = 4.0  # px
CENTER_POINT_SHIFT = 3.0  # px
UNION_BOX_RELATIVE_SHIFT = 0.1  # fraction of the side
UNION_BOX_SHIFT = 1.5  # px


def row_seed(row: Mapping[str, Any], prompt: str) -> int:
    """Seed of a row's prompt, the same in every process, so that every model gets the same prompt.

    It is the first eight bytes of the SHA-256 of the prompt's name and the row's identity (`scan_id`, `nodule_id`,
    `slice_index`, `patient_id`, `source`, and `image_id` unless it is null).
    """
    identity = [prompt, *(row[key] for key in ("scan_id", "nodule_id", "slice_index", "patient_id", "source"))]
    if row.get("image_id") is not None:
        identity.append(row["image_id"])
    digest = hashlib.sha256("|".join(str(part) for part in identity).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def row_prompt(
    row: Mapping[str, Any], masks: np.ndarray, prompt: str, reader: int | None = None
) -> dict[str, list[float] | int]:
    """The prompt of a row wherever results are compared: `make_prompt`, seeded by `row_seed`.

    Args:
        row: with the columns that `row_seed` reads.
        masks: the row's decoded masks (R, H, W).
        prompt: one of `PROMPTS`.
        reader: index of the scored reader, for `reader_box` only.
    """
    return make_prompt(masks, prompt, np.random.default_rng(row_seed(row, prompt)), reader)


def nodule_prompt(first_row: Mapping[str, Any], union: np.ndarray) -> dict[str, list[float] | int]:
    """The prompt `nodule_box` of all slices of a nodule, which is what a person gives as one box in 3D.

    It is the `union_box` of the readers' masks on all slices, seeded by `row_seed` of the first slice with the prompt
    name `nodule_box`.

    Args:
        first_row: row of the nodule's first slice in order of z, with the columns that `row_seed` reads.
        union: boolean (H, W), the union of the masks of all readers on all slices, in the crop that they share.
    """
    return make_prompt(union[None], "union_box", np.random.default_rng(row_seed(first_row, NODULE_BOX)))


def make_prompt(
    masks: np.ndarray, prompt: str, rng: np.random.Generator, reader: int | None = None
) -> dict[str, list[float] | int]:
    """Sample one prompt from the readers' masks.

    - `union_box`: tight box of the union. Each side moves by `u1 * 0.1 * side + u2 * 1.5` px with independent u1 and
      u2, uniform in (-1, 1); `side` is the width of the box for the left and right side and its height for the others.
      The box remains at least 1 px wide and high.
    - `center_box`: 32 px square centred on the union's centroid, shifted by up to 4 px in x and y.
    - `center_point`: one positive point, the union's centroid shifted by up to 3 px in x and y.
    - `reader_box`: tight box of the mask of `reader`, or `center_box` if that mask is empty. It leaks the answer.

    Boxes and points are clipped to the image.

    Args:
        masks: boolean masks (R, H, W) of the readers, at least one not empty.
        prompt: one of `PROMPTS`.
        rng: source of the jitter; `row_prompt` has the one of evaluation.
        reader: index of the scored reader, for `reader_box` only.

    Returns:
        `{"input_boxes": [x1, y1, x2, y2]}` or `{"input_points": [x, y], "input_labels": 1}`, in pixels.

    Raises:
        ValueError: unknown prompt, masks of another shape, all masks empty, or `reader` missing or out of range.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt is {prompt!r}; accepted: {', '.join(PROMPTS)}")
    masks = np.asarray(masks, dtype=bool)
    if masks.ndim != 3:
        raise ValueError(f"masks have shape {masks.shape}; accepted: (readers, height, width)")
    union = np.asarray(masks.any(axis=0))
    if not union.any():
        raise ValueError("all masks are empty; a prompt needs at least one mask that is not empty")
    height, width = union.shape

    if prompt == "reader_box":
        if reader is None or not 0 <= reader < len(masks):
            raise ValueError(f"reader is {reader!r}; reader_box accepts 0..{len(masks) - 1}")
        if masks[reader].any():
            return {"input_boxes": [float(side) for side in _tight_box(masks[reader])]}
        prompt = "center_box"

    if prompt == "union_box":
        x1, y1, x2, y2 = _tight_box(union)
        lengths = np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1], dtype=float)
        u1, u2 = rng.uniform(-1.0, 1.0, size=(2, 4))
        box = np.array([x1, y1, x2, y2]) + u1 * UNION_BOX_RELATIVE_SHIFT * lengths + u2 * UNION_BOX_SHIFT
        return {"input_boxes": _clip_box(box, height, width)}

    counts = union.sum(axis=0), union.sum(axis=1)  # of pixels in each column and row
    center = np.array([count @ np.arange(len(count)) / count.sum() for count in counts]) + 0.5  # (x, y)
    if prompt == "center_box":
        center = center + rng.uniform(-CENTER_BOX_SHIFT, CENTER_BOX_SHIFT, size=2)
        box = np.concatenate([center - CENTER_BOX_SIDE / 2, center + CENTER_BOX_SIDE / 2])
        return {"input_boxes": _clip_box(box, height, width)}

    point = center + rng.uniform(-CENTER_POINT_SHIFT, CENTER_POINT_SHIFT, size=2)
    point = np.clip(point, 0.5, [width - 0.5, height - 0.5])
    return {"input_points": [float(coordinate) for coordinate in point], "input_labels": 1}


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _clip_box(box: np.ndarray, height: int, width: int) -> list[float]:
    """Clip a box to the image; a box thinner than 1 px (or inverted) is widened to 1 px around its middle."""
    limits = np.array([width, height], dtype=float)
    low, high = np.clip(box[:2], 0.0, limits), np.clip(box[2:], 0.0, limits)
    middle = np.clip((low + high) / 2, 0.5, limits - 0.5)
    thin = high - low < 1.0
    low, high = np.where(thin, middle - 0.5, low), np.where(thin, middle + 0.5, high)
    return [float(side) for side in (*low, *high)]
