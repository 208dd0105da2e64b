"""A model from scratch on 4,317 flower photographs at 128 pixels, and timm's in the same loop as control.

    python benchmarks/flowers.py --data FOLDER --network mobilevit
    python benchmarks/flowers.py --data FOLDER --model mobilevitv2_050
    python benchmarks/flowers.py --data FOLDER --network timm
    python benchmarks/flowers.py --data FOLDER --network timm-channels-last --epochs 3

FOLDER holds one sub-folder per class: daisy, dandelion, rose, sunflower, tulip.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import record
from mobilevit.benchmarking import peers
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.training.config import OptimizerSettings, TrainConfig
from mobilevit.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=["mobilevit", "timm", "timm-channels-last"], default="mobilevit")
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    name = f"flowers-{arguments.network}" if arguments.model == "mobilevit_xxs" else f"flowers-{arguments.model}"
    config = TrainConfig(
        data=arguments.data,
        out=arguments.out / name,
        model=arguments.model,
        image_size=128,
        epochs=arguments.epochs,
        batch_size=16,
        learning_rate=arguments.learning_rate,
        num_workers=0,
        seed=arguments.seed,
        classification=ClassificationSettings(min_crop_area=0.3, mixup=0.1),
        optimizer=OptimizerSettings(clip_grad_norm=1.0),
    )

    def network(num_classes: int) -> nn.Module:
        model = peers.timm_model(arguments.model, num_classes)
        return model.to(memory_format=torch.channels_last) if "channels" in arguments.network else Contiguous(model)

    start = time.monotonic()
    result = train(config, overwrite=True, network=None if arguments.network == "mobilevit" else network)
    minutes = (time.monotonic() - start) / 60
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "validation_top1": round(result.report.top1, 4),
        "last_epoch_top1": rows[-1]["top1"],
        "validation_images": result.report.num_images,
        "minutes": round(minutes, 2),
        "epochs": result.epochs,
        "median_training_images_per_second": sorted(r["images_per_second"] for r in rows)[len(rows) // 2],
        "per_epoch_top1": [r["top1"] for r in rows],
        "config": json.loads(config.to_json()) | {"data": "flowers5", "out": config.out.name},
    }
    print(json.dumps({k: v for k, v in figures.items() if k != "config"}))
    record.write(name, figures)


class Contiguous(nn.Module):
    """Feeds a network the layout its users feed it; the loop's batches are channels-last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous())


if __name__ == "__main__":
    main()
