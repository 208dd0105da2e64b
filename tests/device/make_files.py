"""Make the files that the tests of the device floor read: exported models, images, and PyTorch's predictions.

    python tests/device/make_files.py FOLDER [FORMAT ...]

Without a format, for ONNX and OpenVINO; with `none`, checkpoints alone.

It runs where PyTorch is. LiteRT files, whose converter needs an environment of its own, are kept compressed in
`tests/device/litert`: made by this script with the format `litert` in `.venv-litert`, and unpacked otherwise. Weights
have few values, so that compressed files are small.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import mobilevit
from mobilevit.card import ModelCard, card_of
from mobilevit.imaging.photographs import builtin_photographs

KEPT = Path(__file__).parent / "litert"
CLASSES = {
    "classification": ("ant", "bee", "cat", "dog", "eel"),
    "detection": ("ant", "bee", "cat"),
    "segmentation": ("background", "ant", "bee", "cat"),
}
SIZES = {"classification": (128, 128), "detection": (192, 192), "segmentation": (128, 192)}


def main() -> None:
    folder, formats = (
        Path(sys.argv[1]),
        [name for name in sys.argv[2:] if name != "none"] if sys.argv[2:] else ["onnx", "openvino"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    images = [folder / f"{number}.png" for number in range(4)]
    for path, view in zip(images, builtin_photographs()[::5], strict=False):
        view.save(path)
    Image.new("RGB", (40, 30), "teal").save(images[3])
    for task, classes in CLASSES.items():
        checkpoint = folder / f"{task}.safetensors"
        model = mobilevit.create_model("mobilevit_xxs", task=task, num_classes=len(classes))
        model.card = small_card(model, task)
        fill_coarsely(model)
        mobilevit.save(model, checkpoint, classes=classes)
        for name in (name for name in formats if name != "none"):
            report = mobilevit.export(checkpoint, folder, format=name)
            if name == "litert":
                for path in (report.path, Path(f"{report.path}.json")):
                    keep(path.name, path.read_bytes())
        predictor = mobilevit.Predictor(checkpoint, device="cpu")
        found = json.dumps([{**predictor(path).to_dict(min_score=0.0), "source": path.name} for path in images])
        (folder / f"{task}.json").write_text(found)
        if "litert" in formats:  # another PyTorch calibrates to other weights
            keep(f"{task}-litert.json", found.encode())
    for packed in KEPT.glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def keep(name: str, content: bytes) -> None:
    """Write a compressed file into `tests/device/litert`."""
    (KEPT / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))


def small_card(model: nn.Module, task: str) -> ModelCard:
    """The model's card, with a small input."""
    card = card_of(model)
    return dataclasses.replace(card, preprocessing=dataclasses.replace(card.preprocessing, size=SIZES[task]))


@torch.no_grad()
def fill_coarsely(model: nn.Module) -> None:
    """Random weights of four values each, and statistics of photographs, so that images get different answers."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    for parameter in model.parameters():
        if parameter.ndim > 1:
            picked = levels[torch.randint(4, parameter.shape, generator=generator)]
            parameter.copy_(picked * (1.6 / parameter[0].numel()) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
        if isinstance(module, nn.Dropout):
            module.eval()
    preprocessing = card_of(model).preprocessing
    pixels = np.stack([preprocessing.resize(view) for view in builtin_photographs()])
    model.train()
    model(torch.from_numpy(preprocessing.normalize(pixels)))
    model.eval()


if __name__ == "__main__":
    main()
