"""One window of one row: its place and augmentation (the view), and pixels, readers' masks and prompt in it.

A window is the square that is cut around a prompt, in pixels of the image: x and y of its upper left corner, and its
side. The model sees it at `image_size` x `image_size` pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data import make_prompt
from ..processing_probabilistic_sam import ProbabilisticSamProcessor, cut, cut_masks, to_grey_or_rgb


@dataclass(frozen=True)
class View:
    """An augmented view of a row: the image is turned and mirrored, then cut, then its contrast changes.

    Args:
        turns: quarter turns, anticlockwise.
        mirror: reverse the columns after turning.
        window: (x, y, side) in the turned image.
        gamma: exponent of the grey values, scaled to 0..1; 1 leaves them as they are.
    """

    turns: int
    mirror: bool
    window: tuple[int, int, int]
    gamma: float

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Turn and mirror the last two axes."""
        array = np.rot90(array, self.turns, axes=(-2, -1))
        return np.ascontiguousarray(array[..., ::-1] if self.mirror else array)


def plain_view(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> View:
    """The view without augmentation: what the processor cuts around the tight box of all masks (R, H, W)."""
    return View(0, False, prompt_window(masks, processor), 1.0)


def random_view(
    masks: np.ndarray,
    processor: ProbabilisticSamProcessor,
    rng: np.random.Generator,
    max_shift: float,
    max_zoom: float,
    max_gamma: float,
) -> View:
    """A random view: one of the 8 symmetries, with shift, zoom and gamma.

    Args:
        masks: (R, H, W), at least one of them not empty.
        processor: cuts the window that is shifted and zoomed.
        rng: source of all five parameters.
        max_shift: largest shift in x and in y, in pixels of the image.
        max_zoom: largest absolute logarithm of the zoom.
        max_gamma: largest absolute logarithm of gamma.
    """
    view = View(int(rng.integers(4)), bool(rng.integers(2)), (0, 0, 0), math.exp(rng.uniform(-max_gamma, max_gamma)))
    x, y, side = prompt_window(view.turn(masks), processor)
    new_side = max(2, round(side * math.exp(rng.uniform(-max_zoom, max_zoom))))
    corner = (side - new_side) / 2
    x, y = (round(value + corner + rng.uniform(-max_shift, max_shift)) for value in (x, y))
    return View(view.turns, view.mirror, (x, y, new_side), view.gamma)


def prompt_window(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> tuple[int, int, int]:
    """The processor's window (x, y, side) for the tight box of the union of masks (R, H, W)."""
    rows, columns = np.nonzero(masks.any(axis=0))
    box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)
    height, width = masks.shape[-2:]
    return processor.window(height, width, {"input_boxes": [box]})


def view_pixel_values(image: np.ndarray, view: View, processor: ProbabilisticSamProcessor) -> torch.Tensor:
    """The model's input (3, S, S) for a view of an image (H, W)."""
    image = view.turn(image).astype(np.float32)
    low, high = float(image.min()), float(image.max())
    if view.gamma != 1.0 and high > low:
        image = ((image - low) / (high - low)) ** view.gamma
    return processor.pixel_values(to_grey_or_rgb(image), view.window)


def view_readers(masks: np.ndarray, view: View, size: int) -> dict[str, torch.Tensor]:
    """The readers of a view, as the model takes them.

    Args:
        masks: (R, H, W) boolean, of the image.
        view: of the image.
        size: side of the masks that the model predicts, in pixels.

    Returns:
        `labels` (R, size, size) boolean, and `annotated` (R,) boolean: which masks have a pixel in the window.
        `annotated` is decided before resizing, in which a mask of one or two pixels may vanish.
    """
    turned = torch.from_numpy(view.turn(masks)).float()
    annotated = cut(turned, view.window, fill=0.0).flatten(1).any(dim=1)
    return {"labels": cut_masks(turned, view.window, size), "annotated": annotated}


def view_prompt(masks: np.ndarray, view: View, name: str, rng: np.random.Generator, image_size: int) -> dict:
    """A random prompt of protocol `name` for a view, in the model's coordinates; see `place_prompt`."""
    return place_prompt(make_prompt(view.turn(masks), name, rng), view.window, image_size)


def place_prompt(prompt: Mapping[str, Any], window: tuple[int, int, int], image_size: int) -> dict[str, torch.Tensor]:
    """A prompt of `make_prompt` in the model's coordinates: `input_boxes` (4,) or `input_points` (2,).

    Args:
        prompt: in pixels of the image.
        window: (x, y, side) in pixels of the image.
        image_size: side of the model's input, in pixels.
    """
    x, y, side = window
    key = "input_boxes" if "input_boxes" in prompt else "input_points"
    values = np.asarray(prompt[key], dtype=np.float32).reshape(-1, 2) - (x, y)
    return {key: torch.from_numpy((values * (image_size / side)).astype(np.float32).ravel())}
