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
    """A checkpoint of any of the four; its origin is recognized."""
    target: Positional[Path]
    """The .safetensors file to write."""
    to: Literal["mobilevit", "cvnets", "timm", "transformers"] = "mobilevit"
    """Origin whose names and channel order to write."""
    source_channel_order: Literal["rgb", "bgr"] | None = None
    """rgb: keep the order of the input channels; bgr: reverse it. Default: by the conventions of the two origins."""

    def run(self) -> int:
        """Convert, and print what was recognized."""
        from mobilevit import factory
        from mobilevit.weights import checkpoint
        from mobilevit.weights.convert import convert_state_dict, recognize, unwrap_state_dict

        if self.target.suffix != ".safetensors":
            raise MobileViTError(f"{self.target}: name the target .safetensors")
        content, _ = checkpoint.read(self.source)
        state = unwrap_state_dict(content)
        if self.to == "mobilevit" and self.source_channel_order is None:
            checkpoint.save(factory.load(self.source), self.target)
        else:
            converted = convert_state_dict(state, to=self.to, source_channel_order=self.source_channel_order)
            checkpoint.save_tensors(converted, self.target)
        print(f"{self.source} ({recognize(state)[0]}) -> {self.target} ({self.to})")
        return 0
