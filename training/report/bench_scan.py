r"""Measure what a nodule costs: `sample_scan` on ten slices of a scan, with 1, 16 and 100 samples.

    python training/report/bench_scan.py --model model_cards/psam-lidc --scan lung-ct-series/dicom \
        --box 139 253 234 322 --first-slice 11 --output training/results/scan.json

Run this on an otherwise idle machine.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_onnx import interleave, medians

from probabilistic_sam.errors import UserError, run
from probabilistic_sam.files import write_json
from probabilistic_sam.inference import load_model, quiet_transformers, sample_image
from probabilistic_sam.provenance import provenance
from probabilistic_sam.scan_sampling import sample_scan
from probabilistic_sam.scans import open_scan

ROOT = Path(__file__).resolve().parents[2]
NUM_SLICES = 10
NUMBERS = (1, 16, 100)  # of samples


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--scan", type=Path, required=True, help="DICOM series or NIfTI file")
    parser.add_argument("--box", type=float, nargs=4, required=True, metavar=("X1", "Y1", "X2", "Y2"))
    parser.add_argument("--first-slice", type=int, required=True, help="first of the ten slices, 0-based")
    parser.add_argument("--output", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns; default 5")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure in turns and write the results file."""
    args = parse_args(argv)
    quiet_transformers()
    origin, load = provenance(ROOT, ("torch", "transformers", "numpy", "pydicom")), os.getloadavg()
    model, processor = load_model(args.model)
    slices = (args.first_slice, args.first_slice + NUM_SLICES - 1)
    with open_scan(args.scan) as scan:
        images = scan.read(*slices)

        def whole(number: int) -> Callable[[], Any]:
            return lambda: sample_scan(model, processor, scan, args.box, slices, number)

        def one_by_one() -> None:
            for image in images:
                sample_image(model, processor, image, {"box": args.box}, NUMBERS[1])

        ways = {f"{number} samples": whole(number) for number in NUMBERS}
        ways[f"{NUMBERS[1]} samples, slices one by one"] = one_by_one
        seconds = interleave(ways, args.repeats)
    content = {
        "model": args.model.name, "num_slices": NUM_SLICES,
        "seconds": medians(seconds),
        "ranges": {name: [min(values), max(values)] for name, values in seconds.items()},
        "repeats": args.repeats, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "load_at_start": round(load[0], 2),
    }  # fmt: skip
    write_json(args.output, content | origin)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
