"""The paper's choices, each changed alone, on a few thousand photographs: what they do to accuracy, updates and time.

    python benchmarks/experiments.py train --data FOLDER            # goes on where it was stopped; an hour and a half
    python benchmarks/experiments.py train --data FOLDER --seed 1
    python benchmarks/experiments.py why --data FOLDER              # more of the samplers; a quarter of an hour
    python benchmarks/experiments.py time --data FOLDER             # steps of each kind in turns; a minute
    python benchmarks/experiments.py draw                           # docs/images/experiments.png

FOLDER holds one sub-folder per class. mobilevit_xxs from scratch at 128 pixels; every model is measured at five sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import mobilevit
import record
from mobilevit.card import ModelCard
from mobilevit.data.datasets import load_train_val
from mobilevit.evaluation import evaluation_loader, measure
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.mobilevit import ConvNormAct, MobileViTBlock, fold, initialize, unfold
from mobilevit.tasks.settings import ClassificationSettings
from mobilevit.torch_session import TorchSession
from mobilevit.training.config import OptimizerSettings, SizeSettings, TrainConfig
from mobilevit.training.loop import train

SIDES = (64, 96, 128, 160, 192)
"""Of the multi-scale sampler, and of the images that every model is measured on."""
SIZES = tuple((side, side) for side in SIDES)

PAPER = SizeSettings(multi_scale="paper", train_sizes=SIZES)
OPTIMIZER = OptimizerSettings(clip_grad_norm=1.0)

EXPERIMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard sampler": ("sampler", {}),
    "multi-scale, as in the paper": ("sampler", {"sizes": PAPER}),
    "multi-scale, as in its code v0.1": ("sampler", {"sizes": replace(PAPER, multi_scale="never_below_base")}),
    "patches 8, 4, 2": ("patches", {"patch_size": (8, 4, 2)}),
    "no concat skip": ("skip", {}),
    "no EMA": ("regularization", {"optimizer": replace(OPTIMIZER, ema=False)}),
    "no label smoothing": ("regularization", {"classification": ClassificationSettings(label_smoothing=0.0)}),
    "no weight decay": ("regularization", {"optimizer": replace(OPTIMIZER, weight_decay=0.0)}),
    "weight decay 0.1": ("regularization", {"optimizer": replace(OPTIMIZER, weight_decay=0.1)}),
}
"""What is changed, and the settings that change; everything else is the standard sampler's."""

RESULT = record.RESULTS / "experiments.json"
SAMPLERS = record.RESULTS / "experiments_samplers.json"
TIMES = record.RESULTS / "experiments_time.json"


