r"""Log evidence: how well a design predicts the fine-tunes themselves, to compare designs without labels.

With every expert and the anchor normalised, a design is a generative model of the updates: ``Z`` comes from the anchor
and what an expert sees of ``U_i`` scatters around ``Z``. Its evidence is the density of the updates under it,

    p(U | design) = int N(Z; Z_0, T / (2 eta) I) prod_i exp(-E_i(Z) / T) / Z_i dZ
    log Z_i = log_normalizer(s_i, D_i, a_i / T) - log pdet(P_i) / 2

where ``D_i`` is the rank of ``P_i`` and ``pdet`` the product of its nonzero eigenvalues: ``Z_i`` integrates over the
``D_i`` directions that the expert sees. Everything is taken in the posterior's own coordinates: in Span ones the
operator is its restriction to the span, and ``exponent="multivariate"`` should be as well:
:func:`with_restricted_exponents`.

**What can be compared.** The operators ``P_i``, the units of :class:`~poe_models.scales.Relative` scales and a relative
``eta`` are computed from the updates and then held fixed: differences are log Bayes factors given these.

- *Energies, scales, importances, temperatures, anchors:* comparable wherever the residual maps are the same.
- *Maps and sides:* only where they see the same directions of every update, because densities of ``r d_out`` and of
  ``r d_in`` numbers have different units. In Full coordinates that means operators of full rank. In Span coordinates
  the Gram maps and Identity see the same numbers of every update, as many as the span has dimensions; Directional one.
- *Full and Span:* never; they are densities of different numbers.
- *Several experts about one update* (both sides) are normalised one by one. That is a composite likelihood, in which
  the update counts more than once: comparable with others of its kind only.

:func:`compare_designs` refuses the rest. There are two estimators: Laplace's (:func:`log_evidence`), exact for Gaussian
energies, and annealed importance sampling (:func:`annealed_evidence`), which knows nothing of the mode and states its
own error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from inference.fixed_point import solve_posterior
from inference.gibbs import draw_weights
from inference.laplace import Laplace
from poe_models.experts import ProductOfExperts
from poe_models.operators import RANK_TOLERANCE, Gram, Operator, sum_of_squares
from poe_models.posterior import BoundExpert, Posterior
from poe_models.program import log_constant
from poe_models.quadratics import quadratic_of

MODE_SLACK = 0.01
"""Most nats that a Newton step may gain from what is said to be the mode."""

FEWEST_EFFECTIVE = 0.1
"""Share of effective among all particles below which a standard error is not to be trusted."""

PILOT_PARTICLES = 64
MOST_UNITS = 3000
MOST_SHRINKS = 200


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log evidence of one design, per module.

    Attributes:
        value: ``log p(U | design)`` in nats, ``(M,)`` float64.
        dimension: how many numbers of its update each expert sees, ``(M, E)``; ``value`` is a density of all of them.
        standard_error: of ``value``, from the spread of the particles, ``(M,)``; None for Laplace, whose error is
            systematic.
        effective_samples: Kish's effective number of particles, ``(M,)``; None for Laplace.
        path_length: thermodynamic length of the annealing path, ``(M,)``: the log weights have a variance of about its
            square over the number of steps where particles mix at once, and more where they do not; None for Laplace.
    """

    value: Tensor
    dimension: Tensor
    standard_error: Tensor | None = None
    effective_samples: Tensor | None = None
    path_length: Tensor | None = None

    @property
    def total(self) -> float:
        """Log evidence of all modules together in nats; they are independent."""
        return float(self.value.sum())

    @property
    def total_error(self) -> float | None:
        """Standard error of :attr:`total`; None for Laplace."""
        return None if self.standard_error is None else float(self.standard_error.square().sum().sqrt())


def log_evidence(posterior: Posterior, mode: Tensor) -> Evidence:
    """Laplace's approximation of the log evidence; exact for Gaussian energies.

    Args:
        posterior: in Full or Span coordinates.
        mode: its MAP, ``(M, *event)``.

    Returns:
        The evidence, without a standard error: what Laplace misses (tails, other modes) it cannot know.

    Raises:
        ValueError: an expert or the anchor has no normaliser, or ``mode`` is not a mode.
    """
    _require_anchor(posterior)
    normalizers = log_normalizers(posterior)
    approximation = Laplace(posterior, mode)
    _require_mode(approximation)
    value = approximation.log_integral() + log_constant(posterior) - normalizers.sum(-1)
    return Evidence(value, dimensions(posterior))


