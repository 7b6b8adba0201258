"""A point of a span as the designs of a merge, so that it is written as every other merge is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from inference.functional.span_model import SpanModel
from inference.models.averages import Average, ModelDesigns
from inference.models.method_design import MethodDesign
from poe_models.methods import MergingMethod, ModuleBatch
from poe_models.methods.method import About

if TYPE_CHECKING:
    from inference.models.method_design import AnyDesign


@dataclass(frozen=True, eq=False, repr=False)
class FunctionalMerge(MergingMethod):
    """The merge at the coefficients of a fit with functional experts.

    Args:
        model: The span.
        coefficients: Of the merge, ``(M, K)``.
    """

    model: SpanModel
    coefficients: Tensor
    about = About(
        "functional experts",
        "the project's own: predictions on unlabelled inputs as experts beside those in weight space",
        scope="model",
        data="inputs",
    )

    @property
    @override
    def ready(self) -> bool:
        return True

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        if batch.experts != self.model.names:
            raise ValueError(
                f"`FunctionalMerge`: coefficients on {', '.join(self.model.names)}, and updates of "
                f"{', '.join(batch.experts)}. Give the task vectors of the model."
            )
        return torch.stack([self.model.update(self.coefficients, name, batch.updates[0, 0]) for name in batch.names])

    @override
    def __repr__(self) -> str:
        values = self.coefficients.detach().cpu().double().contiguous()
        return f"FunctionalMerge(coefficients={hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]})"


def merge_designs(model: SpanModel, coefficients: Tensor) -> ModelDesigns[AnyDesign]:
    """Designs of all tensors for ``merge_checkpoint``: the merge at some coefficients of a span.

    Args:
        model: The span.
        coefficients: ``(M, K)``, for instance ``posterior.coefficients(fit(...).value)``.

    Returns:
        The designs; averaged tensors follow their module as in :meth:`SpanModel.weights`.
    """
    design = MethodDesign(FunctionalMerge(model, coefficients.detach()))

    def average(tensor: str) -> Average:
        shares = tuple(model.shares(coefficients.detach(), tensor).tolist())
        if sum(shares) == 0:
            raise ValueError(f"`merge_designs(...)`: the coefficients of {tensor!r} sum to zero. Move one a little.")
        return Average(shares, sum(shares))

    return ModelDesigns(lambda tensor: design, average)
