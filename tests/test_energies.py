from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from poe_models import Cauchy, Custom, Energy, Gaussian, GeneralizedGaussian, Huber, StudentT, Welsch
from poe_models.energies import ENERGIES as REGISTRY
from tests.helpers import ENERGIES, assert_close, name_of

Q = torch.tensor([0.0, 1e-12, 1e-3, 0.3, 0.49, 1.0, 7.0, 300.0], dtype=torch.float64)
NORMALISED = [
    (Gaussian(), 1.0),
    (Gaussian(precision=2.0), 0.7),
    (Cauchy(exponent="multivariate"), 1.0),
    (Cauchy(exponent=6.0), 1.5),
    (StudentT(df=3.0, exponent="multivariate"), 1.0),
    (StudentT(df=2.5, exponent=5.0), 1.3),
    (Huber(delta=0.7), 1.2),
    (GeneralizedGaussian(power=1.0), 1.0),
    (GeneralizedGaussian(power=0.7, epsilon=1e-2), 2.0),
    (GeneralizedGaussian(power=4.0), 0.4),
]


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_weight_and_curvature_agree_with_autograd_at_zero_too(energy: Energy) -> None:
    q = Q.clone().requires_grad_(True)
    (weight,) = torch.autograd.grad(energy.rho(q).sum(), q, create_graph=True)
    assert_close(energy.weight(Q), weight.detach(), 1e-12)
    curvature = torch.zeros_like(Q)
    if weight.requires_grad:
        (curvature,) = torch.autograd.grad(weight.sum(), q)
    # Huber's second derivative jumps at delta^2 = 0.49, where either side is right.
    keep = Q != 0.49 if isinstance(energy, Huber) else torch.ones_like(Q, dtype=torch.bool)
    assert_close(energy.curvature(Q)[keep], curvature[keep], 1e-12)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_default_derivatives_of_the_base_class_are_those(energy: Energy) -> None:
    keep = Q != 0.49
    assert_close(Energy.weight(energy, Q), energy.weight(Q), 1e-12)
    assert_close(Energy.curvature(energy, Q)[keep], energy.curvature(Q)[keep], 1e-12)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_rho_is_zero_at_zero_and_does_not_decrease(energy: Energy) -> None:
    grid = torch.logspace(-8, 4, 2000, dtype=torch.float64)
    assert float(energy.rho(torch.zeros((), dtype=torch.float64))) == 0.0
    assert bool((energy.rho(grid).diff() >= 0).all())


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_declared_concavity_and_convexity_hold(energy: Energy) -> None:
    q = torch.logspace(-6, 3, 3000, dtype=torch.float64)
    if energy.concave:
        assert bool((energy.weight(q).diff() <= 1e-15).all())
    r = torch.linspace(0, 30, 5001, dtype=torch.float64)
    second = energy.rho(r.square()).diff().diff()
    if energy.convex:
        assert float(second.min()) > -1e-10
    else:
        assert float(second.min()) < -1e-10 or isinstance(energy, Custom)


def test_student_t_and_cauchy_are_the_densities_of_that_name() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    student = StudentT(df=4.0)
    log_density = -student.rho((x / 1.7).square()) - student.log_normalizer(1.7, 1.0)
    assert_close(log_density, torch.from_numpy(stats.t.logpdf(x.numpy(), df=4.0, scale=1.7)), 1e-12)
    cauchy = -Cauchy().rho((x / 0.6).square()) - Cauchy().log_normalizer(0.6, 1.0)
    assert_close(cauchy, torch.from_numpy(stats.cauchy.logpdf(x.numpy(), scale=0.6)), 1e-12)


def test_multivariate_student_t_is_scipys() -> None:
    point = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    dim = torch.tensor(3.0, dtype=torch.float64)
    energy = StudentT(df=3.0, exponent="multivariate").for_dimension(dim)
    value = -energy.rho((point / 1.4).square().sum()) - energy.log_normalizer(1.4, dim)
    expected = stats.multivariate_t.logpdf(point.numpy(), shape=1.4**2 * np.eye(3), df=3.0)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)


