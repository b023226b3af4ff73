"""The pipeline: results, kinds of input, and samples that depend on the seed but not on the batch."""

import base64
import io
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from endpoint_server import load_handler
from PIL import Image
from test_cli import png_header
from test_processing_probabilistic_sam import files_of, forms_of
from tiny import SIZE, tiny_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from probabilistic_sam import ProbabilisticSamProcessor, images, inference

TASK = "probabilistic-mask-generation"
BOX, OTHER_BOX = [10, 12, 30, 28], [40, 5, 52, 20]
POINTS = [[20, 20], [25, 21]]


def make_image(seed=0, height=48, width=60):
    return np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)


def expressive_model(**kwargs):
    """A model whose masks depend on the latent and are sometimes empty."""
    model = tiny_model(**kwargs)
    with torch.no_grad():
        model.latent_proj[-1].weight.mul_(100)
    return model


@pytest.fixture(scope="module")
def pipe():
    return pipeline(TASK, model=expressive_model(), processor=ProbabilisticSamProcessor(SIZE, 24), device="cpu")


@pytest.fixture(scope="module")
def shipped():
    """The handler of the shipped weights, with its pipeline."""
    return load_handler(ROOT / "probabilistic_sam" / "hub", ROOT / "model_cards" / "psam-lidc")


