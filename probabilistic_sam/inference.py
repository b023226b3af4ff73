"""Load a model and sample masks for a prompt in an image; `results` writes them.

    model, processor = load_model("model_cards/psam-lidc")
    image, pixel_spacing = load_slice("slice.png")
    sampled = sample_image(model, processor, image, {"box": [52, 50, 78, 80]}, num_samples=16, seed=0)
    write_result(Path("result"), image, sampled, "slice.png", "model_cards/psam-lidc", pixel_spacing)

A prompt is a dictionary with any of these keys, in pixels of the image, measured at the pixels' edges:

- `box`: `[x1, y1, x2, y2]`
- `points`: `[[x, y], ...]`, inside the lesion
- `negative_points`: `[[x, y], ...]`, outside the lesion; they refine one of the others
- `mask`: (H, W) array, a rough mask; `processing_probabilistic_sam.mask_inside` decides which values are inside
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from . import ProbabilisticSamModel, ProbabilisticSamProcessor
from .baselines import BASELINES
from .errors import UserError
from .processing_probabilistic_sam import mask_inside

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
RUNTIMES = ("torch", "onnx")
MAX_SAMPLES = 1_000
MAX_POINTS = 32  # per prompt, of each kind
MAX_SAMPLED_PIXELS = 2**30  # samples times pixels; each takes two bytes, one for the mask and one for the outline
HOW_TO_GET_WEIGHTS = (
    "give --model with a folder or a name on the Hub (owner/name), or install a clone of the repository with "
    "pip install -e, so that its model_cards/psam-lidc is found"
)


@dataclass
class SampledMasks:
    """Masks sampled for one prompt, at the size of the image, and how they were sampled.

    Args:
        presence: expected share of readers who annotate.
        outlines: (M, H, W) bool, the samples given presence. M is N, and 0 if the presence is less than 1 %. For a
            baseline, which has no `outline_masks`, they are the samples that are not empty.
        masks: (N, H, W) bool, the samples: sample i is outline i or empty, except for a baseline.
        mean: (H, W) probability, averaged over the samples.
        entropy: (H, W) of that mean in bits.
        areas: (N,) in pixels.
        empty_share: share of empty samples.
        prompt: as given to `sample_image`.
        seed: of the noise.
        threshold: probability above which a pixel belongs to a mask.
    """

    presence: float
    outlines: np.ndarray
    masks: np.ndarray
    mean: np.ndarray
    entropy: np.ndarray
    areas: np.ndarray
    empty_share: float
    prompt: dict[str, Any]
    seed: int
    threshold: float

    @property
    def shown(self) -> np.ndarray:
        """What figures show: outlines, or the samples if the presence is too small for outlines."""
        return self.outlines if len(self.outlines) else self.masks


def find_model(name: str | None) -> str:
    """Return the folder or Hub name of the model to load: `name`, or the released weights if it is None.

    Raises:
        UserError: no name is given and the released weights are missing, as in an installation without a checkout.
    """
    if name is None and not DEFAULT_MODEL.is_dir():
        raise UserError(f"no weights found; {HOW_TO_GET_WEIGHTS}")
    return str(name or DEFAULT_MODEL)


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name; without a name CUDA if available, otherwise the CPU.

    Raises:
        UserError: an unknown device, or one that this computer does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {name!r}; accepted: cpu, cuda, cuda:1, mps")
    count = 1
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    elif device.type == "mps":
        count = int(torch.backends.mps.is_available())
    if (device.index or 0) >= count:
        cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(
            f"device {name} is not available; accepted on this computer: {', '.join(['cpu', *cuda, *mps])}"
        )
    return device


def load_model(
    name: str | os.PathLike,
    device: str | torch.device = "cpu",
    baselines: bool = False,
    runtime: str = "torch",
) -> tuple[Any, ProbabilisticSamProcessor]:
    """Load a trained model and its processor.

    Args:
        name: directory, or `owner/name` on the Hub.
        device: where the model goes.
        baselines: open the models of `probabilistic_sam.baselines` too, not only Probabilistic SAM.
        runtime: `torch`, or `onnx` for an `OnnxModel` from the files of `training/export_onnx.py`.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        UserError: missing directory, files or tensors, damaged files, a model of another kind, or an unknown runtime.
    """
    if runtime == "onnx":
        from .onnx_model import load_onnx_model

        return load_onnx_model(name, device)
    if runtime != "torch":
        raise UserError(f"runtime is {runtime!r}; accepted: {', '.join(RUNTIMES)}")
    classes = {item.config_class.model_type: item for item in (ProbabilisticSamModel, *BASELINES * baselines)}
    accepted = "accepted: a directory that training/train.py wrote, or owner/name on the Hub"
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model directory {name} has no config.json; {accepted}")
        if not any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise UserError(f"model directory {name} has no weights (model.safetensors); {accepted}")
    elif directory.exists():
        raise UserError(f"model {name} is a file; {accepted}")
    elif str(name).count("/") != 1 or str(name).startswith(("/", ".", "~")) or str(name).endswith("/"):
        raise UserError(f"no model directory at {name}; {accepted}")

    model_type = _model_type(name)
    if model_type in ("sam", "sam_hq"):
        raise UserError(
            f"model {name} is a plain SAM checkpoint, which predicts a single mask; accepted: a Probabilistic SAM, "
            "which training/train.py trains from such a checkpoint"
        )
    if model_type not in classes:
        wanted = "neither a Probabilistic SAM nor one of its baselines" if baselines else "not a Probabilistic SAM"
        raise UserError(f"model {name} is of type {model_type!r}, {wanted}; {accepted}")
    if directory.is_dir() and not (directory / "processor_config.json").is_file():
        raise UserError(f"model directory {name} has no processor_config.json; {accepted}")
    try:
        model, info = classes[model_type].from_pretrained(name, output_loading_info=True)
        processor = ProbabilisticSamProcessor.from_pretrained(name)
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError, EOFError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        raise UserError(f"model {name} cannot be loaded ({_first_line(error)}); {accepted}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {name} lacks {len(missing)} tensors, such as {missing[0]}: its weights are incomplete or those "
            f"of another model; {accepted}"
        )
    size = getattr(model.config, "vision_config", model.config).image_size
    if processor.image_size != size:
        raise UserError(
            f"model {name} takes images of {size} pixels, but its processor_config.json makes them of "
            f"{processor.image_size}; accepted: one image_size"
        )
    return model.to(device).eval(), processor


def sample_image(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    image: np.ndarray,
    prompt: dict[str, Any],
    num_samples: int = 16,
    seed: int = 0,
    threshold: float = 0.5,
) -> SampledMasks:
    """Sample masks for one prompt. The same seed gives the same samples.

    Args:
        model: on any device.
        processor: the one saved with the model.
        image: (H, W), any range of grey values, or (H, W, 3).
        prompt: dictionary with `box`, `points`, `negative_points` or `mask`, as described at the top of this module.
        num_samples: N.
        seed: of the noise.
        threshold: probability above which a pixel belongs to a mask, between 0 and 1.

    Raises:
        UserError: a prompt that does not fit the image, a threshold out of range, or logits that are not finite.
        ValueError: `num_samples` is not a whole number of at least 1.
    """
    check_prompt(prompt, image.shape[1], image.shape[0])
    inputs = processor(images=image, **_processor_arguments(prompt), return_tensors="pt")
    windows, sizes = inputs.pop("windows"), inputs.pop("original_sizes")
    generator = torch.Generator().manual_seed(seed)
    samples = model.sample(**inputs.to(model.device), num_samples=num_samples, generator=generator)
    fields = ("pred_masks", "outline_masks", "presence")  # baselines have pred_masks only
    given = {name: samples[name].cpu() for name in fields if name in samples}
    try:
        (result,) = processor.post_process_samples(windows=windows, original_sizes=sizes, threshold=threshold, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    masks = result["masks"].numpy()
    return SampledMasks(
        result["presence"], result["outlines"].numpy(), masks, result["mean"].numpy(), result["entropy"].numpy(),
        masks.sum(axis=(1, 2)), result["empty_share"], prompt, seed, threshold,
    )  # fmt: skip


def check_prompt(prompt: dict[str, Any], width: int, height: int) -> None:
    """Raise `UserError` for a prompt that does not fit an image of `width` x `height` pixels.

    A box may leave the image by less than a pixel; the processor clips it.
    """
    unknown = [key for key in prompt if key not in ("box", "points", "negative_points", "mask")]
    if unknown:
        raise UserError(f"the prompt has the key {unknown[0]!r}; accepted: box, points, negative_points, mask")
    if "box" in prompt:
        _check_box(prompt["box"], width, height)
    for key in ("points", "negative_points"):
        _check_points(prompt.get(key, []), key, width, height)
    if "mask" in prompt:
        _check_mask(prompt["mask"], width, height)
    if "box" not in prompt and "mask" not in prompt and not len(prompt.get("points", [])):
        raise UserError("the prompt has no box, point or mask; accepted: at least one; negative points only refine it")


def check_num_samples(num_samples: int, image: np.ndarray) -> None:
    """Raise `UserError` if that many masks of an image (H, W) or (H, W, 3) need too much memory."""
    height, width = image.shape[:2]
    if num_samples * height * width > MAX_SAMPLED_PIXELS:
        raise UserError(
            f"{num_samples} samples of {width} x {height} pixels need too much memory; accepted: at most "
            f"{MAX_SAMPLED_PIXELS // (height * width)} samples for this image"
        )


def quiet_transformers() -> None:
    """Silence loading reports, retries and progress bars of transformers and the Hub client."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pixels_inside(mask: Any) -> np.ndarray:
    """Pixels (H, W) inside a mask prompt (H, W), as `mask_inside` decides."""
    return mask_inside(torch.from_numpy(np.asarray(mask).astype(np.float32))).numpy()


