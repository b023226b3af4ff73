"""Configurations of Probabilistic SAM and of MobileSAM's vision encoder."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SamConfig

RENAMED = {"drawing_weight": "presence_weight"}  # fields of version 0.1: old name -> new name


@strict
class TinyViTVisionConfig(PreTrainedConfig):
    r"""MobileSAM's image encoder (TinyViT-5M): a convolutional stage and three stages of windowed attention.

    Args:
        image_size (`int`, defaults to 1024): side of the square input in pixels, a multiple of `patch_size`.
        patch_size (`int`, defaults to 16): total stride from pixels to image embeddings.
        embed_dims (`list[int]`): channels of the four stages.
        depths (`list[int]`): blocks of the four stages.
        num_heads (`list[int]`): attention heads of the four stages; the first stage has no attention.
        window_sizes (`list[int]`): sides of the attention windows; the first stage has none.
        mbconv_expand_ratio (`float`): expansion of the first stage's inverted bottlenecks.
        mlp_ratio (`float`): expansion of the MLPs.
        output_channels (`int`): channels of the image embeddings.
        num_pos_feats (`int`): half the width of SAM's positional encoding.
    """

    base_config_key = "vision_config"
    model_type = "tiny_vit_vision_model"

    image_size: int = 1024
    patch_size: int = 16
    num_channels: int = 3
    embed_dims: list[int] | tuple[int, ...] = (64, 128, 160, 320)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: list[int] | tuple[int, ...] = (7, 7, 14, 7)
    mbconv_expand_ratio: float = 4.0
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    output_channels: int = 256
    num_pos_feats: int = 128
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, got {self.image_size}")
        self.hidden_size = self.embed_dims[-1]
        self.scale = 128  # standard deviation with which SAM's positional encoding is initialised
        super().__post_init__(**kwargs)


@strict
class ProbabilisticSamConfig(SamConfig):
    r"""SAM's configuration with fields for the detail network, the latent space and the loss.

    The latent of one sample has `latent_dim` coordinates. The first one is the presence: the reader is predicted to
    annotate if it is positive. The others shape the outline and are added to SAM's sparse prompt embeddings.

    Args:
        vision_config: SAM's own ViT (`SamVisionConfig`) or MobileSAM's TinyViT (`TinyViTVisionConfig`); a dictionary
            is read by its `model_type`.
        latent_dim (`int`, defaults to 9): coordinates of the latent including the presence; at least 2.
        latent_hidden_size (`int`, defaults to 128): width of the prior and posterior networks.
        detail_hidden_size (`int`, defaults to 32): channels of the detail network at the resolution of the masks;
            twice as many at half that resolution, four times as many at a quarter.
        detail_num_blocks (`int`, defaults to 3): blocks of the detail network at its lowest resolution.
        latent_dropout (`float`, defaults to 0.1): dropout in the heads of the prior and posterior networks.
        bce_weight, dice_weight (`float`): weights of the two reconstruction terms: binary cross-entropy **summed over
            the pixels of the low-resolution mask**, and soft Dice loss (0 to 1).
        kl_weight (`float`, defaults to 1): weight of the KL divergence of the outline, in nats, summed over latent
            coordinates. It is relative to a sum over pixels: with a mean over pixels the same weight would count some
            4,000 times as much, and the posterior would collapse.
        presence_weight (`float`, defaults to 1): weight of the KL divergence of the presence, -log P(annotated or
            empty). It is 1 in the evidence lower bound; choose more if `energy_weight` is large, since both terms
            train the prior.
        energy_weight (`float`, defaults to 0): weight of the energy distance between samples of the prior and readers.
        num_energy_samples (`int`, defaults to 4): samples of the prior per training step for the energy distance; at
            least 2 if `energy_weight` is positive.
    """

    model_type = "probabilistic_sam"
    # Outputs that `Trainer` does not pass to compute_metrics, so that it gets `pred_masks` only
    keys_to_ignore_at_inference = [
        "reconstruction_loss", "energy_distance", "kl_divergence", "reconstructed_masks", "iou_scores", "latents",
        "prior_mean", "prior_log_std", "posterior_mean", "posterior_log_std", "outline_masks", "presence",
        "iou_loss",
    ]  # fmt: skip

    latent_dim: int = 9
    latent_hidden_size: int = 128
    detail_hidden_size: int = 32
    detail_num_blocks: int = 3
    latent_dropout: float | int = 0.1
    bce_weight: float | int = 1.0
    dice_weight: float | int = 10.0
    kl_weight: float | int = 1.0
    presence_weight: float | int = 1.0
    energy_weight: float | int = 0.0
    num_energy_samples: int = 4

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read a dictionary; the configuration of a plain SAM is completed with default values."""
        if config_dict.get("model_type") == SamConfig.model_type:
            others = ("model_type", "architectures")
            config_dict = {key: value for key, value in config_dict.items() if key not in others}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        for old, new in RENAMED.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        if kwargs.pop("latent_injection", "sparse") != "sparse":
            raise ValueError('latent_injection was removed in version 0.2; only models with "sparse" can be opened')
        if self.latent_dim < 2:
            raise ValueError(f"latent_dim must be at least 2 (the first is the presence), got {self.latent_dim}")
        least = 2 if self.energy_weight > 0 else 0  # the energy distance compares samples with each other
        if self.num_energy_samples < least:
            raise ValueError(
                f"num_energy_samples must be at least {least} with energy_weight {self.energy_weight:g}, got "
                f"{self.num_energy_samples}"
            )
        if self.detail_hidden_size < 8 or self.detail_hidden_size % 8:
            raise ValueError(f"detail_hidden_size must be a multiple of 8, got {self.detail_hidden_size}")
        vision: Any = self.vision_config  # type: ignore[has-type]
        if isinstance(vision, dict) and vision.get("model_type") == TinyViTVisionConfig.model_type:
            self.vision_config = TinyViTVisionConfig(**vision)
        super().__post_init__(**kwargs)
        vision, prompt_size = self.vision_config, self.prompt_encoder_config.image_size
        if vision.image_size != prompt_size or prompt_size % 16 or vision.patch_size != 16:
            raise ValueError(
                "vision_config and prompt_encoder_config must have one image_size, a multiple of 16, and patch_size "
                f"16, got {vision.image_size} and {prompt_size}, and {vision.patch_size}"
            )

    def include_code(self) -> None:
        """Let `save_pretrained` also write the code of model and pipeline and refer to it in `config.json`.

        Raises:
            ValueError: the configuration is that of another model, such as a baseline.
        """
        if self.model_type != ProbabilisticSamConfig.model_type:
            raise ValueError(
                f"the code of a {self.model_type} cannot be saved with it, only that of a "
                f"{ProbabilisticSamConfig.model_type}; save model and processor, and open them with the package"
            )
        # Imported here because these modules import this one; transformers copies them all the same
        from .modeling_probabilistic_sam import ProbabilisticSamModel
        from .pipeline_probabilistic_sam import ProbabilisticMaskGenerationPipeline

        def reference(part: type) -> str:
            return f"{part.__module__.rpartition('.')[2]}.{part.__name__}"

        self.auto_map = {
            "AutoConfig": reference(ProbabilisticSamConfig),
            "AutoModel": reference(ProbabilisticSamModel),
            "AutoModelForMaskGeneration": reference(ProbabilisticSamModel),
        }
        pipeline = {"impl": reference(ProbabilisticMaskGenerationPipeline), "pt": ["AutoModel"], "type": "image"}
        self.custom_pipelines: Any = {"probabilistic-mask-generation": pipeline}
        self._auto_class = "AutoConfig"  # of this object only, not of the class

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the configuration; if it was loaded with its code, save the code as well.

        The folder can then be opened without this package and without the original repository. transformers alone
        would copy only the modules of the class that is saved, and keep references to missing files or to a
        repository on the Hub.
        """
        if self.model_type != ProbabilisticSamConfig.model_type:  # fields copied from a model with code
            for name in ("auto_map", "custom_pipelines"):
                self.__dict__.pop(name, None)
        elif hasattr(self, "auto_map"):
            self.include_code()
        super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["ProbabilisticSamConfig", "TinyViTVisionConfig"]
