"""LIDC-IDRI slices with every reader's mask: sources, rows, splits and prompts.

Only the light names are re-exported here (numpy and the standard library). Reading and writing of datasets is in
`probabilistic_sam.data.format`, the sources in `slices` and `phantom`.
"""

from .prompts import PROMPTS, make_prompt, row_prompt, row_seed
from .splits import SPLITS, patient_bucket, split_of

__all__ = ["PROMPTS", "SPLITS", "make_prompt", "patient_bucket", "row_prompt", "row_seed", "split_of"]
