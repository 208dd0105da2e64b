"""Predictions for any number of images, as parquet files: streamed, resumed where they stopped.

A batch is one thread's from its files to its rows. As many threads as there are cores do that side by side, so that
while some wait for files, or for the model, the others keep the processor at work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobilevit.card import ModelCard
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.machine import available_cores
from mobilevit.progress import Progress
from mobilevit.results.base import Outputs
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime import artifact as artifacts
from mobilevit.runtime.bulk_parts import Parts, Row, finished, key_of, open_folder, schema_of
from mobilevit.runtime.predictor import Predictor, Prepared
from mobilevit.runtime.session import EngineChoice, read_card
from mobilevit.runtime.sources import read_source

BulkEngine = Literal["torch", "compile", "auto", "ray"]

_LONGEST_STEM = 150
"""Bytes; file systems take names of 255, and one that is being written has more to it."""


@dataclass(frozen=True, kw_only=True)
class BulkJob:
    """What to predict with, and what to write."""

    model: Path
    """A checkpoint, or an exported file."""
    out: Path
    """Folder for the parquet files."""
    top: int = 3
    """Classification: how many labels a row has."""
    min_score: float | None = None
    """Detection: leave out objects below; None: the model's own threshold."""
    masks: Path | None = None
    """Segmentation: folder for label maps, as palette PNGs."""
    batch_size: int | None = None
    """Images that go through the model together; None: what `Predictor` takes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """To compute with on the CPU; None: as many as there are cores; with Ray, of each worker, None: one."""
    engine: BulkEngine = "torch"
    """What runs a checkpoint, or "ray": PyTorch in many processes, on as many machines as a Ray cluster has."""
    workers: int | None = None
    """Batches at work at once, a thread each; with Ray, processes with a model each. None: as many as cores."""
    ray_address: str | None = None
    """Of a running Ray cluster; None: RAY_ADDRESS, or one of this machine alone."""
    part_rows: int = 10_000
    """Rows of a part; a part that takes more than a minute has less."""
    overwrite: bool = False
    """Replace what is in `out`."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "part_rows", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MobileViTError(f"{name} is {value}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """What a run has done."""

    out: Path
    num_sources: int
    """Images that were named."""
    num_before: int
    """Of these, how many were done before."""
    num_written: int
    """Rows of this run, errors included."""
    num_errors: int
    """Rows of this run without a prediction."""
    seconds: float
    """From the first image to the last."""
    stopped: bool
    """Whether a signal ended it; the same command goes on."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "out": str(self.out), "seconds": round(self.seconds, 2)}

    def describe(self) -> str:
        """For people, in one line."""
        speed = self.num_written / max(self.seconds, 1e-9)
        told = f"{self.num_written:,} images ({speed:,.1f} a second), {self.num_errors:,} of them unreadable"
        before = f"; {self.num_before:,} were done before" if self.num_before else ""
        left = self.num_sources - self.num_before - self.num_written
        stopped = f"; stopped with {left:,} left, the same command goes on" if self.stopped else ""
        return f"{self.out}: {told}{before}{stopped}"


def predict_in_bulk(job: BulkJob, sources: Sequence[str]) -> BulkReport:
    """Write a row for every source that has none yet.

    An image that cannot be read becomes a row with `error`. Ctrl-C and SIGTERM write what is done and return; after
    anything worse, the rows since the last part are made again by the next run.

    Raises:
        ValueError: the model cannot be opened, an option is for another task, a package is missing, or `job.out` holds
            something else.
    """
    card = read_card(job.model)
    for name, its_task in (("min_score", "detection"), ("masks", "segmentation")):
        if getattr(job, name) is not None and card.task != its_task:
            raise MobileViTError(f"`{name}` is for {its_task}; this checkpoint does {card.task}")
    schema_of(card.task)  # says early what is not installed
    with ExitStack() as held:
        held.enter_context(open_folder(job.out, _record(job, card), overwrite=job.overwrite))
        batches: Callable[[BulkJob, Sequence[str], Callable[[], bool]], Generator[list[Row]]] = _local_rows
        if job.engine == "ray":
            from mobilevit.runtime.bulk_ray import connected, ray_rows

            held.enter_context(connected(job))
            batches = ray_rows
        stop = held.enter_context(_noticing_signals())  # after Ray, which has a way of its own with them
        done = finished(job.out)
        left = [source for source in sources if key_of(source) not in done]
        before = len(sources) - len(left)
        parts, errors, written = Parts(job.out, card.task, rows=job.part_rows), 0, 0
        start = time.monotonic()
        with Progress("predict", len(sources), "images", before) as progress:
            if left:
                with closing(batches(job, left, stop)) as stream:
                    try:
                        for rows in stream:
                            parts.add(rows)
                            written += len(rows)
                            errors += sum(row.get("error") is not None for row in rows)
                            progress.advance(len(rows))
                    finally:
                        parts.flush()
        return BulkReport(
            out=job.out,
            num_sources=len(sources),
            num_before=before,
            num_written=written,
            num_errors=errors,
            seconds=time.monotonic() - start,
            stopped=written < len(left),
        )


def model_files(path: Path) -> list[Path]:
    """All files that a checkpoint or an exported model consists of."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        inside = [path, *(p for p in (path.with_suffix(".bin"),) if path.suffix == ".xml" and p.exists())]
    sidecar = artifacts.sidecar_of(path)
    return [*inside, *([sidecar] if artifacts.is_artifact(path) and sidecar.exists() else [])]


