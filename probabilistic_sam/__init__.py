"""Probabilistic SAM: a distribution of masks for one image and one prompt.

Importing the package registers its classes with transformers' auto classes and its pipeline.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .modeling_probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamOutput
from .pipeline_probabilistic_sam import ProbabilisticMaskGenerationPipeline
from .processing_probabilistic_sam import ProbabilisticSamProcessor
from .thinning import thin_samples
from .trainer_collator import ProbabilisticSamCollator

__version__ = "0.3.0"

AutoConfig.register(TinyViTVisionConfig.model_type, TinyViTVisionConfig)
AutoConfig.register(ProbabilisticSamConfig.model_type, ProbabilisticSamConfig)
AutoModel.register(ProbabilisticSamConfig, ProbabilisticSamModel)
AutoModelForMaskGeneration.register(ProbabilisticSamConfig, ProbabilisticSamModel)
AutoProcessor.register(ProbabilisticSamConfig, ProbabilisticSamProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "probabilistic-mask-generation", ProbabilisticMaskGenerationPipeline, pt_model=AutoModel, type="image"
)

# The configuration in a repository refers to the pipeline's code in that repository, which `pipeline` would run. Hide
# the entry, since the package has the code. It remains in `__dict__`, from which the configuration is saved.
ProbabilisticSamConfig.custom_pipelines = property(
    lambda config: {}, lambda config, value: config.__dict__.update(custom_pipelines=value)
)

__all__ = [
    "ProbabilisticMaskGenerationPipeline",
    "ProbabilisticSamCollator",
    "ProbabilisticSamConfig",
    "ProbabilisticSamModel",
    "ProbabilisticSamOutput",
    "ProbabilisticSamProcessor",
    "TinyViTVisionConfig",
    "thin_samples",
]
