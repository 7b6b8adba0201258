"""Draws as groups of named arrays by ArviZ's names, for the adapter; nothing here imports ArviZ."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.draws import Draws
from inference.evidence.estimate import log_normalizers
from inference.hierarchical.sampler import HierarchicalDraws
from inference.merge_distance import MergeDistance
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.statistics_files import statistics_digest
from poe_models.posterior import BoundExpert, Posterior
from poe_models.span import SpanStatistics

DIMS = {
    "coefficients": ["module", "basis"],
    "update": ["module", "row", "column"],
    "residual": ["module", "expert"],
    "log_weight": ["module", "expert"],
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


def hierarchical_groups(draws: HierarchicalDraws) -> dict[str, Any]:
    """Groups, coordinates and dimensions of draws of scales and tails by :func:`inference.hierarchical`.

    Returns:
        ``posterior``: ``gamma`` and ``nu``, with a dimension ``expert`` or ``module`` if each has its own, and
        ``weights`` (module, expert). ``sample_stats``: ``diverging``. ``constant_data``: ``anchor_precision`` (module).
    """
    own = {"model": [], "expert": ["expert"], "module": ["module"]}[draws.shared]
    variables = {"gamma": draws.gamma, "nu": draws.nu, "weights": draws.weights}
    return {
        "posterior": {name: _array(value) for name, value in variables.items() if value is not None},
        "sample_stats": {"diverging": _array(draws.diverging)},
        "constant_data": {"anchor_precision": _array(draws.eta)},
        "coords": {"module": list(draws.modules), "expert": list(draws.experts)},
        "dims": {"gamma": own, "nu": own, "weights": ["module", "expert"], "anchor_precision": ["module"]},
    }


def full_groups(draws: FullDraws) -> dict[str, Any]:
    """Groups, coordinates and dimensions of Full draws of a whole model, of the numbers that they are kept as.

    Returns:
        ``posterior``: ``log_weight`` (module, expert), nan where a module has no such expert, or its update is zero.
        ``sample_stats``: what the sampler reports (module).

    Raises:
        ValueError: If they have no mixture weights, as Laplace's and noise, of which a seed is kept.
    """
    if draws.independent:
        raise ValueError(
            f"`to_inference_data(FullDraws)`: {draws.sampler} draws are kept as their seeds, and have no numbers for "
            "ArviZ. Draw by Gibbs sampling, or in Span coordinates."
        )
    names, logs, _ = log_weights(draws)
    return {
        "posterior": {"log_weight": _array(logs)},
        "sample_stats": {name: _array(value) for name, value in draws.stats.items()},
        "coords": {"module": list(draws.modules), "expert": names},
        "dims": DIMS | {name: ["module"] for name in draws.stats},
    }


def full_attributes(draws: FullDraws) -> dict[str, str | float]:
    """Version, designs, sampler, coordinates, temperature and distance from the merge, for netCDF."""
    texts = dict.fromkeys(_recorded_text(json.loads(text)["experts"]) for text in draws.designs)
    attributes: dict[str, str | float] = {
        "poe_merge_version": version("poe-merge"),
        "draws_of": "log mixture weights (Full)",
        "coordinates_of_draws": draws.kind,
        "sampler": draws.sampler or "unknown",
        "design": " | ".join(texts),
        "around": "the merge",
    }
    attributes |= {"temperature": draws.temperatures[0]} if len(draws.temperatures) == 1 else {}
    return attributes | ({} if draws.from_merge is None else merge_attributes(draws.from_merge))


def log_weights(draws: FullDraws) -> tuple[list[str], Tensor, Tensor]:
    """Names of all experts, the logs of their mixture weights ``(C, S, M, E)``, and the mask ``(M, E)`` of the nan.

    These are the experts that a module does not have, or whose update is zero.
    """
    by_module = [[each["name"] for each in json.loads(text)["experts"]] for text in draws.designs]
    names = list(dict.fromkeys(name for own in by_module for name in own))
    weights = draws.weights.new_zeros(*draws.weights.shape[:3], len(names))
    for module, own in enumerate(by_module):
        weights[:, :, module, [names.index(name) for name in own]] = draws.weights[:, :, module, : len(own)]
    silent = (weights == 0).all(0).all(0)
    return names, torch.where(silent, math.nan, weights.double().log()), silent


def posterior_groups(draws: Draws, posterior: Posterior, include_update: bool) -> dict[str, Any]:
    """Groups, coordinates and dimensions of draws of merged updates; arguments as for ``to_inference_data``.

    Returns:
        ``posterior``, ``sample_stats``, ``log_likelihood`` (None in Span coordinates, or with a warning where an energy
        has no normaliser) and ``constant_data``, with ``coords`` and ``dims``.
    """
    statistics = None if posterior.span is None else posterior.span.statistics
    residuals, variables = _variables(draws, posterior, include_update)
    coords = {"module": list(posterior.modules), "expert": [expert.name for expert in posterior.experts]}
    if statistics is not None:
        coords["basis"] = [statistics.basis[place] for place in _varying(statistics)]
    return {
        "posterior": {name: _array(value) for name, value in variables.items()},
        "sample_stats": {name: _array(value) for name, value in draws.stats.items()},
        "log_likelihood": _log_likelihood(posterior, residuals),
        "constant_data": _constants(posterior, statistics),
        "coords": coords,
        "dims": DIMS | {name: ["module"] for name in draws.stats},
    }


def posterior_attributes(draws: Draws, posterior: Posterior) -> dict[str, str | float]:
    """Version, design, sampler, coordinates, temperature and distance from the merge, for netCDF."""
    statistics = None if posterior.span is None else posterior.span.statistics
    attributes: dict[str, str | float] = {
        "poe_merge_version": version("poe-merge"),
        "draws_of": "merged updates (Full)" if statistics is None else "coefficients (Span)",
        "coordinates_of_draws": "full" if statistics is None else "span",
        "sampler": draws.sampler or "unknown",
        "temperature": posterior.fixed_temperature,
        "design": _design_text(posterior),
    }
    if statistics is not None:
        attributes["statistics_digest"] = statistics_digest(statistics)
        attributes["around"] = "the MAP of the span" if statistics.through is None else "the merge"
        named = SpanDraws.of(draws, posterior)
        attributes |= {} if named.from_merge is None else merge_attributes(named.from_merge)
    return attributes


def hierarchical_attributes(draws: HierarchicalDraws) -> dict[str, str | float]:
    """Version, what was drawn, and what shares a scale, for netCDF."""
    return {
        "poe_merge_version": version("poe-merge"),
        "draws_of": "scales, tails and weights (Full)",
        "coordinates_of_draws": "full",
        "sampler": "nuts",
        "shared": draws.shared,
    }


def merge_attributes(found: MergeDistance) -> dict[str, str | float]:
    """Distance of draws from the merge: largest with its module, and mean over modules, in standard deviations."""
    return {
        "merge_distance": found.worst,
        "merge_distance_module": found.where,
        "merge_distance_mean": found.typical,
        "merge_displacement_share": found.share,
    }


def _variables(draws: Draws, posterior: Posterior, include_update: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Residuals ``(C, S, M, E)`` and the variables of the posterior group; Full draws are made again one at a time."""
    parts: dict[str, list[Tensor]] = {"residuals": [], "distance": [], "latents": []}
    span = posterior.span
    for z in _latents(draws):
        if span is not None:  # coordinates that only pad the span have draws of their own, which are no update
            z = z * span.known.unsqueeze(-1)
        parts["residuals"].append(posterior.residuals(z.to(posterior.like)))
        away = z if posterior.center is None else z - posterior.center
        parts["distance"].append(away.double().flatten(-2).norm(dim=-1))
        if span is not None or include_update:
            parts["latents"].append(z)
    stacked = {name: _by_chain(values, draws) for name, values in parts.items() if values}
    variables = {"residual": stacked["residuals"] / _scales(posterior), "distance": stacked["distance"]}
    if span is not None:
        coefficients = span.coefficients(stacked["latents"])
        variables = {"coefficients": coefficients[..., _varying(span.statistics)], **variables}
    elif include_update:
        variables = {"update": stacked["latents"], **variables}
    return stacked["residuals"], variables


