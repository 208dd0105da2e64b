"""The table of commands, and what runs one of them. A command is a dataclass of its options."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import tyro

from mobilevit.cli.errors import UsageError, report_error
from mobilevit.errors import MissingPackageError, did_you_mean


class Command(Protocol):
    """A command: a dataclass of its options that can run."""

    def run(self) -> int:
        """Do it; return the exit status."""
        ...


COMMANDS = {
    "train": "Train a model to classify, detect or segment.",
    "eval": "Measure a checkpoint or an exported file on labeled images.",
    "predict": "Classify, detect or segment: files, folders, globs, or standard input.",
    "explain": "Draw what a pixel attends to, and which parts of an image decided.",
    "export": "Write a checkpoint as a file for a device, compared with the model on real images.",
    "benchmark": "Time engines, precisions, batches and threads on this machine.",
    "tune": "Find the fastest engine on this machine that keeps the answers.",
    "serve": "Answer over HTTP: predictions in batches, a web page, metrics.",
    "info": "Print the layers, parameters and cost of a model, or the description of an exported file.",
    "convert": "Rewrite a checkpoint for ml-cvnets, timm, transformers or this package.",
    "data": "Check labeled data, or write it as shards.",
    "demo": "Train, evaluate, export and predict on built-in images.",
}
"""In `mobilevit.cli`, the module of each has a class of its name; it is imported when the command runs."""

_ON_DEVICES = {"predict", "serve", "info"}
"""Work on exported files without PyTorch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 2 a user's mistake, 1 anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    command: type[Command] | None = None
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        if arguments[0] == "--version":
            from mobilevit import __version__

            print(f"mobilevit {__version__}")
            return 0
        command = _find(arguments[0])
        parsed = _parse(command, arguments[0], arguments[1:])
        return 0 if parsed is None else parsed.run()
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        return report_error(error, command)


def _find(name: str) -> type[Command]:
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; {did_you_mean(name, COMMANDS)}Commands are {', '.join(COMMANDS)}")
    if name not in _ON_DEVICES and find_spec("torch") is None:
        raise MissingPackageError(f"{name} needs PyTorch, which is not installed; pip install 'mobilevit[train]'")
    command: type[Command] = getattr(import_module(f"mobilevit.cli.{name}"), name.capitalize())
    return command


def _parse(command: type[Command], name: str, arguments: list[str]) -> Command | None:
    """The command with its options; None if it only asked for help."""
    defaults: dict[str, Any] = {}
    if name == "train":
        from mobilevit.cli.train import train_defaults, value_of

        if value_of("--recipe", arguments) == "list":
            from mobilevit.training.recipes import describe_recipes

            print(describe_recipes())
            return None
        defaults["default"] = train_defaults(arguments)
    said = io.StringIO()
    try:
        # tyro reports bad flags in a box of several lines; users and programs get one line instead.
        with contextlib.redirect_stderr(said):
            parsed: Command = tyro.cli(command, prog=f"mobilevit {name}", args=arguments, **defaults)
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """The words of a tyro error without its frame."""
    lines = [line.strip("╭╮╰╯│─ ") for line in box.splitlines()]
    return " ".join(line for line in lines[1:] if line)


def _log_to_stderr() -> None:
    logger = logging.getLogger("mobilevit")
    # Made anew each time: standard error may be another stream than at the last call in this process.
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    head = ("usage: mobilevit COMMAND ...", "", "MobileViT: from a folder of images to a small, fast model.", "")
    return "\n".join([*head, "commands:", *lines, "", "mobilevit COMMAND --help shows the options of a command."])
