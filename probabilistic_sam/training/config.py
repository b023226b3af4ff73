"""The configuration of a training run: its fields, their checks, and how it is read from a file and a command line."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .. import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from ..baselines import BASELINES, EllipseConfig
from ..configuration_probabilistic_sam import RENAMED
from ..data import NODULE_BOX
from ..errors import UserError
from .windows import ADDED_AUGMENTATION, SYMMETRIES

MODELS = {item.config_class.model_type: item for item in (ProbabilisticSamModel, *BASELINES)}
RANDOM = "random"  # base_model that is MobileSAM's architecture without its weights
TRAINING_PROMPTS = ("union_box", "center_box", "center_point", NODULE_BOX)
AUGMENTATION: dict[str, Any] = {"max_shift": 6.0, "max_zoom": 0.15, "max_gamma": 0.25} | ADDED_AUGMENTATION
LARGEST = {"max_shift": math.inf, "max_zoom": 2, "max_gamma": 2, "rotation": 180, "noise": 1, "contrast": 2}


def number(default: float, least: float = 0, below: float = math.inf) -> Any:
    """A field whose value must be at least `least` and less than `below`."""
    return field(default=default, metadata={"least": least, "below": below})


@strict
@dataclass
class TrainingConfig:
    """The fields of a configuration file (YAML).

    Raises:
        StrictDataclassError: a value of another type, or one that is not accepted.
    """

    # Directory or Hub name of a SAM, MobileSAM's .pt or .safetensors file, or "random": MobileSAM without its weights
    base_model: str = ""
    image_size: int = number(256, least=16)  # side of the model's input, px
    crop_size: int = number(64, least=1)  # side of the window around a prompt, px of the image
    model: dict[str, Any] = field(default_factory=dict)  # model_type, and fields of that model's configuration
    seed: int = number(0)
    prompts: dict[str, float] = field(default_factory=lambda: {"union_box": 1.0})  # name -> share of the batches
    # frozen: a new view of a row at every visit; trained: the encoder learns too; cached: `num_views` fixed views per
    # row, encoded once and read from disk, for machines without a GPU
    encoder: Literal["frozen", "trained", "cached"] = "frozen"
    num_views: int = number(2)  # augmented views per row in the embedding cache; 0: the plain view only
    augmentation: dict[str, Any] = field(default_factory=AUGMENTATION.copy)  # arguments of windows.random_view
    batch_size: int = number(16, least=1)  # rows per step, over all processes and micro-batches
    gradient_accumulation: int = number(1, least=1)  # micro-batches per step and process
    num_workers: int = number(-1, least=-1)  # processes that make windows, per training process; -1: automatic
    max_steps: int = number(4000)
    max_minutes: float = number(0.0)  # of training, validation included; 0: no limit
    learning_rate: float = number(2e-4)  # of SAM's mask decoder
    latent_learning_rate: float = number(1e-3)  # of the new parameters
    encoder_learning_rate: float = number(5e-5)  # of the vision encoder, if it is trained
    weight_decay: float = number(0.02)
    warmup_steps: int = number(100)
    energy_start_step: int = number(0)  # first step with the energy distance in the loss
    energy_ramp_steps: int = number(500)  # steps until the energy distance has its full weight
    max_grad_norm: float = number(5.0)  # 0: gradients are not clipped
    ema_decay: float = number(0.995, below=1)  # of the averaged weights, which are validated and saved
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False  # compile encoder and detail network with torch.compile
    log_every: int = number(50, least=1)  # steps
    eval_every: int = number(500, least=1)  # steps
    eval_slices: int = number(300, least=1)  # rows of the validation split that are scored
    eval_samples: int = number(16, least=1)  # samples per scored row
    checkpoint_every: int = number(500, least=1)  # steps

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from parsed YAML: fields of version 0.1 are renamed, numbers read as floats where needed.

        Raises:
            ValueError: an unknown field, or a value that is not accepted, in one line.
        """
        types = {item.name: item.type for item in fields(cls)}
        known = convert(values, types)
        if known.get("mixed_precision") is False:  # what YAML makes of an unquoted `no`
            known["mixed_precision"] = "no"
        for name, value in known.items():
            if types[name] == dict[str, float] and isinstance(value, dict):
                known[name] = convert(value, dict.fromkeys(value, float), f"{name}.")
        if isinstance(known.get("augmentation"), dict):
            types_ = {name: type(value) for name, value in AUGMENTATION.items()}
            known["augmentation"] = convert(known["augmentation"], types_, "augmentation.")
        if isinstance(known.get("model"), dict):
            kind = known["model"].get("model_type", ProbabilisticSamConfig.model_type)
            known["model"] = convert(known["model"], model_fields(kind), "model.")
        try:
            return cls(**known)
        except StrictDataclassError as error:
            raise ValueError(explain(error)) from error

    def __post_init__(self) -> None:
        self.augmentation = AUGMENTATION | self.augmentation

    @property
    def model_type(self) -> str:
        """Which model is to be trained, one of `MODELS`."""
        return self.model.get("model_type", ProbabilisticSamConfig.model_type)

    def validate_numbers(self) -> None:
        """Check the limits that `number` states."""
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata
            if limits and not limits["least"] <= value < limits["below"]:
                accepted = f"{limits['least']:g} or more"
                if math.isfinite(limits["below"]):
                    accepted += f", less than {limits['below']:g}"
                raise ValueError(f"{item.name} is {value}; accepted: {accepted}")

    def validate_names(self) -> None:
        """Check the names of prompts and of the fields of `augmentation`."""
        for name, accepted in (("prompts", TRAINING_PROMPTS), ("augmentation", tuple(AUGMENTATION))):
            for key in getattr(self, name):
                if key not in accepted:
                    raise ValueError(f"unknown field {f'{name}.{key}'!r}; accepted: {', '.join(accepted)}")
        if not self.prompts or min(self.prompts.values()) <= 0:
            raise ValueError(f"prompts are {self.prompts}; accepted: names with shares above 0")

    def validate_windows(self) -> None:
        """Check `image_size` and `crop_size` by making the processor."""
        ProbabilisticSamProcessor(self.image_size, self.crop_size)

    def validate_augmentation(self) -> None:
        """Check the values of `augmentation`."""
        symmetries = self.augmentation["symmetries"]
        if symmetries not in SYMMETRIES:
            raise ValueError(f"augmentation.symmetries is {symmetries!r}; accepted: {', '.join(SYMMETRIES)}")
        for name, largest in LARGEST.items():
            value = self.augmentation[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= largest:
                accepted = "0 or more" if math.isinf(largest) else f"0 to {largest}"
                raise ValueError(f"augmentation.{name} is {value!r}; accepted: {accepted}")

    def validate_model(self) -> None:
        """Check the fields of the model by building its configuration."""
        model_class = MODELS[self.model_type]
        values = {name: value for name, value in self.model.items() if name != "model_type"}
        if issubclass(model_class, ProbabilisticSamModel):
            if not self.base_model:
                raise ValueError("base_model is not given; accepted: MobileSAM's file, a SAM's directory or Hub name")
        else:
            values["image_size"] = self.image_size
            if self.encoder == "trained":
                raise ValueError(f"encoder is 'trained', but {self.model_type} has none; accepted: frozen, cached")
            if self.compile:
                raise ValueError(f"compile is true; accepted for {self.model_type}: false")
        try:
            model_class.config_class(**values)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"model: {explain(error)}") from error
        if self.model_type == EllipseConfig.model_type and self.max_steps:
            raise ValueError(f"max_steps is {self.max_steps}; accepted for an ellipse, which is fitted: 0")
        if self.max_minutes and not self.max_steps:
            raise ValueError(f"max_minutes is {self.max_minutes:g} with max_steps 0, which trains nothing")


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainingConfig:
    """Read a YAML file.

    Args:
        path: of the file.
        overrides: values that replace those of the file, by dotted name, such as `{"model.latent_dim": 6}`.

    Raises:
        UserError: no file, no YAML, or what `TrainingConfig.from_dict` refuses.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no configuration file at {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no fields; accepted: lines such as `batch_size: 16`")
    overrides = overrides or {}
    where = " ".join([str(path), *(f"{name}={value}" for name, value in overrides.items())])
    try:
        for name, value in overrides.items():
            override(values, name, value)
        return TrainingConfig.from_dict(values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` arguments, each value as YAML: `["batch_size=32", "model.latent_dim=6"]`.

    Raises:
        UserError: an argument of another form, or the same name twice.

    >>> parse_overrides(["batch_size=32", "prompts.union_box=0.5"])
    {'batch_size': 32, 'prompts.union_box': 0.5}
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name and equals):
            raise UserError(f"{argument!r} is no override; accepted: name=value, such as batch_size=32")
        if name in overrides:
            raise UserError(f"{name} is given twice; accepted: each name once")
        try:
            overrides[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {argument!r} is not valid YAML: {error}") from error
    return overrides


def override(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one value of parsed YAML by its dotted name.

    A group that the file lacks starts from its default. A field's name of version 0.1 in the file gives way to the
    new one.
    """
    group, _, key = name.rpartition(".")
    if group:
        factories: dict[str, Any] = {item.name: item.default_factory for item in fields(TrainingConfig)}
        groups = [item for item, factory in factories.items() if factory is not MISSING]
        if group not in groups:
            raise ValueError(f"unknown field {name!r}; accepted: {', '.join(f'{item}.NAME' for item in groups)}")
        values = values.setdefault(group, factories[group]())
        if not isinstance(values, dict):
            raise ValueError(f"{group} is {values!r}; accepted: fields with values")
    for old, new in RENAMED.items():
        if RENAMED.get(key, key) == new:
            values.pop(old, None)
    values[RENAMED.get(key, key)] = value


