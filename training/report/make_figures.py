"""Plot samples, latent traversals, calibration, and GED against the number of samples.

    python training/report/make_figures.py --model M --dataset phantom --results RESULTS --output figures

The gallery and the traversal show slices of the dataset; the figures in the repository use a phantom build, whose
pixels may be published. Calibration, GED and volumes come from results files of training/evaluate.py; volumes.png is
plotted if there is nodule_shared_100.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.data import row_prompt, row_seed
from probabilistic_sam.data.format import decode_image, decode_masks, load_split
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.inference import load_model
from probabilistic_sam.metrics.functional import ged
from probabilistic_sam.plotting import (
    calibration_figure,
    comparison_figure,
    sample_number_figure,
    save_figure,
    traversal_figure,
    volume_figure,
)

PROMPT = "union_box"
NUM_SAMPLES = 16
NODULES = "nodule_shared_100"
SHOWN = 2  # slices of each kind in the gallery
COORDINATES = 4  # rows of the traversal
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # standard deviations of the prior


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub name of a Probabilistic SAM")
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py: folder or Hub name")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max_slices", type=int, default=200, help="slices of the split to consider for the gallery")
    parser.add_argument("--results", type=Path, required=True, help="folder of results files of training/evaluate.py")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the figures to")
    return parser.parse_args()


def read_results(folder: Path) -> dict[str, dict]:
    """Read all results files by name; `validation` is required."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if "validation" not in results:
        raise UserError(f"{folder} has no validation.json; accepted: results files of training/evaluate.py")
    return results


def prepare(row: dict, processor: ProbabilisticSamProcessor) -> tuple[np.ndarray, np.ndarray, dict]:
    """Image, masks of the readers and model inputs of a row, with the prompt of the evaluation."""
    image, readers = decode_image(row), decode_masks(row)
    box = row_prompt(row, readers, PROMPT)["input_boxes"]
    return image, readers, processor(image, input_boxes=[[box]])


def to_masks(processor: ProbabilisticSamProcessor, pred_masks: torch.Tensor, inputs: dict) -> np.ndarray:
    """Logits (1, 1, N, h, w) to masks (N, H, W)."""
    logits = processor.post_process_logits(pred_masks, inputs["windows"], inputs["original_sizes"])[0]
    return (logits > 0).numpy()


def plot_gallery(model, processor, rows, path: Path) -> None:
    """Plot samples beside the readers for the slices with the lowest, median and highest GED."""
    distances, samples = [], []
    for row in tqdm(rows, desc="gallery", unit="slice"):
        _, readers, inputs = prepare(row, processor)
        generator = torch.Generator().manual_seed(row_seed(row, "gallery") % 2**63)
        output = model.sample(**inputs, num_samples=NUM_SAMPLES, generator=generator)
        samples.append(to_masks(processor, output.pred_masks, inputs))
        distances.append(ged(samples[-1], readers).ged)
    order = np.argsort(distances, kind="stable").tolist()
    middle = (len(order) - SHOWN) // 2
    chosen = {"lowest": order[:SHOWN], "median": order[middle : middle + SHOWN], "highest": order[-SHOWN:]}
    shown = [index for indices in chosen.values() for index in indices]
    titles = [
        f"{rows[index]['patient_id']}: {name} GED, {distances[index]:.2f}"
        for name, indices in chosen.items()
        for index in indices
    ]
    readers = [decode_masks(rows[index]) for index in shown]
    boxes = [
        row_prompt(rows[index], masks, PROMPT)["input_boxes"] for index, masks in zip(shown, readers, strict=True)
    ]
    images = [decode_image(rows[index]) for index in shown]
    save_figure(comparison_figure(images, readers, [samples[index] for index in shown], boxes, titles), path)


def plot_traversal(model, processor, row: dict, path: Path) -> None:
    """Vary one latent coordinate at a time, others at the prior mean; plot those that change the mask most."""
    image, _, inputs = prepare(row, processor)
    prior = model(**inputs)
    mean, std = prior.prior_mean[0, 0], prior.prior_log_std[0, 0].exp()
    coordinates = range(1, len(mean))
    latents = mean.repeat(len(coordinates), len(STEPS), 1)  # (K, T, L)
    latents[..., 0] = 1.0  # presence: not empty
    for index, coordinate in enumerate(coordinates):
        latents[index, :, coordinate] += torch.tensor(STEPS) * std[coordinate]
    output = model(**inputs, latents=latents.flatten(0, 1)[None, None])
    masks = to_masks(processor, output.pred_masks, inputs).reshape(len(coordinates), len(STEPS), *image.shape[:2])
    change = (masks[:, 0] ^ masks[:, -1]).sum(axis=(1, 2))
    most = np.argsort(-change, kind="stable")[:COORDINATES]
    titles = [f"z{coordinates[index]}" for index in most]
    save_figure(traversal_figure(image, masks[most], titles, [f"{step:+g} sd" for step in STEPS]), path)


def sample_numbers(results: dict[str, dict]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Curves of GED by number of samples of the main model, one per column."""
    main = results["validation"]
    curves: dict[str, list[tuple[int, float, float, float]]] = defaultdict(list)
    for result in results.values():
        if result.get("level") == "nodule":
            continue
        same = ("model", "prompt", "split", "num_slices", "truth", "num_candidates", "sampling")
        if all(result.get(name) == main.get(name) for name in same):
            for column in ("all", "shape"):
                entry = result["results"][column]["ged"]
                point = (result["num_samples"], entry["mean"], *entry["ci95"])
                curves[column].append(point)
    return dict(curves)


def plot_volumes(result: dict, path: Path) -> None:
    """Plot the volumes of a results file of --level nodule."""
    title = f"{result['num_nodules']:,} {result['split']} nodules, prompt {result['prompt']}"
    save_figure(volume_figure(result["nodules"], result["quantile_levels"], title), path)


@torch.no_grad()
def main() -> None:
    """Plot all figures."""
    arguments = parse_args()
    results = read_results(arguments.results)
    rows = load_split(arguments.dataset, arguments.split)
    if len(rows) < 3 * SHOWN:
        raise UserError(
            f"{arguments.dataset}: split {arguments.split!r} has {len(rows)} slices; accepted: {3 * SHOWN}"
        )
    rows = [rows[index] for index in range(min(len(rows), arguments.max_slices))]
    model, processor = load_model(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)

    plot_gallery(model, processor, rows, arguments.output / "gallery.png")
    largest = max(rows, key=lambda row: int(decode_masks(row).any(axis=0).sum()))
    plot_traversal(model, processor, largest, arguments.output / "traversal.png")
    main_result = results["validation"]
    calibration = main_result["calibration"]
    title = f"{main_result['num_slices']:,} {main_result['split']} slices, prompt {main_result['prompt']}"
    figure = calibration_figure(np.array(calibration["pixels"]), np.array(calibration["emptiness"]), title)
    save_figure(figure, arguments.output / "calibration.png")
    save_figure(sample_number_figure(sample_numbers(results)), arguments.output / "sample_number.png")
    if NODULES in results:
        plot_volumes(results[NODULES], arguments.output / "volumes.png")
    volumes = ", volumes.png" if NODULES in results else ""
    print(f"wrote {arguments.output}: gallery.png, traversal.png, calibration.png, sample_number.png{volumes}")


if __name__ == "__main__":
    run(main)
