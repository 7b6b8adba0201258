"""Merging methods on statistics, against dense re-implementations and the closed forms they have at special points."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import fixed_point, merge_checkpoint
from poe_merge.cli import run
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Activation,
    Anchor,
    CheckpointError,
    Fisher,
    Gaussian,
    ModuleMoments,
    MomentsFolder,
    ProductOfExperts,
    TaskVectors,
    collect_activations,
    collect_fisher,
)
from poe_models.methods import (
    METHODS,
    FisherMerging,
    GradientMatching,
    MergingMethod,
    ModuleBatch,
    RegMean,
    TaskArithmetic,
    TaskData,
)
from tests.helpers import assert_close, name_of
from tests.methods.toys import SHAPE, setting

EXPERTS = ("a", "b", "c")


MODULES = ("m", "n")


def batch_of(updates: Tensor) -> ModuleBatch:
    return ModuleBatch.of(updates, MODULES[: len(updates)], EXPERTS[: updates.shape[1]])


def fisher_of(values: Tensor) -> ModuleMoments:
    """From ``(M, N, d_out, d_in)``."""
    return ModuleMoments("fisher", {e: {m: values[j, i] for j, m in enumerate(MODULES)} for i, e in enumerate(EXPERTS)})


def moments_of(inputs: Tensor) -> ModuleMoments:
    """From inputs ``(M, N, rows, d_in)``."""
    means = inputs.mT @ inputs / inputs.shape[-2]
    return ModuleMoments(
        "activations", {e: {m: means[j, i] for j, m in enumerate(MODULES)} for i, e in enumerate(EXPERTS)}
    )


def modules_of(updates: Tensor) -> list[Any]:
    from poe_models.weights.task_vectors import ModuleUpdates

    return [ModuleUpdates(m, m, EXPERTS, torch.zeros(SHAPE), u) for m, u in zip(MODULES, updates, strict=True)]


@pytest.fixture
def fisher(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 3, *SHAPE, generator=generator, dtype=torch.float64)


def test_fisher_merging_entry_by_entry(updates: Tensor, fisher: Tensor) -> None:
    norms = [fisher[:, i].square().sum().sqrt() + 1e-3 for i in range(3)]
    method = FisherMerging(fisher_of(fisher), floor=1e-3)
    ready = method.prepare(modules_of(updates))
    found = ready.merge(batch_of(updates))
    for j in range(2):
        for row in range(SHAPE[0]):
            for column in range(SHAPE[1]):
                top = bottom = 0.0
                for i in range(3):
                    weight = float((fisher[j, i, row, column] + 1e-3) / norms[i])
                    top += weight * float(updates[j, i, row, column])
                    bottom += weight
                assert float(found[j, row, column]) == pytest.approx(top / bottom, rel=1e-12)
    plain = FisherMerging(fisher_of(fisher), floor=1e-3, normalize=False).merge(batch_of(updates))
    assert float((plain - found).abs().max()) > 1e-3


def test_fisher_merging_is_the_gaussian_product_with_its_weights_as_importance(updates: Tensor, fisher: Tensor) -> None:
    given = fisher_of(fisher)
    method = FisherMerging(given, floor=1e-3).prepare(modules_of(updates))
    assert isinstance(method, FisherMerging)
    assert method.weights is not None
    poe = ProductOfExperts.of(
        EXPERTS,
        Fisher(given, 1e-3),
        Gaussian(),
        Absolute(1.0),
        importance=method.weights,
        anchor=Anchor(precision=AbsolutePrecision(0.0)),
    )
    assert_close(fixed_point(poe.for_modules(MODULES).bind(updates)).value, method.merge(batch_of(updates)))


def test_fisher_without_information_is_averaging(updates: Tensor) -> None:
    given = fisher_of(torch.zeros(2, 3, *SHAPE))
    assert_close(FisherMerging(given).prepare(modules_of(updates)).merge(batch_of(updates)), updates.mean(1))


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_minimises_the_difference_of_outputs(
    off_diagonal: float, updates: Tensor, generator: torch.Generator
) -> None:
    """Second route: ordinary least squares on the stacked inputs, with rows added for what shrinks off the diagonal."""
    inputs = torch.randn(2, 3, 30, SHAPE[1], generator=generator, dtype=torch.float64)
    found = RegMean(moments_of(inputs), off_diagonal).merge(batch_of(updates))
    for j in range(2):
        rows, targets = [], []
        for i in range(3):
            x = inputs[j, i] / 30**0.5
            rows += [off_diagonal**0.5 * x, torch.diag(((1 - off_diagonal) * x.square().sum(0)).sqrt())]
            targets += [each @ updates[j, i].T for each in rows[-2:]]
        expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
        assert_close(found[j], expected, 1e-9)
    poe = ProductOfExperts.of(
        EXPERTS,
        Activation(moments_of(inputs), off_diagonal),
        Gaussian(),
        Absolute(1.0),
        anchor=Anchor(precision=AbsolutePrecision(0.0)),
    )
    assert_close(fixed_point(poe.for_modules(MODULES).bind(updates)).value, found, 1e-9)


def test_regmean_leaves_directions_without_inputs_at_the_base(updates: Tensor, generator: torch.Generator) -> None:
    inputs = torch.randn(2, 3, 30, SHAPE[1], generator=generator, dtype=torch.float64)
    inputs[..., 1] = 0
    found = RegMean(moments_of(inputs)).merge(batch_of(updates))
    assert_close(found[..., 1], torch.zeros(2, SHAPE[0]))
    kept = [0, 2, 3]
    small = {
        e: {m: v[kept][:, kept] for m in MODULES for v in [moments_of(inputs).experts[e].read(m)]} for e in EXPERTS
    }
    expected = RegMean(ModuleMoments("activations", small)).merge(batch_of(updates[..., kept]))
    assert_close(found[..., kept], expected, 1e-9)
    tiny = {
        e: {m: moments_of(inputs).experts[e].read(m) + 1e-17 * torch.eye(SHAPE[1]) for m in MODULES} for e in EXPERTS
    }
    found = RegMean(ModuleMoments("activations", tiny)).merge(batch_of(updates))
    assert_close(found[..., kept], expected, 1e-9)
    assert_close(found[..., 1], updates[..., 1].mean(1), 1e-9)  # an input is one, however small beside the others


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_regmean_sees_small_inputs_beside_large_ones(
    off_diagonal: float, rows: int, updates: Tensor, generator: torch.Generator
) -> None:
    """Features of transformers differ in size by orders of magnitude, and statistics are in float32."""
    inputs = torch.randn(2, 3, rows, SHAPE[1], generator=generator, dtype=torch.float64)
    inputs = inputs[:, :1].expand(2, 3, rows, SHAPE[1]) * torch.tensor([1.0, 1e4, 1e-4, 3.0])
    exact = moments_of(inputs)
    single = ModuleMoments("activations", {e: {m: exact.experts[e].read(m).float() for m in MODULES} for e in EXPERTS})
    found = RegMean(single, off_diagonal).merge(batch_of(updates.float())).double()
    for j in range(2):
        x = inputs[j, 0] / rows**0.5  # the same for all experts: the mean update, where there are inputs
        shrunk = torch.diag(((1 - off_diagonal) * x.square().sum(0)).sqrt())
        both = torch.cat([off_diagonal**0.5 * x, shrunk])
        expected = updates[j].mean(0) @ torch.linalg.pinv(both, rtol=1e-14) @ both
        assert_close(found[j], expected, 1e-3)


def test_gradient_matching_entry_by_entry_and_at_its_limits(updates: Tensor, fisher: Tensor) -> None:
    base = 0.5 * fisher.mean(1)
    statistics = fisher_of(fisher)
    with_base = ModuleMoments("fisher", {**statistics.experts, "base": {m: base[j] for j, m in enumerate(MODULES)}})
    found = GradientMatching(with_base, scale=0.7, floor=1e-3, base="base").merge(batch_of(updates))
    # The paper's form: a preconditioned sum, with dense diagonal matrices on vec(Z).
    for j in range(2):
        prior = torch.diag(base[j].flatten() + 1e-3)
        hessians = [torch.diag(fisher[j, i].flatten()) for i in range(3)]
        total = prior + 0.7 * sum(hessians)
        expected = sum(
            0.7 * torch.linalg.inv(total) @ (prior + h) @ updates[j, i].flatten() for i, h in enumerate(hessians)
        )
        assert_close(found[j].flatten(), expected)
    limits = GradientMatching(statistics, scale=0.7, floor=1e12).merge(batch_of(updates))
    assert_close(limits, TaskArithmetic(0.7).merge(batch_of(updates)), 1e-9)
    limits = GradientMatching(statistics, scale=0.7, floor=1e-14).merge(batch_of(updates))
    assert_close(limits, (fisher * updates).sum(1) / fisher.sum(1), 1e-8)


GIVEN = [
    lambda f, x: FisherMerging(f, normalize=False),
    lambda f, x: FisherMerging(f),
    lambda f, x: RegMean(x),
    lambda f, x: GradientMatching(f, 0.5),
]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_methods_on_statistics_at_the_awkward_points(
    index: int, dtype: torch.dtype, updates: Tensor, fisher: Tensor, generator: torch.Generator
) -> None:
    inputs = torch.randn(2, 3, 30, SHAPE[1], generator=generator, dtype=torch.float64)
    method: MergingMethod = GIVEN[index](fisher_of(fisher), moments_of(inputs))
    updates = updates.to(dtype)
    before = updates.clone()
    exact = method.prepare(modules_of(updates.double())).merge(batch_of(updates.double()))
    ready = method.prepare(modules_of(updates))
    found = ready.merge(batch_of(updates))
    assert found.dtype == dtype
    assert torch.equal(updates, before)
    assert_close(found.double(), exact, {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])
    order = [2, 0, 1]
    turned = ModuleBatch.of(updates[:, order], MODULES, [EXPERTS[i] for i in order])
    by_turned = method.prepare(
        [replace(m, names=turned.experts, updates=m.updates[order]) for m in modules_of(updates)]
    )
    assert_close(by_turned.merge(turned).double(), exact, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    zero = updates.clone()
    zero[:, 1] = 0
    assert bool(ready.merge(batch_of(zero)).isfinite().all())
    same = updates[:, :1].expand(-1, 3, -1, -1)
    if not isinstance(method, GradientMatching):  # a sum, like task arithmetic
        assert_close(
            ready.merge(batch_of(same)).double(), same[:, 0].double(), 1e-2 if dtype == torch.bfloat16 else 1e-5
        )


def test_statistics_that_do_not_fit_are_named(tmp_path: Path, updates: Tensor, fisher: Tensor) -> None:
    fisher_of(fisher).save(tmp_path / "f")
    folder = MomentsFolder(tmp_path / "f")
    assert_close(
        GradientMatching(folder).merge(batch_of(updates)), GradientMatching(fisher_of(fisher)).merge(batch_of(updates))
    )
    with pytest.raises(CheckpointError, match="expected activations"):
        RegMean(folder).merge(batch_of(updates))
    with pytest.raises(CheckpointError, match="no fisher moments of expert '0'"):
        GradientMatching(folder)(updates)
    with pytest.raises(ValueError, match="it needs no data. Its moments are a field"):
        GradientMatching(folder).prepare([], TaskData({}, lambda weights, batch: batch))
    with pytest.raises(ValueError, match="floor=0.0"):
        FisherMerging(folder, floor=0.0)
    with pytest.raises(TypeError, match=r"a folder of some, `MomentsFolder\(path\)`"):
        FisherMerging(str(tmp_path / "f"))  # type: ignore[arg-type]


def test_collected_statistics_reach_the_methods() -> None:
    """From models and data to merged updates, as a user would."""
    vectors, data, model, loaders = setting()
    fisher, moments = {}, {}
    for name in vectors.names:
        model.load_state_dict({k: vectors.experts[name].read(k) for k in vectors.base.tensors})
        call = lambda m, b: m(b)  # noqa: E731
        fisher[name] = collect_fisher(model, loaders[name], call, vectors.views, dtype=torch.float64)
        moments[name] = collect_activations(model, loaders[name], call, vectors.views, dtype=torch.float64)
    methods: list[MergingMethod] = [
        FisherMerging(ModuleMoments("fisher", fisher)),
        RegMean(ModuleMoments("activations", moments)),
        GradientMatching(ModuleMoments("fisher", fisher), 0.4),
    ]
    for method in methods:
        ready = method.prepare(vectors)
        for module in vectors:
            merged = ready.merge(ModuleBatch.of_module(module))
            assert merged.shape == (1, *module.base.shape)
            assert 0 < float(merged.norm()) < 2 * float(module.updates.norm())


@pytest.mark.parametrize("cls", [c for c in METHODS.values() if c.about.data != "none"], ids=lambda c: c.__name__)
def test_registered_with_what_it_needs(cls: type[MergingMethod]) -> None:
    assert ", 20" in cls.about.citation
    assert "arXiv" in cls.about.citation
    assert cls.about.data in ("fisher", "activations", "inputs")
    assert name_of(cls)


def test_whole_checkpoints_by_methods_on_statistics(tmp_path: Path) -> None:
    """Merged by the streaming machinery, alone and as a centre; the statistics are among the recorded inputs."""
    vectors, data, model, loaders = setting()
    fisher = {}
    for name in vectors.names:
        model.load_state_dict({k: vectors.experts[name].read(k) for k in vectors.base.tensors})
        fisher[name] = collect_fisher(model, loaders[name], lambda m, b: m(b), vectors.views, dtype=torch.float64)
    ModuleMoments("fisher", fisher).save(tmp_path / "f")
    method = FisherMerging(MomentsFolder(str(tmp_path / "f")))
    merge_checkpoint(vectors, method, tmp_path / "alone")
    ready = method.prepare(vectors)
    found = TaskVectors(vectors.base, {"m": tmp_path / "alone"}, dtype=torch.float64)
    for module, merged in zip(vectors, found, strict=True):
        assert_close(merged.updates, ready.merge(ModuleBatch.of_module(module)), 1e-10)
    record = json.loads((tmp_path / "alone" / "poe_merge.json").read_text())
    assert list(record["inputs"]["fisher statistics a"]["sha256"]) == ["a.safetensors"]
    poe = ProductOfExperts.of(vectors.names, anchor=Anchor(method))
    merge_checkpoint(vectors, poe, tmp_path / "centre")
    record = json.loads((tmp_path / "centre" / "poe_merge.json").read_text())
    assert "fisher statistics b" in record["inputs"]
    (tmp_path / "f" / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no fisher moments of expert 'b'"):
        merge_checkpoint(vectors, method, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("how", ["method", "anchor"])
def test_command_line_finds_the_statistics_of_a_method(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"base": torch.zeros(2, 3), "x": torch.ones(2, 3), "y": -torch.ones(2, 3)}
    for name, weight in states.items():
        save_file({"a.weight": weight}, tmp_path / f"{name}.safetensors")
    given = {n: {"a.weight": torch.eye(3) * (1 + 2 * (n == "x"))} for n in "xy"}
    ModuleMoments("activations", given).save(tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    arguments = ["--base-model", "base.safetensors", "--model", "x=x.safetensors", "--model", "y=y.safetensors"]
    arguments += [f"--{how}", "RegMean('inputs')"] + (["--eta", "AbsolutePrecision(1e9)"] if how == "anchor" else [])
    assert run(["merge", *arguments, "--out", "out"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    assert_close(merged, torch.full((2, 3), 0.5), 1e-5)
    inputs = json.loads((tmp_path / "out" / "poe_merge.json").read_text())["inputs"]
    assert "activations statistics x" in inputs
