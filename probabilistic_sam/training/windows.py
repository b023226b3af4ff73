"""One window of one row: its place and augmentation (the view), and pixels, readers' masks and prompt in it.

A window is the square that is cut around a prompt, in pixels of the image: x and y of its upper left corner, and its
side. The model sees it at `image_size` x `image_size` pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data import make_prompt
from ..processing_probabilistic_sam import ProbabilisticSamProcessor, cut, cut_masks

SYMMETRIES = ("dihedral", "flips", "none")
# Arguments of `random_view` that earlier versions did not have, with the values that give their views
ADDED_AUGMENTATION = {"symmetries": "dihedral", "rotation": 0.0, "noise": 0.0, "contrast": 0.0}


@dataclass(frozen=True)
class View:
    """An augmented view of a row: image and masks are turned, mirrored, rotated and cut; then grey values change.

    Args:
        turns: quarter turns, anticlockwise.
        mirror: reverse the columns after turning.
        window: (x, y, side) in the turned image.
        gamma: exponent of the grey values, scaled to 0..1; 1 leaves them as they are.
        rotation: in degrees, anticlockwise, after mirroring.
        contrast: gain around the mean of the window; 1 leaves it as it is.
        noise: standard deviation of Gaussian noise, as a share of the window's grey range.
        noise_seed: of the noise.
    """

    turns: int
    mirror: bool
    window: tuple[int, int, int]
    gamma: float
    rotation: float = 0.0
    contrast: float = 1.0
    noise: float = 0.0
    noise_seed: int = 0

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Turn, mirror and rotate the last two axes."""
        array = np.rot90(array, self.turns, axes=(-2, -1))
        array = np.ascontiguousarray(array[..., ::-1] if self.mirror else array)
        return rotate(array, self.rotation) if self.rotation else array


