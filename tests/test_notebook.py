"""The notebook of every staged model, run from top to bottom."""

import json
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from probabilistic_sam.hub.staging import EXAMPLES, NOTEBOOK, PACKAGE_DATA, stage_model
from probabilistic_sam.inference import load_model

SHIPPED = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"


def test_notebook_is_valid_and_without_outputs():
    notebook = nbformat.read(PACKAGE_DATA / NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_notebook_gives_the_numbers_of_the_package(tmp_path, monkeypatch):
    """Without a connection: the kernel finds the staged model in the cache of the Hub's client."""
    repository = tmp_path / "hub" / "models--alice--psam"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    stage_model(SHIPPED, snapshot, "alice/psam")
    for name in ("MPLBACKEND", "HF_HUB_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(snapshot / NOTEBOOK, 4)
    NotebookClient(notebook, timeout=120).execute()

    install, *_, sample, plot = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert install.outputs == []  # the package is installed
    assert any("image/png" in output.get("data", {}) for output in plot.outputs)
    example = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]
    model, processor = load_model(SHIPPED)
    inputs = processor(Image.open(EXAMPLES / example["image"]), input_boxes=[[example["box"]]])
    samples = model.sample(**inputs, num_samples=16, generator=torch.Generator().manual_seed(0))
    masks = {"outline_masks": samples.outline_masks, "presence": samples.presence}
    (result,) = processor.post_process_samples(
        samples.pred_masks, inputs["windows"], inputs["original_sizes"], example["pixel_spacing_mm"], **masks
    )
    areas = result["area_quantiles_given_presence"].items()
    assert sample.outputs[0].text.splitlines() == [
        f"presence: {result['presence']:.0%}",
        *(f"{float(level):4.0%} quantile of the area given presence: {area:.0f} mm²" for level, area in areas),
    ]
