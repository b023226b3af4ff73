"""Training with transformers' Trainer: collator, the code in TRAINER.md, repeatable evaluation, two processes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, sam_parts, tiny_inputs, tiny_labels, tiny_model, tiny_rows, tiny_vit_parts
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, pipeline

from probabilistic_sam import ProbabilisticSamCollator, ProbabilisticSamProcessor, modeling_probabilistic_sam

ROOT = Path(__file__).resolve().parent.parent
LOW = SIZE // 4
PROCESSOR = ProbabilisticSamProcessor(SIZE, 16)


def square(low=10, high=16, size=SIZE):
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


def make_row(masks=None, **columns):
    image = np.random.default_rng(0).integers(0, 255, size=(SIZE, SIZE)).astype(np.uint8)
    return {"image": image, "masks": [square(), square(11, 15)] if masks is None else masks, **columns}


# -------------------------------------------------------------------------------------------------------- collator


def test_rows_become_a_batch_with_absent_readers():
    batch = ProbabilisticSamCollator(PROCESSOR, num_readers=3, num_samples=5)(
        [
            make_row([square(10, 18), None, square(12, 16)]),
            make_row([square(10, 18), np.zeros((SIZE, SIZE)), square(12, 14)], patient_id="x"),
        ]
    )
    assert batch["num_samples"].tolist() == [5, 5]  # tensors only, which accelerate can distribute
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    # The window is 6..22, shown at 32
    assert batch["input_boxes"].tolist() == [[[8.0, 8.0, 24.0, 24.0]]] * 2
    assert batch["reader_mask"].tolist() == [[[True, True, False]], [[True, True, True]]]
    assert batch["annotated"].tolist() == [[[True, True, False]], [[True, False, True]]]
    assert batch["labels"].shape == (2, 1, 3, LOW, LOW)
    # A pixel of a mask has 2 image pixels: squares of 4, 2 and 1
    assert batch["labels"].sum(dim=(-2, -1)).tolist() == [[[16.0, 4.0, 0.0]], [[16.0, 0.0, 1.0]]]
    assert batch["labels"][0, 0, 0, 2:6, 2:6].all() and batch["labels"][1, 0, 2, 3, 3]
    assert set(batch["labels"].unique().tolist()) == {0.0, 1.0}


def test_labels_and_pixels_of_a_row_are_those_of_the_processor():
    row = make_row(input_boxes=[8, 9, 20, 22])
    batch = ProbabilisticSamCollator(PROCESSOR, num_readers=2)([row])
    expected = PROCESSOR(images=[row["image"]], input_boxes=[[[8, 9, 20, 22]]])
    for name in ("pixel_values", "input_boxes"):
        assert torch.equal(batch[name], expected[name])


def test_a_reader_whose_pixel_vanishes_is_annotated():
    processor = ProbabilisticSamProcessor(SIZE, 32)  # 4 image pixels per pixel of a mask
    dot = np.zeros((SIZE, SIZE), bool)
    dot[12, 12] = True
    batch = ProbabilisticSamCollator(processor, num_readers=2)([make_row([square(), dot])])
    assert batch["annotated"].tolist() == [[[True, True]]] and not batch["labels"][0, 0, 1].any()
    far = np.zeros((200, 200), bool)
    far[190, 190] = True  # outside the window
    row = {"image": np.zeros((200, 200)), "masks": [square(size=200), far], "input_boxes": [10, 10, 16, 16]}
    assert ProbabilisticSamCollator(processor, 2)([row])["annotated"].tolist() == [[[True, False]]]


def test_every_kind_of_image_and_mask_gives_one_batch():
    collator = ProbabilisticSamCollator(PROCESSOR, num_readers=2)
    expected = collator([make_row()])
    plain = make_row()
    others = [
        {"image": Image.fromarray(plain["image"]), "masks": [Image.fromarray(mask) for mask in plain["masks"]]},
        {"image": torch.from_numpy(plain["image"]), "masks": torch.from_numpy(np.stack(plain["masks"]))},
        {"image": plain["image"], "masks": [mask.astype(np.float64) for mask in plain["masks"]]},
        {"image": plain["image"], "masks": [mask * np.uint8(255) for mask in plain["masks"]]},
    ]
    for row in others:
        batch = collator([row])
        assert all(torch.equal(batch[name], expected[name]) for name in expected if name != "num_samples")
    encoded = next(tiny_rows({"train": 1}))
    assert collator([encoded | {"masks": encoded["masks"][:2]}])["labels"][0, 0, 0].any()


def test_points_are_padded_to_the_largest_number_in_a_batch():
    rows = [
        make_row(input_points=[[12, 13]]),
        make_row(input_points=[[12, 13], [14, 9]], input_labels=[1, 0]),
    ]
    batch = ProbabilisticSamCollator(PROCESSOR, num_readers=2)(rows)
    assert batch["input_points"].shape == (2, 1, 2, 2)
    assert batch["input_labels"].tolist() == [[[1, -10]], [[1, 0]]]
    assert "input_boxes" not in batch


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([make_row(), make_row([square()] * 3)], "row 1 of the batch: 3 masks, but num_readers is 2"),
        ([make_row([square() * 7])], "segmentation_maps of image 0 must be boolean, 0 and 1, or 0 and 255"),
        ([make_row([square(), np.where(square(), np.nan, 0)])], "segmentation_maps of image 0 must be boolean"),
        ([make_row([square(size=20)])], r"segmentation_maps .* must have the image's size \(32, 32\), got \(20, 20\)"),
        ([make_row([square(), square(size=20)])], r"masks \(H, W\) of one size"),
        ([make_row([])], r"masks \(H, W\) of one size, at least one, got none"),
        ([make_row([np.zeros((SIZE, SIZE))])], "every mask is empty, .* give input_boxes or input_points"),
        ([make_row(input_boxes=[[1, 1, 9, 9], [2, 2, 8, 8]])], "several prompts; accepted: one prompt per row"),
        ([make_row(), make_row(input_points=[[12, 13]])], "prompts of one kind, got input_boxes, input_points"),
        ([make_row(boxes=[[1, 1, 9, 9]])], "it has the column 'boxes', which is not read; accepted: input_boxes"),
        ([make_row(input_points=[[12, 13]], labels=[1])], "it has the column 'labels', which is not read"),
        ([{"image": np.zeros((4, 4))}], "no 'masks' among its columns image"),
        ([make_row(image={"bytes": b"no image"})], "the image is not an image"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, message):
    with pytest.raises(ValueError, match=f"^(row . of the batch: .*|the rows .*)?{message}") as error:
        ProbabilisticSamCollator(PROCESSOR, num_readers=2)(rows)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def test_evaluation_with_labels_is_repeatable_and_samples_do_not_depend_on_them(parts):
    model, labels = tiny_model(parts, energy_weight=1.0), tiny_labels()
    first = model(**tiny_inputs(), labels=labels, num_samples=3)
    torch.rand(5)
    again = model(**tiny_inputs(), labels=labels, num_samples=3)
    assert first.pred_masks.shape == (2, 3, 3, LOW, LOW) and first.reconstructed_masks.shape == (2, 3, 2, LOW, LOW)
    assert first.latents.shape == (2, 3, 3, 4) and first.iou_scores.shape == (2, 3, 3)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = model(**tiny_inputs(), labels=labels.flip(-1), num_samples=3)
    assert torch.equal(other.pred_masks, first.pred_masks) and other.loss != first.loss
    assert not torch.equal(other.reconstructed_masks, first.reconstructed_masks)
    state = torch.random.get_rng_state()
    model(**tiny_inputs(), labels=labels)
    assert torch.equal(torch.random.get_rng_state(), state)  # training does not depend on evaluations
    model.train()
    assert model(**tiny_inputs(), labels=labels).loss != model(**tiny_inputs(), labels=labels).loss


# --------------------------------------------------------------------------------------------------------- Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "base"
    tiny_model(tiny_vit_parts, energy_weight=1.0).save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    return path


@pytest.mark.parametrize("shipped", [False, True], ids=["tiny", "shipped"])
def test_code_in_trainer_md_runs(base, tmp_path, shipped):
    pytest.importorskip("accelerate")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "training" / "TRAINER.md").read_text(), flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 22
    rows = list(tiny_rows({"train": 2}, slices=2))
    rows[1]["masks"] = rows[1]["masks"][:3]  # one reader is absent
    names = {
        "base": str(ROOT / "model_cards" / "psam-lidc" if shipped else base), "output_dir": str(tmp_path / "run"),
        "train_rows": rows, "eval_rows": rows[:2] if shipped else rows,
    }  # fmt: skip
    exec(compile(code, "TRAINER.md", "exec"), names)
    trainer, model = names["trainer"], names["model"]
    first, second = trainer.evaluate(), trainer.evaluate()
    assert np.isfinite(first["eval_loss"]) and 0 <= first["eval_ged"] <= 2
    assert (first["eval_loss"], first["eval_ged"]) == (second["eval_loss"], second["eval_ged"])
    # The trained weights are saved and loaded
    start, again = AutoModel.from_pretrained(names["base"]), AutoModel.from_pretrained(tmp_path / "run")
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, own[name])}
    assert {name.split(".")[0] for name in changed} == {
        "mask_decoder", "detail_network", "prior", "posterior", "latent_proj",
    }  # fmt: skip
    assert AutoProcessor.from_pretrained(tmp_path / "run").crop_size == names["processor"].crop_size
    assert not list((tmp_path / "run").glob("*.bin"))


def test_compute_metrics_gets_samples_of_the_prior_and_the_readers(base, tmp_path):
    pytest.importorskip("accelerate")
    seen = []
    rows = list(tiny_rows({"train": 1}, slices=3))
    rows[2]["masks"] = rows[2]["masks"][:2]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, remove_unused_columns=False, report_to=[],
        label_names=["labels", "reader_mask"],
    )  # fmt: skip
    collator = ProbabilisticSamCollator(PROCESSOR, num_readers=4, num_samples=6)
    model = AutoModel.from_pretrained(base)
    trainer = Trainer(
        model, arguments, collator, eval_dataset=rows, compute_metrics=lambda prediction: seen.append(prediction) or {}
    )
    trainer.evaluate()
    labels, reader_mask = seen[0].label_ids
    assert seen[0].predictions.shape == (3, 1, 6, LOW, LOW) and labels.shape == (3, 1, 4, LOW, LOW)
    assert reader_mask.sum(axis=(1, 2)).tolist() == [4, 4, 2]
    expected = model(**collator(rows[:2])).pred_masks.detach().numpy()
    np.testing.assert_allclose(seen[0].predictions[:2], expected, atol=1e-5)


def test_checkpoints_open_as_a_pipeline(base, tmp_path):
    rows = list(tiny_rows({"train": 1}, slices=2))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        report_to=[],
        label_names=["labels", "reader_mask"],
        use_cpu=True,
    )
    collator = ProbabilisticSamCollator(PROCESSOR, num_readers=4)
    Trainer(AutoModel.from_pretrained(base), arguments, collator, rows).train()
    pipe = pipeline("probabilistic-mask-generation", model=str(tmp_path / "checkpoint-1"))
    (result,) = pipe(np.zeros((SIZE, SIZE)), boxes=[10, 10, 20, 20], num_samples=2)
    assert result["masks"].shape == (2, SIZE, SIZE) and pipe.processor.to_dict() == PROCESSOR.to_dict()


def replica_of(model):
    """What `torch.nn.DataParallel` makes on each GPU: a copy whose weights are no parameters."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copy in copies.items():
        copy._modules = {name: child and copies[child] for name, child in module._modules.items()}
        copy._parameters = {name: weight for name, weight in module._parameters.items() if weight is None}
        for name, weight in module._parameters.items():
            if weight is not None:
                setattr(copy, name, weight.view_as(weight))  # a tensor
    return copies[model]


