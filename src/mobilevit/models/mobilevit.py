"""MobileViT: light-weight, general-purpose, mobile-friendly vision transformer (Mehta & Rastegari, arXiv:2110.02178).

The whole model, top to bottom, in torch alone. Letters used in shape comments:

    B  images in the batch          ph, pw  height and width of a patch in pixels
    C  channels of a feature map      P       pixels in a patch, ph * pw
    H, W  height and width of a map   N       patches in a map, (H / ph) * (W / pw)
    D  width of the transformer       h       attention heads
    K  classes

Tensors are channels-last (NHWC in memory): a feature map is then already a table of tokens, and going from maps to
token sequences costs two copies, neither of which moves single elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError

PatchSize = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig:
    """The shape of a MobileViT backbone (arXiv:2110.02178, table 4).

    Raises:
        MobileViTError: a field has a value the architecture cannot have.
    """

    channels: tuple[int, int, int, int, int]
    """Output channels of layer1 to layer5."""
    embed_dims: tuple[int, int, int]
    """Transformer width D in layer3, layer4 and layer5."""
    head_channels: int
    """Output channels of the last 1x1 convolution, before pooling."""
    expand_ratio: int = 4
    """Width inside the MobileNetV2 blocks, relative to their input."""
    stem_channels: int = 16
    """Output channels of the first convolution."""
    depths: tuple[int, int, int] = (2, 4, 3)
    """Transformer layers in layer3, layer4 and layer5."""
    num_heads: int = 4
    """Attention heads in every transformer layer."""
    dropout: float = 0.1
    """Dropout after attention and after the feed-forward network."""
    classifier_dropout: float = 0.1
    """Dropout before the last linear layer."""
    patch_size: tuple[PatchSize, PatchSize, PatchSize] = (2, 2, 2)
    """Patch of layer3, layer4 and layer5: a side, or (height, width). (8, 4, 2) is the paper's configuration B."""
    output_stride: int = 32
    """Input size divided by the size of the last map: 32, or 16 or 8 by dilation instead of striding."""

    def __post_init__(self) -> None:
        check_shape(self)


class BackboneConfig(Protocol):
    """The shape of a backbone of either generation, a dataclass; `MobileViTConfig` says what the names mean."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def channels(self) -> tuple[int, int, int, int, int]: ...
    @property
    def embed_dims(self) -> tuple[int, int, int]: ...
    @property
    def expand_ratio(self) -> int: ...
    @property
    def stem_channels(self) -> int: ...
    @property
    def depths(self) -> tuple[int, int, int]: ...
    @property
    def patch_size(self) -> tuple[PatchSize, PatchSize, PatchSize]: ...
    @property
    def output_stride(self) -> int: ...


def check_shape(config: BackboneConfig) -> None:
    """Raise a `MobileViTError` for a patch size or an output stride that no backbone can have."""
    if len(config.patch_size) != 3 or any(min(_pair(p)) < 1 for p in config.patch_size):
        raise MobileViTError(f"`patch_size` is {config.patch_size}; give three sizes of 1 or more, such as 2, 2, 2")
    if config.output_stride not in (8, 16, 32):
        raise MobileViTError(f"`output_stride` is {config.output_stride}; it can be 32, 16 or 8")


def _pair(size: PatchSize) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


XXS = MobileViTConfig(
    channels=(16, 24, 48, 64, 80), embed_dims=(64, 80, 96), head_channels=320, expand_ratio=2, dropout=0.05
)
XS = MobileViTConfig(channels=(32, 48, 64, 80, 96), embed_dims=(96, 120, 144), head_channels=384)
S = MobileViTConfig(channels=(32, 64, 96, 128, 160), embed_dims=(144, 192, 240), head_channels=640)


class ConvNormAct(nn.Module):
    """Convolution with "same" padding, BatchNorm and activation; the last two are optional.

    Activation is SiLU in the backbone, and ReLU in the heads of detection and segmentation.

    Shape: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: Literal["silu", "relu"] | None = "silu",
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = {"silu": nn.SiLU, "relu": nn.ReLU, None: nn.Identity}[act]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return x


