"""training/train.py: a run of eight steps, resuming after a kill, errors in one line."""

import functools
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from forked import Forked
from huggingface_hub.errors import StrictDataclassError
from loopback_hub import LoopbackHub
from tiny import SIZE, load_script, tiny_inputs, tiny_labels, tiny_model, tiny_rows, tiny_vit_parts
from transformers import AutoModel, AutoProcessor

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets
from accelerate import Accelerator

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor, evaluation
from probabilistic_sam.data import split_of
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import FEATURES, decode_masks, encode_png, image_row, load_split
from probabilistic_sam.errors import UserError
from probabilistic_sam.metrics import summarize
from probabilistic_sam.training import checkpoint, loop, models, optimization
from probabilistic_sam.training.batches import collate
from probabilistic_sam.training.checkpoint import checkpoints
from probabilistic_sam.training.config import TrainingConfig, parse_overrides, read_config
from probabilistic_sam.training.log import latent_values
from probabilistic_sam.training.optimization import Ema, Optimization, parameter_groups
from probabilistic_sam.training.validation import Validation
from probabilistic_sam.weights import save_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "train.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Three steps per epoch; neither checkpoints nor validations coincide with the end of one or with a line of the log
CONFIG = {
    "image_size": SIZE, "crop_size": 24, "encoder": "cached", "batch_size": 4, "max_steps": 8, "warmup_steps": 1,
    "log_every": 3,
    "eval_every": 4, "eval_slices": 5, "eval_samples": 3, "checkpoint_every": 4, "energy_ramp_steps": 4,
    "model": {"energy_weight": 5, "num_energy_samples": 2, "latent_dropout": 0.5},
    "prompts": {"union_box": 0.5, "center_box": 0.25, "center_point": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that the tests start, since sums over more threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script():
    return load_script("train")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A base model, a dataset and a configuration."""
    path = tmp_path_factory.mktemp("training")
    tiny_model(tiny_vit_parts).save_pretrained(path / "base")
    write_dataset(tiny_rows({"train": 4, "validation": 2}), path / "lidc", "Made for a test.")
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"base_model": str(path / "base")}, sort_keys=False))
    return path


def arguments(workspace, output, *more):
    given = {"config": "config.yaml", "dataset": "lidc", "cache_dir": "cache"}
    named = [part for name, value in given.items() for part in (f"--{name}", str(workspace / value))]
    return [str(SCRIPT), *named, "--output_dir", str(output), *map(str, more)]


@pytest.fixture
def train(script, workspace, monkeypatch):
    """Run the script in this process."""

    def run(output, *more):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", arguments(workspace, output, *more))
        script.main()

    return run


def start_apart(workspace, output, *more, processes=1):
    """Start the script in one process or several."""
    command = arguments(workspace, output, *more)
    return Forked(command, directory=workspace, environment=ENVIRONMENT, processes=processes)


def train_apart(*args, **kwargs):
    """Start the script and wait for its end."""
    return start_apart(*args, **kwargs).wait()


def train_like_a_user(workspace, output, *more, processes=1, **variables):
    """Run the script in a new interpreter, with several processes through torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments(workspace, output, *more)]
    with subprocess.Popen(
        command,
        env=ENVIRONMENT | variables,
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=570)
        finally:
            if process.poll() is None:  # torchrun alone would leave its processes running
                os.killpg(process.pid, signal.SIGKILL)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module")
def finished(script, workspace):
    """The folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", arguments(workspace, workspace / "finished"))
        script.main()
    return workspace / "finished"


def read_log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(run, expected, steps=8):
    """Weights, their average, optimizer, log and best model are identical bit for bit."""
    states = [torch.load(path / f"checkpoint-{steps}" / "training_state.pt") for path in (run, expected)]
    for part in ("model", "ema"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()), part
    for index, values in states[0]["optimizer"]["state"].items():
        other = states[1]["optimizer"]["state"][index]
        assert all(torch.equal(value, other[name]) for name, value in values.items())
    assert read_log(run) == read_log(expected)
    for name in ("model.safetensors", "best.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------------- a run


def test_run_folder_opens_as_a_model_with_its_processor(finished, workspace):
    model, processor = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    assert isinstance(model, ProbabilisticSamModel) and isinstance(processor, ProbabilisticSamProcessor)
    assert (processor.image_size, processor.crop_size) == (SIZE, 24)
    assert model.config.energy_weight == 5  # that of the configuration, not of a step of the ramp
    inputs = processor(np.arange(40 * 40).reshape(40, 40), input_boxes=[[[4, 4, 12, 12]]])
    assert model.sample(**inputs, num_samples=2).pred_masks.shape == (1, 1, 2, 8, 8)

    base = ProbabilisticSamModel.from_pretrained(workspace / "base").state_dict()
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, base[name])}
    assert changed == {"detail_network", "prior", "posterior", "latent_proj", "mask_decoder"}


def test_run_folder_holds_one_checkpoint_the_configuration_and_the_best_scores(finished):
    names = {path.name for path in finished.iterdir()} - {"tensorboard"}
    assert names == {
        "config.json", "model.safetensors", "processor_config.json", "training_config.yaml", "data.json", "best.json",
        "log.jsonl", "checkpoint-8",
    }  # fmt: skip
    assert json.loads((finished / "data.json").read_text()) == {
        "train": {"slices": 12, "patients": 4, "sources": ["test"], "hash_split": True},
        "validation": {"slices": 6, "patients": 2, "sources": ["test"], "hash_split": True},
    }
    config = yaml.safe_load((finished / "training_config.yaml").read_text())
    assert config["max_steps"] == 8 and config["ema_decay"] == 0.995
    best = json.loads((finished / "best.json").read_text())
    scores = {line["step"]: line["validation/all/ged"] for line in read_log(finished) if "validation/all/ged" in line}
    assert scores.keys() == {4, 8}
    assert best["all/ged"] == min(scores.values()) == scores[best["step"]]


def test_log_has_the_documented_lines(finished):
    training = [line for line in read_log(finished) if "loss" in line]
    assert [line["step"] for line in training] == [3, 6]
    for line in training:
        assert line.keys() == {
            "step", "loss", "reconstruction_loss", "outline_kl", "presence_nll", "energy_distance", "iou_loss",
            "grad_norm", "lr",
        }  # fmt: skip
    validation = [line for line in read_log(finished) if "loss" not in line]
    assert [line["step"] for line in validation] == [4, 8]
    for line in validation:
        assert {"step", "validation/all/ged", "validation/all/hm_iou", "validation/all/sample_diversity"} < line.keys()
        assert {"validation/active_outline_units", "validation/posterior_iou"} < line.keys()
        assert len(line["validation/kl_per_dimension"]) == len(line["validation/posterior_mean_variance"]) == 4


@pytest.mark.slow
def test_run_is_pushed_at_its_end(finished, workspace, tmp_path):
    with LoopbackHub() as hub:
        ended = train_like_a_user(
            workspace, tmp_path / "run", "--push_to_hub", "org/tiny", **hub.environment(tmp_path / "home")
        )
        assert ended.returncode == 0, ended.stderr
        files = hub.repos["model", "org/tiny"].files()
    assert ended.stdout.splitlines()[-1].startswith("pushed to ")
    assert files["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "train: 12 slices of 4 patients, source test" in card and "max_steps: 8" in card
    assert {"handler.py", "modeling_probabilistic_sam.py", "processor_config.json"} < files.keys()
    assert not any("checkpoint" in name or name.endswith(".pt") for name in files)


def test_push_that_cannot_work_is_refused_before_training(train, workspace, tmp_path):
    with pytest.raises(UserError, match="'tiny' is not a repository name"):
        train(tmp_path / "run", "--push_to_hub", "tiny")
    unet = configured(workspace, tmp_path, model={"model_type": "dropout_unet"})
    with pytest.raises(UserError, match="--push_to_hub with model_type 'dropout_unet'; accepted: probabilistic_sam"):
        train(tmp_path / "run", "--config", unet, "--push_to_hub", "org/tiny")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.slow
def test_killed_and_resumed_run_equals_an_uninterrupted_one(train, finished, workspace, tmp_path):
    killed = train_apart(workspace, tmp_path, "--stop_after", 6)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read_log(tmp_path)[-1]["step"] == 6  # later than the checkpoint; the line will be written again
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill may cut a line
    train(tmp_path, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path, finished)


def test_the_better_model_stays_when_repeated_steps_give_others(train, tmp_path, monkeypatch):
    """As on a GPU, where sums depend on the order of threads: here the scores of the repeated steps are others."""
    scores = {name: iter(values) for name, values in {"killed": (0.2, 0.17), "resumed": (0.201, 0.19)}.items()}
    run, more = tmp_path / "run", ("eval_every=2", "checkpoint_every=3", "max_steps=6", "log_every=9")

    def scored(name):
        return lambda self, model: {"all/ged": next(scores[name])}

    with monkeypatch.context() as patch:
        patch.setattr(loop.Validation, "__call__", scored("killed"))
        patch.setattr(loop.os, "kill", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(run, *more, "--stop_after", 4)
    best = json.loads((run / "best.json").read_text())
    assert best == {"step": 4, "all/ged": 0.17} and [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    model = (run / "model.safetensors").read_bytes()
    monkeypatch.setattr(loop.Validation, "__call__", scored("resumed"))
    train(run, *more, "--resume_from_checkpoint", "latest")
    assert json.loads((run / "best.json").read_text()) == best and (run / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_run_killed_from_outside_resumes(train, workspace, tmp_path):
    """A checkpoint per step, so that the kill is likely to come while one is written or removed."""
    values = yaml.safe_load((workspace / "config.yaml").read_text())
    changes = {"checkpoint_every": 1, "max_steps": 30, "eval_every": 30, "log_every": 7, "eval_slices": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | changes))
    more = ("--config", tmp_path / "config.yaml")
    train(tmp_path / "whole", *more)

    def last_checkpoint():
        return max((int(path.name.split("-")[1]) for path in (tmp_path / "killed").glob("checkpoint-*")), default=0)

    started = start_apart(workspace, tmp_path / "killed", *more)
    while started.codes() == [None] and last_checkpoint() < 9:
        time.sleep(0.005)
    started.kill()
    assert started.codes() == [-signal.SIGKILL]
    train(tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=30)


class Killed(BaseException):
    """In place of a signal."""


@pytest.mark.parametrize("encoder", ["frozen", "trained"])
def test_run_with_new_views_resumes_exactly_with_other_workers(train, workspace, tmp_path, monkeypatch, encoder):
    """The uninterrupted run makes its windows in one process, the resumed one with two workers."""
    more = (f"encoder={encoder}", "eval_slices=1", "gradient_accumulation=2", "max_steps=6", "eval_every=6")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.os, "kill", kill)
        with pytest.raises(Killed):
            train(tmp_path / "killed", *more, "--stop_after", 5)
    assert not list(tmp_path.glob("*/model.safetensors"))
    train(tmp_path / "killed", *more, "num_workers=2", "--resume_from_checkpoint", "latest")
    train(tmp_path / "whole", *more)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=6)
    assert not list((tmp_path / "cache").glob("*")) and len(read_log(tmp_path / "whole")) == 3

    base = ProbabilisticSamModel.from_pretrained(workspace / "base").vision_encoder
    encoded = ProbabilisticSamModel.from_pretrained(tmp_path / "whole").vision_encoder
    pairs = zip(base.parameters(), encoded.parameters(), strict=True)
    assert {torch.equal(*pair) for pair in pairs} == {encoder == "frozen"}  # all of them or none


def test_finished_run_resumes_to_nothing(train, finished, tmp_path):
    before = (finished / "log.jsonl").read_bytes()
    train(finished, "--resume_from_checkpoint", finished / "checkpoint-8")
    assert (finished / "log.jsonl").read_bytes() == before


def contents(run):
    """Every file of a run folder with its content and time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_slices": 4}, "eval_slices is 5 there and 4 here"),
        ({"max_steps": 12}, "max_steps is 8 there and 12 here"),  # every step has another learning rate
        ({"model": CONFIG["model"] | {"energy_weight": 7}}, "model.energy_weight is 5.0 there and 7.0 here"),
        ({"model": {}}, "model.energy_weight is 5.0 there and not set here"),
        ({"augmentation": {"max_shift": 0, "max_zoom": 0.15, "max_gamma": 0.25}}, "max_shift is 6.0 there and 0.0 h"),
        ({"prompts": dict(reversed(CONFIG["prompts"].items()))}, 'prompts is {"union_box": .* there and {"center_p'),
        ({"base_model": "random"}, "frozen weights of base_model is sha256 .* there and sha256 .* here"),
    ],
)
def test_another_configuration_is_not_resumed(train, finished, workspace, tmp_path, changes, message):
    before = contents(finished)
    with pytest.raises(
        UserError, match=f"checkpoint-8 cannot be resumed from: .*{message}.*; accepted: the same"
    ) as e:
        train(finished, "--config", configured(workspace, tmp_path, **changes), "--resume_from_checkpoint", "latest")
    assert "\n" not in str(e.value) and contents(finished) == before


