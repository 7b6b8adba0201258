"""Did the chains mix: R-hat, effective sample sizes, Monte Carlo errors, divergences and ranks.

>>> from inference.gibbs import gibbs_posterior
>>> from inference.models.model_draws import SpanDraws
>>> from poe_models import ProductOfExperts, span_posterior, span_statistics
>>> poe = ProductOfExperts.of(["a", "b"])
>>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
>>> posterior, coordinates = span_posterior(poe, statistics)
>>> draws = gibbs_posterior(posterior, 500, generator=torch.Generator().manual_seed(0))
>>> found = chain_convergence(SpanDraws.of(draws, coordinates, statistics))
>>> found.quantities, [verdict.level.name for verdict in found.verdicts]
(('a', 'b'), ['GOOD', 'GOOD'])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from diagnostics.arviz_adapter import ChainStatistics, chain_statistics
from diagnostics.verdicts import Level, Verdict
from inference.models.model_draws import FullDraws, ModelDraws, PosteriorDraws, SpanDraws

__all__ = ["ChainConvergence", "Ranks", "chain_convergence", "rank_histogram", "surround_verdict"]


ABOUT = "centre of the draws"


def surround_verdict(draws: PosteriorDraws) -> Verdict:
    """Judge how far the centre of draws is from the merge, in standard deviations of the draws.

    Args:
        draws: of a whole model, or of some of its modules.

    Returns:
        A verdict that says what the draws are: sampler, coordinates, temperature and distance.

    >>> import torch
    >>> from inference.merge_distance import MergeDistance
    >>> from inference.models.model_draws import SpanDraws
    >>> coefficients = torch.zeros(1, 20, 1, 2, dtype=torch.float64)
    >>> shapes = torch.tensor([[1.0, 0.0]])
    >>> draws = SpanDraws(("m",), shapes, "", ("a",), coefficients, sampler="slice")
    >>> surround_verdict(draws).level.name
    'UNKNOWN'
    """
    if draws.from_merge is None:
        text = (
            f"{draws.about}: how far their centre is from the merge is not known; `distance_from_merge` finds it out."
        )
        return Verdict(ABOUT, Level.UNKNOWN, text)
    if draws.far_from_merge is not None:
        return Verdict(ABOUT, Level.CAUTION, draws.far_from_merge)
    level = Level.UNKNOWN if draws.from_merge.unknown else Level.GOOD
    return Verdict(ABOUT, level, f"{draws.about}: {draws.from_merge}.")


R_HAT = (1.01, 1.05)
"""Above the first, caution; above the second, bad (Vehtari et al., 2021, arXiv 1903.08008)."""
ESS = (400.0, 100.0)
"""Effective sample size below the first, caution; below the second, bad (ibid.: 100 per chain for four chains)."""
DIVERGENT_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class ChainConvergence:
    """Whether ``C`` chains of ``S`` draws can be trusted, for ``K`` quantities in each of ``M`` modules.

    Attributes:
        modules: names.
        quantities: names of what is judged in each module.
        values: the draws themselves, ``(C, S, M, K)`` float64.
        silent: quantities that a module does not have, whose values are NaN, ``(M, K)`` bool.
        statistics: of every quantity, ``(M, K)`` arrays.
        divergences: divergent transitions, ``(M,)`` int64; None if the sampler reports none.
    """

    modules: tuple[str, ...]
    quantities: tuple[str, ...]
    values: np.ndarray
    silent: np.ndarray
    statistics: ChainStatistics
    divergences: np.ndarray | None

    @property
    def num_chains(self) -> int:
        """Number of chains ``C``."""
        return int(self.values.shape[0])

    @property
    def num_draws(self) -> int:
        """Draws per chain ``S``."""
        return int(self.values.shape[1])

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """On R-hat and on effective sample sizes; on divergences where the sampler reports them.

        Draws that are not finite come first: nothing else that is said of their quantities counts.
        """
        found = [*self._broken(), self._r_hat(), self._sample_size()]
        if self.divergences is not None:
            found.append(self._divergences(self.divergences))
        return tuple(found)

    def _broken(self) -> list[Verdict]:
        wrong = ~np.isfinite(self.values) & ~self.silent
        if not wrong.any():
            return []
        draws = int(wrong.any((2, 3)).sum())
        text = (
            f"{draws} of {self.num_chains * self.num_draws} draws are NaN or infinite, the most in "
            f"{self._name(wrong.sum((0, 1)).argmax())}: look at the sampler's settings there, or sample in float64."
        )
        return [Verdict("draws", Level.BAD, text)]

    def _r_hat(self) -> Verdict:
        known = self.statistics.r_hat[np.isfinite(self.statistics.r_hat)]
        if not known.size:
            why = "there is one chain" if self.num_chains == 1 else "no quantity varies, or draws are not finite"
            return Verdict("R-hat", Level.UNKNOWN, f"cannot be judged: {why}. Run four chains or more.")
        top, where = float(known.max()), self._name(np.nanargmax(self.statistics.r_hat))
        text = f"largest R-hat {top:.3f} ({where}) over {self.num_chains} chains of {self.num_draws} draws"
        if top <= R_HAT[0]:
            return Verdict("R-hat", Level.GOOD, f"{text}: the chains agree.")
        if top <= R_HAT[1]:
            return Verdict(
                "R-hat", Level.CAUTION, f"{text}, above {R_HAT[0]}: the chains differ a little; run them longer."
            )
        return Verdict("R-hat", Level.BAD, f"{text}: the chains disagree; run them longer, or look at their modes.")

    def _sample_size(self) -> Verdict:
        sizes = np.fmin(self.statistics.ess_bulk, self.statistics.ess_tail)
        if not np.isfinite(sizes).any():
            return Verdict("effective sample size", Level.UNKNOWN, "cannot be judged: too few draws.")
        least, where = float(np.nanmin(sizes)), self._name(np.nanargmin(sizes))
        varying = np.isfinite(sizes)
        error = self.statistics.mcse_mean[varying] / self.statistics.sd[varying]
        text = (
            f"smallest effective sample size {least:.0f} ({where}) of {self.num_chains * self.num_draws} draws; Monte "
            f"Carlo errors of the means are up to {error.max():.1%} of a standard deviation"
        )
        if least >= ESS[0]:
            return Verdict("effective sample size", Level.GOOD, f"{text}.")
        level = Level.CAUTION if least >= ESS[1] else Level.BAD
        return Verdict("effective sample size", level, f"{text}; {ESS[0]:.0f} are wanted: draw more.")

    def _divergences(self, counts: np.ndarray) -> Verdict:
        total, draws = int(counts.sum()), self.num_chains * self.num_draws * len(counts)
        if total == 0:
            return Verdict("divergences", Level.GOOD, "no divergent transitions.")
        level = Level.BAD if total > DIVERGENT_SHARE * draws else Level.CAUTION
        module = self.modules[int(counts.argmax())] if len(counts) == len(self.modules) else "all modules together"
        text = f"{total} of {draws} transitions diverged, most in {module}: raise the anchor's precision, or use Gibbs."
        return Verdict("divergences", level, text)

    def _name(self, flat: np.intp) -> str:
        module, quantity = np.unravel_index(int(flat), self.statistics.r_hat.shape)
        return f"{self.quantities[quantity]} in {self.modules[module]}"


def chain_convergence(draws: ModelDraws) -> ChainConvergence:
    """Judge the draws of a whole model.

    Span draws are judged by their coefficients. Full ones are made again only when needed, and judged by what the Gibbs
    sampler keeps: the log density and the log of each expert's mixture weight.

    Args:
        draws: of any sampler.

    Returns:
        The judgement of every module.

    Raises:
        ValueError: the draws are no chains (Laplace, noise).
    """
    values, silent, names = _quantities(draws)
    array = values.detach().cpu().double().numpy()
    divergent = draws.stats.get("diverging")
    return ChainConvergence(
        modules=draws.modules,
        quantities=names,
        values=array,
        silent=silent.cpu().numpy(),
        statistics=chain_statistics(array),
        divergences=None if divergent is None else divergent.long().sum((0, 1)).cpu().numpy(),
    )


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of one quantity's draws among those of all chains, counted in bins.

    Attributes:
        counts: ``(C, B)`` int64.
        expected: count of a bin if the chains are alike.
        low: lower end of 95 % of the counts of independent draws of one distribution.
        high: upper end.
    """

    counts: np.ndarray
    expected: float
    low: float
    high: float


