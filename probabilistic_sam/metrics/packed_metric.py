"""What the modules for the `evaluate` library share: masks packed to bytes in, means over images out."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .functional import unpack_masks

INPUTS = """\
Args:
    predictions: for each image the sampled masks, packed by `probabilistic_sam.metrics.functional.pack_masks`, which
        keeps height and width.
    references: for each image the readers' masks, packed in the same way. Their number may differ from that of the
        samples, their size may not.
Returns:
    """


class PackedMetric(evaluate.Metric):
    """Mean over images of a function of sampled masks and readers' masks.

    A module for `evaluate.load` must import this module, not the class: the library takes the first metric that it
    finds by name in a module.
    """

    explanation: str
    bibtex: str
    outputs: str  # names of the results

    def score(self, samples: np.ndarray, readers: np.ndarray) -> dict[str, float]:
        """The results for one image, with samples (N, H, W) and readers (M, H, W), boolean."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        masks = datasets.Sequence(datasets.Value("binary"))
        return evaluate.MetricInfo(
            description=self.explanation,
            citation=self.bibtex,
            inputs_description=f"{INPUTS}{self.outputs}: means over images.",
            features=datasets.Features({"predictions": masks, "references": masks}),
        )

    def _compute(self, predictions: Sequence[list[bytes]], references: Sequence[list[bytes]]) -> dict[str, Any]:
        scores = [
            self.score(unpack_masks(samples), unpack_masks(readers))
            for samples, readers in zip(predictions, references, strict=True)
        ]
        means = np.mean([list(score.values()) for score in scores], axis=0)
        return dict(zip(scores[0], means.tolist(), strict=True))
