r"""Scales and tails inferred instead of set: one ``gamma`` and one ``nu`` for many residuals, with priors.

With normalised experts a design is a generative model of the updates (:mod:`inference.evidence`), so that its scale
``gamma`` and its degrees of freedom ``nu`` can be unknowns like any other, shared by the whole model, by all modules of
one expert (task) or by all experts of one module (layer):

    gamma ~ gamma_prior,  nu ~ df_prior,  x ~ N(x_0, T / (2 eta) I)
    log p(U_i | x, gamma, nu) = -a_i rho_nu(q_i(x) / s_i(gamma)^2) / T - log Z_i(gamma, nu)

in Span coordinates. There an expert sees ``r_i`` numbers of its update, and ``exponent="multivariate"`` means
``(nu + r_i) / 2``: the marginal of the full Student-t on the span. Without ``Z_i`` the largest ``gamma`` would always
win, so experts without a normaliser are refused.

Held fixed, as in the evidence: the operators ``P_i``, the unit of the scale (``s_i / gamma``) and the anchor, whose
``eta`` is computed once at the design's own ``gamma``, the reference; otherwise the prior would move with the unknown.
Two experts about one update (both sides) count as two observations of it, which makes ``gamma`` look better known than
it is. Directional experts can be interpolated whatever their scale: they say little about ``gamma`` and mix slowly.

The posterior of ``x`` narrows in proportion to ``gamma``: a funnel (Betancourt and Girolami, 2013, arXiv 1312.0906).
NUTS therefore moves in ``white``, which is about standard normal for every ``gamma`` and ``nu``: the weights ``w_i`` of
the reference's MAP give a Gaussian ``sum_i w_i K_i = V diag(l) V^T``, and one function ``c(gamma, nu)`` scales them,

    x = x_0 + V (c V^T b / (c l + eta / T) + white / sqrt(2 (c l + eta / T))),   b = sum_i w_i K_i (u_i - x_0)

This is a change of variables with its Jacobian: the model is the same whatever the weights are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from typing_extensions import override

from inference.draws import StoredDraws
from inference.evidence import dimensions, log_normalizers, with_restricted_exponents
from inference.fixed_point import solve_posterior
from poe_models.energies import Energy, StudentT
from poe_models.experts import ProductOfExperts
from poe_models.operators import Gram, Operator
from poe_models.posterior import Posterior
from poe_models.scales import Absolute, NormScaled, Relative, Scale
from poe_models.span import SpanCoordinates, SpanStatistics, span_posterior

Shared = Literal["model", "expert", "module"]
"""What has a ``gamma`` and ``nu`` of its own: the whole model, every expert (task), or every module (layer)."""

POWERS: dict[type[Scale], int] = {Absolute: 2, Relative: 2, NormScaled: 1}
"""``s^2`` is proportional to this power of ``gamma``."""


@dataclass(frozen=True, eq=False)
class HierarchicalDraws:
    """Draws of scale, tail and merged update together, ``C`` chains of ``S`` draws.

    Attributes:
        gamma: the scale's ``gamma``: ``(C, S)``, ``(C, S, E)`` per expert or ``(C, S, M)`` per module; float64.
        nu: degrees of freedom, of the same shape; None where no energy has any.
        updates: draws of the Span latents, ``(C, S, M, N + 1, 1)``, with the statistic ``diverging``.
        coordinates: the change of variables from latents to coefficients.
        eta: the anchor's precision at the reference ``gamma``, ``(M,)``.
    """

    gamma: Tensor
    nu: Tensor | None
    updates: StoredDraws
    coordinates: SpanCoordinates
    eta: Tensor

    @property
    def num_divergences(self) -> int:
        """Diverging trajectories among all kept draws; any is a reason to distrust the draws."""
        return int(self.updates.stats["diverging"][..., 0].sum())

    @property
    def coefficients(self) -> Tensor:
        """Coefficients on the experts' updates and the centre, ``(C, S, M, N + 1)``."""
        return self.coordinates.coefficients(self.updates.values)


