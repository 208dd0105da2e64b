"""MobileViTv2: separable self-attention for mobile vision transformers (Mehta & Rastegari, arXiv:2206.02680).

The stem, the inverted residuals and the five stages are those of `mobilevit.models.mobilevit`; the rest is here, top to
bottom. Letters used in shape comments:

    B  images in the batch          P  pixels in a patch, 4
    C  channels of a feature map      N  patches in a map, H / 2 * W / 2
    H, W  height and width of a map   D  width of the transformer, C / 2
    K  classes

Attention costs O(N) instead of O(N^2): instead of comparing every token with every other, one score for each token says
how much of it goes into a single context vector, which all tokens then read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import (
    Backbone,
    ConvNormAct,
    PatchSize,
    check_shape,
    fold,
    round_channels,
    unfold,
    whole_patches,
)


@dataclass(frozen=True, kw_only=True)
class MobileViTv2Config:
    """The shape of a MobileViTv2 backbone: one width multiplies all channels (arXiv:2206.02680, table 5).

    The published widths are 0.5, 0.75, 1.0, 1.25, 1.5, 1.75 and 2.0.

    Raises:
        MobileViTError: a field has a value the architecture cannot have.
    """

    width: float
    """Channels relative to the model of width 1."""
    patch_size: tuple[PatchSize, PatchSize, PatchSize] = (2, 2, 2)
    """Always 2, 2, 2; here as in the first MobileViT."""
    output_stride: int = 32
    """Input size divided by the size of the last map: 32, or 16 or 8 by dilation instead of striding."""

    def __post_init__(self) -> None:
        check_shape(self)
        if self.patch_size != (2, 2, 2):
            raise MobileViTError(f"`patch_size` is {self.patch_size}; MobileViTv2 has only 2, 2, 2, so leave it out")
        if not self.width > 0:
            raise MobileViTError(f"`width` is {self.width}; it must be above 0")

    @property
    def stem_channels(self) -> int:
        """Output channels of the first convolution."""
        return round_channels(min(max(32 * self.width, 16), 64))

    @property
    def channels(self) -> tuple[int, int, int, int, int]:
        """Output channels of layer1 to layer5."""
        c2, c3, c4, c5 = (round_channels(base * self.width) for base in (128, 256, 384, 512))
        return round_channels(64 * self.width, 16), c2, c3, c4, c5

    @property
    def embed_dims(self) -> tuple[int, int, int]:
        """Transformer width D in layer3, layer4 and layer5."""
        d3, d4, d5 = (round_channels(base * self.width) for base in (128, 192, 256))
        return d3, d4, d5

    @property
    def expand_ratio(self) -> int:
        """Width inside the MobileNetV2 blocks, relative to their input."""
        return 2

    @property
    def depths(self) -> tuple[int, int, int]:
        """Attention layers in layer3, layer4 and layer5."""
        return 2, 4, 3


class GlobalNorm(nn.GroupNorm):
    """Normalization over all tokens and channels of an image together; gain and shift for each channel.

    It is not LayerNorm: every output depends on every pixel.

    Shape: (B, P, N, D) -> (B, P, N, D).
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(1, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.affine:  # fused: the layout does not matter, and engines need not transpose
            return F.group_norm(x.flatten(1)[:, None], 1, eps=self.eps).view_as(x)
        x = x.permute(0, 3, 1, 2)  # (B, D, P, N), channels-last in memory, for which PyTorch has a kernel
        return F.group_norm(x, 1, self.weight, self.bias, self.eps).permute(0, 2, 3, 1)


class SeparableAttention(nn.Module):
    """Separable self-attention, for the tokens at each offset apart (arXiv:2206.02680, section 3.2).

    A score for each token, which sums to one over the tokens, weighs the keys into one context vector; it multiplies
    the values of all tokens. As the keys are linear and the scores sum to one, the tokens are weighed first and the key
    of the result is taken: the same numbers, without one of a layer's seven D x D products and the tensor of keys.

    Shape: (B, P, N, D) -> (B, P, N, D).
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embed_dim, 1)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        context = self.key(self.scores(x).transpose(2, 3) @ x)  # (B, P, 1, D)
        x = self.out(F.relu(self.value(x)) * context)
        return x

    def scores(self, x: Tensor) -> Tensor:
        """Compute the share of each token in the context. Shape: (B, P, N, D) -> (B, P, N, 1)."""
        scores: Tensor = self.query(x).softmax(dim=2)
        return scores


class SeparableLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x)); the ffn is twice as wide as x.

    Shape: (B, P, N, D) -> (B, P, N, D).
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.attention_norm = GlobalNorm(embed_dim)
        self.attention = SeparableAttention(embed_dim)
        self.ffn_norm = GlobalNorm(embed_dim)
        self.ffn_in = nn.Linear(embed_dim, 2 * embed_dim)
        self.ffn_act = nn.SiLU()
        self.ffn_out = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.ffn_out(self.ffn_act(self.ffn_in(self.ffn_norm(x))))
        return x


class MobileViTv2Block(nn.Module):
    """Depthwise 3x3 convolution, then separable attention across patches (arXiv:2206.02680, figure 3).

    Unlike the first MobileViT's, it has no fusion with its input. As in the official code, a map of odd height or width
    is resized bilinearly to the next even size, corners aligned, and stays so: later stages see the larger map.

    Shape: (B, C, H, W) -> (B, C, H, W), H and W rounded up to whole patches.
    """

    def __init__(self, channels: int, *, embed_dim: int, depth: int, dilation: int) -> None:
        super().__init__()
        self.patch_size = (2, 2)
        self.local_conv = ConvNormAct(channels, channels, 3, dilation=dilation, groups=channels)
        self.project_in = ConvNormAct(channels, embed_dim, 1, norm=False, act=None)
        self.transformer = nn.Sequential(*(SeparableLayer(embed_dim) for _ in range(depth)))
        self.norm = GlobalNorm(embed_dim)
        self.project_out = ConvNormAct(embed_dim, channels, 1, act=None)

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, *size), (ph, pw) = x.shape, self.patch_size
        padded = whole_patches(size[0], size[1], self.patch_size)
        if padded != (size[0], size[1]):
            x = F.interpolate(x, size=padded, mode="bilinear", align_corners=True)
        x = self.project_in(self.local_conv(x))  # (B, D, H, W)
        tokens = unfold(x, self.patch_size)  # (B * P, N, D)
        tokens = tokens.view(batch, ph * pw, *tokens.shape[1:])  # the norm needs all of an image
        tokens = self.norm(self.transformer(tokens)).flatten(0, 1)
        x = self.project_out(fold(tokens, padded, self.patch_size))  # (B, C, H, W)
        return x


class MobileViTv2Backbone(Backbone):
    """The backbone that classification, detection and segmentation share (arXiv:2206.02680, table 5)."""

    layer2_strides = (2, 1)
    aspp_channels = 512

    def __init__(self, config: MobileViTv2Config) -> None:
        super().__init__(config)
        self.config: MobileViTv2Config = config

    def _block(self, index: int, channels: int, *, dilation: int) -> MobileViTv2Block:
        embed_dim, depth = self.config.embed_dims[index], self.config.depths[index]
        return MobileViTv2Block(channels, embed_dim=embed_dim, depth=depth, dilation=dilation)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Keep PyTorch's initial weights: the official code names others in its settings, but does not apply them."""
        module.to(memory_format=torch.channels_last)

    def initialize_detection(self, module: nn.Module) -> None:
        """Convolutions: Xavier uniform, which the official code does apply here."""
        self.initialize(module)
        module.apply(_init_xavier)

    @staticmethod
    def initialize_prediction(conv: nn.Conv2d) -> None:
        """Keep what the layers before it have, as the official code does."""


class MobileViTv2(MobileViTv2Backbone):
    """MobileViTv2 for classification: no 1x1 convolution before pooling and no dropout, unlike the first MobileViT.

    K is `num_classes`; 0 leaves the classifier out and returns the pooled features.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> logits (B, K).
    """

    head_config: None = None
    """The head has no shape of its own, unlike those of other tasks."""

    def __init__(self, config: MobileViTv2Config, num_classes: int = 1000) -> None:
        super().__init__(config)
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Linear(config.channels[-1], num_classes) if num_classes else nn.Identity()
        self.classifier.apply(_init_xavier)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)[self._feature_strides[-1]]  # (B, C5, H / 32, W / 32)
        x = self.classifier(x.mean((2, 3)))  # (B, K)
        return x


def _init_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
