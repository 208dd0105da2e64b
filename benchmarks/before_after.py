"""Version 0.1 beside this one, on the same files: predictions, cold start, memory, throughput, training, serving.

    python benchmarks/before_after.py --before ../mobilevit-0.1/src --device-python .venv-device/bin/python

Runs in the environment with PyTorch (`make test` sets up both). Sides run in turns; times are medians. Version 0.1
exports the files, as it cannot read newer sidecars. `--stages` picks some; figures of the others are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

import record
from mobilevit.data.shapes import render_scene, write_folder

ROOT = Path(__file__).parent.parent
TASKS = ("classification", "detection", "segmentation")
ENGINES = {"pytorch": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}


class Side:
    """One version in one environment."""

    def __init__(self, name: str, python: str, source: Path) -> None:
        self.name, self.python = name, python
        self.environment = {**os.environ, "PYTHONPATH": str(source)}

    def command(self, *arguments: object) -> list[str]:
        return [self.python, "-m", "mobilevit", *map(str, arguments)]

    def run(self, *arguments: object) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, env=self.environment
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(map(str, arguments))}\n{done.stderr}")
        return done.stdout

    def cost(self, *arguments: object) -> tuple[float, float]:
        """Seconds and peak megabytes of a command, started by a small process: a fork counts its parent's memory."""
        told = subprocess.check_output(
            [self.python, "-c", _LAUNCHER, *self.command(*arguments)], text=True, env=self.environment
        )
        seconds, megabytes = json.loads(told)
        return seconds, megabytes


_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder src of version 0.1")
    parser.add_argument("--device-python", required=True, help="Python of an environment without PyTorch")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    options = parser.parse_args()
    before = Side("before", sys.executable, options.before.resolve())
    after = Side("after", sys.executable, ROOT / "src")
    device = Side("device", str(Path(options.device_python).absolute()), ROOT / "src")
    file = record.RESULTS / "before_after.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    figures: dict[str, Any] = {stage: known[stage] for stage in STAGES if stage in known}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        make_files(files, before)
        for stage in options.stages:
            figures[stage] = STAGES[stage](files, before, after, device)
            print(stage, json.dumps(figures[stage], indent=2), flush=True)
            record.write("before_after", figures)


def make_files(files: Path, before: Side) -> None:
    """Checkpoints with weights that tell images apart, what version 0.1 exports of them, and images."""
    script = ROOT / "tests" / "device" / "make_files.py"
    subprocess.run([sys.executable, str(script), str(files), "none"], check=True)
    for task in TASKS:
        before.run(
            "export", files / f"{task}.safetensors", "--out", files, "--format", "onnx", "openvino", "executorch"
        )
    (files / "images").mkdir()
    for number in range(200):
        image = render_scene(number, size=320, num_objects=3).image
        image.resize((320 + number % 7 * 40, 240 + number % 5 * 50)).save(files / "images" / f"{number}.jpg")


def predictions(files: Path, before: Side, after: Side, _: Side) -> dict[str, Any]:
    """Differences between the two, by task and engine, over the images."""
    found: dict[str, Any] = {}
    images = sorted((files / "images").iterdir())[:40]
    for task in TASKS:
        for engine, suffix in ENGINES.items():
            model = files / f"{task}{suffix}"
            told = [
                side.run("predict", model, *images, "--json", *extra(task, files, side)) for side in (before, after)
            ]
            rows = [[json.loads(line) for line in text.splitlines()] for text in told]
            found[f"{task} {engine}"] = compare(task, *rows, files)
    return found


def extra(task: str, files: Path, side: Side) -> list[object]:
    if task == "segmentation":
        return ["--masks", files / f"masks-{side.name}"]
    return ["--min-score", 0.0] if task == "detection" else ["--top", 5]


def compare(task: str, old: list[Any], new: list[Any], files: Path) -> dict[str, Any]:
    assert [row["source"] for row in old] == [row["source"] for row in new]
    if task == "segmentation":
        masks = [
            [np.asarray(Image.open(p)) for p in sorted((files / f"masks-{s}").iterdir())] for s in ("before", "after")
        ]
        pixels = sum(a.size for a in masks[0])
        same = sum(int((a == b).sum()) for a, b in zip(*masks, strict=True))
        return {"images": len(old), "pixels": pixels, "pixels_that_differ": pixels - same}
    if task == "classification":
        labels = [[[top["label"] for top in row["top"]] for row in rows] for rows in (old, new)]
        scores = [[top["probability"] for row in rows for top in row["top"]] for rows in (old, new)]
    else:
        # Objects with equal scores have no order.
        found = [[one for row in rows for one in sorted(row["detections"], key=_in_order)] for rows in (old, new)]
        assert [len(row["detections"]) for row in old] == [len(row["detections"]) for row in new]
        labels = [[(one["label"], *one["box_xyxy"]) for one in each] for each in found]
        scores = [[one["score"] for one in each] for each in found]
    return {
        "images": len(old),
        "compared": len(scores[0]),
        "labels_or_boxes_that_differ": sum(a != b for a, b in zip(*labels, strict=True)),
        "largest_score_difference": round(float(np.abs(np.subtract(*scores)).max()), 7),
    }


def _in_order(found: dict[str, Any]) -> tuple[float, str, list[float]]:
    return -found["score"], found["label"], found["box_xyxy"]


def cold(files: Path, before: Side, _: Side, device: Side) -> dict[str, Any]:
    """One image through an .onnx, from a fresh process."""
    costs: dict[str, list[tuple[float, float]]] = {"before": [], "device": []}
    for number in range(8):
        for side in (before, device):
            cost = side.cost("predict", files / "classification.onnx", files / "images" / "0.jpg")
            if number:
                costs[side.name].append(cost)
    return {
        name: {
            "seconds": round(statistics.median(s for s, _ in each), 3),
            "peak_mb": round(statistics.median(mb for _, mb in each), 1),
        }
        for name, each in costs.items()
    }


