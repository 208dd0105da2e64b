"""`mobilevit explain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.cli.printing import print_json
from mobilevit.errors import MobileViTError


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Draw what a pixel attends to in every block, layer and head, and the evidence in the image for the answer.

    MobileViTv2 has context scores in its place, the same for all pixels at the same offset in their patches.
    """

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    image: Positional[Path]
    """The image."""
    pixel: tuple[int, int] | None = None
    """x and y of the pixel to look from, from 0 at the top left. Without it, where the evidence is strongest."""
    figure: Literal["attention", "patches", "both"] = "attention"
    """attention: what the pixel attends to. patches: how this image is unfolded into sequences, for teaching."""
    out: Path = Path("explanation.png")
    """The image to write; with both, the second gets "-patches" behind its name."""
    json: bool = False
    """Print figures as JSON, too."""

    def run(self) -> int:
        """Explain, draw, print."""
        from mobilevit import factory
        from mobilevit.explaining.explain import explain
        from mobilevit.runtime.artifact import is_artifact

        if is_artifact(self.checkpoint):
            raise MobileViTError(
                f"{self.checkpoint}: an exported file cannot be explained; give the checkpoint it was exported from"
            )
        explanation = explain(factory.load(self.checkpoint), self.image, pixel=self.pixel)
        patches = self.out if self.figure == "patches" else self.out.with_stem(f"{self.out.stem}-patches")
        if self.figure != "patches":
            explanation.draw(self.out)
        if self.figure != "attention":
            explanation.draw_patches(patches)
        if self.json:
            print_json(explanation.to_dict())
            return 0
        x, y = explanation.pixel
        told, verb = "attention", "attends to"
        if explanation.blocks[0].separable:
            told, verb = "context scores at the offset", "scores spread over"
        print(f"{explanation.label}  {explanation.score:.1%}, {told} of pixel {x} {y}")
        for block in explanation.blocks:
            (ph, pw), spread = block.patch_size, block.attended().mean(axis=1)
            means = ", ".join(f"{value:.1f}" for value in spread)
            print(f"  {block.name}, patches of {ph} x {pw}: {verb} {means} of {block.num_tokens} patches, by layer")
        for path, drawn in ((self.out, self.figure != "patches"), (patches, self.figure != "attention")):
            if drawn:
                print(path)
        return 0