def plain_view(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> View:
    """The view without augmentation: what the processor cuts around the tight box of all masks (R, H, W)."""
    return View(0, False, prompt_window(masks, processor), 1.0)


def random_view(
    masks: np.ndarray, processor: ProbabilisticSamProcessor, rng: np.random.Generator, **augmentation: Any
) -> View:
    """The view of `turn_randomly`, whose arguments it takes."""
    return turn_randomly(masks, processor, rng, **augmentation)[0]


def turn_randomly(
    masks: np.ndarray,
    processor: ProbabilisticSamProcessor,
    rng: np.random.Generator,
    max_shift: float,
    max_zoom: float,
    max_gamma: float,
    symmetries: str = "dihedral",
    rotation: float = 0.0,
    noise: float = 0.0,
    contrast: float = 0.0,
) -> tuple[View, np.ndarray]:
    """A random view, and the masks turned as in it. What is 0 takes no random number.

    Args:
        masks: (R, H, W), at least one of them not empty.
        processor: cuts the window that is shifted and zoomed.
        rng: source of the parameters of the view.
        max_shift: largest shift in x and in y, in pixels of the image.
        max_zoom: largest absolute logarithm of the zoom.
        max_gamma: largest absolute logarithm of gamma.
        symmetries: `dihedral` (quarter turns and mirroring, 8 in total), `flips` (mirroring of both axes, 4 in
            total) or `none`.
        rotation: largest absolute angle of a further rotation, in degrees.
        noise: standard deviation of Gaussian noise, as a share of the window's grey range.
        contrast: largest absolute logarithm of the gain around the window's mean.
    """
    turns, mirror = 0, False
    if symmetries != "none":
        turns = int(rng.integers(4)) if symmetries == "dihedral" else 2 * int(rng.integers(2))
        mirror = bool(rng.integers(2))
    view = View(turns, mirror, (0, 0, 0), math.exp(rng.uniform(-max_gamma, max_gamma)), noise=noise)
    if rotation:
        view = replace(view, rotation=rng.uniform(-rotation, rotation))
    turned = view.turn(masks)
    x, y, side = prompt_window(turned, processor)
    new_side = max(2, round(side * math.exp(rng.uniform(-max_zoom, max_zoom))))
    corner = (side - new_side) / 2
    x, y = (round(value + corner + rng.uniform(-max_shift, max_shift)) for value in (x, y))
    height, width = turned.shape[-2:]
    x, y = min(max(x, 1 - new_side), width - 1), min(max(y, 1 - new_side), height - 1)  # at least one pixel is inside
    view = replace(view, window=(x, y, new_side))
    if contrast:
        view = replace(view, contrast=math.exp(rng.uniform(-contrast, contrast)))
    return (replace(view, noise_seed=int(rng.integers(2**32))) if noise else view), turned


def effective_augmentation(augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Augmentation without the fields of `ADDED_AUGMENTATION` that have no effect.

    Caches and checkpoints are compared in this form, so that those of earlier versions stay valid.
    """
    return {name: value for name, value in augmentation.items() if ADDED_AUGMENTATION.get(name) != value}


def rotate(array: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate the last two axes anticlockwise around the centre, on a canvas that holds the whole array.

    Values are interpolated bilinearly, and the new corners get the smallest value. Boolean masks stay boolean: a
    pixel belongs to a mask if its interpolated value is at least 1/2. A mask of so few pixels that no value reaches
    1/2 keeps the pixel with its largest value.
    """
    height, width = array.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    canvas = [math.ceil(abs(a * cos) + abs(b * sin) - 1e-6) for a, b in ((height, width), (width, height))]
    y, x = (torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in canvas)  # from the centre, y down
    y, x = y[:, None], x[None]
    grid = torch.stack([(x * cos - y * sin) * 2 / width, (x * sin + y * cos) * 2 / height], dim=-1)[None]
    values = torch.from_numpy(array.astype(np.float32))
    lowest = 0.0 if array.dtype == bool else float(values.min())
    planes = (values - lowest).reshape(1, -1, height, width)
    rotated = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + lowest
    rotated = rotated.reshape(*array.shape[:-2], *canvas)
    if array.dtype == bool:
        peak = rotated.amax(dim=(-2, -1), keepdim=True)
        rotated = (rotated > 0) & (rotated >= peak.clamp(max=0.5))
    return rotated.numpy()


def prompt_window(masks: np.ndarray, processor: ProbabilisticSamProcessor) -> tuple[int, int, int]:
    """The processor's window (x, y, side) for the tight box of the union of masks (R, H, W)."""
    rows, columns = np.nonzero(masks.any(axis=0))
    box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)
    height, width = masks.shape[-2:]
    return processor.window(height, width, {"input_boxes": [box]})


def view_pixel_values(image: np.ndarray, view: View, processor: ProbabilisticSamProcessor) -> torch.Tensor:
    """The model's input (3, S, S) for a view of an image (H, W) or (H, W, 3)."""
    return processor.normalize(processor.resize(view_window(image, view, processor)))


def view_window(image: np.ndarray, view: View, processor: ProbabilisticSamProcessor) -> torch.Tensor:
    """The window of a view of an image (H, W) or (H, W, 3), before resizing: grey values 0..255 (1 or 3, side, side).

    Colours change together: gamma and contrast have one scale for the whole image, and noise is grey.
    """
    planes, (x, y, side) = view.turn(image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)), view.window
    low, high = float(planes.min()), float(planes.max())
    if not view.noise:  # whose random numbers are those of the whole image
        planes = planes[:, max(y, 0) : y + side, max(x, 0) : x + side]
        x, y = min(x, 0), min(y, 0)
    planes = planes.astype(np.float32)
    if view.gamma != 1.0 and high > low:
        planes = ((planes - low) / (high - low)) ** view.gamma
    if view.noise:
        planes = add_noise(planes, view, processor)
    grey = processor.stretch(torch.from_numpy(planes), (x, y, side))
    if view.contrast != 1.0:  # after the stretch, which would undo it
        grey = (grey.mean() + view.contrast * (grey - grey.mean())).clamp(0, 255)
    return grey


def add_noise(planes: np.ndarray, view: View, processor: ProbabilisticSamProcessor) -> np.ndarray:
    """Add the noise of a view to an image (1 or 3, H, W), the same to all colours.

    The grey range of the window is the one between the percentiles that the processor makes black and white.
    """
    x, y, side = view.window
    low, high = np.percentile(planes[:, max(y, 0) : y + side, max(x, 0) : x + side], processor.stretch_percentiles)
    noise = np.random.default_rng(view.noise_seed).standard_normal(planes.shape[-2:], dtype=np.float32)
    return planes + np.float32(view.noise * (high - low)) * noise


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
