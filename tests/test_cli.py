"""The command `probabilistic-sam`: the files it writes, and one-line errors for bad input."""

import csv
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from deep_colour import rgb16_png, rgb16_ppm, rgb16_tiff
from dicom_files import write_slice
from forked import run_forked
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from transformers import SamConfig, SamModel, pipeline

from probabilistic_sam import (
    ProbabilisticSamConfig,
    ProbabilisticSamModel,
    ProbabilisticSamProcessor,
    cli,
    images,
    inference,
    processing_probabilistic_sam,
    results,
    segment,
)
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.processing_image_files import open_image

IMAGE_SIZE = 64


def tiny_config():
    return {
        # with the default of 1e-10 all image embeddings would be zero
        "vision_config": {
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32,
            "image_size": IMAGE_SIZE, "global_attn_indexes": [0], "num_pos_feats": 8, "window_size": 0,
            "initializer_range": 0.02,
        },
        "prompt_encoder_config": {"hidden_size": 16, "image_size": IMAGE_SIZE, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
            "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = ProbabilisticSamModel(ProbabilisticSamConfig(**tiny_config(), latent_dim=4, latent_hidden_size=16))
    with torch.no_grad():  # so that samples differ visibly
        model.latent_proj[-1].weight.mul_(100)
    model.save_pretrained(path)
    ProbabilisticSamProcessor(image_size=IMAGE_SIZE, crop_size=32).save_pretrained(path)
    return path


@pytest.fixture
def image_path(tmp_path):
    path = tmp_path / "slice.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 60), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def run_segment(image_path, model_dir, tmp_path):
    box = ("--box", "10", "12", "30", "28")

    def run(*extra, image=image_path, prompt=box, output=tmp_path / "out", model=model_dir):
        given = ["segment", image, *prompt, "--output", output, *(["--model", model] if model else []), *extra]
        cli.main([str(item) for item in given if item is not None])
        return Path(output)

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sampled_masks(folder, name="masks"):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / name).iterdir())])


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------------------------------------------------- results


def test_small_areas_keep_their_digits(run_segment):
    result = result_of(run_segment("--pixel-spacing", 0.00065, "--num-samples", 5))  # 0.65 micrometres
    expected = np.array(result["area_px"]["samples"]) * 0.00065**2
    assert expected.any() and result["area_mm2"]["samples"] == pytest.approx(expected, rel=1e-3)
    assert result["area_mm2"]["mean"] == pytest.approx(expected.mean(), rel=1e-3)
    assert results.shortened(1234567.0) == 1234567 and results.shortened(12.34567) == 12.3457


def test_nifti_of_one_slice_gives_the_masks_of_the_image(run_segment, image_path, tmp_path):
    pixels = np.asarray(Image.open(image_path))
    path, mask = tmp_path / "slice.nii.gz", tmp_path / "mask.nii"
    for target, values in ((path, pixels.T[:, :, None]), (mask, (pixels.T > 99).astype(np.uint8))):
        image = nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 3, 1]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, target)
    expected = run_segment("--num-samples", 3, output=tmp_path / "png")
    found = run_segment("--num-samples", 3, image=path, output=tmp_path / "nifti")
    assert (sampled_masks(found) == sampled_masks(expected)).all() and sampled_masks(found).any()
    assert result_of(found)["pixel_spacing_mm"] == 0.5
    run_segment("--num-samples", 1, image=path, prompt=("--mask", mask), output=tmp_path / "with_mask")
    with pytest.raises(UserError, match="mask.nii is a mask of .*slice.png; accepted: both NIfTI, or neither"):
        run_segment(prompt=("--mask", mask))


def test_names_of_files_are_no_mathematics(run_segment, image_path, tmp_path):
    path = image_path.with_name("a$x^$b.png")
    shutil.copy(image_path, path)
    run_segment("--num-samples", 2, image=path)


def test_masks_maps_and_areas_are_consistent(run_segment, capsys):
    out = run_segment("--num-samples", 12, "--pixel-spacing", 0.5, "--seed", 3)
    assert {path.name for path in out.iterdir()} == {Path(name).parts[0] for name in results.RESULT_FILES}
    files = sorted((out / "masks").iterdir())
    assert [path.name for path in files] == [f"sample-{index:02d}.png" for index in range(12)]
    images = [Image.open(path) for path in files]
    assert {(image.mode, image.size) for image in images} == {("1", (60, 48))}
    masks = np.stack([np.asarray(image) for image in images])

    result = json.loads((out / "result.json").read_text())
    areas = masks.sum((1, 2))
    assert result["area_px"]["samples"] == areas.tolist()
    assert result["area_px"]["quantiles"]["0.5"] == pytest.approx(np.median(areas))
    assert result["area_mm2"]["mean"] == pytest.approx(areas.mean() / 4)
    assert result["empty_share"] == pytest.approx((areas == 0).mean())
    assert 0 < result["empty_share"] < 1  # with this seed some samples are empty and some are not
    assert (result["seed"], result["num_samples"], result["prompt"]) == (3, 12, {"box": [10.0, 12.0, 30.0, 28.0]})

    mean, entropy = (np.asarray(Image.open(out / name)) for name in ("mean.png", "uncertainty.png"))
    assert mean.dtype == entropy.dtype == np.uint16
    assert mean.shape == entropy.shape == (48, 60)
    probability = mean / 65535
    never = ~masks.any(0)
    assert probability[never].max() <= 0.5  # no sample exceeds a probability of one half there
    expected = -(probability * np.log2(probability + 1e-12) + (1 - probability) * np.log2(1 - probability + 1e-12))
    assert np.abs(entropy / 65535 - expected).max() < 2e-3
    assert Image.open(out / "figure.png").width == 1600

    outlines = sampled_masks(out, "outlines")
    assert outlines.shape == masks.shape and np.array_equal(outlines[areas > 0], masks[areas > 0])
    outlined, empty = result["area_mm2_given_presence"], round(12 * result["empty_share"])
    assert outlined["samples"] == (outlines.sum((1, 2)) / 4).tolist()
    assert abs(1 - result["presence"] - result["empty_share"]) <= 1 / 12 + 1e-6
    median, low, high = (f"{np.quantile(outlined['samples'], level):.4g}" for level in (0.5, 0.05, 0.95))
    assert capsys.readouterr().out == (
        f"wrote {out}: presence {result['presence'] * 100:.0f} %; area if outlined: median {median} mm2 (90 % "
        f"interval {low} to {high}); {empty} of 12 samples empty; see figure.png, result.json\n"
    )


