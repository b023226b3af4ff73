"""Train Probabilistic SAM or a baseline on a LIDC build, with a frozen vision encoder and cached image embeddings.

    accelerate launch training/train.py --config training/configs/psam_lidc.yaml --dataset LIDC --output_dir RUN

Which model is the `model_type` under `model:` in the configuration, Probabilistic SAM when there is none. With
`max_steps: 0` nothing is trained: SAM as it is, or the ellipse, which is fitted in closed form.

Everything random follows from (seed, step), so a run that was killed and resumed gives the weights of one that was
not. A run resumes with the dataset, the configuration and the frozen weights it started with; anything else is refused
before a file of the run is touched. Only `log_every` and `checkpoint_every` may change, and the path of `base_model`.
`max_steps` may not, since the learning rates of all steps follow from it. With another number of processes a run
resumes too, but the random numbers of its further steps are others.
"""

import argparse
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
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.baselines import EllipseModel
from probabilistic_sam.conversion import (
    save_model,
)
from probabilistic_sam.data import row_seed
from probabilistic_sam.data.format import load_split
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.training.config import read_config
from probabilistic_sam.training.embedding_cache import EmbeddingCache
from probabilistic_sam.training.loop import (
    SHARDED,
    Batches,
    Ema,
    Log,
    check_same_run,
    data_counts,
    find_checkpoint,
    fingerprint,
    finish,
    fit_ellipse,
    freeze,
    latent_values,
    load_model,
    parameter_groups,
    read_checkpoint,
    restore,
    save_checkpoint,
    validate,
    write_text,
)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file with the fields of TrainingConfig")
    parser.add_argument("--dataset", required=True, help="build of training/build_dataset.py: folder or Hub name")
    parser.add_argument("--output_dir", required=True, help="run folder: log, checkpoints, the best model at its top")
    parser.add_argument("--base_model", help="in place of the configuration's base_model")
    parser.add_argument("--cache_dir", default="~/.cache/probabilistic_sam", help="folder of the embedding caches")
    parser.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest"')
    parser.add_argument("--max_steps", type=int, help="in place of the configuration's max_steps")
    parser.add_argument("--seed", type=int, help="in place of the configuration's seed")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="push the best model to this repository at the end")
    # For tests of resuming: the process kills itself after this step
    parser.add_argument("--stop_after", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Train."""
    arguments = parse_args()
    config = read_config(arguments)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type in SHARDED:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type}, which shards weights that averages and "
            "checkpoints need whole; accepted: one process, or one a device as in training/configs/accelerate"
        )
    directory = Path(arguments.output_dir)
    checkpoint = (
        find_checkpoint(arguments.resume_from_checkpoint, directory) if arguments.resume_from_checkpoint else None
    )
    if checkpoint is None and any(directory.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir {directory} holds checkpoints of an earlier run; accepted: a new folder, or "
            "--resume_from_checkpoint latest to go on with it"
        )
    if checkpoint and not config.max_steps:
        raise UserError(
            "--resume_from_checkpoint with max_steps 0, which trains nothing; accepted: the run's own number"
        )
    train_rows, validation_rows = (load_split(arguments.dataset, split) for split in ("train", "validation"))
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
        "cache_dir": arguments.cache_dir, "rank": accelerator.process_index, "world_size": accelerator.num_processes,
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
            finish(directory, {"step": 0, **scores}, len(indices), arguments.push_to_hub)
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
        if arguments.stop_after == step:
            os.kill(os.getpid(), signal.SIGKILL)
    progress.close()
    if accelerator.is_main_process:
        finish(directory, best, len(indices), arguments.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