def test_generalized_gaussian_is_scipys_gennorm_when_its_corner_is_sharp() -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)[::2]
    energy = GeneralizedGaussian(power=1.5, epsilon=1e-14)
    value = -energy.rho(x.square()) - energy.log_normalizer(1.0, 1.0)
    expected = stats.gennorm.logpdf(x.numpy(), beta=1.5, scale=1.5 ** (1 / 1.5))
    assert_close(value, torch.from_numpy(expected), 1e-6)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("energy", "importance"), NORMALISED, ids=name_of)
def test_normalizer_agrees_with_quadrature(energy: Energy, importance: float, dim: int) -> None:
    scale = 0.8
    bound = energy.for_dimension(torch.tensor(float(dim), dtype=torch.float64))

    def radial(r: float) -> float:
        q = torch.tensor((r / scale) ** 2, dtype=torch.float64)
        return r ** (dim - 1) * math.exp(-importance * float(bound.rho(q)))

    pieces = [
        integrate.quad(radial, a, b, limit=400, epsabs=0, epsrel=1e-11)[0]
        for a, b in [(0, 0.1), (0.1, 0.56), (0.56, 2), (2, 10), (10, 200), (200, math.inf)]
    ]
    sphere = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    value = float(energy.log_normalizer(scale, float(dim), importance))
    assert value == pytest.approx(math.log(sphere * sum(pieces)), rel=1e-7, abs=1e-7)


def test_normalizer_in_many_dimensions_is_finite_and_right() -> None:
    dim = 50_000.0
    sharp = GeneralizedGaussian(power=2.0).log_normalizer(1.3, dim)
    assert float(sharp) == pytest.approx(float(Gaussian().log_normalizer(1.3, dim)), rel=1e-9)
    for energy in (Huber(delta=0.5), GeneralizedGaussian(power=1.0), StudentT(df=4.0, exponent="multivariate")):
        assert math.isfinite(float(energy.log_normalizer(1.0, dim)))


def test_energies_without_a_normaliser_refuse_by_name() -> None:
    for energy in (Welsch(), Custom(lambda q: q)):
        with pytest.raises(ValueError, match=type(energy).__name__):
            energy.log_normalizer(1.0, 2.0)
    with pytest.raises(ValueError, match="must exceed dim / 2"):
        Cauchy().log_normalizer(1.0, 2.0)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_twin_has_the_same_weight_at_zero(energy: Energy) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert float(energy.twin().weight(zero)) == pytest.approx(float(energy.weight(zero)), rel=1e-12)


@pytest.mark.parametrize("energy", [e for e in ENERGIES if not isinstance(e, Custom)], ids=name_of)
def test_repr_reads_back(energy: Energy) -> None:
    assert eval(repr(energy), dict(REGISTRY)) == energy  # our own repr, in a test


def test_hyperparameters_may_be_tensors() -> None:
    df = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([1.0, 3.0], dtype=torch.float64)
    energy = StudentT(df=df)
    assert_close(energy.rho(q).detach(), torch.stack([StudentT(2.0).rho(q[0]), StudentT(5.0).rho(q[1])]))
    gradient: Tensor = torch.autograd.grad(energy.log_normalizer(1.0, 1.0).sum(), df)[0]
    step = 1e-6
    numeric = [
        (StudentT(v + step).log_normalizer(1.0, 1.0) - StudentT(v - step).log_normalizer(1.0, 1.0)) / (2 * step)
        for v in (2.0, 5.0)
    ]
    assert_close(gradient, torch.stack(numeric), 1e-7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StudentT(df=-1.0), "df=-1.0"),
        (lambda: Huber(delta=0.0), "delta=0.0"),
        (lambda: Cauchy(exponent="wide"), "multivariate"),  # type: ignore[arg-type]
        (lambda: replace(Gaussian(), precision=math.nan), "precision=nan"),
        (lambda: Cauchy(exponent="multivariate").rho(torch.ones(1)), "dimension"),
    ],
)
def test_bad_settings_are_one_clear_error(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
