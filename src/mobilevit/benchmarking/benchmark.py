"""A whole benchmark: who takes part, the files they need, the rounds, accuracy, and the report."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from mobilevit import factory
from mobilevit.benchmarking import peers
from mobilevit.benchmarking.contenders import PRECISIONS, Contender, Network, Origin, Precision, enter, pick_engines
from mobilevit.benchmarking.exports import export_all
from mobilevit.benchmarking.report import BenchmarkReport, case_title
from mobilevit.benchmarking.rounds import Failure, Measurement, measure
from mobilevit.card import ModelCard, card_of
from mobilevit.devices import gpu_names
from mobilevit.errors import MobileViTError
from mobilevit.exporting.export import Evaluate
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import available_cores, this_machine, versions
from mobilevit.models import MODELS, Model
from mobilevit.runtime.session import ArtifactSession
from mobilevit.torch_session import TorchSession
from mobilevit.weights import checkpoint

log = logging.getLogger("mobilevit")

PATCHES_B = (8, 4, 2)
"""The paper's configuration B; A is (2, 2, 2)."""

_PACKAGES = ("mobilevit", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "executorch", "ai-edge-litert", "timm",
             "transformers")  # fmt: skip
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def benchmark(
    model: str | os.PathLike[str],
    *,
    task: str = "classification",
    image_size: tuple[int, int] | None = None,
    engines: Sequence[str] = ("all",),
    precisions: Sequence[str] = ("fp32",),
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    device: str = "cpu",
    with_peers: bool = True,
    cvnets: str | os.PathLike[str] | None = None,
    compare: bool = False,
    patches: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    rounds: int = 15,
    out: str | os.PathLike[str] | None = None,
    max_workers: int | None = None,
) -> BenchmarkReport:
    """Time a model in the engines of this machine, beside other implementations of it.

    What is timed is the forward pass, from prepared images to outputs; reading and preparing take the same time
    whoever follows. Contenders with the same batch and threads take turns, each in a process of its own.

    Args:
        model: a checkpoint of any known origin, or the name of a model, which gets fresh weights.
        task: of a named model.
        image_size: (height, width) of the input; what the model was made for, if not given.
        engines: "eager" (PyTorch, fused), "compile", "onnx", "openvino", "executorch", "litert", "pt2"; "all": those
            that are installed.
        precisions: "fp32", "bf16", "fp16", "int8"; an engine takes part in those it has.
        batch_sizes: images in a run.
        threads: numbers of threads, one after the other; all cores, if not given.
        device: "cpu", "cuda" or "cuda:1"; on a GPU, PyTorch, ONNX Runtime and pt2 take part.
        with_peers: classification: also timm's and transformers' MobileViT, with the same weights, if installed.
        cvnets: classification: also Apple's MobileViT, from this clone of ml-cvnets.
        compare: classification: also the networks of the paper's table (MobileNetV2, DeiT-Ti, PiT-Ti), by timm.
        patches: also the same model with the paper's patch configuration B.
        calibration: for int8: a folder of images of what the model will see.
        evaluate: measures accuracy on labeled images, of our model in each engine.
        rounds: turns of each contender.
        out: folder for exported files, `benchmark.json` and `benchmark.png`; nothing is kept, if not given.
        max_workers: processes that may wait at a time, 2 or more; as memory allows, if not given.

    Raises:
        ValueError: an argument has no meaning, a named engine or peer is not installed, or nothing could be measured.
    """
    _check_counts(batch_sizes=batch_sizes, threads=threads, rounds=[rounds])
    if max_workers is not None and max_workers < 2:
        raise MobileViTError(f"max_workers is {max_workers}; give 2 or more, as the baseline has a process, too")
    chosen = _pick_precisions(precisions, calibration)
    device = _pick_device(device)
    picked, left_out = pick_engines(engines, device)
    loaded = _load(model, task)
    card = card_of(loaded)
    if card.task != "classification":
        for flag, given in (("--cvnets", cvnets is not None), ("--compare", compare)):
            if given:
                raise MobileViTError(f"{flag} is for classification; this checkpoint does {card.task}")
    size = Preprocessing(size=image_size or card.preprocessing.size).size
    with tempfile.TemporaryDirectory(prefix="mobilevit-benchmark-") as aside:
        networks, absent = _networks(
            loaded, size, Path(aside), with_peers=with_peers, cvnets=cvnets, compare=compare, patches=patches
        )
        contenders, impossible = enter(
            networks, picked, chosen, batch_sizes=batch_sizes, threads=threads or [available_cores()], device=device
        )
        if not contenders:
            raise MobileViTError(f"nothing to measure: {', '.join(impossible)}")
        for line in (left_out := [*left_out, *absent, *impossible]):
            log.info("left out: %s", line)
        results = _results(
            contenders,
            Path(aside),
            files=Path(aside) if out is None else Path(out) / "exported",
            calibration=None if calibration is None else Path(calibration),
            rounds=rounds,
            max_workers=max_workers,
        )
        measurements = [result for result in results if isinstance(result, Measurement)]
        failures = [result for result in results if isinstance(result, Failure)]
        if not measurements:
            raise MobileViTError(f"nothing could be measured; {failures[0].contender.name}: {failures[0].reason}")
        if evaluate is not None:
            measurements = _with_metrics(measurements, evaluate)
    report = BenchmarkReport(
        model=os.fspath(model),
        task=card.task,
        device=device,
        rounds=rounds,
        machine=this_machine(gpu_names()),
        packages=versions(_PACKAGES),
        date=datetime.now(UTC).date().isoformat(),
        measurements=tuple(measurements),
        failures=tuple(failures),
        left_out=tuple(left_out),
    )
    if out is not None:
        report.save(Path(out))
    return report


