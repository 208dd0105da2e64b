"""Learning from a larger model, which has learned the same classes (arXiv:1503.02531).

The teacher sees what the student sees, crop for crop (arXiv:2106.05237).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit import factory
from mobilevit.card import card_of
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Divergence of the student's softened answers from the teacher's, times the square of the temperature.

    The square keeps gradients as large as those of the labels' loss (arXiv:1503.02531, section 2).

    Shape: logits (B, K) of both -> scalar in float32, the mean over the batch.
    """
    told = F.log_softmax(teacher.float() / temperature, dim=1)
    said = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(said, told, reduction="batchmean", log_target=True) * temperature**2


class Teacher(nn.Module):
    """A network that is fed what another one is fed, normalized and sized as its own training was.

    Args:
        network: (B, 3, H, W) -> logits (B, K).
        given: how the images it gets are normalized.
        mean: what its own training subtracted from RGB in 0..1.
        std: what that divided by.
        size: the only (height, width) it takes; None: any.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        given: Preprocessing,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), size
        gain = torch.tensor(given.std) / torch.tensor(std)
        shift = (torch.tensor(given.mean) - torch.tensor(mean)) / torch.tensor(std)
        self.gain, self.shift = nn.Buffer(gain[:, None, None]), nn.Buffer(shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain + self.shift
        if self.size is not None and self.size != tuple(x.shape[-2:]):
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        logits: Tensor = self.network(x)
        return logits


def open_teacher(
    name: str, classes: Sequence[str], given: Preprocessing, *, weights: str | Path | None = None
) -> Teacher:
    """A teacher by name.

    Args:
        name: "timm/NAME", "torchvision/NAME", or a checkpoint that `mobilevit.load` reads.
        classes: the student's, in its order.
        given: how the student's images are normalized.
        weights: of a timm or torchvision network fine-tuned on these classes, a .safetensors or .pth. Without it, the
            published ones, which have to be for as many classes.

    Raises:
        ValueError: no such network, weights cannot be had or read, or other classes.
    """
    library, _, network_name = name.partition("/")
    if library in ("timm", "torchvision") and network_name:
        opened = (_timm if library == "timm" else _torchvision)(network_name, len(classes), weights)
        network, mean, std, size = opened
        teacher = Teacher(network, given=given, mean=mean, std=std, size=size)
    else:
        if weights is not None:
            raise MobileViTError(
                f"`teacher_weights` is for timm/... and torchvision/...; {name} is a file with its own"
            )
        model = factory.load(name)
        card = card_of(model)
        if tuple(card.classes) != tuple(classes):
            raise MobileViTError(
                f"`teacher` {name}: knows {_few(card.classes)}, the data have {_few(classes)}; a teacher has the same "
                "classes in the same order: train it on these data"
            )
        teacher = Teacher(model, given=given, mean=card.preprocessing.mean, std=card.preprocessing.std)
    with torch.no_grad():
        size = teacher.size or given.size
        answer = teacher(torch.zeros(1, 3, *size))
    if not isinstance(answer, Tensor) or tuple(answer.shape) != (1, len(classes)):
        found = tuple(answer.shape)[1:] if isinstance(answer, Tensor) else type(answer).__name__
        raise MobileViTError(
            f"`teacher` {name}: answers with {found}, the data have {len(classes)} classes; fine-tune it on these data "
            "and give the result with `teacher_weights`"
        )
    return teacher


Opened = tuple[nn.Module, Sequence[float], Sequence[float], tuple[int, int] | None]
"""A network, the mean and std of its images, and its only input size, if it has one."""


def _timm(name: str, num_classes: int, weights: str | Path | None) -> Opened:
    try:
        import timm
    except ImportError:
        raise MobileViTError("a teacher from timm needs timm; pip install timm") from None
    if not timm.is_model(name):
        raise MobileViTError(f"`teacher` timm/{name}: timm has no such model; timm.list_models() names all")
    with _cannot_be_had(f"timm/{name}"):
        if weights is None:
            network = timm.create_model(name, pretrained=True)
        else:
            network = timm.create_model(name, num_classes=num_classes)
    if weights is not None:
        _fill(network, weights)
    told: dict[str, Any] = network.pretrained_cfg
    size = tuple(told["input_size"][1:]) if told.get("fixed_input_size") else None
    return network, told.get("mean", _IMAGENET_MEAN), told.get("std", _IMAGENET_STD), size


def _torchvision(name: str, num_classes: int, weights: str | Path | None) -> Opened:
    from torchvision import models

    if name not in models.list_models(models):
        raise MobileViTError(f"`teacher` torchvision/{name}: torchvision has no such classifier")
    with _cannot_be_had(f"torchvision/{name}"):
        if weights is None:
            network = models.get_model(name, weights="DEFAULT")
        else:
            network = models.get_model(name, weights=None, num_classes=num_classes)
    if weights is not None:
        _fill(network, weights)
    size = (224, 224) if name.startswith(("vit_", "maxvit")) else None
    return network, _IMAGENET_MEAN, _IMAGENET_STD, size


@contextlib.contextmanager
def _cannot_be_had(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub's client, of urllib, or of the network's own constructor
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MobileViTError(
            f"`teacher` {name}: its weights cannot be had ({reason}); download them where there is a network, or give "
            "a file with `teacher_weights`"
        ) from error


def _fill(network: nn.Module, path: str | Path) -> None:
    """Load a state dict, without running what a file may bring along."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MobileViTError(f"`teacher_weights` {path}: cannot be read ({type(error).__name__})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MobileViTError(f"`teacher_weights` {path}: not of this network ({reason})") from None


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
