"""Probabilistic SAM: one image and one prompt give a distribution of masks."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .modeling_probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamOutput
from .processing_probabilistic_sam import ProbabilisticSamProcessor

__version__ = "0.1.0"

AutoConfig.register(TinyViTVisionConfig.model_type, TinyViTVisionConfig)
AutoConfig.register(ProbabilisticSamConfig.model_type, ProbabilisticSamConfig)
AutoModel.register(ProbabilisticSamConfig, ProbabilisticSamModel)
AutoModelForMaskGeneration.register(ProbabilisticSamConfig, ProbabilisticSamModel)
AutoProcessor.register(ProbabilisticSamConfig, ProbabilisticSamProcessor)

__all__ = [
    "ProbabilisticSamConfig",
    "ProbabilisticSamModel",
    "ProbabilisticSamOutput",
    "ProbabilisticSamProcessor",
    "TinyViTVisionConfig",
]
