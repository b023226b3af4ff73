"""Hungarian-matched IoU as a metric of the `evaluate` library.

>>> import evaluate
>>> from probabilistic_sam.metrics.functional import pack_masks
>>> metric = evaluate.load("probabilistic_sam/metrics/hm_iou.py")  # doctest: +SKIP
>>> metric.add(predictions=pack_masks(samples), references=pack_masks(readers))  # doctest: +SKIP
>>> metric.compute()  # doctest: +SKIP
{'hm_iou': 0.61}
"""

import datasets
import evaluate
import numpy as np

from probabilistic_sam.metrics import functional

_DESCRIPTION = """\
Balanced Hungarian-matched IoU between N sampled masks and M readers' masks: both are repeated to lcm(N, M) masks and
matched one to one so that the mean IoU is greatest; two empty masks have IoU 1. Averaged over images.
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions: for each image the sampled masks, packed to bits by `probabilistic_sam.metrics.functional.pack_masks`,
        which keeps their height and width.
    references: for each image the readers' masks, packed in the same way. Their number may differ, their size may not.
Returns:
    hm_iou: mean over images.
"""

_CITATION = """\
@article{kohl2019hierarchical,
  title = {A Hierarchical Probabilistic {U-Net} for Modeling Multi-Scale Ambiguities},
  author = {Kohl, Simon A. A. and others},
  journal = {arXiv:1905.13077},
  year = {2019}
}
"""


class HmIou(evaluate.Metric):
    """Mean over images of `functional.hm_iou`, which has the formula."""

    def _info(self) -> evaluate.MetricInfo:
        masks = datasets.Sequence(datasets.Value("binary"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": masks, "references": masks}),
        )

    def _compute(self, predictions: list[list[bytes]], references: list[list[bytes]]) -> dict[str, float]:
        matched = [
            functional.hm_iou(functional.unpack_masks(samples), functional.unpack_masks(readers))
            for samples, readers in zip(predictions, references, strict=True)
        ]
        return {"hm_iou": float(np.mean(matched))}