def _processor_arguments(prompt: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the processor for one image with one prompt."""
    arguments: dict[str, Any] = {}
    points, negative = ([list(point) for point in prompt.get(key, [])] for key in ("points", "negative_points"))
    if "box" in prompt:
        arguments["input_boxes"] = [[prompt["box"]]]
    if points or negative:
        arguments["input_points"] = [[points + negative]]
        arguments["input_labels"] = [[[1] * len(points) + [0] * len(negative)]]
    if "mask" in prompt:
        arguments["input_masks"] = [[prompt["mask"]]]
    return arguments


def _check_box(box: Any, width: int, height: int) -> None:
    values = _numbers(box)
    if values is None or values.shape != (4,):
        raise UserError("the box is not understood; accepted: four finite numbers x1 y1 x2 y2")
    with np.errstate(over="ignore"):
        x1, y1, x2, y2 = values.astype(np.float32).tolist()  # the precision of the processor
    text = " ".join(f"{value:g}" for value in values)
    if x2 < x1 or y2 < y1:
        raise UserError(f"box {text} is turned around; accepted: x1 y1 x2 y2 with x1 < x2 and y1 < y2")
    if x1 == x2 or y1 == y2:
        raise UserError(f"box {text} has no area; accepted: x1 y1 x2 y2 with x1 < x2 and y1 < y2")
    outside = max(-x1, -y1, x2 - width, y2 - height) >= 1
    if outside or min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        raise UserError(
            f"box {text} reaches outside the image of {width} x {height} pixels; accepted: 0 <= x <= {width}, "
            f"0 <= y <= {height}"
        )


def _check_points(points: Any, name: str, width: int, height: int) -> None:
    values = _numbers(points)
    if values is None or values.shape != (0,) and (values.ndim != 2 or values.shape[1] != 2):
        raise UserError(f"the {name} are not understood; accepted: pairs of finite numbers x y")
    if len(values) > MAX_POINTS:
        raise UserError(f"the prompt has {len(values)} {name}; accepted: up to {MAX_POINTS}")
    for x, y in values:
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(
                f"point {x:g} {y:g} lies outside the image of {width} x {height} pixels; accepted: 0 <= x <= {width}, "
                f"0 <= y <= {height}"
            )


def _check_mask(mask: Any, width: int, height: int) -> None:
    shape = np.shape(mask)
    if shape != (height, width):
        size = " x ".join(str(length) for length in reversed(shape))
        raise UserError(f"the mask prompt has {size} pixels; accepted: the {width} x {height} pixels of the image")
    try:
        inside = pixels_inside(mask)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not inside.any():
        raise UserError("the mask prompt is empty; accepted: a mask with at least one pixel inside")


def _numbers(values: Any) -> np.ndarray | None:
    """An array of finite numbers, or None if the values are anything else."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return None
    return array if np.isfinite(array).all() else None


def _model_type(name: str | os.PathLike) -> str | None:
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        place = "" if Path(name).is_dir() else ", neither here nor on the Hub"
        raise UserError(f"the configuration of model {name} cannot be read{place} ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"the configuration of model {name} is no JSON object; accepted: that of a Probabilistic SAM")
    return config.get("model_type")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].rstrip(".:")[:200]
