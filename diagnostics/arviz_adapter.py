"""Draws as ArviZ's InferenceData: the one file that knows ArviZ (0.x; 1.x has another data structure)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diagnostics.hierarchical_groups import hierarchical_groups
from inference.draws import Draws
from inference.evidence.estimate import log_normalizers
from inference.hierarchical.sampler import HierarchicalDraws
from inference.merge_distance import MergeDistance
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import statistics_digest
from poe_models.posterior import BoundExpert, Posterior
from poe_models.span import SpanCoordinates, SpanStatistics

with warnings.catch_warnings():
    # ArviZ 0.23 announces its next version on its first import of the day, by a stamp in the user's cache folder.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    import arviz as az

__all__ = [
    "ChainStatistics",
    "LeaveOneOut",
    "TooFewDraws",
    "chain_statistics",
    "compare_leave_one_out",
    "leave_one_out",
    "merge_attributes",
    "to_inference_data",
]

FEWEST_CHAINS, FEWEST_DRAWS = 4, 100


class TooFewDraws(UserWarning):
    """Too few draws for R-hat and effective sample sizes to be trusted; they are computed all the same.

    Attributes:
        chains: how many chains there are.
        draws: how many draws per chain.
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
    coordinates: SpanCoordinates | None = None,
    statistics: SpanStatistics | None = None,
    *,
    modules: Sequence[str] | None = None,
    include_update: bool = False,
) -> az.InferenceData:
    r"""Everything that ArviZ can use, with named coordinates; `az.summary`, `az.plot_trace`, `to_netcdf` take it as is.

    Groups:
        ``posterior``: ``coefficients`` (module, basis) in Span coordinates; in any ``residual`` ``q_i / s_i^2``
        (module, expert) and ``distance`` ``|Z - Z_0|`` (module), on which chains of Full draws can be judged.
        ``sample_stats``: what the sampler reports (module).
        ``log_likelihood``: ``updates`` (module, expert), ``-E_i / T - log Z_i`` in nats, the density of what an expert
        sees of its update, normalised as in :func:`inference.evidence.estimate.log_normalizers`. Full posteriors only,
        because the span is made of the updates. Left out, with a warning, if an energy has no normaliser. An expert
        that says nothing adds a zero. `az.loo` and `az.compare` on it do not work: leaving out one expert of a few
        moves the posterior so far that Pareto shapes are above 0.7 nearly everywhere.
        :func:`inference.evidence.estimate.leave_one_expert_out` has the exact answer, and
        :func:`inference.evidence.designs.compare_designs` compares designs.
        ``constant_data``: ``scale_squared``, ``dimension``, ``importance``, ``anchor_precision``, ``temperature``, and
        in Span coordinates ``gram``, ``forms`` and ``mean_curvature``.

    Args:
        draws: of any sampler, or of :func:`inference.hierarchical`, which are taken alone: ``posterior`` then
        has
            ``gamma``, ``nu`` and ``weights``.
        posterior: what they are draws of.
        coordinates: of a Span posterior.
        statistics: of a Span posterior; always together with `coordinates`.
        modules: names of the modules of a Full posterior; numbered if not given.
        include_update: put every entry of Full draws into ``posterior``, as ``update`` (module, row, column).

    Attributes of the whole say what the draws are: ``coordinates_of_draws``, ``sampler``, ``temperature``, and
    where the span goes through a merge, how far their centre is from it (``merge_distance``, in standard deviations of
    the draws).

    Returns:
        An `arviz.InferenceData`.

    Raises:
        ValueError: Coordinates and statistics are not given together, or do not fit the posterior; or the posterior is
            missing, or given beside hierarchical draws.

    >>> from inference import gibbs_posterior
    >>> from poe_models import Gaussian, ProductOfExperts, span_posterior, span_statistics
    >>> poe = ProductOfExperts.of(["a", "b"], energy=Gaussian())
    >>> statistics = span_statistics(poe, torch.eye(4, dtype=torch.float64).reshape(1, 2, 2, 4), ["fc.weight"])
    >>> posterior, coordinates = span_posterior(poe, statistics)
    >>> draws = gibbs_posterior(posterior, 100, generator=torch.Generator().manual_seed(0))
    >>> data = to_inference_data(draws, posterior, coordinates, statistics)
    >>> data.groups()
    ['posterior', 'sample_stats', 'constant_data']
    >>> az.summary(data, var_names="coefficients").index.tolist()
    ['coefficients[fc.weight, a]', 'coefficients[fc.weight, b]']
    """
    if isinstance(draws, HierarchicalDraws):
        return _hierarchical_data(draws, (posterior, coordinates, statistics, modules), include_update)
    if posterior is None:
        raise ValueError("`to_inference_data(draws)`: give the posterior that they are draws of.")
    _check(posterior, coordinates, statistics, modules)
    if draws.num_chains < FEWEST_CHAINS or draws.num_draws < FEWEST_DRAWS:
        warnings.warn(TooFewDraws(draws.num_chains, draws.num_draws), stacklevel=2)
    names = statistics.modules if statistics is not None else tuple(modules or map(str, range(posterior.num_modules)))
    residuals, variables = _posterior(draws, posterior, coordinates, statistics, include_update)
    dimension = _dimensions(posterior, statistics)
    coords: dict[str, Any] = {
        "module": list(names),
        "expert": [expert.name for expert in posterior.experts],
        "basis": _basis(statistics),
    }
    data = az.from_dict(
        posterior={name: _array(value) for name, value in variables.items()},
        sample_stats={name: _array(value) for name, value in draws.stats.items()},
        log_likelihood=_log_likelihood(posterior, residuals),
        constant_data=_constants(posterior, statistics, dimension),
        coords={key: value for key, value in coords.items() if value},
        dims=_dims(draws),
    )
    data.constant_data["temperature"] = posterior.temperature  # `from_dict` makes an array of a number
    data.attrs |= _attributes(draws, posterior, coordinates, statistics)
    return data


