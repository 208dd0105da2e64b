"""Checkpoints that describe themselves: safetensors files with the card in their header."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from mobilevit import __version__
from mobilevit.card import ModelCard, card_of
from mobilevit.errors import MobileViTError
from mobilevit.files import Json, write_bytes
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import HEADS, MODELS, Config, HeadConfig, Model

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights from any file, under the names of this package, with all that is known of them."""

    origin: str
    """The file, or the name of public weights."""
    described: bool
    """Whether the file itself says the rest; else it was recognized by names and shapes."""
    state: dict[str, Tensor]
    card: ModelCard
    """Without classes if the weights have no classifier."""
    config: Config
    head: HeadConfig | None
    """None: the published one, or a task that needs none."""


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
    """Write a checkpoint that describes itself; what is not given comes from the model's card.

    Args:
        model: made by `create_model` or `load`, not by `fuse`.
        path: ends in `.safetensors`; appears whole or not at all.
        classes: labels by output index, in detection without the background.
        preprocessing: how images become input.
        metrics: measured values to keep with the weights.
        provenance: where the weights come from; added to what the card says.
        score_threshold: detection only: the lowest score that is shown.

    Raises:
        MobileViTError: wrong number of classes, a fused model, or another suffix.
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
    origin = {
        "mobilevit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    card = dataclasses.replace(
        card,
        classes=tuple(classes) if classes is not None else card.classes,
        preprocessing=preprocessing or card.preprocessing,
        metrics=dict(metrics) if metrics is not None else card.metrics,
        provenance={**card.provenance, **(provenance or {}), **origin},
        score_threshold=card.score_threshold if score_threshold is None else score_threshold,
    )
    if len(card.classes) != model.num_classes:
        raise MobileViTError(f"{len(card.classes)} class names for a model of {model.num_classes} classes")
    header = {
        "format_version": FORMAT_VERSION,
        **card.to_dict(),
        "config": dataclasses.asdict(model.config),
        "head": None if model.head_config is None else dataclasses.asdict(model.head_config),
    }
    return save_tensors(model.state_dict(), path, {"mobilevit": json.dumps(header, ensure_ascii=False)})


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as a safetensors file that every reader understands; it appears whole or not at all."""
    # Weights live channels-last in memory; the file holds plain row-major tensors.
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return write_bytes(path, serialize(plain, {"format": "pt", **(metadata or {})}))


def read(path: str | os.PathLike[str]) -> tuple[Mapping[str, Tensor], Json | None]:
    """Read the content of any checkpoint file as it is, and the header if this package wrote it.

    Raises:
        MobileViTError: missing, truncated, or a pickle that would run code.
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


def describe(tensors: Mapping[str, Tensor], header: Json, path: str | os.PathLike[str]) -> Weights:
    """Read the header of a checkpoint of this package.

    Raises:
        MobileViTError: written by a newer version.
    """
    if header["format_version"] > FORMAT_VERSION or header["task"] not in HEADS or header["name"] not in MODELS:
        version, task, name = header["provenance"].get("mobilevit"), header["task"], header["name"]
        raise MobileViTError(
            f"{path}: a checkpoint of {name} for {task} by mobilevit {version}, which is newer; upgrade to read it"
        )
    head = header.get("head")  # the first checkpoints had none
    known = [kind for kind in HEADS[header["task"]].config_types if head and head.keys() <= kind.__annotations__.keys()]
    return Weights(
        origin=str(path),
        described=True,
        state=dict(tensors),
        card=ModelCard.from_dict(header),
        config=type(MODELS[header["name"]])(**_tuples(header["config"])),
        head=known[0](**_tuples(head)) if known else None,
    )


def find_misfit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Name a tensor that a model lacks, has in another shape, or does not know; "" if all fit.

    The counters of BatchNorm may be missing.
    """
    for key, value in wanted.items():
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):
                return f"{key} is missing"
        elif tensors[key].shape != value.shape:
            return f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
    strangers = tensors.keys() - wanted.keys()
    return f"{min(strangers)} belongs to no part of it" if strangers else ""


def _tuples(value: Any) -> Any:
    """Turn the lists of JSON back into the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
