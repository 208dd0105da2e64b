"""Divide a set of labeled images into folders small enough to be sent one by one.

    python scripts/gpu_data.py FOLDER gpu-session/imagenette --limit 45

FOLDER holds train.parquet, and val.parquet or test.parquet. Writes gpu-session/imagenette-1, -2 and so on, of at most
--limit MiB each, which benchmarks/classification.py takes together: --data gpu-session/imagenette-1 ...-2. Images stay
as they are encoded.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from pyarrow import parquet

NAMES = ("train", "val", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="how the folders' names begin")
    parser.add_argument("--limit", type=float, default=45.0, help="MiB of one folder")
    arguments = parser.parse_args()
    for old in arguments.out.parent.glob(f"{arguments.out.name}-*"):
        shutil.rmtree(old)
    files = [file for name in NAMES if (file := arguments.folder / f"{name}.parquet").exists()]
    if not files:
        raise SystemExit(f"{arguments.folder}: no train.parquet")
    for number, tables in folders(files, int(arguments.limit * 2**20)):
        folder = arguments.out.parent / f"{arguments.out.name}-{number}"
        folder.mkdir(parents=True)
        for name, table in tables.items():
            parquet.write_table(table, folder / f"{name}-{number}.parquet", compression="none")
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        print(f"{size:6.1f} MiB  {folder}: {', '.join(f'{len(table)} of {name}' for name, table in tables.items())}")


def folders(files: list[Path], limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows in their order, in turn into as many folders as it takes."""
    number, room = 1, limit
    tables: dict[str, Any] = {}
    for file in files:
        table = parquet.read_table(file)
        # A little more than an image itself, for its label and the file's own tables.
        ends = pc.cumulative_sum(pc.add(pc.binary_length(table["image"]), 24)).to_pylist()
        start = 0
        while start < len(table):
            before = ends[start - 1] if start else 0
            stop = next((row for row in range(start, len(table)) if ends[row] - before > room), len(table))
            if stop > start:
                tables[file.stem] = table.slice(start, stop - start)
                room -= ends[stop - 1] - before
            if stop < len(table):
                yield number, tables
                number, room, tables = number + 1, limit, {}
            start = stop
    yield number, tables


if __name__ == "__main__":
    main()
