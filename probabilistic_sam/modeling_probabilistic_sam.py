"""Probabilistic SAM: Segment Anything with a latent space, so that a prompt gives a distribution of masks.

Shapes: B images, P prompts an image, S samples, R readers, L latent coordinates, g = image_size / 16 (grid of the
image embeddings), h = w = image_size / 4 (low-resolution masks).

The latent of a sample is Gaussian. Its first coordinate decides whether the reader draws at all: a mask is empty when
it is not positive. The others shape the outline and enter SAM's mask decoder with the prompt.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionEncoder,
)
from transformers.utils import ModelOutput

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .modeling_tiny_vit import TinyViTVisionEncoder

EMPTY_LOGIT = -30.0  # every pixel of a mask that its reader does not draw
MAX_DECODED = 64  # masks decoded in one call, so that memory does not grow with the number of samples


@dataclass
class ProbabilisticSamOutput(ModelOutput):
    """Output of `ProbabilisticSamModel`.

    Args:
        loss (`torch.Tensor`, a scalar): reconstruction + `kl_weight` KL of the outline + `drawing_weight`
            -log P(drew or not) + `energy_weight` energy distance; with labels.
        reconstruction_loss (`torch.Tensor`, a scalar): BCE summed over pixels and Dice of the readers who drew, the
            mean over all readers; with labels.
        energy_distance (`torch.Tensor`, a scalar): soft energy distance of prior samples to the readers who drew.
        kl_divergence (`torch.Tensor` of shape `(B, P, R, L)`): nats by coordinate; coordinate 0 is
            -log P(drew or not).
        pred_masks (`torch.Tensor` of shape `(B, P, S, h, w)`): logits; with labels S = R, decoded from the posterior.
        iou_scores (`torch.Tensor` of shape `(B, P, S)`): SAM's own quality estimate, not trained further.
        latents (`torch.Tensor` of shape `(B, P, S, L)`).
        prior_mean, prior_log_std (`torch.Tensor` of shape `(B, P, L)`).
        posterior_mean, posterior_log_std (`torch.Tensor` of shape `(B, P, R, L)`): with labels.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    energy_distance: torch.Tensor | None = None
    kl_divergence: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    prior_mean: torch.Tensor | None = None
    prior_log_std: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_log_std: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------- prompts as maps


