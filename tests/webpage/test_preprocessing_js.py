"""What the browser does to arrays and answers, run by Node.js, against Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.imaging.preprocessing import RESAMPLING, Preprocessing
from mobilevit.results.detection import find_objects, to_pixels
from mobilevit.results.segmentation import decode_label_map
from mobilevit.webpage import page_files

node = shutil.which("node")
pytestmark = pytest.mark.skipif(node is None, reason="Node.js is not installed")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for name, data in page_files("browser").items():
        if name.endswith("processing.js"):
            (folder / name).with_suffix(".mjs").write_bytes(data)
    return folder


def run(folder: Path, script: str, files: dict[str, bytes], told: Any) -> bytes:
    """The bytes that a script of ES modules writes to `out`."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "told.json").write_text(json.dumps(told))
    (folder / "run.mjs").write_text(
        'import { readFileSync, writeFileSync } from "node:fs";\n'
        'const told = JSON.parse(readFileSync("told.json"));\n' + script
    )
    assert node is not None
    done = subprocess.run([node, "run.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "out").read_bytes()


def random_pixels(width: int, height: int) -> np.ndarray:
    """Noise over slopes, with hard edges."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 3)], axis=2)
    noise = np.random.default_rng(width).normal(0, 40, slopes.shape)
    edges = 255 * ((x // 9 + y // 7) % 2)[..., None]
    return (0.5 * slopes + noise + 0.5 * edges).clip(0, 255).astype(np.uint8)


SIZES = [(200, 150), (97, 301), (40, 33), (640, 480), (1, 1), (128, 96)]


@pytest.mark.parametrize("resize_mode", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_inputs_are_pythons_byte_for_byte(scripts: Path, resize_mode: Any, interpolation: Any) -> None:
    preprocessing = Preprocessing(size=(96, 128), resize_mode=resize_mode, interpolation=interpolation)
    script = """
import { prepare } from "./preprocessing.mjs";
const all = told.sizes.map(([width, height], n) => {
  const rgb = new Uint8Array(readFileSync(`image${n}`));
  return prepare(told.preprocessing, rgb, height, width).pixels;
});
writeFileSync("out", Buffer.concat(all));
"""
    arrays = [random_pixels(*size) for size in SIZES]
    files = {f"image{n}": pixels.tobytes() for n, pixels in enumerate(arrays)}
    out = run(scripts, script, files, {"sizes": SIZES, "preprocessing": preprocessing.to_dict()})
    found = np.frombuffer(out, np.uint8).reshape(len(SIZES), 96, 128, 3)
    for size, ours, pixels in zip(SIZES, found, arrays, strict=True):
        image = Image.fromarray(pixels)
        expected = preprocessing.resize(image)
        if size[0] < size[1] and interpolation != "nearest":
            # Pillow resamples such arrays vertically first, since version 13; horizontally first, it is the same.
            place = preprocessing.placement((image.height, image.width))
            left, top, right, bottom = place.region
            height, width = place.filled
            wide = image.resize((width, image.height), RESAMPLING[interpolation], (left, 0, right, image.height))
            expected = np.zeros((96, 128, 3), np.uint8)
            box = (0, top, width, bottom)
            expected[:height, :width] = np.asarray(wide.resize((width, height), RESAMPLING[interpolation], box))
        assert np.array_equal(ours, expected), size


def test_transparency_becomes_white(scripts: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    script = """
import { rgbOf } from "./preprocessing.mjs";
writeFileSync("out", rgbOf(new Uint8Array(readFileSync("rgba"))));
"""
    found = np.frombuffer(run(scripts, script, {"rgba": rgba.tobytes()}, None), np.uint8).reshape(40, 30, 3)
    white = Image.new("RGBA", (30, 40), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(rgba, "RGBA")).convert("RGB")).astype(int)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_label_maps_are_pythons(scripts: Path) -> None:
    logits = torch.randn(5, 24, 32)
    logits = torch.nn.functional.interpolate(logits[None], (96, 128), mode="bilinear")[0].contiguous()
    script = """
import { placement } from "./preprocessing.mjs";
import { labelMap } from "./postprocessing.mjs";
const logits = new Float32Array(readFileSync("logits").buffer.slice(0));
const all = told.sizes.map(([width, height]) => labelMap(logits, 5, placement(told.preprocessing, height, width)));
writeFileSync("out", Buffer.concat(all));
"""
    preprocessing = Preprocessing(size=(96, 128), resize_mode="pad")
    sizes = [(300, 200), (128, 96), (50, 90)]
    out = run(
        scripts,
        script,
        {"logits": logits.numpy().tobytes()},
        {"sizes": sizes, "preprocessing": preprocessing.to_dict()},
    )
    found, at = np.frombuffer(out, np.uint8), 0
    for width, height in sizes:
        ours = found[at : at + width * height].reshape(height, width)
        at += width * height
        expected = decode_label_map({"logits": logits.numpy()}, preprocessing.placement((height, width)))
        assert (ours == expected).mean() > 0.9995  # float32 here, float64 there


def test_boxes_are_pythons(scripts: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centers, sides = torch.rand(50, 2, generator=generator), 0.1 + 0.3 * torch.rand(50, 2, generator=generator)
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    scores = torch.rand(50, 3, generator=generator) * 0.5
    expected = find_objects(boxes.numpy(), scores.numpy())
    flat = {(round(float(scores[a, k]), 7)): (k, a) for a in range(50) for k in range(3)}
    selected = [[0, *flat[round(float(score), 7)]] for score in expected.scores]
    script = """
import { placement } from "./preprocessing.mjs";
import { detect } from "./postprocessing.mjs";
const read = (name, Kind) => new Kind(new Uint8Array(readFileSync(name)).buffer);
const place = placement(told.preprocessing, 150, 200);
const [boxes, scores] = ["boxes", "scores"].map((name) => read(name, Float32Array));
const found = detect(boxes, scores, read("selected", BigInt64Array), ["a", "b", "c"], place);
writeFileSync("out", JSON.stringify(found));
"""
    for mode in ("stretch", "pad", "crop"):
        preprocessing = Preprocessing(size=(96, 128), resize_mode=mode)  # type: ignore[arg-type]
        shuffled = np.random.default_rng(0).permutation(np.array(selected, np.int64))
        files = {"boxes": boxes.numpy().tobytes(), "scores": scores.numpy().tobytes(), "selected": shuffled.tobytes()}
        found = json.loads(run(scripts, script, files, {"preprocessing": preprocessing.to_dict()}))["detections"]
        corners, told, labels = to_pixels(expected, preprocessing.placement((150, 200)))
        assert [one["label"] for one in found] == ["abc"[n] for n in labels]
        np.testing.assert_allclose([one["score"] for one in found], told, rtol=1e-6)
        np.testing.assert_allclose([one["box_xyxy"] for one in found], corners, atol=1e-3)