class InvertedResidual(nn.Module):
    """MobileNetV2 block: a 1x1 expands, a depthwise 3x3 filters, a 1x1 projects (arXiv:1801.04381).

    Shape: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, expand_ratio: int, dilation: int = 1
    ) -> None:
        super().__init__()
        hidden = round_channels(in_channels * expand_ratio)
        self.expand = ConvNormAct(in_channels, hidden, 1)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.project = ConvNormAct(hidden, out_channels, 1, act=None)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def round_channels(channels: float, multiple: int = 8) -> int:
    """Round to the nearest multiple, at least 90 % of `channels` (arXiv:1801.04381, official code)."""
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values (arXiv:1706.03762).

    Shape: (batch, N, D) -> (batch, N, D).
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale: float = self.head_dim**-0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3 * self.num_heads, self.head_dim)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # each (batch, h, N, D / h)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = self.out(x.transpose(1, 2).reshape(batch, num_tokens, self.num_heads * self.head_dim))
        return x


class Dropout(nn.Dropout):
    """`nn.Dropout` at a third of its cost on a CPU.

    There `nn.Dropout` draws every element from a serial generator, which takes a tenth of a training step. Here a draw
    of 64 bits decides four elements; the probability is exact to 1 / 65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        # The compiler would break the graph at each of these draws, and has a fast dropout of its own.
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= round(2**16 * self.p) - 2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + ffn(norm(x)); the ffn is twice as wide as x.

    Shape: (batch, N, D) -> (batch, N, D).
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.ffn_in = nn.Linear(embed_dim, 2 * embed_dim)
        self.ffn_act = nn.SiLU()
        self.ffn_out = nn.Linear(2 * embed_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.ffn_out(self.ffn_act(self.ffn_in(self.ffn_norm(x)))))
        return x


