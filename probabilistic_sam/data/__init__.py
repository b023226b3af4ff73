"""Datasets of images with the masks of several readers: sources, row format, builds, splits and prompts.

This package re-exports only what needs numpy and the standard library. `format` reads datasets, `build` writes them,
`volumes` groups slices into nodules; the sources of LIDC-IDRI are in `lidc`.
"""

from .prompts import NODULE_BOX, PROMPTS, make_prompt, nodule_prompt, row_prompt, row_seed
from .splits import SPLITS, patient_bucket, split_of

__all__ = [
    "NODULE_BOX",
    "PROMPTS",
    "SPLITS",
    "make_prompt",
    "nodule_prompt",
    "patient_bucket",
    "row_prompt",
    "row_seed",
    "split_of",
]
