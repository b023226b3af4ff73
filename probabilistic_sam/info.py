"""The output of `probabilistic-sam info`: versions, device and model."""

import platform
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import yaml

from . import __version__
from .errors import UserError
from .inference import choose_device, find_model, load_model


def information(model: str | None) -> dict[str, Any]:
    """Collect versions, the default device and, if there are weights, facts about the model.

    Args:
        model: folder or owner/name; None takes the released weights.

    Returns:
        A dictionary for JSON. `model` is None if no weights are found, and `note` says how to get them.

    Raises:
        UserError: a model was named but cannot be loaded.
    """
    facts: dict[str, Any] = {
        "versions": {
            "probabilistic_sam": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": str(choose_device()),
        "model": None,
    }
    try:
        name = find_model(model)
    except UserError as error:
        return facts | {"note": str(error)}
    loaded, processor = load_model(name)
    facts["model"] = {
        "name": name,
        "type": loaded.config.model_type,
        "encoder": loaded.config.vision_config.model_type,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "image_size": processor.image_size,
        "crop_size": processor.crop_size,
        "license": _license(name),
    }
    return facts


def information_text(facts: dict[str, Any]) -> str:
    """The result of `information` as lines of text."""
    versions = dict(facts["versions"])
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "probabilistic_sam")
    lines = [f"probabilistic-sam {versions['probabilistic_sam']} ({others})", f"device: {facts['device']}"]
    model = facts["model"]
    if model is None:
        return "\n".join([*lines, f"model: {facts['note']}"])
    crop = "the whole image" if model["crop_size"] is None else f"{model['crop_size']} px around the prompt, or more"
    lines += [
        f"model: {model['name']}",
        f"type: {model['type']} with encoder {model['encoder']}, {model['parameters']:,} parameters",
        f"image size: {model['image_size']} px; crop size: {crop}",
        f"licence of the weights: {model['license'] or 'not stated in the model card'}",
    ]
    return "\n".join(lines)


def _license(name: str) -> str | None:
    """The licence in the metadata of the model card, None without a card or an entry."""
    try:
        card = Path(name) / "README.md" if Path(name).is_dir() else huggingface_hub.hf_hub_download(name, "README.md")
        metadata = huggingface_hub.metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError):  # no card, no connection, or metadata that is not valid YAML
        return None
    return metadata.get("license") if metadata else None
