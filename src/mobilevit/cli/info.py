"""`mobilevit info`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from mobilevit.cli.options import height_and_width
from mobilevit.cli.printing import new_table, print_json, print_table

if TYPE_CHECKING:
    from mobilevit.card import ModelCard
    from mobilevit.models.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show a model's layers (shape, parameters, multiply-adds) and what attention costs in each MobileViT block."""

    model: Positional[str]
    """A model's name or a checkpoint file."""
    task: Literal["classification", "detection", "segmentation"] = "classification"
    """Of a named model; a checkpoint has its own."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. By the task, or what the checkpoint was made for."""
    patch_size: tuple[int, int, int] | None = None
    """Patch sides at strides 8, 16 and 32, of a named model."""
    output_stride: int | None = None
    """32, 16 or 8, of a named model."""
    num_classes: int | None = None
    """Classes of a named model: 1000, in detection 80, in segmentation 21."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Measure and print."""
        import torch

        from mobilevit import factory
        from mobilevit.card import card_of
        from mobilevit.imaging.preprocessing import Preprocessing
        from mobilevit.models import MODELS
        from mobilevit.models.summary import summarize

        named = self.model in MODELS or not (Path(self.model).suffix or Path(self.model).exists())
        if named:
            with torch.device("meta"):  # shapes, no numbers
                model = factory.create_model(
                    self.model,
                    task=self.task,
                    num_classes=self.num_classes,
                    patch_size=self.patch_size,
                    output_stride=self.output_stride,
                )
        else:
            model = factory.load(self.model)
        card = card_of(model)
        size = height_and_width(self.image_size) or card.preprocessing.size
        Preprocessing(size=size)  # says what sizes there are
        summary = summarize(model, size)
        if self.json:
            told = {} if named else {"card": dataclasses.asdict(card)}
            print_json({"model": self.model, "task": card.task, **summary.to_dict(), **told})
            return 0
        _print_summary(self.model, summary, card, named=named)
        return 0


def _print_summary(name: str, summary: Summary, card: ModelCard, *, named: bool) -> None:
    height, width = summary.input_size
    print(f"{name}, {card.task}, at {height} x {width}")
    if not named:
        few = ", ".join(card.classes[:8]) + (" ..." if len(card.classes) > 8 else "")
        print(f"{len(card.classes)} classes: {few}")
        for told in (card.metrics, card.provenance):
            print(", ".join(f"{key} {value}" for key, value in told.items()))
    table = new_table("layer", "kind", "output (C, H, W)", "parameters", "MACs", "activations")
    for row in summary.layers:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", f"{row.macs:,}", f"{row.activations:,}")
    table.add_section()
    table.add_row("total", "", "", f"{summary.parameters:,}", f"{summary.macs:,}", f"{summary.activations:,}")
    print_table(table)
    print("\nOne product of queries and keys, in multiply-adds; C is the transformer's width")
    table = new_table("block", "map", "patch", "C", "plain attention", "same-offset attention", "saved")
    for block in summary.attention:
        (h, w), (ph, pw) = block.map_size, block.patch_size
        p, n = block.num_sequences, block.num_tokens
        table.add_row(
            block.name, f"{h} x {w}", f"{ph} x {pw}", str(block.embed_dim),
            f"{h * w} * {h * w} * C = {block.plain_cost_per_channel:,} C",
            f"{p} * {n} * {n} * C = {block.cost_per_channel:,} C",
            f"{block.plain_cost_per_channel / block.cost_per_channel:.0f} x",
        )  # fmt: skip
    print_table(table)
