"""Expert energies: how much a scaled squared residual costs, in nats.

An energy is one non-decreasing function ``rho(q)`` of the squared residual ``q >= 0`` in units of the expert's scale,
with ``rho(0) = 0``. Everything else follows from it: the half-quadratic weight ``rho'`` of the fixed point, the
curvature ``rho''`` of Laplace's method, the normaliser of the evidence, and the Gaussian twin.

A new energy is one method:

>>> class GemanMcClure(Energy):
...     def rho(self, q):
...         return q / (1 + q)
>>> q = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
>>> GemanMcClure().weight(q)
tensor([1.0000, 0.2500, 0.0625], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.densities import (
    ScaleMixture,
    float64,
    huber_radial_integral,
    log_sphere,
    radial_log_integral,
    student_log_normalizer,
)
from poe_models.energy import Energy, Gaussian
from poe_models.limits import Parameter, require_positive

__all__ = [
    "ENERGIES",
    "Cauchy",
    "Custom",
    "Energy",
    "Gaussian",
    "GeneralizedGaussian",
    "Huber",
    "StudentT",
    "Welsch",
]

Exponent = float | Tensor | Literal["multivariate"]


@dataclass(frozen=True)
class StudentT(Energy):
    r"""``rho(q) = k log(1 + q / df)``.

    Args:
        df: Degrees of freedom ``nu > 0``.
        exponent: ``k``; by default ``(nu + 1) / 2`` ([PoE]'s choice). ``"multivariate"`` makes it
            ``(nu + D) / 2`` with ``D = rank(P_i)``, a normalised ``D``-variate Student-t.
    """

    concave: ClassVar[bool] = True
    df: Parameter
    exponent: Exponent | None = None

    def __post_init__(self) -> None:
        name, exponent = type(self).__name__, self.exponent
        if isinstance(exponent, str) and exponent != "multivariate":
            raise ValueError(f"`{name}(exponent={exponent!r})`: the only named exponent is 'multivariate'.")
        require_positive(f"{name}(", df=self.df, exponent=None if isinstance(exponent, str) else exponent)

    @property
    @override
    def needs_dimension(self) -> bool:
        return isinstance(self.exponent, str)

    @property
    def k(self) -> Parameter:
        """The exponent as a number.

        Raises:
            ValueError: If the exponent is ``"multivariate"`` and no dimension is known yet.
        """
        if isinstance(self.exponent, str):
            raise ValueError(
                f"`{self!r}`: the exponent depends on the dimension of the residual, which is not known here. "
                "Bind the expert to updates first, or call `for_dimension(dim)`."
            )
        return (self.df + 1) / 2 if self.exponent is None else self.exponent

    @property
    @override
    def convex_below(self) -> Parameter:
        return self.df

    @override
    def rho(self, q: Tensor) -> Tensor:
        return self.k * torch.log1p(q / self.df)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return self.k / (self.df + q)

    @override
    def curvature(self, q: Tensor) -> Tensor:
        return -self.k / (self.df + q).square()

    @override
    def scale_mixture(self) -> ScaleMixture:
        return ScaleMixture(shape=self.k, unit=self.df)

    @override
    def for_dimension(self, dim: Tensor) -> Energy:
        return replace(self, exponent=(self.df + dim) / 2) if self.needs_dimension else self

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        energy = self.for_dimension(float64(dim))
        assert isinstance(energy, StudentT)
        shape = importance * float64(energy.k)
        return student_log_normalizer(self, shape, float64(scale).square() * energy.df, float64(dim))


@dataclass(frozen=True)
class Cauchy(StudentT):
    r"""``rho(q) = k log(1 + q)``: :class:`StudentT` with one degree of freedom.

    Args:
        exponent: ``k``, 1 in [PoE]; ``"multivariate"`` makes it ``(1 + D) / 2`` with ``D = rank(P_i)``,
            a normalised ``D``-variate Cauchy.
    """

    df: Parameter = field(default=1.0, init=False, repr=False)
    exponent: Exponent | None = 1.0


@dataclass(frozen=True)
class Welsch(Energy):
    """``rho(q) = (1 - exp(-q)) / 2``: bounded, so it redescends to no influence at all; no normaliser."""

    concave: ClassVar[bool] = True

    @property
    @override
    def convex_below(self) -> Parameter:
        return 0.5

    @override
    def rho(self, q: Tensor) -> Tensor:
        return -0.5 * torch.expm1(-q)


@dataclass(frozen=True)
class Huber(Energy):
    """``q / 2`` up to a residual of ``delta`` scales, ``q = delta**2``, then ``delta * sqrt(q) - delta**2 / 2``."""

    concave: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    delta: float

    def __post_init__(self) -> None:
        require_positive("Huber(", delta=self.delta)

    @override
    def rho(self, q: Tensor) -> Tensor:
        # The clamp keeps sqrt away from 0, where its derivative would poison autograd through `where`.
        root = q.clamp(min=self.delta**2).sqrt()
        return torch.where(q <= self.delta**2, 0.5 * q, self.delta * root - 0.5 * self.delta**2)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return 0.5 * self.delta * q.clamp(min=self.delta**2).rsqrt()

    @override
    def curvature(self, q: Tensor) -> Tensor:
        tail = -0.25 * self.delta * q.clamp(min=self.delta**2) ** -1.5
        return torch.where(q <= self.delta**2, torch.zeros_like(q), tail)

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        scale, dim = float64(scale), float64(dim)
        return log_sphere(dim) + dim * torch.log(scale) + huber_radial_integral(self.delta, dim, importance)


@dataclass(frozen=True)
class GeneralizedGaussian(Energy):
    """``((q + epsilon)**(power / 2) - epsilon**(power / 2)) / power``; ``power = 2`` is the Gaussian.

    Args:
        power: Tail power; 1 is the Laplace density of the residual norm. Above 2 the energy is convex in
            ``q`` and the fixed point line-searches.
        epsilon: Rounds the corner at ``q = 0`` (in squared scales), where powers below 2 would have an
            infinite weight. Residuals well above ``sqrt(epsilon)`` scales do not notice it.
    """

    power: float
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require_positive("GeneralizedGaussian(", power=self.power, epsilon=self.epsilon)

    @property
    @override
    def concave(self) -> bool:  # type: ignore[override]
        return self.power <= 2

    @property
    @override
    def convex(self) -> bool:  # type: ignore[override]
        return self.power >= 1

    @override
    def rho(self, q: Tensor) -> Tensor:
        return ((q + self.epsilon) ** (self.power / 2) - self.epsilon ** (self.power / 2)) / self.power

    @override
    def weight(self, q: Tensor) -> Tensor:
        return 0.5 * (q + self.epsilon) ** (self.power / 2 - 1)

    @override
    def weight_at_rest(self, like: Tensor) -> Tensor:
        return self.weight(torch.ones_like(like))  # at q = 0 it is epsilon's alone

    @override
    def curvature(self, q: Tensor) -> Tensor:
        return 0.5 * (self.power / 2 - 1) * (q + self.epsilon) ** (self.power / 2 - 2)

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        scale, dim = float64(scale), float64(dim)
        return log_sphere(dim) + dim * torch.log(scale) + radial_log_integral(self.rho, dim, importance)


@dataclass(frozen=True)
class Custom(Energy):
    """An energy from a differentiable function ``rho``, for trying something out without a subclass.

    >>> Custom(lambda q: q.sqrt()).rho(torch.tensor(4.0))
    tensor(2.)
    """

    function: Callable[[Tensor], Tensor]

    @override
    def rho(self, q: Tensor) -> Tensor:
        return self.function(q)


ENERGIES: dict[str, type[Energy]] = {
    cls.__name__: cls for cls in (Gaussian, Cauchy, StudentT, Welsch, Huber, GeneralizedGaussian)
}
