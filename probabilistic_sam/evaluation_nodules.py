"""Scoring a model's samples of whole nodules as volumes.

As in `evaluation`, workers decode and score while this process samples on the device: `prepare_nodule` (in workers)
decodes the slices of a nodule and cuts their windows, `sample_nodules` samples those of several nodules at once, and
`score_nodule` (in workers) puts the slices of each sample together and computes the metrics of the volumes.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from tqdm import tqdm

from .data import NODULE_BOX, nodule_prompt, row_prompt, row_seed
from .data.format import decode_image
from .data.volumes import NoduleSlices, stack_masks
from .errors import UserError
from .evaluation import BATCHES_AHEAD, Oracle, Sampling, ScoredRow, cut_windows, gather, sample_batch
from .metrics import nodule_metrics
from .metrics.functional import bounding_box, mean_mask
from .shared_noise import shared_generators
from .workers import InThisProcess, read_ahead

NODULE_PROMPTS = (NODULE_BOX, "union_box")
NOISES = ("shared", "independent")
QUANTILE_LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))


class PreparedNodule(NamedTuple):
    """A decoded nodule of K slices.

    Args:
        nodule: its place in the dataset.
        rows: of the dataset, without images and masks.
        masks: (R, K, H, W) bool, of the readers.
        inputs: the processor's output for K windows as arrays; empty for an oracle.
    """

    nodule: NoduleSlices
    rows: list[dict[str, Any]]
    masks: np.ndarray
    inputs: dict[str, np.ndarray]


class SliceSamples(NamedTuple):
    """Samples of one slice, cut to its window, since they are empty outside.

    Args:
        rows, columns: the window's part of the slice.
        shape: of the masks in the window: N, h, w.
        bits: the masks, packed.
        mean_mask: (h, w) bool, where the mean probability exceeds 1/2.
    """

    rows: slice
    columns: slice
    shape: tuple[int, ...]
    bits: np.ndarray
    mean_mask: np.ndarray


def evaluate_nodules(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    nodules: Sequence[NoduleSlices],
    sampling: Sampling,
    noise: str,
    batch_size: int,
    state: Any,
    device: torch.device | str = "cpu",
    workers: Executor | None = None,
) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Score nodules with all processes. The results do not depend on the number of processes or workers.

    Args:
        model: see `evaluation.evaluate_dataset`, also for the arguments that are not explained here.
        processor: see there.
        dataset: the rows of the nodules.
        nodules: of `group_nodules`.
        sampling: with one of `NODULE_PROMPTS`.
        noise: one of `NOISES`. `shared`: a sample has the same noise on all slices of a nodule, so it is one reader.
            `independent`: each slice has its own noise, as in `evaluate_dataset`.
        batch_size: slices per call of the model.
        state: see there.
        device: see there.
        workers: see there.

    Returns:
        The patient of each nodule, and for each seed what `score_nodule` returns for all nodules.

    Raises:
        UserError: rows that cannot be decoded or are no nodule, or what the model returns cannot be scored.
    """
    workers = workers or InThisProcess()
    groups = group_by_size([len(nodule.rows) for nodule in nodules], batch_size)
    groups = groups[state.process_index :: state.num_processes]
    needed = None if isinstance(model, Oracle) else processor
    prepared = read_nodules(needed, dataset, nodules, groups, sampling.prompt, workers)
    submitted = (
        (numbers, submit_scores(model, processor, group, sampling, noise, batch_size, device, workers))
        for numbers, group in prepared
    )
    scored = []
    with tqdm(total=len(nodules), unit="nodule", desc="evaluate", disable=not state.is_main_process) as progress:
        for numbers, futures in read_ahead(submitted, BATCHES_AHEAD):
            for number, by_seed in zip(numbers, futures, strict=True):
                scores = [future.result() for future in by_seed]
                scored.append(ScoredRow(number, nodules[number].patient_id, scores))
            # The other processes are about as far
            progress.update(min(state.num_processes * len(numbers), len(nodules) - progress.n))
    return gather(scored, sampling.seeds)


def group_by_size(sizes: Sequence[int], most: int) -> list[range]:
    """Ranges of neighbours with at most `most` slices together; a nodule with more is alone."""
    starts = [0]
    for number in range(1, len(sizes)):
        if sum(sizes[starts[-1] : number + 1]) > most:
            starts.append(number)
    return [range(first, last) for first, last in pairwise([*starts, len(sizes)])]


