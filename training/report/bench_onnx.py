r"""Measure exported ONNX files: masks against PyTorch, sizes, and CPU time beside eager PyTorch.

    python training/export_onnx.py --model model_cards/psam-lidc --output model_cards/psam-lidc/onnx
    python training/report/bench_onnx.py --model model_cards/psam-lidc --dataset lidc \
        --output training/results/onnx.json

Masks are compared at the size of the image, for the same noise, on validation slices with a box (`union_box`), and
with one point at the middle of that box. Times are those of PyTorch and onnxruntime in turns on one otherwise idle
machine, with the same number of threads.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probabilistic_sam.data import row_prompt, row_seed
from probabilistic_sam.data.format import decode_image, decode_masks, load_split
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.evaluation import choose_rows, nest_prompt
from probabilistic_sam.files import write_json
from probabilistic_sam.inference import load_model, quiet_transformers
from probabilistic_sam.metrics.functional import ged
from probabilistic_sam.onnx_export import GRAPHS, PRECISIONS
from probabilistic_sam.onnx_model import OnnxModel
from probabilistic_sam.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy")
NAMES = {"": "float32", "_fp16": "float16", "_quantized": "int8"}
NUM_SAMPLES, SEED = 16, 0
# What each precision must reach: share of different pixels, IoU with PyTorch's masks, difference in GED
TARGETS = {"float32": {"different_pixels": 1e-4}, "float16": {"iou": 0.99}, "int8": {"iou": 0.97}}
GED_TARGET = 0.002


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with an exported folder onnx")
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py")
    parser.add_argument("--output", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--num_slices", type=int, default=50, help="validation slices that are compared; default 50")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns; default 20")
    args = parser.parse_args(argv)
    if args.num_slices < 1 or args.repeats < 1:
        raise UserError("--num_slices and --repeats must be 1 or more")
    return args


def open_precision(folder: Path, precision: str) -> OnnxModel:
    """The model of one precision, whose files have a suffix."""
    with tempfile.TemporaryDirectory() as plain:
        for graph in GRAPHS:
            os.symlink(folder.resolve() / f"{graph}{precision}.onnx", Path(plain) / f"{graph}.onnx")
        return OnnxModel(plain)


def read_slices(dataset: Any, processor: Any, count: int) -> list[dict[str, Any]]:
    """Readers' masks, seed of the noise and processed inputs of the first slices of the split by a hash."""
    slices = []
    for index in choose_rows(dataset, count, "onnx"):
        row = dataset[index]
        masks = decode_masks(row)
        prompt = nest_prompt(row_prompt(row, masks, "union_box", None))
        features = processor(images=[decode_image(row)], **prompt)
        slices.append({"masks": masks, "seed": row_seed(row, f"samples {SEED} None"), "features": features})
    return slices


