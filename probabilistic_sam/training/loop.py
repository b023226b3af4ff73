"""The training loop."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from scipy.special import expit
from transformers import AutoConfig, PreTrainedModel

from .. import ProbabilisticSamConfig, ProbabilisticSamModel
from ..baselines import EllipseModel
from ..baselines.common import SamVariant
from ..conversion import convert_mobile_sam, convert_sam, load_torch_file, mobile_sam_config
from ..data import make_prompt, row_seed
from ..data.format import decode_masks, split_content
from ..errors import UserError
from ..hub.staging import push_model
from ..metrics import slice_collapse, slice_metrics, summarize, summarize_collapse
from .config import MODELS, RANDOM, TrainingConfig, model_type
from .embedding_cache import EmbeddingCache
from .windows import view_annotated, view_masks, view_prompt

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


# Of the configuration, what a resumed run may change: none of it moves its weights or its scores. The weights that
# base_model stands for are compared instead of its name
FREE_WHEN_RESUMED = ("base_model", "log_every", "checkpoint_every")


CHECKPOINT = {  # what training_state.pt holds
    "step": int, "best": dict, "log": dict, "ema": dict, "optimizer": dict, "scheduler": dict, "model": dict,
    "fingerprint": dict,
}  # fmt: skip


def load_model(config: TrainingConfig) -> PreTrainedModel:
    """The model to train."""
    kind = model_type(config)
    values = {name: value for name, value in config.model.items() if name != "model_type"}
    if kind == ProbabilisticSamConfig.model_type:
        return load_base_model(config, values)
    model_class = MODELS[kind]
    try:
        if not issubclass(model_class, SamVariant):
            return model_class(model_class.config_class(image_size=config.image_size, **values))
        shared = {name: value for name, value in values.items() if name in ProbabilisticSamConfig.__annotations__}
        return model_class.from_sam(load_base_model(config, shared), **values)
    except UserError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"model {config.model} is not one that can be built: {error}") from error


def load_base_model(config: TrainingConfig, values: dict) -> ProbabilisticSamModel:
    """A MobileSAM file, a SAM, or a Probabilistic SAM, with `values` in its configuration."""
    base, accepted = config.base_model, "MobileSAM's file (.pt, .safetensors), or directory or Hub name of a SAM"
    try:
        if base == RANDOM:
            return ProbabilisticSamModel(mobile_sam_config(config.image_size, **values))
        if base.endswith((".pt", ".pth", ".safetensors")):
            return convert_mobile_sam(base, config.image_size, **values)
        kind = AutoConfig.from_pretrained(base).model_type
        if kind == "sam":
            return convert_sam(base, config.image_size, **values)
        if kind != "probabilistic_sam":
            raise UserError(f"base_model {base!r} is a {kind!r} model; accepted: {accepted}")
        given = ProbabilisticSamConfig.from_pretrained(base)
        wanted = ProbabilisticSamConfig.from_dict(given.to_dict() | values)  # checks the fields anew
        sizes = {name: (getattr(given, name), getattr(wanted, name)) for name in ("latent_dim", "latent_hidden_size")}
        sizes["image_size"] = (given.vision_config.image_size, config.image_size)
        for name, (old, new) in sizes.items():
            if old != new:
                raise UserError(f"base_model {base!r} has {name} {old}, the configuration {new}; accepted: {old}")
        return ProbabilisticSamModel.from_pretrained(base, config=wanted, dtype=torch.float32)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"base_model {base!r} does not open ({error}); accepted: {accepted}") from error


def freeze(model: PreTrainedModel) -> None:
    """Train what is new, and the part of SAM's mask decoder that is used: the model itself freezes the rest of SAM."""
    if isinstance(model, ProbabilisticSamModel):
        model.vision_encoder.requires_grad_(False)


def fit_ellipse(model: EllipseModel, rows) -> None:
    """Fit to the boxes and readers' masks of the training split, the boxes as they are in the evaluation."""
    slices = ((row, decode_masks(row)) for row in rows.remove_columns("image").with_format(None))
    name = "union_box"
    model.fit(
        (make_prompt(masks, name, np.random.default_rng(row_seed(row, name)))["input_boxes"], masks)
        for row, masks in slices
    )


def parameter_groups(model: PreTrainedModel, config: TrainingConfig) -> list[dict]:
    """Two learning rates; no weight decay on vectors (norms, biases)."""
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("mask_decoder."), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate if pretrained else config.latent_learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (pretrained, decays), parameters in groups.items()
    ]


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


