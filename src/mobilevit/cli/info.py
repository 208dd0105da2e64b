"""`mobilevit info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

import mobilevit
from mobilevit.card import ModelCard, card_of
from mobilevit.cli.options import height_and_width
from mobilevit.cli.printing import print_json, print_rows
from mobilevit.errors import some
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.runtime.artifact import Artifact, artifact_files, is_artifact, read_sidecar

if TYPE_CHECKING:
    from mobilevit.models import Model
    from mobilevit.models.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print the layers of a model and what attention costs in each block, or the description of an exported file."""

    model: Positional[str]
    """A model's name, a checkpoint, or an exported file."""
    task: Literal["classification", "detection", "segmentation"] = "classification"
    """Task of a named model; a file has its own."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. Default: by task, or what the checkpoint was made for."""
    patch_size: tuple[int, int, int] | None = None
    """Patch sides of a named model at strides 8, 16 and 32."""
    output_stride: int | None = None
    """Output stride of a named model: 32, 16 or 8."""
    num_classes: int | None = None
    """Classes of a named model. Default: 1000, in detection 80, in segmentation 21."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Describe the model and print."""
        path = Path(self.model)
        if is_artifact(path):
            artifact = read_sidecar(path)
            if self.json:
                print_json({"model": self.model, **artifact.to_dict()})
            else:
                _print_artifact(path, artifact)
            return 0
        is_file = bool(path.suffix) or path.is_file()
        model = mobilevit.load(path) if is_file else self._named_model()
        card = card_of(model)
        size = height_and_width(self.image_size) or card.preprocessing.size
        Preprocessing(size=size)  # says what sizes there are
        from mobilevit.models.summary import summarize

        summary = summarize(model, size)
        if self.json:
            told = {"card": card.to_dict()} if is_file else {}
            print_json({"model": self.model, "task": card.task, **asdict(summary), **told})
            return 0
        print(f"{self.model}, {card.task}, at {size[0]} x {size[1]}")
        if is_file:
            _print_card(card)
        _print_summary(summary)
        return 0

    def _named_model(self) -> Model:
        create_model = mobilevit.create_model  # says what to install where there is no PyTorch
        import torch

        with torch.device("meta"):  # shapes, no numbers
            return create_model(
                self.model,
                task=self.task,
                num_classes=self.num_classes,
                patch_size=self.patch_size,
                output_stride=self.output_stride,
            )


def _print_artifact(path: Path, artifact: Artifact) -> None:
    size = sum(part.stat().st_size for part in artifact_files(path))
    print(f"{path}, {artifact.card.task}, {artifact.format} {artifact.precision}, {size / 1e6:.1f} MB")
    _print_card(artifact.card)
    batch = "B" if artifact.batch_size is None else artifact.batch_size
    height, width = ("H", "W") if artifact.image_size is None else artifact.image_size
    shape = (batch, height, width, 3) if artifact.baked else (batch, 3, height, width)
    print(f"input: {'uint8' if artifact.baked else 'float32'} ({', '.join(map(str, shape))})")
    print(f"outputs: {', '.join(artifact.outputs)}")


def _print_card(card: ModelCard) -> None:
    print(f"{len(card.classes)} classes: {some(card.classes, limit=8)}")
    for told in (card.metrics, card.provenance):
        if told:
            print(", ".join(f"{key} {value}" for key, value in told.items()))


def _print_summary(summary: Summary) -> None:
    print_rows(
        ["layer", "kind", "output (C, H, W)", "parameters", "MACs", "activations"],
        [
            [row.name, row.kind, " x ".join(map(str, row.shape)), *_counts(row.parameters, row.macs, row.activations)]
            for row in summary.layers
        ],
        total=["total", "", "", *_counts(summary.parameters, summary.macs, summary.activations)],
    )
    print("\nOne product of queries and keys, in multiply-adds; C is the transformer's width")
    separable = all(block.separable_cost_per_channel for block in summary.attention)
    rows = []
    for block in summary.attention:
        (h, w), (ph, pw) = block.map_size, block.patch_size
        p, n = block.num_sequences, block.num_tokens
        cost = block.separable_cost_per_channel or block.cost_per_channel
        rows.append([
            block.name, f"{h} x {w}", f"{ph} x {pw}", str(block.embed_dim),
            f"{h * w} * {h * w} * C = {block.plain_cost_per_channel:,} C",
            f"{p} * {n} * {n} * C = {block.cost_per_channel:,} C",
            *([f"{p} * {n} * C = {cost:,} C"] if separable else []),
            f"{block.plain_cost_per_channel / cost:.0f} x",
        ])  # fmt: skip
    columns = ["block", "map", "patch", "C", "plain attention", "same-offset attention"]
    print_rows([*columns, *(["separable attention"] if separable else []), "saved"], rows)


def _counts(*numbers: int) -> list[str]:
    return [f"{number:,}" for number in numbers]
