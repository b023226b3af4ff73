"""The processor: windows, coordinates and areas by hand, every kind of image, prompt and fault."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import SIZE, tiny_model
from transformers import AutoProcessor

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.processing_probabilistic_sam import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OUTSIDE_LOGIT,
    PADDING_LABEL,
    binary_entropy,
)

BOX = [40, 30, 60, 44]  # its middle is (50, 37)


@pytest.fixture
def processor():
    """256 pixels of the model for 64 of the image: a scale of 4."""
    return ProbabilisticSamProcessor(image_size=256, crop_size=64)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, size=(100, 128), dtype=np.uint8)


def grey(pixel_values):
    """Grey values 0..255 of the first channel."""
    return pixel_values[..., 0, :, :] * IMAGENET_STD[0] + IMAGENET_MEAN[0]


# --------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("box", "window"),
    [
        (BOX, [50 - 32, 37 - 32, 64]),
        ([10, 10, 106, 58], [58 - 64, 34 - 64, 128]),  # 96 px are three quarters of 128
        ([0, 0, 10, 12], [5 - 32, 6 - 32, 64]),  # beyond the border
        ([127, 99, 128, 100], [96, 68, 64]),  # one pixel: its middle is (127.5, 99.5), rounded to even
        ([0, 0, 128, 100], [64 - 86, 50 - 86, 171]),  # the whole image: 128 / 0.75 rounded up
    ],
)
def test_window_lies_around_the_box(processor, image, box, window):
    inputs = processor(image, input_boxes=[[box]])
    assert inputs["windows"].tolist() == [window]
    assert inputs["original_sizes"].tolist() == [[100, 128]]


def test_window_holds_all_that_a_prompt_names(processor, image):
    points = processor(image, input_points=[[[[40, 20], [60, 30]]]])
    assert points["windows"].tolist() == [[50 - 32, 25 - 32, 64]]
    both = processor(image, input_boxes=[[[30, 20, 40, 30]]], input_points=[[[[70, 20]]]])
    assert both["windows"].tolist() == [[50 - 32, 25 - 32, 64]]
    mask = np.zeros((100, 128), bool)
    mask[20:30, 40:60] = True
    assert processor(image, input_masks=[[mask]])["windows"].tolist() == [[50 - 32, 25 - 32, 64]]


def test_negative_points_do_not_move_the_window_unless_they_are_alone(processor, image):
    points = [[[[50, 40], [52, 40], [120, 90]]]]
    inputs = processor(image, input_points=points, input_labels=[[[1, 0, 0]]])
    assert inputs["windows"].tolist() == [[18, 8, 64]]
    assert inputs["input_labels"].tolist() == [[[1, 0, PADDING_LABEL]]]  # the last one lies outside of the window
    assert inputs["input_points"][0, 0].tolist() == [[128, 128], [136, 128], [PADDING_LABEL] * 2]
    alone = processor(image, input_points=[[[[50, 40]]]], input_labels=[[[0]]])
    assert alone["windows"].tolist() == [[18, 8, 64]]


def test_prompts_are_in_coordinates_of_the_model(processor, image):
    inputs = processor(image, input_boxes=[[BOX]], input_points=[[[[50, 37], [48, 36]]]])
    assert inputs["input_boxes"].tolist() == [[[(40 - 18) * 4, (30 - 5) * 4, (60 - 18) * 4, (44 - 5) * 4]]]
    assert inputs["input_points"].tolist() == [[[[128, 128], [120, 124]]]]
    assert inputs["input_labels"].tolist() == [[[1, 1]]] and inputs["input_labels"].dtype == torch.int64


def test_mask_prompt_becomes_logits_of_the_window(processor, image):
    mask = np.zeros((100, 128), bool)
    mask[30:44, 40:60] = True
    logits = processor(image, input_masks=[[mask]])["input_masks"]
    assert logits.shape == (1, 1, 64, 64)  # here as large as the window
    expected = torch.full((64, 64), -10.0)
    expected[25:39, 22:42] = 10.0
    assert torch.equal(logits[0, 0], expected)


def test_whole_image_with_all_prompts_in_one_window(image):
    processor = ProbabilisticSamProcessor(image_size=256, crop_size=None)
    inputs = processor(image, input_boxes=[[BOX, [0, 0, 128, 100]]], input_points=[[[[64, 50]], [[1, 2], [3, 4]]]])
    assert inputs["windows"].tolist() == [[0, 0, 128]]
    assert inputs["pixel_values"].shape == (1, 3, 256, 256)
    assert inputs["input_boxes"].tolist() == [[[80, 60, 120, 88], [0, 0, 256, 200]]]
    assert inputs["input_points"].tolist() == [[[[128, 100], [PADDING_LABEL] * 2], [[2, 4], [6, 8]]]]
    assert inputs["input_labels"].tolist() == [[[1, PADDING_LABEL], [1, 1]]]


def test_several_prompts_and_images_give_a_window_each_in_order(processor, image):
    other = np.zeros((70, 80), np.uint8)
    inputs = processor([image, other], input_boxes=[[BOX, [40, 30, 62, 44]], [[40, 30, 64, 44]]])
    assert inputs["pixel_values"].shape == (3, 3, 256, 256)
    assert inputs["windows"][:, 0].tolist() == [18, 19, 20]
    assert inputs["original_sizes"].tolist() == [[100, 128], [100, 128], [70, 80]]
    points = processor([image, other], input_points=[[[[50, 40]]], [[[50, 40], [52, 40]]]])
    assert points["input_points"].shape == (2, 1, 2, 2)
    assert points["input_labels"].tolist() == [[[1, PADDING_LABEL]], [[1, 1]]]


def test_one_prompt_may_come_without_its_level(processor, image):
    """As `SamProcessor` takes it; and arrays and tensors as well as lists."""
    mask = np.ones((100, 128))
    for nested, flat in (
        ({"input_boxes": [[BOX]]}, {"input_boxes": [BOX]}),
        (
            {"input_points": [[[[50, 40], [52, 40]]]], "input_labels": [[[1, 0]]]},
            {"input_points": [[[50, 40], [52, 40]]], "input_labels": [[1, 0]]},
        ),
        ({"input_masks": [[mask]]}, {"input_masks": [mask]}),
    ):
        expected = processor(image, **nested)
        for values in (
            flat,
            {name: np.array(value) for name, value in nested.items()},
            {name: torch.tensor(np.array(value)) for name, value in nested.items()},
        ):
            given = processor(image, **values)
            assert given.keys() == expected.keys()
            assert all(torch.equal(given[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------------------- pixels


def test_every_kind_of_image_gives_the_same_pixels(processor, image):
    expected = processor(image, input_boxes=[[BOX]])["pixel_values"]
    rgb = np.stack([image] * 3, axis=-1)
    pil = PIL.Image.fromarray(image)
    for same in (
        image.astype(np.float64) / 255,
        image.astype(np.int64) * 100 - 1000,  # HU
        image.astype(np.uint16) * 257,
        image[..., None],
        rgb,
        np.moveaxis(rgb, -1, 0),
        torch.from_numpy(image),
        torch.from_numpy(rgb).permute(2, 0, 1).to(torch.bfloat16),  # whole numbers to 256 are exact
        pil,
        pil.convert("RGB"),
        pil.convert("RGBA"),
        pil.convert("LA"),
        pil.convert("P"),  # a palette: numbers are not grey values
        PIL.Image.fromarray(image.astype(np.uint16) * 257),  # I;16
        PIL.Image.fromarray(image.astype(np.float32)),  # F
    ):
        assert torch.allclose(processor(same, input_boxes=[[BOX]])["pixel_values"], expected, atol=1e-3)
    assert expected.shape == (1, 3, 256, 256) and expected.dtype == torch.float32


def test_images_come_as_list_or_as_a_stack(processor, image):
    rgb = torch.from_numpy(image)[None, None].repeat(2, 3, 1, 1)
    for images in (rgb, list(rgb), (image, image), rgb.numpy()):
        assert processor(images, input_boxes=[[BOX], [BOX]])["pixel_values"].shape == (2, 3, 256, 256)


def test_colours_stay_apart(processor):
    coloured = np.zeros((64, 64, 3), np.uint8)
    coloured[:, 32:, 0] = coloured[:32, :, 1] = 200
    pixels = processor(coloured, input_boxes=[[[20, 20, 44, 44]]])["pixel_values"][0]
    # Red is bright on the right, green above, blue nowhere
    bright = [channel > 0 for channel in pixels]
    assert bright[0][:, 130:].all() and not bright[0][:, :126].any()
    assert bright[1][:126].all() and not bright[1][130:].any()
    assert not bright[2].any()


def test_percentiles_of_the_window_become_black_and_white():
    ramp = np.zeros((80, 80))
    ramp[:, 8:72] = np.arange(64)  # the window sees 0..63
    box = [[[30, 30, 50, 50]]]  # window (8, 8)
    whole = ProbabilisticSamProcessor(64, 64, stretch_percentiles=(0, 100))(ramp, input_boxes=box)
    assert torch.allclose(grey(whole["pixel_values"])[0, 0], torch.arange(64) * 255 / 63, atol=1e-3)
    # The percentiles of 0..63 at 25 and 75 are 15.75 and 47.25
    middle = ProbabilisticSamProcessor(64, 64, stretch_percentiles=(25, 75))(ramp, input_boxes=box)
    expected = ((torch.arange(64) - 15.75) / 31.5).clamp(0, 1) * 255
    assert torch.allclose(grey(middle["pixel_values"])[0, 0], expected, atol=1e-3)


def test_window_beyond_the_image_is_filled_with_its_darkest_value():
    processor = ProbabilisticSamProcessor(64, 64, stretch_percentiles=(0, 100))
    image = np.full((64, 64), 7.0)
    image[20, 20] = 9.0
    pixels = grey(processor(image, input_boxes=[[[0, 0, 16, 16]]])["pixel_values"])[0]  # window (-24, -24)
    assert torch.allclose(pixels[:24], torch.zeros(24, 64), atol=1e-3)
    assert pixels[44, 44].item() == pytest.approx(255, abs=1e-3)  # pixel (20, 20)


def test_constant_image_has_no_nan(processor):
    pixels = processor(np.full((64, 64), 1000), input_boxes=[[[10, 10, 20, 20]]])["pixel_values"]
    assert torch.isfinite(pixels).all()


# ------------------------------------------------------------------------------------------------------- and back


def test_mask_returns_to_its_place(processor, image):
    inputs = processor(image, input_boxes=[[BOX]])
    logits = torch.full((1, 1, 2, 64, 64), -10.0)
    logits[..., 25:39, 22:42] = 10.0
    (pasted,) = processor.post_process_logits(logits, inputs["windows"], inputs["original_sizes"])
    expected = np.zeros((2, 100, 128), bool)
    expected[:, 30:44, 40:60] = True
    assert ((pasted > 0).numpy() == expected).all()
    assert (pasted[:, :5] == OUTSIDE_LOGIT).all() and (pasted[:, 5:69, 18:82] != OUTSIDE_LOGIT).all()


def test_box_of_a_mask_drawn_in_the_model_is_the_prompt(processor, image):
    """Forth and back at SAM's own resolution, image_size / 4, with a box on its grid and beyond the border."""
    for box in (BOX, [0, 0, 12, 16], [116, 88, 128, 100]):
        inputs = processor(image, input_boxes=[[box]])
        x1, y1, x2, y2 = (inputs["input_boxes"][0, 0] / 4).long().tolist()  # cells of 4 px: one pixel of the image
        logits = torch.full((1, 1, 1, 64, 64), -10.0)
        logits[..., y1:y2, x1:x2] = 10.0
        (pasted,) = processor.post_process_logits(logits, inputs["windows"], inputs["original_sizes"])
        rows, columns = np.nonzero(pasted[0].numpy() > 0)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box


