"""Bulk prediction by Ray Data: processes with a model each, on this machine or on all of a cluster.

Workers read images and send rows; the process that was started writes them, so parts and resuming are the same.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevit.errors import MobileViTError

if TYPE_CHECKING:
    from mobilevit.runtime.bulk import BulkJob
    from mobilevit.runtime.bulk_parts import Row

_MOST_SOURCES = 256
"""In one piece of work."""
_PIECES_OF_A_WORKER = 4
"""At least, if there are few sources, so that all workers end at about the same time."""
_READERS_OF_A_GPU = 4
_STORE_BYTES = 512 * 2**20
"""For names and rows on their way, on a machine without a cluster."""


@contextmanager
def connected(job: BulkJob) -> Iterator[None]:
    """Join the job's cluster, or start one of this machine alone.

    Raises:
        ValueError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it warns of how Ray Data itself starts its workers
    try:
        import ray
    except ImportError:
        raise MobileViTError("--engine ray needs Ray; pip install 'mobilevit[ray]'") from None
    address = job.ray_address or os.environ.get("RAY_ADDRESS")
    alone: dict[str, Any] = {"object_store_memory": _STORE_BYTES, "include_dashboard": False, "num_cpus": job.workers}
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **({} if address else alone))
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = f"no Ray cluster at {address}" if address else "Ray does not start"
            raise MobileViTError(f"{told} ({' '.join(str(error).split())[:200]})") from None
    # What Ray prints, of tasks that a stop has left undone, is not to get among the report.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            if ours:
                ray.shutdown()


def ray_rows(job: BulkJob, sources: Sequence[str], stop: Callable[[], bool]) -> Generator[list[Row]]:
    """The rows of each piece of work, in the order in which they are done."""
    import pyarrow as pa
    import ray

    from mobilevit.runtime.bulk import model_files

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources: dict[str, float] = ray.cluster_resources()
    gpus = 0 if job.device == "cpu" else int(resources.get("GPU", 0))
    room = gpus or max(1, int(resources.get("CPU", 1)))
    workers = min(job.workers or room, room)  # more would be waited for
    size = max(1, min(_MOST_SOURCES, -(-len(sources) // (workers * _PIECES_OF_A_WORKER))))
    # Names are bytes here: those of files need not be UTF-8.
    pieces = [
        pa.table({"source": pa.array([os.fsencode(name) for name in sources[start : start + size]], pa.binary())})
        for start in range(0, len(sources), size)
    ]
    # In a list, so that it stays a reference until a worker fetches it.
    files = [ray.put({str(path.relative_to(job.model.parent)): path.read_bytes() for path in model_files(job.model)})]
    rows = ray.data.from_arrow(pieces).map_batches(
        _Worker,
        fn_constructor_args=(job, files, str(Path.cwd()), _READERS_OF_A_GPU if gpus else 1),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else None,
    )
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield table.to_pylist()
        if stop():
            return


class _Worker:
    """A model in a process of its own; its files come with it, as other machines may not have them."""

    def __init__(self, job: BulkJob, files: list[Any], folder: str, at_once: int) -> None:
        import ray

        from mobilevit.runtime.bulk import open_predictor

        with suppress(OSError):  # relative paths mean what they mean to the user, where the folder is shared
            os.chdir(folder)
        self._folder = tempfile.TemporaryDirectory(prefix="mobilevit-")
        for name, data in ray.get(files[0]).items():
            path = Path(self._folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._job, self._at_once = job, at_once
        self._predictor = open_predictor(job, Path(self._folder.name, job.model.name), threads=job.threads or 1)

    def __call__(self, names: Any) -> Any:
        from mobilevit.runtime.bulk import predict_rows
        from mobilevit.runtime.bulk_parts import to_table

        sources = [os.fsdecode(name) for name in names["source"].to_pylist()]
        batches = predict_rows(self._predictor, sources, self._job, workers=self._at_once, side_by_side=False)
        return to_table([row for rows in batches for row in rows], self._predictor.card.task)