def log_normalizers(posterior: Posterior) -> Tensor:
    """``log Z_i`` of every expert in nats, ``(M, E)``: ``-E_i / T - log Z_i`` is its normalised log likelihood.

    Args:
        posterior: in Full or Span coordinates, without factor experts.

    Returns:
        ``log_normalizer(s_i, D_i, a_i / T) - log pdet(P_i) / 2``; zero where an expert sees nothing.

    Raises:
        ValueError: an expert has no normaliser; names it.
    """
    if posterior.factors:
        raise ValueError(
            f"`log_normalizers(...)`: {posterior.factors[0].name!r} is a FactorExpert, a function without a "
            "normaliser. Designs can be compared without it."
        )
    return torch.stack([_log_normalizer(expert, posterior.fixed_temperature) for expert in posterior.experts], -1)


def dimensions(posterior: Posterior) -> Tensor:
    """``D_i``, the ranks of the experts' operators in the posterior's own coordinates, ``(M, E)``.

    Zero where an expert drops out.
    """
    return torch.stack([_dimension(expert, _without_rounding(expert.operator)) for expert in posterior.experts], -1)


def radial_normalizer(expert: BoundExpert, dimension: Tensor, temperature: float) -> Tensor:
    """Log integral of ``exp(-E_i / T)`` over residuals, ``|x|^2 = q_i``, of so many dimensions.

    Args:
        expert: with any operator.
        dimension: of the residual in each module, ``(M,)``.
        temperature: ``T``.

    Returns:
        Nats, ``(M,)`` float64; zero where the expert drops out or sees nothing.

    Raises:
        ValueError: its energy has no normaliser.
    """
    scale, power = expert.scale_squared.sqrt(), expert.importance / temperature
    seen = expert.active & (dimension > 0)
    if bool(seen.all()):
        return expert.rho.log_normalizer(scale, dimension, power).expand_as(dimension)
    result = torch.zeros_like(dimension)
    for module in seen.nonzero().flatten().tolist():
        rho = expert.rho.module(slice(module, module + 1))
        result[module] = rho.log_normalizer(scale[module], dimension[module], power).squeeze()
    return result


def with_restricted_exponents(poe: ProductOfExperts, posterior: Posterior) -> Posterior:
    """The posterior with ``exponent="multivariate"`` set from the ranks in its own coordinates.

    In Span coordinates that makes such an expert the marginal of its Student-t on what it sees of the span, again a
    Student-t with the same scale and degrees of freedom. The exponent that :func:`~poe_models.span.span_posterior` sets
    comes from the rank on all of ``vec(Z)``: that is the whole density along the span, far narrower and nearly
    Gaussian. In Full coordinates nothing changes.

    Args:
        poe: the design.
        posterior: the same design bound to updates, in Full or Span coordinates.

    Returns:
        The posterior with the other exponents.
    """
    ranks = dimensions(posterior)
    experts = tuple(
        replace(bound, rho=expert.energy.for_dimension(ranks[:, i]))
        for i, (expert, bound) in enumerate(zip(poe.experts, posterior.experts, strict=True))
    )
    return replace(posterior, experts=experts)


