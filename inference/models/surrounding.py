"""The distance of draws from a merge, by the weights themselves: of any draws, and of any merge of the same modules."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.gibbs import GibbsKernel
from inference.merge_distance import MergeDistance, displacement_of, spread_along, squared_error
from inference.models.design import Design, Designs, as_function
from inference.models.model_draws import FullDraws, PosteriorDraws, SpanDraws
from inference.models.modules import Module, merged_update, module_names, read_modules
from poe_models.sums import sum_of_squares
from poe_models.weights.loading import Checkpoint, open_checkpoint
from poe_models.weights.task_vectors import Source, TaskVectors

SIGMAS = 5.0
"""Standard deviations of the squared rounding error that are allowed for, beyond its mean."""
MOST = 32
"""Draws that are made again to find the centre and spread of Full ones."""


def distance_from_merge(
    draws: PosteriorDraws, task_vectors: TaskVectors, design: Designs, merged: Source | None = None
) -> MergeDistance:
    """Measure the distance of draws from a merge, module by module.

    Args:
        draws: Of a whole model, or of some of its modules.
        task_vectors: Base and experts.
        design: One product or design for all tensors, or a function from the name of a merged tensor.
        merged: A merged checkpoint, whose rounding is allowed for; by default what the design's merge is.

    Returns:
        The distance of every module of the draws, in their order.
    """
    folder = None if merged is None else open_checkpoint(merged, base=task_vectors.base)
    for_tensor, found = as_function(design), {}
    for tensor in task_vectors.treatments:
        names = module_names(task_vectors, tensor)
        if set(names).isdisjoint(draws.modules):
            continue
        here = for_tensor(tensor)
        modules = read_modules(task_vectors, tensor, here)
        blocks = None if folder is None else _blocks(task_vectors, tensor, folder)
        for index, module in enumerate(modules):
            if module.name not in draws.modules:
                continue
            if blocks is None or here.scaling == 0:
                merge, error = merged_update(module, here), 0.0
            else:
                merge, error = _written(module, blocks[index], here, folder_dtype(folder, tensor))
            found[module.name] = distance_of_module(draws, module, merge, error)
    return MergeDistance.joined([found[name] for name in draws.modules])


def distance_of_module(draws: PosteriorDraws, module: Module, merge: Tensor, error: float = 0.0) -> MergeDistance:
    """Distance of the draws of one module from a merged update, whose values have a known squared error."""
    if isinstance(draws, SpanDraws):
        return _span(draws, module, merge, error)
    if draws.independent:
        return _around_mode(draws, module, merge, error)
    posterior = draws.posterior(module)
    weights = draws.weights.flatten(0, 1)[:, draws.index(module.name), : len(posterior.experts)]
    return gibbs_distance(module.name, GibbsKernel(posterior), weights, merge, error)


def gibbs_distance(name: str, kernel: GibbsKernel, weights: Tensor, merge: Tensor, error: float = 0.0) -> MergeDistance:
    """Distance of Full draws of one module by the means and variances of ``Z`` given their mixture weights ``(S, E)``.

    Given these ``Z`` is Gaussian, so that neither its centre nor its spread has the noise of all its entries
    (Rao-Blackwell): what is left of the Monte Carlo error is that of a few weights, of at most ``MOST`` draws.
    """
    places = torch.linspace(0, len(weights) - 1, min(MOST, len(weights))).round().long()
    some = weights[places].to(kernel.posterior.anchor_precision).unsqueeze(1)
    mean = torch.stack([kernel.conditional_mean(each).double() for each in some]).mean(0)[0]
    away = mean - merge.double()
    squared = sum_of_squares(away)
    direction = (away / squared.clamp(min=torch.finfo(torch.float64).tiny).sqrt()).to(merge).unsqueeze(0)
    deviations, inside = [], []
    for each in some:
        moved = kernel.conditional_mean(each)[0].double() - mean
        deviations.append(torch.stack([(moved * direction[0]).sum(), moved.square().sum()]))
        inside.append(kernel.conditional_variance(each, direction)[0])
    along, total = torch.stack(deviations).unbind(-1)
    count = max(len(some) - 1, 1)
    variance = torch.stack(inside).mean() + along.square().sum() / count
    squared_errors = total.sum() / (count * len(some)) + error
    return _one(name, squared, squared_errors, variance.sqrt(), merge)


def folder_dtype(folder: Checkpoint | None, tensor: str) -> torch.dtype:
    """Dtype that a tensor of a merged checkpoint was rounded to."""
    assert folder is not None
    return folder.tensors[folder.aliases.get(tensor, tensor)].dtype


def _span(draws: SpanDraws, module: Module, merge: Tensor, error: float) -> MergeDistance:
    coefficients = draws.coefficients[:, :, [draws.index(module.name)]]
    basis = _basis(draws, module)
    gram = torch.stack([torch.stack([_inner(one, other) for other in basis]) for one in basis]).unsqueeze(0).cpu()
    away = draws.combined(module, coefficients.mean((0, 1))[0]).double() - merge.double()
    squared = sum_of_squares(away)
    direction = away / squared.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    along = torch.stack([_inner(each, direction) for each in basis]).unsqueeze(0).cpu()
    squared_errors = squared_error(coefficients, gram)[0] + error
    return _one(module.name, squared.cpu(), squared_errors, spread_along(coefficients, along)[0], merge)


def _around_mode(draws: FullDraws, module: Module, merge: Tensor, error: float) -> MergeDistance:
    """Distance of draws whose mean is the mode itself: Laplace's, and noise around it."""
    away = module.mode.double() - merge.double()
    squared = sum_of_squares(away)
    along = away if bool(squared > 0) else merge.double()  # at the merge itself, how wide they are along it
    places = torch.linspace(0, len(draws) - 1, min(MOST, len(draws))).round().long().tolist()
    made = [_inner(draws.update(module, place).double() - module.mode.double(), along) for place in places]
    spread = torch.stack(made).square().mean().sqrt() / along.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return _one(module.name, squared, torch.as_tensor(error, dtype=torch.float64), spread, merge)


