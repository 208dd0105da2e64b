"""What `mobilevit demo` reaches on its built-in scenes, and how long it takes with everything.

python benchmarks/demo.py --task detection
python benchmarks/demo.py --task detection --from demo     # of a demo that has been run here
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

import record
from mobilevit.demo import run_demo

SCORES = {
    "classification": {"top1": "top-1"},
    "detection": {"ap50": "AP50", "ap": "AP"},
    "segmentation": {"miou": "mean IoU", "pixel_accuracy": "pixel accuracy"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(SCORES), default="classification")
    parser.add_argument("--from", dest="demo", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        take(arguments.task, arguments.demo)
        return
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        run_demo(demo, arguments.task, epochs=None, num_images=None, seed=0)
        take(arguments.task, demo)


def take(task: str, demo: Path) -> None:
    evaluation = json.loads((demo / "run" / "evaluation.json").read_text())
    config = json.loads((demo / "run" / "config.json").read_text())
    if config["task"] != task:
        raise SystemExit(f"{demo}: a demo of {config['task']}")
    seconds = re.search(r"time in all</th><td>([\d,]+) s", (demo / "report.html").read_text())
    assert seconds is not None
    figures = {
        "scores": {text: evaluation[name] for name, text in SCORES[task].items()},
        "validation_images": evaluation["num_images"],
        "epochs": config["epochs"],
        "seconds": int(seconds[1].replace(",", "")),
    }
    print(figures)
    record.write(f"demo-{task}", figures)


if __name__ == "__main__":
    main()
