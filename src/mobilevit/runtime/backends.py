"""The runtimes that artifacts run in: one class each, from a batch of input to arrays of output.

Several images are computed side by side, one thread each, a few images at a time: what one layer leaves in the
cache is then still there for the next, which is faster than one large batch through all threads
(benchmarks/engines.py).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilevit.errors import MobileViTError
from mobilevit.machine import available_cores
from mobilevit.runtime import pt2
from mobilevit.runtime.artifact import Artifact, Format
from mobilevit.runtime.litert import LitertSession

log = logging.getLogger("mobilevit")

Array = NDArray[Any]


class Backend(Protocol):
    """A loaded artifact."""

    def run(self, images: Array) -> list[Array]:
        """From a batch, of which the artifact's own batch size is a divisor, to its outputs in their order."""
        ...


class OnnxBackend:
    """ONNX Runtime."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        self._runtime = _import("onnxruntime", "onnx")
        self._path, self._artifact, self._threads = path, artifact, threads
        providers = self._runtime.get_available_providers()
        self._providers = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in providers:
                raise MobileViTError(f"--device {device}: this ONNX Runtime has no CUDA; pip install onnxruntime-gpu")
            self._providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        elif device not in ("auto", "cpu"):
            raise MobileViTError(f"--device {device}: ONNX Runtime is used on cpu or cuda")
        self._sessions: dict[int, Any] = {}
        self._session(threads)

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            # Its fused LayerNorm with a skip is slower than the two apart: 2 to 3 % of S and XXS.
            self._sessions[threads] = self._runtime.InferenceSession(
                self._path, options, providers=self._providers, disabled_optimizers=["SkipLayerNormFusion"]
            )
        return self._sessions[threads]

    def run(self, images: Array) -> list[Array]:
        chunks = _chunks(images, self._artifact.batch_size or 1)
        streams = min(self._threads, len(chunks)) if self._providers == ["CPUExecutionProvider"] else 1
        session = self._session(self._threads // streams)
        name = session.get_inputs()[0].name
        with ThreadPoolExecutor(streams) as pool:
            return _join(pool.map(lambda chunk: session.run(None, {name: chunk}), chunks))


class OpenvinoBackend:
    """OpenVINO."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        openvino = _import("openvino", "openvino")
        self._artifact, self._threads = artifact, threads
        self._core = openvino.Core()
        self._device = "CPU" if device in ("auto", "cpu") else device.upper()
        if self._device not in self._core.available_devices:
            raise MobileViTError(
                f"--device {device}: OpenVINO sees {', '.join(self._core.available_devices).lower()} here"
            )
        self._model = self._core.read_model(path)
        self._compiled: dict[int, Any] = {}
        self._compile(1)

    def _compile(self, streams: int) -> Any:
        if streams not in self._compiled:
            settings = dict(self._artifact.settings)
            if settings.get("INFERENCE_PRECISION_HINT") == "bf16" and not self._has_bfloat16():
                if self._artifact.precision == "bf16":  # of int8, it is only what stays in floating point
                    log.warning("this processor has no bfloat16; OpenVINO computes in float32 instead")
                settings["INFERENCE_PRECISION_HINT"] = "f32"
            if self._device == "CPU":
                settings |= {"INFERENCE_NUM_THREADS": str(self._threads), "NUM_STREAMS": str(streams)}
            self._compiled[streams] = self._core.compile_model(self._model, self._device, settings)
        return self._compiled[streams]

    def _has_bfloat16(self) -> bool:
        return "BF16" in self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")

    def run(self, images: Array) -> list[Array]:
        chunks = _chunks(images, self._artifact.batch_size or 1)
        streams = min(self._threads, len(chunks))
        compiled = self._compile(streams)
        if len(chunks) == 1:
            found = compiled(chunks[0])
            return [np.array(found[port]) for port in compiled.outputs]
        # Not by AsyncInferQueue: its threads want the GIL once more when they are done, and so hang a program that lets
        # go of the model right after.
        free = [compiled.create_infer_request() for _ in range(streams)]
        computing: deque[Any] = deque()
        results: list[list[Array]] = []

        def finish() -> Any:
            request = computing.popleft()
            request.wait()
            results.append([np.array(tensor.data) for tensor in request.output_tensors])
            return request

        for chunk in chunks:
            request = free.pop() if free else finish()
            request.start_async({0: chunk})
            computing.append(request)
        while computing:
            finish()
        return _join(results)


