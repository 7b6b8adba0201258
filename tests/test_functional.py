"""Functional experts: the model as a function of coefficients, and energies by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inference.functional import (
    KullbackLeibler,
    Residual,
    SpanModel,
    Targets,
    fit,
    functional,
    functional_laplace,
    predictions,
)
from inference.map import fixed_point
from inference.minimize import minimize
from poe_models import Cauchy, Directional, InputGram, ProductOfExperts, TaskVectors
from poe_models.program import log_constant, log_density, program
from tests.functional_toys import NAMES, called, inputs_of, linear_model, linear_posterior
from tests.levels import Z
from tests.seeds import seeded

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
