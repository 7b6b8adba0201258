"""Are these draws from that posterior? First whether the chains mix at all, then whether their means are right.

Every comparison is in units of the chains' own Monte Carlo error, so that longer chains make it stricter.
"""

from __future__ import annotations

from collections.abc import Mapping

import arviz
import numpy as np
import torch
from torch import Tensor

from inference.draws import Draws
from inference.gibbs import GibbsKernel
from poe_models import Posterior
from tests.helpers import assert_close


class DoesNotMix(AssertionError):
    """The chains are too few, too short or stuck: nothing can be said about their means."""


class IsBiased(AssertionError):
    """The chains mix, but towards something else."""


def functionals(posterior: Posterior, z: Tensor) -> dict[str, Tensor]:
    """What is compared, `(*S, M, *event)` to `(*S, F)` each: coordinates, their squares, squared residuals, energies.

    The first three see means and covariances only; the energy also sees a skewed posterior that was mirrored.
    """
    x = z.double().flatten(-3)
    return {
        "x": x,
        "x^2": x.square(),
        "q": posterior.residuals(z).flatten(-2),
        "energy": posterior.energy(z),
    }


def assert_same_mean(
    posterior: Posterior,
    draws: Draws | Tensor,
    truth: Draws | Tensor | Mapping[str, Tensor],
    min_ess: float = 400.0,
    max_rhat: float = 1.02,
    errors: float = 5.0,
) -> None:
    """Draws `(C, S, M, *event)` mix, and the means of all functionals are within `errors` Monte Carlo errors of truth.

    `truth` is either exact, as means `(F,)` by the names of :func:`functionals`, or other draws, which must mix too.
    """
    estimates = _estimates(posterior, draws, min_ess, max_rhat)
    others = None if isinstance(truth, Mapping) else _estimates(posterior, truth, min_ess, max_rhat)
    for name, (mean, error) in estimates.items():
        expected, spread = (truth[name].numpy(), 0.0) if isinstance(truth, Mapping) else others[name]  # type: ignore[index]
        distance = np.abs(mean - expected) / np.sqrt(error**2 + spread**2)
        worst = int(distance.argmax())
        if not distance[worst] < errors:
            raise IsBiased(
                f"mean of {name}[{worst}] is {mean[worst]:.6g}, not {expected[worst]:.6g}: {distance[worst]:.1f} Monte "
                f"Carlo errors ({int((distance >= errors).sum())} of {distance.size} are over {errors:g})"
            )


def _estimates(
    posterior: Posterior, draws: Draws | Tensor, min_ess: float, max_rhat: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and Monte Carlo error `sd / sqrt(ESS)` of every functional."""
    z = draws if isinstance(draws, Tensor) else values_of(draws)
    result = {}
    for name, value in functionals(posterior, z).items():
        columns = [value[..., i].numpy() for i in range(value.shape[-1])]
        ess = np.array([arviz.ess(column, method="mean") for column in columns])
        rhat = np.array([arviz.rhat(column, method="rank") for column in columns])
        if not (ess.min() >= min_ess and rhat.max() <= max_rhat):
            raise DoesNotMix(
                f"{name}: smallest ESS {ess.min():.0f} < {min_ess:.0f} or R-hat {rhat.max():.3f} > {max_rhat}"
            )
        spread = np.array([column.std() for column in columns])
        result[name] = (np.array([column.mean() for column in columns]), spread / np.sqrt(ess))
    return result


def values_of(draws: Draws) -> Tensor:
    """All draws of any sampler, `(C, S, M, *event)`."""
    return torch.stack(
        [torch.stack([draws.latents(c, s) for s in range(draws.num_draws)]) for c in range(draws.num_chains)]
    )


def made_again(posterior: Posterior, draws: Draws) -> Tensor:
    """All Gibbs draws in Full coordinates, `(C, S, M, *event)`, from their weights and seeds in one batch."""
    kernel = GibbsKernel(posterior)
    seeds = draws.seeds.flatten(0, 1)
    noise = torch.stack([kernel._noise(row) for row in seeds]).unflatten(0, draws.seeds.shape[:2])
    white = kernel.quadratic.compression.compress(noise)
    values = kernel._latent(kernel._conditional(draws.weights, white), noise, white)
    assert_close(values[-1, -1], draws.latents(-1, -1))
    return values


def gaussian_means(posterior: Posterior) -> dict[str, Tensor]:
    """Exact means where every energy is quadratic in the latents: `E f = f(mean) + tr(f'' covariance) / 2`."""
    origin = torch.zeros(posterior.num_modules, *posterior.event_shape, dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        return posterior.joint_energy(x.view_as(origin))

    flat = origin.flatten().requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(flat), flat)
    hessian = torch.autograd.functional.hessian(energy, flat)
    mean = -torch.linalg.solve(hessian, gradient)
    covariance = posterior.temperature * torch.linalg.inv(hessian)
    result = {}
    for name in functionals(posterior, origin):

        def value(x: Tensor, name: str = name) -> Tensor:
            return functionals(posterior, x.view_as(origin))[name]

        curvature = torch.autograd.functional.jacobian(
            lambda x, value=value: torch.autograd.functional.jacobian(value, x, create_graph=True), mean
        )
        result[name] = value(mean) + 0.5 * torch.einsum("fij,ij->f", curvature, covariance)
    return result


def grid_means(posterior: Posterior, active: list[int], points: int = 401, width: float = 7.0) -> dict[str, Tensor]:
    """Means of one module by quadrature over the two coordinates that experts see; the anchor alone has the others.

    The density is smooth, and negligible at the edges, `width` standard deviations of the anchor away: the trapezoid
    rule converges exponentially.
    """
    assert posterior.num_modules == 1
    assert len(active) == 2
    center = (
        torch.zeros(1, *posterior.event_shape, dtype=torch.float64) if posterior.center is None else posterior.center
    )
    variance = posterior.temperature / (2 * float(posterior.anchor_precision))
    axis = torch.linspace(-width, width, points, dtype=torch.float64) * variance**0.5
    z = center.expand(points * points, *center.shape).clone()
    z[:, 0, active, 0] += torch.cartesian_prod(axis, axis)
    weight = torch.softmax(-posterior.energy(z).squeeze(-1) / posterior.temperature, 0)
    edge = weight.view(points, points)[[0, -1]].sum() + weight.view(points, points)[:, [0, -1]].sum()
    assert edge < 1e-9, "the grid is too narrow"
    means = {name: weight @ value for name, value in functionals(posterior, z).items()}
    for i in range(z[0].numel()):
        if i not in active:
            means["x^2"][i] += variance
            means["energy"] += posterior.temperature / 2
    return means
