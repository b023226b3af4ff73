"""Hungarian-matched IoU as a metric of the `evaluate` library.

>>> import evaluate
>>> from probabilistic_sam.metrics.functional import pack_masks
>>> metric = evaluate.load("probabilistic_sam/metrics/hm_iou.py")  # doctest: +SKIP
>>> metric.add(predictions=pack_masks(samples), references=pack_masks(readers))  # doctest: +SKIP
>>> metric.compute()  # doctest: +SKIP
{'hm_iou': 0.61}
"""

import numpy as np

from probabilistic_sam.metrics import functional, packed_metric


class HmIou(packed_metric.PackedMetric):
    """Mean over images of `functional.hm_iou`, which has the formula."""

    explanation = """\
Balanced Hungarian-matched IoU of N sampled masks and M readers' masks: both are repeated to lcm(N, M) masks and
matched one to one so that the mean IoU is largest. Two empty masks have IoU 1. Mean over images.
"""
    outputs = "hm_iou"
    bibtex = """\
@article{kohl2019hierarchical,
  title = {A Hierarchical Probabilistic {U-Net} for Modeling Multi-Scale Ambiguities},
  author = {Kohl, Simon A. A. and others},
  journal = {arXiv:1905.13077},
  year = {2019}
}
"""

    def score(self, samples: np.ndarray, readers: np.ndarray) -> dict[str, float]:
        """The number for one image."""
        return {"hm_iou": functional.hm_iou(samples, readers)}
