"""Stage the folder of a model as it goes to the Hub: weights, configuration, remote code, handler, examples, card.

The remote code is copied from the package when a model is staged. The files that are the same for every model
(`handler.py`, `requirements.txt`, `LICENSE`, `notebook.ipynb` and the example images) are package data beside this
module. The notebook loads the model by its name.
"""

import os
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from ..errors import UserError
from ..files import replaced_directory
from ..inference import load_model
from ..onnx_export import ONNX_FILES
from .model_card import HUB_NAME, read_json, run_card
from .push import check_repo_name, push_folder

PACKAGE_DATA = Path(__file__).resolve().parent
EXAMPLES = PACKAGE_DATA / "examples"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TRAINER_TAG = "generated_from_trainer"  # of the cards that transformers' `Trainer` writes
NOTEBOOK = "notebook.ipynb"  # the Hub offers it for Colab and Kaggle
OF_EVERY_MODEL = ("handler.py", "requirements.txt", "LICENSE", NOTEBOOK, "examples/*")
ONNX_EXAMPLE = "onnx_example.py"  # only with the files of training/export_onnx.py
OF_THE_MODEL = (*WEIGHTS, "*.png", "figures/*.png", "results/*.json", *(f"onnx/{file}" for file in ONNX_FILES))
# Deleted by a push that does not bring them: shards, modules and results of earlier weights
REPLACED = [*OF_THE_MODEL, *OF_EVERY_MODEL, "*.py"]


def stage_model(source: str | os.PathLike[str], output: str | os.PathLike[str], name: str) -> None:
    """Write the Hub folder of a model.

    A `README.md` in `source` becomes the card, with `HUB_NAME` replaced by `name`, unless transformers' `Trainer`
    wrote it. Otherwise the card is generated from the files of the run.

    Args:
        source: run folder of `training/train.py`, or `model_cards/psam-lidc`.
        output: a new or empty directory.
        name: `organisation/name` on the Hub.

    Raises:
        UserError: a bad name, a model that does not load, weights that are not safetensors, ONNX files of other
            weights, an output directory that is not empty.
    """
    check_repo_name(name)
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"no model directory at {source}; accepted: a run of training/train.py")
    model, processor = load_model(source)
    if not any(source.glob("*.safetensors")):
        raise UserError(f"the weights in {source} are not safetensors; accepted: *.safetensors")
    if any(source.glob("onnx/*.onnx")):
        load_model(source, runtime="onnx")  # refuses graphs of earlier weights
    readme = source / "README.md"
    with replaced_directory(output, ()) as folder:
        for part in (model.config, processor):
            part.include_code()
            part.save_pretrained(folder)
        copy_files(source, folder, *OF_THE_MODEL)  # weights keep their precision and shards
        copy_files(PACKAGE_DATA, folder, *OF_EVERY_MODEL, *[ONNX_EXAMPLE] * (folder / "onnx").is_dir())
        card = own_card(readme, name) if readme.is_file() else None
        if card is None or TRAINER_TAG in (card.data.to_dict().get("tags") or ()):
            card = run_card(source, name, read_json(EXAMPLES / "examples.json")["images"][0])
        (folder / "README.md").write_text(card.content, encoding="utf-8")
        notebook = (folder / NOTEBOOK).read_text(encoding="utf-8")
        (folder / NOTEBOOK).write_text(notebook.replace(HUB_NAME, name), encoding="utf-8")


def push_model(source: str | os.PathLike[str], name: str, private: bool = False, revision: str | None = None) -> str:
    """Stage a model and push it as one commit.

    Args:
        source: as for `stage_model`.
        name: `organisation/name` on the Hub.
        private: make the repository private.
        revision: branch to push to, `main` by default.

    Returns:
        The URL of the commit.

    Raises:
        UserError: see `stage_model` and `push_folder`.
    """
    again = f"python training/push_to_hub.py --model {source} --repo-id {name}"
    again += " --private" * private + (f" --revision {revision}" if revision else "")
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "staged"
        stage_model(source, staged, name)
        return push_folder(staged, name, "model", private, revision, replace=REPLACED, again=again)


def own_card(path: Path, name: str) -> ModelCard:
    """Read a card from a file, with `HUB_NAME` replaced by the name on the Hub.

    Raises:
        UserError: the file is not a model card.
    """
    try:
        return ModelCard(path.read_text(encoding="utf-8").replace(HUB_NAME, name))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a model card: {error}") from error


def copy_files(source: Path, output: Path, *patterns: str) -> None:
    """Copy the files that match the patterns, keeping their paths relative to `source`."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = output / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
