"""Find the result of `mobilevit tune` for a checkpoint on this machine.

Beside `NAME.safetensors` are `NAME.tuned.json`, with the fastest engine and the machine it was measured on, and the
folder `NAME.tuned` with the artifact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from mobilevit.files import Json
from mobilevit.machine import this_machine, versions
from mobilevit.runtime.artifact import read_sidecar

log = logging.getLogger("mobilevit")

TUNED_VERSION = 1

RUNTIME_PACKAGES: dict[str, tuple[str, ...]] = {
    "eager": ("torch",),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("ai-edge-litert",),
    "pt2": ("torch",),
}
"""The packages of each engine: with other versions, another engine may be the fastest."""


def tuned_file(checkpoint: Path) -> Path:
    """Return the path of the result for a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.stem}.tuned.json")


def digest_of_file(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_tuned(checkpoint: str | os.PathLike[str]) -> tuple[Path, int | None] | None:
    """Find the fastest engine for a checkpoint.

    A result is not used, and the log gives the reason, if it is from another machine, of other versions of the engine,
    or of other content of the checkpoint.

    Returns:
        The artifact and its number of threads. None: there is no valid result, or PyTorch was the fastest.
    """
    checkpoint = Path(checkpoint)
    file = tuned_file(checkpoint)
    if not file.is_file() or not checkpoint.is_file():
        return None
    again = f"run mobilevit tune {checkpoint} again"
    try:
        values: Json = json.loads(file.read_text(encoding="utf-8"))
        stale = _why_stale(values, checkpoint)
        if stale:
            log.warning("%s: not used, %s; %s", file, stale, again)
            return None
        name = values["artefact"] if "artefact" in values else values["artifact"]  # version 0.1 has the former
        if name is None:
            log.info("%s: PyTorch itself was the fastest here", file)
            return None
        artifact, threads = file.parent / name, values["threads"]
        read_sidecar(artifact)
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s: not used, damaged (%s); %s", file, " ".join(str(error).split()), again)
        return None
    log.info("%s: %s, %s, %s threads", file, values["engine"], values["precision"], threads)
    return artifact, threads


def _why_stale(values: Json, checkpoint: Path) -> str:
    """Return the reason why a result does not apply to this checkpoint here and now; empty if it does."""
    if values["tuned_version"] != TUNED_VERSION:
        return "written by another version of this package"
    if values["checkpoint_sha256"] != digest_of_file(checkpoint):
        return f"{checkpoint.name} has changed since"
    there, here = values["machine"], asdict(this_machine())
    for what in ("processor", "cores", "system"):
        if there[what] != here[what]:
            return f"measured on another machine ({what}: {there[what]}, here {here[what]})"
    installed = versions(RUNTIME_PACKAGES[values["engine"]])
    if values["packages"] != installed:
        names = sorted({*values["packages"], *installed})
        both = ", ".join(f"{n} {values['packages'].get(n, 'none')}, here {installed.get(n, 'none')}" for n in names)
        return f"measured with other versions ({both})"
    return ""
