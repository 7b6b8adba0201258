"""Residual maps on given statistics: their operators, where the statistics come from, and how they are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import Design, fixed_point, gibbs, laplace, merge_checkpoint, plan
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import sample_full
from inference.models.model_draws import ModelDraws, SpanDraws
from inference.models.statistics_files import collect_statistics
from poe_merge.cli import run
from poe_merge.specs import RESIDUAL_MAP, SpecError, canonical, parse_spec
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Activation,
    Anchor,
    Cauchy,
    CheckpointError,
    Expert,
    Fisher,
    Gaussian,
    InputGram,
    Mixed,
    ModuleStatistics,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
    StatisticsFolder,
    TaskVectors,
    log_density,
    span_statistics,
)
from poe_models.operators import root_of
from poe_models.program import log_constant
from poe_models.residual_maps import MomentKind
from tests.helpers import assert_close, random_updates

NAMES = ("a", "b", "c")
MODULES = ("one", "two")
SHAPE = (4, 3)


def statistics(generator: torch.Generator, kind: MomentKind, shape: tuple[int, int] = SHAPE, rows: int = 20) -> dict:
    made: dict[str, dict[str, Tensor]] = {}
    for name in NAMES:
        for module in MODULES:
            inputs = torch.randn(rows, shape[1], generator=generator, dtype=torch.float64)
            fisher = torch.rand(shape, generator=generator, dtype=torch.float64)
            made.setdefault(name, {})[module] = fisher if kind == "fisher" else inputs.mT @ inputs / rows
    return made


def maps(generator: torch.Generator) -> list[ResidualMap]:
    fisher = ModuleStatistics("fisher", statistics(generator, "fisher"))
    activations = ModuleStatistics("activations", statistics(generator, "activations"))
    return [Fisher(fisher), Fisher(fisher, floor=0.1), Activation(activations, 0.9), Mixed(activations, 0.3)]


def formula(residual_map: ResidualMap, given: Tensor, update: Tensor, x: Tensor) -> Tensor:
    """q as DESIGN's table has it, with dense matrices and no factorisation."""
    if isinstance(residual_map, Fisher):
        return ((given + residual_map.floor) * x * x).sum((-2, -1))
    factor = residual_map.off_diagonal  # type: ignore[attr-defined]
    mask = torch.full_like(given, factor)
    mask.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    p = given * mask
    if isinstance(residual_map, Mixed):
        gram = update.mT @ update
        if residual_map.unit_trace:
            p = torch.stack([m / m.trace() * len(m) for m in p])
            gram = torch.stack([m / m.trace() * len(m) for m in gram])
        p = residual_map.share * p + (1 - residual_map.share) * gram
    return torch.einsum("mij,mjk,mik->m", x, p, x)