def read_nodules(
    processor: Any,
    dataset: datasets.Dataset,
    nodules: Sequence[NoduleSlices],
    groups: Sequence[range],
    prompt: str,
    workers: Executor,
) -> Iterator[tuple[range, list[PreparedNodule]]]:
    """Groups of nodules, as numbers and decoded; workers prepare the next ones meanwhile."""
    rows = dataset.with_format("arrow")

    def submitted() -> Iterator[tuple[range, list[Future]]]:
        for group in groups:
            futures = []
            for nodule in (nodules[number] for number in group):
                encoded = rows[list(nodule.rows)].to_pylist()  # decoded by the workers
                futures.append(workers.submit(prepare_nodule, nodule, encoded, processor, prompt))
            yield group, futures

    for group, futures in read_ahead(submitted(), BATCHES_AHEAD):
        yield group, [future.result() for future in futures]


def prepare_nodule(
    nodule: NoduleSlices, rows: Sequence[Mapping[str, Any]], processor: Any, prompt: str
) -> PreparedNodule:
    """Decode the slices of a nodule and cut their windows; without a processor there are none."""
    masks = stack_masks(nodule, rows)
    inputs: dict[str, np.ndarray] = {}
    if not masks.any():
        raise UserError(f"{nodule}: all masks are empty; accepted: nodules that at least one reader annotated")
    if processor is not None:
        boxes = [[box] for box in slice_boxes(nodule, rows, masks, prompt)]
        images = [decode_image(row, masks.shape[2:]) for row in rows]
        features = processor(images=images, input_boxes=boxes, return_tensors="pt")
        inputs = {name: value.numpy() for name, value in features.items()}
    columns = [{name: value for name, value in row.items() if name not in ("image", "masks")} for row in rows]
    return PreparedNodule(nodule, columns, masks, inputs)


def slice_boxes(nodule: NoduleSlices, rows: Sequence[Mapping[str, Any]], masks: np.ndarray, prompt: str) -> list[Any]:
    """The box of each slice, in pixels: one for all with `nodule_box`, otherwise its own.

    Raises:
        UserError: a slice that no reader annotated has no box of its own.
    """
    if prompt == NODULE_BOX:
        return [nodule_prompt(rows[0], np.asarray(masks.any(axis=(0, 1))))["input_boxes"]] * len(rows)
    try:
        of_slices = np.moveaxis(masks, 1, 0)
        return [row_prompt(row, item, prompt)["input_boxes"] for row, item in zip(rows, of_slices, strict=True)]
    except ValueError as error:
        raise UserError(f"{nodule}: prompt {prompt} of a slice: {error}; accepted: the prompt {NODULE_BOX}") from error


# ------------------------------------------------------------------------------------------------------------- samples


def submit_scores(
    model: Any,
    processor: Any,
    group: list[PreparedNodule],
    sampling: Sampling,
    noise: str,
    batch_size: int,
    device: torch.device | str,
    workers: Executor,
) -> list[list[Future]]:
    """The scores to come of each nodule of a group and each seed; for the arguments see `evaluate_nodules`."""
    result: list[list[Future]] = [[] for _ in group]
    if isinstance(model, Oracle):
        for item, by_seed in zip(group, result, strict=True):
            seeds = [row_seed(item.rows[0], f"samples {seed} None") for seed in sampling.seeds]
            by_seed += [
                workers.submit(score_oracle_nodule, model, item.nodule, item.masks, sampling.num_samples, seed)
                for seed in seeds
            ]
        return result
    for samples in sample_nodules(model, processor, group, sampling, noise, batch_size, device):
        for item, slices, by_seed in zip(group, samples, result, strict=True):
            by_seed.append(workers.submit(score_nodule, item.nodule, item.masks, slices))
    return result


