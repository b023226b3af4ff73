"""Views turn image, masks and prompt together, and the cache of their embeddings is never stale."""

import hashlib
import itertools
import json
import math
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_model, tiny_rows, tiny_vit_parts

pytest.importorskip("datasets")

import datasets

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.baselines import DropoutUNetConfig, DropoutUNetModel
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import FEATURES, decode_image, decode_masks, encode_png, load_split
from probabilistic_sam.errors import UserError
from probabilistic_sam.modeling_probabilistic_sam import pack_pixels
from probabilistic_sam.processing_probabilistic_sam import IMAGENET_MEAN, IMAGENET_STD
from probabilistic_sam.training import embedding_cache
from probabilistic_sam.training.embedding_cache import EmbeddingCache, NodeProcesses
from probabilistic_sam.training.windows import (
    ADDED_AUGMENTATION,
    View,
    place_prompt,
    plain_view,
    prompt_window,
    random_view,
    rotate,
    view_pixel_values,
    view_prompt,
    view_readers,
    view_window,
)

AUGMENTATION = {"max_shift": 4.0, "max_zoom": 0.3, "max_gamma": 0.25}
SYMMETRIES = list(itertools.product(range(4), (False, True)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "lidc"
    write_dataset(tiny_rows({"train": 2}), path, "Made for a test.")
    return load_split(path, "train")  # 6 rows


@pytest.fixture(scope="module")
def processor():
    return ProbabilisticSamProcessor(SIZE, 24)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_vit_parts)


@pytest.fixture
def make(model, processor, dataset, tmp_path):
    def make_cache(**changes):
        arguments = {
            "model": model, "processor": processor, "dataset": dataset, "num_views": 2, "seed": 0,
            "augmentation": AUGMENTATION, "cache_dir": tmp_path / "cache", "batch_size": 4,
        }  # fmt: skip
        return EmbeddingCache(**(arguments | changes))

    return make_cache


def tight_box(masks):
    _, rows, columns = np.nonzero(masks)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# ----------------------------------------------------------------------------------------------------------- views


def test_plain_view_equals_the_window_of_the_processor(dataset, processor):
    for row in dataset:
        image, masks = decode_image(row), decode_masks(row)
        expected = processor(image, input_boxes=[[tight_box(masks)]])
        view = plain_view(masks, processor)
        assert list(view.window) == expected["windows"][0].tolist()
        assert torch.equal(view_pixel_values(image, view, processor), expected["pixel_values"][0])


class Still:
    """A random generator that gives prompts without jitter."""

    def uniform(self, low, high, size=None):
        return np.zeros(size)


@pytest.fixture(scope="module")
def masks():
    """Two asymmetric masks of an image that is wider than high."""
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:15, 20:34] = masks[0, 10:20, 20:23] = masks[1, 12:17, 21:31] = True
    return masks


@pytest.mark.parametrize(("turns", "mirror"), SYMMETRIES)
@pytest.mark.parametrize("corner", [(0, 0), (3, -2)], ids=["centred", "shifted"])
def test_image_masks_and_prompt_turn_together(masks, turns, mirror, corner):
    processor = ProbabilisticSamProcessor(image_size=96, crop_size=24, stretch_percentiles=(0, 100))
    x, y, side = prompt_window(View(turns, mirror, (0, 0, 0), 1.0).turn(masks), processor)
    view = View(turns, mirror, (x + corner[0], y + corner[1], side), 1.0)
    assert side == 24  # 14 px are less than three quarters of the window

    seen = view_readers(masks, view, side)["labels"].numpy()  # not resized
    assert seen.sum(axis=(1, 2)).tolist() == masks.sum(axis=(1, 2)).tolist()
    box = view_prompt(masks, view, "union_box", Still(), image_size=96)["input_boxes"]
    assert (box / 4).tolist() == tight_box(seen)
    point = view_prompt(masks, view, "center_point", Still(), image_size=96)["input_points"]
    rows, columns = np.nonzero(seen.any(axis=0))
    assert (point / 4).tolist() == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1e-4)

    image = masks[0].astype(np.uint8) * 100
    bright = view_pixel_values(image, view, processor)[0] > 0
    expected = view_readers(masks, view, 96)["labels"][0]
    assert (bright & expected).sum() > 0.95 * (bright | expected).sum()


