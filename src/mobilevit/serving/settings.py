"""Everything a server can be told; each field's docstring is the help of its flag."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mobilevit.errors import MobileViTError

API_KEY_VARIABLE = "MOBILEVIT_API_KEY"

_GOOD_KEY = re.compile(r"[!-~]+")
_RUN_FILES = ("best", "last", "model")
_RUN_FOLDERS = ("exported",)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How to serve.

    Raises:
        ValueError: a field has no meaning.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is reachable from other machines."""
    port: int = 8000
    """0: any free one."""
    engine: Literal["torch", "compile", "auto"] = "auto"
    """What runs a checkpoint; auto: what `mobilevit tune` found, or PyTorch. Exported files have their own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    workers: int = 1
    """Processes, with the models loaded in each; one that dies is replaced. They share the cores."""
    threads: int | None = None
    """To compute with, in each worker; its share of the cores, or what `mobilevit tune` found, if not given."""
    max_batch: int = 16
    """Images that go through a model together."""
    max_wait_ms: float = 5.0
    """How long an image waits for others that are still being read; with none under way it never waits."""
    max_queue: int = 128
    """Images that may wait for each model, in each worker; beyond that, the answer is 503."""
    timeout_s: float = 30.0
    """For a request, from its first byte to its answer, in seconds."""
    shutdown_s: float = 30.0
    """At most, for finishing what was accepted, after SIGTERM or SIGINT."""
    max_body_mb: float = 20.0
    """Of one request, in megabytes."""
    max_uploads_mb: float = 512.0
    """Of all requests being received or waiting, in each worker; beyond that, the answer is 503."""
    max_pixels: int = 50_000_000
    """Of one image."""
    max_files: int = 32
    """Images in one request."""
    max_connections: int = 512
    """Open at a time, in each worker; beyond that, the answer is 503."""
    api_key: str | None = None
    """Asked of clients, as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Others on this machine can see flags: the
    environment variable MOBILEVIT_API_KEY does the same."""
    cors_origins: tuple[str, ...] = ()
    """Web sites, such as https://example.org, whose pages may ask; "*": all."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Of the line a request; auto: text on a terminal, JSON elsewhere."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "max_batch", "max_queue", "max_files", "max_pixels", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MobileViTError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
        for name in ("timeout_s", "shutdown_s", "max_body_mb", "max_uploads_mb"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise MobileViTError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if not 0 <= self.max_wait_ms < math.inf:
            raise MobileViTError(f"--max-wait-ms is {self.max_wait_ms}; it must be 0 or more")
        if not 0 <= self.port <= 65535:
            raise MobileViTError(f"--port is {self.port}; it must be from 0 to 65535")
        if self.max_uploads_mb < self.max_body_mb:
            raise MobileViTError(f"--max-uploads-mb is {self.max_uploads_mb}, less than one body of {self.max_body_mb}")
        key = self.key()
        if key == "":
            raise MobileViTError(f"the API key is empty; give --api-key or {API_KEY_VARIABLE} a value, or neither")
        if key is not None and not _GOOD_KEY.fullmatch(key):  # such as a line end from a file: no request would match
            raise MobileViTError(
                f"the API key has characters that no header carries; give --api-key or {API_KEY_VARIABLE} ASCII "
                "letters, digits and signs, without spaces or line ends"
            )

    def key(self) -> str | None:
        """What clients must show; None: nothing."""
        return os.environ.get(API_KEY_VARIABLE) if self.api_key is None else self.api_key

    def max_body(self) -> int:
        """Bytes of one request."""
        return round(self.max_body_mb * 1e6)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model to serve."""

    name: str
    """What requests call it."""
    path: Path
    """Checkpoint or exported file."""


def name_models(arguments: tuple[str, ...]) -> tuple[ServedModel, ...]:
    """A name for each model: what stands before "=", the file's, or for files such as best.safetensors the folder's.

    Raises:
        ValueError: a file is not there, or two models have one name.
    """
    if not arguments:
        raise MobileViTError("no model to serve; name a checkpoint or an exported file")
    models: dict[str, Path] = {}
    for argument in arguments:
        given, separator, rest = argument.partition("=")
        named = bool(separator) and not Path(argument).exists()
        path = Path(rest if named else argument)
        if not path.exists():
            raise MobileViTError(f"{path}: no such file")
        name = given if named else _name_of(path)
        if not name:
            raise MobileViTError(f"{argument}: an empty name; write NAME=FILE")
        if name in models:
            raise MobileViTError(
                f"two models are called {name}; give them names: {name}-1={models[name]} {name}-2={path}"
            )
        models[name] = path
    return tuple(ServedModel(name=name, path=path) for name, path in models.items())


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.stem not in _RUN_FILES:
        return path.stem
    folder = path.parent.parent if path.parent.name in _RUN_FOLDERS else path.parent
    return folder.name or path.stem
