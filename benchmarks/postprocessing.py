"""What turning a detector's output into objects costs beside its forward pass: 320 pixels, 3,232 anchors, 81 classes.

    python benchmarks/postprocessing.py

Both sides run in turn on the fused mobilevit_xxs, the smallest, with one image. Three sorts of output: of fresh
weights, where every anchor is as likely to be anything and a quarter of a million scores pass the threshold; noise;
and noise with a background as sure as that of a trained detector.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import mobilevit
import record
from mobilevit.models.ssdlite import DetectionOutput
from mobilevit.results.detection import Detections, decode_detections

ROUNDS = 50


def main() -> None:
    torch.manual_seed(0)
    model = mobilevit.fuse(mobilevit.create_model("mobilevit_xxs", task="detection", num_classes=80))
    image = torch.rand(1, 3, 320, 320)
    with torch.inference_mode():
        fresh: DetectionOutput = model(image)
        noise = fresh._replace(class_logits=2 * torch.randn_like(fresh.class_logits))
        background = torch.tensor([6.0] + [0.0] * 80)
        outputs = {
            "fresh weights": fresh,
            "noise": noise,
            "sure background": noise._replace(class_logits=noise.class_logits + background),
        }
        forward: list[float] = []
        after: dict[str, list[float]] = {name: [] for name in outputs}
        for _ in range(ROUNDS):
            forward.append(_milliseconds(lambda: model(image)))
            for name, output in outputs.items():
                after[name].append(_milliseconds(lambda output=output: _objects(output)))
    base = statistics.median(forward)
    figures = {
        name: {
            "postprocessing_ms": round(statistics.median(times), 3),
            "share_of_forward": round(statistics.median(times) / base, 4),
        }
        for name, times in after.items()
    }
    print({"forward_ms": round(base, 2), **figures})
    record.write("postprocessing", {"anchors": fresh.anchors_cxcywh.shape[0], "forward_ms": round(base, 3), **figures})


def _objects(output: DetectionOutput) -> Detections:
    return decode_detections({name: tensor[0].numpy() for name, tensor in output.named().items()})


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
