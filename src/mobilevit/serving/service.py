"""One process of the service: models, threads, limits."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException

from mobilevit.errors import ImageError, MobileViTError, TooManyPixelsError
from mobilevit.files import Json
from mobilevit.machine import available_cores
from mobilevit.results import RESULT_TYPES
from mobilevit.results.base import ImageInfo, Outputs
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime.artifact import is_artifact
from mobilevit.runtime.predictor import Predictor
from mobilevit.serving import metrics
from mobilevit.serving.batching import Batcher
from mobilevit.serving.refusal import busy
from mobilevit.serving.settings import ServeConfig
from mobilevit.serving.uploads import Upload, UploadBudget

log = logging.getLogger("mobilevit")

_MAX_EXPLANATIONS = 4
"""Limit on explanations in progress; they are slow."""


class Service:
    """The models by name, with their files and `open_predictors`; made in the event loop."""

    def __init__(self, config: ServeConfig, models: Mapping[str, Path], predictors: Mapping[str, Predictor]) -> None:
        self.config = config
        self.uploads = UploadBudget(int(config.max_uploads_mb * 1e6))
        self._models = models
        self._readers = ThreadPoolExecutor(_threads_of_worker(config) or available_cores(), "read")
        self._computer, self._explainer = ThreadPoolExecutor(1, "compute"), ThreadPoolExecutor(1, "explain")
        self._turn = threading.Lock()
        self._batchers = {
            name: Batcher(
                name, predictor, config, readers=self._readers, computer=self._computer, turn=self._turn
            )
            for name, predictor in predictors.items()
        }  # fmt: skip
        self._explaining: set[Future[Json]] = set()
        self._explaining_predictors: dict[str, Predictor] = {}

    def stop(self) -> None:
        """Stop the threads."""
        for batcher in self._batchers.values():
            batcher.close()
        for pool in (self._readers, self._computer, self._explainer):
            pool.shutdown(wait=False, cancel_futures=True)

    def batcher(self, name: str | None) -> Batcher:
        """Return the batcher of a model, or refuse with 404; None: of the first model."""
        name = next(iter(self._batchers)) if name is None else name
        if name not in self._batchers:
            raise HTTPException(404, f"no model {name!r}; there are {', '.join(self._batchers)}")
        return self._batchers[name]

    def describe(self) -> list[Json]:
        """Describe the models, for `/v1/models`."""
        return [
            {
                "name": name,
                "task": card.task,
                "architecture": card.name,
                "classes": list(card.classes),
                "input_size": list(card.preprocessing.size),
                "resize_mode": card.preprocessing.resize_mode,
                "metrics": card.metrics,
                "score_threshold": card.score_threshold,
                "engine": batcher.predictor.engine,
                "explain": not is_artifact(self._models[name]),
            }
            for name, batcher in self._batchers.items()
            for card in [batcher.predictor.card]
        ]

    async def predict(
        self, batcher: Batcher, uploads: Sequence[Upload], *, top: int, min_score: float | None
    ) -> list[Json]:
        """Return an item of the response for each image, or refuse: 400 or 413, none can be read; 503, a full queue."""
        predictor = batcher.predictor
        answers = await batcher.predict(uploads)
        unreadable = [answer for answer in answers if isinstance(answer, ImageError)]
        metrics.IMAGES.labels(batcher.name, "unreadable").inc(len(unreadable))
        metrics.IMAGES.labels(batcher.name, "ok").inc(len(answers) - len(unreadable))
        if len(unreadable) == len(answers):
            raise _refusal(unreadable[0])
        loop, is_slow = asyncio.get_running_loop(), RESULT_TYPES[predictor.card.task].covers_image
        items = []
        for upload, answer in zip(uploads, answers, strict=True):
            if isinstance(answer, ImageError):
                items.append({"source": upload.name, "error": str(answer).removeprefix(f"{upload.name}: ")})
            elif is_slow:
                items.append(await loop.run_in_executor(self._readers, _item, predictor, *answer, top, min_score))
            else:
                items.append(_item(predictor, *answer, top, min_score))
        return items

    def check_explainable(self, batcher: Batcher) -> None:
        """Refuse a request before its upload is read: 404, an exported file; 503, too many are in progress."""
        if is_artifact(self._models[batcher.name]):
            raise HTTPException(404, f"{batcher.name}: exported files cannot be explained; serve the checkpoint")
        if len(self._explaining) >= _MAX_EXPLANATIONS:
            raise busy(5)

    async def explain(self, batcher: Batcher, upload: Upload, pixel: tuple[int, int] | None) -> Json:
        """Explain a prediction, or refuse: 400 or 413, the image cannot be read; 422, the model sees no such pixel."""
        self.check_explainable(batcher)
        work = self._explainer.submit(self._explain, batcher, upload, pixel)
        # Counted until it is done, even if the client has disconnected: a thread cannot be stopped.
        self._explaining.add(work)
        work.add_done_callback(self._explaining.discard)
        return await asyncio.wrap_future(work)

    def _explain(self, batcher: Batcher, upload: Upload, pixel: tuple[int, int] | None) -> Json:
        try:
            image = batcher.open(upload).decode()
        except ImageError as error:
            raise _refusal(error) from None
        with self._turn:
            try:
                explanation = self._predictor_that_explains(batcher).explain(image, pixel)
            except MobileViTError as error:
                raise HTTPException(422, str(error)) from None
        return {**explanation.to_dict(), "source": upload.name, "image_png": _png(explanation.draw())}

    def _predictor_that_explains(self, batcher: Batcher) -> Predictor:
        """Return the predictor in PyTorch; where a tuned artifact answers, it is opened at the first explanation."""
        name = batcher.name
        if batcher.predictor.engine == "torch":
            return batcher.predictor
        if name not in self._explaining_predictors:
            threads = _threads_of_worker(self.config)
            self._explaining_predictors[name] = Predictor(
                self._models[name], device=self.config.device, threads=threads
            )
        return self._explaining_predictors[name]


def open_predictors(config: ServeConfig, models: Mapping[str, Path]) -> dict[str, Predictor]:
    """Open and warm up every model; errors are those of `Predictor`."""
    predictors = {}
    for name, path in models.items():
        start = time.perf_counter()
        predictor = Predictor(
            path,
            device=config.device,
            batch_size=config.max_batch,
            threads=_threads_of_worker(config),
            engine="torch" if is_artifact(path) else config.engine,
            trust_pt2=config.trust_pt2,
        )
        predictor.warm_up()
        seconds = time.perf_counter() - start
        log.info("%s: %s, %s, ready in %.1f s", name, predictor.card.task, predictor.engine, seconds)
        predictors[name] = predictor
    return predictors


def _threads_of_worker(config: ServeConfig) -> int | None:
    """Return the threads of each worker; None: the engine uses the tuned number, or all cores."""
    if config.threads is not None or config.workers == 1:
        return config.threads
    return max(1, available_cores() // config.workers)


def _refusal(error: ImageError) -> HTTPException:
    return HTTPException(413 if isinstance(error, TooManyPixelsError) else 400, str(error))


def _item(predictor: Predictor, info: ImageInfo, outputs: Outputs, top: int, min_score: float | None) -> Json:
    result = predictor.finish(info, outputs)
    item = result.to_dict(top=top, min_score=min_score)
    if isinstance(result, SegmentationResult):
        item["mask_png"] = _png(result.mask())
    return item


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getbuffer()).decode()
