"""Conversion of MobileSAM's file and of SAM's directories, compared with independent weights, masks and formulas."""

import copy
import logging
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZE, sam_parts
from torch import nn
from transformers import SamConfig, SamModel

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor, conversion
from probabilistic_sam.conversion import (
    convert_mobile_sam,
    convert_mobile_sam_state_dict,
    convert_sam,
    fold_batch_norm,
    interpolate_vit_positions,
)
from probabilistic_sam.errors import UserError


@pytest.fixture(scope="module")
def mobile_sam(shared_dir):
    """MobileSAM's original state dict."""
    return load_file(shared_dir / "weights" / "mobile_sam.safetensors")


@pytest.fixture(scope="module")
def checkpoint(mobile_sam, tmp_path_factory):
    """The state dict as MobileSAM publishes it: a torch file that still contains the classifier of its encoder."""
    path = tmp_path_factory.mktemp("mobile_sam") / "mobile_sam.pt"
    head = {"norm_head.weight": 320, "norm_head.bias": 320, "head.weight": (1000, 320), "head.bias": 1000}
    torch.save(mobile_sam | {f"image_encoder.{name}": torch.zeros(shape) for name, shape in head.items()}, path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint):
    return convert_mobile_sam(checkpoint, image_size=64).eval()


def without_latents(model):
    return {k: v for k, v in model.state_dict().items() if not k.startswith(ProbabilisticSamModel.new_modules)}


# ------------------------------------------------------------------------------------------------------- MobileSAM


def test_folded_convolution_equals_convolution_and_normalisation():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 2.0)
    parts = {f"x.bn.{name}": value for name, value in norm.state_dict().items()}
    folded = fold_batch_norm(parts | {"x.c.weight": layer.weight.detach(), "other": torch.ones(1)})
    assert folded.keys() == {"x.c.weight", "x.c.bias", "other"}
    pixels = torch.randn(2, 3, 8, 8)
    expected = norm.eval()(layer(pixels))
    assert torch.allclose(nn.functional.conv2d(pixels, folded["x.c.weight"], folded["x.c.bias"]), expected, atol=1e-5)


def test_every_tensor_of_the_file_is_used(mobile_sam, converted):
    folds = sum(name.endswith(".c.weight") for name in mobile_sam)
    assert sum(".bn." in name for name in mobile_sam) == 5 * folds
    renamed = convert_mobile_sam_state_dict(mobile_sam)
    # A convolution and its five tensors of normalisation become weight and bias; SAM's positions have two names
    assert len(renamed) == len(mobile_sam) - 6 * folds + 2 * folds + 1
    own = without_latents(converted)
    assert own.keys() == renamed.keys()
    assert all(torch.equal(own[name], value) for name, value in renamed.items())
    parameters = sum(value.numel() for value in converted.vision_encoder.parameters())
    assert parameters == pytest.approx(5.75e6, rel=0.01)  # batch normalisation folded


def test_torch_file_and_safetensors_are_equal(shared_dir, converted):
    other = convert_mobile_sam(shared_dir / "weights" / "mobile_sam.safetensors", image_size=64)
    expected = without_latents(converted)
    assert all(torch.equal(value, expected[name]) for name, value in without_latents(other).items())


def test_box_prompts_segment_coins_as_otsu_does(checkpoint):
    skimage = pytest.importorskip("skimage")
    ndimage = pytest.importorskip("scipy.ndimage")
    from skimage import data, filters, measure

    assert skimage
    coins = data.coins()
    bright = ndimage.binary_closing(coins > filters.threshold_otsu(coins), np.ones((3, 3)))
    labels = measure.label(ndimage.binary_fill_holes(bright))
    regions = [region for region in measure.regionprops(labels) if 800 < region.area < 8000]
    assert len(regions) == 22
    truth = np.stack([labels == region.label for region in regions])
    boxes = [[x1, y1, x2, y2] for y1, x1, y2, x2 in (region.bbox for region in regions)]

    model = convert_mobile_sam(checkpoint, image_size=1024).eval()
    processor = ProbabilisticSamProcessor(1024, crop_size=None, stretch_percentiles=(0, 100))
    inputs = processor(coins, input_boxes=[boxes])
    with torch.no_grad():  # SAM's own decoding, without a latent
        sparse, dense = model.prompt_encoder(None, None, inputs["input_boxes"], None)
        masks, _ = model.mask_decoder(
            image_embeddings=model.vision_encoder(inputs["pixel_values"]).last_hidden_state,
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            middle_details=torch.zeros(1, 64, 128, 128),
            fine_details=torch.zeros(1, 32, 256, 256),
        )
    logits = processor.post_process_logits(masks[:, :, None], inputs["windows"], inputs["original_sizes"])
    masks = np.stack([item[0].numpy() > 0 for item in logits])
    iou = (masks & truth).sum(axis=(1, 2)) / (masks | truth).sum(axis=(1, 2))
    assert iou.mean() >= 0.95 and iou.min() >= 0.9