def test_replicas_of_several_gpus_in_one_process_run():
    inputs, labels, model = tiny_inputs(), tiny_labels(), tiny_model()
    for given in ({}, {"labels": labels}):
        expected, found = (
            item(**inputs, **given, num_samples=3, generator=torch.Generator().manual_seed(0))
            for item in (model, replica_of(model))
        )
        assert torch.equal(found.pred_masks, expected.pred_masks)
    model.train()
    losses = []
    for item in (model, replica_of(model)):
        torch.manual_seed(0)  # of dropout
        losses.append(item(**inputs, labels=labels, generator=torch.Generator().manual_seed(0)).loss)
    losses[1].backward()
    assert torch.equal(*losses)


def test_one_batch_serves_for_the_loss_and_for_samples():
    inputs, labels = tiny_inputs(), tiny_labels()
    model = tiny_model()
    batch = inputs | {"labels": labels, "num_samples": torch.tensor([3])}
    batch["reader_mask"] = torch.ones(labels.shape[:3], dtype=torch.bool)
    assert model(**batch).loss.isfinite() and model.sample(**batch).pred_masks.shape[2] == 3
    model(**inputs, return_dict=True)  # as accelerate's unwrapped models are called
    for wrong in (torch.tensor([0]), torch.tensor([1.5])):
        with pytest.raises(ValueError, match="num_samples must be"):
            model(**inputs, num_samples=wrong)


