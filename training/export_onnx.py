"""Export a model as ONNX: encoder, box decoder and point decoder, in float32, float16 and with int8 weights.

    python training/export_onnx.py --model run --output run/onnx

The graphs and how to call them are described in `probabilistic_sam/onnx_export.py`. In a folder `onnx` of the model
they are found by `load_model(..., runtime="onnx")` and pushed by `push_to_hub.py`.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from probabilistic_sam.errors import run
from probabilistic_sam.inference import load_model, quiet_transformers
from probabilistic_sam.onnx_export import export_onnx


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model, or its name on the Hub (owner/name)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files, usually MODEL/onnx")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and export it."""
    arguments = parse_args(argv)
    quiet_transformers()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is missing
    model, processor = load_model(arguments.model)
    name = Path(arguments.model).resolve().name if Path(arguments.model).is_dir() else arguments.model
    for file in export_onnx(model, processor, arguments.output, name):
        print(f"{file.stat().st_size:>12,}  {file}")


if __name__ == "__main__":
    run(main)
