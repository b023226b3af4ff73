"""Builds in parts: the rows of each job are kept in a file until the whole build is written.

This allows several processes, and interrupted builds resume. A part is reused if it is complete and was made from the
same input by the same code.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from ..errors import UserError
from ..files import is_ignored, replaced_files
from .card import Note
from .format import ROW_SCHEMA

_PART_FILE = re.compile(r"[\w-]+\.arrow|\.tmp-.*")  # a part, or the temporary folder of a killed process


@dataclass(frozen=True)
class Job:
    """One unit of work, such as a scan.

    Attributes:
        name: name of its part: letters, digits, `-` and `_`, unique within a build.
        inputs: what its rows depend on, serialisable as JSON.
        make: returns the rows, and notes on what is left out. It is called in other processes, so it must be a
            function of a module or a `functools.partial` of one.
    """

    name: str
    inputs: Sequence
    make: Callable[[], tuple[list[dict], list[Note]]]


def parts_folder(output: str | os.PathLike[str]) -> Path:
    """Folder of the parts of a build, next to its output."""
    output = Path(output).resolve()
    return output.with_name(f"{output.name}.parts")


def part_rows(
    jobs: Sequence[Job], folder: str | os.PathLike[str], notes: list[Note], num_proc: int = 1
) -> Iterator[dict]:
    """Yield the rows of all jobs in order. Each job runs once; its part is kept.

    Args:
        jobs: all jobs of the build.
        folder: folder of the parts. Existing parts are reused; the caller removes it when the build is written.
        notes: list to which the notes of each job are appended.
        num_proc: number of processes, each running one job at a time.

    Raises:
        UserError: `folder` holds other files, a part cannot be written, a process was killed, or a job raises it.
    """
    folder = Path(folder)
    finished_parts(jobs, folder)
    folder.mkdir(parents=True, exist_ok=True)
    make = functools.partial(_make_part, folder=folder)
    try:
        with worker_pool(num_proc) as pool:
            paths = map(make, jobs) if num_proc == 1 else pool.map(make, jobs)
            for path in tqdm(paths, total=len(jobs), unit=" parts", desc="parts"):
                with pa.memory_map(str(path)) as source:
                    reader = pa.ipc.open_file(source)
                    notes += [Note(*note) for note in json.loads(reader.schema.metadata[b"notes"])]
                    for batch in reader.read_all().to_batches():
                        yield from batch.to_pylist()
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the build was killed, perhaps because memory ran out; rerun the command to resume, with a "
            "smaller --num-proc to use less memory"
        ) from error


def finished_parts(jobs: Sequence[Job], folder: str | os.PathLike[str]) -> int:
    """Number of jobs that an interrupted build has finished.

    Raises:
        UserError: `folder` is a file, or holds anything but parts.
    """
    folder = Path(folder)
    if not folder.exists():
        return 0
    accepted = "accepted: no such folder, or the parts of an interrupted build"
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; {accepted}")
    others = (path for path in folder.iterdir() if not is_ignored(path))
    foreign = sorted(path.name for path in others if not _PART_FILE.fullmatch(path.name))
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}; {accepted}")
    return sum(_is_finished(_part_path(job, folder), job) for job in jobs)


def worker_pool(num_proc: int) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to their parent and end when it ends, even if it is killed."""
    return ProcessPoolExecutor(num_proc, initializer=_follow_parent)


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _part_path(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.arrow"


def _make_part(job: Job, folder: Path) -> Path:
    """Run a job unless its part is finished already; returns the path of the part."""
    path = _part_path(job, folder)
    if _is_finished(path, job):
        return path
    rows, notes = job.make()
    metadata = {b"fingerprint": _fingerprint(job).encode(), b"notes": json.dumps(notes).encode()}
    schema = ROW_SCHEMA.with_metadata({**(ROW_SCHEMA.metadata or {}), **metadata})
    with replaced_files(folder) as temporary, pa.ipc.new_file(str(temporary / path.name), schema) as writer:
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return path


def _is_finished(path: Path, job: Job) -> bool:
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).schema.metadata.get(b"fingerprint") == _fingerprint(job).encode()
    except (OSError, pa.ArrowInvalid):
        return False


def _fingerprint(job: Job) -> str:
    return hashlib.sha256(json.dumps([_code_sha256(), job.name, job.inputs]).encode()).hexdigest()


@functools.cache
def _code_sha256() -> str:
    """Hash of the code in this folder, and of the reader of DICOM beside it: other code may produce other rows."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in (*sorted(folder.rglob("*.py")), folder.parent / "dicom_slice.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
