"""Fill the tables of the READMEs and of the pages in docs/ named in PAGES from the result files.

    python benchmarks/tables.py            # rewrite what stands between the marks `results` and `/results`
    python benchmarks/tables.py --check    # exit status 1 if a page is out of date

A measurement without a result file gives no row.
"""
# ruff: noqa: RUF001  Chinese punctuation looks like ASCII's

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
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
FROM_SCRATCH = {"detection": "bccd-mobilevit_xxs", "segmentation": "camvid-mobilevit_xxs"}
SHORT_NAMES = {"mobilevit_xxs": "XXS", "mobilevit_xs": "XS", "mobilevit_s": "S"}
IN_README = {"onnx": "ONNX Runtime, float32", "openvino bf16": "OpenVINO, bfloat16"}
DEMOS = ("demo-classification", "demo-detection", "demo-segmentation")
MEASUREMENTS = (
    "inference", "engines", "quantization", "mobile_runtimes", "training_speed", *FLOWERS.values(),
    *FROM_SCRATCH.values(), "postprocessing", *DEMOS, "resume", "startup",
    "data_pipeline", "processes", "experiments", "experiments_time", "experiments_samplers",
    "imagenet_costs", "training_speed_bf16",
    "browser", "serving", "bulk",
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
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def update(path: Path, body: str, check: bool) -> bool:
    """Whether the page said this already; unless `check`, it does afterwards."""
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
    nothing: str = "Not measured yet: `python benchmarks/inference.py` and the scripts beside it fill this table."
    inference: str = "inference, {model}, batch {batch}"
    engine: str = "the same in {engine}"
    training: str = "training, XXS, {size} px, images/s"
    top1: str = "XXS from scratch, {epochs} epochs: top-1 on {images:,} held-out flower photographs"
    minutes: str = "the same, minutes for training and validation on {threads} thread(s)"
    detection: str = "XXS from scratch, {epochs} epochs: AP50 of boxes around cells, {images} test images of BCCD"
    segmentation: str = "XXS from scratch, {epochs} epochs: mean IoU of road scenes, {images} test images of CamVid"
    times: str = "{value} ({ratio} x)"
    where: str = (
        "In brackets: this package's speed over the other's. Inference is the median time of eager float32 forward "
        "passes at 256 x 256, this package's after `fuse`; below each, of both exported to the same engine, as their "
        "users run them. Measured on {processor}, {threads} threads; "
        "PyTorch {torch}, timm {timm}, transformers {transformers}; {date}. [Spread, commands and all figures]"
        "(docs/benchmarks.md)."
    )
    resume: str = (
        "Killed {kills} times by SIGKILL at random moments and resumed: weights {identical}, {corrupt} corrupt files."
    )
    identical: tuple[str, str] = ("identical bit for bit to an uninterrupted run's", "**not** identical")
    startup: str = "`import mobilevit` takes {above:.2f} s beyond `import torch`; `mobilevit --help` {help:.2f} s."


ENGLISH = Words()
CHINESE = Words(
    nothing="尚未测量：运行 `python benchmarks/inference.py` 及同目录下的其他脚本后，此表自动填写。",
    inference="推理，{model}，batch {batch}",
    engine="同上，{engine}",
    training="训练，XXS，{size} px，张/秒",
    top1="XXS 从零训练 {epochs} 个 epoch：{images:,} 张留出花卉照片上的 top-1",
    minutes="同上，{threads} 个线程上训练加验证用时（分钟）",
    detection="XXS 从零训练 {epochs} 个 epoch：血细胞检测 AP50，BCCD 的 {images} 张测试图片",
    segmentation="XXS 从零训练 {epochs} 个 epoch：道路场景分割 mean IoU，CamVid 的 {images} 张测试图片",
    times="{value}（{ratio} 倍）",
    where=(
        "括号内为本项目的速度是对方的几倍。推理行是 eager 模式、float32、256 x 256 输入下单次前向的耗时中位数，"
        "本项目取 `fuse` 之后的模型；其下各行是双方导出到同一引擎、按各自用户的用法运行的结果。"
        "测试环境：{processor}，{threads} 线程；PyTorch {torch}，timm {timm}，"
        "transformers {transformers}；{date}。[波动范围、命令与全部数据](docs/benchmarks.md)。"
    ),
    resume="训练中随机时刻 SIGKILL {kills} 次并逐次恢复：权重{identical}，损坏文件 {corrupt} 个。",
    identical=("与未中断的训练逐位一致", "**不**一致"),
    startup="`import mobilevit` 比 `import torch` 多用 {above:.2f} 秒；`mobilevit --help` 用时 {help:.2f} 秒。",
)


def short_table(results: Results, words: Words) -> str:
    """What a reader of the README wants to know: this package beside the others, a row a measurement."""
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
                rows.append(_engine_row(words.engine.format(engine=engine_name), measured["milliseconds"]))
    if speed := results.get("training_speed"):
        row = [words.training.format(size=speed["image_size"]), number(speed["figures"]["mobilevit"])]
        for peer in ("timm", "timm channels_last"):
            ratio = number(speed["ratios"][f"faster than {peer}"])
            row.append(words.times.format(value=number(speed["figures"][peer]), ratio=ratio))
        rows.append([*row, ""])
    if ours := results.get(FLOWERS["mobilevit"]):
        runs = {side: results.get(name) for side, name in FLOWERS.items()}
        alike = {side: run for side, run in runs.items() if run and run["epochs"] == ours["epochs"]}
        said = {"images": ours["validation_images"], "epochs": ours["epochs"]}
        accuracies = [words.top1.format(**said)]
        for side in FLOWERS:
            run = alike.get(side)
            accuracies.append(percent(run["last_epoch_top1"]) if run else "")
        minutes = [words.minutes.format(threads=ours["hardware"]["threads"]), f"{ours['minutes']:.1f}", "", ""]
        rows += [[*accuracies, ""], [*minutes, ""]]
    for name, text, figure in (
        (FROM_SCRATCH["detection"], words.detection, "ap50"),
        (FROM_SCRATCH["segmentation"], words.segmentation, "miou"),
    ):
        if run := results.get(name):
            what = text.format(epochs=run["epochs"], images=run["test_report"]["num_images"])
            rows.append([what, percent(run["test"][figure]), "", "", ""])
    if not rows:
        return words.nothing
    measured = results.get("inference") or next(r for r in results.values() if "packages" in r)
    said = {"date": measured["date"], **measured["hardware"], **measured["packages"]}
    processors = dict.fromkeys(short_processor(r["hardware"]["processor"]) for r in results.values() if "hardware" in r)
    notes = [words.where.format(**{**said, "processor": " / ".join(processors)})]
    if resume := results.get("resume"):
        identical = words.identical[0 if resume["identical"] else 1]
        notes.append(words.resume.format(kills=resume["kills"], identical=identical, corrupt=resume["corrupt_files"]))
    if startup := results.get("startup"):
        above, help_s = max(startup["import_mobilevit_above_torch_s"], 0), startup["help_s"]
        notes.append(words.startup.format(above=above, help=help_s))
    return "\n".join([table(words.head, rows), "", *(f"- {note}" for note in notes)])


def _engine_row(what: str, milliseconds: dict[str, float]) -> list[str]:
    """The best of ours, and of what timm's users get without streams of their own."""
    ours = min(value for side, value in milliseconds.items() if side.startswith("mobilevit"))
    timm = min(value for side, value in milliseconds.items() if side in ("timm", "timm by ONNX"))
    return [what, f"{number(ours)} ms", f"{number(timm)} ms ({number(round(timm / ours, 2))} x)", "", ""]


# -- the full tables of docs/benchmarks.md ----------------------------------------------------------------------------


def full_tables(results: Results) -> str:
    """Every figure, with spread, hardware, versions and command."""
    return sections_of(results, SECTIONS)


def sections_of(results: Results, sections: tuple[Section, ...]) -> str:
    """Those of which there is some result file."""
    parts = [section.text(results) for section in sections if any(name in results for name in section.names)]
    return "\n\n".join(parts) or "No result files yet; the commands above write them."


@dataclass(frozen=True, kw_only=True)
class Section:
    """One measurement of the full page."""

    title: str
    names: tuple[str, ...]
    """Result files it is made of."""
    what: str
    """What the figures are, in a sentence or two."""
    body: Callable[[Results], str] = field(repr=False)

    def text(self, results: Results) -> str:
        """Heading, explanation, tables, circumstances."""
        found = [name for name in self.names if name in results]
        return "\n\n".join([f"## {self.title}", self.what, self.body(results), circumstances(results, found)])


def inference_tables(results: Results) -> str:
    parts = []
    for case, figures in results["inference"]["figures"].items():
        model, batch = case.split(" batch ")
        rows = []
        for side in SIDES:
            low, high = figures["spread"][side]
            ratio = figures["fused is"].get(f"faster than {side}")
            rows.append(
                [
                    side,
                    number(figures["milliseconds"][side]),
                    f"{number(low)} to {number(high)}",
                    number(ratio) if ratio else "1",
                ]
            )
        head = ("", "median, ms", "fastest to slowest round, ms", "time over fused")
        parts.append(f"### {SHORT_NAMES.get(model, model)}, batch {batch}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def engines_tables(results: Results) -> str:
    """What each engine makes of ours and of timm's, and the machine's own limits."""
    result = results["engines"]
    rows = []
    for case, figures in result["figures"].items():
        model, rest = case.split(" batch ")
        batch, engine = rest.split(" ", 1)
        best = min((s for s in figures["milliseconds"] if s.startswith("mobilevit")), key=figures["milliseconds"].get)
        for side, milliseconds in figures["milliseconds"].items():
            ratio = figures["best of ours is"].get(f"faster than {side}")
            rows.append(
                [
                    f"{engine}, {SHORT_NAMES[model]}, batch {batch}",
                    f"**{side}**" if side == best else side,
                    number(milliseconds),
                    " to ".join(map(number, figures["spread"][side])),
                    number(ratio) if ratio else "",
                ]
            )
    limits = ", ".join(f"{name} {number(value)}" for name, value in result["limits"].items())
    head = ("", "", "median, ms", "fastest to slowest round, ms", "time over best of ours")
    return f"{table(head, rows)}\n\nLimits of the machine, measured in the same run: {limits}."


def quantization_tables(results: Results) -> str:
    """Accuracy before and after, then size and time."""
    result = results["quantization"]
    parts = []
    for task, entry in result["tasks"].items():
        shown = [key for key in ("top1", "ap50", "ap", "miou") if key in entry["float"]]
        rows = [["PyTorch, float32", *(f"{entry['float'][key]:.4f}" for key in shown), "", ""]]
        for name, after in entry["formats"].items():
            if "failed" in after:
                rows.append([name, *["failed" for _ in shown], "", ""])
                continue
            values = [f"{after[key]:.4f}" for key in shown]
            rows.append([name, *values, percent(after["agreement"], 2), number(after["megabytes"])])
        told = f"{entry['measured on']}; calibrated on {entry['calibrated on']}. Agreement {entry['agreement']}."
        parts.append(f"### {task.capitalize()}\n\n{told}\n\n{table(('', *shown, 'agreement', 'MB'), rows)}")
    for model, entry in result["latency"].items():
        rows = [
            [
                name,
                number(milliseconds),
                " to ".join(map(number, entry["spread"][name])),
                number(entry["megabytes"][name]) if name in entry["megabytes"] else "",
            ]
            for name, milliseconds in entry["milliseconds"].items()
        ]
        head = ("", "median, ms", "fastest to slowest round, ms", "MB")
        parts.append(f"### {SHORT_NAMES[model]}: {entry['unit']}\n\n{table(head, rows)}")
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
    speed = results["training_speed"]
    rows = []
    for side, images_per_second in speed["figures"].items():
        ratio = speed["ratios"].get(f"faster than {side}")
        rows.append([side, number(images_per_second), number(ratio) if ratio else "1"])
    return table(("", "images/s, median", "step time over mobilevit's"), rows)


def flowers_tables(results: Results) -> str:
    runs = {side: results[name] for side, name in FLOWERS.items() if name in results}
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
                f"{run['minutes']:.1f}" if side == "mobilevit" else "",  # a control may share the machine
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
    for task, name in FROM_SCRATCH.items():
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
                f"### {heading}",
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
            "pr-curves.png": "Precision against recall on the validation images, a curve a class",
        },
    ),
    "segmentation": (
        "Road scenes: masks",
        {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_class_accuracy": "mean class accuracy"},
        {"iou": "IoU", "accuracy": "accuracy", "share": "share of the pixels"},
        {
            "curves.png": "Training loss, mean IoU on the validation images and learning rate by epoch",
            "per-class-iou.png": "Bars of IoU by class on the validation images",
        },
    ),
}  # fmt: skip
"""By task: heading; figures by key, the deciding one first; figures of each class by key; plots and what they show."""


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
    return table(("task", "on images held out", "epochs", "seconds in all"), rows)


