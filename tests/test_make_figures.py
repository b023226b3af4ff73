"""The command that plots the figures of the card, with a tiny model and a dataset of discs."""

import json
import sys

import numpy as np
import pytest
from tiny import SIZE, load_script, tiny_model, tiny_rows

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.errors import UserError

make_figures = load_script("report/make_figures")


def result(num_samples: int, ged: float, sampling: str = "together") -> dict:
    entry = {"ged": {"mean": ged, "ci95": [ged - 0.1, ged + 0.1]}}
    return {
        "model": "m", "prompt": "union_box", "split": "validation", "num_slices": 9, "num_samples": num_samples,
        "sampling": sampling, "results": {"all": entry, "shape": entry},
        "calibration": {"pixels": np.ones((3, 10)).tolist(), "emptiness": np.ones((3, 10)).tolist()},
    }  # fmt: skip


def test_curves_join_results_of_one_model():
    results = {"validation": result(16, 0.2), "n4": result(4, 0.3), "independent": result(16, 0.25, "independent")}
    results["other"] = result(16, 0.9) | {"prompt": "center_box"}
    results["public"] = result(16, 0.9) | {"truth": "public"}
    results["thinned"] = result(16, 0.1) | {"num_candidates": 48}
    results["nodules"] = result(16, 0.9) | {"level": "nodule"}
    curves = make_figures.sample_numbers(results)
    assert curves["all"] == [
        (16, 0.2, 0.1, pytest.approx(0.3)),
        (4, 0.3, pytest.approx(0.2), 0.4),
    ]
    assert list(curves) == ["all", "shape"]


def test_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path / "model")
    write_dataset(tiny_rows({"validation": 4}), tmp_path / "data", "Discs.")
    (tmp_path / "results").mkdir()
    command = ["make_figures.py", "--model", tmp_path / "model", "--dataset", tmp_path / "data"]
    command += ["--results", tmp_path / "results", "--output", tmp_path / "figures"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(UserError, match="has no validation.json"):
        make_figures.main()
    (tmp_path / "results/validation.json").write_text(json.dumps(result(16, 0.2)))
    nodule = {"readers_mm3": [4.0, 5.0], "quantiles_mm3": [3.0, 5.0, 7.0]}
    nodules = result(100, 0.2) | {"level": "nodule", "num_nodules": 1, "nodules": [nodule]}
    nodules |= {"quantile_levels": [0.05, 0.5, 0.95]}
    (tmp_path / "results/nodule_shared_100.json").write_text(json.dumps(nodules))
    make_figures.main()
    names = ["calibration.png", "gallery.png", "sample_number.png", "traversal.png", "volumes.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names
    assert "gallery.png" in capsys.readouterr().out
