"""Build a dataset of LIDC-IDRI slices with every reader's mask, as Parquet split by patient.

python training/build_lidc.py slices --input LIDC-IDRI-slices.tar.gz --index index.csv --output lidc
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from probabilistic_sam.data.rows import write_dataset
from probabilistic_sam.data.slices import read_slices
from probabilistic_sam.errors import run

SLICES_ORIGIN = """\
Real CT: crops of 128x128 pixels around each nodule at the scan's own pixel spacing. Grey values are scaled for each
crop from its own minimum and maximum to 0..255; they are not Hounsfield units. Only slices on which some reader drew
are in it."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    slices = sources.add_parser("slices", help="PNG crops in the layout of the public LIDC-IDRI-slices set")
    slices.add_argument("--input", type=Path, required=True, help="directory, .tar or .tar.gz")
    slices.add_argument("--index", type=Path, help="CSV with scan, position, spacing and ratings of each slice")
    slices.add_argument("--output", type=Path, required=True, help="directory of the build")
    return parser.parse_args()


def main() -> None:
    """Build the dataset of the command line and say what was written."""
    args = parse_args()
    start = time.perf_counter()
    rows: Iterable[dict] = read_slices(args.input, args.index)
    origin = SLICES_ORIGIN
    report = write_dataset(tqdm(rows, unit=" slices", desc="reading"), args.output, origin)
    print(f"wrote {args.output}: {report.summary()} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    run(main)
