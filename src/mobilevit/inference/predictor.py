"""From a picture to a result: one call, whatever the picture comes as."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from mobilevit import factory
from mobilevit.devices import pick_device
from mobilevit.models.card import card_of
from mobilevit.models.fuse import fuse
from mobilevit.preprocessing import ImageError, Source, read_image
from mobilevit.tasks.classification import ClassificationResult


class Predictor:
    """Classify pictures with a trained model; preparation and labels come from the checkpoint.

    Args:
        model: a checkpoint file of any known origin, or a model from `create_model` or `load`.
        device: "auto", "cpu", "cuda" or "mps".
        batch_size: pictures that go through the model together when there are many.

    Raises:
        ValueError: the file cannot be read, or the device is not there.
    """

    def __init__(
        self, model: str | os.PathLike[str] | nn.Module, *, device: str = "auto", batch_size: int = 16
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        loaded = model if isinstance(model, nn.Module) else factory.load(model)
        self.card = card_of(loaded)
        self.device = pick_device(device)
        self.batch_size = batch_size
        self._model = fuse(loaded).to(self.device)

    @overload
    def __call__(self, source: Source) -> ClassificationResult: ...
    @overload
    def __call__(self, source: list[Source]) -> list[ClassificationResult]: ...

    def __call__(self, source: Source | list[Source]) -> ClassificationResult | list[ClassificationResult]:
        """Classify one picture, or a list of them.

        Args:
            source: a path, encoded bytes, a PIL image, a numpy array (H, W, 3) of uint8 RGB, or a list of these.

        Raises:
            ImageError: a picture cannot be read; use `stream` to go on past such.
        """
        results = []
        for result in self.stream(source if isinstance(source, list) else [source]):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if isinstance(source, list) else results[0]

    def stream(self, sources: Iterable[Source]) -> Iterator[ClassificationResult | ImageError]:
        """Classify any number of pictures in bounded memory: for each, in order, a result or why there is none."""
        numbered = enumerate(sources, start=1)
        while chunk := list(itertools.islice(numbered, self.batch_size)):
            images: list[Image.Image | ImageError] = []
            for number, source in chunk:
                try:
                    images.append(read_image(source, _name(source, number)))
                except ImageError as error:
                    images.append(error)
            good = [image for image in images if isinstance(image, Image.Image)]
            probabilities = iter(self._probabilities(good) if good else ())
            for (number, source), image in zip(chunk, images, strict=True):
                if isinstance(image, ImageError):
                    yield image
                    continue
                yield ClassificationResult(
                    source=_name(source, number),
                    classes=self.card.classes,
                    probabilities=next(probabilities),
                    image=image,
                )

    @torch.inference_mode()
    def _probabilities(self, images: list[Image.Image]) -> np.ndarray:
        """Shape: B pictures of any sizes -> float32 (B, K)."""
        preprocessing = self.card.preprocessing
        pixels = torch.stack([preprocessing.resize(image) for image in images]).to(self.device)
        logits = self._model(preprocessing.normalize(pixels))
        return logits.float().softmax(dim=1).numpy(force=True)  # type: ignore[no-any-return]


def _name(source: Source, number: int) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else f"picture {number}"
