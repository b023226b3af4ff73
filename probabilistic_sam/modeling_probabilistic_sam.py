"""Probabilistic SAM: Segment Anything with a latent space, so that a prompt gives a distribution of masks.

Shapes: B images, P prompts an image, S samples, R readers, L latent coordinates, g = image_size / 16 (grid of the
image embeddings), h = w = image_size / 4 (low-resolution masks).

SAM's encoder sees a lesion of ten pixels as two or three cells. The detail network, a small U-Net, adds what the
pixels say between its image embeddings and the decoder. It has no weights of SAM's and starts at zero.

The latent of a sample is Gaussian. Its first coordinate decides whether the reader draws at all: a mask is empty when
it is not positive. The others shape the outline and enter SAM's mask decoder with the prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamModel
from transformers import initialization as init
from transformers.models.sam.modeling_sam import (
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionEncoder,
)
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .loss_probabilistic_sam import energy_distance, gaussian_kl, log_probability_of_presence, truncated_normal
from .modeling_mask_decoder import ProbabilisticSamMaskDecoder
from .modeling_tiny_vit import TinyViTVisionEncoder

EMPTY_LOGIT = -30.0  # every pixel of a mask that its reader does not draw
PIXEL_CHANNELS = 16  # of the image embeddings: 4 x 4 grey values a cell of the grid
POINT_LABELS = {1: "inside", 0: "outside", -1: "not a point", -10: "padding"}
PROMPT_CHANNELS = 4  # box, positive points, negative points, mask
GROUPS = 8  # of a group norm
MAX_DECODED = 16  # masks decoded in one call, so that memory does not grow with the number of samples
EVALUATION_SEED = 0  # of the noise in evaluation mode with labels and without a generator
# What processors return besides images, prompts and labels: accepted, so that `model(**inputs)` works, and not used
NOT_USED = ("windows", "original_sizes", "reshaped_input_sizes")
# Arguments of `SamModel.forward` that this model does not have, and why; None and False are accepted
NOT_SUPPORTED = {
    "multimask_output": "num_samples is the number of masks per prompt",
    "attention_similarity": "the mask decoder has no target-guided attention",
    "target_embedding": "the mask decoder has no target-guided attention",
    "output_attentions": "call vision_encoder to see its attentions",
    "output_hidden_states": "call vision_encoder to see its hidden states",
}


@dataclass
class ProbabilisticSamOutput(ModelOutput):
    """Output of `ProbabilisticSamModel`.

    Args:
        loss (`torch.Tensor`, a scalar): reconstruction + `kl_weight` KL of the outline + `presence_weight`
            -log P(drew or not) + `energy_weight` energy distance; with labels.
        reconstruction_loss (`torch.Tensor`, a scalar): BCE summed over pixels and Dice of the readers who drew, the
            mean over all readers who are present; with labels.
        energy_distance (`torch.Tensor`, a scalar): soft energy distance of prior samples to the readers who drew.
        kl_divergence (`torch.Tensor` of shape `(B, P, R, L)`): nats by coordinate; coordinate 0 is
            -log P(drew or not). 0 for an absent reader.
        reconstructed_masks (`torch.Tensor` of shape `(B, P, R, h, w)`): logits decoded from the posterior, which reads
            the labels; with labels.
        pred_masks (`torch.Tensor` of shape `(B, P, S, h, w)`): logits of samples of the prior, which does not see
            labels; none in training mode with labels.
        iou_scores (`torch.Tensor` of shape `(B, P, S)`): SAM's own quality estimate of `pred_masks`, not trained
            further.
        latents (`torch.Tensor` of shape `(B, P, S, L)`): of `pred_masks`.
        prior_mean, prior_log_std (`torch.Tensor` of shape `(B, P, L)`).
        posterior_mean, posterior_log_std (`torch.Tensor` of shape `(B, P, R, L)`): with labels; the prior's for an
            absent reader.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    energy_distance: torch.Tensor | None = None
    kl_divergence: torch.Tensor | None = None
    reconstructed_masks: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    prior_mean: torch.Tensor | None = None
    prior_log_std: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_log_std: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------- images, prompts as maps


