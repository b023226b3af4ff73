"""Sets of PNG files, one image and several masks per slice, read from folders, zip or tar archives.

A `Layout` describes the file names of a set; any other name is refused. An archive is read once, front to back, and
never unpacked to disk; links are not followed.
"""

import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import UserError

# What zipfile raises for damaged and encrypted archives
DAMAGED_ZIP = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error, lzma.LZMAError
)  # fmt: skip
MAX_MEMBER_BYTES = 4 * 2**20
MAX_WAITING_BYTES = 2**31  # of files whose slice is incomplete; the public sets are smaller as a whole
MAX_MEMBERS = 1_000_000  # the public sets have about 95,000 and 64,000

NamedFile = tuple[str, bytes]  # path below the root or in the archive, content


@dataclass(frozen=True)
class Layout:
    """File names of a set.

    Attributes:
        text: the accepted layout, for error messages.
        file: matches a file's path. Its group `kind` is the role of the file in its slice; the other named groups
            identify the slice.
        folder: matches a folder's path.
        kinds: values of `kind`: the image, then the readers' masks.
    """

    text: str
    file: re.Pattern[str]
    folder: re.Pattern[str]
    kinds: tuple[str, ...]


def read_files(
    paths: Iterable[str | os.PathLike[str]], layout: Layout
) -> Iterator[tuple[tuple[str, ...], list[NamedFile]]]:
    """Yield each slice of folders, `.zip`, `.tar` or `.tar.gz` archives as soon as all of its files have been read.

    The files of incomplete slices are kept in memory, up to `MAX_WAITING_BYTES`.

    Yields:
        The named groups of `layout.file` except `kind`, and the files in the order of `layout.kinds`.

    Raises:
        UserError: a file or archive member that does not follow the layout; the message names it.
    """
    roots = [Path(path) for path in paths]
    for path in roots:
        if not path.exists():
            raise UserError(
                f"{path}: no such file or directory; accepted: a folder, .zip or .tar(.gz) in the layout {layout.text}"
            )
    whole = f"accepted: one image and {len(layout.kinds) - 1} masks per slice"
    waiting: dict[tuple[str, ...], dict[str, NamedFile]] = {}
    finished: set[tuple[str, ...]] = set()
    waiting_bytes = 0
    for path in roots:
        read = _directory_files if path.is_dir() else _zip_files if zipfile.is_zipfile(path) else _tar_files
        for name, content in read(path, layout):
            match = layout.file.fullmatch(name)
            assert match is not None  # all three functions check the name
            groups = match.groupdict()
            kind = groups.pop("kind")
            key = tuple(groups.values())
            parts = waiting.setdefault(key, {})
            if key in finished or kind in parts:
                raise UserError(f"{name}: is repeated; {whole}")
            parts[kind] = (name, content)
            waiting_bytes += len(content)
            if waiting_bytes > MAX_WAITING_BYTES:
                first = next(iter(next(iter(waiting.values())).values()))[0]
                raise UserError(
                    f"{first}: its slice is still incomplete after {MAX_WAITING_BYTES >> 20} MiB of other files; "
                    f"{whole}, stored near each other"
                )
            if len(parts) == len(layout.kinds):
                finished.add(key)
                del waiting[key]
                waiting_bytes -= sum(len(content) for _, content in parts.values())
                yield key, [parts[kind] for kind in layout.kinds]
    for parts in waiting.values():
        missing = next(kind for kind in layout.kinds if kind not in parts)
        present = next(iter(parts.values()))[0]
        raise UserError(f"{present}: its slice has no {missing}; {whole}")
    if not finished:
        raise UserError(f"{roots[0]}: holds no slice; accepted: the layout {layout.text}")


def _directory_files(root: Path, layout: Layout) -> Iterator[NamedFile]:
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
                _check_name(layout, layout.folder, name)
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                _check_name(layout, layout.file, name)
                _check_size(entry.stat(follow_symlinks=False).st_size, name)
                yield name, Path(entry.path).read_bytes()
            else:
                raise UserError(f"{name}: is a link or device; accepted: regular files and folders")


def _zip_files(path: Path, layout: Layout) -> Iterator[NamedFile]:
    """Yield (name, content) of every regular member of a zip archive, in the order of its directory."""
    name = "its first member"
    try:
        with zipfile.ZipFile(path) as archive:
            for count, member in enumerate(archive.infolist(), start=1):
                name = member.filename.removesuffix("/")
                _check_name(layout, layout.folder if member.is_dir() else layout.file, name)
                _check_count(count, name)
                if member.is_dir():
                    continue
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{name}: is a link or device; accepted: regular files and folders")
                _check_size(member.file_size, name)
                yield name, archive.read(member)  # never more than `file_size`; a wrong checksum is an error
    except DAMAGED_ZIP as error:
        raise UserError(f"{path}: damaged, encrypted or truncated, at or after {name} ({error})") from error


def _tar_files(path: Path, layout: Layout) -> Iterator[NamedFile]:
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
                    _check_name(layout, layout.folder if member.isdir() else layout.file, name)
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
    """Reads for tarfile, which trusts sizes in headers and accepts archives without an end mark."""

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
        """Read to the end, so that gzip verifies its checksum."""
        while self.read(2**16):
            pass

    @property
    def ended(self) -> bool:
        """Whether the last two blocks are zero, as at the end of a complete archive."""
        return len(self.tail) == 1024 and not any(self.tail)


def _check_name(layout: Layout, pattern: re.Pattern[str], name: str) -> None:
    if not pattern.fullmatch(name):
        shown = name if name.isprintable() else ascii(name)  # no escape codes in the terminal
        raise UserError(f"{shown}: unexpected path; accepted: {layout.text}")


def _check_size(size: int, name: str) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{name}: has {size:,} bytes; accepted: at most {MAX_MEMBER_BYTES:,}")


def _check_count(count: int, name: str) -> None:
    if count > MAX_MEMBERS:
        raise UserError(f"{name}: too many files; accepted: at most {MAX_MEMBERS:,}")
