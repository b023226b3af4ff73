"""Image and prompt to model input, and logits back to masks, mean, uncertainty and area at the image's own size.

A model trained on zoomed crops must see every image at the same zoom. So the processor cuts a square window around each
prompt (`crop_size` image pixels, more when the prompt is larger), stretches its grey values, resizes it to the model's
`image_size`, and pastes the results back.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of 0..255, as SAM was trained
IMAGENET_STD = (58.395, 57.12, 57.375)
PROMPT_SHARE = 0.75  # largest share of the window's side that a prompt may take
OUTSIDE_LOGIT = -30.0  # pixels outside of the window
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class ProbabilisticSamProcessor(ProcessorMixin):
    r"""
    Prepares images and prompts for `ProbabilisticSamModel` and turns its logits into masks.

    Args:
        image_size (`int`): side of the model's input in pixels.
        crop_size (`int`, *optional*): side of the window around a prompt in image pixels; `None` takes the whole image,
            with all its prompts in one window.
        stretch_percentiles (`tuple[float, float]`): grey values of the window at these percentiles become black and white.
    """

    def __init__(self, image_size: int = 256, crop_size: int | None = 64, stretch_percentiles=(0.5, 99.5), **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.crop_size = crop_size
        self.stretch_percentiles = tuple(stretch_percentiles)

    # ------------------------------------------------------------------------------------------------------ forward

    def __call__(
        self,
        images: Any,
        input_boxes: Sequence | None = None,
        input_points: Sequence | None = None,
        input_labels: Sequence | None = None,
        input_masks: Sequence | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Cut a window for each prompt.

        Args:
            images: one or a list of grey `(H, W)` or RGB `(H, W, 3)` arrays, tensors or PIL images of any value range.
            input_boxes: `[image][prompt][x1, y1, x2, y2]` in image pixels, measured at the pixels' edges.
            input_points: `[image][prompt][point][x, y]` in image pixels.
            input_labels: `[image][prompt][point]`: 1 inside, 0 outside; all inside when left out.
            input_masks: `[image][prompt]` boolean arrays `(H, W)`: a rough mask as prompt.
            return_tensors: only `"pt"`.

        Returns:
            `BatchFeature` with one item a window (W windows; with `crop_size` each has one prompt, P = 1):
            `pixel_values (W, 3, S, S)`, `input_boxes (W, P, 4)`, `input_points (W, P, K, 2)`, `input_labels (W, P, K)`,
            `input_masks (W, 1, S / 4, S / 4)` in the model's coordinates, as far as given; `windows (W, 3)` with x, y of
            the upper left corner and side in image pixels; `original_sizes (W, 2)` height and width.

        Raises:
            ValueError: no prompt, a prompt outside of its image, or numbers of prompts that do not fit.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        images = [to_grey_or_rgb(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        given = {"input_boxes": input_boxes, "input_points": input_points, "input_masks": input_masks}
        given = {name: prompts for name, prompts in given.items() if prompts is not None}
        if not given:
            raise ValueError("a prompt must be given: input_boxes, input_points or input_masks")
        for name, prompts in given.items():
            if len(prompts) != len(images):
                raise ValueError(f"{name} are for {len(prompts)} images, but there are {len(images)}")
        features: dict[str, list] = {}
        for index, image in enumerate(images):
            prompts = {name: [as_float(item) for item in values[index]] for name, values in given.items()}
            if "input_points" in prompts:
                prompts["input_labels"] = (
                    [torch.ones(len(points)) for points in prompts["input_points"]]
                    if input_labels is None
                    else [as_float(item) for item in input_labels[index]]
                )
            if len({len(values) for values in prompts.values()}) != 1:
                counts = {name: len(values) for name, values in prompts.items()}
                raise ValueError(f"image {index} has different numbers of prompts: {counts}")
            count = len(next(iter(prompts.values())))
            groups = [range(count)] if self.crop_size is None else [range(i, i + 1) for i in range(count)]
            for group in groups:
                chosen = {name: [values[i] for i in group] for name, values in prompts.items()}
                for name, value in self.window_features(image, chosen).items():
                    features.setdefault(name, []).append(value)
        if len({value.shape for value in features.get("input_boxes", features.get("input_points", []))}) > 1:
            raise ValueError("every window of a batch must have as many prompts and points")
        return BatchFeature({name: torch.stack(values) for name, values in features.items()})

    def window_features(self, image: torch.Tensor, prompts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Features of one window of `image` (C, H, W) that holds `prompts`."""
        height, width = image.shape[-2:]
        x, y, side = self.window(height, width, prompts)
        scale = self.image_size / side
        corner = torch.tensor([x, y], dtype=torch.float32)
        features = {
            "pixel_values": self.pixel_values(image, (x, y, side)),
            "windows": torch.tensor([x, y, side]),
            "original_sizes": torch.tensor([height, width]),
        }
        if "input_boxes" in prompts:
            features["input_boxes"] = (torch.stack(prompts["input_boxes"]) - corner.repeat(2)) * scale
        if "input_points" in prompts:
            features["input_points"] = (torch.stack(prompts["input_points"]) - corner) * scale
            features["input_labels"] = torch.stack(prompts["input_labels"]).long()
        if "input_masks" in prompts:
            if len(prompts["input_masks"]) > 1:
                raise ValueError("a window takes one mask prompt: give a crop_size, or one mask an image")
            mask = cut((prompts["input_masks"][0] > 0).float()[None], (x, y, side), fill=0.0)[None]
            mask = F.interpolate(mask, size=(self.image_size // 4,) * 2, mode="bilinear", antialias=True)[0]
            features["input_masks"] = (mask * 2 - 1) * 10.0  # a confident mask in SAM's logits
        return features

    def window(self, height: int, width: int, prompts: dict[str, list[torch.Tensor]]) -> tuple[int, int, int]:
        """Upper left corner (x, y) and side, in image pixels, of the window for prompts of one image (H, W)."""
        corners = []
        for box in prompts.get("input_boxes", []):
            if box.shape != (4,) or not torch.isfinite(box).all():
                raise ValueError(f"a box must be four finite numbers x1, y1, x2, y2, got {box.tolist()}")
            if box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(f"box {box.tolist()} has no area: x2 must exceed x1 and y2 must exceed y1")
            corners += [box[:2], box[2:]]
        for points, labels in zip(prompts.get("input_points", []), prompts.get("input_labels", []), strict=True):
            if points.ndim != 2 or points.shape[-1] != 2 or not torch.isfinite(points).all():
                raise ValueError(f"points must be finite pairs x, y, got {points.tolist()}")
            corners += list(points[labels == 1] if (labels == 1).any() else points)
        for mask in prompts.get("input_masks", []):
            if mask.shape != (height, width):
                raise ValueError(f"a mask prompt must have the image's size {(height, width)}, got {tuple(mask.shape)}")
            where = torch.nonzero(mask > 0)
            if not len(where):
                raise ValueError("a mask prompt must not be empty")
            corners += [where.amin(dim=0).flip(0).float(), where.amax(dim=0).flip(0).float() + 1]
        low, high = torch.stack(corners).amin(dim=0), torch.stack(corners).amax(dim=0)
        if (low < 0).any() or high[0] > width or high[1] > height:
            raise ValueError(
                f"prompt from {low.tolist()} to {high.tolist()} (x, y) lies outside of the image of {width} x {height} pixels"
            )
        if self.crop_size is None:
            side = max(height, width)
            return 0, 0, side
        side = max(self.crop_size, int(np.ceil(float((high - low).max()) / PROMPT_SHARE)))
        centre_x, centre_y = ((low + high) / 2).tolist()
        return round(centre_x - side / 2), round(centre_y - side / 2), side

    def pixel_values(self, image: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
        """(3, image_size, image_size) of the `window` (x, y, side) of an image (1 or 3, H, W)."""
        inside = image[:, max(window[1], 0) : window[1] + window[2], max(window[0], 0) : window[0] + window[2]]
        crop = cut(image, window, fill=float(inside.min()))
        low, high = np.percentile(inside.numpy(), self.stretch_percentiles)
        crop = ((crop - low) / max(high - low, 1e-6)).clamp(0, 1) * 255.0
        shrinks = window[2] > self.image_size
        crop = F.interpolate(crop[None], size=(self.image_size,) * 2, mode="bilinear", antialias=shrinks)[0]
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        return (crop.expand(3, -1, -1) - mean[:, None, None]) / std[:, None, None]

    # ----------------------------------------------------------------------------------------------------- backward

    def post_process_logits(
        self, pred_masks: torch.Tensor, windows: torch.Tensor, original_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Logits (W, P, N, h, w) to one float tensor (N, H, W) a prompt at the image's size, windows first."""
        results = []
        for masks, (x, y, side), (height, width) in zip(
            pred_masks, windows.tolist(), original_sizes.tolist(), strict=True
        ):
            resized = F.interpolate(masks.float(), size=(side, side), mode="bilinear", antialias=side < masks.shape[-1])
            canvas = torch.full((*masks.shape[:2], height, width), OUTSIDE_LOGIT, device=masks.device)
            top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, height), min(x + side, width)
            canvas[..., top:bottom, left:right] = resized[..., top - y : bottom - y, left - x : right - x]
            results += list(canvas)
        return results

    def post_process_samples(
        self,
        pred_masks: torch.Tensor,
        windows: torch.Tensor,
        original_sizes: torch.Tensor,
        pixel_spacing_mm: float | Sequence[float] | None = None,
    ) -> list[dict]:
        """Everything a user looks at, one dictionary a prompt (W * P of them, windows first).

        Args:
            pred_masks: logits (W, P, N, h, w).
            windows, original_sizes: of the processor's output.
            pixel_spacing_mm: side of a pixel, one number or one a prompt; areas are then in mm^2.

        Returns:
            `masks` (N, H, W) boolean, `mean` (H, W) probability averaged over samples, `entropy` (H, W) of that mean in
            bits, `areas` (N,), `area_quantiles` by level, `area_unit` ("px" or "mm2"), `empty_share` of the samples.
        """
        logits = self.post_process_logits(pred_masks, windows, original_sizes)
        spacings = list(pixel_spacing_mm) if isinstance(pixel_spacing_mm, Sequence) else [pixel_spacing_mm] * len(logits)
        results = []
        for item, spacing in zip(logits, spacings, strict=True):
            masks = item > 0
            mean = item.sigmoid().mean(dim=0)
            areas = masks.sum(dim=(-2, -1)).float() * (1.0 if spacing is None else spacing**2)
            quantiles = torch.quantile(areas, torch.tensor(QUANTILES, device=areas.device)).tolist()
            results.append(
                {
                    "masks": masks,
                    "mean": mean,
                    "entropy": binary_entropy(mean),
                    "areas": areas,
                    "area_quantiles": {str(level): value for level, value in zip(QUANTILES, quantiles, strict=True)},
                    "area_unit": "px" if spacing is None else "mm2",
                    "empty_share": (areas == 0).float().mean().item(),
                }
            )
        return results


def binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy of a Bernoulli variable in bits, 0 at 0 and 1."""
    other = 1 - probability
    return -(torch.xlogy(probability, probability) + torch.xlogy(other, other)) / np.log(2)


def as_float(value: Any) -> torch.Tensor:
    """Any nested list, array or tensor as a float32 tensor."""
    return torch.as_tensor(np.asarray(value, dtype=np.float32))


def to_grey_or_rgb(image: Any) -> torch.Tensor:
    """A grey or RGB image of any kind as float (1 or 3, H, W)."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 0)
    elif array.ndim == 2:
        array = array[None]
    else:
        raise ValueError(f"an image must have the shape (H, W) or (H, W, 3), got {array.shape}")
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not torch.isfinite(tensor).all():
        raise ValueError("an image must hold finite numbers only")
    return tensor


def cut(image: torch.Tensor, window: tuple[int, int, int], fill: float) -> torch.Tensor:
    """The window (x, y, side) of (C, H, W), filled with `fill` outside of the image."""
    x, y, side = window
    height, width = image.shape[-2:]
    padding = (max(-x, 0), max(x + side - width, 0), max(-y, 0), max(y + side - height, 0))
    padded = F.pad(image, padding, value=fill)
    x, y = x + padding[0], y + padding[2]
    return padded[:, y : y + side, x : x + side]


__all__ = ["ProbabilisticSamProcessor"]
