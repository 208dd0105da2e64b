"""The table of commands, and what runs one of them. A command is a dataclass of its options."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import tyro

from mobilevit.cli.benchmark import Benchmark
from mobilevit.cli.convert import Convert
from mobilevit.cli.data import Data
from mobilevit.cli.demo import Demo
from mobilevit.cli.errors import UsageError, report_error
from mobilevit.cli.eval import Eval
from mobilevit.cli.explain import Explain
from mobilevit.cli.export import Export
from mobilevit.cli.info import Info
from mobilevit.cli.predict import Predict
from mobilevit.cli.serve import Serve
from mobilevit.cli.train import Train, train_defaults, value_of
from mobilevit.cli.tune import Tune
from mobilevit.training.recipes import describe_recipes


class Command(Protocol):
    """What every command has besides its options."""

    def run(self) -> int:
        """Do it; return the exit status."""
        ...


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "explain": Explain,
    "export": Export,
    "benchmark": Benchmark,
    "tune": Tune,
    "serve": Serve,
    "info": Info,
    "convert": Convert,
    "data": Data,
    "demo": Demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 success, 2 a user's mistake, 1 anything else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        if arguments[0] == "--version":
            from mobilevit import __version__

            print(f"mobilevit {__version__}")
            return 0
        command = _parse(arguments[0], arguments[1:])
        return 0 if command is None else command.run()
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        return report_error(error)


def _parse(name: str, arguments: list[str]) -> Command | None:
    """The command with its options; None if it only asked for help."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown command {name!r}; {hint}Commands are {', '.join(COMMANDS)}")
    if name == "train" and value_of("--recipe", arguments) == "list":
        print(describe_recipes())
        return None
    defaults: dict[str, Any] = {"default": train_defaults(arguments)} if name == "train" else {}
    said = io.StringIO()
    try:
        # tyro reports bad flags in a box of several lines; users and programs get one line instead.
        with contextlib.redirect_stderr(said):
            command: Command = tyro.cli(COMMANDS[name], prog=f"mobilevit {name}", args=arguments, **defaults)
            return command
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
    lines = [f"  {name:<{width}}  {_summary(command)}" for name, command in COMMANDS.items()]
    head = ("usage: mobilevit COMMAND ...", "", "MobileViT: from a folder of images to a small, fast model.", "")
    return "\n".join([*head, "commands:", *lines, "", "mobilevit COMMAND --help shows the options of a command."])


def _summary(command: type[Command]) -> str:
    return (command.__doc__ or "").splitlines()[0]
