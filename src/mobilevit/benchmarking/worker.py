"""The process of one contender, from both sides: `Worker` in the parent, `Runner` in the process itself.

Requests and replies are pickled. The process ends when its input does, so it never outlives its parent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.benchmarking import peers
from mobilevit.benchmarking.contenders import AMP_DTYPES, Contender
from mobilevit.card import ModelCard, default_classes
from mobilevit.errors import MobileViTError, one_line
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import export_graph
from mobilevit.exporting.images import parity_pixels
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import peak_memory
from mobilevit.models import MODELS
from mobilevit.models.mobilevit import MobileViTConfig
from mobilevit.results.base import Array
from mobilevit.runtime.artifact import artifact_files, read_sidecar
from mobilevit.runtime.engine import open_engine

_KEPT_ANSWERS = 4
_WARM_UP_MS = 1000.0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Some runs of a contender."""

    times_ms: list[float]
    memory: int
    """Most bytes that the process has held so far; 0 where the system does not say."""
    gpu_memory: int | None
    """Most bytes of tensors on the GPU so far, without the driver's share; None: there is no GPU."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A contender that is warmed up."""

    seconds: float
    """From loading to the first answer, compilation included."""
    weight_bytes: int
    """Size of the exported file, or of the weights in memory."""
    answers: list[Array]
    """Outputs for the first few images, to compare contenders by."""
    warm_up: Turn


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, or has ended; in one line."""


class Worker:
    """A worker process, seen from its parent."""

    def __init__(self, threads: int) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, see close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from mobilevit.benchmarking.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            # A group of its own, so that the processes of torch.compile end with it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.pid = self._process.pid

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of `Runner` there, and return its result.

        Raises:
            WorkerError: the method has failed, or the process has ended.
        """
        try:
            pickle.dump((method, arguments), self._requests)
            self._requests.flush()
            succeeded, result = pickle.load(self._replies)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise WorkerError(self._how_it_ended()) from None
        if not succeeded:
            raise WorkerError(result)
        return result

    def close(self) -> None:
        """End the process and all that it has started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._replies, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        how += ", perhaps out of memory" if how == "SIGKILL" else ""
        self._said.seek(0)
        words = [line.strip() for line in self._said if line.strip()]
        return f"its process ended ({how})" + (f": {words[-1][:200]}" if words else "")


def main() -> None:
    """Answer requests until the input ends, each with whether it succeeded, and the result or the error's message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what libraries print out of the replies
    runner = Runner()
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = True, getattr(runner, method)(*arguments)
        except (Exception, SystemExit) as error:  # ml-cvnets leaves the process when something is amiss
            words = one_line(error, 300)
            reply = False, words if isinstance(error, MobileViTError) else f"{type(error).__name__}: {words}"
        pickle.dump(reply, replies)
        replies.flush()


class Runner:
    """The methods that a worker offers. A run goes from prepared images to outputs, in the memory of the device."""

    def export(self, contender: Contender, folder: Path, name: str, calibration: Path | None) -> str:
        """Convert the network to the format of its engine; returns the file."""
        network = contender.network
        model, preprocessing = peers.build(network)
        report = export(
            model if network.origin == "mobilevit" else _Exportable(model, preprocessing),
            folder,
            format=contender.engine,
            precision=contender.precision,
            calibration=calibration,
            image_size=network.image_size,
            batch_size=contender.batch_size,
            verify=False,  # answers are compared with those of the other contenders
            name=name,
        )
        return str(report.path)

    def load(self, contender: Contender) -> Loaded:
        """Load a contender and run it until times have settled."""
        start = time.perf_counter()
        if contender.artifact is None:
            self._run, weight_bytes = _in_torch(contender)
        else:
            self._run, weight_bytes = _in_engine(contender, Path(contender.artifact))
        outputs = self._run()
        seconds = round(time.perf_counter() - start, 3)
        # Clocks rise, allocators learn sizes, CUDA graphs are captured.
        turn = self.time(2)
        while sum(turn.times_ms) < _WARM_UP_MS and len(turn.times_ms) < 200:
            turn.times_ms.extend(self.time(1).times_ms)
        parts = outputs if isinstance(outputs, tuple | list) else [outputs]
        arrays = [part.float().numpy(force=True) if isinstance(part, Tensor) else np.asarray(part) for part in parts]
        answers = [array[:_KEPT_ANSWERS] for array in arrays]
        return Loaded(seconds=seconds, weight_bytes=weight_bytes, answers=answers, warm_up=turn)

    def time(self, runs: int) -> Turn:
        """Time some runs, after one that is not counted: others have used the caches since the last turn.

        A single run is long, and caches matter little to it.
        """
        untimed = int(runs > 1)
        times = [timeit.timeit(self._run, number=1) * 1e3 for _ in range(untimed + runs)]
        gpu_memory = torch.cuda.max_memory_allocated() or None  # 0 without a GPU
        return Turn(times_ms=times[untimed:], memory=peak_memory() or 0, gpu_memory=gpu_memory)


def _in_torch(contender: Contender) -> tuple[Callable[[], object], int]:
    torch.set_num_threads(contender.threads)
    device = torch.device(contender.device)
    on_gpu = device.type == "cuda"
    model, preprocessing = peers.build(contender.network)
    layout = torch.channels_last
    if contender.network.origin == "mobilevit":
        model = export_graph(model, image_size=None)  # with the outputs of exported files
    elif not contender.network.channels_last:
        layout = torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    call: Callable[[Tensor], object] = model
    if contender.engine == "compile":
        # "max-autotune" captures CUDA graphs; on a CPU it takes minutes and gains little.
        call = torch.compile(model, mode="max-autotune" if on_gpu else "default")
    images = _images(contender, preprocessing).to(device).contiguous(memory_format=layout)
    dtype = AMP_DTYPES.get(contender.precision)

    def run() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            outputs = call(images)
        if on_gpu:
            torch.cuda.synchronize()
        return outputs

    return run, weight_bytes


def _in_engine(contender: Contender, path: Path) -> tuple[Callable[[], object], int]:
    artifact = read_sidecar(path)
    # The file may be trusted, as it was exported here.
    engine = open_engine(path, artifact, threads=contender.threads, device=contender.device, trust_pt2=True)
    images = np.ascontiguousarray(_images(contender, artifact.card.preprocessing).numpy())
    return lambda: engine.run(images), sum(part.stat().st_size for part in artifact_files(path))


def _images(contender: Contender, preprocessing: Preprocessing) -> Tensor:
    """Prepare photographs. Shape: (B, 3, H, W), float32."""
    pixels, _ = parity_pixels(None, preprocessing)
    images = torch.from_numpy(preprocessing.normalize(pixels[np.arange(contender.batch_size) % len(pixels)]))
    network = contender.network
    if network.origin in ("transformers", "cvnets") and isinstance(MODELS[network.architecture], MobileViTConfig):
        return images.flip(1)  # weights of the first MobileViT converted for these two expect BGR
    return images


class _Exportable(nn.Module):
    """A peer with the attributes that an export needs of a model."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            outputs = network(torch.zeros(1, 3, *preprocessing.size)).shape[1]
        self.card = ModelCard(
            name="peer", task="classification", classes=default_classes(outputs), preprocessing=preprocessing
        )
        self.backbone = SimpleNamespace(size_multiple=(1, 1))  # a peer itself says which sizes it takes

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits
