"""Probabilistic SAM: Segment Anything with a latent space, so that one prompt gives a distribution of masks.

The model is a conditional variational autoencoder around SAM (Ward and Imran, arXiv 2509.05809):

1. SAM's image encoder and prompt encoder embed image and prompt.
2. The detail network, a small U-Net on the pixels and the prompt, adds the resolution that image embeddings lack: in
   them a lesion of ten pixels is two or three cells wide. Its outputs start at zero.
3. The prior network predicts a Gaussian over a latent z. Its first coordinate is the presence: a sample is an empty
   mask unless z_0 > 0. The other coordinates shape the outline.
4. SAM's mask decoder turns each sample of z into a mask; z is added to the prompt's token embeddings.

In training the posterior network predicts the Gaussian from one reader's mask as well. The loss is the negative
evidence lower bound (reconstruction and KL divergence), plus an energy distance between samples of the prior and the
readers' masks.

This file holds the prompt maps, the arguments about readers, the detail network, the latent networks, the noise and
the model; mask decoder, TinyViT encoder and loss terms have files of their own.

Shapes: B images, P prompts per image, N = B * P, S samples, R readers, L latent coordinates, C channels of SAM's
image embeddings, g = image_size / 16 (grid of the image embeddings), h = w = image_size / 4 (low-resolution masks).
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
from transformers.models.sam.modeling_sam import SamPositionalEmbedding, SamPromptEncoder, SamVisionEncoder
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .loss_probabilistic_sam import dice_loss, energy_distance, latent_kl, masked_mean, mean_iou, summed_bce
from .modeling_mask_decoder import ProbabilisticSamMaskDecoder
from .modeling_tiny_vit import TinyViTVisionEncoder

logger = logging.get_logger(__name__)

EMPTY_LOGIT = -30.0  # every pixel of an empty mask
PIXEL_CHANNELS = 16  # last channels of the image embeddings: 4 x 4 grey values per cell of the grid
PROMPT_CHANNELS = 4  # box, positive points, negative points, mask
GROUPS = 8  # of the group norms
MAX_DECODED = 16  # masks per decoder call, so that memory does not grow with the number of samples
EVALUATION_SEED = 0  # of the noise in evaluation mode with labels but without a generator
# Accepted values of tensors and their meaning
PADDING_LABEL = -10
POINT_LABELS = {1: "inside", 0: "outside", -1: "not a point", PADDING_LABEL: "padding"}
MASK_VALUES = {0: "outside", 1: "inside"}
# Accepted and not used: keys of a processor's output, and what the decorator of `forward` takes
NOT_USED = ("windows", "original_sizes", "image_indices", "reshaped_input_sizes", "return_dict")
OF_READERS = ("labels", "reader_mask", "annotated")  # arguments that describe readers
# Arguments of `SamModel.forward` that are refused unless they are None or False, with the reason
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

    Losses, KL divergence, reconstructions and posterior exist with labels only.

    Args:
        loss (`torch.Tensor`, a scalar): reconstruction + `kl_weight` KL of the outline + `presence_weight`
            -log P(annotated or empty) + `energy_weight` energy distance + IoU loss.
        reconstruction_loss (`torch.Tensor`, a scalar): weighted BCE (summed over pixels) and Dice loss of the readers
            who annotated, 0 for the others; the mean over all readers who are present.
        energy_distance (`torch.Tensor`, a scalar): soft energy distance between samples of the prior and the readers
            who annotated; None if its weight is 0.
        kl_divergence (`torch.Tensor` of shape `(B, P, R, L)`): in nats; coordinate 0 is -log P(annotated or empty).
            0 for an absent reader.
        reconstructed_masks (`torch.Tensor` of shape `(B, P, R, h, w)`): logits decoded from the posterior, which has
            seen the labels.
        pred_masks (`torch.Tensor` of shape `(B, P, S, h, w)`): logits of samples of the prior, which has not seen the
            labels; None in training mode with labels.
        iou_scores (`torch.Tensor` of shape `(B, P, S)`): for each sample, what SAM's IoU head expects to be the mean
            IoU of its outline with those of the readers who annotate. Samples can be ranked by it. Weights that were
            trained before version 0.3 have an untrained head, whose scores mean nothing.
        latents (`torch.Tensor` of shape `(B, P, S, L)`): of `pred_masks`.
        prior_mean, prior_log_std (`torch.Tensor` of shape `(B, P, L)`): of the Gaussian over z given image and prompt.
        posterior_mean, posterior_log_std (`torch.Tensor` of shape `(B, P, R, L)`): given one reader's mask as well.
            Equal to the prior in coordinate 0, whose exact posterior is not Gaussian (see `latent_kl`), and in all
            coordinates for a reader without an outline: absent, empty, or with pixels that vanished in resizing.
        outline_masks (`torch.Tensor` of shape `(B, P, S, h, w)`): logits of the same samples given presence: what a
            reader who annotates would outline. Given the prior, outline and presence are independent, so these are
            samples of the distribution given z_0 > 0. `pred_masks` equals them where z_0 > 0 and is empty elsewhere.
            None whenever `pred_masks` is, and for models without presence.
        presence (`torch.Tensor` of shape `(B, P)`): P(annotated) = Phi(prior mean of z_0), the expected share of
            readers who annotate. Exists with `outline_masks`.
        iou_loss (`torch.Tensor`, a scalar): squared error of the IoU scores of all masks that the loss decodes, 0
            where no reader annotated. Only the IoU head learns from it.
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
    outline_masks: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    iou_loss: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------- pixels and prompt maps


def pack_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Grey values at the resolution of the low-resolution masks, packed: (B, 3, 16g, 16g) to (B, 16, g, g)."""
    return F.pixel_unshuffle(F.avg_pool2d(pixel_values.mean(dim=1, keepdim=True), 4), 4)


