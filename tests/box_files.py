"""To write images with boxes, and to read what became of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobilevit.data.datasets import detection_splits
from mobilevit.data.imageset import ImageSet
from mobilevit.tasks.targets import Boxes


def write_image(path: Path, size: tuple[int, int] = (40, 30), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (9, 9, 9)).save(path, **({"exif": exif} if orientation > 1 else {}))
    return path


def read(path: Path, part: str = "all") -> ImageSet[Boxes]:
    return detection_splits(path)[part]


def boxes(data: ImageSet[Boxes]) -> dict[str, list[tuple[Any, ...]]]:
    """Class, left, top, right and bottom of all boxes, by the name of the image."""
    return {
        Path(name).name: [
            (data.classes[label], *box) for label, box in zip(t.labels.tolist(), t.xyxy.tolist(), strict=True)
        ]
        for name, t in zip(data.names, data.targets, strict=True)
    }


def problems(data: ImageSet[Any], folder: Path) -> list[str]:
    """The lines, without those on classes that have no objects."""
    return [str(p).replace(f"{folder}/", "") for p in data.problems if p.kind != "class without objects"]


def boxes_of(
    xyxy: Sequence[Sequence[float]],
    labels: Sequence[int],
    crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
) -> Boxes:
    """`Boxes` from plain lists; without `areas`, those of the boxes."""
    corners = np.asarray(xyxy, np.float32).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    return Boxes(
        xyxy=corners,
        labels=np.asarray(labels, np.int64),
        crowd=np.zeros(len(corners), np.bool_) if crowd is None else np.asarray(crowd, np.bool_),
        areas=sides[:, 0] * sides[:, 1] if areas is None else np.asarray(areas, np.float32),
    )
