"""Energies at values worked by hand, at their knots and at the edges of their settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poe_models import Cauchy, Custom, Energy, Gaussian, GeneralizedGaussian, Huber, StudentT, Welsch
from poe_models.densities import log_sphere, radial_log_integral, student_log_normalizer
from poe_models.energies import ENERGIES
from poe_models.energy import TwinOf
from tests.helpers import assert_close


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("energy", "q", "rho", "weight", "curvature"),
    [
        (Gaussian(3.0), 2.0, 3.0, 1.5, 0.0),
        (Cauchy(2.0), 3.0, 2 * math.log(4), 0.5, -0.125),
        (StudentT(3.0), 1.0, 2 * math.log(4 / 3), 0.5, -0.125),
        (StudentT(2.0, exponent=3.0), 2.0, 3 * math.log(2), 0.75, -0.1875),
        (Welsch(), math.log(2), 0.25, 0.25, -0.25),
        (Huber(0.5), 0.16, 0.08, 0.5, 0.0),
        (Huber(0.5), 0.25, 0.125, 0.5, 0.0),
        (Huber(0.5), 4.0, 0.875, 0.125, -0.015625),
        (GeneralizedGaussian(1.0, epsilon=0.25), 2.0, 1.0, 1 / 3, -2 / 27),
        (GeneralizedGaussian(4.0, epsilon=0.25), 0.75, (1 - 0.0625) / 4, 0.5, 0.5),
    ],
    ids=repr,
)
def test_values_by_hand(energy: Energy, q: float, rho: float, weight: float, curvature: float) -> None:
    assert float(energy.rho(f64(q))) == pytest.approx(rho, rel=1e-14)
    assert float(energy.weight(f64(q))) == pytest.approx(weight, rel=1e-14)
    assert float(energy.curvature(f64(q))) == pytest.approx(curvature, rel=1e-14, abs=1e-300)


def test_what_concave_and_what_convex() -> None:
    claims = {
        Gaussian(): (True, True),
        Cauchy(): (True, False),
        StudentT(3.0): (True, False),
        Welsch(): (True, False),
        Huber(0.7): (True, True),
        TwinOf(Cauchy("multivariate")): (True, True),
        GeneralizedGaussian(0.5): (True, False),
        GeneralizedGaussian(1.0): (True, True),
        GeneralizedGaussian(2.0): (True, True),
        GeneralizedGaussian(2.5): (False, True),
        Custom(lambda q: q): (False, False),
    }
    assert {energy: (energy.concave, energy.convex) for energy in claims} == claims


def test_defaults_are_those_of_the_paper() -> None:
    assert Gaussian() == Gaussian(precision=1.0)
    assert Cauchy() == Cauchy(exponent=1.0)
    assert StudentT(4.0).k == 2.5
    assert GeneralizedGaussian(1.0).epsilon == 1e-6
    assert set(ENERGIES) >= {"Gaussian", "Cauchy", "StudentT", "Welsch", "Huber", "GeneralizedGaussian"}


def test_multivariate_exponents_and_their_twins() -> None:
    dim = f64(1.0, 9.0)
    for energy, k, at_zero in (
        (StudentT(3.0, "multivariate"), (3 + dim) / 2, (3 + dim) / 6),
        (Cauchy("multivariate"), (1 + dim) / 2, (1 + dim) / 2),
    ):
        assert energy.needs_dimension
        bound = energy.for_dimension(dim)
        assert not bound.needs_dimension
        assert_close(bound.k, k)  # type: ignore[attr-defined]
        assert_close(bound.weight(torch.zeros(2, dtype=torch.float64)), at_zero)
        twin = energy.twin()
        assert twin.needs_dimension
        assert_close(twin.for_dimension(dim).weight(f64(0.0, 5.0)), at_zero)
        with pytest.raises(ValueError, match="for_dimension"):
            twin.rho(dim)
    for energy in (Gaussian(), Cauchy(), StudentT(3.0), Huber(0.7), Welsch()):
        assert not energy.needs_dimension
        assert energy.for_dimension(dim) is energy


def test_scale_mixtures_say_what_gibbs_draws() -> None:
    """``exp(-c rho(q)) = E exp(-tau q / unit)`` with ``tau ~ Gamma(c shape, 1)``, whose transform is a power."""
    q, c = f64(0.0, 0.3, 7.0), 1.7
    for energy in (Cauchy(2.0), StudentT(3.0), StudentT(3.0, exponent=0.8)):
        mixture = energy.scale_mixture()
        assert mixture.shape is not None
        assert_close((1 + q / mixture.unit) ** (-c * mixture.shape), torch.exp(-c * energy.rho(q)))
    mixture = Gaussian(3.0).scale_mixture()
    assert mixture.shape is None
    assert_close(torch.exp(-c * q / mixture.unit), torch.exp(-c * Gaussian(3.0).rho(q)))
    with pytest.raises(ValueError, match="no known Gaussian scale mixture"):
        Huber(1.0).scale_mixture()


def test_settings_that_are_tensors_are_sliced_by_module() -> None:
    energy = StudentT(df=f64(2.0, 3.0, 4.0), exponent=torch.tensor(5.0))
    one = energy.module(slice(1, 2))
    assert isinstance(one, StudentT)
    assert_close(torch.as_tensor(one.df), f64(3.0))
    assert one.exponent is energy.exponent
    assert Cauchy(2.0).module(slice(0, 1)) == Cauchy(2.0)
    custom = Custom(lambda q: q)
    assert custom.module(slice(0, 1)) is custom


def test_a_weight_at_rest_is_one_that_a_gaussian_has() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    cases = [(Cauchy(2.0), 2.0), (Gaussian(3.0), 1.5), (Welsch(), 0.5), (Huber(0.5), 0.5)]
    # No slope at 0, an infinite one, and the corner that epsilon rounds: the weight at one scale stands in.
    cases += [(Custom(lambda q: q**2 / 2), 1.0), (Custom(lambda q: q.sqrt()), 0.5)]
    cases += [(GeneralizedGaussian(1.0, epsilon=1e-14), 0.5)]
    for energy, expected in cases:
        assert_close(energy.weight_at_rest(like), torch.full_like(like, expected), 1e-12)


def test_a_twin_needs_a_positive_finite_weight() -> None:
    assert Custom(lambda q: 4 * q).twin() == Gaussian(precision=8.0)
    for energy in (Custom(lambda q: q**2), Custom(lambda q: q.sqrt())):
        with pytest.raises(ValueError, match="weight at q = 0 is"):
            energy.twin()


def test_derivatives_by_autograd_pass_gradients_on_and_take_constants() -> None:
    """Base-class derivatives inside a larger gradient, and of functions that do not depend on ``q``."""
    cube = Custom(lambda q: q**3)
    assert_close(cube.weight(f64(2.0)), f64(12.0))
    assert_close(cube.curvature(f64(2.0)), f64(12.0))
    assert not cube.weight(f64(2.0)).requires_grad
    constant = Custom(lambda q: torch.ones_like(q))
    setting = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    of_its_setting = Custom(lambda q: setting * torch.ones_like(q))
    linear = Custom(lambda q: 2 * q)
    for energy, weight in ((constant, 0.0), (of_its_setting, 0.0), (linear, 2.0)):
        assert_close(energy.weight(f64(3.0)), f64(weight))
        assert float(energy.curvature(f64(3.0))) == 0.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_settings_are_positive_and_finite(value: float) -> None:
    builds = [
        lambda v: Gaussian(v),
        lambda v: StudentT(v),
        lambda v: StudentT(3.0, exponent=v),
        lambda v: Cauchy(v),
        lambda v: Huber(v),
        lambda v: GeneralizedGaussian(v),
        lambda v: GeneralizedGaussian(1.0, epsilon=v),
    ]
    for build in builds:
        with pytest.raises(ValueError, match="must be a positive finite number"):
            build(value)
    with pytest.raises(ValueError, match="must be a positive finite number"):
        StudentT(df=torch.tensor([3.0, value]))
    with pytest.raises(ValueError, match=r"df=-2\.0"):
        StudentT(df=torch.tensor([0.5, -2.0, -3.0]))
    StudentT(df=torch.tensor([0.5]))
    StudentT(df=torch.tensor([]))
    for tiny in (1e-30, 1e30):
        Gaussian(tiny)
    with pytest.raises(ValueError, match="only named exponent"):
        StudentT(3.0, exponent="univariate")  # type: ignore[arg-type]


# --- normalisers ---


def test_spheres_by_hand() -> None:
    expected = f64(2.0, 2 * math.pi, 4 * math.pi, 2 * math.pi**2).log()
    assert_close(log_sphere(f64(1.0, 2.0, 3.0, 4.0)), expected, 1e-14)


def test_the_student_integral_by_hand_and_where_it_stops_to_exist() -> None:
    """Over one dimension ``(1 + x^2 / 4)^-1`` integrates to 2 pi, ``(1 + x^2)^-2`` to pi / 2."""
    found = student_log_normalizer("E", f64(1.0, 2.0), f64(4.0, 1.0), f64(1.0, 1.0))
    assert_close(found, f64(2 * math.pi, math.pi / 2).log(), 1e-14)
    student_log_normalizer("E", f64(1.0001), f64(1.0), f64(2.0))
    for shape in (1.0, 0.5):
        with pytest.raises(
            ValueError, match=r"is 0\.5, which must exceed dim / 2 = 1 |is 1, which must exceed dim / 2 = 1 "
        ):
            student_log_normalizer("E", f64(9.0, shape), f64(1.0), f64(1.0, 2.0))


@pytest.mark.parametrize("importance", [0.3, 1.0, 40.0])
def test_the_radial_integral_of_a_gaussian_is_a_gamma_function(importance: float) -> None:
    """``int r^(d-1) exp(-a r^2 / 2) dr = 2^(d/2-1) Gamma(d/2) a^(-d/2)``, scalars and batches alike."""
    dim = f64(1.0, 2.0, 7.0, 1e4)
    exact = (dim / 2 - 1) * math.log(2) + torch.lgamma(dim / 2) - dim / 2 * math.log(importance)
    found = radial_log_integral(lambda q: q / 2, dim, importance)
    assert_close(found, exact, 1e-12)
    alone = radial_log_integral(lambda q: q / 2, dim[2], importance)
    assert alone.ndim == 0
    assert float(alone) == pytest.approx(float(exact[2]), rel=1e-12)


def test_the_radial_integral_reaches_far_tails_and_says_when_it_does_not() -> None:
    """``rho = r^p / p``: with ``t = r^p / p`` a Gamma function of ``d / p``, also where the peak is at exp(20)."""
    for power, dim in ((0.25, 40.0), (0.5, 3.0), (6.0, 3.0)):
        exact = (dim / power - 1) * math.log(power) + math.lgamma(dim / power)
        found = radial_log_integral(lambda q, p=power: q ** (p / 2) / p, f64(dim).squeeze(), 1.0)
        assert float(found) == pytest.approx(exact, rel=1e-9, abs=1e-9)
    for importance in (1e60, 1e-60):
        with pytest.raises(ValueError, match="peaks beyond"):
            radial_log_integral(lambda q: q / 2, f64(1.0), importance)
    with pytest.raises(ValueError, match="in 64 dimensions"):
        radial_log_integral(lambda q: q.log1p().log1p(), f64(3.0, 64.0), 1.0)


def test_hubers_normaliser_weighs_both_of_its_pieces() -> None:
    """In one dimension: a Gaussian up to delta and an exponential beyond, both by hand."""
    delta, a, scale = 0.8, 1.7, 2.0
    inner = math.sqrt(2 * math.pi / a) * math.erf(delta * math.sqrt(a / 2))
    outer = 2 * math.exp(a * delta**2 / 2) * math.exp(-a * delta**2) / (a * delta)
    found = float(Huber(delta).log_normalizer(scale, 1.0, a))
    assert found == pytest.approx(math.log(scale * (inner + outer)), rel=1e-13)