def box_map(boxes: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """Share of each cell of the grid that a box covers: boxes (B, P, 4) in pixels to (B, P, g, g)."""
    edges = torch.arange(grid, device=boxes.device, dtype=boxes.dtype)
    low, high = (boxes * (grid / image_size)).split(2, dim=-1)  # (B, P, 2): x, y in cells
    cover = torch.minimum(high[..., None], edges + 1) - torch.maximum(low[..., None], edges)  # (B, P, 2, g)
    cover_x, cover_y = cover.clamp(0, 1).unbind(dim=2)
    return cover_y[..., :, None] * cover_x[..., None, :]


def point_maps(points: torch.Tensor, labels: torch.Tensor, image_size: int, grid: int) -> torch.Tensor:
    """A bump of one cell's width at each point: points (B, P, K, 2), labels (B, P, K) to (B, P, 2, g, g).

    Channel 0 holds the positive points (label 1), channel 1 the negative ones (label 0); padding (-1, -10) is left
    out.
    """
    centres = torch.arange(grid, device=points.device, dtype=points.dtype) + 0.5
    distance = points[..., None] * (grid / image_size) - centres  # (B, P, K, 2, g)
    bump_x, bump_y = torch.exp(-0.5 * distance**2).unbind(dim=3)
    bumps = bump_y[..., :, None] * bump_x[..., None, :]  # (B, P, K, g, g)
    chosen = torch.stack([labels == 1, labels == 0], dim=2).to(bumps.dtype)  # (B, P, 2, K)
    return torch.einsum("bpck,bpkyx->bpcyx", chosen, bumps).clamp(max=1)


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
    """Prior or posterior: image embeddings, prompt maps and (posterior only) readers' masks to Gaussian parameters."""

    PROMPT_CHANNELS = 4  # box, positive points, negative points, mask
    PATCH = 4  # side, in pixels of a low-resolution mask, of a cell of the grid

    def __init__(self, config: ProbabilisticSamConfig, reads_masks: bool):
        super().__init__()
        width = config.latent_hidden_size
        extents = self.PROMPT_CHANNELS + reads_masks
        self.image_proj = nn.Conv2d(config.vision_config.output_channels, width, 1)
        self.prompt_proj = nn.Conv2d(self.PROMPT_CHANNELS, width, 1)
        if reads_masks:
            self.mask_proj = nn.Conv2d(1, width, self.PATCH, stride=self.PATCH)
        self.blocks = nn.ModuleList([LatentBlock(width), LatentBlock(width)])
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.latent_dropout)
        self.lin1 = nn.Linear(3 * width + extents, width)
        self.lin2 = nn.Linear(width, 2 * config.latent_dim)

    def forward(
        self, image_embeddings: torch.Tensor, prompt_maps: torch.Tensor, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, g, g), (B, P, 4, g, g), masks (B, P, R, h, w) in 0..1 to mean, log std (B, P, L) or (B, P, R, L)."""
        batch, prompts, _, grid, _ = prompt_maps.shape
        hidden = self.image_proj(image_embeddings)[:, None] + self.prompt_proj(prompt_maps.flatten(0, 1)).unflatten(
            0, (batch, prompts)
        )  # (B, P, H, g, g)
        inside = prompt_maps[:, :, (0, 1, 3)].amax(dim=2, keepdim=True)  # what the prompt points at
        extents = prompt_maps.sum(dim=(-2, -1))  # in cells
        if masks is not None:
            lead = (batch, prompts, masks.shape[2])
            side = self.PATCH * grid
            hidden = hidden[:, :, None] + self.mask_proj(masks.reshape(-1, 1, side, side)).unflatten(0, lead)
            inside = inside[:, :, None].expand(*lead, -1, -1, -1)
            area = masks.sum(dim=(-2, -1))[..., None] / self.PATCH**2
            extents = torch.cat([extents[:, :, None].expand(*lead, -1), area], dim=-1)
        lead = hidden.shape[:-3]
        hidden = hidden.flatten(0, -4)
        for block in self.blocks:
            hidden = block(hidden)
        tokens = self.layer_norm(hidden.flatten(2).transpose(1, 2))  # (N, g * g, H)
        weight = inside.reshape(len(tokens), -1, 1)
        focus = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-3)
        extents = torch.log(extents + 1e-2).flatten(0, -2)
        pooled = self.dropout(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1), focus], dim=1))
        hidden = self.dropout(F.gelu(self.lin1(torch.cat([pooled, extents], dim=1))))
        mean, log_std = self.lin2(hidden).float().unflatten(0, lead).chunk(2, dim=-1)
        return mean, 4.0 * torch.tanh(log_std / 4.0)  # bounded, so that neither exp nor the KL can overflow


# --------------------------------------------------------------------------------------------------- distributions


def log_probability_of_drawing(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of P(z > 0) and of P(z <= 0) for z ~ N(mean, 1)."""
    return torch.special.log_ndtr(mean), torch.special.log_ndtr(-mean)


