"""training/finish_run.py: averaged weights, and a calibrated share of empty samples."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from scipy.special import ndtr
from tiny import load_script, tiny_model, tiny_rows, tiny_vit_parts

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.data import split_of
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import encode_png, image_row, load_split
from probabilistic_sam.errors import UserError
from probabilistic_sam.training import finish

SCRIPT = Path(__file__).resolve().parent.parent / "training" / "finish_run.py"


@pytest.fixture(scope="module")
def script():
    return load_script("finish_run")


@pytest.fixture
def run_folder(tmp_path):
    """A run folder: a model, and a checkpoint whose averaged weights are larger by 1."""
    model = tiny_model(tiny_vit_parts)
    model.save_pretrained(tmp_path / "run")
    ProbabilisticSamProcessor(32, 32).save_pretrained(tmp_path / "run")
    last = {name: p.detach() + 1 for name, p in model.named_parameters() if name.startswith("prior.")}
    (tmp_path / "run" / "checkpoint-4").mkdir()
    torch.save({"step": 4, "best": {"step": 2}, "ema": last}, tmp_path / "run" / "checkpoint-4" / "training_state.pt")
    write_dataset(tiny_rows({"train": 1, "validation": 3}), tmp_path / "lidc", "Made for a test.")
    return tmp_path / "run"


def test_shift_by_hand():
    # P(z <= 0) is .1587 for a mean of 1
    assert finish.find_shift(np.zeros(3), np.full(3, 0.15865525)) == pytest.approx(1, abs=1e-6)
    assert finish.find_shift(np.array([-1.0, 1.0]), np.array([0.25, 0.75])) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="empty masks is 0"):
        finish.find_shift(np.zeros(2), np.zeros(2))


def test_share_of_empty_masks_is_that_of_the_present_readers(tmp_path):
    empty, square = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    square[10:20, 10:20] = True
    readers = {0: [square, empty], 1: [square, square, square, empty]}  # the first row lacks two readers
    identity = {"patient_id": "LIDC-IDRI-0001", "scan_id": 1, "nodule_id": 0, "source": "test"}
    rows = [
        image_row(
            encode_png(square.astype(np.uint8)), [encode_png(mask) for mask in masks], "image", ["mask"] * len(masks),
            slice_index=index, **identity,
        )
        for index, masks in readers.items()
    ]  # fmt: skip
    write_dataset(iter(rows), tmp_path / "lidc", "Made for a test.")
    rows = load_split(tmp_path / "lidc", split_of("LIDC-IDRI-0001"))
    model, processor = tiny_model(tiny_vit_parts), ProbabilisticSamProcessor(32, 32)
    assert finish.presence_means(model, processor, rows)[1].tolist() == [0.5, 0.25]


def test_average_is_half_of_the_way():
    model = tiny_model(tiny_vit_parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    finish.average(model, {"prior.lin2.bias": before["prior.lin2.bias"] + 1})
    for name, value in model.named_parameters():
        moved = 0.5 if name == "prior.lin2.bias" else 0
        assert torch.allclose(value, before[name] + moved), name
    for wrong in ({}, {"absent": torch.zeros(1)}, {"prior.lin2.bias": torch.zeros(1)}):
        with pytest.raises(UserError, match="of another model"):
            finish.average(model, wrong)


def test_expected_share_of_empty_samples_is_that_of_the_readers(script, run_folder, tmp_path, monkeypatch, capsys):
    arguments = ["--run", run_folder, "--dataset", tmp_path / "lidc", "--output", tmp_path / "done"]
    monkeypatch.setattr(sys, "argv", ["finish_run.py", *map(str, arguments)])
    script.main()
    record = json.loads((tmp_path / "done" / "finish.json").read_text())
    assert record["run_steps"] == [2, 4] and "wrote" in capsys.readouterr().out
    before, after = (ProbabilisticSamModel.from_pretrained(path) for path in (run_folder, tmp_path / "done"))
    processor = ProbabilisticSamProcessor.from_pretrained(tmp_path / "done")
    old, new = (dict(model.named_parameters()) for model in (before, after))
    for name, value in new.items():
        moved = old[name] + 0.5 if name.startswith("prior.") else old[name].clone()
        if name == "prior.lin2.bias":
            moved[0] += record["shift"]
        assert torch.allclose(value, moved, atol=1e-4), name
    rows = load_split(tmp_path / "lidc", "validation")
    means, shares = finish.presence_means(after, processor, rows, batch_size=2)
    assert ndtr(-means).mean() == pytest.approx(shares.mean(), abs=1e-4)
    with pytest.raises(UserError, match="done holds other files"):
        script.main()
    monkeypatch.setattr(sys, "argv", ["finish_run.py", *map(str, arguments), "--output", str(SCRIPT)])
    with pytest.raises(UserError, match="is a file; accepted: a directory"):
        script.main()


def test_readers_who_annotate_every_image_leave_the_presence(script, run_folder, tmp_path, monkeypatch, capsys):
    def everybody():
        for row in tiny_rows({"train": 1, "validation": 1}):
            masks = [row["masks"][0]["bytes"]] * 3  # the first reader always annotated
            names = ("patient_id", "scan_id", "nodule_id", "slice_index", "source")
            yield image_row(row["image"]["bytes"], masks, "image", ["m"] * 3, **{name: row[name] for name in names})

    write_dataset(everybody(), tmp_path / "all", "Made for a test.")
    (run_folder / "data.json").write_text("{}")
    arguments = ["--run", run_folder, "--dataset", tmp_path / "all", "--output", tmp_path / "done"]
    monkeypatch.setattr(sys, "argv", ["finish_run.py", *map(str, arguments)])
    script.main()
    assert (
        "the share of empty masks is 0, which no finite shift reaches: the presence stays\n" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "done" / "finish.json").read_text())["shift"] is None
    assert (tmp_path / "done" / "data.json").read_text() == "{}"
    before, after = (ProbabilisticSamModel.from_pretrained(path) for path in (run_folder, tmp_path / "done"))
    assert torch.allclose(after.prior.lin2.bias, before.prior.lin2.bias + 0.5)


def test_a_folder_that_is_no_run(tmp_path):
    done = run_forked(SCRIPT, "--run", tmp_path, "--dataset", tmp_path, "--output", tmp_path / "done")
    assert done.returncode == 2 and "has no config.json" in done.stderr and "Traceback" not in done.stderr


def test_damaged_checkpoint_is_named(script, run_folder, tmp_path, monkeypatch):
    arguments = ["--run", run_folder, "--dataset", tmp_path / "lidc", "--output", tmp_path / "done"]
    monkeypatch.setattr(sys, "argv", ["finish_run.py", *map(str, arguments)])
    path = run_folder / "checkpoint-4" / "training_state.pt"
    for content, message in (
        ({"step": 4, "best": {"step": 2}}, "training_state.pt lacks 'ema'; accepted: a file of training/train.py"),
        ([1], "training_state.pt lacks 'step'"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            script.main()
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="training_state.pt is not a readable torch file"):
        script.main()
    assert not (tmp_path / "done").exists()
