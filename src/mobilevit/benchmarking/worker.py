"""The process of one contender: it exports or loads a network, warms it up, and times runs when asked.

`mobilevit.benchmarking.rounds.Worker` starts it and sends requests on its standard input: pickled pairs of a method of
`Runner` and arguments. The process ends when its input does, so it never outlives its parent.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit import factory
from mobilevit.benchmarking import peers
from mobilevit.benchmarking.contenders import Contender, Network
from mobilevit.card import ModelCard, card_of, default_classes
from mobilevit.errors import MobileViTError, one_line
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import export_graph
from mobilevit.exporting.images import parity_pixels
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import peak_memory
from mobilevit.runtime.artifact import artifact_files, read_sidecar
from mobilevit.runtime.engine import open_engine
from mobilevit.weights.convert import convert_state_dict

Array = NDArray[np.generic]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

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


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps what libraries print out of the replies
    serve(sys.stdin.buffer, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each request with a pair: whether it succeeded, and the result or the message of the error."""
    runner = Runner()
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = True, getattr(runner, method)(*arguments)
        except (Exception, SystemExit) as error:  # ml-cvnets leaves the process when something is amiss
            words = one_line(error, 300)
            reply = False, words if isinstance(error, MobileViTError) else f"{type(error).__name__}: {words}"
        pickle.dump(reply, replies)
        replies.flush()


def build(network: Network) -> tuple[nn.Module, Preprocessing]:
    """Build a network in eval mode with the weights of its checkpoint, and the preprocessing of its images."""
    preprocessing = Preprocessing(size=network.image_size)
    if network.checkpoint is None:
        return peers.timm_model(network.architecture).eval(), preprocessing
    ours = factory.load(network.checkpoint)
    card = card_of(ours)
    preprocessing = Preprocessing.from_dict(card.preprocessing.to_dict() | {"size": network.image_size})
    if network.origin == "mobilevit":
        return ours, preprocessing
    make: dict[str, Callable[[], nn.Module]] = {
        "timm": lambda: peers.timm_model(card.name, len(card.classes)),
        "transformers": lambda: peers.transformers_model(card.name, len(card.classes)),
        "cvnets": lambda: peers.cvnets_model(card.name, network.clone or "", len(card.classes)),
    }
    peer = make[network.origin]().eval()
    peers.load_weights(peer, convert_state_dict(ours.state_dict(), to=network.origin))
    return peer, preprocessing


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


class Runner:
    """The methods that a worker offers. A run goes from prepared images to outputs, in the memory of the device."""

    def export(self, contender: Contender, folder: Path, name: str, calibration: Path | None) -> str:
        """Convert the network to the format of its engine; returns the file."""
        network = contender.network
        model, preprocessing = build(network)
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
        self._contender, self._on_gpu = contender, contender.device.startswith("cuda")
        if contender.artifact is None:
            self._run, weight_bytes = self._in_torch()
        else:
            self._run, weight_bytes = self._in_engine(Path(contender.artifact))
        outputs = self._run()
        seconds = round(time.perf_counter() - start, 3)
        # Clocks rise, allocators learn sizes, CUDA graphs are captured.
        turn = self.time(2)
        times = turn.times_ms
        while sum(times) < _WARM_UP_MS and len(times) < 200:
            times += self.time(1).times_ms
        answers = [part[:_KEPT_ANSWERS] for part in _arrays(outputs)]
        return Loaded(seconds=seconds, weight_bytes=weight_bytes, answers=answers, warm_up=turn)

    def time(self, runs: int) -> Turn:
        """Time some runs, after one that is not counted: others have used the caches since the last turn.

        A single run is long, and caches matter little to it.
        """
        times: list[float] = []
        for counted in [False] * (runs > 1) + [True] * runs:
            start = self._now()
            self._run()
            if counted:
                times.append((self._now() - start) * 1e3)
        gpu_memory = torch.cuda.max_memory_allocated() if self._on_gpu else None
        return Turn(times_ms=times, memory=peak_memory() or 0, gpu_memory=gpu_memory)

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _images(self, preprocessing: Preprocessing) -> Tensor:
        """Prepare photographs. Shape: (B, 3, H, W), float32."""
        pixels, _ = parity_pixels(None, preprocessing)
        images = torch.from_numpy(preprocessing.normalize(pixels[np.arange(self._contender.batch_size) % len(pixels)]))
        # Weights converted for these two expect BGR.
        return images.flip(1) if self._contender.network.origin in ("transformers", "cvnets") else images

    def _in_torch(self) -> tuple[Callable[[], object], int]:
        contender, network = self._contender, self._contender.network
        torch.set_num_threads(contender.threads)
        device = torch.device(contender.device)
        model, preprocessing = build(network)
        layout = torch.contiguous_format
        if network.origin == "mobilevit":
            model = export_graph(model, image_size=None)  # with the outputs of exported files
            layout = torch.channels_last
        elif network.channels_last:
            layout = torch.channels_last
            model = model.to(memory_format=layout)
        model = model.to(device)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        call: Callable[[Tensor], object] = model
        if contender.engine == "compile":
            # "max-autotune" captures CUDA graphs; on a CPU it takes minutes and gains little.
            call = torch.compile(model, mode="max-autotune" if self._on_gpu else "default")
        images = self._images(preprocessing).to(device).contiguous(memory_format=layout)
        dtype = AMP_DTYPES.get(contender.precision)

        def run() -> object:
            with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return call(images)

        return run, weight_bytes

    def _in_engine(self, path: Path) -> tuple[Callable[[], object], int]:
        artifact = read_sidecar(path)
        threads, device = self._contender.threads, self._contender.device
        engine = open_engine(path, artifact, threads=threads, device=device, trust_pt2=True)  # it was exported here
        images = np.ascontiguousarray(self._images(artifact.card.preprocessing).numpy())
        return lambda: engine.run(images), sum(part.stat().st_size for part in artifact_files(path))


def _arrays(outputs: object) -> Iterator[Array]:
    """List the arrays in a tensor, an array, or a tuple or list of them."""
    if isinstance(outputs, Tensor):
        yield outputs.float().numpy(force=True)
    elif isinstance(outputs, np.ndarray):
        yield outputs
    else:
        assert isinstance(outputs, tuple | list)
        yield from itertools.chain.from_iterable(map(_arrays, outputs))