def test_prompt_is_placed_where_the_processor_places_it():
    box, processor = [10.0, 20.0, 30.0, 28.0], ProbabilisticSamProcessor(image_size=96, crop_size=24)
    placed = place_prompt({"input_boxes": box}, (6, 16, 24), 96)["input_boxes"]
    assert placed.tolist() == [16, 16, 96, 48]  # 4 px of the input per px of the image
    features = processor(np.zeros((40, 40)), input_boxes=[[box]])
    window = tuple(features["windows"][0].tolist())
    again = place_prompt({"input_boxes": box}, window, 96)["input_boxes"]
    assert torch.allclose(again, features["input_boxes"][0, 0])
    point = place_prompt({"input_points": [8.0, 18.5], "input_labels": 1}, (6, 16, 24), 96)
    assert point["input_points"].tolist() == [8, 10] and len(point) == 1


def test_whether_a_reader_annotated_is_decided_between_cutting_and_resizing():
    masks = np.zeros((4, 40, 40), bool)
    masks[0, 10:20, 10:20] = True
    masks[1, 12, 12] = True  # one pixel, a ninth of one after resizing
    masks[2, 35, 35] = True  # outside of the window
    view = View(0, False, (6, 6, 24), 1.0)
    readers = view_readers(masks, view, 8)
    assert readers["labels"].flatten(1).any(dim=1).tolist() == [True, False, False, False]
    assert readers["annotated"].tolist() == [True, True, False, False]
    half_turn = View(2, False, (0, 0, 24), 1.0)  # pixel (35, 35) comes to (4, 4), pixel (12, 12) to (27, 27)
    assert view_readers(masks, half_turn, 8)["annotated"].tolist() == [True, False, True, False]


def test_the_eight_symmetries_differ(masks):
    seen = {View(turns, mirror, (0, 0, 0), 1.0).turn(masks).tobytes() for turns, mirror in SYMMETRIES}
    assert len(seen) == 8


def test_random_views_stay_within_their_bounds(masks, processor):
    views = [random_view(masks, processor, np.random.default_rng(seed), **AUGMENTATION) for seed in range(300)]
    assert {(view.turns, view.mirror) for view in views} == set(SYMMETRIES)
    shifts, zooms = [], []
    for view in views:
        x, y, side = prompt_window(view.turn(masks), processor)
        new_x, new_y, new_side = view.window
        shifts += [new_x + new_side / 2 - x - side / 2, new_y + new_side / 2 - y - side / 2]
        zooms.append(new_side / side)
    assert 3 < np.abs(shifts).max() <= 4.5  # half a pixel from rounding
    assert math.exp(-0.3) - 0.03 < min(zooms) < 0.85 and 1.2 < max(zooms) < math.exp(0.3) + 0.03
    gammas = np.log([view.gamma for view in views])
    assert 0.2 < np.abs(gammas).max() <= 0.25
    again = random_view(masks, processor, np.random.default_rng(7), **AUGMENTATION)
    assert again == views[7] != views[8]


def test_gamma_keeps_black_and_white_and_bends_the_rest():
    processor = ProbabilisticSamProcessor(16, 16, stretch_percentiles=(0, 100))
    image = np.tile(np.arange(16, dtype=np.uint8) * 10, (16, 1))
    views = [View(0, False, (0, 0, 16), gamma) for gamma in (1.0, 2.0)]
    straight, bent = (view_pixel_values(image, view, processor)[0, 0] for view in views)
    assert torch.allclose(straight[[0, -1]], bent[[0, -1]], atol=1e-5)
    share = [(row - row[0]) / (row[-1] - row[0]) for row in (straight, bent)]
    assert torch.allclose(share[1], share[0] ** 2, atol=1e-5)


