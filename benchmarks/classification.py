"""Top-1 from scratch on small public image sets, and the time it takes, compilation included.

    python benchmarks/classification.py imagenette --data FOLDER --model mobilevit_s     # a GPU: some minutes
    python benchmarks/classification.py imagenette --data FOLDER --fit 200               # as many epochs as 200 s allow
    python benchmarks/classification.py cifar10 --data FOLDER                            # a GPU: meant for ten minutes
    python benchmarks/classification.py cifar10 --data FOLDER --images 100 --epochs 1 --image-size 64 --device cpu

FOLDER holds train.parquet, and val.parquet or test.parquet, with the columns `image` (encoded) and `label`; each may
also be in parts, train-1.parquet, train-2.parquet and so on, in several folders. cifar10 is the recipe of that name.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mobilevit
import record
from mobilevit import TrainConfig
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.training.config import OptimizerSettings
from mobilevit.training.recipes import find_recipe

# Smallest crop, flip and label smoothing are those of fastai's baseline.
IMAGENETTE = TrainConfig(
    data=Path(),
    task="classification",
    image_size=128,
    epochs=80,
    batch_size=128,
    learning_rate=2e-3,
    classification=ClassificationSettings(min_crop_area=0.35, mixup=0.2),
    optimizer=OptimizerSettings(warmup_fraction=0.05, weight_decay=0.05, clip_grad_norm=1.0, ema_momentum=2e-3),
)
SETTINGS: dict[str, dict[str, TrainConfig]] = {
    "imagenette": {
        "mobilevit_xxs": IMAGENETTE,
        # More parameters need more against learning by heart.
        "mobilevit_s": replace(IMAGENETTE, classification=replace(IMAGENETTE.classification, cutmix=1.0)),
    },
    "cifar10": {"mobilevit_xxs": find_recipe("cifar10").settings},
}

LEADERBOARD = {
    "imagenette": {"epochs 5": 0.8577, "epochs 20": 0.9157, "epochs 80": 0.9355},
}
"""Best published top-1 at 128 pixels by epochs (github.com/fastai/imagenette), of networks of some 25 M parameters."""

EPOCHS = (200, 80, 40, 20, 10, 5, 2, 1)
"""What --fit chooses from: a schedule must be known before it starts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=list(SETTINGS))
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="at most --epochs, fewer if they take longer")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--images", type=int, help="of either part; to see whether it works")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {part: in_one_file(arguments.data, part, folder, arguments.images) for part in ("train", "val")}
        config = config_of(arguments, parts, folder / "run")
        if arguments.fit is not None:
            config = fitted(config, folder / "trial", arguments.fit - (time.monotonic() - start))
        figures = figures_of(config, arguments)
    record.write(f"{arguments.data_set}-{arguments.model}", figures, arguments.out)


def config_of(arguments: argparse.Namespace, parts: dict[str, Path], out: Path) -> TrainConfig:
    settings = SETTINGS[arguments.data_set]
    config = replace(
        settings.get(arguments.model, settings["mobilevit_xxs"]),
        data=parts["train"],
        val_data=parts["val"],
        out=out,
        model=arguments.model,
        device=arguments.device,
        num_workers=arguments.num_workers,
    )
    told = {"epochs": arguments.epochs, "image_size": arguments.image_size, "batch_size": arguments.batch_size}
    config = replace(config, **{name: value for name, value in told.items() if value is not None})
    if arguments.compile is None:
        return config
    return replace(config, hardware=replace(config.hardware, compile=arguments.compile))


def figures_of(config: TrainConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and tell what came of it."""
    start = time.monotonic()
    result = mobilevit.train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    told = {"data": "train.parquet", "val_data": "val.parquet", "out": "run"}
    parameters = sum(parameter.numel() for parameter in mobilevit.load(result.best).parameters())
    figures = {
        "data_set": arguments.data_set,
        "model": arguments.model,
        "parameters": parameters,
        "epochs": config.epochs,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "top1": result.report.score,
        "last_epoch_top1": rows[-1]["top1"],
        "validation_images": result.report.num_images,
        "images_per_second": [row["images_per_second"] for row in rows],
        "top1_by_epoch": [row["top1"] for row in rows],
        "train_loss_by_epoch": [row["train_loss"] for row in rows],
        "peak_memory_mb": rows[-1]["peak_memory_mb"],
        "leaderboard_top1": LEADERBOARD.get(arguments.data_set),
        "config": json.loads(config.to_json()) | told,
    }
    shown = ("data_set", "model", "parameters", "epochs", "minutes", "top1", "last_epoch_top1", "leaderboard_top1")
    print(json.dumps({name: figures[name] for name in shown}), flush=True)
    return figures


def fitted(config: TrainConfig, out: Path, seconds: float) -> TrainConfig:
    """The same settings with no more epochs than take so many seconds, by a trial of three."""
    start = time.monotonic()
    ends = EpochEnds()
    logging.getLogger("mobilevit").addHandler(ends)
    mobilevit.train(replace(config, out=out, epochs=3))
    logging.getLogger("mobilevit").removeHandler(ends)
    spent = time.monotonic() - start
    an_epoch = ends.times[-1] - ends.times[-2]
    around = spent - 3 * an_epoch  # models are made and compiled, processes start, plots are drawn
    left = seconds - spent - around
    epochs = next((count for count in EPOCHS if count <= config.epochs and 1.1 * count * an_epoch <= left), 1)
    print(f"{an_epoch:.2f} s an epoch, {around:.1f} s around them, {left:.0f} s left: {epochs} epochs", flush=True)
    return replace(config, epochs=epochs)


class EpochEnds(logging.Handler):
    """Notes when training told that an epoch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, told: logging.LogRecord) -> None:
        if told.getMessage().startswith("epoch "):
            self.times.append(time.monotonic())


def in_one_file(folders: list[Path], part: str, out: Path, count: int | None) -> Path:
    """The parquet file of a part; joined if it is in several, and shortened if only `count` images are wanted."""
    import pyarrow
    from pyarrow import parquet

    names = [part, "test"] if part == "val" else [part]
    files = (file for folder in folders for name in names for file in folder.glob(f"{name}*.parquet"))
    found = sorted(files, key=lambda file: file.name)
    if not found:
        raise SystemExit(f"{' and '.join(map(str, folders))}: no {' or '.join(names)}.parquet")
    if len(found) == 1 and count is None:
        return found[0]
    table = pyarrow.concat_tables([parquet.read_table(file) for file in found])
    if count is not None:
        labels = table["label"].to_pylist()
        most, rows = -(-count // len(set(labels))), []
        seen: Counter[Any] = Counter()
        for row, label in enumerate(labels):  # as many of each class
            seen[label] += 1
            rows += [row] if seen[label] <= most else []
        table = table.take(rows)
    path = out / f"{part}.parquet"
    parquet.write_table(table, path)
    return path


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