def same(left, right):
    """Whether results of one image are the same up to rounding."""
    return len(left) == len(right) and all(
        (a["masks"] == b["masks"]).mean() > 0.999 and np.allclose(a["mean"], b["mean"], atol=1e-4)
        for a, b in zip(left, right, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- results


def test_results_of_a_prompt_are_consistent(pipe):
    results = pipe(make_image(), boxes=[BOX, OTHER_BOX], num_samples=12, seed=3, pixel_spacing_mm=0.5)
    assert len(results) == 2
    for result in results:
        masks = result["masks"]
        assert masks.shape == (12, 48, 60) and masks.dtype == bool
        assert np.array_equal(result["areas"], masks.sum((1, 2)) / 4) and result["area_unit"] == "mm2"
        assert result["area_quantiles"]["0.5"] == pytest.approx(np.median(result["areas"]))
        assert result["empty_share"] == pytest.approx((result["areas"] == 0).mean())
        mean = result["mean"].astype(float)
        assert mean.shape == result["uncertainty"].shape == (48, 60)
        inside = (mean > 1e-6) & (mean < 1 - 1e-6)
        p = mean[inside]
        assert np.allclose(result["uncertainty"][inside], -p * np.log2(p) - (1 - p) * np.log2(1 - p), atol=1e-4)
        annotated = result["areas"] > 0
        assert abs(result["presence"] - annotated.mean()) <= 1 / 12 + 1e-6
        assert np.array_equal(result["areas_given_presence"], result["outlines"].sum((1, 2)) / 4)
        assert np.array_equal(result["outlines"][annotated], masks[annotated]) and len(result["outlines"]) == 12
        assert result["area_quantiles_given_presence"]["0.95"] == pytest.approx(
            np.quantile(result["areas_given_presence"], 0.95)
        )
    assert 0 < results[0]["empty_share"] < 1  # with this seed some samples are empty
    assert not np.array_equal(
        results[0]["masks"].any((1, 2)), results[1]["masks"].any((1, 2))
    )  # each prompt has its own noise


def test_result_equals_samples_of_the_model_with_the_same_seed(pipe):
    inputs = pipe.processor(make_image(), input_boxes=[BOX])
    generator = torch.Generator().manual_seed(5)
    samples = pipe.model.sample(**inputs, num_samples=6, generator=generator)
    (expected,) = pipe.processor.post_process_samples(samples.pred_masks, inputs["windows"], inputs["original_sizes"])
    (result,) = pipe(make_image(), boxes=BOX, num_samples=6, seed=5)
    assert np.array_equal(result["masks"], expected["masks"].numpy())
    assert np.array_equal(result["uncertainty"], expected["entropy"].numpy())
    assert result["areas"].tolist() == expected["areas"].tolist() and result["area_unit"] == "px"


def test_threshold_is_a_probability(pipe):
    low, middle, high = (pipe(make_image(), boxes=BOX, threshold=value)[0] for value in (0.1, 0.5, 0.9))
    assert (low["masks"] | middle["masks"] == low["masks"]).all() and low["areas"].sum() > middle["areas"].sum()
    assert (high["masks"] & middle["masks"] == high["masks"]).all() and high["areas"].sum() < middle["areas"].sum()
    assert np.array_equal(low["mean"], high["mean"])
    for value in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
            pipe(make_image(), boxes=BOX, threshold=value)


def test_points_labels_and_both_kinds_of_prompt(pipe):
    (points,), (one,) = pipe(make_image(), points=POINTS), pipe(make_image(), points=POINTS[:1])
    (signed,) = pipe(make_image(), points=POINTS, labels=[1, 0])
    (both,) = pipe(make_image(), points=POINTS, boxes=BOX)
    means = [result["mean"] for result in (points, one, signed, both)]
    assert not any(np.allclose(means[i], means[j]) for i in range(4) for j in range(i))
    assert same(pipe(make_image(), points=[POINTS, POINTS[:1]])[:1], [points])


# ----------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("kind", ["orientation", "palette", "16 bit"])
def test_an_image_gives_the_same_masks_through_every_interface(shipped, tmp_path, kind):
    """The shipped weights: processor and model, pipeline, handler, command, page.

    All forms of a file are tested with the processor, through which all entrances lead.
    """
    app = pytest.importorskip("probabilistic_sam.app", reason="the page needs gradio, extra [app]")
    content, array = files_of(kind)
    box, pipe = [8, 6, 30, 31], shipped.pipe
    inputs = pipe.processor(array.copy(), input_boxes=[[box]])
    samples = pipe.model.sample(**inputs, num_samples=2, generator=torch.Generator().manual_seed(4))
    (result,) = pipe.processor.post_process_samples(samples.pred_masks, inputs["windows"], inputs["original_sizes"])
    expected = result["masks"].numpy()
    assert expected.shape == (2, *array.shape[:2])
    for form in forms_of(content, tmp_path)[1::2]:  # path, bytes in an array, PIL image, data URL
        (given,) = pipe(form, boxes=box, num_samples=2, seed=4)
        assert np.array_equal(given["masks"], expected), type(form)
    parameters = {"boxes": box, "num_samples": 2, "seed": 4}
    bodies = [base64.b64encode(content).decode()]
    if kind != "16 bit":
        bodies.append(Image.open(io.BytesIO(content)).convert("RGB"))  # as an endpoint decodes an image body
    for body in bodies:
        answer = shipped({"inputs": body, "parameters": parameters})
        masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(item["mask"])))) for item in answer[2:]]
        assert np.array_equal(np.stack(masks) > 0, expected)
    path = tmp_path / "image.file"
    for image in (images.load_slice(path)[0], app.open_file(str(path))[0]):
        assert np.array_equal(image, array)
    sampled = inference.sample_image(pipe.model, pipe.processor, image, {"box": box}, 2, 4)
    assert np.array_equal(sampled.masks, expected)
    assert sampled.presence == given["presence"] == answer[0]["presence"] == pytest.approx(samples.presence.item())
    assert sampled.outlines.sum((1, 2)).tolist() == answer[0]["areas_given_presence"]
    assert answer[0]["area_quantiles_given_presence"] == given["area_quantiles_given_presence"]


def test_inputs_of_every_kind_give_the_same(pipe, tmp_path):
    image = make_image()
    Image.fromarray(image).save(tmp_path / "slice.png")
    expected = pipe(image, boxes=BOX)
    for given in (
        str(tmp_path / "slice.png"), tmp_path / "slice.png", Image.fromarray(image), torch.from_numpy(image),
        (tmp_path / "slice.png").read_bytes(), io.BytesIO((tmp_path / "slice.png").read_bytes()),
        base64.b64encode((tmp_path / "slice.png").read_bytes()).decode(),
        np.repeat(image[..., None], 3, axis=2), {"image": image}, {"image": image, "boxes": [BOX], "points": None},
    ):  # fmt: skip
        assert same(pipe(given, boxes=BOX), expected)
    for given in ([image, tmp_path / "slice.png"], (image, image)):
        results = pipe(given, boxes=BOX)
        assert isinstance(results, list) and len(results) == 2
        assert all(same(result, expected) for result in results)


