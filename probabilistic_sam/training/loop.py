"""Training: `train` sets a run up; `Run` repeats step, log, validation and checkpoint."""

import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tqdm.auto import tqdm

from .. import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from ..baselines import EllipseModel
from ..conversion import save_model
from ..data.format import load_split
from ..errors import UserError
from ..files import write_text
from ..hub.push import check_repo_name
from ..hub.staging import push_model
from .batches import Batches
from .checkpoint import find_checkpoint, fingerprint, resume_from, save_checkpoint
from .config import TrainingConfig
from .embedding_cache import EmbeddingCache
from .log import Log, latent_values
from .models import build_model, fit_ellipse, freeze
from .optimization import Optimization
from .validation import Validation

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PRINTED = ("all/ged", "shape/ged", "all/hm_iou", "active_outline_units", "posterior_iou")  # of a validation


def train(
    config: TrainingConfig,
    dataset: str,
    output_dir: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    resume: str | None = None,
    push_to: str | None = None,
    stop_after: int | None = None,
) -> None:
    """Train a model, validate it at intervals, and leave the best one in `output_dir`.

    Args:
        config: model, data and optimisation.
        dataset: build of `training/build_dataset.py`, a folder or its name on the Hub.
        output_dir: run folder: log, checkpoints, and the best model at its top.
        cache_dir: folder of the embedding caches.
        resume: a checkpoint folder of this run, or "latest".
        push_to: repository to which the best model is pushed at the end.
        stop_after: for tests of resuming: the process kills itself after this step.

    Raises:
        UserError: a folder that cannot be written to or holds another run, a checkpoint of another run, data that do
            not open, a loss that is not finite.
    """
    accelerator = start_accelerator(config)
    directory = Path(output_dir)
    checkpoint = choose_checkpoint(directory, config, resume)
    check_push(config, push_to)
    rows = {split: load_split(dataset, split) for split in ("train", "validation")}

    torch.manual_seed(config.seed)
    model: Any = build_model(config)
    freeze(model)
    model.to(accelerator.device)
    processor = ProbabilisticSamProcessor(config.image_size, config.crop_size)
    if config.max_steps:
        optimization = Optimization(model, config)
        identity = fingerprint(config, model, rows)
        state = resume_from(checkpoint, identity, optimization) if checkpoint else {}

    # From here on the run folder is written to
    describe_run(directory, config, rows, accelerator.is_main_process)
    caching = {
        "cache_dir": cache_dir, "rank": accelerator.process_index, "world_size": accelerator.num_processes,
        "barrier": accelerator.wait_for_everyone, "bf16": config.mixed_precision == "bf16",
    }  # fmt: skip
    if config.max_steps:
        # Views do not depend on the seed of the training, so that runs with other seeds share one cache
        cache = EmbeddingCache(
            model, processor, rows["train"], config.num_views, 0, augmentation=config.augmentation, **caching
        )
    validation = Validation(rows["validation"], processor, config, accelerator)

    if config.max_steps:
        mask_size = 4 * cache.embeddings.shape[-1]
        batches = Batches(cache, config, mask_size, accelerator.process_index, accelerator.num_processes)
        run = Run(config, accelerator, directory, model, processor, optimization, batches, validation, identity)
        best = run(state, stop_after)
    else:
        if isinstance(model, EllipseModel):
            fit_ellipse(model, rows["train"])
        best = {"step": 0, **validation(model)}
        if accelerator.is_main_process:
            save_model(model, processor, directory)
    if accelerator.is_main_process:
        report_best(directory, best, len(validation.indices), push_to)
    accelerator.end_training()


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Join the other processes, if any."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type in SHARDED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type}, which shards the weights, but averages and "
            "checkpoints need them whole; accepted: one process, or one per device as in training/configs/accelerate"
        )
    return accelerator


