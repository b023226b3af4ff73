"""Build a dataset of LIDC-IDRI slices with every reader's mask, as Parquet split by patient.

The CT series from TCIA, masks from pylidc: python training/build_lidc.py dicom --input FOLDER --output lidc
The public LIDC-IDRI-slices set:            python training/build_lidc.py slices --input FOLDER --output lidc
Simulated CT, needs no download:            python training/build_lidc.py phantom --output phantom
"""

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from probabilistic_sam.data.dicom import dicom_rows, find_scans
from probabilistic_sam.data.phantom import phantom_rows
from probabilistic_sam.data.pickle_crops import read_pickle
from probabilistic_sam.data.rows import check_output, write_dataset
from probabilistic_sam.data.slices import read_slices
from probabilistic_sam.errors import UserError, run

DICOM_ORIGIN = """\
Real CT in Hounsfield units (16-bit PNG, HU + 1024): a window of 128x128 pixels around each nodule, {spacing}, from the
DICOM series of LIDC-IDRI. Masks are filled from the readers' contours by pylidc. Only slices on which some reader drew
are in it."""

SLICES_ORIGIN = """\
Real CT: crops of 128x128 pixels around each nodule at the scan's own pixel spacing. Grey values are scaled for each
crop from its own minimum and maximum to 0..255; they are not Hounsfield units. Only slices on which some reader drew
are in it."""

PICKLE_ORIGIN = """\
Real CT: the crops of `data_lidc.pickle`, which comes with a PyTorch implementation of the Probabilistic U-Net. Grey
values are scaled to 0..255; they are not Hounsfield units. Which nodule a crop shows is not known: `nodule_id` is 0
and `slice_index` counts the crops of a patient."""

PHANTOM_ORIGIN = """\
**Phantom: the pixels are simulated.** The contours are those that LIDC's readers drew, from the database that pylidc
ships; the CT around them is drawn by a program, 128x128 pixels at the scan's own pixel spacing. It serves
demonstrations, tests and documentation; no claim of quality can rest on it."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    dicom = sources.add_parser("dicom", help="the CT series of TCIA, found by series UID; masks from pylidc")
    dicom.add_argument("--input", type=Path, required=True, help="folder of the DICOM files, nested in any way")
    dicom.add_argument("--spacing", type=float, help="mm, resample to this side of a pixel; the scan's own without it")
    dicom.add_argument("--num-proc", type=int, default=1, help="processes, each working on one scan at a time")
    dicom.add_argument("--num-shards", type=int, default=1, help="parts that the whole build is divided into, by scan")
    dicom.add_argument("--shard-index", type=int, default=0, help="which of them this is, from 0")
    slices = sources.add_parser("slices", help="PNG crops in the layout of the public LIDC-IDRI-slices set")
    slices.add_argument("--input", type=Path, required=True, help="directory, .tar or .tar.gz")
    slices.add_argument("--index", type=Path, help="CSV with scan, position, spacing and ratings of each slice")
    crops = sources.add_parser("pickle", help="data_lidc.pickle of the PyTorch Probabilistic U-Net")
    crops.add_argument("--input", type=Path, required=True, help="the file")
    phantom = sources.add_parser("phantom", help="real readers' contours on simulated CT")
    phantom.add_argument("--num-nodules", type=int, default=64, help="nodules to draw, each on all of its slices")
    for source in (dicom, slices, crops, phantom):
        source.add_argument("--output", type=Path, required=True, help="directory of the build")
    return parser.parse_args()


def main() -> None:
    """Build the dataset of the command line and say what was written."""
    args = parse_args()
    start = time.perf_counter()
    check_output(args.output)
    notes: list[str] = []
    parts = args.output.with_name(args.output.name + ".parts")  # of a build from DICOM that is not finished
    rows: Iterable[dict]
    if args.source == "dicom":
        rows, origin = read_dicom(args, parts, notes)
    elif args.source == "slices":
        rows, origin = read_slices(args.input, args.index), SLICES_ORIGIN
    elif args.source == "pickle":
        rows, origin = read_pickle(args.input), PICKLE_ORIGIN
    else:
        if args.num_nodules < 1:
            raise UserError(f"--num-nodules is {args.num_nodules}; accepted: 1 or more")
        rows, origin = phantom_rows(args.num_nodules), PHANTOM_ORIGIN
    try:
        report = write_dataset(tqdm(rows, unit=" slices", desc=args.source), args.output, origin)
    except OSError as error:
        raise UserError(f"{args.output}: not built: {error}") from error
    finally:
        for note in notes:
            print(note)
    if args.source == "dicom":
        shutil.rmtree(parts)
    print(f"wrote {args.output}: {report.summary()} ({time.perf_counter() - start:.0f} s)")


def read_dicom(args: argparse.Namespace, parts: Path, notes: list[str]) -> tuple[Iterable[dict], str]:
    """Rows of this shard's scans, and where they come from."""
    if args.num_proc < 1:
        raise UserError(f"--num-proc is {args.num_proc}; accepted: 1 or more")
    if not 0 <= args.shard_index < args.num_shards:
        raise UserError(
            f"--shard-index is {args.shard_index} of --num-shards {args.num_shards}; accepted: 0 up to one less"
        )
    scans, lines = find_scans(args.input, args.num_shards, args.shard_index, args.num_proc)
    notes += lines
    notes.append(f"{len(scans):,} scans used")
    spacing = "at the scan's own pixel spacing" if args.spacing is None else f"resampled to {args.spacing:g} mm"
    return dicom_rows(scans, notes, parts, args.spacing, args.num_proc), DICOM_ORIGIN.format(spacing=spacing)


if __name__ == "__main__":
    run(main)
