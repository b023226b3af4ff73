"""Finishing a run: average two sets of weights, and calibrate how often the model samples an empty mask."""

import datasets
import numpy as np
import torch
from accelerate import PartialState
from scipy.optimize import brentq
from scipy.special import ndtr

from .. import ProbabilisticSamModel, ProbabilisticSamProcessor
from ..errors import UserError
from ..evaluation import Sampling, encode, read_batches
from ..workers import default_workers, start_workers


@torch.no_grad()
def average(model: torch.nn.Module, last: dict[str, torch.Tensor]) -> None:
    """Replace the weights of a model by their mean with `last`; weights that `last` lacks stay.

    Both are running averages of one training run, so their mean is a model too, in a flatter minimum (Izmailov et al.
    2018, arXiv 1803.05407).

    Raises:
        UserError: `last` is empty or of another model.
    """
    parameters = dict(model.named_parameters())
    if not last or not set(last) <= set(parameters) or any(last[k].shape != parameters[k].shape for k in last):
        raise UserError("the checkpoint's weights are of another model than the run's")
    for name, value in last.items():
        parameters[name].lerp_(value, 0.5)


@torch.no_grad()
def calibrate_presence(
    model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, rows: datasets.Dataset
) -> dict[str, float | None]:
    """Shift the presence of the prior so that the expected share of empty samples equals that of empty masks.

    Where no mask is empty, or all are, no finite shift does that; the presence then stays, with a printed note.

    Args:
        model: changed in place.
        processor: cuts the windows, as in an evaluation.
        rows: whose mean share is matched, with the prompt `union_box`.

    Returns:
        `shift` (None if the presence stays), `empty_share_readers`, and `empty_share_before`, the expected share
        without the shift.
    """
    means, shares = presence_means(model, processor, rows)
    shift = None
    if 0 < shares.mean() < 1:
        shift = find_shift(means, shares)
        model.prior.lin2.bias[0] += shift
    else:
        print(f"the share of empty masks is {shares.mean():g}, which no finite shift reaches: the presence stays")
    return {
        "shift": None if shift is None else round(shift, 4),
        "empty_share_readers": round(float(shares.mean()), 4),
        "empty_share_before": round(float(ndtr(-means).mean()), 4),
    }


@torch.no_grad()
def presence_means(
    model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, rows: datasets.Dataset, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the prior's mean of the presence, and the share of readers whose mask is empty: (N,) each."""
    means, shares = [], []
    num_workers, _ = default_workers(model.device, len(rows))
    with start_workers(num_workers) as workers:
        for batch in read_batches(model, processor, rows, Sampling(), batch_size, PartialState(), workers):
            inputs = encode(model, batch, model.device).inputs
            _, features, coarse_maps, _ = model.embed(
                inputs["image_embeddings"], None, None, inputs["input_boxes"], None
            )
            means.append(model.prior(features, coarse_maps)[0][:, 0].cpu().numpy())
            shares += [1 - row.masks.any(axis=(1, 2)).mean() for row in batch.rows]
    return np.concatenate(means).astype(float), np.array(shares)


def find_shift(means: np.ndarray, shares: np.ndarray) -> float:
    """The number to add to `means` so that the mean of P(z <= 0), z ~ N(mean, 1), is the mean of `shares`.

    Args:
        means: (N,) of the presence.
        shares: (N,) of readers whose mask is empty.

    Raises:
        UserError: no mask is empty, or all are, so that no shift is finite.
    """
    wanted = float(shares.mean())
    if not 0 < wanted < 1:
        raise UserError(f"the share of empty masks is {wanted:g}; accepted: more than 0, less than 1")
    far = 40  # standard deviations: the probability there is 0 or 1
    return float(brentq(lambda shift: ndtr(-(means + shift)).mean() - wanted, -means.max() - far, far - means.min()))
