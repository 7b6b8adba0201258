"""Every merging rule against its re-implementation on whole models in memory (`tests.dense_anchors`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import fixed_point
from poe_models import Absolute, AbsolutePrecision, Anchor, Gaussian, Identity, InputGram, NormScaled, ProductOfExperts
from poe_models.methods import (
    TSVM,
    Average,
    Dare,
    DareTies,
    DogeTA,
    IsoC,
    IsoCTS,
    KnotsDareTies,
    KnotsTies,
    MergingMethod,
    MetaGPT,
    ModuleBatch,
    TaskArithmetic,
    Ties,
    Wudi,
    WudiAdam,
)
from poe_models.methods.selection import magnitude_thresholds
from poe_models.weights.task_vectors import ModuleUpdates
from tests import dense_anchors as dense
from tests.helpers import assert_close, random_updates

SHAPES = {"b.weight": (12, 9), "a.weight": (7, 11), "c.weight": (6, 6)}
EXPERTS = ("mnist", "emoji", "animals")


def modules_of(generator: torch.Generator, experts: tuple[str, ...] = EXPERTS) -> list[ModuleUpdates]:
    made = []
    for name, (d_out, d_in) in SHAPES.items():
        updates = random_updates(generator, 1, len(experts), d_out, d_in)[0]
        made.append(ModuleUpdates(name, name, experts, torch.zeros(d_out, d_in, dtype=torch.float64), updates))
    return made


def model_of(modules: list[ModuleUpdates]) -> dense.Model:
    return {module.name: module.updates.numpy().copy() for module in modules}


def merged_by(method: MergingMethod, modules: list[ModuleUpdates]) -> dict[str, Tensor]:
    ready = method.prepare(modules)
    return {module.name: ready.merge(ModuleBatch.of_module(module))[0] for module in modules}


def assert_same(found: dict[str, Tensor], expected: dense.Merged, tolerance: float = 1e-10) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        assert_close(value, torch.from_numpy(np.ascontiguousarray(expected[name])), tolerance)


def scaled(merged: dense.Merged, factor: float) -> dense.Merged:
    return {name: factor * value for name, value in merged.items()}


CASES: list[tuple[MergingMethod, Callable[[dense.Model], dense.Merged]]] = [
    (Average(), lambda model: dense.each(model, lambda u: u.mean(0))),
    (TaskArithmetic(0.4), lambda model: dense.each(model, lambda u: 0.4 * u.sum(0))),
    (MetaGPT(), dense.metagpt),
    (Ties(), lambda model: dense.ties(model, 0.2)),
    (Ties(0.35, 0.5, "sum"), lambda model: scaled(dense.ties(model, 0.35, "sum"), 0.5)),
    (Ties(0.7, combine="max"), lambda model: dense.ties(model, 0.7, "max")),
    (Ties(1.0), lambda model: dense.ties(model, 1.0)),
    (Ties(0.001), lambda model: dense.ties(model, 0.001)),
    (Ties(0.3, scope="module"), lambda model: {n: dense.ties({n: u}, 0.3)[n] for n, u in model.items()}),
    (KnotsTies(), lambda model: scaled(dense.knots(model, lambda own: own, 0.2), 0.6)),
    (KnotsDareTies(drop=0.0), lambda model: scaled(dense.knots(model, lambda own: own, 1.0), 0.7)),
    (TSVM(), lambda model: dense.each(model, dense.tsvm)),
    (IsoC(scale=1.5), lambda model: scaled(dense.each(model, dense.iso_c), 1.5)),
    (IsoCTS(), lambda model: dense.each(model, lambda u: dense.iso_cts(u, 0.8))),
    (IsoCTS(common=0.4), lambda model: dense.each(model, lambda u: dense.iso_cts(u, 0.4))),
    (Wudi(), lambda model: dense.each(model, dense.wudi)),
    (DogeTA(steps=30, learning_rate=1e-2), lambda model: dense.doge(model, 0.07, 0.3, 6, 30, 1e-2)),
    (DogeTA(0.5, 0.6, 2, 40), lambda model: dense.doge(model, 0.5, 0.6, 2, 40, 1e-4)),
]


@pytest.mark.parametrize(("method", "reference"), CASES, ids=[repr(method) for method, _ in CASES])
def test_a_method_is_its_dense_reimplementation(
    method: MergingMethod, reference: Callable[[dense.Model], dense.Merged], generator: torch.Generator
) -> None:
    modules = modules_of(generator)
    assert_same(merged_by(method, modules), reference(model_of(modules)), 1e-8)


def test_ties_elects_the_model_s_majority_where_experts_cancel(generator: torch.Generator) -> None:
    modules = modules_of(generator, ("mnist", "emoji"))
    for index, module in enumerate(modules):
        module.updates.abs_().neg_()
        if index == 1:
            module.updates[1] = -module.updates[0]  # everything cancels in this module
    for sign in (1.0, -1.0):
        signed = [ModuleUpdates(m.name, m.tensor, m.names, m.base, sign * m.updates) for m in modules]
        method = Ties(1.0, combine="sum").prepare(signed)
        assert method.majority == -sign
        assert_same(merged_by(Ties(1.0, combine="sum"), signed), dense.ties(model_of(signed), 1.0, "sum"))


def test_module_ties_elects_the_module_s_majority() -> None:
    updates = torch.tensor([[[2.0, 1.0, 3.0, 1.0]], [[-2.0, 1.0, 1.0, -2.0]]], dtype=torch.float64)
    expected = torch.tensor([[2.0, 1.0, 2.0, -2.0]], dtype=torch.float64)
    assert_close(Ties(1.0, scope="module")(updates), expected)
    assert_close(Ties(1.0, scope="module")(-updates), -expected)


def thinned(modules: list[ModuleUpdates], drop: float, seed: int) -> dense.Model:
    """What DARE leaves of each expert alone."""
    model = {}
    for module in modules:
        alone = [
            Dare(drop, 1.0, seed).merge(ModuleBatch.of(module.updates[None, i : i + 1], [module.name], [expert]))[0]
            for i, expert in enumerate(module.names)
        ]
        model[module.name] = torch.stack(alone).numpy()
    return model


def test_dare_drops_and_rescales(generator: torch.Generator) -> None:
    modules = modules_of(generator)
    model = thinned(modules, 0.7, seed=3)
    kept = 0
    for module in modules:
        left = torch.from_numpy(model[module.name])
        kept += int((left != 0).sum())
        assert_close(left[left != 0], (module.updates / 0.3)[left != 0])
    entries = 3 * sum(a * b for a, b in SHAPES.values())
    assert abs(kept - 0.3 * entries) < 4 * (0.21 * entries) ** 0.5
    expected = dense.each(model, lambda u: 0.25 * u.sum(0))
    assert_same(merged_by(Dare(0.7, 0.25, seed=3), modules), expected)


def test_the_mean_of_dare_over_seeds_is_task_arithmetic(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)[0]
    draws = torch.stack([Dare(0.6, 0.3, seed)(updates) for seed in range(4000)])
    error = (draws.mean(0) - TaskArithmetic(0.3)(updates)).abs()
    spread = (0.3**2 * updates.square().sum(0) * 0.6 / 0.4).sqrt()
    assert_close(draws.std(0), spread, 0.1)
    assert bool((error < 5 * spread / 4000**0.5).all())


def test_dare_ties_is_ties_of_what_dare_leaves(generator: torch.Generator) -> None:
    modules = modules_of(generator)
    expected = dense.ties(thinned(modules, 0.4, seed=5), 0.3, "sum")
    assert_same(merged_by(DareTies(0.4, 0.3, 1.0, "sum", seed=5), modules), expected)


def test_knots_dare_ties_thins_the_representations(generator: torch.Generator) -> None:
    """Orthogonal rows of distinct length: the basis is the rows of the identity, smallest first, and R_i = U_i."""
    sizes = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    right = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    updates = torch.stack([sizes[:, None] * right[:3], sizes[:, None] * right[3:6]])
    module, turned = (
        ModuleUpdates("w", "w", ("mnist", "emoji"), torch.zeros(3, 8), each) for each in (updates, updates.flip(1))
    )
    expected = dense.ties(thinned([turned], 0.5, seed=2), 0.3)["w"][::-1]
    assert_same(merged_by(KnotsDareTies(0.5, 0.3, 1.0, seed=2), [module]), {"w": expected})


def test_iterative_wudi_is_adam_on_the_objective(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 5, 7)[0]
    assert_close(WudiAdam(25, 1e-3)(updates), dense.wudi_adam(updates, 25, 1e-3), 1e-8)


def test_iterative_wudi_goes_towards_the_closed_form(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 8, 4)[0]
    closed = Wudi()(updates)
    distances = [float((WudiAdam(steps, 3e-2)(updates) - closed).norm()) for steps in (0, 100, 3000)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3 * distances[0]


# --- Gaussian products of experts ---


def test_wudi_is_a_gaussian_product(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 6, 5)
    poe = ProductOfExperts.of(
        EXPERTS, InputGram(), Gaussian(), NormScaled(1.0), anchor=Anchor(precision=AbsolutePrecision(1e-12))
    )
    assert_close(Wudi()(updates), fixed_point(poe.bind(updates)).value, 1e-8)


def test_the_average_is_a_gaussian_product(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 6, 5)
    poe = ProductOfExperts.of(
        EXPERTS, Identity(), Gaussian(), Absolute(1.0), anchor=Anchor(precision=AbsolutePrecision(0.0))
    )
    assert_close(Average()(updates), fixed_point(poe.bind(updates)).value)


# --- the exact k-th value ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-6, 0.2, 0.5, 0.77, 1.0])
def test_thresholds_are_exact(dtype: torch.dtype, density: float, generator: torch.Generator) -> None:
    parts = [torch.randn(3, size, generator=generator, dtype=dtype) for size in (1, 400, 77)]
    parts[1] *= 1e-30
    parts[2][1] = 0
    parts[1][2, :300] = parts[1][2, 0]  # many equal values
    expected = dense.thresholds(torch.cat(parts, 1).numpy(), density)
    assert magnitude_thresholds(lambda: parts, density) == tuple(expected.tolist())


def test_thresholds_of_half_precision_differences(generator: torch.Generator) -> None:
    """Updates of bfloat16 checkpoints have few distinct values."""
    base = torch.randn(2000, generator=generator).bfloat16()
    tuned = (base + 1e-2 * torch.randn(4, 2000, generator=generator)).bfloat16()
    updates = tuned.float() - base.float()
    assert len(updates.unique()) < 2000
    expected = dense.thresholds(updates.numpy(), 0.3)
    assert magnitude_thresholds(lambda: updates.split(700, 1), 0.3) == tuple(expected.tolist())


def test_thresholds_of_zeros_and_of_nothing() -> None:
    assert magnitude_thresholds(lambda: [torch.zeros(2, 5)], 0.2) == (0.0, 0.0)
    assert magnitude_thresholds(lambda: [torch.zeros(2, 0)], 0.2) == (0.0, 0.0)


def test_a_centre_of_ones_own_is_told_the_names(generator: torch.Generator) -> None:
    """The ground floor knows a merging method by what it can do, not by its class."""

    class ByName:
        def __init__(self, names: tuple[str, ...] = ()) -> None:
            self.names = names

        def for_modules(self, modules: Sequence[str], experts: Sequence[str]) -> ByName:
            return ByName((*modules, *experts))

        def __call__(self, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
            return torch.full_like(updates[:, 0], float(self.names == ("m", "a", "b")))

    updates = random_updates(generator, 1, 2, 3, 4)
    poe = ProductOfExperts.of(["a", "b"], Identity(), Gaussian(), anchor=Anchor(ByName(), AbsolutePrecision(1e9)))
    assert_close(fixed_point(poe.for_modules(["m"]).bind(updates)).value, torch.ones(1, 3, 4), 1e-6)
    assert_close(fixed_point(poe.bind(updates)).value, torch.zeros(1, 3, 4), 1e-6)


def test_a_batch_prints_in_a_line_without_tensors() -> None:
    batch = ModuleBatch.of(torch.ones(1, 2, 3, 4), ["m"], ["a", "b"])
    assert repr(batch) == "ModuleBatch(m of a, b, (1, 2, 3, 4))"