def _check_counts(*, batch_sizes: Sequence[int], threads: Sequence[int], rounds: Sequence[int]) -> None:
    for name, counts in (("batch size", batch_sizes), ("threads", threads), ("rounds", rounds)):
        for count in counts:
            if count < 1:
                raise MobileViTError(f"{name} is {count}; give 1 or more")
    if not batch_sizes:
        raise MobileViTError("no batch size is named; give 1, or several")


def _pick_precisions(names: Sequence[str], calibration: object) -> list[Precision]:
    for name in names:
        if name not in PRECISIONS:
            raise MobileViTError(f"unknown precision {name!r}; choose from {', '.join(PRECISIONS)}")
    if not names:
        raise MobileViTError(f"no precision is named; choose from {', '.join(PRECISIONS)}")
    if "int8" in names and calibration is None:
        raise MobileViTError(
            "int8 must be calibrated on images of what the model will see; give --calibration with a folder of them"
        )
    return [precision for precision in PRECISIONS if precision in names]


def _pick_device(name: str) -> str:
    from mobilevit.devices import pick_device

    device = pick_device("cpu" if name == "auto" and not torch.cuda.is_available() else name)
    if device.type not in ("cpu", "cuda"):
        raise MobileViTError(f"--device {name}: only cpu and cuda are measured")
    return str(device)


def _load(model: str | os.PathLike[str], task: str) -> Model:
    return factory.create_model(str(model), task=task) if str(model) in MODELS else factory.load(model)


