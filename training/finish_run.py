"""Finish a run: average its best and its last weights, and calibrate the share of empty samples.

    python training/finish_run.py --run RUN --dataset LIDC --output FINISHED

The presence of the prior is shifted by one number, so that over the validation split, with the prompt `union_box`, the
expected share of empty samples equals the readers' share of empty masks. It stays where no mask is empty, or all are.
FINISHED is a run folder like RUN.
"""

import argparse
import json
import shutil
from pathlib import Path

from probabilistic_sam.errors import require, run

require("accelerate", "datasets", "scipy", extra="train")

from probabilistic_sam.data.format import load_split
from probabilistic_sam.files import replaced_directory
from probabilistic_sam.inference import choose_device, load_model
from probabilistic_sam.training.checkpoint import find_checkpoint, read_checkpoint
from probabilistic_sam.training.finish import average, calibrate_presence


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of training/train.py")
    parser.add_argument(
        "--dataset", required=True, help="folder or Hub name of a dataset with columns image, masks and patient_id"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write: new or empty")
    return parser.parse_args()


def main() -> None:
    """Average, calibrate, save."""
    arguments = parse_args()
    with replaced_directory(arguments.output, ()) as folder:
        model, processor = load_model(arguments.run)
        model.float()
        state = read_checkpoint(find_checkpoint("latest", arguments.run), ("step", "best", "ema"))
        average(model, state["ema"])
        rows = load_split(arguments.dataset, "validation")
        model.to(choose_device())
        record = {"run_steps": [state["best"]["step"], state["step"]], **calibrate_presence(model, processor, rows)}

        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "finish.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for name in ("training_config.yaml", "data.json"):  # which the model card reads
            if (arguments.run / name).exists():
                shutil.copy(arguments.run / name, folder)
    print(f"wrote {arguments.output}: {record}")


if __name__ == "__main__":
    run(main)
