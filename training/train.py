"""Train Probabilistic SAM or a baseline on a LIDC build, with a frozen vision encoder and cached image embeddings.

    accelerate launch training/train.py --config training/configs/psam_lidc.yaml --dataset LIDC --output_dir RUN

Which model is the `model_type` under `model:` in the configuration, Probabilistic SAM when there is none. With
`max_steps: 0` nothing is trained: SAM as it is, or the ellipse, which is fitted in closed form.

Everything random follows from (seed, step), so a run that was killed and resumed gives the weights of one that was
not. A run resumes with the dataset, the configuration and the frozen weights it started with; anything else is refused
before a file of the run is touched. Only `log_every` and `checkpoint_every` may change, and the path of `base_model`.
`max_steps` may not, since the learning rates of all steps follow from it. With another number of processes a run
resumes too, but the random numbers of its further steps are others.
"""

import argparse

from probabilistic_sam.errors import run
from probabilistic_sam.training.config import read_config
from probabilistic_sam.training.loop import train


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the fields of TrainingConfig")
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py: folder or Hub name")
    parser.add_argument("--output_dir", required=True, help="run folder: log, checkpoints, the best model at its top")
    parser.add_argument("--base_model", help="in place of the configuration's base_model")
    parser.add_argument("--cache_dir", default="~/.cache/probabilistic_sam", help="folder of the embedding caches")
    parser.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest"')
    parser.add_argument("--max_steps", type=int, help="in place of the configuration's max_steps")
    parser.add_argument("--seed", type=int, help="in place of the configuration's seed")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="push the best model to this repository at the end")
    # For tests of resuming: the process kills itself after this step
    parser.add_argument("--stop_after", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Train."""
    arguments = parse_args()
    train(
        read_config(arguments),
        arguments.dataset,
        arguments.output_dir,
        arguments.cache_dir,
        resume=arguments.resume_from_checkpoint,
        push_to=arguments.push_to_hub,
        stop_after=arguments.stop_after,
    )


if __name__ == "__main__":
    run(main)
