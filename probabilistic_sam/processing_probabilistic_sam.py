"""Processor: image and prompt to model input, and logits back to masks at the size of the image.

The model was trained on crops of one zoom and must see every image at that zoom. Therefore the processor cuts a square
window around each prompt (`crop_size` image pixels, more for a larger prompt), stretches its grey values, resizes it
to `image_size`, and pastes the results back.

This file holds the processor and its functions: pasting back, arguments, windows. Image files are read by
`open_image` in a file of its own.
"""

import math
import operator
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .processing_image_files import open_image, shorten

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of 0..255, as SAM was trained
IMAGENET_STD = (58.395, 57.12, 57.375)
PROMPT_SHARE = 0.75  # largest extent of a prompt relative to the side of its window
OUTSIDE_LOGIT = -30.0  # of pixels outside the window
PADDING_LABEL = -10  # of padding points, as in SAM
# Names that must be misspelled prompts, which are refused instead of ignored
MISTAKEN = re.compile(r"(input_)?(bbox|box|point|prompt)(es|s)?|input_(label|mask)s?", re.IGNORECASE)
MISTAKEN_WITH_POINTS = re.compile(r"(point_)?labels?", re.IGNORECASE)  # without points they may be class labels
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MIN_PRESENCE = 0.01  # below it, readers who annotate are too rare for the model to have learnt their outlines
CHUNK_PIXELS = 2**26  # samples x pixels that are held in floating point at a time

# Nesting of prompts and readers' masks, and the number of axes of the innermost arrays
NESTING = {
    "input_boxes": ("[image][prompt][x1, y1, x2, y2]", 1),
    "input_points": ("[image][prompt][point][x, y]", 2),
    "input_labels": ("[image][prompt][point]", 1),
    "input_masks": ("[image][prompt] masks (H, W)", 2),
    "segmentation_maps": ("[image][reader] masks (H, W)", 2),
}
# Arguments of `SamProcessor` with the only value that is accepted
FIXED_OPTIONS = {
    "do_resize": True,
    "do_normalize": True,
    "do_pad": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "data_format": "channels_first",
    "point_pad_value": PADDING_LABEL,
}
FREE_OPTIONS = ("do_rescale", "disable_grouping")  # without effect: grey values are stretched in any case
SAM_SETTINGS = ("size", "pad_size", "mask_size", "mask_pad_size", "image_mean", "image_std", "resample", "target_size")


