"""Source `slices`: a directory or archive of PNG crops in the layout of the public LIDC-IDRI-slices set.

    LIDC-IDRI-slices/LIDC-IDRI-dddd/nodule-n/{images,mask-0,mask-1,mask-2,mask-3}/slice-k.png

The first folder may be missing. An archive is read once from front to end and never unpacked to disk.
"""

import csv
import gzip
import io
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from probabilistic_sam.errors import UserError

from .rows import NUM_READERS, image_row

MAX_MEMBER_BYTES = 4 * 2**20
MAX_MEMBERS = 1_000_000  # the whole public set has about 95,000
LAYOUT = "LIDC-IDRI-slices/LIDC-IDRI-dddd/nodule-n/{images,mask-0..3}/slice-k.png"
_FILE = re.compile(
    r"(?:LIDC-IDRI-slices/)?(?P<patient>LIDC-IDRI-\d{4})/nodule-(?P<nodule>\d{1,4})"
    r"/(?P<kind>images|mask-[0-3])/slice-(?P<slice>\d{1,4})\.png",
    re.ASCII,
)
_FOLDER = re.compile(
    r"\.?|LIDC-IDRI-slices|(?:LIDC-IDRI-slices/)?LIDC-IDRI-\d{4}(?:/nodule-\d{1,4}(?:/(?:images|mask-[0-3]))?)?",
    re.ASCII,
)
_KINDS = ("images", *(f"mask-{reader}" for reader in range(NUM_READERS)))

SliceKey = tuple[str, int, int]  # patient, nodule, slice


def read_slices(path: str | os.PathLike[str], index: str | os.PathLike[str] | None = None) -> Iterator[dict]:
    """Yield a row for each slice of a directory or of a `.tar` / `.tar.gz` archive, in the order they come.

    Args:
        path: the directory or archive.
        index: CSV with scan, position, spacing, annotations and malignancy of each slice; these columns are null
            without it.

    Raises:
        UserError: anything that is not as the layout says, naming the file or archive member.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or directory; accepted: a directory or .tar(.gz) in the layout {LAYOUT}"
        )
    columns = read_index(index) if index is not None else None
    files = _directory_files(path) if path.is_dir() else _archive_files(path)
    waiting: dict[SliceKey, dict[str, tuple[str, bytes]]] = {}
    finished: set[SliceKey] = set()
    for name, content in files:
        match = _FILE.fullmatch(name)
        assert match is not None  # both readers check
        key = (match["patient"], int(match["nodule"]), int(match["slice"]))
        parts = waiting.setdefault(key, {})
        if key in finished or match["kind"] in parts:
            raise UserError(f"{name}: comes twice; accepted: one image and {NUM_READERS} masks a slice")
        parts[match["kind"]] = (name, content)
        if len(parts) == len(_KINDS):
            finished.add(key)
            yield _row(key, waiting.pop(key), columns)
    for parts in waiting.values():
        missing = next(kind for kind in _KINDS if kind not in parts)
        present = next(iter(parts.values()))[0]
        raise UserError(f"{present}: its slice has no {missing}; accepted: one image and {NUM_READERS} masks a slice")
    if not finished:
        raise UserError(f"{path}: holds no slice; accepted: the layout {LAYOUT}")


def read_index(path: str | os.PathLike[str]) -> dict[SliceKey, dict[str, Any]]:
    """Read the index CSV: for each (patient, nodule, slice) the columns of a row that PNG files do not tell.

    What the index does not know becomes None: ids and ratings of 0 or less (no reader, or an annotation that was not
    found), numbers that are `nan`, empty fields.

    Raises:
        UserError: no such file, a column missing, a value that is no number, a slice that comes twice.
    """
    path = Path(path)
    readers = range(NUM_READERS)
    needed = ["patient", "nodule", "slice", "scan_id", "series_uid", "z_mm", "pixel_spacing_mm", "slice_thickness_mm"]
    needed += [f"{name}{reader}" for name in ("ann", "mal") for reader in readers]
    columns: dict[SliceKey, dict[str, Any]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            missing = [name for name in needed if name not in (lines.fieldnames or [])]
            if missing:
                raise UserError(f"{path}: column {missing[0]!r} is missing; accepted: a CSV with {', '.join(needed)}")
            for line in lines:
                try:
                    key = (line["patient"], int(line["nodule"]), int(line["slice"]))
                    values = {
                        "scan_id": _positive(line["scan_id"]),
                        "series_uid": line["series_uid"] or None,
                        "z_mm": _finite(line["z_mm"]),
                        "pixel_spacing_mm": _finite(line["pixel_spacing_mm"]),
                        "slice_thickness_mm": _finite(line["slice_thickness_mm"]),
                        "annotation_ids": [_positive(line[f"ann{reader}"]) for reader in readers],
                        "malignancy": [_positive(line[f"mal{reader}"]) for reader in readers],
                    }
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}: line {lines.line_num}: {error}; accepted: numbers") from error
                if key in columns:
                    raise UserError(f"{path}: line {lines.line_num}: slice {key} comes twice")
                columns[key] = values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the index does not open as CSV: {error}") from error
    return columns


def _positive(text: str) -> int | None:
    value = int(text) if text else 0
    return value if value > 0 else None


def _finite(text: str) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def _row(key: SliceKey, parts: dict[str, tuple[str, bytes]], columns: dict[SliceKey, dict[str, Any]] | None) -> dict:
    if columns is not None and key not in columns:
        raise UserError(f"{parts['images'][0]}: the index has no line for this slice")
    names, contents = zip(*(parts[kind] for kind in _KINDS), strict=True)
    patient_id, nodule_id, slice_index = key
    return image_row(
        contents[0],
        contents[1:],
        names[0],
        names[1:],
        patient_id=patient_id,
        nodule_id=nodule_id,
        slice_index=slice_index,
        source="slices",
        **(columns[key] if columns is not None else {}),
    )


def _directory_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path below the root, content) of every file, sorted, without following links."""
    count = 0
    pending = [root]
    while pending:
        folder = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            count += 1
            name = Path(entry.path).relative_to(root).as_posix()
            _check_count(count, name)
            if entry.is_dir(follow_symlinks=False):
                _check_name(_FOLDER, name)
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                _check_name(_FILE, name)
                _check_size(entry.stat(follow_symlinks=False).st_size, name)
                yield name, Path(entry.path).read_bytes()
            else:
                raise UserError(f"{name}: is a link or device; accepted: regular files and folders")


