"""`Predictor`: from any source of an image to a result in one call, with any engine."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import EncodedImage, Source, read_image
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import ImageInfo, Outputs, Result
from mobilevit.runtime.session import EngineChoice, open_session
from mobilevit.runtime.sources import read_source

if TYPE_CHECKING:
    from torch import nn

    from mobilevit.explaining.explain import Explanation


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An image that was read, and resized for the model."""

    info: ImageInfo
    pixels: NDArray[np.uint8]
    """(H, W, 3): the model's input before it is normalized."""


class Predictor:
    """Classify, detect or segment with a trained model; preprocessing, labels and threshold come from its file.

    Args:
        model: an exported .onnx, .xml, .pte, .tflite or .pt2; or, where PyTorch is installed, a checkpoint of any known
            origin or a model from `create_model` or `load`.
        device: "auto", "cpu", "cuda" or "mps"; for exported files, "cpu" or another device of their engine.
        batch_size: images that go through the model together. None: as many as have the pixels of 16 inputs of
            256 x 256, but at most 64.
        threads: CPU threads; None: as many as cores.
        engine: for checkpoints: "torch"; "compile", which takes a minute at the first image and is then faster; or
            "auto", the fastest that `mobilevit tune` found here, or "torch" if it has not run.
        trust_pt2: load a .pt2 file, although that can run code that came with it.

    Raises:
        MobileViTError: the file cannot be read, its engine is not installed, or there is no such device.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        engine: EngineChoice = "torch",
        trust_pt2: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise MobileViTError(f"`batch_size` is {batch_size}; give 1 or more")
        self._session = open_session(model, device=device, threads=threads, engine=engine, trust_pt2=trust_pt2)
        self.card = self._session.card
        self._result_type = RESULT_TYPES[self.card.task]
        self._result_type.check(self.card.preprocessing)
        height, width = self.card.preprocessing.size
        by_pixels = min(64, max(1, 16 * 256 * 256 // (height * width)))
        self.batch_size = min(batch_size or by_pixels, self._result_type.max_batch_size(self.card))

    @property
    def engine(self) -> str:
        """The engine: "torch", or format and precision of an exported file, such as "onnx fp32"."""
        return self._session.engine

    def warm_up(self) -> None:
        """Predict for a black image, alone and in a full batch, so that the first real image is not slower."""
        height, width = self.card.preprocessing.size
        black = io.BytesIO()
        Image.new("RGB", (width, height)).save(black, "JPEG")
        for count in {1, self.batch_size}:
            self([black.getvalue()] * count)

    def explain(self, source: Source, pixel: tuple[int, int] | None = None) -> Explanation:
        """Explain the prediction for an image; see `mobilevit.explain`.

        Raises:
            ImageError: the image cannot be read.
            MobileViTError: the model is an exported file, or the pixel is outside the part that the model sees.
        """
        return self._session.explain(source, pixel)

    @overload
    def __call__(self, source: Source) -> Result: ...
    @overload
    def __call__(self, source: list[Source]) -> list[Result]: ...

    def __call__(self, source: Source | list[Source]) -> Result | list[Result]:
        """Predict for one image, or for each in a list.

        Args:
            source: a path, a URL, encoded bytes, a PIL image, a numpy array (H, W, 3) of uint8 RGB, or a list of these.

        Returns:
            `ClassificationResult`, `DetectionResult` or `SegmentationResult`, by the model's task.

        Raises:
            ImageError: an image cannot be read; `stream` continues with the others.
        """
        results = []
        for result in self.stream(source if isinstance(source, list) else [source]):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if isinstance(source, list) else results[0]

    def stream(self, sources: Iterable[Source]) -> Iterator[Result | ImageError]:
        """Predict for any number of images in constant memory; yield results, or errors, in order."""
        named = ((source, _name(source, number)) for number, source in enumerate(sources, start=1))
        while batch := list(itertools.islice(named, self.batch_size)):
            yield from self.predict_batch(batch)

    def predict_batch(
        self,
        named: Sequence[tuple[Source, str]],
        *,
        keep_images: bool = True,
        turn: AbstractContextManager[object] | None = None,
    ) -> Iterator[Result | ImageError]:
        """Predict for images with names that go through the model together, while holding `turn`."""
        read: list[Prepared | ImageError] = []
        for source, name in named:
            try:
                read.append(self.prepare(source, name, keep_image=keep_images))
            except ImageError as error:
                read.append(error)
        good = [image for image in read if isinstance(image, Prepared)]
        with turn or nullcontext():
            outputs = iter(self.compute(good) if good else ())
        for image in read:
            yield self.finish(image.info, next(outputs)) if isinstance(image, Prepared) else image

    # The three steps of a prediction, for callers that run each in a thread of its own, as the server does.

    def prepare(self, source: Source | EncodedImage, name: str, *, keep_image: bool = True) -> Prepared:
        """Read an image and resize it for the model.

        Args:
            source: the image.
            name: its name in the result and in errors.
            keep_image: keep the decoded image for the result, which can then draw.

        Raises:
            ImageError: it cannot be read.
        """
        image = read_image(read_source(source) if isinstance(source, str) else source, name)
        info = ImageInfo(source=name, size=(image.height, image.width), image=image if keep_image else None)
        return Prepared(info=info, pixels=self.card.preprocessing.resize(image))

    def compute(self, images: Sequence[Prepared]) -> list[Outputs]:
        """Run the model on a batch; the outputs for each image are for `finish`."""
        return self._result_type.split(self._session.run(np.stack([image.pixels for image in images])))

    def finish(self, info: ImageInfo, outputs: Outputs) -> Result:
        """Decode the outputs for one image."""
        return self._result_type.from_outputs(outputs, self.card, info)

    def side_by_side(self) -> AbstractContextManager[bool]:
        """Prepare for threads that each `compute` a batch; False: batches have to take turns."""
        return self._session.side_by_side()


def _name(source: Source, number: int) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {number}"