class ProbabilisticSamProcessor(ProcessorMixin):
    r"""Prepares images and prompts for `ProbabilisticSamModel` and turns its logits into masks.

    Args:
        image_size (`int`): side of the model's input in pixels, a multiple of 16.
        crop_size (`int`, *optional*): side of the window around a prompt in image pixels; `None` takes the whole
            image, with all its prompts in one window.
        stretch_percentiles (`tuple[float, float]`): percentiles of the window's grey values that become black and
            white.
    """

    def __init__(self, image_size: int = 256, crop_size: int | None = 64, stretch_percentiles=(0.5, 99.5), **kwargs):
        super().__init__(**kwargs)
        if not hasattr(image_size, "__index__") or image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {image_size!r}")
        if crop_size is not None and (not hasattr(crop_size, "__index__") or crop_size < 2):
            raise ValueError(
                f"crop_size must be a whole number of 2 pixels or more, or None for the whole image, got {crop_size!r}"
            )
        try:
            low, high = map(float, stretch_percentiles)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 <= low < high <= 100:
            raise ValueError(f"stretch_percentiles must be two ascending numbers in 0..100, got {stretch_percentiles}")
        self.image_size = operator.index(image_size)
        self.crop_size = None if crop_size is None else operator.index(crop_size)
        self.stretch_percentiles = (low, high)

    # ------------------------------------------------------------------------------------------------------- saving

    def include_code(self) -> None:
        """Let `save_pretrained` also write the processor's code and refer to it in `processor_config.json`."""
        self._auto_class = "AutoProcessor"  # of this object only, not of the class

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As in `ProcessorMixin`, which takes the default settings if there is no file.

        Raises:
            OSError: the folder or repository has no settings of this processor.
        """
        settings, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not settings.keys() & {"image_size", "crop_size", "stretch_percentiles"}:
            raise OSError(
                f"{pretrained_model_name_or_path} has no processor_config.json of a {cls.__name__}; the processor of "
                "training writes it there (processor.save_pretrained)"
            )
        return settings, kwargs

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `ProcessorMixin`; a processor that was loaded with its code is also saved with it."""
        result = super().from_args_and_dict(args, processor_dict, **kwargs)
        if "auto_map" in processor_dict:
            (result[0] if isinstance(result, tuple) else result).include_code()
        return result

    # ---------------------------------------------------------------------------------------------------- to the model

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

        Arguments and their order are those of `SamProcessor`. Prompts are nested lists, arrays or tensors. A level may
        be left out if that is unambiguous: `[prompt]` if each image has one prompt, `[image]` if there is one image.

        Args:
            images: one image or a list of images. An image is anything that `open_image` reads (path, bytes, binary
                file, base64, PIL image), or an array or tensor of any value range: grey `(H, W)`, RGB `(H, W, 3)` or
                `(3, H, W)`.
            text: not accepted.
            segmentation_maps: the readers' masks, `[image][reader] (H, W)` or `[image] (H, W)`, boolean, 0 and 1, or
                0 and 255; shared by the prompts of an image.
            input_points: `[image][prompt][point][x, y]` in image pixels.
            input_labels: `[image][prompt][point]`: 1 inside, 0 outside, -1 or -10 padding; all inside by default.
            input_boxes: `[image][prompt][x1, y1, x2, y2]` in image pixels, measured at pixel edges. A box that extends
                beyond the image by less than a pixel is clipped.
            input_masks: `[image][prompt]` masks `(H, W)` as rough prompts; for accepted values see `mask_inside`.
            device: device of the tensors, the CPU by default.
            return_tensors: only `"pt"`.
            **options: other arguments of `SamProcessor`, only with the value that describes what this processor does
                (`do_resize=True`).

        Returns:
            `BatchFeature` with one item per window: W windows of P prompts (P = 1 with a `crop_size`).

            - `pixel_values (W, 3, S, S)`;
            - the prompts that were given, in pixels of the model's input: `input_boxes (W, P, 4)`, `input_points
              (W, P, K, 2)`, `input_labels (W, P, K)`, `input_masks (W, 1, S / 4, S / 4)`. K is the largest number of
              points. Padding points, and negative points outside the window, have the label -10, which the model
              ignores;
            - `windows (W, 3)`: x and y of the upper left corner and side, in image pixels;
            - `original_sizes (W, 2)`: height and width of the image;
            - `image_indices (W,)`: number of the window's image, since an image has a window for each of its prompts;
            - with `segmentation_maps` of R readers `labels (W, P, R, S / 4, S / 4)`, 0 or 1 in floating point, and
              `annotated (W, P, R)`: whether the reader's mask has pixels in the window before resizing, in which one
              or two pixels may vanish.

        Raises:
            ValueError: no image; no prompt, unless `crop_size` is `None`; a prompt outside its image; numbers of
                prompts or readers that do not fit; an argument that is not accepted.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {brief(return_tensors)}')
        check_options({"text": text, **options})
        images = as_list(images)
        arguments = {
            "input_boxes": input_boxes,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_masks": input_masks,
        }
        given = {name: split(value, name, len(images)) for name, value in arguments.items() if value is not None}
        if "input_labels" in given and "input_points" not in given:
            raise ValueError("input_labels are given without input_points")
        if not given and (self.crop_size is not None or segmentation_maps is not None):
            raise ValueError(
                "a prompt must be given: input_boxes, input_points or input_masks; the window is cut around it"
            )
        readers = None if segmentation_maps is None else split(segmentation_maps, "segmentation_maps", len(images))

        windows: list[dict[str, torch.Tensor]] = []
        for index, item in enumerate(images):
            image = to_grey_or_rgb(item)
            size = image.shape[-2:]
            prompts = read_prompts({name: values[index] for name, values in given.items()}, size, index)
            masks = None if readers is None else reader_masks(readers[index], size, index)
            count = len(next(iter(prompts.values()), [None]))
            groups = [slice(count)] if self.crop_size is None else [slice(i, i + 1) for i in range(count)]
            for group in groups:
                of_window = {name: values[group] for name, values in prompts.items()}
                place = {"image_indices": torch.tensor(index)}
                windows.append(self.window_features(image, of_window, masks) | place)

        for name in given:
            counts = [len(window[name]) for window in windows]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"without a crop_size every image needs the same number of {name}, got {str(counts)[1:-1]}"
                )
        counts = [len(masks) for masks in readers or []]
        if len(set(counts)) > 1:
            raise ValueError(
                f"segmentation_maps have different numbers of readers ({str(counts)[1:-1]}); "
                "accepted: the same number for every image of a call"
            )
        pad_points(windows)
        batch = ProbabilisticSamFeatures({name: torch.stack([w[name] for w in windows]) for name in windows[0]})
        if device is not None:
            try:
                batch = batch.to(torch.device(device))
            except (RuntimeError, AssertionError, TypeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"device {brief(device)} cannot be used ({reason[:200]})") from error
        return batch

    def window_features(
        self, image: torch.Tensor, prompts: dict[str, list[torch.Tensor]], readers: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Features of one window of an image (C, H, W), for prompts of `read_prompts` and readers' masks (R, H, W)."""
        height, width = image.shape[-2:]
        window = x, y, side = self.window(height, width, prompts)
        scale, low_resolution = self.image_size / side, self.image_size // 4
        corner = torch.tensor([x, y], dtype=torch.float32)
        features = {
            "pixel_values": self.pixel_values(image, window),
            "windows": torch.tensor(window),
            "original_sizes": torch.tensor([height, width]),
        }
        if "input_boxes" in prompts:
            features["input_boxes"] = (torch.stack(prompts["input_boxes"]) - corner.repeat(2)) * scale
        if "input_points" in prompts:
            points = pad_sequence(prompts["input_points"], batch_first=True)  # (P, K, 2)
            points = (points - corner) * scale
            labels = pad_sequence(prompts["input_labels"], batch_first=True, padding_value=PADDING_LABEL)
            # Negative points far from the others may lie outside the window, where they carry no information
            used = ((points >= 0) & (points <= self.image_size)).all(dim=-1) & (labels != PADDING_LABEL)
            features["input_points"] = torch.where(used[..., None], points, PADDING_LABEL)
            features["input_labels"] = torch.where(used, labels, PADDING_LABEL).long()
        if "input_masks" in prompts:
            if len(prompts["input_masks"]) > 1:
                raise ValueError("a window takes one mask prompt: give a crop_size, or one mask per image")
            mask = cut(prompts["input_masks"][0][None], window, fill=0.0)[None]
            mask = F.interpolate(mask, size=(low_resolution,) * 2, mode="bilinear", antialias=True)[0]
            features["input_masks"] = (mask * 2 - 1) * 10.0  # logits of a confident mask, as SAM expects
        if readers is not None:
            count = len(next(iter(prompts.values())))
            features["labels"] = cut_masks(readers, window, low_resolution).float().repeat(count, 1, 1, 1)
            features["annotated"] = cut(readers, window, fill=0.0).flatten(1).any(dim=1).repeat(count, 1)
        return features

    def window(self, height: int, width: int, prompts: dict[str, list[torch.Tensor]]) -> tuple[int, int, int]:
        """Window around the prompts of one image: x and y of the upper left corner and side, in image pixels."""
        corners = prompt_corners(prompts, (height, width))
        if self.crop_size is None:
            return 0, 0, max(height, width)
        low, high = torch.stack(corners).amin(dim=0), torch.stack(corners).amax(dim=0)
        side = max(self.crop_size, math.ceil(float((high - low).max()) / PROMPT_SHARE))
        centre_x, centre_y = ((low + high) / 2).tolist()
        return round(centre_x - side / 2), round(centre_y - side / 2), side

    def pixel_values(self, image: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
        """Window (x, y, side) of an image (1 or 3, H, W) as model input: (3, image_size, image_size)."""
        return self.normalize(self.resize(self.stretch(image, window)))

    def stretch(self, image: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
        """Window (x, y, side) of an image (1 or 3, H, W), stretched to grey values 0..255: (1 or 3, side, side)."""
        inside = image[:, max(window[1], 0) : window[1] + window[2], max(window[0], 0) : window[0] + window[2]]
        crop = cut(image, window, fill=float(inside.min()))
        low, high = np.percentile(inside.numpy(), self.stretch_percentiles)
        return ((crop - low) / max(high - low, 1e-6)).clamp(0, 1) * 255.0

    def resize(self, crop: torch.Tensor) -> torch.Tensor:
        """A square (C, side, side), resized to (C, image_size, image_size)."""
        shrinks = crop.shape[-1] > self.image_size
        return F.interpolate(crop[None], size=(self.image_size,) * 2, mode="bilinear", antialias=shrinks)[0]

    def normalize(self, grey: torch.Tensor) -> torch.Tensor:
        """Grey values 0..255 (..., 1 or 3, S, S) as SAM was trained: (..., 3, S, S)."""
        channels = grey.expand(*grey.shape[:-3], 3, -1, -1).unbind(dim=-3)
        # With numbers, not tensors, which would have to be copied to the device
        scaled = [(c - mean) / std for c, mean, std in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
        return torch.stack(scaled, dim=-3)

    # ---------------------------------------------------------------------------------------------------- SAM's names

    @property
    def image_processor(self) -> "ProbabilisticSamProcessor":
        """The processor itself, because SAM's examples call `processor.image_processor.post_process_masks`."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in SAM_SETTINGS:
            raise AttributeError(f"the processor has no {name}; it has image_size, crop_size and stretch_percentiles")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -------------------------------------------------------------------------------------------------- from the model

    @torch.no_grad()
    def post_process_logits(
        self, pred_masks: torch.Tensor, windows: torch.Tensor, original_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Logits (W, P, N, h, w) at the size of the image: W * P float tensors (N, H, W), in order of the windows."""
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
        """Masks at the size of the image, as in SAM; `post_process_samples` also gives mean, entropy and areas.

        Args:
            masks: logits (W, P, N, h, w).
            original_sizes: (W, 2), as returned by the processor.
            windows: (W, 3), as returned by the processor; replaces SAM's `reshaped_input_sizes`.
            mask_threshold: logit above which a pixel belongs to a mask.
            binarize: `False` returns the logits.
            **options: other arguments of SAM are refused.

        Returns:
            One tensor (P, N, H, W) per window, boolean or float.

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
        outline_masks: torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
    ) -> list[dict]:
        """Masks and summaries at the size of the image: one dictionary per prompt, W * P in order of the windows.

        Presence and extent are two answers: which share of readers would annotate, and how large their masks are. A
        summary of all samples, of which some are empty, mixes them.

        Args:
            pred_masks: logits (W, P, N, h, w).
            windows: (W, 3), as returned by the processor.
            original_sizes: (W, 2), as returned by the processor.
            pixel_spacing_mm: side of a pixel, one number or one per prompt; areas are then in mm^2.
            threshold: probability above which a pixel belongs to a mask.
            outline_masks: logits (W, P, N, h, w) of the model's output. Without them the outlines are the samples that
                are not empty.
            presence: (W, P) of the model's output. Without it the presence is the share of samples that are not empty.

        Returns:
            Of readers who annotate: their share `presence`; M masks `outlines` (M, H, W) boolean,
            `areas_given_presence` (M,), `area_quantiles_given_presence` by level. M is N with `outline_masks`. If the
            presence is less than 1 %, the model cannot have learnt what so few readers would outline: M is 0 and the
            quantiles are None.

            Of all readers: `masks` (N, H, W) boolean, `mean` (H, W) probability averaged over the samples, `entropy`
            (H, W) of `mean` in bits, `areas` (N,), `area_quantiles` by level, `empty_share` of the samples.

            `area_unit` is "px" or "mm2".

        Raises:
            ValueError: a spacing that is not positive, or not one per prompt; a threshold outside 0..1; logits that
                are not finite; shapes that do not fit.
        """
        places = check_places(pred_masks, windows, original_sizes)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        for name, given, shape in (
            ("outline_masks", outline_masks, pred_masks.shape), ("presence", presence, pred_masks.shape[:2])
        ):  # fmt: skip
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(given.shape)}")
        if not all(torch.isfinite(item).all() for item in (pred_masks, outline_masks, presence) if item is not None):
            raise ValueError("the model's logits are not finite: its training diverged or its weights are damaged")
        # Pixels outside the window belong to no mask, however small the threshold
        limit = max(math.log(threshold / (1 - threshold)), OUTSIDE_LOGIT)
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
            masks, mean = paste_masks(pred_masks[window, prompt], *places[window], limit)
            areas = masks.sum(dim=(-2, -1)).float() * spacing**2
            share = (areas > 0).float().mean().item() if presence is None else presence[window, prompt].item()
            if share < MIN_PRESENCE:
                outlines = masks[:0]
            elif outline_masks is None:
                outlines = masks[areas > 0]
            else:
                outlines, hidden = masks.clone(), areas == 0  # the other samples are outlines already
                if hidden.any():
                    hidden_logits = outline_masks[window, prompt, hidden]
                    outlines[hidden] = paste_masks(hidden_logits, *places[window], limit)[0]
            areas_given_presence = outlines.sum(dim=(-2, -1)).float() * spacing**2
            results.append(
                {
                    "presence": share,
                    "outlines": outlines,
                    "areas_given_presence": areas_given_presence,
                    "area_quantiles_given_presence": quantiles(areas_given_presence) if len(outlines) else None,
                    "masks": masks,
                    "mean": mean,
                    "entropy": binary_entropy(mean),
                    "areas": areas,
                    "area_quantiles": quantiles(areas),
                    "area_unit": unit,
                    "empty_share": (areas == 0).float().mean().item(),
                }
            )
        return results


def quantiles(areas: torch.Tensor) -> dict[str, float]:
    """Quantiles of areas (N,) by level."""
    values = torch.quantile(areas, torch.tensor(QUANTILES, device=areas.device)).tolist()
    return {str(level): value for level, value in zip(QUANTILES, values, strict=True)}


def binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy of a Bernoulli variable in bits, 0 at 0 and 1."""
    other = 1 - probability
    return -(torch.xlogy(probability, probability) + torch.xlogy(other, other)) / np.log(2)


def paste(masks: torch.Tensor, window: tuple[int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """Logits (P, N, h, w) of a window (x, y, side) at the size (H, W) of the image: (P, N, H, W)."""
    (x, y, side), (height, width) = window, size
    shrinks = side < masks.shape[-1]
    resized = F.interpolate(masks.float(), size=(side, side), mode="bilinear", antialias=shrinks)
    canvas = torch.full((*masks.shape[:2], height, width), OUTSIDE_LOGIT, device=masks.device)
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + side, height), min(x + side, width)
    canvas[..., top:bottom, left:right] = resized[..., top - y : bottom - y, left - x : right - x]
    return canvas


def paste_masks(
    samples: torch.Tensor, window: tuple[int, int, int], size: tuple[int, int], limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, h, w) of a window at the size (H, W) of the image: which exceed `limit`, and mean probability.

    Returns:
        (N, H, W) boolean and (H, W).
    """
    height, width = size
    masks = torch.empty((len(samples), height, width), dtype=torch.bool, device=samples.device)
    mean = torch.zeros((height, width), device=samples.device)
    # In chunks, because floating-point logits of all samples at the size of the image may not fit in memory
    chunk = max(1, CHUNK_PIXELS // max(height * width, window[2] ** 2))
    for part, part_masks in zip(samples.split(chunk), masks.split(chunk), strict=True):
        (logits,) = paste(part[None], window, size)
        part_masks.copy_(logits > limit)
        mean += logits.sigmoid().sum(dim=0)
    return masks, (mean / len(masks)).clamp(max=1)


def check_places(pred_masks: torch.Tensor, windows: Any, original_sizes: Any) -> list[tuple[Any, Any]]:
    """Window (x, y, side) and image size (H, W) of each of the masks (W, P, N, h, w)."""
    shapes = tuple(np.shape(pred_masks)), tuple(np.shape(windows)), tuple(np.shape(original_sizes))
    count = shapes[0][0] if shapes[0] else 0
    if len(shapes[0]) != 5 or shapes[1] != (count, 3) or shapes[2] != (count, 2):
        raise ValueError(
            "masks, windows and original_sizes must have the shapes (W, P, N, h, w), (W, 3) and (W, 2), got "
            f"{', '.join(map(str, shapes))}"
        )
    places = ([tuple(map(int, row)) for row in torch.as_tensor(item).tolist()] for item in (windows, original_sizes))
    return list(zip(*places, strict=True))


# ----------------------------------------------------------------------------------------------------------- arguments


def to_grey_or_rgb(image: Any) -> torch.Tensor:
    """Any grey or RGB image as a float32 tensor (1 or 3, H, W)."""
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


def brief(value: Any) -> str:
    """An argument as error messages repeat it: one line of at most 80 characters."""
    return f"{len(value)} bytes" if isinstance(value, (bytes, bytearray)) else shorten(reprlib.repr(value))


def check_options(options: dict[str, Any]) -> None:
    """Refuse unknown arguments, and arguments of `SamProcessor` with a value that has no effect here."""
    for name, value in options.items():
        if value is None or name in FREE_OPTIONS:
            continue
        if name not in FIXED_OPTIONS:
            raise ValueError(
                f"the processor does not take {shorten(name)}; accepted: images, segmentation_maps, input_points, "
                "input_labels, input_boxes, input_masks, device; image_size, crop_size and stretch_percentiles are "
                "arguments of ProbabilisticSamProcessor(...)"
            )
        if not isinstance(value, (bool, int, str)) or value != FIXED_OPTIONS[name]:
            raise ValueError(f"{name} is {brief(value)}; accepted: only {FIXED_OPTIONS[name]!r}")


def as_list(images: Any) -> list:
    """A list of images from one image, a list, a tuple or a batch (B, ...).

    Raises:
        ValueError: there is no image.
    """
    if images is None:
        raise ValueError("no images are given; accepted: one image or a list of images")
    if not isinstance(images, (list, tuple)):
        images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
    if not len(images):
        raise ValueError("the list of images is empty; accepted: one image or a list of images")
    return list(images)


def as_float(value: Any) -> torch.Tensor:
    """Any nested list, array, tensor or PIL image as a float32 tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float()
    return torch.from_numpy(np.array(value, dtype=np.float32))


def nesting(value: Any) -> int:
    """Depth of nested lists plus axes of the arrays in them; more than is ever accepted for an empty list."""
    levels = 0
    while isinstance(value, (list, tuple)):
        if not value:
            return levels + 9
        levels, value = levels + 1, value[0]
    return levels + (2 if hasattr(value, "getbands") else getattr(value, "ndim", 0))


def split(values: Any, name: str, count: int) -> list[list[torch.Tensor]]:
    """Prompts or readers' masks of each of `count` images, as one tensor each.

    Missing levels are inserted: that of prompts, and with one image that of images, because they are unambiguous.

    Raises:
        ValueError: values that are nested differently, or not for `count` images.
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


def read_prompts(
    prompts: dict[str, list[torch.Tensor]], size: Sequence[int], index: int
) -> dict[str, list[torch.Tensor]]:
    """Prompts of image number `index`, of size (H, W), in one form: labels for points, boxes clipped, masks 0 or 1.

    Raises:
        ValueError: no prompt, different numbers of prompts, or a mask whose values are not accepted.
    """
    counts = {name: len(values) for name, values in prompts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"image {index} has different numbers of prompts: {counts}")
    if 0 in counts.values():
        raise ValueError(f"image {index} has no prompt")
    if "input_points" in prompts:
        labels = prompts.get("input_labels", [torch.ones(len(points)) for points in prompts["input_points"]])
        prompts["input_labels"] = [item.masked_fill(item == -1, PADDING_LABEL) for item in labels]
    if "input_boxes" in prompts:
        prompts["input_boxes"] = [clip_box(box, size) for box in prompts["input_boxes"]]
    if "input_masks" in prompts:
        prompts["input_masks"] = [mask_inside(mask).float() for mask in prompts["input_masks"]]
    return prompts


def prompt_corners(prompts: dict[str, list[torch.Tensor]], size: Sequence[int]) -> list[torch.Tensor]:
    """Points (x, y) that the window of prompts from `read_prompts` must contain, in an image of size (H, W).

    These are corners of boxes and masks and positive points; negative points only in a prompt without positive ones.

    Raises:
        ValueError: a prompt that is malformed, empty or outside the image.
    """
    (height, width), corners, others = size, [], []
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
                f"labels must be 1 (inside), 0 (outside), -1 or -10 (padding), got {brief(labels.tolist())}"
            )
        positive, used = labels == 1, labels != PADDING_LABEL
        corners += list(points[positive if positive.any() else used])
        others += list(points[used])
    for mask in prompts.get("input_masks", []):
        if mask.shape != (height, width):
            raise ValueError(f"a mask prompt must have the image's size {height, width}, got {tuple(mask.shape)}")
        where = torch.nonzero(mask)
        if not len(where):
            raise ValueError("a mask prompt must not be empty: no value of it counts as inside")
        corners += [where.amin(dim=0).flip(0).float(), where.amax(dim=0).flip(0).float() + 1]
    if prompts and not corners:
        raise ValueError("every point is padding: a prompt needs a box, a mask or a point")
    for x, y in (corner.tolist() for corner in corners + others):
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"x {x:g}, y {y:g} of a prompt lies outside the image of {width} x {height} pixels")
    return corners


def clip_box(box: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Clip a box that extends beyond the image (H, W) by less than a pixel, as rescaled boxes may."""
    if box.shape != (4,):
        return box
    edge = torch.tensor([size[1], size[0]] * 2, dtype=box.dtype)
    return torch.where((box > -1) & (box < edge + 1), box.clamp(min=0).minimum(edge), box)


def mask_inside(mask: torch.Tensor) -> torch.Tensor:
    """Which pixels of a mask prompt (H, W) are inside.

    - 0 and one positive value (boolean, 0 and 1, 0 and 255): inside where not 0.
    - Values from 0 to 1: probabilities, inside above 0.5.
    - Some negative values: logits, inside above 0.

    Raises:
        ValueError: other values, or values that are not finite.
    """
    if not mask.numel():
        raise ValueError("a mask prompt must not be empty: it has no pixels")
    if not torch.isfinite(mask).all():
        raise ValueError("a mask prompt must hold finite numbers only")
    low, high = mask.min(), mask.max()
    if low < 0 or ((low == 0 or high > 1) and ((mask == 0) | (mask == high)).all()):
        return mask > 0
    if high <= 1:
        return mask > 0.5
    raise ValueError(
        f"a mask prompt has several values from {low:g} to {high:g}; accepted: 0 and one other value, probabilities "
        "from 0 to 1, or logits with negative values outside"
    )


def reader_masks(masks: list[torch.Tensor], size: Sequence[int], index: int) -> torch.Tensor:
    """Readers' masks of image number `index`, of size (H, W): (R, H, W), 0 or 1 in floating point."""
    subject, (height, width) = f"segmentation_maps of image {index}", size
    if not masks:
        raise ValueError(f"{subject} hold no mask; accepted: one mask per reader, including empty ones")
    for mask in masks:
        if mask.shape != (height, width):
            raise ValueError(f"{subject} must have the image's size {height, width}, got {tuple(mask.shape)}")
        if not any(((mask == 0) | (mask == value)).all() for value in (1, 255)):
            raise ValueError(f"{subject} must be boolean, 0 and 1, or 0 and 255; got other values")
    return (torch.stack(masks) > 0).float()


# ------------------------------------------------------------------------------------------------------------- windows


def cut(image: torch.Tensor, window: Sequence[int], fill: float) -> torch.Tensor:
    """Window (x, y, side) of (C, H, W), padded with `fill` outside the image: (C, side, side)."""
    x, y, side = window
    height, width = image.shape[-2:]
    padding = (max(-x, 0), max(x + side - width, 0), max(-y, 0), max(y + side - height, 0))
    padded = F.pad(image, padding, value=fill)
    x, y = x + padding[0], y + padding[2]
    return padded[:, y : y + side, x : x + side]


def cut_masks(masks: torch.Tensor, window: Sequence[int], size: int) -> torch.Tensor:
    """Window (x, y, side) of readers' masks (R, H, W), 0 or 1, resized: (R, size, size) boolean."""
    inside = cut(masks, window, fill=0.0)
    if inside.shape[-1] == size:
        return inside > 0.5
    return F.interpolate(inside[None], size=(size, size), mode="bilinear", antialias=True)[0] >= 0.5


def pad_points(items: Sequence[dict[str, torch.Tensor]]) -> None:
    """Pad `input_points` (P, K, 2) and `input_labels` (P, K) of several items, in place, to the largest K."""
    items = [item for item in items if "input_points" in item]
    most = max((item["input_points"].shape[1] for item in items), default=0)
    for item in items:
        missing = most - item["input_points"].shape[1]
        item["input_points"] = F.pad(item["input_points"], (0, 0, 0, missing), value=PADDING_LABEL)
        item["input_labels"] = F.pad(item["input_labels"], (0, missing), value=PADDING_LABEL)


class ProbabilisticSamFeatures(BatchFeature):
    """Output of the processor: a `BatchFeature` that explains why SAM's `reshaped_input_sizes` is missing."""

    def __getitem__(self, item: str) -> Any:
        if item == "reshaped_input_sizes":
            raise KeyError("there are no reshaped_input_sizes; post_process_masks takes windows in their place")
        return super().__getitem__(item)


__all__ = ["ProbabilisticSamProcessor"]