@pytest.mark.parametrize("corner", [(3, 5), (-4, 60), (75, -9)])
def test_only_the_window_of_a_large_image_is_computed(masks, processor, corner):
    """The same values as from the whole image, whose darkest and brightest pixels set the scale of gamma."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, size=(80, 90), dtype=np.uint8)
    view = View(1, True, (*corner, 24), 1.2)
    planes = view.turn(image[None]).astype(np.float32)
    low, high = planes.min(), planes.max()
    whole = processor.stretch(torch.from_numpy(((planes - low) / (high - low)) ** 1.2), view.window)
    assert torch.equal(view_window(image, view, processor), whole)

    large = rng.integers(0, 255, size=(2000, 2000), dtype=np.uint8)
    tracemalloc.start()
    view_window(large, view, processor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * large.nbytes  # the turned image, and no float of each pixel


def test_defaults_give_the_views_of_earlier_versions(masks, processor):
    """The numbers are those of the version without the four added arguments."""
    rng = np.random.default_rng(3)
    view = random_view(masks, processor, rng, **AUGMENTATION, **ADDED_AUGMENTATION)
    expected = np.random.default_rng(3)
    turns, mirror = int(expected.integers(4)), bool(expected.integers(2))
    gamma = math.exp(expected.uniform(-0.25, 0.25))
    x, y, side = prompt_window(View(turns, mirror, (0, 0, 0), 1.0).turn(masks), processor)
    new_side = round(side * math.exp(expected.uniform(-0.3, 0.3)))
    x, y = (round(value + (side - new_side) / 2 + expected.uniform(-4, 4)) for value in (x, y))
    assert view == View(turns, mirror, (x, y, new_side), gamma)
    assert rng.random() == expected.random()  # no further random number was taken


@pytest.mark.parametrize(
    ("symmetries", "expected"),
    [("dihedral", set(SYMMETRIES)), ("flips", {(0, False), (0, True), (2, False), (2, True)}), ("none", {(0, False)})],
)
def test_symmetries(masks, processor, symmetries, expected):
    views = [
        random_view(masks, processor, np.random.default_rng(seed), **AUGMENTATION, symmetries=symmetries)
        for seed in range(80)
    ]
    assert {(view.turns, view.mirror) for view in views} == expected
    shapes = {view.turn(masks).shape for view in views}
    assert shapes == {(2, 40, 60), (2, 60, 40)} if symmetries == "dihedral" else {(2, 40, 60)}


def test_rotation_noise_and_contrast_stay_within_their_bounds(masks, processor):
    more = {"rotation": 20.0, "noise": 0.1, "contrast": 0.3}
    views = [random_view(masks, processor, np.random.default_rng(n), **AUGMENTATION, **more) for n in range(200)]
    angles, gains = [view.rotation for view in views], np.log([view.contrast for view in views])
    assert -20 < min(angles) < -18 and 18 < max(angles) < 20
    assert 0.25 < np.abs(gains).max() <= 0.3 and gains.min() < 0
    assert {view.noise for view in views} == {0.1} and len({view.noise_seed for view in views}) == 200


def test_window_of_a_view_never_leaves_the_image(masks, processor):
    far = AUGMENTATION | {"max_shift": 500.0}
    for seed in range(20):
        view = random_view(masks, processor, np.random.default_rng(seed), **far)
        assert torch.isfinite(view_pixel_values(masks[0].astype(np.uint8), view, processor)).all()


@pytest.mark.parametrize("turns", range(4))
def test_rotation_by_quarter_turns_is_that_of_numpy(masks, turns):
    image = np.random.default_rng(0).integers(0, 255, (40, 60)).astype(np.float32)
    assert np.allclose(rotate(image, 90 * turns), np.rot90(image, turns), atol=0.05)
    assert (rotate(masks, 90 * turns) == np.rot90(masks, turns, axes=(-2, -1))).all()


def test_image_and_masks_rotate_together(masks):
    processor = ProbabilisticSamProcessor(image_size=96, crop_size=24, stretch_percentiles=(0, 100))
    for seed in range(20):
        view = random_view(
            masks[:1], processor, np.random.default_rng(seed), max_shift=3, max_zoom=0.1, max_gamma=0, rotation=180
        )
        turned = view.turn(masks[:1])
        assert turned.dtype == bool and turned.sum() == pytest.approx(masks[0].sum(), rel=0.06)  # nothing is lost
        image = view.turn(masks[0] * 200.0)  # the image of the mask
        assert ((image >= 100) == turned[0]).all()
        pixels = view_pixel_values(masks[0].astype(np.uint8) * 200, view, processor)[0]
        seen = view_readers(masks[:1], view, 96)["labels"][0]
        bright = pixels > (pixels.min() + pixels.max()) / 2
        assert (bright & seen).sum() > 0.9 * (bright | seen).sum()  # the mask's outline is not interpolated
        centres = [part.nonzero().float().mean(dim=0) for part in (bright, seen)]
        assert (centres[0] - centres[1]).abs().max() < 0.8  # a fifth of a pixel of the image
        x, y, side = view.window
        box = view_prompt(masks[:1], view, "union_box", Still(), image_size=96)["input_boxes"]
        assert (box.numpy() * side / 96 + [x, y, x, y]).tolist() == pytest.approx(tight_box(turned), abs=1e-3)


def test_masks_of_one_pixel_and_empty_masks_survive_a_rotation():
    masks = np.zeros((3, 20, 31), bool)
    masks[0, 0, 0] = masks[1, 7, 11] = True
    for angle in np.linspace(1, 359, 50):
        turned = rotate(masks, angle)
        assert turned.dtype == bool and turned.any(axis=(1, 2)).tolist() == [True, True, False]
        assert turned.sum() <= 4


def test_noise_has_its_standard_deviation_and_follows_from_its_seed():
    processor = ProbabilisticSamProcessor(64, 64, stretch_percentiles=(0, 100))
    image = np.zeros((64, 80), np.uint16)
    image[:, :32] = 1000  # the window holds 64 of 80 columns, half of them bright
    image[:, 70:] = 50000  # outside of the window
    whole = (0, 0, 64)
    pixels = [
        view_pixel_values(image, View(0, False, whole, 1.0, noise=share, noise_seed=seed), processor)
        for share, seed in ((0.0, 0), (0.05, 1), (0.05, 1), (0.05, 2))
    ]
    assert torch.equal(pixels[1], pixels[2]) and not torch.equal(pixels[1], pixels[3])
    grey = pixels[1][0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    bright, dark = grey[:, :32], grey[:, 32:]
    # The stretch to 0..255 keeps the ratio of noise and contrast
    for part in (bright, dark):
        assert (part.std() / (bright.mean() - dark.mean())).item() == pytest.approx(0.05, rel=0.06)


def test_contrast_is_a_gain_around_the_mean_of_the_window():
    processor = ProbabilisticSamProcessor(16, 16, stretch_percentiles=(0, 100))
    image = np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1))  # 0 to 255, mean 127.5
    plain, low, high = (
        view_pixel_values(image, View(0, False, (0, 0, 16), 1.0, contrast=gain), processor)[0, 0] * IMAGENET_STD[0]
        + IMAGENET_MEAN[0]
        for gain in (1.0, 0.5, 2.0)
    )
    assert torch.allclose(plain, torch.arange(16.0) * 17, atol=1e-3)
    assert torch.allclose(low, 127.5 + 0.5 * (plain - 127.5), atol=1e-3)
    assert torch.allclose(high, (127.5 + 2 * (plain - 127.5)).clamp(0, 255), atol=1e-3)


# ------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_those_of_the_model(make, model, processor, dataset):
    cache = make()
    assert cache.embeddings.shape == (6, 2, 32, 2, 2) and cache.embeddings.dtype == np.float16
    for index, row in enumerate(dataset):
        image, masks = decode_image(row), decode_masks(row)
        for number in range(2):
            pixels = view_pixel_values(image, cache.view(index, number, masks), processor)
            expected = model.get_image_embeddings(pixels[None])[0].numpy()
            assert np.allclose(cache.embeddings[index, number], expected, atol=2e-3, rtol=2e-3)
    assert not np.allclose(cache.embeddings[:, 0], cache.embeddings[:, 1], atol=0.1)
    all_masks = [decode_masks(row) for row in dataset]
    assert len({cache.view(index, number, all_masks[index]) for index in range(6) for number in range(2)}) == 12


def test_without_augmented_views_the_plain_view_is_stored(make, model, processor, dataset):
    cache = make(num_views=0, augmentation=None)
    assert cache.embeddings.shape == (6, 1, 32, 2, 2)
    boxes = [[tight_box(decode_masks(row))] for row in dataset]
    inputs = processor([decode_image(row) for row in dataset], input_boxes=boxes)
    expected = model.get_image_embeddings(inputs["pixel_values"]).numpy()
    assert np.allclose(cache.embeddings[:, 0], expected, atol=2e-3, rtol=2e-3)


def test_cache_is_used_again_and_only_for_the_same_embeddings(make, dataset, monkeypatch):
    first = make()
    written = first.path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCache, "_encode", lambda *arguments: pytest.fail("built again"))
        again = make(model=tiny_model(tiny_vit_parts), batch_size=1)
    assert again.path == first.path and first.path.stat().st_mtime_ns == written
    assert (again.embeddings == first.embeddings).all()

    changed = [
        make(model=tiny_model(tiny_vit_parts, seed=1)),
        make(processor=ProbabilisticSamProcessor(SIZE, 25)),
        make(processor=ProbabilisticSamProcessor(SIZE, 24, stretch_percentiles=(1, 99))),
        make(dataset=dataset.select(range(5))),
        make(dataset=dataset.select([1, 0, 2, 3, 4, 5])),
        make(seed=1),
        make(num_views=1),
        make(augmentation=AUGMENTATION | {"max_shift": 3.0}),
        make(bf16=True),
        make(augmentation=AUGMENTATION | {"rotation": 10.0}),
        make(augmentation=AUGMENTATION | {"symmetries": "none"}),
    ]
    assert len({cache.path for cache in [first, *changed]}) == 12
    assert make(augmentation=AUGMENTATION | ADDED_AUGMENTATION).path == first.path
    # Caches that earlier versions wrote stay valid: the file is named by the hash of these values
    vision, data = hashlib.sha256(), hashlib.sha256()
    for name, value in sorted(tiny_model(tiny_vit_parts).vision_encoder.state_dict().items()):
        vision.update(name.encode() + value.numpy().tobytes())
    for row in dataset:
        data.update(decode_image(row).tobytes() + np.packbits(decode_masks(row)).tobytes())
    key = {
        "version": 2, "vision_encoder": vision.hexdigest(), "data": data.hexdigest(), "num_views": 2, "seed": 0,
        "processor": ProbabilisticSamProcessor(SIZE, 24).to_dict(), "augmentation": AUGMENTATION, "bf16": False,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
    assert first.path.name == f"embeddings-{name}.npy"


def test_latent_networks_do_not_make_a_new_cache(make):
    first, other = make(), tiny_model(tiny_vit_parts)
    torch.nn.init.ones_(other.prior.lin2.weight)
    assert make(model=other).path == first.path


def test_model_without_an_encoder_stores_the_pixels(make, dataset, processor):
    unets = [
        DropoutUNetModel(DropoutUNetConfig(image_size=SIZE, hidden_size=8, num_blocks=1, dropout=share))
        for share in (0.0, 0.5)
    ]
    first, second = (make(model=unet) for unet in unets)
    assert first.path == second.path != make().path
    assert first.embeddings.shape == (6, 2, 16, 2, 2)
    pixels = view_pixel_values(decode_image(dataset[3]), first.view(3, 1, decode_masks(dataset[3])), processor)
    assert np.allclose(first.embeddings[3, 1], pack_pixels(pixels[None])[0], atol=2e-3)


@pytest.fixture(scope="module")
def colour_rows(masks):
    """Three rows with an RGB image: red objects on a blue background, and two readers."""
    rng = np.random.default_rng(0)
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 2], image[..., 1] = 60, rng.integers(0, 20, (40, 60))
    image[masks[0], 0] = 250
    row = {
        "image": {"bytes": encode_png(image), "path": None},
        "masks": [{"bytes": encode_png(mask), "path": None} for mask in masks],
    }
    features = datasets.Features({name: FEATURES[name] for name in row})
    return datasets.Dataset.from_list([row] * 3, features=features)


def test_cache_takes_rgb_images(make, model, processor, colour_rows):
    more = {"rotation": 30.0, "noise": 0.05, "contrast": 0.2}
    cache = make(dataset=colour_rows, augmentation=AUGMENTATION | more)
    image, masks = decode_image(colour_rows[0]), decode_masks(colour_rows[0])
    assert image.shape == (40, 60, 3)
    for number in range(2):
        view = cache.view(1, number, masks)
        pixels = view_pixel_values(image, view, processor)
        grey = pixels * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
        seen = view_readers(masks, view, SIZE)["labels"][0]
        assert grey[0][seen].mean() > 2 * grey[2][seen].mean()  # red inside the mask
        assert grey[2][~seen].mean() > 2 * grey[0][~seen].mean()  # blue outside
        expected = model.get_image_embeddings(pixels[None])[0].numpy()
        assert np.allclose(cache.embeddings[1, number], expected, atol=5e-3, rtol=5e-3)


def test_masks_of_another_size_are_refused_before_any_view_is_encoded(make, dataset):
    rows = dataset.with_format("arrow")[:].to_pylist()
    rows[4]["image"] = {"bytes": encode_png(np.zeros((40, 50), np.uint8)), "path": None}
    patient = rows[4]["patient_id"]
    with pytest.raises(
        UserError,
        match=f"^patient_id {patient}, nodule_id 0, slice_index 1: image of 50x40 pixels and masks of .*: one size",
    ):
        make(dataset=datasets.Dataset.from_list(rows, features=dataset.features))


def test_grey_image_in_three_channels_equals_the_grey_image(masks):
    """Gamma, noise and contrast belong to the image, so equal channels stay equal."""
    processor = ProbabilisticSamProcessor(SIZE, 24, stretch_percentiles=(0, 100))
    grey = np.random.default_rng(0).integers(0, 255, (40, 60)).astype(np.uint8)
    more = {"rotation": 30.0, "noise": 0.05, "contrast": 0.3}
    view = random_view(masks, processor, np.random.default_rng(0), **AUGMENTATION, **more)
    expected = view_pixel_values(grey, view, processor)
    assert torch.allclose(view_pixel_values(np.stack([grey] * 3, axis=-1), view, processor), expected, atol=1e-5)


def test_gamma_has_one_scale_for_all_colours():
    processor = ProbabilisticSamProcessor(16, 16, stretch_percentiles=(0, 100))
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0], image[..., 1], image[8:] = 50, 100, 200  # 0..200; red is 1/4 and green 1/2 of it
    plain, bent = (
        view_pixel_values(image, View(0, False, (0, 0, 16), gamma), processor)[:, 0, 0]
        * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN) for gamma in (1.0, 2.0)
    )  # fmt: skip
    assert (plain / 255).tolist() == pytest.approx([0.25, 0.5, 0], abs=1e-4)
    assert (bent / 255).tolist() == pytest.approx([0.0625, 0.25, 0], abs=1e-4)


# ------------------------------------------------------------------------------------------------ several processes


def together(*functions):
    """Run functions in threads; their results in order."""
    results = [None] * len(functions)

    def call(index):
        results[index] = functions[index]()

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_share_the_work(make, tmp_path):
    barrier = threading.Barrier(2, timeout=60)

    def process(rank):
        return make(cache_dir=tmp_path / "two", processes=NodeProcesses(0, rank, 2, barrier.wait))

    first, second = together(lambda: process(0), lambda: process(1))
    alone = make()
    assert first.path.name == second.path.name == alone.path.name
    # Batches hold other rows, so the last digit may differ
    assert np.allclose(first.embeddings, alone.embeddings, atol=2e-3)
    assert (first.embeddings == second.embeddings).all()
    assert not list((tmp_path / "two").glob("*.part"))


def test_of_two_runs_one_builds_and_the_other_waits(make, monkeypatch):
    builds = []
    encode = EmbeddingCache._encode
    monkeypatch.setattr(
        EmbeddingCache, "_encode", lambda self, *arguments: (builds.append(self), encode(self, *arguments))
    )
    first, second = together(make, make)
    assert len(builds) == 1
    assert (first.embeddings == second.embeddings).all()


def test_interrupted_build_leaves_no_cache_file(make, model, tmp_path, monkeypatch):
    calls = itertools.count()

    def interrupted(pixel_values):
        if next(calls) == 2:  # the first call determines the shape
            raise KeyboardInterrupt
        return torch.ones(len(pixel_values), 32, 2, 2)

    with monkeypatch.context() as patch:
        patch.setattr(model, "get_image_embeddings", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert not list((tmp_path / "cache").glob("*.npy"))
    whole, fresh = make(), make(cache_dir=tmp_path / "other")
    assert (whole.embeddings == fresh.embeddings).all()
    assert not list((tmp_path / "cache").glob("*.part"))


def test_embeddings_that_float16_does_not_hold_are_refused(make, model, tmp_path, monkeypatch):
    real, calls = model.get_image_embeddings, itertools.count()

    def large(pixels):
        embeddings = real(pixels)
        if next(calls) == 2:  # the first call determines the shape, this one has rows 2 and 3
            embeddings[3, 0, 0, 0] = 7e4
        return embeddings

    monkeypatch.setattr(model, "get_image_embeddings", large)
    with pytest.raises(UserError, match="values for row 3 that float16 does not hold; accepted: another encoder"):
        make()
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_cache_that_cannot_be_written_is_refused(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="embedding cache .* cannot be written: "):
        make(cache_dir=tmp_path / "file" / "cache")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(embedding_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="needs 0.0 GB; 0.0 GB are free"):
        make()