def box_map(boxes: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """Share of each cell of the grid that a box covers: boxes (B, P, 4) in pixels to (B, P, g, g)."""
    edges = torch.arange(grid, device=boxes.device, dtype=boxes.dtype)
    low, high = (boxes * (grid / image_size)).split(2, dim=-1)  # (B, P, 2): x, y in cells
    cover = torch.minimum(high[..., None], edges + 1) - torch.maximum(low[..., None], edges)  # (B, P, 2, g)
    cover_x, cover_y = cover.clamp(0, 1).unbind(dim=2)
    return cover_y[..., :, None] * cover_x[..., None, :]


def point_maps(points: torch.Tensor, labels: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """A Gaussian bump of one cell's width at each point: points (B, P, K, 2), labels (B, P, K) to (B, P, 2, g, g).

    Channel 0 holds the positive points (label 1), channel 1 the negative ones (label 0). Points with SAM's padding
    labels, -1 and -10, are left out.
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
    """All prompts as maps of `grid` x `grid` cells: (B, P, 4, grid, grid), zeros for a kind that is not given.

    Arguments and shapes are those of `ProbabilisticSamModel.forward`.

    Raises:
        ValueError: no prompt, or point labels that SAM does not know (checked on the CPU only).
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
    """The pixels packed into image embeddings, as they are and standardised per window: (B, 2, h, w).

    The grey values of a window are stretched, so the brightness of a lesion depends on what else is in the window.
    """
    pixels = F.pixel_shuffle(image_embeddings[:, -PIXEL_CHANNELS:], 4)  # (B, 1, h, w)
    mean, std = pixels.mean(dim=(1, 2, 3), keepdim=True), pixels.std(dim=(1, 2, 3), keepdim=True)
    return torch.cat([pixels, (pixels - mean) / (std + 1e-3)], dim=1)


# ------------------------------------------------------------------------------------------------ checks and readers


def check_other_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that would have no effect.

    Raises:
        ValueError: an argument of `SamModel.forward` that this model does not support.
        TypeError: an unknown argument.
    """
    for name, value in arguments.items():
        if name in NOT_SUPPORTED:
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported: {NOT_SUPPORTED[name]}.")
        elif name not in NOT_USED:
            raise TypeError(f"got an unexpected keyword argument {name!r}.")


def whole_num_samples(num_samples: int | torch.Tensor) -> int:
    """The number of samples as an int; a collator gives it as a tensor (B,) of equal numbers.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    number = num_samples.flatten()[0].item() if isinstance(num_samples, torch.Tensor) else num_samples
    if not hasattr(number, "__index__"):
        raise ValueError(f"num_samples must be a whole number, got {number!r}.")
    if number < 1:
        raise ValueError(f"num_samples must be at least 1, got {number}.")
    return int(number)


def check_image_and_prompts(
    pixel_values: torch.Tensor | None,
    image_embeddings: torch.Tensor | None,
    input_points: torch.Tensor | None,
    input_labels: torch.Tensor | None,
    input_boxes: torch.Tensor | None,
    input_masks: torch.Tensor | None,
) -> None:
    """Check that arguments of `ProbabilisticSamModel.forward` fit together.

    Raises:
        ValueError: neither or both of image and embeddings, no prompt, or shapes that do not fit.
    """
    if (pixel_values is None) == (image_embeddings is None):
        raise ValueError("Exactly one of pixel_values and image_embeddings must be provided.")
    prompts = {"input_points": input_points, "input_boxes": input_boxes, "input_masks": input_masks}
    if all(prompt is None for prompt in prompts.values()):
        raise ValueError("A prompt must be provided: input_boxes, input_points or input_masks.")
    if input_labels is not None and (input_points is None or input_labels.shape != input_points.shape[:-1]):
        points = "none" if input_points is None else tuple(input_points.shape)
        raise ValueError(f"input_labels {tuple(input_labels.shape)} do not fit input_points {points}: one per point.")
    images = pixel_values if image_embeddings is None else image_embeddings
    assert images is not None
    shapes = {"input_points": ("B", "P", "K", 2), "input_boxes": ("B", "P", 4), "input_masks": ("B", 1, "h", "w")}
    for name, prompt in prompts.items():
        if prompt is None:
            continue
        axes = shapes[name]
        right = prompt.ndim == len(axes) and 0 not in prompt.shape
        if not right or any(isinstance(n, int) and n != size for n, size in zip(axes, prompt.shape, strict=True)):
            raise ValueError(f"{name} must have the shape ({', '.join(map(str, axes))}), got {tuple(prompt.shape)}.")
        if prompt.shape[0] != images.shape[0]:
            raise ValueError(f"{name} are for {prompt.shape[0]} images, but there are {images.shape[0]}.")
    side = images.shape[-1] // 4 if image_embeddings is None else 4 * images.shape[-1]
    if input_masks is not None and input_masks.shape[2:] != (side, side):
        raise ValueError(f"input_masks must have the shape (B, 1, {side}, {side}), got {tuple(input_masks.shape)}.")
    if input_points is not None and input_boxes is not None and input_points.shape[1] != input_boxes.shape[1]:
        raise ValueError(
            "input_points and input_boxes must have the same number of prompts per image, got "
            f"{input_points.shape[1]} and {input_boxes.shape[1]}."
        )


def check_values(name: str, values: torch.Tensor, accepted: Mapping[int, str]) -> None:
    """Check that a tensor holds only the `accepted` values; on the CPU only, since reading a GPU would stall it.

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
    """Masks of a batch and what is known of each reader.

    Args:
        targets: (B, P, R, h, w), 0 or 1; 0 for an absent reader.
        present: (B, P, R) bool, readers who looked at the image.
        annotated: (B, P, R) bool, readers whose mask has pixels at the image's own size.
        outlined: (B, P, R) bool, readers whose mask still has pixels at h x w; the outline of the others is unknown.
    """

    targets: torch.Tensor
    present: torch.Tensor
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
        """Check arguments of `ProbabilisticSamModel.forward` and resize the labels to (size, size); `lead` is (B, P).

        Raises:
            ValueError: wrong shapes or types; on the CPU also labels other than 0 and 1, and `annotated` false for a
                reader whose labels have pixels.
        """
        if labels.ndim != 5 or labels.shape[:2] != lead:
            raise ValueError(f"labels must have the shape {(*lead, 'R', 'H', 'W')}, got {tuple(labels.shape)}.")
        for name, given in {"reader_mask": reader_mask, "annotated": annotated}.items():
            if given is not None and (given.shape != labels.shape[:3] or given.dtype != torch.bool):
                raise ValueError(
                    f"{name} must be boolean and have the shape {tuple(labels.shape[:3])}, got {given.dtype} and "
                    f"{tuple(given.shape)}."
                )
        if reader_mask is None:
            reader_mask = torch.ones(labels.shape[:3], dtype=torch.bool, device=labels.device)
        else:
            labels = labels.masked_fill(~reader_mask[..., None, None], 0)
        check_values("labels", labels, MASK_VALUES)
        if annotated is None:
            annotated = (labels != 0).flatten(3).any(dim=-1)
        targets = labels.float()
        if targets.shape[-2:] != (size, size):
            targets = F.interpolate(targets.flatten(0, 1), size=(size, size), mode="area")
            targets = (targets >= 0.5).float().unflatten(0, lead)
        outlined = targets.flatten(3).any(dim=-1)
        annotated = annotated & reader_mask
        on_cpu = targets.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and (outlined & ~annotated).any():
            raise ValueError("annotated must be true for every reader whose labels have pixels, but is false for one.")
        return cls(targets, reader_mask, annotated, outlined & annotated)


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
    """A small U-Net on pixels and prompt, with SAM's image embeddings at its lowest resolution.

    It recovers detail that is lost in cells of 16 x 16 pixels. The outputs are added in SAM's mask decoder at its
    three resolutions. They start at zero, so an untrained model gives SAM's own masks.
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
            Features (N, W, g, g) for the latent networks, and the terms added in the decoder at its three
            resolutions: (N, D, g, g), (N, D / 4, 2g, 2g), (N, D / 8, 4g, 4g).
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

    PATCH = 4  # side of a cell of the grid in pixels of a low-resolution mask

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
        """Features (N, W, g, g), prompt maps (N, 4, g, g) and masks (N, R, h, w) in 0..1 to a Gaussian over z.

        Returns:
            Mean and log standard deviation: (N, L), with masks (N, R, L).
        """
        hidden = self.image_proj(features) + self.prompt_proj(prompt_maps)  # (N, H, g, g)
        # (N, g, g): cells inside the prompt. By slices, since a list of channels would have to be copied to the device
        inside = torch.maximum(prompt_maps[:, :2].amax(dim=1), prompt_maps[:, 3])
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


# ----------------------------------------------------------------------------------------------------------- noise


def check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> None:
    """Check that there is a generator for all images, one for each of `count` images, or none.

    Raises:
        ValueError: another number of them, or something else.
    """
    several = isinstance(generator, Sequence) and not isinstance(generator, str)
    items = list(generator) if several else [generator]  # type: ignore[arg-type]
    if not all(item is None or isinstance(item, torch.Generator) for item in items):
        raise ValueError(
            f"generator is {generator!r}; accepted: torch.Generator().manual_seed(seed), a list with one per image, "
            "or None"
        )
    if several and len(items) != count:
        raise ValueError(f"{len(items)} generators are for as many windows (items of pixel_values), not {count}.")


def to_device(noise: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move noise to a device without blocking on CUDA; a copy to another device could still be in progress."""
    return noise.to(device, non_blocking=torch.device(device).type == "cuda")


def normal_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Standard normal noise of the generator, by default the CPU's: one seed gives the same noise on any device.

    Raises:
        ValueError: a number of generators other than the number of images, or something else than generators.
    """
    check_generators(generator, shape[0])
    if isinstance(generator, Sequence):
        return torch.cat([normal_noise((1, *shape[1:]), item, device) for item in generator])
    source = "cpu" if generator is None else generator.device
    return to_device(torch.empty(shape, device=source).normal_(generator=generator), device)


def spread_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Standard normal noise (B, P, S, L) with evenly spread samples: Latin hypercube sampling.

    In each coordinate one sample lies in each of S intervals of equal probability (McKay, Beckman and Conover 1979).
    Each sample keeps its marginal distribution; together the samples cover it more evenly (lower variance). If the
    probability of an empty mask is 1/4, for example, 4 of 16 samples are empty.

    Raises:
        ValueError: a number of generators other than the number of images, or something else than generators.
    """
    check_generators(generator, shape[0])
    if isinstance(generator, Sequence):
        return torch.cat([spread_noise((1, *shape[1:]), item, device) for item in generator])
    source = "cpu" if generator is None else generator.device
    # On the CPU from here on: float32 cannot resolve levels close to 1, and Apple's GPU has no float64
    order, inside = (torch.empty(shape, device=source).uniform_(generator=generator).cpu() for _ in range(2))
    level = ((order.argsort(dim=2) + inside.double()) / shape[2]).clamp(1e-9, 1 - 1e-9)
    return to_device(torch.special.ndtri(level).float(), device)


def noise_given_presence(noise: torch.Tensor, presence_means: torch.Tensor) -> torch.Tensor:
    """Noise of samples that annotate at least one of the windows that share it.

    A sample annotates window k if presence_means[k] + noise_0 > 0, and at least one window if noise_0 > -m, where m is
    the largest mean. So P(annotated anywhere) = Phi(m), and given that, noise_0 is normal, truncated to
    noise_0 > -m. Levels are mapped from [0, 1] to [Phi(-m), 1] and stay evenly spread. The other coordinates are
    independent of noise_0 and do not change.

    Args:
        noise: (..., S, L) of `spread_noise`, the same for all windows.
        presence_means: (K,), prior means of z_0 of the K windows.

    Returns:
        (..., S, L). Samples can still be empty in windows with a mean below m.
    """
    largest = presence_means.detach().max().cpu()
    # Upper tails, P(Z > z) = Phi(-z), in float64: levels close to 1 would lose their digits
    tail = torch.special.ndtr(-noise[..., 0].cpu().double()) * torch.special.ndtr(largest.double())
    presence = -torch.special.ndtri(tail.clamp(min=torch.finfo(torch.float64).tiny)).to(noise.dtype)
    above = torch.nextafter(-largest.to(noise.dtype), torch.tensor(torch.inf, dtype=noise.dtype))
    presence = torch.maximum(presence, above)  # rounding must not make the sum with the mean zero
    return torch.cat([to_device(presence, noise.device)[..., None], noise[..., 1:]], dim=-1)


# ----------------------------------------------------------------------------------------------------------- model


class ProbabilisticSamModel(SamModel):
    """SAM with a Gaussian latent space: any number of different masks for one image and one prompt.

    `from_pretrained` also opens a plain `SamModel`; then only the detail and latent networks are new.

    The prompt encoder, its positional matrix and the multimask heads of the mask decoder are frozen in every new or
    loaded model, because distributed training needs a gradient for every trainable weight.

    **Presence and extent are two answers.** `presence` of the output is the share of readers who would annotate,
    `outline_masks` are what those would outline, and `pred_masks` combine both: masks of readers, some of them empty.

    **Several slices of one lesion.** To make sample number s the same reader on all slices, share the noise: give
    `sample` one generator per slice, all with the same seed (for several lesions, one seed per lesion).

    ```python
    generators = [torch.Generator().manual_seed(0) for _ in slices]
    samples = model.sample(pixel_values, input_boxes, num_samples=16, generator=generators)  # one image per slice
    ```

    The latents are prior mean + prior standard deviation * noise. Mean and standard deviation describe the slice: how
    large the lesion is there, how often it is annotated, how much readers disagree. The noise describes the reader
    relative to the others: generous or tight, likely to annotate or not. A generous reader is generous on every
    slice, so the noise is what slices have in common. Copying the latents instead would impose the size of one slice
    on all others. With independent noise on each slice, generous and tight masks alternate and cancel in the volume,
    so that sampled volumes vary too little. With shared noise a sample is empty on a slice if its presence noise is at
    most minus the slice's presence mean; the lesion's presence is therefore Phi(largest presence mean), and
    `noise_given_presence` conditions the noise on it.
    """

    accepts_loss_kwargs = False  # `Trainer` would otherwise pass arguments of a loss to **kwargs
    config: ProbabilisticSamConfig
    config_class = ProbabilisticSamConfig
    _no_split_modules = ["SamVisionLayer", "TinyViTStage"]
    new_modules = ("detail_network", "prior", "posterior", "latent_proj")

    def __init__(self, config: ProbabilisticSamConfig):
        super(SamModel, self).__init__(config)  # SamModel.__init__ builds a ViT for every vision configuration
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        # Not isinstance: transformers imports remote code from a local folder twice, so there are two copies of the
        # configuration's class
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
        """As in `PreTrainedModel`, but unused weights stay frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        model.freeze_unused()
        return loaded

    def freeze_unused(self) -> None:
        """Freeze the prompt encoder and the multimask heads, which the loss does not depend on."""
        unused = self.mask_decoder.output_hypernetworks_mlps[1:]
        for module in (self.shared_image_embedding, self.prompt_encoder, unused):
            module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DetailProjection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image embeddings (B, C + 16, g, g), with gradients.

        The first C channels are SAM's. The last 16 hold the grey values at the resolution of the low-resolution masks,
        4 x 4 per cell of the grid, for the detail network.
        """
        embeddings = self.vision_encoder(pixel_values).last_hidden_state
        return torch.cat([embeddings, pack_pixels(pixel_values).to(embeddings.dtype)], dim=1)

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """`encode` without gradients: (B, C + 16, g, g), the `image_embeddings` of `forward`.

        They belong to windows, not to whole images: a processor with a `crop_size` cuts another window for each
        prompt, and embeddings of one window give wrong masks for prompts in another. With `crop_size=None` the window
        is the whole image, and its embeddings serve all prompts. For `kwargs` see `check_other_arguments`.
        """
        check_other_arguments(kwargs)
        return self.encode(pixel_values)

    def embed(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None,
        input_labels: torch.Tensor | None,
        input_boxes: torch.Tensor | None,
        input_masks: torch.Tensor | None,
    ) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        """Everything that the samples of a prompt share, for each of N = B * P prompts.

        Returns:
            (B, P); features (N, W, g, g) and prompt maps (N, 4, g, g) for the latent networks; and the `embeddings`
            of `decode_outlines`: image with details (N, C, g, g), sparse (N, T, C) or None, dense (N, C, g, g),
            details at the two finer resolutions, and which sparse embeddings are padding (N, T) or None.
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
        padding = None
        if sparse is not None and input_labels is not None:  # the points come first, then the box
            padding = (input_labels == PADDING_LABEL).flatten(0, 1)
            padding = F.pad(padding, (0, sparse.shape[1] - padding.shape[1]))
        return (batch, count), features, coarse_maps, (image, sparse, dense, (middle, fine), padding)

    def predict_prior(
        self, lead: tuple[int, int], features: torch.Tensor, coarse_maps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation (B, P, L) of the prior, from what `embed` returns."""
        mean, log_std = (item.unflatten(0, lead) for item in self.prior(features, coarse_maps))
        # Only the sign of the presence matters, so its scale is fixed
        return mean, torch.cat([torch.zeros_like(log_std[..., :1]), log_std[..., 1:]], dim=-1)

    def decode_outlines(self, embeddings: tuple[Any, ...], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder call for all latents (B, P, S, L): logits (B, P, S, h, w) and IoU scores (B, P, S).

        No mask is empty for lack of presence: z_0 has no effect.
        """
        image_embeddings, sparse_embeddings, dense_embeddings, (middle_details, fine_details), padding = embeddings
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
            padding=padding,
        )
        return masks.unflatten(0, lead[:2]).float(), iou_scores.unflatten(0, lead[:2])

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
        latents: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        reader_mask: torch.Tensor | None = None,
        annotated: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample masks, or compute the loss if there are `labels`; `return_dict=False` returns a plain tuple.

        With `labels`, masks are sampled in evaluation mode only.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`.
            input_points: `(B, P, K, 2)`, x and y in pixels of the model's input.
            input_labels: `(B, P, K)`: 1 inside, 0 outside, -1 or -10 padding; all inside by default.
            input_boxes: `(B, P, 4)`, x1, y1, x2, y2 in pixels of the model's input.
            input_masks: `(B, 1, h, w)` logits, shared by the prompts of an image, as in SAM.
            image_embeddings: `(B, C + 16, g, g)` of `get_image_embeddings`, instead of `pixel_values`; for prompts in
                the same window.
            labels: `(B, P, R, H, W)`, readers' masks, boolean or 0 and 1 of any type; resized to h x w. The mask of a
                reader who annotated nothing is empty.
            num_samples: samples per prompt, unless `latents` are given; a number, or a tensor (B,) that repeats it.
            latents: `(B, P, S, L)`, decoded instead of samples; not with `labels`.
            generator: source of the noise; the same seed gives the same samples on any device. By default it is the
                CPU's generator, or in evaluation mode with `labels` a new one with a fixed seed, so that a repeated
                evaluation gives the same numbers. With one generator per image the noise of an image does not depend
                on the other images.
            reader_mask: `(B, P, R)` bool, which readers are present; all by default. Means are over the readers who
                are present; the labels of an absent reader are ignored. Only with `labels`.
            annotated: `(B, P, R)` bool, which masks had pixels before they were resized; by default those whose
                `labels` have any. If all pixels of a reader vanished in resizing, the outline is unknown: the reader
                counts as one who annotated, but not in reconstruction, KL of the outline and energy distance. Only
                with `labels`.
            kwargs: other arguments of `SamModel.forward` and other outputs of processors, see
                `check_other_arguments`.

        Raises:
            ValueError: neither or both of image and embeddings, no prompt, shapes that do not fit, an argument of SAM
                that is not supported; on the CPU also values of `labels`, `annotated` or `input_labels` that are not
                accepted.
            TypeError: an unknown argument.
        """
        check_other_arguments(kwargs)
        check_image_and_prompts(pixel_values, image_embeddings, input_points, input_labels, input_boxes, input_masks)
        # In training nothing is sampled, and reading a tensor would block
        count = 0 if self.training and labels is not None else whole_num_samples(num_samples)
        if labels is None and (reader_mask is not None or annotated is not None):
            raise ValueError("reader_mask and annotated describe labels, but there are none.")
        if labels is not None and latents is not None:
            raise ValueError("Only one of labels and latents can be provided.")

        if pixel_values is not None:
            image_embeddings = self.encode(pixel_values)
        assert image_embeddings is not None
        channels = self.config.vision_config.output_channels + PIXEL_CHANNELS
        grid = self.config.prompt_encoder_config.image_embedding_size
        if image_embeddings.shape[1:] != (channels, grid, grid):
            raise ValueError(
                f"image_embeddings must have the shape (B, {channels}, {grid}, {grid}), those of "
                f"get_image_embeddings, got {tuple(image_embeddings.shape)}."
            )
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.int)
        lead, features, coarse_maps, embeddings = self.embed(
            image_embeddings, input_points, input_labels, input_boxes, input_masks
        )
        prior_mean, prior_log_std = self.predict_prior(lead, features, coarse_maps)

        # Completed with `update`, since PyTorch 2.7 cannot trace `|=`
        values = {"prior_mean": prior_mean, "prior_log_std": prior_log_std}
        if labels is not None:
            if generator is None and not self.training:
                generator = torch.Generator().manual_seed(EVALUATION_SEED)
            size = 4 * self.config.prompt_encoder_config.image_embedding_size
            readers = Readers.read(labels, reader_mask, annotated, lead, size)
            posterior = self.posterior(features, coarse_maps, readers.targets.flatten(0, 1).to(features.dtype))
            mean, log_std = (item.unflatten(0, lead) for item in posterior)
            values.update(
                self.train_on_readers(embeddings, mean, log_std, prior_mean, prior_log_std, readers, generator)
            )
        if labels is None or not self.training:
            if latents is None:
                noise = spread_noise((*lead, count, self.config.latent_dim), generator, prior_mean.device)
                latents = prior_mean[:, :, None] + torch.exp(prior_log_std)[:, :, None] * noise
            elif latents.ndim != 4 or latents.shape[:2] != lead or latents.shape[-1] != self.config.latent_dim:
                expected = (*lead, "S", self.config.latent_dim)
                raise ValueError(f"latents must have the shape {expected}, got {tuple(latents.shape)}.")
            if torch.compiler.is_exporting():  # without a loop, so that the graph fits any number of samples
                outlines, iou_scores = self.decode_outlines(embeddings, latents)
            else:
                parts = latents.split(max(1, MAX_DECODED // math.prod(lead)), dim=2)
                chunks = [self.decode_outlines(embeddings, part) for part in parts]
                outlines, iou_scores = (torch.cat(chunk, dim=2) for chunk in zip(*chunks, strict=True))
            # Written so that NaN stays NaN: `> 0` would make an empty mask of it
            masks = torch.where(latents[..., 0, None, None] <= 0, EMPTY_LOGIT, outlines)
            presence = torch.special.ndtr(prior_mean[..., 0])
            values.update(
                pred_masks=masks, iou_scores=iou_scores, latents=latents, outline_masks=outlines, presence=presence
            )
        return ProbabilisticSamOutput(**values)

    def train_on_readers(
        self,
        embeddings: tuple[Any, ...],
        mean: torch.Tensor,
        log_std: torch.Tensor,
        prior_mean: torch.Tensor,
        prior_log_std: torch.Tensor,
        readers: Readers,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> dict[str, torch.Tensor]:
        """Loss of all readers with one decoder call: negative evidence lower bound and energy distance.

        Readers with an outline contribute BCE + Dice loss of the mask decoded from their posterior, and the KL
        divergence of the outline; all readers who are present contribute -log P(annotated or empty). For a reader
        without an outline a sample of the prior is decoded instead; it is one more sample for the energy distance
        unless the reader is absent.

        Args:
            embeddings: as in `decode_outlines`.
            mean: (B, P, R, L), of the posterior network.
            log_std: (B, P, R, L), of the posterior network.
            prior_mean: (B, P, L).
            prior_log_std: (B, P, L).
            readers: R readers per prompt.
            generator: as in `forward`.

        Returns:
            Fields of `ProbabilisticSamOutput`.
        """
        config = self.config
        targets, present, annotated, outlined = readers
        count = targets.shape[2]

        # The posterior equals the prior in the presence, and for readers whose outline is unknown
        prior_mean_r, prior_log_std_r = (item[:, :, None].expand_as(mean) for item in (prior_mean, prior_log_std))
        known = outlined[..., None] & (torch.arange(config.latent_dim, device=mean.device) > 0)
        mean, log_std = torch.where(known, mean, prior_mean_r), torch.where(known, log_std, prior_log_std_r)
        kl = latent_kl(mean, log_std, prior_mean_r, prior_log_std_r, annotated) * present[..., None]

        # Decode a sample of each posterior, and samples of the prior for the energy distance
        extra = config.num_energy_samples if config.energy_weight > 0 else 0
        slot_mean = torch.cat([mean, prior_mean[:, :, None].expand(-1, -1, extra, -1)], dim=2)  # (B, P, R + E, L)
        slot_log_std = torch.cat([log_std, prior_log_std[:, :, None].expand(-1, -1, extra, -1)], dim=2)
        noise = normal_noise(tuple(slot_mean.shape), generator, slot_mean.device)
        latents = slot_mean + torch.exp(slot_log_std) * noise
        # Given presence, which has its own, exact likelihood
        masks, iou_scores = self.decode_outlines(embeddings, latents)
        logits, probabilities = masks[:, :, :count], masks.sigmoid()

        bce, dice = summed_bce(logits, targets), dice_loss(probabilities[:, :, :count], targets)
        reconstruction = masked_mean((config.bce_weight * bce + config.dice_weight * dice) * outlined, present)
        loss = reconstruction + config.kl_weight * masked_mean(kl[..., 1:].sum(dim=-1), present)
        loss = loss + config.presence_weight * masked_mean(kl[..., 0], present)
        # The mean over the masks of a prompt, which counts as often as it has readers who are present
        squares = (iou_scores - mean_iou(masks, targets, outlined)) ** 2
        decoded = torch.cat([present, present.new_ones(*present.shape[:2], extra)], dim=2)
        squares = (squares * decoded).sum(dim=-1) / decoded.sum(dim=-1).clamp(min=1) * outlined.any(dim=-1)
        iou_loss = masked_mean(squares[..., None].expand_as(present), present)
        loss, values = loss + iou_loss, {"iou_loss": iou_loss}
        if extra:
            from_prior = torch.cat([present & ~outlined, outlined.new_ones(*outlined.shape[:2], extra)], dim=2)
            distances = energy_distance(probabilities.flatten(3), from_prior, targets.flatten(3), outlined)  # (B, P)
            values["energy_distance"] = masked_mean(distances, present.any(dim=-1))
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

        Arguments, shapes and errors are those of `forward`, which also takes `latents`; one encoder pass serves all
        samples. `labels`,
        `reader_mask` and `annotated` of a batch for training are not used. Training mode gives a warning, because
        dropout makes samples of one seed differ.
        """
        if self.training and getattr(self.config, "latent_dropout", 0):
            logger.warning_once("sampling in training mode, with dropout; call model.eval() first")
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_READERS}
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
