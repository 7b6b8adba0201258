"""What a merged folder has beside its weights: config and tokenizer, index, model card, and the record of the merge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from inference.models.plan import Plan
from inference.models.staging import Staging
from poe_models.weights.loading import Checkpoint

RECORD = "poe_merge.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".index.json")
_OURS = ("README.md", RECORD, "merge_state.json", "adapter_config.json")
_LARGEST = 100 * 2**20
_HUB_FOLDER = re.compile(r"models--([^/\\]+)--([^/\\]+)")
_CITATIONS = """\
```bibtex
@inproceedings{bui2026poe,
  title     = {Model Merging as Probabilistic Inference in Fine-Tuning Parameter Space},
  author    = {Bui and others},
  booktitle = {Uncertainty in Artificial Intelligence},
  year      = {2026},
  note      = {arXiv:2607.01689}
}
@article{li2026bmm,
  title   = {Bayesian Model Merging},
  author  = {Li and others},
  year    = {2026},
  journal = {arXiv:2605.12843}
}
```
"""


def companion_files(base: Checkpoint) -> list[tuple[Path, str]]:
    """Config, tokenizer and other small files of the base's folder, with their names in it; no weights.

    A subfolder comes along if it holds small files only (a pooling config, say).

    Args:
        base: The base; one that is no folder has none.

    Returns:
        Pairs of a path and the name to copy it to.
    """
    folder = Path(base.source)
    if not base.files or not folder.is_dir():
        return []
    found = [(path, path.name) for path in sorted(folder.iterdir()) if path.is_file() and _small(path)]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(inner.iterdir())
        if all(path.is_file() and _small(path) for path in files):
            found += [(path, f"{inner.name}/{path.name}") for path in files]
    return found


def _small(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in _OURS
    return not hidden and not path.name.endswith(_WEIGHTS) and path.stat().st_size <= _LARGEST


def write_companions(
    staging: Staging, base: Checkpoint, plan: Plan, out_dtype: torch.dtype | None, record: Mapping[str, Any]
) -> None:
    """Write everything but the weights.

    Args:
        staging: The folder being written.
        base: The base.
        plan: What was merged.
        out_dtype: Dtype asked for; None if the base's was kept.
        record: What goes to `poe_merge.json`.
    """
    for path, name in companion_files(base):
        staging.copy(path, name)
    if out_dtype is not None and base.config is not None:
        staging.write_json("config.json", _with_dtype(base.config, str(out_dtype).removeprefix("torch.")))
    if len(plan.shards) > 1:
        staging.write_json("model.safetensors.index.json", _index(plan))
    staging.write_json(RECORD, record)
    staging.write_text("README.md", str(model_card(base, plan, record)))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype entries, those of its parts included, say what is in the weights."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, Mapping) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def _index(plan: Plan) -> dict[str, Any]:
    names = {t.name: shard.file for shard in plan.shards for group in shard.groups for t in group.tensors}
    names |= {alias: shard.file for shard in plan.shards for alias in shard.aliases}
    return {"metadata": {"total_size": plan.write_bytes}, "weight_map": dict(sorted(names.items()))}


def model_card(base: Checkpoint, plan: Plan, record: Mapping[str, Any]) -> ModelCard:
    """The model card: what was merged from what, how tensors were treated, whether solves converged, what to cite.

    Args:
        base: The base.
        plan: What was merged.
        record: What is in `poe_merge.json`.

    Returns:
        The card.
    """
    base_id = _hub_id(base.source)
    data = ModelCardData(
        base_model=[base_id] if base_id else None,
        base_model_relation="merge" if base_id else None,
        library_name="transformers" if base.config is not None else None,
        tags=["merge", "model-merging", "poe-merge"],
    )
    experts = {
        role.removeprefix("expert "): entry for role, entry in record["inputs"].items() if role.startswith("expert ")
    }
    lines = [
        f"# {' + '.join(experts)} merged",
        "",
        f"A merge of {len(experts)} fine-tuned models made with poe-merge: {_approach(record['designs'])}.",
        "",
        f"- **Base:** `{short_source(base.source)}`",
        *(f"- **Expert {name}:** `{short_source(entry['source'])}`" for name, entry in experts.items()),
        "",
        "## Design",
        "",
        *(line for index, design in enumerate(record["designs"]) for line in _design_lines(index, design)),
        "## Treatment of tensors",
        "",
        "| tensors | treatment | seen as | reason |",
        "|---:|---|---|---|",
        *_treatment_rows(record["tensors"]),
        "",
        "## Convergence",
        "",
        *_convergence_lines(record["tensors"]),
        "",
        "Digests of all inputs, versions, settings and the record of every tensor are in `poe_merge.json`.",
        "",
        "## Citation",
        "",
        _CITATIONS,
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def _approach(designs: Sequence[Mapping[str, Any]]) -> str:
    """What was done, in half a sentence."""
    titles = dict.fromkeys(design["title"] for design in designs if "method" in design)
    parts = [f"by {' and '.join(titles)}"] if titles else []
    if any("experts" in design for design in designs):
        parts.append(
            "each model is an expert with an energy over the merged update of the weights, and the merge is the "
            "maximum a posteriori of their product"
        )
    return "; ".join(parts) or "every tensor is an average or the base's"


def _design_lines(index: int, design: Mapping[str, Any]) -> list[str]:
    if "method" in design:
        return [
            f"Design {index}: W = W_0 + {design['scaling']:g} Z, Z by {design['title']} ({design['citation']}):",
            "",
            f"    {design['method']}",
            "",
        ]
    rows = [
        f"| {e['name']} | `{e['residual_map']}` | `{e['energy']}` | `{e['scale']}` | {e['importance']:g} |"
        for e in design["experts"]
    ]
    anchor = design["anchor"]
    center = "the base" if anchor["center"] is None else f"`{short_source(str(anchor['center']))}`"
    return [
        f"Design {index}: W = W_0 + {design['scaling']:g} Z, anchored at {center} with `{anchor['precision']}`, "
        f"{design['coordinates']} coordinates.",
        "",
        "| expert | residual map | energy | scale | importance |",
        "|---|---|---|---|---:|",
        *rows,
        "",
    ]


def _treatment_rows(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = Counter((record["action"], record["view"] or "", record["reason"]) for record in tensors)
    names = {"merge": "merged", "average": "averaged", "base": "base kept"}
    return [
        f"| {n} | {names[action]} | {view} | {reason.replace('|', '/')} |"
        for (action, view, reason), n in kinds.items()
    ]


def _convergence_lines(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    modules = [module for record in tensors for module in record.get("modules", ())]
    solved = [module for module in modules if "steps" in module]
    if not modules:
        return ["No matrix was merged."]
    lines = [
        f"- {n} of {len(modules)} matrices: {status.replace('_', ' ')}" for status, n in _statuses(modules).items()
    ]
    if solved:
        steps = sorted(module["steps"] for module in solved)
        lines.append(f"- Reweighted solves: median {steps[len(steps) // 2]}, most {steps[-1]}")
        spread = max(module["weight_spread"] or 0.0 for module in solved)
        lines.append(f"- Largest spread of the experts' weights (1: a Gaussian merge): {spread:.3g}")
    updated, back = rounding_of(tensors)
    if updated:
        lines.append(f"- Rounding left {back / updated:.1%} of the {updated:,} changed weights at the base's value")
    return lines


def _statuses(modules: Sequence[Mapping[str, Any]]) -> Counter[str]:
    return Counter(module["status"] for module in modules)


def summary_of(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over the records of all tensors: per action, per status of the solver, and what rounding took back."""
    actions = Counter(record["action"] for record in tensors)
    updated, rounded_back = rounding_of(tensors)
    summary: dict[str, Any] = {
        "tensors": {action: actions[action] for action in ("merge", "average", "base")},
        "matrices": dict(_statuses([module for record in tensors for module in record.get("modules", ())])),
    }
    return summary | ({"rounding": {"updated": updated, "rounded_back": rounded_back}} if updated else {})


def rounding_of(tensors: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many entries the merge changed in half-precision tensors, and how many of them rounding took back."""
    rounded = [record["rounding"] for record in tensors if "rounding" in record]
    return sum(each["updated"] for each in rounded), sum(each["rounded_back"] for each in rounded)


def _hub_id(source: str) -> str | None:
    """The Hub's id of a downloaded model.

    >>> _hub_id("/cache/models--org--name/snapshots/0123abc")
    'org/name'
    """
    found = _HUB_FOLDER.search(source)
    return f"{found[1]}/{found[2]}" if found else None


def short_source(source: str) -> str:
    """A checkpoint's name without the folders of the machine it was on."""
    path = Path(source)
    generic = path.stem in ("model", "pytorch_model", "adapter_model")
    return _hub_id(source) or (f"{path.parent.name}/{path.name}" if generic else path.name)
