"""Files and folders that are written completely or not at all.

New content is written to a temporary folder next to its destination and moved into place at the end. If anything
fails, the previous file or folder is unchanged and the temporary folder is removed. A killed process leaves its
temporary folder behind (`.tmp-<host>-<process id>-*`); the next write to the same place removes it.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .errors import UserError

# The host is part of the name, because process ids of other hosts say nothing on a shared disk
TEMPORARY = f".tmp-{platform.node()}-"


@contextmanager
def replaced_directory(path: str | os.PathLike[str], owned: Sequence[str]) -> Iterator[Path]:
    """Write a folder: yields a temporary folder that replaces `path` when the block ends without an error.

    Args:
        path: the folder to write. It may be missing, empty, or contain only entries that match `owned`.
        owned: names or patterns of the entries that a previous run may have left there.

    Raises:
        UserError: `path` is a file, contains other entries, or cannot be written.
    """
    target = Path(path).resolve()
    with _temporary_folder(target.parent, f"output directory {path}") as temporary:
        _check_replaceable(target, path, owned)
        new, previous = temporary / "new", temporary / "previous"
        new.mkdir()
        yield new
        try:
            if target.exists():
                shutil.copymode(target, new)
                os.replace(target, previous)
            os.replace(new, target)
        finally:
            if previous.exists() and not target.exists():
                os.replace(previous, target)


@contextmanager
def replaced_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Write files into a folder: yields a temporary folder whose files move to `folder` when the block ends.

    Files of the same name are replaced and keep their permissions; other files in `folder` are not touched. The
    folder is created if necessary.

    Raises:
        UserError: a file cannot be written.
    """
    folder = Path(folder)
    with _temporary_folder(folder, folder) as temporary:
        yield temporary
        for file in sorted(temporary.iterdir()):
            target = folder / file.name
            if target.exists():
                shutil.copymode(target, file)
            os.replace(file, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8).

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    with replaced_files(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file.

    Raises:
        UserError: it cannot be written.
        ValueError: `content` has a NaN or an infinite number, which JSON does not allow.
    """
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def _temporary_folder(parent: Path, name: str | Path) -> Iterator[Path]:
    """An empty folder in `parent`, removed at the end; errors of the operating system become one line with `name`."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        with tempfile.TemporaryDirectory(
            dir=parent, prefix=f"{TEMPORARY}{os.getpid()}-", ignore_cleanup_errors=True
        ) as temporary:
            yield Path(temporary)
    except OSError as error:
        if error.errno is None:  # raised by a library for a reason of its own
            raise
        file = str(error.filename or "")
        if TEMPORARY in file or str(name).endswith(file):
            raise UserError(f"{name} cannot be written: {error.strerror}") from error
        raise UserError(f"{file}: {error.strerror}; {name} cannot be written") from error


def _remove_abandoned(parent: Path) -> None:
    """Remove temporary folders of killed processes of this host."""
    if os.name != "posix":  # elsewhere os.kill would end the process
        return
    for path in parent.iterdir():
        process = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if path.name.startswith(TEMPORARY) and process.isdecimal():
            try:
                os.kill(int(process), 0)  # only asks whether it is running
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except (PermissionError, OverflowError):
                pass


def _check_replaceable(target: Path, path: str | os.PathLike[str], owned: Sequence[str]) -> None:
    """Refuse to replace a file, or a folder that contains anything but what a previous run wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"output {path} is a file; accepted: a directory")
    foreign = sorted(child.name for child in target.iterdir() if not any(fnmatch(child.name, name) for name in owned))
    if foreign:
        raise UserError(
            f"output directory {path} holds other files ({foreign[0]}); accepted: a new directory, an empty one or a "
            "previous result"
        )
    if not os.access(target, os.W_OK):
        raise UserError(f"output directory {path} is not writable")
