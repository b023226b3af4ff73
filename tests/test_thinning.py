"""thin_samples: few of many samples that represent all of them."""

import numpy as np
import pytest
import torch
from conftest import SHIPPED
from tiny import tiny_inputs, tiny_model

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamOutput, thin_samples
from probabilistic_sam.metrics.functional import ged


def bars(*widths):
    """Samples (1, 1, S, 1, 8): bars that start at the same place, with these widths."""
    masks = torch.stack([torch.arange(8) < width for width in widths])
    return ProbabilisticSamOutput(pred_masks=torch.where(masks, 5.0, -5.0)[None, None, :, None])


def widths(samples):
    return (samples.pred_masks > 0).sum(dim=(-2, -1))[0, 0].tolist()


def test_bars_in_the_order_that_was_computed_by_hand():
    """Distances: 2 and 4 .5, 2 and 5 .6, 4 and 5 .2; their sums are 1.1, .7 and .8.

    The first is the least distant. Then 2 costs 1.1 / 3 - .5 / 2 = .117, and 5 costs .8 / 3 - .2 / 2 = .167.
    """
    assert widths(thin_samples(bars(2, 4, 5), 3)) == [4, 2, 5]
    assert widths(thin_samples(bars(2, 4, 5), 2)) == [4, 2]


def test_shares_of_equal_masks_are_kept():
    assert sorted(widths(thin_samples(bars(*[0] * 36, *[3] * 12), 16))) == [0] * 12 + [3] * 4


def test_each_prompt_keeps_its_samples_with_all_that_belongs_to_them():
    model = tiny_model()
    samples = model.sample(**tiny_inputs(), num_samples=12, generator=torch.Generator().manual_seed(0))
    thinned = thin_samples(samples, 5)
    for image in range(2):
        for prompt in range(3):
            latents = samples.latents[image, prompt].tolist()
            kept = [latents.index(latent) for latent in thinned.latents[image, prompt].tolist()]
            assert len(set(kept)) == 5
            for name in ("pred_masks", "outline_masks", "iou_scores"):
                assert torch.equal(thinned[name][image, prompt], samples[name][image, prompt, kept])
    for name in ("presence", "prior_mean", "prior_log_std"):
        assert thinned[name] is samples[name]
    assert thinned.keys() == samples.keys()


def test_thinned_samples_of_the_shipped_model_are_closer_to_all_than_the_first_ones():
    model = ProbabilisticSamModel.from_pretrained(SHIPPED)
    inputs = {"pixel_values": torch.zeros(1, 3, 256, 256), "input_boxes": torch.tensor([[[90.0, 90, 160, 150]]])}
    inputs["pixel_values"][..., 100:145, 95:150] = 2
    samples = model.sample(**inputs, num_samples=48, generator=torch.Generator().manual_seed(0))
    everything = (samples.pred_masks[0, 0] > 0).numpy()
    assert np.mean(everything.any(axis=(1, 2))) > 0.5 and len(np.unique(everything.sum(axis=(1, 2)))) > 8
    thinned = (thin_samples(samples, count).pred_masks[0, 0] > 0 for count in (16, 8))
    distances = [ged(masks.numpy(), everything).ged for masks in thinned]
    assert distances[0] < distances[1] < ged(everything[:8], everything).ged
    assert distances[0] < 0.5 * ged(everything[:16], everything).ged


def test_more_samples_than_there_are_or_none_are_refused():
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"num_samples must be 1 to 3, the number of samples; got {count}"):
            thin_samples(bars(2, 4, 5), count)
    with pytest.raises(ValueError, match="samples must have pred_masks"):
        thin_samples(ProbabilisticSamOutput(), 1)