def _networks(
    model: Model,
    size: tuple[int, int],
    folder: Path,
    *,
    with_peers: bool,
    cvnets: str | os.PathLike[str] | None,
    compare: bool,
    patches: bool,
) -> tuple[list[Network], list[str]]:
    """Ours first; and lines on who is absent. Weights of ours are written into the folder, for workers to read."""
    card = card_of(model)
    # Workers read this copy, also of weights that came from elsewhere or from nowhere.
    written = str(checkpoint.save(model, folder / "a.safetensors"))
    top1 = peers.PUBLISHED_TOP1.get(card.name) if compare else None
    ours = Network(
        label=card.name,
        origin="mobilevit",
        architecture=card.name,
        image_size=size,
        checkpoint=written,
        weights="a",
        published_top1=top1,
    )
    networks, absent = [ours], []
    if patches:
        other = factory.create_model(card.name, task=card.task, weights=written, patch_size=PATCHES_B)
        if model.config.patch_size == PATCHES_B:
            absent.append("patch configuration B: this model has it already")
        else:
            file = str(checkpoint.save(other, folder / "b.safetensors"))
            label = f"{card.name} patches {', '.join(map(str, PATCHES_B))}"
            networks.append(dataclasses.replace(ours, label=label, checkpoint=file, weights="b", published_top1=None))
    rivals: list[tuple[str, Origin, bool]] = []
    if with_peers and card.task == "classification":
        for name in peers.PEERS:
            if not peers.is_installed(name):
                absent.append(f"{name}: not installed; pip install 'mobilevit[peers]'")
            elif name == "timm":
                rivals += [("timm", "timm", False), ("timm channels_last", "timm", True)]
            else:
                rivals.append(("transformers", "transformers", False))
    clone = None if cvnets is None else str(peers.check_cvnets(cvnets))
    if clone is not None:
        rivals.append(("ml-cvnets", "cvnets", False))
    if rivals and model.config != MODELS[card.name]:
        absent.append(f"{', '.join(label for label, _, _ in rivals)}: have no model of these patches and this stride")
        rivals = []
    networks += [
        dataclasses.replace(ours, label=label, origin=origin, channels_last=channels_last, clone=clone)
        for label, origin, channels_last in rivals
    ]
    if compare and not peers.is_installed("timm"):
        raise MobileViTError("--compare takes its networks from timm; pip install 'mobilevit[peers]'")
    for name, compared in peers.COMPARED.items() if compare else ():
        networks.append(
            Network(
                label=compared.label,
                origin="timm",
                architecture=name,
                image_size=compared.image_size,
                weights=name,
                channels_last=True,  # the faster one for convolutions; the others do not mind
                published_top1=compared.published_top1,
            )
        )
    return networks, absent


def _results(
    contenders: Sequence[Contender],
    aside: Path,
    *,
    files: Path,
    calibration: Path | None,
    rounds: int,
    max_workers: int | None,
) -> list[Measurement | Failure]:
    """Export, then time case by case."""
    results: list[Measurement | Failure] = []
    ready: list[Contender] = []
    for outcome in export_all(contenders, files, calibration=calibration):
        if isinstance(outcome, Failure):
            results.append(outcome)
        else:
            ready.append(outcome)
    for case in dict.fromkeys(contender.case for contender in ready):
        side_by_side = [contender for contender in ready if contender.case == case]
        label = case_title(case, side_by_side[0].device)
        results += measure(side_by_side, rounds=rounds, folder=aside, max_workers=max_workers, label=label)
    for result in results:
        if isinstance(result, Failure):
            log.warning("failed: %s: %s", result.contender.name, result.reason)
    return results


def _with_metrics(measurements: Sequence[Measurement], evaluate: Evaluate) -> list[Measurement]:
    """Accuracy of our networks; batch, threads and compilation change nothing in it."""
    known: dict[tuple[str, str, str], dict[str, float]] = {}
    found = []
    for measurement in measurements:
        contender = measurement.contender
        if contender.network.origin != "mobilevit":
            found.append(measurement)
            continue
        engine = "PyTorch" if contender.format is None else contender.engine
        key = (contender.network.label, engine, contender.precision)
        if key not in known:
            known[key] = _metrics(contender, evaluate, " ".join(key))
        found.append(dataclasses.replace(measurement, metrics=known[key]))
    return found


def _metrics(contender: Contender, evaluate: Evaluate, label: str) -> dict[str, float]:
    if contender.artifact is not None:
        session = ArtifactSession(contender.artifact, threads=contender.threads)
        return dict(evaluate(session, session.card, label))
    assert contender.network.checkpoint is not None
    model = factory.load(contender.network.checkpoint)
    preprocessing = dataclasses.replace(card_of(model).preprocessing, size=contender.network.image_size)
    card: ModelCard = dataclasses.replace(card_of(model), preprocessing=preprocessing)
    torch_session = TorchSession(
        model, card, device=torch.device(contender.device), amp_dtype=_AMP.get(contender.precision)
    )
    return dict(evaluate(torch_session, card, label))
