"""The files that contenders run: converted in a process of its own, as converters take memory and can crash."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilevit.benchmarking.contenders import Contender
from mobilevit.benchmarking.rounds import Failure, Worker, WorkerError
from mobilevit.progress import Progress

_Key = tuple[str, str, str, int]


def export_all(
    contenders: Sequence[Contender], folder: Path, *, calibration: Path | None = None
) -> list[Contender | Failure]:
    """Write the file of each contender that needs one; those that differ only in threads share it.

    Returns:
        The contenders, knowing their files, or why there is none.
    """
    # Network by network, as loading one takes longer than many a conversion.
    keys = sorted({_key(contender) for contender in contenders if contender.format is not None})
    found: dict[_Key, str | WorkerError] = {}
    worker: Worker | None = None
    network = ""
    try:
        with Progress("export", len(keys), "files") as progress:
            for key in keys:
                contender = next(c for c in contenders if c.format is not None and _key(c) == key)
                if worker is None or contender.network.label != network:
                    if worker is not None:
                        worker.close()
                    worker, network = Worker(contender.threads), contender.network.label
                try:
                    answer: dict[str, Any] = worker.ask(
                        "export",
                        contender=contender.to_dict(),
                        out=str(folder),
                        name=_file_name(contender),
                        batch_size=_file_batch(contender),
                        calibration=None if calibration is None else os.fspath(calibration),
                    )
                    found[key] = answer["path"]
                except WorkerError as error:
                    found[key] = WorkerError(f"export: {error}")
                    worker.close()
                    worker = None
                progress.advance(1, contender.name)
    finally:
        if worker is not None:
            worker.close()
    return [_with_file(contender, found) for contender in contenders]


def _with_file(contender: Contender, found: dict[_Key, str | WorkerError]) -> Contender | Failure:
    if contender.format is None:
        return contender
    file = found[_key(contender)]
    if isinstance(file, WorkerError):
        return Failure(contender=contender, reason=str(file))
    return dataclasses.replace(contender, artifact=file)


def _key(contender: Contender) -> _Key:
    return contender.network.label, contender.engine, contender.precision, _file_batch(contender)


def _file_batch(contender: Contender) -> int:
    """Images in a run of the file. Runtimes on a CPU are given several images side by side, one thread each."""
    whole = contender.engine == "pt2" or contender.device != "cpu"
    return contender.batch_size if whole else 1


def _file_name(contender: Contender) -> str:
    name = re.sub(r"[^A-Za-z0-9_]+", "-", contender.network.label)
    batch = _file_batch(contender)
    return name if batch == 1 else f"{name}-batch{batch}"