def test_dataset_columns_rows_and_generators_stream(pipe):
    images = [Image.fromarray(make_image(seed)) for seed in range(3)]
    rows = datasets.Dataset.from_dict({"image": images, "boxes": [[BOX], [BOX, OTHER_BOX], [OTHER_BOX]]})
    rows = rows.cast_column("image", datasets.Image())
    expected = [pipe(image, boxes=BOX) for image in images]
    streams = (rows["image"], KeyDataset(rows, "image"), (row["image"] for row in rows), rows.to_iterable_dataset())
    for stream in streams[:3]:
        results = pipe(stream, boxes=BOX, batch_size=2)
        assert not isinstance(results, list)
        assert all(same(*pair) for pair in zip(results, expected, strict=True))
    for stream in (rows, streams[3]):
        results = list(pipe(stream, batch_size=2))
        assert [len(result) for result in results] == [1, 2, 1]
        assert same(results[0], expected[0]) and same(results[1][:1], expected[1])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_neither_repeat_nor_reorder_images(pipe, num_workers):
    images = [Image.fromarray(make_image(seed)) for seed in range(4)]
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    expected = [pipe(image, boxes=BOX) for image in images]
    for several in (images, rows["image"], rows, (image for image in images), KeyDataset(rows, "image")):
        results = pipe(several, boxes=BOX, batch_size=2, num_workers=num_workers)
        assert all(same(*pair) for pair in zip(results, expected, strict=True))


def test_batches_hold_the_windows_of_one_image_too(pipe, monkeypatch):
    sizes, sample = [], pipe.model.sample
    monkeypatch.setattr(
        pipe.model, "sample", lambda **inputs: sizes.append(len(inputs["windows"])) or sample(**inputs)
    )
    assert len(pipe(make_image(0), boxes=[BOX, OTHER_BOX, BOX], batch_size=2)) == 3
    assert sizes == [2, 1] and pipe([], boxes=BOX) == []


def test_samples_do_not_depend_on_other_images_or_the_batch_size(pipe):
    rows = [
        {"image": make_image(0), "boxes": [BOX, OTHER_BOX]},
        {"image": make_image(1, 40, 70), "points": POINTS},
        {"image": make_image(2), "points": [POINTS, POINTS[:1]], "labels": [[1, 0], [1]]},
        {"image": make_image(0), "boxes": [BOX]},
        {"image": make_image(3), "boxes": [OTHER_BOX, BOX, BOX]},
    ]
    alone = [pipe(row, seed=7) for row in rows]
    for batch_size in (1, 2, 16):
        assert all(same(*pair) for pair in zip(pipe(rows, seed=7, batch_size=batch_size), alone, strict=True))
    assert same(pipe(rows[::-1], seed=7, batch_size=3)[-1], alone[0])
    assert same(alone[3], alone[0][:1])  # later prompts do not change earlier ones
    assert not same(pipe(rows[0], seed=8), alone[0])


def test_whole_images_with_different_numbers_of_prompts():
    processor = ProbabilisticSamProcessor(SIZE, crop_size=None)
    pipe = pipeline(TASK, model=expressive_model(), processor=processor, device="cpu", num_samples=4)
    rows = [{"image": make_image(0), "boxes": [BOX]}, {"image": make_image(1), "boxes": [BOX, OTHER_BOX]}]
    results = pipe(rows, batch_size=2)
    assert [[item["masks"].shape for item in result] for result in results] == [[(4, 48, 60)], [(4, 48, 60)] * 2]
    assert same(results[1], pipe(rows[1]))


def test_model_in_bfloat16_accepts_images():
    model = expressive_model().to(torch.bfloat16)
    pipe = pipeline(TASK, model=model, processor=ProbabilisticSamProcessor(SIZE, 24), device="cpu")
    (result,) = pipe(make_image(), boxes=BOX)
    assert result["mean"].dtype == np.float32 and np.isfinite(result["mean"]).all()


