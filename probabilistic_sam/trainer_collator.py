"""From rows of a dataset to batches for transformers' `Trainer`, see training/TRAINER.md."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .processing_probabilistic_sam import PADDING_LABEL, ProbabilisticSamProcessor, cut

PROMPTS = ("input_boxes", "input_points", "input_labels")


class ProbabilisticSamCollator:
    r"""Makes a batch of `ProbabilisticSamModel` from rows, each with one image, its readers' masks and one prompt.

    A row is a dictionary:

    - `image`: PIL, array or tensor, as `ProbabilisticSamProcessor` takes it, or `{"bytes": ...}` of an image file, as
      undecoded columns of a dataset have it.
    - `masks`: the masks of its readers, a list of PIL images, arrays, tensors or `{"bytes": ...}` of `(H, W)`, boolean
      or 0 and 1. The mask of a reader who did not annotate is empty; that of a reader who did not look is not in the
      list.
    - the prompt, in image pixels: `input_boxes` with one box `[x1, y1, x2, y2]`, or `input_points` `[[x, y], ...]` and
      their `input_labels` (1 inside, 0 outside; all inside when left out), or both. Without a prompt it is the tight
      box of the union of the masks.

    Other columns are not used. The readers are padded to `num_readers`, so that all batches of a set have one shape.

    Args:
        processor (`ProbabilisticSamProcessor`): cuts the windows.
        num_readers (`int`): largest number of masks in any row.
        num_samples (`int`, defaults to 16): samples per prompt in an evaluation.

    Returns, when called: `pixel_values (B, 3, S, S)`, the prompt in the model's coordinates, `labels (B, 1, R, S / 4,
    S / 4)` float, `reader_mask (B, 1, R)` and `annotated (B, 1, R)` bool, and the number `num_samples`.

    Raises:
        ValueError: a row that does not fit; the message names it by its place in the batch.
    """

    def __init__(self, processor: ProbabilisticSamProcessor, num_readers: int, num_samples: int = 16):
        for name, value in {"num_readers": num_readers, "num_samples": num_samples}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.processor, self.num_readers, self.num_samples = processor, num_readers, num_samples

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows."""
        items = []
        for index, row in enumerate(rows):
            try:
                items.append(self.features(row))
            except ValueError as error:
                raise ValueError(f"row {index} of the batch: {error}") from error
        if len({frozenset(item) for item in items}) > 1:
            kinds = sorted({" and ".join(name for name in PROMPTS[:2] if name in item) for item in items})
            raise ValueError(f"the rows of a batch need prompts of one kind, got {', '.join(kinds)}")
        if "input_points" in items[0]:
            most = max(item["input_points"].shape[1] for item in items)
            for item in items:
                missing = most - item["input_points"].shape[1]
                item["input_points"] = F.pad(item["input_points"], (0, 0, 0, missing), value=PADDING_LABEL)
                item["input_labels"] = F.pad(item["input_labels"], (0, missing), value=PADDING_LABEL)
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return batch | {"num_samples": self.num_samples}

    def features(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """One row's entry of the batch."""
        for name in ("image", "masks"):
            if row.get(name) is None:
                raise ValueError(f"no {name!r} among its columns {', '.join(map(str, row))}")
        masks = to_masks(row["masks"])
        if len(masks) > self.num_readers:
            raise ValueError(f"{len(masks)} masks, but num_readers is {self.num_readers}")
        prompt: dict[str, Any] = {name: [row[name]] for name in PROMPTS if row.get(name) is not None}
        if not prompt:
            prompt = {"input_boxes": [union_box(masks)]}
        inputs = self.processor(images=[decoded(row["image"])], **prompt)
        if masks.shape[-2:] != tuple(inputs["original_sizes"][0].tolist()):
            height, width = inputs["original_sizes"][0].tolist()
            raise ValueError(f"masks of {masks.shape[2]} x {masks.shape[1]} px, but the image has {width} x {height}")
        if len(inputs["windows"]) != 1 or any(inputs[name].shape[1] != 1 for name in prompt if name in inputs):
            raise ValueError("it has several prompts; accepted: one prompt per row")
        labels, annotated = window_labels(masks, inputs["windows"][0].tolist(), self.processor.image_size // 4)
        missing = self.num_readers - len(masks)
        return {name: inputs[name][0] for name in ("pixel_values", *PROMPTS) if name in inputs} | {
            "labels": F.pad(labels, (0, 0, 0, 0, 0, missing))[None],
            "reader_mask": (torch.arange(self.num_readers) < len(masks))[None],
            "annotated": F.pad(annotated, (0, missing))[None],
        }


def decoded(value: Any) -> Any:
    """An image that a dataset has not decoded as PIL image; others as they are."""
    if not (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)):
        return value
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(value["bytes"]))
        image.load()
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"an image does not decode: {error}") from error
    return image


def to_masks(values: Any) -> np.ndarray:
    """The readers' masks of a row as one boolean array (R, H, W).

    Raises:
        ValueError: no mask, other values than 0 and 1, or other shapes.
    """
    masks = []
    for reader, value in enumerate(values):
        mask = np.asarray(decoded(value))
        if mask.ndim != 2:
            raise ValueError(f"the mask of reader {reader} must have the shape (H, W), got {mask.shape}")
        wrong = mask[(mask != 0) & (mask != 1)]
        if mask.dtype != bool and wrong.size:
            raise ValueError(
                f"the mask of reader {reader} must be boolean or hold only 0 (outside) and 1 (inside); got "
                f"{wrong[0]:g} in {wrong.size} of {mask.size} pixels"
            )
        masks.append(mask != 0)
    if not masks or len({mask.shape for mask in masks}) > 1:
        sizes = ", ".join(str(mask.shape) for mask in masks) or "none"
        raise ValueError(f"it needs masks of one size, at least one, got {sizes}")
    return np.stack(masks)


def union_box(masks: np.ndarray) -> list[float]:
    """Tight box x1, y1, x2, y2 of the union of masks (R, H, W), measured at the pixels' edges.

    Raises:
        ValueError: every mask is empty.
    """
    rows, columns = np.nonzero(masks.any(axis=0))
    if not len(rows):
        raise ValueError("every mask is empty, so there is no box around them; give input_boxes or input_points")
    return [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]


def window_labels(masks: np.ndarray, window: Sequence[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (R, H, W) in a window (x, y, side): labels (R, size, size), 0 or 1, and who annotated in it, (R,) bool."""
    x, y, side = window
    inside = cut(torch.from_numpy(masks).float(), (x, y, side), fill=0.0)
    annotated = inside.flatten(1).any(dim=1)
    if side != size:
        inside = F.interpolate(inside[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return (inside >= 0.5).float(), annotated


__all__ = ["ProbabilisticSamCollator"]
