"""Predictions of ensembles of a model that is linearised at a merge: exact for linear ones, of second order else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.draws import Draws
from inference.functional import SpanModel
from inference.models.ensemble import MergedEnsemble
from poe_models import Gaussian, ProductOfExperts
from tests.seeds import seeded
from tests.test_functional_draws import NAMES, network_of, vectors_of


def ensemble_at(network: nn.Module, width: float) -> tuple[MergedEnsemble, dict[str, Tensor]]:
    """Three members at a distance from the merge, with the same noise at every width, and the merge's weights."""
    vectors = vectors_of(network)
    model = SpanModel(network, vectors, ProductOfExperts.of(NAMES, energy=Gaussian()))
    noise = torch.randn(1, 3, *model.start().shape, generator=seeded(5), dtype=torch.float64)
    draws = model.draws(Draws(model.start() + width * noise), model.start())
    merge = model.weights(model.coefficients({"merge": 1.0}))
    return MergedEnsemble(vectors, model.poe, draws, through=model.merges), merge


def test_a_linear_model_is_its_own_linearisation() -> None:
    network = nn.Sequential(nn.Linear(5, 4)).double()
    ensemble, merge = ensemble_at(network, 1.0)
    x = torch.randn(6, 5, generator=seeded(2), dtype=torch.float64)
    plain, linear = (ensemble.predict(network, [x], around=around).probabilities for around in (None, merge))
    torch.testing.assert_close(plain, linear, rtol=1e-10, atol=1e-12)


def test_the_difference_is_of_second_order() -> None:
    network = network_of()
    x = torch.randn(40, 5, generator=seeded(2), dtype=torch.float64)
    errors, moved = [], []
    for width in (1e-2, 1e-3):
        ensemble, merge = ensemble_at(network, width)
        predictors = [ensemble.predictor(network, [x], around=around) for around in (None, merge)]
        sampled, linear = (predictor(ensemble.draws[0]) for predictor in predictors)
        errors.append(float((sampled - linear).norm()))
        network.load_state_dict(merge)
        moved.append(float((sampled - network(x).log_softmax(-1)).norm().detach()))
    assert 50 < errors[0] / errors[1] < 200
    assert 5 < moved[0] / moved[1] < 20
    assert errors[0] < 0.2 * moved[0]


def test_a_cut_and_a_linearisation_exclude_each_other() -> None:
    network: Any = network_of()
    ensemble, merge = ensemble_at(network, 0.1)
    with pytest.raises(ValueError, match="nothing is reused of a linearised model"):
        ensemble.predict(network, [torch.zeros(1, 5)], cut="3", around=merge)
