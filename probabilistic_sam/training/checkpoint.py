"""Checkpoints: written whole, and resumed only with the same data and configuration."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conversion import load_torch_file
from ..data.format import split_content
from ..errors import UserError
from ..files import replaced_directory
from .config import TrainingConfig

# Of the configuration, what a resumed run may change: none of it moves its weights or its scores. The weights that
# base_model stands for are compared instead of its name
FREE_WHEN_RESUMED = ("base_model", "log_every", "checkpoint_every")


CHECKPOINT = {  # what training_state.pt holds
    "step": int, "best": dict, "log": dict, "ema": dict, "optimizer": dict, "scheduler": dict, "model": dict,
    "fingerprint": dict,
}  # fmt: skip


def fingerprint(config: TrainingConfig, model: PreTrainedModel, splits: dict[str, Any]) -> dict[str, Any]:
    """What a run has in common with the checkpoint that it resumes from, by field.

    Args:
        config: of the run.
        model: as `load_model` gives it, frozen already.
        splits: rows by the name of their split.
    """
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if name == "prompts":
            values[name] = json.dumps(value)  # their order matters, since a random number chooses among them
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
        content = split_content(rows)  # as manifest.json has it
        values[f"{split} split of the dataset"] = f"{content['rows']} rows, sha256 {content['sha256']}"
    return values


def save_checkpoint(
    directory: Path, step: int, model, optimizer, scheduler, ema, best: dict, log: dict, same: dict
) -> None:
    """`checkpoint-{step}`: everything that resuming needs, moved into place when it is complete; older ones go."""
    target = directory / f"checkpoint-{step}"
    state = {
        "step": step, "best": best, "log": log, "ema": ema.weights, "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(), "fingerprint": same,
        "model": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
    }  # fmt: skip
    with replaced_directory(target, ("*",)) as folder:
        torch.save(state, folder / "training_state.pt")
    for old in directory.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint folder that `--resume_from_checkpoint` means."""
    if name == "latest":
        found = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        if not found:
            raise UserError(
                f"{directory} holds no checkpoint-* folder to resume from; leave --resume_from_checkpoint out"
            )
        return max(found, key=lambda path: int(path.name.split("-")[-1]))
    path = Path(name)
    if not (path / "training_state.pt").is_file():
        raise UserError(f'{path} is no checkpoint: accepted are "latest" and a checkpoint-* folder of a run')
    if path.resolve().parent != directory.resolve():
        raise UserError(f"{path} is a checkpoint of another run; accepted: one of those in --output_dir {directory}")
    return path


def read_checkpoint(path: Path, names: Sequence[str] = tuple(CHECKPOINT)) -> dict:
    """Read the file of a checkpoint folder.

    Args:
        path: the folder.
        names: what is needed, of `CHECKPOINT`.

    Raises:
        UserError: the file is damaged or not one that `save_checkpoint` wrote.
    """
    state = load_torch_file(path / "training_state.pt")
    for name in names:
        if not isinstance(state, dict) or not isinstance(state.get(name), CHECKPOINT[name]):
            age = ", as those of earlier versions do" if name == "fingerprint" else ""
            raise UserError(f"{path / 'training_state.pt'} lacks {name!r}{age}; accepted: a file of training/train.py")
    return state


def check_same_run(recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `ValueError` unless the `fingerprint` of a checkpoint is that of the run which is to resume from it."""
    for name in [*wanted, *recorded]:
        values = [str(given[name]) if name in given else "not set" for given in (recorded, wanted)]
        if values[0] != values[1]:
            free = " and ".join(FREE_WHEN_RESUMED[1:])
            raise ValueError(
                f"{name} is {values[0]} there and {values[1]} here; accepted: the same dataset, configuration and "
                f"base model, only {free} may differ"
            )


def restore(state: dict, model, optimizer, scheduler, ema) -> None:
    """Put the content of a checkpoint in place.

    Raises:
        RuntimeError, ValueError, KeyError, TypeError, AttributeError: it is of another model or damaged.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, weights in (("model", trained), ("ema", ema.weights)):
        if {name: value.shape for name, value in state[part].items()} != {n: w.shape for n, w in weights.items()}:
            raise ValueError("its weights are of another model")
        with torch.no_grad():
            for name, value in state[part].items():
                weights[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    for parameter, values in optimizer.state.items():
        if any(value.ndim and value.shape != parameter.shape for value in values.values()):
            raise ValueError("its optimizer is of another model")
    scheduler.load_state_dict(state["scheduler"])
    if scheduler.last_epoch != state["step"]:
        raise ValueError(f"its learning rates are those of step {scheduler.last_epoch}, not {state['step']}")