@pytest.mark.parametrize("index", range(4))
def test_operators_are_the_formulas(index: int, generator: torch.Generator) -> None:
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    for i, name in enumerate(NAMES):
        operator = residual_map.for_modules(name, MODULES).operator(updates[:, i])
        given = residual_map.source(name).read(name, MODULES, SHAPE)  # type: ignore[attr-defined]
        expected = formula(residual_map, given, updates[:, i], x)
        assert_close(operator.quadratic(x), expected)
        assert_close((x * operator.apply(x)).sum((-2, -1)), expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("unit_trace", [True, False])
def test_mixed_is_linear_in_its_parts(off_diagonal: float, unit_trace: bool, generator: torch.Generator) -> None:
    given = ModuleStatistics("activations", statistics(generator, "activations"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    residual_map = Mixed(given, 0.25, off_diagonal, unit_trace)
    q = residual_map.for_modules("b", MODULES).operator(updates[:, 1]).quadratic(x)
    assert_close(q, formula(residual_map, given.read("b", MODULES, SHAPE), updates[:, 1], x))


def test_mixed_of_a_zero_update_is_the_data_alone(generator: torch.Generator) -> None:
    given = ModuleStatistics("activations", statistics(generator, "activations"))
    x = random_updates(generator, 2, 1, *SHAPE)[:, 0]
    zero = torch.zeros_like(x)
    q = Mixed(given, 0.25, unit_trace=False).for_modules("a", MODULES).operator(zero).quadratic(x)
    assert_close(q, 0.25 * Activation(given).for_modules("a", MODULES).operator(zero).quadratic(x))
    assert bool(Mixed(given).for_modules("a", MODULES).operator(zero).quadratic(x).isfinite().all())


@pytest.mark.parametrize("index", range(4))
def test_full_span_and_program_agree(index: int, generator: torch.Generator) -> None:
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, residual_map, Cauchy())
    full = poe.for_modules(MODULES).bind(updates)
    span = poe.bind(span_statistics(poe, updates, MODULES))
    coordinates = span.span
    c = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    c[:, -1] = 0
    z = torch.einsum("mj,mjab->mab", c[:, :3], updates)
    x = coordinates.latents(c)
    assert_close(full.residuals(z), span.residuals(x))
    assert_close(full.anchor_precision, span.anchor_precision)
    assert_close(log_density(full)(z), -full.energy(z) + log_constant(full))
    solution = fixed_point(poe.for_modules(MODULES).bind(updates))
    point = solution.value.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(log_density(full)(point).sum(), point)
    assert float(gradient.abs().max()) < 1e-6
    assert solution.converged


@pytest.mark.parametrize("index", range(4))
def test_samplers_take_modules_with_names(index: int, generator: torch.Generator) -> None:
    base = {name: torch.zeros(SHAPE, dtype=torch.float64) for name in MODULES}
    updates = random_updates(generator, 2, 3, *SHAPE)
    vectors = TaskVectors(
        base, {n: dict(zip(MODULES, updates[:, i], strict=True)) for i, n in enumerate(NAMES)}, dtype=torch.float64
    )
    poe = ProductOfExperts.of(NAMES, maps(generator)[index], Gaussian())
    for m, module in enumerate(vectors):
        solution = fixed_point(poe.bind(module))
        assert_close(solution.value[0], fixed_point(poe.for_modules(MODULES).bind(updates)).value[m])
        assert_close(laplace(poe.bind(module), at=solution).mode, solution.value)
        draws = gibbs(poe.bind(module), 20, chains=1, warmup=0, generator=generator)
        assert draws.num_draws == 20


def test_gaussian_map_by_the_normal_equations(generator: torch.Generator) -> None:
    """The MAP of a dense least-squares problem on vec(Z), solved with numpy-like dense algebra."""
    for residual_map in maps(generator):
        updates = random_updates(generator, 2, 3, *SHAPE)
        poe = ProductOfExperts.of(NAMES, residual_map, Gaussian(), Absolute(0.7), anchor=anchor(0.3))
        value = fixed_point(poe.for_modules(MODULES).bind(updates)).value
        units = torch.eye(12, dtype=torch.float64).unflatten(1, SHAPE)
        for m in range(2):
            hessian, pull = 2 * 0.3 * torch.eye(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
            for i, name in enumerate(NAMES):
                given = residual_map.source(name).read(name, [MODULES[m]], SHAPE)  # type: ignore[attr-defined]
                u = updates[m : m + 1, i]
                p = torch.stack(
                    [
                        torch.stack(
                            [
                                (
                                    formula(residual_map, given, u, (a + b)[None])
                                    - formula(residual_map, given, u, a[None])
                                    - formula(residual_map, given, u, b[None])
                                )[0]
                                / 2
                                for a in units
                            ]
                        )
                        for b in units
                    ]
                )
                hessian += p / 0.49
                pull += p @ u.flatten() / 0.49
            assert_close(value[m].flatten(), torch.linalg.solve(hessian, pull), 1e-9)


def anchor(eta: float) -> Anchor:
    return Anchor(precision=AbsolutePrecision(eta))


def test_roots_of_singular_matrices(generator: torch.Generator) -> None:
    thin = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        matrix = (thin @ thin.mT).to(dtype)
        factor = root_of(matrix)
        assert_close(factor @ factor.mT, matrix.double(), tolerance)
        assert torch.linalg.matrix_rank(factor).tolist() == [2, 2]
    with pytest.raises(ValueError, match="not positive semi-definite"):
        root_of(torch.diag(torch.tensor([1.0, -0.5])))
    assert_close(root_of(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3, dtype=torch.float64))


def test_roots_keep_small_inputs_beside_large_ones(generator: torch.Generator) -> None:
    sizes = torch.logspace(-5, 5, 6, dtype=torch.float64)
    for rows in (3, 40):
        inputs = sizes * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        matrix = (inputs.mT @ inputs / rows).float()
        factor = root_of(matrix)
        assert_close((factor @ factor.mT) / sizes / sizes[:, None], matrix.double() / sizes / sizes[:, None], 1e-5)
        assert int((factor.abs().amax(0) > 0).sum()) == min(rows, 6)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("unit_trace", [True, False])
def test_mixed_takes_single_precision_statistics_of_few_rows(
    share: float, unit_trace: bool, generator: torch.Generator
) -> None:
    """Their rounding is that of float32, though they are mixed in float64."""
    given = statistics(generator, "activations", (4, 12), rows=5)
    single = {name: {module: value.float() for module, value in each.items()} for name, each in given.items()}
    left, right = random_updates(generator, 2, 1, 4, 1)[:, 0], random_updates(generator, 2, 1, 1, 12)[:, 0]
    update, x = left @ right, random_updates(generator, 2, 1, 4, 12)[:, 0]
    residual_map = Mixed(ModuleStatistics("activations", single), share, unit_trace=unit_trace)
    found = residual_map.for_modules("a", MODULES).operator(update).quadratic(x)
    expected = formula(residual_map, torch.stack([given["a"][module] for module in MODULES]), update, x)
    assert_close(found, expected, 1e-5)


def test_activation_with_fewer_rows_than_inputs_has_their_rank(generator: torch.Generator) -> None:
    given = ModuleStatistics("activations", statistics(generator, "activations", (4, 6), rows=2))
    update = random_updates(generator, 2, 1, 4, 6)[:, 0]
    assert Activation(given).for_modules("a", MODULES).operator(update).dimension().tolist() == [8.0, 8.0]


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
    given = ModuleStatistics(kind, {"a": {"one": value}})
    residual_map = Fisher(given) if kind == "fisher" else Activation(given)
    poe = ProductOfExperts.of(["a"], residual_map).for_modules(["one"])
    with pytest.raises(ValueError, match=message):
        poe.bind(torch.ones(1, 1, *SHAPE))


def test_what_is_missing_is_named(generator: torch.Generator) -> None:
    given = ModuleStatistics("fisher", statistics(generator, "fisher"))
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
    with pytest.raises(TypeError, match="activations statistics are wanted"):
        ProductOfExperts.of(NAMES, Activation(given)).for_modules(MODULES).bind(updates)
    with pytest.raises(ValueError, match="the kinds are 'fisher', 'activations'"):
        ModuleStatistics("hessian", {"a": {}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mixed(given, 1.5)
    with pytest.raises(ValueError, match="floor must be"):
        Fisher(given, -1.0)


def test_an_entry_without_fisher_information_needs_an_anchor_or_a_floor() -> None:
    updates = torch.ones(1, 2, *SHAPE, dtype=torch.float64)
    values = torch.ones(SHAPE)
    values[1, 2] = 0
    given = ModuleStatistics("fisher", {n: {"one": values} for n in "ab"})
    poe = ProductOfExperts.of(["a", "b"], Fisher(given), Gaussian(), Absolute(1.0), anchor=anchor(0.0))
    with pytest.raises(ValueError, match="some entry has neither an expert nor an anchor"):
        fixed_point(poe.for_modules(["one"]).bind(updates))
    poe = ProductOfExperts.of(["a", "b"], Fisher(given, 1e-6), Gaussian(), Absolute(1.0), anchor=anchor(0.0))
    assert_close(fixed_point(poe.for_modules(["one"]).bind(updates)).value, updates.mean(1))


def test_activations_on_one_side_and_updates_on_the_other(generator: torch.Generator) -> None:
    given = ModuleStatistics("activations", statistics(generator, "activations"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, (Activation(given), OutputGram()), Cauchy()).for_modules(MODULES)
    solution = fixed_point(poe.bind(updates))
    assert solution.converged
    point = solution.value.clone().requires_grad_(True)
    energy = poe.bind(updates).energy(point).sum()
    (gradient,) = torch.autograd.grad(energy, point)
    assert float(gradient.abs().max()) < 1e-6


def test_fisher_and_gram_in_one_module_run_in_span_only(generator: torch.Generator) -> None:
    given = ModuleStatistics("fisher", statistics(generator, "fisher"))
    updates = random_updates(generator, 2, 3, *SHAPE)
    poe = ProductOfExperts.of(NAMES, (Fisher(given), InputGram())).for_modules(MODULES)
    with pytest.raises(ValueError, match="Diagonal and Gram"):
        fixed_point(poe.bind(updates))
    assert all(s.converged for s in fixed_point(poe.bind(updates, coordinates="span")).status)


def test_files_round_trip_and_are_refused_when_they_are_something_else(
    tmp_path: Path, generator: torch.Generator
) -> None:
    shared = torch.eye(3)
    given = ModuleStatistics("activations", {"a/b": {"x[0]": shared, "x[1]": shared}, "c": {"x[0]": 2 * shared}})
    given.save(tmp_path / "s")
    again = StatisticsFolder(tmp_path / "s").opened("activations")
    assert set(again.experts) == {"a/b", "c"}
    assert_close(again.read("a/b", ["x[0]", "x[1]"], SHAPE), torch.stack([shared, shared]))
    assert again.experts["a/b"].aliases == {"x[1]": "x[0]"}
    with pytest.raises(FileExistsError, match="is there already"):
        given.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match="holds activations statistics, expected fisher"):
        StatisticsFolder(tmp_path / "s").opened("fisher")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        StatisticsFolder(tmp_path / "t").opened("fisher")
    with pytest.raises(CheckpointError, match="no activations statistics of expert 'd', only of a/b, c"):
        StatisticsFolder(tmp_path / "s").opened("activations", ["d"])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["a%2Fb.safetensors", "c.safetensors"]
    other = ModuleStatistics("activations", {"c": {"x[0]": 3 * shared}})
    assert repr(given) != repr(other)
    assert repr(given) == repr(ModuleStatistics("activations", dict(given.experts)))


@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_a_whole_checkpoint_with_blocks_streams(tmp_path: Path, coordinates: str, generator: torch.Generator) -> None:
    base = {"a.qkv.weight": torch.zeros(6, 2), "b.weight": torch.zeros(2, 2), "b.bias": torch.zeros(2)}
    experts = {
        name: {key: torch.randn(value.shape, generator=generator) for key, value in base.items()} for name in ("x", "y")
    }
    vectors = TaskVectors(base, experts)
    modules = ["a.qkv.weight[0]", "a.qkv.weight[1]", "a.qkv.weight[2]", "b.weight"]
    fisher = {n: {m: torch.rand(2, 2, generator=generator) + 0.1 for m in modules} for n in experts}
    ModuleStatistics("fisher", fisher).save(tmp_path / "fisher")
    residual_map = Fisher(StatisticsFolder(str(tmp_path / "fisher")))
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
    ModuleStatistics("activations", {"x": {"a.weight": torch.eye(3)}}).save(tmp_path)
    poe = ProductOfExperts.of(
        ["x"], Activation(StatisticsFolder(str(tmp_path))), anchor=Anchor(precision=RelativePrecision(0.1))
    )
    with pytest.raises(CheckpointError, match=r"expert 'x' .*no module 'b.weight'; the nearest is 'a.weight'"):
        plan(vectors, poe)


def test_callers_statistics_and_updates_are_not_changed(generator: torch.Generator) -> None:
    made = statistics(generator, "activations")
    before = {n: {m: v.clone() for m, v in each.items()} for n, each in made.items()}
    updates = random_updates(generator, 2, 3, *SHAPE)
    kept = updates.clone()
    poe = ProductOfExperts.of(NAMES, Mixed(ModuleStatistics("activations", made), 0.5, 0.5))
    fixed_point(poe.for_modules(MODULES).bind(updates))
    assert torch.equal(updates, kept)
    assert all(torch.equal(made[n][m], before[n][m]) for n in NAMES for m in MODULES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_statistics_and_updates(dtype: torch.dtype, generator: torch.Generator) -> None:
    made = {n: {m: v.to(dtype) for m, v in each.items()} for n, each in statistics(generator, "fisher").items()}
    updates = random_updates(generator, 2, 3, *SHAPE, dtype=dtype)
    poe = ProductOfExperts.of(NAMES, Fisher(ModuleStatistics("fisher", made)), Gaussian(), anchor=anchor(1e-3))
    reference = ProductOfExperts.of(
        NAMES,
        Fisher(ModuleStatistics("fisher", {n: {m: v.double() for m, v in e.items()} for n, e in made.items()})),
        Gaussian(),
        anchor=anchor(1e-3),
    )
    value = fixed_point(poe.for_modules(MODULES).bind(updates)).value
    expected = fixed_point(reference.for_modules(MODULES).bind(updates.double())).value
    assert value.dtype == torch.float32  # half precision is computed in it
    assert_close(value.double(), expected, 1e-5)


def test_specs_find_statistics_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ModuleStatistics("fisher", {"x": {"a.weight": torch.ones(2, 3)}}).save(tmp_path / "here" / "f")
    monkeypatch.chdir(tmp_path)
    found = parse_spec("Fisher('f', floor=1e-3)", RESIDUAL_MAP, [tmp_path / "here", tmp_path])
    assert found == Fisher(StatisticsFolder(str(tmp_path / "here" / "f")), 1e-3)
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
    ModuleStatistics("activations", {n: {"a.weight": torch.eye(3) * (1 + 2 * (n == "x"))} for n in "xy"}).save(
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
    ModuleStatistics("activations", statistics(generator, "activations")).save(tmp_path)
    poe = ProductOfExperts.of(NAMES, Activation(StatisticsFolder(str(tmp_path)), 0.9), Gaussian(), anchor=anchor(0.1))
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


@pytest.mark.parametrize("index", range(4))
def test_awkward_points(index: int, generator: torch.Generator) -> None:
    """One expert, identical experts, a zero expert, more experts than a dimension, strided input, a zero residual."""
    residual_map = maps(generator)[index]
    updates = random_updates(generator, 2, 3, *SHAPE)
    tiny = anchor(1e-13)

    def solved(names: tuple[str, ...], given: Tensor) -> Tensor:
        poe = ProductOfExperts.of(names, residual_map, Gaussian(), Absolute(1.0), anchor=tiny)
        return fixed_point(poe.for_modules(MODULES).bind(given)).value

    assert_close(solved(("a",), updates[:, :1]), updates[:, 0], 1e-8)
    assert_close(solved(NAMES, updates[:, :1].expand(-1, 3, -1, -1)), updates[:, 0], 1e-8)
    zero = updates.clone()
    zero[:, 1] = 0
    assert bool(solved(NAMES, zero).isfinite().all())
    strided = updates.mT.contiguous().mT
    assert not strided[:, 0].is_contiguous()
    assert_close(solved(NAMES, strided), solved(NAMES, updates))
    many = tuple(f"e{i}" for i in range(7))
    poe = ProductOfExperts(
        tuple(
            Expert(name, residual_map, Gaussian(), Absolute(1.0), update=NAMES[i % 3]) for i, name in enumerate(many)
        ),
        tiny,
    )
    weights = tuple(float(sum(i % 3 == j for i in range(7))) for j in range(3))
    weighted = ProductOfExperts.of(NAMES, residual_map, Gaussian(), Absolute(1.0), importance=weights, anchor=tiny)
    found = fixed_point(poe.for_modules(MODULES).bind(updates)).value
    assert_close(found, fixed_point(weighted.for_modules(MODULES).bind(updates)).value, 1e-8)
    posterior = weighted.for_modules(MODULES).bind(updates)
    z = updates[:, 0].clone().requires_grad_(True)  # the residual of the first expert is zero
    (gradient,) = torch.autograd.grad(posterior.energy(z).sum(), z)
    assert bool(gradient.isfinite().all())
    assert_close(posterior.residuals(z.detach())[:, 0], torch.zeros(2))
