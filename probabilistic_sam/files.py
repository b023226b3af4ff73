"""Files and folders that are written completely or not at all.

New content is written to a temporary folder at its destination and moved into place at the end. If anything fails
before, the previous file or folder is unchanged and the temporary folder is removed. A killed process leaves its
temporary folder behind (`.tmp-<host>-<process id>-*`); the next write to the same place removes it.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from .errors import UserError

# The host is part of the name, because process ids of other hosts say nothing on a shared disk
TEMPORARY = f".tmp-{platform.node()}-"
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini", ".tmp-*")  # of file managers, and of other processes


@contextmanager
def replaced_directory(
    path: str | os.PathLike[str], owned: Sequence[str], results: str | None = None
) -> Iterator[Path]:
    """Write a folder: yields a temporary folder whose content replaces that of `path` when the block ends.

    A folder that exists stays where it is, since it may be a mount or the current directory of a shell: its entries
    are exchanged.

    Args:
        path: the folder to write. It may be missing, empty, or contain only files that match `owned`.
        owned: patterns of the paths that a previous run may have left there, such as `masks/sample-*.png`. What is
            below a path that matches is owned as well.
        results: pattern of the folders that hold a `result.json` of this program if a previous run left them: "." or
            one such as "box-*"; None if no folder does.

    Raises:
        UserError: `path` is a file, contains other files, or cannot be written.
    """
    target = Path(path).resolve()
    place = target if target.is_dir() else target.parent
    with _temporary_folder(place, f"output directory {path}") as temporary:
        _check_replaceable(target, path, owned, results)
        new, previous = temporary / "new", temporary / "previous"
        new.mkdir()
        previous.mkdir()
        yield new
        if target.exists():
            _exchange(target, new, previous, owned)
        else:
            os.replace(new, target)


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


def _exchange(target: Path, new: Path, previous: Path, owned: Sequence[str]) -> None:
    """Move the owned entries of a folder to `previous` and those of `new` into it; undo this if it fails."""
    old = [entry for entry in target.iterdir() if not is_ignored(entry) and _is_owned((entry.name,), owned, True)]
    moves = [(entry, previous / entry.name) for entry in old]
    moves += [(entry, target / entry.name) for entry in new.iterdir()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            os.replace(source, place)
            done.append((source, place))
    except BaseException:
        for source, place in reversed(done):
            os.replace(place, source)
        raise


def _check_replaceable(target: Path, path: str | os.PathLike[str], owned: Sequence[str], results: str | None) -> None:
    """Refuse to replace a file, or a folder that contains anything but what a previous run wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"output {path} is a file; accepted: a directory")
    foreign = next(_foreign(target, owned, results), None)
    if foreign is not None:
        raise UserError(
            f"output directory {path} holds other files ({foreign}); accepted: a new directory, an empty one or a "
            "previous result"
        )
    # A folder can only be moved by those who may write it
    if not all(os.access(place, os.W_OK) for place in (target, *filter(Path.is_dir, target.iterdir()))):
        raise UserError(f"output directory {path} is not writable")


def _foreign(target: Path, owned: Sequence[str], results: str | None) -> Iterator[PurePath]:
    """Paths in a folder, relative to it, that no previous run can have left there."""

    def fail(error: OSError) -> None:
        raise error

    top: list[str] = []
    found = results is None
    for name, folders, files in os.walk(target, onerror=fail):
        place = Path(name)
        relative = place.relative_to(target)
        folders[:] = sorted(folder for folder in folders if not is_ignored(place / folder))
        entries = [file for file in sorted(files) if not is_ignored(place / file)] + folders
        if place == target:
            top = entries
        for entry in entries:
            is_folder = entry in folders and not (place / entry).is_symlink()
            if not _is_owned((*relative.parts, entry), owned, is_folder):
                yield relative / entry
        if results is not None and _matches(relative.parts, results):
            if _is_result(place / "result.json"):
                found = True
            elif place != target:
                yield relative
    if top and not found:
        yield PurePath(top[0])


def _matches(parts: Sequence[str], pattern: str) -> bool:
    """Whether the parts of a path match those of a pattern one by one."""
    patterns = PurePath(pattern).parts  # none for "."
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _is_owned(parts: Sequence[str], owned: Sequence[str], is_folder: bool) -> bool:
    """Whether a path matches a pattern or is below one that does; a folder may also lead to one."""
    return any(
        all(map(fnmatchcase, parts, pattern)) and (is_folder or len(parts) >= len(pattern))
        for pattern in (name.split("/") for name in owned)
    )


def is_ignored(path: Path) -> bool:
    """Whether a path is a file manager's, or a temporary one of another process."""
    return any(fnmatchcase(path.name, pattern) for pattern in IGNORED)


def _is_result(path: Path) -> bool:
    """Whether a file is a `result.json` of this program."""
    try:
        return "probabilistic_sam" in json.loads(path.read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