def test_areas_given_presence_are_left_out_where_hardly_anyone_would_annotate(tmp_path):
    nothing = np.zeros((3, 8, 8), dtype=bool)
    sampled = inference.SampledMasks(
        0.004,
        nothing[:0],
        nothing,
        np.zeros((8, 8)),
        np.zeros((8, 8)),
        np.zeros(3),
        1.0,
        {"box": [1, 1, 5, 5]},
        0,
        0.5,
    )
    result = results.write_result(tmp_path, np.arange(64.0).reshape(8, 8), sampled, "slice.png", "model", 0.5)
    assert result["area_px_given_presence"] is result["area_mm2_given_presence"] is None
    assert result["presence"] == 0.004 and result["area_px"]["quantiles"]["0.95"] == 0
    assert results.result_words(result) == (
        "presence below 1 %; too few readers would outline a lesion to say how large; 3 of 3 samples empty"
    )
    assert sampled.shown is nothing and not list((tmp_path / "outlines").iterdir())


def test_samples_of_the_shipped_weights_given_presence_are_never_empty():
    model, processor = inference.load_model(inference.DEFAULT_MODEL)
    folder = Path(inference.__file__).parent / "hub" / "examples"
    for example in json.loads((folder / "examples.json").read_text())["images"]:
        image = np.asarray(Image.open(folder / example["image"]))
        sampled = inference.sample_image(model, processor, image, {"box": example["box"]}, 16)
        assert sampled.outlines.any((1, 2)).all() and len(sampled.outlines) == 16
        assert abs(1 - sampled.presence - sampled.empty_share) <= 1 / 16 + 1e-6


def test_the_same_seed_gives_the_same_files_and_another_seed_others(run_segment, tmp_path):
    first = contents(run_segment("--num-samples", 3, output=tmp_path / "a"))
    again = contents(run_segment("--num-samples", 3, output=tmp_path / "b"))
    other = contents(run_segment("--num-samples", 3, "--seed", 1, output=tmp_path / "c"))
    assert first == again
    assert first["mean.png"] != other["mean.png"]


def test_a_box_may_leave_the_image_by_less_than_a_pixel(run_segment, tmp_path):
    given = contents(run_segment("--num-samples", 3, prompt=("--box", "-0.4", "0", "60.5", "48.9")))
    clipped = contents(run_segment("--num-samples", 3, prompt=("--box", 0, 0, 60, 48), output=tmp_path / "b"))
    assert given["mean.png"] == clipped["mean.png"]


def test_colour_images_are_sampled_in_colour(run_segment, model_dir, tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    out = run_segment("--num-samples", 3, image=tmp_path / "colour.png")
    model, processor = inference.load_model(model_dir)
    sampled = inference.sample_image(model, processor, colour, {"box": [10, 12, 30, 28]}, 3, 0)
    assert np.array_equal(sampled_masks(out), sampled.masks)
    assert json.loads((out / "result.json").read_text())["image_size"] == {"width": 60, "height": 48}
    grey = inference.sample_image(model, processor, images.luminance(colour), {"box": [10, 12, 30, 28]}, 3, 0)
    assert not np.array_equal(grey.mean, sampled.mean)
    panel = np.asarray(Image.open(out / "figure.png").convert("RGB"))[150:400, 50:300].reshape(-1, 3)  # in the slice
    assert len({*map(tuple, panel)} & {*map(tuple, colour.reshape(-1, 3))}) > 0.3 * colour.size / 3


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", rgb16_png()), ("a.tif", rgb16_tiff()), ("a.ppm", rgb16_ppm())]
)
def test_colour_of_more_than_8_bits_is_refused(run_segment, tmp_path, name, content):
    """Pillow would silently read 8 of the 16 bits; all entrances read files with `open_image`."""
    (tmp_path / name).write_bytes(content)
    message = (
        "more than 8 bits per channel in colour or with transparency; accepted: grey of 8 or 16 bits, colour of 8"
    )
    with pytest.raises(UserError, match=message):
        run_segment(image=tmp_path / name)
    for given in (content, Image.open(tmp_path / name)):
        with pytest.raises(ValueError, match=message):
            open_image(given)


def test_points_are_repeatable(run_segment):
    out = run_segment("--num-samples", 2, prompt=("--point", "20", "20", "--point", "25.5", "21"))
    assert json.loads((out / "result.json").read_text())["prompt"] == {"points": [[20.0, 20.0], [25.5, 21.0]]}


def test_postprocessing_in_chunks_gives_the_same_result(run_segment, tmp_path, monkeypatch):
    whole = contents(run_segment("--num-samples", 7, output=tmp_path / "a"))
    monkeypatch.setattr(processing_probabilistic_sam, "CHUNK_PIXELS", 2 * 48 * 60)
    parts = contents(run_segment("--num-samples", 7, output=tmp_path / "b"))
    assert {name: data for name, data in whole.items() if "masks" in name or "json" in name} == {
        name: data for name, data in parts.items() if "masks" in name or "json" in name
    }
    means = [np.asarray(Image.open(tmp_path / name / "mean.png")).astype(int) for name in "ab"]
    assert np.abs(means[0] - means[1]).max() <= 1


def test_a_second_run_replaces_the_first(run_segment, tmp_path):
    run_segment("--num-samples", 5)
    out = run_segment("--num-samples", 2)
    assert len(list((out / "masks").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"out", "slice.png"}


def test_a_failed_run_keeps_the_earlier_result(run_segment, tmp_path, monkeypatch):
    out = run_segment("--num-samples", 2)
    before = contents(out)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "save_figure", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        run_segment("--num-samples", 3)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "slice.png"}


