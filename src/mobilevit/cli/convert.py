"""`mobilevit convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.errors import MobileViTError


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint between this package, ml-cvnets, timm and transformers."""

    source: Positional[Path]
    """A checkpoint of any of the four; which one is recognized."""
    target: Positional[Path]
    """The .safetensors to write."""
    to: Literal["mobilevit", "cvnets", "timm", "transformers"] = "mobilevit"
    """Whose names and channel order to write."""
    source_channel_order: Literal["rgb", "bgr"] | None = None
    """rgb: leave the stem's channels as they are; bgr: turn them round. Without it, by the families' conventions."""

    def run(self) -> int:
        """Convert and say what was recognized."""
        from safetensors.torch import save as serialize

        from mobilevit import factory
        from mobilevit.files import write_bytes
        from mobilevit.weights import checkpoint
        from mobilevit.weights.convert import convert_state_dict, detect_family, unwrap_state_dict

        if self.target.suffix != ".safetensors":
            raise MobileViTError(f"{self.target}: name the target .safetensors")
        content, _ = checkpoint.read(self.source)
        state = unwrap_state_dict(content)
        family = detect_family(state)
        if self.to == "mobilevit" and self.source_channel_order is None:
            checkpoint.save(factory.load(self.source), self.target)
        else:
            converted = convert_state_dict(state, to=self.to, source_channel_order=self.source_channel_order)
            tensors = {key: value.contiguous() for key, value in converted.items()}
            write_bytes(self.target, serialize(tensors, {"format": "pt"}))
        print(f"{self.source} ({family}) -> {self.target} ({self.to})")
        return 0