def resume_table(results: Results) -> str:
    resume = results["resume"]
    row = [str(resume["kills"]), "yes" if resume["identical"] else "no", str(resume["corrupt_files"])]
    return table(("kills", "weights identical to an uninterrupted run's", "files that could not be read back"), [row])


def startup_table(results: Results) -> str:
    startup = results["startup"]
    rows = [
        ["`import mobilevit`, beyond `import torch`", f"{startup['import_mobilevit_above_torch_s']:.2f}"],
        ["`mobilevit --help`", f"{startup['help_s']:.2f}"],
    ]
    if "import_torch_s" in startup:
        rows.append(["`import torch`, for comparison", f"{startup['import_torch_s']:.2f}"])
    return table(("", "seconds, median"), rows)


SECTIONS = (
    Section(
        title="Inference",
        names=("inference",),
        what=(
            "Eager PyTorch, float32, 256 x 256, random weights and images, time of one forward pass. All sides take "
            "turns in one process, so a slow moment of the machine meets all of them. `mobilevit` is the model as "
            "built, `mobilevit fused` after `mobilevit.fuse`; both get channels-last images, as `Predictor` feeds "
            "them. `timm` and `transformers` are the models their libraries build, in eval mode; `timm channels_last` "
            "is timm's with model and images in that layout."
        ),
        body=inference_tables,
    ),
    Section(
        title="Engines on the CPU",
        names=("engines",),
        what=(
            "The same networks in ONNX Runtime, OpenVINO and PyTorch, 256 x 256, random weights. timm's model runs as "
            "its users run it, one batch through all threads, and, for honesty, also in streams of small chunks, one "
            "thread each, as this package's sessions run several images. The fastest of ours is in bold."
        ),
        body=engines_tables,
    ),
    Section(
        title="Smaller numbers",
        names=("quantization",),
        what=(
            "XXS trained on small public sets, calibrated on training images, measured on others. Which layers stay "
            "in floating point was chosen on the flowers held out, so that their figures flatter it a little. Times "
            "are of random weights."
        ),
        body=quantization_tables,
    ),
    Section(
        title="Runtimes for phones",
        names=("mobile_runtimes",),
        what=(
            "ExecuTorch and LiteRT, both through XNNPACK, beside fused PyTorch in the same process; 256 x 256, one "
            "image, random weights. Measured on a server's processor: what a phone makes of these files is another "
            "matter, but they run the same kernels there."
        ),
        body=mobile_table,
    ),
    Section(
        title="Training speed",
        names=("training_speed",),
        what=(
            "Whole training steps of XXS on the CPU: forward, loss, backward, AdamW, weight average. Every side runs "
            "the same code; only the network differs. The last column is the median of the rounds' own ratios."
        ),
        body=training_table,
    ),
    Section(
        title="Flowers from scratch",
        names=tuple(FLOWERS.values()),
        what=(
            "XXS without pretrained weights on a folder of flower photographs in five classes, scaled to 128 x 128; a "
            "fifth of each class is held out. timm's model goes through the same loop, data, settings and seed as a "
            "control. Minutes are from start to finish, validation after every epoch included. The best epoch is "
            "chosen on the validation images themselves, so the last epoch's figure is the fairer one. Crop, batch, "
            "learning rate, MixUp and clipping were chosen over a few earlier runs on the same images, most of them "
            "with this package's model, so both figures flatter it a little. One seed; the "
            "standard error is that of a share of so many images."
        ),
        body=flowers_tables,
    ),
    Section(
        title="Detection and segmentation from scratch",
        names=tuple(FROM_SCRATCH.values()),
        what=(
            "XXS without pretrained weights on two small public sets. BCCD: 364 microscope images of blood, 205 to "
            "train on, 87 to validate and 72 to test, with boxes of three kinds of cells. CamVid: 701 frames of road "
            "scenes at 480 x 360, 367, 101 and 233, with masks of eleven classes. The validation part chose the best "
            "epoch; the test part was measured with those weights. One seed. The settings were tried once before, over "
            "a few epochs. Precision and recall are at the score with the best F1 on the images measured. On the "
            "same division of CamVid, SegNet-Basic reached a mean IoU of 46.4 % and ENet 51.3 %, as the paper of ENet "
            "reports ([arXiv:1606.02147](https://arxiv.org/abs/1606.02147)); their training differs from this one."
        ),
        body=from_scratch_tables,
    ),
    Section(
        title="From a detector's output to objects",
        names=("postprocessing",),
        what=(
            "One image of 320 x 320, 3,232 anchors, 80 classes and the background, after the fused XXS. Fresh "
            "weights call every anchor equally likely to be anything, the hardest case; a trained detector is sure of "
            "the background almost everywhere. Medians of rounds in turn with the forward pass."
        ),
        body=postprocessing_table,
    ),
    Section(
        title="The demo",
        names=DEMOS,
        what=(
            "`mobilevit demo` on its built-in scenes: drawing, training XXS from nothing, evaluation, prediction and "
            "report."
        ),
        body=demo_table,
    ),
    Section(
        title="Killed and resumed",
        names=("resume",),
        what=(
            "A short run is killed by SIGKILL at random moments, resumed each time, and compared with the same run "
            "left alone."
        ),
        body=resume_table,
    ),
    Section(
        title="Start",
        names=("startup",),
        what="Fresh processes. `import mobilevit` here includes loading `create_model`, `fuse` and `save`.",
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
        [table(("", "images/s, median"), rows), f"Several over one, median of rounds: {found['several over one']:.2f}"]
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
    head = ("", *(f"{size} px" for size in sizes), "updates", "seconds an epoch")
    seeds_of = {len(seeds) for seeds in figures.values()}
    lines = [table(head, rows)]
    counted = f"{min(seeds_of)}" if len(seeds_of) == 1 else f"{min(seeds_of)} to {max(seeds_of)}"
    images = next(iter(next(iter(figures.values())).values()))["validation_images"]
    lines.append(
        f"Runs of each: {counted}; {results['experiments']['epochs']} epochs; {images} images held out, so one "
        "standard error of a figure near 60 % is about "
        f"{100 * (0.24 / images) ** 0.5:.1f} points."
    )
    if "experiments_time" in results:
        latency = results["experiments_time"]["latency_ms_eager_256"]
        lines.append(
            "One image of 256 pixels through the fused model, eager, milliseconds: "
            + ", ".join(f"{name} {number(value)}" for name, value in latency.items())
            + "."
        )
    return "\n\n".join(lines)


def samplers_table(results: Results) -> str:
    found = results["experiments_samplers"]
    sizes = [str(size) for size in found["test_sizes"]]
    rows = []
    for name, run in found["figures"].items():
        for what, key in (("as trained", "top1"), ("statistics of the test size", "top1_renewed")):
            rows.append([name, f"{run['updates']:,}", what, *(percent(run[key][size]) for size in sizes)])
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
    head = ("sampler, 8 x 128 images", "steps an epoch", "in 300 epochs", "updates, relative", "pixels, relative")
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
        "if one GPU learns from so many images of 256 pixels a second",
        "hours, one size", "hours, multi-scale", "cores to read, for each GPU", "MB/s, all GPUs",
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
        "MB of one process",
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
        "ONNX Runtime natively, 1 thread": "native, 1 threads",
        "2 threads, natively": "native, 2 threads",
    }
    rows = [[name, *(number(sides[key]) for key in columns.values())] for name, sides in found["figures"].items()]
    parts = [table(("", *columns), rows)]
    parts.append(f"Chromium {found['chromium']}, ONNX Runtime Web {found['onnxruntime-web']}.")
    return "\n\n".join([*parts, circumstances(results, ["browser"])])


AT_SCALE = (
    Section(
        title="Measured: reading",
        names=("data_pipeline",),
        what=(
            "JPEGs of 500 pixels become training batches: random crop, flip, normalized float32. One reading process; "
            "its images a second, beside what others' loaders make of the same files in the same run."
        ),
        body=pipeline_table,
    ),
    Section(
        title="Measured: processes",
        names=("processes",),
        what=(
            "The same training on two cores: one process with two threads, or two by torchrun with one each and half "
            "the batch."
        ),
        body=processes_table,
    ),
    Section(
        title="Measured: bf16 on a CPU",
        names=("training_speed", "training_speed_bf16"),
        what="Training steps of mobilevit_xxs on two cores. Where bf16 is slower, `--amp auto` leaves it off.",
        body=bf16_table,
    ),
    Section(
        title="Measured: the paper's choices",
        names=("experiments", "experiments_time"),
        what=(
            "mobilevit_xxs from scratch on 4,317 flowers at 128 pixels, one thing changed at a time; top-1 on images "
            "held out, at five sizes. A small set and few epochs: what differs by less than two standard errors says "
            "nothing, and what holds for ImageNet need not show here. At 128 pixels, no change but the sampler's moves "
            "top-1 by more than one standard error; larger patches are cheaper, and within the noise as good.\n\n"
            "![accuracy by test size, and with one thing changed](images/experiments.png)"
        ),
        body=experiments_table,
    ),
    Section(
        title="Measured: what several sizes cost",
        names=("experiments_samplers",),
        what=(
            "Why several sizes look worse above, far from 128 pixels most of all. The same flowers; more epochs, to "
            "make up for the fewer updates; and BatchNorm with mean and variance of the training images at the size "
            "of the test, instead of those collected over all sizes, between feature maps of 2 x 2 and 6 x 6 cells. "
            "With as many updates, which take about as long, and such statistics, several sizes are as good as one at "
            "every test size, and better at the smallest. The paper's sizes differ by a factor of two, these by three."
        ),
        body=samplers_table,
    ),
    Section(
        title="ImageNet on eight GPUs, worked out",
        names=("imagenet_costs",),
        what=(
            "Steps are counted by the sampler itself on 1,281,167 images; the relative costs follow. Hours depend on "
            "what your GPU does in a second, which `--dry-run` measures and no GPU was here to tell. Cores follow from "
            "the measured reading of one, storage and network from the 138 GB of the published archive, memory from "
            "what a real step keeps for its backward pass. One node needs 138 GB of disk, or the network in the "
            "table; gradients exchanged in a step are 4 bytes a parameter, 5 to 22 MB."
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
            ["the client's share of the cores", *(percent(found[name]["client_share_of_cpu"]) for name in names)],
        ]
        lines.append(table(("", *(engines[name] for name in names)), rows))
    if "overload" in parts:
        found = parts["overload"]
        statuses, memory = found["statuses"], found["megabytes"]
        lines.append(
            f"Four times what it can answer, {number(found['offered_per_second'])} requests a second for "
            f"{number(found['minutes'])} minutes: {statuses.get('200', 0):,} answered, {statuses.get('503', 0):,} "
            f"refused with status 503, {found['lost']} lost; {_percentiles(found)} ms (p50, p95, p99) of these. "
            f"Memory of all processes in the second minute {number(memory['second_minute'])} MB, in the last "
            f"{number(memory['last_minute'])} MB ({100 * memory['growth']:+.1f} %)."
        )
    if "fuzz" in parts:
        found = parts["fuzz"]
        kinds = ", ".join(found["outcomes"])
        lines.append(
            f"{found['uploads']:,} mutated uploads ({kinds}): {len(found['server_errors'])} answered by 5xx other than "
            f"503, {found['tracebacks_in_the_log']} tracebacks, the same processes afterwards: "
            f"{'yes' if found['same_processes_afterwards'] else 'no'}."
        )
    if "schemathesis" in parts:
        found = parts["schemathesis"]
        verdict = "nothing found" if found["exit_status"] == 0 else f"findings: {'; '.join(found['summary'])}"
        lines.append(f"Schemathesis, from the service's own OpenAPI document: {verdict}.")
    if "sigterm" in parts:
        runs = parts["sigterm"]["runs"]
        lines.append(
            f"SIGTERM under load, {len(runs)} times: {sum(run['answered'] for run in runs):,} requests answered, "
            f"{sum(run['accepted_and_lost'] for run in runs)} accepted and lost, "
            f"{sum(run['connections_reset_before_acceptance'] for run in runs)} reset before they were read; "
            f"ended within {max(run['seconds_to_stop'] for run in runs):.1f} s."
        )
    if "kill" in parts:
        runs = parts["kill"]["runs"]
        lines.append(
            f"SIGKILL of one of {parts['kill']['workers']} workers under load, {len(runs)} times: replaced within "
            f"{max(run['seconds_until_replaced'] for run in runs):.1f} s, the other one answering meanwhile; "
            f"connections that died with it: {', '.join(str(run['connections_that_died_with_it']) for run in runs)}."
        )
    commands = dict.fromkeys(public(part["command"]) for part in parts.values())
    told = [f"- `benchmarks/results/serving.json`: {', '.join(f'`{command}`' for command in commands)}"]
    return "\n\n".join([*lines, "\n".join([*told, f"- {machine(results['serving'])}"])])


def _spread(values: list[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


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
            "engine alone, a batch on each core, images/s",
            *(number(run["engine_side_by_side_per_second"]) for run in runs.values()),
        ],
        ["`Predictor.stream`, images/s", *(number(run["stream_per_second"]) for run in runs.values())],
        ["seconds, with opening the model", *(number(run["seconds"]) for run in runs.values())],
        *(
            [f"memory, {when}, MB", *(number(run["memory_mb"][when]) for run in runs.values())]
            for when in ("half way", "near its end", "peak")
        ),
    ]
    killed = figures["killed"]
    told = (
        f"Killed by SIGKILL and started again: {killed['rows kept']:,} rows were kept, "
        f"{killed['rows made by the second run']:,} made, {killed['rows']:,} in all, each image once."
    )
    return "\n\n".join([table(("", *runs), rows), told, circumstances(results, ["bulk"])])


def circumstances(results: Results, names: list[str]) -> str:
    """Where and how the figures of some result files came about; said once where it is the same."""
    lines: list[str] = []
    for name in names:
        result = results[name]
        if "command" in result:
            lines.append(f"- `benchmarks/results/{name}.json`: `{public(result['command'])}`")
    machines = dict.fromkeys(machine(results[name]) for name in names if "hardware" in results[name])
    return "\n".join([*lines, *(f"- {text}" for text in machines)])


def machine(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    parts = [hardware["processor"], f"{hardware['threads']} threads", *hardware["gpus"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return f"{', '.join(parts)}; {versions}; {result['date']}"


def public(command: str) -> str:
    """A command without the folders of the machine it ran on."""
    return re.sub(r"(--data|--out)[ =]\S+", r"\1 FOLDER", command)


# -- text -------------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def short_processor(text: str) -> str:
    """The name without the list of instruction sets."""
    return ", ".join(text.split(", ")[:2])


PAGES: dict[str, Callable[[Results], str]] = {
    "README.md": lambda results: short_table(results, ENGLISH),
    "README.zh-CN.md": lambda results: short_table(results, CHINESE),
    "docs/benchmarks.md": full_tables,
    "docs/bulk.md": bulk_tables,
    "docs/serving.md": serving_tables,
    "docs/browser.md": lambda results: browser_table(results) if "browser" in results else "Not measured yet.",
    "docs/training-at-scale.md": lambda results: sections_of(results, AT_SCALE),
}


if __name__ == "__main__":
    main()
