"""Functional experts: energies by hand, linear networks in closed form, Pyro's algorithms on the program, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

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
    SpanModel,
    Targets,
    fit,
    functional,
    functional_laplace,
    joined_batches,
    prediction_expert,
    predictions,
)
from inference.laplace import DenseLaplace
from inference.map import fixed_point
from inference.minimize import minimize
from inference.nuts import nuts
from poe_models import Cauchy, Directional, FactorExpert, Gaussian, InputGram, ProductOfExperts, StudentT, TaskVectors
from poe_models.posterior import Posterior
from poe_models.program import log_constant, log_density, program
from tests.levels import Z
from tests.seeds import seeded

NAMES = ("a", "b", "c")


class Named(NamedTuple):
    """A batch as a tokenizer's wrapper gives it."""

    x: Tensor
    places: Tensor


def linear_model(energy: Any = None, d_in: int = 5, d_out: int = 4) -> SpanModel:
    """A linear layer with bias: outputs are linear in the coefficients."""
    generator = seeded(3)
    network = nn.Linear(d_in, d_out)

    def draw(scale: float) -> dict[str, Tensor]:
        weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
        return {"weight": scale * weight, "bias": scale * torch.randn(d_out, generator=generator, dtype=torch.float64)}

    base = draw(1.0)
    experts = {name: {key: base[key] + value for key, value in draw(0.3).items()} for name in NAMES}
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    return SpanModel(network.double(), vectors, ProductOfExperts.of(NAMES, InputGram(), energy or Gaussian()))


def inputs_of(count: int, seed: int = 0, d_in: int = 5) -> Tensor:
    return torch.randn(count, d_in, generator=seeded(seed), dtype=torch.float64)


def called(net: Any, x: Any) -> Tensor:
    found: Tensor = net(x)
    return found


def linear_posterior(model: SpanModel, divergence: Any, count: int = 12, **how: Any) -> Posterior:
    return model.posterior(
        *(functional(n, model, inputs_of(count, i), called, divergence, **how) for i, n in enumerate(NAMES))
    )


# --- the model as a function of coefficients ---


def test_an_experts_coefficients_give_the_expert() -> None:
    model, x = linear_model(), inputs_of(3)
    for name in NAMES:
        weights = model.weights(model.expert(name))
        torch.testing.assert_close(
            model.call(model.expert(name), called, x), F.linear(x, weights["weight"], weights["bias"])
        )
    two = model.coefficients({"a": 0.5, "merge": 2.0})
    base, a = model.weights(model.coefficients({})), model.weights(model.expert("a"))
    merged = model.weights(model.coefficients({"merge": 1.0}))
    for tensor in ("weight", "bias"):
        expected = base[tensor] + 0.5 * (a[tensor] - base[tensor]) + 2.0 * (merged[tensor] - base[tensor])
        torch.testing.assert_close(model.weights(two)[tensor], expected)


def test_the_merge_is_the_designs_map_and_its_bias_the_mean() -> None:
    model = linear_model(Cauchy())
    merged = model.weights(model.coefficients({"merge": 1.0}))
    experts = [model.weights(model.expert(name))["bias"] for name in NAMES]
    torch.testing.assert_close(merged["bias"], torch.stack(experts).mean(0))
    posterior = model.posterior()
    torch.testing.assert_close(posterior.coefficients(model.start(0.7)), model.coefficients({"merge": 0.7}))
    x = minimize(posterior, model.start()).value
    torch.testing.assert_close(
        model.weights(posterior.coefficients(x))["weight"], merged["weight"], rtol=1e-4, atol=1e-5
    )


def test_a_prefix_names_the_networks_tensors() -> None:
    plain = linear_model()
    state = {key: value.clone() for key, value in plain.weights(plain.coefficients({})).items()}
    vectors = TaskVectors(state, {"a": {k: v + 1 for k, v in state.items()}}, dtype=torch.float64)
    poe = ProductOfExperts.of(["a"])
    wrapped = nn.Sequential(nn.Linear(5, 4)).double()
    model = SpanModel(wrapped, vectors, poe, prefix="0.")
    x = inputs_of(2)
    found = model.call(model.coefficients({}), called, x)
    mean = state["bias"] + 1  # one expert's merge is a multiple of its update: the bias is the mean of all
    torch.testing.assert_close(found, F.linear(x, state["weight"], mean))
    with pytest.raises(ValueError, match="no tensor 'weight'.*prefix"):
        SpanModel(wrapped, vectors, poe)


def test_the_start_is_the_merge_also_where_it_lies_in_the_span() -> None:
    plain = linear_model()
    base = {key: value.clone() for key, value in plain.weights(plain.coefficients({})).items()}
    experts = {name: {k: v.clone() for k, v in plain.weights(plain.expert(name)).items()} for name in NAMES}
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    for poe in (ProductOfExperts.of(NAMES, Directional()), ProductOfExperts.of(NAMES, importance=[1.0, 2.0, 5.0])):
        model = SpanModel(nn.Linear(5, 4), vectors, poe)
        found = model.weights(model.posterior().coefficients(model.start()))
        (module,) = vectors
        merged = base["weight"] + fixed_point(poe.bind(module)).value[0]
        mean = vectors.average("bias", importance=[e.importance for e in poe.experts])
        torch.testing.assert_close(found["weight"], merged, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found["bias"], mean)


