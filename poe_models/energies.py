"""Expert energies: how much a scaled squared residual costs, in nats.

An energy is one non-decreasing function ``rho(q)`` of the squared residual ``q >= 0`` in units of the
expert's scale, with ``rho(0) = 0``. Everything else follows from it: the half-quadratic weight ``rho'``
(how strongly the fixed point still listens to the expert), the curvature ``rho''`` (what Laplace's
method adds), the normaliser (what evidence needs) and the Gaussian twin.

A new energy is one method:

>>> class GemanMcClure(Energy):
...     def rho(self, q):
...         return q / (1 + q)
>>> q = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
>>> GemanMcClure().weight(q)
tensor([1.0000, 0.2500, 0.0625], dtype=torch.float64)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.densities import log_sphere, radial_log_integral, student_log_normalizer

Exponent = float | Tensor | Literal["multivariate"]
Parameter = float | Tensor
"""A setting of an energy: a number, or a tensor that broadcasts against ``q`` (a sampled hyperparameter)."""


@dataclass(frozen=True)
class ScaleMixture:
    r"""``exp(-c rho(q)) = E[exp(-tau q / unit)]`` over ``tau ~ Gamma(c * shape, 1)``, for every power ``c > 0``.

    Attributes:
        shape: shape of the Gamma at ``c = 1``; None for a Gaussian, whose ``tau`` is ``c`` itself.
        unit: what divides ``q``.
    """

    shape: Parameter | None
    unit: Parameter


class Energy(ABC):
    """The energy ``rho(q)`` of one expert as a function of its scaled squared residual.

    Subclasses define :meth:`rho`; :meth:`weight` and :meth:`curvature` default to autograd and may be
    overridden by closed forms. Shapes are free: every method maps ``(...,)`` to ``(...,)``.

    Attributes:
        concave: whether ``rho`` is concave in ``q``. Then reweighting majorises the energy and every
            step of the fixed point decreases it; otherwise the solver line-searches.
        convex: whether ``r -> rho(r**2)`` is convex. Then the MAP is unique and one start is enough.
    """

    concave: ClassVar[bool] = False
    convex: ClassVar[bool] = False

    @abstractmethod
    def rho(self, q: Tensor) -> Tensor:
        """Energy in nats of squared residuals ``q`` of shape ``(...,)`` in units of the squared scale."""

    @override
    def __repr__(self) -> str:
        """Its name; a dataclass says its settings, too."""
        return f"{type(self).__qualname__}()"

    @property
    def is_concave(self) -> bool:
        """Whether this instance is concave in ``q`` (:class:`GeneralizedGaussian` depends on its power)."""
        return self.concave

    @property
    def is_convex(self) -> bool:
        """Whether this instance is convex in the residual ``sqrt(q)``."""
        return self.convex

    def weight(self, q: Tensor) -> Tensor:
        """Half-quadratic weight ``rho'(q)``, shape ``(...,)``."""
        return _derivative(self.rho, q)

    def weight_at_rest(self, like: Tensor) -> Tensor:
        """Weight of a residual that is met, ``rho'(0)``: what a relative anchor precision measures curvature by.

        Where it is zero or infinite no Gaussian has it, and the weight of a residual of one scale, ``rho'(1)``, stands
        in its place.

        Args:
            like: any tensor ``(...,)`` of the wanted shape, for dtype and device, too.
        """
        met, at_one = self.weight(torch.zeros_like(like)), self.weight(torch.ones_like(like))
        return torch.where((met > 0) & met.isfinite(), met, at_one)

    def curvature(self, q: Tensor) -> Tensor:
        """Second derivative ``rho''(q)``, shape ``(...,)``."""
        return _derivative(lambda point: _derivative(self.rho, point, create_graph=True), q)

    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        r"""Log of ``Z = \int exp(-importance * rho(|x|^2 / scale^2)) dx`` over ``x`` in ``dim`` dimensions.

        ``x`` is the residual in the coordinates in which the expert's operator is the identity on its
        range, so ``dim`` is the rank of ``P_i`` on ``vec(Z)``.

        Args:
            scale: the expert's scale ``s``, a number or a tensor.
            dim: number of dimensions, ``rank(P_i)``.
            importance: the expert's importance over the temperature, ``a / T``.

        The value is in nats, float64, of the broadcast shape of ``scale`` and ``dim``.

        Raises:
            ValueError: this energy has none.
        """
        raise ValueError(
            f"`{type(self).__name__}.log_normalizer(...)`: this energy has no normaliser, so its density is not "
            "proper on its own. Evidence, hierarchical scales and log likelihoods need one: use Gaussian, Huber, "
            "GeneralizedGaussian, or Cauchy / StudentT with exponent='multivariate', or define `log_normalizer`."
        )

    def scale_mixture(self) -> ScaleMixture:
        """This energy's density as a mixture of Gaussians over their scale, for Gibbs sampling.

        Raises:
            ValueError: none is known.
        """
        raise ValueError(
            f"`{self!r}`: this energy has no known Gaussian scale mixture, so Gibbs sampling does not apply. "
            "Use `slice_sample` or `nuts`, which serve any energy."
        )

    def for_dimension(self, dim: Tensor) -> Energy:
        """This energy on residuals of ``dim`` dimensions; only ``exponent="multivariate"`` depends on it."""
        return self

    def module(self, one: slice) -> Energy:
        """This energy for some modules of a batch; differs only where a setting is a tensor over modules."""
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)} if is_dataclass(self) else {}
        sliced = {name: value[one] for name, value in settings.items() if isinstance(value, Tensor) and value.ndim}
        return replace(self, **sliced) if sliced else self  # type: ignore[type-var]

    @property
    def needs_dimension(self) -> bool:
        """Whether the energy depends on the rank of the expert's operator, see :meth:`for_dimension`."""
        return getattr(self, "exponent", None) == "multivariate"

    def twin(self) -> Energy:
        """The Gaussian with the same weight at ``q = 0``.

        Heavy tails at equal scale also regularise differently; against the twin only the tail differs. Where the
        energy depends on the dimension, so does the twin. That of :class:`GeneralizedGaussian` is set by ``epsilon``
        alone and says little.

        >>> Cauchy().twin()
        Gaussian(precision=2.0)

        Raises:
            ValueError: the weight at 0 is not a positive finite number.
        """
        if self.needs_dimension:
            return TwinOf(self)
        at_zero = float(self.weight(torch.zeros((), dtype=torch.float64)))
        if not 0 < at_zero < math.inf:
            raise ValueError(f"`{self!r}.twin()`: its weight at q = 0 is {at_zero:g}, which no Gaussian has.")
        return Gaussian(precision=2.0 * at_zero)


