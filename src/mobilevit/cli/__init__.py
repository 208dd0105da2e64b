"""The command line: `mobilevit COMMAND`, a module each. Nothing heavy is imported before a command runs."""

from mobilevit.cli.entry import main as main
