"""Weights: reading and writing them, whether they fit their model, and their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import UserError
from .files import replaced_files
from .modeling_probabilistic_sam import ProbabilisticSamModel
from .processing_probabilistic_sam import ProbabilisticSamProcessor


def load_torch_file(path: str | Path) -> Any:
    """Read a file of `torch.save` with tensors, containers and numbers only; code in the file is never run.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise UserError(f"{path} is not a readable torch file ({type(error).__name__})") from error


def check_loaded(info: dict, origin: str, new: tuple[str, ...] = ()) -> None:
    """Refuse weights that do not fit their model.

    Args:
        info: what `from_pretrained(output_loading_info=True)` returns.
        origin: of the weights, for the message.
        new: beginnings of the names that may be missing.

    Raises:
        UserError: weights are missing, unexpected or of another shape; the message names them.
    """
    wrong = {
        "missing": sorted(key for key in info["missing_keys"] if not key.startswith(new)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in info["mismatched_keys"]),
    }
    if any(wrong.values()):
        named = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items() if keys)
        raise UserError(f"{origin} does not fit: tensors {named}")


def save_model(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    directory: str | Path,
    others: Mapping[str, str] | None = None,
) -> None:
    """Write model and processor: first all files to a temporary folder, then each to its place.

    Args:
        model: any model of the package.
        processor: its processor.
        directory: folder to write into.
        others: texts of further files, by name.

    Raises:
        UserError: the directory cannot be written.
    """
    with replaced_files(directory) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # what safetensors raises where the disk is full, among others
            raise UserError(f"the model cannot be written to {directory}: {error}") from error
        processor.save_pretrained(folder)
        for name, text in (others or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


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
