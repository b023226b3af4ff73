"""Export a model as ONNX graphs, for onnxruntime in Python, in a browser or on a phone.

    from probabilistic_sam.inference import load_model
    model, processor = load_model("model_cards/psam-lidc")
    export_onnx(model, processor, "onnx", name="psam-lidc")

Three graphs, each in three precisions: `vision_encoder.onnx` in float32, `vision_encoder_fp16.onnx`, and
`vision_encoder_quantized.onnx` with int8 weights. Inputs and outputs are float32 in all of them. There are two
decoders, because SAM appends a padding point to points without a box, which changes the logits.

A call is for one image and one prompt. S is the side of the model's input (`image_size`, 256 in the released model),
C = output channels + 16 (272), g = S / 16, h = w = S / 4, L = `latent_dim` (9). N samples and K points are dynamic.

| graph | name | shape | type |
|---|---|---|---|
| all decoders, encoder | `image_embeddings` | (1, C, g, g) | float32, output of the encoder, input of the decoders |
| `vision_encoder` | input `pixel_values` | (1, 3, S, S) | float32 |
| `box_decoder` | input `input_boxes` | (1, 1, 4) | float32: x1, y1, x2, y2 |
| `point_decoder` | input `input_points` | (1, 1, K, 2) | float32: x, y |
| `point_decoder` | input `input_labels` | (1, 1, K) | int64: 1 inside, 0 outside, -10 padding |
| both decoders | input `noise` | (1, 1, N, L) | float32 |
| both decoders | output `pred_masks` | (1, 1, N, h, w) | float32 logits, -30 everywhere in an empty sample |
| both decoders | output `outline_masks` | (1, 1, N, h, w) | float32 logits of the same samples given presence |
| both decoders | outputs `prior_mean`, `prior_log_std` | (1, 1, L) | float32 |
| both decoders | output `presence` | (1, 1) | float32, probability that a sample is not empty |

From an image (H, W) and a box to masks, in the order of `ProbabilisticSamProcessor` (`crop_size`, `image_size` and
`stretch_percentiles` are in `processor_config.json` and in the metadata of the files):

1. Window: `side = max(crop_size, ceil(max(x2 - x1, y2 - y1) / 0.75))`, `x = round(centre_x - side / 2)`, and y alike
   (round half to even). For points take the bounding box of the positive ones.
2. Percentiles `low`, `high` (0.5 and 99.5, linear interpolation as in `numpy.percentile`) of the window's pixels that
   lie inside the image. Pixels outside take the minimum of those inside. Grey values become
   `255 * clip((v - low) / (high - low), 0, 1)`, where `high - low` is at least 1e-6.
3. Resize to S x S: bilinear with half-pixel centres and clamped edges. Only if side > S the filter is widened
   (antialiasing).
4. Three equal channels (or RGB), each `(v - mean) / std` with mean 123.675, 116.28, 103.53 and std 58.395, 57.12,
   57.375.
5. Prompt: `(coordinate - corner) * S / side`, in pixels of the input, measured at the pixels' edges. Give negative
   points outside the window the label -10 and the coordinates (-10, -10).
6. Noise: standard normal. Any generator will do. Evenly spread samples (Latin hypercube, as `spread_noise` in
   `modeling_probabilistic_sam.py`): for each of the L coordinates a random permutation `p` of 0..N-1 and uniform `u`,
   then `noise = inverse_normal_cdf((p + u) / N)`. The same noise gives the same masks as PyTorch up to rounding.
7. Masks: resize the logits bilinearly from h x w to side x side (as in 3; antialiasing if side < w), paste at (x, y)
   into an image filled with -30, and threshold at 0 (a probability of 0.5).
"""

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ProbabilisticSamModel, ProbabilisticSamProcessor, __version__
from .errors import UserError
from .files import replaced_directory
from .modeling_probabilistic_sam import EMPTY_LOGIT
from .weights import model_hash

OPSET = 20  # the first with Gelu; onnxruntime-web runs it
GRAPHS = ("vision_encoder", "box_decoder", "point_decoder")
PRECISIONS = ("", "_fp16", "_quantized")  # suffixes: float32, float16, int8 weights
ONNX_FILES = tuple(f"{graph}{precision}.onnx" for graph in GRAPHS for precision in PRECISIONS)
# What reads the weights that become int8 (in the mask decoder some are reshaped first), and their smallest size
WEIGHT_CONSUMERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Reshape", "Transpose")
MIN_QUANTIZED = 4096
DECODER_OUTPUTS = ("pred_masks", "outline_masks", "prior_mean", "prior_log_std", "presence")


