"""What an exported file must say of itself: the sidecar beside it, and the same text inside it where its format allows.

An artifact is one file (with OpenVINO, `model.xml` and `model.bin`) and its sidecar, named as the file plus `.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.files import write_json

ARTIFACT_VERSION = 1

Format = Literal["onnx", "openvino", "executorch", "litert", "coreml", "pt2"]
"""Whose file an artifact is: ONNX Runtime, OpenVINO, ExecuTorch, LiteRT, Core ML, `torch.export`."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "palettized"]
"""Numbers an artifact computes with; "palettized" are float16 whose weights are indices into small tables (Core ML)."""

SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".xml": "openvino",
    ".pte": "executorch",
    ".tflite": "litert",
    ".mlpackage": "coreml",
    ".pt2": "pt2",
}
"""Of the files of each format."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Everything a program needs to use an exported file rightly."""

    format: Format
    precision: Precision
    card: ModelCard
    """Task, classes, preprocessing, threshold, provenance."""
    batch_size: int | None
    """Images in one run; None: any number."""
    image_size: tuple[int, int] | None
    """(height, width) of the input; None: any multiple of 32."""
    baked: bool
    """Whether the input is uint8 (B, H, W, 3) as images are, and scaled inside; otherwise it is float32 (B, 3, H, W),
    scaled as `card.preprocessing` says."""
    outputs: tuple[str, ...]
    """Names of what comes out, in order: "logits"; "boxes_xyxy" and "scores", perhaps with "selected"; or
    "label_map"."""
    settings: dict[str, str] = field(default_factory=dict)
    """What the runtime must be told to compute in this precision."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        del values["card"]
        return {"artifact_version": ARTIFACT_VERSION, **values, **self.card.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Artifact:
        """The inverse of `to_dict`."""
        size = values["image_size"]
        return cls(
            format=values["format"],
            precision=values["precision"],
            card=ModelCard.from_dict(values),
            batch_size=values["batch_size"],
            image_size=None if size is None else (size[0], size[1]),
            baked=values["baked"],
            outputs=tuple(values["outputs"]),
            settings=dict(values["settings"]),
        )

    def to_json(self) -> str:
        """One line, for the metadata of files that have room for it."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an exported model, by its suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def artifact_files(path: Path) -> list[Path]:
    """List the files of an artifact, without its sidecar."""
    if path.is_dir():
        return [part for part in path.rglob("*") if part.is_file()]
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of an artifact lies."""
    return path.with_name(path.name + ".json")


def write_sidecar(path: Path, artifact: Artifact) -> Path:
    """Describe a file that is already there; the sidecar holds digests of the file and of its own words."""
    values = artifact.to_dict() | {"file": path.name, "sha256": _digest_of_file(path)}
    return write_json(sidecar_of(path), values | {"sidecar_sha256": _digest_of_values(values)})


def read_sidecar(path: Path) -> Artifact:
    """What the sidecar says of an artifact, when both are as they were written.

    Raises:
        ValueError: the file or its sidecar is missing, damaged, edited, or of a newer version; one line with a remedy.
    """
    if not path.exists():
        raise MobileViTError(f"{path}: no such file")
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        raise MobileViTError(f"{path}: its sidecar {sidecar.name} is missing; copy it beside the file, or export again")
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        version = int(values["artifact_version"] if "artifact_version" in values else values["artefact_version"])
    except (ValueError, KeyError, TypeError, OSError):
        raise MobileViTError(f"{sidecar}: damaged, or no sidecar of this package; export again") from None
    if version > ARTIFACT_VERSION:
        made = values.get("provenance", {}).get("exported_by", "a newer mobilevit")
        raise MobileViTError(f"{path}: made by {made}, which is newer than this one; upgrade mobilevit to use it")
    told = {key: value for key, value in values.items() if key != "sidecar_sha256"}
    if values.get("sidecar_sha256") != _digest_of_values(told):
        raise MobileViTError(f"{sidecar}: was edited after the export, so it may not fit the file; export again")
    if values["sha256"] != _digest_of_file(path):
        raise MobileViTError(f"{path}: is not the file its sidecar describes; copy both together, or export again")
    return Artifact.from_dict(values)


def _digest_of_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    """Of a file, of OpenVINO's two, or of all files of a Core ML package."""
    digest = hashlib.sha256()
    parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if path.suffix == ".xml":
        parts.append(path.with_suffix(".bin"))
    for part in parts:
        if not part.is_file():
            raise MobileViTError(f"{part}: missing; it belongs to {path.name}. Copy all files of an export together")
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


assert set(SUFFIXES.values()) == set(get_args(Format))