# ---------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def seen(monkeypatch):
    """Inputs of the model in each call of `sample`."""
    inputs, sample = [], ProbabilisticSamModel.sample

    def record(self, **kwargs):
        inputs.append(kwargs)
        return sample(self, **kwargs)

    monkeypatch.setattr(ProbabilisticSamModel, "sample", record)
    return inputs


def test_a_mask_prompt_reaches_the_model_as_the_processor_prepares_it(run_segment, model_dir, tmp_path, seen):
    mask = np.zeros((48, 60), dtype=np.uint8)
    mask[20:30, 25:40] = 255
    Image.fromarray(mask).save(tmp_path / "rough.png")
    out = run_segment("--num-samples", 3, prompt=("--mask", tmp_path / "rough.png"))
    _, processor = inference.load_model(model_dir)
    expected = processor(images=np.asarray(Image.open(tmp_path / "slice.png")), input_masks=[[mask > 0]])
    assert set(seen[0]) - {"num_samples", "generator", "image_indices"} == {"pixel_values", "input_masks"}
    torch.testing.assert_close(seen[0]["input_masks"], expected["input_masks"], rtol=0, atol=0)
    torch.testing.assert_close(seen[0]["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    assert result_of(out)["prompt"] == {"mask": str(tmp_path / "rough.png")}


@pytest.mark.parametrize("kind", ["1", "RGB", "P", "tiff", "DICOM"])
def test_masks_are_read_like_images(run_segment, tmp_path, seen, kind):
    inside = np.zeros((48, 60), dtype=bool)
    inside[20:30, 25:40] = True
    path = tmp_path / "mask.png"
    if kind == "tiff":  # probabilities: inside above one half
        path = tmp_path / "mask.tiff"
        Image.fromarray(np.where(inside, 0.75, 0.25).astype(np.float32)).save(path)
    elif kind == "DICOM":
        path = write_slice(tmp_path / "mask", inside.astype(int), "1.2", 0.0, "1.3")
    else:
        Image.fromarray(inside).convert("L").convert(kind).save(path)
    run_segment("--num-samples", 1, prompt=("--mask", path))
    Image.fromarray(inside).save(tmp_path / "plain.png")
    run_segment("--num-samples", 1, prompt=("--mask", tmp_path / "plain.png"), output=tmp_path / "plain")
    assert torch.equal(seen[0]["input_masks"], seen[1]["input_masks"])


def test_bad_masks_are_refused(run_segment, tmp_path):
    values = {
        "10 x 12 pixels; accepted: the 60 x 48": np.ones((12, 10)),
        "must not be empty|is empty": np.zeros((48, 60)),
        "several values": np.arange(48 * 60).reshape(48, 60) % 250,
    }
    for message, mask in values.items():
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match=message):
            run_segment(prompt=("--mask", tmp_path / "mask.png"))
    with pytest.raises(UserError, match="no image file at nowhere.png"):
        run_segment(prompt=("--mask", "nowhere.png"))
    assert not (tmp_path / "out").exists()


def test_box_points_and_mask_are_one_prompt_and_negative_points_have_the_label_0(run_segment, tmp_path, seen):
    mask = np.zeros((48, 60), dtype=np.uint8)
    mask[14:26, 12:28] = 1
    Image.fromarray(mask).save(tmp_path / "rough.png")
    box, more = ("--box", "10", "12", "30", "28"), ("--point", "20", "20", "--point", "22", "18")
    out = run_segment(
        "--num-samples", 2, "--negative-point", 29, 27, "--mask", tmp_path / "rough.png", prompt=(*box, *more)
    )
    (inputs,) = seen
    # The window is laid around the box: side 32, its centre (20, 20) in the centre; 2 pixels of the model per pixel
    assert inputs["input_boxes"].tolist() == [[[12, 16, 52, 48]]]
    assert inputs["input_points"].tolist() == [[[[32, 32], [36, 28], [50, 46]]]]
    assert inputs["input_labels"].tolist() == [[[1, 1, 0]]]
    assert inputs["input_masks"].shape == (1, 1, 16, 16)
    assert result_of(out)["prompt"] == {
        "box": [10, 12, 30, 28],
        "points": [[20, 20], [22, 18]],
        "negative_points": [[29, 27]],
        "mask": str(tmp_path / "rough.png"),
    }


def test_the_figure_shows_negative_points_and_the_mask(run_segment, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path: figures.append(figure))
    mask = np.zeros((48, 60), dtype=np.uint8)
    mask[14:16, 12:15] = 1
    Image.fromarray(mask).save(tmp_path / "rough.png")
    prompt = ("--point", "20", "18", "--negative-point", "29", "27", "--mask", tmp_path / "rough.png")
    run_segment("--num-samples", 1, prompt=prompt)
    axes = figures[0].axes[0]
    assert axes.texts[0].get_text().startswith("prompt (x: outside)")
    outline, points, negative = axes.collections
    assert points.get_offsets().tolist() == [[20, 18]] and negative.get_offsets().tolist() == [[29, 27]]
    edges = np.concatenate(outline.get_segments())  # two rows of three pixels: ten unit edges, with two ends each
    assert len(edges) == 20 and edges.min(0).tolist() == [12, 14] and edges.max(0).tolist() == [15, 16]


def test_several_boxes_equal_single_runs(run_segment, tmp_path, capsys):
    boxes = [("--box", "10", "12", "30", "28"), ("--box", "31.5", "20", "50", "44")]
    out = run_segment("--num-samples", 3, "--seed", 5, prompt=boxes[0] + boxes[1])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"wrote {out}/box-0", f"wrote {out}/box-1"]
    assert {path.name for path in out.iterdir()} == {"box-0", "box-1"}
    for index, box in enumerate(boxes):
        single = run_segment("--num-samples", 3, "--seed", 5, prompt=box, output=tmp_path / "single")
        assert contents(out / f"box-{index}") == contents(single)


