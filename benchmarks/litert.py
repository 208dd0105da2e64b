"""LiteRT (XNNPACK) in float32, float16 and int8 against fused PyTorch: all sides in one run, interleaved, medians.

Run it where the converter is: sh scripts/litert_environment.sh, then

.venv-litert/bin/python benchmarks/litert.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import mobilevit
import record
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.litert import convert_graph
from mobilevit.inference.litert import LitertSession

PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs", "mobilevit_s"])
    parser.add_argument("--image-size", type=int, default=256)
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            files = export(name, arguments.image_size, Path(folder))
            size = {precision: round(path.stat().st_size / 1e6, 2) for precision, path in files.items()}
            figures[name] = {"megabytes": size}
            for threads in arguments.threads:
                figures[name][f"threads {threads}"] = compare(name, files, arguments, threads)
            print(name, figures[name], flush=True)
    record.write("litert", {"unit": "milliseconds, median of rounds, one picture", "figures": figures})


def export(name: str, side: int, folder: Path) -> dict[str, Path]:
    """Files of a fresh model; how long they take does not depend on the weights, nor on what calibrates them."""
    torch.manual_seed(0)
    graph = ExportGraph(mobilevit.create_model(name).eval(), image_size=(side, side)).eval()
    files = {precision: folder / f"{name}-{precision}.tflite" for precision in PRECISIONS}
    for precision, path in files.items():
        noise = [torch.rand(1, 3, side, side) for _ in range(4)]
        convert_graph(graph, noise[0], path, precision=precision, calibration=noise)
    return files


@torch.inference_mode()
def compare(name: str, files: dict[str, Path], arguments: argparse.Namespace, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    x = torch.rand(1, 3, arguments.image_size, arguments.image_size)
    fused = mobilevit.fuse(mobilevit.create_model(name))
    sides: dict[str, Callable[[], object]] = {
        "PyTorch fused": partial(fused, x.contiguous(memory_format=torch.channels_last))
    }
    for precision, path in files.items():
        sides[f"LiteRT {precision}"] = partial(LitertSession(path, threads=threads).run, x.numpy())
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 2):
        for side, run in sides.items():
            start = time.perf_counter()
            for _ in range(4):
                run()
            if number >= 2:  # the first rounds warm up
                times[side].append((time.perf_counter() - start) / 4 * 1e3)
    return {
        "milliseconds": {side: round(statistics.median(t), 2) for side, t in times.items()},
        "spread": {side: [round(min(t), 2), round(max(t), 2)] for side, t in times.items()},
    }


if __name__ == "__main__":
    main()
