"""The command `probabilistic-sam`: an image and a prompt in, a folder of sampled masks out.

    probabilistic-sam segment slice.png --box 40 52 71 80 --num-samples 16 --output result

writes masks, mean probability, uncertainty, a figure and areas to `result`. `probabilistic-sam demo` opens a page that
does the same.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

from . import ProbabilisticSamModel, ProbabilisticSamProcessor, __version__
from .errors import UserError, run
from .plotting import sample_figure, save_figure
from .processing_probabilistic_sam import IMAGE_FORMATS, MAX_PIXELS, QUANTILES, open_image

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
MAX_SAMPLES = 1_000
MAX_SAMPLED_PIXELS = 2**30  # samples times pixels: one byte each is kept
MODEL_HELP = "directory or owner/name; default model_cards/psam-lidc"
RESULT_FILES = ("masks", "mean.png", "uncertainty.png", "figure.png", "result.json")


@dataclass
class Drawn:
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


def load_image(path: str | os.PathLike) -> np.ndarray:
    """Read one image, with the pixels that the processor takes from the same file.

    Returns:
        Grey (H, W): uint8, uint16, int32 or float32; colour (H, W, 3): uint8.

    Raises:
        UserError: no such file, not an image, truncated, several frames, or more than 64 million pixels.
    """
    if not Path(path).is_file():
        raise UserError(f"no image file at {path}; accepted: {', '.join(IMAGE_FORMATS)}")
    try:
        image = open_image(Path(path), f"image {path}")
    except ValueError as error:
        raise UserError(str(error)) from error
    array = np.asarray(image)
    if not np.isfinite(array).all():
        raise UserError(f"image {path} holds NaN or infinite values; accepted: finite grey values")
    return array


def luminance(image: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of an image, grey (H, W) or colour (H, W, 3), for figures."""
    return image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))


def load_slice(path: str | os.PathLike) -> tuple[np.ndarray, float | None]:
    """Read a DICOM file or what `load_image` reads.

    Returns:
        (H, W) grey values, Hounsfield units as float32 of a CT in DICOM; and the side of a pixel in mm, which only
        DICOM says.

    Raises:
        UserError: as `load_image`; DICOM that `read_dicom` refuses, or without pydicom to read it.
    """
    if not _is_dicom(path):
        return load_image(path), None
    try:
        from .dicom_slice import read_dicom
    except ModuleNotFoundError as error:
        raise UserError(f"{path} is a DICOM file; to read it, pip install pydicom") from error
    try:
        values, side = read_dicom(path, MAX_PIXELS)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"DICOM file {path} cannot be read: {error}") from error
    return values.astype(np.float32), side


def load_model(name: str | os.PathLike) -> tuple[ProbabilisticSamModel, ProbabilisticSamProcessor]:
    """Load a trained model and its processor from a directory, or from the Hub by `owner/name`.

    Raises:
        UserError: missing directory, files or tensors, damaged files, or a model of another kind.
    """
    accepted = "accepted: a directory that training/train.py wrote, or owner/name on the Hub"
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"model directory {name} has no config.json; {accepted}")
        if not any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise UserError(f"model directory {name} has no weights (model.safetensors); {accepted}")
        if not (directory / "processor_config.json").is_file() and _model_type(name) == "probabilistic_sam":
            raise UserError(f"model directory {name} has no processor_config.json; {accepted}")
    elif directory.exists():
        raise UserError(f"model {name} is a file; {accepted}")
    elif str(name).count("/") != 1 or str(name).startswith(("/", ".", "~")) or str(name).endswith("/"):
        raise UserError(f"no model directory at {name}; {accepted}")

    model_type = _model_type(name)
    if model_type in ("sam", "sam_hq"):
        raise UserError(
            f"model {name} is a plain SAM checkpoint, which draws one mask: training/train.py makes a Probabilistic "
            "SAM of it; give the directory that it writes"
        )
    if model_type != ProbabilisticSamModel.config_class.model_type:
        raise UserError(f"model {name} is of type {model_type!r}, not a Probabilistic SAM; {accepted}")
    try:
        model, info = ProbabilisticSamModel.from_pretrained(name, output_loading_info=True)
        processor = ProbabilisticSamProcessor.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, EOFError) as error:
        raise UserError(f"model {name} cannot be loaded ({_first_line(error)}); {accepted}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {name} lacks {len(missing)} tensors ({missing[0]} is the first), so it was never trained as a "
            f"Probabilistic SAM or its file is not whole; {accepted}"
        )
    return model.eval(), processor


