"""Sample masks of a nodule through the slices of a scan: every sample is one reader in three dimensions.

    with open_scan("series") as scan:
        sampled = sample_scan(model, processor, scan, [139, 253, 234, 322], (12, 20), num_samples=16)
    print(sampled.presence, np.quantile(sampled.volumes_mm3, [0.05, 0.5, 0.95]))

The model sees one slice at a time. All slices share the noise of a sample: see `shared_noise`.

Presence and extent are two answers. A sample annotates slice k if m_k + e > 0, where m_k is the prior's mean of the
presence in that slice and e the shared noise. It annotates the nodule, on at least one slice, if e > -max(m). So

    presence = P(the nodule is outlined) = Phi(max(m)),

and samples given presence have noise from the normal distribution above -max(m); single slices may still be empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from .errors import UserError
from .inference import check_prompt
from .processing_probabilistic_sam import MIN_PRESENCE, ProbabilisticSamProcessor
from .scans import Scan, check_slices
from .shared_noise import shared_samples

BATCH_SLICES = 8
MAX_SAMPLED_VOXELS = 2**30  # samples x voxels of the window; each takes one byte


@dataclass(frozen=True)
class SampledScan:
    """Samples of one nodule.

    Only the window around the prompt is stored; outside of it all masks are empty.

    Args:
        masks: (N, K, h, w) bool, in the window, for K slices.
        mean: (K, h, w) probability, averaged over the samples.
        presence: probability that a reader outlines the nodule on at least one slice.
        given_presence: whether the samples are those of readers who outline the nodule, or of all readers.
        box: x1, y1, x2, y2 in pixels of a slice.
        slices: first and last slice.
        corner: row and column of the window's first pixel in a slice.
        spacing_mm: distance between slices, rows and columns.
        seed: of the noise.
        threshold: probability above which a voxel belongs to a mask.
    """

    masks: np.ndarray
    mean: np.ndarray
    presence: float
    given_presence: bool
    box: tuple[float, float, float, float]
    slices: tuple[int, int]
    corner: tuple[int, int]
    spacing_mm: tuple[float, float, float]
    seed: int
    threshold: float

    @property
    def volumes_mm3(self) -> np.ndarray:
        """Volume of each sample (N,)."""
        return self.masks.sum(axis=(1, 2, 3)) * math.prod(self.spacing_mm)

    @property
    def diameters_mm(self) -> np.ndarray:
        """Longest diameter of each sample in any slice (N,), 0 for an empty sample."""
        return np.array(
            [max(longest_diameter(mask, self.spacing_mm[1:]) for mask in sample) for sample in self.masks], dtype=float
        )

    @property
    def empty_shares(self) -> np.ndarray:
        """Share of samples that are empty in each slice (K,); NaN without samples."""
        if not len(self.masks):
            return np.full(self.masks.shape[1], np.nan)
        return (~self.masks.any(axis=(2, 3))).mean(axis=0)


@torch.no_grad()
def sample_scan(
    model: Any,
    processor: ProbabilisticSamProcessor,
    scan: Scan,
    box: Sequence[float],
    slices: tuple[int, int],
    num_samples: int = 16,
    seed: int = 0,
    threshold: float = 0.5,
    given_presence: bool = True,
) -> SampledScan:
    """Sample masks of one nodule. The same seed gives the same samples.

    Args:
        model: a `ProbabilisticSamModel` on any device, or another model with its `sample` (baselines).
        processor: the one saved with the model.
        scan: an open scan.
        box: x1, y1, x2, y2 in pixels of a slice, around the nodule on all its slices.
        slices: first and last slice of the nodule. The model has only seen slices that some reader annotated, so it
            cannot tell where a nodule ends: choose the range by eye.
        num_samples: N.
        seed: of the noise.
        threshold: probability above which a voxel belongs to a mask.
        given_presence: sample readers who outline the nodule; none if the presence is below 1 %, because the model
            cannot have learnt what so few readers would outline. A model without presence has fewer than N samples
            given presence: those that are not empty. False samples all readers, of whom a share of 1 - presence is
            empty.

    Raises:
        UserError: box or slices outside the scan, too many samples, or logits that are not finite.
    """
    first, last = slices
    check_slices(first, last, scan)
    check_prompt({"box": box}, scan.shape[2], scan.shape[1])
    values = scan.read(first, last)
    inputs = [
        processor(images=list(part), input_boxes=[[list(box)]] * len(part))
        for part in np.split(values, range(BATCH_SLICES, len(values), BATCH_SLICES))
    ]
    window = inputs[0]["windows"][0].tolist()  # the same for all slices
    left, top, right, bottom = clipped(window, scan.shape[2], scan.shape[1])
    if num_samples * len(values) * (right - left) * (bottom - top) > MAX_SAMPLED_VOXELS:
        most = MAX_SAMPLED_VOXELS // (len(values) * (right - left) * (bottom - top))
        raise UserError(
            f"{num_samples} samples of {len(values)} slices in a window of {right - left} x {bottom - top} pixels "
            f"need too much memory; accepted: at most {most} samples"
        )
    embeddings = [model.get_image_embeddings(item["pixel_values"].to(model.device)) for item in inputs]
    boxes = [item["input_boxes"].to(model.device) for item in inputs]
    presence, logits = shared_samples(model, embeddings, boxes, num_samples, seed, given_presence)

    masks = np.empty((num_samples, len(values), bottom - top, right - left), bool)
    mean = np.empty(masks.shape[1:], np.float32)
    # Pasted into the window clipped to the slice instead of the whole slice
    place = torch.tensor([[window[0] - left, window[1] - top, window[2]]])
    size = torch.tensor([masks.shape[2:]])
    for index, item in enumerate(slice_logits for batch in logits for slice_logits in batch):
        try:
            (result,) = processor.post_process_samples(item[None].cpu(), place, size, threshold=threshold)
        except ValueError as error:
            raise UserError(str(error)) from error
        masks[:, index], mean[index] = result["masks"].numpy(), result["mean"].numpy()
    if presence is None:
        outlined = masks.any(axis=(1, 2, 3))
        presence = float(outlined.mean())
        if given_presence and outlined.any():
            masks = masks[outlined]
            mean = masks.mean(axis=0, dtype=np.float32)
    if given_presence and presence < MIN_PRESENCE:
        masks, mean = masks[:0], np.zeros_like(mean)
    x1, y1, x2, y2 = (float(value) for value in box)
    return SampledScan(
        masks, mean, presence, given_presence, (x1, y1, x2, y2), (first, last), (top, left), scan.spacing_mm, seed,
        threshold,
    )  # fmt: skip


def clipped(window: Sequence[int], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of a window (x, y, side) inside an image."""
    x, y, side = window
    return max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)


def longest_diameter(mask: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Longest distance between two points of a mask's outline, in mm; 0 for an empty mask.

    This is the longest diameter of RECIST 1.1 in one axial slice. The outline follows the pixels' edges.

    Args:
        mask: (h, w) bool.
        spacing_mm: distance between rows and between columns.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return 0.0
    lines = mask[rows]
    left, right = lines.argmax(axis=1), mask.shape[1] - lines[:, ::-1].argmax(axis=1)
    corners = [(rows + down, side) for down in (0, 1) for side in (left, right)]
    points = np.concatenate([np.stack(corner, axis=1) for corner in corners]) * np.asarray(spacing_mm)
    return float(pdist(points[ConvexHull(points).vertices]).max())
