"""Draws as ArviZ's InferenceData: the one file that knows ArviZ (0.x; 1.x has another data structure)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diagnostics.draw_groups import hierarchical_groups, posterior_attributes, posterior_groups
from inference.draws import Draws
from inference.hierarchical.sampler import HierarchicalDraws
from poe_models.posterior import Posterior
from poe_models.printing import Brief

with warnings.catch_warnings():
    # ArviZ 0.23 announces its next version on its first import of the day, by a stamp in the user's cache folder.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    import arviz as az


FEWEST_CHAINS, FEWEST_DRAWS = 4, 100


class TooFewDraws(UserWarning):
    """Too few draws for R-hat and effective sample sizes to be trusted; they are computed all the same.

    Attributes:
        chains: Number of chains.
        draws: Number of draws per chain.
    """

    def __init__(self, chains: int, draws: int) -> None:
        super().__init__(
            f"{chains} chains of {draws} draws are too few to trust R-hat and effective sample sizes: {FEWEST_CHAINS} "
            f"chains of {FEWEST_DRAWS} are the least (50 per half chain; Vehtari et al., 2021, arXiv 1903.08008)."
        )
        self.chains = chains
        self.draws = draws


def to_inference_data(
    draws: Draws | HierarchicalDraws,
    posterior: Posterior | None = None,
    *,
    include_update: bool = False,
) -> az.InferenceData:
    r"""Convert draws to an InferenceData with named coordinates, for ``az.summary``, ``az.plot_trace``, ``to_netcdf``.

    Groups:
        ``posterior``: ``coefficients`` (module, basis) in Span coordinates; in any ``residual`` ``q_i / s_i^2``
        (module, expert) and ``distance`` ``|Z - Z_0|`` (module), on which chains of Full draws can be judged.
        ``sample_stats``: statistics that the sampler reports (module).
        ``log_likelihood``: ``updates`` (module, expert), ``-E_i / T - log Z_i`` in nats, the density of an expert's
        update under its operator, normalised as in :func:`inference.evidence.estimate.log_normalizers`. Full posteriors
        only, because the span is made of the updates. Left out, with a warning, if an energy has no normaliser. An
        expert whose update is zero adds a zero. ``az.loo`` and ``az.compare`` on it do not work: leaving out one expert
        of a few moves the posterior so far that Pareto shapes are above 0.7 nearly everywhere.
        :func:`inference.evidence.estimate.leave_one_expert_out` has the exact answer, and
        :func:`inference.evidence.designs.compare_designs` compares designs.
        ``constant_data``: ``scale_squared``, ``dimension``, ``importance``, ``anchor_precision``, ``temperature``, and
        in Span coordinates ``gram``, ``forms`` and ``mean_curvature``.

    Attributes of the whole are ``coordinates_of_draws``, ``sampler``, ``temperature``, and, where the span goes through
    a merge, the distance of the draws' centre from it (``merge_distance``, in standard deviations of the draws).

    Args:
        draws: Draws by any sampler, or by :func:`inference.hierarchical`, which are taken alone: ``posterior`` then has
            ``gamma``, ``nu`` and ``weights``.
        posterior: The posterior they were drawn from.
        include_update: True to put every entry of Full draws into ``posterior``, as ``update`` (module, row, column).

    Returns:
        An ``arviz.InferenceData``.

    Raises:
        ValueError: If the posterior is missing, or given beside hierarchical draws.

    >>> import torch
    >>> from inference import gibbs
    >>> from poe_models import Gaussian, ProductOfExperts, span_statistics
    >>> poe = ProductOfExperts.of(["a", "b"], energy=Gaussian())
    >>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
    >>> posterior = poe.bind(statistics)
    >>> draws = gibbs(posterior, 100, generator=torch.Generator().manual_seed(0))
    >>> data = to_inference_data(draws, posterior)
    >>> data.groups()
    ['posterior', 'sample_stats', 'constant_data']
    >>> az.summary(data, var_names="coefficients").index.tolist()
    ['coefficients[fc.weight, a]', 'coefficients[fc.weight, b]']
    """
    if isinstance(draws, HierarchicalDraws):
        return _hierarchical_data(draws, posterior, include_update)
    if posterior is None:
        raise ValueError("`to_inference_data(draws)`: give the posterior that they are draws of.")
    if draws.num_chains < FEWEST_CHAINS or draws.num_draws < FEWEST_DRAWS:
        warnings.warn(TooFewDraws(draws.num_chains, draws.num_draws), stacklevel=2)
    data = az.from_dict(**posterior_groups(draws, posterior, include_update))
    data.constant_data["temperature"] = posterior.temperature  # `from_dict` makes an array of a number
    data.attrs |= posterior_attributes(draws, posterior)
    return data


def _hierarchical_data(draws: HierarchicalDraws, posterior: Posterior | None, include_update: bool) -> az.InferenceData:
    if include_update or posterior is not None:
        raise ValueError(
            "`to_inference_data(draws, ...)`: hierarchical draws are of scales, tails and weights, and know their "
            "modules. Give them alone; `draws.update(module, chain, draw)` makes a merged update."
        )
    data = az.from_dict(**hierarchical_groups(draws))
    data.attrs |= {"draws_of": "scales, tails and weights (Full)", "shared": draws.shared}
    return data


@dataclass(frozen=True, eq=False, repr=False)
class ChainStatistics(Brief):
    """Statistics of the chains of each quantity; float64 arrays of the quantities' shape.

    Attributes:
        r_hat: Rank-normalised split R-hat (Vehtari et al., 2021); nan with one chain or for a constant.
        ess_bulk: Effective sample size of the bulk.
        ess_tail: Effective sample size of the 5 % and 95 % quantiles.
        mean: Mean over all draws.
        sd: Standard deviation over all draws.
        mcse_mean: Monte Carlo standard error of the mean.
    """

    r_hat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    mcse_mean: np.ndarray


def chain_statistics(values: np.ndarray) -> ChainStatistics:
    """R-hat, effective sample sizes and Monte Carlo errors of quantities ``(chain, draw, *shape)``.

    >>> draws = np.random.default_rng(0).normal(size=(4, 500, 2))
    >>> bool((chain_statistics(draws).r_hat < 1.01).all())
    True
    """
    data = az.convert_to_dataset({"x": values})
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of constants, whose nan says it
        r_hat = az.rhat(data)["x"].values if len(values) > 1 else np.full(values.shape[2:], np.nan)
        bulk, tail = (az.ess(data, method=method)["x"].values for method in ("bulk", "tail"))
        error = az.mcse(data, method="mean")["x"].values
        constant, mean, sd = np.ptp(values, axis=(0, 1)) == 0, values.mean((0, 1)), values.std((0, 1), ddof=1)
    bulk, tail = (np.where(constant, np.nan, size) for size in (bulk, tail))
    return ChainStatistics(r_hat, bulk, tail, mean, sd, error)


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOut(Brief):
    """Pareto-smoothed importance sampling leave-one-out (Vehtari et al., 2017, arXiv 1507.04544), in nats.

    Attributes:
        pointwise: Expected log predictive density of every value given the others, ``(n,)``.
        pareto_k: Shape of the tail of every value's importance weights, ``(n,)``.
        good_k: Largest shape at which a value's density is reliable with so many draws.
        source: ArviZ's own result, for :func:`compare_leave_one_out`.
    """

    pointwise: np.ndarray
    pareto_k: np.ndarray
    good_k: float
    source: az.ELPDData

    @property
    def elpd(self) -> float:
        """Summed expected log predictive density."""
        return float(self.pointwise.sum())

    @property
    def unreliable(self) -> int:
        """Number of values with a Pareto k above ``good_k``."""
        return int((self.pareto_k > self.good_k).sum())


def leave_one_out(log_likelihood: np.ndarray) -> LeaveOneOut:
    """PSIS-LOO from the nats of independent draws and values, ``(draws, n)``.

    >>> flat = leave_one_out(np.full((200, 3), -1.0) + 1e-3 * np.random.default_rng(0).normal(size=(200, 3)))
    >>> round(flat.elpd, 2)
    -3.0
    """
    nothing = np.zeros((1, len(log_likelihood)))
    data = az.from_dict(posterior={"draw_of": nothing}, log_likelihood={"value": log_likelihood[None]})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")  # `unreliable` says it
        result = az.loo(data, pointwise=True, reff=1.0)
    pointwise, k = (np.asarray(result[name].values, dtype=np.float64) for name in ("loo_i", "pareto_k"))
    return LeaveOneOut(pointwise, k, float(result.good_k), result)


def compare_leave_one_out(results: Mapping[str, LeaveOneOut]) -> dict[str, dict[str, float]]:
    """Compare models of the same values by ``az.compare``, the best first.

    Args:
        results: Name to leave-one-out densities.

    Returns:
        Name to the standard error of the elpd ``error``, the ``difference`` to the best (zero or above), the standard
        error of that ``difference_error``, and the stacking ``weight``.

    Raises:
        ValueError: If a density is not finite.

    >>> noise = 1e-3 * np.random.default_rng(0).normal(size=(2, 200, 3))
    >>> models = {"good": leave_one_out(noise[0] - 1), "poor": leave_one_out(noise[1] - 2)}
    >>> {name: round(row["difference"], 2) for name, row in compare_leave_one_out(models).items()}
    {'good': 0.0, 'poor': 3.0}
    """
    broken = [name for name, result in results.items() if not np.isfinite(result.pointwise).all()]
    if broken:
        count = int((~np.isfinite(results[broken[0]].pointwise)).sum())
        raise ValueError(
            f"`compare_leave_one_out(...)`: {broken[0]!r} has {count} densities that are NaN or infinite, to which no "
            "comparison and no stacking weight can be given. Leave the model out, or mend its likelihood."
        )
    if len(results) == 1:
        ((name, only),) = results.items()
        error = float(np.sqrt(len(only.pointwise) * only.pointwise.var()))
        return {name: {"error": error, "difference": 0.0, "difference_error": 0.0, "weight": 1.0}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # ArviZ 0.x on a newer pandas
        table = az.compare({name: result.source for name, result in results.items()})
    columns = {"error": "se", "difference": "elpd_diff", "difference_error": "dse", "weight": "weight"}
    return {str(name): {new: float(row[old]) for new, old in columns.items()} for name, row in table.iterrows()}
