"""Eager float32 inference against timm and transformers: all sides in one run, interleaved, medians.

python benchmarks/inference.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import mobilevit
import record
from mobilevit.benchmarking import peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs", "mobilevit_s"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {}
    for name in arguments.models:
        for batch in arguments.batches:
            rounds = arguments.rounds if batch == 1 else max(5, arguments.rounds // 3)
            figures[f"{name} batch {batch}"] = compare(name, batch, rounds)
    record.write("inference", {"unit": "milliseconds, median of rounds", "figures": figures})


@torch.inference_mode()
def compare(name: str, batch: int, rounds: int) -> dict[str, object]:
    model = mobilevit.create_model(name)
    sides = {
        "timm": peers.peer_of(model, "timm"),
        "timm channels_last": peers.peer_of(model, "timm").to(memory_format=torch.channels_last),
        "transformers": peers.peer_of(model, "transformers"),
        "mobilevit": model,
        "mobilevit fused": mobilevit.fuse(model),
    }
    x = torch.rand(batch, 3, 256, 256)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    inputs = {side: channels_last if "channels_last" in side or "mobilevit" in side else x for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 2):
        for side, network in sides.items():
            repeats = 4 if batch == 1 else 1
            start = time.perf_counter()
            for _ in range(repeats):
                network(inputs[side])
            if number >= 2:  # the first rounds warm up
                times[side].append((time.perf_counter() - start) / repeats * 1e3)
    median = {side: round(statistics.median(t), 2) for side, t in times.items()}
    spread = {side: [round(min(t), 2), round(max(t), 2)] for side, t in times.items()}
    ratios = {
        f"faster than {s}": round(median[s] / median["mobilevit fused"], 2) for s in sides if s != "mobilevit fused"
    }
    print(name, "batch", batch, median, ratios, flush=True)
    return {"milliseconds": median, "spread": spread, "fused is": ratios}


if __name__ == "__main__":
    main()
