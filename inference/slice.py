r"""Generalised elliptical slice sampling: draws of any posterior from its energy alone, without gradients.

The density is written as a multivariate t near by times what that misses, ``exp(-E(x) / T) = t(x) R(x)``. With
``delta(x) = (x - m)^T S^-1 (x - m)`` in ``D`` dimensions the t is a Gaussian of random scale, and two draws alternate:

    s | x ~ InverseGamma((df + D) / 2, (df + delta(x)) / 2)
    x | s   by a step that leaves N(m, s S) R invariant: a level at a uniform height below R(x), a draw of N(m, s S),
            and a uniform angle on the ellipse through both, from a bracket that shrinks towards x until R is above it

(Murray, Adams and MacKay, 2010, *Elliptical slice sampling*, AISTATS, PMLR 9:541-548; with the t: Nishihara, Murray
and Adams, 2014, *Parallel MCMC with generalized elliptical slice sampling*, JMLR 15:2087-2112).

The steps are exact for any ``m``, ``S`` and ``df``, which only decide how fast the chains mix. A t has heavier tails
than every posterior with an anchor, so that ``R`` is bounded and no chain is held far out, where a Gaussian would hold
it. ``m`` and ``S`` are first those of the quadratic that majorises the energy at the MAP. Where experts disagree, or
the MAP lies on a kink, the posterior looks nothing like that, so they are fitted to the draws of all chains during the
warm-up, as Nishihara et al. do, and are fixed afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from inference.chains import Kernel, Progress, majoriser_draws, mode_of, overdispersed_starts, stored_draws
from inference.draws import Draws
from inference.propriety import require_proper
from inference.units import own_units
from poe_models.posterior import Posterior
from poe_models.records import choose

DEGREES = 4.0
"""``df`` of the t: tails far heavier than an anchor's, and still a variance."""
FIT_AT = (0.1, 0.2, 0.4, 0.8)
"""Shares of the warm-up at which the t is fitted to the draws since the last time."""
MOST_SHRINKS = 100
"""A bracket that was cut this often has shrunk to nothing in float64."""
MOST_COORDINATES = 2000
"""Coordinates up to which a dense covariance is kept."""


def slice_sample(
    posterior: Posterior,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 4,
    warmup: int = 200,
    thin: int = 1,
    progress: Progress | None = None,
) -> Draws:
    """Draws of a posterior in its own coordinates by generalised elliptical slice sampling.

    Args:
        posterior: In Span coordinates, or Full ones of few entries; any energy and factor expert.
        num_samples: Draws kept per chain.
        generator: Source of all randomness, on the posterior's device.
        chains: Independent chains, from overdispersed starts; more cost little time.
        warmup: Steps per chain before the first kept draw, during which the t is fitted.
        thin: Steps per kept draw.
        progress: Called with the number of finished steps and their total.

    Returns:
        Draws ``(C, S, M, *event)`` in float64. ``stats`` has ``lp`` (``-E / T``), ``evaluations`` of the energy in the
        last step and whether it was ``stuck``, of all modules together where a factor expert couples them.

    Raises:
        ValueError: If the posterior is improper or has too many coordinates, its energy is not finite at a start, or a
            count cannot be used.
    """
    kernel = SliceKernel(posterior)
    return stored_draws(
        kernel, num_samples, generator=generator, chains=chains, warmup=warmup, thin=thin, progress=progress
    )


@dataclass(frozen=True, eq=False)
class SliceState:
    """State of ``C`` chains of ``G`` components: each is one module, or all of them where a factor expert couples them.

    Attributes:
        position: ``(C, G, D)`` float64.
        log_density: ``-E / T`` there, in nats, ``(C, G)``.
    """

    position: Tensor
    log_density: Tensor