@torch.inference_mode()
def sample_nodules(
    model: Any,
    processor: Any,
    group: list[PreparedNodule],
    sampling: Sampling,
    noise: str,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[list[list[SliceSamples]]]:
    """For each seed the samples of all slices of each nodule of a group; see `evaluate_nodules`."""
    names = list(group[0].inputs)
    tensors = {name: torch.from_numpy(np.concatenate([item.inputs[name] for item in group])) for name in names}
    windows, sizes = tensors.pop("windows"), tensors.pop("original_sizes")
    parts = []  # of at most `batch_size` slices, encoded once for all seeds
    for first in range(0, len(windows), batch_size):
        part = slice(first, first + batch_size)
        inputs = {name: value[part].to(device, non_blocking=True) for name, value in tensors.items()}
        if hasattr(model, "get_image_embeddings"):
            inputs["image_embeddings"] = model.get_image_embeddings(inputs.pop("pixel_values"))
        parts.append((part, inputs))
    ends = list(accumulate(len(item.rows) for item in group))
    for seed in sampling.seeds:
        generators = [generator for item in group for generator in slice_generators(item, seed, noise)]
        slices: list[SliceSamples] = []
        for part, inputs in parts:
            pred_masks, _ = sample_batch(model, inputs, sampling, generators[part])
            for rows, columns, logits in cut_windows(processor, pred_masks, windows[part], sizes[part]):
                bits = np.packbits((logits > 0).cpu().numpy())
                mean = mean_mask(logits.sigmoid().mean(dim=0).cpu().numpy())
                slices.append(SliceSamples(rows, columns, tuple(logits.shape), bits, mean))
        yield [slices[first:last] for first, last in pairwise([0, *ends])]


def slice_generators(item: PreparedNodule, seed: int, noise: str) -> list[torch.Generator]:
    """A generator for each slice of a nodule, seeded as that of the slice, or all as that of the first slice."""
    seeds = [row_seed(row, f"samples {seed} None") for row in item.rows]
    if noise == "shared":
        return shared_generators(seeds[0], len(seeds))
    return [torch.Generator().manual_seed(value) for value in seeds]


# -------------------------------------------------------------------------------------------------------------- scores


def score_nodule(nodule: NoduleSlices, masks: np.ndarray, slices: Sequence[SliceSamples]) -> dict[str, Any]:
    """Scores of the samples of a nodule, which are put together from those of its slices.

    Args:
        nodule: for the volume of a voxel.
        masks: (R, K, H, W) bool, of the readers.
        slices: samples of the K slices.

    Returns:
        See `score_volumes`.
    """
    seen = np.asarray(masks.any(axis=(0, 1)))
    for item in slices:
        seen[item.rows, item.columns] = True
    region = bounding_box(seen)  # of windows and readers: the rest of the slices has no voxel of either
    samples = np.stack([paste_samples(item, region) for item in slices], axis=1)
    means = np.zeros((1, *masks.shape[1:]), dtype=bool)
    for mean, item in zip(means[0], slices, strict=True):
        mean[item.rows, item.columns] = item.mean_mask
    return score_volumes(nodule, masks[:, :, *region], samples, means[:, :, *region])


def paste_samples(item: SliceSamples, region: tuple[slice, slice]) -> np.ndarray:
    """The samples (N, h, w) of a slice in a region, rows and columns, that contains their window."""
    rows, columns = region
    result = np.zeros((item.shape[0], rows.stop - rows.start, columns.stop - columns.start), dtype=bool)
    top, left, (_, height, width) = item.rows.start - rows.start, item.columns.start - columns.start, item.shape
    place = result[:, top : top + height, left : left + width]
    place[:] = np.unpackbits(item.bits, count=prod(item.shape)).reshape(item.shape)
    return result


def score_oracle_nodule(
    oracle: Oracle, nodule: NoduleSlices, masks: np.ndarray, num_samples: int, seed: int
) -> dict[str, Any]:
    """`score_volumes` of an oracle, which sees the readers' masks (R, K, H, W)."""
    samples = oracle.sample(masks, num_samples, torch.Generator().manual_seed(seed))
    return score_volumes(nodule, masks, samples, mean_mask(samples.mean(axis=0))[None])


def score_volumes(nodule: NoduleSlices, readers: np.ndarray, samples: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
    """Metrics and volumes of one nodule.

    Args:
        nodule: for its identity and the volume of a voxel.
        readers: (R, K, H, W) bool.
        samples: (N, K, H, W) bool.
        mean: (1, K, H, W) bool, the mean mask.

    Returns:
        `samples` and `mean_mask`: `nodule_metrics` of the samples, and of the mean mask as the only sample. `volumes`:
        an entry of `nodules` in a results file.
    """
    metrics: dict[str, Any] = {
        "samples": nodule_metrics(samples, readers, nodule.voxel_mm3),
        "mean_mask": nodule_metrics(mean, readers, nodule.voxel_mm3),
    }
    annotated, sampled = (item.sum(axis=(1, 2, 3)) * nodule.voxel_mm3 for item in (readers, samples))
    visible = sampled[sampled > 0]
    quantiles = np.quantile(visible, QUANTILE_LEVELS).round(2).tolist() if len(visible) else None
    volumes = {
        "patient_id": nodule.patient_id,
        "scan_id": nodule.scan_id,
        "nodule_id": nodule.nodule_id,
        "num_slices": readers.shape[1],
        "readers_mm3": annotated.round(2).tolist(),
        "quantiles_mm3": quantiles,
        "empty_rate_samples": round(float((sampled == 0).mean()), 4),
    }
    volumes |= {name: round(metrics["samples"][name], 6) for name in ("ged_3d", "volume_crps")}
    return metrics | {"volumes": volumes}
