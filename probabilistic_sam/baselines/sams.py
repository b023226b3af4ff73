"""SAM without a latent space: samples vary by dropout in the decoder's inputs, or by random shifts of the prompt."""

import torch
from huggingface_hub.dataclasses import strict
from transformers.utils import can_return_tuple

from ..configuration_probabilistic_sam import ProbabilisticSamConfig
from ..loss_probabilistic_sam import masked_mean
from ..modeling_probabilistic_sam import (
    MAX_DECODED,
    ProbabilisticSamOutput,
    Readers,
    check_image_and_prompts,
    check_other_arguments,
    spread_noise,
    whole_num_samples,
)
from .common import (
    DropoutSampling,
    SamVariant,
    check_dropout,
    drop_channels,
    known_readers,
    reconstruction_loss,
    to_embeddings,
)

RELATIVE_JITTER = 0.1  # of the side of a box, as in the prompt union_box


@strict
class LatentFreeSamConfig(ProbabilisticSamConfig):
    r"""Configuration of `LatentFreeSamModel`; the fields of the latent space and its loss are not used.

    Args:
        dropout (`float`, defaults to 0): dropout in training, of the entries of prompt tokens and of the channels of
            image embeddings and details.
        sampling_dropout (`float`, defaults to 0): the same in sampling.
        jitter (`float`, defaults to 0): in sampling each side of a box moves by u1 * 0.1 * side + u2 * `jitter`, and
            each point by u2 * `jitter`, with u ~ U(-1, 1). In pixels of the model's input: 1.5 px of the image are
            1.5 * image_size / crop_size. Prompts do not move if it is 0.
    """

    dropout: float = 0.0
    sampling_dropout: float = 0.0
    jitter: float = 0.0

    def __post_init__(self, **kwargs):
        check_dropout(self.dropout, self.sampling_dropout)
        if self.jitter < 0:
            raise ValueError(f"jitter must not be negative, got {self.jitter}")
        super().__post_init__(**kwargs)


@strict
class DropoutSamConfig(LatentFreeSamConfig):
    """`LatentFreeSamConfig` with dropout; it is larger in sampling, where it would be too large for training."""

    model_type = "dropout_sam"

    dropout: float = 0.1
    sampling_dropout: float = 0.7


@strict
class DeterministicSamConfig(LatentFreeSamConfig):
    """`LatentFreeSamConfig` with jitter: 6 px of the image, for windows of 64 px that are resized to 256 px."""

    model_type = "deterministic_sam"

    jitter: float = 24.0


