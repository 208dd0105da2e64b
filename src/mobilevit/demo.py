"""The demonstration: a model trained, measured and used on built-in pictures, and a page that shows it."""

from __future__ import annotations

import base64
import html
import logging
import shutil
import time
from pathlib import Path

from PIL import Image

from mobilevit import factory
from mobilevit.data.datasets import find_images, find_splits
from mobilevit.data.shapes import write_folder
from mobilevit.files import write_text
from mobilevit.inference.predictor import Predictor
from mobilevit.models.card import card_of
from mobilevit.tasks.classification import ClassificationResult
from mobilevit.tasks.drawing import GREEN, RED, contact_sheet, save_image
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import TrainResult, train

log = logging.getLogger("mobilevit")

IMAGE_SIZE = 64


def run_demo(out: Path, *, epochs: int, num_images: int, seed: int) -> Path:
    """Draw pictures, train mobilevit_xxs on them, reload it, predict pictures it never saw, write `report.html`.

    Every step but the drawing is what a user's own command would do, and the command is shown.

    Raises:
        ValueError: the folder holds something that is not a demo.
    """
    begun = time.monotonic()
    data, unseen, run = out / "data", out / "unseen", out / "run"
    marker = out / ".mobilevit-demo"
    if out.is_dir() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"--out {out}: holds something else; choose another folder")
    write_text(marker, "A later demo may replace what lies here.\n")
    for folder in (data, unseen, run):
        shutil.rmtree(folder, ignore_errors=True)
    log.info("drawing %d pictures of shapes into %s", num_images, data)
    write_folder(data, num_images=num_images, seed=seed, size=IMAGE_SIZE)
    write_folder(unseen, num_images=24, seed=seed + 1, size=IMAGE_SIZE)

    config = TrainConfig(
        data=data, out=run, image_size=IMAGE_SIZE, crop_fraction=1.0, min_crop_area=0.7, epochs=epochs,
        learning_rate=2e-3, seed=seed,
    )  # fmt: skip
    command = (
        f"mobilevit train --data {data} --out {run} --image-size {IMAGE_SIZE} --crop-fraction 1 --min-crop-area 0.7 "
        f"--epochs {epochs} --learning-rate 2e-3 --seed {seed}"
    )
    log.info("\n$ %s", command)
    result = train(config)
    log.info("\n$ mobilevit eval %s --data %s\ntop-1 %.2f %%", result.best, data, 100 * result.report.top1)

    log.info("\n$ mobilevit predict %s %s", result.best, unseen)
    predictor = Predictor(result.best)
    pictures = find_images(unseen)
    predictions = predictor([str(path) for path in pictures])
    truth = [path.parent.name for path in pictures]
    for prediction in predictions[:6]:
        log.info("%s  %s %.1f %%", prediction.source, prediction.label, 100 * prediction.probability)
    save_image(_sheet(predictions, truth), out / "unseen.png")
    num_classes = len(next(iter(find_splits(data).values())).classes)
    right = sum(p.label == t for p, t in zip(predictions, truth, strict=True))
    facts = {
        "validation top-1": f"{result.report.top1:.2%} of {result.report.num_images:,} pictures held out",
        "pictures drawn after training": f"{right} of {len(pictures)} right",
        "model": f"mobilevit_xxs, {_num_parameters(result.best):,} parameters, {num_classes} classes, "
        f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels",
        "training": f"{epochs} epochs at {result.images_per_second:,.0f} pictures a second",
        "time in all": f"{time.monotonic() - begun:,.0f} s",
        "checkpoint": f"{result.best} ({result.best.stat().st_size / 1e6:.1f} MB)",
    }
    return write_text(out / "report.html", _page(out, run, facts, result, command))


def _num_parameters(checkpoint: Path) -> int:
    model = factory.load(checkpoint)
    assert card_of(model).name == "mobilevit_xxs"
    return sum(p.numel() for p in model.parameters())


def _sheet(predictions: list[ClassificationResult], truth: list[str]) -> Image.Image:
    captions = [
        [f"{p.label} {p.probability:.0%}", "" if p.label == t else f"is {t}"]
        for p, t in zip(predictions, truth, strict=True)
    ]
    colours = [GREEN if p.label == t else RED for p, t in zip(predictions, truth, strict=True)]
    return contact_sheet([p.image for p in predictions], captions, colours, columns=8, cell=128)


def _page(out: Path, run: Path, facts: dict[str, str], result: TrainResult, command: str) -> str:
    """One file with its pictures inside, so that it can be sent on."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    scores = "".join(
        f"<tr><td>{html.escape(c.name)}</td><td>{c.precision:.3f}</td><td>{c.recall:.3f}</td><td>{c.f1:.3f}</td>"
        f"<td>{c.support}</td></tr>"
        for c in result.report.per_class
    )
    parts = [
        (
            "Pictures it never saw",
            out / "unseen.png",
            "Drawn with another seed. Green: right; red: wrong.",
        ),
        (
            "Training",
            run / "curves.png",
            "Validation uses the moving average of the weights, without label smoothing.",
        ),
        ("What is taken for what", run / "confusion_matrix.png", "Rows are the truth, columns what the model says."),
        ("Validation pictures", run / "samples.png", ""),
        ("Its worst mistakes", run / "worst_mistakes.png", "Wrong answers, the surest first."),
    ]
    figures = "".join(
        f'<h2>{title}</h2><p>{text}</p><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for title, path, text in parts
        if path.exists()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mobilevit demo</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100%; background: #fff; border-radius: 6px }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #8884 }}
code, pre {{ font-size: .9rem; white-space: pre-wrap }}
</style>
<h1>mobilevit demo</h1>
<table>{rows}</table>
<p>Trained with</p><pre>{html.escape(command)}</pre>
{figures}
<h2>By class</h2>
<table><tr><th>class</th><th>precision</th><th>recall</th><th>F1</th><th>pictures</th></tr>{scores}</table>
<p>The same on your own pictures: put them into one folder per class, then
<code>mobilevit train --data FOLDER</code>.</p>
</html>
"""
