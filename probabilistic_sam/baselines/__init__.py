"""What Probabilistic SAM is compared with: other ways to draw masks for one image and one prompt.

Every baseline has Probabilistic SAM's `sample(pixel_values | image_embeddings, input_boxes, num_samples, generator)`,
its prompts, its processor and its `save_pretrained`. Importing this package lets `AutoModel` open them.

| model_type | what differs between two samples |
|---|---|
| `dropout_unet` | the channels that dropout leaves out of a U-Net |
| `dropout_sam` | what dropout leaves out of SAM's decoder |
| `probabilistic_unet` | the latent of a conditional variational autoencoder (Kohl et al. 2018) |
| `deterministic_sam` | the prompt, moved by chance |
| `ellipse` | the size of an ellipse in the box; the image is not looked at |
| `pixel_prior` | the latent, as in Probabilistic SAM, but its prior sees raw pixels and no prompt |
| `prompt_free_prior` | the latent, as in Probabilistic SAM, but its prior is not told the prompt |

The oracles, which see the readers and bound what a model can reach, are in `training/evaluate.py`.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from ..processing_probabilistic_sam import ProbabilisticSamProcessor
from .ablations import PixelPriorConfig, PixelPriorModel, PromptFreePriorConfig, PromptFreePriorModel
from .ellipse import EllipseConfig, EllipseModel
from .sams import DeterministicSamConfig, DeterministicSamModel, DropoutSamConfig, DropoutSamModel
from .unets import DropoutUNetConfig, DropoutUNetModel, ProbabilisticUNetConfig, ProbabilisticUNetModel

BASELINES = (
    DropoutUNetModel, DropoutSamModel, ProbabilisticUNetModel, DeterministicSamModel, EllipseModel, PixelPriorModel,
    PromptFreePriorModel,
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
    "PixelPriorConfig",
    "PixelPriorModel",
    "ProbabilisticUNetConfig",
    "ProbabilisticUNetModel",
    "PromptFreePriorConfig",
    "PromptFreePriorModel",
]
