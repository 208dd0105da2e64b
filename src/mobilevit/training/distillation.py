"""Learning from a larger model, which has learned the same classes (arXiv:1503.02531).

The teacher sees what the student sees, crop for crop (arXiv:2106.05237).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.errors import MissingPackageError, MobileViTError, one_line, some
from mobilevit.factory import load
from mobilevit.files import Json
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.training.config import DistillationSettings
from mobilevit.weights import checkpoint
from mobilevit.weights.convert import unwrap_state_dict

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
    """A network that gets images normalized as `given`, and is fed them normalized and sized as in its own training.

    `mean` and `std` are those of its training, of RGB in 0..1; `size` is the only (height, width) it takes.

    Shape: (B, 3, H, W) -> logits (B, K).
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


def open_teacher(settings: DistillationSettings, classes: Sequence[str], given: Preprocessing) -> Teacher:
    """Open the teacher of the settings, for the classes of a student, whose images are normalized as `given`.

    Raises:
        MobileViTError: no such network, weights cannot be had or read, or other classes.
    """
    name, weights = settings.teacher, settings.teacher_weights
    assert name is not None
    library, _, network_name = name.partition("/")
    if library in ("timm", "torchvision") and network_name:
        network, mean, std, size = _open(library, network_name, len(classes), weights)
        teacher = Teacher(network, given=given, mean=mean, std=std, size=size)
    else:
        if weights is not None:
            raise MobileViTError(
                f"`teacher_weights` is for timm/... and torchvision/...; {name} is a file with its own"
            )
        model = load(name)
        card = model.card
        if tuple(card.classes) != tuple(classes):
            raise MobileViTError(
                f"`teacher` {name}: knows {len(card.classes)} classes ({some(card.classes, 3)}), the data have "
                f"{len(classes)} ({some(classes, 3)}); a teacher has the same classes in the same order: train it on "
                "these data"
            )
        teacher = Teacher(model, given=given, mean=card.preprocessing.mean, std=card.preprocessing.std)
    with torch.no_grad():
        answer = teacher(torch.zeros(1, 3, *(teacher.size or given.size)))
    if not isinstance(answer, Tensor) or answer.shape != (1, len(classes)):
        found = tuple(answer.shape[1:]) if isinstance(answer, Tensor) else type(answer).__name__
        raise MobileViTError(
            f"`teacher` {name}: answers with {found}, the data have {len(classes)} classes; fine-tune it on these data "
            "and give the result with `teacher_weights`"
        )
    return teacher


def _open(
    library: str, name: str, num_classes: int, weights: str | Path | None
) -> tuple[nn.Module, Sequence[float], Sequence[float], tuple[int, int] | None]:
    """Open a network of timm or torchvision, with the mean and std of its images, and its only input size, if any."""
    make: Callable[..., nn.Module]
    published: dict[str, object]
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise MissingPackageError("a teacher from timm needs timm; pip install timm") from None
        is_known, make, published = timm.is_model(name), timm.create_model, {"pretrained": True}
    else:
        from torchvision import models

        is_known, make, published = name in models.list_models(models), models.get_model, {"weights": "DEFAULT"}
    if not is_known:
        raise MobileViTError(f"`teacher` {library}/{name}: {library} has no such classifier; see its `list_models`")
    try:
        network = make(name, **(published if weights is None else {"num_classes": num_classes}))
    except Exception as error:  # of the hub's client, of urllib, or of the network's own constructor
        raise MobileViTError(
            f"`teacher` {library}/{name}: its weights cannot be had ({one_line(error)}); download them where there is "
            "a network, or give a file with `teacher_weights`"
        ) from error
    if weights is not None:
        content, _ = checkpoint.read(weights)
        try:
            network.load_state_dict(unwrap_state_dict(content))
        except (RuntimeError, MobileViTError) as error:
            raise MobileViTError(f"`teacher_weights` {weights}: not of this network ({one_line(error)})") from None
    if library == "torchvision":
        return network, _IMAGENET_MEAN, _IMAGENET_STD, (224, 224) if name.startswith(("vit_", "maxvit")) else None
    told: Json = network.pretrained_cfg  # type: ignore[assignment]
    size = tuple(told["input_size"][1:]) if told.get("fixed_input_size") else None
    return network, told.get("mean", _IMAGENET_MEAN), told.get("std", _IMAGENET_STD), size
