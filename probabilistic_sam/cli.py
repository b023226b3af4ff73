"""The command `probabilistic-sam`: an image and a prompt in, a folder of sampled masks out.

    probabilistic-sam segment slice.png --box 40 52 71 80 --num-samples 16 --output result

writes masks, mean probability, uncertainty, a figure and areas to `result`. `probabilistic-sam demo` opens a page that
does the same.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .errors import UserError, run
from .files import replaced_directory
from .images import load_slice
from .inference import (
    DEFAULT_MODEL,
    MAX_SAMPLES,
    RESULT_FILES,
    check_num_samples,
    check_prompt,
    load_model,
    quiet_transformers,
    result_words,
    sample_image,
    write_result,
)
from .processing_image_files import IMAGE_FORMATS

MODEL_HELP = "directory or owner/name; default model_cards/psam-lidc"


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
        sampled = sample_image(model, processor, image, prompt, arguments.num_samples, arguments.seed)
        result = write_result(
            folder, image, sampled, prompt, str(arguments.image), name, arguments.seed, arguments.pixel_spacing or side
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


def entry() -> None:
    """Console script."""
    run(main)


def _model_name(arguments: argparse.Namespace) -> str:
    if arguments.model is None and not DEFAULT_MODEL.is_dir():
        raise UserError("no --model given; accepted: a directory that training/train.py wrote, or owner/name")
    return str(arguments.model or DEFAULT_MODEL)


if __name__ == "__main__":
    entry()
