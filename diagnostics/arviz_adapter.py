"""Draws for ArviZ, as its InferenceData (0.x) or as xarray's DataTree (1.x): the one file that knows ArviZ.

Groups, names, coordinates and attributes are the same in both, and either ArviZ reads the other's files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import h5netcdf
import numpy as np
from xarray.backends import H5NetCDFStore

from diagnostics.draw_groups import (
    full_attributes,
    full_groups,
    hierarchical_attributes,
    hierarchical_groups,
    posterior_attributes,
    posterior_groups,
)
from inference.draws import Draws
from inference.hierarchical.sampler import HierarchicalDraws
from inference.models.model_draws import FullDraws
from poe_models.posterior import Posterior
from poe_models.printing import Brief

with warnings.catch_warnings():
    # ArviZ 0.23 announces its next version on its first import of the day, by a stamp in the user's cache folder.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    import arviz as az


FEWEST_CHAINS, FEWEST_DRAWS = 4, 100
TREES = not az.__version__.startswith("0.")
"""Whether this ArviZ is 1.x, which has DataTrees."""
_ORDER = ("posterior", "log_likelihood", "sample_stats", "constant_data")
"""Groups in the order that ArviZ 0.x gives them."""
ArvizData: TypeAlias = Any
"""An ``arviz.InferenceData`` (0.x) or an ``xarray.DataTree`` (1.x)."""


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
    draws: Draws | HierarchicalDraws | FullDraws,
    posterior: Posterior | None = None,
    *,
    include_update: bool = False,
    seed: int | None = None,
) -> ArvizData:
    r"""Convert draws to ArviZ's data with named coordinates, for ``az.summary``, ``az.plot_trace``, ``to_netcdf``.

    Groups:
        ``posterior``: ``coefficients`` (module, basis) in Span coordinates; in any ``residual`` ``q_i / s_i^2``
        (module, expert) and ``distance`` ``|Z - Z_0|`` (module), on which chains of Full draws can be judged. Where
        modules share coefficients, ``module`` has their groups, and ``expert`` the experts of their first modules, such
        as ``a``, of their second ones, ``a/1``, and so on; nan where a group has fewer modules.
        ``sample_stats``: statistics that the sampler reports (module).
        ``log_likelihood``: ``updates`` (module, expert), ``-E_i / T - log Z_i`` in nats, the density of an expert's
        update under its operator, normalised as in :func:`inference.evidence.estimate.log_normalizers`. Full posteriors
        only, because the span is made of the updates. Left out, with a warning, if an energy has no normaliser. An
        expert whose update is zero adds a zero. ``az.loo`` and ``az.compare`` on it do not work: leaving out one expert
        of a few moves the posterior so far that Pareto shapes are above 0.7 nearly everywhere.
        :func:`inference.evidence.estimate.leave_one_expert_out` has the exact answer, and
        :func:`inference.evidence.designs.compare_designs` answers another question than ``az.compare``: how probable
        all updates were under each design, not how well each is predicted from the others.
        ``constant_data``: ``scale_squared``, ``dimension``, ``importance``, ``anchor_precision``, ``temperature``, and
        in Span coordinates ``gram``, ``forms`` and ``mean_curvature``.

    Attributes of the whole are ``poe_merge_version``, ``design``, ``temperature``, ``coordinates_of_draws``,
    ``sampler``, ``seed`` where it is given, and, where the span goes through a merge, the distance of the draws' centre
    from it (``merge_distance``, in standard deviations of the draws).

    Args:
        draws: Draws by any sampler; by :func:`inference.hierarchical`, whose ``posterior`` has ``gamma``, ``nu`` and
            ``weights``; or Full draws of a whole model, whose ``posterior`` has ``log_weight`` (module, expert), the
            log mixture weights that they are kept as and their chains are judged by. The latter two are taken alone.
        posterior: The posterior they were drawn from.
        include_update: True to put every entry of Full draws into ``posterior``, as ``update`` (module, row, column).
        seed: Seed of the generator that they were drawn with, to be kept beside them.

    Returns:
        An ``xarray.DataTree``; with ArviZ 0.x an ``arviz.InferenceData``.

    Raises:
        ValueError: If the posterior is missing, or given beside draws that are taken alone, or Full draws of a whole
            model have no mixture weights (Laplace, noise).

    >>> import torch
    >>> from inference import gibbs
    >>> from poe_models import Gaussian, ProductOfExperts, span_statistics
    >>> poe = ProductOfExperts.of(["a", "b"], energy=Gaussian())
    >>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
    >>> posterior = poe.bind(statistics)
    >>> draws = gibbs(posterior, 100, generator=torch.Generator().manual_seed(0))
    >>> data = to_inference_data(draws, posterior)
    >>> group_names(data)
    ['posterior', 'sample_stats', 'constant_data']
    >>> az.summary(data, var_names="coefficients").index.tolist()
    ['coefficients[fc.weight, a]', 'coefficients[fc.weight, b]']
    """
    if not isinstance(draws, Draws) and (include_update or posterior is not None):
        raise ValueError(
            f"`to_inference_data({type(draws).__name__}, ...)`: these draws know their modules and the numbers that "
            "are kept of them. Give them alone; `draws.update(...)` makes a merged update."
        )
    if isinstance(draws, HierarchicalDraws):
        return _made(hierarchical_groups(draws), hierarchical_attributes(draws), seed)
    if isinstance(draws, FullDraws):
        groups, attributes = full_groups(draws), full_attributes(draws)
        _warn_of_few(draws)
        return _made(groups, attributes, seed)
    if posterior is None:
        raise ValueError("`to_inference_data(draws)`: give the posterior that they are draws of.")
    _warn_of_few(draws)
    groups = posterior_groups(draws, posterior, include_update)
    data = _made(groups, posterior_attributes(draws, posterior), seed)
    data.constant_data["temperature"] = posterior.fixed_temperature  # `from_dict` of 0.x makes an array of a number
    return data


def _warn_of_few(draws: Draws | FullDraws) -> None:
    if draws.num_chains < FEWEST_CHAINS or draws.num_draws < FEWEST_DRAWS:
        warnings.warn(TooFewDraws(draws.num_chains, draws.num_draws), stacklevel=3)


def group_names(data: ArvizData) -> list[str]:
    """Names of the groups of ArviZ's data, in their order."""
    return list(data.children) if TREES else list(data.groups())