def pack_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Grey values in the resolution of the low-resolution masks, packed: (B, 3, 16g, 16g) to (B, 16, g, g)."""
    return F.pixel_unshuffle(F.avg_pool2d(pixel_values.mean(dim=1, keepdim=True), 4), 4)


def box_map(boxes: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """Share of each cell of the grid that a box covers: boxes (B, P, 4) in pixels to (B, P, g, g)."""
    edges = torch.arange(grid, device=boxes.device, dtype=boxes.dtype)
    low, high = (boxes * (grid / image_size)).split(2, dim=-1)  # (B, P, 2): x, y in cells
    cover = torch.minimum(high[..., None], edges + 1) - torch.maximum(low[..., None], edges)  # (B, P, 2, g)
    cover_x, cover_y = cover.clamp(0, 1).unbind(dim=2)
    return cover_y[..., :, None] * cover_x[..., None, :]


def point_maps(points: torch.Tensor, labels: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """A bump of one cell's width at each point: points (B, P, K, 2), labels (B, P, K) to (B, P, 2, g, g).

    Channel 0 holds the positive points (label 1), channel 1 the negative ones (label 0). The two labels of padding
    are left out: -1, with which SAM's prompt encoder marks what is not a point, and -10, which it embeds as zeros.
    """
    centres = torch.arange(grid, device=points.device, dtype=points.dtype) + 0.5
    distance = points[..., None] * (grid / image_size) - centres  # (B, P, K, 2, g)
    bump_x, bump_y = torch.exp(-0.5 * distance**2).unbind(dim=3)
    bumps = bump_y[..., :, None] * bump_x[..., None, :]  # (B, P, K, g, g)
    chosen = torch.stack([labels == 1, labels == 0], dim=2).to(bumps.dtype)  # (B, P, 2, K)
    return torch.einsum("bpck,bpkyx->bpcyx", chosen, bumps).clamp(max=1)


def prompt_maps(
    image_size: int,
    grid: int,
    input_points: torch.Tensor | None = None,
    input_labels: torch.Tensor | None = None,
    input_boxes: torch.Tensor | None = None,
    input_masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prompts of one kind or several as maps of `grid` x `grid` cells: (B, P, 4, grid, grid), zeros where absent.

    Arguments and shapes are those of `ProbabilisticSamModel.forward`.

    Raises:
        ValueError: no prompt, or labels that are not SAM's (checked on the CPU only).
    """
    boxes = points = masks = None
    if input_boxes is not None:
        boxes = box_map(input_boxes.float(), image_size, grid)[:, :, None]
    if input_points is not None:
        labels = torch.ones_like(input_points[..., 0]) if input_labels is None else input_labels
        check_values("input_labels", labels, POINT_LABELS)
        points = point_maps(input_points.float(), labels, image_size, grid)
    if input_masks is not None:
        masks = F.adaptive_avg_pool2d((input_masks.float() > 0).float(), grid)[:, None]
    given = [item for item in (boxes, points, masks) if item is not None]
    if not given:
        raise ValueError("A prompt must be provided: input_boxes, input_points or input_masks.")
    blank = given[0].new_zeros(given[0].shape[0], given[0].shape[1], 1, grid, grid)
    parts = (
        blank if boxes is None else boxes,
        blank.expand(-1, -1, 2, -1, -1) if points is None else points,
        blank if masks is None else masks.expand_as(blank),  # shared by the prompts of an image
    )
    return torch.cat(parts, dim=2)


def pixels_and_contrast(image_embeddings: torch.Tensor) -> torch.Tensor:
    """The pixels that image embeddings end with, as they are and relative to their window: (B, 2, h, w).

    How bright a lesion is depends on what else is in the window, since its grey values are stretched.
    """
    pixels = F.pixel_shuffle(image_embeddings[:, -PIXEL_CHANNELS:], 4)  # (B, 1, h, w)
    mean, std = pixels.mean(dim=(1, 2, 3), keepdim=True), pixels.std(dim=(1, 2, 3), keepdim=True)
    return torch.cat([pixels, (pixels - mean) / (std + 1e-3)], dim=1)


# ------------------------------------------------------------------------------------------- arguments and readers


