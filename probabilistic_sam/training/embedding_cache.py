"""Image embeddings of augmented views, computed once and then read from disk. They make training cheap on a laptop.

The vision encoder is frozen during training, so its output for a view of a row never changes. A view is a window
around the union of the readers' masks, see `windows.View`. Its parameters follow from (seed, row, view). Only the
embeddings are stored; masks and prompts are computed for each view when they are needed.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from ..data.format import decode_image, decode_masks
from ..errors import UserError
from ..processing_probabilistic_sam import ProbabilisticSamProcessor
from .windows import View, effective_augmentation, plain_view, random_view, view_pixel_values

CACHE_VERSION = 2


class EmbeddingCache:
    """Embeddings (rows, views, C, g, g) in float16, memory-mapped, and the packed masks of the rows in memory.

    The file is named by a hash of everything that its content depends on: weights of the vision encoder, settings of
    the processor, images, masks and the arguments marked *.

    Args:
        model: has `get_image_embeddings`. Without a `vision_encoder` its embeddings must follow from the image alone.
        processor: cuts the windows.
        dataset: rows of one split.
        num_views: * augmented views per row; 0 stores only the plain view, which the processor cuts.
        seed: * of the views.
        cache_dir: folder of all caches.
        augmentation: * of `random_view`; fields without effect are not in the hash.
        rank, world_size, barrier: the processes that share the work, and how they wait for each other.
        batch_size: images per call of the encoder.
        bf16: * encode in bfloat16.

    Raises:
        UserError: the file cannot be written, or the disk has no room for it.
    """

    def __init__(
        self,
        model: Any,
        processor: ProbabilisticSamProcessor,
        dataset: datasets.Dataset,
        num_views: int,
        seed: int,
        cache_dir: str | os.PathLike,
        augmentation: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        batch_size: int = 16,
        bf16: bool = False,
    ):
        self.processor, self.seed, self.num_views = processor, seed, num_views
        self.augmentation = augmentation or {}
        self.masks: list[tuple[np.ndarray, tuple[int, ...]]] = []
        images = hashlib.sha256()
        for row in dataset.select_columns(["image", "masks"]).with_format(None):
            masks = decode_masks(row)
            self.masks.append((np.packbits(masks), masks.shape))
            image = decode_image(row)
            if image.ndim == 3:  # RGB
                images.update(repr(image.shape).encode())
            images.update(image.tobytes())
            images.update(self.masks[-1][0].tobytes())
        vision = hashlib.sha256()
        encoder = getattr(model, "vision_encoder", None)
        for name, value in sorted(encoder.state_dict().items()) if encoder is not None else ():
            vision.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
        key = {
            "version": CACHE_VERSION,
            "vision_encoder": vision.hexdigest(),
            "data": images.hexdigest(),
            "processor": processor.to_dict(),
            "num_views": num_views,
            "seed": seed,
            "augmentation": None if augmentation is None else effective_augmentation(augmentation),
            "bf16": bf16,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
        self.path = Path(cache_dir).expanduser() / f"embeddings-{name}.npy"
        try:
            self._build_once(model, dataset, rank, world_size, barrier, batch_size, bf16)
        except OSError as error:
            raise UserError(f"embedding cache {self.path} cannot be written: {error.strerror or error}") from error
        self.embeddings = np.load(self.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.masks)

    def embedding(self, index: int, view: int) -> torch.Tensor:
        """The embedding (C, g, g) of a view of a row, in float32."""
        return torch.from_numpy(np.array(self.embeddings[index, view])).float()

    def row_masks(self, index: int) -> np.ndarray:
        """Readers' masks (R, H, W) of a row, at the image's size."""
        packed, shape = self.masks[index]
        return np.unpackbits(packed, count=math.prod(shape)).reshape(shape).astype(bool)

    def view(self, index: int, view: int, masks: np.ndarray | None = None) -> View:
        """The parameters of a view of a row."""
        masks = self.row_masks(index) if masks is None else masks
        if self.num_views == 0:
            return plain_view(masks, self.processor)
        return random_view(masks, self.processor, np.random.default_rng((self.seed, index, view)), **self.augmentation)

    def _build_once(self, model, dataset, rank, world_size, barrier, batch_size, bf16) -> None:
        """Build the file unless it exists; of several runs that need it, one builds it and the others wait."""
        lock = FileLock(self.path.with_suffix(".lock"))
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()  # the other processes of this run wait at the barrier; a killed run releases it
        try:
            barrier()
            if not self.path.exists():
                self._build(model, dataset, rank, world_size, barrier, batch_size, bf16)
        finally:
            if rank == 0:
                self.path.with_suffix(".part").unlink(missing_ok=True)
            lock.release()

    def _build(self, model, dataset, rank, world_size, barrier, batch_size, bf16) -> None:
        """Encode every view; all processes write to one file, which gets its final name when it is complete."""
        part = self.path.with_suffix(".part")
        if rank == 0:
            blank = torch.zeros(1, 3, self.processor.image_size, self.processor.image_size, device=model.device)
            shape = (len(dataset), max(self.num_views, 1), *model.get_image_embeddings(blank).shape[1:])
            needed = math.prod(shape) * np.dtype(np.float16).itemsize
            part.unlink(missing_ok=True)
            free = shutil.disk_usage(part.parent).free
            if needed > free:  # writing to a memory map that the disk cannot hold kills the process
                raise UserError(
                    f"embedding cache {self.path} needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
                )
            np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape).flush()
        barrier()
        target = np.lib.format.open_memmap(part, mode="r+")
        num_rows, num_views = target.shape[:2]
        jobs = [(index, view) for index in range(rank, num_rows, world_size) for view in range(num_views)]
        progress = tqdm(total=len(jobs), desc="encoding views", unit="view", disable=rank != 0)
        was_training = model.training
        model.eval()
        images = dataset.select_columns(["image"])
        cached: tuple[int, np.ndarray] | None = None
        for start in range(0, len(jobs), batch_size):
            batch, pixels = jobs[start : start + batch_size], []
            for index, view in batch:
                if cached is None or cached[0] != index:
                    cached = (index, decode_image(images[index]))
                pixels.append(view_pixel_values(cached[1], self.view(index, view), self.processor))
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                embeddings = model.get_image_embeddings(torch.stack(pixels).to(model.device)).float().cpu().numpy()
            for (index, view), embedding in zip(batch, embeddings, strict=True):
                target[index, view] = embedding
            progress.update(len(batch))
        target.flush()
        progress.close()
        model.train(was_training)
        barrier()
        if rank == 0:
            os.replace(part, self.path)  # not by files.py: every process of the run writes into this one file
            size = self.path.stat().st_size / 2**20
            print(f"wrote {self.path}: {num_rows} rows x {num_views} views, {size:.0f} MiB")
        barrier()
