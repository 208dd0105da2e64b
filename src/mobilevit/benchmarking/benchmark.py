"""`benchmark`: contenders, the files they need, the rounds, accuracy, and the report."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import torch

from mobilevit import factory
from mobilevit.benchmarking import peers
from mobilevit.benchmarking.config import BenchmarkConfig
from mobilevit.benchmarking.contenders import (
    Contender,
    Network,
    check_folder,
    check_precisions,
    enter,
    our_network,
    pick_engines,
)
from mobilevit.benchmarking.measurement import BenchmarkReport, Failure, Measurement
from mobilevit.benchmarking.plot import save_plot
from mobilevit.benchmarking.rounds import Worker, WorkerError, measure
from mobilevit.benchmarking.worker import AMP_DTYPES
from mobilevit.card import card_of
from mobilevit.devices import gpu_names, pick_device
from mobilevit.errors import MobileViTError
from mobilevit.evaluation import evaluate_session, find_part
from mobilevit.files import write_json
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import this_machine, versions
from mobilevit.models import MODELS, Model
from mobilevit.progress import Progress
from mobilevit.runtime.session import ArtifactSession, Session
from mobilevit.torch_session import TorchSession
from mobilevit.weights import checkpoint

log = logging.getLogger("mobilevit")

PATCHES_B = (8, 4, 2)
"""The paper's configuration B; A is (2, 2, 2)."""

_PACKAGES = ("mobilevit", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "executorch", "ai-edge-litert", "timm",
             "transformers")  # fmt: skip


def benchmark(model: str | os.PathLike[str], config: BenchmarkConfig | None = None) -> BenchmarkReport:
    """Time a model in the engines of this machine, beside other implementations of it.

    It times the forward pass, from prepared images to outputs. Contenders with the same batch size and threads take
    turns, each in its own process.

    Args:
        model: a checkpoint of any known origin, or the name of a model, which gets fresh weights.
        config: engines, precisions, peers and more.

    Raises:
        MobileViTError: a setting is wrong, a named engine or peer is not installed, or nothing could be measured.
    """
    config = config or BenchmarkConfig()
    device = _check(config)
    engines, left_out = pick_engines(config.engines, device)
    named = str(model) in MODELS
    if named and config.data is not None:
        raise MobileViTError(f"`data` needs a checkpoint, as {model} by name has fresh weights")
    loaded = factory.create_model(str(model), task=config.task) if named else factory.load(model)
    card = card_of(loaded)
    if config.data is not None:  # now, rather than after all the rounds
        find_part(config.data, "auto", card)
    with tempfile.TemporaryDirectory(prefix="mobilevit-benchmark-") as temporary:
        networks, absent = _networks(loaded, config, Path(temporary))
        contenders, impossible = enter(networks, engines, config, device)
        if not contenders:
            raise MobileViTError(f"nothing to measure: {', '.join(impossible)}")
        for line in (left_out := [*left_out, *absent, *impossible]):
            log.info("left out: %s", line)
        folder = Path(temporary) if config.out is None else config.out / "exported"
        ready, failures = _export_all(contenders, folder, config.calibration)
        results = _measure_cases(ready, config)
        measurements = [result for result in results if isinstance(result, Measurement)]
        failures += [result for result in results if isinstance(result, Failure)]
        for failure in failures:
            log.warning("failed: %s: %s", failure.contender.name, failure.reason)
        if not measurements:
            raise MobileViTError(f"nothing could be measured; {failures[0].contender.name}: {failures[0].reason}")
        if config.data is not None:
            measurements = _with_accuracy(measurements, config.data)
    report = BenchmarkReport(
        model=os.fspath(model),
        task=card.task,
        device=device,
        rounds=config.rounds,
        machine=this_machine(gpu_names()),
        packages=versions(_PACKAGES),
        date=datetime.now(UTC).date().isoformat(),
        measurements=tuple(measurements),
        failures=tuple(failures),
        left_out=tuple(left_out),
    )
    if config.out is not None:
        write_json(config.out / "benchmark.json", report.to_dict())
        save_plot(report, config.out / "benchmark.png")
    return report


def _check(config: BenchmarkConfig) -> str:
    """Check the settings that do not depend on the model; returns the device."""
    for name, counts in (("batch_sizes", config.batch_sizes), ("threads", config.threads), ("rounds", [config.rounds])):
        for count in counts:
            if count < 1:
                raise MobileViTError(f"`{name}` is {count}; give 1 or more")
    for name, chosen in (("batch_sizes", config.batch_sizes), ("precisions", config.precisions)):
        if not chosen:
            raise MobileViTError(f"`{name}` is empty; give one or more")
    if config.max_workers is not None and config.max_workers < 2:
        raise MobileViTError(
            f"`max_workers` is {config.max_workers}; give 2 or more, as the baseline has a process, too"
        )
    check_precisions(config.precisions)
    check_folder("calibration", config.calibration)
    if "int8" in config.precisions and config.calibration is None:
        raise MobileViTError("int8 needs calibration; give `calibration`, a folder of images like those it will see")
    device = pick_device("cpu" if config.device == "auto" and not torch.cuda.is_available() else config.device)
    if device.type not in ("cpu", "cuda"):
        raise MobileViTError(f"`device` is {config.device!r}; only cpu and cuda are measured")
    return str(device)


