"""Convergence of chains, and the intervals of their draws: R-hat, effective sample sizes, divergences and ranks.

>>> from inference.gibbs import gibbs
>>> from inference.models.model_draws import SpanDraws
>>> from poe_models import ProductOfExperts, span_statistics
>>> poe = ProductOfExperts.of(["a", "b"])
>>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
>>> posterior = poe.bind(statistics)
>>> draws = gibbs(posterior, 500, generator=torch.Generator().manual_seed(0))
>>> found = chain_convergence(SpanDraws.of(draws, posterior))
>>> found.quantities, [verdict.level.name for verdict in found.verdicts]
(('a', 'b'), ['GOOD', 'GOOD'])
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from diagnostics.arviz_adapter import ChainSummary, chain_summary
from diagnostics.draw_groups import log_weights
from diagnostics.verdicts import Level, Verdict
from inference.models.model_draws import FullDraws, ModelDraws, PosteriorDraws, SpanDraws
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


ABOUT = "mean of the draws"
R_HAT = (1.01, 1.05)
"""Above the first, caution; above the second, bad (Vehtari et al., 2021, arXiv 1903.08008)."""
ESS = (400.0, 100.0)
"""Effective sample size below the first, caution; below the second, bad (ibid.: 100 per chain for four chains)."""
DIVERGENT_SHARE = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class ChainConvergence(Brief):
    """Convergence of ``C`` chains of ``S`` draws, for ``K`` quantities in each of ``M`` modules.

    Attributes:
        modules: Names of the modules.
        quantities: Names of the quantities, the same in each module.
        values: The draws themselves, ``(C, S, M, K)`` float64.
        silent: Mask of the quantities that a module does not have, whose values are NaN, ``(M, K)``.
        summary: R-hat, effective sample sizes and Monte Carlo errors of every quantity, ``(M, K)`` arrays.
        divergences: Divergent transitions, ``(M,)`` int64; None if the sampler reports none.
    """

    modules: tuple[str, ...]
    quantities: tuple[str, ...]
    values: np.ndarray
    silent: np.ndarray
    summary: ChainSummary
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
        """Verdicts on R-hat and effective sample sizes, and on divergences where the sampler reports them.

        Where draws are not finite, that is all that is said of their quantities.
        """
        found = self._broken() or [self._r_hat(), self._sample_size()]
        if self.divergences is not None:
            found.append(self._divergences(self.divergences))
        return tuple(found)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per module and quantity that it has, with the columns of :class:`ChainSummary`."""
        import pandas as pd

        places = [
            (m, q) for m in range(len(self.modules)) for q in range(len(self.quantities)) if not self.silent[m, q]
        ]
        named = [{"module": self.modules[m], "quantity": self.quantities[q]} for m, q in places]
        numbers = {name: [values[place] for place in places] for name, values in vars(self.summary).items()}
        return pd.DataFrame(named).assign(**numbers)

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
        known = self.summary.r_hat[~np.isnan(self.summary.r_hat)]  # infinite: every chain is stuck by itself
        if not known.size:
            why = "there is one chain" if self.num_chains == 1 else "no quantity varies, or draws are not finite"
            return Verdict("R-hat", Level.UNKNOWN, f"cannot be judged: {why}. Run four chains or more.")
        top, where = float(known.max()), self._name(np.nanargmax(self.summary.r_hat))
        text = f"largest R-hat {top:.3f} ({where}) over {self.num_chains} chains of {self.num_draws} draws"
        if top <= R_HAT[0]:
            return Verdict("R-hat", Level.GOOD, f"{text}: the chains agree.")
        if top <= R_HAT[1]:
            return Verdict(
                "R-hat", Level.CAUTION, f"{text}, above {R_HAT[0]}: the chains differ a little; run them longer."
            )
        return Verdict("R-hat", Level.BAD, f"{text}: the chains disagree; run them longer, or look at their modes.")

    def _sample_size(self) -> Verdict:
        stuck = np.isinf(self.summary.r_hat)  # no draw of these says anything about the others
        sizes = np.where(stuck, 1.0, np.fmin(self.summary.ess_bulk, self.summary.ess_tail))
        if not np.isfinite(sizes).any():
            return Verdict("effective sample size", Level.UNKNOWN, "cannot be judged: too few draws.")
        least, where = float(np.nanmin(sizes)), self._name(np.nanargmin(sizes))
        varying = np.isfinite(sizes)
        error = np.where(stuck[varying], 1.0, self.summary.mcse_mean[varying] / self.summary.sd[varying])
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
        module, quantity = np.unravel_index(int(flat), self.summary.r_hat.shape)
        return f"{self.quantities[quantity]} in {self.modules[module]}"


def chain_convergence(draws: ModelDraws) -> ChainConvergence:
    """Judge the chains of a whole model.

    Span draws are judged by their coefficients. Full ones are made again only when needed, and judged by the numbers
    that the Gibbs sampler keeps: the log density and the log of each expert's mixture weight.

    Raises:
        ValueError: If the draws are no chains (Laplace, noise).
    """
    values, silent, names = _quantities(draws)
    array = values.detach().cpu().double().numpy()
    divergent = draws.stats.get("diverging")
    return ChainConvergence(
        modules=draws.modules,
        quantities=names,
        values=array,
        silent=silent.cpu().numpy(),
        summary=chain_summary(array),
        divergences=None if divergent is None else divergent.long().sum((0, 1)).cpu().numpy(),
    )


