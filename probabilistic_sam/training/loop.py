"""Training: `train` sets a run up; `Run` repeats step, log, validation and checkpoint."""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from tqdm.auto import tqdm

from .. import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from ..baselines import EllipseModel
from ..data import split_of
from ..data.format import load_split
from ..errors import UserError
from ..files import write_text
from ..hub.push import check_repo_name
from ..hub.staging import push_model
from ..weights import save_model
from .batches import (
    StepSampler,
    TrainingWindows,
    choose_workers,
    make_loader,
    next_batch,
    reader_counts,
    resize_windows,
)
from .checkpoint import find_checkpoint, fingerprint, resume_from, save_checkpoint
from .config import TrainingConfig
from .embedding_cache import EmbeddingCache, NodeProcesses
from .log import Log, RunningMeans, latent_values
from .models import build_model, compile_parts, fit_ellipse, freeze, set_training_mode
from .optimization import Optimization, rate_factor
from .validation import Validation

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags in /proc/cpuinfo of CPUs that compute in bfloat16
CLOCK_EVERY = 10  # steps between two looks at the clock, which all processes share
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
    if config.encoder != "trained":
        freeze(model)
    model.to(accelerator.device)
    processor = ProbabilisticSamProcessor(config.image_size, config.crop_size)
    if config.max_steps:
        sampler = StepSampler(
            reader_counts(rows["train"]), config, accelerator.process_index, accelerator.num_processes
        )
        optimization = Optimization(model, config)
        identity = fingerprint(config, model, rows)
        state = resume_from(checkpoint, identity, optimization) if checkpoint else {}

    # From here on the run folder is written to
    describe_run(directory, config, rows, accelerator.is_main_process)
    validation = Validation(rows["validation"], processor, config, accelerator)
    if config.max_steps:
        nearby, cache = NodeProcesses.of(accelerator), None
        if config.encoder == "cached":
            # Views do not depend on the seed of the training, so that runs with other seeds share one cache
            cache = EmbeddingCache(
                model, processor, rows["train"], config.num_views, 0, cache_dir, config.augmentation, nearby,
                bf16=config.mixed_precision == "bf16",
            )  # fmt: skip
        windows = TrainingWindows(rows["train"], processor, config, cache)
        num_workers, reason = choose_workers(config.num_workers, accelerator.device, nearby.world_size)
        accelerator.print(f"{num_workers} worker processes make windows ({reason})")
        loader = make_loader(windows, sampler, num_workers, accelerator.device)
        best = Run(
            config, accelerator, directory, model, processor, optimization, sampler, loader, validation, identity
        )(state, stop_after)
    else:
        if isinstance(model, EllipseModel):
            fit_ellipse(model, rows["train"])
        best = {"step": 0, **validation(model)}
        if accelerator.is_main_process:
            save_best(model, processor, directory, best)
    if accelerator.is_main_process:
        report_best(directory, best, len(validation.indices), push_to)
    accelerator.end_training()


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Join the other processes, if any."""
    # The loop itself chooses what runs in bfloat16, so that validation stays in float32
    accelerator = Accelerator(mixed_precision="no")
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != started:
        raise UserError(
            f"the launcher started {started} processes, but accelerate sees {accelerator.num_processes}, so that each "
            "would train on its own; accepted: a GPU for each process, or ACCELERATE_USE_CPU=true in front of the "
            "command for processes on the CPU"
        )
    if accelerator.distributed_type in SHARDED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type}, which shards the weights, but averages and "
            "checkpoints need them whole; accepted: one process, or one per device as in training/configs/accelerate"
        )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    elif config.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not computes_bf16():
        accelerator.print("mixed_precision is bf16, which is slow on this CPU; mixed_precision=no is faster")
    return accelerator


def computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU computes in bfloat16; true where that is not known."""
    return not cpuinfo.exists() or bool(NATIVE_BF16 & set(cpuinfo.read_text(encoding="utf-8").split()))