def check_other_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that would change nothing.

    Raises:
        ValueError: one of `SamModel.forward` that this model does not support.
        TypeError: an unknown one.
    """
    for name, value in arguments.items():
        if name in NOT_SUPPORTED:
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported: {NOT_SUPPORTED[name]}.")
        elif name not in NOT_USED:
            raise TypeError(f"got an unexpected keyword argument {name!r}.")


def check_values(name: str, values: torch.Tensor, accepted: Mapping[int, str]) -> None:
    """Check that a tensor on the CPU holds only the `accepted` values; reading one on a GPU would stall it.

    Raises:
        ValueError: another value.
    """
    if values.dtype == torch.bool or values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = torch.ones_like(values, dtype=torch.bool)
    for value in accepted:
        wrong &= values != value
    if wrong.any():
        meanings = ", ".join(f"{value} ({meaning})" for value, meaning in accepted.items())
        found = f"{values[wrong][0].item():g} in {int(wrong.sum())} of {wrong.numel()} places"
        raise ValueError(f"{name} must be boolean or hold only {meanings}; got {found}.")


class Readers(NamedTuple):
    """What `labels`, `reader_mask` and `annotated` say about the readers of a batch.

    Args:
        targets: (B, P, R, h, w), 0 or 1; 0 for an absent reader.
        mask: (B, P, R) bool, who is present; None when everybody is.
        annotated: (B, P, R) bool, whose mask has pixels at the image's own size.
        outlined: (B, P, R) bool, whose mask still has pixels at h x w. The outline of the others is unknown.
    """

    targets: torch.Tensor
    mask: torch.Tensor | None
    annotated: torch.Tensor
    outlined: torch.Tensor

    @classmethod
    def read(
        cls,
        labels: torch.Tensor,
        reader_mask: torch.Tensor | None,
        annotated: torch.Tensor | None,
        lead: tuple[int, ...],
        size: int,
    ) -> "Readers":
        """Check the arguments of `ProbabilisticSamModel.forward` and resize the labels, for `lead` = (B, P).

        Raises:
            ValueError: another shape or type; on the CPU also labels other than 0 and 1, and readers who are said not
                to have annotated although their labels have pixels.
        """
        if labels.ndim != 5 or labels.shape[:2] != lead:
            raise ValueError(f"labels must have the shape {(*lead, 'R', 'H', 'W')}, got {tuple(labels.shape)}.")
        for name, given in {"reader_mask": reader_mask, "annotated": annotated}.items():
            if given is not None and (given.shape != labels.shape[:3] or given.dtype != torch.bool):
                raise ValueError(
                    f"{name} must be boolean and have the shape {tuple(labels.shape[:3])}, got {given.dtype} and "
                    f"{tuple(given.shape)}."
                )
        if reader_mask is not None:  # what stands in the place of an absent reader is not looked at
            labels = labels.masked_fill(~reader_mask[..., None, None], 0)
        check_values("labels", labels, {0: "outside", 1: "inside"})
        targets = labels.float()
        if targets.shape[-2:] != (size, size):
            targets = F.interpolate(targets.flatten(0, 1), size=(size, size), mode="area")
            targets = (targets >= 0.5).float().unflatten(0, lead)
        outlined = targets.flatten(3).any(dim=-1)
        if annotated is None:
            return cls(targets, reader_mask, outlined, outlined)
        if reader_mask is not None:
            annotated = annotated & reader_mask
        looks = targets.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and (outlined & ~annotated).any():
            raise ValueError("annotated must be true for every reader whose labels have pixels, but is false for one.")
        return cls(targets, reader_mask, annotated, outlined & annotated)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of values (B, P, R) over the readers who are present."""
        return masked_mean(values, self.mask)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of the values where a boolean mask of the same shape is true; of all of them without a mask."""
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)


# -------------------------------------------------------------------------------------------------- detail network


class DetailBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and GELU, with a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.group_norm1, self.group_norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.gelu(self.group_norm1(hidden_states)))
        return hidden_states + self.conv2(F.gelu(self.group_norm2(residual)))


class DetailProjection(nn.Conv2d):
    """A convolution that starts at zero."""


class DetailNetwork(nn.Module):
    """A small U-Net on pixels and prompt, with SAM's image embeddings at its bottom: what a cell of 16 pixels hides.

    A lesion of ten pixels is two or three cells wide in SAM's image embeddings. The outputs join SAM's mask decoder
    at its three resolutions; they start at zero, so that a new model draws SAM's own masks.
    """

    def __init__(self, config: ProbabilisticSamConfig):
        super().__init__()
        fine, middle, coarse = (config.detail_hidden_size * factor for factor in (1, 2, 4))
        channels, decoder = config.vision_config.output_channels, config.mask_decoder_config.hidden_size
        self.stem = nn.Conv2d(2 + PROMPT_CHANNELS, fine, 3, padding=1)
        self.fine_down = DetailBlock(fine)
        self.to_middle = nn.Conv2d(fine, middle, 2, stride=2)
        self.middle_down = DetailBlock(middle)
        self.to_coarse = nn.Conv2d(middle, coarse, 2, stride=2)
        self.image_proj = nn.Conv2d(channels, coarse, 1)
        self.coarse_blocks = nn.Sequential(*(DetailBlock(coarse) for _ in range(config.detail_num_blocks)))
        self.from_coarse = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.middle_up = DetailBlock(middle)
        self.from_middle = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.fine_up = DetailBlock(fine)
        self.coarse_out = DetailProjection(coarse, decoder, 1)
        self.middle_out = DetailProjection(middle, decoder // 4, 1)
        self.fine_out = DetailProjection(fine, decoder // 8, 1)

    def forward(self, image_embeddings: torch.Tensor, prompt_maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Image embeddings with pixels (N, C + 16, g, g) and prompt maps (N, 4, h, w), N prompts.

        Returns:
            Features (N, W, g, g) for the latent networks, and what is added in the decoder at its three resolutions:
            (N, D, g, g), (N, D / 4, 2g, 2g), (N, D / 8, 4g, 4g).
        """
        fine = self.stem(torch.cat([pixels_and_contrast(image_embeddings), prompt_maps], dim=1))
        fine = self.fine_down(fine)
        middle = self.middle_down(self.to_middle(fine))
        coarse = self.coarse_blocks(self.to_coarse(middle) + self.image_proj(image_embeddings[:, :-PIXEL_CHANNELS]))
        middle = self.middle_up(middle + self.from_coarse(coarse))
        fine = self.fine_up(fine + self.from_middle(middle))
        return coarse, self.coarse_out(coarse), self.middle_out(middle), self.fine_out(fine)


