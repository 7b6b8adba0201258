"""Functional experts: linear networks in closed form, Pyro on the program, the fit, bad input, the score."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn import functional as F

from diagnostics import functional_score
from inference.functional import (
    KullbackLeibler,
    Residual,
    Targets,
    fit,
    functional,
    functional_laplace,
    joined_batches,
    prediction_expert,
    predictions,
)
from inference.laplace import DenseLaplace
from inference.minimize import minimize
from inference.nuts import nuts
from poe_models import Cauchy, FactorExpert, Gaussian, StudentT
from poe_models.posterior import Posterior
from poe_models.program import program
from tests.functional_toys import NAMES, Named, called, inputs_of, linear_model, linear_posterior
from tests.levels import Z
from tests.seeds import seeded

# --- closed forms: outputs are linear in the coefficients ---


def dense(posterior: Posterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the joint energy by autograd."""
    flat = x.flatten()

    def energy(value: Tensor) -> Tensor:
        return posterior.joint_energy(value.view(x.shape))

    return torch.func.grad(energy)(flat), torch.func.hessian(energy)(flat)


def test_the_map_is_the_linear_regression() -> None:
    model = linear_model()
    posterior = linear_posterior(model, Residual(scale=0.5))
    gradient, hessian = dense(posterior, model.start())
    exact = model.start().flatten() - torch.linalg.solve(hessian, gradient)  # one Newton step of a quadratic
    found = fit(posterior, model.start(), generator=seeded(0), steps=400, batch_size=12, learning_rate=0.1)
    torch.testing.assert_close(found.value.flatten(), exact, rtol=1e-3, atol=1e-3)
    assert found.info.gradient_norm < 1e-2 * float(gradient.norm())
    assert found.converged


