"""Whole models on a GPU against the CPU: methods, statistics and checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed_models import shapes_of, write
from inference import Design, merge_checkpoint, plan
from inference.models.budget import batch_bytes_within, memory_of
from poe_models import (
    METHODS,
    TSVM,
    Activation,
    Anchor,
    Dare,
    Fisher,
    InputGram,
    IsoC,
    MergingMethod,
    Mixed,
    ModuleMoments,
    MomentsFolder,
    OutputGram,
    ProductOfExperts,
    ResidualMap,
    TaskArithmetic,
    TaskData,
    TaskVectors,
    Ties,
    View,
    Wudi,
    average,
    collect_activations,
    collect_fisher,
    open_checkpoint,
)
from poe_models.methods import ModuleBatch
from tests.gpu.toys import NAMES, Net, Open, batches, product, weights
from tests.helpers import assert_close, merged, random_updates
from tests.seeds import seeded

pytestmark = pytest.mark.gpu


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prepared(method: type[MergingMethod], device: torch.device, updates: dict[str, Tensor]) -> MergingMethod:
    """A method with the default settings, that has seen a model of these updates on a device."""
    kind, base = method.about.data, {name: torch.zeros_like(u[0]) for name, u in updates.items()}
    made: Any = method
    if kind in ("fisher", "activations"):
        given: dict[str, dict[str, Tensor]] = {}
        for i, expert in enumerate(NAMES):
            drawn = {n: random_updates(seeded(i), 1, 30, 1, u.shape[2])[0, :, 0] for n, u in updates.items()}
            gram = {n: rows.mT @ rows for n, rows in drawn.items()}
            given[expert] = gram if kind == "activations" else {n: u[i].square() for n, u in updates.items()}
        return made(moments=ModuleMoments(kind, given)).prepare(vectors_of(base, updates, device))
    vectors = vectors_of(base, updates, device)
    if not method().needs_loaders:  # type: ignore[call-arg]
        return made().prepare(vectors)
    inputs = {name: [torch.randn(6, 8, generator=seeded(i)).double().to(device)] for i, name in enumerate(NAMES)}

    def forward(state: Any, batch: Any) -> Tensor:
        hidden = [torch.tanh(batch[:, : each.shape[1]] @ each.mT)[:, :4] for each in state.values()]
        return torch.stack(hidden).sum(0)

    return made(steps=5, learning_rate=0.05).prepare(vectors, TaskData(inputs, forward))


def vectors_of(base: dict[str, Tensor], updates: dict[str, Tensor], device: torch.device) -> TaskVectors:
    tuned = {expert: {n: u[i].clone() for n, u in updates.items()} for i, expert in enumerate(NAMES)}
    return TaskVectors(base, tuned, dtype=torch.float64, device=device)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_alike_and_draws_the_same(name: str, device: torch.device) -> None:
    updates = {f"{i}.weight": random_updates(seeded(i), 1, 3, *shape)[0] for i, shape in enumerate([(9, 8), (8, 6)])}
    found = []
    for place in (torch.device("cpu"), device):
        method = prepared(METHODS[name], place, updates)
        parts = [method.merge(ModuleBatch.of(u[None].to(place), [n], NAMES)) for n, u in updates.items()]
        assert all(part.device.type == place.type for part in parts)
        found.append([part.cpu() for part in parts])
    learned = METHODS[name].about.data in ("inputs", "labels") or "Adam" in name  # steps of Adam add rounding up
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-4 if learned else 1e-6)


def test_adapters_factors_are_used_alike(device: torch.device, generator: torch.Generator) -> None:
    left, right = (torch.randn(2, 3, *shape, generator=generator).double() for shape in ((9, 2), (2, 7)))
    for method in (Ties(scope="module"), TSVM(), IsoC(), Wudi()):
        one, other = (
            method((left @ right).to(place), (left.to(place), right.to(place))).cpu()
            for place in (torch.device("cpu"), device)
        )
        assert_close(other, one, 1e-6)


def test_a_method_is_an_anchors_centre(device: torch.device, opened: Open) -> None:
    poe = product(anchor=Anchor(Ties(scope="module")))
    for here, there in zip(opened("cpu", torch.float64), opened(device, torch.float64), strict=True):
        assert_close(poe.bind(there).center.cpu(), poe.bind(here).center, 1e-10)  # type: ignore[union-attr]


def collected(nets: dict[str, Net], device: torch.device) -> dict[str, dict[str, dict[str, Tensor]]]:
    views = {"stem.weight": View(), "layers.0.weight": View(), "qkv.weight": View(blocks=3)}
    loader = [batch.double().to(device) for batch in batches()]
    found: dict[str, dict[str, dict[str, Tensor]]] = {"fisher": {}, "activations": {}}
    for name in NAMES:
        model = copy.deepcopy(nets[name]).double().to(device)
        how = {"dtype": torch.float64}
        found["fisher"][name] = collect_fisher(model, loader, lambda m, x: m(x), views, **how)  # type: ignore[arg-type]
        found["activations"][name] = collect_activations(model, loader, lambda m, x: m(x), views, **how)  # type: ignore[arg-type]
    return found


def test_fisher_information_and_second_moments_are_collected_alike(
    nets: dict[str, Net], device: torch.device, tmp_path: Path
) -> None:
    here, there = collected(nets, torch.device("cpu")), collected(nets, device)
    for kind in ("fisher", "activations"):
        for name in NAMES:
            for module, value in there[kind][name].items():
                assert value.device.type == device.type
                assert_close(value.cpu(), here[kind][name][module], 1e-9)
        ModuleMoments(kind, there[kind]).save(tmp_path / kind)  # type: ignore[arg-type]
        again = MomentsFolder(str(tmp_path / kind)).opened(kind)  # type: ignore[arg-type]
        shape = (4, 12) if kind == "fisher" else (12, 12)
        value = again.read("x", ["qkv.weight[1]"], (4, 12))[0]
        assert tuple(value.shape) == shape
        assert torch.equal(value.to(device), there[kind]["x"]["qkv.weight[1]"])


@pytest.mark.parametrize("kind", [Fisher, Activation, Mixed])
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_maps_on_statistics_merge_alike(kind: Any, where: str, device: torch.device) -> None:
    """Wherever the statistics are."""
    updates = random_updates(seeded(0), 2, 3, 7, 6)
    statistics, modules = {}, ("one", "two")
    for i, name in enumerate(NAMES):
        rows = random_updates(seeded(i), 2, 1, 20, 6)[:, 0]
        value = updates[:, i].square() if kind is Fisher else rows.mT @ rows / 20
        statistics[name] = dict(zip(modules, value, strict=True))
    on_device = {n: {m: v.to(device) for m, v in each.items()} for n, each in statistics.items()}

    def of(given: dict[str, dict[str, Tensor]]) -> ResidualMap:
        made = ModuleMoments("fisher" if kind is Fisher else "activations", given)
        result: ResidualMap = kind(made, 0.5)
        return result

    here = product(residual_map=of(statistics), anchor=Anchor(average))
    there = product(residual_map=of(on_device if where == "device" else statistics), anchor=Anchor(average))
    for how in ({}, {"coordinates": "span"}):
        one = merged(here.for_modules(modules).bind(updates, **how))  # type: ignore[arg-type]
        other = merged(there.for_modules(modules).bind(updates.to(device), **how))  # type: ignore[arg-type]
        assert_close(other.cpu(), one, 1e-6)


@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merges_are_bytes_for_bytes_the_same_twice(
    coordinates: Any, stored: torch.dtype, opened: Open, device: torch.device, tmp_path: Path
) -> None:
    design = Design(product(residual_map=(OutputGram(), InputGram())), scaling=0.8, coordinates=coordinates)
    for name, place in (("cpu", "cpu"), ("one", device), ("two", device)):
        merge_checkpoint(opened(place), design, tmp_path / name, out_dtype=stored)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    here, there = weights(tmp_path / "cpu"), weights(tmp_path / "one")
    for name, value in here.items():
        assert there[name].dtype == stored
        assert_close(there[name].float(), value.float(), 1e-3 if stored == torch.float32 else 1e-2)


class Stop(Exception):
    """An interruption."""


class StopAfter:
    """A progress that raises after so many steps of a stage."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.left, self.now = stage, steps, ""

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self.now = stage

    def advance(self, modules: int, nbytes: int) -> None:
        self.left -= self.now == self.stage
        if self.left < 0:
            raise Stop


