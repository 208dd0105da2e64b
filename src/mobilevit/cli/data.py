"""`mobilevit data`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from mobilevit.cli.errors import UsageError
from mobilevit.cli.printing import print_json, print_rows

if TYPE_CHECKING:
    from mobilevit.card import TaskName


@dataclass(frozen=True, kw_only=True)
class Data:
    """Check labeled data, or pack them for training: `data check DIR`, `data shard DIR --out DIR`.

    Check counts what is in the data, finds what is wrong and draws a sheet of labeled images. Shard writes tar files in
    WebDataset's format, with an index: few large files instead of many small ones, for network file systems, object
    stores and spinning disks.
    """

    action: Positional[Literal["check", "shard"]]
    """Action to take."""
    path: Positional[str]
    """Labeled images, as for training."""
    task: Literal["auto", "classification", "detection", "segmentation"] = "auto"
    """auto: the task that the data are labeled for; shards are for classification."""
    out: Path | None = None
    """check: the sheet to draw; data-check.png if not given. shard: the folder to write."""
    max_mb: float = 256.0
    """shard: size of a tar file in megabytes."""
    shorter_side: int | None = None
    """shard: shrink images whose shorter side is longer than this, as JPEG of quality 95; all others are copied."""
    val_fraction: float | None = None
    """shard: share of every class for a val part, if the data are not divided; otherwise all is one part."""
    seed: int = 0
    """shard: decides the order of the images, and their division into parts, as it does in training."""
    overwrite: bool = False
    """shard: replace the shards in the folder."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Check or pack, and print the report."""
        task = None if self.task == "auto" else self.task
        if self.action == "shard":
            return self._shard(task)
        from mobilevit.data.check import check, contact_sheet
        from mobilevit.imaging.drawing import save_image

        out = self.out or Path("data-check.png")
        report = check(self.path, task)
        save_image(contact_sheet(report.splits), out)
        if self.json:
            print_json(report.to_dict())
        else:
            print(*report.headline(), sep="\n")
            print_rows(*report.table())
            print(*report.problem_lines(), sep="\n")
            print(f"\nlabeled images: {out}")
        return 0

    def _shard(self, task: TaskName | None) -> int:
        from mobilevit.data.shard_writing import write_shards

        if self.out is None:
            raise UsageError("`out` names the folder to write the shards into; give it")
        report = write_shards(
            self.path,
            self.out,
            task=task,
            max_bytes=round(self.max_mb * 1e6),
            shorter_side=self.shorter_side,
            val_fraction=self.val_fraction,
            seed=self.seed,
            overwrite=self.overwrite,
        )
        if self.json:
            print_json(asdict(report))
        else:
            print(*report.lines(), sep="\n")
        return 0