def throughput(files: Path, before: Side, after: Side, _: Side) -> dict[str, Any]:
    """Images a second of `predict` on a folder, start-up included; and the ratio."""
    figures = {}
    for task in TASKS:
        for engine in ("pytorch", "onnx"):
            model = files / f"{task}{ENGINES[engine]}"

            def once(side: Side, model: Path = model) -> float:
                return 200 / side.cost("predict", model, files / "images")[0]

            figures[f"{task} {engine}"] = in_turns(once, before, after, rounds=3)
    return figures


def training(files: Path, before: Side, after: Side, _: Side) -> dict[str, Any]:
    """Images a second that the record of a run says, at 128 pixels, of its last epoch."""
    data = files / "shapes"
    write_folder(data, num_images=600, size=128)

    def once(side: Side) -> float:
        with tempfile.TemporaryDirectory() as out:
            side.run(
                "train", "--data", data, "--out", out, "--epochs", 2, "--image-size", 128, "--batch-size", 32,
                "--num-workers", 0, "--device", "cpu", "--overwrite",
            )  # fmt: skip
            rows = (Path(out) / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(rows[-1])["images_per_second"])

    return in_turns(once, before, after, rounds=5)


def serving(files: Path, before: Side, after: Side, device: Side) -> dict[str, Any]:
    """Images a second of 8 connections, and a worker's memory after 100 requests."""
    figures: dict[str, Any] = {}
    for engine in ("pytorch", "onnx"):
        model = files / f"classification{ENGINES[engine]}"
        figures[engine] = in_turns(lambda side, model=model: ask(side, model, files, 400)[0], before, after, rounds=3)
    memory = {side.name: round(ask(side, files / "classification.onnx", files, 100)[1], 1) for side in (before, device)}
    return {**figures, "resident_mb_after_100_requests": memory}


def ask(side: Side, model: Path, files: Path, count: int) -> tuple[float, float]:
    """Images a second, and megabytes of the worker."""
    images = [path.read_bytes() for path in sorted((files / "images").iterdir())]
    server = subprocess.Popen(
        side.command("serve", model, "--port", 0), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=side.environment,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = re.findall(r"http://\S+", server.stdout.readline())[0]
        numbers = iter(range(count + 16))
        lock = threading.Lock()

        def client(limit: int) -> None:
            while True:
                with lock:
                    number = next(numbers, limit)
                if number >= limit:
                    return
                request = urllib.request.Request(
                    f"{address}/v1/predict", images[number % len(images)], {"Content-Type": "image/jpeg"}
                )
                urllib.request.urlopen(request, timeout=60).read()

        client(16)
        start = time.perf_counter()
        threads = [threading.Thread(target=client, args=(count + 16,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        speed = count / (time.perf_counter() - start)
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        return speed, max(process.memory_info().rss for process in family) / 1e6
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def postprocessing(_files: Path, before: Side, after: Side, _: Side) -> dict[str, Any]:
    """Milliseconds from boxes and scores at 3,232 anchors of 80 classes to objects."""
    scene = """
import json, statistics, sys, time
import numpy as np
rng = np.random.default_rng(0)
centers, sides = rng.random((3232, 2)), rng.random((3232, 2)) * 0.3
boxes = np.concatenate([centers - sides / 2, centers + sides / 2], 1).astype(np.float32)
logits = rng.normal(size=(3232, 81)) * 2
logits[:, 0] += 6
powers = np.exp(logits)
scores = (powers / powers.sum(1, keepdims=True))[:, 1:].astype(np.float32)
"""
    old = """
import torch
from mobilevit.tasks.detection import DecodedOutput, postprocess
output = DecodedOutput(torch.from_numpy(boxes)[None], torch.from_numpy(scores)[None])
call = lambda: postprocess(output)
"""
    new = """
from mobilevit.results.detection import find_objects
call = lambda: find_objects(boxes, scores)
"""
    times = """
times = []
for number in range(60):
    start = time.perf_counter(); call(); times.append((time.perf_counter() - start) * 1e3)
print(json.dumps(statistics.median(times[10:])))
"""
    figures: dict[str, list[float]] = {"before": [], "after": []}
    for _round in range(5):
        for side, code in ((before, old), (after, new)):
            told = subprocess.check_output([side.python, "-c", scene + code + times], text=True, env=side.environment)
            figures[side.name].append(json.loads(told))
    return {f"{name}_ms": round(statistics.median(each), 3) for name, each in figures.items()}


def installed(*_: object) -> dict[str, Any]:
    """Megabytes of a fresh environment with `mobilevit[onnx]`, pip itself included."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/pip", "install", "--quiet", f"{ROOT}[onnx]"], check=True)
        size = sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return {"onnx_mb": round(size / 1e6, 1)}


def in_turns(measure: Callable[[Side], float], before: Side, after: Side, *, rounds: int) -> dict[str, float]:
    """Medians of both sides, and the median of the ratios of neighboring runs."""
    found: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(rounds):
        for side in (before, after):
            found[side.name].append(measure(side))
    ratios = [new / old for old, new in zip(found["before"], found["after"], strict=True)]
    medians = {name: round(statistics.median(each), 2) for name, each in found.items()}
    return {**medians, "ratio": round(statistics.median(ratios), 3)}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "predictions": predictions,
    "cold": cold,
    "installed": installed,
    "postprocessing": postprocessing,
    "serving": serving,
    "throughput": throughput,
    "training": training,
}

if __name__ == "__main__":
    main()
