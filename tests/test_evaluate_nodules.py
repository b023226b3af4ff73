"""evaluate.py --level nodule: stub models with known volumes in process, the shipped weights from the command line."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from tiny import load_script

from probabilistic_sam.data import nodule_prompt, row_seed, split_of
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import FEATURES, encode_png, image_row, load_split
from probabilistic_sam.data.volumes import group_nodules, stack_masks
from probabilistic_sam.errors import UserError
from probabilistic_sam.evaluation import Oracle, Sampling
from probabilistic_sam.evaluation_nodules import (
    QUANTILE_LEVELS,
    evaluate_nodules,
    group_by_size,
    prepare_nodule,
    slice_generators,
)
from probabilistic_sam.workers import InThisProcess

SHIPPED = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
SIZE = 32
PATIENTS = [name for name in (f"LIDC-IDRI-{i:04d}" for i in range(1, 200)) if split_of(name) == "validation"][:3]
SLICES = (3, 1, 2)  # of each patient's nodule
SIDES = (4, 6, 8)  # px, of the square of each reader
NOTHING = np.zeros((3, SIZE, SIZE), bool)


def squares() -> np.ndarray:
    """Three readers, one inside the other."""
    masks = NOTHING.copy()
    for mask, side in zip(masks, SIDES, strict=True):
        mask[10 : 10 + side, 12 : 12 + side] = True
    return masks


def make_row(number: int, index: int, masks: np.ndarray | None = None, **changes) -> dict:
    masks = squares() if masks is None else masks
    image = sum(mask.astype(np.uint8) << reader for reader, mask in enumerate(masks))  # from which the stub reads them
    columns = {"patient_id": PATIENTS[number], "scan_id": number, "nodule_id": 0, "slice_index": index}
    columns |= {"z_mm": 2.0 * index, "pixel_spacing_mm": 0.5, "slice_thickness_mm": 2.0, "crop_row": 0, "crop_col": 0}
    names = [f"mask {reader}" for reader in range(len(masks))]
    return image_row(encode_png(image), [encode_png(m) for m in masks], "i", names, source="test", **columns | changes)


def save(rows, path: Path) -> Path:
    write_dataset(rows, path, "Made for a test.")
    return path


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    rows = [make_row(number, index) for number, count in enumerate(SLICES) for index in range(count)]
    return save(rows, tmp_path_factory.mktemp("dataset") / "ct")


@pytest.fixture(scope="module")
def dataset(dataset_dir):
    return load_split(dataset_dir, "validation")


def from_rows(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row[name] for name in FEATURES} for row in rows], features=FEATURES)


class StubProcessor:
    """The whole image as window; boxes as they are."""

    def __call__(self, images, input_boxes, return_tensors):
        count = len(images)
        return {
            "pixel_values": torch.from_numpy(np.stack(images).astype(np.int64)),
            "input_boxes": torch.tensor(input_boxes),
            "windows": torch.tensor([[0, 0, SIZE]] * count),
            "original_sizes": torch.tensor([[SIZE, SIZE]] * count),
        }

    def post_process_logits(self, pred_masks, windows, original_sizes):
        return list(pred_masks.flatten(0, 1))


class Readers:
    """Its samples are the readers' masks, which it reads from the image, in an order from the generator."""

    def __init__(self):
        self.boxes, self.calls = [], []

    def sample(self, pixel_values, input_boxes, num_samples, generator):
        self.boxes += input_boxes[:, 0].tolist()
        self.calls.append(len(pixel_values))
        orders = [torch.randperm(num_samples, generator=one) for one in generator]
        masks = torch.stack(
            [image >> order[:, None, None] & 1 for image, order in zip(pixel_values, orders, strict=True)]
        )
        return SimpleNamespace(pred_masks=(masks.float() * 20 - 10)[:, None])


class Pickling(InThisProcess):
    """What passes through it could pass to and from a worker process."""

    def submit(self, fn, /, *args):
        return super().submit(lambda: pickle.loads(pickle.dumps(fn(*pickle.loads(pickle.dumps(args))))))


