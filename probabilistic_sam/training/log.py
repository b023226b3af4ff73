"""The log of a training run."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..loss_probabilistic_sam import masked_mean


class Log:
    """JSON lines in the run folder, and TensorBoard where it is installed.

    Args:
        directory: of the run.
        resumed_step: lines of later steps are removed, since these steps run again.
    """

    def __init__(self, directory: Path, resumed_step: int):
        self.path = directory / "log.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut the last line
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


def latent_values(
    kl: torch.Tensor | None, annotated: torch.Tensor, reader_mask: torch.Tensor, has_presence: bool
) -> dict[str, torch.Tensor]:
    """Columns of the log for a KL divergence, averaged over the readers who are present.

    Args:
        kl: (B, P, R, L) in nats by latent coordinate, or None for a model without a latent space.
        annotated: (B, P, R) bool, whose masks are not empty. The coordinates of the outline count for these only.
        reader_mask: (B, P, R) bool, readers who are present.
        has_presence: coordinate 0 is the presence.

    Returns:
        `outline_kl` and `presence_nll`, or `kl` for a latent without presence.
    """
    if kl is None:
        return {}
    if not has_presence:
        return {"kl": masked_mean(kl.sum(dim=-1), reader_mask)}
    outline = masked_mean(kl[..., 1:].sum(dim=-1), annotated & reader_mask)
    return {"outline_kl": outline, "presence_nll": masked_mean(kl[..., 0], reader_mask)}