# ------------------------------------------------------------------------------------------------- latent networks


class LatentBlock(nn.Module):
    """Depthwise 5x5 convolution and a pointwise MLP, with a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.layer_norm = nn.LayerNorm(width)
        self.lin1 = nn.Linear(width, 2 * width)
        self.lin2 = nn.Linear(2 * width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = self.layer_norm(self.depthwise(hidden_states).permute(0, 2, 3, 1))
        return hidden_states + self.lin2(F.gelu(self.lin1(tokens))).permute(0, 3, 1, 2)


class LatentNetwork(nn.Module):
    """Prior or posterior: image features, prompt maps and (posterior only) readers' masks to Gaussian parameters."""

    PATCH = 4  # side, in pixels of a low-resolution mask, of a cell of the grid

    def __init__(self, config: ProbabilisticSamConfig, reads_masks: bool):
        super().__init__()
        width = config.latent_hidden_size
        extents = PROMPT_CHANNELS + reads_masks
        self.image_proj = nn.Conv2d(4 * config.detail_hidden_size, width, 1)
        self.prompt_proj = nn.Conv2d(PROMPT_CHANNELS, width, 1)
        if reads_masks:
            self.mask_proj = nn.Conv2d(1, width, self.PATCH, stride=self.PATCH)
        self.blocks = nn.ModuleList([LatentBlock(width), LatentBlock(width)])
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.latent_dropout)
        self.lin1 = nn.Linear(3 * width + extents, width)
        self.lin2 = nn.Linear(width, 2 * config.latent_dim)

    def forward(
        self, features: torch.Tensor, prompt_maps: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, W, g, g), (N, 4, g, g), masks (N, R, h, w) in 0..1 to mean, log std (N, L) or (N, R, L)."""
        hidden = self.image_proj(features) + self.prompt_proj(prompt_maps)  # (N, H, g, g)
        inside = prompt_maps[:, (0, 1, 3)].amax(dim=1)  # (N, g, g): what the prompt points at
        extents = prompt_maps.sum(dim=(-2, -1))  # (N, 4) in cells
        lead = hidden.shape[:1]
        if masks is not None:
            lead = masks.shape[:2]
            hidden = hidden[:, None] + self.mask_proj(masks.flatten(0, 1)[:, None]).unflatten(0, lead)
            hidden = hidden.flatten(0, 1)
            inside = inside[:, None].expand(*lead, -1, -1).flatten(0, 1)
            area = masks.sum(dim=(-2, -1))[..., None] / self.PATCH**2
            extents = torch.cat([extents[:, None].expand(*lead, -1), area], dim=-1).flatten(0, 1)
        for block in self.blocks:
            hidden = block(hidden)
        tokens = self.layer_norm(hidden.flatten(2).transpose(1, 2))  # (M, g * g, H)
        weight = inside.flatten(1)[..., None]
        focus = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-3)
        pooled = self.dropout(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1), focus], dim=1))
        hidden = self.lin1(torch.cat([pooled, torch.log(extents + 1e-2)], dim=1))
        mean, log_std = self.lin2(self.dropout(F.gelu(hidden))).float().unflatten(0, lead).chunk(2, dim=-1)
        return mean, 4.0 * torch.tanh(log_std / 4.0)  # bounded, so that neither exp nor the KL can overflow


# --------------------------------------------------------------------------------------------------- distributions


def to_device(noise: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move noise without waiting for a GPU; other devices read the memory of the CPU later, so they wait."""
    return noise.to(device, non_blocking=torch.device(device).type == "cuda")


