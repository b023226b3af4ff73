"""The staged folder of a model: its files, what its code may import, what its card states."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import SIZE, load_script, sam_parts, tiny_model, tiny_vit_parts

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.baselines import PromptFreePriorModel
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.staging import EXAMPLES, stage_model

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "model_cards" / "psam-lidc"
KINDS = ("configuration", "loss", "modeling", "pipeline", "processing")  # modules that are pushed as remote code
MODULES = sorted(path for kind in KINDS for path in (ROOT / "probabilistic_sam").glob(f"{kind}_*.py"))
# Installed with transformers; Pillow only where files are opened
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub.dataclasses", *sys.stdlib_module_names}
ALLOWED_IN = {"processing_image_files.py": {"PIL"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint."""
    path = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(path)
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(path)
    (path / "training_config.yaml").write_text("base_model: base\nseed: 0\n")
    (path / "data.json").write_text(json.dumps({"train": {"slices": 1200, "patients": 4, "sources": ["eyes"]}}))
    (path / "best.json").write_text(json.dumps({"step": 8, "all/ged": 0.4321}))
    (path / "log.jsonl").touch()
    (path / "checkpoint-8").mkdir()
    (path / "checkpoint-8" / "training_state.pt").touch()
    return path


@pytest.fixture
def changed(run, tmp_path):
    """A copy of `run` that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "changed"))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_results_of_other_weights_are_not_on_the_card(changed, tmp_path):
    (changed / "results").mkdir()
    (changed / "results" / "test.json").write_text(json.dumps({"weights": "0" * 64}))
    with pytest.raises(UserError, match="test.json has the results of other weights"):
        stage_model(changed, tmp_path / "staged", "alice/eyes")


def test_the_card_of_trainer_is_replaced(changed, tmp_path):
    (changed / "README.md").write_text("---\ntags:\n- generated_from_trainer\n---\n\nMore information needed.\n")
    stage_model(changed, tmp_path / "staged", "alice/eyes")
    text = (tmp_path / "staged" / "README.md").read_text()
    assert "More information needed" not in text and "# eyes: " in text


def test_pickled_weights_are_refused(changed, tmp_path):
    torch.save(ProbabilisticSamModel.from_pretrained(changed).state_dict(), changed / "pytorch_model.bin")
    (changed / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the weights in .* are not safetensors"):
        stage_model(changed, tmp_path / "staged", "alice/eyes")


def test_staged_run_has_weights_code_and_examples_but_no_training_files(run, tmp_path):
    stage_model(run, tmp_path / "staged", "alice/eyes")
    assert files(tmp_path / "staged") == {
        "README.md", "LICENSE", "config.json", "model.safetensors", "processor_config.json", "handler.py",
        "requirements.txt", "notebook.ipynb", *(path.name for path in MODULES),
        *(f"examples/{name}" for name in ("examples.json", "phantom-1.png", "phantom-2.png", "phantom-3.png")),
    }  # fmt: skip
    staged = tmp_path / "staged"
    assert 'MODEL = \\"alice/eyes\\"' in (staged / "notebook.ipynb").read_text()
    assert (staged / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    config = json.loads((staged / "config.json").read_text())
    assert config.pop("auto_map") == {
        "AutoConfig": "configuration_probabilistic_sam.ProbabilisticSamConfig",
        "AutoModel": "modeling_probabilistic_sam.ProbabilisticSamModel",
        "AutoModelForMaskGeneration": "modeling_probabilistic_sam.ProbabilisticSamModel",
    }
    assert config.pop("custom_pipelines") == {
        "probabilistic-mask-generation": {
            "impl": "pipeline_probabilistic_sam.ProbabilisticMaskGenerationPipeline",
            "pt": ["AutoModel"],
            "type": "image",
        }
    }
    plain = {
        name: value for name, value in json.loads((run / "config.json").read_text()).items() if name[-7:] != "_config"
    }
    assert plain.items() <= config.items()
    processor = json.loads((staged / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_probabilistic_sam.ProbabilisticSamProcessor"}


INSTALLED = """
import sys
from pathlib import Path
from probabilistic_sam.hub import staging
assert Path(staging.__file__).is_relative_to(sys.argv[1])
staging.stage_model(*sys.argv[2:])
"""


def test_package_installed_from_a_wheel_stages_the_same_files(run, tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "probabilistic_sam", source / "probabilistic_sam")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    command = [sys.executable, "-c", INSTALLED, installed, run, tmp_path / "there", "alice/eyes"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stage_model(run, tmp_path / "here", "alice/eyes")
    here, there = (
        {name: (tmp_path / folder / name).read_bytes() for name in files(tmp_path / folder)}
        for folder in ("here", "there")
    )
    assert here == there and {"handler.py", "LICENSE", "examples/phantom-1.png"} < here.keys()


def test_license_of_staged_models_is_that_of_the_project():
    assert (EXAMPLES.parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_staging_does_not_change_later_saves(run, tmp_path):
    stage_model(run, tmp_path / "staged", "alice/eyes")
    tiny_model().save_pretrained(tmp_path / "later")
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path / "later")
    assert files(tmp_path / "later") == {"config.json", "model.safetensors", "processor_config.json"}


def test_baseline_made_from_a_staged_model_does_not_refer_to_its_code(run, tmp_path):
    stage_model(run, tmp_path / "staged", "alice/eyes")
    model = PromptFreePriorModel.from_sam(ProbabilisticSamModel.from_pretrained(tmp_path / "staged"))
    model.save_pretrained(tmp_path / "baseline")
    assert files(tmp_path / "baseline") == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "baseline" / "config.json").read_text())
    assert config["model_type"] == "prompt_free_prior" and not {"auto_map", "custom_pipelines"} & config.keys()
    with pytest.raises(ValueError, match="the code of a prompt_free_prior cannot be saved with it"):
        model.config.include_code()


def test_pulled_weights_are_staged_with_their_own_code(run, changed, tmp_path):
    """`from_pretrained` prefixes modules with the repository name; a push elsewhere must not refer to it."""
    model = ProbabilisticSamModel.from_pretrained(run)
    model.config.auto_map = {"AutoModel": "org/first--modeling_probabilistic_sam.ProbabilisticSamModel"}
    model.save_pretrained(changed)
    stage_model(changed, tmp_path / "staged", "alice/second")
    assert "org/first" not in (tmp_path / "staged" / "config.json").read_text()


def test_card_of_a_run_states_its_files_and_nothing_about_the_shipped_weights(run, tmp_path):
    stage_model(run, tmp_path / "staged", "alice/eyes")
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("mask-generation", "transformers")
    assert card.data.eval_results is card.data.license is card.data.datasets is card.data.base_model is None
    for part in ("# eyes: ", "train: 1,200 slices of 4 patients, source eyes", "GED was 0.432", "base_model: base"):
        assert part in card.text
    assert 'from_pretrained("alice/eyes"' in card.text and "org/psam-lidc" not in card.text
    assert "`mask-generation` pipeline is not supported" in card.text
    ours = json.loads((SHIPPED / "results" / "validation.json").read_text())["results"]["all"]["ged"]["mean"]
    assert f"{ours:.3f}" not in card.text and "1,740" not in card.text and "MobileSAM" not in card.text


def test_card_of_a_run_states_only_what_is_known_of_its_data(changed, tmp_path):
    def text(name, **files):
        for file, content in files.items():
            (changed / f"{file}.json").write_text(json.dumps(content))
        stage_model(changed, tmp_path / name, "alice/eyes")
        return ModelCard.load(tmp_path / name / "README.md").text

    def data(sources, **more):
        return {"train": {"slices": 7, "patients": 2, "sources": sources, **more}}

    plain = text("a", data=data([None]))  # as earlier versions wrote it
    assert "- train: 7 slices of 2 patients\n\nThe split is that of the dataset.\n" in plain
    assert "mean of those of steps" not in plain and "```\n\n## Results" in plain
    mixed = text("b", data=data([None, "eyes"], hash_split=False))
    assert "2 patients, source eyes\n\nThe split is that of the dataset.\n" in mixed
    hashed = data(["eyes"], hash_split=True)
    finish = {"run_steps": [4, 8], "shift": -0.5, "empty_share_readers": 0.25, "empty_share_before": 0.125}
    finished = text("c", data=hashed, finish=finish)
    assert "The split is by patient, from `int(sha256(" in finished and "split is that of" not in finished
    assert "```\n\nThe weights are the mean of those of steps 4 and 8. The presence was shifted by -0.5" in finished
    assert "masks, 25.0% (before: 12.5%).\n\n## Results" in finished
    assert "8. The presence was not calibrated.\n" in text("d", finish=finish | {"shift": None})


def test_card_of_a_run_with_results_has_a_table_and_a_model_index(changed, tmp_path):
    result = json.loads((SHIPPED / "results" / "validation.json").read_text())
    result |= {"split": "test", "dataset": "/data/eyes"}
    result["results"]["all"]["ged"] = {"mean": 0.1234, "ci95": [0.1, 0.2]}
    result["results"]["shape"]["ged"] = {"mean": None, "ci95": [None, None]}
    (changed / "results").mkdir()
    (changed / "results" / "test.json").write_text(json.dumps(result))
    (changed / "training_config.yaml").write_text("note: '{{ 7 * 7 }}'\n")
    stage_model(changed, tmp_path / "staged", "alice/eyes")
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert [(item.metric_name, item.dataset_name, item.dataset_split) for item in card.data.eval_results] == [
        ("GED, all", "eyes", "test"),
        ("HM-IoU, all", "eyes", "test"),
    ]
    assert card.data.eval_results[0].metric_value == 0.1234
    assert "| GED ↓ | 0.123 [0.100, 0.200] |" in card.text and "by lesion size (`results/test.json`)" in card.text
    assert "checkpoint was selected" not in card.text and "0.432" not in card.text
    assert "note: '{{ 7 * 7 }}'" in card.text  # texts of a run are not evaluated as templates
    assert (tmp_path / "staged" / "results" / "test.json").is_file()


def test_card_in_the_run_is_used(changed, tmp_path):
    (changed / "README.md").write_text("---\nlicense: mit\n---\n\nMine, org/psam-lidc.\n")
    stage_model(changed, tmp_path / "staged", "alice/eyes")
    assert (tmp_path / "staged" / "README.md").read_text() == "---\nlicense: mit\n---\n\nMine, alice/eyes.\n"


def test_shipped_model_is_staged_completely_with_its_card(tmp_path):
    stage_model(SHIPPED, tmp_path / "staged", "alice/psam")
    staged = files(tmp_path / "staged")
    assert files(SHIPPED) - {"TRAINING.md"} < staged
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) == 3
    assert 'from_pretrained("alice/psam"' in card.text and "org/psam-lidc" not in card.text
    assert "`mask-generation` pipeline is not supported" in card.text
    linked = [part.split(")")[0] for part in card.text.split("](")[1:]]
    assert linked and all(name in staged for name in linked if "://" not in name)
    config = json.loads((tmp_path / "staged" / "config.json").read_text())
    assert config["dtype"] == "float32"  # of float16 weights


def test_examples_are_phantom_slices_with_boxes_of_the_protocol():
    if not importlib.util.find_spec("pylidc"):
        pytest.skip("pylidc is not installed")
    import numpy as np

    from probabilistic_sam.data import make_prompt, row_seed
    from probabilistic_sam.data.format import decode_image, decode_masks
    from probabilistic_sam.data.lidc.nodules import read_nodule
    from probabilistic_sam.data.lidc.phantom import CROP_SIDE, phantom_row

    for example in json.loads((EXAMPLES / "examples.json").read_text())["images"]:
        nodule = read_nodule(example["patient_id"], example["nodule_id"], CROP_SIDE)
        row = phantom_row(nodule, example["slice_index"])
        committed = {"image": {"bytes": (EXAMPLES / example["image"]).read_bytes(), "path": None}}
        assert np.array_equal(decode_image(committed), decode_image(row))
        box = make_prompt(decode_masks(row), "union_box", np.random.default_rng(row_seed(row, "union_box")))
        assert example["box"] == pytest.approx(box["input_boxes"], abs=0.051)


# -------------------------------------------------------------------------------------------------------------- code


def forbidden_imports(path: Path) -> list[str]:
    """Imports of a remote-code module other than its siblings, torch, numpy and transformers."""
    allowed = ALLOWED | ALLOWED_IN.get(path.name, set())
    siblings = {module.stem for module in MODULES}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [item.name for item in node.names if item.name.split(".")[0] not in allowed]
        elif isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module not in siblings:
                found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom) and not {node.module, node.module.split(".")[0]} & allowed:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_remote_code_imports_nothing_else(path):
    assert forbidden_imports(path) == []
    # transformers finds siblings by a regular expression, even in docstrings and comments
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    assert set(get_relative_imports(path)) <= {module.stem for module in MODULES}
    # transformers requires these before it runs the code; Pillow is not among them
    assert set(get_imports(path)) <= {"torch", "numpy", "transformers", "huggingface_hub", *sys.stdlib_module_names}


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts])
def test_configuration_may_come_from_another_copy_of_its_module(parts):
    """Without the package, transformers loads each module of a local folder separately."""
    path = ROOT / "probabilistic_sam" / "configuration_probabilistic_sam.py"
    spec = importlib.util.spec_from_file_location("another_configuration_probabilistic_sam", path)
    other = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = other
    try:
        spec.loader.exec_module(other)
    finally:
        del sys.modules[spec.name]
    model = tiny_model(parts)
    fields = {"latent_dim": 4, "latent_hidden_size": 16, "initializer_range": 0.2}
    config = other.ProbabilisticSamConfig(**parts(), **fields)
    assert not isinstance(config, ProbabilisticSamConfig)
    same = ProbabilisticSamModel(config)
    assert type(same.vision_encoder) is type(model.vision_encoder)
    same.load_state_dict(model.state_dict())
    # A sub-configuration may come from the other copy, too
    mixed = ProbabilisticSamConfig(**{**parts(), "vision_config": config.vision_config}, **fields)
    assert mixed.vision_config is config.vision_config
    ProbabilisticSamModel(mixed).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "line",
    [
        "import scipy", "from scipy import ndimage", "import probabilistic_sam.errors", "from . import errors",
        "from probabilistic_sam.errors import UserError", "from .errors import UserError", "from ..x import y",
        "from huggingface_hub import HfApi", "def f():\n    import PIL", "from .data.format import encode_png",
    ],
)  # fmt: skip
def test_forbidden_imports_are_found(tmp_path, line):
    path = tmp_path / "modeling_x.py"
    path.write_text(f"import math\nimport torch.nn\nfrom .modeling_tiny_vit import TinyViTVisionEncoder\n{line}\n")
    assert len(forbidden_imports(path)) == 1


# ------------------------------------------------------------------------------------------------------------ errors


def break_json(run):
    (run / "data.json").write_text("{")


def break_results(run):
    (run / "results").mkdir()
    (run / "results" / "r.json").write_text('{"split": "test"}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "processor_config.json").unlink(), "has no processor_config.json"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda run: (run / "README.md").write_text("---\na: [\n---\n"), "README.md"),
        (break_json, "data.json is not valid JSON"),
        (lambda run: (run / "data.json").write_text('{"train": 3}'), "data.json is not a file of training/train.py"),
        (
            lambda run: (run / "finish.json").write_text('{"run_steps": 1}'),
            "finish.json is not a file of training/fin",
        ),
        (break_results, "r.json is not a results file of training/evaluate.py"),
    ],
)
def test_broken_runs_are_refused(changed, tmp_path, change, message):
    change(changed)
    with pytest.raises(UserError, match=message):
        stage_model(changed, tmp_path / "staged", "alice/eyes")
    assert not (tmp_path / "staged").exists()


def test_bad_sources_names_and_outputs_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="no model directory at .*accepted: a run of training/train.py"):
        stage_model(tmp_path / "nowhere", tmp_path / "staged", "alice/eyes")
    with pytest.raises(UserError, match="is not a repository name"):
        stage_model(run, tmp_path / "staged", "eyes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        stage_model(run, tmp_path / "full", "alice/eyes")


# ------------------------------------------------------------------------------------------------------------ script


@pytest.fixture
def push_to_hub(monkeypatch):
    """A function that runs the script in this process."""
    module = load_script("push_to_hub")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, arguments)])
        module.main()

    return run


def test_dry_run_writes_and_lists_the_folder(push_to_hub, run, tmp_path, capsys):
    push_to_hub("--model", run, "--repo-id", "alice/eyes", "--dry-run", "--output", tmp_path / "staged")
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {tmp_path / 'staged'}; nothing was pushed"
    assert {line.split()[1] for line in lines} == files(tmp_path / "staged")
    sizes = dict(reversed(line.split()) for line in lines)
    assert sizes["model.safetensors"] == f"{(run / 'model.safetensors').stat().st_size:,}"


def test_dry_run_and_output_need_each_other(push_to_hub, run, tmp_path):
    for more in (("--dry-run",), ("--output", tmp_path / "staged")):
        with pytest.raises(UserError, match="accepted: both options or neither"):
            push_to_hub("--model", run, "--repo-id", "alice/eyes", *more)


def test_arguments_of_the_push_and_advice_of_its_error(push_to_hub, run, monkeypatch, capsys):
    seen = {}

    def push_folder(folder, name, *arguments, **options):
        seen.update(options, files=files(Path(folder)), arguments=(name, *arguments))
        return "address"

    monkeypatch.setattr("probabilistic_sam.hub.staging.push_folder", push_folder)
    push_to_hub("--model", run, "--repo-id", "alice/eyes", "--private", "--revision", "v1")
    assert capsys.readouterr().out.splitlines()[-1] == "pushed to address"
    assert seen["arguments"] == ("alice/eyes", "model", True, "v1") and "model.safetensors" in seen["files"]
    assert seen["again"] == (
        f"python training/push_to_hub.py --model {run} --repo-id alice/eyes --private --revision v1"
    )