# ----------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (make_image(), {}, "a prompt must be given"),
        (make_image(), {"boxes": [10, 10, 61, 20]}, "outside the image of 60 x 48"),
        (make_image(), {"boxes": [float("nan"), 10, 20, 20]}, "four finite numbers"),
        (make_image(), {"boxes": BOX, "num_samples": 0}, "num_samples must be at least 1"),
        (make_image(), {"boxes": BOX, "pixel_spacing_mm": -1}, "pixel_spacing_mm must be one positive number"),
        (np.full((8, 8), np.nan), {"boxes": [1, 1, 5, 5]}, "finite numbers only"),
        ({"picture": make_image()}, {"boxes": BOX}, "must hold an image, got picture"),
        ("missing.png", {"boxes": BOX}, "image missing.png cannot be read.*accepted: PNG"),
        (bytes(300_000), {"boxes": BOX}, "the image is not an image"),
        ("https://example.org/slice.png", {"boxes": BOX}, "is a URL, which is not fetched"),
        (make_image(), {"boxes": [[[[1, 2, 3, 4]]]]}, r"\[image\]\[prompt\]\[x1, y1, x2, y2\], got"),
        (make_image(), {"points": [[20, 20]], "labels": [2]}, "labels must be 1"),
    ],
)
def test_faults_are_named(pipe, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(image, **arguments)


def test_levels_of_prompts_may_be_left_out_and_boxes_are_clipped(pipe):
    image = make_image()
    for name, forms in (
        ("boxes", (BOX, [BOX], [[BOX]], np.array(BOX), torch.tensor([[BOX]]))),
        ("points", ([20, 20], [[20, 20]], [[[20, 20]]], np.array([20, 20]), torch.tensor([[[20, 20]]]))),
    ):
        expected = pipe(image, **{name: forms[0]}, num_samples=3)
        assert len(expected) == 1
        assert all(same(pipe(image, **{name: form}, num_samples=3), expected) for form in forms[1:])
    padded = pipe(image, points=[[20, 20], [1, 1]], labels=[1, -1], num_samples=3)
    assert same(padded, pipe(image, points=[[20, 20], [1, 1]], labels=[1, -10], num_samples=3))
    assert same(pipe(image, boxes=[-0.3, 0, 60.6, 48]), pipe(image, boxes=[0, 0, 60, 48]))


def test_dictionaries_keep_columns_and_refuse_mistaken_names(pipe):
    expected = pipe(make_image(), boxes=BOX)
    row = {"image": make_image(), "boxes": BOX, "masks": [0], "patient_id": "A", "label": 3, "spacing": 1, "box": None}
    assert same(pipe(row), expected)
    for name in ("box", "Boxes", "bbox", "bboxes", "input_boxes", "point", "input_points", "input_masks", "prompt"):
        with pytest.raises(ValueError, match=f"a dictionary holds {name}, which is not read; accepted: image, boxes"):
            pipe({"image": make_image(), name: BOX}, boxes=OTHER_BOX)
    for name in ("num_samples", "seed", "threshold"):
        with pytest.raises(ValueError, match=f"a dictionary holds {name}, which is the same for all images"):
            pipe([{"image": make_image(), name: 3}], boxes=OTHER_BOX)
    with pytest.raises(ValueError, match="a dictionary holds label, which is not read"):
        pipe({"image": make_image(), "points": POINTS, "label": [1, 0]})


def test_image_files_are_bounded_and_unknown_arguments_refused(pipe, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(8001, 8000))
    with pytest.raises(ValueError, match="8001 x 8000 pixels; accepted: PNG.* at most 64 million"):
        pipe(tmp_path / "bomb.png", boxes=BOX)
    for name in ("n_samples", "input_boxes", "points_per_batch"):
        with pytest.raises(TypeError, match=f"the pipeline does not take {name}; accepted: boxes, points, labels"):
            pipe(make_image(), boxes=BOX, **{name: 3})
    with pytest.raises(TypeError, match="n_samples"):
        pipeline(TASK, model=pipe.model, processor=pipe.processor, n_samples=3)


# -------------------------------------------------------------------------------------------------------------- hub


def test_pipeline_is_saved_with_the_code_of_all_its_parts(tmp_path):
    pipe = pipeline(TASK, model=tiny_model(), processor=ProbabilisticSamProcessor(SIZE, 24), device="cpu")
    folder = tmp_path / "psam-lidc"
    pipe.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "processor_config.json", "configuration_probabilistic_sam.py",
        "loss_probabilistic_sam.py", "modeling_mask_decoder.py", "modeling_probabilistic_sam.py",
        "modeling_tiny_vit.py", "pipeline_probabilistic_sam.py", "processing_image_files.py",
        "processing_probabilistic_sam.py",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskGeneration"}
    assert config["custom_pipelines"][TASK]["pt"] == ["AutoModel"]
    # The code is saved with references in config.json, and other models of this process are saved without both
    pipe.model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == names - {"processor_config.json"}
    tiny_model().save_pretrained(tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"config.json", "model.safetensors"}
