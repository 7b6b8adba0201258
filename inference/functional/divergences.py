"""Energies of a merged model's outputs on an example, in nats, given what an expert predicts there.

A divergence is any function of outputs ``(b, ..., C)`` and targets that gives ``(b,)`` nats. Shipped are the
Kullback-Leibler divergence of class probabilities and residuals of outputs under any energy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poe_models.energies import Energy, Gaussian
from poe_models.limits import require_positive
from poe_models.printing import Brief

Divergence = Callable[[Tensor, Any], Tensor]
"""Outputs of some examples and their targets to nats per example, ``(b,)``."""


@dataclass(frozen=True, repr=False)
class Targets(Brief):
    """Predictions of an expert, and the mask of those that count.

    Attributes:
        outputs: Outputs of the expert, ``(n, C)`` or ``(n, tokens, C)``.
        counted: Mask ``(n, tokens)`` of the tokens that are observations, padding not among them; None for all.
    """

    outputs: Tensor
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        if self.counted is not None and self.counted.shape != self.outputs.shape[:-1]:
            raise ValueError(
                f"`Targets(counted={tuple(self.counted.shape)})`: outputs of {tuple(self.outputs.shape)}. Give a mask "
                "(n, tokens) of the same examples and tokens."
            )

    def masked(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets with zeros where nothing counts, so that nothing there has a value or a gradient."""
        if self.counted is None:
            return outputs, self.outputs
        kept = self.counted.unsqueeze(-1)
        return torch.where(kept, outputs, 0.0), torch.where(kept, self.outputs, 0.0)


@dataclass(frozen=True)
class KullbackLeibler:
    """``KL(p_i || p_Z)`` of class probabilities, ``softmax`` of the outputs, summed over counted tokens.

    It is the expected log loss of labels that expert ``i`` would give, less its entropy. A class whose logit is
    ``-inf`` in the target has no probability there and costs nothing.

    >>> target = Targets(torch.log(torch.tensor([[0.5, 0.5]])))
    >>> KullbackLeibler()(torch.log(torch.tensor([[0.25, 0.75]])), target)
    tensor([0.1438])
    """

    def __call__(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Nats per example ``(b,)`` of logits ``(b, C)`` or ``(b, tokens, C)``."""
        outputs, target = targets.masked(outputs)
        own = target.log_softmax(-1)
        terms = torch.where(own == -torch.inf, 0.0, own.exp() * (own - outputs.log_softmax(-1)))
        return _per_example(terms.sum(-1))


@dataclass(frozen=True)
class Residual:
    """``rho(|f_Z(x) - f_i(x)|^2 / s^2)`` of outputs or features, one residual for each example or counted token.

    A heavy-tailed energy forgives the examples that cannot be matched, one by one.

    Args:
        energy: Its ``rho``.
        scale: ``s``, in the units of the outputs.

    >>> Residual(Gaussian(), scale=2.0)(torch.tensor([[2.0, 0.0]]), Targets(torch.zeros(1, 2)))      # rho = q / 2
    tensor([0.5000])
    """

    energy: Energy = Gaussian()
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("Residual(", "It is in units of the outputs.", scale=self.scale)
        if self.energy.needs_dimension:
            raise ValueError(
                f"`Residual({self.energy!r})`: its exponent depends on the dimension of the residual. Give one."
            )

    def __call__(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Nats per example ``(b,)`` of outputs ``(b, C)`` or ``(b, tokens, C)``."""
        outputs, target = targets.masked(outputs)
        values = self.energy.rho((outputs - target).square().sum(-1) / self.scale**2)
        return _per_example(values if targets.counted is None else torch.where(targets.counted, values, 0.0))


def _per_example(values: Tensor) -> Tensor:
    """Sum ``(b,)`` of values ``(b,)`` or ``(b, tokens)``."""
    return values if values.ndim == 1 else values.sum(-1)