def prompt_inputs(features: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Inputs of `sample` for the box of a slice, or for the point at its middle."""
    inputs = {"pixel_values": features["pixel_values"]}
    if kind == "box":
        return inputs | {"input_boxes": features["input_boxes"]}
    middle = features["input_boxes"].unflatten(-1, (2, 2)).mean(dim=2, keepdim=True)  # (1, 1, 1, 2)
    return inputs | {"input_points": middle, "input_labels": torch.ones(middle.shape[:3], dtype=torch.long)}


@torch.inference_mode()
def sample_slices(model: Any, processor: Any, slices: Sequence[dict[str, Any]], kind: str) -> list[np.ndarray]:
    """Masks (N, H, W) of each slice."""
    sampled = []
    for item in slices:
        features = item["features"]
        generator = torch.Generator().manual_seed(item["seed"])
        inputs = prompt_inputs(features, kind)
        logits = model.sample(**inputs, num_samples=NUM_SAMPLES, generator=generator).pred_masks
        (pasted,) = processor.post_process_logits(logits, features["windows"], features["original_sizes"])
        sampled.append((pasted > 0).numpy())
    return sampled


def compare(ours: Sequence[np.ndarray], reference: Sequence[np.ndarray], slices: Sequence[dict]) -> dict[str, float]:
    """Means over slices: share of different pixels, IoU of each mask with its counterpart, GED minus reference's."""
    unions = [(a | b).sum(axis=(1, 2)) for a, b in zip(ours, reference, strict=True)]
    overlaps = [(a & b).sum(axis=(1, 2)) for a, b in zip(ours, reference, strict=True)]
    ious = [
        np.where(union == 0, 1.0, overlap / np.maximum(union, 1))
        for union, overlap in zip(unions, overlaps, strict=True)
    ]
    differences = [
        ged(a, item["masks"]).ged - ged(b, item["masks"]).ged
        for a, b, item in zip(ours, reference, slices, strict=True)
    ]
    return {
        "different_pixels": float(np.mean([(a != b).mean() for a, b in zip(ours, reference, strict=True)])),
        "iou": float(np.mean(ious)),
        "smallest_iou": float(np.min(ious)),
        "ged_difference": float(np.mean(differences)),
    }


def meets_target(precision: str, parity: Mapping[str, float]) -> bool:
    """Whether masks are as close to PyTorch's as the precision promises."""
    target = TARGETS[precision]
    return (
        parity["different_pixels"] <= target.get("different_pixels", 1.0)
        and parity["iou"] >= target.get("iou", 0.0)
        and abs(parity["ged_difference"]) <= GED_TARGET
    )


def interleave(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn of several functions that run in turns, after one warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def measure_times(models: Mapping[str, Any], features: Mapping[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """Seconds to encode an image and to sample masks from its embeddings, for each model."""
    images, boxes = features["pixel_values"], features["input_boxes"]
    embeddings = models["torch"].get_image_embeddings(images)

    def encode(model: Any) -> Callable[[], Any]:
        return lambda: model.get_image_embeddings(images)

    def decode(model: Any) -> Callable[[], Any]:
        return lambda: model.sample(image_embeddings=embeddings, input_boxes=boxes, num_samples=NUM_SAMPLES)

    return {
        "encode_s": medians(interleave({name: encode(model) for name, model in models.items()}, repeats)),
        f"decode_{NUM_SAMPLES}_samples_s": medians(
            interleave({name: decode(model) for name, model in models.items()}, repeats)
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, measure and write the results file."""
    args = parse_args(argv)
    quiet_transformers()
    origin, load = provenance(ROOT, PACKAGES), os.getloadavg()
    model, processor = load_model(args.model)
    slices = read_slices(load_split(args.dataset, "validation"), processor, args.num_slices)
    exported = {NAMES[precision]: open_precision(args.model / "onnx", precision) for precision in PRECISIONS}
    parity: dict[str, dict[str, Any]] = {}
    for kind in ("box", "point"):
        reference = sample_slices(model, processor, slices, kind)
        for name, other in exported.items():
            values = compare(sample_slices(other, processor, slices, kind), reference, slices)
            parity.setdefault(name, {})[kind] = values | {"meets_target": meets_target(name, values)}
            print(f"{name:>8} {kind:>5}", *(f"{key} {value:.6g}" for key, value in values.items()), flush=True)
    times = measure_times({"torch": model, **exported}, slices[0]["features"], args.repeats)
    print(times)
    sizes = {
        NAMES[precision]: {
            graph: (args.model / "onnx" / f"{graph}{precision}.onnx").stat().st_size for graph in GRAPHS
        }
        for precision in PRECISIONS
    }
    content = {
        "model": args.model.name, "split": "validation", "prompt": "union_box, and the point at its middle",
        "num_samples": NUM_SAMPLES, "seed": SEED, "num_slices": len(slices),
        "targets": TARGETS | {"ged_difference": GED_TARGET}, "parity": parity, "bytes": sizes, "seconds": times,
        "repeats": args.repeats, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "load_at_start": round(load[0], 2),
    }  # fmt: skip
    write_json(args.output, content | origin)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