def test_several_boxes_replace_an_earlier_result_of_several_boxes_only(run_segment, tmp_path):
    box = ("--box", "10", "12", "30", "28")
    run_segment("--num-samples", 1, prompt=box * 3)
    out = run_segment("--num-samples", 1, prompt=box * 2)
    assert {path.name for path in out.iterdir()} == {"box-0", "box-1"}
    with pytest.raises(UserError, match="other files .box-0"):
        run_segment("--num-samples", 1, prompt=box)
    (out / "box-notes").mkdir()
    with pytest.raises(UserError, match="other files .box-notes"):
        run_segment("--num-samples", 1, prompt=box * 2)


def test_the_threshold_is_the_one_of_post_process_samples(run_segment, model_dir, image_path, tmp_path):
    model, processor = inference.load_model(model_dir)
    inputs = processor(images=image_path, input_boxes=[[[10, 12, 30, 28]]])
    logits = model.sample(
        pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], num_samples=4,
        generator=torch.Generator().manual_seed(0),
    ).pred_masks  # fmt: skip
    areas = []
    for threshold in (0.3, 0.5, 0.7):
        out = run_segment("--num-samples", 4, "--threshold", threshold, output=tmp_path / str(threshold))
        (expected,) = processor.post_process_samples(
            logits, inputs["windows"], inputs["original_sizes"], threshold=threshold
        )
        assert np.array_equal(sampled_masks(out), expected["masks"].numpy())
        assert result_of(out)["threshold"] == threshold
        areas.append(result_of(out)["area_px"]["mean"])
    assert areas[0] > areas[1] > areas[2]


def test_library_prompts_are_checked(model_dir):
    model, processor = inference.load_model(model_dir)
    image = np.zeros((48, 60), dtype=np.uint8)
    for prompt, message in (
        ({"boxes": [[1, 2, 3, 4]]}, "key 'boxes'; accepted: box, points, negative_points, mask"),
        ({"box": [[1, 2, 3, 4]]}, "the box is not understood; accepted: four finite numbers"),
        ({"box": [1, 2, 3]}, "four finite numbers"),
        ({"points": [1, 2]}, "the points are not understood; accepted: pairs of finite numbers"),
        ({"points": [[1, "a"]]}, "the points are not understood"),
        ({"points": [[1, 2]], "negative_points": [[1, 2, 3]]}, "the negative_points are not understood"),
        ({"mask": np.ones((48, 60, 3))}, "the mask prompt has 3 x 60 x 48"),
    ):
        with pytest.raises(UserError, match=message):
            inference.sample_image(model, processor, image, prompt)
    with pytest.raises(UserError, match="threshold must lie between 0 and 1"):
        inference.sample_image(model, processor, image, {"points": [[5, 5]]}, 1, 0, 1.5)


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.fixture
def table(tmp_path):
    """A table of three boxes in two images, one of them DICOM, with a byte order mark as Excel writes it."""
    folder = tmp_path / "study"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 60), dtype=np.uint8)).save(folder / "images/a.png")
    write_slice(folder / "images/IM1", rng.integers(-1000, 400, (40, 50)), "1.2", 0.0, "1.3", PixelSpacing=[0.5, 0.5])
    text = "image,x1,y1,x2,y2\nimages/a.png,10,12,30,28\n\nimages/a.png, 5,6,20.5,30\nimages/IM1,10,10,30,30\n"
    (folder / "table.csv").write_text(text, encoding="utf-8-sig")
    return folder / "table.csv"


def test_a_table_equals_single_calls(run_segment, table, tmp_path, capsys, monkeypatch):
    loaded, load_model = [], segment.load_model
    monkeypatch.setattr(segment, "load_model", lambda name, **given: loaded.append(name) or load_model(name, **given))
    out = run_segment("--num-samples", 3, "--seed", 2, image=None, prompt=("--prompts", table))
    assert len(loaded) == 1
    assert capsys.readouterr().out == (
        f"wrote {out}: 3 rows of 2 images, 3 samples each; see summary.csv, row-*/figure.png, row-*/result.json\n"
    )
    assert {path.name for path in out.iterdir()} == {"row-0", "row-1", "row-2", "summary.csv"}
    cells = [
        ("images/a.png", "10", "12", "30", "28"),
        ("images/a.png", "5", "6", "20.5", "30"),
        ("images/IM1", "10", "10", "30", "30"),
    ]
    with (out / "summary.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == [
        "row", "image", "x1", "y1", "x2", "y2", "presence", "area_given_presence_median", "area_given_presence_q05",
        "area_given_presence_q95", "area_median", "area_q05", "area_q95", "area_unit", "empty_share",
    ]  # fmt: skip
    for index, (image, *box) in enumerate(cells):
        options = {"image": table.parent / image, "prompt": ("--box", *box), "output": tmp_path / "one"}
        single = run_segment("--num-samples", 3, "--seed", 2, **options)
        assert contents(out / f"row-{index}") == contents(single)
        result = result_of(single)
        unit = "mm2" if image == "images/IM1" else "px"
        outlined, areas = (
            np.array(result[name]["samples"]) * (0.25 if unit == "mm2" else 1)
            for name in ("area_px_given_presence", "area_px")
        )
        assert lines[index][:6] == [str(index), image, *box]
        assert float(lines[index][6]) == result["presence"]
        assert [float(value) for value in lines[index][7:13]] == pytest.approx(
            [np.quantile(item, level) for item in (outlined, areas) for level in (0.5, 0.05, 0.95)], abs=1e-3
        )
        assert lines[index][13] == unit
        assert float(lines[index][14]) == pytest.approx((areas == 0).mean())