def _networks(model: Model, config: BenchmarkConfig, folder: Path) -> tuple[list[Network], list[str]]:
    """List the networks, ours first, and a line on each that is absent; workers read the weights from the folder."""
    card = card_of(model)
    if card.task != "classification" and (config.cvnets is not None or config.compare):
        name = "compare" if config.cvnets is None else "cvnets"
        raise MobileViTError(f"`{name}` is for classification; this checkpoint does {card.task}")
    size = config.image_size or card.preprocessing.size
    # A copy, as the weights may have come from elsewhere, or be fresh.
    ours = dataclasses.replace(
        our_network(card, checkpoint.save(model, folder / "a.safetensors")),
        image_size=Preprocessing(size=(size, size) if isinstance(size, int) else size).size,
        published_top1=peers.PUBLISHED_TOP1.get(card.name) if config.compare else None,
    )
    networks, absent = [ours], []
    if config.patches and model.config.patch_size == PATCHES_B:
        absent.append("patch configuration B: this model has it already")
    elif config.patches:
        other = factory.create_model(card.name, task=card.task, weights=ours.checkpoint, patch_size=PATCHES_B)
        file = str(checkpoint.save(other, folder / "b.safetensors"))
        label = f"{card.name} patches {', '.join(map(str, PATCHES_B))}"
        networks.append(dataclasses.replace(ours, label=label, checkpoint=file, weights="b", published_top1=None))
    rivals: list[Network] = []
    if config.peers and card.task == "classification":
        rivals, absent_peers = peers.installed_peers(ours)
        absent += absent_peers
    if config.cvnets is not None:
        clone = str(peers.check_cvnets(config.cvnets))
        rivals.append(dataclasses.replace(ours, label="ml-cvnets", origin="cvnets", clone=clone))
    if rivals and model.config != MODELS[card.name]:
        absent.append(f"{', '.join(r.label for r in rivals)}: have no model of these patches and this stride")
        rivals = []
    return [*networks, *rivals, *(peers.compared_networks() if config.compare else ())], absent


def _export_all(
    contenders: Sequence[Contender], folder: Path, calibration: Path | None
) -> tuple[list[Contender], list[Failure]]:
    """Write the files that contenders need; each in its own process, as converters take memory and can crash."""
    files: dict[Contender, str | WorkerError] = {}
    wanted = list(dict.fromkeys(contender.of_file for contender in contenders if contender.format))
    with Progress("export", len(wanted), "files") as progress:
        for contender in wanted:
            name = re.sub(r"[^A-Za-z0-9_]+", "-", contender.network.label)
            name += "" if contender.batch_size == 1 else f"-batch{contender.batch_size}"
            with closing(Worker(threads=1)) as worker:
                try:
                    files[contender] = worker.ask("export", contender, folder, name, calibration)
                except WorkerError as error:
                    files[contender] = error
            progress.advance(1, contender.name)
    ready, failures = [], []
    for contender in contenders:
        file = files.get(contender.of_file)
        if isinstance(file, WorkerError):
            failures.append(Failure(contender=contender, reason=f"export: {file}"))
        else:
            ready.append(dataclasses.replace(contender, artifact=file))
    return ready, failures


def _measure_cases(contenders: Sequence[Contender], config: BenchmarkConfig) -> list[Measurement | Failure]:
    results: list[Measurement | Failure] = []
    for case in dict.fromkeys(contender.case for contender in contenders):
        side_by_side = [contender for contender in contenders if contender.case == case]
        label = f"batch {case[0]}, threads {case[1]}"
        results += measure(side_by_side, rounds=config.rounds, max_workers=config.max_workers, label=label)
    return results


def _with_accuracy(measurements: Sequence[Measurement], data: str) -> list[Measurement]:
    """Add the accuracy of our networks; batch size, threads and compilation do not change it."""
    known: dict[tuple[str, str, str], dict[str, float]] = {}
    found = []
    for measurement in measurements:
        contender = measurement.contender
        if contender.network.origin == "mobilevit":
            engine = "PyTorch" if contender.format is None else contender.engine
            key = (contender.network.label, engine, contender.precision)
            if key not in known:
                session = _session(contender)
                images, _ = find_part(data, "auto", session.card)
                known[key] = evaluate_session(session, images, label=f"evaluate {' '.join(key)}").report.summary
            measurement = dataclasses.replace(measurement, metrics=known[key])
        found.append(measurement)
    return found


def _session(contender: Contender) -> Session:
    if contender.artifact is not None:
        return ArtifactSession(contender.artifact, threads=contender.threads, trust_pt2=True)
    assert contender.network.checkpoint is not None
    model = factory.load(contender.network.checkpoint)
    preprocessing = dataclasses.replace(card_of(model).preprocessing, size=contender.network.image_size)
    card = dataclasses.replace(card_of(model), preprocessing=preprocessing)
    dtype = AMP_DTYPES.get(contender.precision)
    return TorchSession(model, card, device=torch.device(contender.device), amp_dtype=dtype)
