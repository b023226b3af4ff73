"""ONNX files: their graphs, masks as PyTorch gives them, the runtime `onnx` and the example without PyTorch."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_model

from probabilistic_sam import ProbabilisticSamProcessor, cli
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.staging import EXAMPLES, stage_model
from probabilistic_sam.inference import load_model, sample_image
from probabilistic_sam.modeling_probabilistic_sam import MAX_DECODED, spread_noise
from probabilistic_sam.onnx_export import GRAPHS, ONNX_FILES, export_onnx, to_float16, to_int8

pytestmark = pytest.mark.slow  # the export takes half a minute
SIDE, LATENT = 256, 9
BOX, EMPTY = [80.4, 83.2, 174.0, 176.4], -30
EXAMPLE = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]


@pytest.fixture(scope="module")
def models(exported):
    """The model in PyTorch and in onnxruntime."""
    return load_model(exported)[0], load_model(exported, runtime="onnx")[0]


@pytest.fixture(scope="module")
def pixel_values(exported):
    """Windows of two phantoms; `BOX` is the nodule of the first."""
    processor = load_model(exported)[1]
    images = [Image.open(EXAMPLES / f"phantom-{number}.png") for number in (1, 2)]
    return processor(images, input_boxes=[[EXAMPLE["box"]]] * 2)["pixel_values"]


def prompts(kind, images=2, count=2):
    if kind == "box":
        return {"input_boxes": torch.tensor([BOX, [32.0, 32, 240, 224]])[:count].expand(images, -1, -1)}
    points = torch.tensor([[120.0, 130], [130, 120], [232, 240], [-10, -10]]).expand(images, count, -1, -1)
    return {"input_points": points, "input_labels": torch.tensor([1, 1, 0, -10]).expand(images, count, -1)}


def session_of(folder, graph):
    return onnxruntime.InferenceSession(folder / "onnx" / f"{graph}.onnx")


def test_float16_casts_a_value_for_several_nodes_once():
    # Max and Min stay in float32. Before version 1.32, onnxruntime wrote two casts of one name for such a value
    nodes = [
        onnx.helper.make_node("Mul", ["x", "x"], ["square"]),
        onnx.helper.make_node("Max", ["square", "x"], ["high"]),
        onnx.helper.make_node("Min", ["square", "x"], ["low"]),
        onnx.helper.make_node("Add", ["high", "low"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "graph", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    converted = to_float16(onnx.shape_inference.infer_shapes(model))
    onnx.checker.check_model(converted)
    session = onnxruntime.InferenceSession(converted.SerializeToString())
    (result,) = session.run(None, {"x": np.array([0.5, 2, 3], np.float32)})
    assert result.tolist() == [0.75, 6, 12]  # x^2 + x, whichever of the two is larger


def test_files_are_valid_self_contained_and_say_what_they_hold(exported):
    for name in ONNX_FILES:
        proto = onnx.load(exported / "onnx" / name, load_external_data=False)
        onnx.checker.check_model(proto)
        assert not any(tensor.external_data for tensor in proto.graph.initializer)
        notes = {item.key: item.value for item in proto.metadata_props}
        assert notes["model"] == "psam-lidc" and notes["image_size"] == "256" and notes["latent_dim"] == "9"
        assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 20}
        operators = {node.op_type for node in proto.graph.node}
        assert not operators & {"If", "Loop", "Scan", "SequenceAt", "NonZero"}
        assert not any(node.metadata_props for node in proto.graph.node)  # these would hold paths of this machine
        types = {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
        assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    session = session_of(exported, "point_decoder")
    inputs = {item.name: item.shape for item in session.get_inputs()}
    assert inputs == {
        "image_embeddings": [1, 272, 16, 16], "noise": [1, 1, "samples", LATENT],
        "input_points": [1, 1, "points", 2], "input_labels": [1, 1, "points"],
    }  # fmt: skip
    outputs = {item.name: item.shape for item in session.get_outputs()}
    assert outputs["pred_masks"] == outputs["outline_masks"] == [1, 1, "samples", 64, 64] and outputs["presence"] == [
        1,
        1,
    ]


@pytest.mark.parametrize("kind", ["box", "point"])
@pytest.mark.parametrize("num_samples", [1, 3, MAX_DECODED + 2])
def test_same_generator_gives_the_samples_of_pytorch(models, pixel_values, kind, num_samples):
    expected, got = (
        model.sample(
            pixel_values, **prompts(kind), num_samples=num_samples, generator=torch.Generator().manual_seed(7)
        )
        for model in models
    )
    assert got.pred_masks.shape == (2, 2, num_samples, 64, 64)
    for name in ("pred_masks", "outline_masks", "presence", "latents", "prior_mean", "prior_log_std"):
        torch.testing.assert_close(got[name], expected[name], atol=5e-3, rtol=1e-4)  # logits reach several hundreds
    assert got.iou_scores is None


def test_image_embeddings_are_those_of_pytorch(models, pixel_values):
    expected, got = (model.get_image_embeddings(pixel_values) for model in models)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_presence_is_the_probability_of_a_positive_first_coordinate(exported, models, pixel_values):
    session = session_of(exported, "box_decoder")
    embeddings = models[0].get_image_embeddings(pixel_values[:1]).numpy()
    noise = spread_noise((1, 1, 64, LATENT), torch.Generator().manual_seed(0), "cpu").numpy()
    inputs = {"image_embeddings": embeddings, "input_boxes": np.array([[BOX]], np.float32), "noise": noise}
    masks, outlines, mean, _, presence = session.run(None, inputs)
    normal = torch.distributions.Normal(0, 1)
    assert presence.item() == pytest.approx(normal.cdf(torch.tensor(mean[0, 0, 0])).item(), abs=1e-6)
    # Evenly spread noise: the share of samples is the probability within one sample
    present = (masks > EMPTY).any(axis=(-2, -1))
    assert present.mean() == pytest.approx(presence.item(), abs=1 / 64)
    # Given presence: the samples that are not empty as they are, and outlines for the others
    assert np.array_equal(outlines[present], masks[present]) and 0 < present.mean() < 1
    assert (outlines > EMPTY).any(axis=(-2, -1)).all()


@pytest.mark.parametrize("precision", ["_fp16", "_quantized"])
def test_other_precisions_give_nearly_the_same_masks(exported, models, pixel_values, precision):
    noise = spread_noise((1, 1, 8, LATENT), torch.Generator().manual_seed(0), "cpu")
    encoder, decoder = (session_of(exported, graph + precision) for graph in ("vision_encoder", "box_decoder"))
    (embeddings,) = encoder.run(None, {"pixel_values": pixel_values[:1].numpy()})
    inputs = {"image_embeddings": embeddings, "input_boxes": np.array([[BOX]], np.float32), "noise": noise.numpy()}
    masks, _, mean, _, _ = decoder.run(None, inputs)
    expected = models[0].sample(
        pixel_values[:1], torch.tensor([[BOX]]), num_samples=8, generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(mean, expected.prior_mean, atol=0.1)
    ours, reference = masks > 0, expected.pred_masks.numpy() > 0
    unions = (ours | reference).sum(axis=(-2, -1))
    overlaps = (ours & reference).sum(axis=(-2, -1))
    assert np.mean(overlaps[unions > 0] / unions[unions > 0]) >= (0.99 if precision == "_fp16" else 0.97)


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
        ({"input_masks": torch.zeros(1, 1, 64, 64)}, "does not support a mask prompt"),
        ({**prompts("box", 1), **prompts("point", 1)}, "does not support a box together with points"),
        ({}, "A prompt must be provided"),
        ({**prompts("box", 1), "num_samples": 0}, "num_samples must be at least 1"),
        ({**prompts("point", 1), "input_labels": torch.full((1, 2, 4), 5)}, "input_labels must be"),
        ({**prompts("box", 1), "multimask_output": True}, "multimask_output is not supported"),
    ],
)
def test_what_the_graphs_cannot_do_is_refused(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        models[1].sample(pixel_values=torch.zeros(1, 3, SIDE, SIDE), **arguments)


def test_embeddings_of_another_model_are_refused(models):
    with pytest.raises(ValueError, match="image_embeddings must have the shape"):
        models[1].sample(image_embeddings=torch.zeros(1, 16, 16, 16), **prompts("box", 1))


def test_loading_fails_in_one_line(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="accepted: torch, onnx"):
        load_model(exported, runtime="tensorflow")
    with pytest.raises(UserError, match="runs on the CPU"):
        load_model(exported, "cuda", runtime="onnx")
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no onnx/vision_encoder.onnx; .*export_onnx.py"):
        load_model(tmp_path, runtime="onnx")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would try to connect several times
    with pytest.raises(UserError, match="neither here nor on the Hub"):
        load_model("no-one/nothing", runtime="onnx")
    (tmp_path / "onnx").mkdir()
    for graph in GRAPHS:
        (tmp_path / "onnx" / f"{graph}.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="vision_encoder.onnx cannot be loaded"):
        load_model(tmp_path, runtime="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"probabilistic-sam\[onnx\]"):
        load_model(exported, runtime="onnx")
    with pytest.raises(UserError, match=r"probabilistic-sam\[onnx\]"):
        export_onnx(tiny_model(), ProbabilisticSamProcessor(SIZE, 24), tmp_path / "new")


def test_graphs_of_other_weights_or_windows_are_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "run")
    load_model(tmp_path / "run", runtime="onnx")
    processor = load_model(exported)[1]
    processor.crop_size = 96
    processor.save_pretrained(tmp_path / "run")
    message = "vision_encoder.onnx is out of date: it has other crop_size 64 instead of 96; .*export_onnx.py"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "run", runtime="onnx")
    processor.crop_size = 64
    processor.save_pretrained(tmp_path / "run")
    model = load_model(exported)[0]
    with torch.no_grad():
        model.prior.lin2.bias[0] -= 1.5  # as calibration moves the presence
    model.save_pretrained(tmp_path / "run")
    message = "vision_encoder.onnx is out of date: it has other weights; .*export_onnx"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "run", runtime="onnx")
    with pytest.raises(UserError, match=message):
        stage_model(tmp_path / "run", tmp_path / "staged", "alice/tiny")
    assert not (tmp_path / "staged").exists()


def test_export_does_not_replace_foreign_files(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        export_onnx(tiny_model(), ProbabilisticSamProcessor(SIZE, 24), tmp_path)


def test_segment_gives_the_masks_of_pytorch(exported, tmp_path):
    image = EXAMPLES / "phantom-1.png"
    for runtime in ("torch", "onnx"):
        cli.main(
            ["segment", str(image), "--box", "52", "50", "78", "80", "--num-samples", "4", "--model", str(exported)]
            + ["--runtime", runtime, "--output", str(tmp_path / runtime)]
        )  # fmt: skip
    results = [json.loads((tmp_path / runtime / "result.json").read_text()) for runtime in ("torch", "onnx")]
    assert results[0]["area_px"] == results[1]["area_px"]
    with pytest.raises(UserError, match="runs on the CPU"):
        load_model(exported, runtime="onnx")[0].to("mps")


def test_staged_example_runs_without_pytorch(exported, tmp_path):
    stage_model(exported, tmp_path / "staged", "alice/tiny")
    staged = tmp_path / "staged"
    assert {path.name for path in (staged / "onnx").iterdir()} == set(ONNX_FILES)
    script = str(staged / "onnx_example.py")
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x']; runpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    masks = np.load(tmp_path / "masks.npz")["masks"]
    assert masks.shape == (16, 128, 128) and masks.dtype == bool
    # Of the same model and box: as many empty masks, and the same mean area up to the different noise
    model, processor = load_model(exported)
    image = np.asarray(Image.open(EXAMPLES / EXAMPLE["image"]))
    sampled = sample_image(model, processor, image, {"box": EXAMPLE["box"]}, num_samples=16)
    assert (~masks.any(axis=(1, 2))).mean() == pytest.approx(sampled.empty_share, abs=1 / 16)
