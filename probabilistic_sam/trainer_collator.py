"""Collator from rows of a dataset to batches for transformers' `Trainer`, see training/TRAINER.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .processing_image_files import open_image
from .processing_probabilistic_sam import MISTAKEN, MISTAKEN_WITH_POINTS, ProbabilisticSamProcessor, pad_points

PROMPTS = ("input_boxes", "input_points", "input_labels")


class ProbabilisticSamCollator:
    r"""Makes a batch for `ProbabilisticSamModel` from rows with one image, its readers' masks and one prompt each.

    A row is a dictionary:

    - `image`: a PIL image, array or tensor, as in `ProbabilisticSamProcessor`, or `{"bytes": ...}` of an image file,
      as in undecoded columns of a dataset.
    - `masks`: one mask `(H, W)` per reader, as PIL images, arrays, tensors or `{"bytes": ...}`; boolean, 0 and 1, or 0
      and 255. A reader who looked and annotated nothing has an empty mask; an absent reader has none, or None.
    - the prompt, in image pixels: `input_boxes` with one box `[x1, y1, x2, y2]`, or `input_points` `[[x, y], ...]` and
      `input_labels` (1 inside, 0 outside; all inside by default), or both. By default it is the tight box around the
      union of the masks.

    Other columns are ignored, but those that look like a misspelled prompt, such as `boxes`, are refused. Readers are
    padded to `num_readers`, so that all batches have the same shape.

    Args:
        processor (`ProbabilisticSamProcessor`): cuts the windows.
        num_readers (`int`): R, the largest number of masks in any row.
        num_samples (`int`, defaults to 16): samples per prompt in an evaluation.

    A call returns `pixel_values (B, 3, S, S)`, the prompts in pixels of the model's input, `labels (B, 1, R, S / 4,
    S / 4)` float, `reader_mask (B, 1, R)` and `annotated (B, 1, R)` bool, and `num_samples (B,)`: the same number for
    each row, because `accelerate` distributes tensors only.

    Raises:
        ValueError: a row that does not fit; the message gives its index in the batch.
    """

    def __init__(self, processor: ProbabilisticSamProcessor, num_readers: int, num_samples: int = 16):
        for name, value in {"num_readers": num_readers, "num_samples": num_samples}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.processor, self.num_readers, self.num_samples = processor, num_readers, num_samples

    @property
    def tokenizer(self) -> ProbabilisticSamProcessor:
        """The processor, under the name by which `Trainer` saves it in every checkpoint."""
        return self.processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch."""
        items = []
        for index, row in enumerate(rows):
            try:
                items.append(self.features(row))
            except ValueError as error:
                raise ValueError(f"row {index} of the batch: {error}") from error
        if len({frozenset(item) for item in items}) > 1:
            kinds = sorted({" and ".join(name for name in PROMPTS[:2] if name in item) for item in items})
            raise ValueError(f"the rows of a batch need prompts of one kind, got {', '.join(kinds)}")
        pad_points(items)
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return batch | {"num_samples": torch.full((len(rows),), self.num_samples)}

    def features(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Features of one row."""
        for name in ("image", "masks"):
            if row.get(name) is None:
                raise ValueError(f"no {name!r} among its columns {', '.join(map(str, row))}")
        with_points = row.get("input_points") is not None
        for name in (str(key) for key, value in row.items() if key not in PROMPTS and value is not None):
            if MISTAKEN.fullmatch(name) or (with_points and MISTAKEN_WITH_POINTS.fullmatch(name)):
                raise ValueError(
                    f"it has the column {name!r}, which is not read; accepted: {', '.join(PROMPTS)}, or no such column"
                )
        masks = [np.asarray(open_image(encoded_or_image(mask))) for mask in row["masks"] if mask is not None]
        if len(masks) > self.num_readers:
            raise ValueError(f"{len(masks)} masks, but num_readers is {self.num_readers}")
        prompt: dict[str, Any] = {name: [row[name]] for name in PROMPTS if row.get(name) is not None}
        if not prompt:
            prompt = {"input_boxes": [[union_box(masks)]]}
        image = encoded_or_image(row["image"])
        inputs = self.processor(images=[image], segmentation_maps=[masks], **prompt)
        if inputs["labels"].shape[:2] != (1, 1):
            raise ValueError("it has several prompts; accepted: one prompt per row")
        labels, annotated = inputs["labels"][0], inputs["annotated"][0]  # (1, R, h, w), (1, R)
        missing = self.num_readers - len(masks)
        return {name: inputs[name][0] for name in ("pixel_values", *PROMPTS) if name in inputs} | {
            "labels": F.pad(labels, (0, 0, 0, 0, 0, missing)),
            "reader_mask": torch.arange(self.num_readers)[None] < len(masks),
            "annotated": F.pad(annotated, (0, missing)),
        }


def encoded_or_image(value: Any) -> Any:
    """The bytes of an image that a dataset has not decoded; other images unchanged."""
    return value["bytes"] if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes) else value


def union_box(masks: Sequence[np.ndarray]) -> list[float]:
    """Tight box x1, y1, x2, y2 around the union of masks (H, W), measured at pixel edges.

    Raises:
        ValueError: no mask, masks of different sizes, or every mask is empty.
    """
    if not masks or len({mask.shape for mask in masks}) > 1 or masks[0].ndim != 2:
        sizes = ", ".join(str(mask.shape) for mask in masks) or "none"
        raise ValueError(f"it needs masks (H, W) of one size, at least one, got {sizes}")
    rows, columns = np.nonzero(np.any([mask != 0 for mask in masks], axis=0))
    if not len(rows):
        raise ValueError("every mask is empty, so there is no box around them; give input_boxes or input_points")
    return [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]


__all__ = ["ProbabilisticSamCollator"]
