"""From files to batches: this package's loader beside torchvision's ImageFolder and timm's, one reading process each.

    python benchmarks/data_pipeline.py                        # 500 px JPEGs to 224 px crops; three minutes
    python benchmarks/data_pipeline.py --image-size 160 --append

All read the same JPEGs, made of the package's photographs: random resized crop (8 to 100 % of the area), flip, batches
normalized in float32. What a loader leaves to the training process (timm and this package: the normalization) is done
there and timed, too. Rounds are interleaved; figures are images a second of one core.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import record
from mobilevit.data.datasets import load_train_val
from mobilevit.data.loaders import BatchLoader
from mobilevit.data.shard_writing import write_shards
from mobilevit.imaging.decode import find_images
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.tasks.transforms import ClassificationTransform

BATCH = 64
MIN_AREA = 0.08


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--longer-side", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="keep other sizes in the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        figures = compare(Path(name), arguments)
    path = record.RESULTS / "data_pipeline.json"
    before: dict[str, Any] = json.loads(path.read_text())["figures"] if arguments.append and path.exists() else {}
    told = f"{arguments.longer_side} px to {arguments.image_size} px"
    record.write("data_pipeline", {"unit": "images a second of one core", "figures": before | {told: figures}})


def compare(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = write_images(place / "folder", arguments.images, arguments.longer_side)
    write_parquet(place / "folder", place / "all.parquet")
    write_shards(place / "folder", place / "shards", max_bytes=16_000_000)
    side = arguments.image_size
    sides: dict[str, Callable[[], Iterator[int]]] = {
        "torchvision ImageFolder": torchvision_loader(place / "folder", side),
        "timm": timm_loader(place / "folder", side),
        "mobilevit folder": our_loader(place / "folder", side),
        "mobilevit parquet": our_loader(place / "all.parquet", side),
        "mobilevit shards": our_loader(place / "shards", side),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):
        for name, epoch in sides.items():
            batches = epoch()
            count = next(batches)  # by then the reading process runs
            start = time.perf_counter()
            count = sum(batches)
            if number:
                speeds[name].append(count / (time.perf_counter() - start))
    medians = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    ratios = {
        f"{ours} over {theirs}": round(
            statistics.median(a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)), 3
        )
        for ours in sides
        for theirs in ("torchvision ImageFolder", "timm")
        if ours.startswith("mobilevit")
    }
    print(json.dumps({"images_per_second": medians, "ratios": ratios}, indent=2))
    return {"images_per_second": medians, "ratios": ratios, "mean_kilobytes": round(statistics.mean(sizes) / 1e3, 1)}


def write_images(folder: Path, count: int, longer: int) -> list[int]:
    """Parts of the package's photographs, as JPEGs of quality 90; returns their sizes in bytes."""
    photographs = Path(str(importlib.resources.files("mobilevit.imaging"))) / "photographs"
    originals = [Image.open(path).convert("RGB") for path in find_images(photographs)]
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for number in range(count):
        original = originals[number % len(originals)]
        shape = (longer, longer * 3 // 4) if number % 2 else (longer * 3 // 4, longer)
        share = 0.6 + 0.4 * float(torch.rand((), generator=generator))
        scale = min(original.width / shape[0], original.height / shape[1]) * share
        width, height = shape[0] * scale, shape[1] * scale
        left, top = (
            float(torch.rand((), generator=generator)) * spare
            for spare in (original.width - width, original.height - height)
        )
        image = original.resize(shape, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        path = folder / f"class{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
        sizes.append(path.stat().st_size)
    return sizes


def write_parquet(folder: Path, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    files = find_images(folder)
    columns = {"image": [file.read_bytes() for file in files], "label": [int(file.parent.name[-1]) for file in files]}
    parquet.write_table(pyarrow.table(columns), path)


def our_loader(data: Path, side: int) -> Callable[[], Iterator[int]]:
    train_set, _ = load_train_val(data, task="classification", val_path=None, val_fraction=0.02, seed=0)
    preprocessing = Preprocessing(size=(side, side))
    loader = BatchLoader(
        train_set,
        ClassificationTransform(
            preprocessing=preprocessing, settings=ClassificationSettings(min_crop_area=MIN_AREA), flip=True
        ),
        batch_size=BATCH,
        num_workers=1,
        shuffle_seed=0,
    )

    def epoch() -> Iterator[int]:
        loader.start(0)
        for batch in loader.epoch():
            yield len(preprocessing.normalize(batch.images))

    return epoch


def torchvision_loader(folder: Path, side: int) -> Callable[[], Iterator[int]]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    # As torchvision's own reference training does it.
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(MIN_AREA, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder), transform), BATCH, shuffle=True, num_workers=1, persistent_workers=True
    )

    def epoch() -> Iterator[int]:
        for images, _ in loader:
            yield len(images)

    return epoch


def timm_loader(folder: Path, side: int) -> Callable[[], Iterator[int]]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, side, side),
        batch_size=BATCH,
        is_training=True,
        scale=(MIN_AREA, 1.0),
        interpolation="bicubic",
        color_jitter=None,
        num_workers=1,
        device=torch.device("cpu"),
        persistent_workers=True,
    )

    def epoch() -> Iterator[int]:
        for images, _ in loader:
            yield len(images)

    return epoch


if __name__ == "__main__":
    main()
