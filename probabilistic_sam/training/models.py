"""The model that a configuration asks for, what of it is trained, and at which rate."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from .. import ProbabilisticSamConfig, ProbabilisticSamModel
from ..baselines import EllipseModel
from ..baselines.common import SamVariant
from ..conversion import convert_mobile_sam, convert_sam, mobile_sam_config
from ..data import make_prompt, row_seed
from ..data.format import decode_masks
from ..errors import UserError
from .config import MODELS, RANDOM, TrainingConfig, model_type


def load_model(config: TrainingConfig) -> PreTrainedModel:
    """The model to train."""
    kind = model_type(config)
    values = {name: value for name, value in config.model.items() if name != "model_type"}
    if kind == ProbabilisticSamConfig.model_type:
        return load_base_model(config, values)
    model_class = MODELS[kind]
    try:
        if not issubclass(model_class, SamVariant):
            return model_class(model_class.config_class(image_size=config.image_size, **values))
        shared = {name: value for name, value in values.items() if name in ProbabilisticSamConfig.__annotations__}
        return model_class.from_sam(load_base_model(config, shared), **values)
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"model {config.model} is not one that can be built: {error}") from error


def load_base_model(config: TrainingConfig, values: dict) -> ProbabilisticSamModel:
    """A MobileSAM file, a SAM, or a Probabilistic SAM, with `values` in its configuration."""
    base, accepted = config.base_model, "MobileSAM's file (.pt, .safetensors), or directory or Hub name of a SAM"
    try:
        if base == RANDOM:
            return ProbabilisticSamModel(mobile_sam_config(config.image_size, **values))
        if base.endswith((".pt", ".pth", ".safetensors")):
            return convert_mobile_sam(base, config.image_size, **values)
        kind = AutoConfig.from_pretrained(base).model_type
        if kind == "sam":
            return convert_sam(base, config.image_size, **values)
        if kind != "probabilistic_sam":
            raise UserError(f"base_model {base!r} is a {kind!r} model; accepted: {accepted}")
        given = ProbabilisticSamConfig.from_pretrained(base)
        wanted = ProbabilisticSamConfig.from_dict(given.to_dict() | values)  # checks the fields anew
        sizes = {name: (getattr(given, name), getattr(wanted, name)) for name in ("latent_dim", "latent_hidden_size")}
        sizes["image_size"] = (given.vision_config.image_size, config.image_size)
        for name, (old, new) in sizes.items():
            if old != new:
                raise UserError(f"base_model {base!r} has {name} {old}, the configuration {new}; accepted: {old}")
        return ProbabilisticSamModel.from_pretrained(base, config=wanted, dtype=torch.float32)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"base_model {base!r} does not open ({error}); accepted: {accepted}") from error


def freeze(model: PreTrainedModel) -> None:
    """Train what is new, and the part of SAM's mask decoder that is used: the model itself freezes the rest of SAM."""
    if isinstance(model, ProbabilisticSamModel):
        model.vision_encoder.requires_grad_(False)


def fit_ellipse(model: EllipseModel, rows) -> None:
    """Fit to the boxes and readers' masks of the training split, the boxes as they are in the evaluation."""

    def boxes() -> Iterator[tuple[list[float], np.ndarray]]:
        for row in rows.remove_columns("image").with_format(None):
            masks = decode_masks(row)
            prompt: Any = make_prompt(masks, "union_box", np.random.default_rng(row_seed(row, "union_box")))
            yield prompt["input_boxes"], masks

    model.fit(boxes())


def parameter_groups(model: PreTrainedModel, config: TrainingConfig) -> list[dict]:
    """Two learning rates; no weight decay on vectors (norms, biases)."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("mask_decoder."), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate if pretrained else config.latent_learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (pretrained, decays), parameters in groups.items()
    ]
