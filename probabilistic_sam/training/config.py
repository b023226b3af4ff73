"""The configuration of a training."""

import argparse
import contextlib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .. import ProbabilisticSamConfig, ProbabilisticSamModel
from ..baselines import BASELINES, EllipseConfig
from ..configuration_probabilistic_sam import RENAMED
from ..errors import UserError
from ..hub.push import check_repo_name

MODELS = {item.config_class.model_type: item for item in (ProbabilisticSamModel, *BASELINES)}
RANDOM = "random"  # base_model that is MobileSAM without its weights
TRAINING_PROMPTS = ("union_box", "center_box", "center_point")
AUGMENTATIONS = ("max_shift", "max_zoom", "max_gamma")
MINIMA = dict.fromkeys(("crop_size", "batch_size", "log_every", "eval_every", "eval_slices"), 1) | {
    "eval_samples": 1, "checkpoint_every": 1, "max_steps": 0, "seed": 0, "num_views": 0, "warmup_steps": 0,
}  # fmt: skip


@dataclass
class TrainingConfig:
    """Fields of the YAML file; `model` holds its `model_type` and fields of the configuration of that model."""

    # Directory or Hub name of a SAM, MobileSAM's .pt / .safetensors file, or "random": MobileSAM without its weights
    base_model: str = ""
    image_size: int = 256  # px, the model's input
    crop_size: int = 64  # px of the image around a prompt
    model: dict = field(default_factory=dict)
    seed: int = 0
    prompts: dict = field(default_factory=lambda: {"union_box": 1.0})  # name -> share of the batches
    num_views: int = 2  # augmented views of a slice in the cache
    augmentation: dict = field(default_factory=lambda: {"max_shift": 6.0, "max_zoom": 0.15, "max_gamma": 0.25})
    batch_size: int = 16  # slices a step, over all processes
    max_steps: int = 4000
    learning_rate: float = 2e-4  # of SAM's decoder
    latent_learning_rate: float = 1e-3  # of everything that is new
    weight_decay: float = 0.02
    warmup_steps: int = 100
    energy_start_step: int = 0  # the energy distance joins the loss from here on...
    energy_ramp_steps: int = 500  # ... and reaches its weight after so many steps
    max_grad_norm: float = 5.0
    ema_decay: float = 0.995  # of the weights that are validated and kept
    mixed_precision: str = "no"  # or bf16
    log_every: int = 50
    eval_every: int = 500
    eval_slices: int = 300
    eval_samples: int = 16
    checkpoint_every: int = 500


def read_config(arguments: argparse.Namespace) -> TrainingConfig:
    """The YAML file with what the command line replaces."""
    path = Path(arguments.config)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no configuration file at {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no fields; accepted: lines such as `batch_size: 16`")
    for name in ("base_model", "max_steps", "seed"):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    config = TrainingConfig(**typed(values, {item.name: item.type for item in fields(TrainingConfig)}, str(path)))
    kind = model_type(config)
    if kind not in MODELS:
        raise UserError(f"{path}: model_type is {kind!r}; accepted: {', '.join(MODELS)}")
    if issubclass(MODELS[kind], ProbabilisticSamModel) and not config.base_model:
        raise UserError(f"{path} names no base_model, and --base_model is not given")
    if arguments.push_to_hub:
        check_repo_name(arguments.push_to_hub)
        if kind != ProbabilisticSamConfig.model_type:
            raise UserError(f"--push_to_hub with model_type {kind!r}; accepted: {ProbabilisticSamConfig.model_type}")
    if kind == EllipseConfig.model_type and config.max_steps:
        raise UserError(f"{path}: max_steps is {config.max_steps}; accepted for an ellipse, which is fitted: 0")
    config.model = typed(config.model, model_fields(kind), f"{path}, model")
    config.prompts = typed(config.prompts, dict.fromkeys(TRAINING_PROMPTS, float), f"{path}, prompts")
    config.augmentation = typed(config.augmentation, dict.fromkeys(AUGMENTATIONS, float), f"{path}, augmentation")
    for name, least in MINIMA.items():
        if getattr(config, name) < least:
            raise UserError(f"{path}: {name} is {getattr(config, name)}; accepted: {least} or more")
    if not config.prompts or min(config.prompts.values()) <= 0:
        raise UserError(f"{path}: prompts are {config.prompts}; accepted: names with shares above 0")
    if config.num_views and set(config.augmentation) != set(AUGMENTATIONS):
        raise UserError(f"{path}: augmentation is {config.augmentation}; accepted: all of {', '.join(AUGMENTATIONS)}")
    if config.mixed_precision not in ("no", "bf16"):
        raise UserError(f"{path}: mixed_precision is {config.mixed_precision!r}; accepted: no, bf16")
    return config


def model_type(config: TrainingConfig) -> str:
    """Which model is to be trained."""
    return config.model.get("model_type", ProbabilisticSamConfig.model_type)


def model_fields(kind: str) -> dict[str, Any]:
    """Fields that `model:` may hold, with their types: those that our own classes declare."""
    ours = [item for item in MODELS[kind].config_class.__mro__ if item.__module__.startswith("probabilistic_sam.")]
    fields_ = {name: type_ for item in ours for name, type_ in item.__annotations__.items()}
    fields_.pop("image_size", None)  # stands at the top, since the processor needs it too
    return fields_ | {"model_type": str}


def typed(values: dict, types: dict[str, Any], where: str) -> dict:
    """Check names and types; what YAML reads as int (1) or text (1e-3) becomes float where that is declared."""
    result = {}
    for name, value in values.items():
        name = RENAMED.get(name, name)
        if name not in types:
            raise UserError(f"{where}: unknown field {name!r}; accepted: {', '.join(sorted(types))}")
        if types[name] is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                value = float(value)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not isinstance(value, types[name]) or isinstance(value, bool) or infinite:
            raise UserError(f"{where}: {name} is {value!r}; accepted: a value of type {types[name].__name__}")
        result[name] = value
    return result
