"""Retention by hand: two modules of a few numbers, sums over modules, and every threshold of what is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference.retention import (
    BY_A_SHORTER,
    HELD_BACK,
    SHORTER,
    WAYS_OUT,
    ExpertRetention,
    Retention,
    concerns,
    retention,
    retention_of_updates,
    totals,
    totals_of,
)
from poe_models import Absolute, Gaussian, InputGram, ProductOfExperts
from tests.helpers import assert_close, random_updates


def of(kept: float, left: float, length: float = 1.0, name: str = "a") -> ExpertRetention:
    return ExpertRetention(name, kept, left, length)


def test_every_number_is_its_formula(generator: torch.Generator) -> None:
    updates, gamma = random_updates(generator, 2, 3, 4, 5), 1.7
    posterior = ProductOfExperts.of(["a", "b", "c"], InputGram(), Gaussian(), Absolute(gamma)).bind(updates)
    z = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    found = retention(posterior, z, posterior.residuals(z))

    def measured(x: Tensor) -> Tensor:
        return torch.stack([(x[:, i] @ updates[:, i].mT).square().sum((-2, -1)) for i in range(3)], -1) / gamma**2

    copies = z.unsqueeze(1).expand(-1, 3, -1, -1)
    assert_close(found.residuals, measured(copies - updates), 1e-10)  # type: ignore[arg-type]
    assert_close(found.residuals_at_zero, measured(updates), 1e-10)  # type: ignore[arg-type]
    assert_close(found.sizes, measured(copies), 1e-10)  # type: ignore[arg-type]
    plain = retention_of_updates(["a", "b", "c"], updates, z)
    for each in (found, plain):
        assert each.experts == ("a", "b", "c")
        assert_close(each.kept, (copies * updates).sum((-2, -1)) / updates.square().sum((-2, -1)), 1e-12)
        assert_close(each.norm, z.flatten(1).norm(dim=1), 1e-12)
        assert_close(each.update_norms, updates.flatten(2).norm(dim=2), 1e-12)
    assert_close(found.residual_left, measured(copies - updates) / measured(updates), 1e-10)
    half = found.scaled(-0.5)
    assert_close(half.residuals, measured(-0.5 * copies - updates), 1e-9)  # type: ignore[arg-type]
    assert_close(half.sizes, measured(0.5 * copies), 1e-10)  # type: ignore[arg-type]
    assert_close(half.norm, 0.5 * found.norm, 1e-12)
    for missing in ("residuals", "residuals_at_zero", "sizes"):
        partly = replace(found, **{missing: None}).scaled(-0.5)
        assert_close(partly.kept, -0.5 * found.kept, 1e-12)
        assert (partly.residuals is None) or torch.equal(partly.residuals, found.residuals)  # type: ignore[arg-type]
    assert plain.residual_left.isnan().all()


def test_a_record_leaves_out_what_is_no_number() -> None:
    one, two = torch.tensor([[1.0, 2.0], [3.0, math.nan]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    found = Retention(("a", "b"), one, torch.tensor([9.0, 10.0]), two)
    assert found.record(0) == {"norm": 9.0, "update_norms": {"a": 5.0, "b": 6.0}, "kept": {"a": 1.0, "b": 2.0}}
    assert found.record(1) == {"norm": 10.0, "update_norms": {"a": 7.0, "b": 8.0}, "kept": {"a": 3.0}}
    assert ExpertRetention("a", math.nan, 0.5, math.nan).record() == {
        "name": "a",
        "kept": None,
        "residual_left": 0.5,
        "length": None,
    }


RECORDS = [
    {
        "norm": 3.0,
        "update_norms": {"a": 2.0, "b": 0.0},
        "kept": {"a": 0.5},
        "residuals": {"a": 1.0, "b": 7.0},
        "residuals_at_zero": {"a": 2.0, "b": 9.0},
    },
    {
        "norm": 4.0,
        "update_norms": {"a": 1.0, "b": 10.0},
        "kept": {"a": 3.0, "b": 0.2},
        "residuals": {"a": 3.0, "b": 1.0},
        "residuals_at_zero": {"a": 6.0, "b": 4.0},
    },
]


def test_totals_are_ratios_of_sums() -> None:
    a, b = totals(RECORDS)
    assert (a.name, b.name) == ("a", "b")
    assert a.kept == pytest.approx((0.5 * 4 + 3.0 * 1) / 5)
    assert a.residual_left == pytest.approx(4.0 / 8.0)
    assert a.length == pytest.approx(math.sqrt(25 / 5))
    assert (b.kept, b.residual_left, b.length) == pytest.approx((0.2, 0.25, 0.4))  # of the module that it changed
    plain = [{key: each[key] for key in ("norm", "update_norms", "kept")} for each in RECORDS]
    assert math.isnan(totals(plain)[0].residual_left)
    assert totals(plain)[0].kept == a.kept
    (nothing,) = totals([{"norm": 1.0, "update_norms": {"z": 0.0}, "kept": {}}])
    assert all(math.isnan(value) for value in (nothing.kept, nothing.residual_left, nothing.length))
    tensors = [{}, {"modules": [{"retention": RECORDS[0]}, {}]}, {"modules": [{"retention": RECORDS[1]}]}]
    assert totals_of({"tensors": tensors}) == (a, b)


@pytest.mark.parametrize(
    ("kept", "left", "passed"),
    [(0.5, 0.89, False), (0.5, 0.9, True), (0.5, 1.3, True), (0.1, 0.5, False), (0.099, 0.5, True)],
)
def test_where_being_passed_by_begins(kept: float, left: float, passed: bool) -> None:
    """At nine tenths of the residual, or below a tenth of the best kept share."""
    best = of(1.0, 0.3)
    assert bool(concerns([best, of(kept, left, name="b"), best])) is passed


def test_one_expert_alone_is_not_all_experts() -> None:
    passed, fair = of(0.03, 0.97), of(0.9, 0.05)
    assert concerns([passed]) == ["expert 'a': 97 % of its squared residual left, 3 % of its update kept."]
    assert concerns([fair]) == []
    assert concerns([passed, passed])[0].startswith("no expert has its share")
    assert concerns([fair, passed])[0].startswith("the merge is little more than the expert 'a'")


@pytest.mark.parametrize(("length", "pale"), [(0.1, False), (0.101, False), (0.099, True)])
def test_where_a_merge_is_little_more_than_the_base(length: float, pale: bool) -> None:
    """By the median, of an even number the longer of the two in the middle."""
    fair = of(0.9, 0.05, length)
    for others in ([], [of(0.9, 0.05, 0.01)], [of(0.9, 0.05, 0.01), of(0.9, 0.05, 0.4)]):
        found = concerns([fair, *others])
        assert any("little more than the base" in each for each in found) is pale
    said = concerns([of(0.9, 0.05, 0.0512)])
    assert said[0].startswith("the merge is little more than the base: its update has 5.1 % of the experts' median")


@pytest.mark.parametrize(("longest", "said"), [(0.5, False), (0.51, True), (0.7, True)])
def test_an_expert_as_long_as_the_merge_is_named(longest: float, said: bool) -> None:
    short = of(0.9, 0.05, 0.05)
    (found,) = concerns([short, of(0.9, 0.05, longest, "near"), short])
    assert ("as long as 'near' is" in found) is said


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (2.0, "200 % of its squared residual left, "),
        (2.4, "its squared residual grew 2-fold, "),
        (2.9, "its squared residual grew 3-fold, "),
        (math.nan, ""),
    ],
)
def test_a_residual_grew_from_twice_on(left: float, said: str) -> None:
    fair = of(1.0, 0.05)
    assert concerns([fair, of(0.05, left, name="b"), fair]) == [f"expert 'b': {said}5 % of its update kept."]


def test_an_expert_at_its_least_share_is_not_held_back() -> None:
    holder = of(0.9, 0.01, 3.0, name="d")
    share = BY_A_SHORTER.share * 0.9
    assert concerns([holder, of(share, 0.5)]) == []
    (said,) = concerns([holder, of(share - 1e-9, 0.5), of(0.2, 0.41, name="b"), of(0.5, 0.5, name="c")])
    assert said == f"the expert 'd' holds the merge: 90 % of its update kept, of 'a' 45 %, 'b' 20 %. {SHORTER}"
    equal = of(0.9, 0.01, name="d")
    assert concerns([equal, of(share - 1e-9, 0.5)]) == []
    (said,) = concerns([equal, of(HELD_BACK.share * 0.9 - 1e-9, 0.5)])
    assert said == f"the expert 'd' holds the merge: 90 % of its update kept, of 'a' 30 %. {WAYS_OUT}"
    # Not measured (a merging method), nobody is known to be held back.
    assert concerns([of(0.9, math.nan), of(0.2, 0.5)]) == []
