"""Push a trained model to the Hub in one commit: weights, configuration, remote code, handler, examples, card.

    python training/push_to_hub.py --model RUN --repo-id org/psam-lidc
    python training/push_to_hub.py --model RUN --repo-id org/psam-lidc --dry-run --output staged

RUN is a run folder of training/train.py, or model_cards/psam-lidc. Its card tells what the run's files tell: results
that training/evaluate.py wrote to RUN/results become tables; a README.md in RUN is taken as it is. With --dry-run the
folder is written to be looked at, and nothing leaves this machine.
"""

import argparse
from pathlib import Path

from probabilistic_sam.errors import UserError, run
from probabilistic_sam.hub.staging import push_model, stage_model
from probabilistic_sam.inference import quiet_transformers


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="run folder of training/train.py")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="the repository; made when there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="push to this branch, made when there is none; without it to main")
    parser.add_argument("--dry-run", action="store_true", help="write the folder to --output and push nothing")
    parser.add_argument("--output", type=Path, help="new or empty directory, with --dry-run")
    return parser.parse_args()


def main() -> None:
    """Stage, then list or push."""
    arguments = parse_args()
    if arguments.dry_run != (arguments.output is not None):
        raise UserError("--dry-run writes the folder to --output; accepted: both or none")
    quiet_transformers()
    if arguments.dry_run:
        stage_model(arguments.model, arguments.output, arguments.repo_id)
        for path in sorted(path for path in arguments.output.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {path.relative_to(arguments.output)}")
        print(f"wrote {arguments.output}; nothing was pushed")
        return
    url = push_model(arguments.model, arguments.repo_id, arguments.private, arguments.revision)
    print(f"pushed to {url}")


if __name__ == "__main__":
    run(main)