def normal_noise(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str
) -> torch.Tensor:
    """Standard normal noise from the generator, the CPU's when there is none: one seed, one noise on any device."""
    source = "cpu" if generator is None else generator.device
    return to_device(torch.empty(shape, device=source).normal_(generator=generator), device)


def spread_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Standard normal noise (B, P, S, L) whose S samples spread evenly: Latin hypercube sampling.

    Each coordinate has one sample in each of S intervals of equal probability (McKay, Beckman and Conover 1979). Every
    single sample is distributed as with `normal_noise`; together they stand for the distribution with less chance, so
    that, say, a quarter of 16 samples is empty when the probability of drawing nothing is 1/4.

    Raises:
        ValueError: generators that are not one an image.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators are for as many images, but there are {shape[0]}.")
        return torch.cat([spread_noise((1, *shape[1:]), item, device) for item in generator])
    source = "cpu" if generator is None else generator.device
    # On the CPU from here: float32 has no numbers close to 1, and Apple's GPU has no float64
    order, inside = (torch.empty(shape, device=source).uniform_(generator=generator).cpu() for _ in range(2))
    level = ((order.argsort(dim=2) + inside.double()) / shape[2]).clamp(1e-9, 1 - 1e-9)
    return to_device(torch.special.ndtri(level).float(), device)


# -------------------------------------------------------------------------------------------------------- decoder


# ----------------------------------------------------------------------------------------------------------- model


