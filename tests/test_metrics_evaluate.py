"""The modules for the `evaluate` library, loaded from their files."""

from pathlib import Path

import numpy as np
import pytest

from probabilistic_sam.metrics import functional

evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`evaluate.load` of one of our modules, without network and with caches in a temporary folder."""
    folder = Path(functional.__file__).parent
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return lambda name: evaluate.load(
        str(folder / f"{name}.py"), cache_dir=str(tmp_path / "metrics"), experiment_id=name
    )


def test_modules_agree_with_the_functions(load):
    rng = np.random.default_rng(0)
    images = [(rng.random((n, 9, 9)) < 0.5, rng.random((m, 9, 9)) < 0.5) for n, m in ((4, 2), (3, 4), (1, 1))]
    images.append((rng.random((2, 8, 16)) < 0.5, rng.random((3, 8, 16)) < 0.5))  # images may differ in size
    expected_ged = np.mean([functional.ged(samples, readers) for samples, readers in images], axis=0)
    expected_hm_iou = np.mean([functional.hm_iou(samples, readers) for samples, readers in images])
    predictions = [functional.pack_masks(samples) for samples, _ in images]
    references = [functional.pack_masks(readers) for _, readers in images]

    result = load("ged").compute(predictions=predictions, references=references)
    assert list(result) == ["ged", "cross_distance", "sample_diversity", "reader_diversity"]
    np.testing.assert_allclose(list(result.values()), expected_ged)

    metric = load("hm_iou")
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(predictions=prediction, references=reference)
    assert metric.compute() == pytest.approx({"hm_iou": expected_hm_iou})


@pytest.mark.parametrize("name", ["ged", "hm_iou"])
def test_masks_of_another_size_than_their_readers_are_refused(load, name):
    wide, tall = np.ones((2, 8, 16), dtype=bool), np.ones((3, 16, 8), dtype=bool)  # equally many pixels
    packed = {"predictions": [functional.pack_masks(wide)], "references": [functional.pack_masks(tall)]}
    with pytest.raises(ValueError, match=r"must have one size, got .*\(2, 8, 16\).*\(3, 16, 8\)"):
        load(name).compute(**packed)