def test_the_network_is_a_copy_in_evaluation_mode() -> None:
    generator = seeded(2)
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    base = {k: v.clone() for k, v in network.state_dict().items()}
    experts = {}
    for name in ("a", "b"):
        moved = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items() if v.is_floating_point()}
        experts[name] = {k: v + moved[k] if k in moved and "running" not in k else v for k, v in base.items()}
    model = SpanModel(network, TaskVectors(base, experts), ProductOfExperts.of(["a", "b"]))
    x = inputs_of(6).float()
    one, other = (predictions("a", model, x, called).outputs for _ in range(2))
    assert torch.equal(one, other)
    assert network.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in base.items())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_a_frozen_layer_stays_the_bases() -> None:
    base = {k: v.clone() for k, v in nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).state_dict().items()}
    generator = seeded(8)
    experts = {
        name: {k: v + 0.1 * torch.randn(v.shape, generator=generator) if k[0] == "2" else v for k, v in base.items()}
        for name in NAMES
    }
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.warns(UserWarning, match=r"no update changes 0\.weight"):
        model = SpanModel(network, TaskVectors(base, experts), ProductOfExperts.of(NAMES, InputGram()))
    x = inputs_of(8).float()
    posterior = model.posterior(*(functional(name, model, x, called) for name in NAMES))
    found = fit(posterior, model.start(), generator=seeded(0), steps=5, batch_size=8)
    weights = model.weights(posterior.coefficients(found.value))
    assert torch.equal(weights["0.weight"], base["0.weight"])
    draws = functional_laplace(posterior, minimize(posterior, found.value).value).sample(2, seeded(1))
    assert bool(draws.values.isfinite().all())
    program(posterior)()


# --- energies ---


def test_divergences_by_torch() -> None:
    logits, target = (torch.randn(6, 5, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    expected = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(KullbackLeibler()(logits, Targets(target)), expected)
    squared = (logits - target).square().sum(1)
    torch.testing.assert_close(Residual(Cauchy(), 2.0)(logits, Targets(target)), torch.log1p(squared / 4))
    masked = target.clone()
    masked[:, 0] = -torch.inf
    assert bool(KullbackLeibler()(logits, Targets(masked)).isfinite().all())


def test_only_counted_tokens_are_observations() -> None:
    logits, target = (torch.randn(3, 4, 5, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    counted = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    found = KullbackLeibler()(logits, Targets(target, counted))
    single = torch.stack([KullbackLeibler()(logits[:, t], Targets(target[:, t])) for t in range(4)], 1)
    torch.testing.assert_close(found, torch.where(counted, single, 0.0).sum(1))
    logits[~counted] = torch.nan
    assert bool(KullbackLeibler()(logits, Targets(target, counted)).isfinite().all())


def test_the_program_is_the_sum_of_the_energies() -> None:
    model = linear_model(Cauchy())
    posterior = replace(linear_posterior(model, KullbackLeibler(), importance=2.5), temperature=0.7)
    x = model.start() + 0.1
    total = posterior.energy(x).sum()
    for i, name in enumerate(NAMES):
        rows, coefficients = inputs_of(12, i), posterior.coefficients(x)
        own, merged = (model.call(c, called, rows) for c in (model.expert(name), coefficients))
        total = total + 2.5 * KullbackLeibler()(merged, Targets(own)).sum()
    torch.testing.assert_close(posterior.joint_energy(x), total)
    density = log_density(posterior, joint=True)(x)
    torch.testing.assert_close(density, -total / 0.7 + log_constant(posterior).sum())
    draws = torch.stack([x, model.start()])
    torch.testing.assert_close(log_density(posterior, joint=True)(draws)[0], density)


def test_mini_batches_are_unbiased() -> None:
    model = linear_model()
    posterior = linear_posterior(model, KullbackLeibler(), subsample_size=3)
    x = model.start()
    conditioned = pyro.condition(program(posterior), data={"update": x})
    exact = float(log_density(posterior, joint=True)(x))
    found = []
    for _ in range(400):
        trace = pyro.poutine.trace(conditioned).get_trace()
        found.append(float(trace.log_prob_sum()))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    assert error > 0
    assert abs(float(values.mean()) - exact) < Z * error


def test_examples_one_at_a_time_and_together() -> None:
    model = linear_model()
    one, other = (linear_posterior(model, KullbackLeibler(), batch_size=size) for size in (5, None))
    torch.testing.assert_close(one.joint_energy(model.start()), other.joint_energy(model.start()))


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
    with pytest.raises(ValueError, match="between 1 and the number"):
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
