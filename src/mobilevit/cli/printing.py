"""How commands print: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from mobilevit.tasks.report import Report


def print_json(value: dict[str, Any]) -> None:
    """For programs that read all at once."""
    print(as_json(value, indent=2))


def print_json_line(value: dict[str, Any]) -> None:
    """For programs that read on while more comes."""
    print(as_json(value), flush=True)


def as_json(value: dict[str, Any], indent: int | None = None) -> str:
    """With the odd bytes of file names that are not UTF-8 escaped, as JSON is UTF-8 and nothing else."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def print_report(report: Report) -> None:
    """Of an evaluation: what sums it up, and a row for each of the classes, if they are not too many to read."""
    headline = report.headline()
    print(f"\n{report.num_images:,} images")
    width = max(len(name) for name, _ in headline)
    for name, value in headline:
        print(f"  {name:<{width}}  {value:>8}")
    heading, rows = report.table()
    if len(rows) <= 100:
        print_rows(heading, rows)


def print_rows(heading: list[str], rows: list[list[str]]) -> None:
    """As a table; the first column names, the others are numbers."""
    table = new_table(*heading)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def new_table(first: str, *others: str) -> Table:
    """Without rows yet; of columns with these names."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "kind" else "right")
    return table


def print_table(table: Table) -> None:
    """As wide as the terminal."""
    from rich.console import Console

    # Into a file or a pipe, rich would cut tables at 80 columns.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
