"""What a training step changes: weights, their average, the optimizer and the learning rates."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from .config import TrainingConfig


class Optimization:
    """AdamW with a cosine schedule, and the running average of the trained weights.

    Args:
        model: on its device; its parameters with `requires_grad` are trained.
        config: learning rates, weight decay, numbers of steps, decay of the average.
    """

    def __init__(self, model: PreTrainedModel, config: TrainingConfig):
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups, fused = parameter_groups(model, config), {"fused": True} if model.device.type == "cuda" else {}
        self.optimizer: Any = torch.optim.AdamW(groups, betas=(0.9, 0.98), **fused)
        self.rates = [group["lr"] for group in groups]
        self.ema = Ema(self.trained, config.ema_decay)

    def step(self, step: int, rate: float) -> None:
        """Apply the gradients of `step` (from 1) with `rate` times the configured learning rates, and clear them."""
        for group, configured in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = configured * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, by part."""
        return {
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "ema": self.ema.weights,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read `state_dict`, checked against the `step` that is stored with it.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError, AttributeError: the state is damaged or of another model.
        """
        for part, weights in (("model", self.trained), ("ema", self.ema.weights)):
            if {name: value.shape for name, value in state[part].items()} != {n: w.shape for n, w in weights.items()}:
                raise ValueError("its weights are of another model")
            with torch.no_grad():
                for name, value in state[part].items():
                    weights[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():
            if any(value.ndim and value.shape != parameter.shape for value in values.values()):
                raise ValueError("its optimizer is of another model")
            if int(values["step"]) != state["step"]:
                raise ValueError(f"its optimizer is that of step {int(values['step'])}, not {state['step']}")


def rate_factor(step: int, time_share: float, config: TrainingConfig) -> float:
    """Factor of the learning rates after `step` steps: a linear warmup in steps, then half a cosine down to 0.

    The cosine follows the share of the steps after the warmup, or the share of `max_minutes` if that is larger. A run
    that ends by time therefore also ends at 0.

    >>> config = TrainingConfig(base_model="random", warmup_steps=10, max_steps=110)
    >>> [round(rate_factor(step, 0.0, config), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> round(rate_factor(20, 0.5, config), 3)
    0.5
    """
    warm = min(1.0, step / max(1, config.warmup_steps))
    share = max(0.0, time_share, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Ema:
    """Exponential moving average of weights, which forgets the initial ones quickly: decay at most step / (step + 10).

    Args:
        trained: parameters by name.
        decay: of the average, per step.
    """

    def __init__(self, trained: dict[str, torch.nn.Parameter], decay: float):
        self.trained, self.decay = trained, decay
        self.weights = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after `step` (from 1)."""
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(list(self.weights.values()), list(self.trained.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call undoes it."""
        for name, parameter in self.trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name] = kept


def parameter_groups(model: PreTrainedModel, config: TrainingConfig) -> list[dict]:
    """Learning rates of the encoder, SAM's mask decoder and the rest; no weight decay for vectors (norms, biases)."""
    rates = {"vision_encoder": config.encoder_learning_rate, "mask_decoder": config.learning_rate}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(name.partition(".")[0], config.latent_learning_rate)
            groups.setdefault((rate, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": items, "lr": rate, "weight_decay": decay} for (rate, decay), items in groups.items()]
