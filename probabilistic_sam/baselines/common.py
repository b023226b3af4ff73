"""Shared code of the baselines: reconstruction loss, dropout with a generator, and two base classes.

Shapes as in the model: B images, P prompts per image, S samples, R readers, h = w = image_size / 4.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..loss_probabilistic_sam import dice_loss, summed_bce
from ..modeling_probabilistic_sam import (
    PROMPT_CHANNELS,
    ProbabilisticSamModel,
    ProbabilisticSamOutput,
    Readers,
    check_generators,
    check_image_and_prompts,
    pack_pixels,
    pixels_and_contrast,
    prompt_maps,
    to_device,
)

MAP_CHANNELS = 2 + PROMPT_CHANNELS  # of `pixels_and_contrast` and `prompt_maps`


def to_embeddings(
    encode: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor | None,
    image_embeddings: torch.Tensor | None,
) -> torch.Tensor:
    """The image embeddings, encoded from the image if they are not given.

    Raises:
        ValueError: neither or both of image and embeddings.
    """
    if pixel_values is not None and image_embeddings is None:
        return encode(pixel_values)
    if image_embeddings is not None and pixel_values is None:
        return image_embeddings
    raise ValueError("Exactly one of pixel_values and image_embeddings must be provided.")


def reconstruction_loss(
    logits: torch.Tensor, targets: torch.Tensor, bce_weight: float, dice_weight: float
) -> torch.Tensor:
    """Weighted sum of BCE (summed over pixels) and Dice loss: logits (B, P, 1 or R, h, w) to (B, P, R).

    Empty targets count like any other.
    """
    logits = logits.expand_as(targets)
    return bce_weight * summed_bce(logits, targets) + dice_weight * dice_loss(logits.sigmoid(), targets)


def known_readers(readers: Readers) -> torch.Tensor:
    """Which readers a model without presence can learn from: (B, P, R) bool.

    Absent readers do not count, nor readers whose pixels vanished when the labels were resized: their mask is not
    empty, but its outline is unknown.
    """
    return readers.present & (readers.outlined | ~readers.annotated)


def drop_channels(features: torch.Tensor, share: float, generator: torch.Generator | None) -> torch.Tensor:
    """Dropout of whole channels of (N, C, ...), with random numbers from a generator.

    Neighbouring values in a map are strongly correlated, so dropping single values would hardly change a mask
    (Tompson et al. 2015, arXiv 1411.4280).
    """
    if share == 0:
        return features
    check_generators(generator, len(features))
    source = "cpu" if generator is None else generator.device
    kept = to_device(torch.rand(features.shape[:2], generator=generator, device=source), features.device) >= share
    kept = kept.view(*kept.shape, *[1] * (features.ndim - 2))
    return features * kept.to(features.dtype) / (1 - share)


def check_dropout(dropout: float, sampling_dropout: float) -> None:
    """Raise ValueError for a share outside [0, 1)."""
    for name, share in {"dropout": dropout, "sampling_dropout": sampling_dropout}.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {share}")


class DropoutSampling:
    """Mixin of models with dropout in sampling: with one generator per image, `sample` has a call per image.

    The passes of an image would otherwise share calls, and so random numbers, with those of other images.
    """

    @torch.no_grad()
    def sample(self, pixel_values=None, input_boxes=None, num_samples=16, generator=None, **inputs):
        """As in `ProbabilisticSamModel`."""
        sample = super().sample  # type: ignore[misc]
        if not isinstance(generator, Sequence) or self.config.sampling_dropout == 0:  # type: ignore[attr-defined]
            return sample(pixel_values, input_boxes, num_samples, generator, **inputs)
        inputs |= {"pixel_values": pixel_values, "input_boxes": input_boxes}
        tensors = {name: inputs.pop(name) for name in list(inputs) if isinstance(inputs[name], torch.Tensor)}
        check_generators(generator, len(next(iter(tensors.values()))))
        outputs = [
            sample(**inputs, **{k: v[i : i + 1] for k, v in tensors.items()}, num_samples=num_samples, generator=one)
            for i, one in enumerate(generator)
        ]
        return ProbabilisticSamOutput({name: torch.cat([item[name] for item in outputs]) for name in outputs[0]})


class SamVariant(ProbabilisticSamModel):
    """Base class of models that start from the weights of a SAM."""

    @classmethod
    def from_sam(cls, sam: ProbabilisticSamModel, **fields) -> Self:
        """A model with all weights of a converted SAM whose names match; `fields` change its configuration."""
        others = ("model_type", "architectures", "transformers_version")
        values = {name: value for name, value in sam.config.to_dict().items() if name not in others}
        model = cls(cls.config_class(**(values | fields)))
        model.load_state_dict(sam.state_dict(), strict=False)
        return model


@strict
class PixelConfig(PreTrainedConfig):
    r"""Configuration of a model that uses pixels without SAM.

    Args:
        image_size (`int`, defaults to 256): side of the model's input in pixels, a multiple of 16; the model reduces
            it to a quarter, the size of its masks.
    """

    image_size: int = 256

    def __post_init__(self, **kwargs):
        if self.image_size < 16 or self.image_size % 16:
            raise ValueError(f"image_size must be a positive multiple of 16, got {self.image_size}")
        super().__post_init__(**kwargs)


class PixelModel(PreTrainedModel):
    """Base class of models whose image embeddings are the packed pixels (B, 16, g, g)."""

    config: PixelConfig
    config_class = PixelConfig
    main_input_name = "pixel_values"

    accepts_loss_kwargs = False  # as in `ProbabilisticSamModel`
    sample = ProbabilisticSamModel.sample

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight)

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Grey values at the resolution of the masks: (B, 16, g, g), see `pack_pixels`."""
        return pack_pixels(pixel_values)

    def get_maps(
        self, pixel_values: torch.Tensor | None, image_embeddings: torch.Tensor | None, **prompts
    ) -> torch.Tensor:
        """Input of a U-Net, pixels and prompts as maps: (B, P, 6, h, w).

        Raises:
            ValueError: neither or both of image and embeddings, no prompt, or shapes that do not fit.
        """
        check_image_and_prompts(pixel_values, image_embeddings, **prompts)
        pixels = pixels_and_contrast(to_embeddings(pack_pixels, pixel_values, image_embeddings))  # (B, 2, h, w)
        prompt = prompt_maps(self.config.image_size, pixels.shape[-1], **prompts).to(pixels.dtype)
        return torch.cat([pixels[:, None].expand(-1, prompt.shape[1], -1, -1, -1), prompt], dim=2)
