"""Densities of energies: scale mixtures, and log integrals in any dimension; behind ``Energy.log_normalizer``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poe_models.limits import Parameter

POINTS = 4001
"""Nodes of the trapezoid rule."""


@dataclass(frozen=True)
class ScaleMixture:
    r"""``exp(-c rho(q)) = E[exp(-tau q / unit)]`` over ``tau ~ Gamma(c * shape, 1)``, for every power ``c > 0``.

    Attributes:
        shape: Shape of the Gamma at ``c = 1``; None for a Gaussian, whose ``tau`` is ``c`` itself.
        unit: What divides ``q``.
    """

    shape: Parameter | None
    unit: Parameter


def float64(value: Parameter) -> Tensor:
    """A setting as a tensor."""
    return torch.as_tensor(value, dtype=torch.float64)


def log_sphere(dim: Tensor) -> Tensor:
    """Log surface area of the unit sphere in ``dim`` dimensions: turns a radial integral into a volume."""
    return math.log(2) + dim / 2 * math.log(math.pi) - torch.lgamma(dim / 2)


def student_log_normalizer(energy: object, shape: Tensor, scale_squared: Tensor, dim: Tensor) -> Tensor:
    """Log integral of ``(1 + |x|^2 / scale_squared)**-shape`` over ``dim`` dimensions; finite above ``dim / 2``."""
    if bool((shape <= dim / 2).any()):
        raise ValueError(
            f"`{energy!r}.log_normalizer(...)`: the exponent times importance over temperature is "
            f"{float(shape.min()):g}, which must exceed dim / 2 = {float(dim.max()) / 2:g} for the density to have "
            "a finite integral. Use exponent='multivariate'."
        )
    constant = dim / 2 * (math.log(math.pi) + torch.log(scale_squared))
    return constant + torch.lgamma(shape - dim / 2) - torch.lgamma(shape)


def huber_radial_integral(delta: float, dim: Tensor, importance: float) -> Tensor:
    """Log of the radial integral of Huber's density: a Gaussian up to ``delta``, an exponential beyond it."""
    knot = torch.tensor(importance * delta**2, dtype=torch.float64, device=dim.device)
    inner = (
        (dim / 2 - 1) * math.log(2)
        - dim / 2 * math.log(importance)
        + torch.lgamma(dim / 2)
        + torch.special.gammainc(dim / 2, knot / 2).log()
    )
    beyond = torch.lgamma(dim) + torch.special.gammaincc(dim, knot).log()
    return torch.logaddexp(inner, knot / 2 - dim * math.log(importance * delta) + beyond)


def radial_log_integral(rho: Callable[[Tensor], Tensor], dim: Tensor, importance: float) -> Tensor:
    """Log of ``int_0^inf r**(dim-1) exp(-importance * rho(r**2)) dr`` by the trapezoid rule in ``u = log r``.

    In ``u`` the integrand is smooth, unimodal and decays at both ends, where the trapezoid rule converges
    exponentially. The window is where the log integrand is within 50 nats of its peak.

    Raises:
        ValueError: If the peak is beyond ``exp(60)`` scales.
    """

    def log_integrand(u: Tensor) -> Tensor:
        return dim.unsqueeze(-1) * u - importance * rho(torch.exp(2 * u))

    scalar = dim.ndim == 0
    dim = torch.atleast_1d(dim)
    coarse = torch.linspace(-60.0, 60.0, 24001, dtype=torch.float64, device=dim.device)
    peak = coarse[log_integrand(coarse).argmax(-1)].unsqueeze(-1)
    if bool((peak.abs() > 59.0).any()):
        raise ValueError(
            f"the normaliser's integrand peaks beyond exp(60) scales in {float(dim.max()):g} dimensions, where it "
            "cannot be integrated. Use a larger power."
        )
    floor = log_integrand(peak) - 50.0
    ends = []
    for direction in (-1.0, 1.0):
        near, far = torch.zeros_like(peak), torch.full_like(peak, 120.0)
        for _ in range(60):  # bisection for the edge of the window
            middle = (near + far) / 2
            inside = log_integrand(peak + direction * middle) > floor
            near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
        ends.append(peak + direction * far)
    u = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, POINTS, dtype=torch.float64, device=dim.device)
    step = (ends[1] - ends[0]).squeeze(-1) / (POINTS - 1)
    result = torch.logsumexp(log_integrand(u), -1) + torch.log(step)
    return result.squeeze(0) if scalar else result


def derivative(function: Callable[[Tensor], Tensor], point: Tensor, create_graph: bool = False) -> Tensor:
    """Elementwise derivative by autograd; zero where ``function`` does not depend on ``point``."""
    with torch.enable_grad():
        if not (create_graph and point.requires_grad):
            point = point.detach().requires_grad_(True)
        value = function(point).sum()
        if not value.requires_grad:
            return torch.zeros_like(point)
        (slope,) = torch.autograd.grad(value, point, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(point) if slope is None else slope
