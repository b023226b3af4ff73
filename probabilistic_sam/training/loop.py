"""The training loop."""

import contextlib
import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from scipy.special import expit
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .. import ProbabilisticSamModel, ProbabilisticSamProcessor
from ..baselines import EllipseModel
from ..conversion import save_model
from ..data import make_prompt, row_seed
from ..data.format import load_split
from ..errors import UserError
from ..files import write_text
from ..hub.staging import push_model
from ..metrics import slice_collapse, slice_metrics, summarize, summarize_collapse
from .checkpoint import check_same_run, find_checkpoint, fingerprint, read_checkpoint, restore, save_checkpoint
from .config import TrainingConfig
from .embedding_cache import EmbeddingCache
from .models import fit_ellipse, freeze, load_model, parameter_groups
from .windows import view_annotated, view_masks, view_prompt

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Batches:
    """The batch of any step, from (seed, step, rank) alone: embeddings, a prompt per slice, and readers' masks."""

    def __init__(self, cache: EmbeddingCache, config: TrainingConfig, grid: int, rank: int, world_size: int):
        if config.batch_size % world_size:
            raise UserError(f"batch_size {config.batch_size} does not divide by {world_size} processes")
        self.cache, self.config, self.size = cache, config, 4 * grid
        self.rank, self.share = rank, config.batch_size // world_size
        self.steps_per_epoch = max(1, len(cache) // config.batch_size)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Inputs of the model for this process at `step` (from 0)."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.config.seed, 1, epoch)).permutation(len(self.cache))
        start = offset * self.config.batch_size + self.rank * self.share
        rng = np.random.default_rng((self.config.seed, 2, step, self.rank))
        names, shares = zip(*self.config.prompts.items(), strict=True)
        name = str(rng.choice(names, p=np.asarray(shares) / sum(shares)))
        items = []
        for index in self.order[np.arange(start, start + self.share) % len(self.cache)]:
            index = int(index)
            view_index = (epoch + index) % max(self.cache.num_views, 1)
            masks = self.cache.row_masks(index)
            view = self.cache.view(index, view_index, masks)
            item = view_prompt(masks, view, name, rng, self.config.image_size)
            item["labels"] = view_masks(masks, view, self.size)
            item["annotated"] = view_annotated(masks, view)
            item["image_embeddings"] = torch.from_numpy(np.array(self.cache.embeddings[index, view_index])).float()
            items.append(item)
        by_reader = ("labels", "annotated")
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key not in by_reader}
        most = max(len(item["labels"]) for item in items)
        for key in by_reader:  # (B, 1, R, h, w) and (B, 1, R)
            batch[key] = torch.stack([pad_readers(item[key], most) for item in items])[:, None]
        if "input_boxes" in batch:
            batch["input_boxes"] = batch["input_boxes"][:, None]  # (B, 1, 4)
        else:
            batch["input_points"] = batch["input_points"][:, None, None]  # (B, 1, 1, 2)
        return batch


def pad_readers(values: torch.Tensor, readers: int) -> torch.Tensor:
    """Missing readers get empty masks, which are not annotated; `values` (R, ...) is boolean."""
    return torch.cat([values, values.new_zeros((readers - len(values), *values.shape[1:]))])


class Ema:
    """Exponential moving average of the trained weights (Polyak), with a start that forgets the initial ones."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model's weights after `step` (from 1)."""
        decay = min(self.decay, step / (step + 10))
        for name, parameter in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Exchange the model's weights and the average; a second call undoes it."""
        for name, parameter in model.named_parameters():
            if name in self.weights:
                kept = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name] = kept


