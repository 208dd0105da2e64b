"""Inference on the CPU in each engine, ours against timm in the same engine and precision: interleaved, medians.

python benchmarks/engines.py

Ours is run as the package's sessions can run it: several pictures go a few at a time (`CHUNKS`) through as many
streams as there are threads, one thread each. timm is run as its users run it, one batch through all threads, and
for honesty also in streams of the same chunks. What `--seconds` leaves no time for is named in the result.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from torch import nn

import mobilevit
import record
from mobilevit.benchmark import peers

Array = NDArray[Any]
Run = Callable[[], Array]

CHUNKS = {"onnx": (1,), "openvino f32": (1,), "openvino bf16": (1, 4)}
"""Pictures in one run of a stream, all that are tried. What one layer leaves in the cache is then still there for the
next; where little has to move (XXS in bf16), what each call costs weighs more."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference from eager float32 that we allow ourselves, as a share of the largest logit where that is > 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs", "mobilevit_s"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--seconds", type=int, default=520, help="stop after this long, with what there is by then")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"unit": "milliseconds for the batch, median of rounds"}
    figures: dict[str, Any] = result.setdefault("figures", {})
    left_out = [
        (engine, name, batch)
        for engine in arguments.engines
        for name in arguments.models
        for batch in arguments.batches
    ]
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(arguments.seconds)
    try:
        result["limits"] = limits()
        print(result["limits"], flush=True)
        while left_out:  # the slowest to prepare comes last
            engine, name, batch = left_out[0]
            figures[f"{name} batch {batch} {engine}"] = compare(
                engine, name, batch, arguments.rounds, arguments.threads
            )
            left_out.pop(0)
    except TimeoutError:
        print("out of time", flush=True)
    finally:
        signal.alarm(0)
    result["left_out"] = [f"{name} batch {batch} {engine}" for engine, name, batch in left_out]
    record.write("engines", result)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError


def limits() -> dict[str, float]:
    """The machine's own: matrix products of a size that suits its caches, and copying what no cache holds."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.rand(1024, 1024).to(dtype) for _ in range(2))
        seconds = min(_seconds(lambda a=a, b=b: a @ b) for _ in range(20))  # type: ignore[misc]
        found[f"gemm_{dtype}_gflops".replace("torch.", "")] = round(2 * 1024**3 / seconds / 1e9, 1)
    source = torch.rand(2**26)  # 256 MiB
    target = torch.empty_like(source)
    seconds = min(_seconds(lambda: target.copy_(source)) for _ in range(8))
    found["copy_gb_per_s"] = round(2 * source.numel() * 4 / seconds / 1e9, 1)
    return found


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(engine: str, name: str, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    precision = "bfloat16" if engine.endswith("bf16") else "float32"
    model = mobilevit.fuse(mobilevit.create_model(name))
    timm = peers.timm_model(name).eval()
    x = torch.rand(batch, 3, 256, 256)
    with torch.inference_mode():
        expected = model(x).numpy()
    sides = ENGINES[engine](model, timm, x, threads)
    for side, run in sides.items():
        if side.startswith("mobilevit"):
            error = float(abs(run() - expected).max())
            assert error <= TOLERANCE[precision] * max(1, abs(expected).max()), (engine, name, side, error)
    times = interleaved(sides, rounds)
    median = {side: round(statistics.median(t), 2) for side, t in times.items()}
    ours = min(value for side, value in median.items() if side.startswith("mobilevit"))
    ratios = {f"faster than {side}": round(value / ours, 2) for side, value in median.items() if side.startswith("t")}
    print(name, "batch", batch, engine, median, ratios, flush=True)
    spread = {side: [round(min(t), 2), round(max(t), 2)] for side, t in times.items()}
    return {"milliseconds": median, "spread": spread, "best of ours is": ratios}


def interleaved(sides: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side in each round; a turn lasts a tenth of a second, or one run."""
    repeats = {}
    for side, run in sides.items():
        run()
        repeats[side] = max(1, int(0.1 / min(_seconds(run) for _ in range(2))))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.perf_counter()
            for _ in range(repeats[side]):
                run()
            times[side].append((time.perf_counter() - start) / repeats[side] * 1e3)
    return times


def eager(model: nn.Module, timm: nn.Module, x: torch.Tensor, _threads: int) -> dict[str, Run]:
    channels_last = x.contiguous(memory_format=torch.channels_last)
    other = peers.timm_model(timm.default_cfg["architecture"]).eval().to(memory_format=torch.channels_last)
    sides = {
        "timm": _torch(timm, x),
        "timm channels_last": _torch(other, channels_last),
        "mobilevit": _torch(model, channels_last),
    }
    if len(x) == 1:  # ten times slower
        sides["transformers"] = _torch(peers.transformers_model(timm.default_cfg["architecture"]).eval(), x)
    return sides


