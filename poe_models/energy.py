"""The base of energies, and the Gaussian, which every energy has as a twin."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, is_dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.densities import ScaleMixture, derivative, float64
from poe_models.limits import Parameter, require_positive
from poe_models.records import with_tensors


class Energy(ABC):
    """The energy ``rho(q)`` of one expert as a function of its scaled squared residual.

    Subclasses define :meth:`rho`; :meth:`weight` and :meth:`curvature` default to autograd. Shapes are free.

    Attributes:
        concave: Whether ``rho`` is concave in ``q``. Then reweighting majorises the energy and every
            step of the fixed point decreases it; otherwise the solver line-searches.
        convex: Whether ``r -> rho(r**2)`` is convex. Then the MAP is unique and one start is enough.
    """

    concave: ClassVar[bool] = False
    convex: ClassVar[bool] = False

    @property
    def convex_below(self) -> Parameter:
        """Squared residual up to which ``r -> rho(r**2)`` is convex, or a lower one; 0 where none is known.

        A minimum at which no expert can have left that range is the lowest of all.
        """
        return math.inf if self.convex else 0.0

    @abstractmethod
    def rho(self, q: Tensor) -> Tensor:
        """Energy in nats of squared residuals ``q`` of shape ``(...,)`` in units of the squared scale."""

    @override
    def __repr__(self) -> str:
        """Its name; a dataclass says its settings, too."""
        return f"{type(self).__qualname__}()"

    def weight(self, q: Tensor) -> Tensor:
        """Half-quadratic weight ``rho'(q)``, shape ``(...,)``."""
        return derivative(self.rho, q)

    def weight_at_rest(self, like: Tensor) -> Tensor:
        """Weight at a zero residual, ``rho'(0)``: the curvature that a relative anchor precision is relative to.

        Where it is zero or infinite, the weight of a residual of one scale, ``rho'(1)``, stands in its place. Shape,
        dtype and device are those of ``like``.
        """
        met, at_one = self.weight(torch.zeros_like(like)), self.weight(torch.ones_like(like))
        return torch.where((met > 0) & met.isfinite(), met, at_one)

    def curvature(self, q: Tensor) -> Tensor:
        """Second derivative ``rho''(q)``, shape ``(...,)``."""
        return derivative(lambda point: derivative(self.rho, point, create_graph=True), q)

    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        r"""Log of ``\int exp(-importance * rho(|x|^2 / scale^2)) dx`` in ``dim`` dimensions, nats in float64.

        For an expert ``dim`` is the rank of ``P_i`` on ``vec(Z)``, ``importance`` is over the temperature, ``a / T``.

        Raises:
            ValueError: If this energy has none.
        """
        raise ValueError(
            f"`{type(self).__name__}.log_normalizer(...)`: this energy has no normaliser, so its density is not "
            "proper on its own. Evidence, hierarchical scales and log likelihoods need one: use Gaussian, Huber, "
            "GeneralizedGaussian, or Cauchy / StudentT with exponent='multivariate', or define `log_normalizer`."
        )

    def scale_mixture(self) -> ScaleMixture:
        """This energy's density as a mixture of Gaussians over their scale, for Gibbs sampling.

        Raises:
            ValueError: If none is known.
        """
        raise ValueError(
            f"`{self!r}`: this energy has no known Gaussian scale mixture, so Gibbs sampling does not apply. "
            "Use `slice_sample` or `nuts`, which serve any energy."
        )

    @property
    def is_mixture(self) -> bool:
        """Whether a Gaussian scale mixture is known."""
        try:
            self.for_dimension(torch.ones((), dtype=torch.float64)).scale_mixture()
        except ValueError:
            return False
        return True

    def for_dimension(self, dim: Tensor) -> Energy:
        """This energy with numbers for the settings that depend on the dimension; called where it is bound."""
        return self

    def module(self, one: slice | list[int]) -> Energy:
        """This energy for some modules of a batch; differs only where a setting is a tensor over modules."""
        return with_tensors(lambda value: value[one], self) if is_dataclass(self) else self

    @property
    def needs_dimension(self) -> bool:
        """Whether the energy depends on the rank of the expert's operator, see :meth:`for_dimension`."""
        return False

    def twin(self) -> Energy:
        """The Gaussian with the same weight at ``q = 0``, against which only the tail differs.

        That of :class:`GeneralizedGaussian` is set by ``epsilon`` alone and says little.

        >>> from poe_models.energies import Cauchy
        >>> Cauchy().twin()
        Gaussian(precision=2.0)

        Raises:
            ValueError: If the weight at 0 is not a positive finite number.
        """
        if self.needs_dimension:
            return TwinOf(self)
        at_zero = float(self.weight(torch.zeros((), dtype=torch.float64)))
        if not 0 < at_zero < math.inf:
            raise ValueError(f"`{self!r}.twin()`: its weight at q = 0 is {at_zero:g}, which no Gaussian has.")
        return Gaussian(precision=2.0 * at_zero)