class VisionEncoder(nn.Module):
    """`ProbabilisticSamModel.encode` as a module."""

    def __init__(self, model: ProbabilisticSamModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image embeddings (1, C, g, g) of an image (1, 3, S, S)."""
        return self.model.encode(pixel_values)


class Decoder(nn.Module):
    """Prompt to masks: prompt encoder, detail network, prior and mask decoder, with the noise as an input."""

    def __init__(self, model: ProbabilisticSamModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        image_embeddings: torch.Tensor,
        noise: torch.Tensor,
        input_boxes: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Tensors in the order of `DECODER_OUTPUTS`."""
        model = self.model
        lead, features, coarse_maps, embeddings = model.embed(
            image_embeddings, input_points, input_labels, input_boxes, None
        )
        mean, log_std = model.predict_prior(lead, features, coarse_maps)
        latents = mean[:, :, None] + torch.exp(log_std)[:, :, None] * noise
        outlines, _ = model.decode_outlines(embeddings, latents)
        pred_masks = torch.where(latents[..., 0, None, None] <= 0, EMPTY_LOGIT, outlines)
        presence = 0.5 * (1 + torch.erf(mean[..., 0] / math.sqrt(2)))
        return pred_masks, outlines, mean, log_std, presence


def export_onnx(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    folder: str | os.PathLike[str],
    name: str = "",
) -> list[Path]:
    """Write the three graphs in three precisions.

    Args:
        model: in float32 on the CPU.
        processor: the one saved with the model; its settings are written into the metadata.
        folder: new, empty, or an earlier export, which is replaced as a whole.
        name: of the model, for the metadata.

    Returns:
        The files.

    Raises:
        UserError: packages of the extra `onnx` are missing, or the folder cannot be written.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  # converts to float16
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ModuleNotFoundError as error:
        raise UserError(
            f"the export needs {error.name}, which is not installed; accepted: pip install 'probabilistic-sam[onnx]'"
        ) from error
    metadata = export_metadata(model, processor, name)
    with replaced_directory(folder, ONNX_FILES) as new:
        for graph in GRAPHS:
            exported = trace(model, graph)
            onnx.helper.set_model_props(exported, metadata)
            onnx.checker.check_model(exported, full_check=True)
            onnx.save(exported, new / f"{graph}.onnx")
            onnx.save(to_float16(exported), new / f"{graph}_fp16.onnx")
            onnx.save(to_int8(exported), new / f"{graph}_quantized.onnx")
    return [Path(folder) / file for file in ONNX_FILES]


def export_metadata(
    model: ProbabilisticSamModel, processor: ProbabilisticSamProcessor, name: str = ""
) -> dict[str, str]:
    """What the files say about their model: name, versions, sizes, hash of the weights, settings of the processor."""
    entries: dict[str, Any] = {
        "model": name,
        "commit": getattr(model.config, "_commit_hash", None),  # of a model from the Hub
        "probabilistic_sam": __version__,
        "latent_dim": str(model.config.latent_dim),
        "weights": model_hash(model),
    }
    entries |= processor_settings(processor)
    return {key: value for key, value in entries.items() if value not in (None, "")}


def processor_settings(processor: ProbabilisticSamProcessor) -> dict[str, str | None]:
    """The settings with which the windows of the graphs are cut, as text; None for no `crop_size`."""
    return {
        "image_size": str(processor.image_size),
        "crop_size": None if processor.crop_size is None else str(processor.crop_size),
        "stretch_percentiles": " ".join(f"{value:g}" for value in processor.stretch_percentiles),
    }


def trace(model: ProbabilisticSamModel, graph: str) -> Any:
    """The `onnx.ModelProto` of a graph, without the exporter's notes on its nodes, which name local files."""
    size, latent_dim = model.config.prompt_encoder_config.image_size, model.config.latent_dim
    pixel_values = torch.zeros(1, 3, size, size)
    inputs: dict[str, torch.Tensor] = {"pixel_values": pixel_values}
    shapes: dict[str, Any] = {"pixel_values": None}
    module: nn.Module = VisionEncoder(model)
    outputs: tuple[str, ...] = ("image_embeddings",)
    if graph != "vision_encoder":
        module, outputs = Decoder(model), DECODER_OUTPUTS
        # Sizes other than 1, which would become constants of the graph
        inputs = {
            "image_embeddings": model.get_image_embeddings(pixel_values),
            "noise": torch.zeros(1, 1, 5, latent_dim),
        }
        shapes = {"image_embeddings": None, "noise": {2: "samples"}}
        if graph == "box_decoder":
            inputs["input_boxes"] = torch.tensor([[[0.25, 0.25, 0.75, 0.75]]]) * size
            shapes["input_boxes"] = None
        else:
            inputs["input_points"] = torch.full((1, 1, 3, 2), size / 2)
            inputs["input_labels"] = torch.ones(1, 1, 3, dtype=torch.long)
            shapes |= {"input_points": {2: "points"}, "input_labels": {2: "points"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), kwargs=inputs, dynamic_shapes=shapes, output_names=outputs,
            opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for item in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        item.ClearField("metadata_props")
    return proto


def to_float16(exported: Any) -> Any:
    """The same graph computed in float16, with float32 inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = convert_float_to_float16(exported, keep_io_types=True)
    OnnxModel.graph_topological_sort(converted.graph)  # the converter appends its casts
    return converted


def to_int8(exported: Any) -> Any:
    """The same graph with int8 weights, one scale per channel, computed in float32.

    The weights are dequantised by standard operators when the graph runs, which any execution provider supports. Int8
    activations would be less exact: where the presence changes its sign, a whole mask appears or vanishes.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(exported)
    graph = result.graph
    consumers = {name: node.op_type for node in graph.node for name in node.input}
    dequantizers = []
    for tensor in list(graph.initializer):
        consumer = consumers.get(tensor.name)
        if consumer not in WEIGHT_CONSUMERS or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        weight = onnx.numpy_helper.to_array(tensor)
        if weight.size < MIN_QUANTIZED:
            continue
        axis = int(consumer in ("MatMul", "ConvTranspose"))  # of the output channels
        scale = abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis), keepdims=True) / 127
        scale[scale == 0] = 1
        names = [f"{tensor.name}_int8", f"{tensor.name}_scale"]
        arrays = [(weight / scale).round().astype("int8"), scale.ravel()]
        graph.initializer.remove(tensor)
        graph.initializer.extend(map(onnx.numpy_helper.from_array, arrays, names))
        dequantizers.append(onnx.helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis))
    nodes = [*dequantizers, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return result