def test_low_resolution_masks_grow_with_the_window(processor):
    logits = torch.full((1, 1, 1, 16, 16), -10.0)
    logits[..., 4:6, 8:12] = 10.0  # cells of 4 px
    (pasted,) = processor.post_process_logits(logits, torch.tensor([[0, 0, 64]]), torch.tensor([[64, 64]]))
    rows, columns = np.nonzero(pasted[0].numpy() > 0)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (16, 24, 32, 48)


def square_logits(*sides):
    """(1, 1, N, 8, 8): squares of these sides, certain."""
    logits = torch.full((1, 1, len(sides), 8, 8), -40.0)
    for index, side in enumerate(sides):
        logits[0, 0, index, :side, :side] = 40.0
    return logits


PLACE = {"windows": torch.tensor([[0, 0, 8]]), "original_sizes": torch.tensor([[8, 8]])}


def test_areas_and_their_quantiles_by_hand(processor):
    (result,) = processor.post_process_samples(square_logits(0, 2, 2, 4), **PLACE, pixel_spacing_mm=0.5)
    assert result["areas"].tolist() == [0, 1, 1, 4] and result["area_unit"] == "mm2"
    # Between 0, 1, 1, 4 at 0, 1/3, 2/3, 1
    expected = {"0.05": 0.15, "0.25": 0.75, "0.5": 1.0, "0.75": 1.75, "0.95": 3.55}
    assert result["area_quantiles"] == pytest.approx(expected, abs=1e-5)
    assert result["empty_share"] == 0.25
    (result,) = processor.post_process_samples(square_logits(0, 2, 2, 4), **PLACE)
    assert result["areas"].tolist() == [0, 4, 4, 16] and result["area_unit"] == "px"


