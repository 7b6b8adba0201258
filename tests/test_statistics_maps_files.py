"""Residual maps on given statistics: files, streamed checkpoints, specs, ensembles, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import Design, fixed_point, gibbs, merge_checkpoint, plan
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import sample_full
from inference.models.model_draws import ModelDraws, SpanDraws
from inference.models.statistics_files import collect_statistics, load_statistics, save_statistics
from poe_merge.cli import run
from poe_merge.specs import RESIDUAL_MAP, SpecError, canonical, parse_spec
from poe_models import (
    Absolute,
    Activation,
    Anchor,
    CheckpointError,
    Fisher,
    Gaussian,
    Mixed,
    ModuleMoments,
    MomentsFolder,
    ProductOfExperts,
    RelativePrecision,
    TaskVectors,
)
from poe_models.residual_maps import MomentKind
from tests.helpers import assert_close, random_updates
from tests.made_statistics import MODULES, NAMES, SHAPE, anchor, statistics


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("fisher", torch.full(SHAPE, -1.0), "expert 'a'.*module 'one' has entries below zero"),
        ("fisher", torch.full(SHAPE, torch.nan), "expert 'a'.*module 'one' has values that are NaN"),
        ("fisher", torch.ones(3, 4), r"module 'one' has \(3, 4\), expected \(4, 3\)"),
        ("activations", torch.ones(SHAPE), r"expected \(3, 3\) for a matrix \(4, 3\)"),
        ("activations", torch.ones(3, 3).triu(), "module 'one' has a matrix that is not symmetric"),
        ("activations", -torch.eye(3), "diagonal entries below zero"),
        ("activations", 2 * torch.ones(3, 3) - torch.eye(3), "expert 'a', modules one: .*not positive semi-def"),
    ],
)
def test_bad_statistics_are_refused_by_name(kind: MomentKind, value: Tensor, message: str) -> None:
    given = ModuleMoments(kind, {"a": {"one": value}})
    residual_map = Fisher(given) if kind == "fisher" else Activation(given)
    poe = ProductOfExperts.of(["a"], residual_map).for_modules(["one"])
    with pytest.raises(ValueError, match=message):
        poe.bind(torch.ones(1, 1, *SHAPE))


def test_what_is_missing_is_named(generator: torch.Generator) -> None:
    given = ModuleMoments("fisher", statistics(generator, "fisher"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, Fisher(given))
    with pytest.raises(ValueError, match=r"name the modules of the batch: `poe.for_modules"):
        poe.bind(updates)
    with pytest.raises(ValueError, match="no module 'on'; the nearest is 'one'"):
        poe.for_modules(["on", "two"]).bind(updates)
    with pytest.raises(ValueError, match="for the 1 modules one"):
        poe.for_modules(["one"]).bind(updates)
    with pytest.raises(CheckpointError, match="none of expert 'd', only of a, b, c"):
        ProductOfExperts.of(["d"], Fisher(given)).for_modules(MODULES).bind(updates[:, :1])
    with pytest.raises(TypeError, match="activations moments are wanted"):
        ProductOfExperts.of(NAMES, Activation(given)).for_modules(MODULES).bind(updates)
    with pytest.raises(ValueError, match="the kinds are 'fisher', 'activations'"):
        ModuleMoments("hessian", {"a": {}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mixed(given, 1.5)
    with pytest.raises(ValueError, match="floor must be"):
        Fisher(given, -1.0)


def test_files_round_trip_and_are_refused_when_they_are_something_else(
    tmp_path: Path, generator: torch.Generator
) -> None:
    shared = torch.eye(3)
    given = ModuleMoments("activations", {"a/b": {"x[0]": shared, "x[1]": shared}, "c": {"x[0]": 2 * shared}})
    given.save(tmp_path / "s")
    again = MomentsFolder(tmp_path / "s").opened("activations")
    assert set(again.experts) == {"a/b", "c"}
    assert_close(again.read("a/b", ["x[0]", "x[1]"], SHAPE), torch.stack([shared, shared]))
    assert again.experts["a/b"].aliases == {"x[1]": "x[0]"}
    with pytest.raises(FileExistsError, match="is there already"):
        given.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match="holds activations moments, expected fisher"):
        MomentsFolder(tmp_path / "s").opened("fisher")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        MomentsFolder(tmp_path / "t").opened("fisher")
    with pytest.raises(CheckpointError, match="no activations moments of expert 'd', only of a/b, c"):
        MomentsFolder(tmp_path / "s").opened("activations", ["d"])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["a%2Fb.safetensors", "c.safetensors"]
    other = ModuleMoments("activations", {"c": {"x[0]": 3 * shared}})
    assert repr(given) != repr(other)
    assert repr(given) == repr(ModuleMoments("activations", dict(given.experts)))


@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_a_whole_checkpoint_with_blocks_streams(tmp_path: Path, coordinates: str, generator: torch.Generator) -> None:
    base = {"a.qkv.weight": torch.zeros(6, 2), "b.weight": torch.zeros(2, 2), "b.bias": torch.zeros(2)}
    experts = {
        name: {key: torch.randn(value.shape, generator=generator) for key, value in base.items()} for name in ("x", "y")
    }
    vectors = TaskVectors(base, experts)
    modules = ["a.qkv.weight[0]", "a.qkv.weight[1]", "a.qkv.weight[2]", "b.weight"]
    fisher = {n: {m: torch.rand(2, 2, generator=generator) + 0.1 for m in modules} for n in experts}
    ModuleMoments("fisher", fisher).save(tmp_path / "fisher")
    residual_map = Fisher(MomentsFolder(str(tmp_path / "fisher")))
    poe = ProductOfExperts.of(vectors.names, residual_map, Gaussian(), Absolute(1.0), anchor=anchor(1e-12))
    design = Design(poe, coordinates=coordinates)  # type: ignore[arg-type]
    merge_checkpoint(vectors, design, tmp_path / "out")
    merged = TaskVectors(base, {"merged": tmp_path / "out"})
    if coordinates == "full":
        for module, found in zip(vectors, merged, strict=True):
            f = torch.stack([fisher[n][module.name] for n in vectors.names])
            assert_close(found.updates[0], (f * module.updates).sum(0) / f.sum(0), 1e-5)
    else:
        statistics = collect_statistics(vectors, design)
        assert statistics.modules == tuple(modules)
    record = json.loads((tmp_path / "out" / "poe_merge.json").read_text())
    assert list(record["inputs"]["fisher statistics x"]["sha256"]) == ["x.safetensors"]
    assert "floor=0.0" in record["designs"][0]["experts"][0]["residual_map"]


def test_a_plan_finds_missing_statistics_from_headers(tmp_path: Path) -> None:
    base = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(2, 3)}
    vectors = TaskVectors(base, {"x": {name: torch.ones(2, 3) for name in base}})
    ModuleMoments("activations", {"x": {"a.weight": torch.eye(3)}}).save(tmp_path)
    poe = ProductOfExperts.of(
        ["x"], Activation(MomentsFolder(str(tmp_path))), anchor=Anchor(precision=RelativePrecision(0.1))
    )
    with pytest.raises(CheckpointError, match=r"expert 'x' .*no module 'b.weight'; the nearest is 'a.weight'"):
        plan(vectors, poe)


def test_specs_find_statistics_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ModuleMoments("fisher", {"x": {"a.weight": torch.ones(2, 3)}}).save(tmp_path / "here" / "f")
    monkeypatch.chdir(tmp_path)
    found = parse_spec("Fisher('f', floor=1e-3)", RESIDUAL_MAP, [tmp_path / "here", tmp_path])
    assert found == Fisher(MomentsFolder(str(tmp_path / "here" / "f")), 1e-3)
    text = canonical("Fisher('f', floor=1e-3)", RESIDUAL_MAP, [tmp_path / "here", tmp_path])
    assert parse_spec(text, RESIDUAL_MAP, [tmp_path / "elsewhere"]) == found
    assert text == canonical(text, RESIDUAL_MAP)
    with pytest.raises(SpecError, match="floor must be"):
        parse_spec("Fisher('f', floor=-1)", RESIDUAL_MAP)


def test_command_line_merges_with_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a.weight": torch.zeros(2, 3)}
    experts = {"x": {"a.weight": torch.ones(2, 3)}, "y": {"a.weight": -torch.ones(2, 3)}}
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    ModuleMoments("activations", {n: {"a.weight": torch.eye(3) * (1 + 2 * (n == "x"))} for n in "xy"}).save(
        tmp_path / "inputs"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--base-model", "base.safetensors", "--model", "x=x.safetensors", "--model", "y=y.safetensors"]
    arguments += ["--residual-map", "Activation('inputs')", "--energy", "Gaussian", "--scale", "Absolute(1.0)"]
    assert run(["merge", *arguments, "--eta", "AbsolutePrecision(1e-9)", "--out", "out"]) == 0
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["a.weight"], torch.full((2, 3), 0.5), 1e-5)


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_ensembles_of_whole_models(tmp_path: Path, coordinates: str, generator: torch.Generator) -> None:
    base = {name: torch.zeros(SHAPE, dtype=torch.float64) for name in MODULES}
    updates = random_updates(generator, 2, 3, *SHAPE)
    experts = {n: dict(zip(MODULES, updates[:, i], strict=True)) for i, n in enumerate(NAMES)}
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    ModuleMoments("activations", statistics(generator, "activations")).save(tmp_path)
    poe = ProductOfExperts.of(NAMES, Activation(MomentsFolder(str(tmp_path)), 0.9), Gaussian(), anchor=anchor(0.1))
    poe = dataclasses.replace(poe, temperature=1e-12)  # draws are the MAP
    if coordinates == "full":
        draws: ModelDraws = sample_full(vectors, poe, 3, generator=generator, chains=1, warmup=0)
    else:
        collected = collect_statistics(vectors, poe)  # through the merge in Full coordinates
        posterior = poe.bind(collected)
        draws = SpanDraws.of(gibbs(posterior, 3, chains=1, warmup=0, generator=generator), posterior)
    ensemble = MergedEnsemble(vectors, poe, draws).restrict("one")  # "two" is solved for its MAP
    for member in ensemble.members():
        for m, module in enumerate(vectors):
            expected = fixed_point(poe.bind(module)).value[0]
            assert_close(member[MODULES[m]], expected, 1e-4)


def test_records_of_earlier_versions_still_open(tmp_path: Path, generator: torch.Generator) -> None:
    """Maps on moments were ``Activation(statistics=...)`` until 0.2, in specs and in records."""
    made = statistics(generator, "activations")
    ModuleMoments("activations", made).save(tmp_path / "moments")
    old = f"Activation(statistics='{tmp_path / 'moments'}', off_diagonal=0.5)"
    assert repr(parse_spec(old, RESIDUAL_MAP)) == old.replace("statistics=", "moments=")
    with pytest.raises(SpecError, match="multiple values"):
        parse_spec(f"Activation('{tmp_path}', statistics='{tmp_path}')", RESIDUAL_MAP)
    updates = random_updates(generator, 2, 3, *SHAPE)
    experts = {n: dict(zip(MODULES, updates[:, i], strict=True)) for i, n in enumerate(NAMES)}
    vectors = TaskVectors({name: torch.zeros(SHAPE, dtype=torch.float64) for name in MODULES}, experts)
    poe = ProductOfExperts.of(NAMES, Activation(MomentsFolder(tmp_path / "moments")), anchor=anchor(0.1))
    record = save_statistics(collect_statistics(vectors, poe), tmp_path / "kept") / "statistics.json"
    assert "(moments=" in record.read_text()
    record.write_text(record.read_text().replace("(moments=", "(statistics="))
    poe.bind(load_statistics(tmp_path / "kept"))
