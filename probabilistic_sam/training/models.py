"""The model that a configuration describes, before training."""

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
from ..data import row_prompt
from ..data.format import decode_masks
from ..errors import UserError
from ..weights import check_loaded
from .config import MODELS, RANDOM, TrainingConfig


def build_model(config: TrainingConfig) -> PreTrainedModel:
    """The model to train, with the weights of `base_model` where it has such parts.

    Raises:
        UserError: `base_model` does not open or does not fit the configuration, or the model cannot be built.
    """
    values = {name: value for name, value in config.model.items() if name != "model_type"}
    model_class = MODELS[config.model_type]
    if model_class is ProbabilisticSamModel:
        return load_base_model(config, values)
    try:
        if not issubclass(model_class, SamVariant):
            return model_class(model_class.config_class(image_size=config.image_size, **values))
        shared = {name: value for name, value in values.items() if name in ProbabilisticSamConfig.__annotations__}
        return model_class.from_sam(load_base_model(config, shared), **values)
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"model {config.model} cannot be built: {error}") from error


def load_base_model(config: TrainingConfig, values: dict) -> ProbabilisticSamModel:
    """A Probabilistic SAM from `base_model`: a MobileSAM file, a SAM, or a Probabilistic SAM.

    Args:
        config: its `base_model` and `image_size`.
        values: further fields of the model's configuration.

    Raises:
        UserError: `base_model` does not open, is another model, or does not fit the configuration.
    """
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
        wanted = ProbabilisticSamConfig.from_dict(given.to_dict() | values)  # checks the fields again
        sizes = {name: (getattr(given, name), getattr(wanted, name)) for name in ("latent_dim", "latent_hidden_size")}
        sizes["image_size"] = (given.vision_config.image_size, config.image_size)
        for name, (old, new) in sizes.items():
            if old != new:
                raise UserError(f"base_model {base!r} has {name} {old}, the configuration {new}; accepted: {old}")
        model, info = ProbabilisticSamModel.from_pretrained(
            base, config=wanted, dtype=torch.float32, output_loading_info=True
        )
        check_loaded(info, f"base_model {base!r}")
        return model
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"base_model {base!r} does not open ({error}); accepted: {accepted}") from error


def freeze(model: PreTrainedModel) -> None:
    """Freeze the vision encoder. The model itself freezes the other parts of SAM that are not trained."""
    if isinstance(model, ProbabilisticSamModel):
        model.vision_encoder.requires_grad_(False)


def set_training_mode(model: PreTrainedModel) -> None:
    """Training mode, but the vision encoder stays in evaluation mode even where it is trained.

    Windows are then encoded as in validation, without dropout. No encoder has batch norm whose statistics would have
    to be kept: MobileSAM's are folded into its convolutions at conversion, and SAM's ViT has none.
    """
    model.train()
    if isinstance(model, ProbabilisticSamModel):
        model.vision_encoder.eval()


def compile_parts(model: ProbabilisticSamModel) -> None:
    """Compile encoder and detail network in place: most of a step's kernels, always called with the same shapes.

    Latent networks and decoder see as many readers as the batch has, and losses are a few small operations.
    """
    for part in (model.vision_encoder, model.detail_network):
        part.compile()


def fit_ellipse(model: EllipseModel, rows) -> None:
    """Fit to the readers' masks of the training split and to the boxes that evaluation uses."""

    def boxes() -> Iterator[tuple[list[float], np.ndarray]]:
        for table in rows.remove_columns("image").with_format("arrow").iter(1):
            row = table.to_pylist()[0]
            masks = decode_masks(row)
            prompt: Any = row_prompt(row, masks, "union_box")
            yield prompt["input_boxes"], masks

    model.fit(boxes())