def test_another_dataset_is_not_resumed(train, finished, tmp_path):
    rows = list(tiny_rows({"train": 4, "validation": 2}))
    last = next(row for row in reversed(rows) if split_of(row["patient_id"]) == "validation")
    last["z_mm"] = 1.0  # pixels and numbers of rows stay
    write_dataset(rows, tmp_path / "other", "Made for a test.")
    before = contents(finished)
    message = "validation split of the dataset is 6 rows, sha256 .* there and 6 rows, sha256 .* here"
    with pytest.raises(UserError, match=message):
        train(finished, "--dataset", tmp_path / "other", "--resume_from_checkpoint", "latest")
    assert contents(finished) == before


def test_run_resumes_with_a_copy_of_its_inputs_and_other_intervals(train, finished, workspace, tmp_path):
    """The places of dataset and base model may change, and how often a run writes."""
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("base", "lidc"):
        shutil.copytree(workspace / name, tmp_path / name)
    changes = {"base_model": str(tmp_path / "base"), "log_every": 2, "checkpoint_every": 3}
    config = configured(workspace, tmp_path, **changes)
    train(run, "--config", config, "--dataset", tmp_path / "lidc", "--resume_from_checkpoint", "latest")
    assert yaml.safe_load((run / "training_config.yaml").read_text())["log_every"] == 2