def draw(
    model: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    image: np.ndarray,
    prompt: dict[str, Any],
    num_samples: int,
    seed: int,
) -> Drawn:
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
    return Drawn(masks, result["mean"].numpy(), result["entropy"].numpy(), areas, result["empty_share"])


def area_summary(areas: np.ndarray, scale: float = 1.0) -> dict[str, Any]:
    """Areas of the samples and their quantiles, times `scale` (mm^2 a pixel): a dictionary for JSON."""
    values = np.asarray(areas) * scale
    quantiles = {str(level): round(float(np.quantile(values, level)), 4) for level in QUANTILES}
    return {"mean": round(float(values.mean()), 4), "quantiles": quantiles, "samples": values.round(4).tolist()}


def write_samples(folder: Path, drawn: Drawn) -> None:
    """Write `masks/sample-00.png`, ... as 1-bit PNG."""
    (folder / "masks").mkdir(parents=True)
    digits = max(2, len(str(len(drawn.masks) - 1)))
    for index, mask in enumerate(drawn.masks):
        Image.fromarray(mask).save(folder / "masks" / f"sample-{index:0{digits}d}.png")


def write_grey(path: Path, values: np.ndarray) -> None:
    """Write values between 0 and 1 as 16-bit grey PNG; 65535 stands for 1."""
    Image.fromarray(np.round(np.clip(values, 0, 1) * 65535).astype(np.uint16)).save(path)


