"""Batches of the training split."""

import numpy as np
import torch

from ..errors import UserError
from .config import TrainingConfig
from .embedding_cache import EmbeddingCache
from .windows import view_prompt, view_readers


class Batches:
    """The batch of any step, which follows from (seed, step, rank) alone.

    Args:
        cache: of the training split.
        config: its `seed`, `batch_size`, `prompts` and `image_size`.
        mask_size: side of the masks that the model predicts, in pixels.
        rank, world_size: of this process.

    Raises:
        UserError: the batch size is not a multiple of the number of processes.
    """

    def __init__(self, cache: EmbeddingCache, config: TrainingConfig, mask_size: int, rank: int, world_size: int):
        if config.batch_size % world_size:
            raise UserError(
                f"batch_size is {config.batch_size} with {world_size} processes; accepted: a multiple of {world_size}"
            )
        self.cache, self.config, self.mask_size = cache, config, mask_size
        self.rank, self.share = rank, config.batch_size // world_size
        self.steps_per_epoch = max(1, len(cache) // config.batch_size)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Inputs of the model for this process at `step` (from 0).

        Returns:
            `image_embeddings` (B, C, g, g), `input_boxes` (B, 1, 4) or `input_points` (B, 1, 1, 2), `labels`
            (B, 1, R, h, w), `annotated` and `reader_mask` (B, 1, R). All rows of a batch have the same kind of prompt.
        """
        epoch, offset = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.config.seed, 1, epoch)).permutation(len(self.cache))
        start = offset * self.config.batch_size + self.rank * self.share
        rows = self.order[np.arange(start, start + self.share) % len(self.cache)].tolist()

        rng = np.random.default_rng((self.config.seed, 2, step, self.rank))
        names, shares = zip(*self.config.prompts.items(), strict=True)
        prompt = str(rng.choice(names, p=np.asarray(shares) / sum(shares)))
        return collate([self.item(row, epoch, prompt, rng) for row in rows])

    def item(self, index: int, epoch: int, prompt: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The window of one row; its augmented view changes from epoch to epoch."""
        number = (epoch + index) % max(self.cache.num_views, 1)
        masks = self.cache.row_masks(index)
        view = self.cache.view(index, number, masks)
        return {
            **view_prompt(masks, view, prompt, rng, self.config.image_size),
            **view_readers(masks, view, self.mask_size),
            "image_embeddings": self.cache.embedding(index, number),
        }


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack windows with one prompt each.

    Rows with fewer readers than the largest row are padded with empty masks; `reader_mask` is false there.
    """
    counts = torch.tensor([len(item["labels"]) for item in items])
    most = int(counts.max())
    batch = {"reader_mask": (torch.arange(most) < counts[:, None])[:, None]}
    for key in items[0]:
        values = [item[key] for item in items]
        if key in ("labels", "annotated"):
            values = [torch.cat([v, v.new_zeros((most - len(v), *v.shape[1:]))]) for v in values]
        batch[key] = torch.stack(values) if key == "image_embeddings" else torch.stack(values)[:, None]
    if "input_points" in batch:
        batch["input_points"] = batch["input_points"][:, None]  # one point per prompt
    return batch
