"""The command: what it writes, and one clear line for everything that can be wrong."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_files import write_slice
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from transformers import SamConfig, SamModel

from probabilistic_sam import (
    ProbabilisticSamConfig,
    ProbabilisticSamModel,
    ProbabilisticSamProcessor,
    cli,
    images,
    inference,
    processing_probabilistic_sam,
)
from probabilistic_sam.errors import UserError

IMAGE_SIZE = 64


def tiny_config():
    return {
        # transformers' own 1e-10 would make the image embeddings vanish
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
    with torch.no_grad():  # a latent that shows in the mask
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
        cli.main([str(item) for item in given])
        return Path(output)

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- results


def test_writes_masks_maps_and_areas_that_agree(run_segment, capsys):
    out = run_segment("--num-samples", 12, "--pixel-spacing", 0.5, "--seed", 3)
    assert {path.name for path in out.iterdir()} == set(inference.RESULT_FILES)
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
    assert 0 < result["empty_share"] < 1  # the seed was chosen so that both kinds occur
    assert (result["seed"], result["num_samples"], result["prompt"]) == (3, 12, {"box": [10.0, 12.0, 30.0, 28.0]})

    mean, entropy = (np.asarray(Image.open(out / name)) for name in ("mean.png", "uncertainty.png"))
    assert mean.dtype == entropy.dtype == np.uint16
    assert mean.shape == entropy.shape == (48, 60)
    probability = mean / 65535
    never = ~masks.any(0)
    assert probability[never].max() <= 0.5  # no sample's sigmoid exceeds one half there
    expected = -(probability * np.log2(probability + 1e-12) + (1 - probability) * np.log2(1 - probability + 1e-12))
    assert np.abs(entropy / 65535 - expected).max() < 2e-3
    assert Image.open(out / "figure.png").width == 1600
    assert capsys.readouterr().out.startswith(f"wrote {out}: 12 samples, median area ")


def test_same_seed_same_files_other_seed_others(run_segment, tmp_path):
    first = contents(run_segment("--num-samples", 3, output=tmp_path / "a"))
    again = contents(run_segment("--num-samples", 3, output=tmp_path / "b"))
    other = contents(run_segment("--num-samples", 3, "--seed", 1, output=tmp_path / "c"))
    assert first == again
    assert first["mean.png"] != other["mean.png"]


def test_a_box_may_leave_the_image_by_less_than_a_pixel(run_segment, tmp_path):
    given = contents(run_segment("--num-samples", 3, prompt=("--box", "-0.4", "0", "60.5", "48.9")))
    clipped = contents(run_segment("--num-samples", 3, prompt=("--box", 0, 0, 60, 48), output=tmp_path / "b"))
    assert given["mean.png"] == clipped["mean.png"]


def test_colour_is_what_the_processor_takes(run_segment, model_dir, tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    out = run_segment("--num-samples", 3, image=tmp_path / "colour.png")
    model, processor = inference.load_model(model_dir)
    sampled = inference.sample_image(model, processor, colour, {"box": [10, 12, 30, 28]}, 3, 0)
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted((out / "masks").iterdir())])
    assert np.array_equal(masks, sampled.masks)
    assert json.loads((out / "result.json").read_text())["image_size"] == {"width": 60, "height": 48}
    grey = inference.sample_image(model, processor, images.luminance(colour), {"box": [10, 12, 30, 28]}, 3, 0)
    assert not np.array_equal(grey.mean, sampled.mean)


def test_points_are_repeatable(run_segment):
    out = run_segment("--num-samples", 2, prompt=("--point", "20", "20", "--point", "25.5", "21"))
    assert json.loads((out / "result.json").read_text())["prompt"] == {"points": [[20.0, 20.0], [25.5, 21.0]]}


def test_chunks_do_not_change_the_result(run_segment, tmp_path, monkeypatch):
    whole = contents(run_segment("--num-samples", 7, output=tmp_path / "a"))
    monkeypatch.setattr(processing_probabilistic_sam, "CHUNK_PIXELS", 2 * 48 * 60)
    parts = contents(run_segment("--num-samples", 7, output=tmp_path / "b"))
    assert {name: data for name, data in whole.items() if "masks" in name or "json" in name} == {
        name: data for name, data in parts.items() if "masks" in name or "json" in name
    }
    means = [np.asarray(Image.open(tmp_path / name / "mean.png")).astype(int) for name in "ab"]
    assert np.abs(means[0] - means[1]).max() <= 1


def test_second_run_replaces_the_first_one(run_segment, tmp_path):
    run_segment("--num-samples", 5)
    out = run_segment("--num-samples", 2)
    assert len(list((out / "masks").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"out", "slice.png"}


def test_failure_keeps_the_previous_result(run_segment, tmp_path, monkeypatch):
    out = run_segment("--num-samples", 2)
    before = contents(out)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inference, "save_figure", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        run_segment("--num-samples", 3)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "slice.png"}


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
    if name.split(".")[0] in ("rgb", "rgba", "palette"):  # colour stays colour, as in the processor
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
    """A PNG that claims a size and holds next to nothing."""

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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start a PostScript interpreter
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


def test_dicom_without_spacing_and_dark_where_others_are_bright(tmp_path):
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


def test_deflated_dicom_is_refused_before_it_unpacks(tmp_path):
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
        (("--box", "a", "10", "20", "20"), "'a' is not a finite number"),
        (("--box", "nan", "10", "20", "20"), "not a finite number"),
        (("--box", "10", "10", "1e999", "20"), "not a finite number"),
        (("--box", "10", "10", "20"), "expected 4 arguments"),
        (("--point", "60.5", "10"), "outside the image"),
        (("--point", "5"), "expected 2 arguments"),
        (("--box", "1", "1", "9", "9", "--point", "5", "5"), "not allowed with"),
        ((), "required"),
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
    [("--seed", "-1"), ("--seed", str(2**63)), ("--pixel-spacing", "0"), ("--pixel-spacing", "inf"), ("--sed", 1)],
)
def test_other_bad_options_are_refused(run_segment, extra):
    with pytest.raises(UserError, match=extra[0]):
        run_segment(*extra)


def test_more_samples_than_memory_are_refused(run_segment, monkeypatch):
    monkeypatch.setattr(inference, "MAX_SAMPLED_PIXELS", 10 * 48 * 60)
    with pytest.raises(UserError, match="at most 10 samples"):
        run_segment("--num-samples", 11)


@pytest.mark.parametrize(
    "arguments",
    [[], ["segment"], ["cut"], ["demo", "--port", "0"], ["segment", "a.png", "--box", "1", "1", "2", "2"]],
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
    monkeypatch.setattr(cli, "DEFAULT_MODEL", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--model"):
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


def test_weights_of_another_size_are_refused(run_segment, broken_dir):
    path = broken_dir / "config.json"
    path.write_text(path.read_text().replace('"latent_dim": 4', '"latent_dim": 5'))
    with pytest.raises(UserError, match="cannot be loaded"):
        run_segment(model=broken_dir)


def test_a_plain_sam_is_refused_and_told_how_to_train(run_segment, tmp_path, broken_dir):
    sam_dir = tmp_path / "sam"
    SamModel(SamConfig(**tiny_config())).save_pretrained(sam_dir)
    with pytest.raises(UserError, match="plain SAM checkpoint.*training/train.py"):
        run_segment(model=sam_dir)
    shutil.copy(sam_dir / "model.safetensors", broken_dir / "model.safetensors")  # SAM's weights under our name
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


def test_other_peoples_files_are_never_replaced(run_segment, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="thesis.tex"):
        run_segment()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


def test_outputs_that_cannot_be_written_are_refused(run_segment, tmp_path, image_path, monkeypatch):
    with pytest.raises(UserError, match="is a file"):
        run_segment(output=image_path)
    with pytest.raises(UserError, match="cannot be written"):
        run_segment(output=image_path / "out")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda *args: False)  # the superuser may write everywhere
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


def test_a_run_says_one_line_and_nothing_else(image_path, model_dir, tmp_path):
    command = [sys.executable, "-m", "probabilistic_sam.cli", "segment", str(image_path), "--point", "20", "20"]
    command += ["--output", str(tmp_path / "out"), "--model", str(model_dir), "--num-samples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


@pytest.mark.slow
def test_demo_writes_figures_masks_and_distances(model_dir, tmp_path):
    script = Path(__file__).resolve().parent.parent / "training" / "demo.py"
    command = [sys.executable, script, "--output", tmp_path / "demo", "--model", model_dir, "--num-nodules", "2"]
    done = subprocess.run([*map(str, command), "--num-samples", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'demo'}: 2 figures with 4 samples each, mean GED ")
    assert len(list((tmp_path / "demo").glob("nodule-0[12]/masks/sample-0[0-3].png"))) == 8
    assert {path.name for path in (tmp_path / "demo").glob("*.*")} == {
        "nodule-01.png",
        "nodule-02.png",
        "results.json",
    }
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    for nodule in results["nodules"]:
        distance = 2 * nodule["cross_distance"] - nodule["sample_diversity"] - nodule["reader_diversity"]
        assert nodule["ged"] == pytest.approx(distance)
    assert results["mean"]["ged"] == pytest.approx(np.mean([nodule["ged"] for nodule in results["nodules"]]))


def test_demo_without_a_model_is_one_line(tmp_path):
    script = Path(__file__).resolve().parent.parent / "training" / "demo.py"
    command = [sys.executable, script, "--output", tmp_path / "demo", "--model", tmp_path / "nowhere"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no model directory at ")
