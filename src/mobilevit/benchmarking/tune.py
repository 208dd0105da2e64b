"""`tune`: the fastest engine for a checkpoint on this machine, among those that keep its answers."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mobilevit import factory
from mobilevit.benchmarking.config import PRECISIONS, TuneConfig, check_settings
from mobilevit.benchmarking.contenders import Contender, Engine, has_precision, our_network, pick_engines
from mobilevit.benchmarking.measurement import Measurement
from mobilevit.benchmarking.rounds import measure
from mobilevit.card import TaskName, card_of
from mobilevit.devices import gpu_names
from mobilevit.errors import MobileViTError, one_line
from mobilevit.evaluation import find_part
from mobilevit.exporting.export import ExportReport, export
from mobilevit.files import write_json
from mobilevit.machine import Machine, available_cores, this_machine, versions
from mobilevit.models import Model
from mobilevit.progress import Progress
from mobilevit.runtime.artifact import artifact_files, sidecar_of
from mobilevit.runtime.tuned import RUNTIME_PACKAGES, TUNED_VERSION, digest_of_file, tuned_file
from mobilevit.weights import checkpoint as checkpoints

log = logging.getLogger("mobilevit")

_SCORE: dict[TaskName, str] = {"classification": "top1", "detection": "ap", "segmentation": "miou"}
"""The metric that must not fall."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest engine here, and the others it was compared with."""

    path: Path
    """`NAME.tuned.json`."""
    artifact: Path | None
    """The file to run; None: the checkpoint in PyTorch is the fastest."""
    measurements: tuple[Measurement, ...]
    """The fastest first."""
    dropped: tuple[tuple[str, str], ...]
    """Engine and precision, and why they were not taken."""
    losses: dict[str, float]
    """By engine and precision: the loss that `max_loss` limits, from 0 to 1."""
    machine: Machine
    """Machine that this was measured on."""

    @property
    def fastest(self) -> Measurement:
        """The winner."""
        return self.measurements[0]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Format all measurements as a heading and rows of text."""
        heading = ["engine", "precision", "threads", "ms", "half of runs, ms", "x", "loss"]
        rows = []
        for measurement in self.measurements:
            loss = self.losses.get(_title(measurement.contender))
            extra = {"threads": str(measurement.contender.threads), "loss": "-" if loss is None else f"{loss:.2%}"}
            row = measurement.row() | extra
            rows.append([row[name] for name in heading])
        return heading, rows

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, without paths of the networks."""
        hidden = ("contender", "metrics")
        return {
            "path": str(self.path),
            "artifact": None if self.artifact is None else str(self.artifact),
            **_settings(self.fastest.contender),
            "median_ms": self.fastest.median_ms,
            "speedup": self.fastest.speedup or 1.0,
            "measurements": [
                _settings(m.contender) | {name: value for name, value in m.to_dict().items() if name not in hidden}
                for m in self.measurements
            ],
            "dropped": [list(pair) for pair in self.dropped],
            "losses": self.losses,
            "machine": asdict(self.machine),
        }


