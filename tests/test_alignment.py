"""Alignment of updates with their tasks' inputs: by hand, after gradient steps, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diagnostics import Level, gram_alignment
from poe_models import ModuleMoments, TaskVectors

NAMES = ("a", "b", "c", "d")


def trained(
    generator: torch.Generator, own_inputs: bool, tasks: int = 4, size: int = 12
) -> tuple[TaskVectors, ModuleMoments]:
    """One layer after a step of gradient descent on each task's inputs, or on inputs that all tasks share."""
    base = torch.randn(8, size, generator=generator) / 3
    experts, moments = {}, {}
    common = torch.randn(size, size, generator=generator)
    for name in NAMES[:tasks]:
        mixing = torch.randn(size, size, generator=generator)
        x = mixing @ torch.randn(size, 40, generator=generator)
        seen = x if own_inputs else common @ torch.randn(size, 40, generator=generator)
        errors = torch.randn(8, 40, generator=generator)
        experts[name] = {"fc.weight": base + 1e-3 * errors @ seen.mT}
        moments[name] = {"fc.weight": x @ x.mT / 40}
    return TaskVectors({"fc.weight": base}, experts), ModuleMoments("activations", moments)


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


def test_cosines_are_those_of_dense_matrices(generator: torch.Generator) -> None:
    vectors, activations = trained(generator, True)
    for side in ("input", "output"):
        found = gram_alignment(vectors, activations, side)  # type: ignore[arg-type]
        module = next(iter(vectors))
        for i, update in enumerate(module.updates):
            for j, task in enumerate(NAMES):
                moment = activations.read(task, ["fc.weight"], (8, 12))[0]
                weight = module.base + module.updates[j]
                gram = update.mT @ update if side == "input" else update @ update.mT
                against = moment if side == "input" else weight @ moment @ weight.mT
                assert float(found.cosines[0, i, j]) == pytest.approx(cosine(gram, against), abs=1e-5)
        assert float(found.others[0, 0]) == pytest.approx(float(found.cosines[0, 0, 1:].mean()))


def test_gradient_steps_align_updates_with_their_tasks(generator: torch.Generator) -> None:
    found = gram_alignment(*trained(generator, True))
    assert found.p_value == pytest.approx(1 / 24)
    assert bool((found.own > found.others).all())
    assert found.verdict().level == Level.GOOD
    assert list(found.to_dataframe().columns) == ["module", "expert", "own", "others", "p_value"]


def test_updates_from_other_inputs_are_not_called_aligned() -> None:
    """The p-value of a true null is at least as large as a uniform one: few of 40 runs are below .05."""
    found = [gram_alignment(*trained(torch.Generator().manual_seed(seed), False)) for seed in range(40)]
    called = sum(each.p_value <= 0.05 for each in found)
    assert called <= 10  # P(more | level 1/24) is below 1e-6
    worst = max(found, key=lambda each: each.p_value)
    assert worst.verdict().level == Level.CAUTION
    assert "not to be trusted" in worst.verdict().text


def test_one_expert_has_nothing_to_be_compared_with(generator: torch.Generator) -> None:
    found = gram_alignment(*trained(generator, True, tasks=1))
    assert found.verdict().level == Level.UNKNOWN


def test_many_tasks_are_shuffled_by_a_seed(generator: torch.Generator) -> None:
    names = [f"t{i}" for i in range(9)]
    base = torch.zeros(3, 3)
    updates = {n: {"fc.weight": torch.randn(3, 3, generator=generator)} for n in names}
    moments = {n: {"fc.weight": u["fc.weight"].mT @ u["fc.weight"]} for n, u in updates.items()}
    vectors, activations = TaskVectors({"fc.weight": base}, updates), ModuleMoments("activations", moments)
    found = gram_alignment(vectors, activations, seed=3)
    assert found.p_value == gram_alignment(vectors, activations, seed=3).p_value == pytest.approx(1 / 5040)
    torch.testing.assert_close(found.own, torch.ones(1, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="'input' or 'output'"):
        gram_alignment(vectors, activations, "left")  # type: ignore[arg-type]
