"""The engine of ExecuTorch, whose Python interface takes tensors of PyTorch."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run, import_runtime


class ExecutorchEngine(Engine):
    """ExecuTorch on the CPU.

    The process has one pool of threads, and replacing it breaks programs that were loaded before: an engine whose pool
    was replaced loads its program again.
    """

    _turn: ClassVar[threading.Lock] = threading.Lock()
    """A program has one set of buffers, and all programs share one pool."""
    _pool: ClassVar[object] = None
    """Identifies the current pool."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        super().__init__(path, artifact, threads, device)
        import_runtime("executorch", "executorch")
        if device not in ("auto", "cpu"):
            raise MobileViTError(f"`device` is {device!r}, but ExecuTorch files are made for the cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            self._library = import_runtime("executorch.extension.pybindings.portable_lib", "executorch")
            self._runtime = import_runtime("executorch.runtime", "executorch").Runtime.get()
        with self._turn:
            self._load()

    def _load(self) -> None:
        with _silent_stderr():  # its C++ code complains that files are missing which only phones have
            if self._pool is None or self._library._threadpool_get_thread_count() != self._threads:
                self._library._unsafe_reset_threadpool(self._threads)
                ExecutorchEngine._pool = object()
            self._my_pool = self._pool
            self._program = self._runtime.load_program(self._path)
            self._method = self._program.load_method("forward")

    def _streams(self, _count: int) -> list[Run]:
        return [self._run_part]

    def _run_part(self, part: Array) -> list[Array]:
        import torch

        with self._turn:
            if self._my_pool is not self._pool:
                self._load()
            return [output.numpy() for output in self._method.execute([torch.from_numpy(part)])]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Suppress what compiled libraries write to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
