"""Parameter groups, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from mobilevit.training.config import OptimizerSettings, TrainConfig

# From input to output, the head after them; `layer_decay` lowers the learning rate by one power for each step back.
_STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "layer5", "head_conv")


def is_head(parameter: str) -> bool:
    """Whether a parameter of this name belongs to what a task adds to the backbone."""
    return _stage(parameter) not in _STAGES


def _stage(parameter: str) -> str:
    return parameter.removeprefix("backbone.").partition(".")[0]


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, object]]:
    """Trainable parameters grouped by weight decay and by learning rate relative to the schedule's (`lr_factor`)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = settings.decay_norm_and_bias or parameter.ndim > 1
        head_lr_factor = 1.0 if settings.head_lr_factor is None else settings.head_lr_factor
        stages_to_head = 0 if is_head(name) else len(_STAGES) - _STAGES.index(_stage(name))
        factor = settings.layer_decay**stages_to_head if stages_to_head else head_lr_factor
        groups.setdefault((factor, settings.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with the published betas, fused into one kernel where the device has one."""
    groups = parameter_groups(model, settings)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type in ("cpu", "cuda"))


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up from a tenth of the peak, then half a cosine down to `final_lr_fraction` of it.

    By images rather than updates, as updates take more or fewer images where their size varies.

    Args:
        progress: share of all images of the run, each counted once an epoch, that were seen before the update.
        config: gives peak, warm-up and end.
    """
    peak, warmup, end = config.peak_learning_rate, config.optimizer.warmup_fraction, config.optimizer.final_lr_fraction
    if progress < warmup:
        return peak * (0.1 + 0.9 * progress / warmup)
    progress = (progress - warmup) / max(1 - warmup, 1e-9)
    return peak * (end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2)


class WeightAverage:
    """Exponential moving average of a model's weights and buffers, kept in a second model.

    The published momentum averages over about 2,000 updates; a run of 1,000 would never leave its initial weights. So
    the momentum starts high and falls to the published one: max(momentum, 9 / (10 + updates)).
    """

    def __init__(self, model: nn.Module, average: nn.Module, momentum: float) -> None:
        self.momentum, self.updates = momentum, 0
        self.model = average.eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averaged, self._current = ([pair[side] for pair in averaged] for side in (0, 1))
        self._copies, self._counters = ([pair[side] for pair in copied] for side in (0, 1))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights; counters (integers) are copied."""
        momentum = max(self.momentum, 9 / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, momentum)
        if self._copies:
            torch._foreach_copy_(self._copies, self._counters)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        """For resuming."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The inverse of `state_dict`; tensors are filled in place, so the lists stay as they are."""
        weights, updates = state["model"], state["updates"]
        assert isinstance(weights, dict)
        assert isinstance(updates, int)
        self.model.load_state_dict(weights)
        self.updates = updates
