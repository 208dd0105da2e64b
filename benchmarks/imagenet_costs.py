"""What the paper's ImageNet training costs: steps, memory, reading and storage, from unit costs.

    python benchmarks/imagenet_costs.py

Steps are counted by the sampler that training uses, memory by what a real step keeps for its backward pass, reading by
`data_pipeline.json`. What a GPU does in a second is not known here, so hours are given for several speeds.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

import mobilevit
import record
from mobilevit.data.loaders import EpochSampler, SizedBatch
from mobilevit.training.config import SizeSettings
from mobilevit.training.dry_run import saved_bytes
from mobilevit.training.recipes import find_recipe

IMAGES = 1_281_167
"""Of ImageNet-1k's training part."""
GIGABYTES = 138
"""Of its published tar file."""
PROCESSES = 8
EPOCHS_COUNTED = 3
SPEEDS = (1000, 2000, 4000, 8000)
"""Images of 256 pixels that one GPU learns from in a second."""


def main() -> None:
    pipeline = json.loads((record.RESULTS / "data_pipeline.json").read_text())["figures"]
    per_core = pipeline["500 px to 224 px"]["images_per_second"]["mobilevit shards"]
    figures: dict[str, Any] = {}
    for variant in ("off", "paper", "never_below_base"):
        figures[variant] = steps(variant)
    cost = figures["paper"]["relative_cost"]
    hours = {
        speed: {
            name: round(300 * IMAGES * part / (PROCESSES * speed) / 3600, 1)
            for name, part in (("one size", 1.0), ("multi-scale, as in the paper", cost))
        }
        for speed in SPEEDS
    }
    reading = {
        speed: {
            "cores_for_each_gpu": round(speed / cost / per_core, 1),
            "megabytes_a_second_for_all": round(PROCESSES * speed / cost * GIGABYTES * 1e3 / IMAGES),
        }
        for speed in SPEEDS
    }
    record.write(
        "imagenet_costs",
        {
            "images": IMAGES,
            "processes": PROCESSES,
            "steps": figures,
            "hours_of_300_epochs_by_images_a_second_of_one_gpu": hours,
            "reading_by_images_a_second_of_one_gpu": {"images_a_second_of_one_core": per_core, **reading},
            "memory_mb": {name: memory(name) for name in mobilevit.list_models()},
        },
    )


def steps(variant: str) -> dict[str, Any]:
    settings = find_recipe("imagenet_mobilevit_s").settings
    config = replace(settings, sizes=SizeSettings(multi_scale=variant)).resolve("classification", PROCESSES)
    batches = config.step_sizes() or (SizedBatch(size=(256, 256), batch_size=config.batch_size),)
    sampler = EpochSampler(IMAGES, batches, seed=0, world_size=PROCESSES)
    epochs = [sampler.start(epoch) for epoch in range(EPOCHS_COUNTED)]
    pixels = [
        sum((step.stop - step.start) * step.size[0] * step.size[1] for step in epoch if step.size is not None)
        for epoch in epochs
    ]
    return {
        "images_a_step_of_one_process": {f"{b.size[0]}": b.batch_size for b in batches if b.size is not None},
        "steps_an_epoch": round(statistics.mean(len(epoch) for epoch in epochs)),
        "steps_of_300_epochs": round(300 * statistics.mean(len(epoch) for epoch in epochs)),
        "relative_updates": round(config.batch_size / statistics.mean(batch.batch_size for batch in batches), 3),
        "relative_cost": round(statistics.mean(pixels) / (IMAGES * 256 * 256), 3),
        "share_of_steps": {
            str(size): round(n / len(epochs[0]), 3) for size, n in Counter(s.size for s in epochs[0]).items()
        },
    }


def memory(name: str) -> dict[str, float]:
    """Of one process: weights, gradients, two moments and average; and activations of 128 images of 256 pixels."""
    model = mobilevit.create_model(name).train()
    weights = sum(p.nbytes for p in model.parameters())
    found = {"weights_gradients_optimizer_average": round(5 * weights / 1e6, 1)}
    for label, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        few, many = (saved_bytes(model, torch.rand(n, 3, 256, 256), amp_dtype=dtype) for n in (2, 4))
        found[f"activations_of_128_images_{label}"] = round(128 * (many - few) / 2 / 1e6)
    return found


if __name__ == "__main__":
    main()
