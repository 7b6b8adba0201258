"""The ArviZ adapter: values against formulas of their own, and ArviZ's functions on what it returns."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from diagnostics.arviz_adapter import TooFewDraws, group_names, to_inference_data, write_netcdf
from inference.draws import Draws
from inference.evidence.estimate import log_normalizers
from inference.gibbs import gibbs
from inference.models.statistics_files import statistics_digest
from inference.slice import slice_sample
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    SpanStatistics,
    StudentT,
    Welsch,
    average,
    span_statistics,
)
from poe_models.posterior import Posterior
from tests.helpers import assert_close, name_of, random_updates
from tests.seeds import seeded

NAMES = ["mnist", "emoji", "animals"]
MODULES = ["a.weight", "b.weight"]
# ArviZ 0.x calls what newer versions of its own dependencies announce to change.
ARVIZ_IS_OLD = pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping", "ignore:The inplace keyword in DataFrame.sort_values"
)


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return random_updates(generator, 2, 3, 4, 5)


def span(poe: ProductOfExperts, updates: Tensor, count: int = 150, chains: int = 4) -> tuple[Draws, Posterior]:
    posterior = poe.bind(span_statistics(poe, updates, MODULES[: len(updates)]))
    draws = gibbs(posterior, count, generator=seeded(0), chains=chains, warmup=50)
    return draws, posterior


def statistics_of(posterior: Posterior) -> SpanStatistics:
    assert posterior.span is not None
    return posterior.span.statistics


def normalised(**options: Any) -> ProductOfExperts:
    return ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0, "multivariate"), **options)


def test_coefficients_have_named_coordinates_and_are_those_of_the_draws(updates: Tensor) -> None:
    draws, posterior = span(normalised(anchor=Anchor(average)), updates)
    data = to_inference_data(draws, posterior)
    coefficients = data.posterior["coefficients"]
    assert coefficients.dims == ("chain", "draw", "module", "basis")
    assert list(coefficients.module.values) == MODULES
    assert list(coefficients.basis.values) == [*NAMES, "center"]
    one = coefficients.sel(chain=2, draw=7, module="b.weight", basis="emoji")
    assert float(one) == float(posterior.coefficients(draws.values)[2, 7, 1, 1])
    assert data.attrs["statistics_digest"] == statistics_digest(statistics_of(posterior))


def test_a_zero_centre_has_no_coefficient(updates: Tensor) -> None:
    draws, posterior = span(normalised(), updates)
    data = to_inference_data(draws, posterior)
    assert list(data.posterior.basis.values) == NAMES
    assert data.constant_data["gram"].shape == (2, 3, 3)
    assert bool(az.summary(data, var_names=["coefficients"], round_to="none")["r_hat"].notna().all())


def test_residuals_and_distances_are_those_of_the_merged_updates(updates: Tensor) -> None:
    poe = normalised(anchor=Anchor(average), temperature=0.5)
    draws, posterior = span(poe, updates, count=100)
    data = to_inference_data(draws, posterior)
    full = poe.bind(updates)
    basis = torch.cat([updates, updates.mean(1, keepdim=True)], 1)
    z = torch.einsum("csmj,mjab->csmab", posterior.coefficients(draws.values), basis)
    q = torch.stack([e.residual(z) / e.scale_squared for e in full.experts], -1)
    assert_close(torch.from_numpy(data.posterior["residual"].values), q, 1e-8)
    distance = (z - updates.mean(1)).flatten(-2).norm(dim=-1)
    assert_close(torch.from_numpy(data.posterior["distance"].values), distance, 1e-8)


def test_sample_stats_keep_the_samplers_names(updates: Tensor) -> None:
    _, posterior = span(normalised(), updates)
    draws = slice_sample(posterior, 100, generator=seeded(0), warmup=100)
    data = to_inference_data(draws, posterior)
    assert {"lp", "evaluations", "stuck"} <= set(data.sample_stats)
    assert data.sample_stats["stuck"].dims == ("chain", "draw", "module")
    assert data.sample_stats["stuck"].dtype == bool
    assert np.array_equal(data.sample_stats["lp"].values, draws.stats["lp"].numpy())


# --- log likelihood ---

NORMALISED: list[Energy] = [
    Gaussian(2.0),
    StudentT(4.0, "multivariate"),
    Cauchy("multivariate"),
    Huber(0.7),
    GeneralizedGaussian(1.0),
]


def named(posterior: Posterior) -> Posterior:
    return replace(posterior, modules=tuple(MODULES))


def full(poe: ProductOfExperts, updates: Tensor) -> tuple[Draws, Posterior]:
    """A hundred points around the updates in the place of draws: the densities are of any."""
    noise = torch.randn(4, 100, *updates[:, 0].shape, generator=seeded(0), dtype=torch.float64)
    return Draws(updates.mean(1) + noise), named(poe.bind(updates))


@pytest.mark.parametrize("energy", NORMALISED, ids=name_of)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_likelihoods_are_normalised_densities_of_what_is_seen(
    energy: Energy, temperature: float, updates: Tensor
) -> None:
    """Of the one number that a Directional expert sees, the component along its update: the density integrates to 1."""
    poe = ProductOfExperts.of(NAMES, Directional(), energy, Absolute(0.6), [1.0, 2.0, 1.5], temperature=temperature)
    posterior = named(poe.bind(updates))
    t = torch.linspace(-400, 400, 80_001, dtype=torch.float64)
    t = t.sign() * (t.abs() / 400) ** 3 * 400  # dense where the density is
    for i, expert in enumerate(posterior.experts):
        squared = updates.square().sum((-2, -1))[:, i]
        line = (1 + t[:, None, None, None] / squared[None, :, None, None]) * expert.update
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TooFewDraws)
            data = to_inference_data(Draws(line.unsqueeze(0)), posterior)
        density = np.exp(data.log_likelihood["updates"].sel(expert=expert.name).values[0])
        for module in range(2):
            mass = scipy.integrate.trapezoid(density[:, module], t.numpy() / float(squared[module].sqrt()))
            assert abs(mass - 1) < 2e-3


def test_a_gaussian_log_likelihood_is_scipys(updates: Tensor) -> None:
    poe = ProductOfExperts.of(NAMES, Identity(), Gaussian(), Absolute(0.8), temperature=0.5)
    draws, posterior = full(poe, updates)
    data = to_inference_data(draws, posterior)
    z = draws.values[3, 11, 1].flatten().numpy()
    oracle = scipy.stats.multivariate_normal(updates[1, 2].flatten().numpy(), 0.5 * 0.8**2 * np.eye(20)).logpdf(z)
    assert math.isclose(float(data.log_likelihood["updates"][3, 11, 1, 2]), oracle, rel_tol=1e-10)


def test_a_student_log_likelihood_under_a_gram_is_scipys(updates: Tensor) -> None:
    poe = ProductOfExperts.of(NAMES, OutputGram(), StudentT(3.0, "multivariate"), Absolute(0.8))
    draws, posterior = full(poe, updates)
    data = to_inference_data(draws, posterior)
    z, u = draws.values[0, 5, 0], updates[0, 1]
    # Every column of the update has the shape matrix s^2 (U U^T)^-1.
    shape = np.kron(0.8**2 * np.linalg.inv((u @ u.mT).numpy()), np.eye(5))
    oracle = scipy.stats.multivariate_t(u.flatten().numpy(), shape, df=3).logpdf(z.flatten().numpy())
    assert math.isclose(float(data.log_likelihood["updates"][0, 5, 0, 1]), oracle, rel_tol=1e-9)
    normalizers = log_normalizers(posterior)
    assert float(data.log_likelihood["updates"][0, 5, 0, 1]) == pytest.approx(
        float(-posterior.experts[1].energy(z)[0] - normalizers[0, 1]), rel=1e-12
    )


@pytest.mark.parametrize("energy", [Welsch(), Cauchy(), StudentT(4.0)], ids=name_of)
def test_energies_without_a_normaliser_are_named(energy: Energy, updates: Tensor) -> None:
    draws, posterior = full(ProductOfExperts.of(NAMES, InputGram(), energy), updates)
    with pytest.warns(
        UserWarning, match=rf"log_likelihood group is left out: expert 'mnist' .*{type(energy).__name__}"
    ):
        data = to_inference_data(draws, posterior)
    assert "log_likelihood" not in group_names(data)
    assert {"posterior", "constant_data"} <= set(group_names(data))


def test_span_draws_have_no_log_likelihood(updates: Tensor) -> None:
    data = to_inference_data(*span(normalised(), updates, count=100))
    assert "log_likelihood" not in group_names(data)


def test_an_expert_with_nothing_to_say_adds_nothing(updates: Tensor) -> None:
    updates[1, 2] = 0.0
    draws, posterior = full(normalised(), updates)
    values = to_inference_data(draws, posterior).log_likelihood["updates"]
    assert bool((values.sel(module="b.weight", expert="animals") == 0).all())
    assert bool((values.sel(module="b.weight", expert="mnist") != 0).all())
    alone = to_inference_data(Draws(draws.values[:, :, :1]), posterior.module(0))
    assert np.allclose(values.sel(module="a.weight"), alone.log_likelihood["updates"].sel(module="a.weight"))


def test_leaving_out_one_expert_of_a_few_is_beyond_importance_sampling(updates: Tensor) -> None:
    """Why the documentation sends readers of `az.loo` to the exact leave-one-out."""
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(0.4))
    draws = gibbs(poe.bind(updates), 100, generator=seeded(0), warmup=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loo = az.loo(to_inference_data(draws, poe.bind(updates)), pointwise=True)
    assert bool((loo.pareto_k > 0.7).any())


# --- ArviZ ---


@ARVIZ_IS_OLD
def test_arviz_takes_it_as_it_is(updates: Tensor) -> None:
    mpl.use("agg")
    draws, posterior = span(normalised(anchor=Anchor(average)), updates, count=400)
    data = to_inference_data(draws, posterior)
    summary = az.summary(data, round_to="none")
    assert summary.loc["coefficients[a.weight, emoji]", "r_hat"] < 1.02
    assert summary.loc["distance[b.weight]", "ess_bulk"] > 400
    mean = posterior.coefficients(draws.values)[:, :, 0, 1].mean()
    assert math.isclose(summary.loc["coefficients[a.weight, emoji]", "mean"], float(mean), rel_tol=1e-12)
    for plot, name in ((az.plot_forest, "coefficients"), (az.plot_trace, "distance")):
        plot(data, var_names=[name])
        assert plt.get_fignums()
        plt.close("all")


@pytest.mark.parametrize("energy", [StudentT(4.0, "multivariate"), Gaussian()], ids=name_of)
def test_netcdf_keeps_everything(energy: Energy, updates: Tensor, tmp_path: Path) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), energy, anchor=Anchor(average))
    _, posterior = span(poe, updates)
    draws = slice_sample(posterior, 100, generator=seeded(0), warmup=100)
    data = to_inference_data(draws, posterior)
    write_netcdf(data, tmp_path / "draws.nc")
    back = az.from_netcdf(str(tmp_path / "draws.nc"))
    assert group_names(back) == group_names(data)
    for group in group_names(data):
        for name, variable in data[group].data_vars.items():
            assert np.array_equal(variable.values, back[group][name].values)
            assert variable.dims == back[group][name].dims
    assert list(back.posterior.basis.values) == [*NAMES, "center"]
    assert back.attrs["statistics_digest"] == statistics_digest(statistics_of(posterior))
    assert back.attrs == data.attrs
    exponent = "df=4.0, exponent=tensor (2,)" if isinstance(energy, StudentT) else "precision=1.0"
    assert f"mnist: InputGram(), {type(energy).__name__}({exponent}), importance 1; " in back.attrs["design"]
    assert float(back.constant_data["temperature"]) == 1.0


def test_constants_are_those_of_the_posterior(updates: Tensor) -> None:
    poe = normalised(anchor=Anchor(average), importance=[1.0, 2.0, 3.0], temperature=0.7)
    draws, posterior = span(poe, updates, count=100)
    data = to_inference_data(draws, posterior).constant_data
    assert np.array_equal(data["anchor_precision"].values, posterior.anchor_precision.numpy())
    assert float(data["scale_squared"].sel(module="b.weight", expert="emoji")) == float(
        posterior.experts[1].scale_squared[1]
    )
    assert data["importance"].values.tolist() == [1.0, 2.0, 3.0]
    assert float(data["temperature"]) == 0.7
    assert np.array_equal(data["gram"].values, statistics_of(posterior).gram.numpy())
    assert np.array_equal(data["forms"].values, statistics_of(posterior).forms.numpy())
    assert np.array_equal(data["dimension"].values, np.full((2, 3), 16.0))  # rank 4 times 4 rows


# --- Full draws ---


@pytest.mark.parametrize("include_update", [False, True])
def test_full_draws_are_judged_by_residuals_and_distance(include_update: bool, updates: Tensor) -> None:
    poe = normalised(anchor=Anchor(average, AbsolutePrecision(0.3)))
    draws = gibbs(poe.bind(updates), 100, generator=seeded(0), warmup=20)
    posterior = poe.bind(updates)
    data = to_inference_data(draws, named(posterior), include_update=include_update)
    assert list(data.posterior.module.values) == MODULES
    assert ("update" in data.posterior) == include_update
    z = draws.latents(3, 42)
    if include_update:
        assert data.posterior["update"].dims == ("chain", "draw", "module", "row", "column")
        assert np.array_equal(data.posterior["update"].values[3, 42], z.numpy())
    q = posterior.residuals(z)[1, 2] / posterior.experts[2].scale_squared[1]
    assert math.isclose(float(data.posterior["residual"][3, 42, 1, 2]), float(q), rel_tol=1e-12)
    distance = (z - updates.mean(1))[0].norm()
    assert math.isclose(float(data.posterior["distance"][3, 42, 0]), float(distance), rel_tol=1e-12)
    expected = draws.stats["lp"][3, 42, 0]
    anchor = -posterior.anchor_precision[0] * distance**2
    experts = sum(-e.energy_of(posterior.residuals(z)[..., i])[0] for i, e in enumerate(posterior.experts))
    assert_close(expected, anchor + experts, 1e-8)
    assert az.summary(data, var_names=["distance"], round_to="none")["r_hat"].max() < 1.1
    numbered = to_inference_data(draws, posterior)
    assert list(numbered.posterior.module.values) == ["0", "1"]


# --- too few draws, wrong arguments ---


@pytest.mark.parametrize(("chains", "count"), [(4, 99), (3, 100), (1, 5), (4, 100)])
def test_too_few_draws_warn_and_carry_the_number(chains: int, count: int, updates: Tensor) -> None:
    given = span(normalised(), updates, count, chains)
    if (chains, count) == (4, 100):
        to_inference_data(*given)
        return
    with pytest.warns(TooFewDraws, match=f"{chains} chains of {count} draws") as caught:
        data = to_inference_data(*given)
    warning = caught[0].message
    assert isinstance(warning, TooFewDraws)
    assert (warning.chains, warning.draws) == (chains, count)
    assert data.posterior["coefficients"].shape == (chains, count, 2, 3)


def test_arguments_that_do_not_go_together_are_named(updates: Tensor) -> None:
    draws, _ = span(normalised(), updates)
    with pytest.raises(ValueError, match="give the posterior that they are draws of"):
        to_inference_data(draws)


def test_only_the_adapter_knows_arviz() -> None:
    root = Path(__file__).parents[1]
    files = itertools.chain.from_iterable(
        (root / p).glob("**/*.py") for p in ("poe_models", "inference", "diagnostics")
    )
    assert [path.name for path in files if "import arviz" in path.read_text()] == ["arviz_adapter.py"]