def truncated_normal(mean: torch.Tensor, positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log standard deviation of N(mean, 1) given its sign (Johnson, Kotz and Balakrishnan 1994, 13.10.1)."""
    sign = positive.to(mean.dtype) * 2 - 1
    log_density = -0.5 * mean**2 - 0.5 * math.log(2 * math.pi)
    ratio = torch.exp(log_density - torch.special.log_ndtr(sign * mean))  # inverse Mills ratio
    variance = 1 - ratio * (ratio + sign * mean)
    return mean + sign * ratio, 0.5 * torch.log(variance.clamp(min=1e-6))


def gaussian_kl(
    mean: torch.Tensor, log_std: torch.Tensor, prior_mean: torch.Tensor, prior_log_std: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean, std) || N(prior_mean, prior_std)) in nats, element by element."""
    ratio = torch.exp(2 * (log_std - prior_log_std))
    return 0.5 * (ratio - 1 + ((mean - prior_mean) * torch.exp(-prior_log_std)) ** 2) + prior_log_std - log_std


def soft_jaccard_distance(a: torch.Tensor, b: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - sum min(a, b) / sum max(a, b) over the last axis, both sums `smooth` pixels larger.

    On binary masks it is 1 - IoU; on soft ones it stays a metric, d(a, a) = 0, which the usual soft IoU is not (Wang
    et al. 2023, arXiv 2302.05666), so that its energy distance cannot be lowered by blurring.
    """
    gap = (a - b).abs().sum(dim=-1)
    total = a.sum(dim=-1) + b.sum(dim=-1)
    return 1 - (total - gap + 2 * smooth) / (total + gap + 2 * smooth)


def energy_distance(
    samples: torch.Tensor, is_sample: torch.Tensor, readers: torch.Tensor, is_reader: torch.Tensor
) -> torch.Tensor:
    """2 E d(s, y) - E d(s, s'), pairs of different samples, by the soft Jaccard distance (Szekely and Rizzo 2013).

    The readers' own term is constant and left out. Samples (..., S, pixels) and readers (..., R, pixels) in 0..1; the
    boolean masks (..., S) and (..., R) say which of them count. Returns (...): 0 where no reader counts.
    """
    cross = soft_jaccard_distance(samples[..., :, None, :], readers[..., None, :, :])  # (..., S, R)
    within = soft_jaccard_distance(samples[..., :, None, :], samples[..., None, :, :])  # (..., S, S)
    cross_pairs = (is_sample[..., :, None] & is_reader[..., None, :]).to(cross.dtype)
    distinct = ~torch.eye(samples.shape[-2], dtype=torch.bool, device=samples.device)
    within_pairs = (is_sample[..., :, None] & is_sample[..., None, :] & distinct).to(within.dtype)
    cross = (cross * cross_pairs).sum(dim=(-2, -1)) / cross_pairs.sum(dim=(-2, -1)).clamp(min=1)
    within = (within * within_pairs).sum(dim=(-2, -1)) / within_pairs.sum(dim=(-2, -1)).clamp(min=1)
    return (2 * cross - within) * is_reader.any(dim=-1)


# -------------------------------------------------------------------------------------------------------- decoder


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Multi-head attention of (B, N, length, C) tensors that are projected already."""
    lead = query.shape[:2]
    heads = [item.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2) for item in (query, key, value)]
    context = F.scaled_dot_product_attention(*heads)
    return context.transpose(1, 2).flatten(-2).unflatten(0, lead)


class ProbabilisticSamMaskDecoder(SamMaskDecoder):
    """SAM's mask decoder, same weights and same masks, for many prompts of one image at a fraction of the cost.

    What all prompts of an image share is computed once: until the end of the first layer the image is the same for
    each of them. Projections of the image that read the same tensor are one matrix product, the transposed
    convolutions of stride 2 are products as well, and only the mask token that is used is upscaled.
    """

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode N prompts of each image.

        Args:
            image_embeddings: `(B, C, g, g)`.
            image_positional_embeddings: `(1, C, g, g)`.
            sparse_prompt_embeddings: `(B, N, T, C)`.
            dense_prompt_embeddings: `(B, C, g, g)`.

        Returns:
            Logits `(B, N, 4g, 4g)` of SAM's single-mask token, and its iou scores `(B, N)`.
        """
        batch, prompts = sparse_prompt_embeddings.shape[:2]
        grid = image_embeddings.shape[-1]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, prompts, -1, -1)
        prompt_tokens = torch.cat([tokens, sparse_prompt_embeddings], dim=2)  # (B, N, T, C)
        positions = image_positional_embeddings.flatten(2).transpose(1, 2)[:, None]  # (1, 1, G, C), G = g * g
        # K is 1 while the prompts of an image share it, N afterwards
        image = (image_embeddings + dense_prompt_embeddings).flatten(2).transpose(1, 2)[:, None]  # (B, K, G, C)

        tokens = prompt_tokens
        for layer in self.transformer.layers:
            tokens, image = self.two_way_layer(layer, tokens, image, prompt_tokens, positions)
        attention = self.transformer.final_attn_token_to_image
        key, value = self.project(image, positions, (attention.k_proj, True), (attention.v_proj, False))
        context = attend(attention.q_proj(tokens + prompt_tokens), key, value, attention.num_attention_heads)
        tokens = self.transformer.layer_norm_final_attn(tokens + attention.out_proj(context))

        hyper = self.output_hypernetworks_mlps[0](tokens[:, :, 1])  # (B, N, C / 8)
        hidden = self.upscale(image, self.upscale_conv1)  # (B, N, G, 4, C / 4)
        norm = self.upscale_layer_norm
        hidden = self.activation(F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        hidden = self.activation(self.upscale(hidden, self.upscale_conv2))  # (B, N, G, 4, 4, C / 8)
        masks = (hidden.flatten(2, 4) @ hyper[..., None].to(hidden.dtype))[..., 0]  # (B, N, G * 16)
        # y, x, then the rows and columns of both upscalings
        masks = masks.view(batch, prompts, grid, grid, 2, 2, 2, 2)
        masks = masks.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(batch, prompts, 4 * grid, 4 * grid)
        return masks, self.iou_prediction_head(tokens[:, :, 0])[..., 0]

    @staticmethod
    def two_way_layer(layer, tokens, image, prompt_tokens, positions) -> tuple[torch.Tensor, torch.Tensor]:
        """`SamTwoWayAttentionBlock` on tokens (B, N, T, C) and image (B, K, G, C); the image returns with K = N."""
        attention = layer.self_attn
        query = tokens if layer.skip_first_layer_pe else tokens + prompt_tokens
        context = attend(
            attention.q_proj(query), attention.k_proj(query), attention.v_proj(tokens), attention.num_attention_heads
        )
        context = attention.out_proj(context)
        tokens = layer.layer_norm1(context if layer.skip_first_layer_pe else tokens + context)

        to_image, to_token = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        key, value, image_query = ProbabilisticSamMaskDecoder.project(
            image, positions, (to_image.k_proj, True), (to_image.v_proj, False), (to_token.q_proj, True)
        )
        query = to_image.q_proj(tokens + prompt_tokens)
        # While K = 1, the tokens of all prompts are one sequence
        shared = query.reshape(*image.shape[:2], -1, query.shape[-1])
        context = attend(shared, key, value, to_image.num_attention_heads).view_as(query)
        tokens = layer.layer_norm2(tokens + to_image.out_proj(context))
        tokens = layer.layer_norm3(tokens + layer.mlp(tokens))

        key, value = to_token.k_proj(tokens + prompt_tokens), to_token.v_proj(tokens)
        image_query = image_query.expand(-1, tokens.shape[1], -1, -1)
        context = attend(image_query, key, value, to_token.num_attention_heads)
        return tokens, layer.layer_norm4(image + to_token.out_proj(context))

    @staticmethod
    def project(image, positions, *projections) -> list[torch.Tensor]:
        """Linear projections of the image, each with (True) or without its positions, in one matrix product."""
        layers = [layer for layer, _ in projections]
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        parts = F.linear(image, weight, bias).split([layer.out_features for layer in layers], dim=-1)
        return [
            part + F.linear(positions, layer.weight) if positioned else part
            for part, (layer, positioned) in zip(parts, projections, strict=True)
        ]

    @staticmethod
    def upscale(hidden: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
        """A transposed convolution of kernel and stride 2, channels last: (..., C) to (..., rows x columns, C')."""
        weight = conv.weight.permute(2, 3, 1, 0).reshape(-1, conv.in_channels)
        bias = None if conv.bias is None else conv.bias.repeat(4)
        return F.linear(hidden, weight, bias).unflatten(-1, (4, conv.out_channels))


# ----------------------------------------------------------------------------------------------------------- model


class ProbabilisticSamModel(SamModel):
    """SAM with a Gaussian latent space: one image and one prompt give as many different masks as asked for.

    `from_pretrained` on the directory of a `SamModel` warm-starts: only the latent networks are new.
    """

    config: ProbabilisticSamConfig
    config_class = ProbabilisticSamConfig
    _no_split_modules = ["SamVisionLayer", "TinyViTStage"]
    latent_modules = ("prior", "posterior", "latent_proj")

    def __init__(self, config: ProbabilisticSamConfig):
        super(SamModel, self).__init__(config)  # SamModel's own would build a ViT whatever the vision configuration is
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        encoder = TinyViTVisionEncoder if isinstance(config.vision_config, TinyViTVisionConfig) else SamVisionEncoder
        self.vision_encoder = encoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = ProbabilisticSamMaskDecoder(config.mask_decoder_config)
        self.prior = LatentNetwork(config, reads_masks=False)
        self.posterior = LatentNetwork(config, reads_masks=True)
        hidden_size = config.mask_decoder_config.hidden_size
        self.latent_proj = nn.Sequential(
            nn.Linear(config.latent_dim - 1, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.post_init()

    def get_prompt_maps(self, batch_size, input_points, input_labels, input_boxes, input_masks) -> torch.Tensor:
        """Prompts as maps on the grid of the image embeddings: (B, P, 4, g, g), zeros for a kind that is absent."""
        size = self.config.prompt_encoder_config.image_size
        grid = self.config.prompt_encoder_config.image_embedding_size
        prompt = next(item for item in (input_boxes, input_points, input_masks) if item is not None)
        prompts = 1 if input_boxes is None and input_points is None else prompt.shape[1]
        maps = torch.zeros(
            (batch_size, prompts, LatentNetwork.PROMPT_CHANNELS, grid, grid), device=prompt.device, dtype=torch.float32
        )
        if input_boxes is not None:
            maps[:, :, 0] = box_map(input_boxes.float(), size, grid)
        if input_points is not None:
            maps[:, :, 1:3] = point_maps(input_points.float(), input_labels, size, grid)
        if input_masks is not None:
            maps[:, :, 3] = F.adaptive_avg_pool2d((input_masks.float() > 0).float(), grid)
        return maps

    def decode(
        self,
        image_embeddings: torch.Tensor,
        sparse_embeddings: torch.Tensor | None,
        dense_embeddings: torch.Tensor,
        latents: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder call for all latents (B, P, S, L): logits (B, P, S, h, w) and iou scores (B, P, S)."""
        _, prompts, samples, _ = latents.shape
        latent_embeddings = self.latent_proj(latents[..., 1:].to(dense_embeddings.dtype))
        latent_embeddings = latent_embeddings[:, :, :, None]  # (B, P, S, 1, C)
        if sparse_embeddings is None:  # a mask is the only prompt
            sparse = latent_embeddings
        elif self.config.latent_injection == "sparse":
            sparse = sparse_embeddings[:, :, None] + latent_embeddings  # (B, P, S, T, C)
        else:
            tokens = sparse_embeddings[:, :, None].expand(-1, -1, samples, -1, -1)
            sparse = torch.cat([tokens, latent_embeddings], dim=3)  # (B, P, S, T + 1, C)
        masks, iou_scores = self.mask_decoder(
            image_embeddings=image_embeddings,
            image_positional_embeddings=self.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse.flatten(1, 2),
            dense_prompt_embeddings=dense_embeddings,
        )
        masks = masks.unflatten(1, (prompts, samples)).float()
        draws = latents[..., 0, None, None] > 0
        return torch.where(draws, masks, EMPTY_LOGIT), iou_scores.unflatten(1, (prompts, samples))

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
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput | tuple:
        """Draw masks, or with `labels` compute the loss.

        Args:
            pixel_values: `(B, 3, image_size, image_size)`.
            input_points: `(B, P, K, 2)`, x and y in pixels of the model's input.
            input_labels: `(B, P, K)`: 1 inside, 0 outside, -10 padding; all inside when left out.
            input_boxes: `(B, P, 4)`, x1, y1, x2, y2 in pixels of the model's input.
            input_masks: `(B, 1, h, w)` logits, shared by the prompts of an image, as in SAM.
            image_embeddings: `(B, C, g, g)` in place of `pixel_values`.
            labels: `(B, P, R, H, W)` readers' masks, boolean or 0..1; resized to h x w when they are larger. A reader
                who drew nothing has an empty mask.
            num_samples: samples a prompt when neither `labels` nor `latents` are given.
            latents: `(B, P, S, L)`, to decode instead of drawing them.
            generator: source of the noise; the same seed gives the same samples.
            return_dict: `False` for a plain tuple.
            kwargs: not used; `windows` and `original_sizes` of the processor's output may be passed.

        Raises:
            ValueError: neither or both of image and embeddings, no prompt, or shapes that do not fit.
        """
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

        if image_embeddings is None:
            image_embeddings = self.vision_encoder(pixel_values).last_hidden_state
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

        sparse_embeddings, dense_embeddings = self.prompt_encoder(
            input_points=input_points, input_labels=input_labels, input_boxes=input_boxes, input_masks=input_masks
        )
        prompt_maps = self.get_prompt_maps(batch_size, input_points, input_labels, input_boxes, input_masks)
        prompt_maps = prompt_maps.to(image_embeddings.dtype)
        prior_mean, prior_log_std = self.prior(image_embeddings, prompt_maps)
        # The scale of the drawing coordinate is free, since only its sign counts
        prior_log_std = torch.cat([torch.zeros_like(prior_log_std[..., :1]), prior_log_std[..., 1:]], dim=-1)

        if labels is None:
            if latents is None:
                noise = self.draw_noise((*prior_mean.shape[:2], num_samples, self.config.latent_dim), generator)
                latents = prior_mean[:, :, None] + torch.exp(prior_log_std)[:, :, None] * noise
            elif latents.shape[:2] != prior_mean.shape[:2] or latents.shape[-1] != self.config.latent_dim:
                expected = (*prior_mean.shape[:2], "S", self.config.latent_dim)
                raise ValueError(f"latents must have the shape {expected}, got {tuple(latents.shape)}.")
            chunk = max(1, MAX_DECODED // prior_mean[..., 0].numel())
            chunks = [
                self.decode(image_embeddings, sparse_embeddings, dense_embeddings, part)
                for part in latents.split(chunk, dim=2)
            ]
            masks, iou_scores = (torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
            output = ProbabilisticSamOutput(
                pred_masks=masks,
                iou_scores=iou_scores,
                latents=latents,
                prior_mean=prior_mean,
                prior_log_std=prior_log_std,
            )
        else:
            embeddings = (image_embeddings, sparse_embeddings, dense_embeddings)
            output = self.train_on_readers(embeddings, prompt_maps, prior_mean, prior_log_std, labels, generator)
        return output if return_dict is not False else output.to_tuple()

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
        """Standard normal noise, drawn on the generator's device so that a seed means the same everywhere."""
        device = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device).to(self.device)

    def train_on_readers(
        self,
        embeddings: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
        prompt_maps: torch.Tensor,
        prior_mean: torch.Tensor,
        prior_log_std: torch.Tensor,
        labels: torch.Tensor,
        generator: torch.Generator | None,
    ) -> ProbabilisticSamOutput:
        """Loss of all readers (B, P, R, H, W) in one decoder call: negative evidence lower bound and energy distance.

        For a reader who drew: BCE + Dice of the mask decoded from the posterior, and KL(posterior, prior) over the
        coordinates of the outline. For every reader: -log P(drew or not), the KL of the drawing coordinate between the
        truncated and the whole normal distribution. The slot of a reader who drew nothing decodes a draw of the prior
        instead: it serves the energy distance.
        """
        if labels.ndim != 5 or labels.shape[:2] != prior_mean.shape[:2]:
            expected = (*prior_mean.shape[:2], "R", "H", "W")
            raise ValueError(f"labels must have the shape {expected}, got {tuple(labels.shape)}.")
        config = self.config
        size = 4 * config.prompt_encoder_config.image_embedding_size
        readers = labels.shape[2]
        targets = labels.float()
        if targets.shape[-2:] != (size, size):
            targets = F.interpolate(targets.flatten(0, 1), size=(size, size), mode="area")
            targets = (targets >= 0.5).float().unflatten(0, labels.shape[:2])
        drew = targets.flatten(3).any(dim=-1)  # (B, P, R)

        mean, log_std = self.posterior(embeddings[0], prompt_maps, targets.to(prompt_maps.dtype))  # (B, P, R, L)
        prior_mean_r, prior_log_std_r = (item[:, :, None].expand_as(mean) for item in (prior_mean, prior_log_std))
        drawing_mean, drawing_log_std = truncated_normal(prior_mean_r[..., :1], drew[..., None])
        drew_outline = drew[..., None]
        # Someone who drew nothing says nothing about outlines: his posterior over them is the prior
        mean = torch.cat([drawing_mean, torch.where(drew_outline, mean, prior_mean_r)[..., 1:]], dim=-1)
        log_std = torch.cat([drawing_log_std, torch.where(drew_outline, log_std, prior_log_std_r)[..., 1:]], dim=-1)

        log_draws, log_empty = log_probability_of_drawing(prior_mean_r[..., 0])
        kl_drawing = -torch.where(drew, log_draws, log_empty)[..., None]
        kl_outline = gaussian_kl(mean, log_std, prior_mean_r, prior_log_std_r)[..., 1:]
        kl = torch.cat([kl_drawing, kl_outline], dim=-1)

        extra = config.num_energy_samples if config.energy_weight > 0 else 0
        slot_mean = torch.cat([mean, prior_mean[:, :, None].expand(-1, -1, extra, -1)], dim=2)
        slot_log_std = torch.cat([log_std, prior_log_std[:, :, None].expand(-1, -1, extra, -1)], dim=2)
        noise = self.draw_noise(tuple(slot_mean.shape), generator)
        outline = slot_mean + torch.exp(slot_log_std) * noise
        always = torch.ones_like(outline[..., :1])  # decode every slot: emptiness has its own exact likelihood
        slots = torch.cat([always, outline[..., 1:]], dim=-1)  # (B, P, R + E, L)
        masks, iou_scores = self.decode(*embeddings, slots)

        logits = masks[:, :, :readers]
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(-2, -1))
        probabilities = masks.sigmoid()
        overlap = (probabilities[:, :, :readers] * targets).sum(dim=(-2, -1))
        total = probabilities[:, :, :readers].sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
        dice = 1 - (2 * overlap + 1) / (total + 1)
        reconstruction = ((config.bce_weight * bce + config.dice_weight * dice) * drew).mean()

        loss = reconstruction + config.kl_weight * kl_outline.sum(dim=-1).mean()  # 0 where nothing was drawn
        loss = loss + config.drawing_weight * kl_drawing.mean()
        energy = None
        if extra:
            from_prior = torch.cat([~drew, torch.ones_like(drew[..., :1]).expand(-1, -1, extra)], dim=2)
            energy = energy_distance(probabilities.flatten(3), from_prior, targets.flatten(3), drew).mean()
            loss = loss + config.energy_weight * energy

        return ProbabilisticSamOutput(
            loss=loss,
            reconstruction_loss=reconstruction,
            energy_distance=energy,
            kl_divergence=kl,
            pred_masks=torch.where(drew[..., None, None], logits, EMPTY_LOGIT),
            iou_scores=iou_scores[:, :, :readers],
            latents=torch.cat([drawing_mean, outline[:, :, :readers, 1:]], dim=-1),
            prior_mean=prior_mean,
            prior_log_std=prior_log_std,
            posterior_mean=mean,
            posterior_log_std=log_std,
        )

    @torch.no_grad()
    def sample(
        self,
        pixel_values: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        num_samples: int = 16,
        generator: torch.Generator | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
    ) -> ProbabilisticSamOutput:
        """Draw `num_samples` masks a prompt: `forward` without labels and without gradients.

        Arguments and shapes are those of `forward`; one encoder pass serves all samples. `windows` and
        `original_sizes` are not used: with them `sample(**inputs)` takes all that the processor gives.
        """
        return self(
            pixel_values=pixel_values,
            input_boxes=input_boxes,
            input_points=input_points,
            input_labels=input_labels,
            input_masks=input_masks,
            image_embeddings=image_embeddings,
            num_samples=num_samples,
            generator=generator,
        )


__all__ = ["ProbabilisticSamModel", "ProbabilisticSamOutput"]
