"""Builds in parts: each job runs once, even if the build is interrupted."""

import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from probabilistic_sam.data.card import Note
from probabilistic_sam.data.format import encode_png, image_row
from probabilistic_sam.data.parts import Job, _code_sha256, finished_parts, part_rows
from probabilistic_sam.errors import UserError


def make(log: Path, number: int) -> tuple[list[dict], list[Note]]:
    """One row; a file counts how often the job ran. Job 3 kills its process."""
    with (log / str(number)).open("a") as file:
        file.write("x")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    png = encode_png(np.full((4, 4), number, dtype=np.uint8))
    row = image_row(png, [encode_png(np.eye(4, dtype=bool))], "image", ["mask"], nodule_id=number, slice_index=0)
    return [row], [Note("rows left out", number, f"job {number}")]


def jobs(log: Path, numbers, inputs=()) -> list[Job]:
    log.mkdir(exist_ok=True)
    return [Job(f"job-{number}", inputs, functools.partial(make, log, number)) for number in numbers]


def done(log: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(log.iterdir())}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_each_job_runs_once_and_rows_keep_their_order(tmp_path, num_proc):
    log, parts = tmp_path / "log", tmp_path / "parts"
    first = list(part_rows(jobs(log, [1]), parts, []))
    notes: list[Note] = []
    rows = list(part_rows(jobs(log, [2, 1, 0]), parts, notes, num_proc))
    assert [row["nodule_id"] for row in rows] == [2, 1, 0] and rows[1] == first[0]
    assert notes == [Note("rows left out", number, f"job {number}") for number in (2, 1, 0)]
    assert done(log) == {"0": 1, "1": 1, "2": 1}
    assert rows[0] == {**make(log, 2)[0][0], "pixels_sha256": rows[0]["pixels_sha256"]}


def test_damaged_parts_and_parts_of_other_input_or_code_are_remade(tmp_path, monkeypatch):
    log, parts = tmp_path / "log", tmp_path / "parts"
    for inputs in ((), (0.5,), (0.5,)):
        list(part_rows(jobs(log, [0], inputs), parts, []))
    assert done(log) == {"0": 2}
    monkeypatch.setattr("probabilistic_sam.data.parts._code_sha256", lambda: "other")
    list(part_rows(jobs(log, [0], (0.5,)), parts, []))
    path = parts / "job-0.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    assert finished_parts(jobs(log, [0], (0.5,)), parts) == 0
    list(part_rows(jobs(log, [0], (0.5,)), parts, []))
    assert done(log) == {"0": 4}


def test_code_of_the_dicom_reader_counts(monkeypatch):
    read_bytes, whole = Path.read_bytes, _code_sha256.__wrapped__()
    assert whole == _code_sha256.__wrapped__()
    monkeypatch.setattr(Path, "read_bytes", lambda self: read_bytes(self) + b"#" * (self.name == "dicom_slice.py"))
    assert whole != _code_sha256.__wrapped__()


def test_killed_process_is_reported_and_finished_jobs_are_kept(tmp_path):
    log, parts = tmp_path / "log", tmp_path / "parts"
    list(part_rows(jobs(log, [0, 1]), parts, []))
    with pytest.raises(UserError, match="a process of the build was killed"):
        list(part_rows(jobs(log, [0, 1, 3]), parts, [], 2))
    assert finished_parts(jobs(log, [0, 1, 3]), parts) == 2
    assert done(log) == {"0": 1, "1": 1, "3": 1}


def test_folder_with_other_files_is_refused(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="parts: holds thesis.tex; accepted"):
        list(part_rows(jobs(tmp_path / "log", [0]), folder, []))
    with pytest.raises(UserError, match="thesis.tex: is a file"):
        finished_parts([], folder / "thesis.tex")
    assert not done(tmp_path / "log")
