"""Remedies of messages in Python, done exactly as printed: what was refused goes through, what was warned of is silent.

Those of commands are in `test_remedies_commands.py`; what cannot be executed is listed in `test_remedies.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import (
    DenseLaplace,
    fixed_point,
    gibbs,
    laplace,
    log_evidence,
    merge,
    minimize,
    nuts,
    require_proper,
    slice_sample,
)
from inference.reweighting import SolverOptions
from poe_models import (
    AbsolutePrecision,
    Anchor,
    FactorExpert,
    Huber,
    InputGram,
    OutputGram,
    ProductOfExperts,
    StudentT,
    TaskVectors,
    Welsch,
    open_checkpoint,
    span_statistics,
)
from poe_models.weights.rules import DEFAULT_RULES, Rule
from poe_models.weights.views import View
from tests.helpers import random_updates
from tests.seeds import seeded


def updates() -> Tensor:
    return random_updates(seeded(5), 1, 2, 3, 4)


def small() -> FactorExpert:
    return FactorExpert("small", lambda c: c.square().sum(-1), coordinates="span")


def poe(**settings: Any) -> ProductOfExperts:
    return ProductOfExperts.of(["a", "b"], **settings)


def with_factor() -> Any:
    return (poe() * small()).bind(updates(), coordinates="span")


def loose() -> ProductOfExperts:
    return poe(energy=Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.0)))


def held() -> ProductOfExperts:
    return poe(energy=Welsch(), anchor=Anchor(precision=AbsolutePrecision(0.1)))


def multivariate(eta: float = 0.1) -> ProductOfExperts:
    return poe(energy=StudentT(4.0, exponent="multivariate"), anchor=Anchor(precision=AbsolutePrecision(eta)))


def vectors(*, wide: bool = False, **settings: Any) -> TaskVectors:
    dtype = torch.float64 if wide else torch.float32
    base = {"fc.weight": torch.zeros(4, 4, dtype=dtype), "fc.bias": torch.zeros(4, dtype=dtype)}
    return TaskVectors(base, {"a": {key: each + 1 for key, each in base.items()}}, **settings)


def kept() -> TaskVectors:
    return vectors(rules=DEFAULT_RULES.extended([{"match": "bias", "action": "base"}]))


def named_alike(rules: list[dict[str, Any]]) -> TaskVectors:
    base = {"qkv.weight": torch.zeros(6, 2), "qkv.weight[0]": torch.zeros(2, 2)}
    return TaskVectors(base, {"a": {key: each + 1 for key, each in base.items()}}, DEFAULT_RULES.extended(rules))


Call = Callable[[], object]
CALLS: dict[str, tuple[Call, str, Call]] = {
    "reweighting a function": (lambda: fixed_point(with_factor()), "Use `minimize`", lambda: minimize(with_factor())),
    "gibbs of a function": (
        lambda: gibbs(with_factor(), 2, generator=seeded(0)),
        "Use `slice_sample` or `nuts` in Span coordinates",
        lambda: (
            slice_sample(with_factor(), 2, generator=seeded(0), warmup=2),
            nuts(with_factor(), 2, generator=seeded(0), chains=1, warmup=2),
        ),
    ),
    "structure of a function": (
        lambda: laplace(with_factor(), minimize(with_factor())),  # type: ignore[arg-type]
        "use `DenseLaplace`",
        lambda: DenseLaplace(with_factor(), minimize(with_factor()).value),
    ),
    "a function in full": (
        lambda: (poe() * small()).bind(updates()),
        "Use coordinates='span'",
        lambda: (poe() * small()).bind(updates(), coordinates="span"),
    ),
    "improper": (
        lambda: require_proper(loose().bind(updates())),
        "Give the anchor a positive precision",
        lambda: require_proper(held().bind(updates())),
    ),
    "no mixture": (
        lambda: gibbs(poe(energy=Huber(1.0)).bind(updates()), 2, generator=seeded(0)),
        "slice_sample|nuts|mixture",
        lambda: slice_sample(poe(energy=Huber(1.0)).bind(updates()), 2, generator=seeded(0), warmup=2),
    ),
    "evidence in the span": (
        lambda: log_evidence(multivariate().bind(updates(), coordinates="span"), generator=seeded(0)),
        r"Use `poe.bind\(updates\)`",
        lambda: log_evidence(multivariate().bind(updates()), generator=seeded(0)),
    ),
    "few samples": (
        lambda: log_evidence(multivariate().bind(updates()), generator=seeded(0), samples=3),
        "Give at least 100",
        lambda: log_evidence(multivariate().bind(updates()), generator=seeded(0), samples=100),
    ),
    "no anchor": (
        lambda: log_evidence(multivariate(0.0).bind(updates()), generator=seeded(0)),
        "Give the anchor a positive precision",
        lambda: log_evidence(multivariate(0.1).bind(updates()), generator=seeded(0)),
    ),
    "coefficients in full": (
        lambda: poe().bind(updates()).coefficients(torch.zeros(1, 3, 4)),
        "`poe.bind\\(updates, coordinates='span'\\)`",
        lambda: poe().bind(updates(), coordinates="span").coefficients(torch.zeros(1, 3, 1).double()),
    ),
    "updates of statistics": (
        lambda: poe().bind(span_statistics(poe(), updates())).update(torch.zeros(1, 3, 1).double()),
        "`poe.bind\\(updates, coordinates='span'\\)`",
        lambda: poe().bind(updates(), coordinates="span").update(torch.zeros(1, 3, 1).double()),
    ),
    "ranks of statistics": (
        lambda: multivariate().bind(span_statistics(multivariate(), updates(), ranks=False)),
        "Make them with `ranks=True`",
        lambda: multivariate().bind(span_statistics(multivariate(), updates(), ranks=True)),
    ),
    "one point per chain": (
        lambda: nuts(poe().bind(updates()), 1, generator=seeded(0), chains=2, warmup=1, start=torch.zeros(1, 3, 4)),
        r"`point.expand\(chains, \*point.shape\)`",
        lambda: nuts(
            poe().bind(updates()),
            1,
            generator=seeded(0),
            chains=2,
            warmup=1,
            start=torch.zeros(1, 3, 4).expand(2, 1, 3, 4),
        ),
    ),
    "weights of kept draws": (
        lambda: slice_sample(poe().bind(updates()), 2, generator=seeded(0), warmup=2).weights,
        "Use `values`",
        lambda: slice_sample(poe().bind(updates()), 2, generator=seeded(0), warmup=2).values,
    ),
    "a single start": (
        lambda: SolverOptions(starts="twin"),  # type: ignore[arg-type]
        r"\('twin',\)",
        lambda: SolverOptions(starts=("twin",)),
    ),
    "matrices of an averaged tensor": (
        lambda: vectors().modules("fc.bias"),
        "Use `average`",
        lambda: vectors().average("fc.bias"),
    ),
    "the mean of a kept tensor": (
        lambda: kept().average("fc.bias"),
        r"`base.read\('fc.bias'\)`",
        lambda: kept().base.read("fc.bias"),
    ),
    "rules that are no table": (
        lambda: vectors(rules=[Rule("bias", "base")]),
        r"`DEFAULT_RULES.extended\(rules\)` makes one",
        lambda: vectors(rules=DEFAULT_RULES.extended([Rule("bias", "base")])),
    ),
    "a view of a kept tensor": (
        lambda: Rule("fc", "base", View()),
        "Leave `view` out, or use `action: merge`",
        lambda: (Rule("fc", "base"), Rule("fc", "merge", View())),
    ),
    "a rule without an action": (
        lambda: Rule.from_dict({"match": "lm_head"}),
        "{match: lm_head, action: base}",
        lambda: Rule.from_dict({"match": "lm_head", "action": "base"}),
    ),
    "heights that do not add up": (
        lambda: View(blocks=3).fitted((7, 2)),
        "give their heights as `rows`",
        lambda: View(rows=(3, 3, 1)).fitted((7, 2)),
    ),
    "a nested state dict": (
        lambda: open_checkpoint({"model": {"fc.weight": torch.zeros(2, 2)}}),  # type: ignore[dict-item]
        "Pass the inner dict",
        lambda: open_checkpoint({"fc.weight": torch.zeros(2, 2)}),
    ),
    "a map given twice": (
        lambda: poe(residual_map=[InputGram(), InputGram()]),
        "names must be unique",
        lambda: poe(residual_map=[InputGram(), OutputGram()]),
    ),
    "names of experts": (
        lambda: merge(vectors(), ProductOfExperts.of(["b"])),
        "Give the experts these names",
        lambda: merge(vectors(), ProductOfExperts.of(["a"])),
    ),
    "tensors that are rounded": (
        lambda: vectors(dtype=None, wide=True),
        "For float64 ask for `dtype: float64`",
        lambda: vectors(dtype=torch.float64, wide=True),
    ),
    "one name for two": (
        lambda: named_alike([]),
        r"the rule \{match: '\^qkv\\.weight\\\[0\\\]\$', action: base\}",
        lambda: named_alike([{"match": r"^qkv\.weight\[0\]$", "action": "base"}]),
    ),
    "a rule that is no mapping": (
        lambda: Rule.from_dict("lm_head"),  # type: ignore[arg-type]
        "{match: lm_head, action: base}",
        lambda: Rule.from_dict({"match": "lm_head", "action": "base"}),
    ),
    "a view that is no mapping": (
        lambda: Rule.from_dict({"match": "qkv", "action": "merge", "view": "rows"}),
        r"`view: {rows: \[4096, 1024, 1024\]}`",
        lambda: Rule.from_dict({"match": "qkv", "action": "merge", "view": {"rows": [4096, 1024, 1024]}}),
    ),
    "a vector that is to be a matrix": (
        lambda: vectors(rules=DEFAULT_RULES.extended([{"match": "bias", "action": "merge"}])),
        "use `action: average` or `action: base`",
        lambda: [
            vectors(rules=DEFAULT_RULES.extended([{"match": "bias", "action": each}])) for each in ("average", "base")
        ],
    ),
    "a rule that fits nothing": (
        lambda: vectors(rules=DEFAULT_RULES.extended([{"match": "biass", "action": "base"}])),
        "Did you mean `bias`",
        lambda: vectors(rules=DEFAULT_RULES.extended([{"match": "bias", "action": "base"}])),
    ),
    "names of a task vector": (
        lambda: merge(vectors(), ProductOfExperts.of(["b"])),
        "or set `update=`",
        lambda: merge(
            vectors(), ProductOfExperts(tuple(replace(e, update="a") for e in ProductOfExperts.of(["b"]).experts))
        ),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    wrong, shown, right = CALLS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises((ValueError, TypeError, UserWarning), match=shown):
            wrong()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        right()
