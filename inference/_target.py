"""A posterior's log density and gradient for gradient-based samplers, evaluated for many draws at once.

Samplers see a state ``(C, G, D)``: chains, independent groups, coordinates. A group is a module, or all modules
together where a factor expert couples them.

The value is ``-E / T``: the Pyro program's log density without its constant. The energies are evaluated directly,
because tracing the program costs more than they do, and in Span coordinates their gradient is
``2 sum_i w_i P_i (x - U_i) + 2 eta (x - Z_0)``, from the weights that the fixed point uses. A test holds value and
gradient to :func:`poe_models.program.log_density` for every map and energy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poe_models.operators import Gram, sum_of_squares
from poe_models.posterior import Posterior

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From states ``(C, G, D)`` to log densities in nats ``(C, G)`` and their gradients ``(C, G, D)``."""


class Target:
    """The :data:`Density` of a posterior.

    Args:
        posterior: in Full or Span coordinates, with or without factor experts.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.joint = any(factor.joint for factor in posterior.factors)
        self.stack = _Stack(posterior) if _stackable(posterior) else None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``-E / T`` and its gradient."""
        z = self.latents(x)
        if self.stack is None:
            energy, gradient = self._by_autograd(z, self._all)
        else:
            energy, gradient = self.stack(z)
            energy = energy.sum(-1, keepdim=True) if self.joint else energy
            if self.posterior.factors:
                more = self._by_autograd(z, self._factors)
                energy, gradient = energy + more[0], gradient + more[1]
        temperature = self.posterior.temperature
        return -energy / temperature, -self.states(gradient) / temperature

    def states(self, z: Tensor) -> Tensor:
        """Latents ``(*S, M, *event)`` as states ``(*S, G, D)``, float64."""
        x = z.to(torch.float64).flatten(-2)
        return x.flatten(-2).unsqueeze(-2) if self.joint else x

    def latents(self, x: Tensor) -> Tensor:
        """States ``(*S, G, D)`` as latents ``(*S, M, *event)``."""
        return x.reshape(*x.shape[:-2], self.posterior.num_modules, *self.posterior.event_shape)

    def per_module(self, values: Tensor) -> Tensor:
        """Statistics of groups ``(*S, G)`` repeated for every module of the group, ``(*S, M)``."""
        return values.expand(*values.shape[:-1], self.posterior.num_modules)

    def _all(self, z: Tensor) -> Tensor:
        z = z.to(self.posterior.dtype)
        return self.posterior.joint_energy(z).unsqueeze(-1) if self.joint else self.posterior.energy(z)

    def _factors(self, z: Tensor) -> Tensor:
        """Energy of the factor experts alone, ``(C, G)``."""
        total = z.new_zeros(z.shape[:-2])
        for factor in self.posterior.factors:
            if not factor.joint:
                total = total + factor.energy(z)
        if not self.joint:
            return total
        coupled = [factor.energy(z) for factor in self.posterior.factors if factor.joint]
        return (total.sum(-1) + torch.stack(coupled).sum(0)).unsqueeze(-1)

    @staticmethod
    def _by_autograd(z: Tensor, energy: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Energy and its gradient; draws and groups are independent, so one backward pass of the sum serves all."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            value = energy(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient


def _stackable(posterior: Posterior) -> bool:
    """Whether every latent is a column and every operator a Gram of the same size on it, as in Span coordinates."""
    operators = [expert.operator for expert in posterior.experts]
    if posterior.event_shape[1] != 1 or posterior.dtype != torch.float64:
        return False
    shapes = {tuple(o.factor.shape) if isinstance(o, Gram) and o.side == "left" else None for o in operators}
    return len(shapes) == 1 and None not in shapes


class _Stack:
    """All experts' residuals in one product: ``r = F^T x - F^T U``, ``q_i = |r_i|^2``, ``P_i (x - U_i) = F_i r_i``."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        grams = [e.operator for e in posterior.experts if isinstance(e.operator, Gram)]
        roots = torch.stack([gram.factor.mT for gram in grams], 1)  # (M, E, r, D)
        updates = torch.stack([expert.update for expert in posterior.experts], 1)
        self.sizes = (roots.shape[1], roots.shape[2])
        self.offset = (roots @ updates).flatten(1)
        self.roots = roots.flatten(1, 2).contiguous()

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Energy of experts and anchor ``(*S, M)`` and its gradient ``(*S, M, D, 1)``."""
        posterior = self.posterior
        residual = torch.einsum("mkd,...md->...mk", self.roots, z.squeeze(-1)) - self.offset
        residual = residual.unflatten(-1, self.sizes)
        q = residual.square().sum(-1)
        away = z if posterior.center is None else z - posterior.center
        energy = posterior.energy_of(q) + posterior.anchor_precision * sum_of_squares(away)
        pulled = (residual * posterior.weights(q).unsqueeze(-1)).flatten(-2)
        gradient = torch.einsum("mkd,...mk->...md", self.roots, pulled).unsqueeze(-1)
        return energy, 2 * (gradient + posterior.anchor_precision[:, None, None] * away)
