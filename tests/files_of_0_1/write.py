"""Write one of each kind of file with version 0.1, and note how version 0.1 reads it.

Runs with version 0.1 (commit 3c10f73) only, and was run once:

    git worktree add ../v01 3c10f73
    PYTHONPATH=../v01/src python tests/files_of_0_1/write.py

Each folder is packed as `NAME.tar.xz` beside this script; the answers go to `expected.json`. Weights are 509
numbers that repeat, so that megabytes of them compress to kilobytes and yet every channel differs.
"""

# ruff: noqa: I001, the modules are those of version 0.1

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import lzma
import math
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import mobilevit
from mobilevit.benchmark import tune as tuning
from mobilevit.benchmark.rounds import Measurement
from mobilevit.data.shard_writing import write_shards
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.preprocessing import Preprocessing
from mobilevit.training import loop
from mobilevit.training.run import RunFolder

HERE = Path(__file__).parent
PROVENANCE = {"trained_on": "nothing", "licence": "Apache-2.0"}


NUMBERS = torch.from_numpy(np.random.RandomState(0).standard_normal(509).astype(np.float32))


def pattern(shape: tuple[int, ...], name: str) -> Tensor:
    """Normal numbers that repeat after 509; gains and variances of 1, so that folding them keeps the repetition."""
    if len(shape) <= 1 and name.endswith(("weight", "running_var")):
        return torch.ones(shape)
    count = math.prod(shape)
    values = NUMBERS.repeat(count // len(NUMBERS) + 1)[:count].reshape(shape)
    return 0.1 * values if len(shape) <= 1 else values / math.sqrt(math.prod(shape[1:]))


def patterned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: pattern(tuple(tensor.shape), name) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def fill(model: nn.Module) -> nn.Module:
    model.load_state_dict(patterned(model.state_dict()))
    return model.eval()


def write_image(path: Path) -> None:
    y, x = np.mgrid[:72, :96]
    pixels = np.stack([x * 255 // 95, y * 255 // 71, (x // 8 + y // 8) % 2 * 200 + 20], axis=-1).astype(np.uint8)
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)


def write_checkpoints(folder: Path) -> None:
    folder.mkdir()
    mobilevit.save(
        fill(mobilevit.create_model("mobilevit_xxs", num_classes=3, patch_size=(8, 4, 2))),
        folder / "classifier.safetensors",
        classes=["cat", "dog", "猫"],
        preprocessing=Preprocessing(size=(64, 128), crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.25)),
        metrics={"top1": 0.75},
        provenance=PROVENANCE,
    )
    mobilevit.save(
        fill(mobilevit.create_model("mobilevit_xxs", task="detection", num_classes=2)),
        folder / "detector.safetensors",
        classes=["car", "person"],
        preprocessing=Preprocessing(size=(128, 128), resize_mode="stretch", interpolation="bilinear"),
        metrics={"ap": 0.25},
        provenance=PROVENANCE,
        score_threshold=0.37,
    )
    head = DeepLabv3Config(aspp_channels=64, atrous_rates=(2, 4, 6), aux_head=True)
    segmenter = fill(mobilevit.create_model("mobilevit_xxs", task="segmentation", num_classes=3, head=head))
    balance(segmenter)
    mobilevit.save(
        segmenter,
        folder / "segmenter.safetensors",
        classes=["background", "road", "sky"],
        preprocessing=Preprocessing(size=(64, 64), resize_mode="pad", interpolation="bilinear"),
        metrics={"miou": 0.5},
        provenance=PROVENANCE,
    )


@torch.no_grad()
def balance(segmenter: nn.Module) -> None:
    """Make all classes equally likely, so that the label map has all of them."""
    logits = segmenter(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))).logits
    segmenter.classifier.bias -= logits.mean((0, 2, 3))


def export(checkpoints: Path, folder: Path, image: Path) -> None:
    classifier, detector, segmenter = sorted(checkpoints.iterdir())
    for name in ("onnx", "openvino", "executorch", "pt2"):
        mobilevit.export(classifier, folder / name, format=name, pictures=[image])
    onnx = partial(mobilevit.export, out=folder / "onnx", pictures=[image])
    onnx(classifier, dynamic=("batch",), bake_preprocessing=True, name="baked")
    onnx(detector)
    onnx(detector, nms=True, name="detector-nms")
    onnx(segmenter)
    onnx(segmenter, label_map=True, name="segmenter-map")


