"""Collect the images of all connections into batches.

An image passes three kinds of threads: the event loop accepts it, a pool decodes and resizes it, and one thread runs
the model on the images that are ready. While that thread computes, the next batch collects, so batches grow with the
load and a single image does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from mobilevit.errors import ImageError
from mobilevit.imaging.decode import MAX_PIXELS, EncodedImage, open_image
from mobilevit.results.base import ImageInfo, Outputs
from mobilevit.runtime.predictor import Predictor, Prepared
from mobilevit.serving.metrics import Metrics

log = logging.getLogger("mobilevit")


class QueueFullError(Exception):
    """There is no room for more images; `retry_after` is the expected time in seconds until there is."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the service is busy")
        self.retry_after = retry_after


class Upload(NamedTuple):
    """An image as it was received."""

    name: str
    data: bytes


class Answer(NamedTuple):
    """The model's outputs for an image, for `Predictor.finish`."""

    info: ImageInfo
    outputs: Outputs


class _Job:
    """An accepted image and the future of its answer."""

    __slots__ = ("future", "upload")

    def __init__(self, upload: Upload, future: asyncio.Future[Answer | ImageError]) -> None:
        self.upload, self.future = upload, future


class Batcher:
    """Run one model on batches; `submit` is called by the event loop, the rest runs in threads.

    Args:
        predictor: the model.
        name: the model's name in metrics.
        readers: threads that decode and resize.
        turn: held while the model computes: the models of a process take turns.
        max_batch: limit on images in a batch.
        max_wait_s: how long a decoded image waits for others that are being decoded.
        max_queue: limit on images that are accepted and not yet answered.
        max_pixels: limit on pixels of an image.
        metrics: counts batches and images.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        name: str,
        readers: Executor,
        turn: threading.Lock,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        max_pixels: int,
        metrics: Metrics,
    ) -> None:
        self.predictor, self.name = predictor, name
        self._readers, self._turn, self._metrics = readers, turn, metrics
        # A predictor limits the batch itself where outputs are large, as in segmentation.
        self._max_batch, self._max_wait_s = min(max_batch, predictor.batch_size), max_wait_s
        self._max_queue, self._max_pixels = max_queue, min(max_pixels, MAX_PIXELS)
        self._loop = asyncio.get_running_loop()
        self._pending = 0
        self._seconds_each = 0.05
        """A moving average of the time between answers under load."""
        self._changed = threading.Condition()
        self._ready: deque[tuple[_Job, Prepared]] = deque()
        self._being_read = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        self._thread.start()

    def check_room(self, count: int = 1) -> None:
        """Check that `count` more images would be accepted.

        Raises:
            QueueFullError: they would not.
        """
        if self._closed or self._pending + count > self._max_queue:
            raise QueueFullError(max(1, math.ceil(self._pending * self._seconds_each)))

    def submit(self, uploads: Sequence[Upload]) -> list[asyncio.Future[Answer | ImageError]]:
        """Accept images, all or none; the remaining work on an image is skipped if its future is canceled.

        Raises:
            QueueFullError: there is no room for all of them.
        """
        self.check_room(len(uploads))
        jobs = [_Job(upload, self._loop.create_future()) for upload in uploads]
        self._pending += len(jobs)
        self._metrics.queue(self.name, self._pending)
        with self._changed:
            self._being_read += len(jobs)
        for job in jobs:
            job.future.add_done_callback(self._forget)
            self._readers.submit(self._read, job)
        return [job.future for job in jobs]

    def close(self) -> None:
        """Stop the thread; accepted images must be answered before."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _forget(self, _: asyncio.Future[Answer | ImageError]) -> None:
        self._pending -= 1
        self._metrics.queue(self.name, self._pending)

    def _read(self, job: _Job) -> None:
        """Decode and resize an image, in a thread of the pool."""
        prepared: Prepared | None = None
        try:
            if not job.future.cancelled():
                prepared = self._prepare(job.upload)
        except ImageError as error:
            self._answer([(job, error)])
        except Exception as error:
            log.exception("reading an image failed")
            self._answer([(job, error)])
        with self._changed:
            self._being_read -= 1
            if prepared is not None:
                self._ready.append((job, prepared))
            self._changed.notify_all()

    def open(self, upload: Upload) -> EncodedImage:
        """Read an image's header, and check the number of pixels.

        Raises:
            ImageError: there are too many, or the header cannot be read.
        """
        return open_image(upload.data, upload.name, max_pixels=self._max_pixels)

    def _prepare(self, upload: Upload) -> Prepared:
        opened = self.open(upload)
        # Answers do not contain the image, and a queue full of photographs would fill the memory.
        return self.predictor.prepare(opened, upload.name, keep_image=False)

    def _work(self) -> None:
        while batch := self._next():
            start = time.perf_counter()
            try:
                with self._turn:
                    begin = time.perf_counter()
                    answers = self.predictor.compute([image for _, image in batch])
            except Exception as error:
                log.exception("%s: the model failed", self.name)
                self._answer([(job, error) for job, _ in batch])
                continue
            end = time.perf_counter()
            self._metrics.batch(self.name, len(batch), end - begin)
            self._seconds_each += 0.1 * ((end - start) / len(batch) - self._seconds_each)
            pairs = zip(batch, answers, strict=True)
            self._answer([(job, Answer(image.info, outputs)) for (job, image), outputs in pairs])

    def _next(self) -> list[tuple[_Job, Prepared]]:
        """Wait for the next batch; it is empty after `close`."""
        with self._changed:
            while True:
                while not self._ready:
                    if self._closed:
                        return []
                    self._changed.wait()
                deadline = time.monotonic() + self._max_wait_s
                while len(self._ready) < self._max_batch and self._being_read:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                count = min(len(self._ready), self._max_batch)
                batch = [self._ready.popleft() for _ in range(count)]
                batch = [(job, image) for job, image in batch if not job.future.cancelled()]
                if batch:
                    return batch

    def _answer(self, answers: list[tuple[_Job, Answer | Exception]]) -> None:
        in_loop(self._loop, lambda: _resolve(answers))


def in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call a function in the event loop, from another thread; skip it if the service has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _resolve(answers: list[tuple[_Job, Answer | Exception]]) -> None:
    """Set the results of futures; an `ImageError` is a result, so that other images of the request are answered."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, Exception) and not isinstance(answer, ImageError):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
