"""`mobilevit export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mobilevit.cli.options import height_and_width
from mobilevit.cli.printing import print_json
from mobilevit.errors import MobileViTError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a file for a device; it is kept only if it agrees with the model on real images."""

    checkpoint: Positional[Path]
    """A .safetensors of this package, or a file of ml-cvnets, timm or transformers."""
    format: tuple[Literal["onnx", "openvino", "executorch", "litert", "coreml", "pt2", "web"], ...] = ("onnx",)
    """One or more: onnx (servers), openvino (Intel, ARM), executorch and litert (phones), coreml, pt2; web: a folder
    with a page that runs the model in the visitor's browser."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "palettized"] = "fp32"
    """Numbers to compute with; int8 needs --calibration."""
    out: Path | None = None
    """Folder to write to; "exported" beside the checkpoint if not given."""
    calibration: Path | None = None
    """int8: a folder of images like those the model will see."""
    keep_float: tuple[str, ...] = ()
    """int8: layers to leave in floating point, as --sensitivity names them, with all below them."""
    sensitivity: bool = False
    """int8: measure what quantizing each layer alone costs, and draw it."""
    image_size: tuple[int, ...] = ()
    """Input size in pixels: one number, or height and width. What the checkpoint was made for, if not given."""
    batch_size: int = 1
    """Images in a run."""
    dynamic: tuple[Literal["batch", "size"], ...] = ()
    """Dimensions that may change from run to run (onnx, openvino, pt2)."""
    bake_preprocessing: bool = False
    """Take uint8 (B, H, W, 3), as images are; scaling happens inside."""
    label_map: bool = False
    """Segmentation: give the class of every pixel instead of logits."""
    nms: bool = False
    """Detection to onnx: suppress overlapping boxes inside, too."""
    images: Path | None = None
    """Folder of images to compare on; built-in photographs, or those of --calibration, if not given."""
    data: str | None = None
    """Labeled images, as for training: report accuracy before and after."""
    verify: bool = True
    """Compare the file with the model, and keep it only if they agree."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Export to each format; say how each compares."""
        from mobilevit import factory
        from mobilevit.exporting.export import export

        image_size = height_and_width(self.image_size)
        if not self.format:
            raise MobileViTError(
                "`format` names no format; choose onnx, openvino, executorch, litert, coreml, pt2 or web"
            )
        model = factory.load(self.checkpoint)
        reports = [
            export(
                model,
                self.out or self.checkpoint.parent / "exported",
                format=name,
                precision=self.precision,
                calibration=self.calibration,
                keep_float=self.keep_float,
                sensitivity=self.sensitivity,
                image_size=image_size,
                batch_size=self.batch_size,
                dynamic=self.dynamic,
                bake_preprocessing=self.bake_preprocessing,
                label_map=self.label_map,
                nms=self.nms,
                images=self.images,
                verify=self.verify,
                data=self.data,
                name=self.checkpoint.stem,
            )
            for name in self.format
        ]
        if self.json:
            print_json({report.path.name: {"path": str(report.path), **report.to_dict()} for report in reports})
            return 0
        for report in reports:
            print(f"\n{report.path}  ({report.num_bytes / 1e6:.1f} MB)")
            lines = report.lines()
            width = max(len(label) for label, _ in lines)
            for label, value in lines:
                print(f"  {label:<{width}}  {value}")
        return 0