class LitertBackend:
    """LiteRT."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        if device not in ("auto", "cpu"):
            raise MobileViTError(f"--device {device}: LiteRT is used on the cpu here")
        self._path, self._artifact, self._threads = path, artifact, threads
        self._whole = LitertSession(path, threads=threads)
        self._streams: list[LitertSession] = []
        """Of one thread each; a session is not to be shared."""

    def run(self, images: Array) -> list[Array]:
        chunks = _chunks(images, self._artifact.batch_size or 1)
        if len(chunks) == 1 or self._threads == 1:
            return _join(self._whole.run(chunk) for chunk in chunks)
        while len(self._streams) < min(self._threads, len(chunks)):
            self._streams.append(LitertSession(self._path, threads=1))
        count = len(self._streams)
        results: list[list[Array]] = [[] for _ in chunks]

        def work(stream: int) -> None:
            for place in range(stream, len(chunks), count):
                results[place] = self._streams[stream].run(chunks[place])

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
        return _join(results)


class ExecutorchBackend:
    """ExecuTorch, which in Python computes on the processor.

    Its threads are one pool for the whole process, and replacing that takes it away from under programs loaded before:
    a backend that finds another pool than its own loads its program anew.
    """

    _turn: ClassVar[threading.Lock] = threading.Lock()
    """A program has one set of buffers, and all have one pool."""
    _pool: ClassVar[object] = None
    """Stands for the pool that is there."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        _import("executorch", "executorch")
        if device not in ("auto", "cpu"):
            raise MobileViTError(f"--device {device}: ExecuTorch files are made for the cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being experimental
            self._library = _import("executorch.extension.pybindings.portable_lib", "executorch")
            self._runtime = _import("executorch.runtime", "executorch").Runtime.get()
        self._path, self._artifact, self._threads = path, artifact, threads
        with self._turn:
            self._load()

    def _load(self) -> None:
        with _silent_stderr():  # its C++ tells which files describe a phone's processor, wherever it runs
            if self._pool is None or self._library._threadpool_get_thread_count() != self._threads:
                self._library._unsafe_reset_threadpool(self._threads)
                ExecutorchBackend._pool = object()
            self._my_pool = self._pool
            self._program = self._runtime.load_program(self._path)
            self._method = self._program.load_method("forward")

    def run(self, images: Array) -> list[Array]:
        import torch

        with self._turn:
            if self._my_pool is not self._pool:
                self._load()
            chunks = _chunks(images, self._artifact.batch_size or 1)
            found = [self._method.execute([torch.from_numpy(chunk)]) for chunk in chunks]
        return _join([part.numpy() for part in parts] for parts in found)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without what libraries write to the process's standard error past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Pt2Backend:
    """`torch.export`, run by PyTorch; a file that could run code of its own when it is loaded is refused."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        import torch

        from mobilevit.devices import pick_device

        self._torch, self._artifact = torch, artifact
        self._device = pick_device("cpu" if device == "auto" else device)
        torch.set_num_threads(threads)
        program = torch.export.load(pt2.read(path))
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._module = program.module()

    def run(self, images: Array) -> list[Array]:
        torch, size = self._torch, self._artifact.batch_size or len(images)
        with torch.inference_mode():
            outputs = [self._module(torch.from_numpy(chunk).to(self._device)) for chunk in _chunks(images, size)]
        return _join([part.numpy(force=True) for part in parts] for parts in outputs)


class CoremlBackend:
    """Core ML, on a Mac; written after its documentation and never run, for want of a Mac."""

    def __init__(self, path: Path, artifact: Artifact, threads: int, device: str) -> None:
        if platform.system() != "Darwin":
            raise MobileViTError(f"{path}: Core ML runs on macOS and iOS only; copy the package to a Mac")
        coremltools = _import("coremltools", "coreml")
        del threads  # Core ML decides
        units = "CPU_ONLY" if device == "cpu" else "ALL"
        self._model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit[units])
        self._artifact = artifact
        self._input = self._model.get_spec().description.input[0].name

    def run(self, images: Array) -> list[Array]:
        return _join(self._one(chunk) for chunk in _chunks(images, self._artifact.batch_size or 1))

    def _one(self, chunk: Array) -> list[Array]:
        from PIL import Image

        # With preprocessing inside, the package takes an image.
        found = self._model.predict({self._input: Image.fromarray(chunk[0]) if self._artifact.baked else chunk})
        return [np.asarray(found[name]) for name in self._artifact.outputs]


_BACKENDS: dict[Format, Callable[[Path, Artifact, int, str], Backend]] = {
    "onnx": OnnxBackend,
    "openvino": OpenvinoBackend,
    "executorch": ExecutorchBackend,
    "litert": LitertBackend,
    "coreml": CoremlBackend,
    "pt2": Pt2Backend,
}


def open_backend(path: Path, artifact: Artifact, *, threads: int | None, device: str) -> Backend:
    """Load an artifact into its runtime.

    Raises:
        ValueError: the runtime is not installed, cannot read the file, or does not run on this system.
    """
    if threads is not None and threads < 1:
        raise MobileViTError(f"threads is {threads}; give 1 or more")
    try:
        return _BACKENDS[artifact.format](path, artifact, threads or available_cores(), device)
    except (ValueError, KeyboardInterrupt):
        raise
    except Exception as error:  # every runtime has its own
        reason = " ".join(str(error).split())[:200]
        raise MobileViTError(f"{path}: {artifact.format} cannot load it ({reason}); export it again") from error


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MobileViTError(f"{module} is not installed; pip install 'mobilevit[{extra}]'") from None


def _chunks(images: Array, size: int) -> list[Array]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _join(parts: Iterable[Sequence[Array]]) -> list[Array]:
    outputs = list(zip(*parts, strict=True))
    return [np.concatenate(list(part)) if len(part) > 1 else part[0] for part in outputs]