def write_netcdf(data: ArvizData, path: str | PathLike[str]) -> None:
    """Write ArviZ's data without the hour of its making, so that the same draws are the same file.

    The file is made in memory and written in one go: HDF5 has open objects left where a disk fills up under it, and
    ends the process when it cannot write them later either.
    """
    content = BytesIO()
    with h5netcdf.File(content, "w") as file:
        for name, value in data.attrs.items():
            file.attrs[name] = value
        for group in group_names(data):
            dataset = data[group].to_dataset() if TREES else data[group].copy()
            dataset.attrs.pop("created_at", None)
            dataset.dump_to_store(H5NetCDFStore(file, group=group, mode="a"), encoding=_compressed(dataset))
    Path(path).write_bytes(content.getvalue())


def _compressed(dataset: Any) -> dict[str, dict[str, bool]]:
    """Encoding that compresses each numerical variable of a group."""
    return {name: {"zlib": True} for name, values in dataset.variables.items() if values.dtype.kind in "biufc"}


def _made(groups: Mapping[str, Any], attributes: Mapping[str, str | float], seed: int | None) -> ArvizData:
    """ArviZ's data of groups of arrays, with ``coords`` and ``dims`` among them as ArviZ 0.x has it."""
    coords, dims = groups["coords"], groups["dims"]
    known = {name: groups[name] for name in _ORDER if groups.get(name) is not None}
    data = az.from_dict(known, coords=coords, dims=dims) if TREES else az.from_dict(**known, coords=coords, dims=dims)
    data.attrs |= dict(attributes) | ({} if seed is None else {"seed": seed})
    return data


@dataclass(frozen=True, eq=False, repr=False)
class ChainSummary(Brief):
    """R-hat, effective sample sizes and moments of each quantity; float64 arrays of the quantities' shape.

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


def chain_summary(values: np.ndarray) -> ChainSummary:
    """R-hat, effective sample sizes and Monte Carlo errors of quantities ``(chain, draw, *shape)``.

    >>> draws = np.random.default_rng(0).normal(size=(4, 500, 2))
    >>> bool((chain_summary(draws).r_hat < 1.01).all())
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
    return ChainSummary(r_hat, bulk, tail, mean, sd, error)


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOut(Brief):
    """Pareto-smoothed importance sampling leave-one-out (Vehtari et al., 2017, arXiv 1507.04544), in nats.

    Attributes:
        pointwise: Expected log predictive density of every value given the others, ``(n,)``.
        pareto_k: Shape of the tail of every value's importance weights, ``(n,)``.
        good_k: Largest shape at which a value's density is reliable with so many draws.
        source: ArviZ's own result, an ``ELPDData``, for :func:`compare_leave_one_out`.
    """

    pointwise: np.ndarray
    pareto_k: np.ndarray
    good_k: float
    source: Any

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
    groups = {"posterior": {"draw_of": nothing}, "log_likelihood": {"value": log_likelihood[None]}}
    data = _made(groups | {"coords": {}, "dims": {}}, {}, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")  # `unreliable` says it
        result = az.loo(data, pointwise=True, reff=1.0)
    found = result.elpd_i if TREES else result.loo_i
    pointwise, k = (np.asarray(each.values, dtype=np.float64) for each in (found, result.pareto_k))
    return LeaveOneOut(pointwise, k, float(result.good_k), result)


def compare_leave_one_out(results: Mapping[str, LeaveOneOut]) -> dict[str, dict[str, float]]:
    """Compare models of the same values, the best first; stacking weights are those of ``az.compare``.

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
    weights = _stacking_weights({name: result.source for name, result in results.items()})
    names = sorted(results, key=lambda name: -results[name].elpd)
    best = results[names[0]].pointwise
    return {
        name: {
            "error": _error_of_sum(results[name].pointwise),
            "difference": float((best - results[name].pointwise).sum()),
            "difference_error": _error_of_sum(best - results[name].pointwise),
            "weight": weights[name],
        }
        for name in names
    }


def _error_of_sum(pointwise: np.ndarray) -> float:
    return float(np.sqrt(len(pointwise) * pointwise.var()))


def _stacking_weights(sources: dict[str, Any]) -> dict[str, float]:
    if len(sources) == 1:  # `az.compare` wants two
        return dict.fromkeys(sources, 1.0)
    unrounded: dict[str, Any] = {"round_to": "none"} if TREES else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # ArviZ 0.x on a newer pandas
        table = az.compare(sources, **unrounded)
    return {name: float(table.loc[name, "weight"]) for name in sources}
