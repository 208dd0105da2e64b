"""Bulk prediction of 20,000 small images: speed beside the engine's own, memory, and a kill in the middle.

    python benchmarks/bulk.py --data FOLDER     # images of a folder, encoded anew until there are enough
    python benchmarks/bulk.py                   # images drawn by the package

Some twenty minutes on two cores. How long a model takes does not depend on its weights, so it is a fresh XXS: at
64 x 64, where reading weighs most, and at 256 x 256. The engine's own speed is that of full batches of ready tensors,
before and after each run; `Predictor.stream` reads the same files one after the other. Memory is what the processes of
a run have to themselves, summed, twice a second.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from pyarrow import parquet

import mobilevit
import record
from mobilevit.data.shapes import render_scene
from mobilevit.imaging.decode import find_images, read_image
from mobilevit.runtime.predictor import Predictor

SIDE = 96
"""Of the images, in pixels, for the small input."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--larger", type=int, default=20_000, help="images at 256 x 256")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"images": arguments.images, "model": "mobilevit_xxs, 1000 classes"}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_images(place / "small", arguments.images, SIDE, arguments.data)
        write_images(place / "larger", arguments.larger, 288, arguments.data)
        small, larger = (save_model(place, side) for side in (64, 256))
        for key, model, photos, flags, count in (
            ("here, 64 x 64", small, place / "small", [], arguments.images),
            ("ray, 64 x 64", small, place / "small", ["--engine", "ray"], arguments.images),
            ("here, 256 x 256", larger, place / "larger", [], arguments.larger),
            ("ray, 256 x 256", larger, place / "larger", ["--engine", "ray"], arguments.larger),
        ):
            figures[key] = beside_the_engine(model, photos, place / key, flags, count)
            print(key, figures[key], flush=True)
        figures["killed"] = killed(small, place / "small", place / "killed", arguments.images)
        print(figures["killed"], flush=True)
    record.write("bulk", {"figures": figures})


def save_model(place: Path, side: int) -> Path:
    torch.manual_seed(0)
    model = mobilevit.create_model("mobilevit_xxs")
    preprocessing = mobilevit.Preprocessing(size=(side, side))
    classes = [f"class {number}" for number in range(1000)]
    return mobilevit.save(model, place / f"{side}.safetensors", classes=classes, preprocessing=preprocessing)


def write_images(folder: Path, count: int, side: int, data: Path | None) -> None:
    """JPEGs with `side` pixels on the shorter side."""
    folder.mkdir()
    encoded = []
    for image in (render_scene(n, size=side).image for n in range(500)) if data is None else photographs(data, side):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(encoded[number % len(encoded)])


def photographs(folder: Path, side: int) -> list[Image.Image]:
    found = []
    paths = find_images(folder)
    for path in paths[:: max(1, len(paths) // 500)]:
        image = read_image(path)
        scale = side / min(image.size)
        found.append(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))
    return found


def engine_speed(predictor: Predictor, photos: Path, seconds: float = 5.0) -> float:
    """Images a second, of full batches of ready tensors."""
    paths = find_images(photos)[: predictor.batch_size]
    ready = [predictor.prepare(path, path.name) for path in paths]
    for _ in range(3):
        predictor.compute(ready)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        predictor.compute(ready)
        batches += 1
    return batches * predictor.batch_size / (time.perf_counter() - start)


def side_by_side_speed(predictor: Predictor, photos: Path, seconds: float = 5.0) -> float:
    """The same with a batch on each core, a thread each, instead of all cores on one batch."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores) as pool:
        parts = [pool.submit(engine_speed, predictor, photos, seconds) for _ in range(cores)]
        found = sum(part.result() for part in parts)
    torch.set_num_threads(cores)
    return found


def stream_speed(predictor: Predictor, photos: Path, seconds: float = 5.0) -> float:
    """Images a second, of `Predictor.stream` on files."""
    start, count = time.perf_counter(), 0
    for _ in predictor.stream(itertools.cycle(find_images(photos))):
        count += 1
        if count % predictor.batch_size == 0 and time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def beside_the_engine(model: Path, photos: Path, out: Path, flags: list[str], count: int) -> dict[str, Any]:
    predictor = Predictor(model)
    before, stream = engine_speed(predictor, photos), stream_speed(predictor, photos)
    side_by_side = side_by_side_speed(predictor, photos)
    found = run(model, photos, out, flags, count)
    engine = statistics.mean((before, engine_speed(predictor, photos)))
    return found | {
        "engine_per_second": round(engine, 1),
        "engine_side_by_side_per_second": round(side_by_side, 1),
        "stream_per_second": round(stream, 1),
        "share_of_engine": round(found["images_per_second"] / engine, 3),
    }


def command(model: Path, photos: Path, out: Path, flags: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "mobilevit", "predict", str(model), str(photos), "--out", str(out),
        "--json", *flags,
    ]  # fmt: skip


def run(model: Path, photos: Path, out: Path, flags: list[str], count: int) -> dict[str, Any]:
    process = subprocess.Popen(command(model, photos, out, flags), stdout=subprocess.PIPE, text=True)
    samples: list[float] = []
    watcher = threading.Thread(target=watch, args=(process, samples), daemon=True)
    watcher.start()
    told, _ = process.communicate()
    watcher.join()
    report = json.loads(told)
    assert report["num_written"] == count
    assert report["num_errors"] == 0
    check_rows(out, count)
    return {
        "images_per_second": round(count / report["seconds"], 1),
        "seconds": report["seconds"],
        "memory_mb": {
            # The first part has been written by then, which loads the last of the libraries.
            "half way": samples[int(len(samples) * 0.55)],
            "near its end": samples[int(len(samples) * 0.9)],
            "peak": max(samples),
        },
    }


def watch(process: subprocess.Popen[str], samples: list[float]) -> None:
    while process.poll() is None:
        samples.append(round(sum(memory_of(process.pid)) / 1e6, 1))
        time.sleep(0.5)


def memory_of(pid: int) -> list[float]:
    """Of a process and all it has started."""
    found = []
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                found.append(float(process.memory_full_info().uss))
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return found


def check_rows(out: Path, count: int) -> None:
    names = Counter(n for p in out.glob("part-*.parquet") for n in parquet.read_table(p)["source"].to_pylist())
    assert len(names) == count, "a row is missing"
    assert max(names.values()) == 1, "a row is there twice"


def killed(model: Path, photos: Path, out: Path, count: int) -> dict[str, Any]:
    """SIGKILL some seconds after the first part, then the same command again."""
    process = subprocess.Popen(command(model, photos, out, []), stdout=subprocess.DEVNULL)
    while not list(out.glob("part-*.parquet")):
        time.sleep(0.1)
    time.sleep(5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command(model, photos, out, []), stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(again.stdout)
    check_rows(out, count)
    assert report["num_before"] + report["num_written"] == count
    return {"rows kept": report["num_before"], "rows made by the second run": report["num_written"], "rows": count}


if __name__ == "__main__":
    main()
