"""Inference on a GPU: this package beside timm, each eager and compiled, at its best layout and precision.

    python benchmarks/gpu.py --models mobilevit_s                          # an H100-class GPU: about eight minutes
    python benchmarks/gpu.py --models mobilevit_xxs --append
    python benchmarks/gpu.py --device cpu --batch 2 --size 64 --rounds 2 --mode default    # whether it works at all

Rounds are interleaved; figures are images a second from the median round. Random weights; the answers of every
contender are compared with float32's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mobilevit
import record
from mobilevit.benchmarking import peers
from mobilevit.models.fuse import pad_heads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilevit_s", "mobilevit_xxs"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], choices=list(DTYPES))
    parser.add_argument("--append", action="store_true", help="keep the models that the result file has already")
    parser.add_argument("--profile", action="store_true", help="print what takes the time of the fastest of ours")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    figures: dict[str, Any] = {}
    path = record.RESULTS / "gpu.json"
    if arguments.append and path.exists():
        figures = json.loads(path.read_text())["figures"]
    for name in arguments.models:
        figures[name] = compare(name, device, arguments)
    told = {"batch": arguments.batch, "size": arguments.size, "mode": arguments.mode}
    if device.type == "cuda":
        record.write("gpu", {"unit": "images a second", **told, "figures": figures})
    else:
        print(json.dumps(figures, indent=2))


@torch.inference_mode()
def compare(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = mobilevit.create_model(name).to(device)
    timms = peers.timm_model(name).eval().to(device)
    fused = mobilevit.fuse(ours)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device)
    sides: dict[str, Callable[[], torch.Tensor]] = {}
    wanted: dict[str, torch.Tensor] = {}
    for precision in arguments.precisions:
        for layout in ("contiguous", "channels_last"):
            for how in ("eager", "compiled"):
                side = f"timm {how}, {layout}, {precision}"
                sides[side] = prepare(timms, images, precision, layout, how, arguments.mode)
                wanted[side] = timms(images)
        for label, model, how in (
            ("eager", fused, "eager"),
            ("compiled", fused, "compiled"),
            ("compiled, padded heads", pad_heads(fused), "compiled"),
        ):
            side = f"mobilevit {label}, {precision}"
            sides[side] = prepare(model, images, precision, "channels_last", how, arguments.mode)
            wanted[side] = ours(images)
    agreement = {}
    for side, run in list(sides.items()):
        try:
            for _ in range(3):
                answers = run().float()
        except Exception as error:  # the others go on; the reason is in the table
            print(f"{side}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            del sides[side]
            continue
        agreement[side] = float((answers.argmax(1) == wanted[side].argmax(1)).float().mean())
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, run in sides.items():
            times[side].append(seconds(run, device))
    speed = {side: arguments.batch / statistics.median(spent) for side, spent in times.items()}
    best = {who: max((s for s in speed if s.startswith(who)), key=speed.__getitem__) for who in ("timm", "mobilevit")}
    for side in sorted(speed, key=speed.__getitem__):
        print(f"{name:14s} {side:46s} {speed[side]:10,.0f} images/s   same answers {agreement[side]:.1%}", flush=True)
    if arguments.profile:
        profile(sides[best["mobilevit"]])
    return {
        "images_per_second": {side: round(value, 1) for side, value in speed.items()},
        "spread_ms": {side: [round(min(t) * 1e3, 3), round(max(t) * 1e3, 3)] for side, t in times.items()},
        "same_answers_as_float32": agreement,
        "best": best,
        "ratio": round(speed[best["mobilevit"]] / speed[best["timm"]], 3),
    }


def prepare(
    model: nn.Module, batch: torch.Tensor, precision: str, layout: str, how: str, mode: str
) -> Callable[[], torch.Tensor]:
    import copy

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    network: Any = copy.deepcopy(model).to(DTYPES[precision]).to(memory_format=formats[layout])
    images = batch.to(DTYPES[precision]).contiguous(memory_format=formats[layout])
    if how == "compiled":
        torch._dynamo.reset()
        network = torch.compile(network, mode=mode)
    return lambda: network(images)


def seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Of one batch: several in a row, as a server has them."""
    repeats = 10 if device.type == "cuda" else 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def profile(run: Callable[[], torch.Tensor]) -> None:
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with torch.profiler.profile(activities=kinds) as spent:
        for _ in range(3):
            run()
    order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(spent.key_averages().table(sort_by=order, row_limit=25))


if __name__ == "__main__":
    main()