def surround_verdict(draws: PosteriorDraws) -> Verdict:
    """Verdict on the distance of the draws' mean from the merge, in standard deviations of the draws.

    >>> from inference.models.model_draws import SpanDraws
    >>> coefficients = torch.zeros(1, 20, 1, 2, dtype=torch.float64)
    >>> shapes = torch.tensor([[1.0, 0.0]])
    >>> draws = SpanDraws(("m",), shapes, "", ("a",), coefficients, sampler="slice")
    >>> surround_verdict(draws).level.name
    'UNKNOWN'
    """
    if draws.from_merge is None:
        text = f"{draws.about}: their distance from the merge is not known; `distance_from_merge` measures it."
        return Verdict(ABOUT, Level.UNKNOWN, text)
    if draws.far_from_merge is not None:
        return Verdict(ABOUT, Level.CAUTION, draws.far_from_merge)
    level = Level.UNKNOWN if math.isnan(draws.from_merge.typical) else Level.GOOD
    return Verdict(ABOUT, level, f"{draws.about}: {draws.from_merge}.")


@dataclass(frozen=True, eq=False, repr=False)
class CoefficientIntervals(Brief):
    """Posterior quantiles of ``K`` coefficients in ``M`` modules; float64 ``(M, K)`` arrays.

    Attributes:
        modules: Names of the modules.
        updates: Names of the updates, then of the anchor's centre where it has one, then of a merge that the span goes
            through; a draw at that merge has a one there, and zeros at the updates.
        median: Median over all chains together.
        low: Lower end of the central interval.
        high: Upper end.
        confidence: Level of the interval.
    """

    modules: tuple[str, ...]
    updates: tuple[str, ...]
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float

    def to_dataframe(self) -> pd.DataFrame:
        """One row per module and coefficient: median and ends of the interval."""
        import pandas as pd

        places = pd.MultiIndex.from_product([self.modules, self.updates], names=["module", "update"])
        columns = {name: getattr(self, name).ravel() for name in ("median", "low", "high")}
        return pd.DataFrame(columns, places).reset_index()


def coefficient_intervals(draws: SpanDraws, confidence: float = 0.9) -> CoefficientIntervals:
    """Central intervals of each module's coefficients at a level of confidence; judge the chains first.

    Raises:
        ValueError: If the level is not between 0 and 1, or the draws are not in Span coordinates.

    >>> coefficients = torch.linspace(0, 1, 101, dtype=torch.float64).reshape(1, 101, 1, 1).expand(1, 101, 1, 2)
    >>> found = coefficient_intervals(SpanDraws(("m",), torch.tensor([[1.0, 0.0]]), "", ("a",), coefficients), 0.8)
    >>> found.updates, found.low.round(2), found.high.round(2)
    (('a',), array([[0.1]]), array([[0.9]]))
    """
    if not isinstance(draws, SpanDraws) or not 0 < confidence < 1:
        raise ValueError(
            f"`coefficient_intervals({type(draws).__name__}, confidence={confidence})`: give Span draws, which have "
            "coefficients, and a level between 0 and 1."
        )
    tensor, _, names = _coefficients(draws)
    values = tensor.detach().cpu().double().numpy()
    low, median, high = np.quantile(values, [(1 - confidence) / 2, 0.5, (1 + confidence) / 2], axis=(0, 1))
    return CoefficientIntervals(draws.modules, names, median, low, high, confidence)


@dataclass(frozen=True, eq=False, repr=False)
class Ranks(Brief):
    """Ranks of one quantity's draws among those of all chains, counted in bins.

    Attributes:
        counts: ``(C, B)`` int64.
        expected: Count of a bin if the chains are alike.
        low: Lower end of 95 % of the counts of independent draws of one distribution.
        high: Upper end.
    """

    counts: np.ndarray
    expected: float
    low: float
    high: float


def rank_histogram(values: np.ndarray, bins: int = 20) -> Ranks:
    """Ranks by chain: flat if the chains are alike (Vehtari et al., 2021, arXiv 1903.08008, section 4.1).

    The band is of independent draws; those of a chain depend on each other and stray further.

    Args:
        values: One quantity, ``(chain, draw)``; ties share their mean rank.
        bins: Number of bins.

    Raises:
        ValueError: If the draws are not ``(chain, draw)``, not finite, or fewer than the bins.

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
    """Quantities of the draws, ``(C, S, M, K)``, the mask of those that a module lacks, ``(M, K)``, and their names."""
    if draws.independent:
        raise ValueError(
            f"`chain_convergence({type(draws).__name__})`: these draws are independent of each other; there are no "
            "chains to judge. Give draws of a sampler."
        )
    if isinstance(draws, SpanDraws):
        return _coefficients(draws)
    assert isinstance(draws, FullDraws)
    names, logs, silent = log_weights(draws)
    values = torch.cat([draws.stats["lp"].double().unsqueeze(-1), logs], -1)
    silent = torch.nn.functional.pad(silent, (1, 0))
    return values, silent, ("log density", *(f"log weight of {name}" for name in names))


def _coefficients(draws: SpanDraws) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    values, names = draws.coefficients[..., draws.varying], tuple(draws.basis[place] for place in draws.varying)
    return values, torch.zeros(values.shape[2:], dtype=torch.bool), names