@torch.no_grad()
def validate(model, processor, cache, rows, indices, config, accelerator) -> dict:
    """Metrics of the protocol (union_box) over `indices` of the validation rows, and the state of the latent space."""
    model.eval()
    results = []
    for index in indices[accelerator.process_index :: accelerator.num_processes]:
        masks = cache.row_masks(index)
        row = rows[index]
        box = make_prompt(masks, "union_box", np.random.default_rng(row_seed(row, "union_box")))["input_boxes"]
        view = cache.view(index, 0, masks)
        x, y, side = view.window
        scale = config.image_size / side
        boxes = (torch.tensor(box, dtype=torch.float32) - torch.tensor([x, y, x, y])) * scale
        embeddings = torch.from_numpy(np.array(cache.embeddings[index, 0])).float()
        inputs = {"image_embeddings": embeddings[None], "input_boxes": boxes[None, None]}
        inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
        generator = torch.Generator().manual_seed(row_seed(row, "validation") % 2**63)
        samples = model.sample(**inputs, num_samples=config.eval_samples, generator=generator)
        logits = processor.post_process_logits(
            samples.pred_masks.cpu(), torch.tensor([[x, y, side]]), torch.tensor([masks.shape[-2:]])
        )[0].numpy()
        result = {"index": index, "metrics": slice_metrics(logits > 0, expit(logits), masks)}
        if hasattr(model, "posterior"):
            target = view_masks(masks, view, samples.pred_masks.shape[-1])
            annotated = view_annotated(masks, view)
            readers = {"labels": target[None, None], "annotated": annotated[None, None]}
            readers = {name: value.to(accelerator.device) for name, value in readers.items()}
            output = model(**inputs, **readers, generator=generator)
            result["collapse"] = slice_collapse(
                output.kl_divergence[0, 0].cpu().numpy(),
                output.posterior_mean[0, 0].cpu().numpy(),
                output.reconstructed_masks[0, 0].cpu().numpy() > 0,
                target.numpy(),
                annotated.numpy(),
            )
        results.append(result)
    results = sorted(gather_object(results), key=lambda item: item["index"])
    model.train()
    summary = summarize([item["metrics"] for item in results], [rows[item["index"]]["patient_id"] for item in results])
    scores = {
        f"{column}/{name}": summary[column][name]["mean"]
        for column in ("all", "shape", "four_readers")
        for name in ("ged", "cross_distance", "sample_diversity", "reader_diversity", "hm_iou", "ece")
        if summary[column][name]["mean"] is not None
    }
    scores |= {
        f"all/{name}": summary["all"][name]["mean"]
        for name in ("empty_ece", "empty_correlation", "dice_max_per_reader")
    }
    latent_spaces = [item["collapse"] for item in results if "collapse" in item]
    has_presence = isinstance(model, ProbabilisticSamModel)
    return scores | summarize_collapse(latent_spaces, has_presence) if latent_spaces else scores


def latent_values(kl: torch.Tensor | None, annotated: torch.Tensor, has_presence: bool) -> dict[str, torch.Tensor]:
    """What the log says of a KL divergence (B, P, R, L) in nats; its coordinate 0 may be the presence.

    `annotated` (B, P, R) tells whose masks are not empty: the outline's coordinates count for these only.
    """
    if kl is None:
        return {}
    if not has_presence:
        return {"kl": kl.sum(dim=-1).mean()}
    outline = (kl[..., 1:].sum(dim=-1) * annotated).sum() / annotated.sum().clamp(min=1)
    return {"outline_kl": outline, "presence_nll": kl[..., 0].mean()}