def test_mean_and_entropy_by_hand(processor):
    (result,) = processor.post_process_samples(square_logits(0, 2, 2, 4), **PLACE)
    assert result["masks"].dtype == torch.bool and result["masks"].sum(dim=(1, 2)).tolist() == [0, 4, 4, 16]
    mean = [result["mean"][row, row].item() for row in (0, 3, 7)]
    assert mean == pytest.approx([0.75, 0.25, 0.0], abs=1e-6)
    three_to_one = 0.75 * math.log2(4 / 3) + 0.25 * math.log2(4)
    entropy = [result["entropy"][row, row].item() for row in (0, 3, 7)]
    assert entropy == pytest.approx([three_to_one, three_to_one, 0.0], abs=1e-6)


def test_entropy_is_in_bits():
    assert binary_entropy(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 1.0, 0.0]


def test_spacing_is_one_number_or_one_a_prompt(processor):
    logits = square_logits(2, 4).transpose(1, 2)  # two prompts of one sample
    for spacing, areas in (
        ((0.5, 2), [1, 64]),
        (np.array([0.5, 2]), [1, 64]),
        (2, [16, 64]),
        (torch.tensor(0.5), [1, 4]),
    ):
        results = processor.post_process_samples(logits, **PLACE, pixel_spacing_mm=spacing)
        assert [result["areas"].item() for result in results] == areas
    for spacing in (0, -1, float("nan"), (1, 1, 1)):
        with pytest.raises(ValueError, match="pixel_spacing_mm must be one positive number, or one for each of 2"):
            processor.post_process_samples(logits, **PLACE, pixel_spacing_mm=spacing)