def convert(values: Mapping[str, Any], types: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check names, rename those of version 0.1, and convert values to float where that is the type.

    The conversion is needed because YAML reads 1 as an integer and 1e-3 as text.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        new = RENAMED.get(name, name)
        if new not in types:
            raise ValueError(f"unknown field {prefix + str(name)!r}; accepted: {', '.join(sorted(types))}")
        if new in result:
            raise ValueError(f"{prefix}{new} is given twice, once by its old name; accepted: {new} alone")
        if types[new] in (float, float | int) and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):  # what stays text is refused as such
                value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} is {value}; accepted: a finite number")
        result[new] = value
    return result


def model_fields(kind: Any) -> dict[str, Any]:
    """Names and types of the fields that `model` may hold: those that our own configuration classes declare."""
    if kind not in list(MODELS):  # YAML may give what no dictionary takes as a key
        raise ValueError(f"model.model_type is {kind!r}; accepted: {', '.join(MODELS)}")
    ours = [item for item in MODELS[kind].config_class.__mro__ if item.__module__.startswith("probabilistic_sam.")]
    found = {name: type_ for item in ours for name, type_ in item.__annotations__.items()}
    found.pop("image_size", None)  # a field of the training configuration, since the processor needs it too
    return found | {"model_type": str}


def explain(error: BaseException) -> str:
    """What a strict dataclass refused, in one line: the first cause that is not about the dataclass itself."""
    while error.__cause__ is not None and type(error) is not ValueError:
        error = error.__cause__
    return str(error)