def unfold(x: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Collect the pixels at the same offset inside their patches into one sequence each (arXiv:2110.02178, figure 4).

    Sequences are ordered by image, then by offset inside the patch, row by row. Costs two copies, of whole rows and of
    runs of D numbers; no tensor has more than 4 dimensions, so that exported graphs suit compilers for small devices.

    Shape: (B, D, H, W) -> (B * P, N, D); H and W are multiples of the patch.
    """
    (batch, dim, height, width), (ph, pw) = x.shape, patch_size
    x = x.permute(0, 2, 3, 1)  # (B, H, W, D), no copy: the map is channels-last in memory
    x = x.reshape(batch, height // ph, ph, width * dim).transpose(1, 2)  # (B, ph, H/ph, W * D)
    x = x.reshape(batch * ph, height // ph * (width // pw), pw, dim).transpose(1, 2)  # (B * ph, pw, N, D)
    return x.reshape(batch * ph * pw, height // ph * (width // pw), dim)


def fold(tokens: Tensor, size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Put every token back at its pixel: the inverse of `unfold`.

    Shape: (B * P, N, D) -> (B, D, H, W), channels-last in memory; `size` is (H, W).
    """
    (height, width), (ph, pw), dim = size, patch_size, tokens.shape[-1]
    batch = tokens.shape[0] // (ph * pw)
    x = tokens.reshape(batch * ph, pw, height // ph * (width // pw), dim).transpose(1, 2)  # (B * ph, N, pw, D)
    x = x.reshape(batch, ph, height // ph, width * dim).transpose(1, 2)  # (B, H/ph, ph, W * D)
    return x.reshape(batch, height, width, dim).permute(0, 3, 1, 2)


def whole_patches(height: int, width: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Round the size of a map up to whole patches."""
    ph, pw = patch_size
    return -(-height // ph) * ph, -(-width // pw) * pw


class MobileViTBlock(nn.Module):
    """Local 3x3 convolution, then attention across patches (arXiv:2110.02178, section 3.1).

    A pixel attends only to the pixels at its own offset inside the other patches: P sequences of N tokens.
    As in the official code, a map that patches do not divide is resized bilinearly to the next multiple, and back.

    `depth` is the number of transformer layers (L in the paper), `patch_size` a side in pixels or (height, width).

    Shape: (B, C, H, W) -> (B, C, H, W), any H and W.

    Raises:
        MobileViTError: `embed_dim` is not divisible by `num_heads`.
    """

    def __init__(
        self, in_channels: int, *, embed_dim: int, depth: int, num_heads: int, patch_size: PatchSize, dropout: float
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise MobileViTError(f"`embed_dim` {embed_dim} is not divisible by `num_heads` {num_heads}")
        self.patch_size = _pair(patch_size)
        self.local_conv = ConvNormAct(in_channels, in_channels, 3)
        self.project_in = ConvNormAct(in_channels, embed_dim, 1, norm=False, act=None)
        self.transformer = nn.Sequential(*(TransformerLayer(embed_dim, num_heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.project_out = ConvNormAct(embed_dim, in_channels, 1)
        self.fusion = ConvNormAct(2 * in_channels, in_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = whole_patches(height, width, self.patch_size)

        y = self.project_in(self.local_conv(x))  # (B, D, H, W)
        if padded != (height, width):
            y = F.interpolate(y, size=padded, mode="bilinear", align_corners=False)
        tokens = unfold(y, self.patch_size)  # (B * P, N, D)
        tokens = self.norm(self.transformer(tokens))
        y = fold(tokens, padded, self.patch_size)  # (B, D, H, W)
        if padded != (height, width):
            y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        y = self.project_out(y)  # (B, C, H, W)
        x = self.fusion(torch.cat((x, y), dim=1))
        return x


class Backbone(nn.Module):
    """The stem and five stages of either generation; each halves the map and adds channels.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> the maps of `forward_features`.
    """

    card: ModelCard
    """Name, task, classes and preprocessing; set by `create_model` and `load`."""
    layer2_strides: ClassVar[tuple[int, ...]]
    """Strides of the inverted residuals of layer2."""
    aspp_channels: ClassVar[int]
    """Published width of a DeepLabv3 head on this backbone."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        stem, (c1, c2, c3, c4, c5) = config.stem_channels, config.channels
        # Where a stage no longer halves the map, later depthwise convolutions are dilated to see as far; as in
        # the official code, that of the stage's own inverted residual is not.
        stride4, stride5 = (2 if config.output_stride >= 16 else 1), (2 if config.output_stride >= 32 else 1)

        self.stem = ConvNormAct(3, stem, 3, stride=2)
        self.layer1 = self._inverted_residuals(stem, c1, strides=(1,))
        self.layer2 = self._inverted_residuals(c1, c2, strides=self.layer2_strides)
        self.layer3 = self._stage(0, c2, c3, stride=2)
        self.layer4 = self._stage(1, c3, c4, stride=stride4)
        self.layer5 = self._stage(2, c4, c5, stride=stride5, dilation=2 // stride4)

        strides = (2, 4, 8, 8 * stride4, 8 * stride4 * stride5)
        self.feature_channels: dict[int, int] = dict(zip(strides, config.channels, strict=True))
        """Channels of each map that `forward_features` returns, by stride."""
        self._feature_strides = strides
        self.initialize(self)

    def _inverted_residuals(self, in_channels: int, out_channels: int, *, strides: Sequence[int]) -> nn.Sequential:
        widths = pairwise((in_channels, *(out_channels for _ in strides)))
        ratio = self.config.expand_ratio
        return nn.Sequential(
            *(InvertedResidual(i, o, stride=s, expand_ratio=ratio) for (i, o), s in zip(widths, strides, strict=True))
        )

    def _stage(self, index: int, in_channels: int, out_channels: int, *, stride: int, dilation: int = 1) -> nn.Module:
        ratio = self.config.expand_ratio
        return nn.Sequential(
            InvertedResidual(in_channels, out_channels, stride=stride, expand_ratio=ratio, dilation=dilation),
            self._block(index, out_channels, dilation=dilation * (2 // stride)),
        )

    def _block(self, index: int, channels: int, *, dilation: int) -> nn.Module:
        """Make the transformer block of layer 3 + `index`; `dilation` is for a generation that dilates it."""
        raise NotImplementedError

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Give a module, and all in it, initial weights and channels-last memory."""
        raise NotImplementedError

    def initialize_detection(self, module: nn.Module) -> None:
        """`initialize` for what SSDLite adds to the backbone."""
        self.initialize(module)

    @staticmethod
    def initialize_prediction(conv: nn.Conv2d) -> None:
        """Start a last convolution so small that all classes are equally likely and boxes stay where anchors are."""
        nn.init.normal_(conv.weight, std=0.01)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)

    @property
    def size_multiple(self) -> tuple[int, int]:
        """(height, width) whose multiples are the input sizes at which patches divide every map, without resizing."""
        patches = [_pair(patch) for patch in self.config.patch_size]
        strides = self._feature_strides[2:]
        height, width = (math.lcm(32, *(s * p[axis] for s, p in zip(strides, patches, strict=True))) for axis in (0, 1))
        return height, width

    def forward_features(self, x: Tensor) -> dict[int, Tensor]:
        """Compute the deepest feature map at each stride.

        Shape: (B, 3, H, W) -> {stride: (B, feature_channels[stride], ceil(H / stride), ceil(W / stride))}; MobileViTv2
        makes maps of odd size from stride 8 on larger by one.
        """
        return dict(zip(self._feature_strides, self.forward_stages(x), strict=True))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Compute the outputs of layer1 to layer5, also where dilation leaves several at the same stride.

        Shape: (B, 3, H, W) -> five maps of `config.channels`.
        """
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = layer(x)
            stages.append(x)
        return stages


class MobileViTBackbone(Backbone):
    """The backbone that classification, detection and segmentation share (arXiv:2110.02178, table 4)."""

    layer2_strides = (2, 1, 1)
    aspp_channels = 256

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__(config)
        self.config: MobileViTConfig = config

    def _block(self, index: int, channels: int, *, dilation: int) -> MobileViTBlock:
        del dilation  # as in the official code
        config = self.config
        return MobileViTBlock(
            channels,
            embed_dim=config.embed_dims[index],
            depth=config.depths[index],
            num_heads=config.num_heads,
            patch_size=config.patch_size[index],
            dropout=config.dropout,
        )

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Convolutions: Kaiming normal over fan-out; linear layers: normal 0.02; as in the official code."""
        module.apply(_init_weights)
        module.to(memory_format=torch.channels_last)


class MobileViT(MobileViTBackbone):
    """MobileViT for classification (arXiv:2110.02178, table 4).

    K is `num_classes`; 0 leaves the classifier out and returns the pooled features.

    Shape: RGB in 0..1, (B, 3, H, W), H and W >= 32 -> logits (B, K).
    """

    head_config: None = None
    """The head has no shape of its own, unlike those of other tasks."""

    def __init__(self, config: MobileViTConfig, num_classes: int = 1000) -> None:
        super().__init__(config)
        self.head_conv = ConvNormAct(config.channels[-1], config.head_channels, 1)
        self.classifier_dropout = nn.Dropout(config.classifier_dropout)
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Linear(config.head_channels, num_classes) if num_classes else nn.Identity()
        self.initialize(self.classifier)
        self.initialize(self.head_conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)[self._feature_strides[-1]]  # (B, C5, H / 32, W / 32)
        x = self.head_conv(x).mean((2, 3))  # (B, head_channels)
        x = self.classifier(self.classifier_dropout(x))  # (B, K)
        return x


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