def test_model_takes_what_the_processor_gives(image):
    processor, model = ProbabilisticSamProcessor(SIZE, 24), tiny_model()
    inputs = processor(image, input_boxes=[[BOX, [0, 0, 9, 9]]], input_points=[[[[50, 37]], [[1, 2], [3, 4]]]])
    output = model.sample(**inputs, num_samples=3)
    results = processor.post_process_samples(output.pred_masks, inputs["windows"], inputs["original_sizes"])
    assert [result["masks"].shape for result in results] == [(3, 100, 128)] * 2
    with torch.no_grad():
        assert model(**inputs, num_samples=3).pred_masks.shape == output.pred_masks.shape


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "a prompt must be given"),
        ({"input_boxes": [[]]}, "image 0 has no prompt"),
        ({"input_boxes": [[BOX], [BOX]]}, "input_boxes are for 2 images, but there are 1"),
        ({"input_boxes": [[[40, 30, 60]]]}, r"four finite numbers x1, y1, x2, y2, got \[40.0, 30.0, 60.0\]"),
        ({"input_boxes": [[[40, 30, 60, float("nan")]]]}, "four finite numbers"),
        ({"input_boxes": [[["a", 30, 60, 44]]]}, "input_boxes must be nested lists of numbers"),
        ({"input_boxes": 3}, "input_boxes must be a list with an entry for each image, got 3"),
        ({"input_boxes": [3]}, "input_boxes must be nested lists of numbers"),
        ({"input_boxes": [[[60, 30, 40, 44]]]}, "has no area: x2 must exceed x1"),
        ({"input_boxes": [[[40, 30, 60, 30]]]}, "has no area"),
        (
            {"input_boxes": [[[-1, 30, 60, 44]]]},
            "x -1, y 30 of a prompt lies outside of the image of 128 x 100 pixels",
        ),
        ({"input_boxes": [[[40, 30, 60, 101]]]}, "x 60, y 101 of a prompt lies outside"),
        ({"input_points": [[[[200, 30]]]]}, "x 200, y 30 of a prompt lies outside"),
        (
            {"input_points": [[[[20, 30], [0, 200]]]], "input_labels": [[[1, 0]]]},
            "x 0, y 200 of a prompt lies outside",
        ),
        ({"input_points": [[[[20, float("inf")]]]]}, "points must be finite pairs"),
        ({"input_points": [[[[20, 30, 40]]]]}, "points must be finite pairs"),
        ({"input_points": [[[[20, 30]]]], "input_labels": [[[1, 1]]]}, "1 points need as many labels"),
        ({"input_points": [[[[20, 30]]]], "input_labels": [[[2]]]}, "labels must be 1 .inside., 0 .outside. or -10"),
        ({"input_points": [[[[20, 30]]]], "input_labels": [[[-10]]]}, "every point is padding"),
        ({"input_points": [[[[20, 30]]]], "input_labels": [[[1], [1]]]}, "image 0 has different numbers of prompts"),
        ({"input_boxes": [[BOX]], "input_points": [[[[20, 30]], [[20, 30]]]]}, "different numbers of prompts"),
        ({"input_boxes": [[BOX]], "input_labels": [[[1]]]}, "input_labels are given without input_points"),
        ({"input_masks": [[np.ones((3, 3))]]}, r"must have the image's size \(100, 128\), got \(3, 3\)"),
        ({"input_masks": [[np.zeros((100, 128))]]}, "a mask prompt must not be empty"),
        ({"input_boxes": [[BOX]], "return_tensors": "np"}, "return_tensors must be \"pt\", got 'np'"),
    ],
)
def test_wrong_prompts_are_named(processor, image, prompts, message):
    with pytest.raises(ValueError, match=message):
        processor(image, **prompts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 5, 6)), r"got \(4, 5, 6\)"),
        (np.zeros(9), r"got \(9,\)"),
        (np.zeros((0, 5)), r"got \(0, 5\)"),
        (np.full((100, 128), np.nan), "finite numbers only"),
    ],
)
def test_wrong_images_are_named(processor, wrong, message):
    with pytest.raises(ValueError, match=message):
        processor(wrong, input_boxes=[[BOX]])


