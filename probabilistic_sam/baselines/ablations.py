"""Ablations: Probabilistic SAM without the prompt, or without SAM's features, in the latent networks."""

import torch

from ..configuration_probabilistic_sam import ProbabilisticSamConfig
from ..modeling_probabilistic_sam import PIXEL_CHANNELS, pixels_and_contrast
from .common import SamVariant
from .unets import GaussianEncoder


class PromptFreePriorConfig(ProbabilisticSamConfig):
    """Configuration of `PromptFreePriorModel`."""

    model_type = "prompt_free_prior"


class PromptFreePriorModel(SamVariant):
    """Probabilistic SAM with latent networks that do not get the prompt; the decoder does."""

    config_class = PromptFreePriorConfig

    def embed(self, image_embeddings, *prompts):
        """As in `ProbabilisticSamModel`, but features and maps for the latent networks are without the prompt."""
        lead, _, coarse_maps, embeddings = super().embed(image_embeddings, *prompts)
        image_embeddings = image_embeddings.repeat_interleave(lead[1], dim=0)
        size = 4 * image_embeddings.shape[-1]
        nothing = coarse_maps.new_zeros(*coarse_maps.shape[:2], size, size)
        return lead, self.detail_network(image_embeddings, nothing)[0], torch.zeros_like(coarse_maps), embeddings


class PixelLatentNetwork(GaussianEncoder):
    """Prior or posterior on pixels (N, 2, h, w) as features, with the interface of `LatentNetwork`."""

    def forward(  # type: ignore[override]  # the output of a posterior has one more axis
        self, features: torch.Tensor, prompt_maps: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation (N, L), or (N, R, L) with masks (N, R, h, w)."""
        if masks is None:
            return super().forward(features)
        lead = masks.shape[:2]
        pixels = features[:, None].expand(-1, lead[1], -1, -1, -1)
        mean, log_std = super().forward(torch.cat([pixels, masks[:, :, None]], dim=2).flatten(0, 1))
        return mean.unflatten(0, lead), log_std.unflatten(0, lead)


class PixelPriorConfig(ProbabilisticSamConfig):
    """Configuration of `PixelPriorModel`."""

    model_type = "pixel_prior"


class PixelPriorModel(SamVariant):
    """Probabilistic SAM with latent networks that get only raw pixels, as in the public code of the paper."""

    config_class = PixelPriorConfig

    def __init__(self, config: PixelPriorConfig):
        super().__init__(config)
        channels, width = 2, config.detail_hidden_size
        self.prior = PixelLatentNetwork(channels, width, config.latent_dim)  # type: ignore[assignment]
        self.posterior = PixelLatentNetwork(channels + 1, width, config.latent_dim)  # type: ignore[assignment]
        self.post_init()

    def embed(self, image_embeddings, *prompts):
        """As in `ProbabilisticSamModel`, with pixels (N, 2, h, w) for the latent networks."""
        lead, _, coarse_maps, embeddings = super().embed(image_embeddings, *prompts)
        pixels = pixels_and_contrast(image_embeddings[:, -PIXEL_CHANNELS:])
        return lead, pixels.repeat_interleave(lead[1], dim=0), coarse_maps, embeddings
