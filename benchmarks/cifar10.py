"""The recipe `cifar10`: mobilevit_xxs on CIFAR-10 from scratch, with the time it takes, compilation included.

    python benchmarks/cifar10.py --data FOLDER                                    # a GPU: meant for ten minutes
    python benchmarks/cifar10.py --data FOLDER --epochs 1 --images 1000 --image-size 64 --no-compile --device cpu

FOLDER holds train.parquet and test.parquet with the columns `image` (encoded) and `label`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

import record
from mobilevit.training.config import HardwareSettings
from mobilevit.training.loop import train
from mobilevit.training.recipes import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--images", type=int, help="only so many, to see whether it works")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    parts = {name: arguments.data / f"{name}.parquet" for name in ("train", "test")}
    if arguments.images:
        parts = {name: shortened(path, folder / path.name, arguments.images) for name, path in parts.items()}
    config = find_recipe("cifar10").settings
    told = {"epochs": arguments.epochs, "image_size": arguments.image_size, "batch_size": arguments.batch_size}
    changes = {name: value for name, value in told.items() if value is not None}
    config = dataclasses.replace(
        config,
        data=parts["train"],
        val_data=parts["test"],
        out=arguments.out,
        device=arguments.device,
        hardware=HardwareSettings(compile=not arguments.no_compile),
        **changes,
    )
    start = time.monotonic()
    result = train(config, overwrite=True)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "top1": result.report.score,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "last_epoch_top1": rows[-1]["top1"],
        "images_per_second": [row["images_per_second"] for row in rows],
        "peak_memory_mb": rows[-1]["peak_memory_mb"],
        "validation_images": result.report.num_images,
        "config": json.loads(config.to_json()) | {"data": "train.parquet", "val_data": "test.parquet", "out": "runs"},
    }
    print(json.dumps({name: value for name, value in figures.items() if name != "config"}))
    if arguments.images is None and torch.cuda.is_available():
        record.write("cifar10", figures)


def shortened(path: Path, out: Path, count: int) -> Path:
    from pyarrow import parquet

    parquet.write_table(parquet.read_table(path).slice(0, count), out)
    return out


if __name__ == "__main__":
    main()
