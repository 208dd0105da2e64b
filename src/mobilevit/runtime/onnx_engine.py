"""The engine of ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mobilevit.errors import MobileViTError
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run, import_runtime

if TYPE_CHECKING:
    import onnxruntime


class OnnxEngine(Engine):
    """ONNX Runtime on the CPU or CUDA."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        super().__init__(path, artifact, threads, device)
        self._runtime = import_runtime("onnxruntime", "onnx")
        providers = self._runtime.get_available_providers()
        self._on_cpu = not device.startswith("cuda")
        if not self._on_cpu and "CUDAExecutionProvider" not in providers:
            raise MobileViTError(
                f"`device` is {device!r}, but this ONNX Runtime has no CUDA; pip install onnxruntime-gpu"
            )
        if self._on_cpu and device not in ("auto", "cpu"):
            raise MobileViTError(f"`device` is {device!r}, but ONNX Runtime runs on cpu or cuda here")
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        if self._on_cpu:
            _share_memory(self._runtime)
        self._session(threads)

    def _session(self, threads: int) -> onnxruntime.InferenceSession:
        if threads not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            if self._on_cpu:
                options.add_session_config_entry("session.use_env_allocators", "1")
            providers = ["CPUExecutionProvider"] if self._on_cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"]
            # Its LayerNorm fused with a skip connection makes S and XXS 2 to 3 % slower.
            self._sessions[threads] = self._runtime.InferenceSession(
                self._path, options, providers=providers, disabled_optimizers=["SkipLayerNormFusion"]
            )
        return self._sessions[threads]

    def _streams(self, count: int) -> list[Run]:
        count = count if self._on_cpu else 1
        session = self._session(self._threads // count)
        name = session.get_inputs()[0].name
        return [lambda part: session.run(None, {name: part})] * count


@cache
def _share_memory(runtime: ModuleType) -> None:
    """Let all sessions of the process share one arena that grows by what they need.

    By default each has its own, which doubles whenever it is full: 25 MB more for the two sessions of XXS.
    """
    memory = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    no_limit, default, same_as_requested = 0, -1, 1
    runtime.create_and_register_allocator(memory, runtime.OrtArenaCfg(no_limit, same_as_requested, default, default))
