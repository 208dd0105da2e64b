"""Predictions for any number of images, as parquet files: streamed, and resumed after a stop.

One thread processes a batch from its files to its rows. There are as many threads as cores, so that while some wait for
files or for the model, others keep the processor busy.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mobilevit.card import ModelCard
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.files import Json, as_utf8, reading_from
from mobilevit.machine import available_cores
from mobilevit.progress import Progress
from mobilevit.results import RESULT_TYPES, check_options
from mobilevit.results.base import Result
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime.artifact import artifact_files, is_artifact, sidecar_of
from mobilevit.runtime.bulk_parts import Parts, Row, finished, open_folder, schema_of
from mobilevit.runtime.predictor import Predictor
from mobilevit.runtime.session import read_card

PART_ROWS = 10_000
"""Rows of a part; a part has fewer if they take more than a minute."""
_MAX_STEM_BYTES = 150
"""File systems limit a name to 255 bytes."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `mobilevit predict` on the model, its results, and how they are computed.

    Raises:
        MobileViTError: a field has an impossible value.
    """

    top: int = 3
    """Classification: number of labels to show."""
    min_score: float | None = None
    """Detection: show objects with at least this score. Default: the best balance of precision and recall in
    validation."""
    masks: Path | None = None
    """Segmentation: folder to write label maps to, as palette PNGs."""
    batch_size: int | None = None
    """Images that go through the model together. Default: 16 of 256 x 256 pixels, more of smaller inputs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """CPU threads. Default: all cores; with ray, one for each process."""
    engine: Literal["torch", "compile", "auto", "ray"] = "torch"
    """Engine of a checkpoint; auto: the fastest that `mobilevit tune` found. ray, with --out: many processes of Ray
    Data, on this machine or a cluster, with PyTorch or the engine of an exported file."""
    trust_pt2: bool = False
    """Load a .pt2 file, although that can run code that came with it."""
    overwrite: bool = False
    """With --out: replace the predictions in the folder."""
    workers: int | None = None
    """With --out: batches in progress at a time; with ray: processes with a model each. Default: as many as cores."""
    ray_address: str | None = None
    """With ray: the cluster, such as auto or ray://head:10001. Default: RAY_ADDRESS, or this machine alone."""

    def __post_init__(self) -> None:
        for name in ("top", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MobileViTError(f"`{name}` is {value}; give 1 or more")

    def open(self, model: Path, *, threads: int | None) -> Predictor:
        """Open a model; with "ray", in PyTorch."""
        return Predictor(
            model,
            device=self.device,
            batch_size=self.batch_size,
            threads=threads,
            engine="torch" if self.engine == "ray" else self.engine,
            trust_pt2=self.trust_pt2,
        )


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """The outcome of a run."""

    out: Path
    num_sources: int
    num_before: int
    """Images that were done before this run."""
    num_written: int
    """Rows of this run, including those with errors."""
    num_errors: int
    seconds: float
    stopped: bool
    """Whether a signal ended the run; the same command continues it."""

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        return {**asdict(self), "out": str(self.out), "seconds": round(self.seconds, 2)}

    def describe(self) -> str:
        """Summarize the run in one line."""
        speed = self.num_written / max(self.seconds, 1e-9)
        done = f"{self.num_written:,} images ({speed:,.1f} a second), {self.num_errors:,} of them unreadable"
        before = f"; {self.num_before:,} were done before" if self.num_before else ""
        left = self.num_sources - self.num_before - self.num_written
        stopped = f"; stopped with {left:,} left, the same command continues" if self.stopped else ""
        return f"{self.out}: {done}{before}{stopped}"


def predict_in_bulk(model: Path, sources: Sequence[str], out: Path, options: PredictOptions) -> BulkReport:
    """Write a row for every source that has none yet.

    An image that cannot be read becomes a row with `error`. Ctrl-C and SIGTERM write the finished rows and return; if
    the process is killed, the next run repeats the rows since the last part.

    Raises:
        MobileViTError: the model cannot be opened, an option is for another task, a package is missing, or `out`
            contains something else.
    """
    card = read_card(model)
    check_options(card.task, [name for name in ("min_score", "masks") if getattr(options, name) is not None])
    schema_of(card.task)  # fails early if pyarrow is not installed
    with ExitStack() as held:
        held.enter_context(open_folder(out, _record(model, card, options), overwrite=options.overwrite))
        rows_of = _local_rows
        if options.engine == "ray":
            from mobilevit.runtime.bulk_ray import connected, ray_rows

            held.enter_context(connected(options))
            rows_of = ray_rows
        stop = held.enter_context(_stop_on_signals())  # after Ray, which installs handlers of its own
        done = finished(out)
        left = [source for source in sources if as_utf8(source) not in done]
        before = len(sources) - len(left)
        parts, errors, written = Parts(out, card.task, rows=PART_ROWS), 0, 0
        start = time.monotonic()
        held.callback(parts.flush)
        progress = held.enter_context(Progress("predict", len(sources), "images", before))
        if left:
            for rows in held.enter_context(closing(rows_of(model, left, options, stop))):
                parts.add(rows)
                written += len(rows)
                errors += sum(row.get("error") is not None for row in rows)
                progress.advance(len(rows))
        seconds = time.monotonic() - start
    return BulkReport(
        out=out,
        num_sources=len(sources),
        num_before=before,
        num_written=written,
        num_errors=errors,
        seconds=seconds,
        stopped=written < len(left),
    )


def files_of(model: Path) -> list[Path]:
    """List all files of a checkpoint or an exported model, its sidecar included."""
    return [*artifact_files(model), sidecar_of(model)] if is_artifact(model) else [model]


def predict_rows(
    predictor: Predictor,
    sources: Iterable[str],
    options: PredictOptions,
    *,
    workers: int,
    side_by_side: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[list[Row]]:
    """Predict batches in threads; yield the rows of each, in the order of the sources, until `stop` returns True."""
    turn = nullcontext() if side_by_side else threading.Lock()
    names, batches = iter(sources), deque[Future[list[Row]]]()
    with ThreadPoolExecutor(workers, "predict") as pool:
        try:
            while True:
                while len(batches) < 2 * workers and not stop():
                    batch = list(itertools.islice(names, predictor.batch_size))
                    if not batch:
                        break
                    batches.append(pool.submit(_predict_batch, predictor, batch, options, turn))
                if not batches:
                    break
                yield batches.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _local_rows(
    model: Path, sources: Sequence[str], options: PredictOptions, stop: Callable[[], bool]
) -> Generator[list[Row]]:
    predictor = options.open(model, threads=options.threads)
    with predictor.side_by_side() as at_once:
        workers = options.workers or (options.threads if at_once else None) or available_cores()
        yield from predict_rows(predictor, sources, options, workers=workers, side_by_side=at_once, stop=stop)


def _predict_batch(
    predictor: Predictor, sources: Sequence[str], options: PredictOptions, turn: AbstractContextManager[object]
) -> list[Row]:
    """Read images, run the model and make rows, all in one thread."""
    # A row needs no image, and large images would fill the memory.
    results = predictor.predict_batch([(source, source) for source in sources], keep_images=False, turn=turn)
    return [_row(source, result, options) for source, result in zip(sources, results, strict=True)]


def _row(source: str, result: Result | ImageError, options: PredictOptions) -> Row:
    if isinstance(result, ImageError):
        return {"source": as_utf8(source), "error": as_utf8(str(result).removeprefix(f"{source}: "))}
    height, width = result.info.size
    row: Row = {"source": as_utf8(source), "width": width, "height": height}
    row |= result.to_row(top=options.top, min_score=options.min_score)
    if options.masks is not None and isinstance(result, SegmentationResult):
        mask = options.masks / _mask_name(source)
        result.save_mask(mask)
        row["mask"] = as_utf8(str(mask))
    return row


def _mask_name(source: str) -> str:
    """Name the mask of a source: the same in every run, but different for equal names in different folders."""
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    stem = as_utf8(Path(source).stem).encode()[:_MAX_STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{digest}.png"


def _record(model: Path, card: ModelCard, options: PredictOptions) -> Json:
    """Return the settings that the rows depend on."""
    digest = hashlib.sha256()
    for path in files_of(model):
        with reading_from(path):
            digest.update(path.read_bytes())
    return {
        "version": 1,
        "task": card.task,
        "model": str(model),
        "digest": digest.hexdigest(),
        "top": options.top if "top" in RESULT_TYPES[card.task].options else None,
        "min_score": options.min_score,
        "masks": None if options.masks is None else str(options.masks),
    }


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C and SIGTERM, so that the loop can stop after a batch; a second signal ends the process at once."""
    received = threading.Event()

    def record(number: int, _: object) -> None:
        received.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