def annealed_evidence(
    posterior: Posterior,
    *,
    generator: torch.Generator,
    particles: int = 256,
    steps: int = 200,
    sweeps: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Log evidence by annealed importance sampling (Neal, 2001, Statistics and Computing 11(2)).

    Particles start as exact draws of the anchor and move to the posterior along ``anchor * prod_i exp(-b E_i / T)``, by
    steps that leave each of these bridges invariant: exact Gibbs steps where every energy has a Gaussian scale mixture,
    for then ``exp(-b E_i / T)`` has one too, with the shape ``b kappa_i / T``; otherwise elliptical slice sampling
    (Murray, Adams and MacKay, 2010, AISTATS, PMLR 9), exact for a Gaussian times anything and without settings.

    The mean weight is an unbiased estimate of the evidence even if the particles do not mix; then the weights spread,
    and its logarithm is low by about half the squared error. A pilot run of other particles places the bridges at equal
    thermodynamic length, for every module by itself (Gelman and Meng, 1998, Statistical Science 13(2)).

    Only directions that some expert sees are simulated; elsewhere the posterior is the anchor, which integrates to one.
    The path grows with their number and with the distance of the updates from the anchor's centre in its standard
    deviations ``sqrt(T / (2 eta))``: cold posteriors and large modules in Full coordinates need many steps. All
    particles of all modules are in memory at once, in Full coordinates each with a factored matrix of its own.

    Args:
        posterior: in Full or Span coordinates.
        generator: source of all randomness, on the posterior's device.
        particles: independent runs per module.
        steps: bridges from the anchor to the posterior.
        sweeps: transitions at every bridge.
        progress: called with the number of finished steps and their total.

    Returns:
        The evidence with its standard error (delta method), effective number of particles and path length.

    Raises:
        ValueError: an expert or the anchor has no normaliser, or the path is too long to follow.
    """
    if particles < 2 or steps < 1 or sweeps < 1:
        raise ValueError(
            f"`annealed_evidence(particles={particles}, steps={steps}, sweeps={sweeps})`: needs at least two particles "
            "(for the standard error), one step and one sweep."
        )
    normalizers = log_normalizers(posterior)
    path = _Path(posterior, generator)
    knots, length = _pilot(path, sweeps)
    schedule = _schedule(knots, length, steps)
    x, q = path.start(particles)
    log_weights = torch.zeros_like(q[..., 0])
    for k in range(steps):
        log_weights = log_weights + (schedule[k + 1] - schedule[k]) * path.tilt(q)
        if k + 1 < steps:  # draws of the posterior itself would enter no weight
            for _ in range(sweeps):
                x, q = path.move(x, q, schedule[k + 1])
        if progress is not None:
            progress(k + 1, steps)
    log_mean, error, effective = _summary(log_weights)
    _warn_if_poor(effective, particles, length, steps)
    return Evidence(log_mean - normalizers.sum(-1), dimensions(posterior), error, effective, length)


class _Path:
    """The bridges ``N(x; anchor) prod_i exp(-b E_i / T)``, ``b`` between 0 and 1 for each module, ``(M,)``.

    Particles ``x`` are ``(P, M, a, b)``: displacements from the centre in the compressed coordinates of the
    least-squares problem.
    """

    def __init__(self, posterior: Posterior, generator: torch.Generator) -> None:
        _require_anchor(posterior)
        self.posterior = posterior
        self.generator = generator
        self.quadratic = quadratic_of(posterior, for_draws=True)
        self.pulls = self.quadratic.pulls()
        self.shift = posterior.anchor_precision / posterior.temperature
        self.has_mixtures = all(_has_mixture(expert) for expert in posterior.experts)

    def start(self, particles: int) -> tuple[Tensor, Tensor]:
        """Exact draws of the anchor and their residuals, ``(P, M, E)``."""
        x = self._anchor_noise(particles)
        return x, self.quadratic.residuals(x)

    def tilt(self, q: Tensor) -> Tensor:
        """``-sum_i E_i / T`` at residuals ``(P, M, E)``, ``(P, M)``."""
        return -self.posterior.energy_of(q) / self.posterior.temperature

    def move(self, x: Tensor, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """One transition that leaves the bridges at ``b > 0`` invariant."""
        return self._gibbs_step(q, b) if self.has_mixtures else self._slice_step(x, q, b)

    def _gibbs_step(self, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``tau_i | x ~ Gamma(b kappa_i / T, rate 1 + q_i / s_i^2)``, then ``x | tau``; see :mod:`inference.gibbs`."""
        weights = draw_weights(self.posterior, q, b / self.posterior.temperature, self.generator)
        precision = self.quadratic.precision(weights, self.shift)
        pulls = [weights[..., i].to(pull.dtype)[..., None, None] * pull for i, pull in enumerate(self.pulls)]
        x = precision.solve(torch.stack(pulls).sum(0)) + precision.sample(self._white(len(q))) * 0.5**0.5
        return x, self.quadratic.residuals(x)

    def _slice_step(self, x: Tensor, q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Elliptical slice sampling: a point above a level, on the ellipse through ``x`` and a draw of the anchor."""
        across = self._anchor_noise(len(x))
        level = b * self.tilt(q) + self._uniform(q).log()
        angle = 2 * math.pi * self._uniform(q)
        low, high = angle - 2 * math.pi, angle
        start, waiting = x, torch.ones_like(level, dtype=torch.bool)
        for _ in range(MOST_SHRINKS):  # a bracket that shrank to nothing leaves x where it is
            turn = angle.to(x.dtype)[..., None, None]
            proposal = start * turn.cos() + across * turn.sin()
            proposed = self.quadratic.residuals(proposal)
            taken = waiting & (b * self.tilt(proposed) > level)
            x = torch.where(taken[..., None, None], proposal, x)
            q = torch.where(taken.unsqueeze(-1), proposed, q)
            waiting = waiting & ~taken
            if not bool(waiting.any()):
                break
            low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
            angle = low + (high - low) * self._uniform(q)
        return x, q

    def _anchor_noise(self, particles: int) -> Tensor:
        white = self._white(particles)
        return white * (2 * self.shift).rsqrt().to(white.dtype)[:, None, None]

    def _white(self, particles: int) -> Tensor:
        like = self.pulls[0]
        return torch.randn((particles, *like.shape), generator=self.generator, dtype=like.dtype, device=like.device)

    def _uniform(self, q: Tensor) -> Tensor:
        return torch.rand(q.shape[:-1], generator=self.generator, dtype=torch.float64, device=q.device)


def _pilot(path: _Path, sweeps: int) -> tuple[Tensor, Tensor]:
    """Follow the path in steps of one unit of thermodynamic length, ``db sd(tilt) = 1``.

    Returns:
        Where the units end, ``(J + 1, M)`` from 0 to 1, and the length of each module's path, ``(M,)``.
    """
    x, q = path.start(PILOT_PARTICLES)
    knots = [torch.zeros_like(path.shift)]
    length = torch.zeros_like(path.shift)
    while bool((knots[-1] < 1).any()):
        if len(knots) > MOST_UNITS:
            worst = int(knots[-1].argmin())
            raise ValueError(
                f"`annealed_evidence(...)`: the path of module {worst} of the batch is longer than {MOST_UNITS} units "
                f"(at b = {float(knots[-1][worst]):.2g}): the anchor is too far from the posterior in its own standard "
                "deviations. Lower its precision, raise the temperature, or use Span coordinates."
            )
        deviation = path.tilt(q).std(0)
        reach = knots[-1] + 1 / deviation
        length = length + torch.where(reach < 1, torch.ones_like(length), (1 - knots[-1]) * deviation)
        knots.append(reach.clamp(max=1))
        for _ in range(sweeps):
            x, q = path.move(x, q, knots[-1])
    return torch.stack(knots), length


def _schedule(knots: Tensor, length: Tensor, steps: int) -> Tensor:
    """Bridges at equal thermodynamic length, between knots one unit apart, ``(steps + 1, M)``."""
    share = torch.linspace(0, 1, steps + 1, dtype=length.dtype, device=length.device).unsqueeze(-1)
    position = share * length
    below = position.floor().long().clamp(max=len(knots) - 2)
    start, end = knots.gather(0, below), knots.gather(0, below + 1)
    unit = (length - below).clamp(min=torch.finfo(length.dtype).tiny, max=1)  # the last one is cut short
    schedule = start + (end - start) * ((position - below) / unit).clamp(max=1)
    schedule[-1] = 1
    return schedule


def _summary(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log mean, its standard error and the effective number of weights, ``(P, M)`` to ``(M,)`` each."""
    count = len(log_weights)
    log_mean = torch.logsumexp(log_weights, 0) - math.log(count)
    relative = (log_weights - log_mean).exp()
    return log_mean, relative.std(0) / math.sqrt(count), count**2 / relative.square().sum(0)


def _warn_if_poor(effective: Tensor, particles: int, length: Tensor, steps: int) -> None:
    if float(effective.min()) < FEWEST_EFFECTIVE * particles:
        worst = int(effective.argmin())
        warnings.warn(
            f"`annealed_evidence(steps={steps})`: only {float(effective[worst]):.1f} of {particles} particles are "
            f"effective in module {worst} of the batch, so that neither its value nor its standard error can be "
            f"trusted. Raise `steps` or `sweeps`: its path is {float(length[worst]):.0f} units long, which even for "
            f"particles that mix at once takes about {math.ceil(float(length[worst]) ** 2)} steps.",
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class DesignEvidence:
    """One row of :class:`EvidenceTable`.

    Attributes:
        name: of the design.
        annealed: by annealed importance sampling.
        laplace: by Laplace's approximation at the MAP.
    """

    name: str
    annealed: Evidence
    laplace: Evidence


@dataclass(frozen=True, eq=False)
class EvidenceTable:
    """Designs by log evidence, the best first; prints as a table.

    Attributes:
        rows: one per design.
    """

    rows: tuple[DesignEvidence, ...]

    @override
    def __str__(self) -> str:
        width = max(len("design"), *(len(row.name) for row in self.rows))
        titles = ("log evidence", "s.e.", "below best", "Laplace", "least ESS")
        lines = [f"{'design':<{width}}" + "".join(f"{title:>14}" for title in titles)]
        for row in self.rows:
            annealed = row.annealed
            assert annealed.effective_samples is not None
            least = float(annealed.effective_samples.min())
            below = self.rows[0].annealed.total - annealed.total
            numbers = (annealed.total, annealed.total_error, below, row.laplace.total, least)
            lines.append(f"{row.name:<{width}}" + "".join(f"{number:>14.2f}" for number in numbers))
        return "\n".join(lines)


def compare_designs(
    posteriors: Mapping[str, Posterior],
    *,
    generator: torch.Generator,
    particles: int = 256,
    steps: int = 200,
) -> EvidenceTable:
    """Evidence of several designs for the same merge, by both estimators, the best first.

    Args:
        posteriors: name to a design that has met its updates, all in the same coordinates. For a whole model,
            ``with_restricted_exponents(poe, span_posterior(poe, statistics)[0])`` with the statistics of that design's
            residual maps.
        generator: source of all randomness.
        particles: see :func:`annealed_evidence`.
        steps: see :func:`annealed_evidence`.

    Returns:
        The table, in nats summed over modules, sorted by annealed importance sampling.

    Raises:
        ValueError: two designs cannot be compared, or one has no evidence or no MAP; names the design.
    """
    _require_comparable(posteriors)
    rows = []
    for name, posterior in posteriors.items():
        try:
            log_normalizers(posterior)  # refuse before anything takes time
            annealed = annealed_evidence(posterior, generator=generator, particles=particles, steps=steps)
            rows.append(DesignEvidence(name, annealed, log_evidence(posterior, _mode(posterior))))
        except ValueError as error:
            raise ValueError(f"`compare_designs(...)`: design {name!r}: {error}") from error
    return EvidenceTable(tuple(sorted(rows, key=lambda row: row.annealed.total, reverse=True)))


def _mode(posterior: Posterior) -> Tensor:
    solution = solve_posterior(posterior)
    lost = [i for i, status in enumerate(solution.status) if not status.converged]
    if lost:
        raise ValueError(f"no MAP was found in module {lost[0]} of the batch: {solution.status[lost[0]]}")
    return solution.value


def _require_comparable(posteriors: Mapping[str, Posterior]) -> None:
    """Raise unless all evidences are densities of the same numbers, as far as shapes, ranks and lengths tell."""
    if not posteriors:
        raise ValueError("`compare_designs({})`: no designs. Give at least one.")
    (first, reference), *others = posteriors.items()
    for name, posterior in others:
        reason = _difference(reference, posterior)
        if reason is not None:
            raise ValueError(
                f"`compare_designs(...)`: {first!r} and {name!r} cannot be compared, because their evidences are "
                f"densities of different numbers: {reason}. Compare designs of the same updates in the same "
                "coordinates; Gram maps on different sides can be compared in Span coordinates."
            )


def _difference(one: Posterior, other: Posterior) -> str | None:
    """What makes two evidences densities of different numbers; None if nothing is seen to."""
    shapes = [(each.num_modules, *each.event_shape) for each in (one, other)]
    if shapes[0] != shapes[1]:
        return f"the latents are {shapes[0]} and {shapes[1]}"
    pairs = [sorted(enumerate(each.experts), key=lambda pair: pair[1].update_name) for each in (one, other)]
    if [e.update_name for _, e in pairs[0]] != [e.update_name for _, e in pairs[1]]:
        return "their experts are not about the same updates, one by one"
    ranks, other_ranks = dimensions(one), dimensions(other)
    for (i, a), (j, b) in zip(*pairs, strict=True):
        left, right = ranks[:, i], other_ranks[:, j]
        if not torch.allclose(sum_of_squares(a.update), sum_of_squares(b.update), rtol=1e-4):
            return f"the two updates {a.update_name!r} differ in length"
        if not torch.equal(left, right):
            return f"{a.name!r} sees {_range(left)} numbers of an update, {b.name!r} {_range(right)}"
        if _kind(a.operator) != _kind(b.operator) and bool((left < math.prod(one.event_shape)).any()):
            return f"{a.name!r} and {b.name!r} see different directions of {a.update_name!r}"
    return None


def _range(ranks: Tensor) -> str:
    least, most = int(ranks.min()), int(ranks.max())
    return str(least) if least == most else f"{least} to {most}"


def _kind(operator: Operator) -> tuple[type[Operator], str]:
    return type(operator), operator.side if isinstance(operator, Gram) else ""


def _log_normalizer(expert: BoundExpert, temperature: float) -> Tensor:
    operator = _without_rounding(expert.operator)
    dimension = _dimension(expert, operator)
    try:
        value = radial_normalizer(expert, dimension, temperature)
    except ValueError as error:
        raise ValueError(f"expert {expert.name!r} is not a density: {error}") from error
    return torch.where(dimension > 0, value - operator.log_pseudo_determinant() / 2, torch.zeros_like(dimension))


def _dimension(expert: BoundExpert, operator: Operator) -> Tensor:
    """Rank of an expert's operator, ``(M,)``; zero where the expert drops out, for then it has no energy either."""
    return torch.where(expert.active, operator.dimension(), 0.0)


def _without_rounding(operator: Operator) -> Operator:
    """A Span form without eigenvalues that are rounding: forms are differences of inner products of the weights."""
    if not isinstance(operator, Gram) or operator.shape[1] != 1 or operator.factor.shape[-1] != operator.shape[0]:
        return operator
    left, singular, _ = torch.linalg.svd(operator.factor)
    kept = singular.square() > RANK_TOLERANCE * singular[..., :1].square()
    return Gram(left * torch.where(kept, singular, 0.0).unsqueeze(-2), operator.side, operator.shape)


def _has_mixture(expert: BoundExpert) -> bool:
    try:
        expert.rho.scale_mixture()
    except ValueError:
        return False
    return True


def _require_anchor(posterior: Posterior) -> None:
    loose = (posterior.anchor_precision == 0).nonzero().flatten().tolist()
    if loose:
        raise ValueError(
            f"modules {loose} of the batch have no anchor (eta = 0): a flat prior has no normaliser, so that the "
            "evidence would be known only up to a constant, another one for every design. Give the anchor a positive "
            "precision, and leave out modules whose updates are all zero: a relative precision is zero there."
        )


def _require_mode(approximation: Laplace) -> None:
    """Raise if a Newton step from the mode would lower ``E / T`` by more than :data:`MODE_SLACK` nats and rounding."""
    posterior, quadratic = approximation.posterior, approximation.quadratic
    displacement = approximation.mode if posterior.center is None else approximation.mode - posterior.center
    x = quadratic.compression.compress(displacement)
    weights, shift = posterior.weights(quadratic.residuals(x)), posterior.anchor_precision
    pulls = [weights[:, i].to(pull.dtype)[:, None, None] * pull for i, pull in enumerate(quadratic.pulls())]
    gradient = 2 * (quadratic.apply(weights, shift, x) - torch.stack(pulls).sum(0))
    # Where no expert sees anything the step leads to the centre and gains the whole anchor energy.
    outside = shift * (sum_of_squares(displacement) - sum_of_squares(x))
    gain = (gradient * approximation.hessian.solve(gradient)).double().sum((-2, -1)) / 2 + outside
    rounding = 100 * torch.finfo(x.dtype).eps * posterior.energy(approximation.mode)
    excess = (gain - rounding) / posterior.temperature
    if bool((excess > MODE_SLACK).any()):
        worst = int(excess.argmax())
        raise ValueError(
            f"`log_evidence(posterior, mode)`: module {worst} of the batch is not at its mode, a Newton step gains "
            f"{float(gain[worst]) / posterior.temperature:.3g} nats. Pass the value of a converged "
            "`solve_posterior(posterior)`."
        )
