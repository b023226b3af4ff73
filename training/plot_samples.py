"""Plot samples of a model beside the readers, for some rows of a dataset.

    python training/plot_samples.py --model run --dataset mine-build --output samples.png

Each line of the figure shows an image with its prompt, the readers' outlines, the outlines of the samples, and the
mean of the samples (0 blue, 1 yellow). Prompts are those of `training/evaluate.py`, the box around all readers'
masks by default.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probabilistic_sam.errors import UserError, require, run

require("accelerate", "datasets", "scipy", extra="train")

from probabilistic_sam.data import row_prompt
from probabilistic_sam.data.format import decode_row, load_split
from probabilistic_sam.evaluation import choose_rows
from probabilistic_sam.inference import load_model, quiet_transformers, sample_image
from probabilistic_sam.plotting import comparison_figure, save_figure

MAX_ROWS = 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub name of a model or baseline")
    parser.add_argument(
        "--dataset", required=True, help="folder or Hub name of a dataset with columns image, masks and patient_id"
    )
    parser.add_argument("--split", default="validation", help="default validation")
    parser.add_argument("--rows", type=int, default=5, help=f"rows to plot, up to {MAX_ROWS}; default 5")
    parser.add_argument("--num_samples", type=int, default=16, help="samples per row; default 16")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args(argv)
    for name, most in (("rows", MAX_ROWS), ("num_samples", 100)):
        if not 1 <= getattr(args, name) <= most:
            raise UserError(f"--{name} is {getattr(args, name)}; accepted: 1 to {most}")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: no such folder; accepted: a PNG file in an existing folder")
    return args


def row_title(row: Mapping[str, Any]) -> str:
    """What identifies a row: image, image of a patient, or slice of a patient."""
    patient, image = row["patient_id"], row["image_id"]
    if image is None:
        return f"{patient}, slice {row['slice_index']}"
    return image if image == patient else f"{patient}, {image}"


def main(argv: Sequence[str] | None = None) -> None:
    """Sample masks for the chosen rows and write the figure."""
    args = parse_args(argv)
    quiet_transformers()
    dataset = load_split(args.dataset, args.split)
    rows = dataset.select(choose_rows(dataset, args.rows, "plotted rows")).with_format("arrow")[:].to_pylist()
    model, processor = load_model(args.model, baselines=True)
    images, readers = zip(*map(decode_row, rows), strict=True)
    boxes = [row_prompt(row, masks, "union_box")["input_boxes"] for row, masks in zip(rows, readers, strict=True)]
    samples = [
        sample_image(model, processor, image, {"box": box}, args.num_samples, args.seed).masks
        for image, box in zip(images, boxes, strict=True)
    ]
    save_figure(comparison_figure(images, readers, samples, boxes, [row_title(row) for row in rows]), args.output)
    print(f"wrote {args.output}: {len(rows)} rows of {args.split}, {args.num_samples} samples each")


if __name__ == "__main__":
    run(main)