def hierarchical(
    poe: ProductOfExperts,
    statistics: SpanStatistics,
    num_samples: int,
    *,
    seed: int,
    shared: Shared = "model",
    gamma_prior: dist.TorchDistribution | None = None,
    df_prior: dist.TorchDistribution | None = None,
    chains: int = 4,
    warmup: int = 500,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> HierarchicalDraws:
    """Infer scales and tails by Pyro's NUTS on :class:`HierarchicalModel`.

    Args:
        poe: the design, with normalised experts: ``StudentT(df, exponent="multivariate")`` to infer ``gamma`` and
            ``nu``, any other energy with a normaliser to infer ``gamma`` alone. Its own ``gamma`` is the reference of
            the anchor and of the default prior; its own ``df`` only helps to find ``white``.
        statistics: of all modules, under the design's residual maps.
        num_samples: draws kept per chain.
        seed: decides everything; torch's global generator is as before when the function returns.
        shared: what has a ``gamma`` and ``nu`` of its own.
        gamma_prior: a scalar distribution on positive numbers, on the statistics' device; by default log-normal about
            the design's own ``gamma`` with a log standard deviation of 1.
        df_prior: a scalar distribution on positive numbers; by default Gamma(2, 0.1) (Juarez and Steel, 2010,
            Journal of Business and Economic Statistics 28(1)), of mean 20.
        chains: one after another, from starts drawn from the priors.
        warmup: steps per chain before the first kept draw.
        target_acceptance: raise it if trajectories diverge.
        max_tree_depth: most doublings of one trajectory.
        progress: called with the number of finished steps and their total.

    Returns:
        The draws; a warning says so if trajectories diverged.

    Raises:
        ValueError: an expert is not a normalised density, or a setting cannot be used.
    """
    if num_samples < 1 or chains < 1 or warmup < 1:
        raise ValueError(
            f"`hierarchical(num_samples={num_samples}, chains={chains}, warmup={warmup})`: needs at least one of each."
        )
    model = HierarchicalModel(poe, statistics, shared, gamma_prior, df_prior)
    device = statistics.gram.device
    samples, divergences = [], torch.zeros(chains, num_samples, dtype=torch.bool)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for chain in range(chains):
            kernel = _ScaledNUTS(model, target_acceptance, max_tree_depth)

            def watch(kernel: NUTS, _: object, stage: str, step: int, chain: int = chain) -> None:
                finished = chain * (warmup + num_samples) + step + 1 + (0 if stage == "Warmup" else warmup)
                if stage == "Sample" and step + 1 == num_samples:
                    divergences[chain, kernel.diagnostics()["divergences"]] = True
                if progress is not None:
                    progress(finished, chains * (warmup + num_samples))

            mcmc = MCMC(
                kernel,
                num_samples=num_samples,
                warmup_steps=warmup,
                initial_params=model.start(),
                disable_progbar=True,
                disable_validation=True,
                hook_fn=watch,
            )
            mcmc.run()
            samples.append(mcmc.get_samples())
    return _gather(model, samples, divergences)


class HierarchicalModel:
    """The Pyro model: sites ``gamma``, ``nu`` (where the energy has it), ``white``, ``update`` and ``expert/<name>``.

    ``update`` are the Span latents ``(M, N + 1, 1)``, a deterministic site: a function of the others whose density is
    that of the module's docstring. Leading dimensions of all methods are draws.

    Args:
        poe: see :func:`hierarchical`.
        statistics: see :func:`hierarchical`.
        shared: see :func:`hierarchical`.
        gamma_prior: see :func:`hierarchical`.
        df_prior: see :func:`hierarchical`.

    Raises:
        ValueError: an expert is not a normalised density, or a setting cannot be used.
    """

    def __init__(
        self,
        poe: ProductOfExperts,
        statistics: SpanStatistics,
        shared: Shared = "model",
        gamma_prior: dist.TorchDistribution | None = None,
        df_prior: dist.TorchDistribution | None = None,
    ) -> None:
        if shared not in get_args(Shared):
            raise ValueError(f"`hierarchical(shared={shared!r})`: is one of {', '.join(map(repr, get_args(Shared)))}.")
        bound, self.coordinates = span_posterior(poe, statistics)
        self.posterior = with_restricted_exponents(poe, bound)
        self.shared = shared
        self.has_df = _check_energies(poe)
        normalizers = log_normalizers(self.posterior)  # refuses experts that are not densities
        _check_anchor(self.posterior)
        self._prepare()
        self.scale_power, own = _check_scales(poe, shared)
        reference = self.shift.new_tensor(own)
        self.unit = self.reference_scale / reference**self.scale_power
        self.constant = normalizers
        if self.has_df:  # keep what does not depend on nu
            self.constant = normalizers - self._student_normalizer(self.shift.new_tensor(_own_df(poe)))
        self._prepare_priors(reference, gamma_prior, df_prior)

    def __call__(self) -> Tensor:
        """Run the model; returns the Span latents ``(M, N + 1, 1)``."""
        gamma = pyro.sample("gamma", self.gamma_prior)
        nu = pyro.sample("nu", self.df_prior) if self.has_df else None
        white = pyro.sample("white", self.white_prior)
        y, log_volume = self.eigencoordinates(white, gamma, nu)
        # The anchor's density of y in the place of the standard normal's of white.
        anchor = 0.5 * y.shape[-1] * (self.shift / math.pi).log() - self.shift * y.square().sum(-1)
        pyro.factor("anchor", (anchor + log_volume).sum() - self.white_prior.log_prob(white))
        likelihood = self.log_likelihood(y, gamma, nu)
        for i, expert in enumerate(self.posterior.experts):
            pyro.factor(f"expert/{expert.name}", likelihood[:, i].sum())
        return pyro.deterministic("update", self.latents(y))

    def eigencoordinates(self, white: Tensor, gamma: Tensor, nu: Tensor | None) -> tuple[Tensor, Tensor]:
        """``y = V^T (x - x_0)`` of ``white``, both ``(*S, M, N + 1)``, and the log volume of the change ``(*S, M)``."""
        weights = self._weights(gamma, nu)
        strength = (weights * self.trace).sum(-1) / self.reference_strength
        precision = strength.unsqueeze(-1) * self.eigenvalues + self.shift.unsqueeze(-1)
        mean = strength.unsqueeze(-1) * self.pull / precision
        return mean + white * (2 * precision).rsqrt(), -0.5 * (2 * precision).log().sum(-1)

    def log_likelihood(self, y: Tensor, gamma: Tensor, nu: Tensor | None) -> Tensor:
        """Normalised log likelihood of every expert's update in nats, ``(*S, M, E)``."""
        residual = torch.einsum("merd,...md->...mer", self.roots, y) - self.offset
        scale_squared = self.scale_squared(gamma)
        energy = self._energy(nu)
        widening = 0.5 * self.rank * (scale_squared / self.reference_scale).log()
        return -energy.rho(residual.square().sum(-1) / scale_squared) - self._normalizer(nu) - widening

    def latents(self, y: Tensor) -> Tensor:
        """Span latents ``x``, ``(*S, M, N + 1, 1)``."""
        center = self.posterior.center
        x = self.vectors @ y.unsqueeze(-1)
        return x if center is None else center + x

    def scale_squared(self, gamma: Tensor) -> Tensor:
        """``s_i^2``, ``(*S, M, E)``."""
        return self.unit * self.spread(gamma) ** self.scale_power

    def spread(self, shared: Tensor) -> Tensor:
        """A shared quantity as one per module and expert, broadcastable to ``(*S, M, E)``."""
        if self.shared == "model":
            return shared[..., None, None]
        return shared.unsqueeze(-2) if self.shared == "expert" else shared.unsqueeze(-1)

    def start(self) -> dict[str, Tensor]:
        """A start from the priors, in the unconstrained coordinates that NUTS moves in."""
        priors = {"gamma": self.gamma_prior, "white": self.white_prior}
        if self.has_df:
            priors["nu"] = self.df_prior
        values = {name: prior.sample().to(self.shift) for name, prior in priors.items()}
        return {name: torch.distributions.biject_to(priors[name].support).inv(value) for name, value in values.items()}

    def first_variances(self) -> dict[str, Tensor]:
        """Rough posterior variances of ``log gamma``, ``log nu`` and ``white``, by counting what is known of each."""
        axes = {"model": (0, 1), "expert": (0,), "module": (1,)}[self.shared]
        numbers, residuals = self.rank.sum(axes), (self.rank > 0).double().sum(axes)
        log_gamma = (2 / (self.scale_power**2 * numbers.clamp(min=1))).clamp(max=1)
        return {"gamma": log_gamma, "nu": (10 / residuals.clamp(min=1)).clamp(max=0.5), "white": numbers.new_ones(())}

    def _energy(self, nu: Tensor | None) -> Energy:
        """``a_i rho / T`` of all experts at once, on ``(*S, M, E)``."""
        if nu is None:
            return _Columns([expert.rho for expert in self.posterior.experts], self.power)
        df = self.spread(nu)
        return StudentT(df=df, exponent=self.power * (df + self.rank) / 2)

    def _normalizer(self, nu: Tensor | None) -> Tensor:
        """``log Z_i`` at the reference scale, ``(*S, M, E)``; it grows by ``r_i log s_i`` with the scale."""
        return self.constant if nu is None else self.constant + self._student_normalizer(self.spread(nu))

    def _weights(self, gamma: Tensor, nu: Tensor | None) -> Tensor:
        """``a_i rho' / (T s_i^2)`` at the residuals of the reference's MAP, ``(*S, M, E)``."""
        scale_squared = self.scale_squared(gamma)
        return self._energy(nu).weight(self.reference_residuals / scale_squared) / scale_squared

    def _prepare(self) -> None:
        """Everything that does not depend on the unknowns, in the eigenbasis of the reference's precision."""
        posterior = self.posterior
        factors = torch.stack([_factor(expert.operator) for expert in posterior.experts], 1)  # (M, E, N + 1, N + 1)
        factors = torch.where(posterior.active[..., None, None], factors, 0.0)  # who drops out has no energy
        targets = torch.stack([expert.update for expert in posterior.experts], 1)
        targets = targets if posterior.center is None else targets - posterior.center.unsqueeze(1)
        self.rank = dimensions(posterior)
        self.shift = posterior.anchor_precision / posterior.temperature
        self.power = self.shift.new_tensor([expert.importance for expert in posterior.experts]) / posterior.temperature
        self.reference_scale = torch.stack([expert.scale_squared for expert in posterior.experts], -1)
        self.reference_residuals = posterior.residuals(solve_posterior(posterior).value)
        weights = posterior.weights(self.reference_residuals) / posterior.temperature
        forms = factors @ factors.mT
        self.eigenvalues, self.vectors = torch.linalg.eigh(torch.einsum("me,meab->mab", weights, forms))
        self.pull = (self.vectors.mT @ torch.einsum("me,meab->mab", weights, forms @ targets)).squeeze(-1)
        self.roots = factors.mT @ self.vectors.unsqueeze(1)
        self.offset = (factors.mT @ targets).squeeze(-1)
        self.trace = factors.square().sum((-2, -1))
        strength = (weights * self.trace).sum(-1)
        self.reference_strength = torch.where(strength > 0, strength, torch.ones_like(strength))
        zero = torch.zeros_like(self.eigenvalues)
        self.white_prior = dist.Normal(zero, torch.ones_like(zero)).to_event(2)

    def _student_normalizer(self, df: Tensor) -> Tensor:
        """Log integral of a Student-t at unit scale; written so that NUTS may look at ``df`` near 0."""
        shape = (self.power * df + (self.power - 1) * self.rank) / 2  # of the mixture: exponent minus rank / 2
        return self.rank / 2 * (math.pi * df).log() + torch.lgamma(shape) - torch.lgamma(shape + self.rank / 2)

    def _prepare_priors(
        self, reference: Tensor, gamma_prior: dist.TorchDistribution | None, df_prior: dist.TorchDistribution | None
    ) -> None:
        posterior = self.posterior
        size = {"model": (), "expert": (len(posterior.experts),), "module": (posterior.num_modules,)}[self.shared]
        if gamma_prior is None:
            center = (reference if self.shared == "expert" else reference[0]).log().expand(size)
            self.gamma_prior = dist.LogNormal(center, torch.ones_like(center)).to_event(len(size))
        else:
            self.gamma_prior = _shared_prior("gamma_prior", gamma_prior, size)
        if df_prior is not None and not self.has_df:
            raise ValueError("`hierarchical(df_prior=...)`: no expert has a Student-t energy. Leave it out.")
        two, tenth = reference.new_tensor(2.0), reference.new_tensor(0.1)
        self.df_prior = _shared_prior("df_prior", df_prior or dist.Gamma(two, tenth), size)


class _ScaledNUTS(NUTS):
    """Pyro's NUTS with first guesses of the scales in the place of ones.

    Many residuals know ``gamma`` to within a few per cent. Until its first renewal of the mass matrix (about 100 steps)
    Pyro's NUTS would move everything at that pace, in trajectories ten times as long.
    """

    def __init__(self, model: HierarchicalModel, target_acceptance: float, max_tree_depth: int) -> None:
        super().__init__(model, target_accept_prob=target_acceptance, max_tree_depth=max_tree_depth)
        self._guesses = model.first_variances()

    @override
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepare a chain; Pyro's own signature."""
        super().setup(warmup_steps, *args, **kwargs)
        (sites,) = self.inverse_mass_matrix
        self.mass_matrix_adapter.inverse_mass_matrix = {
            sites: torch.cat([self._guesses[site].expand(self.initial_params[site].shape).flatten() for site in sites])
        }


class _Columns(Energy):
    """One energy per expert, each times a power, on the last dimension."""

    def __init__(self, energies: list[Energy], power: Tensor) -> None:
        self.energies, self.power = energies, power

    @override
    def rho(self, q: Tensor) -> Tensor:
        return self.power * torch.stack([e.rho(q[..., i]) for i, e in enumerate(self.energies)], -1)

    @override
    def weight(self, q: Tensor) -> Tensor:
        return self.power * torch.stack([e.weight(q[..., i]) for i, e in enumerate(self.energies)], -1)


def _gather(model: HierarchicalModel, samples: list[dict[str, Tensor]], divergences: Tensor) -> HierarchicalDraws:
    """Latents from the chains' white coordinates."""
    stacked = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}
    nu = stacked.get("nu")
    y, _ = model.eigencoordinates(stacked["white"], stacked["gamma"], nu)
    count = int(divergences.sum())
    if count:
        warnings.warn(
            f"`hierarchical(...)`: {count} of {divergences.numel()} trajectories diverged, so the draws may miss a "
            "part of the posterior. Raise `target_acceptance` (0.95), or give `gamma` and `nu` narrower priors.",
            stacklevel=3,
        )
    per_module = divergences.unsqueeze(-1).expand(*divergences.shape, model.posterior.num_modules)
    updates = StoredDraws(model.latents(y), {"diverging": per_module})
    return HierarchicalDraws(stacked["gamma"], nu, updates, model.coordinates, model.posterior.anchor_precision)


