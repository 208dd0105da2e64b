"""Why a model says what it says: what a pixel attends to in every block, and which parts of a picture decided.

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

from mobilevit.drawing import save_image
from mobilevit.inference.explain_figures import attention_figure, patches_figure
from mobilevit.models.card import ModelCard, card_of
from mobilevit.models.mobilevit import Attention, MobileViTBlock
from mobilevit.preprocessing import Placement, Source, read_image

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
    """What one pixel attends to, and which parts of the picture spoke for an answer."""

    source: str
    """The picture's file, or what it was called."""
    label: str
    """The class that is explained."""
    score: float
    """Its probability."""
    pixel: Point
    """(x, y) of the chosen pixel, in the upright picture."""
    blocks: tuple[BlockAttention, ...]
    """From fine to coarse."""
    class_activation: NDArray[np.float32]
    """(height, width) of the last map, 0 to 1: what spoke for the class, by Grad-CAM (arXiv:1610.02391)."""
    placement: Placement = field(repr=False)
    """Where the picture lies in the model's input."""
    input_image: Image.Image = field(repr=False)
    """What the model sees."""

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """Picture, class activation, and attention in every block, layer and head; written to `path` if given."""
        return _saved(attention_figure(self), path)

    def draw_patches(self, path: str | Path | None = None) -> Image.Image:
        """How each block cuts this picture into patches and sequences, and folds it back."""
        return _saved(patches_figure(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; places are pixels of the upright picture."""
        return {
            "source": self.source,
            "label": self.label,
            "score": round(self.score, 6),
            "pixel": list(self.pixel),
            "blocks": [
                {
                    "name": block.name,
                    "stride": block.stride,
                    "map_size": list(block.map_size),
                    "patch_size": list(block.patch_size),
                    "num_tokens": block.num_tokens,
                    "patches_attended_by_layer_and_head": block.attended().round(2).tolist(),
                    "most_attended": self._most_attended(block),
                }
                for block in self.blocks
            ],
        }

    def _most_attended(self, block: BlockAttention, count: int = 5) -> list[dict[str, float]]:
        rows, columns = block.rollout.shape
        found = []
        for place in np.argsort(-block.rollout, axis=None, kind="stable")[:count]:
            row, column = divmod(int(place), columns)
            middle = np.array([[(column + 0.5) / columns, (row + 0.5) / rows] * 2])
            x, y = self.placement.to_picture(middle)[0, :2]
            found.append(
                {
                    "x": round(float(x), 1),
                    "y": round(float(y), 1),
                    "weight": round(float(block.rollout[row, column]), 4),
                }
            )
        return found


def explain(model: nn.Module, source: Source, *, pixel: Point | None = None) -> Explanation:
    """Look into a model while it looks at a picture.

    What is explained is the class of the picture, the strongest object, or the class of the chosen pixel.

    Args:
        model: of any task, from `create_model` or `load`, not fused; it is put into evaluation mode.
        source: a path, encoded bytes, a PIL image, or a numpy array (H, W, 3) of uint8 RGB.
        pixel: (x, y) in the upright picture; without it, where the most spoke for the class.

    Raises:
        ImageError: the picture cannot be read.
        ValueError: the pixel is not in the picture, or not in the part that the model sees.
    """
    card = card_of(model)
    model.eval()
    image = read_image(source)
    placement = card.preprocessing.placement((image.height, image.width))
    place = None if pixel is None else _place_in_input(pixel, placement)
    pixels = card.preprocessing.resize(image)
    images = card.preprocessing.normalize(pixels[None]).to(next(model.parameters()).device)
    backbone: Any = getattr(model, "backbone", model)
    with _watched(backbone) as seen, torch.enable_grad():
        output = model(images)
        label, score, target = _answer(card, output, place)
        activation = _class_activation(target, seen.stages)
    if place is None:
        row, column = np.unravel_index(int(activation.argmax()), activation.shape)
        place = ((float(column) + 0.5) / activation.shape[1], (float(row) + 0.5) / activation.shape[0])
        x, y = placement.to_picture(np.array([place * 2]))[0, :2]
        pixel = (min(int(x), image.width - 1), min(int(y), image.height - 1))
    assert pixel is not None
    return Explanation(
        source=str(source) if isinstance(source, str | Path) else "picture",
        label=label,
        score=score,
        pixel=pixel,
        blocks=tuple(
            _block_attention(name, block, seen, place, images.shape[-1]) for name, block in seen.blocks.items()
        ),
        class_activation=activation,
        placement=placement,
        input_image=Image.fromarray(pixels.permute(1, 2, 0).numpy()),
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
    """(x, y) of a picture's pixel as shares of the input's width and height."""
    rows, columns = placement.picture
    x, y = pixel
    if not (0 <= x < columns and 0 <= y < rows):
        raise ValueError(f"pixel {x} {y} is not in the picture of {columns} x {rows}; count x and y from 0, top left")
    left, top, right, bottom = placement.region
    if not (left <= x + 0.5 <= right and top <= y + 0.5 <= bottom):
        raise ValueError(
            f"pixel {x} {y} lies outside of what the model sees; choose x from {math.ceil(left)} to {int(right) - 1} "
            f"and y from {math.ceil(top)} to {int(bottom) - 1}"
        )
    u, v = placement.to_input(np.array([[x + 0.5, y + 0.5] * 2]))[0, :2]
    return float(u), float(v)


def _answer(card: ModelCard, output: Any, place: tuple[float, float] | None) -> tuple[str, float, Tensor]:
    """The class to explain, its probability, and the scalar whose gradient says what spoke for it."""
    if card.task == "classification":
        number = int(output[0].argmax())
        return card.classes[number], float(output[0].softmax(0)[number].detach()), output[0, number]
    if card.task == "detection":
        scores = output.class_logits[0].softmax(dim=-1)[:, 1:]
        anchor, number = divmod(int(scores.argmax()), scores.shape[1])
        return card.classes[number], float(scores[anchor, number].detach()), output.class_logits[0, anchor, number + 1]
    logits = output.logits[0]
    classes, height, width = logits.shape
    if place is not None:
        row, column = min(int(place[1] * height), height - 1), min(int(place[0] * width), width - 1)
        number = int(logits[:, row, column].argmax())
        return (
            card.classes[number],
            float(logits[:, row, column].softmax(0)[number].detach()),
            logits[number, row, column],
        )
    label_map = logits.argmax(0)
    number = int(torch.bincount(label_map.flatten(), minlength=classes).argmax())
    shown = label_map == number
    return card.classes[number], float(logits.softmax(0)[number][shown].mean().detach()), logits[number][shown].mean()


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
        patch_size=(ph, pw),
        pixel=(row, column),
        weights=torch.stack([layer[:, token] for layer in weights])
        .reshape(len(weights), -1, rows, columns)
        .cpu()
        .numpy(),
        rollout=through[token].reshape(rows, columns).cpu().numpy(),
    )


def _saved(picture: Image.Image, path: str | Path | None) -> Image.Image:
    if path is not None:
        save_image(picture, path)
    return picture
