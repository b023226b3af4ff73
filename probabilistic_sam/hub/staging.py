"""A model's folder as it goes to the Hub: one that a stranger can open, try and read about.

Nothing of this is committed twice: the remote code is copied from the package when a model is staged.
"""

import os
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from ..errors import UserError
from ..files import replaced_directory
from ..inference import DEFAULT_MODEL, load_model
from .model_card import HUB_NAME, read_json, run_card
from .push import check_repo_name, push_folder

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SERVING = ("handler.py", "requirements.txt", "examples/*")  # the same for every model
OF_THE_MODEL = (*WEIGHTS, "*.png", "figures/*.png", "results/*.json")
# Files of an earlier push that this one does not bring: shards, modules, results of other weights
REPLACED = [*OF_THE_MODEL, *SERVING, "*.py"]


def stage_model(source: str | os.PathLike[str], output: str | os.PathLike[str], name: str) -> None:
    """Write the folder of a model: weights as they are, configuration that names the remote code, that code, a card.

    A `README.md` in `source` is the card, with the name on the Hub put in place of `HUB_NAME`; otherwise one is made
    of what the run's files say.

    Args:
        source: run folder of `training/train.py`, or `model_cards/psam-lidc`.
        output: a new or empty directory.
        name: `organisation/name` on the Hub.

    Raises:
        UserError: a bad name, no model that opens, weights that are not safetensors, an output that holds files.
    """
    check_repo_name(name)
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"no model directory at {source}; accepted: a run of training/train.py")
    model, processor = load_model(source)
    if not any(source.glob("*.safetensors")):
        raise UserError(f"the weights of {source} are not safetensors, and nothing else is pushed")
    readme = source / "README.md"
    with replaced_directory(output, ()) as folder:
        for part in (model.config, processor):
            part.include_code()
            part.save_pretrained(folder)
        # The weights go as they are, in their own precision and shards
        copy(source, folder, *OF_THE_MODEL)
        copy(DEFAULT_MODEL, folder, *SERVING)
        shutil.copyfile(DEFAULT_MODEL.parent.parent / "LICENSE", folder / "LICENSE")
        if readme.is_file():
            card = own_card(readme, name)
        else:
            card = run_card(source, name, read_json(folder / "examples" / "examples.json")["images"][0])
        (folder / "README.md").write_text(card.content, encoding="utf-8")


def push_model(source: str | os.PathLike[str], name: str, private: bool = False, revision: str | None = None) -> str:
    """Stage a model and push it as one commit.

    Args:
        source: as for `stage_model`.
        name: `organisation/name` on the Hub.
        private: make the repository private.
        revision: the branch, `main` without it.

    Returns:
        The address of the commit.

    Raises:
        UserError: of `stage_model` and `push_folder`.
    """
    again = f"python training/push_to_hub.py --model {source} --repo-id {name}"
    again += " --private" * private + (f" --revision {revision}" if revision else "")
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "staged"
        stage_model(source, staged, name)
        return push_folder(staged, name, "model", private, revision, replace=REPLACED, again=again)


def own_card(path: Path, name: str) -> ModelCard:
    """A card from a file, checked, with the name on the Hub."""
    try:
        return ModelCard(path.read_text(encoding="utf-8").replace(HUB_NAME, name))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no model card: {error}") from error


def copy(source: Path, output: Path, *patterns: str) -> None:
    """Copy the files that match, at their places."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = output / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
