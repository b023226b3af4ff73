"""Whether the latent space is used: KL per coordinate, active outline units, and IoU of the reconstructions.

A collapsed posterior equals the prior and carries no information about its reader: its KL is 0, and its
reconstructions are no better than samples of the prior.

`slice_collapse` reduces the outputs of the model for one slice to a few numbers, `summarize_collapse` averages them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ACTIVE_UNIT_KL = 0.05  # nats
DECIMALS = 6


def slice_collapse(
    kl: np.ndarray,
    posterior_mean: np.ndarray,
    reconstructions: np.ndarray,
    targets: np.ndarray,
    annotated: np.ndarray,
) -> dict[str, Any]:
    """The state of the latent space for one slice with R readers and L latent coordinates.

    Args:
        kl: (R, L) KL divergence of each reader's posterior from the prior, in nats per latent coordinate.
        posterior_mean: (R, L).
        reconstructions: (R, h, w) bool, the masks decoded from each reader's posterior.
        targets: (R, h, w) bool, the readers' masks at the same resolution.
        annotated: (R,) bool, which masks have a pixel at the resolution of the image. At that of `targets` a mask of
            one or two pixels may be empty.

    Returns:
        `kl` and `posterior_mean` in float64, `annotated`, and `iou`: the IoU of reconstruction and target for each
        annotated mask. Two empty masks have IoU 1.

    Raises:
        ValueError: shapes that do not match.
    """
    if kl.shape != posterior_mean.shape or kl.ndim != 2:
        raise ValueError(f"kl {kl.shape} and posterior_mean {posterior_mean.shape} must have one shape (R, L)")
    if reconstructions.shape != targets.shape or len(targets) != len(kl):
        raise ValueError(f"reconstructions {reconstructions.shape} and targets {targets.shape} must be (R, h, w)")
    if annotated.shape != (len(kl),) or annotated.dtype != bool:
        raise ValueError(f"annotated must be bool ({len(kl)},), got {annotated.dtype} {annotated.shape}")
    union = (reconstructions | targets).sum(axis=(1, 2))[annotated]
    intersection = (reconstructions & targets).sum(axis=(1, 2))[annotated]
    iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    return {"kl": kl.astype(float), "posterior_mean": posterior_mean.astype(float), "annotated": annotated, "iou": iou}


def active_outline_units(kl: Sequence[float | None], has_presence: bool = True) -> int | None:
    """The number of latent coordinates that tell something about the reader.

    Burda et al. (2016, arXiv 1509.00519) count coordinates whose posterior mean varies over the data. That fits a
    fixed prior. Here the prior depends on image and prompt, and a posterior that equals it varies as well, so the KL
    divergence counts instead. The presence is left out, since it carries information by construction.

    Args:
        kl: mean over the data, in nats per coordinate; None where it is unknown.
        has_presence: coordinate 0 is the presence. Without a presence (Probabilistic U-Net) all coordinates count.

    Returns:
        The number of coordinates whose KL exceeds `ACTIVE_UNIT_KL`; None if all are unknown.

    >>> active_outline_units([0.9, 0.5, 0.001])
    1
    """
    known = [value for value in kl[1 if has_presence else 0 :] if value is not None]
    return sum(value > ACTIVE_UNIT_KL for value in known) if known else None


def summarize_collapse(slices: Sequence[dict[str, Any]], has_presence: bool = True) -> dict[str, Any]:
    """The state of the latent space over many slices.

    Coordinate 0 counts all readers. The others, which shape the outline, count only annotated masks: the posterior of
    an empty mask equals the prior there by construction, which would look like collapse.

    Args:
        slices: what `slice_collapse` returned, at least one.
        has_presence: see `active_outline_units`.

    Returns:
        - `kl_per_dimension`: L numbers in nats, the mean over the readers of a slice, then over slices;
        - `posterior_mean_variance`: L numbers, the variance over the readers of all slices;
        - `active_outline_units` of these KL divergences;
        - `posterior_iou`: the IoU of the reconstructions, averaged like the KL.

        A number is None where no mask is annotated.

    Raises:
        ValueError: no slice.
    """
    if not slices:
        raise ValueError("no slice was given")
    with_outline = [item for item in slices if item["annotated"].any()]
    kl = [np.mean([item["kl"][:, 0].mean() for item in slices])]
    variance = [np.concatenate([item["posterior_mean"][:, 0] for item in slices]).var()]
    if with_outline:
        kl += [*np.mean([item["kl"][item["annotated"], 1:].mean(axis=0) for item in with_outline], axis=0)]
        variance += [
            *np.concatenate([item["posterior_mean"][item["annotated"], 1:] for item in with_outline]).var(axis=0)
        ]
        iou = np.mean([item["iou"].mean() for item in with_outline])
    else:
        outline = slices[0]["kl"].shape[1] - 1
        kl, variance, iou = kl + [np.nan] * outline, variance + [np.nan] * outline, np.nan
    divergences = [_number(value) for value in kl]
    return {
        "kl_per_dimension": divergences,
        "posterior_mean_variance": [_number(value) for value in variance],
        "active_outline_units": active_outline_units(divergences, has_presence),
        "posterior_iou": _number(iou),
    }


def _number(value: float) -> float | None:
    """A rounded float for JSON; None for nan."""
    return round(float(value), DECIMALS) if np.isfinite(value) else None
