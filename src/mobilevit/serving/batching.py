"""Images of all connections, put together into batches.

An image passes three kinds of threads. The event loop accepts it, a pool reads and resizes it, and one thread runs
the model on whatever is ready. While that thread computes, the next batch gathers, so that batches grow with load and
a lone image never waits.
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
    """There is no room for more images; `retry_after` says in how many seconds there should be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the service is busy")
        self.retry_after = retry_after


class Upload(NamedTuple):
    """An image as it came."""

    name: str
    data: bytes


class Answer(NamedTuple):
    """What `Predictor.compute` says of an image; `Predictor.finish` makes the result of it."""

    info: ImageInfo
    outputs: Outputs


class _Job:
    """An image that was accepted."""

    __slots__ = ("future", "upload")

    def __init__(self, upload: Upload, future: asyncio.Future[Answer | ImageError]) -> None:
        self.upload, self.future = upload, future


class Batcher:
    """Answers for one model; `submit` is called by the event loop, all else happens in threads.

    Args:
        predictor: the model.
        name: for metrics.
        readers: threads that read and resize.
        turn: held while the model computes: models of one process take turns on its cores.
        max_batch: images in a batch, at most.
        max_wait_s: how long an image that is ready waits for those that are being read.
        max_queue: images accepted and not yet answered.
        max_pixels: of an image.
        metrics: told of batches and images.
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
        # Segmenters' logits are large: a predictor for them lowers the batch itself.
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
        """Whether so many images would be accepted now.

        Raises:
            QueueFullError: no.
        """
        if self._closed or self._pending + count > self._max_queue:
            raise QueueFullError(max(1, math.ceil(self._pending * self._seconds_each)))

    def submit(self, uploads: Sequence[Upload]) -> list[asyncio.Future[Answer | ImageError]]:
        """Accept images, all or none; a future that is cancelled spares its image the work not yet begun.

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
        """Stop the thread; what was accepted must be answered before."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _forget(self, _: asyncio.Future[Answer | ImageError]) -> None:
        self._pending -= 1
        self._metrics.queue(self.name, self._pending)

    def _read(self, job: _Job) -> None:
        """From bytes to the model's input, in a thread of the pool."""
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
        """An image's header, if its pixels are within the limit.

        Raises:
            ImageError: no.
        """
        return open_image(upload.data, upload.name, max_pixels=self._max_pixels)

    def _prepare(self, upload: Upload) -> Prepared:
        opened = self.open(upload)
        # The decoded image is not needed for numbers, and a queue full of photographs would fill the memory.
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
            told = zip(batch, answers, strict=True)
            self._answer([(job, Answer(image.info, outputs)) for (job, image), outputs in told])

    def _next(self) -> list[tuple[_Job, Prepared]]:
        """Wait for images; empty when closed."""
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
    """Have a thread's call made by the event loop; not made, if the service has ended meanwhile."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _resolve(answers: list[tuple[_Job, Answer | Exception]]) -> None:
    """In the event loop; an image that cannot be read is an answer, too, so that others of its request go on."""
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, Exception) and not isinstance(answer, ImageError):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
