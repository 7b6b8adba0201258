r"""Families of tails: zero-centred symmetric densities on the line, each a scale and at most one shape.

A family is ``f(x) = exp(-h(|x| / s; shape)) / (s C(shape))``. Fits also use its *influence* ``u h'(u)`` with
``u = |x| / s``: at the scale of greatest likelihood its mean is one, whatever the family, and since it never decreases
in ``u`` that scale is unique.

>>> STUDENT_T.log_density(np.array([0.0, 1.0]), 1.0, 1.0).round(6) == CAUCHY.log_density(np.array([0.0, 1.0])).round(6)
array([ True,  True])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats
from scipy.special import gammaln
from typing_extensions import override

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """The shape parameter of a family, with its prior.

    Args:
        symbol: Symbol in verdicts.
        bounds: Range in which fits look for it.
        log_prior: Log density of the shape itself in nats, up to a constant.
    """

    symbol: str
    bounds: tuple[float, float]
    log_prior: Callable[[Array], Array]


@dataclass(frozen=True)
class Family:
    """A zero-centred family of densities.

    Args:
        name: Name in tables.
        energy: ``h(u, shape)`` in nats, ``u = |x| / scale``.
        influence: ``u dh/du``.
        log_constant: ``log C(shape)``, the log integral of ``exp(-h)`` over the line.
        reference: The same distribution of ``scipy.stats`` from ``(scale, shape)``.
        shape: Its shape parameter; None for scale families.
        log_size: Log of a typical ``|x|`` at scale one, where the scale alone says little about it.
        nests: Names of the families that are special cases or limits of it.
    """

    name: str
    energy: Callable[[Array, Any], Array]
    influence: Callable[[Array, Any], Array]
    log_constant: Callable[[Any], Any]
    reference: Callable[[float, float], Any]
    shape: Shape | None = None
    log_size: Callable[[Any], Any] = np.zeros_like
    nests: frozenset[str] = frozenset()

    def log_density(self, values: Array, scale: Array | float = 1.0, shape: Array | float = 1.0) -> Array:
        """Log density in nats of values that broadcast against the positive parameters.

        Families without a shape do not look at it.
        """
        scale, shape = np.asarray(scale, dtype=np.float64), np.asarray(shape, dtype=np.float64)
        log_density: Array = -self.energy(np.abs(values) / scale, shape) - np.log(scale) - self.log_constant(shape)
        return log_density

    def distribution(self, scale: float, shape: float = 1.0) -> Any:
        """The frozen distribution of ``scipy.stats``, for quantiles and random numbers."""
        return self.reference(scale, shape)

    def covers(self, other: Family) -> bool:
        """Whether it is the other family or nests it.

        >>> STUDENT_T.covers(GAUSSIAN), LAPLACE.covers(GAUSSIAN)
        (True, False)
        """
        return other.name == self.name or other.name in self.nests

    @override
    def __repr__(self) -> str:
        return f"<{self.name}>"


def _gamma_2_01(df: Array) -> Array:
    """Gamma(2, rate 0.1): Juárez and Steel, 2010, Journal of Business & Economic Statistics 28(1)."""
    log_prior: Array = np.log(df) - 0.1 * df
    return log_prior


def _standard_lognormal(power: Array) -> Array:
    log_prior: Array = -0.5 * np.log(power) ** 2 - np.log(power)
    return log_prior


def _student_energy(u: Array, df: Array) -> Array:
    energy: Array = (df + 1) / 2 * np.log1p(u**2 / df)
    return energy


def _student_constant(df: Array) -> Array:
    constant: Array = gammaln(df / 2) - gammaln((df + 1) / 2) + 0.5 * np.log(df * np.pi)
    return constant


def _power(u: Array, power: Array) -> Array:
    with np.errstate(over="ignore"):  # far out under a large power: a density of zero
        raised: Array = u**power
    return raised


GAUSSIAN = Family(
    "Gaussian",
    energy=lambda u, _: u**2 / 2,
    influence=lambda u, _: u**2,
    log_constant=lambda _: 0.5 * np.log(2 * np.pi),
    reference=lambda scale, _: scipy.stats.norm(scale=scale),
)
LAPLACE = Family(
    "Laplace",
    energy=lambda u, _: u,
    influence=lambda u, _: u,
    log_constant=lambda _: np.log(2.0),
    reference=lambda scale, _: scipy.stats.laplace(scale=scale),
)
LOGISTIC = Family(
    "logistic",
    energy=lambda u, _: u + 2 * np.log1p(np.exp(-u)),
    influence=lambda u, _: u * np.tanh(u / 2),
    log_constant=lambda _: 0.0,
    reference=lambda scale, _: scipy.stats.logistic(scale=scale),
)
CAUCHY = Family(
    "Cauchy",
    energy=lambda u, _: np.log1p(u**2),
    influence=lambda u, _: 2 * u**2 / (1 + u**2),
    log_constant=lambda _: np.log(np.pi),
    reference=lambda scale, _: scipy.stats.cauchy(scale=scale),
)
STUDENT_T = Family(
    "Student-t",
    energy=_student_energy,
    influence=lambda u, df: (df + 1) * u**2 / (df + u**2),
    log_constant=_student_constant,
    reference=lambda scale, df: scipy.stats.t(df, scale=scale),
    shape=Shape("nu", (0.1, 1000.0), _gamma_2_01),
    nests=frozenset({"Gaussian", "Cauchy"}),
)
GENERALIZED_GAUSSIAN = Family(
    "generalised Gaussian",
    energy=_power,
    influence=lambda u, power: power * _power(u, power),
    log_constant=lambda power: np.log(2 / power) + gammaln(1 / power),
    reference=lambda scale, power: scipy.stats.gennorm(power, scale=scale),
    shape=Shape("p", (0.1, 20.0), _standard_lognormal),
    log_size=lambda power: gammaln(2 / power) - gammaln(1 / power),  # of the mean
    nests=frozenset({"Gaussian", "Laplace"}),
)
FAMILIES: tuple[Family, ...] = (GAUSSIAN, LAPLACE, LOGISTIC, STUDENT_T, CAUCHY, GENERALIZED_GAUSSIAN)


def families_named(names: Sequence[str]) -> tuple[Family, ...]:
    """Families by their names in ``FAMILIES``, in the same order.

    Raises:
        ValueError: If there are none, or one is unknown or there twice.

    >>> families_named(["Cauchy"])
    (<Cauchy>,)
    """
    known = {family.name: family for family in FAMILIES}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"`families={list(names)}`: {f'{unknown[0]!r} is unknown' if unknown else 'empty, or one is there twice'}. "
            f"Known: {', '.join(known)}."
        )
    return tuple(known[name] for name in names)