def latent_values(kl: torch.Tensor | None, annotated: torch.Tensor, has_drawing: bool) -> dict[str, torch.Tensor]:
    """What the log says of a KL divergence (B, P, R, L) in nats; its coordinate 0 may be the presence.

    `annotated` (B, P, R) tells whose masks are not empty: the outline's coordinates count for these only.
    """
    if kl is None:
        return {}
    if not has_drawing:
        return {"kl": kl.sum(dim=-1).mean()}
    outline = (kl[..., 1:].sum(dim=-1) * annotated).sum() / annotated.sum().clamp(min=1)
    return {"outline_kl": outline, "drawing_nll": kl[..., 0].mean()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


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


def fingerprint(config: TrainingConfig, model: PreTrainedModel, splits: dict[str, Any]) -> dict[str, Any]:
    """What a run has in common with the checkpoint that it resumes from, by field.

    Args:
        config: of the run.
        model: as `load_model` gives it, frozen already.
        splits: rows by the name of their split.
    """
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if name == "prompts":
            values[name] = json.dumps(value)  # their order matters, since a random number chooses among them
        elif isinstance(value, dict):
            values |= {f"{name}.{key}": item for key, item in value.items()}
        elif name not in FREE_WHEN_RESUMED:
            values[name] = value
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in trained:
            frozen.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    values["frozen weights of base_model"] = f"sha256 {frozen.hexdigest()}"
    for split, rows in splits.items():
        content = split_content(rows)  # as manifest.json has it
        values[f"{split} split of the dataset"] = f"{content['rows']} rows, sha256 {content['sha256']}"
    return values


def save_checkpoint(
    directory: Path, step: int, model, optimizer, scheduler, ema, best: dict, log: dict, same: dict
) -> None:
    """`checkpoint-{step}`: everything that resuming needs, moved into place when it is complete; older ones go."""
    target, staging = directory / f"checkpoint-{step}", directory / f".checkpoint-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    state = {
        "step": step, "best": best, "log": log, "ema": ema.weights, "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(), "fingerprint": same,
        "model": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
    }  # fmt: skip
    torch.save(state, staging / "training_state.pt")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    for old in directory.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(name: str, directory: Path) -> Path:
    """The checkpoint folder that `--resume_from_checkpoint` means."""
    if name == "latest":
        found = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        if not found:
            raise UserError(
                f"{directory} holds no checkpoint-* folder to resume from; leave --resume_from_checkpoint out"
            )
        return max(found, key=lambda path: int(path.name.split("-")[-1]))
    path = Path(name)
    if not (path / "training_state.pt").is_file():
        raise UserError(f'{path} is no checkpoint: accepted are "latest" and a checkpoint-* folder of a run')
    if path.resolve().parent != directory.resolve():
        raise UserError(f"{path} is a checkpoint of another run; accepted: one of those in --output_dir {directory}")
    return path


def read_checkpoint(path: Path, names: Sequence[str] = tuple(CHECKPOINT)) -> dict:
    """Read the file of a checkpoint folder.

    Args:
        path: the folder.
        names: what is needed, of `CHECKPOINT`.

    Raises:
        UserError: the file is damaged or not one that `save_checkpoint` wrote.
    """
    state = load_torch_file(path / "training_state.pt")
    for name in names:
        if not isinstance(state, dict) or not isinstance(state.get(name), CHECKPOINT[name]):
            age = ", as those of earlier versions do" if name == "fingerprint" else ""
            raise UserError(f"{path / 'training_state.pt'} lacks {name!r}{age}; accepted: a file of training/train.py")
    return state


def check_same_run(recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `ValueError` unless the `fingerprint` of a checkpoint is that of the run which is to resume from it."""
    for name in [*wanted, *recorded]:
        values = [str(given[name]) if name in given else "not set" for given in (recorded, wanted)]
        if values[0] != values[1]:
            free = " and ".join(FREE_WHEN_RESUMED[1:])
            raise ValueError(
                f"{name} is {values[0]} there and {values[1]} here; accepted: the same dataset, configuration and "
                f"base model, only {free} may differ"
            )


def restore(state: dict, model, optimizer, scheduler, ema) -> None:
    """Put the content of a checkpoint in place.

    Raises:
        RuntimeError, ValueError, KeyError, TypeError, AttributeError: it is of another model or damaged.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, weights in (("model", trained), ("ema", ema.weights)):
        if {name: value.shape for name, value in state[part].items()} != {n: w.shape for n, w in weights.items()}:
            raise ValueError("its weights are of another model")
        with torch.no_grad():
            for name, value in state[part].items():
                weights[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    for parameter, values in optimizer.state.items():
        if any(value.ndim and value.shape != parameter.shape for value in values.values()):
            raise ValueError("its optimizer is of another model")
    scheduler.load_state_dict(state["scheduler"])
    if scheduler.last_epoch != state["step"]:
        raise ValueError(f"its learning rates are those of step {scheduler.last_epoch}, not {state['step']}")


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
