"""Baselines: other models that sample masks for one image and one prompt.

Every baseline has the same `sample(pixel_values | image_embeddings, input_boxes, num_samples, generator)`, prompts,
processor and `save_pretrained` as Probabilistic SAM. Importing this package registers them with `AutoModel`.

| model_type | source of the variation between samples |
|---|---|
| `dropout_unet` | dropout of channels in a U-Net |
| `dropout_sam` | dropout in the inputs of SAM's mask decoder |
| `probabilistic_unet` | latent of a conditional variational autoencoder (Kohl et al. 2018) |
| `deterministic_sam` | random shifts of the prompt |
| `ellipse` | random size of an ellipse in the box; the image is not used |
| `no_detail` | latent as in Probabilistic SAM; no detail network |
| `pixel_prior` | latent as in Probabilistic SAM; the prior gets only raw pixels |
| `prompt_free_prior` | latent as in Probabilistic SAM; the prior does not get the prompt |

Oracles, which know the readers' masks and bound what a model can achieve, are in `probabilistic_sam/evaluation.py`.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from ..processing_probabilistic_sam import ProbabilisticSamProcessor
from .ablations import (
    NoDetailConfig,
    NoDetailModel,
    PixelPriorConfig,
    PixelPriorModel,
    PromptFreePriorConfig,
    PromptFreePriorModel,
)
from .ellipse import EllipseConfig, EllipseModel
from .sams import DeterministicSamConfig, DeterministicSamModel, DropoutSamConfig, DropoutSamModel
from .unets import DropoutUNetConfig, DropoutUNetModel, ProbabilisticUNetConfig, ProbabilisticUNetModel

BASELINES = (
    DropoutUNetModel, DropoutSamModel, ProbabilisticUNetModel, DeterministicSamModel, EllipseModel, NoDetailModel,
    PixelPriorModel, PromptFreePriorModel,
)  # fmt: skip

for model_class in BASELINES:
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    AutoModel.register(model_class.config_class, model_class)
    AutoProcessor.register(model_class.config_class, ProbabilisticSamProcessor)

__all__ = [
    "BASELINES",
    "DeterministicSamConfig",
    "DeterministicSamModel",
    "DropoutSamConfig",
    "DropoutSamModel",
    "DropoutUNetConfig",
    "DropoutUNetModel",
    "EllipseConfig",
    "EllipseModel",
    "NoDetailConfig",
    "NoDetailModel",
    "PixelPriorConfig",
    "PixelPriorModel",
    "ProbabilisticUNetConfig",
    "ProbabilisticUNetModel",
    "PromptFreePriorConfig",
    "PromptFreePriorModel",
]