class ProbabilisticSamModel(SamModel):
    """SAM with a Gaussian latent space: one image and one prompt give as many different masks as asked for.

    `from_pretrained` on the directory of a `SamModel` warm-starts: only the detail and latent networks are new.

    The prompt encoder, its positional matrix, and the heads of the mask decoder that no loss reaches are frozen in
    every new or loaded model: in distributed training every trainable weight needs a gradient.
    """

    accepts_loss_kwargs = False  # `Trainer` takes any **kwargs for those of a loss
    config: ProbabilisticSamConfig
    config_class = ProbabilisticSamConfig
    _no_split_modules = ["SamVisionLayer", "TinyViTStage"]
    new_modules = ("detail_network", "prior", "posterior", "latent_proj")

    def __init__(self, config: ProbabilisticSamConfig):
        super(SamModel, self).__init__(config)  # SamModel's own would build a ViT whatever the vision configuration is
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        # Not isinstance: as remote code from a local folder, the configuration's class comes from another copy of its
        # module than the one that this module imports
        is_tiny_vit = config.vision_config.model_type == TinyViTVisionConfig.model_type
        encoder = TinyViTVisionEncoder if is_tiny_vit else SamVisionEncoder
        self.vision_encoder = encoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = ProbabilisticSamMaskDecoder(config.mask_decoder_config)
        self.detail_network = DetailNetwork(config)
        self.prior = LatentNetwork(config, reads_masks=False)
        self.posterior = LatentNetwork(config, reads_masks=True)
        hidden_size = config.mask_decoder_config.hidden_size
        self.latent_proj = nn.Sequential(
            nn.Linear(config.latent_dim - 1, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.post_init()
        self.freeze_unused()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in `PreTrainedModel`, which makes every weight trainable; those of `freeze_unused` stay frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.freeze_unused()
        return loaded

    def freeze_unused(self) -> None:
        """Freeze the prompt encoder, and what the loss does not depend on: SAM's iou head and multimask heads."""
        decoder = self.mask_decoder
        unused = decoder.iou_prediction_head, decoder.output_hypernetworks_mlps[1:]
        for module in (self.shared_image_embedding, self.prompt_encoder, *unused):
            module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DetailProjection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image embeddings (B, C + 16, g, g) with gradients: SAM's, and the pixels.

        The last 16 channels hold the image's grey values at the resolution of the low-resolution masks, 4 x 4 of them
        a cell of the grid, so that one tensor still stands for the image.
        """
        embeddings = self.vision_encoder(pixel_values).last_hidden_state
        return torch.cat([embeddings, pack_pixels(pixel_values).to(embeddings.dtype)], dim=1)

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What `forward` takes as `image_embeddings`: (B, C + 16, g, g), see `encode`; no gradients."""
        return self.encode(pixel_values)

    def embed(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None,
        input_labels: torch.Tensor | None,
        input_boxes: torch.Tensor | None,
        input_masks: torch.Tensor | None,
    ) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        """What all samples of a prompt share. Every prompt has details of its own, so there are N = B * P of each.

        Returns:
            (B, P); features (N, W, g, g) and prompt maps (N, 4, g, g) for the latent networks; what `decode` takes:
            image with details (N, C, g, g), sparse (N, T, C) or None, dense (N, C, g, g), details of the two other
            resolutions.
        """
        sparse, dense = self.prompt_encoder(
            input_points=input_points, input_labels=input_labels, input_boxes=input_boxes, input_masks=input_masks
        )
        grid, image_size = image_embeddings.shape[-1], self.config.prompt_encoder_config.image_size
        prompts = (input_points, input_labels, input_boxes, input_masks)
        coarse_maps, fine_maps = (
            prompt_maps(image_size, side, *prompts).to(image_embeddings.dtype) for side in (grid, 4 * grid)
        )
        batch, count = coarse_maps.shape[:2]
        coarse_maps, fine_maps = coarse_maps.flatten(0, 1), fine_maps.flatten(0, 1)
        image_embeddings, dense = (item.repeat_interleave(count, dim=0) for item in (image_embeddings, dense))
        features, coarse, middle, fine = self.detail_network(image_embeddings, fine_maps)
        image = image_embeddings[:, :-PIXEL_CHANNELS] + coarse
        sparse = None if sparse is None else sparse.flatten(0, 1)
        return (batch, count), features, coarse_maps, (image, sparse, dense, (middle, fine))

    def decode(self, embeddings: tuple[Any, ...], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder call for all latents (B, P, S, L): logits (B, P, S, h, w) and iou scores (B, P, S).

        `embeddings` are those of `embed`, with one entry a prompt.
        """
        image_embeddings, sparse_embeddings, dense_embeddings, (middle_details, fine_details) = embeddings
        lead = latents.shape[:3]
        latent_embeddings = self.latent_proj(latents[..., 1:].to(dense_embeddings.dtype))
        latent_embeddings = latent_embeddings.flatten(0, 1)[:, :, None]  # (B * P, S, 1, C)
        sparse = latent_embeddings
        if sparse_embeddings is not None:  # None: a mask is the only prompt
            sparse = sparse_embeddings[:, None] + latent_embeddings  # (B * P, S, T, C)
        masks, iou_scores = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense_embeddings,
            middle_details=middle_details,
            fine_details=fine_details,
        )
        masks = masks.unflatten(0, lead[:2]).float()
        present = latents[..., 0, None, None] > 0
        return torch.where(present, masks, EMPTY_LOGIT), iou_scores.unflatten(0, lead[:2])

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
        num_samples: int = 1,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        reader_mask: torch.Tensor | None = None,
        annotated: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample masks, with `labels` compute the loss; `return_dict=False` gives a plain tuple.

        With `labels` there are samples in evaluation mode only.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`.
            input_points: `(B, P, K, 2)`, x and y in pixels of the model's input.
            input_labels: `(B, P, K)`: 1 inside, 0 outside, -1 not a point, as SAM pads, -10 padding; all inside when
                left out.
            input_boxes: `(B, P, 4)`, x1, y1, x2, y2 in pixels of the model's input.
            input_masks: `(B, 1, h, w)` logits, shared by the prompts of an image, as in SAM.
            image_embeddings: `(B, C, g, g)` in place of `pixel_values`.
            labels: `(B, P, R, H, W)` readers' masks, boolean or 0 and 1 of any type; resized to h x w when they
                have another size. The mask of a reader who did not annotate is empty.
            num_samples: samples per prompt when `latents` are not given.
            latents: `(B, P, S, L)`, to decode instead of sampling them; not with `labels`.
            generator: source of the noise; the same seed gives the same samples on any device. Without one it is the
                CPU's, or in evaluation mode with `labels` a new one with a fixed seed, so that a repeated evaluation
                gives the same numbers. One generator per image makes the samples of an image independent of the
                others; only without `labels`.
            reader_mask: `(B, P, R)` bool, which readers are present, with `labels`; all of them when left out. Means
                are over the present ones; the labels of an absent one are not looked at.
            annotated: `(B, P, R)` bool, whose mask had pixels before it was resized, with `labels`; when left out,
                whose has pixels at h x w. A reader whose few pixels vanished counts as one who annotated; since the
                outline is unknown, reconstruction, KL of the outline and energy distance leave this reader out.
            kwargs: the other arguments of `SamModel.forward`, and what processors return besides: not supported or not
                used, see `check_other_arguments`.

        Raises:
            ValueError: neither or both of image and embeddings, no prompt, shapes that do not fit, values of labels
                that are not accepted (checked on the CPU only), or an argument of SAM that is not supported.
            TypeError: an unknown argument.
        """
        check_other_arguments(kwargs)
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("Exactly one of pixel_values and image_embeddings must be provided.")
        if input_points is None and input_boxes is None and input_masks is None:
            raise ValueError("A prompt must be provided: input_boxes, input_points or input_masks.")
        if input_points is not None and input_points.ndim != 4:
            raise ValueError(f"input_points must have the shape (B, P, K, 2), got {tuple(input_points.shape)}.")
        if input_boxes is not None and input_boxes.ndim != 3:
            raise ValueError(f"input_boxes must have the shape (B, P, 4), got {tuple(input_boxes.shape)}.")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        if labels is None and (reader_mask is not None or annotated is not None):
            raise ValueError("reader_mask and annotated describe labels, but there are none.")
        if labels is not None and latents is not None:
            raise ValueError("Only one of labels and latents can be provided.")

        if pixel_values is not None:
            image_embeddings = self.encode(pixel_values)
        assert image_embeddings is not None
        channels = self.config.vision_config.output_channels + PIXEL_CHANNELS
        if image_embeddings.shape[1] != channels:
            raise ValueError(
                f"image_embeddings must have {channels} channels, those of get_image_embeddings, got "
                f"{image_embeddings.shape[1]}."
            )
        batch_size = image_embeddings.shape[0]
        prompts = {"input_points": input_points, "input_boxes": input_boxes, "input_masks": input_masks}
        for name, prompt in prompts.items():
            if prompt is not None and prompt.shape[0] != batch_size:
                raise ValueError(f"{name} are for {prompt.shape[0]} images, but there are {batch_size}.")
        if input_points is not None and input_boxes is not None and input_points.shape[1] != input_boxes.shape[1]:
            raise ValueError(
                f"input_points and input_boxes must have as many prompts an image, got {input_points.shape[1]} and "
                f"{input_boxes.shape[1]}."
            )
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.int)

        lead, features, coarse_maps, embeddings = self.embed(
            image_embeddings, input_points, input_labels, input_boxes, input_masks
        )
        prior_mean, prior_log_std = (item.unflatten(0, lead) for item in self.prior(features, coarse_maps))
        # The scale of the drawing coordinate is free, since only its sign counts
        prior_log_std = torch.cat([torch.zeros_like(prior_log_std[..., :1]), prior_log_std[..., 1:]], dim=-1)

        values = {"prior_mean": prior_mean, "prior_log_std": prior_log_std}
        if labels is not None:
            if isinstance(generator, Sequence):
                raise ValueError("With labels one generator serves all images.")
            if generator is None and not self.training:
                generator = torch.Generator().manual_seed(EVALUATION_SEED)
            size = 4 * self.config.prompt_encoder_config.image_embedding_size
            readers = Readers.read(labels, reader_mask, annotated, lead, size)
            values |= self.train_on_readers(
                embeddings, (features, coarse_maps), prior_mean, prior_log_std, readers, generator
            )
        if labels is None or not self.training:
            if latents is None:
                noise = spread_noise((*lead, num_samples, self.config.latent_dim), generator, self.device)
                latents = prior_mean[:, :, None] + torch.exp(prior_log_std)[:, :, None] * noise
            elif latents.shape[:2] != prior_mean.shape[:2] or latents.shape[-1] != self.config.latent_dim:
                expected = (*prior_mean.shape[:2], "S", self.config.latent_dim)
                raise ValueError(f"latents must have the shape {expected}, got {tuple(latents.shape)}.")
            count = math.prod(lead)
            if torch.compiler.is_exporting():  # no loop: the graph serves all batches
                masks, iou_scores = self.decode(embeddings, latents)
            else:
                parts = latents.split(max(1, MAX_DECODED // count), dim=2)
                chunks = [self.decode(embeddings, part) for part in parts]
                masks, iou_scores = (torch.cat(chunk, dim=2) for chunk in zip(*chunks, strict=True))
            values |= {"pred_masks": masks, "iou_scores": iou_scores, "latents": latents}
        return ProbabilisticSamOutput(**values)

    def train_on_readers(
        self,
        embeddings: tuple[Any, ...],
        posterior_inputs: tuple[torch.Tensor, torch.Tensor],
        prior_mean: torch.Tensor,
        prior_log_std: torch.Tensor,
        readers: Readers,
        generator: torch.Generator | None,
    ) -> dict[str, torch.Tensor]:
        """Loss of all readers in one decoder call: negative evidence lower bound and energy distance.

        For a reader with an outline: BCE + Dice of the mask decoded from the posterior, and KL(posterior, prior) over
        the coordinates of the outline. For every reader who is present: -log P(annotated or not), the KL of the
        presence between the truncated and the whole normal distribution. The slot of a reader without an outline
        decodes a sample of the prior instead, which serves the energy distance unless the reader is absent.

        Returns:
            Fields of `ProbabilisticSamOutput`.
        """
        config = self.config
        targets, present, annotated, outlined = readers
        lead, count = prior_mean.shape[:2], targets.shape[2]

        mean, log_std = (
            item.unflatten(0, lead)  # (B, P, R, L)
            for item in self.posterior(*posterior_inputs, targets.flatten(0, 1).to(posterior_inputs[0].dtype))
        )
        prior_mean_r, prior_log_std_r = (item[:, :, None].expand_as(mean) for item in (prior_mean, prior_log_std))
        presence_mean, presence_log_std = truncated_normal(prior_mean_r[..., :1], annotated[..., None])
        # Without pixels there is no outline information, so the posterior over outlines equals the prior
        mean, log_std = (
            torch.cat([presence, torch.where(outlined[..., None], outline, prior)[..., 1:]], dim=-1)
            for presence, outline, prior in (
                (presence_mean, mean, prior_mean_r), (presence_log_std, log_std, prior_log_std_r)
            )
        )  # fmt: skip
        log_annotated, log_empty = log_probability_of_presence(prior_mean_r[..., 0])
        kl_presence = -torch.where(annotated, log_annotated, log_empty)[..., None]
        kl_outline = gaussian_kl(mean, log_std, prior_mean_r, prior_log_std_r)[..., 1:]
        kl = torch.cat([kl_presence, kl_outline], dim=-1)
        if present is not None:
            kl = kl * present[..., None]
            mean, log_std = (
                torch.where(present[..., None], posterior, prior)
                for posterior, prior in ((mean, prior_mean_r), (log_std, prior_log_std_r))
            )

        extra = config.num_energy_samples if config.energy_weight > 0 else 0
        slot_mean = torch.cat([mean, prior_mean[:, :, None].expand(-1, -1, extra, -1)], dim=2)
        slot_log_std = torch.cat([log_std, prior_log_std[:, :, None].expand(-1, -1, extra, -1)], dim=2)
        noise = normal_noise(tuple(slot_mean.shape), generator, self.device)
        outline = slot_mean + torch.exp(slot_log_std) * noise
        always = torch.ones_like(outline[..., :1])  # decode every slot: emptiness has its own exact likelihood
        slots = torch.cat([always, outline[..., 1:]], dim=-1)  # (B, P, R + E, L)
        masks, _ = self.decode(embeddings, slots)

        logits = masks[:, :, :count]
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(-2, -1))
        probabilities = masks.sigmoid()
        overlap = (probabilities[:, :, :count] * targets).sum(dim=(-2, -1))
        total = probabilities[:, :, :count].sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
        dice = 1 - (2 * overlap + 1) / (total + 1)
        reconstruction = readers.mean((config.bce_weight * bce + config.dice_weight * dice) * outlined)

        loss = reconstruction + config.kl_weight * readers.mean(kl_outline.sum(dim=-1))  # 0 without an outline
        loss = loss + config.presence_weight * readers.mean(kl_presence[..., 0])
        values = {}
        if extra:
            from_prior = ~outlined if present is None else present & ~outlined
            from_prior = torch.cat([from_prior, torch.ones_like(outlined[..., :1]).expand(-1, -1, extra)], dim=2)
            distances = energy_distance(probabilities.flatten(3), from_prior, targets.flatten(3), outlined)  # (B, P)
            values["energy_distance"] = masked_mean(distances, None if present is None else present.any(dim=-1))
            loss = loss + config.energy_weight * values["energy_distance"]
        return values | {
            "loss": loss,
            "reconstruction_loss": reconstruction,
            "kl_divergence": kl,
            "reconstructed_masks": torch.where(annotated[..., None, None], logits, EMPTY_LOGIT),
            "posterior_mean": mean,
            "posterior_log_std": log_std,
        }

    @torch.no_grad()
    def sample(
        self,
        pixel_values: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        num_samples: int = 16,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample `num_samples` masks per prompt: `forward` without labels and without gradients.

        Arguments, shapes and errors are those of `forward`; one encoder pass serves all samples.
        """
        check_other_arguments(kwargs)
        return self(
            pixel_values=pixel_values,
            input_boxes=input_boxes,
            input_points=input_points,
            input_labels=input_labels,
            input_masks=input_masks,
            image_embeddings=image_embeddings,
            num_samples=num_samples,
            generator=generator,
            return_dict=True,
        )


__all__ = ["ProbabilisticSamModel", "ProbabilisticSamOutput"]
