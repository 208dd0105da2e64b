"""Artifacts: an exported file and its sidecar, which describes it; formats with metadata also contain the description.

An artifact is one file (with OpenVINO, `model.xml` and `model.bin`) and a sidecar, named as the file plus `.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.files import Json, reading_from, write_json

ARTIFACT_VERSION = 1

Format = Literal["onnx", "openvino", "executorch", "litert", "coreml", "pt2"]
"""The engine of an artifact: ONNX Runtime, OpenVINO, ExecuTorch, LiteRT, Core ML, `torch.export`."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "palettized"]
"""Precision of an artifact; "palettized" is float16 with weights as indices into small tables (Core ML)."""

SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".xml": "openvino",
    ".pte": "executorch",
    ".tflite": "litert",
    ".mlpackage": "coreml",
    ".pt2": "pt2",
}
"""The format by the suffix of its files."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Everything a program needs to use an exported file."""

    format: Format
    precision: Precision
    card: ModelCard
    """Task, classes, preprocessing, threshold, provenance."""
    batch_size: int | None
    """Images per run; None: any number."""
    image_size: tuple[int, int] | None
    """(height, width) of the input; None: any multiple of 32."""
    baked: bool
    """Whether the file normalizes the input itself: it is then uint8 (B, H, W, 3), as images are; otherwise it is
    float32 (B, 3, H, W), normalized as `card.preprocessing` says."""
    outputs: tuple[str, ...]
    """Names of the outputs, in order: "logits"; "boxes_xyxy" and "scores", perhaps with "selected"; or "label_map"."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings that the engine needs to compute in this precision."""

    def to_dict(self) -> Json:
        """Return plain values for JSON; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        del values["card"]
        return {"artifact_version": ARTIFACT_VERSION, **values, **self.card.to_dict()}

    @classmethod
    def from_dict(cls, values: Json) -> Artifact:
        """Make an `Artifact` from the values of `to_dict`."""
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
        """Return the description in one line, for formats with metadata."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an exported model, by its suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def artifact_files(path: Path) -> list[Path]:
    """List the files of an artifact, without its sidecar."""
    if path.is_dir():
        return sorted(part for part in path.rglob("*") if part.is_file())
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def sidecar_of(path: Path) -> Path:
    """Return the path of an artifact's sidecar."""
    return path.with_name(path.name + ".json")


def write_sidecar(path: Path, artifact: Artifact) -> Path:
    """Write the sidecar of an existing file, with digests of the file and of the description."""
    values = artifact.to_dict() | {"file": path.name, "sha256": _digest_of_file(path)}
    return write_json(sidecar_of(path), values | {"sidecar_sha256": _digest_of_values(values)})


def read_sidecar(path: Path) -> Artifact:
    """Read the sidecar of an artifact, and check that both are unchanged since the export.

    Raises:
        MobileViTError: the file or its sidecar is missing, damaged, edited, or of a newer version.
    """
    sidecar = sidecar_of(path)
    with reading_from(path):
        path.stat()
    if not sidecar.exists():
        raise MobileViTError(f"{path}: its sidecar {sidecar.name} is missing; copy it beside the file, or export again")
    with reading_from(sidecar):
        text = sidecar.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
        version = int(values["artifact_version"] if "artifact_version" in values else values["artefact_version"])
    except (ValueError, KeyError, TypeError):
        raise MobileViTError(f"{sidecar}: damaged, or not a sidecar of this package; export again") from None
    if version > ARTIFACT_VERSION:
        made = values.get("provenance", {}).get("exported_by", "a newer mobilevit")
        raise MobileViTError(f"{path}: made by {made}, which is newer than this version; upgrade mobilevit to use it")
    described = {key: value for key, value in values.items() if key != "sidecar_sha256"}
    if values.get("sidecar_sha256") != _digest_of_values(described):
        raise MobileViTError(f"{sidecar}: was edited after the export, so it may not fit the file; export again")
    if values["sha256"] != _digest_of_file(path):
        raise MobileViTError(f"{path}: is not the file its sidecar describes; copy both together, or export again")
    return Artifact.from_dict(values)


def _digest_of_values(values: Json) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    """Compute the digest of a file, of the two files of OpenVINO, or of all files in a Core ML package."""
    digest = hashlib.sha256()
    for part in artifact_files(path):
        if not part.exists():
            raise MobileViTError(f"{part}: missing; it belongs to {path.name}. Copy all files of an export together")
        with reading_from(part), part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
