"""MAP of any differentiable posterior by L-BFGS: for factor experts, which have no weights to iterate on.

>>> from poe_models.experts import FactorExpert, ProductOfExperts
>>> updates = torch.eye(2, dtype=torch.float64).unsqueeze(1)                     # two experts, (2, 1, 2)
>>> small = FactorExpert("small", lambda c: c.square().sum(-1), coordinates="span")
>>> poe = ProductOfExperts.of(["a", "b"]) * small
>>> posterior = poe.bind(updates, coordinates="span")
>>> solution = minimize(posterior)
>>> solution.converged, posterior.coefficients(solution.value)[0, :2] < 0.7
(True, tensor([True, True]))
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.curvature import NEGATIVE, least_curvature
from inference.retention import retention
from inference.solution import MinimizeInfo, Solution, Status
from inference.units import COMFORTABLE, own_units, powers_of_two
from poe_models.posterior import Posterior
from poe_models.program import log_density

ESCAPES = 3
"""Times that the descent goes on from a saddle."""
ROUNDING = 10.0
"""Error of a gradient by rounding, in units of the dtype's and of the gradients of its terms."""
STEPS_OFF = (0.3, 0.1, 0.03, 0.01)
"""Lengths of the steps off a saddle that are tried, in units of the longest update."""


def minimize(
    posterior: Posterior, start: Tensor | None = None, max_steps: int = 1000, tolerance: float = 1e-6
) -> Solution[MinimizeInfo]:
    """MAP in the posterior's own coordinates, all modules together, from the program's log density.

    Where the descent ends at a saddle, as it does between opposed updates, it goes on along the direction in which the
    energy curves down the most.

    Args:
        posterior: Usually in Span coordinates; with factor experts always.
        start: Where to start, ``(M, *event)``; by default the average of the experts' updates.
        max_steps: Evaluations of the energy while it descends; where it ends some 34 gradients more tell a minimum from
            a saddle.
        tolerance: On each module's gradient, relative to the summed norms of the gradients of its experts, anchor and
            factors, which balance each other at a minimum.

    Raises:
        ValueError: If a factor expert's energy is not finite at the start, or carries no gradient, or updates of
            extreme size have a design of absolute ones.
    """
    own = own_units(posterior, "minimize", near=True)  # first steps are as long as the gradient
    posterior = own.posterior
    if start is None:
        start = torch.stack([expert.update for expert in posterior.experts]).mean(0)
    else:
        start = own.latents(start)
    descent = _Descent(posterior, start, max_steps)
    _require_gradients(posterior, descent.x)
    descent.run(tolerance)
    saddles, direction = descent.saddles(tolerance)
    for _ in range(ESCAPES):
        if descent.steps >= max_steps or not descent.step_off(saddles, direction):
            break
        descent.run(tolerance)
        saddles, direction = descent.saddles(tolerance)
    gradient, value = descent.balance(), descent.x.detach()
    ends = zip((gradient <= tolerance).tolist(), saddles.tolist(), strict=True)
    status = tuple(
        Status.MAX_STEPS if not still else Status.SADDLE if saddle else Status.CONVERGED for still, saddle in ends
    )
    info = MinimizeInfo(
        joint_energy=posterior.joint_energy(value),
        energy=posterior.energy(value),
        gradient_norm=gradient,
        retention=retention(posterior, value, posterior.residuals(value)),
        steps=descent.steps,
    )
    return own.solution(Solution(value, status, info))


