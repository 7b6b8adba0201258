"""A forward function is given the merged network as a module is: called, with its signature and configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.functional import SpanModel, functional
from inference.models.outputs import called
from poe_models import ProductOfExperts, TaskVectors
from tests.seeds import seeded


class Keywords(nn.Module):
    """A network that takes keyword arguments, as those of transformers do, and gives an output with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.config = nn.Linear(5, 4), SimpleNamespace(is_encoder_decoder=False)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.fc(inputs)}


def test_mappings_become_keyword_arguments_of_the_merged_network() -> None:
    network, generator = Keywords(), seeded(1)
    base = {k: v.clone() for k, v in network.state_dict().items()}
    experts = {n: {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for n in "ab"}
    model = SpanModel(network, TaskVectors(base, experts), ProductOfExperts.of(["a", "b"]))
    x = torch.randn(6, 5, generator=seeded(2))
    batch: Any = {"inputs": x, "labels": torch.zeros(6, dtype=torch.int64)}
    expert = functional("a", model, batch, called)
    weights = model.weights(model.coefficients({"b": 1.0}))
    found = model.call(model.coefficients({"b": 1.0}), called, batch)
    torch.testing.assert_close(found, x @ weights["fc.weight"].T + weights["fc.bias"])
    assert expert.examples == 6
    with pytest.raises(ValueError, match=r"do not fit `Merged\.forward`"):
        model.call(model.expert("a"), called, {"x": x})
