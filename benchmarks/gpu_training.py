"""Training on a GPU: steps of this package's models beside timm's in the same loop, and with real images to read.

    python benchmarks/gpu_training.py                                    # an H100-class GPU, 16 cores: three minutes
    python benchmarks/gpu_training.py --models mobilevit_s --seconds 90
    python benchmarks/gpu_training.py --device cpu --batch 4 --size 64 --rounds 2 --images 32 --no-compile     # a trial

Everything is the package's own learner: loss, autocast to bf16, AdamW, weight average; only the network differs. Rounds
are interleaved. Then the same learner reads a parquet file of 500-pixel JPEGs with several processes, beside itself on
one batch that lies on the GPU. The result file is written after every model.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import record
from data_pipeline import write_images, write_parquet
from mobilevit.benchmarking import peers
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import Batch, BatchLoader, ahead_on, default_num_workers
from mobilevit.tasks.classification import CLASSIFICATION
from mobilevit.training.config import HardwareSettings, TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.learner import Learner
from mobilevit.training.loop import Run

NUM_CLASSES = 1000
OURS = "mobilevit"
TIMM, TIMM_PLAIN = "timm channels_last", "timm contiguous"
SIDES = (f"{OURS}, compiled", f"{TIMM}, compiled", f"{OURS}, eager", f"{TIMM}, eager", f"{TIMM_PLAIN}, eager")
"""The compiler chooses layouts itself, so that one of timm's is enough there. The most important first."""
BATCH = {"mobilevit_s": 128}
"""Images in a step; of other models 256."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilevit_s", "mobilevit_xxs"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, help="128 of mobilevit_s and 256 of others if not given")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of a side in one round")
    parser.add_argument("--images", type=int, default=8192, help="to read in an epoch")
    parser.add_argument("--no-compile", action="store_true", help="run what would be compiled as it is")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after so many")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache, measure nothing")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    if arguments.no_compile:
        torch.compiler.set_stance("force_eager")
    told = {"size": arguments.size, "amp": "bf16"}
    found: dict[str, Any] = {"unit": "images a second, median of rounds", **told, "steps": {}, "reading": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            if time.monotonic() > end:
                print(f"{name}: no time left", flush=True)
                continue
            batch_size = arguments.batch or BATCH.get(name, 256)
            sides = {side: learner_of(name, side, batch_size, arguments) for side in arguments.sides}
            if arguments.compile_only:
                for learner in sides.values():
                    take_steps(learner, batch_for(learner), 1)
                continue
            found["steps"][name] = steps = compare(sides, arguments, end)
            print_steps(name, steps)
            record.write("gpu_training", found, arguments.out)
            ours = next((sides[side] for side in (f"{OURS}, compiled", f"{OURS}, eager") if side in sides), None)
            sides.clear()
            if ours is not None and time.monotonic() < end:
                found["reading"][name] = reading = read(ours, images_in(Path(folder), arguments), arguments)
                print(f"{name}, with images that are read: {reading}", flush=True)
                record.write("gpu_training", found, arguments.out)
            free(arguments.device)


def learner_of(name: str, side: str, batch_size: int, arguments: argparse.Namespace) -> Learner:
    data = ImageSet(
        task=CLASSIFICATION,
        origin="nothing",
        names=["none"],
        targets=[0],
        classes=tuple(f"class {number}" for number in range(NUM_CLASSES)),
        open=lambda _: b"",
    )
    origin, how = side.split(", ")
    config = TrainConfig(
        data=Path("nothing"),
        task="classification",
        model=name,
        image_size=arguments.size,
        batch_size=batch_size,
        learning_rate=1e-4,
        device=arguments.device,
        hardware=HardwareSettings(amp="bf16", compile=how == "compiled"),
    ).resolve("classification")
    network = None if origin == OURS else timm_in(origin.removeprefix("timm "), name)
    learner = Learner(config, data, world=World(), device=torch.device(arguments.device), network=network)
    learner.train_mode()
    return learner


class Contiguous(nn.Module):
    """A network that is given its images as most code gives them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.contiguous())
        return logits


def timm_in(layout: str, name: str) -> Callable[[int], nn.Module]:
    def make(num_classes: int) -> nn.Module:
        network = peers.timm_model(name, num_classes)
        return Contiguous(network) if layout == "contiguous" else network.to(memory_format=torch.channels_last)

    return make


def batch_for(learner: Learner) -> Batch:
    """One batch that lies on the learner's device."""
    torch.manual_seed(0)
    count, (height, width) = learner.config.batch_size, learner.config.input_size
    shape = (count, height, width, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=learner.device).permute(0, 3, 1, 2)
    targets = torch.randint(0, NUM_CLASSES, (count,), device=learner.device)
    return Batch(images=images, targets=targets, indices=list(range(count)), errors=[])


