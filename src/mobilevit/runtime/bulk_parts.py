"""A folder of parquet files that grows part by part; parts are whole or not there, and say which images are done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError, one_line
from mobilevit.files import Json, file_lock, reading_from, write_atomically, write_json, writing_to
from mobilevit.runtime.engine import import_runtime

if TYPE_CHECKING:
    import pyarrow

RECORD = "_run.json"
"""The settings that the rows depend on. Readers of parquet folders skip names that begin with an underscore."""

_LOCK = "_lock"
_SECONDS = 60.0
"""How much work may be lost if the process is killed."""

Row = Json
"""The row of one image, by the columns of `schema_of`; missing columns are null."""


def schema_of(task: TaskName) -> pyarrow.Schema:
    """Return the columns of a task's rows; in rows with an `error`, all but `source` are null."""
    pa = import_runtime("pyarrow", "bulk")
    text, number = pa.string(), pa.float32()
    objects = [("label", text), ("score", number), *((edge, number) for edge in ("left", "top", "right", "bottom"))]
    columns: dict[TaskName, list[tuple[str, pyarrow.DataType]]] = {
        "classification": [
            ("label", text),
            ("probability", number),
            ("top", pa.list_(pa.struct([("label", text), ("probability", number)]))),
        ],
        "detection": [("detections", pa.list_(pa.struct(objects)))],
        "segmentation": [
            ("shares", pa.list_(pa.struct([("label", text), ("share", pa.float64())]))),
            ("mask", text),
        ],
    }
    size = [("width", pa.int32()), ("height", pa.int32())]
    return pa.schema([("source", text), *size, *columns[task], ("error", text)])


class Parts:
    """Collect rows, and write them as the next part whenever there are enough.

    They are kept as plain values: small arrow tables between large arrays that come and go would fragment the memory.
    """

    def __init__(self, folder: Path, task: TaskName, *, rows: int) -> None:
        self._folder, self._task, self._rows = folder, task, rows
        self._number = max((int(path.stem.partition("-")[2]) for path in find_parts(folder)), default=-1) + 1
        self._waiting: list[Row] = []
        self._since = time.monotonic()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows for the next part, and write the part if it is due."""
        self._waiting += rows
        if len(self._waiting) >= self._rows or time.monotonic() - self._since >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(self._waiting, schema=schema_of(self._task))
        path = self._folder / f"part-{self._number:06}.parquet"
        write_atomically(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
        self._waiting, self._number = [], self._number + 1


def find_parts(folder: Path) -> list[Path]:
    """Find the finished parts, in order."""
    return sorted(folder.glob("part-" + 6 * "[0-9]" + ".parquet"))


def finished(folder: Path) -> set[str]:
    """Read the sources of all finished parts, in the form of `as_utf8`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    done: set[str] = set()
    for path in find_parts(folder):
        try:
            with reading_from(path):
                done.update(pq.read_table(path, columns=["source"])["source"].to_pylist())
        except (pa.ArrowInvalid, KeyError) as error:
            raise MobileViTError(f"{path}: not a part of predictions ({one_line(error)}); delete it") from None
    return done


@contextmanager
def open_folder(folder: Path, record: Mapping[str, object], *, overwrite: bool) -> Iterator[None]:
    """Create the folder, or continue one with the same record; no other process can write into it meanwhile.

    Raises:
        MobileViTError: it contains other files, or rows with other settings, or another process is writing into it.
    """
    recorded = folder / RECORD
    with ExitStack() as stack:
        with writing_to(folder):
            if folder.exists() and not folder.is_dir():
                raise MobileViTError(f"{folder}: is a file; `out` is a folder for parquet files")
            folder.mkdir(parents=True, exist_ok=True)
            if not recorded.exists() and any(not path.name.startswith((".", _LOCK)) for path in folder.iterdir()):
                raise MobileViTError(f"{folder}: contains other files; choose a new folder for `out`")
            try:
                stack.enter_context(file_lock(folder / _LOCK, wait=False))
            except BlockingIOError:
                raise MobileViTError(
                    f"{folder}: another process is writing into it; wait, or choose another `out`"
                ) from None
            leftovers = [*folder.glob(".*part-*")]  # half-written by a process that was killed
            replaced = [*find_parts(folder), recorded] if overwrite else []
            for path in (*leftovers, *replaced):
                path.unlink(missing_ok=True)
        if recorded.exists():
            _compare(folder, record)
        else:
            write_json(recorded, record)
        yield


def _compare(folder: Path, now: Mapping[str, object]) -> None:
    path = folder / RECORD
    with reading_from(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        before: Json = dict(json.loads(text))
    except (ValueError, TypeError):
        raise MobileViTError(f"{path}: damaged; `overwrite` replaces all predictions in this folder") from None
    for name, value in now.items():
        if name != "model" and before.get(name) != value:
            change = f"{name} is now {value}, was {before.get(name)}" if name != "digest" else "it is another model"
            raise MobileViTError(f"{folder}: has predictions with other settings ({change}); `overwrite` replaces them")
