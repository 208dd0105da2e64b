"""A folder of parquet files that grows part by part: each is whole or not there, and says which images are done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mobilevit.card import Task
from mobilevit.errors import MobileViTError
from mobilevit.files import file_lock, write_atomically, write_json

RECORD = "_run.json"
"""What the rows were made with. Readers of parquet folders pass over names with an underscore."""

_LOCK = "_lock"

Row = dict[str, Any]
"""What one image gets: columns of `schema_of`; those that are not there are null."""


def schema_of(task: Task) -> Any:
    """The columns of a task's rows, as a `pyarrow.Schema`; those of the task are null where `error` is not.

    Raises:
        ValueError: pyarrow is not installed.
    """
    pa = _pyarrow()
    scored = {
        "classification": [
            ("label", pa.string()),
            ("probability", pa.float32()),
            ("top", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
        ],
        "detection": [
            (
                "detections",
                pa.list_(
                    pa.struct(
                        [("label", pa.string()), ("score", pa.float32())]
                        + [(edge, pa.float32()) for edge in ("left", "top", "right", "bottom")]
                    )
                ),
            )
        ],
        "segmentation": [
            ("shares", pa.list_(pa.struct([("label", pa.string()), ("share", pa.float64())]))),
            ("mask", pa.string()),
        ],
    }
    first = [("source", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    return pa.schema([*first, *scored[task], ("error", pa.string())])


def to_table(rows: Sequence[Row], task: Task) -> Any:
    """Rows as a `pyarrow.Table`."""
    return _pyarrow().Table.from_pylist(list(rows), schema=schema_of(task))


def key_of(source: str) -> str:
    """How a source is written into rows: file names that are not UTF-8 have their odd bytes escaped."""
    return source.encode("utf-8", "backslashreplace").decode()


class Parts:
    """Gathers rows and writes them as the next part whenever there are enough.

    They wait as plain values: small arrow tables among the large tensors that come and go would scatter the memory.

    Args:
        folder: which exists.
        task: whose columns they have.
        rows: of a part; or less, if they took longer than `seconds`.
        seconds: of work that a kill may cost.
    """

    def __init__(self, folder: Path, task: Task, *, rows: int, seconds: float = 60.0) -> None:
        self._folder, self._task, self._rows, self._seconds = folder, task, rows, seconds
        self._number = max((int(path.stem.partition("-")[2]) for path in find_parts(folder)), default=-1) + 1
        self._waiting: list[Row] = []
        self._since = time.monotonic()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows for the next part, and write the part if it is due."""
        self._waiting += rows
        if len(self._waiting) >= self._rows or time.monotonic() - self._since >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        import pyarrow.parquet as pq

        table = to_table(self._waiting, self._task)
        path = self._folder / f"part-{self._number:06}.parquet"
        write_atomically(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
        self._waiting, self._number = [], self._number + 1


def find_parts(folder: Path) -> list[Path]:
    """The finished parts, in order."""
    return sorted(folder.glob("part-" + 6 * "[0-9]" + ".parquet"))


def finished(folder: Path) -> set[str]:
    """The sources of all finished parts, as `key_of` writes them.

    Raises:
        ValueError: a file in the folder is not a part.
    """
    _pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    done: set[str] = set()
    for path in find_parts(folder):
        try:
            done.update(pq.read_table(path, columns=["source"])["source"].to_pylist())
        except (pa.ArrowInvalid, KeyError) as error:
            raise MobileViTError(
                f"{path}: not a part of predictions ({' '.join(str(error).split())}); delete it"
            ) from None
    return done


@contextmanager
def open_folder(folder: Path, record: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Make the folder, or go on with one of the same record; nobody else writes into it meanwhile.

    Raises:
        ValueError: it holds something else, or rows made otherwise, or another process is writing into it.
    """
    if folder.exists() and not folder.is_dir():
        raise MobileViTError(f"{folder}: is a file; --out names a folder for parquet files")
    if (
        folder.is_dir()
        and not (folder / RECORD).exists()
        and any(not p.name.startswith((".", _LOCK)) for p in folder.iterdir())
    ):
        raise MobileViTError(f"{folder}: holds other files; choose a new folder for --out")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder / _LOCK, wait=False))
        except BlockingIOError:
            raise MobileViTError(
                f"{folder}: another process is writing into it; wait, or choose another --out"
            ) from None
        if overwrite:
            for path in (*find_parts(folder), folder / RECORD):
                path.unlink(missing_ok=True)
        for path in folder.glob(".*part-*"):  # what a killed run was writing
            path.unlink(missing_ok=True)
        if (folder / RECORD).exists():
            _compare(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")), record)
        else:
            write_json(folder / RECORD, record)
        yield


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if name != "model" and before.get(name) != value:
            told = f"{name} {value}, not {before.get(name)}" if name != "digest" else "another model"
            raise MobileViTError(f"{folder}: holds predictions made otherwise (now {told}); --overwrite replaces them")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MobileViTError("--out writes parquet, which needs pyarrow; pip install 'mobilevit[bulk]'") from None
    return pyarrow
