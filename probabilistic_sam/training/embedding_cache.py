"""Image embeddings of augmented views, computed once and then read from disk: `encoder: cached`, for laptops.

The vision encoder is frozen, so its output for a view of a row never changes. A view is a window around
the union of the readers' masks, see `windows.View`. Its parameters follow from (seed, row, view). Only the embeddings
are stored; masks and prompts are computed for each view when they are needed.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock
from tqdm.auto import tqdm

from ..data.format import decode_row, encoded_rows
from ..errors import UserError
from ..processing_probabilistic_sam import ProbabilisticSamProcessor
from ..weights import weights_hash
from .windows import View, effective_augmentation, plain_view, random_view, view_pixel_values

CACHE_VERSION = 2


class EmbeddingCache:
    """Embeddings (rows, views, C, g, g) in float16, memory-mapped.

    The file is named by a hash of everything that its content depends on: weights of the vision encoder, settings of
    the processor, images, masks and the arguments marked *. For that hash every image is decoded once at the start;
    nothing of them is kept.

    Args:
        model: has `get_image_embeddings`. Without a `vision_encoder` its embeddings must follow from the image alone.
        processor: cuts the windows.
        dataset: rows of one split.
        num_views: * augmented views per row; 0 stores only the plain view, which the processor cuts.
        seed: * of the views.
        cache_dir: folder of all caches.
        augmentation: * of `random_view`; fields without effect are not in the hash.
        processes: that share the work.
        batch_size: images per call of the encoder.
        bf16: * encode in bfloat16.

    Raises:
        UserError: a row that does not decode; embeddings that are not finite in float16; the file cannot be written,
            or the disk has no room for it.
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
        processes: "NodeProcesses | None" = None,
        batch_size: int = 16,
        bf16: bool = False,
    ):
        self.processor, self.seed, self.num_views = processor, seed, num_views
        self.augmentation = augmentation or {}
        rows = encoded_rows(dataset, "image", "masks")
        key = {
            "version": CACHE_VERSION,
            "vision_encoder": encoder_hash(model),
            "data": pixels_hash(rows),
            "processor": processor.to_dict(),
            "num_views": num_views,
            "seed": seed,
            "augmentation": None if augmentation is None else effective_augmentation(augmentation),
            "bf16": bf16,
        }
        processes = processes or NodeProcesses()
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
        name += f"-node{processes.node}" if processes.node else ""
        self.path = Path(cache_dir).expanduser() / f"embeddings-{name}.npy"
        try:
            self._build_once(model, rows, processes, batch_size, bf16)
        except OSError as error:
            raise UserError(f"embedding cache {self.path} cannot be written: {error.strerror or error}") from error

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """The memory-mapped file."""
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory map: a worker process opens the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "embeddings"}

    def embedding(self, index: int, view: int) -> torch.Tensor:
        """The embedding (C, g, g) of a view of a row, in float32."""
        return torch.from_numpy(np.array(self.embeddings[index, view])).float()

    def view(self, index: int, view: int, masks: np.ndarray) -> View:
        """The parameters of a view of a row with readers' masks (R, H, W)."""
        if self.num_views == 0:
            return plain_view(masks, self.processor)
        return random_view(masks, self.processor, np.random.default_rng((self.seed, index, view)), **self.augmentation)

    def _build_once(self, model, rows, processes, batch_size, bf16) -> None:
        """Build the file unless it exists; of several runs that need it, one builds it and the others wait.

        The number of barriers is the same whether the file exists or not, because it may exist on some nodes only.
        """
        lock, part, is_main = FileLock(self.path.with_suffix(".lock")), self.path.with_suffix(".part"), False
        if processes.rank == 0:
            is_main = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()  # the other processes of this run wait at the barrier; a killed run releases it
        try:
            processes.barrier()
            missing = not self.path.exists()
            if missing and is_main:
                self._allocate(part, model, len(rows))
            processes.barrier()
            if missing:
                self._encode(part, model, rows, processes, batch_size, bf16)
            processes.barrier()
            if missing and is_main:
                os.replace(part, self.path)  # not by files.py: every process writes into this one file
                size = self.path.stat().st_size / 2**20
                print(f"wrote {self.path}: {len(rows)} rows x {max(self.num_views, 1)} views, {size:.0f} MiB")
            processes.barrier()
        finally:
            if is_main:
                part.unlink(missing_ok=True)
            lock.release()

    def _allocate(self, part: Path, model: Any, num_rows: int) -> None:
        """Make the file in its full size, under the name that it has until it is complete."""
        blank = torch.zeros(1, 3, self.processor.image_size, self.processor.image_size, device=model.device)
        shape = (num_rows, max(self.num_views, 1), *model.get_image_embeddings(blank).shape[1:])
        needed = math.prod(shape) * np.dtype(np.float16).itemsize
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(part.parent).free
        if needed > free:  # writing to a memory map that the disk cannot hold kills the process
            raise UserError(f"embedding cache {self.path} needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
        np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape).flush()

    def _encode(self, part: Path, model: Any, rows: Any, processes: "NodeProcesses", batch_size: int, bf16) -> None:
        """Encode every view; all processes of the node write to one file."""
        target = np.lib.format.open_memmap(part, mode="r+")
        num_rows, num_views = target.shape[:2]
        mine = range(processes.rank, num_rows, processes.world_size)
        jobs = [(index, view) for index in mine for view in range(num_views)]
        progress = tqdm(total=len(jobs), desc="encoding views", unit="view", disable=processes.rank != 0)
        was_training = model.training
        model.eval()
        cached: tuple[int, np.ndarray, np.ndarray] | None = None
        for start in range(0, len(jobs), batch_size):
            batch, pixels = jobs[start : start + batch_size], []
            for index, view in batch:
                if cached is None or cached[0] != index:
                    cached = index, *decode_row(rows[index].to_pylist()[0])
                _, image, masks = cached
                pixels.append(view_pixel_values(image, self.view(index, view, masks), self.processor))
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                embeddings = model.get_image_embeddings(torch.stack(pixels).to(model.device)).half().cpu().numpy()
            for (index, view), embedding in zip(batch, embeddings, strict=True):
                if not np.isfinite(embedding).all():
                    raise UserError(
                        f"embedding cache {self.path}: the vision encoder gives values for row {index} that float16 "
                        "does not hold; accepted: another encoder, mixed_precision: no, or encoder: frozen"
                    )
                target[index, view] = embedding
            progress.update(len(batch))
        target.flush()
        progress.close()
        model.train(was_training)


