"""Scoring a model's samples on the rows of a dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import probabilistic_sam.baselines  # noqa: F401  (registers all our models for AutoModel and AutoProcessor)

from .data import make_prompt, row_seed
from .data.format import decode_image, decode_masks
from .errors import UserError
from .metrics import slice_collapse, slice_metrics
from .metrics.functional import majority_mask
from .training.windows import View, view_annotated, view_masks

ORACLES = ("oracle:majority", "oracle:readers")
IDENTITY = ["patient_id", "scan_id", "nodule_id", "slice_index", "source"]
SELECTION = "the first max_slices of the split in the order of a hash of each slice's identity"
READER_BOX_NOTE = (
    "num_samples samples were drawn with each reader's own box, the answer to the question: dice_max_per_reader, "
    "dice_mean and iou_mean score a reader with the samples of his own box; all other metrics score the union of the "
    "samples of all readers, num_samples * readers of them"
)


class Oracle:
    """Draws masks from the readers' own; `kind` is one of `ORACLES`."""

    def __init__(self, kind: str):
        self.kind = kind

    def sample(self, masks: np.ndarray, num_samples: int, generator: torch.Generator) -> np.ndarray:
        """Readers' masks (R, H, W) to samples (N, H, W), boolean both.

        The majority is strictly more than half of the readers, so that a tie is not drawn, as in the metrics. Readers
        are chosen with replacement.
        """
        if self.kind == "oracle:majority":
            return np.repeat(majority_mask(masks)[None], num_samples, axis=0)
        return masks[torch.randint(len(masks), (num_samples,), generator=generator).numpy()]


def load_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """Open a model and its processor; refuse weights that are incomplete and models that cannot draw samples.

    An oracle has no processor.
    """
    if name in ORACLES:
        return Oracle(name), None
    try:
        model, info = AutoModel.from_pretrained(name, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: does not open as a model with a processor: {reason}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name}: weights lack {len(missing)} parameters of the model, {missing[0]} the first of them")
    if not hasattr(model, "sample"):
        raise UserError(
            f"{name}: {type(model).__name__} has no sample(); accepted: Probabilistic SAM and its baselines"
        )
    return model.to(device).eval(), processor


def choose_slices(dataset: datasets.Dataset, max_slices: int | None) -> datasets.Dataset:
    """The rows to score: all, or the first `max_slices` by hash, kept in the order of the file."""
    if max_slices is None or max_slices >= len(dataset):
        return dataset
    keys = [row_seed(row, "evaluated slices") for row in dataset.select_columns(IDENTITY)]
    return dataset.select(sorted(np.argsort(keys, kind="stable")[:max_slices].tolist()))


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
    """Draw samples for one batch of rows and score them.

    The batch goes through the image encoder once when the model has `get_image_embeddings`; samples are then drawn row
    by row, because every row has a generator of its own.

    Args:
        model: has `sample(pixel_values, input_boxes, num_samples, generator)`; with `get_image_embeddings` also
            `sample(image_embeddings=...)`; with `posterior` takes `labels` as `ProbabilisticSamModel` does. Or an
            `Oracle`, for which neither processor nor prompt matter.
        processor: `ProbabilisticSamProcessor` or one that works like it.
        rows: of a dataset build.
        prompt: one of `probabilistic_sam.data.PROMPTS`. With `reader_box` `num_samples` samples are drawn with each
            reader's box, see `slice_metrics(owners=...)`.
        num_samples: masks a prompt.
        seeds: of the samples; the prompt is the same for all of them.
        device: where the model is.
        independent: draw each sample by a call of its own. A model may spread samples that it draws together.

    Returns:
        For each row, for each seed what `slice_metrics` returns. With the first seed there is also `collapse`, what
        `slice_collapse` returns, if the model has a `posterior` and the prompt is one for all readers.
    """
    all_masks = [decode_masks(row) for row in rows]
    if isinstance(model, Oracle):
        return [
            [score_oracle(model, masks, num_samples, row_seed(row, f"samples {seed} None")) for seed in seeds]
            for row, masks in zip(rows, all_masks, strict=True)
        ]
    prompts = []  # (row, reader whose box it is or None, features of one window), one or `readers` a row
    for index, (row, masks) in enumerate(zip(rows, all_masks, strict=True)):
        image = decode_image(row)
        for reader in range(len(masks)) if prompt == "reader_box" else [None]:
            made = make_prompt(masks, prompt, np.random.default_rng(row_seed(row, prompt)), reader=reader)
            prompts.append((index, reader, processor(images=[image], return_tensors="pt", **nest_prompt(made))))

    results: list[list[dict]] = [[] for _ in rows]
    looks_inside = hasattr(model, "posterior") and prompt != "reader_box"
    with torch.inference_mode():
        name, images = "pixel_values", torch.cat([item["pixel_values"] for _, _, item in prompts]).to(device)
        if hasattr(model, "get_image_embeddings"):
            name, images = "image_embeddings", model.get_image_embeddings(images)
        for seed in seeds:
            logits: list[list[torch.Tensor]] = [[] for _ in rows]
            latent_spaces: list[dict | None] = [None for _ in rows]
            for window, (index, reader, item) in enumerate(prompts):
                inputs = {key: value.to(device) for key, value in item.items() if key.startswith("input_")}
                inputs[name] = images[window : window + 1]
                # A seed for each row (and box), so that neither the batch nor the process matters.
                generator = torch.Generator().manual_seed(row_seed(rows[index], f"samples {seed} {reader}"))
                calls = [1] * num_samples if independent else [num_samples]
                sampled = [
                    model.sample(**inputs, num_samples=count, generator=generator).pred_masks for count in calls
                ]
                pred_masks = torch.cat(sampled, dim=2)
                if pred_masks.shape[2] != num_samples:
                    raise UserError(f"sample() drew {pred_masks.shape[2]} masks instead of {num_samples}")
                if not torch.isfinite(pred_masks).all():
                    raise UserError("sample() gave logits that are not finite: has the model's training diverged?")
                logits[index] += processor.post_process_logits(pred_masks, item["windows"], item["original_sizes"])
                if looks_inside and seed == seeds[0]:  # after the samples, whose noise must not depend on it
                    view = window_view(item["windows"])
                    targets = view_masks(all_masks[index], view, pred_masks.shape[-1])
                    annotated = view_annotated(all_masks[index], view)
                    latent_spaces[index] = look_inside(model, inputs, targets, annotated, generator)
            for index, masks in enumerate(all_masks):
                sampled_logits = torch.cat(logits[index]).float()  # (N, H, W), N for each reader with reader_box
                samples, probabilities = (sampled_logits > 0).cpu().numpy(), sampled_logits.sigmoid().cpu().numpy()
                owners = np.repeat(np.arange(len(masks)), num_samples) if prompt == "reader_box" else None
                scores: dict[str, Any] = slice_metrics(samples, probabilities, masks, owners)
                latent_space = latent_spaces[index]
                results[index].append(scores if latent_space is None else scores | {"collapse": latent_space})
    return results


