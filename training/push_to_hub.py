"""Push a trained model to the Hub in one commit: weights, configuration, remote code, handler, examples, card.

    python training/push_to_hub.py --model RUN --repo-id org/psam-lidc
    python training/push_to_hub.py --model RUN --repo-id org/psam-lidc --dry-run --output staged
    python training/push_to_hub.py --space org/psam-lidc-space --repo-id org/psam-lidc

RUN is a run folder of training/train.py, or model_cards/psam-lidc. A README.md in RUN becomes the card. Otherwise the
card is generated from the files of the run, with a table for each results file of training/evaluate.py in RUN/results.
With --dry-run the folder is only written to --output, for inspection.

--space pushes the static Space of model_cards/psam-lidc-space instead, a page that runs the model --repo-id in the
browser. `npm pack` fetches its JavaScript libraries in pinned versions; --packages takes them from a node_modules
folder.
"""

import argparse
from pathlib import Path

from probabilistic_sam.errors import UserError, run
from probabilistic_sam.hub.space import push_space, stage_space
from probabilistic_sam.hub.staging import push_model, stage_model
from probabilistic_sam.inference import quiet_transformers

SPACE = Path(__file__).resolve().parents[1] / "model_cards" / "psam-lidc-space"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="run folder of training/train.py")
    parser.add_argument("--space", metavar="ORG/NAME", help="push the Space instead, for the model --repo-id")
    parser.add_argument("--packages", type=Path, help="node_modules folder with the libraries of the Space")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository, created if necessary")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch, created if necessary; default main")
    parser.add_argument("--dry-run", action="store_true", help="write the folder to --output, do not push")
    parser.add_argument("--output", type=Path, help="new or empty directory for --dry-run")
    return parser.parse_args()


def main() -> None:
    """Stage the folder, then list or push it."""
    arguments = parse_args()
    if arguments.dry_run != (arguments.output is not None):
        raise UserError("--dry-run writes the folder to --output; accepted: both options or neither")
    if (arguments.model is None) == (arguments.space is None):
        raise UserError("nothing to push is named, or two things; accepted: either --model or --space")
    if arguments.packages and not arguments.space:
        raise UserError("--packages holds libraries of the Space; accepted: only with --space")
    quiet_transformers()
    if arguments.dry_run:
        stage(arguments)
        for path in sorted(path for path in arguments.output.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {path.relative_to(arguments.output)}")
        print(f"wrote {arguments.output}; nothing was pushed")
        return
    print(f"pushed to {push(arguments)}")


def stage(arguments: argparse.Namespace) -> None:
    """Write the folder of the model or of the Space."""
    if arguments.space:
        stage_space(SPACE, arguments.output, arguments.repo_id, arguments.packages)
    else:
        stage_model(arguments.model, arguments.output, arguments.repo_id)


def push(arguments: argparse.Namespace) -> str:
    """Push the model or the Space; returns the URL of the commit."""
    options = {"private": arguments.private, "revision": arguments.revision}
    if arguments.space:
        return push_space(SPACE, arguments.space, arguments.repo_id, arguments.packages, **options)
    return push_model(arguments.model, arguments.repo_id, **options)


if __name__ == "__main__":
    run(main)
