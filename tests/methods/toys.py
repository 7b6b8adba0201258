"""Batches and statistics of small modules, and a network that learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from poe_models import TaskVectors
from poe_models.methods import TaskData
from tests.seeds import seed_of

SHAPE = (5, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(3))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def setting(seed: int = 0) -> tuple[TaskVectors, TaskData, Net, dict[str, list[Tensor]]]:
    torch.manual_seed(seed_of(seed))
    base = Net().double()
    experts = {}
    for name in ("a", "b"):
        state = {k: v.clone() for k, v in base.state_dict().items()}
        for key in state:
            if state[key].is_floating_point():
                state[key] += 0.5 * torch.randn_like(state[key])
        experts[name] = state
    start = {name: value.clone() for name, value in base.state_dict().items()}
    vectors = TaskVectors(start, experts, dtype=torch.float64)
    loaders = {name: list(torch.randn(12, 4, dtype=torch.float64).split(4)) for name in ("a", "b")}
    forward = lambda weights, batch: functional_call(base, dict(weights), (batch,))  # noqa: E731
    return vectors, TaskData(loaders, forward), base, loaders
