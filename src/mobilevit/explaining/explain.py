"""`explain`: the attention of a pixel in every block, and the parts of an image that led to a prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mobilevit.card import ModelCard, card_of
from mobilevit.errors import MobileViTError
from mobilevit.explaining.attention import BlockAttention, block_attention, class_activation, recording
from mobilevit.explaining.figures import attention_figure, patches_figure
from mobilevit.imaging.decode import Source, read_image
from mobilevit.imaging.drawing import save_image
from mobilevit.imaging.preprocessing import Placement
from mobilevit.models.mobilevit import Backbone
from mobilevit.models.segmenter import SegmentationOutput
from mobilevit.models.ssdlite import DetectionOutput, decode_boxes
from mobilevit.results.detection import DEFAULT_SCORE_THRESHOLD

Place = tuple[float, float]
"""(x, y) in the model's input, as shares of its width and height."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The attention of one pixel, and the evidence in an image for a prediction."""

    source: str
    """The image's file, or "image"."""
    label: str
    """The class that is explained."""
    score: float
    """Its probability."""
    pixel: tuple[int, int]
    """(x, y) of the chosen pixel, in the upright image."""
    blocks: tuple[BlockAttention, ...]
    """From fine to coarse."""
    class_activation: NDArray[np.float32]
    """(height, width) of the last map, 0 to 1: evidence for the class, by Grad-CAM (arXiv:1610.02391)."""
    placement: Placement = field(repr=False)
    """Location of the image in the model's input."""
    view: Image.Image = field(repr=False)
    """The part of the image that the model sees, with its margin, in the image's own shape and sharpness."""
    box_xyxy: tuple[float, float, float, float] | None = None
    """Detection: the object that is explained, in pixels of the upright image."""

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        """Convert a place in the upright image to the same place on `view`."""
        u, v = self.placement.to_input(np.array([[x, y] * 2]))[0, :2]
        return float(u) * self.view.width, float(v) * self.view.height

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """Draw image, class activation, and attention in every block, layer and head; write it to `path` if given."""
        x, y = self.pixel
        box = self.box_xyxy
        drawn = attention_figure(
            self.view,
            self.blocks,
            self.class_activation,
            title=f"{self.label}  {self.score:.1%}, pixel ({x}, {y})",
            place=self.to_view(x + 0.5, y + 0.5),
            corners=None if box is None else (self.to_view(*box[:2]), self.to_view(*box[2:])),
        )
        if path is not None:
            save_image(drawn, path)
        return drawn

    def draw_patches(self, path: str | Path | None = None) -> Image.Image:
        """Draw how each block cuts this image into patches and sequences, and folds it back."""
        drawn = patches_figure(self.view, self.blocks)
        if path is not None:
            save_image(drawn, path)
        return drawn

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; places are pixels of the upright image."""
        return {
            "source": self.source,
            "label": self.label,
            "score": round(self.score, 6),
            "pixel": list(self.pixel),
            "box_xyxy": None if self.box_xyxy is None else [round(edge, 1) for edge in self.box_xyxy],
            "blocks": [
                {
                    "name": block.name,
                    "stride": block.stride,
                    "map_size": list(block.map_size),
                    "map_size_before": list(block.map_size_before),
                    "patch_size": list(block.patch_size),
                    "num_tokens": block.num_tokens,
                    "separable": block.separable,
                    "patches_attended_by_layer_and_head": block.attended().round(2).tolist(),
                    "most_attended": self._most_attended(block),
                }
                for block in self.blocks
            ],
        }

    def _most_attended(self, block: BlockAttention) -> list[dict[str, float]]:
        """List the five pixels, one in a patch, with the largest share of the rollout, without the chosen one."""
        (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
        own = row // ph * (width // pw) + column // pw
        found = []
        order = np.argsort(-block.rollout, axis=None, kind="stable")
        for place in order[order != own][:5].tolist():
            down, right = divmod(place, width // pw)
            middle = np.array([[(right * pw + column % pw + 0.5) / width, (down * ph + row % ph + 0.5) / height] * 2])
            x, y = self.placement.to_image(middle)[0, :2].round(1).tolist()
            found.append({"x": x, "y": y, "weight": round(float(block.rollout[down, right]), 4)})
        return found


def explain(model: nn.Module, source: Source, pixel: tuple[int, int] | None = None) -> Explanation:
    """Show what a model looks at in an image.

    It explains the class of the image; or the strongest object, of those at the chosen pixel if there are any; or the
    class of the chosen pixel.

    Args:
        model: of any task, from `create_model` or `load`, not fused; it is put into evaluation mode.
        source: a path, encoded bytes, a PIL image, or a numpy array (H, W, 3) of uint8 RGB.
        pixel: (x, y) in the upright image; None: where the evidence for the class is strongest, else the middle.

    Raises:
        ImageError: the image cannot be read.
        MobileViTError: the pixel is not in the image, or not in the part that the model sees.
    """
    card = card_of(model)
    model.eval()
    image = read_image(source)
    placement = card.preprocessing.placement((image.height, image.width))
    place = None if pixel is None else _place_in_input(pixel, placement)
    images = torch.from_numpy(card.preprocessing.normalize(card.preprocessing.resize(image)[None]))
    backbone: Backbone = getattr(model, "backbone", model)  # type: ignore[arg-type]
    with recording(backbone) as record, torch.inference_mode(False), torch.enable_grad():
        output = model(images.to(next(model.parameters()).device))
        subject = subject_of(output, card, place)
        activation = class_activation(subject.target, record.stages)
    if place is None or pixel is None:
        place = _strongest_place(activation, placement)
        x, y = placement.to_image(np.array([place * 2]))[0, :2]
        pixel = (min(int(x), image.width - 1), min(int(y), image.height - 1))
    box = None
    if subject.box_xyxy is not None:
        left, top, right, bottom = placement.to_image(subject.box_xyxy.double().numpy(force=True)[None])[0].tolist()
        box = (left, top, right, bottom)
    return Explanation(
        source=str(source) if isinstance(source, str | Path) else "image",
        label=subject.label,
        score=subject.score,
        pixel=pixel,
        blocks=tuple(
            block_attention(f"layer{number}", block, record, place, min(2**number, backbone.config.output_stride))
            for number, block in enumerate(record.maps, start=3)
        ),
        class_activation=activation,
        placement=placement,
        view=_view(image, placement),
        box_xyxy=box,
    )


def _place_in_input(pixel: tuple[int, int], placement: Placement) -> Place:
    rows, columns = placement.image
    x, y = pixel
    if not (0 <= x < columns and 0 <= y < rows):
        raise MobileViTError(f"pixel {x} {y} is not in the image of {columns} x {rows}; count x and y from 0, top left")
    left, top, right, bottom = placement.region
    if not (left <= x + 0.5 <= right and top <= y + 0.5 <= bottom):
        raise MobileViTError(
            f"pixel {x} {y} lies outside of what the model sees; choose x from {math.ceil(left)} to {int(right) - 1} "
            f"and y from {math.ceil(top)} to {int(bottom) - 1}"
        )
    u, v = placement.to_input(np.array([[x + 0.5, y + 0.5] * 2]))[0, :2]
    return float(u), float(v)


def _strongest_place(activation: NDArray[np.float32], placement: Placement) -> Place:
    """Find the place with the most evidence for the class; the margin is left out."""
    (height, width), (rows, columns) = placement.size, activation.shape
    inside = activation.copy()
    filled_height, filled_width = placement.filled[0] / height, placement.filled[1] / width
    inside[(np.arange(rows) + 0.5) / rows > filled_height] = 0
    inside[:, (np.arange(columns) + 0.5) / columns > filled_width] = 0
    if not inside.any():
        return filled_width / 2, filled_height / 2
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    return (float(column) + 0.5) / columns, (float(row) + 0.5) / rows


def _view(image: Image.Image, placement: Placement, side: int = 512) -> Image.Image:
    """Cut out what the model sees of an image, undistorted and as sharp as it is, up to `side` pixels."""
    left, top, right, bottom = placement.region
    (height, width), (filled_height, filled_width) = placement.size, placement.filled
    across, down = (right - left) * width / filled_width, (bottom - top) * height / filled_height
    scale = side / max(across, down)
    view = Image.new("RGB", (max(1, round(across * scale)), max(1, round(down * scale))))
    shown = (round(view.width * filled_width / width), round(view.height * filled_height / height))
    view.paste(image.resize((max(1, shown[0]), max(1, shown[1])), Image.Resampling.LANCZOS, placement.region))
    return view


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The prediction that is explained."""

    label: str
    score: float
    """Its probability."""
    target: Tensor
    """The scalar whose gradient shows the evidence. Shape: ()."""
    box_xyxy: Tensor | None = None
    """Detection: the object, in 0..1 of the input. Shape: (4,)."""


