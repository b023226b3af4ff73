"""Baseline that ignores the image: an ellipse of random size in the box, empty as often as the readers' masks."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from ..errors import UserError
from ..modeling_probabilistic_sam import (
    EMPTY_LOGIT,
    ProbabilisticSamOutput,
    check_other_arguments,
    spread_noise,
    whole_num_samples,
)
from .common import PixelConfig, PixelModel

SHARPNESS = 4.0  # logit one pixel inside the outline


@strict
class EllipseConfig(PixelConfig):
    """Configuration of `EllipseModel`."""

    model_type = "ellipse"


class EllipseModel(PixelModel):
    """An ellipse centred in the box, with axes of `scale` times the sides of the box and log scale ~ N(mean, std).

    The three weights are the probability of an empty mask, and mean and standard deviation of the log scale; `fit`
    estimates them.
    """

    config: EllipseConfig
    config_class = EllipseConfig

    def __init__(self, config: EllipseConfig):
        super().__init__(config)
        self.probability_of_empty = nn.Parameter(torch.zeros(()))
        self.log_scale_mean = nn.Parameter(torch.zeros(()))
        self.log_scale_std = nn.Parameter(torch.zeros(()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, EllipseModel):  # always an ellipse that fills the box
            for parameter in (module.probability_of_empty, module.log_scale_mean, module.log_scale_std):
                init.zeros_(parameter)

    @torch.no_grad()
    def fit(self, slices: Iterable[tuple[list[float], np.ndarray]]) -> None:
        """Maximum likelihood estimate from the box (4,) and the readers' masks (R, H, W) of each slice.

        The scale of a mask is that of an ellipse of equal area: sqrt(area / (pi / 4 * width * height of the box)).
        """
        empty: list[bool] = []
        log_scales: list[float] = []
        for (x1, y1, x2, y2), masks in slices:
            areas = masks.sum(axis=(1, 2))
            empty += (areas == 0).tolist()
            log_scales += (0.5 * np.log(areas[areas > 0] / (math.pi / 4 * (x2 - x1) * (y2 - y1)))).tolist()
        self.probability_of_empty.fill_(float(np.mean(empty)))
        self.log_scale_mean.fill_(float(np.mean(log_scales)))
        self.log_scale_std.fill_(float(np.std(log_scales)))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image_embeddings: torch.Tensor | None = None,
        **kwargs,
    ) -> ProbabilisticSamOutput:
        """Sample masks in boxes (B, P, 4), in pixels of the model's input: `pred_masks` (B, P, S, h, w).

        The arguments are those of `ProbabilisticSamModel.forward`; the image is not used.

        Raises:
            UserError: no box, other prompts, or labels.
        """
        for name in ("input_points", "input_labels", "input_masks", "labels", "reader_mask", "annotated"):
            if kwargs.pop(name, None) is not None and input_boxes is not None:
                raise UserError(f"the ellipse baseline does not use {name}; accepted: prompts with input_boxes only")
        check_other_arguments(kwargs)
        if input_boxes is None:
            raise UserError("the ellipse baseline needs a box; accepted: prompts with input_boxes")
        count = whole_num_samples(num_samples)
        size = self.config.image_size // 4
        noise = spread_noise((*input_boxes.shape[:2], count, 2), generator, input_boxes.device)
        present = noise[..., 0] > torch.special.ndtri(self.probability_of_empty.float())  # (B, P, S)
        scale = torch.exp(self.log_scale_mean + self.log_scale_std * noise[..., 1])
        low, high = (input_boxes.float() * (size / self.config.image_size)).chunk(2, dim=-1)  # (B, P, 2), mask px
        radii = (((high - low) / 2)[:, :, None] * scale[..., None]).clamp(min=1e-3)  # (B, P, S, 2)
        centres = torch.arange(size, device=input_boxes.device) + 0.5
        offsets = (centres - ((low + high) / 2)[:, :, None, :, None]) / radii[..., None]  # (B, P, S, 2, size)
        x, y = offsets.unbind(dim=-2)
        distance = torch.sqrt(x[..., None, :] ** 2 + y[..., :, None] ** 2)  # 1 on the outline
        logits = SHARPNESS * (1 - distance) * radii.amin(dim=-1)[..., None, None]
        return ProbabilisticSamOutput(pred_masks=torch.where(present[..., None, None], logits, EMPTY_LOGIT))