@dataclass(frozen=True)
class Gaussian(Energy):
    """``rho(q) = precision * q / 2``.

    Args:
        precision: multiplies the energy; 1 is the standard Gaussian, other values are twins.
    """

    concave: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    precision: Parameter = 1.0

    def __post_init__(self) -> None:
        _require_positive("Gaussian", precision=self.precision)

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
        scale, dim = _f64(scale), _f64(dim)
        return 0.5 * dim * (torch.log(2 * math.pi / (importance * _f64(self.precision))) + 2 * torch.log(scale))


@dataclass(frozen=True)
class TwinOf(Energy):
    """The Gaussian twin of an energy that depends on the dimension of the residual; becomes one once it is known.

    Args:
        energy: an energy with ``exponent="multivariate"``.
    """

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
        at_zero = self.energy.for_dimension(dim).weight(torch.zeros_like(dim))
        return Gaussian(precision=2.0 * at_zero)


@dataclass(frozen=True)
class StudentT(Energy):
    r"""``rho(q) = k log(1 + q / df)``.

    Args:
        df: degrees of freedom ``nu > 0``.
        exponent: ``k``; by default ``(nu + 1) / 2`` ([PoE]'s choice). ``"multivariate"`` makes it
            ``(nu + D) / 2`` with ``D = rank(P_i)``, a normalised ``D``-variate Student-t.
    """

    concave: ClassVar[bool] = True
    df: Parameter
    exponent: Exponent | None = None

    def __post_init__(self) -> None:
        _require_positive("StudentT", df=self.df, exponent=self.exponent)

    @property
    def k(self) -> Parameter:
        """The exponent as a number.

        Raises:
            ValueError: the exponent is ``"multivariate"`` and no dimension is known yet.
        """
        if self.exponent is None:
            return (self.df + 1) / 2
        return _known_exponent(self, self.exponent)

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
        return replace(self, exponent=(self.df + dim) / 2) if _is_multivariate(self.exponent) else self

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        energy = self.for_dimension(_f64(dim))
        assert isinstance(energy, StudentT)
        shape = importance * _f64(energy.k)
        return student_log_normalizer(self, shape, _f64(scale).square() * energy.df, _f64(dim))


@dataclass(frozen=True)
class Cauchy(Energy):
    r"""``rho(q) = k log(1 + q)``.

    Args:
        exponent: ``k``, 1 in [PoE]; ``"multivariate"`` makes it ``(1 + D) / 2`` with ``D = rank(P_i)``,
            a normalised ``D``-variate Cauchy.
    """

    concave: ClassVar[bool] = True
    exponent: Exponent = 1.0

    def __post_init__(self) -> None:
        _require_positive("Cauchy", exponent=self.exponent)

    @property
    def k(self) -> Parameter:
        """The exponent as a number.

        Raises:
            ValueError: the exponent is ``"multivariate"`` and no dimension is known yet.
        """
        return _known_exponent(self, self.exponent)

    @override
    def rho(self, q: Tensor) -> Tensor:
        return self.k * torch.log1p(q)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return self.k / (1 + q)

    @override
    def curvature(self, q: Tensor) -> Tensor:
        return -self.k / (1 + q).square()

    @override
    def scale_mixture(self) -> ScaleMixture:
        return ScaleMixture(shape=self.k, unit=1.0)

    @override
    def for_dimension(self, dim: Tensor) -> Energy:
        return replace(self, exponent=(1 + dim) / 2) if _is_multivariate(self.exponent) else self

    @override
    def log_normalizer(self, scale: Parameter, dim: float | Tensor, importance: float = 1.0) -> Tensor:
        energy = self.for_dimension(_f64(dim))
        assert isinstance(energy, Cauchy)
        return student_log_normalizer(self, importance * _f64(energy.k), _f64(scale).square(), _f64(dim))


