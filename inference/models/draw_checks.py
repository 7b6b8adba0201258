"""Checks that draws belong to the designs of an ensemble, from names and settings before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping

from inference.models.design import Design, design_text
from inference.models.full_draws import warn_of_changes
from inference.models.method_design import AnyDesign, MethodDesign
from inference.models.method_draws import MethodDraws, method_text
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from poe_models.span_labels import merge_label
from poe_models.weights.task_vectors import TaskVectors


def check_designs(draws: ModelDraws, designs: Mapping[str, AnyDesign], task_vectors: TaskVectors) -> None:
    """Refuse draws that cannot be made into members under the designs of their modules, given in their order.

    Raises:
        ValueError: If they are of other designs; says how they differ.
    """
    if isinstance(draws, MethodDraws):
        return _check_methods(draws, designs, task_vectors)
    products: dict[str, Design] = {}
    for name, design in designs.items():
        if isinstance(design, MethodDesign):
            raise ValueError(
                f"`MergedEnsemble(...)`: {name!r} was drawn from a posterior, and the design merges it by "
                f"{design.method!r}. Give the product that it was drawn from, or draw seeds: `MethodDraws.of`."
            )
        products[name] = design
    if isinstance(draws, SpanDraws):
        _check_order(draws, products)
    _check_merge(draws, products)
    if isinstance(draws, FullDraws):
        _check_full(draws, products, task_vectors)


def _check_methods(draws: MethodDraws, designs: Mapping[str, AnyDesign], task_vectors: TaskVectors) -> None:
    """Refuse seeds of another method, or of other experts."""
    if draws.experts != task_vectors.names:
        raise ValueError(
            f"`MergedEnsemble(...)`: the draws are merges of {', '.join(draws.experts)}, the task vectors are "
            f"{', '.join(task_vectors.names)}. Give the experts of the draws, in their order."
        )
    texts: dict[int, str] = {}
    for (name, design), text in zip(designs.items(), draws.designs, strict=True):
        if isinstance(design, MethodDesign) and id(design) not in texts:
            texts[id(design)] = method_text(design, task_vectors)
        if texts.get(id(design)) != text:
            now = repr(design.method) if isinstance(design, MethodDesign) else "a product of experts"
            raise ValueError(
                f"`MergedEnsemble(...)`: {name!r} was drawn by {json.loads(text)['method']}, and is merged by {now} "
                "here. Give the method of the draws, with what it was given or has learned; only its seed may differ."
            )


def _check_merge(draws: ModelDraws, designs: Mapping[str, Design]) -> None:
    """Refuse draws around another point than the merge of their design."""
    where = {"full": "the MAP in Full coordinates", "span": "the MAP in Span coordinates"}
    for name in draws.modules:
        merged = designs[name].coordinates
        if merged != draws.surrounds:
            raise ValueError(
                f"`MergedEnsemble(...)`: the draws of {name!r} are around {where[draws.surrounds]}, the design's "
                f"merge is {where[merged]}, which may lie far away (`distance_from_merge` says how far). Draw "
                "around it (`collect_statistics(task_vectors, design)` or `sample_full`), or give a `Design` with "
                f"coordinates={draws.surrounds!r}."
            )
    if isinstance(draws, SpanDraws):
        for name, text in zip(draws.modules, draws.designs, strict=False):
            if merge_label(designs[name].poe) != text:
                raise ValueError(
                    f"`MergedEnsemble(...)`: the draws of {name!r} go through the merge of another design ({text}; "
                    f"here it is {merge_label(designs[name].poe)}). Give the design that they were drawn with."
                )


def _check_order(draws: SpanDraws, designs: Mapping[str, Design]) -> None:
    """Refuse coefficients on other task vectors, or on the same in another order."""
    for name in draws.modules:
        names = designs[name].poe.update_names
        if names != draws.updates:
            raise ValueError(
                f"`MergedEnsemble(...)`: the draws of {name!r} are coefficients on {', '.join(draws.updates)}, the "
                f"design is about {', '.join(names)}. Give the experts of the draws, in their order."
            )


def _check_full(draws: FullDraws, designs: Mapping[str, Design], task_vectors: TaskVectors) -> None:
    """Refuse Full draws whose seeds would give other numbers under these designs, dtype or device."""
    dtype = str(task_vectors.dtype).removeprefix("torch.")
    if draws.environment["dtype"] != dtype:
        raise ValueError(
            f"`MergedEnsemble(...)`: Full draws made in {draws.environment['dtype']} are other draws in {dtype}. "
            f"Open the task vectors with `dtype=torch.{draws.environment['dtype']}`."
        )
    if draws.environment["device"] != task_vectors.device.type:
        warn_of_changes(draws.environment, task_vectors.device)
    for name, text in zip(draws.modules, draws.designs, strict=True):
        if design_text(designs[name], solver=draws.uses_modes) != text:
            what = "experts, anchor or solver" if draws.uses_modes else "experts or anchor"
            raise ValueError(
                f"`MergedEnsemble(...)`: {name!r} was drawn under another design ({what}), and Full draws are made "
                "again under the one they have. Give the design that they were drawn with."
            )
