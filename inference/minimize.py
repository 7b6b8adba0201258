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

from inference.retention import retention
from inference.solution import MinimizeInfo, Solution, Status
from inference.units import own_units
from poe_models.posterior import Posterior
from poe_models.program import log_density


def minimize(
    posterior: Posterior, start: Tensor | None = None, max_steps: int = 1000, tolerance: float = 1e-6
) -> Solution[MinimizeInfo]:
    """MAP in the posterior's own coordinates, all modules together, from the program's log density.

    Args:
        posterior: Usually in Span coordinates; with factor experts always.
        start: Where to start, ``(M, *event)``; by default the average of the experts' updates.
        max_steps: Evaluations of the energy.
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
    density, temperature = log_density(posterior, joint=True), posterior.fixed_temperature
    x = start.detach().to(posterior.dtype).clone().requires_grad_(True)
    _require_gradients(posterior, x)
    optimizer = torch.optim.LBFGS(
        [x],
        lr=1.0,
        max_iter=max_steps,
        max_eval=max_steps,
        history_size=20,
        tolerance_grad=0.1 * tolerance * float(_scales(posterior, x).min()) / x.numel() ** 0.5,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = -temperature * density(x)
        x.grad = _gradient(value, x)
        return value

    optimizer.step(closure)
    norm = _gradient(-temperature * density(x), x).flatten(1).norm(dim=1).double()
    gradient = torch.where(norm > 0, norm / _scales(posterior, x), norm)
    status = tuple(Status.CONVERGED if value <= tolerance else Status.MAX_STEPS for value in gradient.tolist())
    value = x.detach()
    info = MinimizeInfo(
        joint_energy=posterior.joint_energy(value),
        energy=posterior.energy(value),
        gradient_norm=gradient,
        retention=retention(posterior, value, posterior.residuals(value)),
        steps=int(optimizer.state[x]["func_evals"]),
    )
    return own.solution(Solution(value, status, info))


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
