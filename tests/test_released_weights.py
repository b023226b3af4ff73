"""Outputs of the released weights, compared with those that were recorded when they were released.

A change of the architecture that still loads the weights shows here. `python tests/test_released_weights.py` records
the values of new weights.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SHIPPED
from PIL import Image

from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.inference import load_model

RECORDED = ROOT / "tests" / "released_values.json"


def released_values() -> dict[str, dict[str, list[float]]]:
    """Prior, posterior and masks for a box, for a box that leaves a colour image, and for points of both labels."""
    model, processor = load_model(SHIPPED)
    example = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]
    image = np.asarray(Image.open(EXAMPLES / example["image"])).astype(float)
    colour = np.stack([image, image[::-1], image[:, ::-1]], axis=-1)
    points = {"input_points": [[[[65, 65], [70, 60], [50, 90]]]], "input_labels": [[[1, 1, 0]]]}
    box = {"input_boxes": [[example["box"]]]}
    values = {}
    for name, picture, prompt in (
        ("box", image, box),
        ("colour", colour, {"input_boxes": [[[-0.5, 3, 60, 40]]]}),
        ("points", image, points),
    ):
        generator = torch.Generator().manual_seed(0)
        output = model.sample(**processor(picture, **prompt), num_samples=4, generator=generator)
        values[name] = {field: output[field] for field in ("prior_mean", "prior_log_std", "iou_scores")}
        values[name]["area"] = output.outline_masks.sigmoid().mean(dim=(-2, -1)) * 100  # in percent of the window
    with torch.no_grad():
        output = model(**processor(image, **box, segmentation_maps=[image > 150]))
    values["reader"] = {field: output[field] for field in ("posterior_mean", "posterior_log_std")}
    return {
        name: {field: [round(value, 4) for value in item.flatten().tolist()] for field, item in fields.items()}
        for name, fields in values.items()
    }


def test_released_weights_give_the_recorded_values():
    recorded, found = json.loads(RECORDED.read_text()), released_values()
    assert recorded.keys() == found.keys()
    for name, fields in recorded.items():
        for field, values in fields.items():
            assert found[name][field] == pytest.approx(values, abs=5e-3), (name, field)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(released_values()) + "\n")
    print(f"wrote {RECORDED}")
