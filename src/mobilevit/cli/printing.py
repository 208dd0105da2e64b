"""Print results: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from mobilevit.files import Json, as_utf8

if TYPE_CHECKING:
    from rich.table import Table

    from mobilevit.tasks.report import Report


def print_json(value: Json) -> None:
    """Print indented JSON, for a program that reads all the output at once."""
    print(as_json(value, indent=2))


def print_json_line(value: Json) -> None:
    """Print one line of JSON at once, for a program that reads line by line."""
    print(as_json(value), flush=True)


def as_json(value: Json, indent: int | None = None) -> str:
    """Convert a value to JSON."""
    return as_utf8(json.dumps(value, indent=indent, ensure_ascii=False))


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


def print_rows(heading: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column has names, the others have numbers."""
    table = new_table(*heading)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def new_table(first: str, *others: str) -> Table:
    """Create a table without rows, with columns of these names."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "kind" else "right")
    return table


def print_table(table: Table) -> None:
    """Print a table at the width of the terminal."""
    from rich.console import Console

    # In a file or a pipe, rich would cut tables off at 80 columns.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
