"""`mobilevit eval`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.cli.printing import print_json, print_report

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a checkpoint on labeled images: accuracy, AP or mean IoU, per class, with plots and mistakes."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, a file of ml-cvnets, timm or transformers, or an exported file."""
    data: str
    """Labeled images, as for training."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """auto: the val part if there is one; of the data it was trained on, what was held out; of other data, all."""
    out: Path | None = None
    """Folder for plots and images; beside the checkpoint if not given."""
    batch_size: int = 32
    """Images that go through the model together."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    engine: Literal["torch", "compile", "auto"] = "torch"
    """Engine of a checkpoint; auto: the fastest that `mobilevit tune` found."""
    trust_pt2: bool = False
    """Load a .pt2 file, although that can run code that came with it."""
    num_workers: int | None = None
    """Processes that read images."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        """Evaluate, print, write images."""
        from mobilevit.data.imageset import report_problems
        from mobilevit.evaluation import evaluate_session, find_part, report_unreadable, write_evaluation
        from mobilevit.runtime.session import open_session

        session = open_session(
            self.checkpoint,
            device=self.device,
            threads=self.threads,
            engine=self.engine,
            trust_pt2=self.trust_pt2,
        )
        data, which = find_part(self.data, self.split, session.card)
        log.info("%s on %s: %s, %d images", self.checkpoint, self.data, which, len(data))
        report_problems(data)
        evaluation = evaluate_session(session, data, batch_size=self.batch_size, num_workers=self.num_workers)
        out = self.out or self.checkpoint.parent / "evaluation"
        write_evaluation(evaluation, data, out)
        report_unreadable(evaluation.errors, "labeled", len(data))
        if self.json:
            print_json({"checkpoint": str(self.checkpoint), "split": which, **evaluation.report.to_dict()})
        else:
            print_report(evaluation.report)
            print(f"\nplots, samples and worst mistakes: {out}")
        return 0