@dataclass(frozen=True, eq=False)
class SliceInfo:
    """Energies until a point above the level was found, and whether the bracket shrank to nothing; ``(C, G)``."""

    evaluations: Tensor
    stuck: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """The multivariate t of each component, ``DEGREES`` degrees of freedom.

    Attributes:
        center: ``m``, ``(G, D)``.
        root: Lower triangular ``L`` with ``S = L L^T``, ``(G, D, D)``.
    """

    center: Tensor
    root: Tensor

    @classmethod
    def majoriser(cls, posterior: Posterior, mode: Tensor) -> Reference:
        """About the MAP ``(M, *event)``, with the covariance of the quadratic that majorises ``E / T`` there.

        Raises:
            ValueError: If there are too many coordinates for a dense covariance.
        """
        center = states(posterior, mode)
        size = center.shape[-1]
        if size > MOST_COORDINATES:
            raise ValueError(
                f"`slice_sample(...)`: {size} coordinates in one component (a module, or all of them where a factor "
                f"expert couples them), and it keeps their dense covariance, at most {MOST_COORDINATES} wide. Use Span "
                "coordinates, or `gibbs` or `laplace` in Full ones."
            )
        # R with R R^T the covariance has the draws of the unit vectors as its columns; L L^T = R R^T by QR.
        units = torch.eye(mode[0].numel()).to(mode).view(-1, 1, *posterior.event_shape)
        columns = majoriser_draws(posterior, mode, units.expand(-1, *mode.shape)).double().flatten(2)  # (D, M, D)
        root = columns.permute(1, 2, 0)
        if posterior.joint:
            root = torch.block_diag(*root).unsqueeze(0)
        return cls(center, torch.linalg.qr(root.mT).R.mT)

    def standardize(self, position: Tensor) -> Tensor:
        """``y = L^-1 (x - m)``, ``(C, G, D)``; ``|y|^2 = delta(x)``."""
        away = (position - self.center).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.root, away, upper=False).squeeze(-1)

    def position(self, y: Tensor) -> Tensor:
        """``x = m + L y``, ``(C, G, D)``."""
        return self.center + (self.root @ y.unsqueeze(-1)).squeeze(-1)

    def log_density(self, y: Tensor) -> Tensor:
        """Log of the t without its constant at standardized ``y``, ``(C, G, D)`` to ``(C, G)``."""
        return -(DEGREES + y.shape[-1]) / 2 * torch.log1p(y.square().sum(-1) / DEGREES)

    def scale(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of ``s | x``, ``(C, G)``."""
        shape = torch.full_like(y[..., 0], (DEGREES + y.shape[-1]) / 2)
        # The distribution objects take no generator; this is the kernel beneath torch.distributions.Gamma.
        return (DEGREES + y.square().sum(-1)) / 2 / torch._standard_gamma(shape, generator=generator)

    def fitted(self, positions: Tensor) -> Reference:
        """Mean and covariance of draws ``(n, G, D)`` together with ``D`` pseudo-draws of this one's covariance.

        Computed in this one's own units, in which a long and narrow posterior is not ill-conditioned.
        """
        count, size = len(positions), positions.shape[-1]
        y = self.standardize(positions)
        away = y - y.mean(0)
        covariance = torch.einsum("ngi,ngj->gij", away, away) + size * torch.eye(size).to(y)
        return Reference(self.position(y.mean(0)), self.root @ torch.linalg.cholesky(covariance / (count + size)))


def init(position: Tensor, posterior: Posterior) -> SliceState:
    """The state at a position ``(C, G, D)``.

    Raises:
        ValueError: If the energy is not finite there.
    """
    state = _at(position, posterior)
    finite = state.log_density.isfinite()
    if not bool(finite.all()):
        chain, component = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the energy of component {component} (a module, unless a factor expert couples them) is not finite where "
            f"chain {chain} starts. Look at the experts' energies around the MAP and the task vectors."
        )
    return state


def step(
    state: SliceState, posterior: Posterior, reference: Reference, generator: torch.Generator
) -> tuple[SliceState, SliceInfo]:
    """One elliptical slice step of all chains and components; exact whatever t the ellipses come from."""
    start = reference.standardize(state.position)
    noise = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
    across = noise * reference.scale(start, generator).sqrt().unsqueeze(-1)
    level = height(state.log_density - reference.log_density(start), generator)
    angle = 2 * math.pi * _uniform(level, generator)
    low, high = angle - 2 * math.pi, angle
    waiting, evaluations = torch.ones_like(level, dtype=torch.bool), torch.zeros_like(level, dtype=torch.long)
    for _ in range(MOST_SHRINKS):
        turn = angle.unsqueeze(-1)
        y = start * turn.cos() + across * turn.sin()
        proposal = _at(reference.position(y), posterior)
        evaluations = evaluations + waiting
        taken = waiting & (proposal.log_density - reference.log_density(y) > level)
        state = choose(taken, proposal, state)
        waiting = waiting & ~taken
        if not bool(waiting.any()):
            break
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)  # 0 is where x is
        angle = low + (high - low) * _uniform(level, generator)
    return state, SliceInfo(evaluations, waiting)


def height(log_ratio: Tensor, generator: torch.Generator) -> Tensor:
    """Log of a uniform height below ``R(x)``, from ``log R(x)``."""
    return log_ratio + _uniform(log_ratio, generator).log()


def states(posterior: Posterior, z: Tensor) -> Tensor:
    """Latents ``(*S, M, *event)`` as states ``(*S, G, D)``, float64."""
    x = z.to(torch.float64).flatten(-2)
    return x.flatten(-2).unsqueeze(-2) if posterior.joint else x


def latents(posterior: Posterior, x: Tensor) -> Tensor:
    """States ``(*S, G, D)`` as latents ``(*S, M, *event)``."""
    return x.reshape(*x.shape[:-2], posterior.num_modules, *posterior.event_shape)


class SliceKernel(Kernel[SliceState, SliceInfo]):
    """Elliptical slice steps whose t is fitted to the chains' draws during the warm-up and fixed afterwards."""

    name = "slice"
    function = "slice_sample"

    def __init__(self, posterior: Posterior) -> None:
        self.own = own_units(posterior, "slice_sample")
        self.posterior = self.own.posterior
        require_proper(self.posterior)
        self.mode = mode_of(self.posterior)
        self.reference = Reference.majoriser(self.posterior, self.mode)
        self.recent: list[Tensor] = []

    @override
    def init(self, chains: int, generator: torch.Generator) -> SliceState:
        starts = overdispersed_starts(self.posterior, self.mode, chains, generator)
        return init(states(self.posterior, starts), self.posterior)

    @override
    def step(self, state: SliceState, generator: torch.Generator) -> tuple[SliceState, SliceInfo]:
        return step(state, self.posterior, self.reference, generator)

    @override
    def warm_up(self, state: SliceState, step: int, steps: int) -> None:
        self.recent.append(state.position)
        if step in {round(share * steps) for share in FIT_AT}:
            self.reference = self.reference.fitted(torch.cat(self.recent))
            self.recent = []

    @override
    def latents(self, state: SliceState, info: SliceInfo) -> Tensor:
        return self.own.back(latents(self.posterior, state.position))

    @override
    def stats(self, state: SliceState, info: SliceInfo) -> dict[str, Tensor]:
        return {"lp": state.log_density, "evaluations": info.evaluations, "stuck": info.stuck}


def _at(position: Tensor, posterior: Posterior) -> SliceState:
    z = latents(posterior, position).to(posterior.dtype)
    return SliceState(position, -posterior.component_energy(z) / posterior.temperature)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
