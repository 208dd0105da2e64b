"""Detection and segmentation from scratch on small public data, measured on their validation and test parts.

    python benchmarks/from_scratch.py bccd --data FOLDER --epochs 80
    python benchmarks/from_scratch.py camvid --data FOLDER --epochs 60
    python benchmarks/from_scratch.py bccd --data FOLDER --model mobilevit_s --epochs 300 --batch-size 16 --device cuda

bccd: blood cells, 205/87/72 images with boxes of 3 classes, as Pascal VOC. camvid: road scenes, 367/101/233 images
of 480 x 360 with masks of 11 classes. Curves and plots go to `docs/images`. The clock includes reading and evaluation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import record
from mobilevit import factory
from mobilevit.card import card_of
from mobilevit.data.datasets import find_splits
from mobilevit.devices import pick_device
from mobilevit.evaluation import evaluate_session
from mobilevit.tasks.settings import DetectionSettings, SegmentationSettings
from mobilevit.torch_session import TorchSession
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import train

IMAGES = Path(__file__).parent.parent / "docs" / "images"

SETTINGS: dict[str, dict[str, Any]] = {
    # Cells are equally large in every image, so images are not shrunk.
    "bccd": {"task": "detection", "batch_size": 8, "learning_rate": 1e-3, "detection": DetectionSettings(zoom_out=0.0)},
    "camvid": {
        "task": "segmentation",
        "batch_size": 8,
        "learning_rate": 1e-3,
        "image_size": (360, 480),
        "segmentation": SegmentationSettings(crop_size=256, scale_range=(0.5, 1.25)),
    },
}
PLOTS = {
    "bccd": ("curves.png", "pr_curves.png"),
    "camvid": ("curves.png", "per_class_iou.png"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=list(SETTINGS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    given = {"batch_size": arguments.batch_size, "learning_rate": arguments.learning_rate}
    settings = SETTINGS[arguments.data_set] | {k: v for k, v in given.items() if v is not None}
    name = f"{arguments.data_set}-{arguments.model}"
    config = TrainConfig(
        data=arguments.data,
        out=arguments.out / name,
        model=arguments.model,
        epochs=arguments.epochs,
        device=arguments.device,
        num_workers=0 if device.type == "cpu" else None,
        seed=arguments.seed,
        **settings,
    )
    start = time.monotonic()
    result = train(config, overwrite=True)
    minutes = (time.monotonic() - start) / 60

    model = factory.load(result.best)
    test = find_splits(arguments.data, result.task)["test"]
    evaluation = evaluate_session(TorchSession(model, card_of(model), device=device), test, batch_size=8)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "validation": result.report.summary,
        "test": evaluation.report.summary,
        "test_report": {k: v for k, v in evaluation.report.to_dict().items() if k in ("per_class", "num_images")},
        "minutes": round(minutes, 2),
        "epochs": result.epochs,
        "median_training_images_per_second": sorted(r["images_per_second"] for r in rows)[len(rows) // 2],
        "per_epoch": [{k: v for k, v in row.items() if k in ("train_loss", "ap", "ap50", "miou")} for row in rows],
        "config": json.loads((config.out / "config.json").read_text())
        | {"data": arguments.data_set, "out": config.out.name},
    }
    print(json.dumps({k: figures[k] for k in ("validation", "test", "minutes")}))
    record.write(name, figures)
    for plot in PLOTS[arguments.data_set]:
        shutil.copyfile(config.out / plot, IMAGES / f"{name}-{plot.replace('_', '-')}")


if __name__ == "__main__":
    main()
