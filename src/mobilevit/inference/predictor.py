"""From a picture to a result: one call, whatever the picture comes as and whatever the model does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, overload

import torch
from PIL import Image
from torch import nn

from mobilevit.inference.session import Engine, open_session
from mobilevit.preprocessing import ImageError, Source, read_image
from mobilevit.tasks.classification import ClassificationResult
from mobilevit.tasks.detection import DetectionResult, postprocess, to_pixels
from mobilevit.tasks.segmentation import SegmentationResult, most_at_once, to_label_map

Result = ClassificationResult | DetectionResult | SegmentationResult

DEFAULT_SCORE_THRESHOLD = 0.3
"""For detectors whose file names none."""


class Predictor:
    """Classify, detect or segment with a trained model; preparation, labels and threshold come from its file.

    Args:
        model: a checkpoint of any known origin; an exported .onnx, .xml, .pte, .tflite or .pt2; or a model from
            `create_model` or `load`.
        device: "auto", "cpu", "cuda" or "mps"; for exported files, "cpu" and what else their runtime knows.
        batch_size: pictures that go through the model together when there are many.
        threads: to compute with on the CPU; None: as many as there are cores.
        engine: for checkpoints: "torch"; "compile", which takes a minute at the first picture and is then faster; or
            "auto", what `mobilevit tune` found to be the fastest here, or "torch" where it has not run.

    Raises:
        ValueError: the file cannot be read, its runtime is not installed, or the device is not there.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        batch_size: int = 16,
        threads: int | None = None,
        engine: Engine = "torch",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        self.card, self._session = open_session(model, device=device, threads=threads, engine=engine)
        if self.card.task == "segmentation" and self.card.preprocessing.resize_mode == "crop":
            raise ValueError(
                "a cropped input says nothing of the border; give the model resize_mode 'pad' or 'stretch'"
            )
        self.batch_size = batch_size
        if self.card.task == "segmentation":
            self.batch_size = min(batch_size, most_at_once(len(self.card.classes), self.card.preprocessing.size))

    def warm_up(self) -> None:
        """Answer for a black picture, alone and in a full batch, so that the first real ones wait for nothing."""
        black = torch.zeros(3, *self.card.preprocessing.size, dtype=torch.uint8)
        for count in {1, self.batch_size}:
            self._session(black.expand(count, -1, -1, -1))

    @overload
    def __call__(self, source: Source) -> Result: ...
    @overload
    def __call__(self, source: list[Source]) -> list[Result]: ...

    def __call__(self, source: Source | list[Source]) -> Result | list[Result]:
        """What the model says of one picture, or of each in a list.

        Args:
            source: a path, encoded bytes, a PIL image, a numpy array (H, W, 3) of uint8 RGB, or a list of these.

        Returns:
            `ClassificationResult`, `DetectionResult` or `SegmentationResult`, as the model's task is.

        Raises:
            ImageError: a picture cannot be read; use `stream` to go on past such.
        """
        results = []
        for result in self.stream(source if isinstance(source, list) else [source]):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if isinstance(source, list) else results[0]

    def stream(self, sources: Iterable[Source]) -> Iterator[Result | ImageError]:
        """Any number of pictures in bounded memory: for each, in order, a result or why there is none."""
        numbered = enumerate(sources, start=1)
        while chunk := list(itertools.islice(numbered, self.batch_size)):
            read: list[tuple[str, Image.Image] | ImageError] = []
            for number, source in chunk:
                name = _name(source, number)
                try:
                    read.append((name, read_image(source, name)))
                except ImageError as error:
                    read.append(error)
            good = [picture for picture in read if not isinstance(picture, ImageError)]
            results = iter(self._results(good) if good else ())
            for picture in read:
                yield picture if isinstance(picture, ImageError) else next(results)

    @torch.inference_mode()
    def _results(self, pictures: list[tuple[str, Image.Image]]) -> list[Result]:
        pixels = torch.stack([self.card.preprocessing.resize(image) for _, image in pictures])
        outputs = self._session(pixels)
        make = {"classification": self._classes, "detection": self._boxes, "segmentation": self._masks}[self.card.task]
        return make(outputs, pictures)

    def _classes(self, logits: torch.Tensor, pictures: list[tuple[str, Image.Image]]) -> list[Result]:
        rows = zip(pictures, logits.float().softmax(dim=1).numpy(force=True), strict=True)
        return [
            ClassificationResult(source=name, classes=self.card.classes, probabilities=probabilities, image=image)
            for (name, image), probabilities in rows
        ]

    def _boxes(self, output: Any, pictures: list[tuple[str, Image.Image]]) -> list[Result]:
        threshold = self.card.score_threshold
        results: list[Result] = []
        for (name, image), found in zip(pictures, postprocess(output), strict=True):
            placement = self.card.preprocessing.placement((image.height, image.width))
            boxes, scores, class_ids = to_pixels(found, placement)
            results.append(
                DetectionResult(
                    source=name,
                    classes=self.card.classes,
                    boxes_xyxy=boxes,
                    scores=scores,
                    class_ids=class_ids,
                    score_threshold=DEFAULT_SCORE_THRESHOLD if threshold is None else threshold,
                    image=image,
                )
            )
        return results

    def _masks(self, output: Any, pictures: list[tuple[str, Image.Image]]) -> list[Result]:
        results: list[Result] = []
        for (name, image), logits in zip(pictures, output.logits, strict=True):
            placement = self.card.preprocessing.placement((image.height, image.width))
            label_map = to_label_map(logits, placement)
            results.append(SegmentationResult(source=name, classes=self.card.classes, label_map=label_map, image=image))
        return results


def _name(source: Source, number: int) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"picture {number}"
