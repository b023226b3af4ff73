"""Generalised energy distance as a metric of the `evaluate` library.

>>> import evaluate
>>> from probabilistic_sam.metrics.functional import pack_masks
>>> metric = evaluate.load("probabilistic_sam/metrics/ged.py")  # doctest: +SKIP
>>> metric.add(predictions=pack_masks(samples), references=pack_masks(readers))  # doctest: +SKIP
>>> metric.compute()  # doctest: +SKIP
{'ged': 0.21, 'cross_distance': 0.37, 'sample_diversity': 0.29, 'reader_diversity': 0.24}
"""

import datasets
import evaluate
import numpy as np

from probabilistic_sam.metrics import functional

_DESCRIPTION = """\
Squared generalised energy distance between sampled masks and the masks of several readers with d = 1 - IoU, and the
three means it is made of; self-pairs are included, two empty masks have distance 0. Averaged over images.
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions: for each image the sampled masks, packed to bits by `probabilistic_sam.metrics.functional.pack_masks`,
        which keeps their height and width.
    references: for each image the readers' masks, packed in the same way. Their number may differ, their size may not.
Returns:
    ged, cross_distance, sample_diversity, reader_diversity: means over images.
"""

_CITATION = """\
@inproceedings{kohl2018probabilistic,
  title = {A Probabilistic {U-Net} for Segmentation of Ambiguous Images},
  author = {Kohl, Simon and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}
"""


class Ged(evaluate.Metric):
    """Mean over images of `functional.ged`, which has the formula."""

    def _info(self) -> evaluate.MetricInfo:
        masks = datasets.Sequence(datasets.Value("binary"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": masks, "references": masks}),
        )

    def _compute(self, predictions: list[list[bytes]], references: list[list[bytes]]) -> dict[str, float]:
        distances = [
            functional.ged(functional.unpack_masks(samples), functional.unpack_masks(readers))
            for samples, readers in zip(predictions, references, strict=True)
        ]
        means = np.mean(distances, axis=0)
        return {
            name: float(mean) for name, mean in zip(functional.GeneralizedEnergyDistance._fields, means, strict=True)
        }
