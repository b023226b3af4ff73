"""Train Probabilistic SAM or a baseline on a dataset build.

    accelerate launch training/train.py --config training/configs/psam_lidc.yaml --dataset LIDC --output_dir RUN
    accelerate launch training/train.py --config C --dataset LIDC --output_dir RUN batch_size=32 model.latent_dim=6

Arguments of the form `name=value` replace fields of the configuration; groups have dots, as in
`prompts.union_box=0.5`. `model.model_type` chooses the model, Probabilistic SAM by default. `encoder` is `frozen` (new
views at every visit), `trained`, or `cached` (fixed views, encoded once; for machines without a GPU). With
`max_steps=0` nothing is trained: the result is the SAM as converted, or the ellipse baseline, which is fitted in
closed form.

Everything random follows from (seed, step), so a run that was killed and resumed gives the same weights as an
uninterrupted one. A run resumes only with the dataset, the configuration and the frozen weights it started with;
otherwise it is refused before any file changes. Only `log_every`, `checkpoint_every`, `num_workers` and the path of
`base_model` may change. `max_steps` may not, because the learning rate of every step depends on it. A run also resumes
with another number of processes: the windows stay the same, but the noise of its further steps differs.

With `--max_minutes` the run also ends by the clock, and its learning rates follow the share of the time that has
passed; such a run resumes where it was, but not with exactly the same weights. On CUDA the sums of some kernels depend
on the order of threads, so a resumed run is close to an uninterrupted one, not identical (not measured yet).
"""

import argparse

from probabilistic_sam.errors import require, run

require("accelerate", "datasets", "scipy", extra="train")

from probabilistic_sam.training.config import parse_overrides, read_config
from probabilistic_sam.training.loop import train


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the fields of TrainingConfig")
    parser.add_argument(
        "--dataset", required=True, help="folder or Hub name of a dataset with columns image, masks and patient_id"
    )
    parser.add_argument(
        "--output_dir", required=True, help="run folder: log, checkpoints, and the best model at its top"
    )
    parser.add_argument("--base_model", help="replaces base_model of the configuration")
    parser.add_argument("--max_steps", type=int, help="replaces max_steps of the configuration")
    parser.add_argument("--max_minutes", type=float, help="replaces max_minutes of the configuration")
    parser.add_argument("--seed", type=int, help="replaces seed of the configuration")
    parser.add_argument(
        "--cache_dir", default="~/.cache/probabilistic_sam", help="local folder of the embedding caches"
    )
    parser.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest"')
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="push the best model to this repository at the end")
    # For tests of resuming: the process kills itself after this step
    parser.add_argument("--stop_after", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="replaces a field of the configuration")
    return parser.parse_intermixed_args()


def main() -> None:
    """Train."""
    arguments = parse_args()
    options = {name: getattr(arguments, name) for name in ("base_model", "max_steps", "max_minutes", "seed")}
    given = {name: value for name, value in options.items() if value is not None}
    train(
        read_config(arguments.config, given | parse_overrides(arguments.overrides)),
        arguments.dataset,
        arguments.output_dir,
        arguments.cache_dir,
        resume=arguments.resume_from_checkpoint,
        push_to=arguments.push_to_hub,
        stop_after=arguments.stop_after,
    )


if __name__ == "__main__":
    run(main)
