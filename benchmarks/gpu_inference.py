"""Inference on a GPU: this package beside timm, each eager, compiled and as a CUDA graph, with what bounds both.

    python benchmarks/gpu_inference.py                                   # an H100-class GPU: about five minutes
    python benchmarks/gpu_inference.py --models mobilevit_s --seconds 120
    python benchmarks/gpu_inference.py --device cpu --precisions fp32 --batch 2 --size 64 --backend aot_eager  # a trial

Rounds are interleaved; figures are images a second from the median round. timm's model has the weights of ours, which
are random, and every side's answers are compared with float32's. The result file is written after every case, the most
important case first.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mobilevit
import record
from mobilevit.benchmarking import peers
from padded_heads import pad_heads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Run = Callable[[], torch.Tensor]

KINDS = (
    ("normalization or reduction", r"^triton_(red|per)_"),
    ("matrix product", r"^triton_tem_"),
    ("layout or copy", r"^triton_poi_fused_(cat|clone)_\d|nchwtonhwc|nhwctonchw"),
    ("pointwise", r"^triton_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("depthwise convolution", r"depthwise|_c1_k1_|grouped_direct"),
    ("convolution", r"fprop|dgrad|wgrad|implicit|conv|winograd|cudnn"),
    ("matrix product", r"gemm|nvjet|cublas|cutlass|wgmma|addmm|\bmm\b"),
    ("layout or copy", r"memcpy|memset|copy|transpose|catarray"),
    ("normalization or reduction", r"norm|reduce|mean|softmax"),
    ("pointwise", r"elementwise|silu|add|mul"),
)
"""What a kernel does, by its name; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table of the result."""

    model: str
    precision: str
    batch: int
    size: int
    mode: str = "default"
    """Of torch.compile; CUDA graphs are captured here, whatever it is."""

    @property
    def name(self) -> str:
        """Key in the result file."""
        mode = "" if self.mode == "default" else f", {self.mode}"
        return f"{self.model}, {self.precision}, batch {self.batch}{mode}"

    def sides(self, on_gpu: bool) -> list[str]:
        """Origin and layout, how it runs, and whether as a graph; in the order in which they are prepared."""
        compiled = ["timm channels_last, compiled", "mobilevit fused, compiled", "timm contiguous, compiled"]
        if self.mode == "default":
            eager = ["timm channels_last", "timm contiguous", "mobilevit", "mobilevit fused"]
            sides = [*(f"{origin}, eager" for origin in eager), *compiled, "mobilevit padded, compiled"]
        else:
            sides = compiled
        graphs = [f"{side}, graph" for side in sides if "compiled" in side or side.startswith("mobilevit fused")]
        return sides + (graphs if on_gpu else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilevit_s", "mobilevit_xxs", "mobilevitv2_100"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256, help="of the large batch; a batch of one is measured, too")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after so many")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache, measure nothing")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    found: dict[str, Any] = {"unit": "images a second, median of rounds", "size": arguments.size, "cases": {}}
    if not arguments.compile_only:
        found["limits"] = limits(device, arguments.precisions)
        print(found["limits"], flush=True)
    for case in cases(arguments):
        if time.monotonic() > end:
            print(f"{case.name}: no time left", flush=True)
            continue
        if (figures := compare(case, device, arguments, end)) is not None:
            found["cases"][case.name] = figures | against(case, figures, found["limits"], device)
            print_case(case, found["cases"][case.name])
            record.write("gpu_inference", found, arguments.out)
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The most important first."""
    models = [name for name in arguments.models if name in mobilevit.list_models()]
    first = [name for name in models if "v2" not in name]
    second = [name for name in models if "v2" in name]
    main, *others = arguments.precisions
    order = [
        *((name, main, arguments.batch) for name in first),
        *((name, main, 1) for name in first),
        *((name, main, arguments.batch) for name in second),
        *((name, precision, arguments.batch) for precision in others for name in first),
        *((name, main, 1) for name in second),
    ]
    for name, precision, batch in dict.fromkeys(order):
        yield Case(model=name, precision=precision, batch=batch, size=arguments.size)
    # Not beside others, whose load would mislead the choice between kernels.
    if arguments.backend == "inductor" and not arguments.compile_only:
        for name in first:
            yield Case(
                model=name,
                precision=main,
                batch=arguments.batch,
                size=arguments.size,
                mode="max-autotune-no-cudagraphs",
            )


