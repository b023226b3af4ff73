"""The processor: windows, coordinates and areas by hand, all kinds of images and prompts, errors."""

import base64
import io
import json
import math
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import SIZE, tiny_model
from transformers import AutoProcessor, SamImageProcessor, SamProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.processing_probabilistic_sam import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OUTSIDE_LOGIT,
    PADDING_LABEL,
    binary_entropy,
    open_image,
)

BOX = [40, 30, 60, 44]  # its middle is (50, 37)


@pytest.fixture
def processor():
    """64 pixels of the image become 256 of the model: a scale of 4."""
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


def test_window_contains_all_parts_of_a_prompt(processor, image):
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
    assert inputs["input_labels"].tolist() == [[[1, 0, PADDING_LABEL]]]  # the last one lies outside the window
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
    assert logits.shape == (1, 1, 64, 64)  # in this test the size of the window
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


def test_each_prompt_of_each_image_has_a_window_in_order(processor, image):
    other = np.zeros((70, 80), np.uint8)
    inputs = processor([image, other], input_boxes=[[BOX, [40, 30, 62, 44]], [[40, 30, 64, 44]]])
    assert inputs["pixel_values"].shape == (3, 3, 256, 256)
    assert inputs["windows"][:, 0].tolist() == [18, 19, 20]
    assert inputs["original_sizes"].tolist() == [[100, 128], [100, 128], [70, 80]]
    points = processor([image, other], input_points=[[[[50, 40]]], [[[50, 40], [52, 40]]]])
    assert points["input_points"].shape == (2, 1, 2, 2)
    assert points["input_labels"].tolist() == [[[1, PADDING_LABEL]], [[1, 1]]]


def test_one_prompt_may_come_without_its_level(processor, image):
    """As in `SamProcessor`; with arrays and tensors as well as lists."""
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


def equal(given, expected):
    """Whether two outputs of the processor are equal."""
    return given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize("convert", [lambda value: value, np.array, lambda value: torch.tensor(np.array(value))])
def test_levels_may_be_left_out_if_unambiguous(processor, image, convert):
    """With one image that of images; with several images that of prompts."""
    mask = np.zeros((100, 128), bool)
    mask[30:44, 40:60] = True
    for name, full, others in (
        ("input_boxes", [[BOX]], (BOX, [BOX])),
        ("input_boxes", [[BOX, [0, 0, 9, 9]]], ([BOX, [0, 0, 9, 9]],)),
        ("input_points", [[[[30, 30]]]], ([30, 30], [[30, 30]], [[[30, 30]]])),
        ("input_points", [[[[30, 30], [40, 41]]]], ([[30, 30], [40, 41]], [[[30, 30], [40, 41]]])),
        ("input_points", [[[[30, 30]], [[40, 41]]]], ([[[30, 30]], [[40, 41]]],)),
        ("input_masks", [[mask]], (mask, [mask])),
    ):
        expected = processor(image, **{name: full})
        for value in others:
            assert equal(processor(image, **{name: convert(value)}), expected)
    signed = processor(image, input_points=[[[[30, 30], [40, 41]]]], input_labels=[[[1, 0]]])
    for labels in ([1, 0], [[1, 0]]):
        assert equal(processor(image, input_points=[[30, 30], [40, 41]], input_labels=convert(labels)), signed)
    two = processor([image, image], input_points=[[[[30, 30]]], [[[40, 41]]]], input_labels=[[[1]], [[0]]])
    given = processor([image, image], input_points=convert([[30, 30], [40, 41]]), input_labels=convert([1, 0]))
    assert equal(given, two)


def test_minus_one_is_padding_as_in_sam(processor, image):
    points = [[[[50, 40], [5, 5], [52, 40]]]]
    expected = processor(image, input_points=points, input_labels=[[[1, PADDING_LABEL, 1]]])
    assert equal(processor(image, input_points=points, input_labels=[[[1, -1, 1]]]), expected)
    assert expected["input_labels"].tolist() == [[[1, PADDING_LABEL, 1]]]
    assert expected["windows"].tolist() == [[51 - 32, 40 - 32, 64]]