def _latents(draws: Draws) -> Iterable[Tensor]:
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
        warnings.warn(f"the log_likelihood group is left out: {error}", stacklevel=4)
        return None
    temperature = posterior.fixed_temperature
    columns = [-expert.energy_of(residuals[..., i]) / temperature for i, expert in enumerate(posterior.experts)]
    return {"updates": _array(torch.stack(columns, -1) - normalizers)}


def _constants(posterior: Posterior, statistics: SpanStatistics | None) -> dict[str, np.ndarray]:
    constants = {
        "scale_squared": _scales(posterior),
        "importance": torch.tensor([expert.importance for expert in posterior.experts], dtype=torch.float64),
        "anchor_precision": posterior.anchor_precision,
    }
    if statistics is None:
        constants["dimension"] = torch.stack([expert.operator.dimension() for expert in posterior.experts], -1)
    else:  # an operator in Span coordinates has the rank of the span; the merged update's own is in the statistics
        kept = _varying(statistics)
        constants["dimension"] = statistics.dimension
        constants["gram"] = statistics.gram[:, kept][:, :, kept]
        constants["forms"] = statistics.forms[..., kept, :][..., kept]
        constants["mean_curvature"] = statistics.mean_curvature
    return {name: _array(value) for name, value in constants.items()}


