"""Predictions of ensembles against a loop over models, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import sample_full
from poe_models import ProductOfExperts, TaskVectors
from tests.ensemble.toys import CLASSES, Net, by_hand, call, span_draws
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded


@pytest.mark.parametrize("pattern", ["", r"layers\.2\.fc2", "out", "stem"])
def test_predictions_are_those_of_a_loop_over_models(
    pattern: str, model: Net, vectors: TaskVectors, poe: ProductOfExperts, loader: DataLoader[Any]
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(pattern)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.layers[1].eval()
    ticks: list[tuple[int, int]] = []
    found = ensemble.predict(model, loader, progress=lambda i, n: ticks.append((i, n)))
    for value, expected in zip(
        (found.probabilities, found.entropy, found.mutual_information), by_hand(model, ensemble, loader), strict=True
    ):
        assert_close(value, expected, 1e-9)
    assert (found.num_members, ticks) == (4, [(1, 4), (2, 4), (3, 4), (4, 4)])
    # The model is as it was: weights, modes of each part, hooks, forward methods.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.stem.training, model.layers[1].training) == (True, True, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_mutual_information_is_zero_for_equal_members_and_large_for_opposed_ones() -> None:
    base = {"weight": torch.zeros(2, 1, dtype=torch.float64)}
    vectors = TaskVectors(
        base, {"x": {"weight": torch.tensor([[1.0], [-1.0]], dtype=torch.float64)}}, dtype=torch.float64
    )
    design = Design(ProductOfExperts.of(["x"]), coordinates="span")
    draws = span_draws(vectors, design, 2)
    model, loader = nn.Linear(1, 2, bias=False, dtype=torch.float64), [torch.ones(1, 1, dtype=torch.float64)]
    for coefficients, expected in (((10.0, 10.0), 0.0), ((40.0, -40.0), 0.6931471805599453)):
        values = torch.tensor([[c, 0.0] for c in coefficients], dtype=torch.float64).reshape(1, 2, 1, 2)
        ensemble = MergedEnsemble(vectors, design, replace(draws, coefficients=values))
        found = ensemble.predict(model, loader)
        assert abs(float(found.mutual_information) - expected) < 1e-12


def test_a_head_on_top_and_another_dtype(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(model)
            self.head = nn.Linear(CLASSES, 2, dtype=torch.float64)

        @override
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    torch.manual_seed(seed_of(1))
    whole = Classifier()
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"layers\.1")
    found = ensemble.predict(whole, loader, submodule="body")
    assert found.reused == "body.layers.1"
    batches = [x for x, _ in loader]
    logits = torch.stack([torch.cat([call(model, s, x) for x in batches]) for s in ensemble.members()])
    assert_close(found.probabilities, whole.head(logits).softmax(-1).mean(0).detach(), 1e-12)
    with pytest.raises(ValueError, match=r"the model has no such tensor.*submodule="):
        ensemble.predict(whole, loader)
    single = whole.float()
    batches32 = [x.float() for x in batches]
    assert_close(ensemble.predict(single, batches32, submodule="body").probabilities, found.probabilities, 1e-4)


def test_a_predictor_takes_draws_of_any_temperature(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    draws = span_draws(vectors, poe)
    ensemble = MergedEnsemble(vectors, poe, draws)
    predictor = ensemble.predictor(model, loader)
    mean = torch.stack([predictor(draw).exp() for draw in draws]).mean(0)
    assert_close(mean, ensemble.predict(model, loader).probabilities, 1e-12)
    colder = span_draws(vectors, replace(poe, temperature=1e-3))
    expected = next(MergedEnsemble(vectors, poe, colder).members())
    x = next(iter(loader))[0]
    assert_close(predictor(colder[0])[: len(x)], call(model, expected, x).log_softmax(-1), 1e-12)
    for wrong in (draws, draws.restrict("out")[0], replace(draws, source="other")[0]):
        with pytest.raises(ValueError, match="expected one draw of the ensemble's"):
            predictor(wrong)


def test_full_draws_keep_their_temperature_in_a_predictor(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    def drawn(temperature: float) -> Any:
        tempered = replace(poe, temperature=temperature)
        return sample_full(vectors, tempered, 1, generator=seeded(2), chains=2, warmup=5)

    warm, cold = drawn(0.3), drawn(1e-3)
    predictor = MergedEnsemble(vectors, poe, warm).predictor(model, loader)
    own = MergedEnsemble(vectors, replace(poe, temperature=1e-3), cold).predictor(model, loader)
    assert torch.equal(predictor(cold[1]), own(cold[1]))
    assert not torch.equal(predictor(cold[1]), predictor(warm[1]))


class Shuffled:
    """Other batches in every pass."""

    def __init__(self, generator: torch.Generator) -> None:
        self.x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.generator = generator

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(12, generator=self.generator)].split(5))


def test_bad_loaders_and_outputs_are_named(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any], generator: torch.Generator
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe))
    with pytest.raises(ValueError, match="Turn shuffling and random augmentation off"):
        ensemble.predict(model, Shuffled(generator))
    with pytest.raises(ValueError, match="got an iterator"):
        ensemble.predict(model, iter(loader))
    with pytest.raises(ValueError, match="has no batches"):
        ensemble.predict(model, [])
    with pytest.raises(ValueError, match=r"batches are mappings with input_ids.*`Net.forward`.*forward=lambda"):
        ensemble.predict(model, [{"input_ids": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match=r"gave a tensor \(10, 1, 2, 5\), expected logits \(b, classes\)"):
        ensemble.predict(
            model, loader, forward=lambda model, batch: model(batch[0])[:, None, None].expand(-1, 1, 2, -1)
        )
    with pytest.raises(ValueError, match="batch 0: a member gives logits that are NaN"):
        ensemble.predict(model, loader, forward=lambda model, batch: model(batch[0]) * torch.nan)
    other = Net()
    other.out = nn.Linear(6, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'out.bias' of shape \(5,\), the model has \(7,\)"):
        ensemble.predict(other, loader)