def test_a_table_replaces_an_earlier_table_result_only(run_segment, table):
    out = run_segment("--num-samples", 1, image=None, prompt=("--prompts", table))
    table.write_text("image,x1,y1,x2,y2\nimages/a.png,10,12,30,28\n")
    run_segment("--num-samples", 1, image=None, prompt=("--prompts", table))
    assert {path.name for path in out.iterdir()} == {"row-0", "summary.csv"}
    with pytest.raises(UserError, match="other files .summary.csv"):
        run_segment("--num-samples", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nowhere.png,1,2,30,40", "no image file at .*nowhere.png"),
        ("images,1,2,30,40", "no image file at .*images"),
        ("a\0.png,1,2,30,40", "no image file at"),
        (",1,2,30,40", "no image; accepted: a path"),
        ("table.csv,1,2,30,40", "table.csv is not an image"),
        ("images/a.png,1,2,61,40", "box 1 2 61 40 reaches outside the image of 60 x 48 pixels"),
        ("images/a.png,9,2,1,40", "turned around"),
        ("images/a.png,1,2,30,forty", "y2 is 'forty'; accepted: a finite number"),
        ("images/a.png,nan,2,30,40", "x1 is 'nan'"),
        ("images/a.png,1,2,30", "4 cells; accepted: 5"),
        ("images/a.png,1,2,30,40,50", "6 cells; accepted: 5"),
        ('"images/a.png,1,2,30,40', "unexpected end of data"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(run_segment, table, tmp_path, row, message, monkeypatch):
    monkeypatch.setattr(segment, "load_model", lambda name: pytest.fail("the model was loaded"))
    table.write_text(f"image,x1,y1,x2,y2\nimages/a.png,10,12,30,28\n{row}\n")
    with pytest.raises(UserError, match=message) as caught:
        run_segment(image=None, prompt=("--prompts", table))
    assert f"{table}, line 3: " in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the columns .none.; accepted: a CSV file"),
        (b"image,x1,y1,x2,y2\n", "no rows"),
        (b"image,x1,y1,x2\na.png,1,2,3\n", "the columns image,x1,y1,x2; accepted"),
        (b"image,x1,y1,x2,y2,x1\na.png,1,2,3,4,5\n", "the columns image,x1,y1,x2,y2,x1; accepted"),
        (b"image;x1;y1;x2;y2\na.png;1;2;3;4\n", "the columns image;x1;y1;x2;y2; accepted"),
        ("image,x1,y1,x2,y2\n".encode("utf-16"), "cannot be read"),
        (b"image,x1,y1,x2,y2\n" + b"images/a.png,10,12,30,28\n" * 4, "more than 3 rows"),
        (b"#" * 2000, "more than 0 MiB"),
    ],
)
def test_other_tables_are_refused(run_segment, table, tmp_path, content, message, monkeypatch):
    monkeypatch.setattr(segment, "MAX_ROWS", 3)
    monkeypatch.setattr(segment, "MAX_TABLE_BYTES", 1000)
    table.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_segment(image=None, prompt=("--prompts", table))
    assert not (tmp_path / "out").exists()


def test_a_table_goes_without_image_and_prompt(run_segment, table, image_path):
    for image, extra in ((image_path, ()), (None, ("--point", 5, 5)), (None, ("--mask", image_path))):
        with pytest.raises(UserError, match="--prompts takes images and boxes from the table"):
            run_segment(*extra, image=image, prompt=("--prompts", table))
    with pytest.raises(UserError, match="no image given"):
        run_segment(image=None)
    with pytest.raises(UserError, match="no table at nowhere.csv"):
        run_segment(image=None, prompt=("--prompts", "nowhere.csv"))


def test_prompts_with_the_shipped_model_equal_the_pipeline(run_segment, tmp_path):
    examples = EXAMPLES  # phantom slices with their boxes
    images = json.loads((examples / "examples.json").read_text())["images"][:2]
    pipe = pipeline("probabilistic-mask-generation", model=str(inference.DEFAULT_MODEL))
    rows = [",".join(map(str, [examples / item["image"], *item["box"]])) for item in images]
    (tmp_path / "table.csv").write_text("\n".join(["image,x1,y1,x2,y2", *rows]))
    options = {"model": None, "output": tmp_path / "out"}
    run_segment("--num-samples", 2, image=None, prompt=("--prompts", tmp_path / "table.csv"), **options)
    for index, item in enumerate(images):
        (expected,) = pipe(str(examples / item["image"]), boxes=[item["box"]], num_samples=2)
        assert np.array_equal(sampled_masks(tmp_path / f"out/row-{index}"), expected["masks"])

    image = examples / "phantom-1.png"
    prompt = ("--box", 53, 51, 77, 76, "--point", 65, 64, "--negative-point", 78, 60)
    out = run_segment("--num-samples", 2, image=image, prompt=prompt, model=None, output=tmp_path / "points")
    given = {"boxes": [[53, 51, 77, 76]], "points": [[[65, 64], [78, 60]]], "labels": [[1, 0]]}
    (expected,) = pipe(str(image), num_samples=2, **given)
    assert expected["masks"].any() and np.array_equal(sampled_masks(out), expected["masks"])

    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[55:72, 57:73] = 255
    Image.fromarray(mask).save(tmp_path / "rough.png")
    prompt = ("--box", 53, 51, 77, 76, "--mask", tmp_path / "rough.png")
    out = run_segment("--num-samples", 2, image=image, prompt=prompt, model=None, output=tmp_path / "mask")
    inputs = pipe.processor(images=str(image), input_boxes=[[[53, 51, 77, 76]]], input_masks=[[mask]])
    places = inputs.pop("windows"), inputs.pop("original_sizes")
    logits = pipe.model.sample(**inputs, num_samples=2, generator=torch.Generator().manual_seed(0)).pred_masks
    (expected,) = pipe.processor.post_process_samples(logits, *places)
    assert expected["masks"].any() and np.array_equal(sampled_masks(out), expected["masks"].numpy())


# ------------------------------------------------------------------------------------------------------------ device


