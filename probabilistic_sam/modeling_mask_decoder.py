"""SAM's mask decoder with the same weights and masks, at half the cost for many prompts of one image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamMaskDecoder

MASKED = -1e4  # added to a score, it makes a weight of 0 in every floating-point type


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Multi-head attention of projected tensors (B, N, length, C); `mask` (B, length) is added to the scores of keys.

    The scores are small because there are few tokens. Plain matrix products avoid the fused kernel, whose backward
    pass is slow in bfloat16 on a CPU.
    """
    query, key, value = (item.unflatten(-1, (num_heads, -1)).transpose(2, 3) for item in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask[:, None, None, None]
    context = scores.softmax(dim=-1).to(value.dtype) @ value
    return context.transpose(2, 3).flatten(-2)


def weight_and_bias(layer: Any, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias (out,) of a linear layer, with dtype and device of `given`.

    For other linear maps, such as quantised layers or layers with a LoRA adapter, they are computed from the outputs
    for unit vectors.
    """
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    units = torch.eye(layer.in_features, dtype=given.dtype, device=given.device)
    bias = layer(torch.zeros_like(units[:1]))
    return (layer(units) - bias).T, bias[0]


class ProbabilisticSamMaskDecoder(SamMaskDecoder):
    """SAM's mask decoder with the same weights and masks, at half the cost for many prompts of one image.

    - Up to the end of the first layer the image tokens are the same for all prompts of an image, so they are computed
      once.
    - Afterwards each prompt has its own image tokens, and projecting these G cells is the most expensive part of an
      attention. Therefore the products are reordered, (q W) x^T instead of q (x W^T)^T: the weights of each head are
      applied to the few tokens, and the cells are multiplied with heads x T vectors (8 x 7 with a box) instead of
      C / 2 = 128.
    - The transposed convolutions of stride 2 are matrix products, and only the mask token in use is upscaled.

    `attn_implementation` applies to the vision encoder only.
    """

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        middle_details: torch.Tensor,
        fine_details: torch.Tensor,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode N prompts of each image.

        Args:
            image_embeddings: `(B, C, g, g)`.
            image_positional_embeddings: `(1, C, g, g)`.
            sparse_prompt_embeddings: `(B, N, T, C)`.
            dense_prompt_embeddings: `(B, C, g, g)`.
            middle_details: `(B, C / 4, 2g, 2g)`, added after the first upscaling.
            fine_details: `(B, C / 8, 4g, 4g)`, added after the second one.
            padding: `(B, T)` bool, sparse embeddings that nothing attends to. SAM attends to them, so that its masks
                depend on how many points the other prompts have.

        Returns:
            Logits `(B, N, 4g, 4g)` of SAM's single-mask token, and the IoU scores `(B, N)` of its IoU head.
        """
        batch, prompts = sparse_prompt_embeddings.shape[:2]
        grid = image_embeddings.shape[-1]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, prompts, -1, -1)
        mask = None
        if padding is not None:
            mask = F.pad(padding, (tokens.shape[2], 0)).to(sparse_prompt_embeddings.dtype) * MASKED  # (B, T)
        prompt_tokens = torch.cat([tokens, sparse_prompt_embeddings], dim=2)  # (B, N, T, C)
        positions = image_positional_embeddings.flatten(2).transpose(1, 2)[:, None]  # (1, 1, G, C), G = g * g
        # (B, K, G, C): K is 1 while the prompts of an image share its tokens, N afterwards
        image = (image_embeddings + dense_prompt_embeddings).flatten(2).transpose(1, 2)[:, None].contiguous()

        tokens = prompt_tokens
        for layer in self.transformer.layers:
            tokens, image = self.two_way_layer(layer, tokens, image, prompt_tokens, positions, mask)
        attention = self.transformer.final_attn_token_to_image
        context = self.token_to_image(attention, tokens + prompt_tokens, image, positions)
        tokens = self.transformer.layer_norm_final_attn(tokens + context)

        hyper = self.output_hypernetworks_mlps[0](tokens[:, :, 1])  # (B, N, C / 8)
        hidden = self.upscale(image, self.upscale_conv1)  # (B, N, G, 4, C / 4)
        details = F.pixel_unshuffle(middle_details, 2).flatten(2).unflatten(1, (-1, 4))  # (B, C / 4, 4, G)
        hidden += (details.permute(0, 3, 2, 1) + self.upscale_conv1.bias)[:, None]
        norm = self.upscale_layer_norm
        hidden = self.activation(F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        hidden = self.upscale(hidden, self.upscale_conv2)  # (B, N, G, 4, 4, C / 8)
        details = fine_details.unflatten(3, (grid, 2, 2)).unflatten(2, (grid, 2, 2))  # (B, C / 8, g, 2, 2, g, 2, 2)
        details = details.permute(0, 2, 5, 3, 6, 4, 7, 1).flatten(1, 2).flatten(2, 3).flatten(3, 4)
        hidden += (details + self.upscale_conv2.bias)[:, None]
        hidden = self.activation(hidden)
        masks = (hidden.flatten(2, 4) @ hyper[..., None].to(hidden.dtype))[..., 0]  # (B, N, G * 16)
        # Axes: y, x, then rows and columns of the two upscalings
        masks = masks.view(batch, prompts, grid, grid, 2, 2, 2, 2)
        masks = masks.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(batch, prompts, 4 * grid, 4 * grid)
        # Detached: the scores learn from the masks, not the masks from the scores
        return masks, self.iou_prediction_head(tokens[:, :, 0].detach())[..., 0]

    @staticmethod
    def two_way_layer(layer, tokens, image, prompt_tokens, positions, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """`SamTwoWayAttentionBlock` on tokens (B, N, T, C) and image (B, K, G, C); returns the image with K = N.

        `mask` (B, T) is added to the scores of the tokens as keys, or None.
        """
        attention = layer.self_attn
        query = tokens if layer.skip_first_layer_pe else tokens + prompt_tokens
        context = attend(
            attention.q_proj(query), attention.k_proj(query), attention.v_proj(tokens), attention.num_attention_heads,
            mask,
        )  # fmt: skip
        context = attention.out_proj(context)
        tokens = layer.layer_norm1(context if layer.skip_first_layer_pe else tokens + context)

        context = ProbabilisticSamMaskDecoder.token_to_image(
            layer.cross_attn_token_to_image, tokens + prompt_tokens, image, positions
        )
        tokens = layer.layer_norm2(tokens + context)
        tokens = layer.layer_norm3(tokens + layer.mlp(tokens))
        context = ProbabilisticSamMaskDecoder.image_to_token(
            layer.cross_attn_image_to_token, image, positions, tokens + prompt_tokens, tokens, mask
        )
        return tokens, layer.layer_norm4(image + context)

    @staticmethod
    def scores(tokens, projection, image, positions) -> torch.Tensor:
        """Tokens (B, N, T, heads, D) times the projected cells of image + positions: (B, N, heads, T, G)."""
        heads = tokens.shape[3]
        shared = image + positions if image.shape[1] == 1 else positions
        scores = torch.einsum("bnthd,bghd->bnhtg", tokens, projection(shared)[:, 0].unflatten(-1, (heads, -1)))
        if image.shape[1] == 1:
            return scores
        weight, _ = weight_and_bias(projection, image)
        tokens = torch.einsum("bnthd,hdc->bnhtc", tokens, weight.unflatten(0, (heads, -1))).flatten(2, 3)
        return (tokens @ image.transpose(-2, -1)).view(scores.shape) + scores

    @staticmethod
    def token_to_image(attention, tokens, image, positions) -> torch.Tensor:
        """`SamAttention` of tokens (B, N, T, C) to the image (B, K, G, C)."""
        heads = attention.num_attention_heads
        query = (attention.q_proj(tokens) * attention.scaling).unflatten(-1, (heads, -1))
        weights = ProbabilisticSamMaskDecoder.scores(query, attention.k_proj, image, positions).softmax(dim=-1)
        if image.shape[1] == 1:
            value = attention.v_proj(image)[:, 0].unflatten(-1, (heads, -1))
            context = torch.einsum("bnhtg,bghd->bnthd", weights, value)
        else:
            weight, bias = (item.unflatten(0, (heads, -1)) for item in weight_and_bias(attention.v_proj, image))
            context = (weights.flatten(2, 3) @ image).unflatten(2, (heads, -1))
            context = torch.einsum("bnhtc,hdc->bnthd", context, weight) + bias
        return attention.out_proj(context.flatten(-2))

    @staticmethod
    def image_to_token(attention, image, positions, tokens, values, mask) -> torch.Tensor:
        """`SamAttention` of the image (B, K, G, C) to tokens (B, N, T, C) with their `values`: (B, N, G, C)."""
        heads = attention.num_attention_heads
        key = (attention.k_proj(tokens) * attention.scaling).unflatten(-1, (heads, -1))
        scores = ProbabilisticSamMaskDecoder.scores(key, attention.q_proj, image, positions)  # (B, N, heads, T, G)
        weights = (scores if mask is None else scores + mask[:, None, None, :, None]).softmax(dim=3)
        weight, bias = weight_and_bias(attention.out_proj, tokens)
        value = attention.v_proj(values).unflatten(-1, (heads, -1))
        # The attention weights of a head sum to 1, so the bias can be added to the values
        value = torch.einsum("bnthd,chd->bnhtc", value, weight.unflatten(-1, (heads, -1))) + bias / heads
        return weights.flatten(2, 3).transpose(-2, -1) @ value.flatten(2, 3)

    @staticmethod
    def upscale(hidden: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
        """Transposed convolution with kernel and stride 2, without bias: (..., C) to (..., rows x columns, C')."""
        weight = conv.weight.permute(2, 3, 1, 0).reshape(-1, conv.in_channels)
        return F.linear(hidden, weight).unflatten(-1, (4, conv.out_channels))
