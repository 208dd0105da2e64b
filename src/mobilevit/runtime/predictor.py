"""From an image to a result: one call, whatever the image comes as and whatever the model does."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mobilevit.card import ModelCard, Task
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import EncodedImage, Source, read_image
from mobilevit.runtime.session import ArtifactSession, Engine, open_session
from mobilevit.tasks.classification import ClassificationResult
from mobilevit.tasks.detection import DetectionResult, Detections, postprocess, to_pixels
from mobilevit.tasks.segmentation import SegmentationResult, most_at_once, to_label_map

Result = ClassificationResult | DetectionResult | SegmentationResult

DEFAULT_SCORE_THRESHOLD = 0.3
"""For detectors whose file names none."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An image on its way through a `Predictor`: read, and resized for the model."""

    source: str
    """What the image is called."""
    size: tuple[int, int]
    """(height, width) of the image."""
    image: Image.Image
    """The upright RGB image, which the result carries."""
    pixels: torch.Tensor
    """uint8 (3, H, W): the model's input before it is scaled."""


class Predictor:
    """Classify, detect or segment with a trained model; preparation, labels and threshold come from its file.

    Args:
        model: a checkpoint of any known origin; an exported .onnx, .xml, .pte, .tflite or .pt2; or a model from
            `create_model` or `load`.
        device: "auto", "cpu", "cuda" or "mps"; for exported files, "cpu" and what else their runtime knows.
        batch_size: images that go through the model together when there are many. None: as many as have the pixels
            of 16 inputs of 256 x 256, but no more than 64.
        threads: to compute with on the CPU; None: as many as there are cores.
        engine: for checkpoints: "torch"; "compile", which takes a minute at the first image and is then faster; or
            "auto", what `mobilevit tune` found to be the fastest here, or "torch" where it has not run.

    Raises:
        ValueError: the file cannot be read, its runtime is not installed, or the device is not there.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        engine: Engine = "torch",
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise MobileViTError(f"batch_size is {batch_size}; give 1 or more")
        self.card, self._session = open_session(model, device=device, threads=threads, engine=engine)
        if self.card.task == "segmentation" and self.card.preprocessing.resize_mode == "crop":
            raise MobileViTError(
                "a cropped input says nothing of the border; give the model resize_mode 'pad' or 'stretch'"
            )
        height, width = self.card.preprocessing.size
        self.batch_size = batch_size or min(64, max(1, 16 * 256 * 256 // (height * width)))
        if self.card.task == "segmentation":
            self.batch_size = min(self.batch_size, most_at_once(len(self.card.classes), (height, width)))

    @property
    def engine(self) -> str:
        """What runs the model: "torch", or format and precision of an exported file, such as "onnx fp32"."""
        if isinstance(self._session, ArtifactSession):
            return f"{self._session.artifact.format} {self._session.artifact.precision}"
        return "torch"

    def warm_up(self) -> None:
        """Answer for a black image, alone and in a full batch, so that the first real ones wait for nothing."""
        height, width = self.card.preprocessing.size
        black = io.BytesIO()
        Image.new("RGB", (width, height)).save(black, "JPEG")
        for count in {1, self.batch_size}:
            self([black.getvalue()] * count)

    @overload
    def __call__(self, source: Source) -> Result: ...
    @overload
    def __call__(self, source: list[Source]) -> list[Result]: ...

    def __call__(self, source: Source | list[Source]) -> Result | list[Result]:
        """What the model says of one image, or of each in a list.

        Args:
            source: a path, encoded bytes, a PIL image, a numpy array (H, W, 3) of uint8 RGB, or a list of these.

        Returns:
            `ClassificationResult`, `DetectionResult` or `SegmentationResult`, as the model's task is.

        Raises:
            ImageError: an image cannot be read; use `stream` to go on past such.
        """
        results = []
        for result in self.stream(source if isinstance(source, list) else [source]):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if isinstance(source, list) else results[0]

    def stream(self, sources: Iterable[Source]) -> Iterator[Result | ImageError]:
        """Any number of images in bounded memory: for each, in order, a result or why there is none."""
        numbered = enumerate(sources, start=1)
        while chunk := list(itertools.islice(numbered, self.batch_size)):
            read: list[Prepared | ImageError] = []
            for number, source in chunk:
                try:
                    read.append(self.prepare(source, _name(source, number)))
                except ImageError as error:
                    read.append(error)
            good = [image for image in read if not isinstance(image, ImageError)]
            answers = iter(self.compute(good) if good else ())
            for image in read:
                yield image if isinstance(image, ImageError) else self.finish(image, next(answers))

    # The three steps of a prediction, for who wants them apart, as the server does: each may have a thread of its own.

    def prepare(self, source: Source | EncodedImage, name: str) -> Prepared:
        """Read an image and resize it for the model.

        Raises:
            ImageError: it cannot be read.
        """
        image = read_image(source, name)
        pixels = self.card.preprocessing.resize(image)
        return Prepared(source=name, size=(image.height, image.width), image=image, pixels=pixels)

    @torch.inference_mode()
    def compute(self, images: Sequence[Prepared]) -> list[Any]:
        """Run the model on some images together; what it says of each is for `finish`."""
        output = self._session(torch.stack([image.pixels for image in images]))
        if self.card.task == "classification":
            return list(output.float().softmax(dim=1).numpy(force=True))
        return postprocess(output) if self.card.task == "detection" else list(output.logits)

    @torch.inference_mode()
    def finish(self, image: Prepared, answer: Any) -> Result:
        """The result, in the image's own pixels."""
        return _RESULT[self.card.task](self.card, image, answer)


def _classes(card: ModelCard, image: Prepared, probabilities: NDArray[np.float32]) -> Result:
    return ClassificationResult(
        source=image.source, classes=card.classes, probabilities=probabilities, image=image.image
    )


def _boxes(card: ModelCard, image: Prepared, found: Detections) -> Result:
    boxes, scores, class_ids = to_pixels(found, card.preprocessing.placement(image.size))
    threshold = card.score_threshold
    return DetectionResult(
        source=image.source,
        classes=card.classes,
        boxes_xyxy=boxes,
        scores=scores,
        class_ids=class_ids,
        score_threshold=DEFAULT_SCORE_THRESHOLD if threshold is None else threshold,
        image=image.image,
    )


def _mask(card: ModelCard, image: Prepared, logits: torch.Tensor) -> Result:
    label_map = to_label_map(logits, card.preprocessing.placement(image.size))
    return SegmentationResult(source=image.source, classes=card.classes, label_map=label_map, image=image.image)


_RESULT: dict[Task, Callable[[ModelCard, Prepared, Any], Result]] = {
    "classification": _classes,
    "detection": _boxes,
    "segmentation": _mask,
}


def _name(source: Source, number: int) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}"