def require_slope(energy: Energy) -> None:
    """Refuse an energy whose derivative by automatic differentiation is not that of its values.

    One that is 0 everywhere pulls nothing, and one that is wrong at some residuals leads to no minimum. Judged at 25
    residuals by differences of values, so that a kink or a jump at a single one does no harm.

    Args:
        energy: Any energy; one whose weights are written out is judged by its values alone.

    Raises:
        ValueError: If it carries no gradient, or the wrong one.
    """
    energy = energy.for_dimension(torch.tensor(2.0, dtype=torch.float64))
    q = torch.logspace(-3, 3, 25, dtype=torch.float64)
    slope, step = derivative(energy.rho, q).double(), 0.01 * q
    if not bool((slope != 0).any()):
        raise ValueError(
            f"the derivative of `rho` is 0 at every q, so that nothing would pull. {_WITH_TORCH}; a step function has "
            "no slope."
        )
    with torch.no_grad():
        risen = (energy.rho(q + step).double() - energy.rho(q - step).double()) / (2 * step)
    wrong = (risen - slope).abs() > 0.05 * torch.maximum(risen.abs(), slope.abs()) + 1e-8
    if int(wrong.sum()) > 2:
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"the derivative of `rho` at q = {float(q[at]):.3g} is {float(slope[at]):.3g}, but its values rise by "
            f"{float(risen[at]):.3g} per unit there. {_WITH_TORCH}."
        )


_WITH_TORCH = "Compute it from `q` with torch, without `.detach()`, `.item()` or NumPy"


@dataclass(frozen=True)
class Gaussian(Energy):
    """``rho(q) = precision * q / 2``; a precision of 1 is the standard Gaussian, twins have others."""

    concave: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    precision: Parameter = 1.0

    def __post_init__(self) -> None:
        require_positive("Gaussian(", precision=self.precision)

    @override
    def rho(self, q: Tensor) -> Tensor:
        return 0.5 * self.precision * q

    @override
    def weight(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q) + 0.5 * self.precision

    @override
    def curvature(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    @override
    def scale_mixture(self) -> ScaleMixture:
        return ScaleMixture(shape=None, unit=2.0 / self.precision)

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        scale, dim = float64(scale), float64(dim)
        return 0.5 * dim * (torch.log(2 * math.pi / (importance * float64(self.precision))) + 2 * torch.log(scale))


@dataclass(frozen=True)
class TwinOf(Energy):
    """The Gaussian twin of an energy that depends on the dimension; becomes a Gaussian once that is known."""

    concave: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    energy: Energy

    @property
    @override
    def needs_dimension(self) -> bool:
        return True

    @override
    def rho(self, q: Tensor) -> Tensor:
        raise ValueError(f"`{self!r}`: the dimension of the residual is not known here. Call `for_dimension(dim)`.")

    @override
    def for_dimension(self, dim: Tensor) -> Energy:
        return Gaussian(precision=2.0 * self.energy.for_dimension(dim).weight(torch.zeros_like(dim)))