def tune(checkpoints: Path, folder: Path, image: Path) -> None:
    """With ONNX Runtime as the winner, whatever this machine says."""
    measure = tuning.measure

    def onnx_wins(*arguments: Any, **settings: Any) -> list[Any]:
        return [
            dataclasses.replace(result, median_ms=1e-3)
            if isinstance(result, Measurement) and result.contender.engine == "onnx"
            else result
            for result in measure(*arguments, **settings)
        ]

    folder.mkdir()
    checkpoint = folder / "classifier.safetensors"
    checkpoint.write_bytes((checkpoints / checkpoint.name).read_bytes())
    tuning.measure = onnx_wins
    tuning.tune(checkpoint, engines=("onnx",), precisions=("fp32",), pictures=[image], threads=1, rounds=2)


def write_images(folder: Path) -> None:
    """Two classes of eight images each, of one color."""
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 32), (number, 200 * label + number, 7)).save(folder / name / f"{number}.png")


def train(images: Path, run: Path) -> None:
    """Stop in the second of three epochs of three steps, two steps in."""
    saved, save_last = 0, RunFolder.save_last

    def save_and_stop(self: RunFolder, state: dict[str, Any]) -> None:
        nonlocal saved
        saved += 1
        state = {**state, **{key: _patterned_anywhere(value) for key, value in state.items() if key != "ranks"}}
        save_last(self, state)
        if saved == 3 + 1 + 2:
            raise KeyboardInterrupt

    RunFolder.save_last = save_and_stop  # type: ignore[method-assign]
    config = mobilevit.TrainConfig(
        data=images, out=run, image_size=32, epochs=3, batch_size=4, num_workers=0, learning_rate=1e-3, randaugment=5,
        mixup=0.2, checkpoint_minutes=0, device="cpu", val_fraction=0.25,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        loop.train(config)
    for events in run.glob("events.out.tfevents.*"):
        events.unlink()
    best = run / "best.safetensors"
    with safe_open(best, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    save_file(patterned(tensors), best, metadata)


def _patterned_anywhere(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: pattern(tuple(v.shape), str(key)).abs() if isinstance(v, Tensor) and "exp_avg_sq" in str(key)
            else pattern(tuple(v.shape), str(key)) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim
            else _patterned_anywhere(v)
            for key, v in value.items()
        }  # fmt: skip
    return [_patterned_anywhere(v) for v in value] if isinstance(value, list) else value


def answer(model: Path, image: Path) -> dict[str, Any]:
    result = mobilevit.Predictor(model, device="cpu")(image)
    if isinstance(result, mobilevit.tasks.classification.ClassificationResult):
        return {"probabilities": result.probabilities.tolist()}
    if isinstance(result, mobilevit.tasks.detection.DetectionResult):
        kept = result.above(None)
        return {
            "count": len(kept.labels),
            "labels": list(kept.labels[:20]),
            "scores": kept.scores[:20].tolist(),
            "boxes_xyxy": kept.boxes_xyxy[:20].tolist(),
        }
    return {"shares": result.to_dict()["shares"], "label_map": result.label_map[::8, ::8].tolist()}


def pack(folder: Path, target: Path) -> None:
    """The same folder always gives the same bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    target.write_bytes(lzma.compress(data.getvalue(), preset=9))
    print(f"{target.name}: {target.stat().st_size:,} bytes for {len(data.getvalue()):,}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        image = root / "images" / "image.png"
        write_image(image)
        write_checkpoints(root / "checkpoints")
        export(root / "checkpoints", root / "artifacts", image)
        tune(root / "checkpoints", root / "tuned", image)
        write_images(root / "images" / "classes")
        train(root / "images" / "classes", root / "run")
        write_shards(root / "images" / "classes", root / "shards", max_bytes=20_000, val_fraction=0.25)
        models = [*root.glob("checkpoints/*"), *root.glob("run/best.*")]
        models += [p for p in root.glob("artifacts/*/*") if p.suffix in (".onnx", ".xml", ".pte", ".pt2")]
        expected = {path.relative_to(root).as_posix(): answer(path, image) for path in sorted(models)}
        lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in expected.items())
        (HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        for folder in sorted(path for path in root.iterdir()):
            pack(folder, HERE / f"{folder.name}.tar.xz")


if __name__ == "__main__":
    main()
