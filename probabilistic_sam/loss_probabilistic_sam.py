"""The terms of the training loss: reconstruction, KL divergence and energy distance.

Shapes: B images, P prompts per image, R readers, S samples, L latent coordinates, masks of h x w pixels.
"""

import torch
import torch.nn.functional as F


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values where a boolean mask of the same shape is true; 0 if it is true nowhere."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def summed_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy summed over pixels: (..., h, w) to (...)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=(-2, -1))


def dice_loss(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - soft Dice coefficient, smoothed by one pixel: (..., h, w) to (...).

    With an empty target it is 1 - 1 / (1 + predicted area).
    """
    overlap = (probabilities * targets).sum(dim=(-2, -1))
    total = probabilities.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def log_probability_of_presence(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of P(z > 0) and of P(z <= 0) for z ~ N(mean, 1)."""
    return torch.special.log_ndtr(mean), torch.special.log_ndtr(-mean)


def gaussian_kl(
    mean: torch.Tensor, log_std: torch.Tensor, prior_mean: torch.Tensor, prior_log_std: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean, std) || N(prior_mean, prior_std)) in nats, element by element."""
    ratio = torch.exp(2 * (log_std - prior_log_std))
    return 0.5 * (ratio - 1 + ((mean - prior_mean) * torch.exp(-prior_log_std)) ** 2) + prior_log_std - log_std


def latent_kl(
    mean: torch.Tensor,
    log_std: torch.Tensor,
    prior_mean: torch.Tensor,
    prior_log_std: torch.Tensor,
    annotated: torch.Tensor,
) -> torch.Tensor:
    """KL divergence of each reader's posterior from the prior, in nats per latent coordinate.

    Whether a reader annotated is known, so the exact posterior of the presence is the prior restricted to z_0 > 0 or
    to z_0 <= 0. Its KL divergence is -log P(z_0 > 0) or -log P(z_0 <= 0); coordinate 0 of `mean` and `log_std` is not
    used.

    Args:
        mean: (B, P, R, L), of the posterior.
        log_std: (B, P, R, L), of the posterior.
        prior_mean: (B, P, R, L).
        prior_log_std: (B, P, R, L), 0 in coordinate 0.
        annotated: (B, P, R) bool.

    Returns:
        (B, P, R, L).
    """
    log_annotated, log_empty = log_probability_of_presence(prior_mean[..., 0])
    presence = -torch.where(annotated, log_annotated, log_empty)
    outline = gaussian_kl(mean, log_std, prior_mean, prior_log_std)[..., 1:]
    return torch.cat([presence[..., None], outline], dim=-1)


def soft_jaccard_distance(a: torch.Tensor, b: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - sum min(a, b) / sum max(a, b) of each pair, both sums plus `smooth`: (..., M, pixels), (..., N, pixels).

    On binary masks it is 1 - IoU, up to `smooth`. On soft masks it remains a metric with d(a, a) = 0, which the usual
    soft IoU is not (Wang et al. 2023, arXiv 2302.05666), so blurring a mask does not lower the energy distance.

    Returns:
        (..., M, N).
    """
    # sum min = (total - gap) / 2 and sum max = (total + gap) / 2. cdist needs no tensor (..., M, N, pixels) in the
    # forward pass and is more than twice as fast on a CPU as the sum over such a tensor.
    gap = torch.cdist(a, b, p=1.0)
    total = a.sum(dim=-1)[..., :, None] + b.sum(dim=-1)[..., None, :]
    return 1 - (total - gap + 2 * smooth) / (total + gap + 2 * smooth)


@torch.no_grad()
def mean_iou(logits: torch.Tensor, readers: torch.Tensor, is_reader: torch.Tensor) -> torch.Tensor:
    """Mean IoU of each mask with the readers who count.

    Args:
        logits: (..., S, h, w) of the masks, which hold the pixels above 0.
        readers: (..., R, h, w), 0 or 1.
        is_reader: (..., R) bool, which readers count; their masks are not empty.

    Returns:
        (..., S), 0 where no reader counts.
    """
    masks, readers = (logits > 0).flatten(-2).to(readers.dtype), readers.flatten(-2)
    overlap = masks @ readers.transpose(-2, -1)  # (..., S, R)
    union = masks.sum(dim=-1)[..., :, None] + readers.sum(dim=-1)[..., None, :] - overlap
    counts = is_reader[..., None, :].to(overlap.dtype)
    return (overlap / union.clamp(min=1) * counts).sum(dim=-1) / counts.sum(dim=-1).clamp(min=1)


def energy_distance(
    samples: torch.Tensor, is_sample: torch.Tensor, readers: torch.Tensor, is_reader: torch.Tensor
) -> torch.Tensor:
    """2 E d(s, y) - E d(s, s') over pairs of different samples (Szekely and Rizzo 2013), d = `soft_jaccard_distance`.

    The term of the readers alone, - E d(y, y'), is constant and left out.

    Args:
        samples: (..., S, pixels), probabilities.
        is_sample: (..., S) bool, which samples count.
        readers: (..., R, pixels), 0 or 1.
        is_reader: (..., R) bool, which readers count.

    Returns:
        (...), 0 where no reader counts.
    """
    cross = soft_jaccard_distance(samples, readers)  # (..., S, R)
    within = soft_jaccard_distance(samples, samples)  # (..., S, S)
    cross_pairs = (is_sample[..., :, None] & is_reader[..., None, :]).to(cross.dtype)
    distinct = ~torch.eye(samples.shape[-2], dtype=torch.bool, device=samples.device)
    within_pairs = (is_sample[..., :, None] & is_sample[..., None, :] & distinct).to(within.dtype)
    cross = (cross * cross_pairs).sum(dim=(-2, -1)) / cross_pairs.sum(dim=(-2, -1)).clamp(min=1)
    within = (within * within_pairs).sum(dim=(-2, -1)) / within_pairs.sum(dim=(-2, -1)).clamp(min=1)
    return (2 * cross - within) * is_reader.any(dim=-1)