def _factor(operator: Operator) -> Tensor:
    assert isinstance(operator, Gram)  # what Span coordinates make of every residual map
    return operator.factor


def _shared_prior(name: str, prior: dist.TorchDistribution, size: tuple[int, ...]) -> dist.TorchDistribution:
    """A scalar prior for each of the shared quantities."""
    if prior.batch_shape or prior.event_shape:
        raise ValueError(
            f"`hierarchical({name}=...)`: has batch shape {tuple(prior.batch_shape)} and event shape "
            f"{tuple(prior.event_shape)}. Give a scalar distribution; `shared` decides how many there are."
        )
    if prior.support is None or bool(prior.support.check(torch.tensor(-1.0))):
        raise ValueError(
            f"`hierarchical({name}={prior})`: allows negative values. Give a distribution on positive numbers, for "
            "instance LogNormal, Gamma or HalfNormal."
        )
    return prior.expand(size).to_event(len(size))


def _check_energies(poe: ProductOfExperts) -> bool:
    """Whether there are degrees of freedom to infer."""
    students = [expert for expert in poe.experts if isinstance(expert.energy, StudentT)]
    for expert in students:
        if getattr(expert.energy, "exponent", None) != "multivariate":
            raise ValueError(
                f"`hierarchical(...)`: expert {expert.name!r} has the energy {expert.energy!r}, which is no normalised "
                "density for every `nu`. Set exponent='multivariate'."
            )
        if expert.importance < poe.temperature:
            raise ValueError(
                f"`hierarchical(...)`: expert {expert.name!r} has importance {expert.importance:g} at temperature "
                f"{poe.temperature:g}: a Student-t to a power below 1 has no finite integral for small `nu`. Leave "
                "both at 1; `gamma` and `nu` do their work."
            )
    if students and len(students) < len(poe.experts):
        other = next(expert for expert in poe.experts if expert not in students)
        raise ValueError(
            f"`hierarchical(...)`: {students[0].name!r} has degrees of freedom and {other.name!r} ({other.energy!r}) "
            "has none. Give all experts a Student-t energy or none."
        )
    return bool(students)


