"""The provenance of results files, and a hash of weights."""

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import UserError


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


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, the same in every precision that float32 holds exactly."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def model_hash(model: Any) -> str:
    """`weights_hash` of a model's weights as `save_pretrained` writes them: without tied ones."""
    tied = set(model.all_tied_weights_keys)
    return weights_hash({name: value for name, value in model.state_dict().items() if name not in tied})


def folder_hash(folder: Path) -> str | None:
    """`weights_hash` of the safetensors files of a folder, the `model_hash` of their model; None without files.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        weights = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read ({error})") from error
    return weights_hash(weights) if weights else None
