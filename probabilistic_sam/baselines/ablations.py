"""Ablations: Probabilistic SAM without the detail network, or with less for the latent networks to see."""

import torch
from torch import nn

from ..configuration_probabilistic_sam import ProbabilisticSamConfig
from ..modeling_probabilistic_sam import PIXEL_CHANNELS, pixels_and_contrast
from .common import SamVariant
from .unets import GaussianEncoder


class NoDetailConfig(ProbabilisticSamConfig):
    """Configuration of `NoDetailModel`."""

    model_type = "no_detail"


class NoDetailNetwork(nn.Module):
    """The interface of `DetailNetwork` with SAM's image embeddings as features; adds nothing in the mask decoder."""

    def __init__(self, config: NoDetailConfig):
        super().__init__()
        self.widths = [config.mask_decoder_config.hidden_size // factor for factor in (1, 4, 8)]
        self.image_proj = nn.Conv2d(config.vision_config.output_channels, 4 * config.detail_hidden_size, 1)

    def forward(self, image_embeddings: torch.Tensor, prompt_maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As in `DetailNetwork`; the latent networks get the prompt from its maps."""
        count, grid = len(image_embeddings), image_embeddings.shape[-1]
        sides = zip(self.widths, (grid, 2 * grid, 4 * grid), strict=True)
        nothing = [image_embeddings.new_zeros(count, width, side, side) for width, side in sides]
        return self.image_proj(image_embeddings[:, :-PIXEL_CHANNELS]), *nothing


class NoDetailModel(SamVariant):
    """Probabilistic SAM that sees the image through SAM's image embeddings only, as in the paper."""

    config_class = NoDetailConfig

    def __init__(self, config: NoDetailConfig):
        super().__init__(config)
        self.detail_network = NoDetailNetwork(config)  # type: ignore[assignment]
        self.post_init()


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
