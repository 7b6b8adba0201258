"""Draws of functional posteriors as those of whole models: members, files, restriction, tempering, ArviZ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

from diagnostics.arviz_adapter import to_inference_data
from inference.draws import Draws
from inference.functional import SpanModel, functional, functional_laplace
from inference.minimize import minimize
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.model_draws import SpanDraws
from inference.nuts import nuts
from inference.tempering import temper
from poe_models import Cauchy, InputGram, ProductOfExperts, TaskVectors
from poe_models.posterior import Posterior
from poe_models.program import program
from tests.seeds import seeded

NAMES = ("a", "b", "c")


def network_of(d_in: int = 5, width: int = 6, classes: int = 4) -> nn.Module:
    """Two matrices with biases, and a norm between them that follows neither."""
    layers = nn.Sequential(nn.Linear(d_in, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, classes))
    return layers.double()


def vectors_of(network: nn.Module) -> TaskVectors:
    generator = seeded(3)
    base = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in network.state_dict().items()}
    experts = {
        name: {k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()}
        for name in NAMES
    }
    return TaskVectors(base, experts, dtype=torch.float64)


def called(net: Any, x: Any) -> Tensor:
    found: Tensor = net(x)
    return found


@pytest.fixture(scope="module")
def made() -> tuple[TaskVectors, SpanModel, Posterior, Tensor]:
    """Vectors, model, posterior and its mode."""
    network = network_of()
    vectors = vectors_of(network)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), importance=[1.0, 2.0, 1.0])
    model = SpanModel(network, vectors, poe)
    inputs = torch.randn(12, 5, generator=seeded(5), dtype=torch.float64)
    posterior = model.posterior(*(functional(name, model, inputs, called) for name in NAMES))
    return vectors, model, posterior, minimize(posterior, model.start()).value


def ensemble_of(made: tuple[TaskVectors, SpanModel, Posterior, Tensor], draws: SpanDraws) -> MergedEnsemble:
    vectors, model = made[:2]
    return MergedEnsemble(vectors, model.poe, draws, through=model.merges)


def test_members_are_the_weights_at_their_coefficients(made: Any) -> None:
    _, model, posterior, mode = made
    found = functional_laplace(posterior, mode).sample(4, seeded(1))
    draws = model.draws(found, mode)
    assert draws.followers == {"0.bias": "0.weight", "3.bias": "3.weight"}
    ensemble = ensemble_of(made, draws)
    for latents, member in zip(found.values[0], ensemble.members(), strict=True):
        weights = model.weights(posterior.coefficients(latents))
        assert member.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(member[name], value, rtol=1e-10, atol=1e-10)
    first, second = (ensemble.member(draws[i])["3.bias"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_the_ensemble_is_the_mean_of_softmaxes(made: Any) -> None:
    _, model, posterior, mode = made
    found = functional_laplace(posterior, mode).sample(3, seeded(1))
    x = torch.randn(7, 5, generator=seeded(8), dtype=torch.float64)
    prediction = ensemble_of(made, model.draws(found, mode)).predict(network_of(), [x[:4], x[4:]])
    members = [model.call(posterior.coefficients(z), called, x).softmax(-1) for z in found.values[0]]
    torch.testing.assert_close(prediction.probabilities, torch.stack(members).mean(0), rtol=1e-10, atol=1e-10)


def test_the_merges_are_the_designs_own(made: Any) -> None:
    vectors, model, posterior, mode = made
    draws = model.draws(functional_laplace(posterior, mode).sample(2, seeded(1)), mode)
    given, solved = ensemble_of(made, draws), MergedEnsemble(vectors, model.poe, draws)
    for one, other in zip(given.members(), solved.members(), strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_span_through_another_merge_wants_it_again(made: Any) -> None:
    vectors, own, *_ = made
    merged = {name: 0.5 * value for name, value in own.merges.items()}
    model = SpanModel(network_of(), vectors, own.poe, merged)
    draws = model.draws(Draws(model.start().expand(1, 2, -1, -1, -1)), model.start())
    with pytest.raises(ValueError, match="go through a merge of norm"):
        list(MergedEnsemble(vectors, own.poe, draws).members())
    member = next(MergedEnsemble(vectors, own.poe, draws, through=merged).members())
    weights = model.weights(model.coefficients({"merge": 1.0}))
    for name, value in weights.items():
        torch.testing.assert_close(member[name], value)
    with pytest.raises(ValueError, match="`through` has none"):
        list(MergedEnsemble(vectors, own.poe, draws, through={}).members())


def test_draws_are_saved_and_restricted_with_what_follows(made: Any, tmp_path: Path) -> None:
    _, model, posterior, mode = made
    draws = model.draws(functional_laplace(posterior, mode).sample(3, seeded(1)), mode)
    again = load_draws(save_draws(draws, tmp_path / "draws"))
    assert isinstance(again, SpanDraws)
    assert again.followers == draws.followers
    assert again.digest() == draws.digest()
    assert replace(draws, followers={}).digest() != draws.digest()
    last = ensemble_of(made, again).restrict(r"^3\.")
    assert last.sampled == ("3.weight",)
    members = list(last.members())
    assert torch.equal(members[0]["0.bias"], members[1]["0.bias"])
    assert not torch.equal(members[0]["3.bias"], members[1]["3.bias"])
    ensemble_of(made, again).save(tmp_path / "deltas", format="deltas")
    with pytest.raises(ValueError, match="'1.weight' follows '0.weight'|'x' follows"):
        ensemble_of(made, replace(draws, followers={"x": "0.weight"}))


def test_they_surround_the_map_that_they_are_of(made: Any) -> None:
    _, model, posterior, mode = made
    draws = model.draws(functional_laplace(posterior, mode).sample(200, seeded(1)), mode)
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 1
    assert draws.far_from_merge is None
    assert draws.about == "laplace draws in Span coordinates through the merge at temperature 1"


@pytest.mark.filterwarnings("ignore::diagnostics.arviz_adapter.TooFewDraws")
def test_arviz_takes_draws_of_laplace_and_of_a_sampler(made: Any) -> None:
    _, model, posterior, mode = made
    for found in (functional_laplace(posterior, mode).sample(6, seeded(1)), short_chain(model, posterior)):
        data = to_inference_data(found, posterior)
        assert data.posterior.sizes["draw"] == found.num_draws
        named = model.draws(found, mode).coefficients
        torch.testing.assert_close(torch.tensor(data.posterior.coefficients.values), named[..., [0, 1, 2, 4]])


def short_chain(model: SpanModel, posterior: Posterior) -> Draws:
    """A chain by Pyro's sampler; how well it mixes is another test's question."""
    return nuts(posterior, 2, generator=seeded(2), warmup=1, chains=1, max_tree_depth=1)


def test_temperature_and_logit_temperature_together(made: Any) -> None:
    _, model, posterior, mode = made
    laplace = functional_laplace(posterior, mode)
    x = torch.randn(30, 5, generator=seeded(8), dtype=torch.float64)
    labels = model.call(model.expert("a"), called, x).argmax(-1)

    def sample(temperature: float) -> SpanDraws:
        return model.draws(laplace.tempered(temperature).sample(3, seeded(4)), mode)

    predictor = ensemble_of(made, sample(1.0)).predictor(network_of(), [x])
    path = temper(sample, predictor, labels, (0.01, 1.0), num_temperatures=3, refinements=0, scale_logits=True)
    assert len(path.path) == 3
    assert path.draws.temperatures == (path.temperature,)
    assert all(point.logit_temperature > 0 for point in path.path)


def test_a_tempered_approximation_is_that_of_the_tempered_posterior(made: Any) -> None:
    _, _, posterior, mode = made
    found = functional_laplace(posterior, mode).tempered(0.25)
    exact = functional_laplace(replace(posterior, temperature=0.25), mode)
    torch.testing.assert_close(found.standard_deviations(), exact.standard_deviations())
    torch.testing.assert_close(found.log_integral(), exact.log_integral())


def test_draws_of_a_variational_guide_are_named_too(made: Any) -> None:
    _, model, posterior, mode = made
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(program(posterior))
    svi = SVI(program(posterior), guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step()
    with torch.no_grad():
        values = torch.stack([guide()["update"] for _ in range(3)]).unsqueeze(0)
    draws = model.draws(Draws(values, sampler="AutoNormal", temperature=1.0), mode)
    member = list(ensemble_of(made, draws).members())[2]
    for name, value in model.weights(posterior.coefficients(values[0, 2])).items():
        torch.testing.assert_close(member[name], value, rtol=1e-10, atol=1e-10)