def _archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of every regular member of a tar archive, in one pass."""
    name = "its first member"
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = _TarStream(gzip.GzipFile(fileobj=raw) if packed else raw)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for count, member in enumerate(archive, start=1):
                    name = member.name.removeprefix("./")
                    _check_name(_FOLDER if member.isdir() else _FILE, name)
                    _check_count(count, name)
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise UserError(f"{name}: is a link or device; accepted: regular files and folders")
                    _check_size(member.size, name)
                    stream.allowance = _TarStream.ALLOWANCE
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    if len(content) != member.size:
                        raise UserError(f"{path}: truncated in {name}")
                    yield name, content
            stream.finish()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(
                f"{path}: damaged, truncated or not a tar archive, at or after {name} ({error})"
            ) from error
        if not stream.ended:
            raise UserError(f"{path}: truncated after {name}, the end mark of a tar archive is missing")


class _TarStream(io.RawIOBase):
    """Reads on behalf of tarfile, which trusts sizes in headers and takes a missing end mark for the end."""

    ALLOWANCE = MAX_MEMBER_BYTES + 2**20  # bytes between two members

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self.file = file
        self.allowance = self.ALLOWANCE
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.allowance -= len(block)
        if self.allowance < 0:
            raise UserError(f"a header or member of the archive is larger than {MAX_MEMBER_BYTES:,} bytes")
        self.tail = (self.tail + block)[-1024:] if len(block) < 1024 else block[-1024:]
        return block

    def finish(self) -> None:
        """Read to the end, so that gzip checks its sum."""
        while self.read(2**16):
            pass

    @property
    def ended(self) -> bool:
        """Whether the last two blocks are the zeros that end an archive."""
        return len(self.tail) == 1024 and not any(self.tail)


def _check_name(pattern: re.Pattern[str], name: str) -> None:
    if not pattern.fullmatch(name):
        shown = name if name.isprintable() else ascii(name)  # a name must not write escape codes to the terminal
        raise UserError(f"{shown}: unexpected path; accepted: {LAYOUT}")


def _check_size(size: int, name: str) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{name}: has {size:,} bytes; accepted: at most {MAX_MEMBER_BYTES:,}")


def _check_count(count: int, name: str) -> None:
    if count > MAX_MEMBERS:
        raise UserError(f"{name}: one file too many; accepted: at most {MAX_MEMBERS:,}")
