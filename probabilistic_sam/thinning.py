"""Thinning: a few of many samples that represent all of them."""

import torch

from .modeling_probabilistic_sam import ProbabilisticSamOutput

OF_SAMPLES = ("pred_masks", "iou_scores", "latents", "outline_masks")  # fields with an axis of samples


def thin_samples(samples: ProbabilisticSamOutput, num_samples: int) -> ProbabilisticSamOutput:
    """The samples of each prompt that together represent all of its samples best.

        samples = thin_samples(model.sample(**inputs, num_samples=48), 16)

    They are chosen one after another, each so that the energy distance between the chosen masks C and all S masks,

        2 mean d(c, s) - mean d(c, c') - mean d(s, s'),  d = 1 - IoU,  0 for two empty masks,

    is as small as possible (support points; Mak and Joseph 2018, doi 10.1214/17-AOS1629). They keep this order, so the
    first k of them are what `num_samples=k` returns. Decoding further samples is cheap beside encoding the image.

    Not for slices that share noise so that a sample is the same reader on each of them: other samples would remain on
    each slice.

    Args:
        samples: output of `sample` with S masks per prompt, of any model.
        num_samples: 1 to S.

    Returns:
        The output with `num_samples` masks, scores and latents per prompt. The other fields are unchanged.

    Raises:
        ValueError: `num_samples` is below 1 or above S, or there are no samples (training mode with labels).
    """
    if samples.pred_masks is None:
        raise ValueError("samples must have pred_masks, which the output of training mode with labels has not.")
    masks = (samples.pred_masks > 0).flatten(3).float()  # (B, P, S, pixels)
    count = masks.shape[2]
    if not 1 <= num_samples <= count:
        raise ValueError(f"num_samples must be 1 to {count}, the number of samples; got {num_samples}.")
    overlap = masks @ masks.transpose(2, 3)
    area = masks.sum(dim=-1)
    union = area[..., :, None] + area[..., None, :] - overlap
    distance = torch.where(union > 0, 1 - overlap / union.clamp(min=1), 0)  # (B, P, S, S)
    to_all = distance.mean(dim=-1)
    to_chosen = torch.zeros_like(to_all)  # sums over the chosen ones
    chosen: list[torch.Tensor] = []  # (B, P, 1) each
    for number in range(1, num_samples + 1):
        # What sample s adds to the energy distance, but for terms that do not depend on s
        cost = 2 * to_all / number - 2 * to_chosen / number**2
        if chosen:
            cost = cost.scatter(2, torch.cat(chosen, dim=2), torch.inf)
        best = cost.argmin(dim=2, keepdim=True)
        to_chosen = to_chosen + distance.take_along_dim(best[..., None], dim=2)[:, :, 0]
        chosen.append(best)
    index = torch.cat(chosen, dim=2)  # (B, P, num_samples)
    kept = dict(samples)
    for name in OF_SAMPLES:
        if name in kept:
            kept[name] = kept[name].take_along_dim(index.view(*index.shape, *[1] * (kept[name].ndim - 3)), dim=2)
    return ProbabilisticSamOutput(**kept)
