"""Inference on the CPU in each engine, ours against timm in the same engine and precision: in turns, medians.

python benchmarks/engines.py

Each side has a process of its own, as a user's program has: what one engine's threads do while they wait slows others.
Ours is run as the package's sessions can run it: several images go a few at a time (`CHUNKS`) through as many streams
as there are threads, one thread each. timm is run as its users run it, one batch through all threads, and for honesty
also in streams of the same chunks, and in OpenVINO by way of ONNX as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray

import mobilevit
import record
from mobilevit.benchmarking import peers
from mobilevit.card import card_of
from mobilevit.exporting.graph import Plan, export_graph
from mobilevit.exporting.onnx import to_proto
from mobilevit.models import Model
from mobilevit.runtime.artifact import Artifact

Array = NDArray[Any]
Run = Callable[[], Array]

ENGINES = ("eager", "onnx", "openvino f32", "openvino bf16", "compile bf16")

CHUNKS = {"onnx": (1,), "openvino f32": (1,), "openvino bf16": (1, 4)}
"""Images in one run of a stream, all that are tried. What one layer leaves in the cache is then still there for the
next; where little has to move (XXS in bf16), what each call costs weighs more."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference from eager float32 that we allow ourselves, as a share of the largest logit where that is > 1."""

TURN_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs", "mobilevit_s"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = record.RESULTS / "engines.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"hardware": {}, "figures": {}}
    here = before["hardware"].get("processor") == record.processor()
    figures = before["figures"] if here else {}  # those of other machines do not belong beside
    measured = limits()
    print(measured, flush=True)
    for engine in arguments.engines:
        for name in arguments.models:
            for batch in arguments.batches:
                case = Case(engine=engine, model=name, batch=batch, threads=arguments.threads)
                figures[f"{name} batch {batch} {engine}"] = compare(case, arguments.rounds)
    unit = "milliseconds for the batch, median of rounds"
    record.write("engines", {"unit": unit, "figures": figures, "limits": measured})


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


# -- sides in turns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table of the result."""

    engine: str
    model: str
    batch: int
    threads: int

    def sides(self) -> list[str]:
        """What is compared: an origin, and perhaps how it is run."""
        if self.engine == "eager":
            slow = ["transformers"] if self.batch == 1 else []
            return ["timm", "timm channels_last", "mobilevit", *slow]
        if self.engine.startswith("compile"):
            return ["timm", "mobilevit"]
        sides = ["timm", "mobilevit"]
        if self.engine.startswith("openvino"):
            sides.insert(1, "timm by ONNX")
        if self.batch > 1:
            sides += [f"{who} in streams of {n}" for n in CHUNKS[self.engine] for who in ("timm", "mobilevit")]
        return sides


