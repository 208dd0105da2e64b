"""Attention in the blocks of a MobileViT: recorded while the model runs, then read out for one pixel.

MobileViTv2 has context scores instead: one for each token, the share of it in the context that all tokens read. They
are attention by one head whose N x N matrix has equal rows.

Letters are those of `mobilevit.models.mobilevit`: P pixels in a patch, N patches in a map, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit.models.mobilevit import Attention, Backbone, MobileViTBlock
from mobilevit.models.mobilevitv2 import MobileViTv2Block, SeparableAttention


@dataclass(frozen=True, kw_only=True)
class BlockAttention:
    """Attention of one pixel of a block's map: to the pixels at its own offset in all patches, one in each."""

    name: str
    """layer3, layer4 or layer5."""
    stride: int
    """Pixels of the input to a pixel of the map."""
    map_size: tuple[int, int]
    """(height, width) of the map, resized to whole patches where necessary."""
    map_size_before: tuple[int, int]
    """(height, width) of the map before that; usually the same."""
    patch_size: tuple[int, int]
    """(height, width) of a patch, in pixels of the map."""
    pixel: tuple[int, int]
    """(row, column) of the chosen pixel on the map."""
    weights: NDArray[np.float32]
    """(layers, h, rows, columns): attention of the chosen pixel to each patch's pixel; sums to one over the patches."""
    separable: bool
    """Whether these are context scores, the same for all pixels at the chosen one's offset."""
    rollout: NDArray[np.float32]
    """(rows, columns): attention through all layers of the block and past them, heads averaged (arXiv:2005.00928)."""

    @property
    def num_tokens(self) -> int:
        """N, patches in the map."""
        return self.rollout.size

    def attended(self) -> NDArray[np.float64]:
        """Count the patches (layers, h) that each head spreads its attention over: the exponential of its entropy."""
        weights = self.weights.astype(np.float64)
        entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(axis=(2, 3))
        spread: NDArray[np.float64] = np.exp(entropy)
        return spread


@dataclass(frozen=True)
class Recording:
    """Inputs and outputs inside a backbone during one forward pass."""

    maps: dict[MobileViTBlock | MobileViTv2Block, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of each block's map, before it is resized to whole patches."""
    attention: dict[Attention | SeparableAttention, Tensor] = field(default_factory=dict)
    """Input of each attention layer."""
    stages: list[Tensor] = field(default_factory=list)
    """Outputs of layer4 and layer5, which gradients reach."""


@contextmanager
def recording(backbone: Backbone) -> Iterator[Recording]:
    """Record every forward pass of a backbone until the context ends."""
    record = Recording()

    def keep_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(module, Attention | SeparableAttention):
            record.attention[module] = inputs[0].detach()
        elif isinstance(module, MobileViTBlock | MobileViTv2Block):
            record.maps[module] = (inputs[0].shape[2], inputs[0].shape[3])

    def keep_stage(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        # Gradients are needed from here on only.
        output = output if record.stages else output.detach().requires_grad_()
        record.stages.append(output)
        return output

    with ExitStack() as hooks:
        for module in backbone.modules():
            hooks.enter_context(module.register_forward_pre_hook(keep_input))
        for stage in (backbone.layer4, backbone.layer5):
            hooks.enter_context(stage.register_forward_hook(keep_stage))
        yield record


def attention_weights(attention: Attention | SeparableAttention, x: Tensor) -> Tensor:
    """Compute the weights that `attention` gives to values, or to keys. Shape: (B, N, D) -> (B, h, N, N)."""
    batch, num_tokens, _ = x.shape
    if isinstance(attention, SeparableAttention):  # every token reads the same context
        return attention.scores(x[:, None]).transpose(2, 3).expand(-1, -1, num_tokens, -1)
    qkv = attention.qkv(x).view(batch, num_tokens, 3 * attention.num_heads, attention.head_dim)
    q, k, _ = qkv.transpose(1, 2).chunk(3, dim=1)
    weights: Tensor = (q @ k.transpose(2, 3) * attention.scale).softmax(dim=-1)
    return weights


@torch.no_grad()
def block_attention(
    name: str,
    block: MobileViTBlock | MobileViTv2Block,
    record: Recording,
    place: tuple[float, float],
    stride: int,
) -> BlockAttention:
    """Read out the attention of the pixel at `place`, (x, y) as shares of the input's width and height, in a block."""
    (height, width), (ph, pw) = record.maps[block], block.patch_size
    padded = (-(-height // ph) * ph, -(-width // pw) * pw)
    row, column = (min(int(share * side), side - 1) for share, side in zip(place[::-1], padded, strict=True))
    rows, columns = padded[0] // ph, padded[1] // pw
    sequence = row % ph * pw + column % pw  # as `unfold` orders them
    token = row // ph * columns + column // pw
    layers = [
        attention_weights(module, record.attention[module].flatten(end_dim=-3)[sequence : sequence + 1])[0]
        for module in block.modules()
        if isinstance(module, Attention | SeparableAttention)
    ]
    identity = torch.eye(rows * columns, device=layers[0].device)
    through = identity
    for layer in layers:
        through = (layer.mean(dim=0) + identity) / 2 @ through
    weights = torch.stack([layer[:, token] for layer in layers]).reshape(len(layers), -1, rows, columns)
    return BlockAttention(
        name=name,
        stride=stride,
        map_size=padded,
        map_size_before=(height, width),
        patch_size=(ph, pw),
        pixel=(row, column),
        weights=weights.numpy(force=True),
        separable=isinstance(block, MobileViTv2Block),
        rollout=through[token].reshape(rows, columns).numpy(force=True),
    )


def class_activation(target: Tensor, stages: list[Tensor]) -> NDArray[np.float32]:
    """Compute the evidence for a score on the coarsest map that it depends on, 0 to 1, by Grad-CAM (arXiv:1610.02391).

    Shape: of each stage (1, C, h, w), from fine to coarse -> (h, w).
    """
    gradients = torch.autograd.grad(target, stages, allow_unused=True)
    # An object may have been found on the finer map; it does not depend on the coarser one.
    pairs = [(stage, gradient) for stage, gradient in zip(stages, gradients, strict=True) if gradient is not None]
    stage, gradient = next((pair for pair in reversed(pairs) if pair[1].any()), pairs[0])
    activation = torch.einsum("c,chw->hw", gradient[0].mean(dim=(1, 2)), stage.detach()[0]).clamp(min=0)
    evidence: NDArray[np.float32] = (activation / activation.max().clamp(min=1e-12)).float().numpy(force=True)
    return evidence