def score(dataset, model=None, noise="shared", prompt="nodule_box", batch_size=4, process=(0, 1), seeds=(0,), **more):
    state = SimpleNamespace(process_index=process[0], num_processes=process[1], is_main_process=False)
    nodules, _ = group_nodules(dataset)
    sampling = Sampling(prompt, len(SIDES), seeds)
    return evaluate_nodules(
        model or Readers(), StubProcessor(), dataset, nodules, sampling, noise, batch_size, state, **more
    )


def test_samples_that_are_the_readers_have_known_scores(dataset):
    patients, (scores,) = score(dataset)
    assert patients == PATIENTS
    # Areas 16, 36 and 64 px of 0.25 mm2 on slices at a distance of 2 mm: 8, 18 and 32 mm3 per slice
    assert [item["volumes"]["readers_mm3"] for item in scores] == [[24, 54, 96], [8, 18, 32], [16, 36, 64]]
    for item in scores:
        assert item["samples"]["ged_3d"] == pytest.approx(0, abs=1e-9)
        # mean |x - y| = 2 (10 + 14 + 24) / 9, and half of it remains; mean volume 58 / 3
        assert item["samples"]["volume_crps"] == pytest.approx(48 / 9 / (58 / 3))
        # The mean mask is the middle reader: IoU 16/36, 1 and 36/64; of readers 16/36, 36/64 and 16/64
        cross, readers = 1 - (16 / 36 + 1 + 36 / 64) / 3, (6 - 2 * (16 / 36 + 36 / 64 + 16 / 64)) / 9
        assert item["mean_mask"]["ged_3d"] == pytest.approx(2 * cross - readers)
        assert item["mean_mask"]["volume_error"] == pytest.approx(abs(18 - 58 / 3) / (58 / 3))
    assert scores[1]["volumes"]["quantiles_mm3"] == np.quantile([8, 18, 32], QUANTILE_LEVELS).round(2).tolist()


def test_independent_noise_mixes_the_readers_of_the_slices(dataset):
    _, (shared,) = score(dataset)
    _, (independent,) = score(dataset, noise="independent")
    differences = [b["samples"]["ged_3d"] - a["samples"]["ged_3d"] for a, b in zip(shared, independent, strict=True)]
    assert differences[0] > 0.01 and differences[1] == 0  # three slices; one
    # The noise of a slice is that of its evaluation as a slice
    nodule = group_nodules(dataset)[0][0]
    rows = [dataset[index] for index in nodule.rows]
    item = prepare_nodule(nodule, rows, StubProcessor(), "union_box")
    own = [row_seed(row, "samples 7 None") for row in rows]
    assert [one.initial_seed() for one in slice_generators(item, 7, "independent")] == own
    assert [one.initial_seed() for one in slice_generators(item, 7, "shared")] == [own[0]] * 3


def test_prompts_are_one_box_or_one_per_slice(dataset):
    nodules, _ = group_nodules(dataset)
    model, single = Readers(), Readers()
    score(dataset, model)
    expected = []
    for nodule in nodules:
        rows = [dataset[index] for index in nodule.rows]
        box = nodule_prompt(rows[0], stack_masks(nodule, rows).any(axis=(0, 1)))["input_boxes"]
        expected += [box] * len(rows)
    np.testing.assert_allclose(model.boxes, expected)
    score(dataset, single, prompt="union_box")
    assert len({tuple(box) for box in single.boxes}) == sum(SLICES)


def test_results_do_not_depend_on_batches_processes_or_workers(dataset):
    model = Readers()
    _, expected = score(dataset, model, "independent", seeds=(0, 1))
    assert model.calls == [4, 4, 2, 2] and expected[0] != expected[1]
    small = Readers()
    assert score(dataset, small, "independent", batch_size=2, seeds=(0, 1))[1] == expected
    assert small.calls == [2, 1, 2, 1, 1, 1, 2, 2]  # three slices are more than a batch
    parts = [score(dataset, noise="independent", process=(index, 2)) for index in range(2)]
    assert parts[0][0] == PATIENTS[:2] and parts[0][1][0] + parts[1][1][0] == expected[0]
    assert score(dataset, noise="independent", workers=Pickling())[1][0] == expected[0]
    oracle = Oracle("oracle:readers")
    assert score(dataset, oracle, workers=Pickling()) == score(dataset, oracle)


