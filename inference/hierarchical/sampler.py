r"""Scales and tails inferred instead of set: one ``gamma`` and one ``nu`` for many residuals, with priors.

With normalised experts a design is a generative model of the updates (:mod:`inference.evidence.estimate`), so that its
scale ``gamma`` and its degrees of freedom ``nu`` can be unknowns like any other, shared by the whole model, by all
modules of one expert (task) or by all experts of one module (layer):

    gamma ~ gamma_prior,  nu ~ df_prior,  Z ~ N(Z_0, T / (2 eta) I)
    log p(U_i | Z, gamma, nu) = -a_i rho_nu(q_i(Z) / s_i(gamma)^2) / T - log Z_i(gamma, nu)

in Full coordinates: Span ones are made of the updates and know nothing of their scale. ``Z`` is integrated out given
one weight per expert and module (:mod:`inference.hierarchical.model`), so that NUTS moves in few numbers whatever the
size of the modules. Each of its steps factors one matrix per module, of a side or of the directions that the experts
see there, if these are fewer: quick for adapters and sides up to some hundreds, slow for many full-rank ones of
thousands.

Without ``Z_i`` the largest ``gamma`` would always win, so experts without a normaliser are refused.

Held fixed, as in the evidence: the operators ``P_i``, the unit of the scale (``s_i / gamma``) and the anchor, whose
``eta`` is computed once at the design's own ``gamma``, the reference; otherwise the prior would move with the unknown.
Two experts about one update (both sides) count as two observations of it, which makes ``gamma`` look better known than
it is. Directional experts can be interpolated whatever their scale: they say little about ``gamma``.

>>> from poe_models import Absolute, AbsolutePrecision, Anchor, Gaussian, Identity
>>> anchor = Anchor(precision=AbsolutePrecision(0.5))
>>> poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), Absolute(1.0), anchor=anchor)
>>> updates = torch.randn(20, 2, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> draws = hierarchical(poe, updates, 100, seed=0, chains=1, warmup=50)
>>> draws.gamma.shape, draws.update("3", 0, 99).shape
(torch.Size([1, 100]), torch.Size([1, 50]))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from typing_extensions import override

from inference.draws import Draws
from inference.evidence.module_batches import Updates
from inference.gibbs import regenerate_with
from inference.hierarchical.model import HierarchicalModel
from inference.hierarchical.requirements import Shared
from poe_models.experts import ProductOfExperts
from poe_models.printing import Brief


@dataclass(frozen=True, eq=False, repr=False)
class HierarchicalDraws(Brief):
    """Draws of scale, tail, the experts' weights and the merged updates together, ``C`` chains of ``S`` draws.

    Attributes:
        gamma: The scale's ``gamma``: ``(C, S)``, ``(C, S, E)`` per expert or ``(C, S, M)`` per module; float64.
        nu: Degrees of freedom, of the same shape; None where no energy has any.
        weights: Weights ``w_i`` of the ``P_i``, ``(C, S, M, E)``.
        updates: Draws of the merged updates, made again from weights and seeds, for each batch of modules of one shape.
        diverging: Which trajectories diverged, ``(C, S)`` bool.
        eta: The anchor's precision at the reference ``gamma``, ``(M,)``.
        modules: Names of the modules, batch after batch.
        experts: Names of the experts.
        shared: What has a ``gamma`` and ``nu`` of its own.
    """

    gamma: Tensor
    nu: Tensor | None
    weights: Tensor
    updates: tuple[Draws, ...]
    diverging: Tensor
    eta: Tensor
    modules: tuple[str, ...]
    experts: tuple[str, ...]
    shared: Shared

    @property
    def num_divergences(self) -> int:
        """Diverging trajectories among all kept draws; any is a reason to distrust the draws."""
        return int(self.diverging.sum())

    def update(self, module: str, chain: int, draw: int) -> Tensor:
        """One draw of a module's merged update by name and position, ``(d_out, d_in)``.

        Raises:
            ValueError: If there is no such module.
        """
        if module not in self.modules:
            raise ValueError(f"`HierarchicalDraws.update({module!r})`: the modules are {', '.join(self.modules)}.")
        place = self.modules.index(module)
        for batch in self.updates:
            if place < batch.num_modules:
                return batch.module_latents(chain, draw, place)
            place -= batch.num_modules
        raise AssertionError(module)


def hierarchical(
    poe: ProductOfExperts,
    updates: Updates,
    num_samples: int,
    *,
    seed: int,
    shared: Shared = "model",
    gamma_prior: dist.TorchDistribution | None = None,
    df_prior: dist.TorchDistribution | None = None,
    chains: int = 4,
    warmup: int = 300,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> HierarchicalDraws:
    """Infer scales and tails by Pyro's NUTS on :class:`~inference.hierarchical.model.HierarchicalModel`.

    Args:
        poe: The design, with normalised experts: ``StudentT(df, exponent="multivariate")`` to infer ``gamma`` and
            ``nu``, Gaussian or ``Cauchy("multivariate")`` to infer ``gamma`` alone. Its own ``gamma`` is the reference
            of the anchor and of the default prior; its own ``df`` only helps to find ``white``.
        updates: A tensor ``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)``, or modules of any shapes, for instance a
            whole model's :class:`~poe_models.weights.task_vectors.TaskVectors`.
        num_samples: Draws kept per chain.
        seed: Decides everything; torch's global generator is as before when the function returns.
        shared: What has a ``gamma`` and ``nu`` of its own.
        gamma_prior: A scalar distribution on positive numbers; by default log-normal about the design's own ``gamma``
            with a log standard deviation of 1.
        df_prior: A scalar distribution on positive numbers; by default Gamma(2, 0.1) (Juarez and Steel, 2010,
            Journal of Business and Economic Statistics 28(1)), of mean 20.
        chains: One after another, from starts drawn from the priors.
        warmup: Steps per chain before the first kept draw.
        target_acceptance: Raise it if trajectories diverge.
        max_tree_depth: Most doublings of one trajectory.
        progress: Called with the number of finished steps and their total.

    Returns:
        The draws; a warning says so if trajectories diverged. R-hat and effective sample sizes of ``gamma`` and ``nu``:
        ``az.summary(to_inference_data(draws))``.

    Raises:
        ValueError: If an expert is not a normalised density, or a setting cannot be used.
    """
    if num_samples < 1 or chains < 1 or warmup < 1:
        raise ValueError(
            f"`hierarchical(num_samples={num_samples}, chains={chains}, warmup={warmup})`: needs at least one of each."
        )
    model = HierarchicalModel(poe, updates, shared, gamma_prior, df_prior)
    device = model.eta.device
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
        return gather(model, samples, divergences)


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


def gather(model: HierarchicalModel, samples: list[dict[str, Tensor]], divergences: Tensor) -> HierarchicalDraws:
    """The draws of all chains, by site, with weights, and seeds of the merged updates from torch's global generator.

    A warning says so if trajectories diverged, ``(C, S)`` bool.
    """
    stacked = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}
    gamma, nu, white = stacked["gamma"], stacked.get("nu"), stacked.get("white")
    weights = torch.stack([
        model.weights(gamma[chain], None if nu is None else nu[chain], None if white is None else white[chain])
        for chain in range(len(gamma))
    ])  # fmt: skip
    count = int(divergences.sum())
    if count:
        warnings.warn(
            f"`hierarchical(...)`: {count} of {divergences.numel()} trajectories diverged, so the draws may miss a "
            "part of the posterior. Raise `target_acceptance` (0.95), or give `gamma` and `nu` narrower priors.",
            stacklevel=3,
        )
    seeds = torch.randint(2**62, weights.shape[:3])
    sizes = [posterior.num_modules for posterior in model.posteriors]
    pairs = zip(model.posteriors, weights.split(sizes, 2), seeds.split(sizes, 2), strict=True)
    updates = tuple(Draws(part, seeds=here, regenerate=regenerate_with(posterior)) for posterior, part, here in pairs)
    names = (model.eta, model.modules, model.experts, model.shared)
    return HierarchicalDraws(gamma, nu, weights, updates, divergences, *names)
