"""The files and words in which masks sampled for one prompt are reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from . import __version__
from .inference import SampledMasks, pixels_inside
from .plotting import sample_figure, save_figure
from .processing_probabilistic_sam import MIN_PRESENCE, QUANTILES

RESULT_FILES = (
    "outlines/sample-[0-9]*.png", "masks/sample-[0-9]*.png", "mean.png", "uncertainty.png", "figure.png",
    "result.json",
)  # fmt: skip


def value_summary(values: np.ndarray, scale: float = 1.0) -> dict[str, Any] | None:
    """Return mean, quantiles and all values, times `scale` (such as mm^2 per pixel), for JSON; None for no values."""
    if not len(values):
        return None
    values = np.asarray(values) * scale
    quantiles = {str(level): shortened(np.quantile(values, level)) for level in QUANTILES}
    return {
        "mean": shortened(values.mean()),
        "quantiles": quantiles,
        "samples": [shortened(value) for value in values],
    }


def shortened(value: float) -> float:
    """A number with four decimals, or four significant digits if it is small, such as mm^2 under a microscope."""
    return round(float(value), 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def measure_words(value: float, decimals: int) -> str:
    """A measure with that many decimals, or two significant digits if it is small, such as a volume in micro-CT.

    >>> [measure_words(value, 0) for value in (1234.5, 12.3, 1.23, 0.0123)]
    ['1,234', '12', '1.2', '0.012']
    """
    return f"{value:,.{decimals}f}" if value >= 10 ** (1 - decimals) else f"{value:.2g}"


def write_masks(folder: Path, masks: np.ndarray) -> None:
    """Write masks (N, H, W) as 1-bit PNGs into a new folder: `sample-00.png`, ..."""
    folder.mkdir(parents=True)
    digits = max(2, len(str(len(masks) - 1)))
    for index, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"sample-{index:0{digits}d}.png")


def write_grey(path: Path, values: np.ndarray) -> None:
    """Write values from 0 to 1 as a 16-bit grey PNG; 65535 means 1."""
    Image.fromarray(np.round(np.clip(values, 0, 1) * 65535).astype(np.uint16)).save(path)


def write_result(
    folder: Path,
    image: np.ndarray,
    sampled: SampledMasks,
    name: str,
    model: str,
    pixel_spacing: float | None = None,
    mask_name: str | None = None,
) -> dict[str, Any]:
    """Write masks, mean, uncertainty, figure and `result.json` into `folder`.

    Args:
        folder: new or empty.
        image: (H, W), or (H, W, 3) uint8.
        sampled: from `sample_image` with this image.
        name: file of the image.
        model: folder or owner/name.
        pixel_spacing: side of a pixel in mm; adds areas in mm^2.
        mask_name: file of the mask prompt.

    Returns:
        The content of `result.json`.
    """
    prompt = sampled.prompt
    write_masks(folder / "masks", sampled.masks)
    write_masks(folder / "outlines", sampled.outlines)
    write_grey(folder / "mean.png", sampled.mean)
    write_grey(folder / "uncertainty.png", sampled.entropy)
    given = ", samples given presence" if len(sampled.outlines) else ""
    figure = sample_figure(
        image, sampled.shown, sampled.mean, sampled.entropy, box=prompt.get("box"),
        point=prompt.get("points"), negative_points=prompt.get("negative_points"),
        title=f"{Path(name).name}: {presence_words(sampled.presence)}{given}",
        mask=pixels_inside(prompt["mask"]) if "mask" in prompt else None,
    )  # fmt: skip
    save_figure(figure, folder / "figure.png")
    outlined = sampled.outlines.sum(axis=(1, 2))
    result = {
        "image": name,
        "image_size": {"width": image.shape[1], "height": image.shape[0]},
        "prompt": {
            key: mask_name if key == "mask" else np.asarray(value, dtype=float).tolist()
            for key, value in prompt.items()
        },
        "model": model,
        "num_samples": len(sampled.masks),
        "seed": sampled.seed,
        "threshold": sampled.threshold,
        "presence": sampled.presence,
        "area_px_given_presence": value_summary(outlined),
        "empty_share": sampled.empty_share,
        "area_px": value_summary(sampled.areas),
    }
    if pixel_spacing is not None:
        result["pixel_spacing_mm"] = pixel_spacing
        result["area_mm2_given_presence"] = value_summary(outlined, pixel_spacing**2)
        result["area_mm2"] = value_summary(sampled.areas, pixel_spacing**2)
    result["files"] = {
        "outlines/sample-*.png": "one mask per sample given presence, 1 bit",
        "masks/sample-*.png": "one mask per sample, 1 bit",
        "mean.png": "mean probability, 16 bit, 65535 = 1",
        "uncertainty.png": "entropy of the mean probability, 16 bit, 65535 = 1 bit",
        "figure.png": "prompt, samples given presence, mean and uncertainty in one figure",
    }
    result["versions"] = {
        "probabilistic_sam": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def area_unit(result: dict[str, Any]) -> str:
    """Unit of the areas of a result that are reported: "mm2" if the pixel spacing is known, otherwise "px"."""
    return "mm2" if "area_mm2" in result else "px"


def presence_words(presence: float) -> str:
    """Presence in percent, such as "presence 56 %"."""
    return "presence below 1 %" if presence < MIN_PRESENCE else f"presence {presence * 100:.0f} %"


def result_words(result: dict[str, Any]) -> str:
    """Summarise a result of `write_result` in one line: presence, area given presence, number of empty samples."""
    unit, count = area_unit(result), result["num_samples"]
    outlined = result[f"area_{unit}_given_presence"]
    if outlined is None:
        area = "too few readers would outline a lesion to say how large"
    else:
        low, median, high = (outlined["quantiles"][level] for level in ("0.05", "0.5", "0.95"))
        area = f"area if outlined: median {median:.4g} {unit} (90 % interval {low:.4g} to {high:.4g})"
    empty = round(result["empty_share"] * count)
    return f"{presence_words(result['presence'])}; {area}; {empty} of {count} samples empty"
