"""Batches of training windows: a dataset of (row, seed), a sampler that can start at any step, and their loader.

Windows have different sides. A worker cuts a window and stretches its grey values at the image's own resolution,
`collate` pads the windows of a batch to one side, and `resize_windows` resizes them together on the model's device.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import NODULE_BOX
from ..data.format import decode_image, decode_masks, encoded_rows
from ..data.volumes import group_nodules
from ..errors import UserError
from ..processing_probabilistic_sam import ProbabilisticSamProcessor
from ..workers import MOST_WORKERS, usable_cores, worker_context
from .config import TrainingConfig
from .embedding_cache import EmbeddingCache
from .windows import View, turn_randomly, view_prompt, view_readers, view_window

KEPT_BYTES = 2**28  # of decoded rows, in each process that cuts windows


class WindowKey(NamedTuple):
    """What a window follows from.

    Args:
        row: index in the split.
        epoch: how often the row has been visited before; chooses among its cached views.
        seed: of everything random: the run's seed, the step and the place in the step's batch.
        prompt: name of the prompt.
    """

    row: int
    epoch: int
    seed: tuple[int, ...]
    prompt: str


class TrainingWindows(Dataset[dict[str, torch.Tensor]]):
    """The windows of a split's rows, which are read from the memory-mapped dataset when they are needed.

    Decoding takes longer than cutting, so rows stay decoded until they fill `KEPT_BYTES`.

    Args:
        rows: of the split.
        processor: cuts the windows.
        config: its `augmentation`, and whether `nodule_box` is among its `prompts`.
        cache: of the rows' embeddings, whose views are then used; without it every view is new.

    Raises:
        UserError: `nodule_box` is among the prompts, but no slices of the split form a nodule.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: ProbabilisticSamProcessor,
        config: TrainingConfig,
        cache: EmbeddingCache | None = None,
    ):
        self.rows = encoded_rows(rows, *([] if cache else ["image"]), "masks")  # decoded when a window needs them
        self.processor, self.augmentation, self.cache = processor, config.augmentation, cache
        self.kept: dict[int, tuple[np.ndarray, int, np.ndarray]] = {}  # row -> bits of masks, width, pixels
        self.room = KEPT_BYTES
        self.nodules: dict[int, tuple[int, ...]] = {}  # all rows of a row's nodule
        if NODULE_BOX in config.prompts:
            nodules, left_out = group_nodules(rows)
            self.nodules = {row: nodule.rows for nodule in nodules for row in nodule.rows}
            if not nodules:
                raise UserError(
                    f"prompts has {NODULE_BOX}, but the training split has no nodule of known geometry ({left_out} "
                    "left out); accepted: rows with scan_id, nodule_id, z_mm, pixel_spacing_mm, crop_row and crop_col"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: WindowKey) -> dict[str, torch.Tensor]:
        """One window.

        Returns:
            `labels` (R, h, w), `annotated` (R,), `input_boxes` (4,) or `input_points` (2,), and `image_embeddings`
            (C, g, g) or `window` (1 or 3, side, side): grey values 0..255, at most `image_size` pixels wide.

        Raises:
            UserError: a row without annotated pixels, or with an image of another size than its masks.
        """
        (masks, pixels), rng = self.decode(key.row), np.random.default_rng(key.seed)
        if not masks.any():
            raise UserError(f"row {key.row} of the training split has no annotated pixel; accepted: at least one")
        seen = masks  # by whoever gives the prompt; the last one covers the other slices of the nodule
        if key.prompt == NODULE_BOX:
            seen = np.concatenate([masks, self.nodule_mask(key.row, masks)[None]])
        if self.cache:
            number = (key.epoch + key.row) % max(self.cache.num_views, 1)
            view = self.cache.view(key.row, number, masks)
            turned = view.turn(seen)
            image = {"image_embeddings": self.cache.embedding(key.row, number)}
        else:
            view, turned = turn_randomly(seen, self.processor, rng, **self.augmentation)
            window = view_window(pixels, view, self.processor)
            image = {"window": self.processor.resize(window) if view.window[2] > self.processor.image_size else window}
        size, place = self.processor.image_size, View(0, False, view.window, 1.0)  # in the turned masks
        prompt = view_prompt(turned, place, "union_box" if key.prompt == NODULE_BOX else key.prompt, rng, size)
        return prompt | view_readers(turned[: len(masks)], place, size // 4) | image

    def decode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Masks (R, H, W) of a row, and pixels of `decode_image`, not to be changed; with a cache an empty array."""
        if index in self.kept:
            bits, width, pixels = self.kept[index]
            return np.unpackbits(bits, axis=-1, count=width).view(bool), pixels
        row = self.rows[index].to_pylist()[0]
        masks = decode_masks(row)
        pixels = np.empty((0, 0)) if self.cache else decode_image(row, masks.shape[1:])
        bits = np.packbits(masks, axis=-1)
        if bits.nbytes + pixels.nbytes <= self.room:
            self.room -= bits.nbytes + pixels.nbytes
            self.kept[index] = bits, masks.shape[-1], pixels
        return masks, pixels

    def nodule_mask(self, row: int, masks: np.ndarray) -> np.ndarray:
        """Union (H, W) of all readers' masks on all slices of a row's nodule; `masks` (R, H, W) are the row's own."""
        unions = [self.decode(other)[0].any(axis=0) for other in self.nodules.get(row, ()) if other != row]
        return np.any([masks.any(axis=0), *unions], axis=0)


class StepSampler(Sampler[list[WindowKey]]):
    """The keys of this process for every micro-batch, which follow from (seed, step, place in the step's batch).

    A step's batch is therefore the same for any number of processes, micro-batches and workers. Every epoch visits
    each row once, in an order that follows from (seed, epoch). All windows of a step have the same kind of prompt.

    Args:
        num_readers: (N,), masks of each row, see `reader_counts`.
        config: its `seed`, `batch_size`, `gradient_accumulation`, `prompts` and `max_steps`.
        rank, world_size: of this process.

    Attributes:
        start: the first step.

    Raises:
        UserError: the batch size is not a multiple of the number of micro-batches of all processes.
    """

    def __init__(self, num_readers: np.ndarray, config: TrainingConfig, rank: int = 0, world_size: int = 1):
        parts = world_size * config.gradient_accumulation
        if config.batch_size % parts:
            raise UserError(
                f"batch_size is {config.batch_size} with {world_size} processes and gradient_accumulation "
                f"{config.gradient_accumulation}; accepted: a multiple of {parts}"
            )
        self.num_readers, self.config = num_readers, config
        share = config.batch_size // parts
        first = rank * config.gradient_accumulation
        self.slots = [range(part * share, (part + 1) * share) for part in range(first, first + parts // world_size)]
        self.steps_per_epoch = max(1, len(num_readers) // config.batch_size)
        self.start = 0
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[WindowKey]]:
        for step in range(self.start, self.config.max_steps):
            keys = self.keys(step)
            for slots in self.slots:
                yield [keys[slot] for slot in slots]

    def keys(self, step: int) -> list[WindowKey]:
        """The keys of the whole batch of a step (from 0)."""
        seed, (epoch, rows) = self.config.seed, self.rows(step)
        names, shares = zip(*self.config.prompts.items(), strict=True)
        prompt = np.random.default_rng((seed, 2, step)).choice(names, p=np.asarray(shares) / sum(shares))
        return [WindowKey(row, epoch, (seed, 3, step, slot), str(prompt)) for slot, row in enumerate(rows)]

    def rows(self, step: int) -> tuple[int, list[int]]:
        """The epoch of a step, and the rows of its batch."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.config.seed, 1, epoch)).permutation(len(self.num_readers))
        places = np.arange(offset * self.config.batch_size, (offset + 1) * self.config.batch_size)
        return epoch, self.order[places % len(self.order)].tolist()

    def weights(self, step: int) -> list[float]:
        """Readers in each micro-batch of this process, relative to the mean of all micro-batches of the step.

        A micro-batch's loss is a mean over its readers; with these weights, the mean of all micro-batches is the
        mean over all readers of the step.
        """
        counts = self.num_readers[self.rows(step)[1]]
        return [float(counts[list(slots)].mean() / counts.mean()) for slots in self.slots]


def reader_counts(rows: datasets.Dataset) -> np.ndarray:
    """Number of readers of each row, without reading any mask; absent readers do not count."""
    counts = []
    for table in rows.select_columns(["masks"]).with_format("arrow").iter(1000):
        for masks in table["masks"].chunks:
            present = pc.list_parent_indices(masks).filter(pc.is_valid(pc.list_flatten(masks)))
            counts.append(np.bincount(present, minlength=len(masks)))
    return np.concatenate(counts)


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch for the model, from windows of `TrainingWindows` with one kind of prompt.

    Rows with fewer readers than the largest row are padded with empty masks; `reader_mask` is false there. Windows
    are padded with zeros to the largest side, and grey ones get three channels in a batch with colours.

    Returns:
        `labels` (B, 1, R, h, w), `annotated` and `reader_mask` (B, 1, R), `input_boxes` (B, 1, 4) or `input_points`
        (B, 1, 1, 2), and `image_embeddings` (B, C, g, g), or `windows` (B, 1 or 3, side, side) and `sides` (B,).
    """
    counts = torch.tensor([len(item["labels"]) for item in items])
    most = int(counts.max())
    batch = {"reader_mask": (torch.arange(most) < counts[:, None])[:, None]}
    for key in items[0]:
        values = [item[key] for item in items]
        if key in ("labels", "annotated"):
            values = [torch.cat([v, v.new_zeros((most - len(v), *v.shape[1:]))]) for v in values]
        if key == "window":
            channels, side = max(len(v) for v in values), max(v.shape[-1] for v in values)
            missing = [side - v.shape[-1] for v in values]
            padded = [F.pad(v, (0, m, 0, m)).expand(channels, -1, -1) for v, m in zip(values, missing, strict=True)]
            batch["windows"], batch["sides"] = torch.stack(padded), torch.tensor([v.shape[-1] for v in values])
        else:
            batch[key] = torch.stack(values) if key == "image_embeddings" else torch.stack(values)[:, None]
    if "input_points" in batch:
        batch["input_points"] = batch["input_points"][:, None]  # one point per prompt
    return batch


def resize_windows(windows: torch.Tensor, sides: torch.Tensor, size: int) -> torch.Tensor:
    """Resize padded windows of different sides together, as `ProbabilisticSamProcessor.resize` does one by one.

    Bilinear interpolation mixes two rows and two columns for each pixel of the result; here they are gathered, so
    that nothing depends on how exactly the device multiplies matrices.

    Args:
        windows: (B, C, N, N), of which the first `side` rows and columns belong to the window.
        sides: (B,), at most `size`.
        size: of the result, in pixels.

    Returns:
        (B, C, size, size).
    """
    place = (torch.arange(size, device=windows.device) + 0.5) * (sides[:, None] / size) - 0.5  # (B, size)
    place = place.clamp(min=0)
    low = place.long()
    high, share = torch.minimum(low + 1, sides[:, None] - 1), (place - low)[:, None]

    def gather(planes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return planes.gather(2, rows[:, None, :, None].expand(-1, planes.shape[1], -1, planes.shape[3]))

    for _ in range(2):  # rows, then columns
        windows = torch.lerp(gather(windows, low), gather(windows, high), share[..., None]).transpose(2, 3)
    return windows


def make_loader(
    windows: TrainingWindows, sampler: StepSampler, num_workers: int, device: torch.device
) -> DataLoader[dict[str, torch.Tensor]]:
    """Micro-batches in order of the steps."""
    on_cuda = device.type == "cuda"
    return DataLoader(
        windows, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, pin_memory=on_cuda,
        multiprocessing_context=worker_context(f"{__package__}.loop") if on_cuda and num_workers else None,
    )  # fmt: skip


def choose_workers(wanted: int, device: torch.device, local_processes: int) -> tuple[int, str]:
    """Number of worker processes for each training process, and the reason.

    Args:
        wanted: `num_workers` of the configuration, -1 for an automatic choice.
        device: of the model.
        local_processes: training processes on this machine.
    """
    if wanted >= 0:
        return wanted, "num_workers of the configuration"
    if device.type == "cpu":
        return 0, "the model trains on the CPU, where workers would compete with it for the cores"
    cores = usable_cores(local_processes)
    reason = f"{cores} cores per process, which keeps one of them; at most {MOST_WORKERS}"
    return max(1, min(MOST_WORKERS, cores - 1)), reason


def next_batch(batches: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The next batch of a loader; an error of a row is one line, without the worker's traceback."""
    try:
        return next(batches)
    except UserError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")) from error
