"""An exported model run by onnxruntime on the CPU, with the `sample` of `ProbabilisticSamModel`.

`inference.load_model(name, runtime="onnx")` opens it. The graphs are those of `onnx_export.py` in float32.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError

from . import ProbabilisticSamOutput, ProbabilisticSamProcessor
from .errors import UserError
from .modeling_probabilistic_sam import (
    MAX_DECODED,
    OF_READERS,
    POINT_LABELS,
    check_image_and_prompts,
    check_other_arguments,
    check_values,
    spread_noise,
    whole_num_samples,
)
from .onnx_export import DECODER_OUTPUTS, GRAPHS, processor_settings
from .weights import folder_hash

FILES = tuple(f"onnx/{graph}.onnx" for graph in GRAPHS)
HOW_TO_EXPORT = "python training/export_onnx.py --model MODEL --output MODEL/onnx writes them"


class OnnxModel:
    """Samples masks with onnxruntime instead of PyTorch; the same generator gives the same samples up to rounding.

    Args:
        folder: with the three graphs.

    Raises:
        UserError: onnxruntime is not installed, or a file cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise UserError(
                "runtime onnx needs onnxruntime, which is not installed; accepted: pip install "
                "'probabilistic-sam[onnx]', or runtime torch"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.device = torch.device("cpu")
        self.sessions = {}
        for graph in GRAPHS:
            file = Path(folder) / f"{graph}.onnx"
            try:
                self.sessions[graph] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors have no common base
                reason = str(error).strip().partition("\n")[0][:200]
                raise UserError(f"{file} cannot be loaded ({reason}); {HOW_TO_EXPORT}") from error
        noise = next(item for item in self.sessions["box_decoder"].get_inputs() if item.name == "noise")
        self.latent_dim = noise.shape[-1]
        self.embedding_shape = tuple(self.sessions["vision_encoder"].get_outputs()[0].shape[1:])

    def to(self, device: str | torch.device) -> "OnnxModel":
        """The model itself.

        Raises:
            UserError: a device other than the CPU.
        """
        if torch.device(device).type != "cpu":
            raise UserError(f"runtime onnx runs on the CPU, got device {device}; accepted: cpu, or runtime torch")
        return self

    @property
    def weights(self) -> str | None:
        """The `model_hash` of the exported model; None in files of version 0.3 and earlier."""
        return self.sessions["vision_encoder"].get_modelmeta().custom_metadata_map.get("weights")

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As in `ProbabilisticSamModel`: (B, 3, S, S) to (B, C + 16, g, g)."""
        images = pixel_values.float().numpy()
        return torch.cat([self._run("vision_encoder", pixel_values=image[None])[0] for image in images])

    def sample(
        self,
        pixel_values: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        num_samples: int = 16,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ProbabilisticSamOutput:
        """As in `ProbabilisticSamModel`, for boxes or points, without `iou_scores`.

        Raises:
            ValueError: see `ProbabilisticSamModel.forward`.
            UserError: a mask prompt, or boxes and points together, for which there is no graph.
        """
        check_other_arguments({name: value for name, value in kwargs.items() if name not in OF_READERS})
        check_image_and_prompts(pixel_values, image_embeddings, input_points, input_labels, input_boxes, input_masks)
        num_samples = whole_num_samples(num_samples)
        if input_masks is not None or (input_boxes is not None and input_points is not None):
            given = "a mask prompt" if input_masks is not None else "a box together with points"
            raise UserError(f"runtime onnx does not support {given}; accepted: boxes or points, or runtime torch")
        if pixel_values is not None:
            image_embeddings = self.get_image_embeddings(pixel_values)
        assert image_embeddings is not None
        if tuple(image_embeddings.shape[1:]) != self.embedding_shape:
            raise ValueError(
                f"image_embeddings must have the shape {('B', *self.embedding_shape)}, those of get_image_embeddings, "
                f"got {tuple(image_embeddings.shape)}."
            )
        if input_points is not None:
            labels = torch.ones_like(input_points[..., 0]) if input_labels is None else input_labels
            check_values("input_labels", labels, POINT_LABELS)
            graph, prompts = "point_decoder", {"input_points": input_points.float(), "input_labels": labels.long()}
        else:
            assert input_boxes is not None
            graph, prompts = "box_decoder", {"input_boxes": input_boxes.float()}

        lead = next(iter(prompts.values())).shape[:2]
        noise = spread_noise((*lead, num_samples, self.latent_dim), generator, "cpu")
        decoded = []
        for image, prompt in np.ndindex(*lead):
            one = {name: value[image, prompt][None, None].numpy() for name, value in prompts.items()}
            one["image_embeddings"] = image_embeddings[image][None].float().numpy()
            # In parts, so that memory does not grow with the number of samples
            parts = [
                self._run(graph, **one, noise=part[None, None].numpy())
                for part in noise[image, prompt].split(MAX_DECODED)
            ]
            masks = [torch.cat([part[number] for part in parts], dim=2) for number in (0, 1)]
            decoded.append((*masks, *parts[0][2:]))
        outputs = [torch.cat(items).unflatten(0, lead).squeeze(2) for items in zip(*decoded, strict=True)]
        values = dict(zip(DECODER_OUTPUTS, outputs, strict=True))
        mean, log_std = values["prior_mean"], values["prior_log_std"]
        latents = mean[:, :, None] + torch.exp(log_std)[:, :, None] * noise
        return ProbabilisticSamOutput(latents=latents, **values)

    def _run(self, graph: str, **inputs: np.ndarray) -> list[torch.Tensor]:
        """Outputs of a graph."""
        return [torch.from_numpy(output) for output in self.sessions[graph].run(None, inputs)]


def load_onnx_model(
    name: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[OnnxModel, ProbabilisticSamProcessor]:
    """Load the graphs in `onnx/` of a folder or of a repository on the Hub, and the processor.

    Raises:
        UserError: missing or unreadable files, graphs of other weights than those in the folder or of another
            processor, onnxruntime is not installed, or a device other than the CPU.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.hf_hub_download(str(name), "processor_config.json")).parent
            for file in FILES:
                huggingface_hub.hf_hub_download(str(name), file)
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(f"the ONNX files of {name} are neither here nor on the Hub ({reason})") from error
    missing = [file for file in ("processor_config.json", *FILES) if not (folder / file).is_file()]
    if missing:
        raise UserError(f"model directory {name} has no {missing[0]}; {HOW_TO_EXPORT}")
    try:
        processor = ProbabilisticSamProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the processor of {name} cannot be loaded ({error})") from error
    model = OnnxModel(folder / "onnx").to(device)
    check_export(model, processor, folder)
    return model, processor


def check_export(model: OnnxModel, processor: ProbabilisticSamProcessor, folder: Path) -> None:
    """Raise `UserError` unless the graphs are those of the processor and of the weights, if any, in a folder.

    Weights may have been trained further, or calibrated, since the graphs were written.
    """
    expected = processor_settings(processor)
    if weights := folder_hash(folder):  # a cached repository of the Hub may have graphs only
        expected["weights"] = weights
    for graph, session in model.sessions.items():
        stated = session.get_modelmeta().custom_metadata_map
        for name, value in expected.items():
            if stated.get(name) != value:
                found = "" if name == "weights" else f" {stated.get(name)} instead of {value}"
                place = folder / "onnx" / f"{graph}.onnx"
                raise UserError(f"{place} is out of date: it has other {name}{found}; {HOW_TO_EXPORT}")