def test_whole_images_need_prompts_that_fit_each_other(image):
    processor = ProbabilisticSamProcessor(256, crop_size=None)
    with pytest.raises(ValueError, match="as many input_boxes as the others, got 1, 2"):
        processor([image, image], input_boxes=[[BOX], [BOX, BOX]])
    with pytest.raises(ValueError, match="a window takes one mask prompt"):
        processor(image, input_masks=[np.ones((2, 100, 128))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "image_size must be a positive multiple of 16, got 100"),
        ({"image_size": 0}, "got 0"),
        ({"crop_size": 0}, "crop_size must be at least 1 pixel, or None for the whole image, got 0"),
        ({"stretch_percentiles": (99, 1)}, "two ascending numbers in 0..100, got 99 and 1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ProbabilisticSamProcessor(**settings)


# ---------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("auto", [ProbabilisticSamProcessor, AutoProcessor])
def test_settings_are_saved(tmp_path, image, auto):
    processor = ProbabilisticSamProcessor(128, crop_size=48, stretch_percentiles=(1, 98))
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["processor_config.json"]
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved == {
        "processor_class": "ProbabilisticSamProcessor", "image_size": 128, "crop_size": 48,
        "stretch_percentiles": [1, 98],
    }  # fmt: skip
    loaded = auto.from_pretrained(tmp_path)
    assert isinstance(loaded, ProbabilisticSamProcessor)
    expected = processor(image, input_boxes=[[BOX]])
    assert all(torch.equal(value, expected[name]) for name, value in loaded(image, input_boxes=[[BOX]]).items())


def test_whole_image_is_saved_too(tmp_path):
    ProbabilisticSamProcessor(128, crop_size=None).save_pretrained(tmp_path)
    assert ProbabilisticSamProcessor.from_pretrained(tmp_path).crop_size is None