def rank_histogram(values: np.ndarray, bins: int = 20) -> Ranks:
    """Ranks by chain: flat if the chains are alike (Vehtari et al., 2021, arXiv 1903.08008, section 4.1).

    The band is of independent draws; those of a chain depend on each other and stray further.

    Args:
        values: one quantity, ``(chain, draw)``; ties share their mean rank.
        bins: how many.

    Returns:
        The counts.

    Raises:
        ValueError: the draws are not ``(chain, draw)``, not finite, or fewer than the bins.

    >>> ranks = rank_histogram(np.arange(80.0).reshape(2, 40), bins=4)
    >>> ranks.counts.tolist(), ranks.expected
    ([[20, 20, 0, 0], [0, 0, 20, 20]], 10.0)
    """
    if values.ndim != 2 or values.size < bins or not np.isfinite(values).all():
        raise ValueError(
            f"`rank_histogram(values {values.shape}, bins={bins})`: give finite draws (chain, draw) of one quantity, "
            "no fewer than bins."
        )
    ranks = scipy.stats.rankdata(values, method="average").reshape(values.shape)
    edges = np.linspace(0.5, values.size + 0.5, bins + 1)
    counts = np.stack([np.histogram(row, edges)[0] for row in ranks])
    low, high = scipy.stats.binom(values.shape[1], 1 / bins).interval(0.95)
    return Ranks(counts, values.shape[1] / bins, float(low), float(high))


def _quantities(draws: ModelDraws) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """What draws are judged by, ``(C, S, M, K)``, where a module lacks it, ``(M, K)``, and its names."""
    if draws.independent:
        raise ValueError(
            f"`chain_convergence({type(draws).__name__})`: these draws are independent of each other; there are no "
            "chains to judge. Give draws of a sampler."
        )
    if isinstance(draws, SpanDraws):
        values, names = draws.coefficients[..., draws.varying], tuple(draws.basis[place] for place in draws.varying)
        return values, torch.zeros(values.shape[2:], dtype=torch.bool), names
    assert isinstance(draws, FullDraws)
    silent = (draws.weights == 0).all(0).all(0)  # no such expert
    weights = torch.where(silent, torch.nan, draws.weights.double().log())
    density = draws.stats["lp"].double().unsqueeze(-1)
    silent = torch.nn.functional.pad(silent, (1, 0))
    return torch.cat([density, weights], -1), silent, ("lp", *(f"log weight {i + 1}" for i in range(weights.shape[-1])))
