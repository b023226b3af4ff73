"""Checkpoints of a training run: written as a whole, and resumed only with the same data and configuration."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from ..data.format import encoded_bytes
from ..errors import UserError
from ..files import replaced_directory
from ..weights import load_torch_file
from .config import TrainingConfig
from .optimization import Optimization
from .windows import effective_augmentation

# Fields that a resumed run may change, since neither weights nor scores depend on them. `base_model` is among them
# because its weights are compared instead of its name
FREE_WHEN_RESUMED = ("base_model", "log_every", "checkpoint_every", "num_workers")

CHECKPOINT = {  # content of training_state.pt
    "step": int, "best": dict, "log": dict, "seconds": float, "ema": dict, "optimizer": dict, "model": dict,
    "fingerprint": dict,
}  # fmt: skip


def fingerprint(config: TrainingConfig, model: PreTrainedModel, splits: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run resumes from a checkpoint, by field.

    Args:
        config: of the run.
        model: from `build_model`; its frozen weights are compared.
        splits: rows by the name of their split.
    """
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if name == "prompts":
            values[name] = json.dumps(value)  # the order matters, since a random number chooses among them
        elif name == "augmentation":
            values |= {f"{name}.{key}": item for key, item in effective_augmentation(value).items()}
        elif isinstance(value, dict):
            values |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in FREE_WHEN_RESUMED:
            values[name] = value
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in trained:
            frozen.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    values["frozen weights of base_model"] = f"sha256 {frozen.hexdigest()}"
    for split, rows in splits.items():
        values[f"{split} split of the dataset"] = f"{len(rows)} rows, sha256 {encoded_content(rows)}"
    return values


def encoded_content(rows: datasets.Dataset) -> str:
    """SHA-256 of a split's columns and encoded images, without decoding any."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(1):  # one at a time, since images may be large
        (row,) = table.to_pylist()
        image, masks = row.pop("image"), row.pop("masks")
        digest.update(json.dumps(row, sort_keys=True).encode())
        for item in filter(None, (image, *masks)):
            try:
                digest.update(hashlib.sha256(encoded_bytes(item)).digest())
            except OSError as error:
                raise UserError(f"image {item['path']} of the dataset cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write `checkpoint-{step}` completely or not at all, and remove the older ones.

    Args:
        directory: of the run.
        state: with the keys of `CHECKPOINT`.
    """
    target = directory / f"checkpoint-{state['step']}"
    with replaced_directory(target, ("*",)) as folder:
        try:
            torch.save(state, folder / "training_state.pt")
        except RuntimeError as error:  # what PyTorch raises where the disk is full, among others
            raise UserError(f"{target} cannot be written (is the disk full?): {str(error).splitlines()[0]}") from error
    for old in checkpoints(directory):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoint folders of a run, in the order of their steps; folders with other names are not among them."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def find_checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint folder that `--resume_from_checkpoint` names.

    Args:
        name: "latest" or a folder.
        directory: of the run.

    Raises:
        UserError: there is no checkpoint, or it is of another run.
    """
    if name == "latest":
        found = checkpoints(directory)
        if not found:
            raise UserError(
                f"{directory} holds no checkpoint-* folder to resume from; leave --resume_from_checkpoint out"
            )
        return found[-1]
    path = Path(name)
    if not (path / "training_state.pt").is_file():
        raise UserError(f'{path} is no checkpoint: accepted are "latest" and a checkpoint-* folder of a run')
    if path.resolve().parent != directory.resolve():
        raise UserError(f"{path} is a checkpoint of another run; accepted: one of those in --output_dir {directory}")
    return path


def resume_from(path: Path, wanted: dict[str, Any], optimization: Optimization) -> dict[str, Any]:
    """Restore weights, average and optimizer from a checkpoint.

    Args:
        path: checkpoint folder.
        wanted: `fingerprint` of the run that resumes.
        optimization: of the same run, changed in place.

    Returns:
        The content of the checkpoint.

    Raises:
        UserError: the checkpoint is damaged or of another run.
    """
    try:
        state = read_checkpoint(path)
        check_same_run(state["fingerprint"], wanted)
        optimization.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be resumed from: {error}") from error
    return state


def read_checkpoint(path: Path, names: Sequence[str] = tuple(CHECKPOINT)) -> dict[str, Any]:
    """Read the file of a checkpoint folder.

    Args:
        path: the folder.
        names: keys of `CHECKPOINT` that are needed.

    Raises:
        UserError: the file is damaged or not one that `save_checkpoint` wrote.
    """
    state = load_torch_file(path / "training_state.pt")
    for name in names:
        if not isinstance(state, dict) or not isinstance(state.get(name), CHECKPOINT[name]):
            age = ", like those of earlier versions" if name == "fingerprint" else ""
            raise UserError(f"{path / 'training_state.pt'} lacks {name!r}{age}; accepted: a file of training/train.py")
    return state


def check_same_run(recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `ValueError` unless the `fingerprint` of a checkpoint equals that of the run which resumes from it."""
    for name in [*wanted, *recorded]:
        values = [str(given[name]) if name in given else "not set" for given in (recorded, wanted)]
        if values[0] != values[1]:
            free = ", ".join(FREE_WHEN_RESUMED[1:])
            raise ValueError(
                f"{name} is {values[0]} there and {values[1]} here; accepted: the same dataset, configuration and "
                f"base model, only {free} may differ"
            )
