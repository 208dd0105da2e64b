"""Figures of the code itself: lines, `Any`, comparisons of the task's name, long functions, files of a training step.

python benchmarks/code_figures.py --before ../mobilevit-0.1/src
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parent.parent

_FIRST_STEP = """
import inspect, json, sys
from pathlib import Path
import mobilevit
from mobilevit.cli import main
from mobilevit.training.learner import Learner

home = str(Path(mobilevit.__file__).parent)
files, functions = set(), set()

class Done(Exception):
    pass

def watch(frame, event, _):
    code = frame.f_code
    # Bodies of classes run when their file is imported; only functions have fast locals.
    is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
    if event == "call" and is_function and code.co_filename.startswith(home):
        files.add(code.co_filename)
        functions.add((code.co_filename, code.co_qualname))
    if event == "return" and code is Learner.step.__code__:
        sys.setprofile(None)
        print("FIGURES" + json.dumps([sorted(files), len(functions)]), flush=True)
        raise Done

sys.setprofile(watch)
main(["train", "--data", sys.argv[1], "--out", sys.argv[2], "--epochs", "1", "--image-size", "32", "--batch-size", "8",
      "--num-workers", "0", "--device", "cpu"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder src of version 0.1")
    options = parser.parse_args()
    figures = {"before": figures_of(options.before.resolve()), "after": figures_of(ROOT / "src")}
    print(json.dumps(figures, indent=2))
    record.write("code_figures", figures)


def figures_of(source: Path) -> dict[str, Any]:
    texts = {path: path.read_text(encoding="utf-8") for path in source.rglob("*.py")}
    everything = "\n".join(texts.values())
    lengths = sorted(
        (
            (node.end_lineno or 0) - node.lineno + 1,
            f"{path.relative_to(source)}:{node.name}",
        )
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    files, functions = first_step(source)
    return {
        "lines": sum(text.count("\n") for text in texts.values()),
        "uses_of_any": len(re.findall(r"\bAny\b", everything)),
        "comparisons_of_the_task": len(re.findall(r"\btask (?:==|!=|in \()", everything)),
        "longest_functions": [f"{length} {name}" for length, name in lengths[:-5:-1]],
        "functions_over_60_lines": sum(length > 60 for length, _ in lengths),
        "files_to_the_end_of_the_first_step": len(files),
        "files_of_the_first_step": files,
        "functions_to_the_end_of_the_first_step": functions,
    }


def first_step(source: Path) -> tuple[list[str], int]:
    """Name the files, and count the functions, that `mobilevit train` enters until its first training step ends."""
    from mobilevit.data.shapes import write_folder

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_folder(data, num_images=24, size=32)
        told = subprocess.run(
            [sys.executable, "-c", _FIRST_STEP, str(data), f"{folder}/run"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
    found = re.search(r"FIGURES(.*)", told.stdout)
    assert found, told.stderr
    files, functions = json.loads(found[1])
    return [str(Path(file).relative_to(source / "mobilevit")) for file in files], functions


if __name__ == "__main__":
    main()
