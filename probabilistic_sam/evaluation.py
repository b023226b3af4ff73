"""Scoring a model's samples on the rows of a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from .data import row_prompt, row_seed
from .data.format import decode_image, decode_masks
from .errors import UserError
from .metrics import slice_collapse, slice_metrics
from .metrics.functional import majority_mask

ORACLES = ("oracle:majority", "oracle:readers")
IDENTITY = ["patient_id", "scan_id", "nodule_id", "slice_index", "image_id", "source"]
SELECTION = "the first max_slices of the split in the order of a hash of each slice's identity"
READER_BOX_NOTE = (
    "num_samples samples were generated with each reader's own box, which reveals the answer: dice_max_per_reader, "
    "dice_mean and iou_mean compare a reader only with the samples of their own box; all other metrics score the "
    "union of the samples of all readers, num_samples * readers of them"
)


def choose_rows(dataset: datasets.Dataset, count: int | None, purpose: str) -> list[int]:
    """Indices of the first `count` rows in the order of a hash, ascending; all rows where `count` is None.

    Args:
        dataset: rows of a split; their order does not change the choice.
        count: how many.
        purpose: part of what is hashed, so that rows are chosen independently for different purposes.
    """
    keys = [row_seed(row, purpose) for row in dataset.select_columns(IDENTITY)]
    return sorted(sorted(range(len(keys)), key=keys.__getitem__)[:count])


def evaluate_dataset(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    prompt: str,
    num_samples: int,
    seeds: Sequence[int],
    batch_size: int,
    state: PartialState,
    device: torch.device | str = "cpu",
    independent: bool = False,
) -> tuple[list[str], list[list[dict]]]:
    """Score a dataset with all processes.

    Whole batches are distributed among the processes. A batch therefore holds the same rows whatever the number of
    processes, and the floating-point results are identical.

    Args:
        model: see `evaluate_rows`, also for the other arguments that are not explained here.
        processor: see there.
        dataset: rows to score.
        prompt: see there.
        num_samples: see there.
        seeds: see there.
        batch_size: rows per batch.
        state: of the processes.
        device: see there.
        independent: see there.

    Returns:
        The patient of each row, and for each seed the scores of all rows, in the order of the dataset.
    """
    starts = range(0, len(dataset), batch_size)[state.process_index :: state.num_processes]
    mine = []
    with tqdm(total=len(dataset), unit="slice", desc="evaluate", disable=not state.is_main_process) as progress:
        for start in starts:
            indices = range(start, min(start + batch_size, len(dataset)))
            rows = [dataset[index] for index in indices]
            scores = evaluate_rows(model, processor, rows, prompt, num_samples, seeds, device, independent)
            mine += [(i, row["patient_id"], by_seed) for i, row, by_seed in zip(indices, rows, scores, strict=True)]
            # The other processes are about as far
            progress.update(min(len(rows) * state.num_processes, len(dataset) - progress.n))
    gathered = sorted(gather_object(mine), key=lambda item: item[0])
    patients = [patient for _, patient, _ in gathered]
    return patients, [[by_seed[number] for _, _, by_seed in gathered] for number in range(len(seeds))]


def evaluate_rows(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    prompt: str,
    num_samples: int,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    independent: bool = False,
) -> list[list[dict]]:
    """Sample masks for one batch of rows and score them.

    A model with `get_image_embeddings` encodes the batch at once. Samples are generated row by row, because each row
    has its own random generator.

    Args:
        model: has `sample(pixel_values, input_boxes, num_samples, generator)`; with `get_image_embeddings` also
            `sample(image_embeddings=...)`; with `posterior` takes `labels` like `ProbabilisticSamModel`. Or an
            `Oracle`, which uses neither processor nor prompt.
        processor: `ProbabilisticSamProcessor`, or one with the same arguments and outputs.
        rows: of a dataset build.
        prompt: one of `probabilistic_sam.data.PROMPTS`. With `reader_box`, `num_samples` samples are generated for
            each reader's box, see `slice_metrics(owners=...)`.
        num_samples: masks per prompt.
        seeds: of the samples; the prompt is the same for all of them.
        device: of the model.
        independent: generate each sample in a separate call. Samples of one call may depend on each other, since a
            model may spread them evenly over the distribution.

    Returns:
        For each row and each seed, what `slice_metrics` returns. The first seed also has `collapse`, what
        `latent_state` returns, if the model has a `posterior` and the prompt is not `reader_box`.

    Raises:
        UserError: the model returns another number of masks, or logits that are not finite.
    """
    all_masks = [decode_masks(row) for row in rows]
    if isinstance(model, Oracle):
        return [
            [score_oracle(model, masks, num_samples, row_seed(row, f"samples {seed} None")) for seed in seeds]
            for row, masks in zip(rows, all_masks, strict=True)
        ]
    has_latent_state = hasattr(model, "posterior") and prompt != "reader_box"
    windows = []  # (row, reader whose box it is or None, features), one per row, with reader_box one per reader
    for index, (row, masks) in enumerate(zip(rows, all_masks, strict=True)):
        readers = {"segmentation_maps": [masks]} if has_latent_state else {}
        for reader in range(len(masks)) if prompt == "reader_box" else [None]:
            given = nest_prompt(row_prompt(row, masks, prompt, reader)) | readers
            windows.append((index, reader, processor(images=[decode_image(row)], return_tensors="pt", **given)))

    results: list[list[dict]] = [[] for _ in rows]
    with torch.inference_mode():
        name, images = "pixel_values", torch.cat([item["pixel_values"] for _, _, item in windows]).to(device)
        if hasattr(model, "get_image_embeddings"):
            name, images = "image_embeddings", model.get_image_embeddings(images)
        for seed in seeds:
            logits: list[list[torch.Tensor]] = [[] for _ in rows]
            latent_states: list[dict[str, Any]] = [{} for _ in rows]
            for number, (index, reader, item) in enumerate(windows):
                inputs = {key: value.to(device) for key, value in item.items() if key.startswith("input_")}
                inputs[name] = images[number : number + 1]
                # A seed for each row and reader, so that results do not depend on batches or processes
                generator = torch.Generator().manual_seed(row_seed(rows[index], f"samples {seed} {reader}"))
                pred_masks = sample_logits(model, inputs, num_samples, generator, independent)
                logits[index] += processor.post_process_logits(pred_masks, item["windows"], item["original_sizes"])
                if has_latent_state and seed == seeds[0]:  # after sampling, whose noise must not depend on it
                    labels, annotated = item["labels"][0, 0].bool(), item["annotated"][0, 0]
                    latent_states[index]["collapse"] = latent_state(model, inputs, labels, annotated, generator)
            for index, masks in enumerate(all_masks):
                sampled = torch.cat(logits[index]).float()  # (N, H, W); with reader_box N per reader
                samples, probabilities = (sampled > 0).cpu().numpy(), sampled.sigmoid().cpu().numpy()
                owners = np.repeat(np.arange(len(masks)), num_samples) if prompt == "reader_box" else None
                results[index].append(slice_metrics(samples, probabilities, masks, owners) | latent_states[index])
    return results


def nest_prompt(prompt: Mapping[str, Any]) -> dict[str, list]:
    """One prompt as the processor takes it: a list of images, of prompts, and for points of points."""
    if "input_boxes" in prompt:
        return {"input_boxes": [[prompt["input_boxes"]]]}
    return {"input_points": [[[prompt["input_points"]]]], "input_labels": [[[prompt["input_labels"]]]]}


def sample_logits(
    model: Any, inputs: Mapping[str, Any], num_samples: int, generator: torch.Generator, independent: bool
) -> torch.Tensor:
    """Logits (1, 1, N, h, w) of the samples for one window, from one call or from one call per sample."""
    calls = [1] * num_samples if independent else [num_samples]
    sampled = [model.sample(**inputs, num_samples=count, generator=generator).pred_masks for count in calls]
    pred_masks = torch.cat(sampled, dim=2)
    if pred_masks.shape[2] != num_samples:
        raise UserError(f"sample() returned {pred_masks.shape[2]} masks instead of {num_samples}")
    if not torch.isfinite(pred_masks).all():
        raise UserError("sample() returned logits that are not finite; the model's training may have diverged")
    return pred_masks


def latent_state(
    model: Any,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    annotated: torch.Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What `slice_collapse` returns for the readers of one window.

    Args:
        model: with a posterior.
        inputs: its arguments for one image and one prompt.
        labels: readers' masks (R, h, w) in the window, boolean.
        annotated: (R,) boolean, see `slice_collapse`.
        generator: of the posterior's noise.
    """
    readers = {"labels": labels[None, None], "annotated": annotated[None, None]}
    readers = {name: value.to(model.device) for name, value in readers.items()}
    output = model(**inputs, **readers, generator=generator)
    return slice_collapse(
        output.kl_divergence[0, 0].cpu().numpy(),
        output.posterior_mean[0, 0].cpu().numpy(),
        (output.reconstructed_masks[0, 0] > 0).cpu().numpy(),
        labels.numpy(),
        annotated.numpy(),
    )