def test_max_steps_of_zero_and_checkpoints_of_another_run_are_refused(train, finished, tmp_path):
    before = contents(finished)
    with pytest.raises(UserError, match="--resume_from_checkpoint with max_steps 0, which trains nothing"):
        train(finished, "--resume_from_checkpoint", "latest", "--max_steps", 0)
    with pytest.raises(UserError, match="checkpoint-8 is a checkpoint of another run; accepted: one of those in"):
        train(tmp_path / "other", "--resume_from_checkpoint", finished / "checkpoint-8")
    assert contents(finished) == before and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_two_uninterrupted_ones(workspace, tmp_path):
    whole = train_apart(workspace, tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("the best model") == 1
    killed = train_apart(workspace, tmp_path / "killed", "--stop_after", 6, processes=2)
    assert killed.returncode != 0
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = train_apart(workspace, tmp_path / "killed", "--resume_from_checkpoint", "latest", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("path", ["base", ROOT / "model_cards" / "psam-lidc"], ids=["tiny", "shipped"])
def test_an_absent_reader_does_not_change_the_loss(workspace, path):
    model = ProbabilisticSamModel.from_pretrained(workspace / path).train()
    model.config.energy_weight, side = 5.0, model.config.prompt_encoder_config.image_embedding_size
    channels = model.config.vision_config.output_channels + 16
    generator = torch.Generator().manual_seed(0)

    def item(readers):
        labels = torch.zeros(readers, 4 * side, 4 * side, dtype=torch.bool)
        labels[:-1, side : 2 * side, side : 3 * side] = True  # the last reader annotated nothing
        return {
            "input_boxes": torch.tensor([0.2, 0.2, 0.8, 0.5]) * 16 * side, "labels": labels,
            "annotated": labels.flatten(1).any(dim=1),
            "image_embeddings": torch.randn(channels, side, side, generator=generator),
        }  # fmt: skip

    def run(batch):
        torch.manual_seed(1)
        output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        return output, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    two, four, other = item(2), item(4), item(4)
    output, _ = run(collate([two, four]))
    assert output.kl_divergence[0, 0, 2:].eq(0).all() and output.kl_divergence[1].ne(0)[..., 0].all()
    mean = output.kl_divergence[..., 0].sum().item() / 6  # of two and four readers
    values = latent_values(
        output.kl_divergence, *(collate([two, four])[k] for k in ("annotated", "reader_mask")), True
    )
    assert values["presence_nll"].item() == pytest.approx(mean)
    changed = collate([two, four])
    changed["labels"][0, 0, 2:] = changed["annotated"][0, 0, 2:] = True  # of the two absent readers
    assert torch.equal(run(changed)[0].loss, output.loss)

    # With the same number of readers in all rows, the loss and its gradients are those without a mask
    batch = collate([four, other])
    masked, gradients = run(batch)
    plain, expected = run({name: value for name, value in batch.items() if name != "reader_mask"})
    assert torch.equal(masked.loss, plain.loss) and len(gradients) == len(expected) > 20
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_log_averages_the_outline_over_annotated_masks_and_the_presence_over_present_readers():
    kl = torch.tensor([[9.0, 1, 2], [9, 3, 4], [0, 50, 50], [0, 0, 0]])[None, None]  # (B, P, R, L)
    annotated = torch.tensor([[[True, True, False, False]]])
    present = torch.tensor([[[True, True, True, False]]])
    values = latent_values(kl, annotated, present, True)
    assert values["outline_kl"].item() == 5  # (1 + 2 + 3 + 4) / 2
    assert values["presence_nll"].item() == 6
    assert latent_values(kl, annotated, present, False)["kl"].item() == pytest.approx(128 / 3)


def test_rows_with_different_numbers_of_readers_are_trained_and_validated(train, mixed, tmp_path):
    more = ("--dataset", mixed, "--cache_dir", tmp_path / "cache", "max_steps=2", "log_every=1")
    train(tmp_path / "run", *more, "eval_every=2", "eval_slices=6")
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 2] and all(np.isfinite(line["loss"]) for line in log[:2])

    # Each row is scored with its own readers
    rows = load_split(mixed, "validation")
    model = ProbabilisticSamModel.from_pretrained(tmp_path / "run").eval()
    processor = ProbabilisticSamProcessor.from_pretrained(tmp_path / "run")
    state = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False)
    _, (scores,) = evaluation.evaluate_dataset(model, processor, rows, "union_box", 3, (0,), 4, state)
    for row, of_row in zip(rows, scores, strict=True):
        masks = decode_masks(row)
        assert of_row["all"]["empty_rate_readers"] == pytest.approx(1 - masks.any(axis=(1, 2)).mean())
        assert len(of_row["collapse"]["annotated"]) == len(masks)
        assert len(masks) == 4 or of_row["four_readers"] is None
    assert {len(row["masks"]) for row in rows} == {2, 4}
    validated = json.loads((tmp_path / "run" / "best.json").read_text())
    assert validated["all/ged"] == pytest.approx(np.mean([of_row["all"]["ged"] for of_row in scores]), abs=1e-5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset whose rows have two or four readers."""

    def some_readers(rows):
        for number, row in enumerate(rows):
            if number % 2:  # two readers of four; the first one annotated
                image, masks = row["image"]["bytes"], [mask["bytes"] for mask in row["masks"][:2]]
                row = image_row(
                    image, masks, "image", ["mask 0", "mask 1"],
                    **{name: row[name] for name in ("patient_id", "scan_id", "nodule_id", "slice_index", "source")},
                )  # fmt: skip
            yield row

    path = tmp_path_factory.mktemp("mixed") / "lidc"
    write_dataset(some_readers(tiny_rows({"train": 2, "validation": 2})), path, "Made for a test.")
    return path


def gradients_of(monkeypatch, start):
    """The gradients at each step of a run."""
    steps = []
    with monkeypatch.context() as patch:
        step = Optimization.step

        def record(self, *given):
            steps.append({name: weight.grad.clone() for name, weight in self.trained.items()})
            step(self, *given)

        patch.setattr(Optimization, "step", record)
        start()
    return steps


def test_micro_batches_give_the_gradients_of_the_whole_batch(train, mixed, tmp_path, monkeypatch):
    """With different numbers of readers, each weight is that of the mean over all readers of the step."""
    monkeypatch.setattr(
        "probabilistic_sam.modeling_probabilistic_sam.normal_noise", lambda shape, *_: torch.zeros(shape)
    )
    more = ("--dataset", mixed, "max_steps=2", "log_every=1", "eval_slices=1", "encoder=frozen")
    more += ("model.latent_dropout=0", "model.energy_weight=50", "learning_rate=0", "latent_learning_rate=0")
    one, four = (
        gradients_of(
            monkeypatch, lambda parts=parts: train(tmp_path / str(parts), *more, f"gradient_accumulation={parts}")
        )
        for parts in (1, 4)
    )
    logs = [read_log(tmp_path / name) for name in ("1", "4")]
    assert [line["step"] for line in logs[0]] == [1, 2, 2]
    for whole, parts, lines in zip(one, four, zip(*logs, strict=True), strict=False):
        largest = max(gradient.abs().max() for gradient in whole.values())
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=1e-3, atol=1e-5 * largest), name
        for name in ("grad_norm", "loss"):
            assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-3)


def test_two_processes_give_the_gradients_of_one(train, workspace, mixed, tmp_path):
    """A model without noise, since every process has its own."""
    config = configured(workspace, tmp_path, model={"model_type": "deterministic_sam"}, encoder="frozen")
    more = ("--config", config, "--dataset", mixed, "max_steps=2", "log_every=1", "eval_slices=2")
    ended = train_apart(workspace, tmp_path / "two", *more, processes=2)
    assert ended.returncode == 0, ended.stderr
    train(tmp_path / "one", *more)
    one, two = ([line for line in read_log(tmp_path / run) if "loss" in line] for run in ("one", "two"))
    assert len(one) == 2
    for name in ("grad_norm", "loss"):  # over the rows of all processes
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-3), name


def test_a_run_ends_by_time_and_resumes_with_what_is_left(train, tmp_path, monkeypatch, capsys):
    """A clock that advances by six seconds whenever someone looks at it."""
    ticks = itertools.count(step=6.0)
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(loop, "CLOCK_EVERY", 1)
    more = ("encoder=frozen", "eval_slices=1", "log_every=1", "max_steps=1000", "eval_every=999", "warmup_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(loop.os, "kill", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(tmp_path, *more, "--max_minutes", 2, "--stop_after", 4)
    assert torch.load(tmp_path / "checkpoint-4" / "training_state.pt")["seconds"] >= 4 * 6
    train(tmp_path, *more, "--max_minutes", 2, "--resume_from_checkpoint", "latest")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if "loss" in line]
    assert (
        8 <= lines[-1]["step"] <= 14 and lines[-1]["step"] == json.loads((tmp_path / "best.json").read_text())["step"]
    )
    assert lines[-1]["seconds"] == pytest.approx(120, abs=15)
    rates, shares = [line["lr"] for line in lines], [line["seconds"] / 120 for line in lines]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.2 * max(rates)
    later, earlier = (2e-4 * 0.5 * (1 + np.cos(np.pi * shares[index])) for index in (4, 3))
    assert later < rates[4] < earlier  # by the clock after the step before


def test_a_run_whose_time_is_over_before_its_first_validation_leaves_a_model(train, tmp_path, monkeypatch):
    more = ("encoder=frozen", "eval_slices=1", "eval_every=9", "checkpoint_every=1", "--max_minutes", 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop.os, "kill", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(tmp_path, *more, "--stop_after", 1)
    path = tmp_path / "checkpoint-1" / "training_state.pt"
    torch.save(torch.load(path) | {"seconds": 121.0}, path)
    train(tmp_path, *more, "--resume_from_checkpoint", "latest")
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1 and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("largest", [0.0, 0.5, 1e9])
def test_gradients_are_clipped_unless_the_norm_is_zero(train, tmp_path, monkeypatch, largest):
    more = ("encoder=frozen", "eval_slices=1", "max_steps=1", f"max_grad_norm={largest}")
    (gradients,) = gradients_of(monkeypatch, lambda: train(tmp_path, *more))
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-3) if largest == 0.5 else norm > 1


def test_the_weight_of_the_energy_distance_rises(train, tmp_path, monkeypatch):
    """Also after a validation, which computes with the whole weight."""
    forward, weights = loop.Run.forward, []

    def recorded(self, *given):
        weights.append(self.model.config.energy_weight)
        return forward(self, *given)

    monkeypatch.setattr(loop.Run, "forward", recorded)
    more = ("encoder=frozen", "energy_start_step=1", "energy_ramp_steps=2", "max_steps=5", "eval_every=2")
    train(tmp_path, *more, "eval_slices=1")
    assert weights == [0, 2.5, 5, 5, 5]


def test_the_average_is_validated_and_saved_and_training_goes_on_without_it(train, tmp_path, monkeypatch):
    update, averages, weights, scored = Ema.update, [], [], []

    def copied(values):
        return torch.cat([value.detach().flatten() for value in values])

    def updated(self, step):
        update(self, step)
        averages.append(copied(self.weights.values()))
        weights.append(copied(self.trained.values()))

    def score(self, model):
        scored.append(copied(weight for weight in model.parameters() if weight.requires_grad))
        return {"all/ged": 0.5}

    monkeypatch.setattr(Ema, "update", updated)
    monkeypatch.setattr(loop.Validation, "__call__", score)
    train(tmp_path / "plain", "encoder=frozen", "max_steps=3", "eval_every=9")
    undisturbed = weights[-1]
    for recorded in (averages, weights, scored):
        recorded.clear()
    train(tmp_path / "run", "encoder=frozen", "max_steps=3", "eval_every=2")
    assert torch.equal(scored[0], averages[1]) and not torch.equal(scored[0], weights[1])
    assert torch.equal(weights[-1], undisturbed)
    saved = ProbabilisticSamModel.from_pretrained(tmp_path / "run").state_dict()
    trained = torch.load(tmp_path / "run" / "checkpoint-3" / "training_state.pt")["model"]
    assert torch.equal(copied(saved[name] for name in trained), averages[1])  # step 3 was not better


def test_schedule_average_and_weight_decay_by_hand():
    config = TrainingConfig(base_model="random", warmup_steps=10, max_steps=110)
    assert optimization.rate_factor(35, 0.0, config) == pytest.approx((1 + 0.5**0.5) / 2)  # cosine of an eighth turn
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = Ema({"w": weight}, decay=0.5)
    torch.nn.init.constant_(weight, 8.0)
    ema.update(step=990)  # 990 / 1,000 is more than the decay
    assert ema.weights["w"].item() == 4.0
    config = TrainingConfig(base_model="random", image_size=SIZE, encoder="trained")
    for group in parameter_groups(tiny_model(tiny_vit_parts), config):
        assert {weight.ndim > 1 for weight in group["params"]} == {group["weight_decay"] > 0}  # matrices only


def test_only_checkpoints_are_removed(tmp_path):
    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-20-backup", "checkpoint-notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"]
    checkpoint.save_checkpoint(tmp_path, {"step": 30})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-20-backup", "checkpoint-30", "checkpoint-notes"]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"step": 1, "model": torch.ones(4)})
    before = (tmp_path / "checkpoint-1" / "training_state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of the end of the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="checkpoint-2 cannot be written") as error:
            checkpoint.save_checkpoint(tmp_path, {"step": 2, "model": torch.ones(100_000)})
        with pytest.raises(UserError, match="model cannot be written to") as other:
            save_model(tiny_model(), ProbabilisticSamProcessor(32, 24), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value) and "\n" not in str(other.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "training_state.pt").read_bytes() == before


def test_patients_in_both_splits_are_named(train, tmp_path, capsys):
    rows = list(tiny_rows({"train": 2}))
    made = {"train": rows, "validation": [row for row in rows if row["patient_id"] == rows[0]["patient_id"]]}
    features = datasets.Features({name: FEATURES[name] for name in ("image", "masks", "patient_id")})
    for split, part in made.items():
        made[split] = datasets.Dataset.from_list([{key: row[key] for key in features} for row in part], features)
    datasets.DatasetDict(made).save_to_disk(tmp_path / "data")
    train(tmp_path / "run", "--dataset", tmp_path / "data", "encoder=frozen", "max_steps=1", "eval_slices=1")
    assert f"1 patients are in more than one split, such as {rows[0]['patient_id']!r}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["shared_patients"] == 1


def test_a_loss_that_is_not_finite_is_found_before_anything_is_saved(train, tmp_path, monkeypatch):
    forward = loop.Run.forward
    monkeypatch.setattr(
        loop.Run, "forward", lambda self, *given: forward(self, *given) * (np.nan if self.step == 1 else 1.0)
    )
    with pytest.raises(UserError, match="is not finite in one of the steps 1 to 3; lower"):
        train(tmp_path / "run", "encoder=frozen", "checkpoint_every=3", "log_every=50", "eval_every=50")
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "model.safetensors").exists()


def test_learning_rates_of_the_three_groups(workspace):
    model = ProbabilisticSamModel.from_pretrained(workspace / "base")
    config = TrainingConfig(base_model="random", image_size=SIZE, encoder="trained")
    groups = parameter_groups(model, config)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (5e-5, 2e-4, 1e-3) for decay in (0.0, 0.02)
    }
    rate_of = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert {rate_of[id(weight)] for weight in model.vision_encoder.parameters()} == {5e-5}
    models.freeze(model)
    assert {group["lr"] for group in parameter_groups(model, config)} == {2e-4, 1e-3}


def test_compiled_parts_give_the_same_loss_and_keep_the_names_of_the_weights(monkeypatch):
    # Traced and differentiated, but not translated to C++, which takes a minute and is tested by PyTorch
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    model = tiny_model(tiny_vit_parts)
    names, given = list(model.state_dict()), {**tiny_inputs(), "labels": tiny_labels()}

    def loss():
        return model(**given, generator=torch.Generator().manual_seed(0)).loss.item()

    expected = loss()
    models.compile_parts(model)
    assert loss() == pytest.approx(expected, rel=1e-4) and list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("flags", "native"), [("fpu sse4_2 avx512f", False), ("fpu avx512_bf16", True), ("asimd bf16", True)]
)
def test_cpus_that_compute_in_bfloat16(tmp_path, flags, native):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert loop.computes_bf16(tmp_path / "cpuinfo") == native
    assert loop.computes_bf16(tmp_path / "missing")


@pytest.mark.parametrize("trained", [False, True])
def test_validation_is_the_evaluation_in_float32(workspace, trained, request):
    """Embeddings are kept while the encoder is frozen; autocast, also in `forward`, has no effect."""
    rows, model = load_split(workspace / "lidc", "validation"), tiny_model(tiny_vit_parts)
    processor, config = (
        ProbabilisticSamProcessor(SIZE, 24),
        TrainingConfig(base_model="random", eval_slices=5, eval_samples=3),
    )
    model.vision_encoder.requires_grad_(trained)
    validation = Validation(rows, processor, config, Accelerator())
    state = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False)
    chosen = rows.select(validation.indices)
    patients, (scores,) = evaluation.evaluate_dataset(model, processor, chosen, "union_box", 3, (0,), 16, state)
    expected = summarize(scores, patients)

    forward, encoded = model.forward, []
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(forward)
    wrapped = model.forward
    model.vision_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    precisions = []
    model.mask_decoder.register_forward_hook(lambda *_: precisions.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")  # as on a GPU
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    model.train()
    noise = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = validation(model), validation(model)
    assert first == second and torch.equal(torch.get_rng_state(), noise) and model.training
    assert model.forward is wrapped and encoded == ([5, 5] if trained else [5])
    assert torch.get_float32_matmul_precision() == "high" and set(precisions) == {"highest"}
    for row in (row for batch in validation.kept for row in batch.rows):
        assert row.bits.nbytes == row.masks.size // 8 and row.masks.dtype == bool
    for column, name in (("all", "ged"), ("shape", "hm_iou"), ("all", "empty_ece")):
        assert first[f"{column}/{name}"] == expected[column][name]["mean"]
    assert first["posterior_iou"] is not None


def test_a_field_of_version_0_1_is_read_as_the_new_one(tmp_path):
    (tmp_path / "old.yaml").write_text("base_model: random\nmodel: {drawing_weight: 7}\n")
    assert read_config(tmp_path / "old.yaml").model == {"presence_weight": 7.0}
    assert read_config(tmp_path / "old.yaml", {"model.drawing_weight": 8}).model == {"presence_weight": 8.0}
    assert read_config(tmp_path / "old.yaml", {"model.presence_weight": 8}).model == {"presence_weight": 8.0}
    (tmp_path / "both.yaml").write_text("base_model: random\nmodel: {drawing_weight: 7, presence_weight: 8}\n")
    with pytest.raises(UserError, match="presence_weight is given twice"):
        read_config(tmp_path / "both.yaml")


def test_overrides_replace_fields_of_the_file(train, workspace, tmp_path):
    values = ["max_steps=1", "model.energy_weight=0", "prompts.union_box=0.125", "augmentation.max_shift=2"]
    values += [f"augmentation.{text}" for text in ("symmetries=flips", "rotation=15", "noise=5e-2", "contrast=0.2")]
    train(tmp_path / "run", *values, "--seed", 3, "learning_rate=2e-5", "mixed_precision=no")
    config = yaml.safe_load((tmp_path / "run" / "training_config.yaml").read_text())
    assert (config["max_steps"], config["seed"], config["learning_rate"]) == (1, 3, 2e-5)
    assert config["model"] == CONFIG["model"] | {"energy_weight": 0.0}
    assert config["prompts"] == CONFIG["prompts"] | {"union_box": 0.125}
    assert config["augmentation"] == {  # the others by default
        "max_shift": 2.0, "max_zoom": 0.15, "max_gamma": 0.25,
        "symmetries": "flips", "rotation": 15.0, "noise": 0.05, "contrast": 0.2,
    }  # fmt: skip
    assert config["mixed_precision"] == "no"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["energy_weight"] == 0


def test_configuration_without_the_new_augmentation_keeps_its_fingerprint():
    old = {"max_shift": 6.0, "max_zoom": 0.15, "max_gamma": 0.25}
    config = TrainingConfig.from_dict({"base_model": "random", "augmentation": old})
    assert config == TrainingConfig(base_model="random")
    model = torch.nn.Linear(1, 1)
    recorded = checkpoint.fingerprint(config, model, {})
    found = {name.removeprefix("augmentation."): recorded[name] for name in recorded if "augmentation" in name}
    assert found == old
    config = TrainingConfig.from_dict({"base_model": "random", "augmentation": {"rotation": 15, "symmetries": "none"}})
    recorded = checkpoint.fingerprint(config, model, {})
    assert recorded["augmentation.rotation"] == 15.0 and recorded["augmentation.symmetries"] == "none"
    assert recorded["augmentation.max_shift"] == 6.0 and "augmentation.noise" not in recorded


def test_override_may_replace_a_whole_group(workspace):
    overrides = parse_overrides(["prompts={center_point: 1}"])
    assert read_config(workspace / "config.yaml", overrides).prompts == {"center_point": 1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size", "'batch_size' is no override; accepted: name=value"),
        ("=3", "'=3' is no override"),
        ("batchsize=3", "config.yaml batchsize=3: unknown field 'batchsize'; accepted: .*batch_size"),
        ("batch_size=0", "config.yaml batch_size=0: batch_size is 0; accepted: 1 or more"),
        ("batch_size=", "'batch_size' expected int, got NoneType"),
        ("batch_size=[", "is not valid YAML"),
        ("model.latent_dims=3", "unknown field 'model.latent_dims'; accepted: .*latent_dim"),
        ("model.latent_dim=1", "latent_dim must be at least 2"),
        (
            "seed.latent_dim=3",
            "unknown field 'seed.latent_dim'; accepted: model.NAME, prompts.NAME, augmentation.NAME",
        ),
        ("prompts.reader_box=1", "unknown field 'prompts.reader_box'; accepted: union_box, center_box, center_point"),
        ("model=3", "'model' expected a dict, got int"),
    ],
)
def test_wrong_overrides(train, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", override)
    with pytest.raises(UserError, match="seed is given twice"):
        train(tmp_path / "run", "seed=1", "seed=2")
    assert not (tmp_path / "run").exists()


def test_configuration_made_in_python_is_checked():
    assert TrainingConfig(base_model="random").model_type == "probabilistic_sam"
    for values, message in (
        ({"batch_size": "16"}, "expected int, got str"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; accepted: 0 or more, less than 1"),
        ({"prompts": {"reader_box": 1.0}}, "unknown field 'prompts.reader_box'"),
        ({"base_model": ""}, "base_model is not given"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            TrainingConfig(**({"base_model": "random"} | values))


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_read(script, path):
    config = read_config(path)
    assert path.stem == "ellipse" or config.max_steps > config.warmup_steps
    assert config.crop_size == 64 and config.image_size % 16 == 0


def test_base_model_without_weights(script):
    config = TrainingConfig(base_model="random", image_size=SIZE)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(models.load_base_model(config, {"latent_dim": 3}))
    assert found[0].config.latent_dim == 3 and found[0].config.vision_config.image_size == SIZE
    weights = [model.mask_decoder.mask_tokens.weight for model in found]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    embeddings = found[0].eval().get_image_embeddings(images)[:, :-16]
    assert embeddings.std() > 0.1 and not torch.allclose(
        embeddings[0], embeddings[1], atol=0.01
    )  # they depend on the image


def test_average_of_weights(script):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = Ema(dict(model.named_parameters()), decay=0.995)
    torch.nn.init.constant_(model.weight, 12.0)
    ema.update(step=1)  # decay 1 / 11: 1 / 11 + 12 * 10 / 11
    ema.swap()
    assert model.weight.item() == pytest.approx(11.0)
    ema.swap()
    assert model.weight.item() == 12.0


# ---------------------------------------------------------------------------------------------------------- errors


def configured(workspace, tmp_path, **changes):
    values = CONFIG | {"base_model": str(workspace / "base")} | changes
    path = tmp_path / "changed.yaml"
    given = {name: value for name, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 3}, "unknown field 'batchsize'; accepted: .*batch_size"),
        ({"batch_size": 0}, "batch_size is 0; accepted: 1 or more"),
        ({"batch_size": "many"}, "'batch_size' expected int, got str .value: 'many'"),
        ({"learning_rate": "fast"}, "'learning_rate' expected float, got str"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; accepted: a finite number"),
        ({"base_model": None}, "base_model is not given; accepted: MobileSAM's file"),
        ({"base_model": "no/such/model"}, "base_model 'no/such/model' does not open .*accepted: MobileSAM's file"),
        ({"base_model": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
        ({"model": {"latent_dims": 3}}, "unknown field 'model.latent_dims'; accepted: .*latent_dim"),
        ({"model": {"latent_dim": 1}}, "latent_dim must be at least 2"),
        ({"model": {"latent_dim": 7}}, "has latent_dim 4, the configuration 7; accepted: 4"),
        ({"image_size": 64}, "has image_size 32, the configuration 64; accepted: 32"),
        ({"prompts": {"reader_box": 1.0}}, "unknown field 'prompts.reader_box'; accepted: union_box"),
        ({"prompts": {"union_box": 0}}, "accepted: names with shares above 0"),
        ({"augmentation": {"max_turn": 1}}, "unknown field 'augmentation.max_turn'; accepted: contrast, max_gamma, "),
        ({"augmentation": {"symmetries": "all"}}, "symmetries is 'all'; accepted: dihedral, flips, none"),
        ({"augmentation": {"rotation": 181}}, "augmentation.rotation is 181.0; accepted: 0 to 180"),
        ({"augmentation": {"noise": "loud"}}, "augmentation.noise is 'loud'; accepted: 0 to 1"),
        ({"augmentation": {"max_shift": -1}}, "augmentation.max_shift is -1.0; accepted: 0 or more"),
        ({"augmentation": 3}, "'augmentation' expected a dict, got int"),
        ({"mixed_precision": "fp8"}, "'mixed_precision' expected one of .'no', 'bf16'., got fp8"),
        ({"batch_size": True}, "'batch_size' expected int, got bool"),
        ({"max_steps": -1}, "max_steps is -1; accepted: 0 or more"),
        ({"model": {"model_type": "bert"}}, "model.model_type is 'bert'; accepted: probabilistic_sam, "),
        ({"model": {"model_type": [1]}}, "model.model_type is .1.; accepted: probabilistic_sam, "),
        ({"model": {"energy_weight": float("nan")}}, "model.energy_weight is nan; accepted: a finite number"),
        ({"encoder": "thawed"}, "'encoder' expected one of .'frozen', 'trained', 'cached'., got thawed"),
        (
            {"encoder": "trained", "model": {"model_type": "dropout_unet"}},
            "encoder is 'trained', but dropout_unet has",
        ),
        ({"compile": True, "model": {"model_type": "dropout_unet"}}, "compile is true; accepted for dropout_unet: f"),
        ({"max_steps": 0, "max_minutes": 3}, "max_minutes is 3 with max_steps 0, which trains nothing"),
        (
            {"gradient_accumulation": 3},
            "batch_size is 4 with 1 processes and gradient_accumulation 3; accepted: a mult",
        ),
        ({"num_workers": -2}, "num_workers is -2; accepted: -1 or more"),
        ({"model": {"model_type": "ellipse"}}, "max_steps is 8; accepted for an ellipse, which is fitted: 0"),
    ],
)
def test_wrong_configuration(train, workspace, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", "--config", configured(workspace, tmp_path, **changes))


def test_numbers_that_yaml_takes_for_text_or_integers_are_read(script, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "base_model: x\nlearning_rate: 2e-4\nmodel: {kl_weight: 1}\nmixed_precision: no\n"
    )
    config = read_config(tmp_path / "config.yaml", {"max_steps": 9})
    assert (config.learning_rate, config.max_steps, config.seed) == (2e-4, 9, 0)
    assert config.mixed_precision == "no"  # which YAML reads as false
    assert isinstance(config.model["kl_weight"], float)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no configuration file"),
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "holds no fields"),
        ("", "holds no fields"),
    ],
)
def test_file_that_is_no_configuration(train, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", "--config", path)
    assert not (tmp_path / "run").exists()


def test_model_of_another_kind_is_refused(train, workspace, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a 'bert' model; accepted: MobileSAM's file"):
        train(tmp_path / "run", "--base_model", tmp_path / "bert")


def test_missing_data(train, workspace, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        train(tmp_path / "run", "--dataset", tmp_path / "nowhere")
    write_dataset(tiny_rows({"train": 1}), tmp_path / "lidc", "Made for a test.")
    with pytest.raises(UserError, match="has no split 'validation'; accepted: train"):
        train(tmp_path / "run", "--dataset", tmp_path / "lidc")
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        train(tmp_path / "file" / "run")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_to_resume_from(train, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="holds no checkpoint-.* folder to resume from"):
        train(run, "--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match="is no checkpoint: accepted are"):
        train(run, "--resume_from_checkpoint", tmp_path)
    (run / "checkpoint-4").mkdir(parents=True)
    state = run / "checkpoint-4" / "training_state.pt"
    whole = (finished / "checkpoint-8" / "training_state.pt").read_bytes()
    (run / "best.json").write_text("{}")
    contents = [b"", b"text", whole[:1000], pickle.dumps(Malicious(), protocol=2)]
    name = "latent_proj.0.weight"
    damages = (
        lambda state: state["model"].pop(name),
        lambda state: state["ema"].pop(name),
        lambda state: state["model"].update({name: torch.zeros(1)}),  # would be broadcast to all elements
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda state: state["optimizer"]["state"][0].update(step=torch.tensor(3.0)),
        lambda state: state.pop("fingerprint"),
        lambda state: state.update(model=[1]),
        lambda state: state.update(step="8"),
    )
    for damage in damages:
        damaged = torch.load(finished / "checkpoint-8" / "training_state.pt")
        damage(damaged)
        torch.save(damaged, tmp_path / "damaged.pt")
        contents.append((tmp_path / "damaged.pt").read_bytes())
    for content in contents:
        state.write_bytes(content)
        with pytest.raises(UserError, match="checkpoint-4 cannot be resumed from") as error:
            train(run, "--resume_from_checkpoint", "latest")
        assert "\n" not in str(error.value)
        assert {path.name for path in run.iterdir()} == {"checkpoint-4", "best.json"}  # nothing is written
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_an_earlier_version_says_why(script, tmp_path):
    torch.save(
        {name: kind() for name, kind in checkpoint.CHECKPOINT.items() if name != "fingerprint"}, tmp_path / "a.pt"
    )
    (tmp_path / "a.pt").rename(tmp_path / "training_state.pt")
    with pytest.raises(UserError, match="lacks 'fingerprint', like those of earlier versions; accepted"):
        checkpoint.read_checkpoint(tmp_path)


def test_earlier_run_is_not_overwritten(train, finished):
    with pytest.raises(UserError, match="holds checkpoints of an earlier run; accepted: a new folder"):
        train(finished)


def test_processes_that_would_train_on_their_own_are_refused(monkeypatch):
    alone = SimpleNamespace(num_processes=1, distributed_type="NO", device=torch.device("cpu"))
    monkeypatch.setattr(loop, "Accelerator", lambda **options: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but accelerate sees 1.* ACCELERATE_USE_CPU=true in fro"):
        loop.start_accelerator(TrainingConfig(base_model="x"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert loop.start_accelerator(TrainingConfig(base_model="x")) is alone


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory):
    """A saved `DatasetDict` of three columns: absent readers are null, and nobody annotated the first row."""
    path, masks = tmp_path_factory.mktemp("hand-made") / "data", np.zeros((SIZE, SIZE), bool)
    empty = {"bytes": encode_png(masks), "path": None}
    splits = {"train": [], "validation": []}
    for number, row in enumerate(tiny_rows({"train": 4, "validation": 2})):
        masks = [None, *row["masks"][1:]] if row["num_nonempty"] > 1 and number % 2 else row["masks"]
        image = {"image": row["image"], "masks": masks, "patient_id": "a" if number < 12 else "b"}
        splits["train" if number < 12 else "validation"].append(image)
    features = datasets.Features({name: FEATURES[name] for name in ("image", "masks", "patient_id")})
    for rows in splits.values():
        rows[0] = rows[0] | {"masks": [empty, None, empty]}
    made = {split: datasets.Dataset.from_list(rows, features=features) for split, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "more", [("encoder=cached",), ("encoder=frozen",), ("--max_steps", 0, "model.model_type=ellipse")]
)
def test_dataset_of_three_columns(train, hand_made, workspace, tmp_path, capsys, more):
    if "model.model_type=ellipse" in more:  # which has none of the other fields
        config = {key: value for key, value in CONFIG.items() if key != "model"}
        (tmp_path / "ellipse.yaml").write_text(yaml.safe_dump(config | {"base_model": "random"}))
        more = ("--config", tmp_path / "ellipse.yaml", *more)
    train(tmp_path / "run", "--dataset", hand_made, "--cache_dir", tmp_path / "cache", "--max_steps", 2, *more)
    printed = capsys.readouterr().out
    for split, count in (("train", 12), ("validation", 6)):
        assert f"split '{split}': 1 of {count} rows left out, which no reader annotated" in printed
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["train"] == {"slices": 11, "patients": 1, "sources": [], "hash_split": split_of("a") == "train"}
    scores = tmp_path / "scores.json"
    command = ["--model", tmp_path / "run", "--dataset", hand_made, "--num_samples", 3, "--num_workers", 0]
    load_script("evaluate").main([str(part) for part in (*command, "--output", scores)])
    assert json.loads(scores.read_text())["num_slices"] == 5
    figure = tmp_path / "samples.png"
    command = ["--model", tmp_path / "run", "--dataset", hand_made, "--num_samples", 3, "--output", figure]
    load_script("plot_samples").main([str(part) for part in command])
    assert figure.is_file()


def test_sharded_weights_are_refused(script, train, tmp_path, monkeypatch):
    # accelerate shards on GPUs only, so the type it reports on a CPU is declared a sharded one
    monkeypatch.setattr(loop, "SHARDED", (loop.DistributedType.NO,))
    with pytest.raises(UserError, match="accelerate is configured for .*accepted: one process"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_and_exit_code_2(workspace, tmp_path):
    ended = train_apart(workspace, tmp_path / "run", "--config", tmp_path / "nowhere.yaml")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no configuration file") and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_of_two_processes_one_prints_the_error(workspace, tmp_path):
    ended = train_like_a_user(workspace, tmp_path / "run", "--config", tmp_path / "nowhere.yaml", processes=2)
    assert ended.returncode != 0
    assert sum(line.startswith("error: ") for line in ended.stderr.splitlines()) == 1
