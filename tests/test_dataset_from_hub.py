"""A build on the Hub by its name, for every command with --dataset; against a server on the loopback address."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback_hub import LoopbackHub
from tiny import SIZE, tiny_model, tiny_rows, tiny_vit_parts

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from probabilistic_sam.data.build import write_dataset

TESTS = Path(__file__).resolve().parent

# One process, since importing takes longest: push as the builder does, then use the name in all commands
COMMANDS = """
import json
import os
import sys
from pathlib import Path
from tiny import load_script
from probabilistic_sam.data.format import load_split, split_content
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.push import push_folder

folder = Path(sys.argv[1])
push_folder(folder / "build", "org/lidc", "dataset", private=True, replace="data/*")  # as training/build_dataset.py
push_folder(folder / "script", "org/script", "dataset")

def run(script, *arguments):
    sys.argv = [script, "--dataset", "org/lidc", *map(str, arguments)]
    load_script(script).main()

cache = ("--cache_dir", folder / "cache")
run("train", "--config", folder / "config.yaml", "--output_dir", folder / "run", *cache)
run("finish_run", "--run", folder / "run", "--output", folder / "finished")
run("evaluate", "--model", folder / "finished", "--num_samples", "2", "--output", folder / "validation.json")
(folder / "results").mkdir()
os.rename(folder / "validation.json", folder / "results" / "validation.json")
figures = ("--model", folder / "finished", "--results", folder / "results", "--output", folder / "figures")
run("report/make_figures", *figures)

found = {"content": {name: split_content(load_split("org/lidc", name)) for name in ("train", "validation")}}
for key, name, split in (
    ("split", "org/lidc", "test"), ("script", "org/script", "train"), ("absent", "org/absent", "train")
):
    try:
        load_split(name, split)
    except UserError as error:
        found[key] = str(error)
os.makedirs("org/lidc")
try:
    load_split("org/lidc", "train")
except UserError as error:
    found["local"] = str(error)
print(json.dumps(found))
"""
CONFIG = {
    "image_size": SIZE, "crop_size": 24, "batch_size": 4, "max_steps": 2, "warmup_steps": 1, "log_every": 1,
    "eval_every": 2, "eval_slices": 3, "eval_samples": 2, "checkpoint_every": 2, "num_views": 1,
}  # fmt: skip


@pytest.mark.slow
def test_every_command_takes_a_build_from_the_hub(tmp_path):
    write_dataset(tiny_rows({"train": 2, "validation": 4}), tmp_path / "build", "Made for a test.")
    tiny_model(tiny_vit_parts).save_pretrained(tmp_path / "base")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"base_model": str(tmp_path / "base")}))
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("open('ran', 'w')")
    (tmp_path / "work").mkdir()
    with LoopbackHub() as hub:
        environment = os.environ | hub.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        command = [sys.executable, "-c", COMMANDS, str(tmp_path)]
        ended = subprocess.run(
            command, env=environment, cwd=tmp_path / "work", capture_output=True, text=True, check=False, timeout=300
        )
        assert ended.returncode == 0, ended.stderr
        pushed = hub.repos["dataset", "org/lidc"].files()
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["content"] == json.loads(pushed["manifest.json"])["splits"]
    assert found["content"]["train"]["rows"] == 6
    assert found["split"] == "org/lidc: has no split 'test'; accepted: train, validation"
    assert found["script"].startswith("org/script: holds no data/*.parquet; accepted: ")
    assert found["absent"].startswith("org/absent: no such directory, and no dataset on the Hub (404")
    assert "\n" not in found["absent"] and found["absent"].endswith("or its name on the Hub, organisation/name")
    assert found["local"].startswith("org/lidc: holds no data/*.parquet")  # a folder of this name goes first
    cached = [path for path in (tmp_path / "home").rglob("snapshots/*/**/*") if path.is_file()]
    assert cached and all(path.suffix == ".parquet" for path in cached)  # neither scripts nor anything else
    assert not list(tmp_path.rglob("ran"))
    assert json.loads((tmp_path / "results" / "validation.json").read_text())["dataset"] == "org/lidc"
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "figures" / "gallery.png").exists()
