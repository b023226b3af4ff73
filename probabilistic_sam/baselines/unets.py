"""Two U-Nets on pixels and prompt: one with dropout, one with a latent space.

Their blocks and size are those of the detail network of Probabilistic SAM, for a fair comparison.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils import can_return_tuple

from ..loss_probabilistic_sam import gaussian_kl, masked_mean, summed_bce
from ..modeling_probabilistic_sam import (
    MAX_DECODED,
    DetailBlock,
    ProbabilisticSamOutput,
    Readers,
    check_other_arguments,
    normal_noise,
    spread_noise,
    whole_num_samples,
)
from .common import (
    MAP_CHANNELS,
    DropoutSampling,
    PixelConfig,
    PixelModel,
    check_dropout,
    drop_channels,
    known_readers,
    reconstruction_loss,
)


class UNet(nn.Module):
    """Maps (N, 6, h, w) to features (N, hidden_size, h, w): three resolutions, `num_blocks` blocks at the lowest.

    Dropout is applied before the three inner stages (Dropout U-Net of Kohl et al. 2018, appendix B).
    """

    def __init__(self, hidden_size: int, num_blocks: int):
        super().__init__()
        fine, middle, coarse = (hidden_size * factor for factor in (1, 2, 4))
        self.stem = nn.Conv2d(MAP_CHANNELS, fine, 3, padding=1)
        self.fine_down = DetailBlock(fine)
        self.to_middle = nn.Conv2d(fine, middle, 2, stride=2)
        self.middle_down = DetailBlock(middle)
        self.to_coarse = nn.Conv2d(middle, coarse, 2, stride=2)
        self.coarse_blocks = nn.Sequential(*(DetailBlock(coarse) for _ in range(num_blocks)))
        self.from_coarse = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.middle_up = DetailBlock(middle)
        self.from_middle = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.fine_up = DetailBlock(fine)

    def forward(
        self, maps: torch.Tensor, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """One pass, with dropout from the generator."""
        fine = self.fine_down(self.stem(maps))
        middle = self.middle_down(drop_channels(self.to_middle(fine), dropout, generator))
        coarse = self.coarse_blocks(drop_channels(self.to_coarse(middle), dropout, generator))
        middle = self.middle_up(drop_channels(middle + self.from_coarse(coarse), dropout, generator))
        return self.fine_up(fine + self.from_middle(middle))


# -------------------------------------------------------------------------------------------------------- dropout


@strict
class DropoutUNetConfig(PixelConfig):
    r"""Configuration of `DropoutUNetModel`.

    Args:
        hidden_size (`int`, defaults to 32): channels at the resolution of the masks, a multiple of 8; twice as many at
            half that resolution, four times as many at a quarter.
        num_blocks (`int`, defaults to 3): blocks at the lowest resolution.
        dropout (`float`, defaults to 0.3): share of the channels that is dropped in training.
        sampling_dropout (`float`, defaults to 0.5): the same in sampling.
        bce_weight, dice_weight (`float`): as in `ProbabilisticSamConfig`, but for empty masks as well.
    """

    model_type = "dropout_unet"

    hidden_size: int = 32
    num_blocks: int = 3
    dropout: float = 0.3
    sampling_dropout: float = 0.5
    bce_weight: float = 1.0
    dice_weight: float = 10.0

    def __post_init__(self, **kwargs):
        check_dropout(self.dropout, self.sampling_dropout)
        super().__post_init__(**kwargs)


class DropoutUNetModel(DropoutSampling, PixelModel):  # type: ignore[misc]
    """A U-Net with dropout in sampling (Gal and Ghahramani 2016, arXiv 1506.02142)."""

    config: DropoutUNetConfig
    config_class = DropoutUNetConfig

    def __init__(self, config: DropoutUNetConfig):
        super().__init__(config)
        self.unet = UNet(config.hidden_size, config.num_blocks)
        self.head = nn.Conv2d(config.hidden_size, 1, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_samples: int | torch.Tensor = 1,
        generator: torch.Generator | None = None,
        reader_mask: torch.Tensor | None = None,
        annotated: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample masks, one pass each; with `labels` (B, P, R, H, W) compute the loss of one pass.

        Other arguments and outputs are those of `ProbabilisticSamModel.forward`. With `labels`, masks are sampled in
        evaluation mode only. The loss is the mean over `known_readers`.
        """
        check_other_arguments(kwargs)
        count = 0 if self.training and labels is not None else whole_num_samples(num_samples)
        maps = self.get_maps(
            pixel_values, image_embeddings, input_points=input_points, input_labels=input_labels,
            input_boxes=input_boxes, input_masks=input_masks,
        )  # fmt: skip
        values = {}
        if labels is not None:
            readers = Readers.read(labels, reader_mask, annotated, maps.shape[:2], maps.shape[-1])
            masks = self.passes(maps, 1, self.config.dropout, generator)
            losses = reconstruction_loss(masks, readers.targets, self.config.bce_weight, self.config.dice_weight)
            loss = masked_mean(losses, known_readers(readers))
            values = {"loss": loss, "reconstruction_loss": loss}
        if labels is None or not self.training:
            values["pred_masks"] = self.passes(maps, count, self.config.sampling_dropout, generator)
        return ProbabilisticSamOutput(**values)

    def passes(
        self, maps: torch.Tensor, count: int, dropout: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Logits (B, P, count, h, w) of `count` passes over maps (B, P, 6, h, w)."""
        slots = maps.flatten(0, 1).repeat_interleave(count, dim=0).split(MAX_DECODED)
        logits = torch.cat([self.head(self.unet(part, dropout, generator)) for part in slots])
        return logits[:, 0].float().unflatten(0, (*maps.shape[:2], count))


# --------------------------------------------------------------------------------------------------- latent space


@strict
class ProbabilisticUNetConfig(PixelConfig):
    r"""Configuration of `ProbabilisticUNetModel`.

    Args:
        hidden_size, num_blocks (`int`): as in `DropoutUNetConfig`.
        latent_dim (`int`, defaults to 6): coordinates of the latent.
        bce_weight (`float`, defaults to 1): weight of the binary cross-entropy, **summed over the pixels** of a mask.
        kl_weight (`float`, defaults to 1): beta, the weight of the KL divergence of posterior from prior in nats,
            summed over coordinates. With both weights 1 the loss is the negative evidence lower bound.
    """

    model_type = "probabilistic_unet"

    hidden_size: int = 32
    num_blocks: int = 3
    latent_dim: int = 6
    bce_weight: float = 1.0
    kl_weight: float = 1.0

    def __post_init__(self, **kwargs):
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        super().__post_init__(**kwargs)


class GaussianEncoder(nn.Module):
    """Maps (N, channels, h, w) to mean and log standard deviation (N, L) of an axis-aligned Gaussian."""

    def __init__(self, channels: int, hidden_size: int, latent_dim: int):
        super().__init__()
        fine, middle, coarse = (hidden_size * factor for factor in (1, 2, 4))
        self.layers = nn.Sequential(
            nn.Conv2d(channels, fine, 2, stride=2), DetailBlock(fine),
            nn.Conv2d(fine, middle, 2, stride=2), DetailBlock(middle),
            nn.Conv2d(middle, coarse, 2, stride=2), DetailBlock(coarse),
        )  # fmt: skip
        self.head = nn.Linear(coarse, 2 * latent_dim)

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation."""
        mean, log_std = self.head(self.layers(maps).mean(dim=(-2, -1))).float().chunk(2, dim=-1)
        return mean, 4.0 * torch.tanh(log_std / 4.0)  # bounded as in Probabilistic SAM


class ProbabilisticUNetModel(PixelModel):
    """Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034) with the prompt as additional input.

    The prior gets pixels and prompt, the posterior also one reader's mask. The latent is repeated at every pixel and
    joined to the features of the U-Net by three 1x1 convolutions.
    """

    config: ProbabilisticUNetConfig
    config_class = ProbabilisticUNetConfig

    def __init__(self, config: ProbabilisticUNetConfig):
        super().__init__(config)
        width = config.hidden_size
        self.unet = UNet(width, config.num_blocks)
        self.prior = GaussianEncoder(MAP_CHANNELS, width, config.latent_dim)
        self.posterior = GaussianEncoder(MAP_CHANNELS + 1, width, config.latent_dim)
        self.fcomb = nn.Sequential(
            nn.Conv2d(width + config.latent_dim, width, 1), nn.GELU(),
            nn.Conv2d(width, width, 1), nn.GELU(),
            nn.Conv2d(width, 1, 1),
        )  # fmt: skip
        self.post_init()

    def decode(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Features (N, W, h, w) and latents (N, S, L) to logits (N, S, h, w)."""
        planes = latents.to(features.dtype)[..., None, None].expand(-1, -1, -1, *features.shape[-2:])
        shared = features[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        slots = torch.cat([shared, planes], dim=2)
        return self.fcomb(slots.flatten(0, 1))[:, 0].float().unflatten(0, latents.shape[:2])

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_samples: int | torch.Tensor = 1,
        generator: torch.Generator | None = None,
        reader_mask: torch.Tensor | None = None,
        annotated: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample masks from the prior; with `labels` (B, P, R, H, W) compute the loss of all readers.

        Other arguments and outputs are those of `ProbabilisticSamModel.forward`, but there is no presence coordinate.
        With `labels`, masks are sampled in evaluation mode only. The loss is the negative evidence lower bound: the
        mean over `known_readers` of `bce_weight` BCE (summed over pixels) + `kl_weight` KL.
        """
        check_other_arguments(kwargs)
        count = 0 if self.training and labels is not None else whole_num_samples(num_samples)
        maps = self.get_maps(
            pixel_values, image_embeddings, input_points=input_points, input_labels=input_labels,
            input_boxes=input_boxes, input_masks=input_masks,
        )  # fmt: skip
        lead = maps.shape[:2]
        flat = maps.flatten(0, 1)  # (B * P, 6, h, w)
        features = self.unet(flat)
        prior_mean, prior_log_std = (item.unflatten(0, lead) for item in self.prior(flat))
        values = {"prior_mean": prior_mean, "prior_log_std": prior_log_std}
        if labels is not None:
            readers = Readers.read(labels, reader_mask, annotated, lead, flat.shape[-1])
            values.update(self.train_on_readers(maps, features, prior_mean, prior_log_std, readers, generator))
        if labels is None or not self.training:
            noise = spread_noise((*lead, count, self.config.latent_dim), generator, prior_mean.device)
            latents = prior_mean[:, :, None] + torch.exp(prior_log_std)[:, :, None] * noise
            chunks = latents.flatten(0, 1).split(max(1, MAX_DECODED // len(flat)), dim=1)
            masks = torch.cat([self.decode(features, part) for part in chunks], dim=1).unflatten(0, lead)
            values.update(pred_masks=masks, latents=latents)
        return ProbabilisticSamOutput(**values)

    def train_on_readers(
        self,
        maps: torch.Tensor,
        features: torch.Tensor,
        prior_mean: torch.Tensor,
        prior_log_std: torch.Tensor,
        readers: Readers,
        generator: torch.Generator | None,
    ) -> dict[str, torch.Tensor]:
        """Fields of `ProbabilisticSamOutput` that depend on the readers."""
        targets, lead, known = readers.targets, maps.shape[:2], known_readers(readers)
        seen = torch.cat(
            [maps[:, :, None].expand(-1, -1, targets.shape[2], -1, -1, -1), targets[:, :, :, None].to(maps.dtype)],
            dim=3,
        )  # (B, P, R, 7, h, w)
        mean, log_std = (item.unflatten(0, targets.shape[:3]) for item in self.posterior(seen.flatten(0, 2)))
        latents = mean + torch.exp(log_std) * normal_noise(tuple(mean.shape), generator, mean.device)
        masks = self.decode(features, latents.flatten(0, 1)).unflatten(0, lead)  # (B, P, R, h, w)
        kl = gaussian_kl(mean, log_std, prior_mean[:, :, None], prior_log_std[:, :, None]) * known[..., None]
        reconstruction = masked_mean(self.config.bce_weight * summed_bce(masks, targets), known)
        return {
            "loss": reconstruction + self.config.kl_weight * masked_mean(kl.sum(dim=-1), known),
            "reconstruction_loss": reconstruction,
            "kl_divergence": kl,
            "reconstructed_masks": masks,
            "posterior_mean": mean,
            "posterior_log_std": log_std,
        }
