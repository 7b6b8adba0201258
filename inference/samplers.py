"""The samplers of a posterior in one table, from which command line, draws, ensembles and reports know them.

A sampler of your own is a function in a file and an entry here. The function takes a bound posterior, the number of
draws per chain and a generator, and returns :class:`~inference.draws.Draws`; of the settings ``chains``, ``warmup``,
``thin``, ``progress`` and ``mode`` (the MAP to draw around) it names those it has a use for, with their defaults::

    SAMPLERS["mine"] = Sampler(mine, "one line for the help text")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.draws import Draws
from inference.gibbs import gibbs
from inference.laplace import Laplace
from inference.nuts import nuts
from inference.slice import slice_sample
from poe_models.energies import Energy
from poe_models.posterior import Posterior


@dataclass(frozen=True)
class Sampler:
    """A function that draws from a posterior, and what one may ask of it.

    Attributes:
        draw: The function.
        about: One line for help texts.
        coordinates: Coordinates that it draws in, ``"span"`` and ``"full"``. Draws in Full coordinates are made again
            from seeds, which ``inference.models.full_draws`` has to know how to do.
        refusal: Maps an energy to the reason why it cannot be drawn, or to None.
    """

    draw: Callable[..., Draws]
    about: str
    coordinates: tuple[str, ...] = ("span",)
    refusal: Callable[[Energy], str | None] = lambda energy: None

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword parameters of the function, with their defaults."""
        parameters = inspect.signature(self.draw).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    @property
    def independent(self) -> bool:
        """Whether its draws are independent of each other, so that there are no chains to judge."""
        return "chains" not in self.settings


def laplace_draws(posterior: Posterior, num_samples: int, *, generator: torch.Generator, mode: Tensor) -> Draws:
    """Independent draws of Laplace's approximation at a MAP ``(M, *event)``, in one chain; errors as Laplace's."""
    return Laplace(posterior, mode).sample(num_samples, generator)


def _without_mixture(energy: Energy) -> str | None:
    return None if energy.is_mixture else "has no known Gaussian scale mixture"


SAMPLERS = {
    "gibbs": Sampler(gibbs, "exact, for energies that are Gaussian scale mixtures", ("span", "full"), _without_mixture),
    "slice": Sampler(slice_sample, "for any energy, from its values alone"),
    "nuts": Sampler(nuts, "Pyro's No-U-Turn Sampler, for any energy; slow, a reference"),
    "laplace": Sampler(laplace_draws, "independent draws of the Gaussian at the MAP", ("span", "full")),
}
"""Every sampler by the name that ``poe-merge sample --sampler`` and records of draws have for it."""
