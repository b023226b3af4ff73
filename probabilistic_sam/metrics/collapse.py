"""Is the latent space used? KL by dimension, active outline units, and what the posterior can reconstruct.

A posterior that has collapsed equals the prior and tells nothing about its reader: its KL is 0, its mean does not vary
over the data, and its reconstructions are no better than samples of the prior.

`slice_collapse` runs where the model ran; what it returns is small, so that processes can gather it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ACTIVE_UNIT_VARIANCE = 0.01  # of the posterior mean over the data (Burda et al. 2016, arXiv 1509.00519, section 4)
DECIMALS = 6


def slice_collapse(
    kl: np.ndarray,
    posterior_mean: np.ndarray,
    reconstructions: np.ndarray,
    targets: np.ndarray,
    annotated: np.ndarray,
) -> dict[str, Any]:
    """What one slice says about the latent space.

    Args:
        kl: (R, L) KL divergence of each reader's posterior from the prior, in nats by latent coordinate.
        posterior_mean: (R, L).
        reconstructions: (R, h, w) bool, the masks decoded from each reader's posterior.
        targets: (R, h, w) bool, the readers' masks at the same resolution.
        annotated: (R,) bool, which masks have a pixel at the image's own resolution. At that of `targets` a mask of
            one or two pixels may be empty.

    Returns:
        `kl` and `posterior_mean` in float64, `annotated` (R,) bool, and `iou` of the reconstruction for each
        of these; two empty masks have IoU 1.

    Raises:
        ValueError: for shapes that do not fit each other.
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


def active_outline_units(variance: Sequence[float | None], has_presence: bool = True) -> int | None:
    """How many latent coordinates vary over the data, the presence coordinate aside, which does so by construction.

    Args:
        variance: of the posterior mean over the data, by coordinate; None where it is not known. Also the
            `posterior_mean_variance` of older results files, whose `active_units` counts the presence coordinate.
        has_presence: coordinate 0 is the presence; all coordinates count without it (Probabilistic U-Net).

    Returns:
        The number of coordinates whose variance exceeds `ACTIVE_UNIT_VARIANCE`; None where none is known.
    """
    known = [value for value in variance[1 if has_presence else 0 :] if value is not None]
    return sum(value > ACTIVE_UNIT_VARIANCE for value in known) if known else None


def summarize_collapse(slices: Sequence[dict[str, Any]], has_presence: bool = True) -> dict[str, Any]:
    """State of the latent space over many slices.

    Coordinate 0, which decides whether a reader draws, counts every reader. The others shape an outline and count the
    readers who drew: for the rest the posterior is the prior by construction, which would look like collapse.

    Args:
        slices: what `slice_collapse` returned, at least one.
        has_presence: see `active_outline_units`.

    Returns:
        `kl_per_dimension`, L numbers in nats: mean over a slice's readers, then over slices;
        `posterior_mean_variance`, L numbers: variance over the readers of all slices; `active_outline_units`, counted
        from these; `posterior_iou`: IoU of the reconstructions, averaged like the KL. None stands where nobody drew.
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
    variances = [_number(value) for value in variance]
    return {
        "kl_per_dimension": [_number(value) for value in kl],
        "posterior_mean_variance": variances,
        "active_outline_units": active_outline_units(variances, has_presence),
        "posterior_iou": _number(iou),
    }


def _number(value: float) -> float | None:
    """A float for JSON, short enough to read; None for nan."""
    return round(float(value), DECIMALS) if np.isfinite(value) else None
