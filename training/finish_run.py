"""Finish a run: average its best and its last weights, and let it draw nothing as often as the readers do.

    python training/finish_run.py --run RUN --dataset LIDC --output FINISHED

Both weights are running averages of one training, so their mean is a model too, in a flatter place (Izmailov et al.
2018, arXiv 1803.05407). The drawing coordinate of the prior is then shifted by one number, so that over the validation
split, prompt `union_box`, the expected share of empty masks is that of the readers. FINISHED is a run folder like RUN.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from scipy.optimize import brentq
from scipy.special import ndtr

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.data import make_prompt, row_seed
from probabilistic_sam.data.format import load_split
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.training.checkpoint import find_checkpoint, read_checkpoint
from probabilistic_sam.training.embedding_cache import EmbeddingCache


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of training/train.py")
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py: folder or Hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache_dir", default="~/.cache/probabilistic_sam", help="folder of the embedding caches")
    return parser.parse_args()


@torch.no_grad()
def average(model: ProbabilisticSamModel, last: dict[str, torch.Tensor]) -> None:
    """Move a model's weights half of the way to `last`, by name; those that are not there stay."""
    parameters = dict(model.named_parameters())
    if not last or not set(last) <= set(parameters) or any(last[k].shape != parameters[k].shape for k in last):
        raise UserError("the checkpoint's weights are of another model than the run's")
    for name, value in last.items():
        parameters[name].lerp_(value, 0.5)


@torch.no_grad()
def presence_means(
    model: ProbabilisticSamModel, cache: EmbeddingCache, rows, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the prior's mean of the drawing coordinate, and the share of readers who drew nothing."""
    size = model.config.vision_config.image_size
    means, shares = [], []
    for start in range(0, len(rows), batch_size):
        boxes = []
        for index in range(start, min(start + batch_size, len(rows))):
            masks, row = cache.row_masks(index), rows[index]
            box = make_prompt(masks, "union_box", np.random.default_rng(row_seed(row, "union_box")))["input_boxes"]
            x, y, side = cache.view(index, 0, masks).window
            boxes.append((torch.tensor(box, dtype=torch.float32) - torch.tensor([x, y, x, y])) * (size / side))
            shares.append(1 - masks.any(axis=(1, 2)).mean())
        embeddings = torch.from_numpy(np.array(cache.embeddings[start : start + batch_size, 0])).float()
        _, features, coarse_maps, _ = model.embed(embeddings, None, None, torch.stack(boxes)[:, None], None)
        means.append(model.prior(features, coarse_maps)[0][:, 0].numpy())
    return np.concatenate(means).astype(float), np.array(shares)


def find_shift(means: np.ndarray, shares: np.ndarray) -> float:
    """The number to add to `means` so that P(coordinate <= 0), deviation 1, is on average the mean of `shares`."""
    wanted = float(shares.mean())
    if not 0 < wanted < 1:
        raise UserError(f"the share of readers who drew nothing is {wanted:g}; accepted: some of them, not all")
    far = 40  # deviations: the probability there is 0 or 1
    return float(brentq(lambda shift: ndtr(-(means + shift)).mean() - wanted, -means.max() - far, far - means.min()))


def main() -> None:
    """Average, calibrate, save."""
    arguments = parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise UserError(f"--output {arguments.output} is not empty; accepted: a new or empty folder")
    try:
        model = ProbabilisticSamModel.from_pretrained(arguments.run, dtype=torch.float32).eval()
        processor = ProbabilisticSamProcessor.from_pretrained(arguments.run)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--run {arguments.run} does not open: {str(error).splitlines()[0]}") from error
    state = read_checkpoint(find_checkpoint("latest", arguments.run), ("step", "best", "ema"))
    average(model, state["ema"])
    rows = load_split(arguments.dataset, "validation")
    cache = EmbeddingCache(model, processor, rows, 0, 0, arguments.cache_dir, bf16=True)
    means, shares = presence_means(model, cache, rows)
    shift = find_shift(means, shares)
    with torch.no_grad():
        model.prior.lin2.bias[0] += shift
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    record = {
        "run_steps": [state["best"]["step"], state["step"]],
        "shift": round(shift, 4),
        "empty_share_readers": round(float(shares.mean()), 4),
        "empty_share_before": round(float(ndtr(-means).mean()), 4),
    }
    (arguments.output / "finish.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if (arguments.run / "training_config.yaml").exists():
        shutil.copy(arguments.run / "training_config.yaml", arguments.output)
    print(f"wrote {arguments.output}: {record}")


if __name__ == "__main__":
    run(main)
