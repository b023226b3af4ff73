"""The command `probabilistic-sam`: sample masks for prompts in images.

probabilistic-sam segment slice.png --box 40 52 71 80 --num-samples 16 --output result
probabilistic-sam segment --prompts boxes.csv --output results
probabilistic-sam segment series --box 139 253 234 340 --slices 14 20 --output nodule
probabilistic-sam demo
probabilistic-sam info
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from . import __version__
from .arguments import ArgumentParser, number, probability, spacing, whole_number
from .errors import UserError, run
from .images import SCANS, is_dicom, is_scan
from .inference import MAX_SAMPLES, RUNTIMES, choose_device, find_model, load_model, quiet_transformers
from .info import information, information_text
from .processing_image_files import IMAGE_FORMATS
from .segment import COLUMNS, Options, segment_image, segment_table

IMAGE_OPTIONS = ("point", "negative_point", "mask", "pixel_spacing")  # of `segment`, without effect on scans
SCAN_OPTIONS = ("slices", "box_mm", "series", "format")
SCAN_FORMATS = ("nifti", "dicom-seg", "dicom-seg-samples", "png")
MODEL_HELP = "folder of a model, or its name on the Hub (owner/name); default: model_cards/psam-lidc of the checkout"


def segment(arguments: argparse.Namespace) -> None:
    """`probabilistic-sam segment`: sample masks in an image or a scan and write them."""
    device = arguments.device or ("cpu" if arguments.runtime == "onnx" else None)
    options = Options(
        find_model(arguments.model), choose_device(device), arguments.num_samples, arguments.seed,
        arguments.threshold, arguments.pixel_spacing, arguments.runtime,
    )  # fmt: skip
    if arguments.image is not None and is_scan(arguments.image):
        segment_in_scan(arguments, options)
    else:
        check_options(arguments, SCAN_OPTIONS, *not_a_scan(arguments.image))
        segment_in_image(arguments, options)


def check_options(arguments: argparse.Namespace, names: Sequence[str], reason: str, otherwise: str = "") -> None:
    """Raise `UserError` if an option was given that has no effect."""
    given = [name for name in names if getattr(arguments, name) not in (None, [])]
    if given:
        raise UserError(f"{reason}; accepted: {otherwise}the command without --{given[0].replace('_', '-')}")


def not_a_scan(path: str | None) -> tuple[str, str]:
    """Why there is no scan at a path, and what is accepted instead."""
    if path is None:
        return "a table of images is not a scan", ""
    if not os.path.exists(path):
        return f"no scan at {path}", f"{SCANS}, or "
    if is_dicom(path):
        return f"{path} is a single slice", "the folder of its series, or "
    return f"{path} is not a scan", f"{SCANS}, or "


def segment_in_scan(arguments: argparse.Namespace, options: Options) -> None:
    """`probabilistic-sam segment SCAN`."""
    try:
        from .segment_scan import segment_scan
    except ModuleNotFoundError as error:
        raise UserError(
            f"scans need {error.name}, which is not installed; accepted: pip install 'probabilistic-sam[scan]'"
        ) from error
    check_options(arguments, IMAGE_OPTIONS, f"{arguments.image} is a scan")
    if arguments.runtime != "torch":
        raise UserError(f"{arguments.image} is a scan, sampled with torch only; accepted: no --runtime")
    if len(arguments.box) > 1:
        raise UserError(f"{len(arguments.box)} boxes in a scan; accepted: one, or a table with --prompts")
    box = arguments.box[0] if arguments.box else None
    lines = segment_scan(
        arguments.image, box, arguments.slices, arguments.box_mm, arguments.prompts, arguments.series,
        arguments.format, arguments.output, options,
    )  # fmt: skip
    print(*lines, sep="\n")


def segment_in_image(arguments: argparse.Namespace, options: Options) -> None:
    """`probabilistic-sam segment IMAGE`, or a table of images."""
    prompt = (arguments.box, arguments.point, arguments.negative_point, arguments.mask)
    if arguments.prompts is None:
        if arguments.image is None:
            raise UserError("no image given; accepted: IMAGE with a prompt, or --prompts with a table")
        print(*segment_image(arguments.image, *prompt, arguments.output, options), sep="\n")
    elif arguments.image is not None or any(prompt):
        raise UserError(
            "--prompts takes images and boxes from the table; accepted: no IMAGE, box, point or mask with it"
        )
    else:
        print(segment_table(arguments.prompts, arguments.output, options))


def demo(arguments: argparse.Namespace) -> None:
    """`probabilistic-sam demo`: serve the page until the command is interrupted."""
    try:
        from .app import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"the browser demo needs {error.name}, which is not installed; accepted: "
            "pip install 'probabilistic-sam[app]'"
        ) from error
    name = find_model(arguments.model)
    model, processor = load_model(name)
    serve(model.to(choose_device()), processor, name, arguments.port)


def info(arguments: argparse.Namespace) -> None:
    """`probabilistic-sam info`: print versions, device and model."""
    facts = information(arguments.model)
    print(json.dumps(facts, indent=2) if arguments.json else information_text(facts))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        prog="probabilistic-sam",
        description="Segment a lesion as several readers might: sample masks for a prompt in an image.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"probabilistic-sam {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "segment",
        allow_abbrev=False,
        help="sample masks for prompts in one image, for a table of images and boxes, or for a nodule in a scan",
        usage="%(prog)s IMAGE (--box X1 Y1 X2 Y2 | --point X Y | --mask FILE) ... --output DIR [options]\n"
        "       %(prog)s --prompts TABLE --output DIR [options]\n"
        "       %(prog)s SCAN (--box X1 Y1 X2 Y2 --slices FIRST LAST | --box-mm X1 Y1 Z1 X2 Y2 Z2 | --prompts TABLE) "
        "--output DIR [options]",
        description="Sample masks for a prompt and write masks, mean probability, uncertainty, areas and a figure. "
        "Report the presence (the share of readers who would annotate) and the area that these would outline. "
        "A prompt is a box, points, a rough mask, or several of them together. Coordinates are pixels of the image, "
        "measured at the pixels' edges: x from 0 to the width, y from 0 to the height. In a scan, each sample stands "
        "for one simulated reader through all slices, and the results are presence, volume and longest diameter of "
        "the nodule with intervals. The model has seen only slices that some reader annotated, so it cannot tell "
        "where a nodule ends: choose the range of slices by eye. It was trained on CT with the pixel spacing and "
        "slice thickness of "
        "LIDC-IDRI. For research only.",
    )
    command.set_defaults(run=segment)
    command.add_argument(
        "image", metavar="IMAGE", nargs="?",
        help=f"{', '.join(IMAGE_FORMATS)} (grey of 8 or 16 bits, colour of 8), DICOM or NIfTI of one slice; or a "
        "SCAN: folder or zip with a DICOM series, multi-frame DICOM, .nii or .nii.gz",
    )  # fmt: skip
    prompt = command.add_argument_group("prompt")
    several: Any = {"action": "append", "default": []}
    prompt.add_argument(
        "--box", type=number, nargs=4, metavar=("X1", "Y1", "X2", "Y2"), **several,
        help="box around the lesion; repeat it for several lesions, each with a folder DIR/box-0, DIR/box-1, ...",
    )  # fmt: skip
    prompt.add_argument(
        "--point", type=number, nargs=2, metavar=("X", "Y"), **several, help="point inside the lesion; repeatable"
    )
    prompt.add_argument(
        "--negative-point", type=number, nargs=2, metavar=("X", "Y"), **several,
        help="point outside the lesion; repeatable; ignored far away from the rest of the prompt",
    )  # fmt: skip
    prompt.add_argument(
        "--mask", metavar="FILE",
        help="image of a rough mask, as large as IMAGE: 0 is outside; add a box or a point unless the model was "
        "trained with masks (the released weights were not)",
    )  # fmt: skip
    prompt.add_argument(
        "--prompts", metavar="TABLE",
        help=f"instead of IMAGE and prompt: CSV file with the columns {','.join(COLUMNS)}, one box per row; image "
        "paths are relative to the table's folder; writes DIR/row-0, DIR/row-1, ... and DIR/summary.csv. With SCAN: "
        "the columns x1,y1,x2,y2,first,last, one nodule per row; writes DIR/nodule-0, ... and DIR/summary.csv",
    )  # fmt: skip
    scan = command.add_argument_group("scan")
    scan.add_argument(
        "--slices", type=whole_number(0, 100_000), nargs=2, metavar=("FIRST", "LAST"),
        help="first and last slice of the nodule, counted from 0 at the feet, both included",
    )  # fmt: skip
    scan.add_argument(
        "--box-mm", type=number, nargs=6, metavar=("X1", "Y1", "Z1", "X2", "Y2", "Z2"),
        help="instead of --box and --slices: patient coordinates in mm (LPS, as in DICOM)",
    )  # fmt: skip
    scan.add_argument("--series", metavar="UID", help="series instance UID, if the folder or zip holds several")
    scan.add_argument(
        "--format", nargs="+", choices=SCAN_FORMATS, metavar="F",
        help=f"files to write beside result.json: {', '.join(SCAN_FORMATS)}; DICOM SEG of DICOM scans only; default: "
        "all that the scan allows, but not dicom-seg-samples",
    )  # fmt: skip
    command.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the result: new, empty, or with an earlier result"
    )
    samples = whole_number(1, MAX_SAMPLES)
    command.add_argument("--num-samples", type=samples, default=16, metavar="N", help="masks per prompt; default 16")
    command.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="S", help="default 0")
    command.add_argument(
        "--threshold", type=probability, default=0.5, metavar="T",
        help="probability above which a pixel belongs to a mask; default 0.5",
    )  # fmt: skip
    command.add_argument(
        "--pixel-spacing", type=spacing, metavar="MM",
        help="side of a pixel in mm, to get areas in mm^2; default: from DICOM or NIfTI",
    )  # fmt: skip
    command.add_argument("--model", metavar="M", help=MODEL_HELP)
    command.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 or mps; default: cuda if available, otherwise cpu"
    )
    command.add_argument(
        "--runtime", choices=RUNTIMES, default="torch",
        help="onnx runs the model's onnx/ files with onnxruntime on the CPU, not for scans or masks; default torch",
    )  # fmt: skip

    command = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="open the browser demo on this computer: mark a lesion, see samples",
        description="Serve a page at http://127.0.0.1:PORT until interrupted. No data leaves this computer.",
    )
    command.set_defaults(run=demo)
    command.add_argument("--port", type=whole_number(1, 65535), default=7860, metavar="N", help="default 7860")
    command.add_argument("--model", metavar="M", help=MODEL_HELP)

    command = commands.add_parser(
        "info",
        allow_abbrev=False,
        help="print versions, device and model",
        description="Print versions, the default device, and size and licence of the model.",
    )
    command.set_defaults(run=info)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--model", metavar="M", help=MODEL_HELP)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command."""
    arguments = parse_args(argv)
    quiet_transformers()
    arguments.run(arguments)


def entry() -> None:
    """Console script."""
    run(main)


if __name__ == "__main__":
    entry()
