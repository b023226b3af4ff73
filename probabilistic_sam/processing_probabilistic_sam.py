"""Image and prompt to model input, and logits back to masks, mean, uncertainty and area at the image's own size.

A model trained on zoomed crops must see every image at the same zoom. So the processor cuts a square window around
each prompt (`crop_size` image pixels, more when the prompt is larger), stretches its grey values, resizes it to the
model's `image_size`, and pastes the results back.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of 0..255, as SAM was trained
IMAGENET_STD = (58.395, 57.12, 57.375)
PROMPT_SHARE = 0.75  # largest share of the window's side that a prompt may take
OUTSIDE_LOGIT = -30.0  # pixels outside of the window
PADDING_LABEL = -10  # of a point that is not there, as in SAM
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CHUNK_PIXELS = 2**26  # samples times pixels that are floating point at one time


class ProbabilisticSamProcessor(ProcessorMixin):
    r"""Prepares images and prompts for `ProbabilisticSamModel` and turns its logits into masks.

    Args:
        image_size (`int`): side of the model's input in pixels, a multiple of 16.
        crop_size (`int`, *optional*): side of the window around a prompt in image pixels; `None` takes the whole
            image, with all its prompts in one window.
        stretch_percentiles (`tuple[float, float]`): grey values of the window at these percentiles become black and
            white.
    """

    def __init__(self, image_size: int = 256, crop_size: int | None = 64, stretch_percentiles=(0.5, 99.5), **kwargs):
        super().__init__(**kwargs)
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size}")
        if crop_size is not None and crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 pixel, or None for the whole image, got {crop_size}")
        low, high = stretch_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"stretch_percentiles must be two ascending numbers in 0..100, got {low} and {high}")
        self.image_size = image_size
        self.crop_size = crop_size
        self.stretch_percentiles = tuple(stretch_percentiles)

    # ------------------------------------------------------------------------------------------------------- saving

    def include_code(self) -> None:
        """Let `save_pretrained` write the processor's code too, and name it in `processor_config.json`."""
        self._auto_class = "AutoProcessor"  # of this object only: not every processor is to be saved with code

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A processor that came with code is saved with code."""
        result = super().from_args_and_dict(args, processor_dict, **kwargs)
        if "auto_map" in processor_dict:
            (result[0] if isinstance(result, tuple) else result).include_code()
        return result

    # ------------------------------------------------------------------------------------------------------ forward

    def __call__(
        self,
        images: Any,
        input_boxes: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_masks: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Cut a window for each prompt.

        Prompts are nested lists, arrays or tensors. As with `SamProcessor`, the level `[prompt]` may be left out when
        each image has one.

        Args:
            images: one image or a list of them, PIL, array or tensor, of any value range: grey `(H, W)`, RGB
                `(H, W, 3)` or `(3, H, W)`. Transparency is dropped.
            input_boxes: `[image][prompt][x1, y1, x2, y2]` in image pixels, measured at the pixels' edges.
            input_points: `[image][prompt][point][x, y]` in image pixels.
            input_labels: `[image][prompt][point]`: 1 inside, 0 outside, -10 padding; all inside when left out.
            input_masks: `[image][prompt]` boolean arrays `(H, W)`: a rough mask as prompt.
            return_tensors: only `"pt"`.

        Returns:
            `BatchFeature` with one item a window (W windows; with `crop_size` each has one prompt, P = 1):
            `pixel_values (W, 3, S, S)`, `input_boxes (W, P, 4)`, `input_points (W, P, K, 2)`, `input_labels
            (W, P, K)`, `input_masks (W, 1, S / 4, S / 4)` in the model's coordinates, as far as given; `windows
            (W, 3)` with x, y of the upper left corner and side in image pixels; `original_sizes (W, 2)` height and
            width. K is the largest number of points; missing ones, and negative points outside of the window, have
            the label -10, which the model leaves out.

        Raises:
            ValueError: no prompt, a prompt outside of its image, or numbers of prompts that do not fit.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
        if input_points is None and input_labels is not None:
            raise ValueError("input_labels are given without input_points")
        arguments = {
            "input_boxes": input_boxes,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_masks": input_masks,
        }
        given = {name: values for name, values in arguments.items() if values is not None}
        if not given:
            raise ValueError("a prompt must be given: input_boxes, input_points or input_masks")
        for name, values in given.items():
            if not hasattr(values, "__len__"):
                raise ValueError(f"{name} must be a list with an entry for each image, got {values!r}")
            if len(values) != len(images):
                raise ValueError(f"{name} are for {len(values)} images, but there are {len(images)}")

        windows: list[dict[str, torch.Tensor]] = []
        for index, item in enumerate(images):
            image = to_grey_or_rgb(item)
            prompts = {name: to_prompts(values[index], name) for name, values in given.items()}
            counts = {name: len(values) for name, values in prompts.items()}
            if len(set(counts.values())) != 1:
                raise ValueError(f"image {index} has different numbers of prompts: {counts}")
            count = next(iter(counts.values()))
            if not count:
                raise ValueError(f"image {index} has no prompt")
            if "input_points" in prompts and "input_labels" not in prompts:
                prompts["input_labels"] = [torch.ones(len(points)) for points in prompts["input_points"]]
            groups = [range(count)] if self.crop_size is None else [range(i, i + 1) for i in range(count)]
            for group in groups:
                windows.append(self.window_features(image, {k: [v[i] for i in group] for k, v in prompts.items()}))

        most = max((window["input_points"].shape[1] for window in windows if "input_points" in window), default=0)
        for window in windows:
            if "input_points" in window:
                missing = most - window["input_points"].shape[1]
                window["input_points"] = F.pad(window["input_points"], (0, 0, 0, missing), value=PADDING_LABEL)
                window["input_labels"] = F.pad(window["input_labels"], (0, missing), value=PADDING_LABEL)
        for name in given:
            if len({len(window[name]) for window in windows}) > 1:
                counts_text = ", ".join(str(len(window[name])) for window in windows)
                raise ValueError(
                    f"without a crop_size every image needs as many {name} as the others, got {counts_text}"
                )
        return BatchFeature({name: torch.stack([window[name] for window in windows]) for name in windows[0]})

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
            points = pad_sequence(prompts["input_points"], batch_first=True)  # (P, K, 2)
            points = (points - corner) * scale
            labels = pad_sequence(prompts["input_labels"], batch_first=True, padding_value=PADDING_LABEL)
            # A negative point may lie far from the others: outside of the window it has nothing to say
            counts = ((points >= 0) & (points <= self.image_size)).all(dim=-1) & (labels != PADDING_LABEL)
            features["input_points"] = torch.where(counts[..., None], points, PADDING_LABEL)
            features["input_labels"] = torch.where(counts, labels, PADDING_LABEL).long()
        if "input_masks" in prompts:
            if len(prompts["input_masks"]) > 1:
                raise ValueError("a window takes one mask prompt: give a crop_size, or one mask an image")
            mask = cut((prompts["input_masks"][0] > 0).float()[None], (x, y, side), fill=0.0)[None]
            mask = F.interpolate(mask, size=(self.image_size // 4,) * 2, mode="bilinear", antialias=True)[0]
            features["input_masks"] = (mask * 2 - 1) * 10.0  # a confident mask in SAM's logits
        return features

    def window(self, height: int, width: int, prompts: dict[str, list[torch.Tensor]]) -> tuple[int, int, int]:
        """Upper left corner (x, y) and side, in image pixels, of the window for prompts of one image (H, W)."""
        corners, outer = [], []  # what the window is laid around; what must lie in the image
        for box in prompts.get("input_boxes", []):
            if box.shape != (4,) or not torch.isfinite(box).all():
                raise ValueError(f"a box must be four finite numbers x1, y1, x2, y2, got {box.tolist()}")
            if box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(f"box {box.tolist()} has no area: x2 must exceed x1 and y2 must exceed y1")
            corners += [box[:2], box[2:]]
        for points, labels in zip(prompts.get("input_points", []), prompts.get("input_labels", []), strict=True):
            if points.ndim != 2 or points.shape[-1] != 2 or not len(points) or not torch.isfinite(points).all():
                raise ValueError(f"points must be finite pairs x, y, at least one, got {points.tolist()}")
            if labels.shape != points.shape[:1]:
                raise ValueError(f"{len(points)} points need as many labels, got {labels.tolist()}")
            if not torch.isin(labels, torch.tensor([0.0, 1.0, PADDING_LABEL])).all():
                raise ValueError(f"labels must be 1 (inside), 0 (outside) or -10 (padding), got {labels.tolist()}")
            points = points[labels != PADDING_LABEL]
            labels = labels[labels != PADDING_LABEL]
            outer += list(points)
            corners += list(points[labels == 1] if (labels == 1).any() else points)
        for mask in prompts.get("input_masks", []):
            if mask.shape != (height, width):
                raise ValueError(f"a mask prompt must have the image's size {height, width}, got {tuple(mask.shape)}")
            where = torch.nonzero(mask > 0)
            if not len(where):
                raise ValueError("a mask prompt must not be empty")
            corners += [where.amin(dim=0).flip(0).float(), where.amax(dim=0).flip(0).float() + 1]
        if not corners:
            raise ValueError("every point is padding: a prompt needs a box, a mask or a point")
        for x, y in torch.stack(corners + outer).tolist():
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(
                    f"x {x:g}, y {y:g} of a prompt lies outside of the image of {width} x {height} pixels"
                )
        low, high = torch.stack(corners).amin(dim=0), torch.stack(corners).amax(dim=0)
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
            shrinks = side < masks.shape[-1]
            resized = F.interpolate(masks.float(), size=(side, side), mode="bilinear", antialias=shrinks)
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
        threshold: float = 0.5,
    ) -> list[dict]:
        """Everything a user looks at, one dictionary a prompt (W * P of them, windows first).

        Args:
            pred_masks: logits (W, P, N, h, w).
            windows: (W, 3), of the processor's output.
            original_sizes: (W, 2), of the processor's output.
            pixel_spacing_mm: side of a pixel, one number or one a prompt; areas are then in mm^2.
            threshold: probability above which a pixel belongs to a mask.

        Returns:
            `masks` (N, H, W) boolean, `mean` (H, W) probability averaged over samples, `entropy` (H, W) of that mean
            in bits, `areas` (N,), `area_quantiles` by level, `area_unit` ("px" or "mm2"), `empty_share` of the
            samples.

        Raises:
            ValueError: a spacing that is not positive, or not one a prompt; a threshold that is not within 0..1;
                logits that are not finite.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        if not torch.isfinite(pred_masks).all():
            raise ValueError("the model's logits are not finite: its training diverged or its weights are damaged")
        limit = math.log(threshold / (1 - threshold))
        count = pred_masks.shape[0] * pred_masks.shape[1]
        unit = "px" if pixel_spacing_mm is None else "mm2"
        spacings = np.asarray(1.0 if pixel_spacing_mm is None else pixel_spacing_mm, dtype=float).reshape(-1)
        if len(spacings) not in (1, count) or not (np.isfinite(spacings) & (spacings > 0)).all():
            raise ValueError(
                f"pixel_spacing_mm must be one positive number, or one for each of {count} prompts, got "
                f"{pixel_spacing_mm}"
            )
        results = []
        for index, spacing in enumerate(np.broadcast_to(spacings, count).tolist()):
            window, prompt = divmod(index, pred_masks.shape[1])
            place = windows[window : window + 1], original_sizes[window : window + 1]
            samples = pred_masks[window : window + 1, prompt : prompt + 1]  # (1, 1, N, h, w)
            (height, width), side = original_sizes[window].tolist(), int(windows[window, 2])
            masks = torch.empty((samples.shape[2], height, width), dtype=torch.bool, device=samples.device)
            mean = torch.zeros((height, width), device=samples.device)
            # Some samples at a time are floating point at the image's size, so that memory stays bounded
            chunk = max(1, CHUNK_PIXELS // max(height * width, side**2))
            for part, drawn in zip(samples.split(chunk, dim=2), masks.split(chunk), strict=True):
                (logits,) = self.post_process_logits(part, *place)
                drawn.copy_(logits > limit)
                mean += logits.sigmoid().sum(dim=0)
            mean = (mean / len(masks)).clamp(max=1)
            areas = masks.sum(dim=(-2, -1)).float() * spacing**2
            quantiles = torch.quantile(areas, torch.tensor(QUANTILES, device=areas.device)).tolist()
            results.append(
                {
                    "masks": masks,
                    "mean": mean,
                    "entropy": binary_entropy(mean),
                    "areas": areas,
                    "area_quantiles": {str(level): value for level, value in zip(QUANTILES, quantiles, strict=True)},
                    "area_unit": unit,
                    "empty_share": (areas == 0).float().mean().item(),
                }
            )
        return results


def binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy of a Bernoulli variable in bits, 0 at 0 and 1."""
    other = 1 - probability
    return -(torch.xlogy(probability, probability) + torch.xlogy(other, other)) / np.log(2)


def as_float(value: Any) -> torch.Tensor:
    """Any nested list, array or tensor as a float32 tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float()
    return torch.from_numpy(np.array(value, dtype=np.float32))


def to_prompts(values: Any, name: str) -> list[torch.Tensor]:
    """One image's prompts of a kind, one tensor a prompt; a single prompt may come without the level of prompts."""
    ndim = {"input_boxes": 1, "input_points": 2, "input_labels": 1, "input_masks": 2}[name]
    try:
        prompts = [as_float(value) for value in values]
        if prompts and all(prompt.ndim == ndim - 1 for prompt in prompts):
            prompts = [torch.stack(prompts)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be nested lists of numbers, arrays or tensors, got {values!r}") from error
    return prompts


def to_grey_or_rgb(image: Any) -> torch.Tensor:
    """A grey or RGB image of any kind as float (1 or 3, H, W)."""
    if hasattr(image, "getbands") and image.mode not in ("RGB", "L", "F", "I") and not image.mode.startswith("I;16"):
        grey = image.mode in ("1", "LA", "La")
        image = image.convert("L" if grey else "RGB")  # palettes, transparency, CMYK and the like
    array = as_float(image).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 0)
    elif array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.size:
        raise ValueError(f"an image must have the shape (H, W), (H, W, 3) or (3, H, W), got {np.shape(image)}")
    tensor = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
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
