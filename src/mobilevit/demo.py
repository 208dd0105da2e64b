"""The demonstration: a model trained, measured and used on built-in images, and a page that shows it."""

from __future__ import annotations

import base64
import dataclasses
import html
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from mobilevit import factory
from mobilevit.card import TaskName
from mobilevit.data import shapes
from mobilevit.errors import MissingPackageError, MobileViTError
from mobilevit.exporting.export import ExportReport, export
from mobilevit.files import write_text
from mobilevit.imaging.decode import Source, find_images
from mobilevit.imaging.drawing import DARK, contact_sheet, save_image
from mobilevit.results.base import Result
from mobilevit.results.classification import ClassificationResult
from mobilevit.runtime.predictor import Predictor
from mobilevit.tasks.classification_report import prediction_sheet
from mobilevit.tasks.report import Report
from mobilevit.tasks.settings import ClassificationSettings, DetectionSettings, SegmentationSettings
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import train

log = logging.getLogger("mobilevit")

NUM_UNSEEN = 24


_SHAPES: dict[TaskName, tuple[Callable[..., None], int]] = {
    "classification": (shapes.write_folder, 3000),
    "detection": (shapes.write_boxes, 3000),
    "segmentation": (shapes.write_masks, 1500),
}
"""Functions that draw labeled images into a folder, and how many they draw."""

_SETTINGS: dict[TaskName, TrainConfig] = {
    "classification": TrainConfig(
        data="",
        image_size=64,
        crop_fraction=1.0,
        epochs=10,
        learning_rate=2e-3,
        classification=ClassificationSettings(min_crop_area=0.7),
    ),
    "detection": TrainConfig(
        data="",
        image_size=128,
        epochs=9,
        batch_size=16,
        learning_rate=2e-3,
        detection=DetectionSettings(zoom_out=0.0, iou_crop=False),
    ),
    "segmentation": TrainConfig(
        data="",
        image_size=128,
        epochs=6,
        batch_size=16,
        learning_rate=1.5e-3,
        segmentation=SegmentationSettings(output_stride=8, scale_range=(0.8, 1.25), rotation=0.0),
    ),
}
"""All but places and seed."""


def run_demo(
    out: Path,
    task: TaskName = "classification",
    *,
    model: str = TrainConfig.model,
    epochs: int | None,
    num_images: int | None,
    seed: int,
) -> Path:
    """Draw images, train a model on them, export it, predict unseen images, write `report.html`.

    Every step but the drawing is what a user's own command would do, and the command is shown. Epochs and images that
    are None are as many as the task needs.

    Raises:
        MobileViTError: no such model, or the folder holds something that is not a demo.
    """
    begun = time.monotonic()
    factory.config_of(model)  # refuses an unknown name before anything is written
    write_shapes, usual_number = _SHAPES[task]
    num_images = usual_number if num_images is None else num_images
    data, unseen, run = out / "data", out / "unseen", out / "run"
    marker = out / ".mobilevit-demo"
    if out.is_dir() and any(out.iterdir()) and not marker.exists():
        raise MobileViTError(f"--out {out}: holds something else; choose another folder")
    write_text(marker, "A later demo may replace what lies here.\n")
    for folder in (data, unseen, run):
        shutil.rmtree(folder, ignore_errors=True)
    log.info("drawing %d images of shapes into %s", num_images, data)
    config = dataclasses.replace(_SETTINGS[task], data=data, out=run, model=model, seed=seed)
    if epochs is not None:
        config = dataclasses.replace(config, epochs=epochs)
    write_shapes(data, num_images=num_images, seed=seed, size=config.input_size[0])
    write_shapes(unseen, num_images=NUM_UNSEEN, seed=seed + 1, size=config.input_size[0])
    command = f"mobilevit train {' '.join(_flag(name, value) for name, value in config.changes().items())}"
    log.info("\n$ %s", command)
    result = train(config)
    log.info("\n$ mobilevit eval %s --data %s", result.best, data)
    for name, value in result.report.headline():
        log.info("%s  %s", name, value)

    images: list[Source] = [path for path in find_images(unseen) if path.parent.name != "masks"]
    exported = _export(result.best, images)
    to_use = exported.path if exported else result.best
    log.info("\n$ mobilevit predict %s %s", to_use, unseen)
    predictions = Predictor(to_use)(images)
    for prediction in predictions[:6]:
        log.info("%s  %s", prediction.source, prediction.describe(top=1))
    save_image(_sheet(predictions), out / "unseen.png")
    num_parameters = sum(parameter.numel() for parameter in factory.load(result.best).parameters())
    facts = {
        **{f"validation {name}": value for name, value in result.report.headline()[:3]},
        "measured on": f"{result.report.num_images:,} images held out",
        "model": f"{model}, {task}, {num_parameters:,} parameters, "
        f"{len(shapes.CLASSES)} shapes, {' x '.join(map(str, config.input_size))} pixels",
        "training": f"{config.epochs} epochs at {result.images_per_second:,.0f} images a second",
        **({"exported": str(exported.path), **dict(exported.lines())} if exported else {}),
        "time in all": f"{time.monotonic() - begun:,.0f} s",
        "checkpoint": f"{result.best} ({result.best.stat().st_size / 1e6:.1f} MB)",
    }
    return write_text(out / "report.html", _page(out, facts, result.report, command))


