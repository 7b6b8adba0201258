"""DARE: drop entries at random and rescale the rest (Yu et al., 2024, arXiv 2311.03099), alone or before TIES."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import require_choice, require_number, require_seed, require_share
from poe_models.methods.method import About, MergingMethod, ModuleBatch, named_generator
from poe_models.methods.ties import Combine, SignElection


@dataclass(frozen=True)
class Dare(MergingMethod):
    """``scale * sum_i m_i U_i / (1 - drop)`` with masks ``m_i`` of Bernoulli(1 - drop) entries (Yu et al., 2024).

    Its expectation over seeds is task arithmetic. The masks depend on the seed and on the names of module and expert,
    not on the order in which anything is merged.

    Args:
        drop: Probability of dropping an entry.
        scale: The task-arithmetic coefficient.
        seed: Seed of the masks.

    >>> Dare(drop=0.5, scale=1.0, seed=1)(torch.ones(1, 1, 8))
    tensor([[2., 2., 0., 0., 0., 2., 2., 0.]])
    """

    about = About(
        "DARE",
        "Yu et al., 2024, Language models are super Mario, arXiv 2311.03099",
        random=True,
        exceptions={
            "one expert": "entries are dropped at random",
            "identical experts": "entries are dropped at random",
        },
    )

    drop: float = 0.5
    scale: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        require_share(self, "drop", one=False)
        require_number(self, "scale")
        require_seed(self)

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        total = torch.zeros_like(batch.updates[:, 0])
        for index, expert in enumerate(batch.experts):
            for position, module in enumerate(batch.names):
                total[position] += dropped(batch.updates[position, index], self.drop, self.seed, module, expert)
        return self.scale * total


@dataclass(frozen=True)
class DareTies(SignElection):
    """TIES on randomly dropped and rescaled updates (Yu et al., 2024; see ``Dare`` and ``Ties``).

    Args:
        drop: Probability of dropping an entry.
        density: Share of the entries that an expert keeps; dropped ones, which are zero, count.
        scale: Coefficient of the merged update.
        combine: Mean, sum, or largest of the entries that agree.
        seed: Seed of the masks.
        thresholds: Smallest magnitude that each expert keeps; filled in by ``prepare``.
        majority: Sign of the entries whose trimmed values cancel; filled in by ``prepare``.

    >>> DareTies(drop=0.5, seed=1, thresholds=(0.0,), majority=1)(torch.ones(1, 1, 8))
    tensor([[2., 2., 0., 0., 0., 2., 2., 0.]])
    """

    about = About(
        "DARE-TIES",
        "Yu et al., 2024, Language models are super Mario, arXiv 2311.03099",
        scope="model",
        random=True,
        exceptions={
            "one expert": "entries are dropped and trimmed",
            "identical experts": "entries are dropped and trimmed",
        },
    )

    drop: float = 0.5
    density: float = 0.2
    scale: float = 1.0
    combine: Combine = "mean"
    seed: int = 0
    thresholds: tuple[float, ...] | None = None
    majority: int | None = None

    def __post_init__(self) -> None:
        require_share(self, "drop", one=False)
        require_share(self, "density")
        require_number(self, "scale")
        require_choice(self, "combine", Combine)
        require_seed(self)

    @override
    def represented(self, batch: ModuleBatch) -> Iterator[tuple[Tensor | None, Tensor]]:
        for module, updates in zip(batch.names, batch.updates, strict=True):
            yield None, all_dropped(updates, self.drop, self.seed, module, batch.experts)

    @override
    def working_floats(self, modules: int, experts: int, shape: tuple[int, int]) -> int:
        return (2 * experts + 8) * shape[0] * shape[1]


def all_dropped(updates: Tensor, drop: float, seed: int, module: str, experts: Sequence[str]) -> Tensor:
    """The thinned updates ``(N, ...)`` of all experts in one module; see :func:`dropped`."""
    return torch.stack([dropped(each, drop, seed, module, name) for each, name in zip(updates, experts, strict=True)])


def dropped(values: Tensor, drop: float, seed: int, module: str, expert: str) -> Tensor:
    """Entries of one expert in one module, dropped with a probability, the others divided by one minus it."""
    drawn = torch.rand(values.shape, generator=named_generator(seed, module, expert))
    uniform = drawn.to(values.device)  # the same whatever the dtype and device
    return torch.where(uniform >= drop, values / (1 - drop), 0)
