"""Fill the tables of the READMEs and of the pages in docs/ named in PAGES from the result files.

    python benchmarks/tables.py            # rewrite the text between the marks `results` and `/results`
    python benchmarks/tables.py --check    # exit status 1 if a page is out of date

A measurement without a result file gives no row.
"""
# ruff: noqa: RUF001  Chinese punctuation and the dash of ranges look like ASCII

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"

Results = dict[str, dict[str, Any]]
"""Content of the result files, by name without suffix."""

SIDES = ("mobilevit fused", "mobilevit", "timm", "timm channels_last", "transformers")
PEERS = ("timm", "timm channels_last", "transformers")
FLOWERS = {
    "mobilevit": "flowers-mobilevit",
    "timm": "flowers-timm",
    "timm channels_last": "flowers-timm-channels-last",
}
TRAINED = ("mobilevit_xxs", "mobilevitv2_050")
FLOWERS_V2 = "flowers-mobilevitv2_050"
FROM_SCRATCH = {
    task: {model: f"{data}-{model}" for model in TRAINED}
    for task, data in {"detection": "bccd", "segmentation": "camvid"}.items()
}
SCRATCH_FILES = [name for runs in FROM_SCRATCH.values() for name in runs.values()]
TRAINING_SPEED = {"mobilevit_xxs": "training_speed", "mobilevitv2_050": "training_speed-mobilevitv2_050"}
QUANTIZATION = {"mobilevit_xxs": "quantization", "mobilevitv2_050": "quantization-mobilevitv2_050"}
SHORT_NAMES = {
    "mobilevit_xxs": "XXS", "mobilevit_xs": "XS", "mobilevit_s": "S",
    **{f"mobilevitv2_{percent:03}": f"v2-{percent / 100}" for percent in range(50, 201, 25)},
}  # fmt: skip
IN_README = {"onnx": "ONNX Runtime, float32", "openvino bf16": "OpenVINO, bfloat16"}
GPU_RUNS = ("imagenette-mobilevit_xxs", "imagenette-mobilevit_s", "cifar10-mobilevit_xxs")
DEMOS = ("demo-classification", "demo-detection", "demo-segmentation")
MEASUREMENTS = (
    "inference", "engines", *QUANTIZATION.values(), "mobile_runtimes", *TRAINING_SPEED.values(), *FLOWERS.values(),
    FLOWERS_V2, *SCRATCH_FILES, "postprocessing", *DEMOS, "resume", "startup",
    "data_pipeline", "processes", "experiments", "experiments_time", "experiments_samplers",
    "imagenet_costs", "training_speed_bf16", "gpu_tests", "gpu_inference", "gpu_training", *GPU_RUNS,
    "browser", "serving", "bulk", "before_after",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of result files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds README.md and docs/")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    stale = [page for page, make in PAGES.items() if not update(arguments.root / page, make(results), arguments.check)]
    if stale and arguments.check:
        sys.exit(f"out of date: {', '.join(stale)}; run python benchmarks/tables.py")
    print(f"rewrote {', '.join(stale)}" if stale else "every page is up to date")


def read_results(folder: Path) -> Results:
    paths = {name: folder / f"{name}.json" for name in MEASUREMENTS}
    return {name: _read(path) for name, path in paths.items() if path.exists()}


def _read(path: Path) -> dict[str, Any]:
    """Read one result file; those of version 0.1 use other words in keys and text."""
    text = path.read_text(encoding="utf-8").replace("picture", "image")
    result: dict[str, Any] = json.loads(re.sub("optimi[sz]er", "optimizer", text))
    return result


def update(path: Path, body: str, check: bool) -> bool:
    """Return whether the page was up to date, and unless `check` bring it up to date."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path}: no {BEGIN} ... {END} in it")
    new = f"{before}{BEGIN}\n\n{body.strip()}\n\n{END}{after}"
    if new != page and not check:
        path.write_text(new, encoding="utf-8")
    return new == page


# -- the small table of the README ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Words:
    """The README's words in one language."""

    head: tuple[str, ...] = ("", "mobilevit", "timm", "timm, channels_last", "transformers")
    nothing: str = "Not measured yet: `python benchmarks/inference.py` and the other scripts fill this table."
    inference: str = "inference, {model}, batch {batch}"
    engine: str = "same in {engine}"
    training: str = "training, {model}, {size} px, images/s"
    top1: str = "{model} from scratch, {epochs} epochs: top-1 on {images:,} held-out flower photos"
    minutes: str = "same: minutes to train and validate on {threads} thread(s)"
    detection: str = "{model} from scratch, {epochs} epochs: AP50 on {images} test images of BCCD (blood cells)"
    segmentation: str = (
        "{model} from scratch, {epochs} epochs: mean IoU on {images} test images of CamVid (road scenes)"
    )
    times: str = "{value} ({ratio} x)"
    where: str = (
        "In parentheses: speedup of this package. Inference is the median time of an eager float32 forward pass at "
        "256 x 256, for this package after `fuse`; the rows below it compare both models exported to the same engine. "
        "{processor}, {threads} threads; "
        "PyTorch {torch}, timm {timm}, transformers {transformers}; {date}. [Spread, commands and all figures]"
        "(docs/benchmarks.md)."
    )
    resume: str = (
        "A training run killed {kills} times with SIGKILL at random moments and resumed: weights {identical}, "
        "{corrupt} corrupt files."
    )
    identical: tuple[str, str] = ("bit-identical to an uninterrupted run", "**not** identical")
    device: str = (
        "On a device, with {installed} MB of packages: `mobilevit predict best.onnx one.jpg` takes {seconds} s and "
        "{memory} MB, and took {seconds_before} s and {memory_before} MB in version 0.1 ({processor})."
    )
    startup: str = "`import mobilevit` takes {above:.2f} s beyond `import torch`; `mobilevit --help` {help:.2f} s."


ENGLISH = Words()
CHINESE = Words(
    nothing="尚未测量：运行 `python benchmarks/inference.py` 及同目录下的其他脚本后，此表自动填写。",
    inference="推理，{model}，batch {batch}",
    engine="同上，{engine}",
    training="训练，{model}，{size} px，张/秒",
    top1="{model} 从零训练 {epochs} 个 epoch：{images:,} 张留出花卉照片上的 top-1",
    minutes="同上，{threads} 个线程上训练加验证用时（分钟）",
    detection="{model} 从零训练 {epochs} 个 epoch：血细胞检测 AP50，BCCD 的 {images} 张测试图片",
    segmentation="{model} 从零训练 {epochs} 个 epoch：道路场景分割 mean IoU，CamVid 的 {images} 张测试图片",
    times="{value}（{ratio} 倍）",
    where=(
        "括号内为本项目的速度是对方的几倍。推理行是 eager 模式、float32、256 x 256 输入下单次前向的耗时中位数，"
        "本项目取 `fuse` 之后的模型；其下各行是双方导出到同一引擎、按各自用户的用法运行的结果。"
        "测试环境：{processor}，{threads} 线程；PyTorch {torch}，timm {timm}，"
        "transformers {transformers}；{date}。[波动范围、命令与全部数据](docs/benchmarks.md)。"
    ),
    resume="训练中随机时刻 SIGKILL {kills} 次并逐次恢复：权重{identical}，损坏文件 {corrupt} 个。",
    identical=("与未中断的训练逐位一致", "**不**一致"),
    device=(
        "在设备上（软件包共 {installed} MB）：`mobilevit predict best.onnx one.jpg` 用时 {seconds} 秒、"
        "内存 {memory} MB；0.1 版为 {seconds_before} 秒、{memory_before} MB（{processor}）。"
    ),
    startup="`import mobilevit` 比 `import torch` 多用 {above:.2f} 秒；`mobilevit --help` 用时 {help:.2f} 秒。",
)


def short_table(results: Results, words: Words) -> str:
    """Compare this package with the others, one row per measurement."""
    rows: list[list[str]] = []
    inference = results.get("inference", {"figures": {}})["figures"]
    for case, figures in inference.items():
        model, batch = case.split(" batch ")
        milliseconds, ratios = figures["milliseconds"], figures["fused is"]
        row = [words.inference.format(model=SHORT_NAMES.get(model, model), batch=batch)]
        row.append(f"{number(milliseconds['mobilevit fused'])} ms")
        for peer in PEERS:
            ratio = number(ratios[f"faster than {peer}"])
            row.append(words.times.format(value=f"{number(milliseconds[peer])} ms", ratio=ratio))
        rows.append(row)
        engines = results.get("engines", {"figures": {}})["figures"]
        for engine, engine_name in IN_README.items():
            if measured := engines.get(f"{case} {engine}"):
                rows.append(_engine_row(words, engine_name, measured["milliseconds"]))
    for model, name in TRAINING_SPEED.items():
        if not (speed := results.get(name)):
            continue
        row = [words.training.format(model=SHORT_NAMES[model], size=speed["image_size"])]
        row.append(number(speed["figures"]["mobilevit"]))
        for peer in ("timm", "timm channels_last"):
            ratio = number(speed["ratios"][f"faster than {peer}"])
            row.append(words.times.format(value=number(speed["figures"][peer]), ratio=ratio))
        rows.append([*row, ""])
    if ours := results.get(FLOWERS["mobilevit"]):
        runs = {side: results.get(name) for side, name in FLOWERS.items()}
        alike = {side: run for side, run in runs.items() if run and run["epochs"] == ours["epochs"]}
        said = {"images": ours["validation_images"], "epochs": ours["epochs"]}
        accuracies = [words.top1.format(model="XXS", **said)]
        for side in FLOWERS:
            run = alike.get(side)
            accuracies.append(percent(run["last_epoch_top1"]) if run else "")
        minutes = [words.minutes.format(threads=ours["hardware"]["threads"]), f"{ours['minutes']:.1f}", "", ""]
        rows += [[*accuracies, ""], [*minutes, ""]]
    if run := results.get(FLOWERS_V2):
        label = words.top1.format(model="v2-0.5", epochs=run["epochs"], images=run["validation_images"])
        rows.append([label, percent(run["last_epoch_top1"]), "", "", ""])
    for task, text, figure in (("detection", words.detection, "ap50"), ("segmentation", words.segmentation, "miou")):
        for model, name in FROM_SCRATCH[task].items():
            if run := results.get(name):
                images = run["test_report"]["num_images"]
                label = text.format(model=SHORT_NAMES[model], epochs=run["epochs"], images=images)
                rows.append([label, percent(run["test"][figure]), "", "", ""])
    if not rows:
        return words.nothing
    measured = results.get("inference") or next(r for r in results.values() if "packages" in r)
    said = {"date": measured["date"], **measured["hardware"], **measured["packages"]}
    tabled = ("inference", "engines", *TRAINING_SPEED.values(), *FLOWERS.values(), FLOWERS_V2, *SCRATCH_FILES)
    processors = dict.fromkeys(short_processor(results[name]) for name in tabled if name in results)
    notes = [words.where.format(**{**said, "processor": " / ".join(processors)})]
    if resume := results.get("resume"):
        identical = words.identical[0 if resume["identical"] else 1]
        notes.append(words.resume.format(kills=resume["kills"], identical=identical, corrupt=resume["corrupt_files"]))
    if compared := results.get("before_after"):
        cold = compared["cold"]
        told = {
            "installed": number(compared["installed"]["onnx_mb"]),
            "seconds": number(cold["device"]["seconds"]),
            "memory": number(cold["device"]["peak_mb"]),
            "seconds_before": number(cold["before"]["seconds"]),
            "memory_before": number(cold["before"]["peak_mb"]),
        }
        notes.append(words.device.format(**told, processor=short_processor(compared)))
    if startup := results.get("startup"):
        above, help_s = max(startup["import_mobilevit_above_torch_s"], 0), startup["help_s"]
        notes.append(words.startup.format(above=above, help=help_s))
    return "\n".join([table(words.head, rows), "", *(f"- {note}" for note in notes)])


def _engine_row(words: Words, engine: str, milliseconds: dict[str, float]) -> list[str]:
    """Compare our best time with timm's best in one stream."""
    ours = min(value for side, value in milliseconds.items() if side.startswith("mobilevit"))
    timm = min(value for side, value in milliseconds.items() if side in ("timm", "timm by ONNX"))
    timms = words.times.format(value=f"{number(timm)} ms", ratio=number(round(timm / ours, 2)))
    return [words.engine.format(engine=engine), f"{number(ours)} ms", timms, "", ""]


# -- both generations side by side, for docs/alternatives.md ----------------------------------------------------------


def generations_table(results: Results) -> str:
    """Compare MobileViT and MobileViTv2 of about the same size, this package's best in each engine."""
    models = ("mobilevit_xxs", "mobilevitv2_050", "mobilevit_s", "mobilevitv2_100")
    of_case: dict[str, dict[str, str]] = {}
    for name in ("inference", "engines"):
        for case, figures in results.get(name, {"figures": {}})["figures"].items():
            model, rest = case.split(" batch ")
            batch, _, engine = rest.partition(" ")
            ours = min(value for side, value in figures["milliseconds"].items() if side.startswith("mobilevit"))
            row = f"{engine or 'PyTorch, eager'}, batch {batch}, ms"
            if engine != "eager":  # the same as in `inference`
                of_case.setdefault(row, {})[model] = number(ours)
    for name, figure, files in (
        ("flowers from scratch, top-1", "last_epoch_top1", {TRAINED[0]: FLOWERS["mobilevit"], TRAINED[1]: FLOWERS_V2}),
        ("BCCD from scratch, AP50", "ap50", FROM_SCRATCH["detection"]),
        ("CamVid from scratch, mean IoU", "miou", FROM_SCRATCH["segmentation"]),
    ):
        for model, file in files.items():
            if run := results.get(file):
                of_case.setdefault(name, {})[model] = f"{percent(run.get('test', run)[figure])}, {run['epochs']} epochs"
    rows = [
        [row, *(cells.get(model, "") for model in models)]
        for row, cells in of_case.items()
        if any(model.startswith("mobilevitv2") for model in cells)
    ]
    if not rows:
        return "Not measured yet."
    return table(("", *(SHORT_NAMES[model] for model in models)), rows)


# -- the full tables of docs/benchmarks.md ----------------------------------------------------------------------------


def full_tables(results: Results) -> str:
    """Every figure, with spread, hardware, versions and command."""
    return sections_of(results, SECTIONS)


def sections_of(results: Results, sections: tuple[Section, ...]) -> str:
    """The sections that have a result file, then the machine and the versions."""
    found = [section for section in sections if any(name in results for name in section.names)]
    if not found:
        return "No result files yet; the commands above write them."
    names = [name for section in found for name in section.names if name in results]
    return "\n\n".join([*(section.text(results) for section in found), machine(results, names)])


@dataclass(frozen=True, kw_only=True)
class Section:
    """One measurement of the full page."""

    title: str
    names: tuple[str, ...]
    """Result files it is made of."""
    summary: str
    """The measurement in a sentence or two."""
    body: Callable[[Results], str] = field(repr=False)

    def text(self, results: Results) -> str:
        """Heading, explanation, tables, files and commands."""
        found = [name for name in self.names if name in results]
        return "\n\n".join([f"## {self.title}", self.summary, self.body(results), commands(results, found)])


def inference_table(results: Results) -> str:
    rows = []
    for case, figures in results["inference"]["figures"].items():
        model, batch = case.split(" batch ")
        cells = [_timed(figures, side, figures["fused is"]) for side in SIDES]
        rows.append([f"{SHORT_NAMES.get(model, model)}, batch {batch}", *cells])
    return table(("", *SIDES), rows)


def _timed(figures: dict[str, Any], side: str, ratios: dict[str, float]) -> str:
    """Median, range of the rounds, and time over the side that the ratios refer to."""
    ratio = ratios.get(f"faster than {side}")
    times = f", {number(ratio)} x" if ratio else ""
    return f"{number(figures['milliseconds'][side])} ({span(figures['spread'][side])}){times}"


def engines_tables(results: Results) -> str:
    """One table per engine: our times and timm's; then the machine's own limits."""
    result = results["engines"]
    of_engine: dict[str, dict[str, dict[str, Any]]] = {}
    for case, figures in result["figures"].items():
        model, rest = case.split(" batch ")
        batch, engine = rest.split(" ", 1)
        of_engine.setdefault(engine, {})[f"{SHORT_NAMES[model]}, batch {batch}"] = figures
    parts = []
    for engine, cases in of_engine.items():
        sides = list(dict.fromkeys(side for figures in cases.values() for side in figures["milliseconds"]))
        rows = []
        for case, figures in cases.items():
            milliseconds: dict[str, float] = figures["milliseconds"]
            best = min((side for side in milliseconds if side.startswith("mobilevit")), key=milliseconds.__getitem__)
            cells = [
                _timed(figures, side, figures["best of ours is"]) if side in milliseconds else "" for side in sides
            ]
            rows.append(
                [case, *(f"**{cell}**" if side == best else cell for side, cell in zip(sides, cells, strict=True))]
            )
        parts.append(f"**{engine}**\n\n{table(('', *sides), rows)}")
    limits = ", ".join(f"{name} {number(value)}" for name, value in result["limits"].items())
    return "\n\n".join([*parts, f"Limits of the machine, measured in the same run: {limits}."])


def quantization_tables(results: Results) -> str:
    """Accuracy before and after, then size and time."""
    found = {model: results[name] for model, name in QUANTIZATION.items() if name in results}
    parts = []
    entries = [(model, *entry) for model, result in found.items() for entry in result["tasks"].items()]
    for model, task, entry in entries:
        shown = [key for key in ("top1", "ap50", "ap", "miou") if key in entry["float"]]
        rows = [["PyTorch, float32", *(f"{entry['float'][key]:.4f}" for key in shown), "", ""]]
        for name, after in entry["formats"].items():
            if "failed" in after:
                rows.append([name, *["failed" for _ in shown], "", ""])
                continue
            values = [f"{after[key]:.4f}" for key in shown]
            rows.append([name, *values, percent(after["agreement"], 2), number(after["megabytes"])])
        images, agreement = entry["measured on"].split(",")[0], entry["agreement"].split(": ")[-1]
        head = ("", *shown, "agreement", "MB")
        parts.append(
            f"**{task.capitalize()}, {SHORT_NAMES[model]}**, {images}; agreement: {agreement}.\n\n{table(head, rows)}"
        )
    of_models = {model: entry for result in found.values() for model, entry in result["latency"].items()}
    names = list(dict.fromkeys(name for entry in of_models.values() for name in entry["milliseconds"]))
    rows = []
    for name in names:
        cells = []
        for entry in of_models.values():
            megabytes = entry["megabytes"].get(name)
            cells += [_timed(entry, name, {}), number(megabytes) if megabytes else ""]
        rows.append([name, *cells])
    units = dict.fromkeys(entry["unit"] for entry in of_models.values())
    head = ("", *(text for model in of_models for text in (f"{SHORT_NAMES[model]}, ms", f"{SHORT_NAMES[model]}, MB")))
    parts.append(f"**Time**, {'; '.join(units)}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def mobile_table(results: Results) -> str:
    """Time and size in each runtime for phones."""
    rows = []
    for case, found in results["mobile_runtimes"]["figures"].items():
        format_, model = case.split(" ")
        threads = [key for key in found if key != "megabytes"]
        for side in found[threads[0]]["milliseconds"]:
            precision = "float32" if side == format_ else side.removeprefix(f"{format_}-")
            rows.append(
                [
                    f"{SHORT_NAMES[model]}, {side if side == 'PyTorch' else f'{format_} {precision}'}",
                    *(number(found[key]["milliseconds"][side]) for key in threads),
                    number(found["megabytes"][side]) if side in found["megabytes"] else "",
                ]
            )
    return table(("", "1 thread, ms", "2 threads, ms", "MB"), rows)


def training_table(results: Results) -> str:
    rows = []
    for model, name in TRAINING_SPEED.items():
        speed = results.get(name, {"figures": {}})
        for side, images_per_second in speed["figures"].items():
            ratio = speed["ratios"].get(f"faster than {side}")
            row = [f"{SHORT_NAMES[model]}, {side}", number(images_per_second), number(ratio) if ratio else "1"]
            rows.append(row)
    return table(("", "images/s, median", "step time over mobilevit's"), rows)


def flowers_tables(results: Results) -> str:
    named = {**FLOWERS, "mobilevit, v2-0.5": FLOWERS_V2}
    runs = {side: results[name] for side, name in named.items() if name in results}
    rows = []
    for side, run in runs.items():
        error = (run["validation_top1"] * (1 - run["validation_top1"]) / run["validation_images"]) ** 0.5
        rows.append(
            [
                side,
                str(run["epochs"]),
                percent(run["last_epoch_top1"], 2),
                percent(run["validation_top1"], 2),
                percent(error, 2),
                f"{run['minutes']:.1f}" if side == "mobilevit" else "",  # the others may share the machine
            ]
        )
    head = ("", "epochs", "top-1, last epoch", "top-1, best epoch", "standard error", "minutes")
    parts = [table(head, rows)]
    longest = max(len(run["per_epoch_top1"]) for run in runs.values())
    shown = [epoch for epoch in range(longest) if epoch < 3 or (epoch + 1) % 5 == 0]
    rows = [
        [side, *(percent(top1[i]) if i < len(top1) else "" for i in shown)]
        for side, top1 in ((side, run["per_epoch_top1"]) for side, run in runs.items())
    ]
    parts.append(f"Top-1 after each epoch:\n\n{table(('', *(str(i + 1) for i in shown)), rows)}")
    return "\n\n".join(parts)


def from_scratch_tables(results: Results) -> str:
    parts: list[str] = []
    for task, model, name in ((task, *run) for task, runs in FROM_SCRATCH.items() for run in runs.items()):
        if run := results.get(name):
            heading, figures, shown, plots = _FROM_SCRATCH_TEXTS[task]
            config = run["config"]
            height, width = config["image_size"]
            settings = (
                f"{run['epochs']} epochs, batches of {config['batch_size']}, peak learning rate "
                f"{config['learning_rate']:g}, {width} x {height} pixels; {number(run['minutes'])} minutes with "
                f"evaluation after every epoch."
            )
            columns = ("validation, best epoch", "test")
            rows = [
                [label, *(percent(run[part][key]) for part in ("validation", "test"))]
                for key, label in figures.items()
                if key in run["test"]
            ]
            classes = run["test_report"]["per_class"]
            per_class = [
                [row["name"], *("" if row[key] is None else percent(row[key]) for key in shown)] for row in classes
            ]
            score = next(iter(figures))
            epochs = [epoch for epoch in range(len(run["per_epoch"])) if (epoch + 1) % 10 == 0]
            by_epoch = [[figures[score], *(percent(run["per_epoch"][epoch][score]) for epoch in epochs)]]
            parts += [
                f"### {heading}, {SHORT_NAMES[model]}",
                settings,
                table(("", *columns), rows),
                f"By class, on the test part:\n\n{table(('', *shown.values()), per_class)}",
                f"Validation, by epoch:\n\n{table(('', *(str(epoch + 1) for epoch in epochs)), by_epoch)}",
                *(f"![{text}](images/{name}-{plot})" for plot, text in plots.items()),
            ]
    return "\n\n".join(parts)


_FROM_SCRATCH_TEXTS: dict[str, tuple[str, dict[str, str], dict[str, str], dict[str, str]]] = {
    "detection": (
        "Blood cells: boxes",
        {
            "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
            "ap_large": "AP large", "ar100": "AR100",
        },
        {"ap": "AP", "ap50": "AP50", "precision": "precision", "recall": "recall"},
        {
            "curves.png": "Training loss, AP on the validation images and learning rate by epoch",
            "pr-curves.png": "Precision against recall on the validation images, one curve per class",
        },
    ),
    "segmentation": (
        "Road scenes: masks",
        {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_class_accuracy": "mean class accuracy"},
        {"iou": "IoU", "accuracy": "accuracy", "share": "share of pixels"},
        {
            "curves.png": "Training loss, mean IoU on the validation images and learning rate by epoch",
            "per-class-iou.png": "Bars of IoU by class on the validation images",
        },
    ),
}  # fmt: skip
"""By task: heading; figures by key, the deciding one first; figures of each class by key; plots and their captions."""


def postprocessing_table(results: Results) -> str:
    result = results["postprocessing"]
    rows = [
        [name, number(figures["postprocessing_ms"]), percent(figures["share_of_forward"])]
        for name, figures in result.items()
        if isinstance(figures, dict) and "postprocessing_ms" in figures
    ]
    head = ("output", "postprocessing, ms", f"share of the forward pass ({number(result['forward_ms'])} ms)")
    return table(head, rows)


def demo_table(results: Results) -> str:
    rows = []
    for name in DEMOS:
        result = results[name]
        scores = ", ".join(f"{text} {percent(value)}" for text, value in result["scores"].items())
        rows.append([name.removeprefix("demo-"), scores, str(result["epochs"]), str(result["seconds"])])
    return table(("task", "on held-out images", "epochs", "total seconds"), rows)


def resume_table(results: Results) -> str:
    resume = results["resume"]
    row = [str(resume["kills"]), "yes" if resume["identical"] else "no", str(resume["corrupt_files"])]
    return table(("kills", "weights identical to an uninterrupted run", "unreadable files"), [row])


def startup_table(results: Results) -> str:
    startup = results["startup"]
    rows = [
        ["`import mobilevit`, beyond `import torch`", f"{startup['import_mobilevit_above_torch_s']:.2f}"],
        ["`mobilevit --help`", f"{startup['help_s']:.2f}"],
    ]
    if "import_torch_s" in startup:
        rows.append(["`import torch`, for comparison", f"{startup['import_torch_s']:.2f}"])
    return table(("", "seconds, median"), rows)


def device_table(results: Results) -> str:
    found = results["before_after"]
    before, device = found["cold"]["before"], found["cold"]["device"]
    worker = found["serving"]["resident_mb_after_100_requests"]
    rows = [
        ["seconds", number(before["seconds"]), number(device["seconds"])],
        ["peak memory, MB", number(before["peak_mb"]), number(device["peak_mb"])],
        ["worker of `serve` after 100 requests, MB", number(worker["before"]), number(worker["device"])],
        ["installed packages, MB", "", number(found["installed"]["onnx_mb"])],
    ]
    return table(("", "version 0.1", "this version, without PyTorch"), rows)


SECTIONS = (
    Section(
        title="On a device",
        names=("before_after",),
        summary="`mobilevit predict best.onnx one.jpg` in a fresh process, and `mobilevit serve best.onnx`; "
        "this version with `mobilevit[onnx]` only.",
        body=device_table,
    ),
    Section(
        title="Inference",
        names=("inference",),
        summary=(
            "Eager PyTorch, float32, 256 x 256, the same random weights on every side: median ms "
            "(fastest–slowest round), then time relative to `mobilevit fused`. All sides take turns in one process, "
            "so a slow moment of the machine affects all of them. `mobilevit fused` is the model after "
            "`mobilevit.fuse`; `mobilevit` and `mobilevit fused` get channels-last images, as from `Predictor`. "
            "`timm` and `transformers` are the models as their libraries build them, in eval mode; `timm "
            "channels_last` has model and images in that layout."
        ),
        body=inference_table,
    ),
    Section(
        title="Engines on the CPU",
        names=("engines",),
        summary=(
            "The same networks in each engine, with the same random weights, 256 x 256: median ms (fastest–slowest "
            "round), then time relative to our best, which is bold. timm's model runs the usual way, one batch "
            "through all threads, and also in streams of small chunks with one thread each, as this package's "
            "sessions run batches."
        ),
        body=engines_tables,
    ),
    Section(
        title="Smaller numbers",
        names=tuple(QUANTIZATION.values()),
        summary=(
            "Models trained on small public sets, calibrated on 128 of the training images, measured on held-out "
            "images; agreement is with float32 PyTorch. The layers that stay in floating point were chosen on the "
            "held-out flowers, which favors the classification figures a little. Times are for random weights."
        ),
        body=quantization_tables,
    ),
    Section(
        title="Runtimes for phones",
        names=("mobile_runtimes",),
        summary=(
            "ExecuTorch and LiteRT, both through XNNPACK, and fused PyTorch in the same process; 256 x 256, one "
            "image, random weights. Measured on a server CPU; phones run the same kernels, but were not measured."
        ),
        body=mobile_table,
    ),
    Section(
        title="Training speed",
        names=tuple(TRAINING_SPEED.values()),
        summary=(
            "Complete training steps on the CPU: forward, loss, backward, AdamW, weight average. Every side "
            "runs the same code with its own network. The last column is the median of the ratios of each round."
        ),
        body=training_table,
    ),
    Section(
        title="Flowers from scratch",
        names=(*FLOWERS.values(), FLOWERS_V2),
        summary=(
            "XXS, where not named otherwise, without pretrained weights on flower photos of five classes, scaled to "
            "128 x 128; a fifth of each class is held out. timm's model is the control: same loop, data, settings and"
            " seed. Minutes include validation after every epoch. The held-out images also choose the best epoch, so "
            "the last epoch's figure is the fairer one. Crop, batch, learning rate, MixUp and clipping were chosen in"
            " a few earlier runs on the same images, mostly with this package's model, so both figures are slightly "
            "optimistic. One seed; the standard error is that of a proportion over the held-out images."
        ),
        body=flowers_tables,
    ),
    Section(
        title="Detection and segmentation from scratch",
        names=tuple(SCRATCH_FILES),
        summary=(
            "Without pretrained weights, on two small public sets. BCCD: 364 microscope images of blood (205 "
            "train, 87 validation, 72 test) with boxes of three kinds of cells. CamVid: 701 frames of road scenes at "
            "480 x 360 (367, 101, 233) with masks of eleven classes. Validation chose the best epoch, whose weights "
            "were then measured on test. MobileViTv2 had as many epochs as it manages in the time of XXS. One seed; "
            "the settings had one short trial before. Precision and recall are at the score with the best F1 on the "
            "measured images. On the same split of CamVid, the ENet paper "
            "reports a mean IoU of 46.4 % for SegNet-Basic and 51.3 % for ENet "
            "([arXiv:1606.02147](https://arxiv.org/abs/1606.02147)), trained differently."
        ),
        body=from_scratch_tables,
    ),
    Section(
        title="From a detector's output to objects",
        names=("postprocessing",),
        summary=(
            "One image of 320 x 320, 3,232 anchors, 80 classes plus background, after the fused XXS. With fresh "
            "weights all classes are equally likely at every anchor, which is the hardest case; a trained detector is"
            " sure of background almost everywhere. Medians of rounds that alternate with the forward pass."
        ),
        body=postprocessing_table,
    ),
    Section(
        title="The demo",
        names=DEMOS,
        summary=(
            "`mobilevit demo` on its built-in scenes: drawing, training XXS from scratch, evaluation, prediction, "
            "report."
        ),
        body=demo_table,
    ),
    Section(
        title="Killed and resumed",
        names=("resume",),
        summary=(
            "A short run is killed with SIGKILL at random moments, resumed each time, and compared with an "
            "uninterrupted run."
        ),
        body=resume_table,
    ),
    Section(
        title="Start",
        names=("startup",),
        summary=("Fresh processes. `import mobilevit` here includes loading `create_model`, `fuse` and `save`."),
        body=startup_table,
    ),
)


def pipeline_table(results: Results) -> str:
    figures = results["data_pipeline"]["figures"]
    sides = list(next(iter(figures.values()))["images_per_second"])
    rows = []
    for side in sides:
        row = [side]
        for found in figures.values():
            row.append(number(found["images_per_second"][side]))
            ratios = [found["ratios"].get(f"{side} over {peer}") for peer in ("torchvision ImageFolder", "timm")]
            row += [number(ratio) if ratio else "" for ratio in ratios]
        rows.append(row)
    head = [""]
    for sizes in figures:
        head += [f"{sizes}, images/s", "over ImageFolder", "over timm"]
    return table(tuple(head), rows)


def processes_table(results: Results) -> str:
    found = results["processes"]
    rows = [[side, number(speed)] for side, speed in found["images_per_second"].items()]
    return "\n\n".join(
        [
            table(("", "images/s, median"), rows),
            f"Speedup, median of rounds: {found['several over one']:.2f}.",
        ]
    )


def bf16_table(results: Results) -> str:
    rows = []
    for label, name in (("float32", "training_speed"), ("bfloat16 by autocast", "training_speed_bf16")):
        if name in results:
            speeds = results[name]["figures"]
            rows.append([label, *(number(speeds[side]) for side in ("timm", "timm channels_last", "mobilevit"))])
    return table(("images/s, median", "timm", "timm channels_last", "mobilevit"), rows)


def experiments_table(results: Results) -> str:
    figures, times = results["experiments"]["figures"], results.get("experiments_time", {}).get("figures", {})
    sizes = [str(size) for size in results["experiments"]["test_sizes"]]
    rows = []
    for name, seeds in figures.items():
        runs = list(seeds.values())
        means = [sum(run["top1"][size] for run in runs) / len(runs) for size in sizes]
        seconds = [number(times[name]["seconds_per_epoch"])] if name in times else [""]
        rows.append([name, *(percent(mean) for mean in means), f"{runs[0]['updates']:,}", *seconds])
    head = ("", *(f"{size} px" for size in sizes), "updates", "seconds per epoch")
    seeds_of = {len(seeds) for seeds in figures.values()}
    lines = [table(head, rows)]
    counted = f"{min(seeds_of)}" if len(seeds_of) == 1 else f"{min(seeds_of)} to {max(seeds_of)}"
    images = next(iter(next(iter(figures.values())).values()))["validation_images"]
    lines.append(
        f"Runs of each: {counted}; {results['experiments']['epochs']} epochs; {images} held-out images, so the "
        f"standard error of a figure near 60 % is about {100 * (0.24 / images) ** 0.5:.1f} points."
    )
    if "experiments_time" in results:
        latency = results["experiments_time"]["latency_ms_eager_256"]
        lines.append(
            "Fused model, eager, one image of 256 pixels, ms: "
            + ", ".join(f"{name} {number(value)}" for name, value in latency.items())
            + "."
        )
    return "\n\n".join(lines)


def samplers_table(results: Results) -> str:
    found = results["experiments_samplers"]
    sizes = [str(size) for size in found["test_sizes"]]
    rows = []
    for name, run in found["figures"].items():
        for label, key in (("as trained", "top1"), ("statistics of the test size", "top1_renewed")):
            rows.append([name, f"{run['updates']:,}", label, *(percent(run[key][size]) for size in sizes)])
    return table(("", "updates", "BatchNorm", *(f"{size} px" for size in sizes)), rows)


def imagenet_tables(results: Results) -> str:
    found = results["imagenet_costs"]
    names = {"off": "256 pixels only", "paper": "paper", "never_below_base": "never_below_base"}
    rows = [
        [
            names[variant],
            f"{plan['steps_an_epoch']:,}",
            f"{plan['steps_of_300_epochs']:,}",
            number(plan["relative_updates"]),
            number(plan["relative_cost"]),
        ]
        for variant, plan in found["steps"].items()
    ]
    head = ("sampler, 8 x 128 images", "steps per epoch", "in 300 epochs", "relative updates", "relative pixels")
    parts = [table(head, rows)]
    hours = found["hours_of_300_epochs_by_images_a_second_of_one_gpu"]
    reading = found["reading_by_images_a_second_of_one_gpu"]
    rows = [
        [
            f"{int(speed):,}",
            number(both["one size"]),
            number(both["multi-scale, as in the paper"]),
            number(reading[speed]["cores_for_each_gpu"]),
            f"{reading[speed]['megabytes_a_second_for_all']:,}",
        ]
        for speed, both in hours.items()
    ]
    head = (
        "256-pixel images/s of one GPU",
        "hours, one size", "hours, multi-scale", "reading cores per GPU", "MB/s, all GPUs",
    )  # fmt: skip
    parts.append(table(head, rows))
    rows = [
        [
            name,
            number(memory["weights_gradients_optimizer_average"]),
            f"{memory['activations_of_128_images_float32']:,}",
            f"{memory['activations_of_128_images_bfloat16']:,}",
        ]
        for name, memory in found["memory_mb"].items()
    ]
    head = (
        "MB per process",
        "weights, gradients, optimizer, average",
        "128 images, float32",
        "128 images, bf16",
    )
    return "\n\n".join([*parts, table(head, rows)])


def browser_table(results: Results) -> str:
    found = results["browser"]
    columns = {
        "Chromium, 1 thread": "browser, 1 threads",
        "2 threads": "browser, 2 threads",
        "2 threads, with decoding and resizing": "browser with image, 2 threads",
        "native ONNX Runtime, 1 thread": "native, 1 threads",
        "native, 2 threads": "native, 2 threads",
    }
    rows = [[name, *(number(sides[key]) for key in columns.values())] for name, sides in found["figures"].items()]
    parts = [table(("", *columns), rows)]
    parts.append(f"Chromium {found['chromium']}, ONNX Runtime Web {found['onnxruntime-web']}.")
    return "\n\n".join([*parts, commands(results, ["browser"]), machine(results, ["browser"])])


def gpu_tests_line(results: Results) -> str:
    counts = {kind: len(results["gpu_tests"][kind]) for kind in ("passed", "failed", "skipped")}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + "."


def gpu_inference_tables(results: Results) -> str:
    found = results["gpu_inference"]
    cases = found["cases"]
    sides = dict.fromkeys(side for case in cases.values() for side in case["images_per_second"])
    speeds = [
        [side, *(number(value) if (value := case["images_per_second"].get(side)) else "" for case in cases.values())]
        for side in sides
    ]
    bounds = []
    for name, case in cases.items():
        image = case["an_image"]
        moved, allowed = image["megabytes_moved"], image["images_per_second_allowed"]
        ratio = number(case["ratio"]) if "ratio" in case else ""
        figures = (image["gflops"], moved["eager"], moved["least"], allowed["least"])
        bounds.append([name, ratio, *map(number, figures), f"{max(case['error'].values()):.0e}"])
    kinds = dict.fromkeys(kind for case in cases.values() for kind in case["profile"].get("ms_by_kind", ()))
    spent = [
        [kind, *(number(case["profile"].get("ms_by_kind", {}).get(kind, 0.0)) for case in cases.values())]
        for kind in kinds
    ]
    limits = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in found["limits"].items())
    head = (
        "", "ours over timm, each at its best", "GFLOP per image", "MB moved, each operation alone",
        "MB moved, all fused", "images/s that the limits allow then", "largest error",
    )  # fmt: skip
    return "\n\n".join(
        [
            table(("images/s, median", *cases), speeds),
            table(head, bounds),
            table(("ms of the fastest of ours", *cases), spent),
            f"Limits measured in the same run: {limits}.",
        ]
    )


def gpu_training_tables(results: Results) -> str:
    found = results["gpu_training"]
    rows, reading = [], []
    for name, steps in found["steps"].items():
        first = f"{SHORT_NAMES[name]}, {steps['batch']} images"
        for side, speed in steps["images_per_second"].items():
            ratio = steps["ratio"].get(side)
            rows.append([first, side, number(speed), number(ratio) if ratio else ""])
    for name, told_of in found["reading"].items():
        for processes, told in told_of.items():
            if isinstance(told, dict):
                speeds = (number(told["reading_alone"]), number(told["training"]), percent(told["of_synthetic"]))
                reading.append([SHORT_NAMES[name], processes, *speeds])
    parts = [table(("", "", "images/s, median", "ours over it"), rows)]
    if reading:
        head = ("", "", "reading alone, images/s", "training, images/s", "of one batch repeated")
        parts.append(table(head, reading))
    return "\n\n".join(parts)


def gpu_runs_table(results: Results) -> str:
    rows = []
    for name in GPU_RUNS:
        if name in results:
            run = results[name]
            best = (run.get("leaderboard_top1") or {}).get(f"epochs {run['epochs']}")
            rows.append(
                [
                    run["data_set"],
                    f"{SHORT_NAMES[run['model']]}, {run['parameters'] / 1e6:.1f} M parameters",
                    str(run["epochs"]),
                    number(run["minutes"]),
                    percent(run["top1"], 2),
                    percent(run["last_epoch_top1"], 2),
                    percent(best, 2) if best else "",
                ]
            )
    head = ("", "", "epochs", "minutes", "top-1, best epoch", "top-1, last epoch", "leaderboard")
    return table(head, rows)


AT_SCALE = (
    Section(
        title="Measured: on a GPU, tests",
        names=("gpu_tests",),
        summary="`pytest -m gpu`.",
        body=gpu_tests_line,
    ),
    Section(
        title="Measured: on a GPU, inference",
        names=("gpu_inference",),
        summary=(
            "The same random weights on all sides, 256 x 256 pixels. A graph is a CUDA graph; padded is fused, with "
            "attention heads widened to multiples of 8. Bytes count weights and everything that operations read and "
            "write: for every operation separately, or only for convolutions, matrix products and attention, as if "
            "everything else were fused into them. Errors are relative to our float32."
        ),
        body=gpu_inference_tables,
    ),
    Section(
        title="Measured: on a GPU, training",
        names=("gpu_training",),
        summary=(
            "Complete steps in bf16 by autocast: forward, loss, backward, AdamW, weight average; only the network "
            "differs. The second table is for the compiled model, with images read from a parquet file of 500-pixel "
            "JPEGs."
        ),
        body=gpu_training_tables,
    ),
    Section(
        title="Measured: on a GPU, from scratch",
        names=GPU_RUNS,
        summary=(
            "Imagenette at 128 pixels, and the best result of its public leaderboard for as many epochs, by networks "
            "of some 25 million parameters. The two are only roughly comparable: the images of the copy used here were "
            "stretched to a square before scaling, while the leaderboard keeps the aspect ratio. The best epoch is "
            "chosen on the validation images, so the last epoch's figure is the fairer one."
        ),
        body=gpu_runs_table,
    ),
    Section(
        title="Measured: reading",
        names=("data_pipeline",),
        summary=(
            "One process turns JPEGs of 500 pixels into training batches (random crop, flip, normalized float32); "
            "images/s, and the speedup over the loaders of torchvision and timm on the same files in the same run."
        ),
        body=pipeline_table,
    ),
    Section(
        title="Measured: processes",
        names=("processes",),
        summary=(
            "The same training on two cores: one process with two threads, or two processes under torchrun with one "
            "thread and half the batch each."
        ),
        body=processes_table,
    ),
    Section(
        title="Measured: bf16 on a CPU",
        names=("training_speed", "training_speed_bf16"),
        summary=("Training steps of mobilevit_xxs on two cores. Where bf16 is slower, `--amp auto` does not use it."),
        body=bf16_table,
    ),
    Section(
        title="Measured: the paper's choices",
        names=("experiments", "experiments_time"),
        summary=(
            "mobilevit_xxs from scratch on 4,317 flower photos at 128 pixels, one change at a time; top-1 on held-out"
            " images at five sizes. The set is small and the runs are short: differences below two standard errors "
            "mean nothing, and effects known from ImageNet need not appear. At 128 pixels, only the sampler moves "
            "top-1 by more than one standard error. Larger patches are cheaper and, within the noise, as "
            "good.\n\n![accuracy by test size, and with one thing changed](images/experiments.png)"
        ),
        body=experiments_table,
    ),
    Section(
        title="Measured: what several sizes cost",
        names=("experiments_samplers",),
        summary=(
            "Multi-scale training looks worse above, most of all far from 128 pixels. This run tests two causes: "
            "fewer updates, made up for by more epochs, and BatchNorm statistics collected over all sizes, with "
            "feature maps from 2 x 2 to 6 x 6, replaced by those of the training images at the test size. With as "
            "many updates, which take about as long, and statistics of the test size, multi-scale training is as good"
            " as training at one size for every test size, and better at the smallest. The paper's sizes differ by a "
            "factor of two, these by three."
        ),
        body=samplers_table,
    ),
    Section(
        title="ImageNet on eight GPUs, worked out",
        names=("imagenet_costs",),
        summary=(
            "Steps are counted by running the sampler on 1,281,167 images; relative costs follow from them. Hours "
            "depend on the speed of your GPU, which `--dry-run` measures; no GPU was available here. Cores follow "
            "from the reading speed of one core above, network traffic from the 138 GB of the published archive, "
            "memory from the tensors that a real step keeps for its backward pass. A single node needs 138 GB of "
            "disk, or the network in the table. Each step exchanges gradients of 4 bytes per parameter, 5 to 22 MB."
        ),
        body=imagenet_tables,
    ),
)


def serving_tables(results: Results) -> str:
    if "serving" not in results:
        return "No result file yet; the command above writes it."
    parts = results["serving"]["parts"]
    lines = []
    if "throughput" in parts:
        found = parts["throughput"]
        names = [name for name in ("torch", "tuned") if name in found]
        engines = {"torch": "PyTorch", "tuned": f"tuned ({found.get('tuned_engine', '')})"}
        rows = [
            ["served, images/s", *(number(found[name]["images_per_second"]["server"]) for name in names)],
            ["lowest and highest round", *(_spread(found[name]["all_rounds"]["server"]) for name in names)],
            ["engine alone, images/s", *(number(found[name]["images_per_second"]["engine"]) for name in names)],
            ["lowest and highest round", *(_spread(found[name]["all_rounds"]["engine"]) for name in names)],
            [
                "`Predictor.stream`, images/s",
                *(number(found[name]["images_per_second"]["stream"]) for name in names),
            ],
            ["served, share of the engine", *(percent(found[name]["share_of_engine"], 0) for name in names)],
            ["served, share of `stream`", *(percent(found[name]["share_of_stream"], 0) for name in names)],
            ["latency p50, p95, p99, ms", *(_percentiles(found[name]) for name in names)],
            ["client's share of the CPU", *(percent(found[name]["client_share_of_cpu"]) for name in names)],
        ]
        lines.append(table(("", *(engines[name] for name in names)), rows))
    if "overload" in parts:
        found = parts["overload"]
        statuses, memory = found["statuses"], found["megabytes"]
        lines.append(
            f"**Overload**: four times its capacity, {number(found['offered_per_second'])} requests/s, for "
            f"{number(found['minutes'])} minutes: {statuses.get('200', 0):,} answered, {statuses.get('503', 0):,} "
            f"refused with status 503, {found['lost']} lost; p50, p95, p99 {_percentiles(found)} ms. "
            f"Memory of all processes {number(memory['second_minute'])} MB in the second minute, "
            f"{number(memory['last_minute'])} MB in the last ({100 * memory['growth']:+.1f} %)."
        )
    if "fuzz" in parts:
        found = parts["fuzz"]
        kinds = ", ".join(found["outcomes"])
        lines.append(
            f"**Fuzzing**: {found['uploads']:,} mutated uploads ({kinds}): {len(found['server_errors'])} answers "
            f"of 5xx other than 503, {found['tracebacks_in_the_log']} tracebacks, same processes afterwards: "
            f"{'yes' if found['same_processes_afterwards'] else 'no'}."
        )
    if "schemathesis" in parts:
        found = parts["schemathesis"]
        verdict = "no issues" if found["exit_status"] == 0 else f"findings: {'; '.join(found['summary'])}"
        lines.append(f"**Schemathesis**, on the service's OpenAPI document: {verdict}.")
    if "sigterm" in parts:
        runs = parts["sigterm"]["runs"]
        lines.append(
            f"**SIGTERM under load**, {len(runs)} times: {sum(run['answered'] for run in runs):,} requests answered, "
            f"{sum(run['accepted_and_lost'] for run in runs)} accepted and lost, "
            f"{sum(run['connections_reset_before_acceptance'] for run in runs)} reset before they were read; "
            f"stopped within {max(run['seconds_to_stop'] for run in runs):.1f} s."
        )
    if "kill" in parts:
        runs = parts["kill"]["runs"]
        lines.append(
            f"**SIGKILL of one of {parts['kill']['workers']} workers under load**, {len(runs)} times: replaced within "
            f"{max(run['seconds_until_replaced'] for run in runs):.1f} s while the other answered; connections lost: "
            f"{', '.join(str(run['connections_that_died_with_it']) for run in runs)}."
        )
    ran = dict.fromkeys(public(part["command"]) for part in parts.values())
    lines.append(f"- `benchmarks/results/serving.json`: {', '.join(f'`{command}`' for command in ran)}")
    return "\n\n".join([*lines, machine(results, ["serving"])])


def _spread(values: list[float]) -> str:
    return span([min(values), max(values)])


def _percentiles(found: dict[str, Any]) -> str:
    return ", ".join(f"{found[name]:,.0f}" for name in ("p50_ms", "p95_ms", "p99_ms"))


def bulk_tables(results: Results) -> str:
    if "bulk" not in results:
        return "No result file yet; the command above writes it."
    figures = results["bulk"]["figures"]
    runs = {name: run for name, run in figures.items() if isinstance(run, dict) and "images_per_second" in run}
    rows = [
        ["to parquet, images/s", *(number(run["images_per_second"]) for run in runs.values())],
        ["engine alone, images/s", *(number(run["engine_per_second"]) for run in runs.values())],
        ["to parquet, share of the engine", *(percent(run["share_of_engine"], 0) for run in runs.values())],
        [
            "engine alone, one batch per core, images/s",
            *(number(run["engine_side_by_side_per_second"]) for run in runs.values()),
        ],
        ["`Predictor.stream`, images/s", *(number(run["stream_per_second"]) for run in runs.values())],
        ["seconds, including loading the model", *(number(run["seconds"]) for run in runs.values())],
        *(
            [f"memory, {when}, MB", *(number(run["memory_mb"][when]) for run in runs.values())]
            for when in ("half way", "near its end", "peak")
        ),
    ]
    killed = figures["killed"]
    told = (
        f"Killed with SIGKILL and restarted: {killed['rows kept']:,} rows kept, "
        f"{killed['rows made by the second run']:,} added, {killed['rows']:,} in total, each image once."
    )
    return "\n\n".join([table(("", *runs), rows), told, commands(results, ["bulk"]), machine(results, ["bulk"])])


def commands(results: Results, names: list[str]) -> str:
    """One line per result file: its name, the command that wrote it, threads and date."""
    lines = []
    for name in names:
        result = results[name]
        threads = result["hardware"]["threads"]
        told = f"{threads} thread{'s' if threads > 1 else ''}, {result['date']}"
        lines.append(f"- `benchmarks/results/{name}.json`: `{public(result['command'])}`; {told}")
    return "\n".join(lines)


def machine(results: Results, names: list[str]) -> str:
    """Processors and library versions of some result files; those that differ from the usual name their files."""
    found = {name: results[name] for name in names}
    processors = {
        name: ", ".join([result["hardware"]["processor"], *result["hardware"]["gpus"]])
        for name, result in found.items()
    }
    packages = dict.fromkeys(package for result in found.values() for package in result["packages"])
    versions = [
        f"{package} {_usual({name: r['packages'][package] for name, r in found.items() if package in r['packages']})}"
        for package in packages
    ]
    return f"Machine: {_usual(processors)}. Versions: {', '.join(versions)}."


def _usual(values: dict[str, str]) -> str:
    """The value of most files, then each other one and its files."""
    counts = Counter(values.values()).most_common()
    others = [
        f" ({value} for {', '.join(name for name in values if values[name] == value)})" for value, _ in counts[1:]
    ]
    return counts[0][0] + "".join(others)


def public(command: str) -> str:
    """Replace the folders of the machine that a command ran on."""
    return re.sub(r"(--data|--out)[ =]\S+", r"\1 FOLDER", command)


# -- text -------------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(ends: Sequence[float]) -> str:
    low, high = ends
    return f"{number(low)}–{number(high)}"


def number(value: float) -> str:
    """Format with three digits, or with all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def short_processor(result: dict[str, Any]) -> str:
    """The processor of a result, without its instruction sets."""
    return ", ".join(result["hardware"]["processor"].split(", ")[:2])


PAGES: dict[str, Callable[[Results], str]] = {
    "README.md": lambda results: short_table(results, ENGLISH),
    "README.zh-CN.md": lambda results: short_table(results, CHINESE),
    "docs/benchmarks.md": full_tables,
    "docs/alternatives.md": generations_table,
    "docs/bulk.md": bulk_tables,
    "docs/serving.md": serving_tables,
    "docs/browser.md": lambda results: browser_table(results) if "browser" in results else "Not measured yet.",
    "docs/training-at-scale.md": lambda results: sections_of(results, AT_SCALE),
}


if __name__ == "__main__":
    main()
