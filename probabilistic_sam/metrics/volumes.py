"""Metrics of a set of sampled volumes against the readers' volumes of one nodule: pure functions of arrays.

Conventions of this module:

- `samples` is (N, slices, H, W) bool and `readers` is (M, slices, H, W) bool; a sample or reader without any voxel on
  any slice is an *empty* volume. A reader whose volume is not empty *annotated* the nodule.
- `sample_volumes` is (N,) and `reader_volumes` is (M,), in one unit such as mm^3.
- At least one sample, and at least one reader who annotated; anything else raises `ValueError`.
"""

import numpy as np

from .functional import GeneralizedEnergyDistance, bounding_box, check_masks, ged

INTERVAL = (0.05, 0.95)  # quantiles of the 90 % interval of `coverage`


def ged_3d(samples: np.ndarray, readers: np.ndarray) -> GeneralizedEnergyDistance:
    """Squared generalised energy distance with IoU over the voxels of the whole nodule: `functional.ged` in 3D.

    Two empty volumes have IoU 1, an empty and a non-empty one have 0. Values for different N are not comparable.

    Args:
        samples: (N, slices, H, W) bool.
        readers: (M, slices, H, W) bool.

    >>> volume = np.array([[[[True, False]], [[True, False]]]])  # one voxel on each of two slices
    >>> ged_3d(volume, volume & np.array([True, False])[:, None, None]).cross_distance
    0.5
    """
    _check_volumes(samples, readers)
    rows, columns = bounding_box(np.asarray(samples.any(axis=(0, 1)) | readers.any(axis=(0, 1))))
    # Slices one below the other: IoU does not depend on where a voxel lies
    flat = [volumes[:, :, rows, columns] for volumes in (samples, readers)]
    return ged(*(volumes.reshape(len(volumes), -1, volumes.shape[-1]) for volumes in flat))


def volume_crps(sample_volumes: np.ndarray, reader_volumes: np.ndarray) -> float:
    """Continuous ranked probability score of the sampled volumes, relative to the nodule's volume.

        CRPS(y) = mean_i |x_i - y| - 1/2 mean_ij |x_i - x_j|

    for the volume y of each reader, including empty ones (Gneiting and Raftery 2007, equation 21, for the empirical
    distribution of the samples x). The mean over readers is divided by the mean volume of those who annotated.

    Returns:
        A number of at least 0; 0 if all samples and all readers have one volume.

    >>> volume_crps(np.array([0.0, 2.0]), np.array([2.0]))  # (1 - 1/2 * 1) / 2
    0.25
    """
    reference = _reference_volume(sample_volumes, reader_volumes)
    errors = np.abs(sample_volumes[:, None] - reader_volumes[None, :]).mean()
    spread = np.abs(sample_volumes[:, None] - sample_volumes[None, :]).mean()
    return float((errors - spread / 2) / reference)


def coverage(sample_volumes: np.ndarray, reader_volumes: np.ndarray) -> tuple[int, int]:
    """How many readers who annotated have a volume within the 90 % interval of the samples.

    The interval is from the .05 to the .95 quantile of the non-empty samples' volumes, ends included. Without a
    non-empty sample nobody is covered. Counts of several nodules are added before they are divided.

    Returns:
        The number of readers covered, and the number of readers who annotated.

    >>> coverage(np.array([0.0, 10.0, 20.0]), np.array([0.0, 10.2, 15.0, 19.8]))  # from 10.5 to 19.5
    (1, 3)
    """
    _reference_volume(sample_volumes, reader_volumes)
    annotating, visible = reader_volumes[reader_volumes > 0], sample_volumes[sample_volumes > 0]
    if not len(visible):
        return 0, len(annotating)
    low, high = np.quantile(visible, INTERVAL)
    return int(((low <= annotating) & (annotating <= high)).sum()), len(annotating)


def volume_error(sample_volumes: np.ndarray, reader_volumes: np.ndarray) -> float:
    """Relative error of the median volume: |median of non-empty samples - mean of annotating readers| / that mean.

    Without a non-empty sample the median counts as 0, so the error is 1.

    >>> volume_error(np.array([0.0, 10.0, 20.0]), np.array([0.0, 10.0]))  # |15 - 10| / 10
    0.5
    """
    reference = _reference_volume(sample_volumes, reader_volumes)
    visible = sample_volumes[sample_volumes > 0]
    median = np.median(visible) if len(visible) else 0.0
    return float(abs(median - reference) / reference)


def _check_volumes(samples: np.ndarray, readers: np.ndarray) -> None:
    for name, volumes in (("samples", samples), ("readers", readers)):
        if volumes.ndim != 4 or not volumes.shape[1]:
            raise ValueError(f"{name} must be bool (volumes, slices, H, W), got {volumes.dtype} {volumes.shape}")
    if samples.shape[1:] != readers.shape[1:]:
        raise ValueError(f"volumes must have one size, got samples {samples.shape} and readers {readers.shape}")
    check_masks(samples=samples[:, 0], readers=readers[:, 0])


def _reference_volume(sample_volumes: np.ndarray, reader_volumes: np.ndarray) -> float:
    """Mean volume of the readers who annotated."""
    for name, volumes in (("sample_volumes", sample_volumes), ("reader_volumes", reader_volumes)):
        if volumes.ndim != 1 or not len(volumes) or not np.isfinite(volumes).all() or volumes.min() < 0:
            raise ValueError(f"{name} must be one or more numbers of at least 0, got shape {volumes.shape}")
    if not reader_volumes.any():
        raise ValueError("all readers' volumes are empty; at least one reader must have annotated the nodule")
    return float(reader_volumes[reader_volumes > 0].mean())