def compare(sides: dict[str, Learner], arguments: argparse.Namespace, end: float) -> dict[str, Any]:
    device = torch.device(arguments.device)
    batch = batch_for(next(iter(sides.values())))
    failed: dict[str, str] = {}
    memory: dict[str, float] = {}
    for side, learner in list(sides.items()):
        if time.monotonic() > end:
            failed[side] = "no time left"
        else:
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                take_steps(learner, batch, 3)
                print(f"{side}: first steps after {time.perf_counter() - start:.1f} s", flush=True)
                if device.type == "cuda":
                    memory[side] = round(torch.cuda.max_memory_allocated() / 1e6)
            except Exception as error:  # the others go on; the reason is in the result
                failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print(f"{side}: {failed[side]}", flush=True)
        if side in failed:
            del sides[side]
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, learner in sides.items():
            times[side].append(take_steps(learner, batch, arguments.steps))
    speed = {side: len(batch) / statistics.median(spent) for side, spent in times.items()}
    hows = ("compiled", "eager")
    pairs = [(f"{OURS}, {how}", f"{theirs}, {how}") for how in hows for theirs in (TIMM, TIMM_PLAIN)]
    pairs = [pair for pair in pairs if speed.keys() >= set(pair)]
    return {
        "batch": len(batch),
        "images_per_second": {side: round(value, 1) for side, value in speed.items()},
        "spread_ms": {side: [round(min(t) * 1e3, 3), round(max(t) * 1e3, 3)] for side, t in times.items()},
        "peak_memory_mb": memory,
        "failed": failed,
        "ratio": {
            theirs: round(speed[ours] / speed[theirs], 3) for ours, theirs in pairs if {ours, theirs} <= {*speed}
        },
    }


def take_steps(learner: Learner, batch: Batch, count: int) -> float:
    """Seconds of one step, from `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        learner.step(batch, share=1.0, learning_rate=1e-4)
    if learner.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


# -- real images ------------------------------------------------------------------------------------------------------


def images_in(folder: Path, arguments: argparse.Namespace) -> Path:
    """A parquet file of JPEGs; few are different, as drawing them takes time, but all are read and decoded."""
    path = folder / "all.parquet"
    if not path.exists():
        import pyarrow
        from pyarrow import parquet

        different = min(256, arguments.images)
        write_images(folder / "folder", different, longer=500)
        write_parquet(folder / "folder", path)
        table = parquet.read_table(path)
        parquet.write_table(pyarrow.concat_tables([table] * (arguments.images // different)), path)
    return path


def read(learner: Learner, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the learner with images that are read, and with a batch that is there."""
    cores = len(os.sched_getaffinity(0))
    batch = batch_for(learner)
    synthetic = len(batch) / min(take_steps(learner, batch, arguments.steps) for _ in range(3))
    found: dict[str, Any] = {
        "cores": cores,
        "synthetic": round(synthetic, 1),
    }
    for count in dict.fromkeys((default_num_workers(learner.device), max(1, cores - 1))):
        config = dataclasses.replace(learner.config, data=path, val_data=path, num_workers=count)
        loader = Run(config, World(), learner.device).loader
        alone = images_per_second(loader.epoch() for _ in epochs(loader))
        fed = images_per_second(learned(learner, loader) for _ in epochs(loader))
        found[f"{count} processes"] = {
            "reading_alone": round(alone, 1),
            "training": round(fed, 1),
            "of_synthetic": round(fed / synthetic, 3),
        }
        del loader
    return found


def epochs(loader: BatchLoader) -> Iterator[int]:
    for epoch in range(2):
        loader.start(epoch)
        yield epoch


def learned(learner: Learner, loader: BatchLoader) -> Iterator[Batch]:
    for batch in ahead_on(learner.device, loader.epoch()):
        learner.step(batch, share=1.0, learning_rate=1e-4)
        yield batch


def images_per_second(batches_of_epochs: Iterable[Iterator[Batch]]) -> float:
    """Without the first batches, while processes start."""
    batches = itertools.chain.from_iterable(batches_of_epochs)
    for _ in range(2):
        next(batches)
    start = time.perf_counter()
    total = sum(len(batch) for batch in batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return total / (time.perf_counter() - start)


def free(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def print_steps(name: str, figures: dict[str, Any]) -> None:
    print(f"\n{name}, ours over timm: {figures['ratio']}")
    for side, value in figures["images_per_second"].items():
        print(f"  {side:32s} {value:10,.1f} images/s")


if __name__ == "__main__":
    main()
