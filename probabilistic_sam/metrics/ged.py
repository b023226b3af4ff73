"""Generalised energy distance as a metric of the `evaluate` library.

>>> import evaluate
>>> from probabilistic_sam.metrics.functional import pack_masks
>>> metric = evaluate.load("probabilistic_sam/metrics/ged.py")  # doctest: +SKIP
>>> metric.add(predictions=pack_masks(samples), references=pack_masks(readers))  # doctest: +SKIP
>>> metric.compute()  # doctest: +SKIP
{'ged': 0.21, 'cross_distance': 0.37, 'sample_diversity': 0.29, 'reader_diversity': 0.24}
"""

import numpy as np

from probabilistic_sam.metrics import functional, packed_metric


class Ged(packed_metric.PackedMetric):
    """Mean over images of `functional.ged`, which has the formula."""

    explanation = """\
Squared generalised energy distance with d = 1 - IoU between sampled masks and the masks of several readers, and the
three means that it consists of. Pairs of a mask with itself count; two empty masks have distance 0. Mean over images.
"""
    outputs = "ged, cross_distance, sample_diversity, reader_diversity"
    bibtex = """\
@inproceedings{kohl2018probabilistic,
  title = {A Probabilistic {U-Net} for Segmentation of Ambiguous Images},
  author = {Kohl, Simon and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}
"""

    def score(self, samples: np.ndarray, readers: np.ndarray) -> dict[str, float]:
        """The four numbers for one image."""
        return functional.ged(samples, readers)._asdict()