def _one(name: str, squared: Tensor, error: Tensor, spread: Tensor, merge: Tensor) -> MergeDistance:
    length = sum_of_squares(merge).sqrt()
    values = (displacement_of(squared, error.to(squared), length), spread.to(squared), length)
    return MergeDistance((name,), *(value.double().cpu().reshape(1) for value in values))


def _basis(draws: SpanDraws, module: Module) -> list[Tensor]:
    center = module.center
    parts = [*module.updates, torch.zeros_like(module.updates[0]) if center is None else center]
    return [*parts, module.mode] if draws.through_merge else parts


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() * other.double()).sum()


def _blocks(task_vectors: TaskVectors, tensor: str, folder: Checkpoint) -> list[Tensor]:
    view = task_vectors.treatments[tensor].view
    assert view is not None
    return view.split(folder.read(tensor).to(task_vectors.dtype))


def _written(module: Module, block: Tensor, design: Design, dtype: torch.dtype) -> tuple[Tensor, float]:
    """``Z_*`` of merged weights, and a bound on the squared error that rounding them to their dtype has made."""
    weights = block.to(module.base)
    squares = _spacing(weights, dtype).square()
    mean, deviation = squares.sum() / 12, (squares.square().sum() / 180).sqrt()  # of squares of uniform errors
    return (weights - module.base) / design.scaling, float(mean + SIGMAS * deviation) / design.scaling**2


def _spacing(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of a dtype, float64; rounding errors are uniform over it, about the weight."""
    exponents = torch.frexp(weights.double())[1]  # the mantissa is in [1/2, 1)
    return torch.where(weights == 0, 0.0, torch.finfo(dtype).eps / 2 * exponents.double().exp2())
