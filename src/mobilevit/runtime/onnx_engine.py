"""The engine of ONNX Runtime."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mobilevit.errors import MobileViTError
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import chunks, import_runtime, join

if TYPE_CHECKING:
    import onnxruntime


class OnnxEngine:
    """ONNX Runtime on the CPU or CUDA."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        self._runtime = import_runtime("onnxruntime", "onnx")
        self._path, self._artifact, self._threads = path, artifact, threads
        providers = self._runtime.get_available_providers()
        self._providers = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in providers:
                raise MobileViTError(
                    f"`device` is {device!r}, but this ONNX Runtime has no CUDA; pip install onnxruntime-gpu"
                )
            self._providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        elif device not in ("auto", "cpu"):
            raise MobileViTError(f"`device` is {device!r}, but ONNX Runtime runs on cpu or cuda here")
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        if self._providers == ["CPUExecutionProvider"]:
            _share_memory(self._runtime)
        self._session(threads)

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        if threads not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            if self._providers == ["CPUExecutionProvider"]:
                options.add_session_config_entry("session.use_env_allocators", "1")
            # Its LayerNorm fused with a skip connection makes S and XXS 2 to 3 % slower.
            self._sessions[threads] = self._runtime.InferenceSession(
                self._path, options, providers=self._providers, disabled_optimizers=["SkipLayerNormFusion"]
            )
        return self._sessions[threads]

    def run(self, images: Array) -> list[Array]:
        parts = chunks(images, self._artifact.batch_size or 1)
        streams = min(self._threads, len(parts)) if self._providers == ["CPUExecutionProvider"] else 1
        session = self._session(self._threads // streams)
        name = session.get_inputs()[0].name
        with ThreadPoolExecutor(streams) as pool:
            return join(pool.map(lambda chunk: session.run(None, {name: chunk}), parts))


@cache
def _share_memory(runtime: ModuleType) -> None:
    """Let all sessions of the process share one arena that grows by what they need.

    By default each has its own, which doubles whenever it is full: 25 MB more for the two sessions of XXS.
    """
    memory = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    no_limit, default, same_as_requested = 0, -1, 1
    runtime.create_and_register_allocator(memory, runtime.OrtArenaCfg(no_limit, same_as_requested, default, default))
