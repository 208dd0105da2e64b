"""One process of the service: models, threads, limits, metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from mobilevit.errors import ImageError, MobileViTError, TooManyPixelsError
from mobilevit.files import Json
from mobilevit.machine import available_cores
from mobilevit.results import RESULT_TYPES
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime.artifact import is_artifact
from mobilevit.runtime.predictor import Predictor
from mobilevit.serving.batching import Answer, Batcher, QueueFullError, Upload, in_loop
from mobilevit.serving.metrics import Metrics
from mobilevit.serving.refusal import RefusalError, busy
from mobilevit.serving.settings import ServeConfig, ServedModel
from mobilevit.serving.uploads import UploadBudget

log = logging.getLogger("mobilevit")

_MAX_EXPLANATIONS = 4
"""Limit on explanations in progress; they are slow."""


class Service:
    """The models by name.

    Args:
        config: settings.
        models: the models to offer.
        predictors: the result of `open_predictors`.
        metrics: counts images and batches.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[ServedModel],
        predictors: Mapping[str, Predictor],
        metrics: Metrics,
    ) -> None:
        self.config, self.metrics = config, metrics
        self.uploads = UploadBudget(int(config.max_uploads_mb * 1e6))
        self.ready = False
        self._paths, self._predictors = {model.name: model.path for model in models}, predictors
        self._batchers: dict[str, Batcher] = {}
        self._explaining = 0
        self._explaining_predictors: dict[str, Predictor] = {}
        self._explainer = ThreadPoolExecutor(1, "explain")
        threads = _threads_of_worker(config)
        self._readers = ThreadPoolExecutor(threads or available_cores(), "read")
        self._turn = threading.Lock()

    def start(self) -> None:
        """Start the threads; called in the event loop."""
        for name, predictor in self._predictors.items():
            self._batchers[name] = Batcher(
                predictor,
                name=name,
                readers=self._readers,
                turn=self._turn,
                max_batch=self.config.max_batch,
                max_wait_s=self.config.max_wait_ms / 1e3,
                max_queue=self.config.max_queue,
                max_pixels=self.config.max_pixels,
                metrics=self.metrics,
            )
        self.ready = True

    def stop(self) -> None:
        """Stop the threads."""
        for batcher in self._batchers.values():
            batcher.close()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._explainer.shutdown(wait=False, cancel_futures=True)

    def batcher(self, name: str | None) -> Batcher:
        """Return the batcher of a model; None: of the first model.

        Raises:
            RefusalError: 404, there is no such model.
        """
        if name is None:
            return next(iter(self._batchers.values()))
        if name not in self._batchers:
            raise RefusalError(404, f"no model {name!r}; there are {', '.join(self._batchers)}")
        return self._batchers[name]

    def describe(self) -> list[Json]:
        """Describe the models, for `/v1/models`."""
        return [
            {
                "name": batcher.name,
                "task": card.task,
                "architecture": card.name,
                "classes": list(card.classes),
                "input_size": list(card.preprocessing.size),
                "resize_mode": card.preprocessing.resize_mode,
                "metrics": card.metrics,
                "score_threshold": card.score_threshold,
                "engine": batcher.predictor.engine,
                "explain": self._can_explain(batcher.name),
            }
            for batcher in self._batchers.values()
            for card in [batcher.predictor.card]
        ]

    def check_room(self, batcher: Batcher) -> None:
        """Refuse a request before its upload is read.

        Raises:
            RefusalError: 503, the queue is full.
        """
        try:
            batcher.check_room()
        except QueueFullError as error:
            raise busy(error.retry_after) from None

    async def predict(
        self, batcher: Batcher, uploads: Sequence[Upload], *, top: int, min_score: float | None
    ) -> list[Json]:
        """Predict; return an item of the response for each image.

        Raises:
            RefusalError: 400 or 413, no image can be read; 503, the queue is full.
        """
        is_slow = RESULT_TYPES[batcher.predictor.card.task].covers_image
        try:
            futures = batcher.submit(uploads)
        except QueueFullError as error:
            raise busy(error.retry_after) from None
        try:
            answers = [await future for future in futures]
        finally:
            for future in futures:
                future.cancel()
        unreadable = [answer for answer in answers if isinstance(answer, ImageError)]
        self.metrics.images(batcher.name, "unreadable", len(unreadable))
        self.metrics.images(batcher.name, "ok", len(answers) - len(unreadable))
        if len(unreadable) == len(answers):
            raise RefusalError(413 if isinstance(unreadable[0], TooManyPixelsError) else 400, str(unreadable[0]))
        items = []
        for upload, answer in zip(uploads, answers, strict=True):
            if isinstance(answer, ImageError):
                items.append({"source": upload.name, "error": str(answer).removeprefix(f"{upload.name}: ")})
            elif is_slow:
                loop = asyncio.get_running_loop()
                items.append(await loop.run_in_executor(self._readers, _item, batcher, answer, top, min_score))
            else:
                items.append(_item(batcher, answer, top, min_score))
        return items

    def _can_explain(self, name: str) -> bool:
        return not is_artifact(self._paths[name])

    def check_explainable(self, batcher: Batcher) -> None:
        """Refuse a request before its upload is read.

        Raises:
            RefusalError: 404, an exported file; 503, too many are in progress.
        """
        if not self._can_explain(batcher.name):
            raise RefusalError(404, f"{batcher.name}: exported files cannot be explained; serve the checkpoint")
        if self._explaining >= _MAX_EXPLANATIONS:
            raise busy(5)

    async def explain(self, batcher: Batcher, upload: Upload, pixel: tuple[int, int] | None) -> Json:
        """Explain the prediction for an image, for `/v1/explain`.

        Raises:
            RefusalError: 404, an exported file; 400 or 413, the image cannot be read; 422, the pixel is outside the
                part that the model sees; 503, too many are in progress.
        """
        self.check_explainable(batcher)
        self._explaining += 1
        loop = asyncio.get_running_loop()
        work = self._explainer.submit(self._explain, batcher, upload, pixel)
        # Counted until it is done, even if the client has disconnected: a thread cannot be stopped.
        work.add_done_callback(lambda _: in_loop(loop, self._explained))
        return await asyncio.wrap_future(work)

    def _explained(self) -> None:
        self._explaining -= 1

    def _explain(self, batcher: Batcher, upload: Upload, pixel: tuple[int, int] | None) -> Json:
        try:
            image = batcher.open(upload).decode()
        except ImageError as error:
            raise RefusalError(413 if isinstance(error, TooManyPixelsError) else 400, str(error)) from None
        with self._turn:
            try:
                explanation = self._predictor_that_explains(batcher).explain(image, pixel)
            except MobileViTError as error:
                raise RefusalError(422, str(error)) from None
        return {**explanation.to_dict(), "source": upload.name, "image_png": _png(explanation.draw())}

    def _predictor_that_explains(self, batcher: Batcher) -> Predictor:
        """Return the predictor in PyTorch; where a tuned artifact answers, it is opened at the first explanation."""
        if batcher.predictor.engine == "torch":
            return batcher.predictor
        if batcher.name not in self._explaining_predictors:
            path, threads = self._paths[batcher.name], _threads_of_worker(self.config)
            self._explaining_predictors[batcher.name] = Predictor(path, device=self.config.device, threads=threads)
        return self._explaining_predictors[batcher.name]


