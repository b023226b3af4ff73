"""The log of a training run."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

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


class RunningMeans:
    """Means of values over the steps since the last line of the log.

    The sums stay on the values' device until they are read, because reading a GPU would stall it at every step.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, torch.Tensor | None]) -> None:
        """Add the values of a step; None has no value there."""
        for name, value in values.items():
            if value is not None:
                value = value.detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
                self.counts[name] = self.counts.get(name, 0) + 1

    def share(self, accelerator: Accelerator) -> None:
        """Replace the sums by their means over all processes, which have the same names."""
        if self.sums:
            shared = accelerator.reduce(torch.stack(list(self.sums.values())), "mean")
            self.sums = dict(zip(self.sums, shared, strict=True))

    def read(self) -> dict[str, float]:
        """The means; one copy from the device."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {name: value / self.counts[name] for name, value in zip(self.sums, sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a checkpoint."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])


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
