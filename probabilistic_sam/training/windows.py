"""One window of one slice with its readers."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..data import make_prompt
from ..processing_probabilistic_sam import ProbabilisticSamProcessor, cut, cut_masks, to_grey_or_rgb


@dataclass(frozen=True)
class View:
    """One way to look at a slice: first turn (quarter turns) and mirror, then the window (x, y, side) and contrast."""

    turns: int
    mirror: bool
    window: tuple[int, int, int]
    gamma: float

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Turn and mirror the last two axes."""
        array = np.rot90(array, self.turns, axes=(-2, -1))
        return np.ascontiguousarray(array[..., ::-1] if self.mirror else array)


def plain_view(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> View:
    """What the processor itself would cut around the tight box of all readers' masks (R, H, W)."""
    return View(0, False, prompt_window(masks, processor), 1.0)


def random_view(
    masks: np.ndarray,
    processor: ProbabilisticSamProcessor,
    rng: np.random.Generator,
    max_shift: float,
    max_zoom: float,
    max_gamma: float,
) -> View:
    """Any of the 8 symmetries, shifted by up to `max_shift` px, zoomed and gamma-corrected by up to exp(max)."""
    view = View(int(rng.integers(4)), bool(rng.integers(2)), (0, 0, 0), math.exp(rng.uniform(-max_gamma, max_gamma)))
    x, y, side = prompt_window(view.turn(masks), processor)
    new_side = max(2, round(side * math.exp(rng.uniform(-max_zoom, max_zoom))))
    corner = (side - new_side) / 2
    x, y = (round(value + corner + rng.uniform(-max_shift, max_shift)) for value in (x, y))
    return View(view.turns, view.mirror, (x, y, new_side), view.gamma)


def prompt_window(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> tuple[int, int, int]:
    """The processor's window for the tight box of the union of masks (R, H, W)."""
    rows, columns = np.nonzero(masks.any(axis=0))
    box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)
    height, width = masks.shape[-2:]
    return processor.window(height, width, {"input_boxes": [box]})


def view_pixel_values(image: np.ndarray, view: View, processor: ProbabilisticSamProcessor) -> torch.Tensor:
    """(3, S, S) of a view of an image (H, W)."""
    image = view.turn(image).astype(np.float32)
    low, high = float(image.min()), float(image.max())
    if view.gamma != 1.0 and high > low:
        image = ((image - low) / (high - low)) ** view.gamma
    return processor.pixel_values(to_grey_or_rgb(image), view.window)


def view_annotated(masks: np.ndarray, view: View) -> torch.Tensor:
    """Which readers' masks (R, H, W) have a pixel in a view, (R,) boolean.

    Decided before resizing, in which a mask of one or two pixels may vanish.
    """
    window = cut(torch.from_numpy(view.turn(masks)).float(), view.window, fill=0.0)
    return window.flatten(1).any(dim=1)


def view_masks(masks: np.ndarray, view: View, size: int) -> torch.Tensor:
    """Readers' masks (R, H, W) in a view, (R, size, size) boolean."""
    return cut_masks(torch.from_numpy(view.turn(masks)).float(), view.window, size)


def view_prompt(masks: np.ndarray, view: View, name: str, rng: np.random.Generator, image_size: int) -> dict:
    """A prompt of protocol `name` in the model's coordinates of a view: `input_boxes` (4,) or `input_points` (2,)."""
    prompt = make_prompt(view.turn(masks), name, rng)
    x, y, side = view.window
    key = "input_boxes" if "input_boxes" in prompt else "input_points"
    values = np.asarray(prompt[key], dtype=np.float32).reshape(-1, 2) - (x, y)
    return {key: torch.from_numpy((values * (image_size / side)).astype(np.float32).ravel())}
