"""How long `import mobilevit` takes beyond `import torch`, and `mobilevit --help`: medians of fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import record


def main() -> None:
    codes = {
        "torch": "import torch",
        "both": "import torch; import mobilevit; mobilevit.create_model; mobilevit.fuse; mobilevit.save",
        "help": "from mobilevit.cli import main; main(['--help'])",
    }
    times: dict[str, list[float]] = {name: [] for name in codes}
    for number in range(8):
        for name, code in codes.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            if number:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        "import_mobilevit_above_torch_s": round(median["both"] - median["torch"], 3),
        "help_s": round(median["help"], 3),
        "import_torch_s": round(median["torch"], 3),
        "note": "import mobilevit includes loading create_model, fuse and save, which are loaded on first use",
    }
    print(figures)
    record.write("startup", figures)


if __name__ == "__main__":
    main()