@pytest.fixture
def computer(monkeypatch):
    """Pretend that the computer has a number of CUDA devices, and MPS or not."""

    def pretend(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_devices_are_chosen_if_the_computer_has_them(computer):
    computer()
    assert [str(inference.choose_device(name)) for name in (None, "cpu")] == ["cpu", "cpu"]
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match=f"device {name} is not available; accepted on this computer: cpu$"):
            inference.choose_device(name)
    computer(cuda=2, mps=True)
    names = (None, "cpu", "cuda", "cuda:1", "mps")
    assert [str(inference.choose_device(name)) for name in names] == ["cuda", "cpu", "cuda", "cuda:1", "mps"]
    for name in ("cuda:2", "cpu:1", "mps:1"):
        with pytest.raises(UserError, match="accepted on this computer: cpu, cuda:0, cuda:1, mps$"):
            inference.choose_device(name)
    for name in ("gpu", "xpu", "", "cuda:-1", "cuda:x", "meta"):
        with pytest.raises(UserError, match="unknown device .*; accepted: cpu, cuda, cuda:1, mps"):
            inference.choose_device(name)


def test_the_device_option_places_the_model(run_segment, computer, tmp_path, monkeypatch):
    computer()
    placed = []
    monkeypatch.setattr(ProbabilisticSamModel, "to", lambda self, device: placed.append(str(device)) or self)
    run_segment("--num-samples", 1, "--device", "cpu")
    assert placed[-1] == "cpu"
    with pytest.raises(UserError, match="device cuda is not available"):
        run_segment("--num-samples", 1, "--device", "cuda", output=tmp_path / "none")
    computer(cuda=2)
    run_segment("--num-samples", 1, "--device", "cuda:1")
    assert placed[-1] == "cuda:1"
    run_segment("--num-samples", 1)
    assert placed[-1] == "cuda"
    assert not (tmp_path / "none").exists()


# -------------------------------------------------------------------------------------------------------------- info


def test_info_describes_the_shipped_model(capsys):
    cli.main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == {"probabilistic_sam", "python", "torch", "transformers"}
    assert facts["device"] == str(inference.choose_device())
    model = ProbabilisticSamModel.from_pretrained(inference.DEFAULT_MODEL)
    assert facts["model"] == {
        "name": str(inference.DEFAULT_MODEL),
        "type": "probabilistic_sam",
        "encoder": "tiny_vit_vision_model",
        "parameters": model.num_parameters(),
        "image_size": 256,
        "crop_size": 64,
        "license": "apache-2.0",
    }
    cli.main(["info"])
    text = capsys.readouterr().out
    assert "11,518,856 parameters" in text and "image size: 256 px; crop size: 64 px" in text
    assert "licence of the weights: apache-2.0" in text


@pytest.mark.parametrize("card", [None, "no metadata", "---\n: [\n---\n", "---\ntags: [a]\n---\n", "---\n- a\n---\n"])
def test_info_without_a_licence_in_the_card(capsys, broken_dir, card):
    if card is not None:
        (broken_dir / "README.md").write_text(card)
    cli.main(["info", "--model", str(broken_dir)])
    assert "licence of the weights: not stated" in capsys.readouterr().out


def test_info_without_a_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "DEFAULT_MODEL", tmp_path / "nowhere")
    cli.main(["info"])
    assert "model: no weights found; give --model" in capsys.readouterr().out
    cli.main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] is None and "install a clone of the repository" in facts["note"]
    with pytest.raises(UserError, match="no model directory"):
        cli.main(["info", "--model", str(tmp_path / "nowhere")])


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "name", ["rgb.png", "rgba.png", "palette.png", "rgb.jpg", "grey.bmp", "grey16.png", "float.tiff"]
)
def test_reads_grey_of_every_kind(tmp_path, name):
    ramp = np.tile(np.arange(60, dtype=np.uint8) * 4, (48, 1))
    image = Image.fromarray(ramp)
    if "grey16" in name:
        image = Image.fromarray(ramp.astype(np.uint16) * 200)
    elif "float" in name:
        image = Image.fromarray(ramp.astype(np.float32) - 1000)
    elif "grey" not in name:
        image = image.convert({"rgb": "RGB", "rgba": "RGBA", "palette": "P"}[name.split(".")[0]])
    image.save(tmp_path / name)
    array = images.load_image(tmp_path / name)
    if name.split(".")[0] in ("rgb", "rgba", "palette"):  # the processor keeps colour, too
        assert array.shape == (48, 60, 3)
        array = images.luminance(array)
    assert array.shape == (48, 60)
    if name == "grey16.png":
        assert (array.dtype, array.max()) == (np.uint16, 59 * 4 * 200)
    elif name == "float.tiff":
        assert array.min() == -1000
    else:
        assert array.dtype == np.uint8
        assert np.abs(array.astype(int) - ramp).max() <= 4


