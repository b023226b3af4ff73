"""The provenance of results files, and a hash of weights."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(root: Path, packages: Sequence[str]) -> dict[str, Any]:
    """What is needed to reproduce a results file.

    Args:
        root: folder of the repository.
        packages: whose versions are recorded.

    Returns:
        `command`, `commit`, `date` (UTC) and `versions`.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git_commit(root),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def git_commit(root: Path) -> str:
    """The commit of a repository, with `+dirty` if tracked files differ from it; `unknown` outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")
