"""What runs in a process of its own: one contender, which is loaded, warmed up, and timed whenever it is asked to.

`python -m mobilevit.benchmarking.worker` reads requests from standard input, one line of JSON each, and answers each
with a line. It ends when its input does, so it outlives nobody who started it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit import factory
from mobilevit.benchmarking import peers
from mobilevit.benchmarking.contenders import Contender, Network, size_of
from mobilevit.card import ModelCard, card_of, default_classes
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.images import parity_pixels
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.inputs import normalize
from mobilevit.runtime.artifact import read_sidecar
from mobilevit.runtime.backends import open_backend
from mobilevit.weights.convert import convert_state_dict

KEPT_ANSWERS = 4
"""Images whose answers are handed over, to be compared with others'."""

_WARM_UP_SECONDS = 1.0
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then ends this process
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get among the replies
    serve(sys.stdin, replies)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer each line; an error is an answer, too."""
    ready: Ready | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                ready = Ready(Contender.from_dict(request["contender"]))
                answer = ready.warm_up(Path(request["answers"]))
            elif request["do"] == "export":
                answer = export_file(Contender.from_dict(request["contender"]), request)
            else:
                assert ready is not None
                answer = {"milliseconds": ready.time(request["runs"]), **ready.memory()}
        except (Exception, SystemExit) as error:  # ml-cvnets leaves the process when something is amiss
            answer = {"error": one_line(error)}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def one_line(error: BaseException) -> str:
    """What went wrong; with the kind of error, if nobody wrote the words for users."""
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}".removesuffix(": ")


def build(network: Network) -> tuple[nn.Module, Preprocessing]:
    """A network in eval mode, with the weights of its checkpoint; and how its images are prepared."""
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


def export_file(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """Convert a contender's network to its engine's format, in the folder `out`."""
    network = contender.network
    model, preprocessing = build(network)
    if network.origin != "mobilevit":
        model = Exportable(model, preprocessing)
    assert contender.format is not None
    report = export(
        model,
        request["out"],
        format=contender.format,
        precision=contender.precision,
        calibration=request["calibration"],
        image_size=network.image_size,
        batch_size=request["batch_size"],
        verify=False,  # answers are compared with those of the other contenders
        name=request["name"],
    )
    return {"path": str(report.path)}


class Exportable(nn.Module):
    """A peer with what an export asks of a model."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            outputs = network(torch.zeros(1, 3, *preprocessing.size)).shape[1]
        self.card = ModelCard(
            name="peer", task="classification", classes=default_classes(outputs), preprocessing=preprocessing
        )
        self.backbone = SimpleNamespace(size_multiple=(1, 1))  # a peer says itself what sizes it takes

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


class Ready:
    """A contender that can run: from a prepared input to outputs, both in the memory of its device.

    With a GPU, a run ends when the GPU has finished.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._start = time.perf_counter()
        self._on_gpu = contender.device.startswith("cuda")
        if contender.format is None:
            self.run, self.weight_bytes = self._in_torch()
        else:
            self.run, self.weight_bytes = self._in_a_runtime()

    def warm_up(self, answers: Path) -> dict[str, Any]:
        """Run until times have settled, and write the answers for a few images."""
        outputs = self.run()
        started = time.perf_counter() - self._start
        np.savez(answers, *(part[:KEPT_ANSWERS] for part in _arrays(outputs)))
        # Clocks rise, allocators learn sizes, CUDA graphs are captured.
        times = self.time(2)
        while sum(times) < _WARM_UP_SECONDS * 1e3 and len(times) < 200:
            times += self.time(1)
        return {
            "seconds": round(started, 3),
            "milliseconds": min(times),
            "weight_bytes": self.weight_bytes,
            **self.memory(),
        }

    def time(self, runs: int) -> list[float]:
        """Milliseconds of each run, after one that is not counted: others have had the caches since the last turn.

        A single run is long, and caches are little of it.
        """
        times: list[float] = []
        for counted in [False] * (runs > 1) + [True] * runs:
            if self._on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            self.run()
            if self._on_gpu:
                torch.cuda.synchronize()
            if counted:
                times.append((time.perf_counter() - start) * 1e3)
        return times

    def memory(self) -> dict[str, Any]:
        """Peaks since the start, in bytes; that of the GPU is of tensors, without the driver's share."""
        return {"memory": peak_memory(), "gpu_memory": torch.cuda.max_memory_allocated() if self._on_gpu else None}

    def _images(self, preprocessing: Preprocessing) -> Tensor:
        """Photographs, prepared. Shape: (B, 3, H, W), float32."""
        pixels, _ = parity_pixels(None, preprocessing)
        pixels = pixels[torch.arange(self.contender.batch_size) % len(pixels)]
        images = normalize(pixels, preprocessing)
        # The weights that came from ours were turned to the order of these two, which read images as BGR.
        return images.flip(1) if self.contender.network.origin in ("transformers", "cvnets") else images

    def _in_torch(self) -> tuple[Callable[[], Any], int]:
        contender, network = self.contender, self.contender.network
        torch.set_num_threads(contender.threads)
        device = torch.device(contender.device)
        model, preprocessing = build(network)
        layout = torch.contiguous_format
        if network.origin == "mobilevit":
            model = ExportGraph(model, image_size=None).eval()  # the same outputs as of exported files
            layout = torch.channels_last
        elif network.channels_last:
            layout = torch.channels_last
            model = model.to(memory_format=layout)
        model = model.to(device)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        # "max-autotune" captures CUDA graphs; on a CPU it takes minutes for little.
        call: Any = model
        if contender.engine == "compile":
            call = torch.compile(model, mode="max-autotune" if self._on_gpu else "default")
        images = self._images(preprocessing).to(device).contiguous(memory_format=layout)
        precision = _AMP.get(contender.precision)

        def run() -> Any:
            amp = torch.autocast(device.type, dtype=precision, enabled=precision is not None)
            with torch.inference_mode(), amp:
                return call(images)

        return run, weight_bytes

    def _in_a_runtime(self) -> tuple[Callable[[], Any], int]:
        contender = self.contender
        assert contender.artifact is not None
        artifact = read_sidecar(Path(contender.artifact))
        backend = open_backend(Path(contender.artifact), artifact, threads=contender.threads, device=contender.device)
        images = np.ascontiguousarray(self._images(artifact.card.preprocessing).numpy())
        return lambda: backend.run(images), size_of(contender.artifact)


def _arrays(outputs: Any) -> Iterator[NDArray[Any]]:
    """Of a tensor, a tuple of them, or arrays."""
    if isinstance(outputs, Tensor):
        yield outputs.float().numpy(force=True)
    elif isinstance(outputs, np.ndarray):
        yield outputs
    else:
        yield from itertools.chain.from_iterable(map(_arrays, outputs))


def peak_memory() -> int:
    """Most memory this process has held, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started this process
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
