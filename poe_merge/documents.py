"""Output of commands for programs: one JSON document each, with the fields that ``docs/json.md`` lists."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.predictions.functional_score import FunctionalScore
    from diagnostics.predictions.model_scores import ModelScores
    from inference.models.plan import Plan
    from poe_models.methods import MergingMethod
    from poe_models.methods.checking import Report
    from poe_models.weights.task_vectors import TaskVectors


def show(document: Mapping[str, Any]) -> None:
    """Print a document to stdout; numbers that are not finite are null."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plan(planned: Plan, task_vectors: TaskVectors, seconds: float | None) -> dict[str, Any]:
    """The treatment of every tensor, and the costs of a merge, its time in seconds included."""
    tensors = [
        {
            "name": tensor.name,
            "aliases": tensor.aliases,
            "shape": tensor.shape,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "action": tensor.treatment.action,
            "view": None if tensor.treatment.view is None else str(tensor.treatment.view),
            "reason": tensor.treatment.reason,
            "matrices": tensor.matrices,
            "design": None if tensor.design is None else planned.designs.index(tensor.design),
        }
        for tensor in planned.tensors
    ]
    return {
        "base": task_vectors.base.source,
        "experts": task_vectors.names,
        "merged": planned.reach,
        "tensors": tensors,
        "designs": [design.describe() for design in planned.designs],
        "count": {action: planned.count(action) for action in ("merge", "average", "base")},
        "share": {action: planned.share(action) for action in ("merge", "average", "base")},
        "modules": planned.modules,
        "seconds": seconds,
        "peak_bytes": planned.peak_bytes,
        "read_bytes": planned.read_bytes,
        "write_bytes": planned.write_bytes,
        "disk_bytes": planned.disk_bytes,
        "files": [shard.file for shard in planned.shards],
    }


def check(report: Report) -> dict[str, Any]:
    """The outcome of every property, and whether a promised one is broken."""
    return {"broken": len(report.broken), "outcomes": [vars(outcome) for outcome in report.outcomes]}


def scores(found: ModelScores) -> dict[str, Any]:
    """The scores of models on tasks, a row for each model, task and metric."""
    rows = found.to_dataframe().to_dict("records")
    return {"confidence": found.confidence, "reference": found.reference, "examples": found.examples, "scores": rows}


def divergences(found: FunctionalScore) -> dict[str, Any]:
    """The functional scores of models, the nearest to the experts first."""
    rows = [
        {
            "model": model,
            **_estimate(found.mean(model)),
            "tasks": {task: _estimate(found.on_task(model, task)) for task in found.tasks},
        }
        for model in found.ranking
    ]
    return {"confidence": found.confidence, "divergences": rows}


def _estimate(each: Any) -> dict[str, float]:
    return {"kl": each.value, "low": each.low, "high": each.high, "error": each.error}


def methods(known: Mapping[str, type[MergingMethod]]) -> dict[str, Any]:
    """The merging methods: what they see and need, and whom to cite."""
    rows = [
        {
            "name": name,
            "title": method.about.title,
            "citation": method.about.citation,
            "sees": method.about.scope,
            "needs": method.about.data,
            "streams": method.about.streaming,
            "random": method.about.random,
            "matrices": method.about.matrices,
        }
        for name, method in known.items()
    ]
    return {"methods": rows}
