"""What a training step changes: weights, their average, the optimizer and the learning rates."""

from typing import Any

import torch
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .config import TrainingConfig


class Optimization:
    """AdamW with a cosine schedule, and the running average of the trained weights.

    Args:
        model: its parameters with `requires_grad` are trained.
        config: learning rates, weight decay, numbers of steps, decay of the average.
    """

    def __init__(self, model: PreTrainedModel, config: TrainingConfig):
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer: Any = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, config.warmup_steps, config.max_steps)
        self.ema = Ema(self.trained, config.ema_decay)

    def step(self, step: int) -> None:
        """Apply the gradients of `step` (from 1) and clear them."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.update(step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, by part."""
        return {
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "ema": self.ema.weights,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
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
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scheduler.last_epoch != state["step"]:
            raise ValueError(f"its learning rates are those of step {self.scheduler.last_epoch}, not {state['step']}")


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
        for name, parameter in self.trained.items():
            self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call undoes it."""
        for name, parameter in self.trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name] = kept


def parameter_groups(model: PreTrainedModel, config: TrainingConfig) -> list[dict]:
    """Two learning rates, SAM's mask decoder and the rest; no weight decay for vectors (norms, biases)."""
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
