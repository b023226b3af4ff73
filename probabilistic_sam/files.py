"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def replaced_directory(path: str | os.PathLike, owned: Sequence[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well; otherwise nothing changes.

    Args:
        path: the folder to write: new, empty, or with entries that all match `owned`.
        owned: names or patterns of what a previous run may have left there.

    Raises:
        UserError: `path` is a file, holds anything else, or cannot be written.
    """
    target = Path(path).resolve()
    staging = aside = None
    try:
        if target.exists():
            if not target.is_dir():
                raise UserError(f"output {path} is a file; accepted: a directory")
            foreign = sorted(
                child.name for child in target.iterdir() if not any(fnmatch(child.name, name) for name in owned)
            )
            if foreign:
                raise UserError(
                    f"output directory {path} holds other files ({foreign[0]}); accepted: a new directory, an empty "
                    "one or a previous result"
                )
            if not os.access(target, os.W_OK):
                raise UserError(f"output directory {path} is not writable")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        staging.chmod(target.stat().st_mode if target.exists() else target.parent.stat().st_mode & 0o777)
        yield staging
        if target.exists():
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) / "previous"
            os.replace(target, aside)
        os.replace(staging, target)
    except OSError as error:
        raise UserError(f"output directory {path} cannot be written ({error.strerror or error})") from error
    finally:
        if aside is not None:
            if aside.exists() and not target.exists():
                os.replace(aside, target)
            shutil.rmtree(aside.parent, ignore_errors=True)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
