"""What float16, bfloat16 and int8 cost in accuracy and bring in speed, in each format that can be written here.

    python benchmarks/quantization.py --from CHECKPOINT --data FOLDER --from CHECKPOINT --data FOLDER ...

A checkpoint of any task, with the data it was trained on. Calibrated on training images only, measured on those held
out. What a run does not measure stays in the result file, so tasks can be measured one by one, and latency apart:

    python benchmarks/quantization.py --latency mobilevit_xxs mobilevit_s

Latency is processor time of one thread for one image, of fresh models, whose time does not depend on their weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import record
from mobilevit import create_model, factory
from mobilevit.card import ModelCard, card_of
from mobilevit.data.shapes import render_scene
from mobilevit.evaluation import find_part
from mobilevit.exporting.export import ExportError, export
from mobilevit.exporting.graph import export_graph
from mobilevit.exporting.images import parity_pixels
from mobilevit.exporting.options import FORMATS
from mobilevit.exporting.parity import check
from mobilevit.exporting.sensitivity import measure_sensitivity
from mobilevit.runtime.session import ArtifactSession, Session
from mobilevit.torch_session import TorchSession

UNIT = "milliseconds of one image of 256 x 256, processor time of one thread, median of rounds"
FIGURES = {"classification": ("top1",), "detection": ("ap", "ap50"), "segmentation": ("miou", "pixel_accuracy")}
MOST_COMPARED = 1000
"""Held-out images on which answers are compared with PyTorch's; of masks, a tenth: they have many answers each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="checkpoints", type=Path, action="append", default=[])
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--formats", nargs="+", default=["onnx", "openvino", "executorch", "litert"])
    parser.add_argument("--calibration", type=int, default=128, help="training images to calibrate on")
    parser.add_argument("--latency", nargs="*", default=[], help="models, such as mobilevit_xxs")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--name", default="quantization", help="of the result file, which has one model for each task")
    arguments = parser.parse_args()
    if len(arguments.checkpoints) != len(arguments.data):
        parser.error("give as many --data as --from")
    torch.set_num_threads(1)
    path = record.RESULTS / f"{arguments.name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    tasks, latency = known.get("tasks", {}), known.get("latency", {})
    for checkpoint, data in zip(arguments.checkpoints, arguments.data, strict=True):
        task, figures = measure(checkpoint, data, arguments)
        tasks[task] = merged(tasks.get(task, {}), figures)
    for name in arguments.latency:
        latency[name] = latencies(name, arguments) | {"unit": UNIT}
    record.write(arguments.name, {"tasks": tasks, "latency": latency})


def merged(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of other formats before, if it was the same model on the same images."""
    if known.get("float") != found["float"]:
        return dict(found)
    return {**known, **found, "formats": {**known["formats"], **found["formats"]}}


# -- accuracy ---------------------------------------------------------------------------------------------------------


def measure(checkpoint: Path, folder: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Accuracy of a checkpoint in every format and precision."""
    model = factory.load(checkpoint)
    card = card_of(model)
    steps = export_graph(model, image_size=None).size_multiple
    height, width = (max(step, side // step * step) for side, step in zip(card.preprocessing.size, steps, strict=True))
    card = dataclasses.replace(card, preprocessing=dataclasses.replace(card.preprocessing, size=(height, width)))
    training, _ = find_part(folder, "train", card)
    held_out, which = find_part(folder, "auto", card)
    step = max(1.0, len(training) / arguments.calibration)
    calibration = [training.open(int(n * step)) for n in range(min(arguments.calibration, len(training)))]
    before: dict[str, float] = {}
    most = MOST_COMPARED // (10 if card.task == "segmentation" else 1)
    every = max(1, len(held_out) // most)
    pixels = _resized([held_out.open(n) for n in range(0, len(held_out), every)], card)
    formats: dict[str, Any] = {}
    for format_ in arguments.formats:
        for precision in FORMATS[format_].precisions:
            name = f"{format_} {precision}"
            with tempfile.TemporaryDirectory() as out:
                try:
                    report = export(
                        model,
                        out,
                        format=format_,
                        precision=precision,
                        image_size=(height, width),
                        calibration=calibration if precision == "int8" else None,
                        images=calibration[:: max(1, len(calibration) // 16)],
                        data=folder,
                    )
                except ExportError as error:
                    formats[name] = {"failed": str(error).replace(out, "FOLDER")}
                except ValueError as error:
                    if "not installed" not in str(error):
                        raise
                    print(f"{name}: left out; {error}", flush=True)
                    break
                else:
                    graph = export_graph(model, image_size=(height, width))
                    parity = check(graph, ArtifactSession(report.path, threads=1), pixels, "held out")
                    before = {figure: report.torch_metrics[figure] for figure in FIGURES[card.task]}
                    formats[name] = {
                        **{figure: report.metrics[figure] for figure in before},
                        "loss": {k: round(before[k] - report.metrics[k], 6) for k in before},
                        "agreement": round(parity.agreement, 5),
                        "megabytes": round(report.num_bytes / 1e6, 3),
                    }
            print(card.task, name, formats[name], flush=True)
    rows = measure_sensitivity(
        export_graph(model, image_size=(height, width)),
        [torch.from_numpy(card.preprocessing.normalize(image[None])) for image in _resized(calibration, card)],
    )
    return card.task, {
        "checkpoint": checkpoint.parent.name,
        "image_size": [height, width],
        "measured on": f"{len(held_out)} images, {which}",
        "calibrated on": f"{len(calibration)} of its training images",
        "agreement": f"with PyTorch in float32: {parity.measure}",
        "float": before,
        "formats": formats,
        "most sensitive": [dataclasses.asdict(row) for row in rows[:20]],
    }


def _resized(images: list[Any], card: ModelCard) -> NDArray[np.uint8]:
    """All of them, a few at a time, as the function draws from more."""
    parts = [parity_pixels(images[start : start + 32], card.preprocessing)[0] for start in range(0, len(images), 32)]
    return np.concatenate(parts)


# -- latency ----------------------------------------------------------------------------------------------------------


def latencies(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of every format and precision, in turns."""
    torch.manual_seed(0)
    model = create_model(name)
    card = card_of(model)
    scenes = [render_scene(number, size=256).image for number in range(32)]
    pixels = parity_pixels(scenes[:1], card.preprocessing)[0]
    sessions: dict[str, Session] = {"PyTorch": TorchSession(model, card, device=torch.device("cpu"))}
    megabytes = {}
    with tempfile.TemporaryDirectory() as out:
        for format_ in arguments.formats:
            for precision in FORMATS[format_].precisions:
                calibration = scenes if precision == "int8" else None
                try:
                    report = export(
                        model, out, format=format_, precision=precision, calibration=calibration, verify=False
                    )
                    sessions[f"{format_} {precision}"] = ArtifactSession(report.path, threads=1)
                except ValueError as error:
                    if "not installed" not in str(error):
                        raise
                    break
                megabytes[f"{format_} {precision}"] = round(report.num_bytes / 1e6, 3)
        times: dict[str, list[float]] = {side: [] for side in sessions}
        for number in range(arguments.rounds + 3):
            for side, session in sessions.items():
                start = time.process_time()
                session.run(pixels)
                if number >= 3:
                    times[side].append((time.process_time() - start) * 1e3)
    milliseconds = {side: round(statistics.median(found), 2) for side, found in times.items()}
    spread = {side: [round(min(found), 2), round(max(found), 2)] for side, found in times.items()}
    print(name, milliseconds, flush=True)
    return {"milliseconds": milliseconds, "spread": spread, "megabytes": megabytes}


if __name__ == "__main__":
    main()