def test_converted_model_survives_a_round_trip(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    loaded = ProbabilisticSamModel.from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in converted.state_dict().items())
    # In float64, since rounding in float32 may depend on the memory layout; masks are cast to float32
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "input_boxes": torch.tensor([[[8.0, 8, 40, 48]]])}
    inputs = {name: value.double() for name, value in inputs.items()}
    first, second = (
        model.sample(**inputs, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks
        for model in (copy.deepcopy(converted).double(), loaded.double())
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-5)


def test_one_line_says_that_the_latent_networks_are_new(checkpoint, caplog, capfd):
    level = logging.getLogger("transformers").level
    convert_mobile_sam(checkpoint, image_size=64)
    assert "REPORT" not in caplog.text + capfd.readouterr().err
    (line,) = [record.getMessage() for record in caplog.records if record.name == "probabilistic_sam.conversion"]
    assert "new and untrained: detail_network, prior, posterior, latent_proj" in line
    assert logging.getLogger("transformers").level == level  # unchanged


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def damaged(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pt", lambda path: None, "no checkpoint at .*none.pt"),
        ("folder.pt", lambda path: path.mkdir(), "no checkpoint at"),
        ("code.pt", damaged(pickle.dumps({"a": Malicious()}, protocol=2)), "is not a readable torch file"),
        ("code.pt", lambda path: torch.save({"a": Malicious()}, path), "is not a readable torch file"),
        ("empty.pt", damaged(b""), "is not a readable torch file"),
        ("text.pt", damaged(b"text"), "is not a readable torch file"),
        ("text.safetensors", damaged(b"text"), "is not a readable safetensors file"),
        ("list.pt", lambda path: torch.save([torch.ones(1)], path), "does not contain a plain state dict"),
        (
            "nested.pt",
            lambda path: torch.save({"model": {"a": torch.ones(1)}}, path),
            "not contain a plain state dict",
        ),
        (
            "other.pt",
            lambda path: torch.save({"a": torch.ones(1)}, path),
            "does not fit: .* missing, such as .*; 1 unexp",
        ),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path, monkeypatch, name, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        convert_mobile_sam(tmp_path / name, image_size=64)
    assert not (tmp_path / "executed").exists()


def test_truncated_and_incomplete_checkpoints(checkpoint, mobile_sam, tmp_path):
    path = tmp_path / "truncated.pt"
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is not a readable torch file"):
        convert_mobile_sam(path, image_size=64)

    name = "mask_decoder.iou_token.weight"
    save_file({k: v for k, v in mobile_sam.items() if k != name}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=f"does not fit: tensors 1 missing, such as {name}"):
        convert_mobile_sam(tmp_path / "less.safetensors", image_size=64)
    save_file(mobile_sam | {name: torch.ones(1, 7)}, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=f"does not fit: tensors 1 of another shape, such as {name}"):
        convert_mobile_sam(tmp_path / "shape.safetensors", image_size=64)


# ------------------------------------------------------------------------------------------------------------- SAM


@pytest.fixture(scope="module")
def sam_dir(tmp_path_factory):
    """A tiny SAM with nonzero positions and windows as large as its patch map."""
    path = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    model = SamModel(SamConfig(**sam_parts()))
    for name, value in model.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            nn.init.normal_(value)
    model.save_pretrained(path)
    return path


def test_same_image_size_changes_nothing(sam_dir):
    expected = SamModel.from_pretrained(sam_dir).state_dict()
    for model in (convert_sam(sam_dir), convert_sam(sam_dir, SIZE)):
        assert model.config.model_type == "probabilistic_sam"
        own = without_latents(model)
        assert own.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in own.items())
    assert interpolate_vit_positions(expected, SIZE // 16, [1]).items() == expected.items()


def test_other_image_size_resizes_positions_of_global_layers_only(sam_dir):
    expected = SamModel.from_pretrained(sam_dir).state_dict()
    model = convert_sam(sam_dir, 64, latent_dim=3).eval()
    own = model.state_dict()
    resized = {"vision_encoder.pos_embed"} | {f"vision_encoder.layers.1.attn.rel_pos_{axis}" for axis in "hw"}
    assert {name for name, value in expected.items() if own[name].shape != value.shape} == resized
    assert all(torch.equal(own[name], value) for name, value in expected.items() if name not in resized)
    assert own["vision_encoder.pos_embed"].shape == (1, 4, 4, 16)
    assert own["vision_encoder.layers.1.attn.rel_pos_h"].shape == (7, 8)
    # Both ends lie outside the centres of the old samples, so they repeat these
    old, new = (state["vision_encoder.layers.1.attn.rel_pos_h"] for state in (expected, own))
    assert torch.allclose(new[[0, -1]], old[[0, -1]])
    assert torch.allclose(new[3], old[1])  # offset 0 stays in the middle

    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "input_boxes": torch.tensor([[[8.0, 8, 40, 48]]])}
    assert model.sample(**inputs, num_samples=2).pred_masks.shape == (1, 1, 2, 16, 16)


def test_constant_positions_stay_constant():
    state = {
        "vision_encoder.pos_embed": torch.full((1, 4, 4, 2), 0.5),
        "vision_encoder.layers.0.attn.rel_pos_h": torch.full((7, 2), -0.25),
        "vision_encoder.layers.1.attn.rel_pos_w": torch.full((7, 2), 0.75),
    }
    for grid in (2, 7):
        changed = interpolate_vit_positions(state, grid, [1])
        assert torch.allclose(changed["vision_encoder.pos_embed"], torch.full((1, grid, grid, 2), 0.5))
        assert torch.equal(changed["vision_encoder.layers.0.attn.rel_pos_h"], torch.full((7, 2), -0.25))
        rel_pos = changed["vision_encoder.layers.1.attn.rel_pos_w"]
        assert torch.allclose(rel_pos, torch.full((2 * grid - 1, 2), 0.75))


def test_other_models_and_incomplete_sams_are_refused(sam_dir, tmp_path):
    """transformers itself fills missing weights with random numbers."""
    whole = SamModel.from_pretrained(sam_dir)
    state = whole.state_dict()
    del state["mask_decoder.iou_token.weight"]
    whole.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(UserError, match="does not fit: tensors 1 missing, such as mask_decoder.iou_token.weight"):
        convert_sam(tmp_path / "part")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="other is a model of type 'bert'; accepted: 'sam'"):
        convert_sam(tmp_path / "other")


