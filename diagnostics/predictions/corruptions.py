r"""Image corruptions at three severities, after Hendrycks and Dietterich, 2019 (arXiv 1903.12261).

The settings are those of CIFAR-10-C at its severities 1, 3 and 5, for images of about 32 pixels a side; the width of
the blur grows with the side. Values are rounded to the nearest integer.

>>> images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
>>> corrupt(images, "brightness", 2, seed=0).unique()
tensor([138], dtype=torch.uint8)
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Corruption = Literal["gaussian_noise", "shot_noise", "gaussian_blur", "brightness", "contrast", "pixelate"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3)
SETTINGS: dict[Corruption, tuple[float, float, float]] = {
    "gaussian_noise": (0.04, 0.08, 0.10),  # standard deviation
    "shot_noise": (500.0, 100.0, 50.0),  # photons of white
    "gaussian_blur": (0.4, 0.7, 1.0),  # standard deviation in pixels of 32
    "brightness": (0.05, 0.15, 0.30),  # added to the value of HSV
    "contrast": (0.75, 0.40, 0.15),  # factor of the distance from the channel's mean
    "pixelate": (0.95, 0.85, 0.65),  # side of the small image
}
BLUR_SIDE = 32


def corrupt(images: Tensor, kind: Corruption, severity: int, *, seed: int) -> Tensor:
    """Corrupted copies of images.

    Args:
        images: ``(n, channels, height, width)`` uint8 with 1 or 3 channels, on any device.
        kind: Kind of corruption.
        severity: 1, 2 or 3.
        seed: Seed of the noise, drawn on the CPU so that it is the same on every device; other kinds have none.

    Returns:
        Images of the same shape, type and device.

    Raises:
        ValueError: If images, kind or severity are not valid.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"`corrupt(images=...)`: {images.dtype} of shape {tuple(images.shape)}. Give uint8 (n, 1 or 3, height, "
            "width), before they are normalised."
        )
    if kind not in SETTINGS or severity not in SEVERITIES:
        raise ValueError(
            f"`corrupt(kind={kind!r}, severity={severity!r})`: give one of {', '.join(CORRUPTIONS)}, and 1, 2 or 3."
        )
    x, setting = images.float() / 255, SETTINGS[kind][severity - 1]
    if kind == "gaussian_noise":
        x = x + setting * torch.randn(x.shape, generator=_generator(seed)).to(x.device)
    elif kind == "shot_noise":
        x = torch.poisson((x * setting).cpu(), generator=_generator(seed)).to(x.device) / setting
    elif kind == "gaussian_blur":
        x = _blur(x, setting * min(x.shape[-2:]) / BLUR_SIDE)
    elif kind == "brightness":
        x = _brighten(x, setting)
    elif kind == "contrast":
        mean = x.mean((-2, -1), keepdim=True)
        x = mean + setting * (x - mean)
    else:
        x = _pixelate(x, setting)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _blur(x: Tensor, width: float) -> Tensor:
    """Gaussian blur cut at four standard deviations; the border repeats the last pixel."""
    radius = math.ceil(4 * width - 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = (-0.5 * (offsets / width).square()).softmax(0)
    rows, columns = (_convolution(kernel, size).to(x) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _convolution(kernel: Tensor, size: int) -> Tensor:
    """Matrix ``(size, size)`` that convolves a row, its border repeated."""
    radius = len(kernel) // 2
    place = torch.arange(size).unsqueeze(1) + torch.arange(-radius, radius + 1)
    return kernel.new_zeros(size, size).scatter_add_(1, place.clamp(0, size - 1), kernel.expand(size, -1))


def _brighten(x: Tensor, amount: float) -> Tensor:
    """Add to the largest channel, keeping hue and saturation; black becomes grey."""
    value = x.amax(1, keepdim=True)
    brighter = (value + amount).clamp_max(1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-6), brighter)


def _pixelate(x: Tensor, share: float) -> Tensor:
    """Resize to a share of the side and back, by box filters."""
    for axis in (-2, -1):
        size = x.shape[axis]
        small = max(1, int(size * share))
        there_and_back = (_box(small, size) @ _box(size, small)).to(x)
        x = (x.movedim(axis, -1) @ there_and_back.T).movedim(-1, axis)
    return x


def _box(size: int, target: int) -> Tensor:
    """Matrix ``(target, size)`` of a box filter: the mean of the pixels whose centres are in the new pixel's box."""
    scale = size / target
    centre = (torch.arange(target, dtype=torch.float64) + 0.5).unsqueeze(1) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centre) / max(scale, 1.0)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)