@pytest.mark.parametrize("divergence", [KullbackLeibler(), Residual(scale=0.5), Residual(StudentT(4.0), 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gauss_newton_is_the_hessian_of_linear_outputs(divergence: Any, temperature: float) -> None:
    model = linear_model()
    posterior = replace(linear_posterior(model, divergence, batch_size=5), temperature=temperature)
    mode = minimize(posterior, model.start()).value
    found, exact = functional_laplace(posterior, mode), DenseLaplace(posterior, mode)
    torch.testing.assert_close(found.log_integral(), exact.log_integral(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.standard_deviations(), exact.standard_deviations(), rtol=1e-6, atol=1e-9)


def test_draws_of_the_approximation_have_its_moments() -> None:
    model = linear_model()
    posterior = linear_posterior(model, KullbackLeibler())
    laplace = functional_laplace(posterior, minimize(posterior, model.start()).value)
    draws = laplace.sample(4000, seeded(1)).values[0].flatten(1)
    deviation = laplace.standard_deviations().flatten()
    moved = (draws - laplace.mode.flatten()).mean(0).abs() * math.sqrt(len(draws))
    assert bool((moved <= Z * deviation + 1e-12).all())
    assert torch.equal(laplace.sample(3, seeded(1)).values, laplace.sample(3, seeded(1)).values)


def test_heavy_tails_forgive_examples_that_cannot_be_matched() -> None:
    """Of 40 targets 6 are nonsense; the other 34 are exact at coefficients that are known."""
    model = linear_model()
    truth = model.coefficients({"a": 0.6, "b": 0.2, "c": -0.1})
    x = inputs_of(40, 9)
    outputs = model.call(truth, called, x)
    outputs[:6] += 20.0
    errors = {}
    for energy in (Gaussian(), Cauchy()):
        expert = functional("a", model, x, called, Residual(energy, 0.3), targets=Targets(outputs), name="seen")
        found = fit(
            model.posterior(expert), model.start(), generator=seeded(0), steps=300, batch_size=40, learning_rate=0.05
        )
        merged = model.call(model.posterior().coefficients(found.value), called, x)
        errors[type(energy)] = float((merged - model.call(truth, called, x))[6:].norm())
    assert errors[Cauchy] < 0.3 * errors[Gaussian]


# --- Pyro's own algorithms, as they stand ---


@pytest.mark.parametrize("guide", [AutoNormal, AutoLowRankMultivariateNormal, AutoLaplaceApproximation])
def test_variational_inference_on_mini_batches(guide: Any) -> None:
    model = linear_model()
    posterior = linear_posterior(model, KullbackLeibler(), subsample_size=6)
    exact = functional_laplace(posterior, minimize(posterior, model.start()).value)
    pyro.clear_param_store()
    family = guide(program(posterior))
    svi = SVI(program(posterior), family, Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step() for _ in range(250)]
    assert sum(losses[-50:]) < sum(losses[:50])
    center = family.median()["update"] if guide is not AutoLaplaceApproximation else family()["update"]
    off = (center - exact.mode).abs() / exact.standard_deviations()
    assert float(off.detach().max()) < 3


def test_nuts_agrees_with_the_gaussian_posterior() -> None:
    model = linear_model()
    posterior = model.posterior(functional("a", model, inputs_of(8), called, Residual(scale=0.5)))
    mode = minimize(posterior, model.start()).value
    exact = functional_laplace(posterior, mode)
    draws = nuts(posterior, 60, generator=seeded(5), warmup=40)
    spread = exact.standard_deviations().flatten()
    off = (draws.values.flatten(0, 1).flatten(1).mean(0) - mode.flatten()).abs() / spread
    assert float(off[spread > 0].max()) < Z / math.sqrt(15)  # 60 draws are worth at least 15


# --- own experts, in a few lines ---


def test_entropy_and_a_few_labels_as_experts() -> None:
    model, x = linear_model(), inputs_of(20, 4)
    labels = torch.arange(20) % 4

    def entropy(logits: Tensor, _: None) -> Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits, wanted, reduction="none")

    experts = (
        prediction_expert("certain", model, x, called, entropy, importance=0.1),
        prediction_expert("labels", model, x, called, loss, labels),
    )
    posterior = model.posterior(*experts)
    found = fit(posterior, model.start(), generator=seeded(0), steps=150, batch_size=20)
    before, after = (model.call(posterior.coefficients(z), called, x) for z in (model.start(), found.value))
    assert F.cross_entropy(after, labels) < F.cross_entropy(before, labels)
    impossible = prediction_expert("labels", model, x, called, loss, labels + 1)
    with pytest.raises(ValueError, match=r"outputs \(20, 4\) with its targets: Target 4 .* Give labels of 0 to 3"):
        impossible.function(model.coefficients({"merge": 1.0}), torch.arange(20))


def test_inputs_may_be_mappings_and_batches() -> None:
    model = linear_model()
    batches = [{"x": inputs_of(4, 1)}, {"x": inputs_of(2, 2)}]
    joined = joined_batches(batches)
    expert = functional("b", model, joined, lambda net, batch: net(batch["x"]))
    plain = functional("b", model, torch.cat([batch["x"] for batch in batches]), called)
    rows, c = torch.tensor([5, 0]), model.coefficients({"merge": 1.0})
    torch.testing.assert_close(expert.function(c, rows), plain.function(c, rows))
    named = functional("b", model, Named(joined["x"], torch.arange(6)), lambda net, batch: net(batch.x))
    torch.testing.assert_close(named.function(c, rows), plain.function(c, rows))
    with pytest.raises(ValueError, match="Pad all inputs"):
        joined_batches([torch.zeros(1, 2), torch.zeros(1, 3)])


# --- the fit ---


def test_seed_decides_and_held_out_inputs_choose_the_point() -> None:
    model = linear_model()
    posterior = linear_posterior(model, KullbackLeibler())
    held_out = [functional(name, model, inputs_of(12, 50 + i), called) for i, name in enumerate(NAMES)]

    def run(seed: int) -> Tensor:
        return fit(
            posterior, model.start(), generator=torch.Generator().manual_seed(seed), steps=30, batch_size=4
        ).value

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    told: list[tuple[int, int]] = []
    found = fit(
        posterior,
        model.start(),
        generator=seeded(0),
        steps=60,
        batch_size=4,
        held_out=held_out,
        every=5,
        progress=lambda done, total: told.append((done, total)),
    )
    seen = found.info.held_out_trace
    assert found.info.best_step == int(seen[seen[:, 1].argmin(), 0])
    assert told[-1] == (found.info.steps, 60)
    assert found.info.energy_trace.shape == (found.info.steps,)


def test_the_status_is_judged_by_the_gradient() -> None:
    model = linear_model()
    posterior = linear_posterior(model, KullbackLeibler())
    short, long = (
        fit(posterior, model.start(), generator=seeded(0), steps=steps, batch_size=12, learning_rate=0.05)
        for steps in (1, 300)
    )
    assert not short.converged
    assert long.converged
    with pytest.warns(UserWarning, match="had not converged"):
        functional_laplace(posterior, short)


def test_gauss_newton_of_tokens_is_the_hessian_of_linear_outputs() -> None:
    model, x = linear_model(), torch.randn(3, 4, 5, generator=seeded(1), dtype=torch.float64)
    counted = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    posterior = model.posterior(functional("a", model, x, called, counted=counted, batch_size=2))
    mode = minimize(posterior, model.start()).value
    found, exact = functional_laplace(posterior, mode), DenseLaplace(posterior, mode)
    torch.testing.assert_close(found.standard_deviations(), exact.standard_deviations(), rtol=1e-6, atol=1e-9)


def test_predictions_are_the_experts_own() -> None:
    model, x = linear_model(), inputs_of(7)
    found = predictions("c", model, x, called, batch_size=3)
    torch.testing.assert_close(found.outputs, model.call(model.expert("c"), called, x))


# --- bad input, one error each ---


def test_bad_input() -> None:
    model, x = linear_model(), inputs_of(6)
    start = model.start()

    def fitted(*experts: FactorExpert, held_out: tuple[FactorExpert, ...] = ()) -> None:
        fit(model.posterior(*experts), start, generator=seeded(0), steps=2, held_out=held_out)

    with pytest.raises(ValueError, match="no examples|of no examples"):
        functional("a", model, [], called)
    with pytest.raises(ValueError, match="one row for each example"):
        functional("a", model, {"x": x, "y": x[:3]}, called)
    with pytest.raises(ValueError, match="no such task vector"):
        functional("z", model, x, called)
    with pytest.raises(ValueError, match=r"expected logits"):
        fitted(functional("a", model, x, lambda net, b: net(b).sum(-1), targets=Targets(torch.zeros(6, 4))))
    with pytest.raises(ValueError, match="NaN in the batch of rows 0 to 5"):
        functional("a", model, x * torch.nan, called)
    for ignoring in (lambda net, b: b[:, :4], lambda net, b: nn.Linear(5, 4).double()(b)):
        with pytest.raises(ValueError, match="do not depend on the merged weights"):
            fitted(functional("a", model, x, ignoring))
    with pytest.raises(ValueError, match="2 inputs of 'b/predictions' are those of the fit"):
        fitted(functional("a", model, x, called), held_out=(functional("b", model, x[:2].clone(), called),))
    with pytest.raises(ValueError, match="with another `SpanModel`"):
        fitted(functional("a", linear_model(Cauchy()), x, called))
    with pytest.raises(ValueError, match="9 targets for 6 inputs"):
        functional("a", model, x, called, targets=Targets(torch.zeros(9, 4)))
    with pytest.raises(ValueError, match="give the mask with the targets"):
        functional("a", model, x, called, targets=Targets(torch.zeros(6, 4)), counted=torch.ones(6).bool())
    with pytest.raises(ValueError, match="Give a mask"):
        Targets(torch.zeros(6, 3, 4), torch.ones(9, 3).bool())
    with pytest.raises(ValueError, match="no factor of this posterior is a sum over examples"):
        fitted()
    with pytest.raises(ValueError, match="energy is nan at step 0"):
        fitted(functional("a", model, x, called, targets=Targets(torch.full((6, 4), torch.nan))))
    with pytest.raises(ValueError, match="importance"):
        functional("a", model, x, called, importance=0.0)
    with pytest.raises(ValueError, match="between 1 and that of the examples"):
        functional("a", model, x, called, subsample_size=7)
    with pytest.raises(ValueError, match="other classes|classes"):
        functional("a", model, x, called, targets=Targets(torch.zeros(6, 3)))
    with pytest.raises(ValueError, match="scope 'examples' needs"):
        FactorExpert("f", lambda c, rows: rows, "span", "examples")
    bare = FactorExpert("bare", lambda c, rows: c[..., 0, :1] * rows, "span", "examples", 3)
    with pytest.raises(ValueError, match="without outputs"):
        functional_laplace(model.posterior(bare), start)


# --- the score ---


def test_the_score_is_the_mean_divergence_and_its_interval_covers() -> None:
    generator = seeded(11)
    own, merge = (torch.randn(400, 4, generator=generator, dtype=torch.float64).softmax(1) for _ in range(2))
    better = (0.7 * own.log() + 0.3 * merge.log()).softmax(1)
    score = functional_score({"one": {"t": merge}, "two": {"t": better}}, {"t": own}, seed=0)
    expected = F.kl_div(merge.log(), own, reduction="none").sum(1)
    found = score.on_task("one", "t")
    assert found.value == pytest.approx(float(expected.mean()))
    assert found.error == pytest.approx(float(expected.std()) / 20, rel=0.15)
    assert score.ranking == ("two", "one")
    difference = score.difference("two", "one")
    assert difference.value == pytest.approx(score.mean("two").value - score.mean("one").value)
    assert difference.high < 0
    assert score.to_dataframe().shape[0] == 2
    logits = torch.tensor([[120.0, 0.0]]), torch.tensor([[100.0, 0.0]])
    sure = functional_score({"one": {"t": logits[0]}}, {"t": logits[1]}, seed=0, logits=True)
    assert 0 <= sure.mean("one").value < 1e-12
    excluded = own.clone()
    excluded[0] = torch.tensor([0.0, 0.5, 0.25, 0.25])
    never = functional_score({"one": {"t": excluded}}, {"t": own}, seed=0)
    assert never.mean("one").value == math.inf
    assert not bool(never.replicates.isnan().any())
    with pytest.raises(ValueError, match="on the same inputs"):
        functional_score({"one": {"t": merge[:5]}}, {"t": own}, seed=0)
    with pytest.raises(ValueError, match="no predictions on 't'"):
        functional_score({"one": {}}, {"t": own}, seed=0)
    with pytest.raises(ValueError, match="0 merges"):
        functional_score({}, {"t": own}, seed=0)