def _hierarchical_data(draws: HierarchicalDraws, others: tuple[object, ...], include_update: bool) -> az.InferenceData:
    if include_update or any(each is not None for each in others):
        raise ValueError(
            "`to_inference_data(draws, ...)`: hierarchical draws are of scales, tails and weights, and know their "
            "modules. Give them alone; `draws.update(module, chain, draw)` makes a merged update."
        )
    data = az.from_dict(**hierarchical_groups(draws))
    data.attrs |= {"draws_of": "scales, tails and weights (Full)", "shared": draws.shared}
    return data


def _posterior(
    draws: Draws,
    posterior: Posterior,
    coordinates: SpanCoordinates | None,
    statistics: SpanStatistics | None,
    include_update: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Residuals ``(C, S, M, E)`` and the variables of the posterior group; Full draws are made again one at a time."""
    parts: dict[str, list[Tensor]] = {"residuals": [], "distance": []}
    whole = coordinates is not None or include_update
    for z in _latents(draws):
        if coordinates is not None:  # coordinates that only pad the span have draws of their own, which are no update
            z = z * (coordinates.transform != 0).any(-2).unsqueeze(-1)
        parts["residuals"].append(posterior.residuals(z.to(posterior.like)))
        away = z if posterior.center is None else z - posterior.center
        parts["distance"].append(away.double().flatten(-2).norm(dim=-1))
        if whole:
            parts.setdefault("latents", []).append(z)
    stacked = {name: _by_chain(values, draws) for name, values in parts.items()}
    scales = torch.stack([expert.scale_squared for expert in posterior.experts], -1)
    variables = {"residual": stacked["residuals"] / scales, "distance": stacked["distance"]}
    if coordinates is not None:
        assert statistics is not None
        coefficients = coordinates.coefficients(stacked["latents"])
        variables = {"coefficients": coefficients[..., _varying(statistics)], **variables}
    elif include_update:
        variables = {"update": stacked["latents"], **variables}
    return stacked["residuals"], variables


def _latents(draws: Draws) -> list[Tensor] | Any:
    """Draws chain after chain; stored ones all at once per chain."""
    if draws.regenerate is None:
        return draws.values
    return (draws.latents(chain, draw) for chain in range(draws.num_chains) for draw in range(draws.num_draws))


def _by_chain(values: list[Tensor], draws: Draws) -> Tensor:
    joined = torch.stack(values)
    return joined if draws.regenerate is None else joined.unflatten(0, (draws.num_chains, draws.num_draws))


def _log_likelihood(posterior: Posterior, residuals: Tensor) -> dict[str, np.ndarray] | None:
    """Normalised log densities of the experts' updates ``(C, S, M, E)``; None in Span, or with a warning."""
    if posterior.coordinates == "span":
        return None
    try:
        normalizers = log_normalizers(posterior)
    except ValueError as error:
        warnings.warn(f"the log_likelihood group is left out: {error}", stacklevel=3)
        return None
    temperature = posterior.fixed_temperature
    columns = [-expert.energy_of(residuals[..., i]) / temperature for i, expert in enumerate(posterior.experts)]
    return {"updates": _array(torch.stack(columns, -1) - normalizers)}


def _dimensions(posterior: Posterior, statistics: SpanStatistics | None) -> Tensor:
    """Rank of ``P_i`` on the merged update itself, ``(M, E)``."""
    if statistics is not None:
        return statistics.dimension
    return torch.stack([expert.operator.dimension() for expert in posterior.experts], -1)


def _constants(posterior: Posterior, statistics: SpanStatistics | None, dimension: Tensor) -> dict[str, np.ndarray]:
    constants = {
        "scale_squared": torch.stack([expert.scale_squared for expert in posterior.experts], -1),
        "importance": torch.tensor([expert.importance for expert in posterior.experts], dtype=torch.float64),
        "dimension": dimension,
        "anchor_precision": posterior.anchor_precision,
    }
    if statistics is not None:
        kept = _varying(statistics)
        constants["gram"] = statistics.gram[:, kept][:, :, kept]
        constants["forms"] = statistics.forms[..., kept, :][..., kept]
        constants["mean_curvature"] = statistics.mean_curvature
    return {name: _array(value) for name, value in constants.items()}


def _dims(draws: Draws) -> dict[str, list[str]]:
    dims = {
        "coefficients": ["module", "basis"],
        "update": ["module", "row", "column"],
        "residual": ["module", "expert"],
        "distance": ["module"],
        "updates": ["module", "expert"],
        "scale_squared": ["module", "expert"],
        "importance": ["expert"],
        "dimension": ["module", "expert"],
        "anchor_precision": ["module"],
        "gram": ["module", "basis", "basis_too"],
        "forms": ["module", "expert", "basis", "basis_too"],
        "mean_curvature": ["module", "expert"],
    }
    return dims | {name: ["module"] for name in draws.stats}


def _basis(statistics: SpanStatistics | None) -> list[str]:
    """Names of the coefficients."""
    return [] if statistics is None else [statistics.basis[place] for place in _varying(statistics)]


def _varying(statistics: SpanStatistics) -> list[int]:
    """Positions of the coefficients, without that of a centre that is zero everywhere, which is always zero."""
    center = len(statistics.updates)
    centered = bool((statistics.gram[:, center, center] > 0).any())
    return [place for place in range(len(statistics.basis)) if place != center or centered]


def _attributes(
    draws: Draws, posterior: Posterior, coordinates: SpanCoordinates | None, statistics: SpanStatistics | None
) -> dict[str, str | float]:
    """What netCDF can keep: text and numbers."""
    attributes: dict[str, str | float] = {
        "draws_of": "merged updates (Full)" if statistics is None else "coefficients (Span)",
        "coordinates_of_draws": "full" if statistics is None else "span",
        "sampler": draws.sampler or "unknown",
        "temperature": posterior.fixed_temperature,
        "energies": "; ".join(f"{expert.name}: {_plain(expert)}" for expert in posterior.experts),
    }
    if statistics is not None:
        attributes["residual_maps"] = "; ".join(statistics.residual_maps)
        attributes["statistics_digest"] = statistics_digest(statistics)
        attributes["around"] = "the MAP of the span" if statistics.through is None else "the merge"
        assert coordinates is not None
        named = SpanDraws.of(draws, coordinates, statistics)
        if named.from_merge is not None:
            attributes |= merge_attributes(named.from_merge)
    return attributes


def merge_attributes(found: MergeDistance) -> dict[str, str | float]:
    """How far draws are from the merge, as attributes of their InferenceData.

    Args:
        found: the distances of all modules.

    Returns:
        The largest with its module, and the mean over modules, in standard deviations of the draws.
    """
    return {
        "merge_distance": found.worst,
        "merge_distance_module": found.where,
        "merge_distance_mean": found.typical,
        "merge_displacement_share": found.share,
    }


def _plain(expert: BoundExpert) -> str:
    """An energy as text; settings that are tensors over modules by their shape."""
    names: list[str] = [field.name for field in fields(expert.rho)] if is_dataclass(expert.rho) else []
    shown = {name: getattr(expert.rho, name) for name in names}
    texts = [f"{k}={f'tensor {tuple(v.shape)}' if isinstance(v, Tensor) else v!r}" for k, v in shown.items()]
    return f"{type(expert.rho).__name__}({', '.join(texts)})"


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().cpu().numpy()
    return array


def _check(
    posterior: Posterior,
    coordinates: SpanCoordinates | None,
    statistics: SpanStatistics | None,
    modules: Sequence[str] | None,
) -> None:
    if (coordinates is None) != (statistics is None):
        raise ValueError(
            "`to_inference_data(...)`: a Span posterior needs both `coordinates` and `statistics`: what "
            "`span_posterior` returned beside it, and what it was made from. A Full posterior needs neither."
        )
    names = statistics.modules if statistics is not None else modules
    if names is not None and len(names) != posterior.num_modules:
        raise ValueError(
            f"`to_inference_data(...)`: {len(names)} names for {posterior.num_modules} modules of the posterior. Give "
            "the statistics that it was made from, or one name for each module."
        )


@dataclass(frozen=True, eq=False)
class ChainStatistics:
    """What ArviZ says about chains of each quantity; float64 arrays of the quantities' shape.

    Attributes:
        r_hat: rank-normalised split R-hat (Vehtari et al., 2021); nan with one chain or for a constant.
        ess_bulk: effective sample size of the bulk.
        ess_tail: that of the 5 % and 95 % quantiles.
        mean: mean over all draws.
        sd: standard deviation over all draws.
        mcse_mean: Monte Carlo standard error of the mean.
    """

    r_hat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    mcse_mean: np.ndarray


def chain_statistics(values: np.ndarray) -> ChainStatistics:
    """R-hat, effective sample sizes and Monte Carlo errors.

    Args:
        values: ``(chain, draw, *shape)``.

    Returns:
        One number for each quantity; nan where ArviZ gives none (constants, values that are not finite, one chain).

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


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Pareto-smoothed importance sampling leave-one-out (Vehtari et al., 2017, arXiv 1507.04544), in nats.

    Attributes:
        pointwise: expected log predictive density of every value given the others, ``(n,)``.
        pareto_k: shape of the tail of every value's importance weights, ``(n,)``.
        good_k: above it a value's density is not reliable with so many draws.
        parameters: effective number of parameters.
    """

    pointwise: np.ndarray
    pareto_k: np.ndarray
    good_k: float
    parameters: float
    source: az.ELPDData

    @property
    def elpd(self) -> float:
        """Summed expected log predictive density."""
        return float(self.pointwise.sum())

    @property
    def unreliable(self) -> int:
        """How many values have a Pareto k above `good_k`."""
        return int((self.pareto_k > self.good_k).sum())


def leave_one_out(log_likelihood: np.ndarray) -> LeaveOneOut:
    """PSIS-LOO of independent draws.

    Args:
        log_likelihood: Nats of every draw and value, ``(draws, n)``.

    Returns:
        The leave-one-out densities.

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
    return LeaveOneOut(pointwise, k, float(result.good_k), float(result.p_loo), result)


def compare_leave_one_out(results: Mapping[str, LeaveOneOut]) -> dict[str, dict[str, float]]:
    """`az.compare` of models of the same values, the best first.

    Args:
        results: Name to leave-one-out densities.

    Returns:
        Name to ``elpd``, its standard error ``error``, the ``difference`` to the best (zero or above), the standard
        error of that ``difference_error``, and the stacking ``weight``.

    >>> noise = 1e-3 * np.random.default_rng(0).normal(size=(2, 200, 3))
    >>> models = {"good": leave_one_out(noise[0] - 1), "poor": leave_one_out(noise[1] - 2)}
    >>> {name: round(row["difference"], 2) for name, row in compare_leave_one_out(models).items()}
    {'good': 0.0, 'poor': 3.0}
    """
    if len(results) == 1:
        ((name, only),) = results.items()
        error = float(np.sqrt(len(only.pointwise) * only.pointwise.var()))
        return {name: {"elpd": only.elpd, "error": error, "difference": 0.0, "difference_error": 0.0, "weight": 1.0}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The inplace keyword")  # ArviZ 0.x on a newer pandas
        table = az.compare({name: result.source for name, result in results.items()})
    columns = {
        "elpd": "elpd_loo", "error": "se", "difference": "elpd_diff", "difference_error": "dse", "weight": "weight",
    }  # fmt: skip
    return {str(name): {new: float(row[old]) for new, old in columns.items()} for name, row in table.iterrows()}
