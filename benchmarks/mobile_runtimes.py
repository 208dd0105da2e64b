"""ExecuTorch and LiteRT, in float32 and int8, beside fused PyTorch: one image of 256 x 256, in turns, medians.

    python benchmarks/mobile_runtimes.py

writes of ExecuTorch. LiteRT's converter has an environment of its own: sh scripts/litert_environment.sh, then

    .venv-litert/bin/python benchmarks/mobile_runtimes.py

The result file keeps what it had of the other. How long models take does not depend on their weights, so these are
fresh ones. Each number of threads has a process of its own, as ExecuTorch has one pool of threads for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mobilevit
import record
from mobilevit.card import card_of
from mobilevit.data.shapes import render_scene
from mobilevit.exporting.export import export
from mobilevit.exporting.options import FORMATS
from mobilevit.runtime.session import ArtifactSession
from mobilevit.torch_session import TorchSession

RUNS = 4
"""Of a side in each of its turns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["executorch", "litert"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs", "mobilevit_s"])
    parser.add_argument("--time", type=Path, help="only time the files of this folder, and print that")
    arguments = parser.parse_args()
    if arguments.time:
        print(json.dumps(times(arguments.time, arguments.models[0], arguments.threads[0], arguments.rounds)))
        return
    path = record.RESULTS / "mobile_runtimes.json"
    figures = json.loads(path.read_text())["figures"] if path.is_file() else {}
    for format_ in arguments.formats:
        for name in arguments.models:
            with tempfile.TemporaryDirectory() as folder:
                if not write(format_, name, Path(folder)):
                    break
                found: dict[str, Any] = {"megabytes": {p.stem: megabytes(p) for p in artifacts(Path(folder))}}
                for threads in arguments.threads:
                    command = [sys.executable, __file__, "--time", folder, "--threads", str(threads)]
                    command += ["--rounds", str(arguments.rounds), "--models", name]
                    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    found[f"{threads} thread{'s' if threads > 1 else ''}"] = json.loads(told.splitlines()[-1])
            figures[f"{format_} {name}"] = found
            print(format_, name, found, flush=True)
    record.write("mobile_runtimes", {"unit": "milliseconds, median of rounds, one image", "figures": figures})


def write(format_: str, name: str, folder: Path) -> bool:
    """Export in each precision; False where the converter is not installed."""
    torch.manual_seed(0)
    model = mobilevit.create_model(name)
    scenes = [render_scene(number, size=256).image for number in range(32)]
    for precision in FORMATS[format_].precisions:
        calibration = scenes if precision == "int8" else None
        try:
            export(
                model, folder, format=format_, precision=precision, calibration=calibration, verify=False, name=format_
            )
        except ValueError as error:
            if "not installed" not in str(error):
                raise
            print(f"{format_}: left out; {error}", flush=True)
            return False
    return True


def artifacts(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.pte"), *folder.glob("*.tflite")])


def megabytes(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)


def times(folder: Path, name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Of all files of a folder and of PyTorch, in this process."""
    torch.set_num_threads(threads)
    model = mobilevit.create_model(name)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    theirs = TorchSession(model, card_of(model), device=torch.device("cpu"))
    sides: dict[str, Callable[[], object]] = {"PyTorch": partial(theirs.run, pixels)}
    for path in artifacts(folder):
        sides[path.stem] = partial(ArtifactSession(path, threads=threads).run, pixels)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 2):
        for side, run in sides.items():
            start = time.perf_counter()
            for _ in range(RUNS):
                run()
            if number >= 2:  # the first rounds warm up
                found[side].append((time.perf_counter() - start) / RUNS * 1e3)
    return {
        "milliseconds": {side: round(statistics.median(t), 2) for side, t in found.items()},
        "spread": {side: [round(min(t), 2), round(max(t), 2)] for side, t in found.items()},
    }


if __name__ == "__main__":
    main()
