"""Collect the images of all connections into batches.

The event loop accepts an image, a pool of threads decodes and resizes it, and one thread runs the model on the images
that are ready. While that thread computes, the next batch collects, so batches grow with the load and a single image
does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

from mobilevit.errors import ImageError
from mobilevit.imaging.decode import MAX_PIXELS, EncodedImage, open_image
from mobilevit.results.base import ImageInfo, Outputs
from mobilevit.runtime.predictor import Predictor, Prepared
from mobilevit.serving import metrics
from mobilevit.serving.refusal import busy
from mobilevit.serving.settings import ServeConfig
from mobilevit.serving.uploads import Upload

log = logging.getLogger("mobilevit")

Answer = tuple[ImageInfo, Outputs] | ImageError
"""The model's outputs for an image, for `Predictor.finish`; or why it cannot be read."""


class Batcher:
    """Run one model on batches; all methods are called in the event loop.

    Threads of `readers` decode and resize, the one of `computer` runs the model. It holds `turn`, as the models of a
    process take turns.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        config: ServeConfig,
        *,
        readers: Executor,
        computer: Executor,
        turn: threading.Lock,
    ) -> None:
        self.name, self.predictor = name, predictor
        self._config, self._readers, self._computer, self._turn = config, readers, computer, turn
        # A predictor limits the batch itself where outputs are large, as in segmentation.
        self._max_batch = min(config.max_batch, predictor.batch_size)
        self._loop = asyncio.get_running_loop()
        self._pending = 0
        """Images that are accepted and not yet answered."""
        self._being_read = 0
        self._ready: deque[tuple[Prepared, asyncio.Future[Outputs]]] = deque()
        self._changed = asyncio.Event()
        """Set when an image becomes ready, or turns out to be unreadable."""
        self._seconds_each = 0.05
        """A moving average of the time between answers under load."""
        self._work = asyncio.create_task(self._compute_batches())

    def check_room(self, count: int = 1) -> None:
        """Refuse with 503 unless `count` more images would be accepted."""
        if self._pending + count > self._config.max_queue:
            raise busy(max(1, math.ceil(self._pending * self._seconds_each)))

    async def predict(self, uploads: Sequence[Upload]) -> list[Answer]:
        """Accept images, all or none, and compute their outputs; if it is canceled, what has not begun is skipped."""
        self.check_room(len(uploads))
        self._count(len(uploads))
        tasks = [asyncio.create_task(self._answer(upload)) for upload in uploads]
        for task in tasks:
            task.add_done_callback(lambda _: self._count(-1))
        return await asyncio.gather(*tasks)

    def open(self, upload: Upload) -> EncodedImage:
        """Read an image's header, and check the number of pixels; errors are those of `open_image`."""
        return open_image(upload.data, upload.name, max_pixels=min(self._config.max_pixels, MAX_PIXELS))

    def close(self) -> None:
        """Accept no more batches."""
        self._work.cancel()

    def _count(self, images: int) -> None:
        self._pending += images
        metrics.QUEUE.labels(self.name).set(self._pending)

    async def _answer(self, upload: Upload) -> Answer:
        self._being_read += 1
        try:
            prepared = await self._loop.run_in_executor(self._readers, self._prepare, upload)
        except ImageError as error:
            return error
        finally:
            self._being_read -= 1
            self._changed.set()
        outputs: asyncio.Future[Outputs] = self._loop.create_future()
        self._ready.append((prepared, outputs))
        return prepared.info, await outputs

    def _prepare(self, upload: Upload) -> Prepared:
        # Answers do not contain the image, and a queue full of photographs would fill the memory.
        return self.predictor.prepare(self.open(upload), upload.name, keep_image=False)

    async def _compute_batches(self) -> None:
        while True:
            batch = await self._next()
            start = time.perf_counter()
            try:
                answers = await self._loop.run_in_executor(self._computer, self._compute, [image for image, _ in batch])
            except Exception as error:
                log.exception("%s: the model failed", self.name)
                for _, outputs in batch:
                    if not outputs.done():
                        outputs.set_exception(error)
                continue
            self._seconds_each += 0.1 * ((time.perf_counter() - start) / len(batch) - self._seconds_each)
            for (_, outputs), answer in zip(batch, answers, strict=True):
                if not outputs.done():  # its client may have gone
                    outputs.set_result(answer)

    def _compute(self, images: list[Prepared]) -> list[Outputs]:
        with self._turn, metrics.COMPUTE.labels(self.name).time():
            metrics.BATCHES.labels(self.name).observe(len(images))
            return self.predictor.compute(images)

    async def _next(self) -> list[tuple[Prepared, asyncio.Future[Outputs]]]:
        """Wait for the next batch."""
        while True:
            while not self._ready:
                await self._change()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.max_wait_ms / 1e3):
                    while len(self._ready) < self._max_batch and self._being_read:
                        await self._change()
            images = [self._ready.popleft() for _ in range(min(len(self._ready), self._max_batch))]
            if batch := [(image, outputs) for image, outputs in images if not outputs.cancelled()]:
                return batch

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
