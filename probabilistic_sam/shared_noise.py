"""Noise that all slices of a nodule share, so that one sample is one reader in three dimensions.

The model sees one slice at a time. Its latent is `mean + std * noise`: mean and standard deviation depend on the
slice, and the noise describes the reader, for example how generous the outlines are. Therefore all slices share the
*noise* of a sample, but not the latent, whose mean and scale belong to one slice. With independent noise per slice,
the differences between readers would average out, and the interval of the volumes would be too narrow.

Equally seeded generators, one per slice, give that noise to every model with `sample`. Only samples given presence
need more: their noise depends on all slices of the nodule.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .modeling_probabilistic_sam import ProbabilisticSamModel, noise_given_presence, spread_noise


def shared_generators(seed: int, count: int) -> list[torch.Generator]:
    """The argument `generator` of `sample` for `count` slices that share their noise."""
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def shared_samples(
    model: Any,
    embeddings: Sequence[torch.Tensor],
    boxes: Sequence[torch.Tensor],
    num_samples: int,
    seed: int,
    given_presence: bool,
) -> tuple[float | None, Iterator[torch.Tensor]]:
    """Samples of all slices of a nodule with shared noise.

    Args:
        model: has `sample(image_embeddings, input_boxes, num_samples, generator)`.
        embeddings: image embeddings (B, C, g, g) of each batch of slices.
        boxes: (B, 1, 4) in pixels of the model's input.
        num_samples: N.
        seed: of the noise.
        given_presence: sample readers who annotate the nodule on at least one slice. A model without a prior samples
            all readers.

    Returns:
        Probability that a reader annotates the nodule, None for a model without a prior, and an iterator over logits
        (B, 1, N, h, w), so that only one batch is in memory.
    """
    batches = list(zip(embeddings, boxes, strict=True))
    priors = read_priors(model, batches, seed)
    presence = None
    if priors:
        presence_means = torch.cat([mean[..., 0].flatten() for mean, _ in priors]).cpu()
        presence = float(torch.special.ndtr(presence_means.max()))
        if given_presence:
            generator = torch.Generator().manual_seed(seed)
            noise = spread_noise((1, 1, num_samples, model.config.latent_dim), generator, "cpu")
            noise = noise_given_presence(noise, presence_means).to(model.device)
            latents = (mean[:, :, None] + std[:, :, None] * noise for mean, std in priors)
            return presence, decode(model, batches, latents)
    return presence, (
        model.sample(
            image_embeddings=item,
            input_boxes=box,
            num_samples=num_samples,
            generator=shared_generators(seed, len(box)),
        ).pred_masks
        for item, box in batches
    )


@torch.no_grad()
def decode(
    model: ProbabilisticSamModel,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    latents: Iterator[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Logits (B, 1, N, h, w) of latents (B, 1, N, L), one batch after the other."""
    for (item, box), latent in zip(batches, latents, strict=True):
        yield model(image_embeddings=item, input_boxes=box, latents=latent).pred_masks


def read_priors(
    model: Any, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation (B, 1, L) of the latents of each batch; none for a model without a prior."""
    if not isinstance(model, ProbabilisticSamModel):
        return []
    outputs = [  # with generators, so that the global random state stays as it is
        model.sample(
            image_embeddings=item, input_boxes=box, num_samples=1, generator=shared_generators(seed, len(box))
        )
        for item, box in batches
    ]
    return [
        (output.prior_mean, output.prior_log_std.exp())
        for output in outputs
        if output.prior_mean is not None and output.prior_log_std is not None
    ]
