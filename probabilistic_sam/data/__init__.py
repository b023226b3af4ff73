"""Datasets of images with the masks of several readers: sources, row format, builds, splits and prompts.

This package re-exports only what needs numpy and the standard library. `format` reads datasets and `build` writes
them; the sources of LIDC-IDRI are in `lidc`.
"""

from .prompts import PROMPTS, make_prompt, row_prompt, row_seed
from .splits import SPLITS, patient_bucket, split_of

__all__ = ["PROMPTS", "SPLITS", "make_prompt", "patient_bucket", "row_prompt", "row_seed", "split_of"]
