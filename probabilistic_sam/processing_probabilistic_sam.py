"""Image and prompt to model input, and logits back to masks, mean, uncertainty and area at the image's own size.

A model trained on zoomed crops must see every image at the same zoom. So the processor cuts a square window around
each prompt (`crop_size` image pixels, more when the prompt is larger), stretches its grey values, resizes it to the
model's `image_size`, and pastes the results back.
"""

import base64
import contextlib
import io
import math
import os
import reprlib
import warnings
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

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 2**29  # of one image in bytes or base64; the largest uncompressed one has four bytes per pixel
MAX_QUOTED = 80  # characters of an argument that an error message repeats

# How prompts and readers' masks are nested, and the axes of one of them
NESTING = {
    "input_boxes": ("[image][prompt][x1, y1, x2, y2]", 1),
    "input_points": ("[image][prompt][point][x, y]", 2),
    "input_labels": ("[image][prompt][point]", 1),
    "input_masks": ("[image][prompt] masks (H, W)", 2),
    "segmentation_maps": ("[image][reader] masks (H, W)", 2),
}
# Arguments of `SamProcessor` with the only value that means something here
FIXED_OPTIONS = {
    "do_resize": True,
    "do_normalize": True,
    "do_pad": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "data_format": "channels_first",
    "point_pad_value": PADDING_LABEL,
}
FREE_OPTIONS = ("do_rescale", "disable_grouping")  # they change nothing: grey values are stretched anyway
SAM_SETTINGS = ("size", "pad_size", "mask_size", "mask_pad_size", "image_mean", "image_std", "resample", "target_size")


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
        images: Any = None,
        text: Any = None,
        segmentation_maps: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        device: str | torch.device | None = None,
        return_tensors: str = "pt",
        **options: Any,
    ) -> "ProbabilisticSamFeatures":
        """Cut a window around each prompt.

        The arguments are those of `SamProcessor`, in its order. Prompts are nested lists, arrays or tensors. Levels
        may be left out where only one reading is possible: `[prompt]` when each image has one, and `[image]` too when
        there is one image.

        Args:
            images: one image or a list of them, in any form that `open_image` takes: path, bytes, binary file, base64,
                PIL image; or an array or tensor of any value range: grey `(H, W)`, RGB `(H, W, 3)` or `(3, H, W)`.
            text: not accepted.
            segmentation_maps: the readers' masks, `[image][reader] (H, W)` or `[image] (H, W)`, boolean, 0 and 1, or
                0 and 255. The same masks serve every prompt of an image.
            input_points: `[image][prompt][point][x, y]` in image pixels.
            input_labels: `[image][prompt][point]`: 1 inside, 0 outside, -1 or -10 padding; all inside when left out.
            input_boxes: `[image][prompt][x1, y1, x2, y2]` in image pixels, measured at the pixels' edges. A box that
                leaves the image by less than a pixel is clipped.
            input_masks: `[image][prompt]` masks `(H, W)` as rough prompts; `mask_inside` says which values count.
            device: where the tensors go; the CPU when left out.
            return_tensors: only `"pt"`.
            **options: the other arguments of `SamProcessor`, with the value that describes what this processor does
                (`do_resize=True`); any other value is refused.

        Returns:
            `BatchFeature` with one item a window (W windows; with `crop_size` each has one prompt, P = 1):
            `pixel_values (W, 3, S, S)`, `input_boxes (W, P, 4)`, `input_points (W, P, K, 2)`, `input_labels
            (W, P, K)`, `input_masks (W, 1, S / 4, S / 4)` in the model's coordinates, as far as given; `windows
            (W, 3)` with x, y of the upper left corner and side in image pixels; `original_sizes (W, 2)` height and
            width. K is the largest number of points; missing ones, and negative points outside of the window, have
            the label -10, which the model leaves out. With `segmentation_maps` of R readers also `labels
            (W, P, R, S / 4, S / 4)`, 0 or 1 in floating point, and `annotated (W, P, R)`: whether the reader's mask
            has pixels in the window, decided before resizing, in which a mask of one or two pixels may vanish.

        Raises:
            ValueError: no image; no prompt, unless `crop_size` is `None`; a prompt outside of its image; numbers of
                prompts or readers that do not fit; an argument that is not accepted.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {brief(return_tensors)}')
        check_options({"text": text, **options})
        if images is None:
            raise ValueError("no images are given; accepted: one image or a list of them")
        if not isinstance(images, (list, tuple)):
            images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
        if not len(images):
            raise ValueError("the list of images is empty; accepted: one image or a list of them")
        if input_points is None and input_labels is not None:
            raise ValueError("input_labels are given without input_points")
        arguments = {
            "input_boxes": input_boxes,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_masks": input_masks,
        }
        given = {name: split(value, name, len(images)) for name, value in arguments.items() if value is not None}
        if not given and (self.crop_size is not None or segmentation_maps is not None):
            raise ValueError(
                "a prompt must be given: input_boxes, input_points or input_masks; the window is cut around it"
            )
        readers = None if segmentation_maps is None else split(segmentation_maps, "segmentation_maps", len(images))

        windows: list[dict[str, torch.Tensor]] = []
        for index, item in enumerate(images):
            image = to_grey_or_rgb(item)
            prompts = {name: values[index] for name, values in given.items()}
            counts = {name: len(values) for name, values in prompts.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"image {index} has different numbers of prompts: {counts}")
            count = next(iter(counts.values()), 0)
            if given and not count:
                raise ValueError(f"image {index} has no prompt")
            if "input_points" in prompts and "input_labels" not in prompts:
                prompts["input_labels"] = [torch.ones(len(points)) for points in prompts["input_points"]]
            if "input_labels" in prompts:
                prompts["input_labels"] = [
                    labels.masked_fill(labels == -1, PADDING_LABEL) for labels in prompts["input_labels"]
                ]
            if "input_boxes" in prompts:
                prompts["input_boxes"] = [clip_box(box, image.shape[-2:]) for box in prompts["input_boxes"]]
            if "input_masks" in prompts:
                prompts["input_masks"] = [mask_inside(mask).float() for mask in prompts["input_masks"]]
            masks = None if readers is None else reader_masks(readers[index], image.shape[-2:], index)
            groups = [range(count)] if self.crop_size is None else [range(i, i + 1) for i in range(count)]
            for group in groups:
                features = self.window_features(image, {k: [v[i] for i in group] for k, v in prompts.items()})
                if masks is not None:
                    place = features["windows"].tolist()
                    labels = cut_masks(masks, place, self.image_size // 4).float()
                    annotated = cut(masks, place, fill=0.0).flatten(1).any(dim=1)
                    features["labels"] = labels.repeat(len(group), 1, 1, 1)
                    features["annotated"] = annotated.repeat(len(group), 1)
                windows.append(features)

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
        if readers is not None and len({len(item) for item in readers}) > 1:
            counts_text = ", ".join(str(len(item)) for item in readers)
            raise ValueError(
                f"segmentation_maps have different numbers of readers ({counts_text}); accepted: as many for every "
                "image of a call"
            )
        stacked = {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
        batch = ProbabilisticSamFeatures(stacked)
        if device is not None:
            try:
                batch = batch.to(torch.device(device))
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"device {brief(device)} cannot be used ({reason[:200]})") from error
        return batch

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
            mask = cut(prompts["input_masks"][0][None], (x, y, side), fill=0.0)[None]
            mask = F.interpolate(mask, size=(self.image_size // 4,) * 2, mode="bilinear", antialias=True)[0]
            features["input_masks"] = (mask * 2 - 1) * 10.0  # a confident mask in SAM's logits
        return features

    def window(self, height: int, width: int, prompts: dict[str, list[torch.Tensor]]) -> tuple[int, int, int]:
        """Upper left corner (x, y) and side, in image pixels, of the window for prompts of one image (H, W)."""
        corners, outer = [], []  # what the window is laid around; what must lie in the image
        for box in prompts.get("input_boxes", []):
            if box.shape != (4,) or not torch.isfinite(box).all():
                raise ValueError(f"a box must be four finite numbers x1, y1, x2, y2, got {brief(box.tolist())}")
            if box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(f"box {box.tolist()} has no area: x2 must exceed x1 and y2 must exceed y1")
            corners += [box[:2], box[2:]]
        for points, labels in zip(prompts.get("input_points", []), prompts.get("input_labels", []), strict=True):
            if points.ndim != 2 or points.shape[-1] != 2 or not len(points) or not torch.isfinite(points).all():
                raise ValueError(f"points must be finite pairs x, y, at least one, got {brief(points.tolist())}")
            if labels.shape != points.shape[:1]:
                raise ValueError(f"{len(points)} points need as many labels, got {brief(labels.tolist())}")
            if not torch.isin(labels, torch.tensor([0.0, 1.0, PADDING_LABEL])).all():
                raise ValueError(
                    "labels must be 1 (inside), 0 (outside), -1 or -10 (padding), got " + brief(labels.tolist())
                )
            points = points[labels != PADDING_LABEL]
            labels = labels[labels != PADDING_LABEL]
            outer += list(points)
            corners += list(points[labels == 1] if (labels == 1).any() else points)
        for mask in prompts.get("input_masks", []):
            if mask.shape != (height, width):
                raise ValueError(f"a mask prompt must have the image's size {height, width}, got {tuple(mask.shape)}")
            where = torch.nonzero(mask)
            if not len(where):
                raise ValueError("a mask prompt must not be empty: no value of it counts as inside")
            corners += [where.amin(dim=0).flip(0).float(), where.amax(dim=0).flip(0).float() + 1]
        if prompts and not corners:
            raise ValueError("every point is padding: a prompt needs a box, a mask or a point")
        for x, y in (corner.tolist() for corner in corners + outer):
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(
                    f"x {x:g}, y {y:g} of a prompt lies outside of the image of {width} x {height} pixels"
                )
        if self.crop_size is None:
            side = max(height, width)
            return 0, 0, side
        low, high = torch.stack(corners).amin(dim=0), torch.stack(corners).amax(dim=0)
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

    # ---------------------------------------------------------------------------------------------------- SAM's names

    @property
    def image_processor(self) -> "ProbabilisticSamProcessor":
        """The processor itself: `processor.image_processor.post_process_masks` is how SAM's examples spell it."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in SAM_SETTINGS:
            raise AttributeError(f"the processor has no {name}; it has image_size, crop_size and stretch_percentiles")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ----------------------------------------------------------------------------------------------------- backward

    @torch.no_grad()
    def post_process_logits(
        self, pred_masks: torch.Tensor, windows: torch.Tensor, original_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Logits (W, P, N, h, w) to one float tensor (N, H, W) a prompt at the image's size, windows first."""
        places = check_places(pred_masks, windows, original_sizes)
        return [logits for masks, place in zip(pred_masks, places, strict=True) for logits in paste(masks, *place)]

    @torch.no_grad()
    def post_process_masks(
        self,
        masks: torch.Tensor,
        original_sizes: torch.Tensor,
        windows: torch.Tensor | None = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        **options: Any,
    ) -> list[torch.Tensor]:
        """SAM's name for pasting masks back; `post_process_samples` gives mean, uncertainty and areas as well.

        Args:
            masks: logits (W, P, N, h, w).
            original_sizes: (W, 2), of the processor's output.
            windows: (W, 3), of the processor's output, in the place of SAM's `reshaped_input_sizes`.
            mask_threshold: logit above which a pixel belongs to a mask.
            binarize: `False` returns the logits.
            **options: other arguments of SAM are refused.

        Returns:
            One tensor (P, N, H, W) a window at the image's size, boolean or float.

        Raises:
            ValueError: no windows, or shapes that do not fit.
        """
        refused = [name for name, value in options.items() if value is not None]
        if windows is None or refused or np.shape(windows)[-1:] == (2,):
            raise ValueError(
                "post_process_masks takes masks, original_sizes and windows: give the windows that the processor "
                f"returned, inputs['windows'], in place of {refused[0] if refused else 'reshaped_input_sizes'}"
            )
        places = check_places(masks, windows, original_sizes)
        pasted = (paste(logits, *place) for logits, place in zip(masks, places, strict=True))
        return [logits > mask_threshold if binarize else logits for logits in pasted]

    @torch.no_grad()
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
                logits that are not finite; shapes that do not fit.
        """
        places = check_places(pred_masks, windows, original_sizes)
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
            samples = pred_masks[window, prompt]  # (N, h, w)
            (_, _, side), (height, width) = places[window]
            masks = torch.empty((len(samples), height, width), dtype=torch.bool, device=samples.device)
            mean = torch.zeros((height, width), device=samples.device)
            # Some samples at a time are floating point at the image's size, so that memory stays bounded
            chunk = max(1, CHUNK_PIXELS // max(height * width, side**2))
            for part, part_masks in zip(samples.split(chunk), masks.split(chunk), strict=True):
                (logits,) = paste(part[None], *places[window])
                part_masks.copy_(logits > limit)
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


def paste(masks: torch.Tensor, window: tuple[int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """Logits (P, N, h, w) of a window (x, y, side) at the image's size, (P, N, H, W)."""
    (x, y, side), (height, width) = window, size
    shrinks = side < masks.shape[-1]
    resized = F.interpolate(masks.float(), size=(side, side), mode="bilinear", antialias=shrinks)
    canvas = torch.full((*masks.shape[:2], height, width), OUTSIDE_LOGIT, device=masks.device)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, height), min(x + side, width)
    canvas[..., top:bottom, left:right] = resized[..., top - y : bottom - y, left - x : right - x]
    return canvas


