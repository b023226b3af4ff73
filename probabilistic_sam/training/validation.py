"""Scores of the model during training, on a fixed part of the validation split: `evaluation` itself, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from .. import ProbabilisticSamModel, ProbabilisticSamProcessor
from ..evaluation import Batch, Sampling, choose_rows, encode, gather, read_batches, score_batches
from ..metrics import summarize, summarize_collapse
from ..workers import default_workers, start_workers
from .config import TrainingConfig

BATCH_SIZE = 16
# The scores in the log: for each column, then for the column `all` alone
METRICS = ("ged", "cross_distance", "sample_diversity", "reader_diversity", "hm_iou", "ece")
METRICS_OF_ALL = ("empty_ece", "empty_correlation", "dice_max_per_reader")


class Validation:
    """The rows that are scored, the first `eval_slices` in the order of a hash, and how.

    The embeddings of an encoder that is not trained are kept after the first time, with the readers' masks as bits:
    about 0.4 MB per slice of the released model at 128 x 128 pixels, shared among the processes.

    Args:
        rows: of the validation split.
        processor: cuts windows and puts samples back into the image.
        config: its `eval_slices` and `eval_samples`.
        accelerator: of the processes that share the rows.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: ProbabilisticSamProcessor,
        config: TrainingConfig,
        accelerator: Accelerator,
    ):
        self.indices = choose_rows(rows, config.eval_slices, "subset")
        self.rows, self.processor, self.accelerator = rows.select(self.indices), processor, accelerator
        self.sampling = Sampling(num_samples=config.eval_samples)
        self.kept: list[Batch] = []  # encoded

    def __call__(self, model: Any) -> dict[str, Any]:
        """Score a model: metrics by `column/name`, and the state of the latent space of a model that has one."""
        device, was_training = self.accelerator.device, model.training
        model.eval()
        num_workers, _ = default_workers(device, len(self.rows) // self.accelerator.num_processes)
        with full_precision(model, device), start_workers(num_workers) as workers:
            batches = self.encoded_batches(model, workers)
            scored = list(score_batches(model, self.processor, batches, self.sampling, device, workers))
        model.train(was_training)
        patients, (scores,) = gather(scored, self.sampling.seeds)

        summary = summarize(scores, patients)
        values = {
            f"{column}/{name}": summary[column][name]["mean"]
            for column in ("all", "shape", "four_readers")
            for name in METRICS
            if summary[column][name]["mean"] is not None
        }
        values |= {f"all/{name}": summary["all"][name]["mean"] for name in METRICS_OF_ALL}
        latent_spaces = [item["collapse"] for item in scores if "collapse" in item]
        if latent_spaces:
            values |= summarize_collapse(latent_spaces, isinstance(model, ProbabilisticSamModel))
        return values

    def encoded_batches(self, model: Any, workers: Any) -> Iterator[Batch]:
        """The batches of this process with image embeddings, kept for the next time if the encoder does not change."""
        if self.kept:
            yield from self.kept
            return
        encoder = getattr(model, "vision_encoder", None)
        fixed = encoder is None or not any(weight.requires_grad for weight in encoder.parameters())
        for batch in read_batches(
            model, self.processor, self.rows, self.sampling, BATCH_SIZE, self.accelerator, workers
        ):
            batch = encode(model, batch, self.accelerator.device)
            if fixed:
                for row in batch.rows:
                    for _, features in row.windows:
                        features.pop("pixel_values")
                self.kept.append(batch)
            yield batch


@contextmanager
def full_precision(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Without TF32 in matrix products, and without autocast, also that which accelerate puts around a `forward`."""
    wrapped, precision = model.__dict__.pop("forward", None), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if wrapped is not None:
            model.__dict__["forward"] = wrapped
