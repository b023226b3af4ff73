"""README and the other pages: every Python block runs, and every command is one that the scripts accept."""

import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import SIZE, load_script, tiny_model

from probabilistic_sam import ProbabilisticSamProcessor, cli
from probabilistic_sam.hub.staging import EXAMPLES, stage_model

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "model_cards" / "psam-lidc"
PAGES = (
    "README.md",
    "FAQ.md",
    "SCANS.md",
    "training/README.md",
    "training/OWN_DATA.md",
    "training/TRAINER.md",
    "model_cards/README.md",
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(page, language):
    """Contents of the fenced blocks of a page."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands():
    """The words of every command in a block without a language."""
    lines = [(page, line) for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    return [
        pytest.param(shlex.split(line, comments=True), id=f"{page}: {line[:60].strip()}")
        for page, line in lines
        if line.split(" ")[0] in ("python", "accelerate", "make", "pip", "probabilistic-sam")
    ]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with the released model and a slice, as the pages assume."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").mkdir()
    os.symlink(SHIPPED, tmp_path / "model_cards" / "psam-lidc")
    shutil.copyfile(EXAMPLES / "phantom-1.png", tmp_path / "slice.png")
    return tmp_path


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_lead_somewhere():
    for page in (*PAGES, "CHANGELOG.md", "training/EXPERIMENTS.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert target.startswith("http") or ((ROOT / page).parent / target).exists(), (page, target)


def test_python_of_the_readme_runs(desk, capsys):
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "torch.Size([16, 128, 128])" in out and out.count("'0.5': ") == 2


def test_python_of_the_hub_page_runs(desk, capsys):
    stage_model(SHIPPED, "staged", "org/psam-lidc")
    names: dict = {}
    for block in blocks("model_cards/README.md", "python"):
        exec(compile(block, "model_cards/README.md", "exec"), names)
    (result,) = names["pipe"]("slice.png", boxes=[[52, 50, 78, 80]], num_samples=2, seed=0)
    assert result["masks"].shape == (2, 128, 128)


def test_adapters_of_the_training_page_learn(desk):
    image = np.random.default_rng(0).integers(0, 255, size=(SIZE, SIZE)).astype(np.uint8)
    masks = np.zeros((2, SIZE, SIZE), bool)
    masks[:, 8:20, 8:20] = True
    names = {"model": tiny_model(), "processor": ProbabilisticSamProcessor(SIZE, 24)}
    names["slices"] = [(image, [8, 8, 20, 20], masks)]
    (block,) = blocks("training/README.md", "python")
    exec(compile(block, "training/README.md", "exec"), names)
    assert (desk / "merged" / "model.safetensors").is_file() and (desk / "adapter").is_dir()


def test_segment_as_the_readme_prints_it(desk):
    (line,) = [line for block in blocks("README.md", "") for line in block.splitlines() if "segment" in line]
    cli.main([*shlex.split(line)[1:], "--model", str(SHIPPED)])
    assert np.asarray(Image.open(desk / "out" / "masks" / "sample-00.png")).shape == (128, 128)


@pytest.mark.parametrize("words", commands())
def test_commands_are_accepted(words, monkeypatch):
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "pip":
        extras = re.findall(r"\[([^\]]*)\]", " ".join(rest))
        assert rest[0] == "install" and {name for item in extras for name in item.split(",")} <= EXTRAS.keys()
    elif program == "probabilistic-sam":
        cli.parse_args(rest)
    elif program in ("python", "accelerate"):
        if program == "accelerate":
            assert rest.pop(0) == "launch"
            if rest[0] == "--config_file":
                assert (ROOT / rest[1]).is_file()
                rest = rest[2:]
        script, *arguments = rest
        configs = [value for name, value in zip(arguments, arguments[1:], strict=False) if name == "--config"]
        assert all((ROOT / config).is_file() for config in configs)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        load_script(script.removeprefix("training/").removesuffix(".py")).parse_args()