def choose_checkpoint(directory: Path, config: TrainingConfig, resume: str | None) -> Path | None:
    """The checkpoint folder to resume from; None for a new run, which may not overwrite an earlier one."""
    if not resume:
        if any(directory.glob("checkpoint-*")):
            raise UserError(
                f"--output_dir {directory} holds checkpoints of an earlier run; accepted: a new folder, or "
                "--resume_from_checkpoint latest to continue that run"
            )
        if any(directory.glob("*.safetensors")):
            raise UserError(f"--output_dir {directory} holds a model, which would be lost; accepted: a new folder")
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
    counts: dict[str, dict[str, Any]] = {}
    everyone = []
    for split, part in rows.items():
        patients = set(part["patient_id"])
        counts[split] = {
            "slices": len(part),
            "patients": len(patients),
            "sources": sorted(set(part["source"]) - {None}),
            "hash_split": all(split_of(patient) == split for patient in patients),
        }
        everyone.append(patients)
    if shared := set.intersection(*everyone):
        for item in counts.values():
            item["shared_patients"] = len(shared)
        if writes:
            print(
                f"warning: {len(shared)} patients are in more than one split, such as {min(shared)!r} (column "
                "patient_id), so that validation scores are better than those of new patients"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if writes:
            write_text(directory / "training_config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
            write_text(directory / "data.json", json.dumps(counts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from error


def save_best(model: Any, processor: ProbabilisticSamProcessor, directory: Path, best: dict) -> None:
    """Write a model and, as `best.json`, its step and scores."""
    save_model(model, processor, directory, {"best.json": json.dumps(best, indent=2) + "\n"})


def read_best(directory: Path) -> dict[str, Any]:
    """What `save_best` wrote; empty before the first validation.

    Raises:
        UserError: the file is not one of `save_best`.
    """
    path = directory / "best.json"
    if not path.is_file():
        return {}
    try:
        best = json.loads(path.read_text(encoding="utf-8"))
        float(best["all/ged"]), int(best["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of training/train.py ({error!r})") from error
    return best


def report_best(directory: Path, best: dict, num_slices: int, repo_name: str | None) -> None:
    """Print the result, and push when a repository is named."""
    result = f"step {best['step']}, GED {best['all/ged']:.4f} on {num_slices} slices"
    print(f"wrote {directory}: the best model ({result})")
    if repo_name:
        print(f"pushed to {push_model(directory, repo_name)}")


@dataclass
class Run:
    """The steps of a training run.

    Nothing in a step waits for the device: copies do not block, noise is made on the device, and what the log needs
    stays there until a line is written.

    Args:
        config: of the run.
        accelerator: of its processes.
        directory: run folder.
        model: on its device.
        processor: saved with the model.
        optimization: of the model, restored if the run resumes.
        sampler: of the windows of all steps.
        loader: of their batches.
        validation: of the validation split.
        identity: `fingerprint` of the run, for its checkpoints.
    """

    config: TrainingConfig
    accelerator: Accelerator
    directory: Path
    model: Any
    processor: ProbabilisticSamProcessor
    optimization: Optimization
    sampler: StepSampler
    loader: Any
    validation: Validation
    identity: dict[str, Any]

    step: int = field(init=False)  # steps that are done
    checked: int = field(init=False)  # step up to which losses are known to be finite
    best: dict[str, Any] = field(init=False)  # step and scores of the model that is saved
    time_share: float = field(init=False, default=0.0)  # of max_minutes; 0 without a limit

    def __call__(self, state: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
        """Train to the last step.

        Args:
            state: content of the checkpoint that the run resumes from; empty for a new run.
            stop_after: see `train`.

        Returns:
            `step` and scores of the best model, which is in the run folder.
        """
        self.step = self.checked = self.sampler.start = state.get("step", 0)
        # Of the model in the folder, which may be later than the checkpoint: the steps between them are repeated, and
        # where they give other weights than before, as on CUDA, the better model stays
        self.best = (read_best(self.directory) or state["best"]) if state else {}
        self.running = RunningMeans()
        if "log" in state:
            self.running.load_state_dict(state["log"], self.accelerator.device)
        self.energy_weight = getattr(self.model.config, "energy_weight", 0.0)
        self.generator = torch.Generator(self.accelerator.device)
        if self.config.compile:
            compile_parts(self.model)
        self.wrapped, self.optimization.optimizer = self.accelerator.prepare(self.model, self.optimization.optimizer)
        self.progress = tqdm(total=self.config.max_steps, initial=self.step, desc="training", disable=not self.is_main)
        if self.is_main:
            self.log = Log(self.directory, self.step)
            self.describe()

        set_training_mode(self.model)
        batches = iter(self.loader)
        self.started = time.monotonic() - state.get("seconds", 0.0)
        self.read_clock()
        while not self.ended:
            self.train_step(batches)
            if self.step % CLOCK_EVERY == 0:
                self.read_clock()
            if self.due(self.config.log_every, at_end=False):
                self.write_log()
            if self.due(self.config.eval_every):
                self.validate()
            if self.due(self.config.checkpoint_every):
                self.write_checkpoint()
            if stop_after == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.step == self.sampler.start and not state.get("best"):  # the time was over before the first validation
            self.validate()
        self.progress.close()
        return self.best

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.accelerator.is_main_process

    def describe(self) -> None:
        """Print the sizes of the run."""
        weights = sum(parameter.numel() for parameter in self.optimization.trained.values()) / 1e6
        slices, steps = len(self.sampler.num_readers), self.sampler.steps_per_epoch
        print(f"{slices} training slices, {weights:.2f} M trained weights, {steps} steps per epoch")

    def due(self, every: int, at_end: bool = True) -> bool:
        """Whether something that happens `every` so many steps happens now."""
        return self.step % every == 0 or at_end and self.ended

    @property
    def ended(self) -> bool:
        """Whether the run has done all its steps, or its time is over."""
        return self.step >= self.config.max_steps or self.time_share >= 1

    def read_clock(self) -> None:
        """Share of `max_minutes` that has passed, by the clock of the main process for all of them."""
        if self.config.max_minutes:
            share = (time.monotonic() - self.started) / (60 * self.config.max_minutes)
            self.time_share = broadcast(torch.tensor(share, device=self.accelerator.device)).item()

    # ------------------------------------------------------------------------------------------------------- a step

    def train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """One step of the optimizer."""
        self.seed_noise()
        self.ramp_energy_weight()
        weights = self.sampler.weights(self.step)
        for number, weight in enumerate(weights, start=1):
            batch = next_batch(batches)
            waits = number < len(weights)  # for the gradients of the other micro-batches
            with self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                loss = self.forward(batch, weight)
                self.accelerator.backward(loss / len(weights))
        trained = list(self.optimization.trained.values())
        norm = self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm or math.inf)
        self.running.add({"grad_norm": norm})
        self.rate = rate_factor(self.step, self.time_share, self.config)
        self.step += 1
        self.optimization.step(self.step, self.rate)
        self.progress.update()

    def seed_noise(self) -> None:
        """Let noise and dropout follow from the number of the step, so that a checkpoint needs no random state."""
        seed, rank = self.config.seed, self.accelerator.process_index
        torch.manual_seed(hash((seed, self.step, rank)) % 2**63)
        self.generator.manual_seed(hash((seed, self.step, rank, 1)) % 2**63)

    def ramp_energy_weight(self) -> None:
        """Set the weight of the energy distance for the next step."""
        if self.energy_weight:
            ramp = (self.step + 1 - self.config.energy_start_step) / max(self.config.energy_ramp_steps, 1)
            self.model.config.energy_weight = self.energy_weight * min(max(ramp, 0.0), 1.0)

    def forward(self, batch: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
        """The loss of a micro-batch; `weight` is one of `StepSampler.weights`."""
        device = self.accelerator.device
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
            output = self.wrapped(**self.encode(batch), generator=self.generator)
        loss = output.loss * weight
        if weight != 1 and output.energy_distance is not None:  # which is a mean over rows, not over readers
            loss = loss + (1 - weight) * self.model.config.energy_weight * output.energy_distance
        has_presence = isinstance(self.model, ProbabilisticSamModel)
        self.running.add(
            {
                "loss": loss,
                "reconstruction_loss": output.reconstruction_loss,
                **latent_values(output.kl_divergence, batch["annotated"], batch["reader_mask"], has_presence),
                "energy_distance": output.energy_distance,
                "iou_loss": output.iou_loss,
            }
        )
        return loss

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Arguments of the model; windows become its input, and their embeddings unless the encoder is trained."""
        if "windows" not in batch:
            return batch
        inputs = {name: value for name, value in batch.items() if name not in ("windows", "sides")}
        grey = resize_windows(batch["windows"], batch["sides"], self.config.image_size)
        pixel_values = self.processor.normalize(grey)
        if self.config.encoder == "trained":
            return inputs | {"pixel_values": pixel_values}
        return inputs | {"image_embeddings": self.model.get_image_embeddings(pixel_values).float()}

    # ------------------------------------------------------------------------------------------- between two steps

    def read_means(self) -> dict[str, float]:
        """Means over all processes since the last line of the log, which are checked; nothing is written before."""
        self.running.share(self.accelerator)
        means = self.running.read()
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(
                f"the loss or its gradient is not finite in one of the steps {self.checked + 1} to {self.step}; lower "
                "the learning rates or use mixed_precision: no"
            )
        self.checked = self.step
        return means

    def write_log(self) -> None:
        """Write the means since the last line of the log."""
        line = {name: round(value, 5) for name, value in self.read_means().items()}
        self.running = RunningMeans()
        if self.is_main:
            rate, seconds = self.optimization.rates[0] * self.rate, round(time.monotonic() - self.started, 1)
            self.log(self.step, line | {"lr": rate, "seconds": seconds})
            shown = [name for name in ("loss", "outline_kl", "kl") if name in line]
            self.progress.set_postfix({name: f"{line[name]:.3g}" for name in shown})

    def validate(self) -> None:
        """Score the averaged weights, and save the model if it is the best so far."""
        self.read_means()
        self.optimization.ema.swap()
        if self.energy_weight:
            self.model.config.energy_weight = self.energy_weight
        # Batches of other shapes would be compiled again
        with torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext():
            scores = self.validation(self.model)
        set_training_mode(self.model)
        if self.is_main:
            self.log(self.step, {f"validation/{name}": value for name, value in scores.items()})
            known = [f"{name} {scores[name]:.4g}" for name in PRINTED if scores.get(name) is not None]
            self.progress.write(f"step {self.step}: {', '.join(known)}")
            if scores["all/ged"] < self.best.get("all/ged", math.inf):
                self.best = {"step": self.step, **scores}
                save_best(self.model, self.processor, self.directory, self.best)
        self.optimization.ema.swap()

    def write_checkpoint(self) -> None:
        """Save everything that resuming needs."""
        self.read_means()
        if self.is_main:
            done = {"step": self.step, "best": self.best, "fingerprint": self.identity}
            clock = {"log": self.running.state_dict(), "seconds": time.monotonic() - self.started}
            save_checkpoint(self.directory, done | clock | self.optimization.state_dict())
        self.accelerator.wait_for_everyone()