def _export(checkpoint: Path, images: list[Source]) -> ExportReport | None:
    """To ONNX, compared on these images; None where the packages for it are not installed."""
    folder = checkpoint.parent / "exported"
    log.info("\n$ mobilevit export %s --format onnx --out %s", checkpoint, folder)
    try:
        report = export(checkpoint, folder, images=images)
    except MissingPackageError as error:
        log.info("left out: %s", error)
        return None
    for name, value in report.lines():
        log.info("%s  %s", name, value)
    return report


def _flag(name: str, value: object) -> str:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _sheet(predictions: list[Result]) -> Image.Image:
    """Every image with its prediction; classes in green where right, red with the truth where wrong."""
    found = [prediction for prediction in predictions if isinstance(prediction, ClassificationResult)]
    if found:
        return prediction_sheet(
            [prediction.image for prediction in found],
            [prediction.probabilities for prediction in found],
            [prediction.classes.index(Path(prediction.source).parent.name) for prediction in found],
            found[0].classes,
            columns=8,
            cell=128,
        )
    images = [prediction.draw() for prediction in predictions]
    return contact_sheet(images, [[]] * len(images), [DARK] * len(images), columns=6, cell=220)


_FIGURES = (
    ("Unseen images", "unseen.png", "Drawn with another seed, with the model's predictions."),
    ("Training", "run/curves.png", "Validation uses the moving average of the weights."),
    ("Confusion matrix", "run/confusion_matrix.png", "Rows are true classes, columns predicted ones."),
    ("Precision and recall", "run/pr_curves.png", "At an IoU of 0.50; the star marks the score threshold."),
    ("Intersection over union", "run/per_class_iou.png", ""),
    ("Validation images", "run/samples.png", ""),
    ("Worst mistakes", "run/worst_mistakes.png", ""),
)


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _page(out: Path, facts: dict[str, str], report: Report, command: str) -> str:
    """One file with its images inside, so that it can be sent on."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    heading, body = report.table()
    table = _row("th", heading) + "".join(_row("td", row) for row in body)
    figures = "".join(
        f'<h2>{title}</h2><p>{text}</p><img alt="{title}" src="data:image/png;base64,'
        f'{base64.b64encode((out / name).read_bytes()).decode()}">'
        for title, name, text in _FIGURES
        if (out / name).exists()
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
<table>{table}</table>
<p>The same on your own images: put them into one folder per class, or beside boxes or masks, then
<code>mobilevit train --data FOLDER</code>.</p>
</html>
"""
