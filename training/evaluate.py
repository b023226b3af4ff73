"""Score a model's samples against the readers' masks and write a results file.

    python training/evaluate.py --model M --dataset DIR --split validation --num_samples 16 --output results.json

The same command under `accelerate launch` or `torchrun` shares the slices among processes and gives the same results:
batches are the same whatever the number of processes, and each slice's samples come from a generator seeded by the
slice and `--seed`. The metrics are those of `probabilistic_sam.metrics`.

A model is anything that `AutoModel.from_pretrained` opens and that has `sample(pixel_values, input_boxes, num_samples,
generator)`; its processor comes from the same place. When it has a `posterior` too, the state of its latent space is
reported under "collapse": see `probabilistic_sam.metrics.collapse`.

Two oracles see the readers' masks instead of image and prompt, and bound what a model can reach: with `--model
oracle:majority` every sample is the majority of the readers, with `oracle:readers` that of a reader chosen at random.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import probabilistic_sam.baselines  # noqa: F401  (registers all our models for AutoModel and AutoProcessor)
from probabilistic_sam import ProbabilisticSamModel
from probabilistic_sam.data import PROMPTS, make_prompt, row_seed
from probabilistic_sam.data.format import decode_image, decode_masks, load_split
from probabilistic_sam.embedding_cache import View, view_annotated, view_masks
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.files import write_json
from probabilistic_sam.metrics import (
    COLUMNS,
    METRICS,
    breakdown,
    calibration_sums,
    patient_sums,
    slice_collapse,
    slice_metrics,
    summarize,
    summarize_collapse,
    summarize_seeds,
)
from probabilistic_sam.metrics.functional import majority_mask
from probabilistic_sam.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scipy")
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

    def draw(self, masks: np.ndarray, num_samples: int, generator: torch.Generator) -> np.ndarray:
        """Readers' masks (R, H, W) to samples (N, H, W), boolean both.

        The majority is strictly more than half of the readers, so that a tie is not drawn, as in the metrics. Readers
        are chosen with replacement.
        """
        if self.kind == "oracle:majority":
            return np.repeat(majority_mask(masks)[None], num_samples, axis=0)
        return masks[torch.randint(len(masks), (num_samples,), generator=generator).numpy()]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score a model's samples against the readers' masks.")
    parser.add_argument(
        "--model", required=True, help=f"directory or Hub name of a model with its processor, or {', '.join(ORACLES)}"
    )
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py: folder or Hub name")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--prompt", default="union_box", choices=PROMPTS)
    parser.add_argument("--num_samples", type=int, default=16, help="masks drawn for each slice")
    parser.add_argument("--output", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument(
        "--independent", action="store_true", help="draw each sample by a call of its own, not all of a slice together"
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of the samples")
    seeds.add_argument("--seeds", type=int, nargs="+", help="several seeds; the results are their mean")
    parser.add_argument("--batch_size", type=int, default=8, help="images encoded at once")
    parser.add_argument("--max_slices", type=int, help=f"score only {SELECTION}")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default what accelerate finds")
    args = parser.parse_args(argv)
    args.seeds = [args.seed] if args.seeds is None else args.seeds
    for name in ("num_samples", "batch_size", "max_slices"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; accepted: 1 or more")
    if args.model.startswith("oracle:") and args.model not in ORACLES:
        raise UserError(f"--model is {args.model}; accepted: a model, {', '.join(ORACLES)}")
    if args.model in ORACLES and args.prompt == "reader_box":
        raise UserError(f"--prompt is reader_box, but {args.model} takes no prompt; accepted: any other, to no effect")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds are {args.seeds}; accepted: different numbers, 0 or more")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a directory; accepted: the name of a file")
    return args


def start_process(device: str | None) -> tuple[PartialState, torch.device]:
    """Join the other processes, if any, and choose this one's device."""
    try:
        wanted = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device is {device!r}; accepted: cpu, cuda, cuda:1, mps and so on") from error
    if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {device!r}, but no CUDA device is available; accepted: cpu")
    # PartialState alone overlooks ACCELERATE_USE_CPU, and without an accelerator each process would think it is alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu if wanted is None else wanted.type == "cpu")
    if wanted is None or state.num_processes > 1 and wanted.type == state.device.type:
        return state, state.device
    if state.num_processes > 1:
        raise UserError(f"--device is {device!r}, but {state.num_processes} processes run on {state.device.type}")
    return state, wanted


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
                drawn = [model.sample(**inputs, num_samples=count, generator=generator).pred_masks for count in calls]
                pred_masks = torch.cat(drawn, dim=2)
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
                drawn_logits = torch.cat(logits[index]).float()  # (N, H, W), N for each reader with reader_box
                samples, probabilities = (drawn_logits > 0).cpu().numpy(), drawn_logits.sigmoid().cpu().numpy()
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
        samples = oracle.draw(readers, num_samples, torch.Generator().manual_seed(seed))
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


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results as text: a row a metric, a column a set of slices, means with 95 % intervals."""

    def cell(entry: Mapping[str, Any]) -> str:
        if entry["mean"] is None:
            return "-"
        low, high = entry["ci95"]
        return f"{entry['mean']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    lines = [f"{'':<20}" + "".join(f"{name} ({results[name]['count']:,})".rjust(26) for name in COLUMNS)]
    lines += [
        f"{metric:<20}" + "".join(cell(results[name][metric]).rjust(26) for name in COLUMNS) for metric in METRICS
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a model and write its results file."""
    args = parse_args(argv)
    dataset = load_split(args.dataset, args.split)
    chosen = choose_slices(dataset, args.max_slices)
    state, device = start_process(args.device)
    if not state.is_main_process:
        transformers.logging.disable_progress_bar()
    model, processor = load_model(args.model, device)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: its folder cannot be made: {error.strerror}") from error
    if not os.access(args.output.parent, os.W_OK):
        raise UserError(f"--output {args.output}: its folder cannot be written to; accepted: one that can")

    # Before the run: the commit may move on while it lasts
    origin, started = provenance(ROOT, PACKAGES), time.monotonic()
    patients, runs = evaluate_dataset(
        model, processor, chosen, args.prompt, args.num_samples, args.seeds, args.batch_size, state, device,
        args.independent,
    )  # fmt: skip
    if state.is_main_process:
        content: dict[str, Any] = {
            "model": args.model,
            "dataset": args.dataset,
            "split": args.split,
            "prompt": args.prompt,
            "num_samples": args.num_samples,
            "sampling": "independent" if args.independent else "together",
            "seed": args.seeds[0] if len(args.seeds) == 1 else args.seeds,
            "num_slices": len(patients),
            "num_patients": len(set(patients)),
            "results": summarize_seeds(runs, patients),
            "ged_by_patient": patient_sums(runs, patients),
            "calibration": calibration_sums(runs),
            "breakdown": breakdown(runs),
        }
        latent_spaces = [scores["collapse"] for scores in runs[0] if "collapse" in scores]
        if latent_spaces:
            content["collapse"] = summarize_collapse(latent_spaces, isinstance(model, ProbabilisticSamModel))
        if len(args.seeds) > 1:
            content["per_seed"] = {
                str(seed): summarize(run, patients) for seed, run in zip(args.seeds, runs, strict=True)
            }
        if len(chosen) < len(dataset):
            content["max_slices"], content["slice_selection"] = args.max_slices, SELECTION
        if args.prompt == "reader_box":
            content["note"] = READER_BOX_NOTE
        content |= origin | {
            "device": str(device),
            "num_processes": state.num_processes,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(args.output, content)
        print(format_table(content["results"]))
        print(
            f"wrote {args.output}: {len(patients):,} slices of {content['num_patients']} patients, {args.split}, "
            f"prompt {args.prompt}, {args.num_samples} samples, seed {content['seed']}"
        )
    state.destroy_process_group()


if __name__ == "__main__":
    run(main)
