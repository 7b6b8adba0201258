"""Search of a design space where a naive one would be wrong: methods that see the model, studies of something else."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from torch import Tensor

from diagnostics import Level, gram_alignment
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from inference.models.method_design import MethodDesign
from inference.search import Choice, DesignSpace, ModelMerges, Range, Searched, StudyError, search
from poe_merge.search import RangeSection, Space
from poe_merge.settings import Document
from poe_models import Anchor, Gaussian, InputGram, ModuleMoments, ProductOfExperts, RelativePrecision, TaskVectors
from poe_models.methods import Ties
from poe_models.weights.loading import open_checkpoint

NAMES = ["a", "b", "c"]


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    def state(size: float) -> dict[str, Tensor]:
        return {f"{i}.weight": size * torch.randn(5, 4, generator=generator) for i in range(2)}

    base = state(1.0)
    updates = {name: state(0.1) for name in NAMES}
    return TaskVectors(base, {n: {k: base[k] + u[k] for k in base} for n, u in updates.items()})


def around_ties(eta: float) -> Design:
    anchor = Anchor(Ties(0.5), RelativePrecision(eta))
    return Design(ProductOfExperts.of(NAMES, InputGram(), Gaussian(), anchor=anchor))


@pytest.mark.parametrize("design", [around_ties(0.3), MethodDesign(Ties(0.5), 0.7)])
def test_methods_that_see_the_whole_model(design: Design, vectors: TaskVectors, tmp_path: Path) -> None:
    merges = ModelMerges(vectors)
    found = merges.state(lambda tensor: design)
    again = merges.state(lambda tensor: design)
    merge_checkpoint(vectors, design, tmp_path / "merged")
    expected = open_checkpoint(tmp_path / "merged")
    for name, value in found.items():
        torch.testing.assert_close(value, expected.read(name), rtol=1e-5, atol=1e-6)
        assert torch.equal(value, again[name])


def test_a_study_of_somebody_else_is_not_taken_over(vectors: TaskVectors, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    database = optuna.storages.RDBStorage(storage)
    other = optuna.create_study(storage=database, study_name="poe-merge", direction="minimize")
    other.optimize(lambda trial: trial.suggest_float("z", 0, 1), n_trials=1)
    database.remove_session()
    database.engine.dispose()
    space = DesignSpace(around_ties, {"eta": Searched(Range(0.1, 1.0))})
    with pytest.raises(StudyError, match="is of another"):
        search(space, lambda s: float(s["0.weight"].sum()), ModelMerges(vectors), trials=2, storage=storage)


def test_the_same_settings_on_other_tensors_are_another_space(vectors: TaskVectors, tmp_path: Path) -> None:
    storage, merges = f"sqlite:///{tmp_path}/study.db", ModelMerges(vectors)

    def space(first: str) -> DesignSpace:
        def make(eta: float) -> object:
            return lambda tensor: around_ties(eta if tensor.startswith(first) else 0.2)

        return DesignSpace(make, {"eta": Searched(Range(0.3, 1.0))})  # type: ignore[arg-type]

    search(space("0"), lambda s: float(s["0.weight"].sum()), merges, trials=2, storage=storage)
    with pytest.raises(StudyError, match="is of another design space"):
        search(space("1"), lambda s: float(s["0.weight"].sum()), merges, trials=3, storage=storage)


def test_pruned_trials_are_failed_ones(vectors: TaskVectors) -> None:
    def pruned(state: dict[str, Tensor]) -> float:
        raise optuna.TrialPruned

    space = DesignSpace(around_ties, {"eta": Searched(Range(0.1, 1.0))})
    with pytest.raises(StudyError, match="all 2 trials failed"):
        search(space, pruned, ModelMerges(vectors), trials=2, sampler="random")


def test_a_grid_that_the_budget_cannot_hold_is_refused(vectors: TaskVectors) -> None:
    groups = {name: (name,) for name in ("0.weight", "1.weight")}
    for values in (Range(0.1, 1.0), Choice((0.1, 0.2))):
        space = DesignSpace(around_ties, {"eta": Searched(values, groups)})
        with pytest.raises(StudyError, match=r"space\.shared"):
            search(space, lambda s: 0.0, ModelMerges(vectors), trials=3, sampler="grid")


def test_names_that_are_parts_of_others_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"fc.weight": 0.5, "a.fc.weight": 0.01, "b.a.fc.weight": 0.5, "x": 0.01, "y": 0.01}
    treatments = {name: SimpleNamespace(action="merge") for name in values}
    space = Space(Document(), {"eta": RangeSection(low=0.01, high=1)}, (), False)
    written: dict[str, object] = {}
    monkeypatch.setattr(Space, "config", lambda self, cases: written.update(cases))
    designs = SimpleNamespace(settings=lambda _, tensor: {"eta": values[tensor]})
    space.best(designs, {}, SimpleNamespace(treatments=treatments))  # type: ignore[arg-type]
    cases = written["eta"]
    assert isinstance(cases, list)
    for name, value in values.items():
        assert next(case["value"] for case in cases if case.get("filter", "") in name) == value


def test_three_tasks_are_too_few_to_shuffle_and_frozen_modules_say_nothing(generator: torch.Generator) -> None:
    base = torch.zeros(3, 3)
    updates = {name: {"fc.weight": torch.randn(3, 3, generator=generator)} for name in NAMES}
    moments = {name: {"fc.weight": u["fc.weight"].mT @ u["fc.weight"]} for name, u in updates.items()}
    found = gram_alignment(TaskVectors({"fc.weight": base}, updates), ModuleMoments("activations", moments))
    assert found.verdict().level == Level.UNKNOWN
    nothing = {name: {"fc.weight": torch.zeros(3, 3)} for name in NAMES}
    frozen = gram_alignment(TaskVectors({"fc.weight": base}, updates), ModuleMoments("activations", nothing))
    assert frozen.p_value != frozen.p_value
    assert frozen.verdict().level == Level.UNKNOWN


def test_values_that_are_no_range_are_refused() -> None:
    with pytest.raises(TypeError, match=r"give a Range\(low, high\) or a Choice"):
        Searched((0.1, 0.2))  # type: ignore[arg-type]


def test_the_overhead_is_what_merges_and_scores_do_not_take(vectors: TaskVectors) -> None:
    space = DesignSpace(around_ties, {"eta": Searched(Range(0.1, 1.0))})
    scores = iter(range(14))
    before = time.process_time()
    found = search(space, lambda s: float(next(scores)), ModelMerges(vectors), trials=14)
    total = time.process_time() - before
    inside = sum(trial.solve_seconds + trial.score_seconds for trial in found.trials)
    assert found.overhead_seconds + inside == pytest.approx(total, abs=0.05 * total)