def test_boxes_are_clipped_by_less_than_a_pixel(processor, image):
    expected = processor(image, input_boxes=[[[0, 0, 128, 100]]])
    assert equal(processor(image, input_boxes=[[[-0.3, -0.99, 128.6, 100.5]]]), expected)
    for outside in ([-1, 0, 9, 9], [0, 0, 129, 9], [0, 0, 9, 101]):
        with pytest.raises(ValueError, match="lies outside the image of 128 x 100"):
            processor(image, input_boxes=[[outside]])
    with pytest.raises(ValueError, match="has no area"):
        processor(image, input_boxes=[[[128.1, 0, 128.9, 9]]])


def test_mask_prompts_may_be_soft(processor, image):
    inside = np.zeros((100, 128), bool)
    inside[30:44, 40:60] = True
    expected = processor(image, input_masks=[[inside]])
    for mask in (
        inside.astype(np.uint8) * 255,
        np.where(inside, 0.3, 0.0),  # 0 and another value
        np.where(inside, 0.9, 0.02),
        np.where(inside, 0.51, 0.5),  # one half is not inside
        np.where(inside, 4.0, -3.0),
        np.where(inside, 0.25, -20.0) + np.where(inside, np.arange(128), 0),  # logits of any size
        np.where(inside, 0.6 + np.arange(128) / 1000, np.arange(128) / 1000),  # a mean of samples
        PIL.Image.fromarray(inside),
        torch.from_numpy(inside),
    ):
        assert equal(processor(image, input_masks=[[mask]]), expected)
    for mask, message in (
        (np.where(inside, np.nan, 0), "a mask prompt must hold finite numbers only"),
        (np.where(inside, np.inf, 0), "a mask prompt must hold finite numbers only"),
        (np.tile(np.arange(128), (100, 1)), "several values from 0 to 127; accepted: 0 and one other value, prob"),
        (np.where(inside, 2, 1), "several values from 1 to 2"),
        (np.full((100, 128), 0.2), "must not be empty: no value of it counts as inside"),
        (np.where(inside, -1, -2), "must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(image, input_masks=[[mask]])


# --------------------------------------------------------------------------------------------------------- readers


def test_readers_masks_are_cut_like_the_image(processor, image):
    """Window (18, 5, 64) and masks of 64 x 64: a pixel is a cell."""
    masks = np.zeros((3, 100, 128), np.uint8)
    masks[0, 30:44, 40:60] = 1
    masks[1, 99, 127] = 1  # outside the window
    inputs = processor(image, input_boxes=[[BOX, [0, 0, 12, 12]]], segmentation_maps=[masks])
    assert inputs["labels"].shape == (2, 1, 3, 64, 64) and inputs["labels"].dtype == torch.float32
    assert inputs["annotated"].dtype == torch.bool
    assert inputs["annotated"].tolist() == [[[True, False, False]], [[False, False, False]]]
    expected = torch.zeros(3, 64, 64)
    expected[0, 30 - 5 : 44 - 5, 40 - 18 : 60 - 18] = 1
    assert torch.equal(inputs["labels"][0, 0], expected) and not inputs["labels"][1].any()


def test_pixels_that_vanish_when_resized_are_annotated(processor):
    """A window of 1024 for masks of 64: one pixel is 1/256 of a cell, a block of 16 is one cell."""
    image, masks = np.zeros((1024, 1024), np.uint8), np.zeros((2, 1024, 1024), bool)
    masks[0, 500, 500] = True
    masks[1, 512:544, 512:544] = True
    inputs = processor(image, input_boxes=[[[128, 128, 896, 896]]], segmentation_maps=masks)
    assert inputs["windows"].tolist() == [[0, 0, 1024]]
    assert inputs["annotated"].tolist() == [[[True, True]]]
    assert inputs["labels"][0, 0, 0].sum() == 0
    rows, columns = torch.nonzero(inputs["labels"][0, 0, 1], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 33, 32, 33)


def test_readers_masks_may_have_any_form(processor, image):
    mask = np.zeros((100, 128), bool)
    mask[30:44, 40:60] = True
    expected = processor(image, input_boxes=[[BOX]], segmentation_maps=[[mask]])
    assert expected["labels"].shape == (1, 1, 1, 64, 64) and expected["labels"].sum() == 14 * 20
    pil = PIL.Image.fromarray(mask)
    for maps in (
        mask,
        [mask],
        mask[None],
        torch.from_numpy(mask),
        mask * 255,
        mask.astype(float),
        pil,
        [pil],
        [[pil]],
    ):
        assert equal(processor(image, input_boxes=[[BOX]], segmentation_maps=maps), expected)
    several = processor([image] * 2, input_boxes=[[BOX], [BOX]], segmentation_maps=[mask, ~mask])  # one reader each
    assert several["labels"].shape == (2, 1, 1, 64, 64)
    assert torch.equal(several["labels"][1], 1 - several["labels"][0])
    assert equal(processor(image, None, [[mask]], None, None, [[BOX]]), expected)  # SamProcessor's own order
    whole = ProbabilisticSamProcessor(256, crop_size=None)
    shared = whole(image, input_boxes=[[BOX, [0, 0, 9, 9]]], segmentation_maps=[np.stack([mask, mask & False])])
    assert shared["labels"].shape == (1, 2, 2, 64, 64)
    assert torch.equal(shared["labels"][:, 0], shared["labels"][:, 1])
    assert shared["annotated"].tolist() == [[[True, False]] * 2]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((9, 9)), r"segmentation_maps of image 0 must have the image's size \(100, 128\), got \(9, 9\)"),
        (np.full((100, 128), 0.5), "must be boolean, 0 and 1, or 0 and 255"),
        (np.tile(np.arange(128) % 3, (100, 1)), "must be boolean, 0 and 1, or 0 and 255"),
        (np.full((100, 128), np.nan), "must be boolean, 0 and 1, or 0 and 255"),
        (np.zeros((0, 100, 128)), "segmentation_maps of image 0 hold no mask"),
        (np.zeros((2, 1, 100, 128)), "segmentation_maps are for 2 images, but there are 1"),
        ("masks.png", r"must be nested lists of numbers.*\[image\]\[reader\] masks \(H, W\)"),
        (7, "must be nested lists of numbers"),
    ],
)
def test_wrong_readers_masks_are_named(processor, image, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(image, input_boxes=[[BOX]], segmentation_maps=maps)


def test_images_of_one_call_must_have_the_same_number_of_readers(processor, image):
    mask = np.zeros((100, 128))
    with pytest.raises(ValueError, match=r"different numbers of readers \(1, 2\)"):
        processor([image] * 2, input_boxes=[[BOX], [BOX]], segmentation_maps=[[mask], [mask, mask]])


def test_a_model_trains_on_outputs_of_the_processor(image):
    """The shipped architecture is tested with the pipeline."""
    mask = np.zeros((100, 128), bool)
    mask[30:44, 40:60] = True
    inputs = ProbabilisticSamProcessor(SIZE, 24)(image, input_boxes=[[BOX]], segmentation_maps=[[mask, mask & False]])
    assert inputs.pop("annotated").tolist() == [[[True, False]]]
    assert torch.isfinite(tiny_model()(**inputs).loss)


# ---------------------------------------------------------------------------------------------------------- pixels


def files_of(kind):
    """An image file (PNG or TIFF) and the array (H, W) or (H, W, 3) that it contains."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    colour = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    options, expected = {}, colour
    if kind == "orientation":  # 6: the file lies on its left side
        image, expected = PIL.Image.fromarray(colour), np.rot90(colour, -1)
        options["exif"] = PIL.Image.Exif()
        options["exif"][0x0112] = 6
    elif kind == "palette":
        image = PIL.Image.fromarray(colour).quantize(16)
        options["transparency"], expected = 3, np.asarray(image.convert("RGB"))
    elif kind == "transparent":
        image = PIL.Image.fromarray(np.concatenate([colour, grey[..., None]], axis=-1))
    elif kind == "grey with alpha":
        image, expected = PIL.Image.merge("LA", [PIL.Image.fromarray(grey)] * 2), grey
    elif kind == "1 bit":
        image, expected = PIL.Image.fromarray(grey > 99), np.where(grey > 99, 255, 0)
    elif kind == "16 bit":
        expected = grey.astype(np.uint16) * 200 + 3
        image = PIL.Image.fromarray(expected)
    elif kind == "float":
        expected = grey.astype(np.float32) / 7 - 1000
        image, options["format"] = PIL.Image.fromarray(expected), "TIFF"
    else:
        image = PIL.Image.fromarray(colour)
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue(), expected


KINDS = ("colour", "orientation", "palette", "transparent", "grey with alpha", "1 bit", "16 bit", "float")


def forms_of(content, folder):
    """All forms in which a file may be given."""
    text, path = base64.b64encode(content).decode(), folder / "image.file"
    path.write_bytes(content)
    return (
        path, str(path), content, bytearray(content), io.BytesIO(content), PIL.Image.open(io.BytesIO(content)), text,
        "data:image/png;base64," + text, "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_same_in_every_form(processor, tmp_path, kind):
    content, array = files_of(kind)
    expected = processor(array.copy(), input_boxes=[[[5, 5, 25, 30]]])
    for form in forms_of(content, tmp_path):
        assert equal(processor(form, input_boxes=[[[5, 5, 25, 30]]]), expected), type(form)
    with (tmp_path / "image.file").open("rb") as file:  # stays open
        for _ in range(2):
            assert equal(processor(file, input_boxes=[[[5, 5, 25, 30]]]), expected)


def test_files_that_are_not_images_give_one_short_line(processor, tmp_path):
    content, _ = files_of("colour")
    (tmp_path / "text.png").write_text("hello")
    frames = [PIL.Image.new("L", (8, 8), value) for value in (0, 1)]
    frames[0].save(tmp_path / "stack.tiff", save_all=True, append_images=frames[1:])
    secret = "c2VjcmV0" * 4000
    for image, message in (
        (secret, "the image is not an image; accepted: PNG"),
        (secret + "!", "image c2VjcmV0.* cannot be read .no such file, and not base64.; accepted: PNG"),
        ("data:image/png;base64," + secret, "the image is not an image"),
        ("data:image/png," + secret, "data URL without base64"),
        ("missing.png", "image missing.png cannot be read .no such file"),
        ("https://example.org/slice.png", "the image is a URL, which is not fetched; accepted: PNG"),
        (tmp_path / "missing.png", "cannot be read .No such file"),
        (tmp_path, "cannot be read .Is a directory"),
        (secret.encode(), "the image is not an image"),
        (content[:-2000], "the image cannot be read"),
        (PIL.Image.open(io.BytesIO(content[:-2000])), "the image cannot be read"),
        (PIL.Image.open(tmp_path / "stack.tiff"), "the image holds 2 frames"),
        (tmp_path / "stack.tiff", "holds 2 frames"),
        ({"path": secret}, "an image must be a file, a PIL image or an array of numbers, got dict"),
        (np.array(["a", "b"]), "an image must be a file, a PIL image or an array of numbers, got ndarray"),
        (None, "no images are given"),
        ([], "the list of images is empty"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            processor(image, input_boxes=[[[1, 1, 5, 5]]])
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    with (tmp_path / "text.png").open() as file, pytest.raises(ValueError, match="opened as text"):
        processor(file, input_boxes=[[[1, 1, 5, 5]]])


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated:UserWarning")
def test_damaged_orientation_tags_are_one_line_or_none():
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    PIL.Image.new("RGB", (40, 30)).save(file, format="JPEG", exif=exif)
    content = file.getvalue()
    assert open_image(content).size == (30, 40)
    refused = 0
    for position in range(content.index(b"Exif"), content.index(b"words")):
        for value in (5, 10, 12):  # including fractions and floating-point numbers
            damaged = content[:position] + bytes([value]) + content[position + 1 :]
            try:
                open_image(damaged)
            except ValueError as error:
                refused += 1
                assert "cannot be read" in str(error) and "\n" not in str(error)
    assert refused


def test_files_need_pillow_and_arrays_do_not(processor, image, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # importing it fails
    assert processor(image, input_boxes=[[BOX]])["windows"].tolist() == [[18, 5, 64]]
    with pytest.raises(ImportError, match="reading image files needs Pillow"):
        processor(tmp_path / "slice.png", input_boxes=[[BOX]])


def test_messages_are_short_for_any_argument(processor, image):
    for name, value in (
        ("input_boxes", [["x" * 10**6]]),
        ("input_boxes", [[list(range(10**5))]]),
        ("input_points", "y" * 10**6),
        ("input_points", [[[[0, 10**400]]]]),
        ("input_labels", [[1] * 10**5]),
        ("input_masks", [[["z" * 10**6]]]),
        ("w" * 10**6, 1),
        ("do_pad", "v" * 10**6),
        ("device", "u" * 10**6),
        ("return_tensors", "t" * 10**6),
    ):
        prompts = {"input_points": [[[[50, 40]]]], name: value}
        with pytest.raises(ValueError) as caught:
            processor(image, **prompts)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


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


def test_colours_are_not_mixed(processor):
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
    image = np.full((64, 64), -1000.0)
    image[20, 20] = 200.0
    pixels = grey(processor(image, input_boxes=[[[0, 0, 16, 16]]])["pixel_values"])[0]  # window (-24, -24)
    assert torch.allclose(pixels[:24], torch.zeros(24, 64), atol=1e-3)
    assert pixels[44, 44].item() == pytest.approx(255, abs=1e-3)  # pixel (20, 20)


def test_percentiles_are_those_inside_the_image():
    image = np.arange(64.0 * 64).reshape(64, 64)
    processor = ProbabilisticSamProcessor(64, 64, stretch_percentiles=(25, 75))
    pixels = grey(processor(image, input_boxes=[[[0, 0, 16, 16]]])["pixel_values"])[0]  # window (-24, -24)
    low, high = np.percentile(image[:40, :40], [25, 75])
    expected = np.clip((image[:40, :40] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(pixels[24:, 24:], expected, atol=1e-2)


def test_colours_are_normalised_as_imagenet():
    np.testing.assert_allclose(IMAGENET_MEAN, np.array(IMAGENET_DEFAULT_MEAN) * 255)
    np.testing.assert_allclose(IMAGENET_STD, np.array(IMAGENET_DEFAULT_STD) * 255)


def test_stripes_narrower_than_a_pixel_become_grey():
    stripes = np.tile([1.0, 0, 0, 1], (128, 32))
    processor = ProbabilisticSamProcessor(32, 128, stretch_percentiles=(0, 100))
    pixels = grey(processor(stripes, input_boxes=[[[40, 40, 88, 88]]])["pixel_values"])[0]
    assert (pixels[:, 2:-2] - 127.5).abs().max() < 8


def test_outside_of_the_window_the_mean_is_zero():
    processor = ProbabilisticSamProcessor(64, 16)
    window, size = torch.tensor([[8, 8, 16]]), torch.tensor([[32, 32]])
    (result,) = processor.post_process_samples(torch.full((1, 1, 2, 16, 16), 9.0), window, size)
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[8:24, 8:24] = False
    assert result["mean"][outside].max() < 1e-9 and result["entropy"][outside].max() < 1e-6


def test_constant_image_has_no_nan(processor):
    pixels = processor(np.full((64, 64), 1000), input_boxes=[[[10, 10, 20, 20]]])["pixel_values"]
    assert torch.isfinite(pixels).all()


# ------------------------------------------------------------------------------------------------------ post-process


def test_mask_returns_to_its_place(processor, image):
    inputs = processor(image, input_boxes=[[BOX]])
    logits = torch.full((1, 1, 2, 64, 64), -10.0)
    logits[..., 25:39, 22:42] = 10.0
    (pasted,) = processor.post_process_logits(logits, inputs["windows"], inputs["original_sizes"])
    expected = np.zeros((2, 100, 128), bool)
    expected[:, 30:44, 40:60] = True
    assert ((pasted > 0).numpy() == expected).all()
    assert (pasted[:, :5] == OUTSIDE_LOGIT).all() and (pasted[:, 5:69, 18:82] != OUTSIDE_LOGIT).all()


def test_box_of_a_pasted_mask_is_the_prompt(processor, image):
    """A mask that fills the prompt box at image_size / 4, for boxes inside the image and at its border."""
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


def test_fine_masks_are_averaged_when_they_shrink(processor):
    """4 columns to 2: a triangle 2 columns wide on either side of the new centre, as with an input of 512 px."""
    logits = torch.tensor([7.0, 0.0, 0.0, 0.0]).expand(1, 1, 1, 4, 4)
    (pasted,) = processor.post_process_logits(logits, torch.tensor([[0, 0, 2]]), torch.tensor([[2, 2]]))
    torch.testing.assert_close(pasted[0], torch.tensor([[3.0, 0.0], [3.0, 0.0]]))  # 7 * .75 / (.75 + .75 + .25)


def square_logits(*sides):
    """(1, 1, N, 8, 8): confident squares with these sides."""
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
    wide = {"windows": torch.tensor([[0, 0, 8]]), "original_sizes": torch.tensor([[20, 20]])}
    (result,) = processor.post_process_samples(square_logits(0, 2), **wide, threshold=1e-14)
    assert result["areas"][0] == 0 and 0 < result["areas"][1] <= 64  # not the pixels outside the window


def test_areas_given_presence_by_hand(processor):
    samples, outlines = square_logits(0, 2, 2, 4), square_logits(3, 2, 2, 4)
    presence = torch.tensor([[0.7]])
    (result,) = processor.post_process_samples(
        samples, **PLACE, pixel_spacing_mm=0.5, outline_masks=outlines, presence=presence
    )
    assert result["presence"] == pytest.approx(0.7) and result["empty_share"] == 0.25
    assert result["areas"].tolist() == [0, 1, 1, 4]
    assert result["areas_given_presence"].tolist() == [2.25, 1, 1, 4]
    assert result["outlines"].sum(dim=(1, 2)).tolist() == [9, 4, 4, 16]
    # Between 1, 1, 2.25, 4 at 0, 1/3, 2/3, 1
    expected = {"0.05": 1.0, "0.25": 1.0, "0.5": 1.625, "0.75": 2.6875, "0.95": 3.7375}
    assert result["area_quantiles_given_presence"] == pytest.approx(expected, abs=1e-5)
    # A model without presence: its samples that are not empty
    (result,) = processor.post_process_samples(samples, **PLACE)
    assert result["presence"] == 0.75 and result["areas_given_presence"].tolist() == [4, 4, 16]
    assert result["area_quantiles_given_presence"]["0.5"] == 4


@pytest.mark.parametrize("given", [{}, {"presence": torch.tensor([[0.009]]), "outline_masks": square_logits(3, 3)}])
def test_nothing_is_invented_where_hardly_anyone_would_annotate(processor, given):
    (result,) = processor.post_process_samples(square_logits(0, 0), **PLACE, **given)
    assert result["presence"] < 0.01 and result["outlines"].shape == (0, 8, 8)
    assert result["areas_given_presence"].tolist() == [] and result["area_quantiles_given_presence"] is None
    assert result["areas"].tolist() == [0, 0] and result["area_quantiles"]["0.5"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presence": torch.tensor([0.5])}, r"presence must have the shape \(1, 1\), got \(1,\)"),
        ({"outline_masks": square_logits(2)}, r"outline_masks must have the shape \(1, 1, 2, 8, 8\)"),
        ({"presence": torch.tensor([[math.nan]])}, "not finite"),
    ],
)
def test_presence_and_outlines_that_do_not_fit_are_refused(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_samples(square_logits(0, 2), **PLACE, **given)


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


def test_spacing_is_one_number_or_one_per_prompt(processor):
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


def test_model_accepts_outputs_of_the_processor(image):
    processor, model = ProbabilisticSamProcessor(SIZE, 24), tiny_model()
    inputs = processor(image, input_boxes=[[BOX, [0, 0, 9, 9]]], input_points=[[[[50, 37]], [[1, 2], [3, 4]]]])
    output = model.sample(**inputs, num_samples=3)
    results = processor.post_process_samples(output.pred_masks, inputs["windows"], inputs["original_sizes"])
    assert [result["masks"].shape for result in results] == [(3, 100, 128)] * 2
    with torch.no_grad():
        assert model(**inputs, num_samples=3).pred_masks.shape == output.pred_masks.shape


def test_results_have_no_gradients(processor, image):
    inputs = processor(image, input_boxes=[[BOX]])
    place = inputs["windows"], inputs["original_sizes"]
    logits = torch.randn(1, 1, 2, 64, 64, requires_grad=True)
    (result,) = processor.post_process_samples(logits, *place)
    assert not any(value.requires_grad for value in result.values() if isinstance(value, torch.Tensor))
    assert not processor.post_process_logits(logits, *place)[0].requires_grad
    assert not processor.post_process_masks(logits, *place[::-1], binarize=False)[0].requires_grad
    result["mean"].numpy()  # would raise with gradients


def test_sam_names_for_pasting_masks_back(processor, image):
    inputs = processor([image, image[:90]], input_boxes=[[BOX], [BOX]])
    logits = torch.randn(2, 1, 3, 64, 64)
    sizes, windows = inputs["original_sizes"], inputs["windows"]
    expected = processor.post_process_logits(logits, windows, sizes)
    for owner in (processor, processor.image_processor):
        masks = owner.post_process_masks(logits, sizes, windows)
        assert [mask.shape for mask in masks] == [(1, 3, 100, 128), (1, 3, 90, 128)] and masks[0].dtype == torch.bool
        assert all(torch.equal(mask[0], pasted > 0) for mask, pasted in zip(masks, expected, strict=True))
    higher = processor.post_process_masks(logits, sizes.tolist(), windows.tolist(), mask_threshold=1.0)
    assert torch.equal(higher[1][0], expected[1] > 1)
    (raw, _) = processor.post_process_masks(logits, sizes, windows, binarize=False)
    assert torch.equal(raw[0], expected[0])
    for arguments in ((sizes,), (sizes, torch.tensor([[256, 256]] * 2)), (sizes, windows, 0.0, True)):
        options = {"reshaped_input_sizes": sizes} if len(arguments) == 4 else {}
        with pytest.raises(ValueError, match="give the windows .* in place of reshaped_input_sizes"):
            processor.post_process_masks(logits, *arguments, **options)
    with pytest.raises(KeyError, match="post_process_masks takes windows in their place"):
        inputs["reshaped_input_sizes"]
    for wrong in ((logits[0], windows, sizes), (logits, sizes, windows), (logits, windows[:1], sizes)):
        for function in (processor.post_process_logits, processor.post_process_samples):
            with pytest.raises(
                ValueError, match=r"must have the shapes \(W, P, N, h, w\), \(W, 3\) and \(W, 2\), got"
            ):
                function(*wrong)
    with pytest.raises(AttributeError, match="the processor has no size; it has image_size, crop_size"):
        _ = processor.image_processor.size
    assert not hasattr(processor, "tokenizer")


# ------------------------------------------------------------------------------------------- arguments of SamProcessor


def test_arguments_of_sam_processor_are_accepted_or_refused(processor, image):
    import inspect

    from transformers import SamProcessor
    from transformers.models.sam.processing_sam import SamProcessorKwargs
    from transformers.processing_utils import ImagesKwargs

    expected = processor(image, input_boxes=[[BOX]])
    honoured = {
        "do_resize": True, "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "do_center_crop": False,
        "data_format": "channels_first", "point_pad_value": -10, "do_rescale": False, "return_tensors": "pt",
        "device": "cpu", "disable_grouping": True, "text": None, "size": None,
    }  # fmt: skip
    for name, value in honoured.items():
        assert equal(processor(image, input_boxes=[[BOX]], **{name: value}), expected), name
    scaled = processor(image / 255, input_boxes=[[BOX]], do_rescale=False)
    assert torch.allclose(scaled["pixel_values"], expected["pixel_values"], atol=1e-4)
    moved = processor(image, input_boxes=[[BOX]], device="meta")
    assert {value.device.type for value in moved.values()} == {"meta"}

    names = set(inspect.signature(SamProcessor.__call__).parameters) | set(ImagesKwargs.__annotations__)
    names |= set(SamProcessorKwargs.__annotations__) - {"return_tensors"}
    names |= {"images_kwargs", "padding", "pad_token", "padding_value", "truncation", "videos", "audio", "mask_size"}
    for name in sorted(names - {"self", "kwargs", "images", "do_rescale", "disable_grouping"}):
        prompts = {"input_boxes": [[BOX]], name: "wrong"}
        with pytest.raises(ValueError, match=name.replace("segmentation_maps", "segmentation_maps must be")) as caught:
            processor(image, **prompts)
        assert "\n" not in str(caught.value)
    for name in ("do_resize", "do_normalize", "do_pad", "do_convert_rgb"):
        with pytest.raises(ValueError, match=f"{name} is False; accepted: only True"):
            processor(image, input_boxes=[[BOX]], **{name: False})
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        processor(image, input_boxes=[[BOX]], device="nowhere")


def test_windows_name_their_image():
    inputs = ProbabilisticSamProcessor(32, 16)(
        [np.zeros((40, 40)), np.ones((40, 40))], input_boxes=[[[4, 4, 9, 9], [20, 20, 30, 30]], [[8, 8, 12, 12]]]
    )
    assert inputs["image_indices"].tolist() == [0, 0, 1] and len(inputs["pixel_values"]) == 3


def test_an_image_without_a_prompt_is_accepted_without_crop_size_only(processor, image):
    with pytest.raises(ValueError, match="a prompt must be given: input_boxes, input_points or input_masks"):
        processor(image)
    whole = ProbabilisticSamProcessor(256, crop_size=None)
    inputs = whole(image)  # for embeddings
    assert set(inputs) == {"pixel_values", "windows", "original_sizes", "image_indices"}
    assert torch.equal(inputs["pixel_values"], whole(image, input_boxes=[[BOX]])["pixel_values"])
    with pytest.raises(ValueError, match="a prompt must be given"):
        whole(image, segmentation_maps=np.zeros((100, 128)))


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "a prompt must be given"),
        ({"input_boxes": [[]]}, "image 0 has no prompt"),
        ({"input_boxes": [[BOX], [BOX]]}, "input_boxes are for 2 images, but there are 1"),
        ({"input_boxes": [[[40, 30, 60]]]}, r"four finite numbers x1, y1, x2, y2, got \[40.0, 30.0, 60.0\]"),
        ({"input_boxes": [[[40, 30, 60, float("nan")]]]}, "four finite numbers"),
        ({"input_boxes": [[["a", 30, 60, 44]]]}, "input_boxes must be nested lists of numbers"),
        ({"input_boxes": 3}, r"input_boxes must be nested lists of numbers.* \[image\]\[prompt\]\[x1, y1.* got 3$"),
        ({"input_boxes": [3]}, r"a box must be four finite numbers x1, y1, x2, y2, got \[3.0\]"),
        ({"input_boxes": [[[BOX]]]}, r"input_boxes must be .*\[image\]\[prompt\]\[x1, y1, x2, y2\], got \[\[\[\[40"),
        ({"input_boxes": "all"}, "input_boxes must be nested lists of numbers"),
        ({"input_boxes": [BOX, [BOX]]}, "input_boxes must be nested lists of numbers"),
        ({"input_boxes": []}, "input_boxes are for 0 images, but there are 1"),
        ({"input_boxes": [[[60, 30, 40, 44]]]}, "has no area: x2 must exceed x1"),
        ({"input_boxes": [[[40, 30, 60, 30]]]}, "has no area"),
        (
            {"input_boxes": [[[-1, 30, 60, 44]]]},
            "x -1, y 30 of a prompt lies outside the image of 128 x 100 pixels",
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
        (
            {"input_points": [[[[20, 30]]]], "input_labels": [[[2]]]},
            "labels must be 1 .inside., 0 .outside., -1 or -10",
        ),
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


def test_whole_images_need_the_same_number_of_prompts(image):
    processor = ProbabilisticSamProcessor(256, crop_size=None)
    with pytest.raises(ValueError, match="same number of input_boxes, got 1, 2"):
        processor([image, image], input_boxes=[[BOX], [BOX, BOX]])
    with pytest.raises(ValueError, match="a window takes one mask prompt"):
        processor(image, input_masks=[np.ones((2, 100, 128))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "image_size must be a positive multiple of 16, got 100"),
        ({"image_size": 0}, "got 0"),
        ({"crop_size": 1}, "crop_size must be a whole number of 2 pixels or more, or None for the whole image, got 1"),
        ({"crop_size": 64.0}, "crop_size must be a whole number .* got 64.0"),
        ({"image_size": "256"}, "image_size must be a positive multiple of 16, got '256'"),
        ({"stretch_percentiles": (99, 1)}, r"two ascending numbers in 0..100, got \(99, 1\)"),
        ({"stretch_percentiles": 5}, "two ascending numbers in 0..100, got 5"),
        ({"stretch_percentiles": (1, 2, 3)}, r"two ascending numbers in 0..100, got \(1, 2, 3\)"),
        ({"stretch_percentiles": ("a", "b")}, r"two ascending numbers in 0..100, got \('a', 'b'\)"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ProbabilisticSamProcessor(**settings)


def test_sizes_may_be_integers_of_numpy():
    processor = ProbabilisticSamProcessor(np.int64(32), np.int64(24), np.array([1, 98]))
    settings = [processor.image_size, processor.crop_size, processor.stretch_percentiles]
    assert json.dumps(settings) == "[32, 24, [1.0, 98.0]]"


# ---------------------------------------------------------------------------------------------------- save and load


def test_missing_settings_are_not_replaced_by_default_ones(tmp_path):
    with pytest.raises(OSError, match="has no processor_config.json of a ProbabilisticSamProcessor"):
        ProbabilisticSamProcessor.from_pretrained(tmp_path)
    SamProcessor(SamImageProcessor()).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has no processor_config.json of a ProbabilisticSamProcessor"):
        ProbabilisticSamProcessor.from_pretrained(tmp_path)


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
