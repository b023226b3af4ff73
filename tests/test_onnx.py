"""ONNX files: their graphs, masks as PyTorch gives them, the runtime `onnx` and the example without PyTorch."""

import json
import logging
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_model, tiny_vit_parts

from probabilistic_sam import ProbabilisticSamProcessor, cli
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.staging import EXAMPLES, stage_model
from probabilistic_sam.inference import load_model, sample_image
from probabilistic_sam.modeling_probabilistic_sam import MAX_DECODED, spread_noise
from probabilistic_sam.onnx_export import GRAPHS, ONNX_FILES, export_onnx, to_int8

pytestmark = pytest.mark.slow  # the export takes a few seconds per graph
BOX, EMPTY = [8.0, 9, 20, 22], -30


def smallest_parts():
    """The kinds of layers of the shipped architecture, each once."""
    parts = tiny_vit_parts()
    parts["mask_decoder_config"]["num_hidden_layers"] = 1
    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its exported files."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model(smallest_parts, detail_num_blocks=1)
    model.save_pretrained(path)
    processor = ProbabilisticSamProcessor(SIZE, 24)
    processor.save_pretrained(path)
    logging.disable()  # PyTorch's trace records, which pytest would keep, take longer than the export
    try:
        files = export_onnx(model, processor, path / "onnx", "tiny")
    finally:
        logging.disable(logging.NOTSET)
    assert [file.name for file in files] == list(ONNX_FILES) and all(file.is_file() for file in files)
    return path


@pytest.fixture(scope="module")
def models(folder):
    """The model in PyTorch and in onnxruntime."""
    return load_model(folder)[0], load_model(folder, runtime="onnx")[0]


def prompts(kind, images=2, count=2):
    if kind == "box":
        return {"input_boxes": torch.tensor([BOX, [4.0, 4, 30, 28]])[:count].expand(images, -1, -1)}
    points = torch.tensor([[10.0, 12], [14, 11], [29, 30], [-10, -10]]).expand(images, count, -1, -1)
    return {"input_points": points, "input_labels": torch.tensor([1, 1, 0, -10]).expand(images, count, -1)}


def test_files_are_valid_self_contained_and_say_what_they_hold(folder):
    for name in ONNX_FILES:
        proto = onnx.load(folder / "onnx" / name, load_external_data=False)
        onnx.checker.check_model(proto)
        assert not any(tensor.external_data for tensor in proto.graph.initializer)
        notes = {item.key: item.value for item in proto.metadata_props}
        assert notes["model"] == "tiny" and notes["image_size"] == "32" and notes["latent_dim"] == "4"
        assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 20}
        operators = {node.op_type for node in proto.graph.node}
        assert not operators & {"If", "Loop", "Scan", "SequenceAt", "NonZero"}
        assert not any(node.metadata_props for node in proto.graph.node)  # these would hold paths of this machine
        types = {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
        assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    session = onnxruntime.InferenceSession(folder / "onnx" / "point_decoder.onnx")
    inputs = {item.name: item.shape for item in session.get_inputs()}
    assert inputs == {
        "image_embeddings": [1, 32, 2, 2], "noise": [1, 1, "samples", 4],
        "input_points": [1, 1, "points", 2], "input_labels": [1, 1, "points"],
    }  # fmt: skip
    outputs = {item.name: item.shape for item in session.get_outputs()}
    assert outputs["pred_masks"] == [1, 1, "samples", 8, 8] and outputs["presence"] == [1, 1]


@pytest.mark.parametrize("kind", ["box", "point"])
@pytest.mark.parametrize("num_samples", [1, 3, MAX_DECODED + 2])
def test_same_generator_gives_the_samples_of_pytorch(models, kind, num_samples):
    pixel_values = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected, got = (
        model.sample(
            pixel_values, **prompts(kind), num_samples=num_samples, generator=torch.Generator().manual_seed(7)
        )
        for model in models
    )
    assert got.pred_masks.shape == (2, 2, num_samples, 8, 8)
    for name in ("pred_masks", "latents", "prior_mean", "prior_log_std"):
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4)
    assert got.iou_scores is None


def test_image_embeddings_are_those_of_pytorch(models):
    pixel_values = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected, got = (model.get_image_embeddings(pixel_values) for model in models)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_presence_is_the_probability_of_a_positive_first_coordinate(folder, models):
    session = onnxruntime.InferenceSession(folder / "onnx" / "box_decoder.onnx")
    embeddings = models[0].get_image_embeddings(torch.zeros(1, 3, SIZE, SIZE)).numpy()
    noise = spread_noise((1, 1, 1000, 4), torch.Generator().manual_seed(0), "cpu").numpy()
    inputs = {"image_embeddings": embeddings, "input_boxes": np.array([[BOX]], np.float32), "noise": noise}
    masks, mean, _, presence = session.run(None, inputs)
    normal = torch.distributions.Normal(0, 1)
    assert presence.item() == pytest.approx(normal.cdf(torch.tensor(mean[0, 0, 0])).item(), abs=1e-6)
    # Evenly spread noise: the share of samples is the probability within one sample
    assert (masks > EMPTY).any(axis=(-2, -1)).mean() == pytest.approx(presence.item(), abs=2e-3)


