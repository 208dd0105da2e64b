"""Training steps against timm's model, in the package's own loss, optimizer and average, interleaved.

    python benchmarks/training_speed.py             # float32: two minutes
    python benchmarks/training_speed.py --amp       # the same in bf16, by autocast

On a CPU; gpu_training.py is for GPUs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import mobilevit
import record
from mobilevit.benchmarking import peers
from mobilevit.devices import keep_freed_memory
from mobilevit.tasks.classification import classification_loss
from mobilevit.training.config import OptimizerSettings
from mobilevit.training.learner import WeightAverage, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--amp", action="store_true", help="bf16 by autocast")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # for all sides, as in a run
    name, num_classes = arguments.model, 5
    timm = peers.timm_model(name, num_classes)
    sides = {
        "timm": timm,
        "timm channels_last": copy.deepcopy(timm).to(memory_format=torch.channels_last),
        "mobilevit": mobilevit.create_model(name, num_classes=num_classes),
    }
    steps = {side: Step(network, side, arguments) for side, network in sides.items()}
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(0, num_classes, (arguments.batch_size,))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 2):
        for side, step in steps.items():
            start = time.perf_counter()
            step(pixels, labels)
            if number >= 2:
                times[side].append(time.perf_counter() - start)
    speed = {side: round(arguments.batch_size / statistics.median(t), 1) for side, t in times.items()}
    # A round's three sides run within a second of each other, so its ratio is free of slower drift.
    pairs = {s: [a / b for a, b in zip(times[s], times["mobilevit"], strict=True)] for s in sides if s != "mobilevit"}
    ratios = {f"faster than {side}": round(statistics.median(values), 3) for side, values in pairs.items()}
    print(speed, ratios)
    told = {"model": name, "image_size": arguments.image_size, "batch_size": arguments.batch_size}
    measured = "training_speed_bf16" if arguments.amp else "training_speed"
    record.write(
        measured if name == "mobilevit_xxs" else f"{measured}-{name}",
        {"unit": "images/s, median of rounds", **told, "figures": speed, "ratios": ratios},
    )


class Step:
    """One training step as the loop does it."""

    def __init__(self, network: nn.Module, side: str, arguments: argparse.Namespace) -> None:
        settings = OptimizerSettings()
        self.network, self.amp = network.train(), arguments.amp
        self.average = WeightAverage(network, settings.ema_momentum)
        self.optimizer = make_optimizer(network, settings, torch.device("cpu"))
        plain = side == "timm"
        self.memory_format = torch.contiguous_format if plain else torch.channels_last

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        images = (pixels.float() / 255).contiguous(memory_format=self.memory_format)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.amp):
            logits = self.network(images)
        classification_loss(logits, labels, label_smoothing=0.1).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()


if __name__ == "__main__":
    main()
