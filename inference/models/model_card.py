"""The model card of a merged folder: what was merged from what, how, whether solves converged, what to cite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from inference.models.digest import UNDER
from inference.models.folder import rounding_of, statuses
from inference.models.places import hub_id, short_source
from inference.models.plan import ALL
from poe_models.printing import visible
from poe_models.weights.loading import Checkpoint

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


_CARD = """\
---
{header}
---

# {names} merged

A merge of {count} fine-tuned models made with poe-merge: {approach}.

- **Base:** {base}
{sources}

## Design

{designs}
## Treatment of tensors

| tensors | treatment | seen as | reason |
|---:|---|---|---|
{treatments}

{shares}

## Convergence

{convergence}

Digests of all inputs, versions, settings and the record of every tensor are in `poe_merge.json`.

## Citation

{citations}"""


_ACTIONS = {"merge": "merged", "average": "averaged", "base": "base kept"}
_MEANS_SOMETHING = re.compile(r"[\\`*_<>#|~$&!@]|\](?=[(\[:])|:(?=//)|(?<=www)\.")
"""Characters that Markdown, HTML in it, or the Hub would read as more than themselves."""


def markdown(text: object) -> str:
    r"""Text as Markdown that shows it and does nothing else.

    >>> print(markdown("<b>a_b</b>"))
    \<b\>a\_b\</b\>
    """
    return _MEANS_SOMETHING.sub(r"\\\g<0>", visible(str(text)))


def code(text: object) -> str:
    """Text as a span of code, also in a table.

    >>> code("Cauchy()")
    '`Cauchy()`'
    """
    return f"`{visible(str(text)).replace('`', chr(39)).replace('|', '/')}`"


def model_card(base: Checkpoint, record: Mapping[str, Any]) -> ModelCard:
    """Model card: what was merged from what, how tensors were treated, whether solves converged, what to cite."""
    base_id = hub_id(base.source)
    data = ModelCardData(
        base_model=[base_id] if base_id else None,
        base_model_relation="merge" if base_id else None,
        library_name="transformers" if base.config is not None else None,
        tags=["merge", "model-merging", "poe-merge"],
    )
    names = [role.removeprefix("expert ") for role in record["inputs"] if role.startswith("expert ")]
    text = _CARD.format(
        header=data.to_yaml(),
        names=" + ".join(map(markdown, names)),
        count=len(names),
        approach=_approach(record["designs"], record["summary"]["reach"]),
        base=code(_source("base", record["inputs"])),
        sources="\n".join(
            f"- **Expert {markdown(name)}:** {code(_source(f'expert {name}', record['inputs']))}" for name in names
        ),
        designs="\n".join(line for index, each in enumerate(record["designs"]) for line in _design_lines(index, each)),
        treatments="\n".join(_treatment_rows(record["tensors"])),
        shares=_shares(record["tensors"]),
        convergence="\n".join(_convergence_lines(record["tensors"])),
        citations=_CITATIONS,
    )
    return ModelCard(text)


def _source(role: str, inputs: Mapping[str, Any]) -> str:
    """Short name of an input, and of the models under it if it is an adapter on another than the base."""
    under = UNDER + role
    name = short_source(str(inputs[role]["source"]))
    return f"{name} on {_source(under, inputs)}" if under in inputs else name


def _approach(designs: Sequence[Mapping[str, Any]], reach: str) -> str:
    """The approach in half a sentence; a published method is named for no more than what it did."""
    titles = {design["title"]: design["matrices"] for design in designs if "method" in design}
    published = ", as published" if reach == ALL else "" if all(titles.values()) else " (published for all parameters)"
    parts = [f"by {' and '.join(map(markdown, titles))} on {reach}{published}"] if titles else []
    if any("experts" in design for design in designs):
        parts.append(
            "each model is an expert with an energy over the merged update of the weights, and the merge is the "
            "maximum a posteriori of their product"
        )
    return "; ".join(parts) or "every tensor is an average or the base's"


def _design_lines(index: int, design: Mapping[str, Any]) -> list[str]:
    if "method" in design:
        return [
            f"Design {index}: W = W_0 + {design['scaling']:g} Z, Z by {markdown(design['title'])} "
            f"({markdown(design['citation'])}):",
            "",
            f"    {visible(design['method'])}",
            "",
        ]
    rows = [
        f"| {markdown(e['name'])} | {code(e['residual_map'])} | {code(e['energy'])} | {code(e['scale'])} | "
        f"{e['importance']:g} |"
        for e in design["experts"]
    ]
    anchor = design["anchor"]
    center = "the base" if anchor["center"] is None else code(short_source(str(anchor["center"])))
    return [
        f"Design {index}: W = W_0 + {design['scaling']:g} Z, anchored at {center} with {code(anchor['precision'])}, "
        f"{design['coordinates']} coordinates.",
        "",
        "| expert | residual map | energy | scale | importance |",
        "|---|---|---|---|---:|",
        *rows,
        "",
    ]


def _treatment_rows(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = Counter((record["action"], record["view"] or "", record["reason"]) for record in tensors)
    return [
        f"| {n} | {_ACTIONS[action]} | {markdown(view)} | {markdown(reason)} |"
        for (action, view, reason), n in kinds.items()
    ]


def _shares(tensors: Sequence[Mapping[str, Any]]) -> str:
    """Share of the parameters that the approach is about, in a sentence."""
    sizes = {action: sum(each["numel"] for each in tensors if each["action"] == action) for action in _ACTIONS}
    total = sum(sizes.values()) or 1
    told = ", ".join(f"{size / total:.1%} {_ACTIONS[action]}" for action, size in sizes.items())
    return (
        f"Of all parameters: {told}. The approach above is about the merged ones; averaged tensors are W_0 + λ times "
        "the mean of the updates, weighted by the experts' importance."
    )


def _convergence_lines(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    modules = [module for record in tensors for module in record.get("modules", ())]
    solved = [module for module in modules if "steps" in module]
    if not modules:
        return ["No matrix was merged."]
    lines = [f"- {n} of {len(modules)} matrices: {status.replace('_', ' ')}" for status, n in statuses(modules).items()]
    if solved:
        steps = sorted(module["steps"] for module in solved)
        lines.append(f"- Reweighted solves: median {steps[len(steps) // 2]}, most {steps[-1]}")
        spread = max(module["weight_spread"] or 0.0 for module in solved)
        lines.append(f"- Largest spread of the experts' weights (1: a Gaussian merge): {spread:.3g}")
    updated, back = rounding_of(tensors)
    if updated:
        lines.append(f"- Rounding left {back / updated:.1%} of the {updated:,} changed weights at the base's value")
    return lines
