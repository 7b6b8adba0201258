"""Coefficients that modules share: groups by pattern, and the same energies at the coefficients of the groups."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from diagnostics.arviz_adapter import to_inference_data
from inference.draws import Draws
from inference.functional import Residual, SpanModel, fit, functional, functional_laplace
from inference.functional.tied import Groups
from inference.minimize import minimize
from inference.models.ensemble import MergedEnsemble
from poe_models import Cauchy, Energy, InputGram, NormScaled, ProductOfExperts, StudentT, TaskVectors
from poe_models.program import log_constant, log_density
from tests.seeds import seeded
from tests.test_functional_draws import NAMES, called, network_of, vectors_of

LAYERS = ("layers.0.attn.q", "layers.0.mlp.fc", "layers.1.attn.q", "layers.1.mlp.fc", "head")


def models_of(tied: str, energy: Energy | None = None) -> tuple[SpanModel, SpanModel]:
    """The same model with and without tied coefficients."""
    network = network_of()
    vectors = vectors_of(network)
    poe = ProductOfExperts.of(NAMES, InputGram(), energy or Cauchy(), NormScaled(0.7))
    return SpanModel(network, vectors, poe, tied=tied), SpanModel(network, vectors, poe)


def inputs_of(count: int) -> Tensor:
    return torch.randn(count, 5, generator=seeded(7), dtype=torch.float64)


def test_groups_are_what_the_pattern_matches() -> None:
    assert Groups.of(LAYERS, None).places == (0, 1, 2, 3, 4)
    assert Groups.of(LAYERS, "") == Groups(("all modules",), (0, 0, 0, 0, 0))
    assert Groups.of(LAYERS, r"layers\.(\d+)\.") == Groups(("0", "1", "head"), (0, 0, 1, 1, 2))
    assert Groups.of(LAYERS, r"(attn|mlp)") == Groups(("attn", "mlp", "head"), (0, 1, 0, 1, 2))
    assert Groups.of(LAYERS, "attn|mlp") == Groups(("all modules", "head"), (0, 0, 0, 0, 1))
    with pytest.raises(ValueError, match="finds none of 5 modules"):
        Groups.of(LAYERS, "conv")


@pytest.mark.parametrize("energy", [Cauchy(), StudentT(4.0, exponent="multivariate")])
@pytest.mark.parametrize("tied", ["", r"^(\d)"])
def test_energies_are_those_of_the_modules_at_the_groups_coefficients(tied: str, energy: Any) -> None:
    model, free = models_of(tied, energy)
    coefficients = torch.randn(len(model.modules), len(model.basis), generator=seeded(1), dtype=torch.float64)
    every = coefficients[[0, 0] if tied == "" else [0, 1]]
    experts = [[functional(n, m, inputs_of(9), called, Residual(scale=0.5)) for n in NAMES] for m in (model, free)]
    one, other = (m.posterior(*e) for m, e in zip((model, free), experts, strict=True))
    x, y = model.latents(coefficients), free.latents(every)
    torch.testing.assert_close(one.joint_energy(x), other.joint_energy(y))
    torch.testing.assert_close(one.coefficients(x), one.coefficients(model.latents(one.coefficients(x))))
    density = log_density(one, joint=True)(x)
    torch.testing.assert_close(density, log_constant(one).sum() - one.joint_energy(x))
    for name, value in free.weights(every).items():
        torch.testing.assert_close(model.weights(coefficients)[name], value)


def test_one_coefficient_for_each_expert() -> None:
    model, free = models_of("")
    assert model.modules == ("all modules",)
    assert model.expert("a").shape == (1, 5)
    start = model.weights(model.posterior().coefficients(model.start()))
    for name, value in free.weights(free.coefficients({"merge": 1.0})).items():
        torch.testing.assert_close(start[name], value)


def test_fit_laplace_and_draws_are_those_of_groups() -> None:
    model, free = models_of("")
    posterior = model.posterior(*(functional(name, model, inputs_of(12), called) for name in NAMES))
    found = fit(posterior, model.start(), generator=seeded(0), steps=40, batch_size=12)
    assert found.value.shape == (1, 5, 1)
    assert found.info.energy_trace[-1] < found.info.energy_trace[0]
    mode = minimize(posterior, found.value).value
    latents = functional_laplace(posterior, mode).sample(2, seeded(2))
    draws = model.draws(latents, mode)
    assert draws.modules == free.modules
    assert torch.equal(draws.coefficients[:, :, 0], draws.coefficients[:, :, 1])
    member = next(MergedEnsemble(vectors_of(network_of()), model.poe, draws, through=model.merges).members())
    weights = model.weights(posterior.coefficients(latents.values[0, 0]))
    for name, value in weights.items():
        torch.testing.assert_close(member[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::diagnostics.arviz_adapter.TooFewDraws")
@pytest.mark.parametrize(("tied", "groups"), [("", [[0, 1, 2]]), (r"^(\d)", [[0], [1], [2]]), ("^[02]", [[0, 1], [2]])])
def test_arviz_gets_the_experts_of_every_module_of_a_group(tied: str, groups: list[list[int]]) -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    own = {name: value.detach() for name, value in network.state_dict().items()}
    noise = {
        n: {k: v + 0.2 * torch.randn(v.shape, generator=seeded(i)).double() for k, v in own.items()}
        for i, n in enumerate(NAMES)
    }
    vectors = TaskVectors(own, noise, dtype=torch.float64)
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0, exponent="multivariate"), NormScaled(0.7))
    model, free = SpanModel(network, vectors, poe, tied=tied), SpanModel(network, vectors, poe)
    one, other = (m.posterior(*(functional(n, m, inputs_of(9), called) for n in NAMES)) for m in (model, free))
    coefficients = torch.randn(1, 3, len(groups), len(model.basis), generator=seeded(1), dtype=torch.float64)
    every = coefficients[:, :, [next(g for g, members in enumerate(groups) if m in members) for m in range(3)]]
    data, apart = (
        to_inference_data(Draws(m.span.latents(c)), p) for m, c, p in ((model, coefficients, one), (free, every, other))
    )
    assert data.posterior["module"].values.tolist() == list(model.modules)
    assert model.groups_of([free.modules[members[-1]] for members in groups]) == list(model.modules)
    assert model.groups_of(free.modules[:1]) == list(model.modules[:1])
    parts = [("posterior", "residual"), *(("constant_data", each) for each in ("forms", "dimension", "scale_squared"))]
    for group, members in enumerate(groups):
        for slot, name in product(range(max(map(len, groups))), NAMES):
            here = {"module": model.modules[group], "expert": f"{name}/{slot}" if slot else name}
            for part, key in (*parts, ("constant_data", "mean_curvature")):
                found = data[part][key].sel(here).values
                if slot >= len(members):
                    assert bool(np.isnan(found).all())
                    continue
                known = apart[part][key].sel({"module": free.modules[members[slot]], "expert": name}).values
                assert_allclose(found, known, rtol=1e-8, err_msg=f"{part}/{key}")