def compiled(model: nn.Module, timm: nn.Module, x: torch.Tensor, _threads: int) -> dict[str, Run]:
    torch.compiler.reset()
    channels_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "timm": _torch(torch.compile(timm), x, amp=True),
        "mobilevit": _torch(torch.compile(model), channels_last, amp=True),
    }


def _torch(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, amp: bool = False) -> Run:
    def run() -> Array:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            return network(x).float().numpy()

    return run


def onnx(model: nn.Module, timm: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Run]:
    pictures = x.numpy()
    sides = {
        "timm": _onnx_run(_onnx_session(onnx_file(timm, len(x)), threads), pictures),
        "mobilevit": _onnx_run(_onnx_session(onnx_file(model, len(x)), threads, plain_norms=True), pictures),
    }
    if len(x) > 1:
        for chunk in CHUNKS["onnx"]:
            parts = _chunks(pictures, chunk)
            theirs = _onnx_session(onnx_file(timm, chunk), 1)
            ours = _onnx_session(onnx_file(model, chunk), 1, plain_norms=True)
            sides[f"timm in streams of {chunk}"] = _onnx_streams(theirs, parts, threads)
            sides[f"mobilevit in streams of {chunk}"] = _onnx_streams(ours, parts, threads)
    return sides


def onnx_file(model: nn.Module, batch: int) -> bytes:
    exported = torch.onnx.export(model, (torch.rand(batch, 3, 256, 256),), dynamo=True, opset_version=18, verbose=False)
    assert exported is not None
    return exported.model_proto.SerializeToString()


def _onnx_session(file: bytes, threads: int, *, plain_norms: bool = False) -> onnxruntime.InferenceSession:
    """`plain_norms`: leave additions apart from the LayerNorms after them, which ONNX Runtime does faster in turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    disabled = ["SkipLayerNormFusion"] if plain_norms else []
    return onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)


def _onnx_run(session: onnxruntime.InferenceSession, pictures: Array) -> Run:
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: pictures})[0]


def _chunks(pictures: Array, size: int) -> list[Array]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def _onnx_streams(session: onnxruntime.InferenceSession, parts: list[Array], streams: int) -> Run:
    name = session.get_inputs()[0].name
    pool = ThreadPoolExecutor(streams)
    return lambda: np.concatenate(list(pool.map(lambda part: session.run(None, {name: part})[0], parts)))


def openvino_f32(model: nn.Module, timm: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Run]:
    return _openvino(model, timm, x, threads, "f32")


def openvino_bf16(model: nn.Module, timm: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Run]:
    return _openvino(model, timm, x, threads, "bf16")


def _openvino(model: nn.Module, timm: nn.Module, x: torch.Tensor, threads: int, precision: str) -> dict[str, Run]:
    pictures, core = x.numpy(), openvino.Core()
    with torch.no_grad():
        direct = openvino.convert_model(torch.export.export(timm, (x,), strict=False))
    files = {"timm": direct, "timm by ONNX": _read(core, timm, len(x)), "mobilevit": _read(core, model, len(x))}
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    sides = {side: _openvino_run(core.compile_model(f, "CPU", settings), pictures) for side, f in files.items()}
    if len(x) > 1:
        settings["NUM_STREAMS"] = threads
        for chunk, (origin, network) in itertools.product(
            CHUNKS[f"openvino {precision}"], (("timm", timm), ("mobilevit", model))
        ):
            engine = core.compile_model(_read(core, network, chunk), "CPU", settings)
            sides[f"{origin} in streams of {chunk}"] = _openvino_streams(engine, _chunks(pictures, chunk), threads)
    return sides


def _read(core: openvino.Core, model: nn.Module, batch: int) -> openvino.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(onnx_file(model, batch))
        return core.read_model(path)


def _openvino_run(engine: openvino.CompiledModel, pictures: Array) -> Run:
    request = engine.create_infer_request()

    def run() -> Array:
        request.infer({0: pictures}, share_inputs=True)
        return np.array(request.output_tensors[0].data)

    return run


def _openvino_streams(engine: openvino.CompiledModel, parts: list[Array], streams: int) -> Run:
    queue = openvino.AsyncInferQueue(engine, streams)
    found: dict[int, Array] = {}

    def keep(request: Any, place: int) -> None:
        found[place] = np.array(request.output_tensors[0].data)

    queue.set_callback(keep)

    def run() -> Array:
        for place, part in enumerate(parts):
            queue.start_async({0: part}, place, share_inputs=True)
        queue.wait_all()
        return np.concatenate([found[place] for place in range(len(parts))])

    return run


ENGINES: dict[str, Callable[[nn.Module, nn.Module, torch.Tensor, int], dict[str, Run]]] = {
    "eager": eager,
    "onnx": onnx,
    "openvino f32": openvino_f32,
    "openvino bf16": openvino_bf16,
    "compile bf16": compiled,
}
"""By name, in the order of measuring; "timm" with every engine is what its user gets."""


if __name__ == "__main__":
    main()