def score_oracle(oracle: Oracle, masks: np.ndarray, num_samples: int, seed: int) -> dict[str, Any]:
    """Metrics of what an oracle draws for readers' masks (R, H, W).

    The column `shape` has only readers who drew, so its oracle knows no others: a majority of all readers would often
    be empty there.
    """

    def score(readers: np.ndarray) -> dict[str, Any]:
        samples = oracle.sample(readers, num_samples, torch.Generator().manual_seed(seed))
        return slice_metrics(samples, samples.astype(float), readers)

    scores = score(masks)
    if scores["shape"] is not None:
        rates = {name: scores["shape"][name] for name in ("empty_rate_samples", "empty_rate_readers")}
        scores["shape"] = score(masks[masks.any(axis=(-2, -1))])["shape"] | rates
    return scores


def window_view(windows: torch.Tensor) -> View:
    """The window (1, 3) that the processor cut, as a view."""
    x, y, side = windows[0].tolist()
    return View(0, False, (x, y, side), 1.0)


def look_inside(
    model: Any,
    inputs: Mapping[str, Any],
    targets: torch.Tensor,
    annotated: torch.Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What the readers' masks (R, h, w) of one window, (R,) of them annotated, become in the model's latent space."""
    readers = {"labels": targets[None, None], "annotated": annotated[None, None]}
    readers = {name: value.to(model.device) for name, value in readers.items()}
    output = model(**inputs, **readers, generator=generator)
    return slice_collapse(
        output.kl_divergence[0, 0].cpu().numpy(),
        output.posterior_mean[0, 0].cpu().numpy(),
        (output.reconstructed_masks[0, 0] > 0).cpu().numpy(),
        targets.numpy(),
        annotated.numpy(),
    )


def nest_prompt(prompt: Mapping[str, Any]) -> dict[str, list]:
    """One prompt as the processor takes it: a list of images, of prompts, and for points of points."""
    if "input_boxes" in prompt:
        return {"input_boxes": [[prompt["input_boxes"]]]}
    return {"input_points": [[[prompt["input_points"]]]], "input_labels": [[[prompt["input_labels"]]]]}


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
    """Score a dataset with all processes: the patients and, for each seed, the metrics of all slices in order.

    Whole batches are dealt out to the processes, so a batch holds the same rows however many there are, and its
    floating-point results are the same too.
    """
    starts = range(0, len(dataset), batch_size)[state.process_index :: state.num_processes]
    mine = []
    with tqdm(total=len(dataset), unit="slice", desc="evaluate", disable=not state.is_main_process) as progress:
        for start in starts:
            indices = range(start, min(start + batch_size, len(dataset)))
            rows = [dataset[index] for index in indices]
            scores = evaluate_rows(model, processor, rows, prompt, num_samples, seeds, device, independent)
            mine += [(i, row["patient_id"], by_seed) for i, row, by_seed in zip(indices, rows, scores, strict=True)]
            # The others are about as far.
            progress.update(min(len(rows) * state.num_processes, len(dataset) - progress.n))
    gathered = sorted(gather_object(mine), key=lambda item: item[0])
    patients = [patient for _, patient, _ in gathered]
    return patients, [[by_seed[number] for _, _, by_seed in gathered] for number in range(len(seeds))]