def png_header(width, height):
    """A PNG with the given size in its header and no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no image file"),
        (b"", "not an image"),
        (b"hello", "not an image"),
        (bytes(128) + b"DICM", "DICOM file .* cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start PostScript
        (png_header(8001, 8000), "8001 x 8000 pixels"),
        (png_header(100_000, 100_000), "too large|100000 x 100000"),
        (png_header(100, 100), "cannot be read"),
    ],
)
def test_bad_images_are_refused(tmp_path, data, message):
    path = tmp_path / "image.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        images.load_slice(path)


def test_truncated_stacked_and_infinite_images_are_refused(tmp_path, image_path):
    (tmp_path / "cut.png").write_bytes(image_path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read"):
        images.load_image(tmp_path / "cut.png")
    frames = [Image.new("L", (8, 8), value) for value in (0, 1)]
    frames[0].save(tmp_path / "stack.tiff", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="2 frames"):
        images.load_image(tmp_path / "stack.tiff")
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(UserError, match="NaN"):
        images.load_image(tmp_path / "nan.tiff")
    with pytest.raises(UserError, match="no image file"):
        images.load_image(tmp_path)


def test_segment_reads_dicom_and_its_pixel_spacing(run_segment, tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 400, size=(48, 60))
    path = write_slice(tmp_path / "IM1", hu, "1.2", 0.0, "1.3", PixelSpacing=[0.5, 0.8])
    image, side = images.load_slice(path)
    np.testing.assert_array_equal(image, hu)
    assert side**2 == pytest.approx(0.4)
    result = json.loads((run_segment("--num-samples", 3, image=path) / "result.json").read_text())
    assert result["area_mm2"]["mean"] == pytest.approx(0.4 * result["area_px"]["mean"], abs=1e-3)
    out = run_segment("--num-samples", 3, "--pixel-spacing", 2, image=path, output=tmp_path / "given")
    assert json.loads((out / "result.json").read_text())["pixel_spacing_mm"] == 2


def test_dicom_without_spacing_and_with_inverted_grey_values(tmp_path):
    hu = np.array([[-1000, 0], [100, 400]])
    path = write_slice(tmp_path / "IM1", hu, "1.2", 0.0, "1.3", PhotometricInterpretation="MONOCHROME1")
    image, side = images.load_slice(path)
    assert side is None
    np.testing.assert_array_equal(image, [[400, -600], [-700, -1000]])  # -1000 + 400 - hu


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 2}, "60 x 48 pixels, 2 frames"),
        ({"SamplesPerPixel": 3}, "3 channels"),
        ({"Rows": 40_000, "Columns": 40_000}, "40000 x 40000 pixels"),
        ({"Rows": 0}, "60 x 0 pixels"),
        ({"PixelData": b"short"}, "cannot be read"),
    ],
)
def test_other_dicom_is_refused(tmp_path, tags, message):
    path = write_slice(tmp_path / "IM1", np.zeros((48, 60), dtype=int), "1.2", 0.0, "1.3", **tags)
    with pytest.raises(UserError, match=message):
        images.load_slice(path)


def test_deflated_dicom_is_refused_before_decompression(tmp_path):
    path = write_slice(tmp_path / "IM1", np.zeros((48, 60), dtype=int), "1.2", 0.0, "1.3")
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path)
    with pytest.raises(UserError, match="deflated"):
        images.load_slice(path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    path = write_slice(tmp_path / "IM1", np.zeros((8, 8), dtype=int), "1.2", 0.0, "1.3")
    for missing, module, message, call in (
        ("pydicom", "dicom_slice", "pip install pydicom", lambda: images.load_slice(path)),
        ("gradio", "app", "needs gradio, .* pip install", lambda: cli.main(["demo"])),
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(sys.modules, f"probabilistic_sam.{module}", raising=False)
        with pytest.raises(UserError, match=message):
            call()


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (("--box", "10", "10", "61", "20"), "outside the image of 60 x 48 pixels"),
        (("--box", "-1", "10", "20", "20"), "outside the image"),
        (("--box", "10", "10", "20", "49"), "outside the image"),
        (("--box", "60.2", "10", "60.8", "20"), "outside the image"),
        (("--box", "20", "10", "10", "30"), "turned around"),
        (("--box", "10", "30", "20", "10"), "turned around"),
        (("--box", "10", "10", "10", "30"), "no area"),
        (("--box", "10", "10", "20", "10"), "no area"),
        (("--box", "10", "10", "10.0000001", "10.0000001"), "no area"),
        (("--box", "a", "10", "20", "20"), "'a' is not a finite number"),
        (("--box", "nan", "10", "20", "20"), "not a finite number"),
        (("--box", "10", "10", "1e999", "20"), "not a finite number"),
        (("--box", "10", "10", "20"), "expected 4 arguments"),
        (("--point", "60.5", "10"), "outside the image"),
        (("--point", "5"), "expected 2 arguments"),
        (("--negative-point", "60", "48"), "no box, point or mask"),
        (("--box", "1", "1", "9", "9", "--negative-point", "60.5", "10"), "point 60.5 10 lies outside the image"),
        (("--point", "5", "5") * 33, "33 points; accepted: up to 32"),
        (("--box", "1", "1", "9", "9", "--box", "10", "10", "61", "20"), "box 10 10 61 20 reaches outside"),
        (("--box", "1", "1", "9", "9") * 2 + ("--point", "5", "5"), "2 boxes with points or a mask"),
        (("--box", "1", "1", "9", "9") * 2 + ("--negative-point", "5", "5"), "2 boxes with points or a mask"),
        (("--box", "1", "1", "9", "9") * 2 + ("--mask", "mask.png"), "2 boxes with points or a mask"),
        (("--box", "1", "1", "9", "9") * 101, "101 boxes; accepted: at most 100"),
        ((), "no box, point or mask"),
    ],
)
def test_bad_prompts_are_refused(run_segment, tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        run_segment(prompt=prompt)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["0", "-1", "1001", "2.5", "many"])
def test_bad_numbers_of_samples_are_refused(run_segment, value):
    with pytest.raises(UserError, match="num-samples.* from 1 to 1000"):
        run_segment("--num-samples", value)


@pytest.mark.parametrize(
    "extra",
    [
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--pixel-spacing", "0"),
        ("--pixel-spacing", "inf"),
        ("--sed", 1),
        ("--threshold", "0"),
        ("--threshold", "1"),
        ("--threshold", "half"),
        ("--threshold", "nan"),
    ],  # fmt: skip
)
def test_other_bad_options_are_refused(run_segment, extra):
    with pytest.raises(UserError, match=extra[0]):
        run_segment(*extra)


def test_more_samples_than_memory_allows_are_refused(run_segment, monkeypatch):
    monkeypatch.setattr(inference, "MAX_SAMPLED_PIXELS", 10 * 48 * 60)
    with pytest.raises(UserError, match="at most 10 samples"):
        run_segment("--num-samples", 11)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment"],
        ["cut"],
        ["demo", "--port", "0"],
        ["segment", "a.png", "--box", "1", "1", "2", "2"],
        ["info", "a.png"],
    ],  # fmt: skip
)
def test_incomplete_commands_are_refused(arguments):
    with pytest.raises(UserError, match="--help"):
        cli.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------------ models


@pytest.fixture
def broken_dir(model_dir, tmp_path):
    return Path(shutil.copytree(model_dir, tmp_path / "broken"))


def test_missing_models_are_refused(run_segment, tmp_path, image_path, monkeypatch):
    for name, message in (
        (tmp_path / "nowhere", "no model directory"),
        ("nowhere", "no model directory"),
        (tmp_path, "no config.json"),
        (image_path, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            run_segment(model=name)
    monkeypatch.setattr(inference, "DEFAULT_MODEL", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no weights found; give --model .* or install a clone of the repository"):
        run_segment(model=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("processor_config.json", "no processor"),
    ],
)
def test_incomplete_models_are_refused(run_segment, broken_dir, name, message):
    (broken_dir / name).unlink()
    with pytest.raises(UserError, match=message):
        run_segment(model=broken_dir)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json"])
def test_damaged_models_are_refused(run_segment, broken_dir, name):
    path = broken_dir / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be (read|loaded)"):
        run_segment(model=broken_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "configuration"),
        ("config.json", {"latent_dim": "nine"}, "cannot be loaded .*latent_dim"),
        ("processor_config.json", "[]", "cannot be loaded"),
        (
            "processor_config.json",
            {"image_size": 48},
            "takes images of 64 pixels, but its processor.* of 48;",
        ),
    ],
)
def test_a_configuration_of_another_kind_is_refused(run_segment, broken_dir, name, content, message):
    path = broken_dir / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        run_segment(model=broken_dir)


def test_weights_of_another_size_are_refused(run_segment, broken_dir):
    path = broken_dir / "config.json"
    path.write_text(path.read_text().replace('"latent_dim": 4', '"latent_dim": 5'))
    with pytest.raises(UserError, match="cannot be loaded"):
        run_segment(model=broken_dir)


def test_a_plain_sam_is_refused_with_the_way_to_train_it(run_segment, tmp_path, broken_dir):
    sam_dir = tmp_path / "sam"
    SamModel(SamConfig(**tiny_config())).save_pretrained(sam_dir)
    with pytest.raises(UserError, match="plain SAM checkpoint.*training/train.py"):
        run_segment(model=sam_dir)
    # Weights of SAM with the configuration of a Probabilistic SAM
    shutil.copy(sam_dir / "model.safetensors", broken_dir / "model.safetensors")
    with pytest.raises(UserError, match="lacks .* tensors"):
        run_segment(model=broken_dir)


def test_a_model_of_another_kind_is_refused(run_segment, broken_dir):
    (broken_dir / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert'"):
        run_segment(model=broken_dir)


def test_a_model_that_diverged_is_refused(run_segment, broken_dir, tmp_path):
    model = ProbabilisticSamModel.from_pretrained(broken_dir)
    with torch.no_grad():
        model.mask_decoder.mask_tokens.weight.fill_(torch.nan)
    model.save_pretrained(broken_dir)
    with pytest.raises(UserError, match="not finite"):
        run_segment(model=broken_dir)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ output


def test_foreign_files_are_never_replaced(run_segment, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="thesis.tex"):
        run_segment()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("boxes", [1, 2])
def test_folders_with_names_of_results_are_never_replaced(run_segment, tmp_path, boxes):
    for name in ("masks/mask-0.png", "box-1/notes.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).write_text("years")
    with pytest.raises(UserError, match="holds other files"):
        run_segment(prompt=("--box", 10, 12, 30, 28) * boxes)
    assert set(contents(tmp_path / "out").values()) == {b"years"}


def test_the_current_directory_stays_the_current_directory(run_segment, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for samples in (3, 2):
        run_segment("--num-samples", samples, output=".")
        assert len(list(Path("masks").iterdir())) == samples


def test_outputs_that_cannot_be_written_are_refused(run_segment, tmp_path, image_path, monkeypatch):
    with pytest.raises(UserError, match="is a file"):
        run_segment(output=image_path)
    with pytest.raises(UserError, match="cannot be written"):
        run_segment(output=image_path / "out")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(UserError, match="not writable"):
        run_segment(output=tmp_path / "locked")


def test_a_linked_output_is_followed(run_segment, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run_segment("--num-samples", 1, output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "result.json").is_file()


# ------------------------------------------------------------------------------------------------------- the process


def test_an_error_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probabilistic-sam", "segment", str(tmp_path), "--box", "1", "1", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.entry()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: argument --box: expected 4 arguments (see `probabilistic-sam segment --help`)\n"


def test_a_run_prints_one_line(image_path, model_dir, tmp_path):
    command = [sys.executable, "-m", "probabilistic_sam.cli", "segment", str(image_path), "--point", "20", "20"]
    command += ["--output", str(tmp_path / "out"), "--model", str(model_dir), "--num-samples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


@pytest.mark.slow
def test_demo_writes_figures_masks_and_distances(model_dir, tmp_path):
    script = Path(__file__).resolve().parent.parent / "training" / "demo.py"
    options = ["--output", tmp_path / "demo", "--model", model_dir, "--num-nodules", 2, "--num-samples", 4]
    done = run_forked(script, *options)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'demo'}: 2 figures with 4 samples each, mean GED ")
    command = shlex.split(second.partition("probabilistic-sam ")[2])
    cli.main([*command[:-1], str(tmp_path / "nodule"), "--num-samples", "2"])
    assert result_of(tmp_path / "nodule")["scan"]["kind"] == "NIfTI"
    assert len(list((tmp_path / "demo").glob("nodule-0[12]/masks/sample-0[0-3].png"))) == 8
    assert {path.name for path in (tmp_path / "demo").glob("*.*")} == {
        "nodule-01.png",
        "nodule-02.png",
        "phantom-scan.nii",
        "results.json",
    }
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    for nodule in results["nodules"]:
        distance = 2 * nodule["cross_distance"] - nodule["sample_diversity"] - nodule["reader_diversity"]
        assert nodule["ged"] == pytest.approx(distance)
    assert results["mean"]["ged"] == pytest.approx(np.mean([nodule["ged"] for nodule in results["nodules"]]))


def test_demo_without_a_model_is_one_line(tmp_path):
    script = Path(__file__).resolve().parent.parent / "training" / "demo.py"
    done = run_forked(script, "--output", tmp_path / "demo", "--model", tmp_path / "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no model directory at ")
