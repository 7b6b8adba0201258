"""Small networks and draws of products of their fine-tuned copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from inference.gibbs import gibbs
from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import collect_statistics
from poe_models import ProductOfExperts, TaskVectors
from tests.seeds import seeded

CLASSES = 5


class Block(nn.Module):
    """A residual block: its input is used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.act = nn.ReLU()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Blocks in a ModuleList, an activation that is used before and after them, and an unused integer buffer."""

    def __init__(self, width: int = 6, depth: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)
        self.act = nn.Tanh()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.arange(3))
        self.to(dtype)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.stem(x)))
        for layer in self.layers:
            x = layer(x)
        return self.out(self.act(x))


def tuned(model: nn.Module, generator: torch.Generator, count: int = 3, size: float = 0.2) -> TaskVectors:
    """Task vectors of perturbed copies of a model, in memory; tied tensors stay tied."""
    base = model.state_dict()
    experts = {}
    for name in "xyz"[:count]:
        one = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in one.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (size * noise).to(parameter)
        experts[name] = one.state_dict()
    return TaskVectors(base, experts, dtype=torch.float64)


def span_draws(vectors: TaskVectors, design: ProductOfExperts | Design, count: int = 4, seed: int = 0) -> SpanDraws:
    statistics = collect_statistics(vectors, design)
    poe = design.poe if isinstance(design, Design) else design
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    draws = gibbs(posterior, 100, generator=generator, warmup=20)
    return SpanDraws.of(draws, posterior).thinned(count)


def call(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The straightforward route: load into a copy, run."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    with torch.no_grad():
        return loaded.eval()(x).double()


def by_hand(model: nn.Module, ensemble: MergedEnsemble, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    batches = [x for x, _ in loader]
    logits = [torch.cat([call(model, state, x) for x in batches]) for state in ensemble.members()]
    p = torch.stack(logits).softmax(-1)
    mean = p.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    return mean, entropy, entropy + (p * p.log()).sum(-1).mean(0)


def counted(module: nn.Module) -> list[int]:
    """Counts how often a module is really computed."""
    calls = [0]
    forward = module.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    module.forward = counting
    return calls