@contextmanager
def replaced_directory(path: str | os.PathLike, owned: Sequence[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well; otherwise nothing changes.

    Args:
        path: the folder to write: new, empty, or with entries that all match `owned`.
        owned: names or patterns of what a previous run may have left there.

    Raises:
        UserError: `path` is a file, holds anything else, or cannot be written.
    """
    target = Path(path).resolve()
    staging = aside = None
    try:
        if target.exists():
            if not target.is_dir():
                raise UserError(f"output {path} is a file; accepted: a directory")
            foreign = sorted(
                child.name for child in target.iterdir() if not any(fnmatch(child.name, name) for name in owned)
            )
            if foreign:
                raise UserError(
                    f"output directory {path} holds other files ({foreign[0]}); accepted: a new directory, an empty "
                    "one or a previous result"
                )
            if not os.access(target, os.W_OK):
                raise UserError(f"output directory {path} is not writable")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        staging.chmod(target.stat().st_mode if target.exists() else target.parent.stat().st_mode & 0o777)
        yield staging
        if target.exists():
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) / "previous"
            os.replace(target, aside)
        os.replace(staging, target)
    except OSError as error:
        raise UserError(f"output directory {path} cannot be written ({error.strerror or error})") from error
    finally:
        if aside is not None:
            if aside.exists() and not target.exists():
                os.replace(aside, target)
            shutil.rmtree(aside.parent, ignore_errors=True)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


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
    drawn: Drawn,
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
        drawn: what the model drew on it.
        prompt: as `draw` takes it.
        name: of the image.
        model: directory or owner/name.
        seed: of the noise.
        pixel_spacing: side of a pixel in mm; adds areas in mm^2.

    Returns:
        What `result.json` holds.
    """
    write_samples(folder, drawn)
    write_grey(folder / "mean.png", drawn.mean)
    write_grey(folder / "uncertainty.png", drawn.entropy)
    figure = sample_figure(
        luminance(image), drawn.masks, drawn.mean, drawn.entropy, box=prompt.get("box"), point=prompt.get("points"),
        title=Path(name).name,
    )  # fmt: skip
    save_figure(figure, folder / "figure.png")
    result = {
        "image": name,
        "image_size": {"width": image.shape[1], "height": image.shape[0]},
        "prompt": prompt,
        "model": model,
        "num_samples": len(drawn.masks),
        "seed": seed,
        "empty_share": drawn.empty_share,
        "area_px": area_summary(drawn.areas),
    }
    if pixel_spacing is not None:
        result["pixel_spacing_mm"] = pixel_spacing
        result["area_mm2"] = area_summary(drawn.areas, pixel_spacing**2)
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


def segment(arguments: argparse.Namespace) -> None:
    """`probabilistic-sam segment`: draw masks for one prompt and write them."""
    image, side = load_slice(arguments.image)
    prompt = {"box": arguments.box} if arguments.box else {"points": arguments.point}
    check_prompt(prompt, image.shape[1], image.shape[0])
    check_num_samples(arguments.num_samples, image)
    name = _model_name(arguments)
    with replaced_directory(arguments.output, RESULT_FILES) as folder:
        model, processor = load_model(name)
        if torch.cuda.is_available():
            model = model.to("cuda")
        drawn = draw(model, processor, image, prompt, arguments.num_samples, arguments.seed)
        result = write_result(
            folder, image, drawn, prompt, str(arguments.image), name, arguments.seed, arguments.pixel_spacing or side
        )
    print(f"wrote {arguments.output}: {result_words(result)}; see figure.png, result.json")


def demo(arguments: argparse.Namespace) -> None:
    """`probabilistic-sam demo`: serve the page until the command is interrupted."""
    try:
        from .app import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"the page needs {error.name}, which is not installed; accepted: pip install 'probabilistic-sam[app]'"
        ) from error
    name = _model_name(arguments)
    model, processor = load_model(name)
    if torch.cuda.is_available():
        model = model.to("cuda")
    serve(model, processor, name, arguments.port)


class ArgumentParser(argparse.ArgumentParser):
    """`argparse` whose complaints are one line, as everywhere in this project."""

    def error(self, message: str) -> Any:
        """Raise `UserError` in place of printing the usage."""
        raise UserError(f"{message} (see `{self.prog} --help`)")


def number(text: str) -> float:
    """A finite number from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def spacing(text: str) -> float:
    """Side of a pixel in mm from the command line."""
    value = number(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} mm; accepted: more than 0, at most 1000")
    return value


def whole_number(low: int, high: int) -> Any:
    """A type for `argparse`: whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number from {low} to {high}")
        return value

    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="probabilistic-sam", description="Sample masks from images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"probabilistic-sam {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "segment",
        allow_abbrev=False,
        help="sample masks for one prompt in one image",
        description="Sample masks for one prompt. Coordinates are pixels of the image, counted at the pixels' edges.",
    )
    command.set_defaults(run=segment)
    command.add_argument(
        "image", metavar="IMAGE", help=f"{', '.join(IMAGE_FORMATS)}, grey or colour, 8 or 16 bit; or a DICOM slice"
    )
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--box", type=number, nargs=4, metavar=("X1", "Y1", "X2", "Y2"), help="box around the lesion")
    prompt.add_argument(
        "--point", type=number, nargs=2, action="append", metavar=("X", "Y"), help="point inside it; may be repeated"
    )
    samples = whole_number(1, MAX_SAMPLES)
    command.add_argument("--num-samples", type=samples, default=16, metavar="N", help="masks to draw; default 16")
    command.add_argument("--output", required=True, metavar="DIR", help="folder: new, empty or a previous result")
    command.add_argument("--model", metavar="M", help=MODEL_HELP)
    command.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="S", help="default 0")
    command.add_argument(
        "--pixel-spacing", type=spacing, metavar="MM", help="side of a pixel; adds areas in mm^2; default: DICOM's own"
    )
    command = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="open a page on this computer: drag a box, see samples",
        description="Serve a page at http://127.0.0.1:PORT until interrupted. Nothing leaves this computer.",
    )
    command.set_defaults(run=demo)
    command.add_argument("--port", type=whole_number(1, 65535), default=7860, metavar="N", help="default 7860")
    command.add_argument("--model", metavar="M", help=MODEL_HELP)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, and do what was asked for."""
    arguments = parse_args(argv)
    quiet_transformers()
    arguments.run(arguments)


def quiet_transformers() -> None:
    """Keep loading reports, retries and progress bars of transformers and the Hub client from the terminal."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def entry() -> None:
    """Console script."""
    run(main)


def _model_name(arguments: argparse.Namespace) -> str:
    if arguments.model is None and not DEFAULT_MODEL.is_dir():
        raise UserError("no --model given; accepted: a directory that training/train.py wrote, or owner/name")
    return str(arguments.model or DEFAULT_MODEL)


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


def _is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file begins as DICOM does: with a preamble, or without one at its first tag."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    group, element = start[:2], int.from_bytes(start[2:4], "little")
    if start[4:6].isalpha() and start[4:6].isupper():  # the type of the value is explicit
        return group in (b"\2\0", b"\10\0", b"\0\10")
    # Otherwise its length follows, and only the first tags of a group can come first
    return group in (b"\2\0", b"\10\0") and element <= 0x18 and int.from_bytes(start[4:8], "little") <= 256


if __name__ == "__main__":
    entry()