class Log:
    """JSON lines in the run folder, and TensorBoard when it is installed."""

    def __init__(self, directory: Path, resumed_step: int):
        self.path = directory / "log.jsonl"
        if self.path.exists():  # lines after the checkpoint will be written again
            kept = []
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the kill may have cut the last line
                    kept += [line] if json.loads(line)["step"] <= resumed_step else []
            write_text(self.path, "".join(line + "\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)
        except ImportError:
            self.writer = None

    def __call__(self, step: int, values: dict) -> None:
        """Write one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.writer is not None and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)


def data_counts(rows) -> dict:
    """What the card of the model says of a split."""
    sources = sorted(rows.unique("source"))
    return {"slices": len(rows), "patients": len(rows.unique("patient_id")), "sources": sources}


def finish(directory: Path, best: dict, num_slices: int, repo_name: str | None) -> None:
    """Write the scores of the best model, say where everything is, and push when a repository is named."""
    write_text(directory / "best.json", json.dumps(best, indent=2) + "\n")
    result = f"step {best['step']}, GED {best['all/ged']:.4f} on {num_slices} slices"
    print(f"wrote {directory}: the best model ({result})")
    if repo_name:
        print(f"pushed to {push_model(directory, repo_name)}")


def train(
    config: TrainingConfig,
    dataset: str,
    output_dir: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    resume: str | None = None,
    push_to: str | None = None,
    stop_after: int | None = None,
) -> None:
    """Train a model, validate it on the way, and leave the best one in `output_dir`.

    Args:
        config: what is trained, and how.
        dataset: a build of `training/build_dataset.py`, a folder or its name on the Hub.
        output_dir: run folder: log, checkpoints, the best model at its top.
        cache_dir: folder of the embedding caches.
        resume: a checkpoint folder of this run, or "latest".
        push_to: repository that the best model is pushed to at the end.
        stop_after: for tests of resuming: the process kills itself after this step.

    Raises:
        UserError: a folder that cannot be written to or holds another run, a checkpoint of another run, data that do
            not open, a loss that is not finite.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type in SHARDED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type}, which shards weights that averages and "
            "checkpoints need whole; accepted: one process, or one a device as in training/configs/accelerate"
        )
    directory = Path(output_dir)
    checkpoint = find_checkpoint(resume, directory) if resume else None
    if checkpoint is None and any(directory.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir {directory} holds checkpoints of an earlier run; accepted: a new folder, or "
            "--resume_from_checkpoint latest to go on with it"
        )
    if checkpoint and not config.max_steps:
        raise UserError(
            "--resume_from_checkpoint with max_steps 0, which trains nothing; accepted: the run's own number"
        )
    train_rows, validation_rows = (load_split(dataset, split) for split in ("train", "validation"))
    torch.manual_seed(config.seed)
    model = load_model(config)
    processor = ProbabilisticSamProcessor(config.image_size, config.crop_size)
    freeze(model)
    model.to(accelerator.device)
    state: dict[str, Any] = {}
    if config.max_steps:
        same = fingerprint(config, model, {"train": train_rows, "validation": validation_rows})
        optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
        scheduler = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.max_steps)
        ema = Ema(model, config.ema_decay)
    if checkpoint:
        try:
            state = read_checkpoint(checkpoint)
            check_same_run(state["fingerprint"], same)
            restore(state, model, optimizer, scheduler, ema)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{checkpoint} cannot be resumed from: {error}") from error

    # From here on the run folder is written to
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            write_text(directory / "training_config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
            counts = {"train": data_counts(train_rows), "validation": data_counts(validation_rows)}
            write_text(directory / "data.json", json.dumps(counts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from error

    shared = {
        "cache_dir": cache_dir, "rank": accelerator.process_index, "world_size": accelerator.num_processes,
        "barrier": accelerator.wait_for_everyone, "bf16": config.mixed_precision == "bf16",
    }  # fmt: skip
    if config.max_steps:
        # The same views whatever the seed of the training, so that several seeds share one encoding.
        cache = EmbeddingCache(
            model, processor, train_rows, config.num_views, 0, augmentation=config.augmentation, **shared
        )
    validation_cache = EmbeddingCache(model, processor, validation_rows, 0, 0, **shared)
    order = sorted(range(len(validation_rows)), key=lambda i: row_seed(validation_rows[i], "subset"))
    indices = sorted(order[: config.eval_slices])

    if not config.max_steps:
        if isinstance(model, EllipseModel):
            fit_ellipse(model, train_rows)
        scores = validate(model, processor, validation_cache, validation_rows, indices, config, accelerator)
        if accelerator.is_main_process:
            save_model(model, processor, directory)
            finish(directory, {"step": 0, **scores}, len(indices), push_to)
        accelerator.end_training()
        return

    batches = Batches(cache, config, cache.embeddings.shape[-1], accelerator.process_index, accelerator.num_processes)
    energy_weight = getattr(model.config, "energy_weight", 0.0)
    step, best, unlogged = state.get("step", 0), state.get("best", {}), state.get("log", {})
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_main_process:
        log = Log(directory, step)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes = f"{len(cache)} training slices, {trained / 1e6:.2f} M trained weights"
        print(f"{sizes}, {batches.steps_per_epoch} steps an epoch")

    model.train()
    running: dict[str, list[float]] = unlogged.get("running", {})  # values of the steps since the last line of the log
    started = time.time() - unlogged.get("seconds", 0.0)
    progress = tqdm(total=config.max_steps, initial=step, desc="training", disable=not accelerator.is_main_process)
    while step < config.max_steps:
        batch = {key: value.to(accelerator.device) for key, value in batches(step).items()}
        # Noise and dropout of a step follow from its number, so nothing random needs to be stored
        torch.manual_seed(hash((config.seed, step, accelerator.process_index)) % 2**63)
        if energy_weight:
            ramp = (step + 1 - config.energy_start_step) / max(config.energy_ramp_steps, 1)
            model.config.energy_weight = energy_weight * min(max(ramp, 0.0), 1.0)
        output = wrapped(**batch)
        accelerator.backward(output.loss)
        norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        ema.update(model, step)
        progress.update()

        values = {
            "loss": output.loss, "reconstruction_loss": output.reconstruction_loss,
            **latent_values(output.kl_divergence, batch["annotated"], isinstance(model, ProbabilisticSamModel)),
            "energy_distance": output.energy_distance, "grad_norm": norm,
        }  # fmt: skip
        for name, value in values.items():
            if value is not None:
                running.setdefault(name, []).append(float(value.detach()))
        # The norm is that of the processes' mean gradient, so all of them stop together
        if not all(math.isfinite(items[-1]) for items in running.values()):
            advice = "lower the learning rates or use mixed_precision: no"
            raise UserError(f"the loss or its gradient is not finite at step {step}; {advice}")
        if step % config.log_every == 0:
            line = {name: round(float(np.mean(items)), 5) for name, items in running.items()}
            running.clear()
            if accelerator.is_main_process:
                log(step, line | {"lr": scheduler.get_last_lr()[0], "seconds": round(time.time() - started, 1)})
                shown = [name for name in ("loss", "outline_kl", "kl") if name in line]
                progress.set_postfix({name: f"{line[name]:.3g}" for name in shown})
        if step % config.eval_every == 0 or step == config.max_steps:
            ema.swap(model)
            if energy_weight:
                model.config.energy_weight = energy_weight
            scores = validate(model, processor, validation_cache, validation_rows, indices, config, accelerator)
            if accelerator.is_main_process:
                log(step, {f"validation/{name}": value for name, value in scores.items()})
                told = ("all/ged", "shape/ged", "all/hm_iou", "active_outline_units", "posterior_iou")
                known = [f"{name} {scores[name]:.4g}" for name in told if scores.get(name) is not None]
                progress.write(f"step {step}: {', '.join(known)}")
                if scores["all/ged"] < best.get("all/ged", math.inf):
                    best = {"step": step, **scores}
                    save_model(model, processor, directory)
            ema.swap(model)
        if step % config.checkpoint_every == 0 or step == config.max_steps:
            if accelerator.is_main_process:
                unlogged = {"running": running, "seconds": time.time() - started}
                save_checkpoint(directory, step, model, optimizer, scheduler, ema, best, unlogged, same)
            accelerator.wait_for_everyone()
        if stop_after == step:
            os.kill(os.getpid(), signal.SIGKILL)
    progress.close()
    if accelerator.is_main_process:
        finish(directory, best, len(indices), push_to)
    accelerator.end_training()
