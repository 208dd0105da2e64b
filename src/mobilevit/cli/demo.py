"""`mobilevit demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train, evaluate, export and predict on built-in images: some minutes on two cores, no download."""

    task: Literal["classification", "detection", "segmentation"] = "classification"
    """Task to train for."""
    model: str = "mobilevit_xxs"
    """Model to train, as in train."""
    out: Path = Path("demo")
    """Folder for data, run and report.html; a former demo in it is replaced."""
    epochs: int | None = None
    """Passes over the training images. By the task, if not given."""
    num_images: int | None = None
    """Images to draw. By the task, if not given."""
    seed: int = 0
    """Decides images and training."""

    def run(self) -> int:
        """Run the demo."""
        from mobilevit.demo import run_demo

        report = run_demo(
            self.out,
            self.task,
            model=self.model,
            epochs=self.epochs,
            num_images=self.num_images,
            seed=self.seed,
        )
        print(f"\nopen {report}")
        return 0