def _own_df(poe: ProductOfExperts) -> list[float]:
    return [float(expert.energy.df) for expert in poe.experts if isinstance(expert.energy, StudentT)]


def _check_scales(poe: ProductOfExperts, shared: Shared) -> tuple[int, list[float]]:
    """The power of ``gamma`` in the squared scales, and each expert's own ``gamma``."""
    kinds = {type(expert.scale) for expert in poe.experts}
    if len(kinds) > 1 or not kinds <= set(POWERS):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        known = ", ".join(kind.__name__ for kind in POWERS)
        raise ValueError(f"`hierarchical(...)`: the experts have scales {names}. Give all the same one of {known}.")
    reference = [float(expert.scale.gamma) for expert in poe.experts]  # type: ignore[attr-defined]
    if shared != "expert" and len(set(reference)) > 1:
        raise ValueError(
            f"`hierarchical(shared={shared!r})`: one `gamma` takes the place of the experts' own, which differ "
            f"({', '.join(f'{gamma:g}' for gamma in reference)}). Give them one, or use shared='expert'."
        )
    return POWERS[kinds.pop()], reference


def _check_anchor(posterior: Posterior) -> None:
    loose = (posterior.anchor_precision == 0).nonzero().flatten().tolist()
    if loose:
        raise ValueError(
            f"`hierarchical(...)`: modules {loose} have no anchor (eta = 0), a flat prior under which `gamma` and `nu` "
            "have no likelihood. Give the anchor a positive precision, and leave out modules whose updates are zero."
        )
