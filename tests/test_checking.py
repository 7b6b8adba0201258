"""The property checker: every registered method as declared, every property by a rule that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from poe_models import ModuleMoments, MomentsFolder, TaskVectors
from poe_models.methods import METHODS, About, FisherMerging, MergingMethod, ModuleBatch, TaskArithmetic, Ties, Wudi
from poe_models.methods.checking import PROPERTIES, Report, check
from tests.helpers import random_updates
from tests.seeds import seed_of, seeded

QUICK = {"DogeTA": 5, "WudiAdam": 5, "AdaMerging": 5, "ConcreteTaskArithmetic": 5}


def made(name: str) -> MergingMethod:
    cls = METHODS[name]
    settings: dict[str, object] = {"steps": QUICK[name]} if name in QUICK else {}
    if cls.about.data in ("fisher", "activations"):
        settings["moments"] = MomentsFolder("random moments take its place")
    return cls(**settings)


def real(count: int = 3) -> TaskVectors:
    generator = seeded(5)
    updates = random_updates(generator, 2, count, 9, 7)
    wide = random_updates(generator, 1, count, 4, 11)
    base = {"a": torch.zeros(9, 7), "b": torch.zeros(9, 7), "c": torch.ones(4, 11)}
    experts = {f"e{i}": {"a": updates[0, i], "b": updates[1, i], "c": 1 + wide[0, i]} for i in range(count)}
    return TaskVectors(base, experts, dtype=torch.float64)


@pytest.mark.parametrize("name", METHODS)
def test_registered_methods_keep_what_they_promise(name: str) -> None:
    report = check(made(name), real() if METHODS[name].about.data == "none" else None)
    assert report.broken == (), report
    assert {each.name for each in report.outcomes} == set(PROPERTIES)
    assert set(METHODS[name].about.exceptions) <= {"one expert", "identical experts", "scale equivariance"}


@pytest.mark.parametrize("name", METHODS)
def test_no_exception_is_declared_in_vain(name: str) -> None:
    exceptions = METHODS[name].about.exceptions
    if exceptions:
        report = check(made(name), properties=list(exceptions), seed=3)
        assert any(each.status == "not promised" for each in report.outcomes)


def test_settings_that_keep_a_property_are_seen_to() -> None:
    report = check(TaskArithmetic(1.0), properties=["one expert", "identical experts"])
    assert [each.status for each in report.outcomes] == ["holds", "not promised"]
    assert "not promised: a sum, not a mean" in str(report)


def write(updates: Tensor) -> Tensor:
    updates.mul_(2)
    return updates.mean(0) / 2


def orthogonal(updates: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(updates.mean(0), full_matrices=False)
    return u @ v


BREAKING: dict[str, Callable[[Tensor], Tensor]] = {
    "one expert": lambda u: 0.5 * u.mean(0),
    "identical experts": lambda u: u.sum(0),
    "permutation": lambda u: u[0],
    "scale equivariance": lambda u: u.mean(0).sign() * u.mean(0) ** 2,
    "dtype": lambda u: u.mean(0).double(),
    "zero expert": lambda u: (u / u.flatten(1).norm(dim=1)[:, None, None]).mean(0),
    "zero module": lambda u: u.mean(0) / u.mean(0).norm() * u.norm(),
    "more experts than rank": lambda u: u.mean(0) / 0 if len(u) > min(u.shape[1:]) else u.mean(0),
    "low-rank stability": orthogonal,
    "inputs unchanged": write,
    "seed determinism": lambda u: u.mean(0) * (1 + 1e-9 * torch.rand(u.shape[1:], dtype=u.dtype)),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_rule_that_breaks_a_property_is_found_out(name: str) -> None:
    assert check(lambda updates: updates.mean(0), properties=[name]).broken == ()
    report = check(BREAKING[name], real(), properties=[name])
    assert report.broken
    assert {each.name for each in report.broken} == {name}
    assert all(each.detail for each in report.broken)
    kinds = {each.modules for each in report.broken}
    assert kinds == ({"random"} if PROPERTIES[name].random_only else {"random", "real"})


def test_a_half_precision_rule_that_computes_in_half_precision_is_found_out() -> None:
    @dataclass(frozen=True)
    class Half(MergingMethod):
        about = About("half", "2026")

        @override
        def merged(self, batch: ModuleBatch) -> Tensor:
            careless = batch.updates if batch.updates.dtype == torch.float64 else (300 + batch.updates).bfloat16() - 300
            return careless.mean(1).to(batch.updates.dtype)

    report = check(Half(), properties=["dtype"])
    assert "off by" in report.broken[0].detail


def test_a_rule_that_takes_buffers_or_needs_untied_weights_is_found_out() -> None:
    """The rule refuses what the small model has in its modules: the failure is reported under the property."""

    def picky(updates: Tensor) -> Tensor:
        if updates.shape[1:] == (12, 8) and float(updates.abs().sum()) > 0:
            raise RuntimeError("this one I do not like\nat all")
        return updates.mean(0)

    report = check(picky, properties=["integer buffers", "tied weights"])
    assert [each.detail for each in report.broken] == ["RuntimeError: this one I do not like"] * 2


def test_seed_determinism_with_the_global_generator_reseeded() -> None:
    def reseeds(updates: Tensor) -> Tensor:
        torch.manual_seed(seed_of(0))
        return updates.mean(0) + 0 * torch.rand(1, dtype=updates.dtype)

    assert check(reseeds, properties=["seed determinism"]).broken[0].detail == "it draws from torch's global generator"


def test_nan_is_no_randomness() -> None:
    report = check(lambda updates: updates.mean(0) * torch.nan, properties=["seed determinism", "zero expert"])
    assert [each.name for each in report.broken] == ["zero expert"]


def test_further_exceptions_and_their_reasons() -> None:
    report = check(
        lambda updates: updates.sum(0),
        properties=["identical experts"],
        not_promised={"identical experts": "sums are what I want"},
    )
    assert report.broken == ()
    assert "not promised: sums are what I want" in str(report)


def test_real_modules_with_statistics(tmp_path: Path) -> None:
    vectors = real()
    generator = seeded(1)
    fisher = {name: {m.name: torch.rand(m.base.shape, generator=generator) for m in vectors} for name in vectors.names}
    ModuleMoments("fisher", fisher).save(tmp_path)
    report = check(FisherMerging(MomentsFolder(str(tmp_path))), vectors)
    assert report.broken == (), report
    assert any(each.modules == "real" and each.status == "holds" for each in report.outcomes)


def test_wrong_questions_are_answered() -> None:
    with pytest.raises(ValueError, match="no property is called 'symmetry'. Known: one expert"):
        check(Wudi(), properties=["symmetry"])
    with pytest.raises(ValueError, match="no property is called 'speed'"):
        check(Wudi(), not_promised={"speed": "slow"})
    with pytest.raises(ValueError, match="there are no modules"):
        check(Wudi(), [])


def test_report_is_a_table_and_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    report = check(Ties(), real(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(PROPERTIES), len(PROPERTIES))
    lines = str(report).splitlines()
    assert lines[0].split() == ["property", "random", "modules", "real", "modules"]
    assert len(lines) == 1 + len(PROPERTIES)
    assert [line for line in lines if line.startswith("tied weights")][0].split()[-1] == "-"
    assert isinstance(report, Report)
