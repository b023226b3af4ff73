"""MobileSAM's image encoder, TinyViT-5M (Wu et al. 2022, arXiv 2207.10666; Zhang et al. 2023, arXiv 2306.14289).

Conversion folds batch normalisation into the convolutions, so there are no running statistics and no difference
between training and evaluation.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.sam.modeling_sam import SamVisionEncoderOutput, SamVisionNeck, eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .configuration_probabilistic_sam import TinyViTVisionConfig


def conv(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution with padding that preserves the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups)


class TinyViTPatchEmbeddings(nn.Module):
    """Two convolutions of stride 2: (B, 3, H, W) to (B, C, H / 4, W / 4)."""

    def __init__(self, config: TinyViTVisionConfig):
        super().__init__()
        self.config = config
        width = config.embed_dims[0]
        self.conv1 = conv(config.num_channels, width // 2, 3, stride=2)
        self.act = ACT2FN[config.hidden_act]
        self.conv2 = conv(width // 2, width, 3, stride=2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.config.image_size, self.config.image_size):
            size = self.config.image_size
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({size}*{size}).")
        return self.conv2(self.act(self.conv1(pixel_values)))


class TinyViTMBConv(GradientCheckpointingLayer):
    """Inverted bottleneck: expand, depthwise 3x3, project, add, activate."""

    def __init__(self, config: TinyViTVisionConfig, width: int):
        super().__init__()
        hidden = int(width * config.mbconv_expand_ratio)
        self.conv1 = conv(width, hidden)
        self.conv2 = conv(hidden, hidden, 3, groups=hidden)
        self.conv3 = conv(hidden, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.act(self.conv1(hidden_states))
        hidden_states = self.act(self.conv2(hidden_states))
        return self.act(residual + self.conv3(hidden_states))


class TinyViTPatchMerging(nn.Module):
    """Changes the width between two stages and, at stride 2, halves the resolution."""

    def __init__(self, config: TinyViTVisionConfig, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, stride=stride, groups=out_channels)
        self.conv3 = conv(out_channels, out_channels)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act(self.conv1(hidden_states))
        hidden_states = self.act(self.conv2(hidden_states))
        return self.conv3(hidden_states)


class TinyViTAttention(nn.Module):
    """Attention within a window, with a learned bias for each pair of absolute offsets (|dy|, |dx|)."""

    def __init__(self, config: TinyViTVisionConfig, width: int, num_heads: int, window_size: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.window_size = window_size
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size * window_size))

    def bias(self) -> torch.Tensor:
        """(heads, window * window, window * window); the index is computed, so no buffer is needed."""
        side = torch.arange(self.window_size, device=self.attention_biases.device)
        offset = (side[:, None] - side[None, :]).abs()  # (w, w)
        index = offset[:, None, :, None] * self.window_size + offset[None, :, None, :]  # (w, w, w, w): y, x, y', x'
        return self.attention_biases[:, index.reshape(self.window_size**2, self.window_size**2)]

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the context and, from the eager implementation, the weights (windows, heads, length, length)."""
        batch, length, width = hidden_states.shape  # one item per window
        qkv = self.qkv(self.layer_norm(hidden_states)).view(batch, length, self.num_heads, 3 * self.head_dim)
        query, key, value = qkv.transpose(1, 2).split(self.head_dim, dim=-1)  # (windows, heads, length, head_dim)
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # With an axis for the windows, since PyTorch's fused attention on a CPU takes masks of 2 or 4 axes only
        bias = self.bias().to(query.dtype)[None]
        context, weights = attend(self, query, key, value, attention_mask=bias, scaling=self.head_dim**-0.5)
        return self.proj(context.reshape(batch, length, width)), weights


class TinyViTMLP(nn.Module):
    """LayerNorm and two linear layers."""

    def __init__(self, config: TinyViTVisionConfig, width: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, int(width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(width * config.mlp_ratio), width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.layer_norm(hidden_states))))


class TinyViTBlock(GradientCheckpointingLayer):
    """Windowed attention, a depthwise convolution across windows, and an MLP. (B, C, H, W) in and out."""

    def __init__(self, config: TinyViTVisionConfig, width: int, num_heads: int, window_size: int):
        super().__init__()
        self.window_size = window_size
        self.attn = TinyViTAttention(config, width, num_heads, window_size)
        self.local_conv = conv(width, width, 3, groups=width)
        self.mlp = TinyViTMLP(config, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, width, height, length = hidden_states.shape
        size = self.window_size
        tokens = hidden_states.permute(0, 2, 3, 1)  # (B, H, W, C)
        # As in MobileSAM, zeros are padded below and to the right, and the windows attend to the padding
        padded = F.pad(tokens, (0, 0, 0, -length % size, 0, -height % size))
        rows, columns = padded.shape[1] // size, padded.shape[2] // size
        windows = padded.view(batch, rows, size, columns, size, width).transpose(2, 3).reshape(-1, size * size, width)
        windows = self.attn(windows)[0].view(batch, rows, columns, size, size, width)
        context = windows.transpose(2, 3).reshape(batch, rows * size, columns * size, width)[:, :height, :length]
        hidden_states = self.local_conv((tokens + context).permute(0, 3, 1, 2))
        tokens = hidden_states.permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class TinyViTStage(nn.Module):
    """Blocks of one width, followed by patch merging (except after the last stage)."""

    def __init__(self, config: TinyViTVisionConfig, index: int):
        super().__init__()
        width = config.embed_dims[index]
        blocks: list[nn.Module]
        if index == 0:
            blocks = [TinyViTMBConv(config, width) for _ in range(config.depths[0])]
        else:
            heads, window = config.num_heads[index], config.window_sizes[index]
            blocks = [TinyViTBlock(config, width, heads, window) for _ in range(config.depths[index])]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None
        if index + 1 < len(config.embed_dims):
            stride = 1 if index == 2 else 2  # the total stride is 16 in MobileSAM, 32 in TinyViT
            self.downsample = TinyViTPatchMerging(config, width, config.embed_dims[index + 1], stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states if self.downsample is None else self.downsample(hidden_states)


class TinyViTVisionEncoder(PreTrainedModel):
    """pixel_values (B, 3, S, S) to image embeddings (B, output_channels, S / 16, S / 16)."""

    config: TinyViTVisionConfig
    config_class = TinyViTVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["TinyViTStage"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": TinyViTStage, "attentions": TinyViTAttention}

    def __init__(self, config: TinyViTVisionConfig):
        super().__init__(config)
        self.patch_embed = TinyViTPatchEmbeddings(config)
        self.layers = nn.ModuleList([TinyViTStage(config, index) for index in range(len(config.embed_dims))])
        self.neck = SamVisionNeck(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TinyViTAttention):
            init.zeros_(module.attention_biases)
        elif isinstance(module, nn.Conv2d):  # no normalisation follows, since it is folded into the convolutions
            init.kaiming_normal_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The first layer, as in SAM's encoder."""
        return self.patch_embed

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> SamVisionEncoderOutput:
        """Image embeddings as `last_hidden_state`.

        `output_hidden_states=True` adds the input of the first stage and the output of each stage,
        `output_attentions=True` the attention weights (eager implementation only).
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        hidden_states = self.patch_embed(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden_states.permute(0, 2, 3, 1)))


__all__ = ["TinyViTVisionEncoder"]