@pytest.mark.parametrize("precision", ["_fp16", "_quantized"])
def test_other_precisions_give_nearly_the_same_logits(folder, models, precision):
    pixel_values = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    noise = spread_noise((1, 1, 8, 4), torch.Generator().manual_seed(0), "cpu")
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{graph}{precision}.onnx")
        for graph in ("vision_encoder", "box_decoder")
    )
    (embeddings,) = encoder.run(None, {"pixel_values": pixel_values.numpy()})
    inputs = {"image_embeddings": embeddings, "input_boxes": np.array([[BOX]], np.float32), "noise": noise.numpy()}
    masks, mean, log_std, _ = decoder.run(None, inputs)
    expected = models[0].sample(
        pixel_values, torch.tensor([[BOX]]), num_samples=8, generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(mean, expected.prior_mean, atol=0.1)
    same_presence = (masks > EMPTY).any(axis=(-2, -1)) == (expected.pred_masks > EMPTY).numpy().any(axis=(-2, -1))
    assert same_presence.mean() >= 7 / 8


def test_int8_weights_are_within_half_a_step_of_their_channel():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 80)).astype(np.float32) * np.geomspace(0.01, 10, 80, dtype=np.float32)
    weight[:, 3] = 0
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [64, width]) for name, width in (("x", 64), ("y", 80)))
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(to_int8(model).SerializeToString())
    (restored,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    step = np.abs(weight).max(axis=0) / 127
    assert (np.abs(restored - weight) <= 0.5001 * step + 1e-7).all() and (restored[:, 3] == 0).all()
    assert not np.array_equal(restored, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_masks": torch.zeros(1, 1, 8, 8)}, "does not support a mask prompt"),
        ({**prompts("box", 1), **prompts("point", 1)}, "does not support a box together with points"),
        ({}, "A prompt must be provided"),
        ({**prompts("box", 1), "num_samples": 0}, "num_samples must be at least 1"),
        ({**prompts("point", 1), "input_labels": torch.full((1, 2, 4), 5)}, "input_labels must be"),
        ({**prompts("box", 1), "multimask_output": True}, "multimask_output is not supported"),
    ],
)
def test_what_the_graphs_cannot_do_is_refused(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        models[1].sample(pixel_values=torch.zeros(1, 3, SIZE, SIZE), **arguments)


def test_embeddings_of_another_model_are_refused(models):
    with pytest.raises(ValueError, match="image_embeddings must have the shape"):
        models[1].sample(image_embeddings=torch.zeros(1, 16, 2, 2), **prompts("box", 1))


def test_loading_fails_in_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="accepted: torch, onnx"):
        load_model(folder, runtime="tensorflow")
    with pytest.raises(UserError, match="runs on the CPU"):
        load_model(folder, "cuda", runtime="onnx")
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no onnx/vision_encoder.onnx; .*export_onnx.py"):
        load_model(tmp_path, runtime="onnx")
    with pytest.raises(UserError, match="neither here nor on the Hub"):
        load_model("no-one/nothing", runtime="onnx")
    (tmp_path / "onnx").mkdir()
    for graph in GRAPHS:
        (tmp_path / "onnx" / f"{graph}.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="vision_encoder.onnx cannot be loaded"):
        load_model(tmp_path, runtime="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"probabilistic-sam\[onnx\]"):
        load_model(folder, runtime="onnx")
    with pytest.raises(UserError, match=r"probabilistic-sam\[onnx\]"):
        export_onnx(tiny_model(), ProbabilisticSamProcessor(SIZE, 24), tmp_path / "new")


def test_export_does_not_replace_foreign_files(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        export_onnx(tiny_model(), ProbabilisticSamProcessor(SIZE, 24), tmp_path)


def test_segment_gives_the_masks_of_pytorch(folder, tmp_path):
    image = EXAMPLES / "phantom-1.png"
    for runtime in ("torch", "onnx"):
        cli.main(
            ["segment", str(image), "--box", "52", "50", "78", "80", "--num-samples", "4", "--model", str(folder)]
            + ["--runtime", runtime, "--output", str(tmp_path / runtime)]
        )  # fmt: skip
    results = [json.loads((tmp_path / runtime / "result.json").read_text()) for runtime in ("torch", "onnx")]
    assert results[0]["area_px"] == results[1]["area_px"]
    with pytest.raises(UserError, match="runs on the CPU"):
        load_model(folder, runtime="onnx")[0].to("mps")


def test_staged_example_runs_without_pytorch(folder, tmp_path):
    stage_model(folder, tmp_path / "staged", "alice/tiny")
    staged = tmp_path / "staged"
    assert {path.name for path in (staged / "onnx").iterdir()} == set(ONNX_FILES)
    script = str(staged / "onnx_example.py")
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x']; runpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    masks = np.load(tmp_path / "masks.npz")["masks"]
    assert masks.shape == (16, 128, 128) and masks.dtype == bool
    # Of the same model and box: as many empty masks, and the same mean area up to the different noise
    example = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]
    model, processor = load_model(folder)
    image = np.asarray(Image.open(EXAMPLES / example["image"]))
    sampled = sample_image(model, processor, image, {"box": example["box"]}, num_samples=16)
    assert (~masks.any(axis=(1, 2))).mean() == pytest.approx(sampled.empty_share, abs=1 / 16)