# -- sides in turns ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(case: Case, device: torch.device, arguments: argparse.Namespace, end: float) -> dict[str, Any] | None:
    """Speed and error of each side; None where there was only to compile."""
    networks = networks_of(case, device)
    images = torch.rand(case.batch, 3, case.size, case.size, device=device)
    wanted = networks["mobilevit"](images).double()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    for side in case.sides(device.type == "cuda" and not arguments.compile_only):
        if arguments.compile_only and "compiled" not in side:
            continue
        base = side.removesuffix(", graph")
        if side != base and base not in runs:
            continue
        if time.monotonic() > end:
            failed[side] = "no time left"
            continue
        try:
            run = captured(runs[base]) if side != base else prepare(side, networks, case, images, arguments.backend)
            for _ in range(3):
                answers = run()
            errors[side] = float((answers.double() - wanted).norm() / wanted.norm())
        except Exception as error:  # the others go on; the reason is in the result
            failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{case.name}: {side}: {failed[side]}", flush=True)
            continue
        runs[side] = run
    if arguments.compile_only or not runs:
        return None
    times = in_turns(runs, device, arguments.rounds)
    return figures_of(case, times, errors, failed) | {"profile": profile(runs, times, device)}


def networks_of(case: Case, device: torch.device) -> dict[str, nn.Module]:
    """All with the same weights, in float32."""
    torch.manual_seed(0)
    ours = mobilevit.create_model(case.model).eval()
    timms = peers.peer_of(ours, "timm")
    fused = mobilevit.fuse(ours)
    networks = {"mobilevit": ours, "mobilevit fused": fused, "mobilevit padded": pad_heads(fused)}
    networks |= {f"timm {layout}": timms for layout in LAYOUTS}
    return {name: copy.deepcopy(network).to(device) for name, network in networks.items()}


def prepare(side: str, networks: dict[str, nn.Module], case: Case, images: torch.Tensor, backend: str) -> Run:
    origin, how = side.split(", ")
    layout = LAYOUTS[origin.removeprefix("timm ")] if origin.startswith("timm") else torch.channels_last
    dtype = DTYPES[case.precision]
    network: Any = copy.deepcopy(networks[origin]).to(dtype).to(memory_format=layout)
    given = images.to(dtype).contiguous(memory_format=layout)
    if how == "compiled":
        mode = {"mode": case.mode} if backend == "inductor" else {}
        network = torch.compile(network, dynamic=False, backend=backend, **mode)
    return lambda: network(given)


def captured(run: Run) -> Run:
    """The same as one CUDA graph: no work for the host but to start it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return answers

    return replay


def in_turns(runs: dict[str, Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of one run: every side in every round, as often as takes some milliseconds."""
    repeats = {side: min(50, max(1, math.ceil(0.03 / seconds(run, device, 1)))) for side, run in runs.items()}
    times: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(rounds):
        for side, run in runs.items():
            times[side].append(seconds(run, device, repeats[side] if device.type == "cuda" else 1))
    return times


def seconds(run: Run, device: torch.device, repeats: int) -> float:
    """Of one run, from several in a row, as a server has them."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    finish.record()
    finish.synchronize()
    return begin.elapsed_time(finish) / 1e3 / repeats


def figures_of(
    case: Case, times: dict[str, list[float]], errors: dict[str, float], failed: dict[str, str]
) -> dict[str, Any]:
    speed = {side: case.batch / statistics.median(spent) for side, spent in times.items()}
    best = {
        origin: max((side for side in speed if side.startswith(origin)), key=speed.__getitem__, default=None)
        for origin in ("timm", "mobilevit")
    }
    told = {
        "images_per_second": {side: round(value, 1) for side, value in speed.items()},
        "spread_ms": {side: [round(min(t) * 1e3, 4), round(max(t) * 1e3, 4)] for side, t in times.items()},
        "error": {side: float(f"{value:.2e}") for side, value in errors.items()},
        "failed": failed,
        "best": best,
    }
    ours, theirs = best["mobilevit"], best["timm"]
    return told | ({"ratio": round(speed[ours] / speed[theirs], 3)} if ours and theirs else {})


# -- limits -----------------------------------------------------------------------------------------------------------


def limits(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """The device's own: large matrix products, and copying what no cache holds; bytes count read and written."""
    on_gpu = device.type == "cuda"
    side, count = (8192, 2**30) if on_gpu else (256, 2**24)
    found = {}
    for name in precisions:
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[name]) for _ in range(2))
        found[f"gemm_{name}_tflops"] = round(2 * side**3 / fastest(lambda a=a, b=b: a @ b, device) / 1e12, 3)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_second"] = round(2 * count / fastest(lambda: target.copy_(source), device) / 1e9, 1)
    return found