def open_predictor(job: BulkJob, model: Path, *, threads: int | None) -> Predictor:
    """The job's model, which may lie elsewhere than the job says."""
    engine: EngineChoice = "torch" if job.engine == "ray" else job.engine
    return Predictor(model, device=job.device, batch_size=job.batch_size, threads=threads, engine=engine)


def predict_rows(
    predictor: Predictor,
    sources: Iterable[str],
    job: BulkJob,
    *,
    workers: int,
    side_by_side: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[list[Row]]:
    """Predict for batches in threads; yield the rows of each, in the order of the sources, until `stop` says so."""
    turn = nullcontext() if side_by_side else threading.Lock()
    names, batches = iter(sources), deque[Future[list[Row]]]()
    with ThreadPoolExecutor(workers, "predict") as pool:
        try:
            while True:
                while len(batches) < 2 * workers and not stop():
                    batch = list(itertools.islice(names, predictor.batch_size))
                    if not batch:
                        break
                    batches.append(pool.submit(_predict_batch, predictor, batch, job, turn))
                if not batches:
                    break
                yield batches.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _local_rows(job: BulkJob, sources: Sequence[str], stop: Callable[[], bool]) -> Generator[list[Row]]:
    predictor = open_predictor(job, job.model, threads=job.threads)
    with predictor.side_by_side() as at_once:
        workers = job.workers or (job.threads if at_once else None) or available_cores()
        yield from predict_rows(predictor, sources, job, workers=workers, side_by_side=at_once, stop=stop)


def _predict_batch(
    predictor: Predictor, sources: Sequence[str], job: BulkJob, turn: AbstractContextManager[Any]
) -> list[Row]:
    """Read, compute and make rows, all in one thread."""
    read = [_prepare(predictor, source) for source in sources]
    good = [image for image in read if isinstance(image, Prepared)]
    with turn:
        answers = iter(predictor.compute(good) if good else ())
    return [
        _row(predictor, image, next(answers), job)
        if isinstance(image, Prepared)
        else {"source": key_of(source), "error": key_of(str(image).removeprefix(f"{source}: "))}
        for source, image in zip(sources, read, strict=True)
    ]


def _prepare(predictor: Predictor, source: str) -> Prepared | ImageError:
    try:  # rows need no image, and images of many megapixels should not wait in memory
        return predictor.prepare(read_source(source), source, keep_image=False)
    except ImageError as error:
        return error


def _row(predictor: Predictor, image: Prepared, outputs: Outputs, job: BulkJob) -> Row:
    height, width = image.info.size
    result = predictor.finish(image.info, outputs)
    row = {"source": key_of(result.source), "width": width, "height": height}
    row |= result.to_row(top=job.top, min_score=job.min_score)
    if job.masks is not None and isinstance(result, SegmentationResult):
        mask = job.masks / mask_name(result.source)
        result.save_mask(mask)
        row["mask"] = key_of(str(mask))
    return row


def mask_name(source: str) -> str:
    """The same for the same source in every run, and another one for images of the same name in other folders."""
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    stem = key_of(Path(source).stem).encode()[:_LONGEST_STEM].decode(errors="ignore")
    return f"{stem}-{digest}.png"


def _record(job: BulkJob, card: ModelCard) -> dict[str, Any]:
    """What rows depend on."""
    digest = hashlib.sha256()
    for path in model_files(job.model):
        digest.update(path.read_bytes())
    return {
        "version": 1,
        "task": card.task,
        "model": str(job.model),
        "digest": digest.hexdigest(),
        "top": job.top if card.task == "classification" else None,
        "min_score": job.min_score,
        "masks": None if job.masks is None else str(job.masks),
    }


@contextmanager
def _noticing_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are noted, for the loop to stop at a good place; a second one ends the process at once."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return

    def note(number: int, _: object) -> None:
        noted.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
