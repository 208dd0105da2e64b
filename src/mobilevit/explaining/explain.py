"""Why a model says what it says: what a pixel attends to in every block, and which parts of an image decided.

Letters are those of `mobilevit.models.mobilevit`: P pixels in a patch, N patches in a map, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mobilevit.card import ModelCard, card_of
from mobilevit.errors import MobileViTError
from mobilevit.explaining.figures import attention_figure, patches_figure
from mobilevit.imaging.decode import Source, read_image
from mobilevit.imaging.drawing import save_image
from mobilevit.imaging.preprocessing import Placement
from mobilevit.models.mobilevit import Attention, MobileViTBlock
from mobilevit.models.ssdlite import decode_boxes
from mobilevit.results.detection import DEFAULT_SCORE_THRESHOLD

Point = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BlockAttention:
    """What one pixel of a block's map attends to: the pixels at its own offset in all patches, one in each."""

    name: str
    """Of the block: layer3, layer4 or layer5."""
    stride: int
    """Pixels of the input to a pixel of the map."""
    map_size: tuple[int, int]
    """(height, width) of the map, resized to whole patches where it has to be."""
    map_size_before: tuple[int, int]
    """(height, width) of the map before that; mostly the same."""
    patch_size: tuple[int, int]
    """(height, width) of a patch, in pixels of the map."""
    pixel: Point
    """(row, column) of the chosen pixel on the map."""
    weights: NDArray[np.float32]
    """(layers, h, rows, columns): attention of the chosen pixel to each patch's pixel; sums to one over the patches."""
    rollout: NDArray[np.float32]
    """(rows, columns): attention through all the block's layers and past them, heads averaged (arXiv:2005.00928)."""

    @property
    def num_tokens(self) -> int:
        """N, patches in the map."""
        return self.rollout.size

    def attended(self) -> NDArray[np.float64]:
        """Patches that each head spreads its attention over, as the exponential of its entropy. Shape: (layers, h)."""
        weights = self.weights.astype(np.float64)
        entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=(2, 3))
        spread: NDArray[np.float64] = np.exp(entropy)
        return spread


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What one pixel attends to, and which parts of the image spoke for an answer."""

    source: str
    """The image's file, or what it was called."""
    label: str
    """The class that is explained."""
    score: float
    """Its probability."""
    pixel: Point
    """(x, y) of the chosen pixel, in the upright image."""
    blocks: tuple[BlockAttention, ...]
    """From fine to coarse."""
    class_activation: NDArray[np.float32]
    """(height, width) of the last map, 0 to 1: what spoke for the class, by Grad-CAM (arXiv:1610.02391)."""
    placement: Placement = field(repr=False)
    """Where the image lies in the model's input."""
    view: Image.Image = field(repr=False)
    """The part of the image that the model sees, with its margin, in the image's own shape and sharpness."""
    box_xyxy: tuple[float, float, float, float] | None = None
    """Detection: the object that is explained, in pixels of the upright image."""

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        """From a place in the upright image to the same place on `view`."""
        u, v = self.placement.to_input(np.array([[x, y] * 2]))[0, :2]
        return float(u) * self.view.width, float(v) * self.view.height

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """Image, class activation, and attention in every block, layer and head; written to `path` if given."""
        return _saved(attention_figure(self), path)

    def draw_patches(self, path: str | Path | None = None) -> Image.Image:
        """How each block cuts this image into patches and sequences, and folds it back."""
        return _saved(patches_figure(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; places are pixels of the upright image."""
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
                    "patches_attended_by_layer_and_head": block.attended().round(2).tolist(),
                    "most_attended": self._most_attended(block),
                }
                for block in self.blocks
            ],
        }

    def _most_attended(self, block: BlockAttention, count: int = 5) -> list[dict[str, float]]:
        """The pixels, one in a patch, that reach the chosen one most through all layers; itself left out."""
        (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
        own = row // ph * (width // pw) + column // pw
        found = []
        order = [int(place) for place in np.argsort(-block.rollout, axis=None, kind="stable") if place != own]
        for place in order[:count]:
            down, right = divmod(place, width // pw)
            middle = np.array([[(right * pw + column % pw + 0.5) / width, (down * ph + row % ph + 0.5) / height] * 2])
            x, y = self.placement.to_image(middle)[0, :2].round(1).tolist()
            found.append({"x": x, "y": y, "weight": round(float(block.rollout[down, right]), 4)})
        return found


def explain(model: nn.Module, source: Source, pixel: Point | None = None) -> Explanation:
    """Look into a model while it looks at an image.

    What is explained is the class of the image; the strongest object, of those at the chosen pixel if there are any;
    or the class of the chosen pixel.

    Args:
        model: of any task, from `create_model` or `load`, not fused; it is put into evaluation mode.
        source: a path, encoded bytes, a PIL image, or a numpy array (H, W, 3) of uint8 RGB.
        pixel: (x, y) in the upright image; without it, where the most spoke for the class, else the middle.

    Raises:
        ImageError: the image cannot be read.
        ValueError: the pixel is not in the image, or not in the part that the model sees.
    """
    card = card_of(model)
    model.eval()
    image = read_image(source)
    placement = card.preprocessing.placement((image.height, image.width))
    place = None if pixel is None else _place_in_input(pixel, placement)
    pixels = card.preprocessing.resize(image)
    backbone: Any = getattr(model, "backbone", model)
    with _watched(backbone) as seen, torch.inference_mode(False), torch.enable_grad():
        output = model(torch.from_numpy(card.preprocessing.normalize(pixels[None])).to(next(model.parameters()).device))
        answer = _answer(card, output, place)
        activation = _class_activation(answer.target, seen.stages)
    if place is None:
        place = _strongest_place(activation, placement)
        x, y = placement.to_image(np.array([place * 2]))[0, :2]
        pixel = (min(int(x), image.width - 1), min(int(y), image.height - 1))
    assert pixel is not None
    return Explanation(
        source=str(source) if isinstance(source, str | Path) else "image",
        label=answer.label,
        score=answer.score,
        pixel=pixel,
        blocks=tuple(
            _block_attention(name, block, seen, place, placement.size[1]) for name, block in seen.blocks.items()
        ),
        class_activation=activation,
        placement=placement,
        view=_view(image, placement),
        box_xyxy=_box_in_image(answer.box, placement),
    )


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """The weights that `Attention.forward` gives to values, and never shows. Shape: (B, N, D) -> (B, h, N, N)."""
    batch, num_tokens, _ = x.shape
    qkv = attention.qkv(x).view(batch, num_tokens, 3 * attention.num_heads, attention.head_dim)
    q, k, _ = qkv.transpose(1, 2).chunk(3, dim=1)
    weights: Tensor = (q @ k.transpose(2, 3) * attention.scale).softmax(dim=-1)
    return weights


@dataclass(frozen=True)
class _Seen:
    """What passed through a model while it was watched."""

    blocks: dict[str, MobileViTBlock] = field(default_factory=dict)
    maps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of each block's map, before it is resized to whole patches."""
    attention: dict[str, list[tuple[Attention, Tensor]]] = field(default_factory=dict)
    """Of each block, its attention layers with what they were given."""
    stages: list[Tensor] = field(default_factory=list)
    """The outputs of layer4 and layer5."""


@contextmanager
def _watched(backbone: Any) -> Iterator[_Seen]:
    seen = _Seen()
    handles = []
    for name in ("layer3", "layer4", "layer5"):
        block: MobileViTBlock = getattr(backbone, name)[1]
        seen.blocks[name], seen.attention[name] = block, []

        def note_map(_: nn.Module, inputs: tuple[Tensor], __: Tensor, name: str = name) -> None:
            seen.maps[name] = (inputs[0].shape[2], inputs[0].shape[3])

        handles.append(block.register_forward_hook(note_map))
        for module in block.modules():
            if isinstance(module, Attention):

                def note_input(module: Attention, inputs: tuple[Tensor], _: Tensor, name: str = name) -> None:
                    seen.attention[name].append((module, inputs[0].detach()))

                handles.append(module.register_forward_hook(note_input))

    def note_stage(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        # Gradients are wanted from here on only.
        output = output if seen.stages else output.detach().requires_grad_()
        seen.stages.append(output)
        return output

    handles += [getattr(backbone, name).register_forward_hook(note_stage) for name in ("layer4", "layer5")]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _place_in_input(pixel: Point, placement: Placement) -> tuple[float, float]:
    """(x, y) of an image's pixel as shares of the input's width and height."""
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


def _strongest_place(activation: NDArray[np.float32], placement: Placement) -> tuple[float, float]:
    """(x, y), as shares of the input, where the most spoke for the class; the margin has no say."""
    (height, width), (rows, columns) = placement.size, activation.shape
    inside = activation.copy()
    filled_height, filled_width = placement.filled[0] / height, placement.filled[1] / width
    inside[(np.arange(rows) + 0.5) / rows > filled_height] = 0
    inside[:, (np.arange(columns) + 0.5) / columns > filled_width] = 0
    if not inside.any():
        return filled_width / 2, filled_height / 2
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    return (float(column) + 0.5) / columns, (float(row) + 0.5) / rows


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What is explained."""

    label: str
    score: float
    target: Tensor
    """The scalar whose gradient says what spoke for it."""
    box: Tensor | None = None
    """Of an object, left, top, right, bottom in 0..1 of the input."""


def _answer(card: ModelCard, output: Any, place: tuple[float, float] | None) -> _Answer:
    if card.task == "classification":
        number = int(output[0].argmax())
        return _Answer(
            label=card.classes[number], score=float(output[0].softmax(0)[number].detach()), target=output[0, number]
        )
    return _object(card, output, place) if card.task == "detection" else _segment(card, output.logits[0], place)


def _object(card: ModelCard, output: Any, place: tuple[float, float] | None) -> _Answer:
    """The strongest object; of those around a chosen place, if one there is sure enough."""
    scores = output.class_logits[0].detach().softmax(dim=-1)[:, 1:]
    boxes = decode_boxes(output.box_regression[0].detach(), output.anchors_cxcywh)
    if place is not None:
        x, y = place
        around = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        there = scores * around[:, None]
        threshold = DEFAULT_SCORE_THRESHOLD if card.score_threshold is None else card.score_threshold
        scores = there if float(there.max()) >= threshold else scores
    anchor, number = divmod(int(scores.argmax()), scores.shape[1])
    return _Answer(
        label=card.classes[number],
        score=float(scores[anchor, number]),
        target=output.class_logits[0, anchor, number + 1],
        box=boxes[anchor],
    )


def _segment(card: ModelCard, logits: Tensor, place: tuple[float, float] | None) -> _Answer:
    """The class of the chosen pixel, or the class that covers the most, in the mean of its pixels."""
    classes, height, width = logits.shape
    if place is not None:
        row, column = min(int(place[1] * height), height - 1), min(int(place[0] * width), width - 1)
        here = logits[:, row, column]
        number = int(here.argmax())
        return _Answer(label=card.classes[number], score=float(here.softmax(0)[number].detach()), target=here[number])
    label_map = logits.argmax(0)
    number = int(torch.bincount(label_map.flatten(), minlength=classes).argmax())
    shown = label_map == number
    return _Answer(
        label=card.classes[number],
        score=float(logits.softmax(0)[number][shown].mean().detach()),
        target=logits[number][shown].mean(),
    )


def _box_in_image(box: Tensor | None, placement: Placement) -> tuple[float, float, float, float] | None:
    if box is None:
        return None
    left, top, right, bottom = placement.to_image(box.double().numpy(force=True)[None])[0].tolist()
    return left, top, right, bottom


def _view(image: Image.Image, placement: Placement, side: int = 512) -> Image.Image:
    """What the model sees of an image, but undistorted and as sharp as it is, up to `side` pixels."""
    left, top, right, bottom = placement.region
    (height, width), (filled_height, filled_width) = placement.size, placement.filled
    across, down = (right - left) * width / filled_width, (bottom - top) * height / filled_height
    scale = side / max(across, down)
    view = Image.new("RGB", (max(1, round(across * scale)), max(1, round(down * scale))))
    shown = (round(view.width * filled_width / width), round(view.height * filled_height / height))
    view.paste(image.resize((max(1, shown[0]), max(1, shown[1])), Image.Resampling.LANCZOS, placement.region))
    return view


def _class_activation(target: Tensor, stages: list[Tensor]) -> NDArray[np.float32]:
    gradients = torch.autograd.grad(target, stages, allow_unused=True)
    # An object may have been found on the finer map, of which the coarser one knows nothing.
    pairs = [(stage, gradient) for stage, gradient in zip(stages, gradients, strict=True) if gradient is not None]
    stage, gradient = next((pair for pair in reversed(pairs) if pair[1].any()), pairs[0])
    weights = gradient[0].mean(dim=(1, 2))
    activation = torch.einsum("c,chw->hw", weights, stage.detach()[0]).clamp(min=0)
    found: NDArray[np.float32] = (activation / activation.max().clamp(min=1e-12)).float().cpu().numpy()
    return found


@torch.no_grad()
def _block_attention(
    name: str, block: MobileViTBlock, seen: _Seen, place: tuple[float, float], input_width: int
) -> BlockAttention:
    (height, width), (ph, pw) = seen.maps[name], block.patch_size
    padded = (-(-height // ph) * ph, -(-width // pw) * pw)
    row, column = (min(int(share * side), side - 1) for share, side in zip(place[::-1], padded, strict=True))
    rows, columns = padded[0] // ph, padded[1] // pw
    sequence = column % pw * ph + row % ph  # as `unfold` orders them
    token = row // ph * columns + column // pw
    weights = [attention_weights(module, x[sequence : sequence + 1])[0] for module, x in seen.attention[name]]
    through = torch.eye(rows * columns, device=weights[0].device)
    for layer in weights:
        through = (layer.mean(dim=0) + torch.eye(rows * columns, device=layer.device)) / 2 @ through
    return BlockAttention(
        name=name,
        stride=round(input_width / width),
        map_size=padded,
        map_size_before=(height, width),
        patch_size=(ph, pw),
        pixel=(row, column),
        weights=torch.stack([layer[:, token] for layer in weights])
        .reshape(len(weights), -1, rows, columns)
        .cpu()
        .numpy(),
        rollout=through[token].reshape(rows, columns).cpu().numpy(),
    )


def _saved(image: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        save_image(image, path)
    return image