def test_an_interrupted_merge_goes_on_with_the_same_bytes(opened: Open, device: torch.device, tmp_path: Path) -> None:
    merge_checkpoint(opened(device), product(), tmp_path / "whole", batch_bytes=1)
    with pytest.raises(Stop):
        merge_checkpoint(opened(device), product(), tmp_path / "part", batch_bytes=1, progress=StopAfter("merging", 2))
    assert not (tmp_path / "part" / "model.safetensors").exists()
    merge_checkpoint(opened(device), product(), tmp_path / "part", batch_bytes=1, resume=True)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_a_checkpoint_as_centre_and_methods_merge_alike(opened: Open, device: torch.device, tmp_path: Path) -> None:
    merge_checkpoint(opened("cpu"), TaskArithmetic(0.4), tmp_path / "centre")
    centre = open_checkpoint(tmp_path / "centre")
    designs = {"centre": Design(product(anchor=Anchor()), center=centre), "dare": Dare(drop=0.5), "ties": Ties()}
    for name, design in designs.items():
        for where, place in (("here", "cpu"), ("there", device)):
            merge_checkpoint(opened(place), design, tmp_path / f"{name} {where}")
        here, there = (weights(tmp_path / f"{name} {where}") for where in ("here", "there"))
        for key, value in here.items():
            assert_close(there[key], value, 1e-3)


def test_a_budget_of_the_devices_memory_is_kept(device: torch.device, tmp_path: Path) -> None:
    if device.type != "cuda":
        pytest.skip("only a card says what was held at most")
    shapes = shapes_of("8 512 1024 4")
    write(tmp_path, shapes)
    vectors = TaskVectors(tmp_path / "base", {f"e{i}": tmp_path / f"expert{i}" for i in range(1, 5)}, device=device)
    design = ProductOfExperts.of(vectors.names, InputGram())
    one, two = (memory_of(plan(vectors, design, batch_bytes=size), device) for size in (1, 16 * 2**20))
    budget = (one + two) // 2
    size = batch_bytes_within(budget, vectors, design)
    assert size < 16 * 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    merge_checkpoint(vectors, design, tmp_path / "merged", batch_bytes=size)
    assert torch.cuda.max_memory_allocated(device) <= budget


def test_less_precise_products_are_close_and_recorded(opened: Open, device: torch.device, tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            merge_checkpoint(opened(device), product(), tmp_path / precision)
            record = json.loads((tmp_path / precision / "poe_merge.json").read_text(encoding="utf-8"))
            assert record["matmul_precision"] == precision
    finally:
        torch.set_float32_matmul_precision(before)
    exact, rough = (weights(tmp_path / precision) for precision in ("highest", "high"))
    for name, value in exact.items():
        assert_close(rough[name], value, 1e-2)
