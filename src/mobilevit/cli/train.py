"""`mobilevit train`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, arg

from mobilevit.cli.errors import UsageError
from mobilevit.cli.printing import as_json, print_json, print_report
from mobilevit.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model to classify, detect or segment; the run folder gets checkpoints, curves, metrics, a model card."""

    settings: OmitArgPrefixes[Annotated[TrainConfig, arg(name="")]]
    config: Path | None = None
    """Take settings from a run's config.json; flags change single ones."""
    recipe: str | None = None
    """Take settings from a named recipe, such as small_detection; flags change single ones. "list" shows all."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Replace another run in --out."""
    dry_run: bool = False
    """Take a few steps and print all settings, and the steps, memory and time of the run; nothing is written."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Train, then say what came of it."""
        from mobilevit.training.distributed import speaks
        from mobilevit.training.loop import train

        if self.dry_run:
            from mobilevit.training.dry_run import dry_run

            plan = dry_run(self.settings)
            if speaks():
                print(as_json(plan.to_dict(), indent=2) if self.json else "\n".join(plan.lines()))
            return 0
        result = train(self.settings, resume=self.resume, overwrite=self.overwrite)
        if speaks() and self.json:
            print_json({"best": str(result.best), "epochs": result.epochs, **result.report.to_dict()})
        elif speaks():
            print_report(result.report)
            print(f"\n{result.best}  (images of the run beside it, in {result.best.parent})")
        return 0


def train_defaults(arguments: list[str]) -> Train:
    """Defaults of `train`: those of the file behind --config, or of the run to resume, if there is one."""
    file, out, recipe = (value_of(flag, arguments) for flag in ("--config", "--out", "--recipe"))
    if file is None and out is not None and "--resume" in arguments and (Path(out) / "config.json").exists():
        file = str(Path(out) / "config.json")
    if file is None:
        settings = TrainConfig(data="")
        if recipe is not None:
            from mobilevit.training.recipes import find_recipe

            settings = find_recipe(recipe).settings
        return Train(settings=dataclasses.replace(settings, data=tyro.MISSING), recipe=recipe)
    if recipe is not None:
        raise UsageError("--recipe and --config both give settings; leave one of them out")
    return Train(settings=TrainConfig.from_json(Path(file)), config=Path(file))


def value_of(flag: str, arguments: list[str]) -> str | None:
    """Return the value after a flag, before the command line as a whole is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value
