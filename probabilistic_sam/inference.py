"""From an image and a prompt to sampled masks, and their files."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

from . import ProbabilisticSamModel, ProbabilisticSamProcessor, __version__
from .baselines import BASELINES
from .errors import UserError
from .images import luminance
from .plotting import sample_figure, save_figure
from .processing_probabilistic_sam import QUANTILES

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
MAX_SAMPLES = 1_000
MAX_SAMPLED_PIXELS = 2**30  # samples times pixels: one byte each is kept
RESULT_FILES = ("masks", "mean.png", "uncertainty.png", "figure.png", "result.json")


@dataclass
class SampledMasks:
    """Samples of one prompt at the image's own size.

    Args:
        masks: (N, H, W) bool.
        mean: (H, W) probability, averaged over the samples.
        entropy: (H, W) of that mean in bits.
        areas: (N,) in pixels.
        empty_share: share of the samples that are empty.
    """

    masks: np.ndarray
    mean: np.ndarray
    entropy: np.ndarray
    areas: np.ndarray
    empty_share: float


def load_model(
    name: str | os.PathLike, device: str | torch.device = "cpu", baselines: bool = False
) -> tuple[Any, ProbabilisticSamProcessor]:
    """Load a trained model and its processor.

    Args:
        name: directory, or `owner/name` on the Hub.
        device: where the model goes.
        baselines: open the models of `probabilistic_sam.baselines` too, not only Probabilistic SAM.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        UserError: missing directory, files or tensors, damaged files, or a model of another kind.
    """
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
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, EOFError) as error:
        raise UserError(f"model {name} cannot be loaded ({_first_line(error)}); {accepted}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {name} lacks {len(missing)} tensors, such as {missing[0]}: its weights are incomplete or those "
            f"of another model; {accepted}"
        )
    return model.to(device).eval(), processor


def sample_image(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    image: np.ndarray,
    prompt: dict[str, Any],
    num_samples: int,
    seed: int,
) -> SampledMasks:
    """Draw samples for one prompt; the same seed gives the same samples.

    Args:
        model: on any device.
        processor: the one saved with the model.
        image: (H, W), any range of grey values, or (H, W, 3).
        prompt: `{"box": [x1, y1, x2, y2]}` or `{"points": [[x, y], ...]}`, in pixels of the image.
        num_samples: N.
        seed: of the noise.

    Raises:
        UserError: the model's logits are not finite.
    """
    if "box" in prompt:
        inputs = processor(images=image, input_boxes=[[prompt["box"]]], return_tensors="pt")
    else:
        labels = [[[1] * len(prompt["points"])]]
        inputs = processor(images=image, input_points=[[prompt["points"]]], input_labels=labels, return_tensors="pt")
    windows, sizes = inputs.pop("windows"), inputs.pop("original_sizes")
    generator = torch.Generator().manual_seed(seed)
    pred_masks = model.sample(**inputs.to(model.device), num_samples=num_samples, generator=generator).pred_masks
    assert pred_masks is not None  # always there; the output's fields are optional for mypy
    try:
        (result,) = processor.post_process_samples(pred_masks.cpu(), windows, sizes)
    except ValueError as error:
        raise UserError(str(error)) from error
    masks = result["masks"].numpy()
    areas = masks.sum(axis=(1, 2))
    return SampledMasks(masks, result["mean"].numpy(), result["entropy"].numpy(), areas, result["empty_share"])


def area_summary(areas: np.ndarray, scale: float = 1.0) -> dict[str, Any]:
    """Areas of the samples and their quantiles, times `scale` (mm^2 a pixel): a dictionary for JSON."""
    values = np.asarray(areas) * scale
    quantiles = {str(level): round(float(np.quantile(values, level)), 4) for level in QUANTILES}
    return {"mean": round(float(values.mean()), 4), "quantiles": quantiles, "samples": values.round(4).tolist()}


def write_samples(folder: Path, sampled: SampledMasks) -> None:
    """Write `masks/sample-00.png`, ... as 1-bit PNG."""
    (folder / "masks").mkdir(parents=True)
    digits = max(2, len(str(len(sampled.masks) - 1)))
    for index, mask in enumerate(sampled.masks):
        Image.fromarray(mask).save(folder / "masks" / f"sample-{index:0{digits}d}.png")


def write_grey(path: Path, values: np.ndarray) -> None:
    """Write values between 0 and 1 as 16-bit grey PNG; 65535 stands for 1."""
    Image.fromarray(np.round(np.clip(values, 0, 1) * 65535).astype(np.uint16)).save(path)


def check_prompt(prompt: dict[str, Any], width: int, height: int) -> None:
    """Raise `UserError` for a box or a point that does not lie in an image of `width` x `height` pixels.

    A box may leave it by less than a pixel; the processor clips it.
    """
    size = f"the image of {width} x {height} pixels"
    if "box" in prompt:
        x1, y1, x2, y2 = prompt["box"]
        text = " ".join(f"{value:g}" for value in prompt["box"])
        if x2 < x1 or y2 < y1:
            raise UserError(f"box {text} is turned around; accepted: x1 y1 x2 y2 with x1 < x2 and y1 < y2")
        if x1 == x2 or y1 == y2:
            raise UserError(f"box {text} has no area; accepted: x1 y1 x2 y2 with x1 < x2 and y1 < y2")
        outside = max(-x1, -y1, x2 - width, y2 - height) >= 1
        if outside or min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
            raise UserError(f"box {text} reaches outside {size}; accepted: 0 <= x <= {width}, 0 <= y <= {height}")
    for x, y in prompt.get("points", []):
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"point {x:g} {y:g} lies outside {size}; accepted: 0 <= x <= {width}, 0 <= y <= {height}")


def check_num_samples(num_samples: int, image: np.ndarray) -> None:
    """Raise `UserError` when so many masks of the image (H, W) or (H, W, 3) need too much memory."""
    height, width = image.shape[:2]
    if num_samples * height * width > MAX_SAMPLED_PIXELS:
        raise UserError(
            f"{num_samples} samples of {width} x {height} pixels need too much memory; accepted: at most "
            f"{MAX_SAMPLED_PIXELS // (height * width)} samples for this image"
        )


def write_result(
    folder: Path,
    image: np.ndarray,
    sampled: SampledMasks,
    prompt: dict[str, Any],
    name: str,
    model: str,
    seed: int,
    pixel_spacing: float | None = None,
) -> dict[str, Any]:
    """Write masks, mean, uncertainty, figure and `result.json` into `folder`.

    Args:
        folder: new or empty.
        image: (H, W) or (H, W, 3).
        sampled: what the model sampled for it.
        prompt: as `sample_image` takes it.
        name: of the image.
        model: directory or owner/name.
        seed: of the noise.
        pixel_spacing: side of a pixel in mm; adds areas in mm^2.

    Returns:
        What `result.json` holds.
    """
    write_samples(folder, sampled)
    write_grey(folder / "mean.png", sampled.mean)
    write_grey(folder / "uncertainty.png", sampled.entropy)
    figure = sample_figure(
        luminance(image), sampled.masks, sampled.mean, sampled.entropy, box=prompt.get("box"),
        point=prompt.get("points"), title=Path(name).name,
    )  # fmt: skip
    save_figure(figure, folder / "figure.png")
    result = {
        "image": name,
        "image_size": {"width": image.shape[1], "height": image.shape[0]},
        "prompt": prompt,
        "model": model,
        "num_samples": len(sampled.masks),
        "seed": seed,
        "empty_share": sampled.empty_share,
        "area_px": area_summary(sampled.areas),
    }
    if pixel_spacing is not None:
        result["pixel_spacing_mm"] = pixel_spacing
        result["area_mm2"] = area_summary(sampled.areas, pixel_spacing**2)
    result["files"] = {
        "masks/sample-*.png": "one mask a sample, 1 bit",
        "mean.png": "mean probability, 16 bit, 65535 = 1",
        "uncertainty.png": "entropy of the mean probability, 16 bit, 65535 = 1 bit",
        "figure.png": "everything on one page",
    }
    result["versions"] = {
        "probabilistic_sam": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def result_words(result: dict[str, Any]) -> str:
    """What `write_result` returned, in one line: number of samples, median area and its range, share of empty ones."""
    unit = "mm2" if "area_mm2" in result else "px"
    low, middle, high = (result[f"area_{unit}"]["quantiles"][level] for level in ("0.05", "0.5", "0.95"))
    return (
        f"{result['num_samples']} samples, median area {middle:.4g} {unit} (5 to 95 %: {low:.4g} to {high:.4g}), "
        f"{result['empty_share']:.0%} empty"
    )


def quiet_transformers() -> None:
    """Keep loading reports, retries and progress bars of transformers and the Hub client from the terminal."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _model_type(name: str | os.PathLike) -> str | None:
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        place = "" if Path(name).is_dir() else ", neither here nor on the Hub"
        raise UserError(f"the configuration of model {name} cannot be read{place} ({_first_line(error)})") from error
    return config.get("model_type")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].rstrip(".:")[:200]