def choose_checkpoint(directory: Path, config: TrainingConfig, resume: str | None) -> Path | None:
    """The checkpoint folder to resume from; None for a new run, which may not overwrite an earlier one."""
    if not resume:
        if any(directory.glob("checkpoint-*")):
            raise UserError(
                f"--output_dir {directory} holds checkpoints of an earlier run; accepted: a new folder, or "
                "--resume_from_checkpoint latest to continue that run"
            )
        return None
    checkpoint = find_checkpoint(resume, directory)
    if not config.max_steps:
        raise UserError(
            "--resume_from_checkpoint with max_steps 0, which trains nothing; accepted: the run's own number"
        )
    return checkpoint


def check_push(config: TrainingConfig, push_to: str | None) -> None:
    """Refuse a push that cannot work, before training."""
    if push_to:
        check_repo_name(push_to)
        if config.model_type != ProbabilisticSamConfig.model_type:
            accepted = ProbabilisticSamConfig.model_type
            raise UserError(f"--push_to_hub with model_type {config.model_type!r}; accepted: {accepted}")


def describe_run(directory: Path, config: TrainingConfig, rows: dict[str, datasets.Dataset], writes: bool) -> None:
    """Make the run folder, and write the configuration and the sizes of the splits, which the model card reads."""
    counts = {
        split: {
            "slices": len(part),
            "patients": len(part.unique("patient_id")),
            "sources": sorted(part.unique("source")),
        }
        for split, part in rows.items()
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if writes:
            write_text(directory / "training_config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
            write_text(directory / "data.json", json.dumps(counts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from error


def report_best(directory: Path, best: dict, num_slices: int, repo_name: str | None) -> None:
    """Write the scores of the best model, print the result, and push when a repository is named."""
    write_text(directory / "best.json", json.dumps(best, indent=2) + "\n")
    result = f"step {best['step']}, GED {best['all/ged']:.4f} on {num_slices} slices"
    print(f"wrote {directory}: the best model ({result})")
    if repo_name:
        print(f"pushed to {push_model(directory, repo_name)}")


@dataclass
class Run:
    """The steps of a training run.

    Args:
        config: of the run.
        accelerator: of its processes.
        directory: run folder.
        model: on its device.
        processor: saved with the model.
        optimization: of the model, restored if the run resumes.
        batches: of the training split.
        validation: of the validation split.
        identity: `fingerprint` of the run, for its checkpoints.
    """

    config: TrainingConfig
    accelerator: Accelerator
    directory: Path
    model: Any
    processor: ProbabilisticSamProcessor
    optimization: Optimization
    batches: Batches
    validation: Validation
    identity: dict[str, Any]

    step: int = field(init=False)  # steps that are done
    best: dict[str, Any] = field(init=False)  # step and scores of the model that is saved
    running: dict[str, list[float]] = field(init=False)  # values of the steps since the last line of the log

    def __call__(self, state: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
        """Train to the last step.

        Args:
            state: content of the checkpoint that the run resumes from; empty for a new run.
            stop_after: see `train`.

        Returns:
            `step` and scores of the best model, which is in the run folder.
        """
        self.step, self.best = state.get("step", 0), state.get("best", {})
        unlogged = state.get("log", {})
        self.running = unlogged.get("running", {})
        self.started = time.time() - unlogged.get("seconds", 0.0)
        self.energy_weight = getattr(self.model.config, "energy_weight", 0.0)
        self.wrapped, self.optimization.optimizer = self.accelerator.prepare(self.model, self.optimization.optimizer)
        self.progress = tqdm(total=self.config.max_steps, initial=self.step, desc="training", disable=not self.is_main)
        if self.is_main:
            self.log = Log(self.directory, self.step)
            weights = sum(parameter.numel() for parameter in self.optimization.trained.values()) / 1e6
            steps = self.batches.steps_per_epoch
            slices = len(self.batches.cache)
            print(f"{slices} training slices, {weights:.2f} M trained weights, {steps} steps per epoch")

        self.model.train()
        while self.step < self.config.max_steps:
            self.train_step()
            if self.due(self.config.log_every, at_end=False):
                self.write_log()
            if self.due(self.config.eval_every):
                self.validate()
            if self.due(self.config.checkpoint_every):
                self.write_checkpoint()
            if stop_after == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
        self.progress.close()
        return self.best

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.accelerator.is_main_process

    def due(self, every: int, at_end: bool = True) -> bool:
        """Whether something that happens `every` so many steps happens now."""
        return self.step % every == 0 or at_end and self.step == self.config.max_steps

    def train_step(self) -> None:
        """One step of the optimizer."""
        batch = {key: value.to(self.accelerator.device) for key, value in self.batches(self.step).items()}
        # Noise and dropout follow from the number of the step, so a checkpoint needs no state of a random generator
        torch.manual_seed(hash((self.config.seed, self.step, self.accelerator.process_index)) % 2**63)
        self.ramp_energy_weight()
        output = self.wrapped(**batch)
        self.accelerator.backward(output.loss)
        trained = list(self.optimization.trained.values())
        norm = self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
        self.step += 1
        self.optimization.step(self.step)
        self.progress.update()

        has_presence = isinstance(self.model, ProbabilisticSamModel)
        values = {
            "loss": output.loss, "reconstruction_loss": output.reconstruction_loss,
            **latent_values(output.kl_divergence, batch["annotated"], batch["reader_mask"], has_presence),
            "energy_distance": output.energy_distance, "grad_norm": norm,
        }  # fmt: skip
        for name, value in values.items():
            if value is not None:
                self.running.setdefault(name, []).append(float(value.detach()))
        # The norm is that of the mean gradient of all processes, so all of them stop together
        if not all(math.isfinite(items[-1]) for items in self.running.values()):
            advice = "lower the learning rates or use mixed_precision: no"
            raise UserError(f"the loss or its gradient is not finite at step {self.step}; {advice}")

    def ramp_energy_weight(self) -> None:
        """Set the weight of the energy distance for the next step."""
        if self.energy_weight:
            ramp = (self.step + 1 - self.config.energy_start_step) / max(self.config.energy_ramp_steps, 1)
            self.model.config.energy_weight = self.energy_weight * min(max(ramp, 0.0), 1.0)

    def write_log(self) -> None:
        """Write the means since the last line of the log."""
        line = {name: round(float(np.mean(items)), 5) for name, items in self.running.items()}
        self.running.clear()
        if self.is_main:
            rate, seconds = self.optimization.scheduler.get_last_lr()[0], round(time.time() - self.started, 1)
            self.log(self.step, line | {"lr": rate, "seconds": seconds})
            shown = [name for name in ("loss", "outline_kl", "kl") if name in line]
            self.progress.set_postfix({name: f"{line[name]:.3g}" for name in shown})

    def validate(self) -> None:
        """Score the averaged weights, and save the model if it is the best so far."""
        self.optimization.ema.swap()
        if self.energy_weight:
            self.model.config.energy_weight = self.energy_weight
        scores = self.validation(self.model)
        if self.is_main:
            self.log(self.step, {f"validation/{name}": value for name, value in scores.items()})
            known = [f"{name} {scores[name]:.4g}" for name in PRINTED if scores.get(name) is not None]
            self.progress.write(f"step {self.step}: {', '.join(known)}")
            if scores["all/ged"] < self.best.get("all/ged", math.inf):
                self.best = {"step": self.step, **scores}
                save_model(self.model, self.processor, self.directory)
        self.optimization.ema.swap()

    def write_checkpoint(self) -> None:
        """Save everything that resuming needs."""
        if self.is_main:
            unlogged = {"running": self.running, "seconds": time.time() - self.started}
            done = {"step": self.step, "best": self.best, "log": unlogged, "fingerprint": self.identity}
            save_checkpoint(self.directory, done | self.optimization.state_dict())
        self.accelerator.wait_for_everyone()