class WithoutSkip(MobileViTBlock):
    """The block without the concatenation of its input: what the transformer makes is all that goes on."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (ph, pw) = x.shape[-2:], self.patch_size
        padded = (-(-height // ph) * ph, -(-width // pw) * pw)
        y = self.project_in(self.local_conv(x))
        y = F.interpolate(y, size=padded, mode="bilinear", align_corners=False)
        y = fold(self.norm(self.transformer(unfold(y, self.patch_size))), padded, self.patch_size)
        y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        return self.fusion(self.project_out(y))


class Plain(nn.Module):
    """Keeps the run from writing a checkpoint that says it is an unchanged model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def without_skip(num_classes: int) -> nn.Module:
    model = mobilevit.create_model("mobilevit_xxs", num_classes=num_classes)
    for block in [module for module in model.modules() if isinstance(module, MobileViTBlock)]:
        block.__class__ = WithoutSkip
        channels = block.local_conv.conv.in_channels
        block.fusion = ConvNormAct(channels, channels, 3)
        initialize(block.fusion)
    return Plain(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "why", "time", "draw"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    arguments = parser.parse_args()
    {"train": train_all, "why": explain_samplers, "time": time_all, "draw": draw}[arguments.action](arguments)


def config_of(name: str, arguments: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        data=arguments.data,
        out=arguments.out / f"{name} {arguments.seed}",
        image_size=128,
        epochs=arguments.epochs,
        batch_size=32,
        learning_rate=1e-3,
        num_workers=0,
        seed=arguments.seed,
        device="cpu",
        **{"optimizer": OPTIMIZER, **EXPERIMENTS[name][1]},
    )


# -- accuracy ---------------------------------------------------------------------------------------------------------


def train_all(arguments: argparse.Namespace) -> None:
    found: dict[str, Any] = json.loads(RESULT.read_text())["figures"] if RESULT.exists() else {}
    for name in EXPERIMENTS:
        seeds = found.setdefault(name, {})
        if str(arguments.seed) in seeds:
            continue
        seeds[str(arguments.seed)] = figures = run(name, arguments)
        print(name, arguments.seed, figures, flush=True)
        told = {"epochs": arguments.epochs, "image_size": 128, "test_sizes": SIDES}
        record.write("experiments", {"unit": "top-1 on held-out images", **told, "figures": found})


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config = config_of(name, arguments)
    network = without_skip if name == "no concat skip" else None
    result = train(config, overwrite=True, network=network)
    train_set, val_set = parts(config)
    if network is None:
        model = mobilevit.load(result.best)
    else:
        model = network(len(train_set.classes))
        model.load_state_dict(load_file(result.best))
    top1 = accuracy(model, val_set, config)
    updates = sum(len(steps_of_epoch(config, len(train_set), epoch)) for epoch in range(config.epochs))
    return {
        "top1": top1,
        "validation_images": len(val_set),
        "updates": updates,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def accuracy(model: nn.Module, images: Any, config: TrainConfig, renew: Any = None) -> dict[int, float]:
    """Top-1 at every test size; given training images, with BatchNorm's statistics of them at that size."""
    top1 = {}
    for side in SIDES:
        preprocessing = Preprocessing(size=(side, side), crop_fraction=config.crop_fraction)
        card = ModelCard(
            name="mobilevit_xxs", task="classification", classes=images.classes, preprocessing=preprocessing
        )
        loading = {"batch_size": 64, "num_workers": 0, "device": torch.device("cpu")}
        if renew is not None:
            renew_statistics(model, evaluation_loader(renew, card, **loading), preprocessing)
        session = TorchSession(model.eval(), card, device=torch.device("cpu"))
        loader = evaluation_loader(images, card, **loading)
        top1[side] = round(measure(session, loader).report.score, 4)
    return top1


def renew_statistics(model: nn.Module, batches: Any, preprocessing: Preprocessing) -> None:
    """Mean and variance of every BatchNorm over the batches, instead of what training has left there."""
    model.eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.reset_running_stats()
        norm.momentum = None  # an average of all
        norm.train()
    with torch.inference_mode():
        for batch in batches.epoch():
            model(preprocessing.normalize(batch.images))


def parts(config: TrainConfig) -> tuple[Any, Any]:
    return load_train_val(
        config.data, task="classification", val_path=None, val_fraction=config.val_fraction, seed=config.seed
    )


def steps_of_epoch(config: TrainConfig, count: int, epoch: int) -> list[Any]:
    from mobilevit.data.loaders import EpochSampler, SizedBatch

    sizes = config.resolve("classification").step_sizes()
    sampler = EpochSampler(count, sizes or (SizedBatch(size=None, batch_size=config.batch_size),), seed=config.seed)
    return sampler.start(epoch)


def explain_samplers(arguments: argparse.Namespace) -> None:
    """What several sizes cost within few epochs: updates, or statistics of BatchNorm that suit none of the sizes."""
    figures: dict[str, Any] = {}
    for name, epochs in (
        ("standard sampler", arguments.epochs),
        ("multi-scale, as in the paper", arguments.epochs),
        ("multi-scale, as in the paper", arguments.epochs * 3 // 2),
    ):
        config = config_of(name, arguments)
        config = replace(config, epochs=epochs, out=Path(f"{config.out} {epochs} epochs"))
        best = train(config, overwrite=True).best
        train_set, val_set = parts(config)
        mixed = train_set.subset(torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0)).tolist())
        figures[f"{name}, {epochs} epochs"] = row = {
            "updates": sum(len(steps_of_epoch(config, len(train_set), epoch)) for epoch in range(epochs)),
            "top1": accuracy(mobilevit.load(best), val_set, config),
            "top1_renewed": accuracy(mobilevit.load(best), val_set, config, renew=mixed),
        }
        print(name, epochs, row, flush=True)
    record.write("experiments_samplers", {"unit": "top-1 on held-out images", "test_sizes": SIDES, "figures": figures})


# -- time -------------------------------------------------------------------------------------------------------------


def time_all(arguments: argparse.Namespace) -> None:
    """Steps of every experiment that changes their cost, in turns; sizes weigh as often as the sampler draws them."""
    from mobilevit.tasks.classification import classification_loss
    from mobilevit.training.learner import WeightAverage, make_optimizer

    train_set, _ = parts(config_of("standard sampler", arguments))
    num_classes = len(train_set.classes)
    kinds = [name for name, (what, _) in EXPERIMENTS.items() if what in ("sampler", "patches", "skip")]
    plans: dict[str, dict[tuple[int, int], int]] = {}
    spent: dict[tuple[str, tuple[int, int]], list[float]] = {}
    models: dict[str, Any] = {}
    latency: dict[str, list[float]] = {"patches 2, 2, 2": [], "patches 8, 4, 2": [], "no concat skip": []}
    for name in kinds:
        config = config_of(name, arguments).resolve("classification")
        steps = steps_of_epoch(config, len(train_set), 0)
        plans[name] = {}
        for step in steps:
            key = (step.size[0] if step.size else 128, step.stop - step.start)
            plans[name][key] = plans[name].get(key, 0) + 1
        if name == "no concat skip":
            model = without_skip(num_classes)
        else:
            model = mobilevit.create_model("mobilevit_xxs", num_classes=num_classes, patch_size=config.patch_size)
        model.train()
        average = WeightAverage(model, config.optimizer.ema_momentum)
        models[name] = (model, make_optimizer(model, config.optimizer, torch.device("cpu")), average)
    usual = {name: max(plan, key=plan.__getitem__) for name, plan in plans.items()}
    for number in range(arguments.rounds + 1):
        for name in kinds:
            model, optimizer, average = models[name]
            # Odd last batches of an epoch are priced by the image.
            for side, count in {key for key, times in plans[name].items() if times > 1} | {usual[name]}:
                pixels, labels = torch.rand(count, 3, side, side), torch.randint(0, num_classes, (count,))
                start = time.perf_counter()
                classification_loss(model(pixels), labels, label_smoothing=0.1).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                average.update()
                if number:
                    spent.setdefault((name, (side, count)), []).append(time.perf_counter() - start)
        image = torch.rand(1, 3, 256, 256)
        for label, name in zip(latency, ("standard sampler", "patches 8, 4, 2", "no concat skip"), strict=True):
            fast = mobilevit.fuse(models[name][0])
            with torch.inference_mode():
                for _ in range(3):
                    fast(image)
                start = time.perf_counter()
                for _ in range(5):
                    fast(image)
            latency[label].append((time.perf_counter() - start) / 5)
    figures = {}
    for name in kinds:
        prices = {key: statistics.median(times) for (who, key), times in spent.items() if who == name}
        per_image = {side: price / count for (side, count), price in prices.items()}
        seconds = sum(
            times * prices.get(key, per_image.get(key[0], 0.0) * key[1]) for key, times in plans[name].items()
        )
        figures[name] = {
            "updates_per_epoch": sum(plans[name].values()),
            "seconds_per_epoch": round(seconds, 1),
            "ms_per_step": {f"{side} x {count}": round(price * 1e3, 1) for (side, count), price in prices.items()},
        }
        print(name, figures[name])
    latencies = {label: round(statistics.median(times) * 1e3, 2) for label, times in latency.items()}
    print(latencies)
    record.write(
        "experiments_time",
        {"image_size": 128, "figures": figures, "latency_ms_eager_256": latencies, "images": len(train_set)},
    )


# -- image ----------------------------------------------------------------------------------------------------------


def draw(_: argparse.Namespace) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    found = json.loads(RESULT.read_text())["figures"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_size, by_change = figure.subplots(1, 2)
    colors = ("#555555", "#0072b2", "#d55e00")
    samplers = [name for name, (what, _) in EXPERIMENTS.items() if what == "sampler" and found.get(name)]
    for name, color in zip(samplers, colors, strict=False):
        curves = [[seed["top1"][str(side)] for side in SIDES] for seed in found[name].values()]
        means = [statistics.mean(values) for values in zip(*curves, strict=True)]
        by_size.plot(SIDES, means, marker="o", color=color, label=name)
        for curve in curves:
            by_size.plot(SIDES, curve, ls="", marker=".", ms=4, color=color, alpha=0.5)
    if SAMPLERS.exists():
        renewed = json.loads(SAMPLERS.read_text())["figures"]
        for name, color in zip(
            ("standard sampler, 8 epochs", "multi-scale, as in the paper, 12 epochs"), colors[:2], strict=True
        ):
            curve = [renewed[name]["top1_renewed"][str(side)] for side in SIDES]
            by_size.plot(SIDES, curve, ls="--", color=color, label=f"{name},\nstatistics of the test size")
    by_size.set(title="trained at 128 or at 64 to 192 pixels", xlabel="side of test images", ylabel="top-1")
    by_size.set_xticks(SIDES)
    by_size.legend(frameon=False, fontsize=8)
    names = [name for name in EXPERIMENTS if found.get(name)]
    for place, name in enumerate(reversed(names)):
        values = [seed["top1"]["128"] for seed in found[name].values()]
        by_change.plot([statistics.mean(values)], [place], marker="o", color="#0072b2", ls="")
        by_change.plot(values, [place] * len(values), marker=".", ms=4, color="#0072b2", alpha=0.5, ls="")
    base = statistics.mean(seed["top1"]["128"] for seed in found["standard sampler"].values())
    images = next(iter(found["standard sampler"].values()))["validation_images"]
    noise = (base * (1 - base) / images) ** 0.5
    by_change.axvspan(base - noise, base + noise, color="#000000", alpha=0.07, lw=0)
    by_change.set_yticks(range(len(names)), list(reversed(names)))
    by_change.set(title="one thing changed; gray: one standard error", xlabel="top-1 at 128 pixels")
    for axes, axis, step in ((by_size, by_size.yaxis, 0.02), (by_change, by_change.xaxis, 0.01)):
        axis.set_major_locator(MultipleLocator(step))
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(__file__).parent.parent / "docs" / "images" / "experiments.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
