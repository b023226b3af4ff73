"""The terms of the training loss."""

import math

import torch


def log_probability_of_presence(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
