"""Print results: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from mobilevit.files import Json, as_utf8

if TYPE_CHECKING:
    from mobilevit.tasks.report import Report


def as_json(value: Json, indent: int | None = 2) -> str:
    """Convert a value to JSON; in one line if `indent` is None."""
    return as_utf8(json.dumps(value, indent=indent, ensure_ascii=False))


def print_json(value: Json, indent: int | None = 2) -> None:
    """Print JSON at once, for a program that reads along."""
    print(as_json(value, indent), flush=True)


def print_report(report: Report) -> None:
    """Print the summary of an evaluation, and a row per class if there are at most 100."""
    headline = report.headline()
    print(f"\n{report.num_images:,} images")
    width = max(len(name) for name, _ in headline)
    for name, value in headline:
        print(f"  {name:<{width}}  {value:>8}")
    heading, rows = report.table()
    if len(rows) <= 100:
        print_rows(heading, rows)


def print_rows(heading: list[str], rows: list[list[str]], total: list[str] | None = None) -> None:
    """Print a table, and a last row below a line; the columns have numbers, except the first and "kind"."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(heading):
        table.add_column(name, justify="left" if number == 0 or name == "kind" else "right")
    for row in rows:
        table.add_row(*row)
    if total is not None:
        table.add_section()
        table.add_row(*total)
    # In a file or a pipe, rich would cut tables off at 80 columns.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
