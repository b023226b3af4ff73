"""Where a file of results comes from, and how it is written."""

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
    """What is needed to make a results file again: command, commit of the repository `root`, date, versions."""
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
    """The repository's commit, with `+dirty` when tracked files differ from it; `unknown` outside of a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")
