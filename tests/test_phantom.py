"""The phantom: attenuation of lung, nodule and chest wall, noise, and the same bytes in every process."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from probabilistic_sam.data.format import RATINGS
from probabilistic_sam.data.lidc.nodules import SLICE_SIDE, Nodule
from probabilistic_sam.data.lidc.phantom import _tree, phantom_hu, phantom_slice
from probabilistic_sam.errors import UserError
from probabilistic_sam.plotting import grid_figure

SPACING = 0.7
SCANS = range(1, 5)


def disc(row=64.0, column=64.0, radius=10.0):
    rows, columns = np.mgrid[:128, :128]
    return np.hypot(rows + 0.5 - row, columns + 0.5 - column) < radius


def made_nodule(scan_id=1, texture=5, subtlety=5, origin=(192, 330), radius=10.0):
    """A round nodule on which four readers agree, by default in the middle of the left lung."""
    masks = np.repeat(disc(radius=radius)[None, None], 4, axis=1)
    ratings = dict.fromkeys(RATINGS, (3,) * 4)
    ratings |= {"texture": (texture,) * 4, "subtlety": (subtlety,) * 4, "calcification": (6,) * 4}
    return Nodule(
        patient_id="LIDC-IDRI-0001", scan_id=scan_id, series_uid="1", nodule_id=0, annotation_ids=(1, 2, 3, 4),
        left_out=(), ratings=ratings, pixel_spacing_mm=SPACING, slice_thickness_mm=1.25, z_mm=np.zeros(1),
        origin=origin, masks=masks,
    )  # fmt: skip


def levels(nodule):
    """HU inside the nodule (its middle half) and of the lung around it."""
    hu = phantom_hu(nodule, 0)
    lung = hu[disc(radius=28) & ~disc(radius=15)]
    return np.median(hu[disc(radius=5)]), np.median(lung)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes():
    image = phantom_slice(made_nodule(), 0)
    code = "from test_phantom import *; print(hashlib.sha256(phantom_slice(made_nodule(), 0).tobytes()).hexdigest())"
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(image.tobytes()).hexdigest()


def test_simulation_does_not_change_the_masks():
    nodule = made_nodule()
    before = nodule.masks.copy()
    phantom_slice(nodule, 0)
    np.testing.assert_array_equal(nodule.masks, before)


def test_lung_has_a_typical_attenuation():
    lungs = [levels(made_nodule(scan))[1] for scan in SCANS]
    assert all(-920 < lung < -760 for lung in lungs)
    assert abs(np.mean(lungs) + 850) < 40


def test_more_solid_nodules_are_brighter():
    contrasts = [
        np.mean([np.subtract(*levels(made_nodule(scan, texture))) for scan in SCANS]) for texture in (1, 3, 5)
    ]
    assert 50 < contrasts[0] < contrasts[1] < contrasts[2]
    assert contrasts[2] > 700


def test_part_solid_core_is_brighter_than_its_rim():
    rim = disc(radius=8.5) & ~disc(radius=7)
    for scan in SCANS:
        hu = phantom_hu(made_nodule(scan, texture=3), 0)
        assert hu[disc(radius=3)].mean() > hu[rim].mean() + 50


def test_calcified_nodule_is_brighter_than_soft_tissue():
    soft = made_nodule()
    calcified = dataclasses.replace(soft, ratings=soft.ratings | {"calcification": (3,) * 4})
    assert levels(calcified)[0] > levels(soft)[0] + 300


def test_noise_has_a_realistic_level():
    """The middle of a large solid nodule shows only noise."""
    for scan in SCANS:
        hu = phantom_hu(made_nodule(scan, radius=25.0), 0)
        noise = hu - ndimage.gaussian_filter(hu, 4.0)
        assert 5 < noise[disc(radius=15)].std() < 90


def test_chest_wall_is_next_to_a_peripheral_nodule():
    peripheral, central = made_nodule(origin=(192, 383)), made_nodule()
    for scan in SCANS:
        shares = [
            (ndimage.gaussian_filter(phantom_hu(dataclasses.replace(nodule, scan_id=scan), 0), 2.0) > -300).mean()
            for nodule in (peripheral, central)
        ]
        assert shares[0] > 0.2 and shares[0] > shares[1]


def test_padding_is_only_outside_the_round_field_of_view():
    padded = 0
    for scan in range(1, 11):
        nodule = made_nodule(scan, origin=(0, SLICE_SIDE - 128))
        hu = phantom_hu(nodule, 0)
        rows, columns = np.mgrid[:128, :128] + 0.5
        beyond = np.hypot(rows - 256, columns + SLICE_SIDE - 128 - 256) > 256
        assert hu[~beyond].min() >= -1024
        padded += bool((hu[beyond] < -1999).all())
    assert 0 < padded < 10


def test_vascular_tree_reaches_every_point_and_tapers():
    root, points = np.zeros(3), np.random.default_rng(0).uniform(5.0, 50.0, size=(200, 3))
    segments = _tree(root, points, 0.3)
    assert {tuple(last) for _, last, _ in segments} == set(map(tuple, points))
    ends = {tuple(last): radius for _, last, radius in segments}
    for first, _, radius in segments:
        assert 0.3 <= radius <= ends.get(tuple(first), np.inf)


def test_grid_figure_has_a_panel_and_a_title_for_each_slice():
    readers = np.stack([disc(), np.zeros((128, 128), dtype=bool)])
    image = phantom_slice(made_nodule(), 0)
    figure = grid_figure([image] * 5, [readers, readers[:0], readers, readers, readers], list("abcde"))
    assert [axes.get_title() for axes in figure.axes] == list("abcde")
    assert {axes.images[0].get_clim() for axes in figure.axes} == {(0, 255)}
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([], [], []), "0 images"),
        (([np.zeros((4, 4))], [], ["a"]), "0 stacks of readers"),
        (([np.zeros((4, 4))], [np.zeros((1, 5, 4))], ["a"]), r"readers have shape \(1, 5, 4\)"),
        (([np.zeros(4)], [np.zeros((1, 4))], ["a"]), r"the image has shape \(4,\)"),
    ],
)
def test_grid_figure_refuses_what_does_not_fit(arrays, message):
    with pytest.raises(UserError, match=message):
        grid_figure(*arrays)
