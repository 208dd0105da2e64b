"""Bulk prediction by Ray Data: processes with a model each, on this machine or on all machines of a cluster.

Workers read images and send rows; the process that was started writes them, so parts and resuming stay the same.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.errors import MobileViTError, one_line
from mobilevit.runtime.engine import import_runtime

if TYPE_CHECKING:
    import pyarrow
    import ray

    from mobilevit.runtime.bulk import PredictOptions
    from mobilevit.runtime.bulk_parts import Row

_MAX_SOURCES = 256
"""Images in one piece of work."""
_MIN_PIECES = 4
"""Pieces per worker when there are few images, so that all workers finish at about the same time."""
_READERS_PER_GPU = 4
_STORE_BYTES = 512 * 2**20
"""Size of Ray's object store, for names and rows in transit, on a machine without a cluster."""


@contextmanager
def connected(options: PredictOptions) -> Iterator[None]:
    """Join the cluster, or start one on this machine alone.

    Raises:
        MobileViTError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of the way Ray Data itself starts its workers
    ray = import_runtime("ray", "ray")
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    alone: dict[str, object] = {}
    if not address:
        alone = {"object_store_memory": _STORE_BYTES, "include_dashboard": False, "num_cpus": options.workers}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **alone)
    except (ConnectionError, ValueError, RuntimeError) as error:
        problem = f"no Ray cluster at {address}" if address else "Ray does not start"
        raise MobileViTError(f"{problem} ({one_line(error)})") from None
    # Ray prints messages about unfinished tasks after a stop; they must not get into the report.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def ray_rows(
    model: Path, sources: Sequence[str], options: PredictOptions, stop: Callable[[], bool]
) -> Generator[list[Row]]:
    """Yield the rows of each piece of work, in the order in which pieces are finished."""
    import pyarrow as pa
    import ray

    from mobilevit.runtime.bulk import files_of

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources: dict[str, float] = ray.cluster_resources()
    gpus = 0 if options.device == "cpu" else int(resources.get("GPU", 0))
    room = gpus or max(1, int(resources.get("CPU", 1)))
    workers = min(options.workers or room, room)  # Ray would wait for more
    size = max(1, min(_MAX_SOURCES, -(-len(sources) // (workers * _MIN_PIECES))))
    # Names are sent as bytes: file names need not be UTF-8.
    pieces = [
        pa.table({"source": pa.array([os.fsencode(name) for name in sources[start : start + size]], pa.binary())})
        for start in range(0, len(sources), size)
    ]
    # In a list, so that it stays a reference until a worker fetches it.
    files = [ray.put({str(path.relative_to(model.parent)): path.read_bytes() for path in files_of(model)})]
    rows = ray.data.from_arrow(pieces).map_batches(
        _Worker,
        fn_constructor_args=(model.name, files, options, str(Path.cwd()), _READERS_PER_GPU if gpus else 1),
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
    """A model in a process of its own; its files are sent to it, as other machines may not have them."""

    def __init__(
        self, model: str, files: list[ray.ObjectRef], options: PredictOptions, folder: str, at_once: int
    ) -> None:
        import ray

        with suppress(OSError):  # relative paths are relative to the user's folder, where it is shared
            os.chdir(folder)
        self._folder = tempfile.TemporaryDirectory(prefix="mobilevit-")
        for name, data in ray.get(files[0]).items():
            path = Path(self._folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._options, self._at_once = options, at_once
        self._predictor = options.open(Path(self._folder.name, model), threads=options.threads or 1)

    def __call__(self, names: pyarrow.Table) -> pyarrow.Table:
        import pyarrow as pa

        from mobilevit.runtime.bulk import predict_rows
        from mobilevit.runtime.bulk_parts import schema_of

        sources = [os.fsdecode(name) for name in names["source"].to_pylist()]
        batches = predict_rows(self._predictor, sources, self._options, workers=self._at_once, side_by_side=False)
        return pa.Table.from_pylist(list(chain.from_iterable(batches)), schema=schema_of(self._predictor.card.task))