def _scales(posterior: Posterior) -> Tensor:
    """``s_i^2``, ``(M, E)``; nan for experts that a group of fewer modules than others does not have."""
    scales = torch.stack([expert.scale_squared for expert in posterior.experts], -1)
    if posterior.span is None:
        return scales
    return scales.where(~posterior.span.statistics.mean_curvature.isnan(), math.nan)


def _varying(statistics: SpanStatistics) -> list[int]:
    """Positions of the coefficients, without that of a centre that is zero everywhere, which is always zero."""
    center = len(statistics.updates)
    centered = bool((statistics.gram[:, center, center] > 0).any())
    return [place for place in range(len(statistics.basis)) if place != center or centered]


def _design_text(posterior: Posterior) -> str:
    """Residual map (in Full coordinates the kind of its operator), energy and importance of each expert."""
    experts = posterior.experts
    maps = [type(each.operator).__name__ for each in experts]
    maps = maps if posterior.span is None else list(posterior.span.statistics.residual_maps)
    told = zip(experts, maps, strict=True)
    return "; ".join(f"{e.name}: {kind}, {_energy_text(e)}, importance {e.importance:g}" for e, kind in told)


def _recorded_text(experts: Iterable[dict[str, Any]]) -> str:
    """Residual map, energy and importance of each expert of a design as draws have it."""
    told = [(each["name"], each["residual_map"], each["energy"], each["importance"]) for each in experts]
    return "; ".join(f"{name}: {kind}, {energy}, importance {weight:g}" for name, kind, energy, weight in told)


def _energy_text(expert: BoundExpert) -> str:
    """An energy as text; settings that are tensors over modules by their shape."""
    names: list[str] = [each.name for each in fields(expert.rho) if each.init] if is_dataclass(expert.rho) else []
    shown = {name: getattr(expert.rho, name) for name in names}
    texts = [f"{k}=tensor {tuple(v.shape)}" if isinstance(v, Tensor) else f"{k}={v!r}" for k, v in shown.items()]
    return f"{type(expert.rho).__name__}({', '.join(texts)})"


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().cpu().numpy()
    return array