def test_sampling_in_training_mode_is_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_probabilistic_sam.logger, "warning_once", warnings.append)
    model = tiny_model()
    model.sample(**tiny_inputs())
    assert not warnings
    model.train().sample(**tiny_inputs())
    assert warnings == ["sampling in training mode, with dropout; call model.eval() first"]


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import datasets
import torch
from tiny import tiny_model, tiny_rows, tiny_vit_parts
from transformers import Trainer, TrainingArguments
from probabilistic_sam import ProbabilisticSamCollator, ProbabilisticSamProcessor

torch.set_num_threads(1)
rows = list(tiny_rows({"train": 2}, slices=2))
train_rows = rows
if "stream" in sys.argv[1]:  # accelerate's first process reads the rows and distributes the batches
    train_rows = datasets.IterableDataset.from_generator(lambda: iter(rows))
arguments = TrainingArguments(
    sys.argv[1], max_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1, save_strategy="no",
    report_to=[], remove_unused_columns=False, label_names=["labels", "reader_mask"], gradient_checkpointing=True,
    disable_tqdm=True, use_cpu=True)
trainer = Trainer(
    tiny_model(tiny_vit_parts, energy_weight=1.0), arguments,
    ProbabilisticSamCollator(ProbabilisticSamProcessor(32, 16), num_readers=4, num_samples=2), train_rows, rows,
    compute_metrics=lambda prediction: {"rows": len(prediction.predictions)})
trainer.train()
metrics = trainer.evaluate()
weights = torch.cat([value.detach().flatten() for value in trainer.model.parameters()])
total = round(float(weights.double().abs().sum()), 6)
result = f"{trainer.accelerator.num_processes} {metrics['eval_rows']} {total}"
Path(sys.argv[1], f"result-{trainer.accelerator.process_index}").write_text(result)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "stream"])
def test_two_processes_train_with_gradient_checkpointing(tmp_path, name):
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / name), str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # or processes of torchrun would remain
            raise
    assert process.returncode == 0, errors[-3000:]
    results = [path.read_text().split() for path in (tmp_path / name).glob("result-*")]
    assert len(results) == 2 and results[0] == results[1]  # both have the same weights
    assert results[0][:2] == ["2", "4"]