class NodeProcesses(NamedTuple):
    """The processes that build one cache file: those of one machine.

    Several machines would lose each other's pages in one memory map on a network disk, so each has its own file.

    Args:
        node: number of the machine; from 1 on it is part of the file's name.
        rank: of this process on its machine.
        world_size: processes on this machine.
        barrier: waits for the processes of all machines.
    """

    node: int = 0
    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, accelerator: Accelerator) -> "NodeProcesses":
        """Those of a run; every machine has the same number of processes."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))  # set by torchrun and accelerate
        node, rank = divmod(accelerator.process_index, count)
        return cls(node, rank, count, accelerator.wait_for_everyone)


def pixels_hash(rows: datasets.Dataset) -> str:
    """SHA-256 of all images and masks, decoded one after the other; rows in the format "arrow"."""
    digest = hashlib.sha256()
    for table in rows.iter(1):
        image, masks = decode_row(table.to_pylist()[0])
        if image.ndim == 3:  # RGB
            digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
        digest.update(np.packbits(masks).tobytes())
    return digest.hexdigest()


def encoder_hash(model: Any) -> str:
    """`weights_hash` of a model's vision encoder, if it has one."""
    encoder = getattr(model, "vision_encoder", None)
    return weights_hash({} if encoder is None else encoder.state_dict())