def subject_of(output: Tensor | DetectionOutput | SegmentationOutput, card: ModelCard, place: Place | None) -> _Subject:
    """Choose what to explain of a model's output for one image; `place` is the pixel that the user asks about."""
    if isinstance(output, DetectionOutput):
        return _object(output, card, place)
    if isinstance(output, SegmentationOutput):
        return _segment(output, card, place)
    number = int(output[0].argmax())
    score = float(output[0].softmax(0)[number].detach())
    return _Subject(label=card.classes[number], score=score, target=output[0, number])


def _object(output: DetectionOutput, card: ModelCard, place: Place | None) -> _Subject:
    """Choose the strongest object; of those around the place, if one there is above the threshold."""
    scores = output.class_logits[0].detach().softmax(dim=-1)[:, 1:]
    boxes = decode_boxes(output.box_regression[0].detach(), output.anchors_cxcywh)
    if place is not None:
        x, y = place
        around = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        there = scores * around[:, None]
        threshold = DEFAULT_SCORE_THRESHOLD if card.score_threshold is None else card.score_threshold
        scores = there if float(there.max()) >= threshold else scores
    anchor, number = divmod(int(scores.argmax()), scores.shape[1])
    return _Subject(
        label=card.classes[number],
        score=float(scores[anchor, number]),
        target=output.class_logits[0, anchor, number + 1],
        box_xyxy=boxes[anchor],
    )


def _segment(output: SegmentationOutput, card: ModelCard, place: Place | None) -> _Subject:
    """Choose the class at the place, or the class that covers the most, as the mean over its pixels."""
    logits = output.logits[0]
    classes, height, width = logits.shape
    if place is None:
        label_map = logits.argmax(0)
        number = int(torch.bincount(label_map.flatten(), minlength=classes).argmax())
        pixels = label_map == number
    else:
        pixels = torch.zeros(height, width, dtype=torch.bool, device=logits.device)
        pixels[min(int(place[1] * height), height - 1), min(int(place[0] * width), width - 1)] = True
        number = int(logits[:, pixels].argmax())
    return _Subject(
        label=card.classes[number],
        score=float(logits.softmax(0)[number][pixels].mean().detach()),
        target=logits[number][pixels].mean(),
    )
