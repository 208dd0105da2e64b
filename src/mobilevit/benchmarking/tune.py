"""The fastest way to run a checkpoint on this machine, among those that give its answers."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobilevit import factory
from mobilevit.benchmarking.contenders import (
    PRECISIONS,
    Contender,
    Engine,
    Network,
    Precision,
    has_precision,
    pick_engines,
)
from mobilevit.benchmarking.rounds import Failure, Measurement, measure
from mobilevit.card import Task, card_of
from mobilevit.devices import gpu_names
from mobilevit.errors import MobileViTError
from mobilevit.exporting.export import Evaluate, ExportReport, export
from mobilevit.exporting.images import Images
from mobilevit.files import write_json
from mobilevit.machine import Machine, available_cores, this_machine, versions
from mobilevit.models import Model
from mobilevit.progress import Progress
from mobilevit.runtime.artifact import sidecar_of
from mobilevit.runtime.tuned import RUNTIME_PACKAGES, TUNED_VERSION, digest_of_file, tuned_file
from mobilevit.weights import checkpoint as checkpoints

log = logging.getLogger("mobilevit")

_SCORE: dict[Task, str] = {"classification": "top1", "detection": "ap", "segmentation": "miou"}
"""The figure of an evaluation that must not fall."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What is fastest here, and beside what."""

    path: Path
    """`NAME.tuned.json`."""
    artifact: Path | None
    """The file to run; None: the checkpoint in PyTorch is the fastest."""
    engine: Engine
    precision: str
    threads: int
    median_ms: float
    """Of a batch."""
    speedup: float
    """Times as fast as PyTorch in float32 with all threads."""
    measurements: tuple[Measurement, ...]
    """The fastest first."""
    dropped: tuple[tuple[str, str], ...]
    """Engine and precision, and why it was not taken."""
    losses: dict[str, float]
    """By engine and precision: what `max_loss` was compared with, as a loss from 0 to 1."""
    machine: Machine
    """Where this holds."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """What to print: the heading, and rows of text."""
        heading = ["engine", "precision", "threads", "ms", "half of runs, ms", "x", "loss"]
        rows = []
        for m in self.measurements:
            c = m.contender
            loss = self.losses.get(f"{c.engine} {c.precision}")
            low, high = m.quartiles_ms
            row = [c.engine, c.precision, str(c.threads), f"{m.median_ms:.2f}", f"{low:.2f} to {high:.2f}"]
            rows.append(
                [*row, "-" if m.speedup is None else f"{m.speedup:.2f}", "-" if loss is None else f"{loss:.2%}"]
            )
        return heading, rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "artifact": None if self.artifact is None else str(self.artifact),
            "engine": self.engine,
            "precision": self.precision,
            "threads": self.threads,
            "median_ms": self.median_ms,
            "speedup": self.speedup,
            "measurements": [_told(measurement) for measurement in self.measurements],
            "dropped": [list(pair) for pair in self.dropped],
            "losses": self.losses,
            "machine": dataclasses.asdict(self.machine),
        }


def tune(
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    images: Images | None = None,
    calibration: Images | None = None,
    max_loss: float = 0.01,
    batch_size: int = 1,
    threads: int | None = None,
    engines: Sequence[str] = ("all",),
    precisions: Sequence[str] = ("fp32", "bf16", "fp16", "int8"),
    evaluate: Evaluate | None = None,
    rounds: int = 10,
) -> Tuned:
    """Measure the engines that are installed, drop those that change the answers, and keep the fastest.

    Beside the checkpoint appear `NAME.tuned.json` and, unless PyTorch is the fastest, the folder `NAME.tuned` with the
    artifact. `Predictor(..., engine="auto")` finds them there. Those of an earlier run are replaced.

    Args:
        checkpoint: of any known origin.
        out: another folder for the result; `Predictor` looks beside the checkpoint only.
        images: folder or images to compare answers on; built-in photographs, or those of `calibration`, if not
            given.
        calibration: for int8: a folder of images of what the model will see, or 32 images and more. Without it,
            int8 takes no part.
        max_loss: of accuracy, or, without `evaluate`, of agreement with float32 PyTorch; 0.01 is one in a hundred.
        batch_size: images in a run.
        threads: to compute with. If not given, all cores and half of them are tried.
        engines: "onnx", "openvino", "executorch", "litert", "pt2", or "all" that are installed. PyTorch itself takes
            part always; `torch.compile` never, as it compiles anew in every process.
        precisions: to try, in each engine that has them.
        evaluate: measures accuracy on labeled images.
        rounds: turns of each.

    Raises:
        ValueError: an argument has no meaning, a named engine is not installed, or the checkpoint cannot be read.
    """
    path = Path(checkpoint)
    _check(max_loss, batch_size, threads, rounds, precisions)
    formats, left_out = _formats(engines)
    dropped: list[tuple[str, str]] = [(line.partition(":")[0], line.partition(": ")[2]) for line in left_out]
    if "int8" in precisions and calibration is None:
        dropped.append(("int8", "not tried, as no --calibration images were given"))
        precisions = [precision for precision in precisions if precision != "int8"]
    model = factory.load(path)
    folder = path.parent if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    losses: dict[str, float] = {}
    # In the same folder as the result, so that the winner is moved, not copied.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tune-") as aside:
        files: list[tuple[Engine, Precision, str]] = []
        tried = [(f, p) for f in formats for p in PRECISIONS if p in precisions and has_precision(f, p, "cpu")]
        with Progress("export and compare", len(tried), "files") as progress:
            for engine, precision in tried:
                name = f"{engine} {precision}"
                try:
                    report = export(
                        model,
                        Path(aside) / "files",
                        format=engine,
                        precision=precision,
                        calibration=calibration if precision == "int8" else None,
                        batch_size=batch_size if engine == "pt2" else 1,
                        images=images or calibration,
                        evaluate=evaluate,
                        name=path.stem,
                    )
                    losses[name] = _loss(report)
                    if losses[name] > max_loss:
                        dropped.append((name, f"loses {losses[name]:.2%}, where {max_loss:.2%} is allowed"))
                    else:
                        files.append((engine, precision, str(report.path)))
                except Exception as error:  # whatever a converter raises, the others go on
                    dropped.append((name, " ".join(str(error).split())[:300] or type(error).__name__))
                progress.advance(1, name)
        results = measure(
            _contenders(model, Path(aside), files, batch_size, threads), rounds=rounds, folder=Path(aside), label="tune"
        )
        measured = sorted((r for r in results if isinstance(r, Measurement)), key=lambda m: m.median_ms)
        dropped += [(_name(r.contender), r.reason) for r in results if isinstance(r, Failure)]
        if not measured:
            raise MobileViTError(f"{path}: nothing could be measured; {dropped[-1][0]}: {dropped[-1][1]}")
        for name, why in dropped:
            log.info("left out: %s: %s", name, why)
        return _keep(path, folder, measured, tuple(dropped), losses)


def _check(max_loss: float, batch_size: int, threads: int | None, rounds: int, precisions: Sequence[str]) -> None:
    if not 0 <= max_loss < 1:
        raise MobileViTError(f"max_loss is {max_loss}; give a share from 0 to 1, such as 0.01")
    for name, count in (("batch_size", batch_size), ("threads", threads), ("rounds", rounds)):
        if count is not None and count < 1:
            raise MobileViTError(f"{name} is {count}; give 1 or more")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise MobileViTError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")


def _formats(engines: Sequence[str]) -> tuple[list[Engine], list[str]]:
    if "compile" in engines:
        raise MobileViTError(
            "torch.compile compiles anew in every process, so it is not tuned for; choose it by --engine"
        )
    picked, left_out = pick_engines(engines, "cpu")
    return [engine for engine in picked if engine not in ("eager", "compile")], left_out


def _loss(report: ExportReport) -> float:
    """Of accuracy if it was measured, else of agreement."""
    score = _SCORE[report.artifact.card.task]
    if score in report.metrics:
        return max(0.0, report.torch_metrics[score] - report.metrics[score])
    return 0.0 if report.parity is None else 1.0 - report.parity.agreement


def _contenders(
    model: Model, folder: Path, files: Sequence[tuple[Engine, Precision, str]], batch_size: int, threads: int | None
) -> list[Contender]:
    """PyTorch with all threads first, as the baseline."""
    card = card_of(model)
    network = Network(
        label=card.name,
        origin="mobilevit",
        architecture=card.name,
        image_size=card.preprocessing.size,
        checkpoint=str(checkpoints.save(model, folder / "model.safetensors")),
        weights="a",
    )
    cores = available_cores()
    # Two threads of one core can stand in each other's way.
    counts = [threads] if threads is not None else list(dict.fromkeys([cores, max(1, cores // 2)]))
    plain = Contender(network=network, engine="eager", batch_size=batch_size)
    return [
        dataclasses.replace(plain, engine=engine, precision=precision, artifact=artifact, threads=count)
        for engine, precision, artifact in [("eager", "fp32", None), *files]
        for count in counts
    ]


def _keep(
    path: Path,
    folder: Path,
    measured: Sequence[Measurement],
    dropped: tuple[tuple[str, str], ...],
    losses: dict[str, float],
) -> Tuned:
    """Put the winner into its place; what says so comes last."""
    best = measured[0]
    contender = best.contender
    file = folder / tuned_file(path).name
    home = folder / f"{path.stem}.tuned"
    file.unlink(missing_ok=True)
    if home.is_dir():
        shutil.rmtree(home)
    artifact = None
    if contender.artifact is not None:
        home.mkdir(parents=True)
        found = Path(contender.artifact)
        artifact = home / found.name
        for part in (found, found.with_suffix(".bin") if found.suffix == ".xml" else found, sidecar_of(found)):
            if part.exists():
                part.replace(home / part.name)
    machine = this_machine(gpu_names())
    tuned = Tuned(
        path=file,
        artifact=artifact,
        engine=contender.engine,
        precision=contender.precision,
        threads=contender.threads,
        median_ms=best.median_ms,
        speedup=best.speedup or 1.0,
        measurements=tuple(measured),
        dropped=dropped,
        losses=losses,
        machine=machine,
    )
    values = {
        "tuned_version": TUNED_VERSION,
        "checkpoint": path.name,
        "checkpoint_sha256": digest_of_file(path),
        "packages": versions(RUNTIME_PACKAGES[contender.engine]),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch_size": contender.batch_size,
        **tuned.to_dict(),
        # Beside this file, wherever both are copied to.
        "artifact": None if artifact is None else f"{home.name}/{artifact.name}",
    }
    del values["path"]
    write_json(file, values)
    return tuned


def _name(contender: Contender) -> str:
    return f"{contender.engine} {contender.precision}, {contender.threads} threads"


def _told(measurement: Measurement) -> dict[str, Any]:
    """The figures, without paths of this machine."""
    contender = measurement.contender
    settings = {"engine": contender.engine, "precision": contender.precision, "threads": contender.threads}
    figures = {key: value for key, value in measurement.to_dict().items() if key not in ("contender", "metrics")}
    return settings | figures
