"""The settings of the server; the docstring of each field is the help text of its flag."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mobilevit.errors import MobileViTError
from mobilevit.files import reading_from

API_KEY_VARIABLE = "MOBILEVIT_API_KEY"

_VALID_KEY = re.compile(r"[!-~]+")
_RUN_FILES = ("best", "last", "model")
_RUN_FOLDERS = ("exported",)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the server.

    Raises:
        MobileViTError: a field has an impossible value.
    """

    host: str = "127.0.0.1"
    """Address to listen on; with 0.0.0.0, other machines can connect."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    engine: Literal["torch", "compile", "auto"] = "auto"
    """Engine of a checkpoint; auto: the fastest that `mobilevit tune` found, or PyTorch. Exported files have their
    own."""
    trust_pt2: bool = False
    """Load a .pt2 file, although that can run code that came with it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    workers: int = 1
    """Processes, each with all models; they share the cores, and one that dies is replaced."""
    threads: int | None = None
    """CPU threads of each worker. Default: its share of the cores, or the number that `mobilevit tune` found."""
    max_batch: int = 16
    """Limit on images that go through a model together."""
    max_wait_ms: float = 5.0
    """Limit on the time an image waits for others that are being decoded; if there are none, it does not wait."""
    max_queue: int = 128
    """Limit on waiting images, for each model and worker; further requests get a 503."""
    timeout_s: float = 30.0
    """Limit on the time of a request, from its first byte to its answer, in seconds."""
    shutdown_s: float = 30.0
    """Limit on the time to answer accepted requests after SIGTERM or SIGINT, in seconds."""
    max_body_mb: float = 20.0
    """Limit on the size of a request in megabytes."""
    max_uploads_mb: float = 512.0
    """Limit on the size of all requests in progress, in each worker; further requests get a 503."""
    max_pixels: int = 50_000_000
    """Limit on the pixels of an image."""
    max_files: int = 32
    """Limit on images in a request."""
    max_connections: int = 512
    """Limit on open connections, in each worker; further ones get a 503."""
    api_key: str | None = None
    """Key that clients must send, as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Other users of this machine can
    see flags; the environment variable MOBILEVIT_API_KEY does the same."""
    cors_origins: tuple[str, ...] = ()
    """Web sites, such as https://example.org, whose pages may send requests; "*": all."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of the log; auto: text on a terminal, JSON elsewhere."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "max_batch", "max_queue", "max_files", "max_pixels", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MobileViTError(f"`{name}` is {value}; it must be 1 or more")
        for name in ("timeout_s", "shutdown_s", "max_body_mb", "max_uploads_mb"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise MobileViTError(f"`{name}` is {value}; it must be above 0")
        if not 0 <= self.max_wait_ms < math.inf:
            raise MobileViTError(f"`max_wait_ms` is {self.max_wait_ms}; it must be 0 or more")
        if not 0 <= self.port <= 65535:
            raise MobileViTError(f"`port` is {self.port}; it must be from 0 to 65535")
        if self.max_uploads_mb < self.max_body_mb:
            raise MobileViTError(
                f"`max_uploads_mb` is {self.max_uploads_mb}, less than one body of `max_body_mb` {self.max_body_mb}"
            )
        key = self.key()
        if key == "":
            raise MobileViTError(f"the API key is empty; give `api_key` or {API_KEY_VARIABLE} a value, or neither")
        if key is not None and not _VALID_KEY.fullmatch(key):  # such as a line end from a file: no request would match
            raise MobileViTError(
                f"the API key has characters that headers cannot contain; give `api_key` or {API_KEY_VARIABLE} ASCII "
                "letters, digits and punctuation, without spaces or line ends"
            )

    def key(self) -> str | None:
        """Return the key that clients must send; None: they need none."""
        return os.environ.get(API_KEY_VARIABLE) if self.api_key is None else self.api_key

    def max_body(self) -> int:
        """Return the limit on the size of a request in bytes."""
        return round(self.max_body_mb * 1e6)


def name_models(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return the file of each model by its name: that before "=", or of the file, or for best.safetensors the folder.

    Raises:
        MobileViTError: a file does not exist, or two models have the same name.
    """
    if not arguments:
        raise MobileViTError("no model to serve; name a checkpoint or an exported file")
    models: dict[str, Path] = {}
    for argument in arguments:
        given, separator, rest = argument.partition("=")
        with reading_from(argument):
            named = bool(separator) and not Path(argument).exists()
        path = Path(rest if named else argument)
        with reading_from(path):
            path.stat()
        name = given if named else _name_of(path)
        if not name:
            raise MobileViTError(f"{argument}: the name is empty; write NAME=FILE")
        if name in models:
            raise MobileViTError(
                f"two models are called {name}; give them names: {name}-1={models[name]} {name}-2={path}"
            )
        models[name] = path
    return models


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.stem not in _RUN_FILES:
        return path.stem
    folder = path.parent.parent if path.parent.name in _RUN_FOLDERS else path.parent
    return folder.name or path.stem