def test_groups_of_neighbours_fill_batches():
    assert group_by_size([3, 1, 2, 9, 1, 1], 4) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert group_by_size([5], 4) == [range(1)]


def test_majority_is_one_volume(dataset):
    _, (scores,) = score(dataset, Oracle("oracle:majority"))
    assert scores[0]["samples"]["ged_3d"] == scores[0]["mean_mask"]["ged_3d"] > 0
    assert scores[0]["volumes"]["quantiles_mm3"] == [54.0] * len(QUANTILE_LEVELS)


def test_slices_that_nobody_annotated_belong_to_the_nodule_but_have_no_box():
    # Our builds leave them out, other datasets may not
    dataset = from_rows(make_row(0, 0), make_row(0, 1, NOTHING))
    volumes = score(dataset)[1][0][0]["volumes"]
    assert volumes["readers_mm3"] == [8, 18, 32] and volumes["num_slices"] == 2
    where = f"{PATIENTS[0]} scan 0 nodule 0"
    with pytest.raises(UserError, match=f"{where}: prompt union_box of a slice: all masks are empty.*nodule_box"):
        score(dataset, prompt="union_box")
    with pytest.raises(UserError, match=f"{where}: all masks are empty; accepted: nodules that at least one reader"):
        score(from_rows(make_row(0, 0, NOTHING)))


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


def arguments(dataset, output, *more, model=SHIPPED):
    command = ["--level", "nodule", "--model", model, "--dataset", dataset, "--output", output, *more]
    return list(map(str, command))


def test_command_writes_what_a_figure_and_a_card_need(script, dataset_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    script.main(arguments(dataset_dir, output, "--num_samples", "4", "--max_nodules", "2", "--device", "cpu"))
    content = json.loads(output.read_text())
    expected = {
        "level": "nodule", "prompt": "nodule_box", "noise": "shared", "num_samples": 4, "seed": 0, "num_nodules": 2,
        "num_left_out": 0, "num_patients": 2, "max_nodules": 2, "truth": None, "split": "validation",
        "sampling": "together", "num_slices": sum(item["num_slices"] for item in content["nodules"]),
    }  # fmt: skip
    assert {name: content[name] for name in expected} == expected and content["command"] and "commit" in content
    for column in content["results"].values():
        assert column["count"] == 2 and 0 <= column["ged_3d"]["mean"] <= 2 and len(column["ged_3d"]["ci95"]) == 2
    for item in content["nodules"]:
        assert item["readers_mm3"] == [volume * item["num_slices"] for volume in (8, 18, 32)]
        assert item["empty_rate_samples"] == 1 or len(item["quantiles_mm3"]) == len(content["quantile_levels"])
    printed = capsys.readouterr().out
    assert "samples (2)" in printed and "mean_mask (2)" in printed and "2 nodules of 2 patients" in printed


def test_nodules_without_a_known_volume_are_left_out_and_counted(script, tmp_path, dataset):
    rows = [make_row(0, 0), make_row(1, 0, z_mm=None), make_row(2, 0, slice_thickness_mm=None)]
    path, output = save(rows, tmp_path / "part"), tmp_path / "results.json"
    script.main(arguments(path, output, model="oracle:readers"))
    content = json.loads(output.read_text())
    assert (content["num_nodules"], content["num_left_out"]) == (1, 2) and "max_nodules" not in content
    path = save(rows[1:], tmp_path / "none")
    with pytest.raises(UserError, match="none of 2 nodules has z_mm, pixel_spacing_mm.* accepted with --level nodule"):
        script.main(arguments(path, output, model="oracle:readers"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "reader_box"], "--prompt is reader_box; accepted with --level nodule: nodule_box, union_box"),
        (["--level", "slice", "--prompt", "nodule_box"], "--prompt is nodule_box; accepted with --level slice: union"),
        (["--level", "slice", "--noise", "shared"], "--noise is given with --level slice; accepted: --level nodule"),
        (["--max_slices", "3"], "--max_slices is given with --level nodule; accepted: --level slice"),
        (["--max_nodules", "0"], "--max_nodules is 0; accepted: 1 or more"),
    ],
)
def test_options_of_the_other_level_are_refused(script, dataset_dir, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        script.main(arguments(dataset_dir, tmp_path / "results.json", *more))