def tune(checkpoint: str | os.PathLike[str], config: TuneConfig | None = None) -> Tuned:
    """Measure the installed engines, drop those that change the answers, and keep the fastest.

    Beside the checkpoint appear `NAME.tuned.json` and, unless PyTorch is the fastest, the folder `NAME.tuned` with the
    artifact; they replace those of an earlier run. `Predictor(..., engine="auto")` finds them there.

    Raises:
        MobileViTError: a setting is wrong, a named engine is not installed, or the checkpoint cannot be read.
    """
    config = config or TuneConfig()
    check_settings(config)
    path = Path(checkpoint)
    engines, left_out = pick_engines(config.engines, "cpu")
    dropped = [(engine, reason) for engine, _, reason in (line.partition(": ") for line in left_out)]
    if "int8" in config.precisions and config.calibration is None:
        dropped.append(("int8", "not tried, as no calibration images were given"))
    model = factory.load(path)
    card = card_of(model)
    if config.data is not None:  # here, as a failing export is no reason to stop
        find_part(config.data, "auto", card)
    folder = path.parent if config.out is None else config.out
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder as the result, so that the winner is moved, not copied.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tune-") as temporary:
        copy = checkpoints.save(model, Path(temporary) / "model.safetensors")
        network = our_network(card, copy, card.preprocessing.size)
        plain = Contender(network=network, engine="eager", batch_size=config.batch_size)
        files, losses, lost = _export_all(plain, engines, model, path.stem, Path(temporary) / "files", config)
        cores = available_cores()
        # Two threads of one core can stand in each other's way.
        counts = dict.fromkeys([cores, max(1, cores // 2)] if config.threads is None else [config.threads])
        # PyTorch with all threads first, as the baseline.
        contenders = [replace(c, threads=count) for c in (plain, *files) for count in counts]
        dropped += lost
        measured, failed = measure(contenders, rounds=config.rounds, label="tune")
        dropped += [(f"{_title(f.contender)}, {f.contender.threads} threads", f.reason) for f in failed]
        if not measured:
            raise MobileViTError(f"{path}: nothing could be measured; {dropped[-1][0]}: {dropped[-1][1]}")
        measured.sort(key=lambda measurement: measurement.median_ms)
        artifact = _keep(measured[0].contender.artifact, folder, path)
    tuned = Tuned(
        path=folder / tuned_file(path).name,
        artifact=artifact,
        measurements=tuple(measured),
        dropped=tuple(dropped),
        losses=losses,
        machine=this_machine(gpu_names()),
    )
    contender = tuned.fastest.contender
    values = {
        "tuned_version": TUNED_VERSION,
        "checkpoint": path.name,
        "checkpoint_sha256": digest_of_file(path),
        "packages": versions(RUNTIME_PACKAGES[contender.engine]),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch_size": contender.batch_size,
        **tuned.to_dict(),
        # Relative to this file, so that both can be copied elsewhere.
        "artifact": None if artifact is None else f"{artifact.parent.name}/{artifact.name}",
    }
    del values["path"]
    write_json(tuned.path, values)
    return tuned


def _export_all(
    plain: Contender, engines: Sequence[Engine], model: Model, name: str, folder: Path, config: TuneConfig
) -> tuple[list[Contender], dict[str, float], list[tuple[str, str]]]:
    """Export to every engine and precision; returns those that keep the answers, all losses, and what was dropped."""
    kept, losses, dropped = [], dict[str, float](), list[tuple[str, str]]()
    tried = [
        replace(plain, engine=engine, precision=precision)
        for engine in engines
        for precision in PRECISIONS
        if engine not in ("eager", "compile")
        and precision in config.precisions
        and has_precision(engine, precision, "cpu")
        and (precision != "int8" or config.calibration is not None)
    ]
    with Progress("export and compare", len(tried), "files") as progress:
        for contender in tried:
            title = _title(contender)
            try:
                report = export(
                    model,
                    folder,
                    format=contender.engine,
                    precision=contender.precision,
                    calibration=config.calibration,  # for int8
                    batch_size=contender.of_file.batch_size,
                    images=config.images or config.calibration,
                    data=config.data,
                    name=name,
                )
                losses[title] = _loss(report)
                if losses[title] > config.max_loss:
                    dropped.append((title, f"loses {losses[title]:.2%}, where {config.max_loss:.2%} is allowed"))
                else:
                    kept.append(replace(contender, artifact=str(report.path)))
            except MobileViTError as error:
                dropped.append((title, one_line(error, 300)))
            except Exception as error:  # a converter can raise anything; the others go on
                log.warning("%s: export failed", title, exc_info=error)
                dropped.append((title, f"{type(error).__name__}: {one_line(error, 300)}"))
            progress.advance(1, title)
    return kept, losses, dropped


def _loss(report: ExportReport) -> float:
    """Compute the loss of accuracy if it was measured, else of agreement."""
    score = _SCORE[report.artifact.card.task]
    if score in report.metrics:
        return max(0.0, report.torch_metrics[score] - report.metrics[score])
    return 0.0 if report.parity is None else 1.0 - report.parity.agreement


def _keep(winner: str | None, folder: Path, checkpoint: Path) -> Path | None:
    """Remove the result of an earlier run, and move the winner into its place."""
    (folder / tuned_file(checkpoint).name).unlink(missing_ok=True)
    home = folder / f"{checkpoint.stem}.tuned"
    if home.is_dir():
        shutil.rmtree(home)
    if winner is None:
        return None
    home.mkdir()
    artifact = Path(winner)
    for part in (*artifact_files(artifact), sidecar_of(artifact)):
        part.replace(home / part.name)
    return home / artifact.name


def _title(contender: Contender) -> str:
    return f"{contender.engine} {contender.precision}"


def _settings(contender: Contender) -> dict[str, object]:
    return {"engine": contender.engine, "precision": contender.precision, "threads": contender.threads}