def check_places(pred_masks: torch.Tensor, windows: Any, original_sizes: Any) -> list[tuple[Any, Any]]:
    """Window (x, y, side) and image size (H, W) of each of the masks (W, P, N, h, w)."""
    shapes = tuple(np.shape(pred_masks)), tuple(np.shape(windows)), tuple(np.shape(original_sizes))
    count = shapes[0][0] if shapes[0] else 0
    if len(shapes[0]) != 5 or shapes[1] != (count, 3) or shapes[2] != (count, 2):
        raise ValueError(
            "masks, windows and original_sizes must have the shapes (W, P, N, h, w), (W, 3) and (W, 2), got "
            f"{', '.join(map(str, shapes))}"
        )
    return list(zip(np_list(windows), np_list(original_sizes), strict=True))


def np_list(values: Any) -> list[tuple[int, ...]]:
    """Rows of an integer array, tensor or nested list as tuples."""
    return [tuple(int(number) for number in row) for row in (values.tolist() if hasattr(values, "tolist") else values)]


# -------------------------------------------------------------------------------------------------------------- images


def open_image(image: Any, name: str | None = None, max_pixels: int = MAX_PIXELS, paths: bool = True) -> Any:
    """Decode one image, however it comes; its size is checked before, so that a huge one is refused and not decoded.

    Args:
        image: a path; bytes or a binary file; base64 of a file or a data URL, as text; a PIL image. Anything else,
            such as an array, is returned as it is.
        name: the subject of error messages, as in "image slice.png".
        max_pixels: its largest width times height.
        paths: whether text may be a path. For text that comes from outside it must not.

    Returns:
        `PIL.Image.Image`, upright by its orientation tag, grey (`L`, `I`, `I;16`, `F`) or `RGB`: palettes and other
        colour spaces become RGB, transparency is dropped.

    Raises:
        ValueError: not an image, truncated, several frames, more than `max_pixels`, or a URL.
    """
    is_pil = hasattr(image, "getbands")
    if not is_pil and not isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        if not hasattr(image, "read"):
            return image
        if isinstance(image, io.TextIOBase):
            raise ValueError(f"{name or 'the image'} is a file opened as text; accepted: one opened with mode 'rb'")
    try:  # transformers would otherwise demand it before it loads this file, and arrays do without
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError("reading image files needs Pillow, which is not installed: pip install pillow") from error

    if isinstance(image, str) and not (paths and os.path.isfile(image)):
        image = decode_base64(image, name, paths)
    if isinstance(image, (str, os.PathLike)):
        name = name or f"image {shorten(str(image))}"
    name = name or "the image"
    if isinstance(image, (bytes, bytearray, memoryview)):
        if len(image) > MAX_FILE_BYTES:
            raise ValueError(f"{name} has more than {MAX_FILE_BYTES >> 20} MiB")
        image = io.BytesIO(image)
    try:
        with contextlib.ExitStack() as stack:
            # The header says the size
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                opened = image if is_pil else stack.enter_context(Image.open(image, formats=IMAGE_FORMATS))
            frames = getattr(opened, "n_frames", 1)
            if opened.width * opened.height > max_pixels:
                problem = f"has {opened.width} x {opened.height} pixels"
            elif frames > 1:
                problem = f"holds {frames} frames"
            else:
                return plain_mode(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        problem = f"is too large ({error})"
    except UnidentifiedImageError:
        problem = "is not an image"
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        problem = f"cannot be read ({getattr(error, 'strerror', None) or str(error)[:MAX_QUOTED]})"
    raise ValueError(f"{name} {problem}; {accepted_images(max_pixels)}")


def accepted_images(max_pixels: int = MAX_PIXELS) -> str:
    """The end of an error about an image."""
    formats = ", ".join(IMAGE_FORMATS)
    return f"accepted: {formats} of at most {max_pixels // 10**6} million pixels, one slice a file"


def decode_base64(text: str, name: str | None, paths: bool) -> bytes:
    """Bytes of a data URL or of base64, which is what text stands for that is not the path of a file."""
    if text[:5].lower() == "data:":
        head, _, content = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError(
                f"{name or 'the image'} is a data URL without base64; accepted: data:image/png;base64,..."
            )
    elif "://" in text[:16]:
        raise ValueError(f"{name or 'the image'} is a URL, which is not fetched; {accepted_images()}")
    else:
        content = text
    try:
        if len(content) > MAX_FILE_BYTES // 3 * 4:
            raise ValueError(f"more than {MAX_FILE_BYTES >> 20} MiB")
        if paths and content is text and len(text) < MAX_QUOTED:  # shorter than any image
            raise ValueError("no such file")
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        if paths and content is text:
            problem = f"{name or 'image ' + shorten(text)} cannot be read (no such file, and not base64)"
        else:
            problem = f"{name or 'the image'} is not valid base64 ({error})"
        raise ValueError(f"{problem}; {accepted_images()}") from error


def plain_mode(image: Any) -> Any:
    """A PIL image in grey or RGB."""
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return image
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")  # palettes, transparency, CMYK and the like


def to_grey_or_rgb(image: Any) -> torch.Tensor:
    """A grey or RGB image of any kind as float (1 or 3, H, W)."""
    image = open_image(image)
    try:
        array = as_float(image).numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
        shape = array.shape
        if array.ndim == 3 and array.shape[-1] in (1, 3):
            array = np.moveaxis(array, -1, 0)
        elif array.ndim == 2:
            array = array[None]
        tensor = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    except (TypeError, ValueError, OverflowError) as error:
        kind = type(image).__name__
        raise ValueError(f"an image must be a file, a PIL image or an array of numbers, got {kind}") from error
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        kind = type(image).__name__
        raise ValueError(f"an image must have the shape (H, W), (H, W, 3) or (3, H, W), got {shape} ({kind})")
    if not torch.isfinite(tensor).all():
        raise ValueError("an image must hold finite numbers only")
    return tensor


# ------------------------------------------------------------------------------------------------- prompts and readers


def brief(value: Any) -> str:
    """What an error message repeats of an argument: one line of at most 80 characters."""
    return f"{len(value)} bytes" if isinstance(value, (bytes, bytearray)) else shorten(reprlib.repr(value))


def shorten(text: str) -> str:
    """The beginning of a text as one line of at most 80 characters."""
    text = " ".join(text[: 2 * MAX_QUOTED].split())
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def check_options(options: dict[str, Any]) -> None:
    """Refuse arguments of `SamProcessor`, or of nothing, that this processor cannot honour."""
    for name, value in options.items():
        if value is None or name in FREE_OPTIONS:
            continue
        if name not in FIXED_OPTIONS:
            raise ValueError(
                f"the processor does not take {shorten(name)}; accepted: images, segmentation_maps, input_points, "
                "input_labels, input_boxes, input_masks, device; image_size, crop_size and stretch_percentiles are "
                "set when it is made"
            )
        if not isinstance(value, (bool, int, str)) or value != FIXED_OPTIONS[name]:
            raise ValueError(f"{name} is {brief(value)}; accepted: only {FIXED_OPTIONS[name]!r}, what is always done")


def as_float(value: Any) -> torch.Tensor:
    """Any nested list, array, tensor or PIL image as a float32 tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float()
    return torch.from_numpy(np.array(value, dtype=np.float32))


def nesting(value: Any) -> int:
    """Number of levels of nested lists and of the arrays in them; of an empty list more than anything has."""
    levels = 0
    while isinstance(value, (list, tuple)):
        if not value:
            return levels + 9
        levels, value = levels + 1, value[0]
    return levels + (2 if hasattr(value, "getbands") else getattr(value, "ndim", 0))


def split(values: Any, name: str, count: int) -> list[list[torch.Tensor]]:
    """Prompts, or readers' masks, for each of `count` images, one tensor each.

    Missing levels are put in: the level of prompts, and with one image that of images, because then nothing else can
    be meant.
    """
    expected, ndim = NESTING[name]
    least = 2 if ndim == 2 and name != "input_points" else int(name != "input_labels")
    message = f"{name} must be nested lists of numbers, arrays or tensors, {expected}, got {brief(values)}"
    if count == 1 and least <= nesting(values) < ndim + 2:
        values = [values]
    if not nesting(values) or isinstance(values, (str, bytes)):
        raise ValueError(message)
    if len(values) != count:
        raise ValueError(f"{name} are for {len(values)} images, but there are {count}; accepted: {expected}")
    images: list[list[torch.Tensor]] = []
    for item in values:
        if isinstance(item, (list, tuple)) and not item:
            images.append([])
            continue
        if not least <= nesting(item) <= ndim + 1:
            raise ValueError(message)
        for _ in range(ndim + 1 - nesting(item)):
            item = [item]
        try:
            prompts = [as_float(value) for value in item]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(message) from error
        if any(prompt.ndim != ndim for prompt in prompts):
            raise ValueError(message)
        images.append(prompts)
    return images


def clip_box(box: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A box whose sides leave the image (H, W) by less than a pixel, as rescaled boxes do, at the image's edge."""
    if box.shape != (4,):
        return box
    edge = torch.tensor([size[1], size[0]] * 2, dtype=box.dtype)
    return torch.where((box > -1) & (box < edge + 1), box.clamp(min=0).minimum(edge), box)


def mask_inside(mask: torch.Tensor) -> torch.Tensor:
    """Which pixels of a mask prompt (H, W) are inside.

    0 and one other, positive value (boolean, 0 and 1, 0 and 255): all that is not 0. Negative values: logits, inside
    where they are positive. Values from 0 to 1: probabilities, inside where they exceed 0.5.

    Raises:
        ValueError: values that are not finite, or others.
    """
    if not mask.numel():
        raise ValueError("a mask prompt must not be empty: it has no pixels")
    if not torch.isfinite(mask).all():
        raise ValueError("a mask prompt must hold finite numbers only")
    low, high = mask.min(), mask.max()
    if low < 0:
        return mask > 0
    if (low == 0 or high > 1) and ((mask == 0) | (mask == high)).all():
        return mask > 0
    if high <= 1:
        return mask > 0.5
    raise ValueError(
        f"a mask prompt has several values from {low:g} to {high:g}; accepted: 0 and one other value, probabilities "
        "from 0 to 1, or logits with negative values outside"
    )


def reader_masks(masks: list[torch.Tensor], size: Sequence[int], index: int) -> torch.Tensor:
    """Readers' masks of image number `index` as (R, H, W), 0 or 1 in floating point."""
    subject, (height, width) = f"segmentation_maps of image {index}", size
    if not masks:
        raise ValueError(f"{subject} hold no mask; accepted: one for each reader, empty ones included")
    for mask in masks:
        if mask.shape != (height, width):
            raise ValueError(f"{subject} must have the image's size {height, width}, got {tuple(mask.shape)}")
        if not any(((mask == 0) | (mask == value)).all() for value in (1, 255)):
            raise ValueError(f"{subject} must be boolean, 0 and 1, or 0 and 255; got other values")
    return (torch.stack(masks) > 0).float()


def cut_masks(masks: torch.Tensor, window: Sequence[int], size: int) -> torch.Tensor:
    """Readers' masks (R, H, W), 0 or 1, in a window (x, y, side): (R, size, size) boolean."""
    inside = cut(masks, window, fill=0.0)
    if inside.shape[-1] == size:
        return inside > 0.5
    return F.interpolate(inside[None], size=(size, size), mode="bilinear", antialias=True)[0] >= 0.5


def cut(image: torch.Tensor, window: Sequence[int], fill: float) -> torch.Tensor:
    """The window (x, y, side) of (C, H, W), filled with `fill` outside of the image."""
    x, y, side = window
    height, width = image.shape[-2:]
    padding = (max(-x, 0), max(x + side - width, 0), max(-y, 0), max(y + side - height, 0))
    padded = F.pad(image, padding, value=fill)
    x, y = x + padding[0], y + padding[2]
    return padded[:, y : y + side, x : x + side]


class ProbabilisticSamFeatures(BatchFeature):
    """What the processor returns: a `BatchFeature` that says where the sizes are which SAM's examples look up."""

    def __getitem__(self, item: str) -> Any:
        if item == "reshaped_input_sizes":
            raise KeyError("there are no reshaped_input_sizes; post_process_masks takes windows in their place")
        return super().__getitem__(item)


__all__ = ["ProbabilisticSamProcessor"]