def fastest(run: Run, device: torch.device) -> float:
    return min(seconds(run, device, 5) for _ in range(6))


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, weights included."""

    KERNELS = ("convolution", "mm", "addmm", "bmm", "scaled_dot_product", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        """By every operation by itself, as eager mode runs them."""
        self.least = 0
        """By convolutions, matrix products and attention alone, as if all else were part of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs, outputs = (
            {t.untyped_storage().data_ptr(): t.nbytes for t in tree_tensors(tree)} for tree in (args, output)
        )
        writes = func._schema.is_mutable or not outputs.keys() <= inputs.keys()  # a view does nothing
        if writes and outputs:
            moved = sum(inputs.values()) + sum(outputs.values())
            self.all += moved
            self.least += moved if any(word in func.__name__ for word in self.KERNELS) else 0
        return output


def tree_tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf


@torch.inference_mode()
def against(case: Case, figures: dict[str, Any], limits: dict[str, float], device: torch.device) -> dict[str, Any]:
    """What one image takes of the fused model, and how many a second the limits would allow."""
    model = mobilevit.fuse(mobilevit.create_model(case.model)).to(device, DTYPES[case.precision])
    batch = min(case.batch, 8)
    images = torch.rand(batch, 3, case.size, case.size, device=device, dtype=DTYPES[case.precision])
    with FlopCounterMode(display=False) as operations:
        model(images)
    with Traffic() as traffic:
        model(images)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A larger batch reads the weights once for more images.
    saved = weights / batch - weights / case.batch
    flops = operations.get_total_flops() / batch
    rate, bandwidth = limits[f"gemm_{case.precision}_tflops"] * 1e12, limits["copy_gb_per_second"] * 1e9
    moved = {"eager": traffic.all / batch - saved, "least": traffic.least / batch - saved}
    bounds = {name: min(bandwidth / count, rate / flops) for name, count in moved.items()}
    ours = figures["best"]["mobilevit"]
    speed = figures["images_per_second"][ours] if ours else 0.0
    return {
        "an_image": {
            "gflops": round(flops / 1e9, 3),
            "megabytes_moved": {name: round(count / 1e6, 2) for name, count in moved.items()},
            "images_per_second_allowed": {name: round(value, 1) for name, value in bounds.items()},
            "megabytes_the_best_could_have_moved": round(bandwidth / speed / 1e6, 2) if speed else None,
        }
    }


# -- profile ----------------------------------------------------------------------------------------------------------


def profile(runs: dict[str, Run], times: dict[str, list[float]], device: torch.device) -> dict[str, Any]:
    """Time of the fastest of ours by kind of kernel; not as a graph, so that names show."""
    ours = [side for side in runs if side.startswith("mobilevit")]
    if not ours:
        return {}
    side = min(ours, key=lambda name: statistics.median(times[name])).removesuffix(", graph")
    repeats = 3
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as spent:
        for _ in range(repeats):
            runs[side]()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in spent.events():
        if device.type != "cuda":
            by_name[event.name] += event.self_cpu_time_total / repeats
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            by_name[event.name] += event.time_range.elapsed_us() / repeats
        calls[event.name] += 1
    by_kind: Counter[str] = Counter()
    for name, microseconds in by_name.items():
        by_kind[kind_of(name)] += microseconds
    return {
        "side": side,
        "ms_by_kind": {kind: round(value / 1e3, 4) for kind, value in by_kind.most_common()},
        "kernels": [
            {"name": name[:160], "kind": kind_of(name), "ms": round(value / 1e3, 4), "calls": calls[name] // repeats}
            for name, value in by_name.most_common(40)
        ],
    }


def kind_of(kernel: str) -> str:
    """The first of `KINDS` that fits a kernel's name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")


def print_case(case: Case, figures: dict[str, Any]) -> None:
    speed = figures["images_per_second"]
    print(f"\n{case.name}: ours over timm, each at its best: {figures.get('ratio', 'not measured')}")
    for side in sorted(speed, key=speed.__getitem__):
        print(f"  {side:44s} {speed[side]:12,.1f} images/s   error {figures['error'][side]:.1e}")
    print(f"  an image of the fused model: {figures['an_image']}")
    print(f"  {figures['profile'].get('side')}, ms by kind of kernel: {figures['profile'].get('ms_by_kind')}")
    for kernel in figures["profile"].get("kernels", [])[:12]:
        print(f"    {kernel['ms']:9.4f} ms {kernel['calls']:4d} x {kernel['kind']:26s} {kernel['name'][:90]}")


if __name__ == "__main__":
    main()
