"""One self-describing file a model: safetensors, with the card in its header."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from mobilevit import __version__
from mobilevit.card import ModelCard, Task, card_of
from mobilevit.errors import MobileViTError
from mobilevit.files import write_bytes
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import HEAD_CONFIGS, HeadConfig, Model, build_model
from mobilevit.models.mobilevit import MobileViT, MobileViTConfig

FORMAT_VERSION = 1


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
    score_threshold: float | None = None,
) -> Path:
    """Write a checkpoint that needs nothing remembered; what is not given comes from the model's card.

    Args:
        model: made by `create_model` or `load`, not by `fuse`.
        path: ends in `.safetensors`; appears whole or not at all.
        classes: labels by output index; a detector's without the background.
        preprocessing: how images become input.
        metrics: measured values to keep with the weights.
        provenance: where the weights come from; added to what the card says.
        score_threshold: detection only: the score from which on a detection is shown.

    Raises:
        ValueError: wrong number of classes, a fused model, or another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise MobileViTError(
            f"{path}: checkpoints are safetensors files; name it {path.with_suffix('.safetensors').name}"
        )
    if getattr(model, "fused", False):
        raise MobileViTError("a fused model cannot be saved; save the original and call mobilevit.fuse after loading")
    if not isinstance(model, Model):
        raise MobileViTError(f"cannot save a {type(model).__name__}; only models of this package describe themselves")
    card = card_of(model)
    card = dataclasses.replace(
        card,
        classes=tuple(classes) if classes is not None else card.classes,
        preprocessing=preprocessing or card.preprocessing,
        metrics=dict(metrics) if metrics is not None else card.metrics,
        provenance={**card.provenance, **(provenance or {})},
        score_threshold=card.score_threshold if score_threshold is None else score_threshold,
    )
    if len(card.classes) != model.num_classes:
        raise MobileViTError(f"{len(card.classes)} class names for a model of {model.num_classes} classes")
    header = {
        "format_version": FORMAT_VERSION,
        "name": card.name,
        "task": card.task,
        "config": dataclasses.asdict(model.config),
        "head": None if isinstance(model, MobileViT) else dataclasses.asdict(model.head_config),
        "classes": card.classes,
        "preprocessing": card.preprocessing.to_dict(),
        "metrics": card.metrics,
        "score_threshold": card.score_threshold,
        "provenance": {
            **card.provenance,
            "mobilevit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    # Weights live channels-last in memory; the file holds plain row-major tensors, which every reader understands.
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "mobilevit": json.dumps(header, ensure_ascii=False)}
    return write_bytes(path, serialize(tensors, metadata))


def read(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """Read the tensors of any checkpoint file, and the header if this package wrote it.

    Returns:
        What the file holds, wrappers and all; the parsed header or None.

    Raises:
        ValueError: missing, truncated, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise MobileViTError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("mobilevit")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
            return tensors, json.loads(header) if header else None
        except (SafetensorError, OSError, ValueError) as error:
            raise MobileViTError(
                f"{path}: damaged or not a safetensors file ({error}); fetch or save it again"
            ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise MobileViTError(
            f"{path}: this pickle may run code when opened, so it is refused; ask its author for safetensors, "
            "or for a file of the state_dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MobileViTError(f"{path}: damaged or not a PyTorch file ({reason}); fetch or save it again") from None
    if not isinstance(content, Mapping):
        raise MobileViTError(f"{path}: holds a {type(content).__name__}, not a state dict of weights")
    return content, None


def restore(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str | os.PathLike[str]) -> Model:
    """Build the model that a header describes and fill it.

    Raises:
        ValueError: written by a newer version, or header and tensors do not fit.
    """
    if header["format_version"] > FORMAT_VERSION or header["task"] not in HEAD_CONFIGS:
        version, task = header["provenance"].get("mobilevit"), header["task"]
        raise MobileViTError(
            f"{path}: a checkpoint for {task} by mobilevit {version}, which is newer; upgrade to read it"
        )
    card = ModelCard(
        name=header["name"],
        task=header["task"],
        classes=tuple(header["classes"]),
        preprocessing=Preprocessing.from_dict(header["preprocessing"]),
        metrics=dict(header["metrics"]),
        score_threshold=header.get("score_threshold"),
        provenance=dict(header["provenance"]),
    )
    head = head_from_dict(card.task, header.get("head"))
    model = build_model(config_from_dict(header["config"]), task=card.task, num_classes=len(card.classes), head=head)
    try:
        fill(model, tensors)
    except ValueError as error:
        raise MobileViTError(f"{path}: header and weights do not fit ({error})") from None
    model.card = card
    return model.eval()


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights that are exactly a model's; counters of batches may be missing.

    Raises:
        ValueError: they are not; names one that is missing, too many or of another shape.
    """
    wanted = model.state_dict()
    for key, value in wanted.items():
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):
                raise MobileViTError(f"{key} is missing")
        elif tensors[key].shape != value.shape:
            raise MobileViTError(f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}")
    if strangers := tensors.keys() - wanted.keys():
        raise MobileViTError(f"{min(strangers)} belongs to no part of it")
    model.load_state_dict(dict(tensors))


def config_from_dict(values: Mapping[str, Any]) -> MobileViTConfig:
    """A configuration from plain JSON values, whose lists stand for tuples."""
    return MobileViTConfig(**{key: _tuples(value) for key, value in values.items()})


def head_from_dict(task: Task, values: Mapping[str, Any] | None) -> HeadConfig | None:
    """The configuration of a task's head from plain JSON values; None: the published one, or a task without."""
    kind = HEAD_CONFIGS[task]
    if kind is None or values is None:
        return None
    return kind(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