class _Descent:
    """L-BFGS on the joint energy, and steps off the saddles where it ends.

    Args:
        posterior: Whose energy is minimised.
        start: The first point, ``(M, *event)``.
        max_steps: Evaluations of the energy, at most.
    """

    def __init__(self, posterior: Posterior, start: Tensor, max_steps: int) -> None:
        self.posterior, self.max_steps, self.steps = posterior, max_steps, 0
        self.density = log_density(posterior, joint=True)
        self.x = start.detach().to(posterior.dtype).clone().requires_grad_(True)
        updates = torch.stack([expert.update.flatten(1) for expert in posterior.experts])
        longest = updates.norm(dim=-1).amax(0)
        self.size = torch.where(longest > 0, longest, 1.0)  # (M,)

    def energy(self, z: Tensor) -> Tensor:
        return -self.posterior.fixed_temperature * self.density(z)

    def gradient(self, z: Tensor) -> Tensor:
        point = z.detach().requires_grad_(True)
        return _gradient(self.energy(point), point)

    def run(self, tolerance: float) -> None:
        """Descend from where it is, on an energy in units in which its gradient is not far from one."""
        left, scales = self.max_steps - self.steps, _scales(self.posterior, self.x)
        largest = scales.amax()
        unit = float(powers_of_two(largest, (largest > 0) & ((largest < 1 / COMFORTABLE) | (largest > COMFORTABLE))))
        optimizer = torch.optim.LBFGS(
            [self.x],
            lr=1.0,
            max_iter=left,
            max_eval=left,
            history_size=20,
            tolerance_grad=0.1 * tolerance * float(scales.min()) / unit / self.x.numel() ** 0.5,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value = self.energy(self.x) / unit
            self.x.grad = _gradient(value, self.x)
            return value

        optimizer.step(closure)
        self.steps += int(optimizer.state[self.x]["func_evals"])

    def balance(self) -> Tensor:
        """Each module's gradient, relative to the summed norms of the gradients of its terms, ``(M,)``."""
        norm = self.gradient(self.x).flatten(1).norm(dim=1).double()
        return torch.where(norm > 0, norm / _scales(self.posterior, self.x), norm)

    def saddles(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Mask of stationary points that curve down, ``(M,)``, and where to; factors have all modules in common."""
        still, joined = self.balance() <= tolerance, bool(self.posterior.factors)
        if not bool(still.all() if joined else still.any()):
            return torch.zeros_like(still), torch.zeros_like(self.x)
        unit = self.size.to(self.x).reshape(-1, *(1,) * (self.x.ndim - 1))  # of every module, whatever the others'

        def gradient(y: Tensor) -> Tensor:
            return (unit * self.gradient(unit * y.reshape(self.x.shape))).reshape(y.shape)

        y = self.x.detach() / unit
        noise = ROUNDING * torch.finfo(y.dtype).eps * self.size.double() * _scales(self.posterior, self.x)
        if joined:
            y, noise = y.unsqueeze(0), noise.sum().unsqueeze(0)
        found, direction = least_curvature(gradient, y, noise)
        return still & (found < -NEGATIVE[y.dtype]), unit * direction.reshape(self.x.shape)

    def step_off(self, saddles: Tensor, direction: Tensor) -> bool:
        """Step off saddles to where the energy is lower; whether there was such a step."""
        left = saddles.clone()
        with torch.no_grad():
            here = self.energies(self.x)
            for step in (sign * length for length in STEPS_OFF for sign in (1, -1)):
                mask = left.reshape(-1, *(1,) * (self.x.ndim - 1))
                there = torch.where(mask, self.x + step * direction, self.x)
                lower = left & (self.energies(there) < here)
                self.x.copy_(torch.where(lower.reshape(mask.shape), there, self.x))
                left &= ~lower
        return bool((left != saddles).any())

    def energies(self, z: Tensor) -> Tensor:
        """The energy of each module, ``(M,)``; where factors have modules in common, that of all, for each."""
        joint = self.posterior.factors
        return self.energy(z).expand(len(z)) if joint else self.posterior.energy(z)


def _require_gradients(posterior: Posterior, x: Tensor) -> None:
    for factor in posterior.factors:
        energy = factor.energy(x)
        if not bool(energy.isfinite().all()):
            raise ValueError(
                f"`minimize(...)`: the energy of factor expert {factor.name!r} is not finite at the start. Mend its "
                "function, or give a `start` where it is."
            )
        if not energy.requires_grad:
            raise ValueError(
                f"`minimize(...)`: the energy of factor expert {factor.name!r} carries no gradient. Compute it from "
                "its argument with torch, without `.detach()`, `.item()` or NumPy."
            )


def _scales(posterior: Posterior, x: Tensor) -> Tensor:
    """Summed norms of the gradients of all terms of the energy, ``(M,)``."""
    terms = [expert.energy(x).sum() for expert in posterior.experts]
    terms += [posterior.anchor_energy(x).sum(), *(factor.energy(x).sum() for factor in posterior.factors)]
    norms = [_gradient(term, x).flatten(1).norm(dim=1).double() for term in terms if term.requires_grad]
    return torch.stack(norms).sum(0)


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, x)
    return gradient