class Oracle:
    """A source of samples that sees the readers' masks, and bounds what a model can reach.

    Args:
        kind: one of `ORACLES`.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def sample(self, masks: np.ndarray, num_samples: int, generator: torch.Generator) -> np.ndarray:
        """Samples (N, H, W) for readers' masks (R, H, W), both boolean.

        `oracle:majority` returns the pixels of strictly more than half of the readers, as in the metrics;
        `oracle:readers` chooses readers at random with replacement.
        """
        if self.kind == "oracle:majority":
            return np.repeat(majority_mask(masks)[None], num_samples, axis=0)
        return masks[torch.randint(len(masks), (num_samples,), generator=generator).numpy()]


def score_oracle(oracle: Oracle, masks: np.ndarray, num_samples: int, seed: int) -> dict[str, Any]:
    """What `slice_metrics` returns for an oracle and readers' masks (R, H, W).

    In the column `shape`, which leaves out empty masks, the oracle sees the other readers only. The majority of all
    readers would often be empty there.
    """

    def score(readers: np.ndarray) -> dict[str, Any]:
        samples = oracle.sample(readers, num_samples, torch.Generator().manual_seed(seed))
        return slice_metrics(samples, samples.astype(float), readers)

    scores = score(masks)
    if scores["shape"] is not None:
        rates = {name: scores["shape"][name] for name in ("empty_rate_samples", "empty_rate_readers")}
        scores["shape"] = score(masks[masks.any(axis=(-2, -1))])["shape"] | rates
    return scores