def compare(case: Case, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[float]] = {side: [] for side in case.sides()}
    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        for side in times:
            pipe, its_pipe = context.Pipe()
            process = context.Process(target=serve, args=(case, side, its_pipe), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.enter_context(closing(pipe))
            stack.callback(pipe.send, 0)
            pipes[side] = pipe
            if pipe.recv() != "ready":
                process.terminate()
                raise SystemExit(f"{case}, {side}: could not be measured")
        for _ in range(rounds):
            for side, pipe in pipes.items():
                pipe.send(1)
                times[side].append(pipe.recv())
    median = {side: round(statistics.median(t), 2) for side, t in times.items()}
    ours = min(value for side, value in median.items() if side.startswith("mobilevit"))
    ratios = {f"faster than {side}": round(value / ours, 2) for side, value in median.items() if side.startswith("t")}
    print(case.model, "batch", case.batch, case.engine, median, ratios, flush=True)
    spread = {side: [round(min(t), 2), round(max(t), 2)] for side, t in times.items()}
    return {"milliseconds": median, "spread": spread, "best of ours is": ratios}


def serve(case: Case, side: str, pipe: Connection) -> None:
    """The life of a side: get ready, and take a turn whenever asked for one."""
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        x = torch.rand(case.batch, 3, 256, 256)
        run = prepare(case, side, x)
        found = run()
        if side.startswith("mobilevit"):
            with torch.inference_mode():
                expected = ours(case.model)(x).numpy()
            allowed = TOLERANCE["bfloat16" if case.engine.endswith("bf16") else "float32"]
            error = float(abs(found - expected).max())
            assert error <= allowed * max(1, abs(expected).max()), (case, side, error)
        repeats = max(1, int(TURN_SECONDS / min(_seconds(run) for _ in range(4))))
        pipe.send("ready")
    except Exception:
        traceback.print_exc()
        pipe.send("failed")
        return
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        pipe.send((time.perf_counter() - start) / repeats * 1e3)


# -- what a side runs -------------------------------------------------------------------------------------------------


def built(name: str) -> Model:
    """Ours before `fuse`; the peers get its weights."""
    torch.manual_seed(1)
    return mobilevit.create_model(name)


def ours(name: str) -> Model:
    return mobilevit.fuse(built(name))


def prepare(case: Case, side: str, x: torch.Tensor) -> Run:
    who = side.split(" ")[0]
    if case.engine == "eager" or case.engine.startswith("compile"):
        return in_pytorch(case, who, x, channels_last="channels_last" in side)
    chunk = int(side.rpartition(" ")[2]) if "streams" in side else case.batch
    if case.engine == "onnx":
        return in_onnx_runtime(case, who, x.numpy(), chunk)
    return in_openvino(case, who, x.numpy(), chunk, direct=side == "timm")


def in_pytorch(case: Case, who: str, x: torch.Tensor, *, channels_last: bool) -> Run:
    amp = case.engine.endswith("bf16")
    if who == "mobilevit":
        model, channels_last = ours(case.model), True
    else:
        model = peers.peer_of(built(case.model), who)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    network: Any = torch.compile(model) if case.engine.startswith("compile") else model

    def run() -> Array:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            return network(x).float().numpy()

    return run


def onnx_file(name: str, who: str, batch: int, *, stepwise: bool = True) -> bytes:
    """Ours as the package exports it, timm's as PyTorch does."""
    if who == "mobilevit":
        model = ours(name)
        graph = export_graph(model, image_size=(256, 256))
        artifact = Artifact(
            format="onnx",
            precision="fp32",
            card=card_of(model),
            batch_size=batch,
            image_size=(256, 256),
            baked=False,
            outputs=graph.output_names,
        )
        plan = Plan(graph=graph, artifact=artifact, example=graph.example(batch, (256, 256)))
        return to_proto(plan, stepwise=stepwise).SerializeToString()
    example = (torch.rand(batch, 3, 256, 256),)
    exported = torch.onnx.export(
        peers.peer_of(built(name), "timm"), example, dynamo=True, opset_version=18, verbose=False
    )
    assert exported is not None
    return exported.model_proto.SerializeToString()


def in_onnx_runtime(case: Case, who: str, images: Array, chunk: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads if chunk == case.batch else 1
    options.log_severity_level = 3
    # As in the package: LayerNorm apart from the sum before it is faster than both as one.
    disabled = ["SkipLayerNormFusion"] if who == "mobilevit" else []
    file = onnx_file(case.model, who, chunk)
    session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)
    name = session.get_inputs()[0].name
    if chunk == case.batch:
        return lambda: session.run(None, {name: images})[0]
    pool = ThreadPoolExecutor(case.threads)
    parts = _parts(images, chunk)
    return lambda: np.concatenate(list(pool.map(lambda part: session.run(None, {name: part})[0], parts)))


def _parts(images: Array, size: int) -> list[Array]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def in_openvino(case: Case, who: str, images: Array, chunk: int, *, direct: bool) -> Run:
    core = openvino.Core()
    if direct:
        with torch.no_grad():
            program = torch.export.export(peers.peer_of(built(case.model), "timm"), (torch.from_numpy(images),))
            model = openvino.convert_model(program)
    else:
        model = core.read_model(onnx_file(case.model, who, chunk, stepwise=not case.engine.endswith("bf16")))
    settings = {
        "INFERENCE_PRECISION_HINT": case.engine.split(" ")[1],
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1 if chunk == case.batch else case.threads,
    }
    engine = core.compile_model(model, "CPU", settings)
    if chunk == case.batch:
        request = engine.create_infer_request()

        def run() -> Array:
            request.infer({0: images}, share_inputs=True)
            return np.array(request.output_tensors[0].data)

        return run
    queue = openvino.AsyncInferQueue(engine, case.threads)
    found: dict[int, Array] = {}

    def keep(request: Any, place: int) -> None:
        found[place] = np.array(request.output_tensors[0].data)

    queue.set_callback(keep)
    parts = _parts(images, chunk)

    def run_all() -> Array:
        for place, part in enumerate(parts):
            queue.start_async({0: part}, place, share_inputs=True)
        queue.wait_all()
        return np.concatenate([found[place] for place in range(len(parts))])

    return run_all


if __name__ == "__main__":
    main()
