"""`benchmark`: contenders, the files they need, the rounds, accuracy, and the report."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from mobilevit import factory
from mobilevit.benchmarking import peers
from mobilevit.benchmarking.config import BenchmarkConfig, check_settings
from mobilevit.benchmarking.contenders import AMP_DTYPES, Contender, Network, enter, our_network, pick_engines
from mobilevit.benchmarking.measurement import BenchmarkReport, Failure, Measurement
from mobilevit.benchmarking.plot import save_plot
from mobilevit.benchmarking.rounds import measure
from mobilevit.benchmarking.worker import Worker, WorkerError
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
    check_settings(config)
    if "int8" in config.precisions and config.calibration is None:
        raise MobileViTError("int8 needs calibration; give `calibration`, a folder of images like those it will see")
    device = str(pick_device(config.device))
    if not device.startswith(("cpu", "cuda")):
        raise MobileViTError(f"`device` is {config.device!r}; only cpu and cuda are measured")
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
        left_out += [*absent, *impossible]
        for line in left_out:
            log.info("left out: %s", line)
        folder = Path(temporary) if config.out is None else config.out / "exported"
        measurements, failures = _measure(contenders, folder, config)
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


def _networks(model: Model, config: BenchmarkConfig, folder: Path) -> tuple[list[Network], list[str]]:
    """List the networks, ours first, and a line on each that is absent; workers read the weights from the folder."""
    card = card_of(model)
    is_classifier = card.task == "classification"
    if not is_classifier and (config.cvnets is not None or config.compare):
        name = "compare" if config.cvnets is None else "cvnets"
        raise MobileViTError(f"`{name}` is for classification; this checkpoint does {card.task}")
    size = config.image_size or card.preprocessing.size
    size = Preprocessing(size=(size, size) if isinstance(size, int) else size).size  # checked
    # A copy, as the weights may have come from elsewhere, or be fresh.
    ours = our_network(card, checkpoint.save(model, folder / "a.safetensors"), size)
    if config.compare:
        ours = replace(ours, published_top1=peers.PUBLISHED_TOP1.get(card.name))
    rivals, absent = list[Network](), list[str]()
    if config.peers and is_classifier:
        rivals, absent = peers.installed_peers(ours)
    if config.cvnets is not None:
        clone = str(peers.check_cvnets(card.name, config.cvnets))
        rivals.append(replace(ours, label="ml-cvnets", origin="cvnets", clone=clone))
    if rivals and model.config != MODELS[card.name]:
        absent.append(f"{', '.join(r.label for r in rivals)}: have no model of these patches and this stride")
        rivals = []
    return [ours, *rivals, *(peers.compared_networks() if config.compare else ())], absent


def _measure(
    contenders: Sequence[Contender], folder: Path, config: BenchmarkConfig
) -> tuple[list[Measurement], list[Failure]]:
    """Write the files that contenders need, and time those of each case side by side."""
    ready, failures = _export_all(contenders, folder, config.calibration)
    measurements: list[Measurement] = []
    for case in dict.fromkeys(contender.case for contender in ready):
        side_by_side = [contender for contender in ready if contender.case == case]
        label = f"batch {case[0]}, threads {case[1]}"
        found, failed = measure(side_by_side, rounds=config.rounds, max_workers=config.max_workers, label=label)
        measurements += found
        failures += failed
    for failure in failures:
        log.warning("failed: %s: %s", failure.contender.name, failure.reason)
    if not measurements:
        raise MobileViTError(f"nothing could be measured; {failures[0].contender.name}: {failures[0].reason}")
    return measurements, failures


def _export_all(
    contenders: Sequence[Contender], folder: Path, calibration: Path | None
) -> tuple[list[Contender], list[Failure]]:
    """Write the files that contenders need; each in its own process, as converters take memory and can crash."""
    files, errors = dict[Contender, str](), dict[Contender, str]()
    wanted = list(dict.fromkeys(contender.of_file for contender in contenders if contender.format))
    with Progress("export", len(wanted), "files") as progress:
        for contender in wanted:
            name = re.sub(r"[^A-Za-z0-9_]+", "-", contender.network.label)
            name += "" if contender.batch_size == 1 else f"-batch{contender.batch_size}"
            with closing(Worker(threads=1)) as worker:
                try:
                    files[contender] = worker.ask("export", contender, folder, name, calibration)
                except WorkerError as error:
                    errors[contender] = f"export: {error}"
            progress.advance(1, contender.name)
    failures = [Failure(contender=c, reason=errors[c.of_file]) for c in contenders if c.of_file in errors]
    ready = [replace(c, artifact=files.get(c.of_file)) for c in contenders if c.of_file not in errors]
    return ready, failures


def _with_accuracy(measurements: Sequence[Measurement], data: str) -> list[Measurement]:
    """Add the accuracy of our network; batch size, threads and compilation do not change it."""
    known: dict[str, dict[str, float]] = {}
    scored = []
    for measurement in measurements:
        contender, metrics = measurement.contender, dict[str, float]()
        if contender.network.origin == "mobilevit":
            answers = f"{contender.format or 'PyTorch'} {contender.precision}"
            if answers not in known:
                session = _session(contender)
                images, _ = find_part(data, "auto", session.card)
                known[answers] = evaluate_session(session, images, label=f"evaluate {answers}").report.summary
            metrics = known[answers]
        scored.append(replace(measurement, metrics=metrics))
    return scored


def _session(contender: Contender) -> Session:
    if contender.artifact is not None:
        return ArtifactSession(contender.artifact, threads=contender.threads, trust_pt2=True)
    model, preprocessing = peers.build(contender.network)
    card = replace(card_of(model), preprocessing=preprocessing)
    dtype = AMP_DTYPES.get(contender.precision)
    return TorchSession(model, card, device=torch.device(contender.device), amp_dtype=dtype)