class LatentFreeSamModel(DropoutSampling, SamVariant):  # type: ignore[misc]
    """Encoder, detail network and decoder of Probabilistic SAM without the latent space: one mask per pass.

    Before training its masks are those of SAM.
    """

    config: LatentFreeSamConfig
    config_class = LatentFreeSamConfig

    def __init__(self, config: LatentFreeSamConfig):
        super().__init__(config)
        del self.prior, self.posterior, self.latent_proj

    def freeze_unused(self) -> None:
        """As in `ProbabilisticSamModel`, and the IoU head, on which this loss does not depend."""
        super().freeze_unused()
        self.mask_decoder.iou_prediction_head.requires_grad_(False)

    def move_prompts(
        self, num_samples: int, generator: torch.Generator | None, prompts: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`num_samples` moved copies of each box (B, P, 4) and point (B, P, K, 2): (B, P * S, ...)."""
        boxes, points = prompts.get("input_boxes"), prompts.get("input_points")
        given = prompts["input_points" if boxes is None else "input_boxes"]
        noise = spread_noise((*given.shape[:2], num_samples, 8), generator, given.device)
        relative, absolute = (2 * torch.special.ndtr(noise) - 1).chunk(2, dim=-1)  # (B, P, S, 4), uniform in -1..1
        moved = dict(prompts)
        if boxes is not None:
            sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)[:, :, None]  # (B, P, 1, 4)
            corners = boxes[:, :, None] + RELATIVE_JITTER * sides * relative + self.config.jitter * absolute
            first, second = corners.flatten(1, 2).chunk(2, dim=-1)
            moved["input_boxes"] = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)
        if points is not None:
            shift = self.config.jitter * absolute[..., None, :2]  # (B, P, S, 1, 2)
            moved["input_points"] = (points[:, :, None] + shift).flatten(1, 2)
            moved["input_labels"] = prompts["input_labels"].repeat_interleave(num_samples, dim=1)
        return moved

    def decode_once(
        self, embeddings: tuple, dropout: float, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass for each of N prompts with dropout: logits (N, h, w) and IoU scores (N,)."""
        image, tokens, dense, middle, fine, padding = embeddings
        tokens = drop_channels(tokens.flatten(1), dropout, generator).view_as(tokens)
        image, middle, fine = (drop_channels(item, dropout, generator) for item in (image, middle, fine))
        masks, iou_scores = self.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=tokens[:, None],
            dense_prompt_embeddings=dense,
            middle_details=middle,
            fine_details=fine,
            padding=padding,
        )
        return masks[:, 0].float(), iou_scores[:, 0]

    @can_return_tuple
    def forward(  # no latents
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
        """Sample masks; with `labels` (B, P, R, H, W) compute the mean loss of one mask over `known_readers`.

        Other arguments and outputs are those of `ProbabilisticSamModel.forward`. With `labels`, masks are sampled in
        evaluation mode only.

        Raises:
            ValueError: neither or both of image and embeddings, no prompt, or shapes that do not fit.
        """
        check_other_arguments(kwargs)
        check_image_and_prompts(pixel_values, image_embeddings, input_points, input_labels, input_boxes, input_masks)
        count = 0 if self.training and labels is not None else whole_num_samples(num_samples)
        image_embeddings = to_embeddings(self.encode, pixel_values, image_embeddings)
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.int)
        given = {
            "input_points": input_points, "input_labels": input_labels, "input_boxes": input_boxes,
            "input_masks": input_masks,
        }  # fmt: skip
        prompts = {name: value for name, value in given.items() if value is not None}

        values = {}
        if labels is not None:
            masks, _ = self.passes(image_embeddings, prompts, 1, self.config.dropout, generator)
            readers = Readers.read(labels, reader_mask, annotated, masks.shape[:2], masks.shape[-1])
            losses = reconstruction_loss(masks, readers.targets, self.config.bce_weight, self.config.dice_weight)
            loss = masked_mean(losses, known_readers(readers))
            values = {"loss": loss, "reconstruction_loss": loss}
        if labels is None or not self.training:
            moves = self.config.jitter > 0 and prompts.keys() != {"input_masks"}
            if moves:
                prompts = self.move_prompts(count, generator, prompts)
            passes = 1 if moves else count
            masks, iou_scores = self.passes(image_embeddings, prompts, passes, self.config.sampling_dropout, generator)
            # With moved prompts the shape is (B, P * S, 1, ...)
            values["pred_masks"] = masks.flatten(1, 2).unflatten(1, (-1, count))
            values["iou_scores"] = iou_scores.flatten(1, 2).unflatten(1, (-1, count))
        return ProbabilisticSamOutput(**values)

    def passes(
        self,
        image_embeddings: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        count: int,
        dropout: float,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, P, count, h, w) and IoU scores (B, P, count) of `count` passes per prompt."""
        kinds = ("input_points", "input_labels", "input_boxes", "input_masks")
        *_, embeddings = self.embed(image_embeddings, *(prompts.get(kind) for kind in kinds))
        image, sparse, dense, details, padding = embeddings
        tokens = dense.new_zeros(len(dense), 0, dense.shape[1]) if sparse is None else sparse
        padding = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool) if padding is None else padding
        slots = (item.repeat_interleave(count, dim=0) for item in (image, tokens, dense, *details, padding))
        parts = zip(*(item.split(MAX_DECODED) for item in slots), strict=True)
        decoded = zip(*(self.decode_once(part, dropout, generator) for part in parts), strict=True)
        masks, iou_scores = (torch.cat(items).unflatten(0, (len(image_embeddings), -1, count)) for items in decoded)
        return masks, iou_scores


class DropoutSamModel(LatentFreeSamModel):
    """SAM fine-tuned on all readers; samples vary by dropout in the decoder's inputs."""

    config_class = DropoutSamConfig


class DeterministicSamModel(LatentFreeSamModel):
    """SAM, as it is or fine-tuned on all readers; samples vary by random shifts of the prompt."""

    config_class = DeterministicSamConfig