def test_half_precision_sam_becomes_float32(sam_dir, tmp_path):
    SamModel.from_pretrained(sam_dir, dtype=torch.float16).save_pretrained(tmp_path)
    assert convert_sam(tmp_path).dtype == convert_sam(tmp_path, 64).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- command line


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
    conversion.main()


def test_command_writes_model_and_processor(checkpoint, converted, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "model"
    call(monkeypatch, checkpoint, output, "--image_size", 64, "--crop_size", 32)
    assert {path.name for path in output.iterdir()} == {"config.json", "model.safetensors", "processor_config.json"}
    loaded = without_latents(ProbabilisticSamModel.from_pretrained(output))
    assert all(torch.equal(value, loaded[name]) for name, value in without_latents(converted).items())
    processor = ProbabilisticSamProcessor.from_pretrained(output)
    assert (processor.image_size, processor.crop_size) == (64, 32)
    assert f"wrote {output}: MobileSAM at 64 pixels" in capsys.readouterr().out


def test_command_refuses_bad_arguments_in_one_line(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="image_size must be a positive multiple of 16, got 100"):
        call(monkeypatch, checkpoint, tmp_path / "model", "--image_size", 100)
    with pytest.raises(UserError, match="no checkpoint at"):
        call(monkeypatch, tmp_path / "nothing.pt", tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/model cannot be written: Not a directory"):
        call(monkeypatch, checkpoint, tmp_path / "file" / "model", "--image_size", 64)
