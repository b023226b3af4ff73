"""Scores of the model during training, on a fixed part of the validation split."""

from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy.special import expit

from .. import ProbabilisticSamModel, ProbabilisticSamProcessor
from ..data import row_prompt, row_seed
from ..data.format import decode_image, decode_masks
from ..evaluation import choose_rows, latent_state
from ..metrics import slice_metrics, summarize, summarize_collapse
from .config import TrainingConfig
from .windows import place_prompt, plain_view, view_pixel_values, view_readers

PROMPT = "union_box"
# The scores in the log: for each column, then for the column `all` alone
METRICS = ("ged", "cross_distance", "sample_diversity", "reader_diversity", "hm_iou", "ece")
METRICS_OF_ALL = ("empty_ece", "empty_correlation", "dice_max_per_reader")


class Validation:
    """The rows that are scored, the first `eval_slices` in the order of a hash, and how.

    Args:
        rows: of the validation split.
        processor: puts samples back into the image.
        config: its `image_size`, `eval_slices` and `eval_samples`.
        accelerator: of the processes that share the rows.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: ProbabilisticSamProcessor,
        config: TrainingConfig,
        accelerator: Accelerator,
    ):
        self.rows = rows
        self.indices = choose_rows(rows, config.eval_slices, "subset")
        self.processor, self.config, self.accelerator = processor, config, accelerator

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, Any]:
        """Score a model: metrics by `column/name`, and the state of the latent space of a model that has one."""
        model.eval()
        mine = self.indices[self.accelerator.process_index :: self.accelerator.num_processes]
        scored = sorted(gather_object([(index, self.score(model, index)) for index in mine]), key=lambda item: item[0])
        model.train()
        patients = [self.rows[index]["patient_id"] for index, _ in scored]
        summary = summarize([scores for _, scores in scored], patients)
        values = {
            f"{column}/{name}": summary[column][name]["mean"]
            for column in ("all", "shape", "four_readers")
            for name in METRICS
            if summary[column][name]["mean"] is not None
        }
        values |= {f"all/{name}": summary["all"][name]["mean"] for name in METRICS_OF_ALL}
        latent_spaces = [scores["collapse"] for _, scores in scored if "collapse" in scores]
        if latent_spaces:
            values |= summarize_collapse(latent_spaces, isinstance(model, ProbabilisticSamModel))
        return values

    def score(self, model: Any, index: int) -> dict[str, Any]:
        """What `slice_metrics` returns for a row, with `collapse`, as in `evaluation.evaluate_rows`."""
        row = self.rows[index]
        masks = decode_masks(row)
        view = plain_view(masks, self.processor)
        pixels = view_pixel_values(decode_image(row), view, self.processor)[None].to(self.accelerator.device)
        box = place_prompt(row_prompt(row, masks, PROMPT), view.window, self.config.image_size)["input_boxes"]
        inputs = {"image_embeddings": model.get_image_embeddings(pixels), "input_boxes": box[None, None]}
        inputs = {name: value.to(self.accelerator.device) for name, value in inputs.items()}
        generator = torch.Generator().manual_seed(row_seed(row, "validation") % 2**63)
        pred_masks = model.sample(**inputs, num_samples=self.config.eval_samples, generator=generator).pred_masks
        window, size = torch.tensor([view.window]), torch.tensor([masks.shape[-2:]])
        logits = self.processor.post_process_logits(pred_masks.cpu(), window, size)[0].numpy()
        scores: dict[str, Any] = slice_metrics(logits > 0, expit(logits), masks)
        if hasattr(model, "posterior"):
            readers = view_readers(masks, view, pred_masks.shape[-1])
            scores["collapse"] = latent_state(model, inputs, readers["labels"], readers["annotated"], generator)
        return scores