def open_predictors(config: ServeConfig, models: Sequence[ServedModel]) -> dict[str, Predictor]:
    """Open and warm up every model; errors are those of `Predictor`."""
    predictors = {}
    for model in models:
        start = time.perf_counter()
        predictor = Predictor(
            model.path,
            device=config.device,
            batch_size=config.max_batch,
            threads=_threads_of_worker(config),
            engine="torch" if is_artifact(model.path) else config.engine,
            trust_pt2=config.trust_pt2,
        )
        predictor.warm_up()
        seconds = time.perf_counter() - start
        log.info("%s: %s, %s, ready in %.1f s", model.name, predictor.card.task, predictor.engine, seconds)
        predictors[model.name] = predictor
    return predictors


def _threads_of_worker(config: ServeConfig) -> int | None:
    """Return the threads of each worker; None: the engine uses the tuned number, or all cores."""
    if config.threads is not None or config.workers == 1:
        return config.threads
    return max(1, available_cores() // config.workers)


def _item(batcher: Batcher, answer: Answer, top: int, min_score: float | None) -> Json:
    result = batcher.predictor.finish(*answer)
    item = result.to_dict(top=top, min_score=min_score)
    if isinstance(result, SegmentationResult):
        item["mask_png"] = _png(result.mask())
    return item


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getbuffer()).decode()