@dataclass(frozen=True)
class Welsch(Energy):
    """``rho(q) = (1 - exp(-q)) / 2``: bounded, so it redescends to no influence at all; no normaliser."""

    concave: ClassVar[bool] = True

    @override
    def rho(self, q: Tensor) -> Tensor:
        return -0.5 * torch.expm1(-q)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return 0.5 * torch.exp(-q)

    @override
    def curvature(self, q: Tensor) -> Tensor:
        return -0.5 * torch.exp(-q)


@dataclass(frozen=True)
class Huber(Energy):
    """``q / 2`` up to ``delta**2``, then ``delta * sqrt(q) - delta**2 / 2``.

    Args:
        delta: residual (in scales) at which the quadratic becomes linear.
    """

    concave: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    delta: float

    def __post_init__(self) -> None:
        _require_positive("Huber", delta=self.delta)

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
        # Radial integral in two pieces: a Gaussian up to delta, an exponential beyond it.
        scale, dim = _f64(scale), _f64(dim)
        a, knot = importance, torch.tensor(importance * self.delta**2, dtype=torch.float64)
        inner = (
            (dim / 2 - 1) * math.log(2)
            - dim / 2 * math.log(a)
            + torch.lgamma(dim / 2)
            + torch.special.gammainc(dim / 2, knot / 2).log()
        )
        outer = knot / 2 - dim * math.log(a * self.delta) + torch.lgamma(dim) + torch.special.gammaincc(dim, knot).log()
        return log_sphere(dim) + dim * torch.log(scale) + torch.logaddexp(inner, outer)


@dataclass(frozen=True)
class GeneralizedGaussian(Energy):
    """``((q + epsilon)**(power / 2) - epsilon**(power / 2)) / power``; ``power = 2`` is the Gaussian.

    Args:
        power: tail power; 1 is the Laplace density of the residual norm. Above 2 the energy is convex in
            ``q`` and the fixed point line-searches.
        epsilon: rounds the corner at ``q = 0`` (in squared scales), where powers below 2 would have an
            infinite weight. Residuals well above ``sqrt(epsilon)`` scales do not notice it.
    """

    power: float
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _require_positive("GeneralizedGaussian", power=self.power, epsilon=self.epsilon)

    @property
    @override
    def is_concave(self) -> bool:
        return self.power <= 2

    @property
    @override
    def is_convex(self) -> bool:
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
        scale, dim = _f64(scale), _f64(dim)
        return log_sphere(dim) + dim * torch.log(scale) + radial_log_integral(self.rho, dim, importance)


@dataclass(frozen=True)
class Custom(Energy):
    """An energy from a function, for trying something out without a subclass.

    Args:
        function: ``rho``; maps ``q`` of shape ``(...,)`` to nats of the same shape, differentiable.

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


def _derivative(function: Callable[[Tensor], Tensor], point: Tensor, create_graph: bool = False) -> Tensor:
    """Elementwise derivative by autograd; zero where ``function`` does not depend on ``point``."""
    with torch.enable_grad():
        if not (create_graph and point.requires_grad):
            point = point.detach().requires_grad_(True)
        value = function(point).sum()
        if not value.requires_grad:
            return torch.zeros_like(point)
        (slope,) = torch.autograd.grad(value, point, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(point) if slope is None else slope


def _f64(value: Parameter) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _is_multivariate(exponent: Exponent | None) -> bool:
    return isinstance(exponent, str)


def _known_exponent(energy: Energy, exponent: Exponent) -> Parameter:
    if isinstance(exponent, str):
        raise ValueError(
            f"`{energy!r}`: the exponent depends on the dimension of the residual, which is not known here. "
            "Bind the expert to updates first, or call `for_dimension(dim)`."
        )
    return exponent


def _require_positive(owner: str, **values: Exponent | None) -> None:
    for name, value in values.items():
        if isinstance(value, str) and value != "multivariate":
            raise ValueError(f"`{owner}({name}={value!r})`: the only named exponent is 'multivariate'.")
        number = value if isinstance(value, int | float) else None
        if isinstance(value, Tensor) and not bool((good := (value > 0) & value.isfinite()).all()):
            number = float(value.detach()[~good][0])
        if number is not None and not (0 < number < math.inf):
            raise ValueError(f"`{owner}({name}={number})`: must be a positive finite number.")
