"""Statistics and draws on disk: bit for bit, small, and refused when anything about them is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.draws import Draws
from inference.gibbs import gibbs
from inference.map import fixed_point
from inference.models import full_draws
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import TOLERANCE, RegenerationWarning, noise_control, sample_full
from inference.models.merge import OutputError
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.models.modules import Module, read_modules
from inference.models.statistics_files import collect_statistics, load_statistics, save_statistics, statistics_digest
from inference.reweighting import SolverOptions
from poe_models import (
    Anchor,
    Cauchy,
    CheckpointError,
    Directional,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    StudentT,
    TaskVectors,
    average,
    open_checkpoint,
    span_statistics,
)
from poe_models.weights.rules import DEFAULT_RULES, Rule
from tests.helpers import assert_close, name_of
from tests.seeds import seeded

SHAPES = {"a.weight": (6, 4), "b.weight": (5, 6), "b.bias": (5,), "attn.in_proj_weight": (12, 4)}
MODULES = ("a.weight", "b.weight", *(f"attn.in_proj_weight[{i}]" for i in range(3)))


def states(generator: torch.Generator, shapes: dict[str, tuple[int, ...]] = SHAPES, names: str = "xyz") -> Any:
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        each: {k: w + 0.1 * (common[k] + torch.randn(w.shape, generator=generator)) for k, w in base.items()}
        for each in names
    }
    return base, experts


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    return TaskVectors(*states(generator), dtype=torch.float64)


def poe_of(vectors: TaskVectors, **options: Any) -> ProductOfExperts:
    return ProductOfExperts.of(vectors.names, **options)


def span_draws(vectors: TaskVectors, poe: ProductOfExperts, seed: int = 0, count: int = 50) -> SpanDraws:
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    return SpanDraws.of(gibbs(posterior, count, generator=generator), posterior)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- statistics ---


@pytest.mark.parametrize("center", [None, average], ids=["zero", "average"])
def test_one_pass_gives_the_statistics_of_every_module(center: Any, vectors: TaskVectors) -> None:
    poe = poe_of(vectors, residual_map=(InputGram(), OutputGram()), anchor=Anchor(center))
    statistics = collect_statistics(vectors, poe)
    assert statistics.modules == MODULES
    for index, module in enumerate(vectors):
        merged = fixed_point(poe.bind(module)).value
        alone = span_statistics(poe, module.updates, [module.name], through=merged)
        for name in ("gram", "forms", "mean_curvature", "dimension"):
            assert torch.equal(getattr(statistics, name)[index], getattr(alone, name)[0])


def test_a_checkpoint_as_the_centre_counts_as_the_last_basis_vector(
    vectors: TaskVectors, generator: torch.Generator
) -> None:
    base = {name: vectors.base.read(name) for name in SHAPES}
    center = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
    design = Design(poe_of(vectors), center=open_checkpoint(center), coordinates="span")
    statistics = collect_statistics(vectors, design)
    displacement = (center["a.weight"].double() - base["a.weight"].double()).square().sum()
    assert_close(statistics.gram[0, -1, -1], displacement, 1e-12)
    posterior = design.span_product.bind(statistics)
    for index, module in enumerate(read_modules(vectors, "a.weight", design)):  # the MAP is that of the weights
        alone = module.poe.bind(module.updates, coordinates="span")
        coefficients = posterior.coefficients(fixed_point(posterior).value)[index]
        assert_close(coefficients, alone.coefficients(fixed_point(alone).value)[0], 1e-6)
        assert float(coefficients[-1]) > 0.01
    with pytest.raises(ValueError, match="has the centre zero, the statistics were made with the centre tensor"):
        design.poe.bind(statistics)


def test_the_order_of_the_products_names_decides(vectors: TaskVectors) -> None:
    there = collect_statistics(vectors, ProductOfExperts.of(["x", "y", "z"]))
    back = collect_statistics(vectors, ProductOfExperts.of(["z", "y", "x"]))
    flipped = torch.tensor([2, 1, 0, 3, 4])
    assert_close(back.gram, there.gram[:, flipped][:, :, flipped], 1e-9)


def test_progress_counts_modules_and_bytes(vectors: TaskVectors) -> None:
    seen: list[tuple[Any, ...]] = []

    class Ticks:
        def begin(self, stage: str, modules: int, nbytes: int) -> None:
            seen.append((stage, modules, nbytes))

        def advance(self, modules: int, nbytes: int) -> None:
            seen.append((modules, nbytes))

    collect_statistics(vectors, poe_of(vectors), progress=Ticks())
    assert seen[0] == ("statistics", 5, 4 * (24 + 30 + 48))
    assert seen[1:] == [(1, 96), (1, 120), (3, 192)]


def test_designs_that_do_not_go_together_name_two_tensors(vectors: TaskVectors) -> None:
    kinds = {"a.weight": poe_of(vectors, residual_map=OutputGram())}
    with pytest.raises(ValueError, match=r"'b.weight' has InputGram\(\).*'a.weight' has OutputGram\(\)"):
        collect_statistics(vectors, lambda name: Design(kinds.get(name, poe_of(vectors))))
    with pytest.raises(ValueError, match=r"merged in full coordinates; tensor 'a.weight' has .* in span coordinates"):
        collect_statistics(
            vectors, lambda name: Design(poe_of(vectors), coordinates="span" if name == "a.weight" else "full")
        )
    # Energies and scales may differ: statistics depend on them by the merge alone.
    energies = {"a.weight": poe_of(vectors, energy=StudentT(3.0))}

    def collected(given: dict[str, ProductOfExperts], coordinates: Any) -> Any:
        return collect_statistics(
            vectors, lambda name: Design(given.get(name, poe_of(vectors)), coordinates=coordinates)
        )

    mixed, alike = ([collected(given, kind) for kind in ("span", "full")] for given in (energies, {}))
    assert statistics_digest(mixed[0]) == statistics_digest(alike[0])
    assert statistics_digest(mixed[1]) != statistics_digest(alike[1])
    assert torch.equal(mixed[1].gram[1:], alike[1].gram[1:])
    with pytest.raises(ValueError, match="the statistics of 'a.weight' go through the merge of the design x StudentT"):
        poe_of(vectors).bind(mixed[1])
    with pytest.raises(ValueError, match=r"'a.weight' is about 'nobody'; the task vectors are x, y, z"):
        collect_statistics(vectors, ProductOfExperts.of(["x", "nobody"]))


def test_nothing_to_merge_is_said(generator: torch.Generator) -> None:
    base, experts = states(generator)
    rules = DEFAULT_RULES.extended([Rule(".", "base")])
    vectors = TaskVectors(base, experts, rules=rules)
    with pytest.raises(ValueError, match="no tensor of the base is merged"):
        collect_statistics(vectors, poe_of(vectors))


def test_statistics_come_back_bit_for_bit_and_give_the_same_posterior(vectors: TaskVectors, tmp_path: Path) -> None:
    poe = poe_of(vectors, residual_map=(InputGram(), OutputGram()), anchor=Anchor(average))
    statistics = collect_statistics(vectors, poe)
    folder = save_statistics(statistics, tmp_path / "stats", inputs={"base": {"sha256": "0"}}, settings={"eta": 0.1})
    loaded = load_statistics(tmp_path / "stats")
    assert folder == tmp_path / "stats"
    for name in statistics.__dataclass_fields__:
        before, after = getattr(statistics, name), getattr(loaded, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    draws = [gibbs(poe.bind(each), 3, generator=seeded(1)).values for each in (statistics, loaded)]
    assert torch.equal(*draws)
    record = json.loads((folder / "statistics.json").read_text())
    assert record["inputs"] == {"base": {"sha256": "0"}}
    assert record["settings"] == {"eta": 0.1}
    assert record["versions"]["torch"] == torch.__version__


def test_a_model_of_26_modules_and_4_experts_takes_less_than_a_megabyte(
    generator: torch.Generator, tmp_path: Path
) -> None:
    shapes = {f"layers.{i}.weight": (8, 9) for i in range(26)}
    vectors = TaskVectors(*states(generator, shapes, "wxyz"))
    poe = poe_of(vectors, residual_map=(InputGram(), OutputGram()))
    folder = save_statistics(collect_statistics(vectors, poe), tmp_path / "stats")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000


def test_statistics_without_ranks_are_not_saved(vectors: TaskVectors, tmp_path: Path) -> None:
    module = next(iter(vectors))
    statistics = span_statistics(poe_of(vectors), module.updates, ranks=False)
    with pytest.raises(ValueError, match=r"dimension has values that are not finite.*ranks=True"):
        save_statistics(statistics, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_writing_is_all_or_nothing(vectors: TaskVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect_statistics(vectors, poe_of(vectors))
    save_statistics(statistics, tmp_path / "there")
    with pytest.raises(OutputError, match="exists"):
        save_statistics(statistics, tmp_path / "there")

    def full(self: Path, target: Path) -> Path:  # once the tensors are there
        if target.name == "statistics.json":
            raise OSError(errno.ENOSPC, "no space left")
        os.replace(self, target)
        return target

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="is full"):
        save_statistics(statistics, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def corrupt_weights(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder that is not there": (shutil.rmtree, "no statistics here, statistics.json is missing"),
    "no weights": (lambda folder: (folder / "statistics.safetensors").unlink(), "cannot be read.*Make the statistics"),
    "no JSON": (lambda folder: (folder / "statistics.json").unlink(), "statistics.json is missing"),
    "a flipped bit": (corrupt_weights, "not the file that was saved"),
    "half a JSON": (lambda folder: (folder / "statistics.json").write_text('{"kind": "st'), "not readable as JSON"),
    "another JSON": (
        lambda folder: (folder / "statistics.json").write_text("[]"),
        "expected a JSON object, got list",
    ),
    "a pickle": (
        lambda folder: torch.save({"gram": torch.zeros(1)}, folder / "statistics.safetensors"),
        "not the file that was saved",
    ),
    "other names": (
        lambda folder: edit_json(folder / "statistics.json", lambda data: data["modules"].append("more")),
        r"incomplete statistics \(ValueError: there are 6 modules, and designs of 5 merges",
    ),
    "renamed experts": (
        lambda folder: edit_json(folder / "statistics.json", lambda data: data["updates"].reverse()),
        "statistics.json is not about these numbers",
    ),
    "missing names": (
        lambda folder: edit_json(folder / "statistics.json", lambda data: data.pop("updates")),
        "incomplete statistics",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda name: name.replace(" ", "-"))
def test_a_damaged_file_is_one_clear_error(damage: str, vectors: TaskVectors, tmp_path: Path) -> None:
    save_statistics(collect_statistics(vectors, poe_of(vectors)), tmp_path / "stats")
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "stats")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_statistics(tmp_path / "stats")
    assert str(tmp_path / "stats") in str(caught.value)


def test_draws_are_no_statistics(vectors: TaskVectors, tmp_path: Path) -> None:
    save_draws(span_draws(vectors, poe_of(vectors)), tmp_path / "draws")
    with pytest.raises(CheckpointError, match="no statistics here"):
        load_statistics(tmp_path / "draws")


def test_the_digest_notices_every_part(vectors: TaskVectors) -> None:
    statistics = collect_statistics(vectors, poe_of(vectors))
    changed = [
        replace(statistics, modules=statistics.modules[::-1]),
        replace(statistics, residual_maps=("OutputGram()",) * 3),
        replace(statistics, gram=statistics.gram + torch.finfo(torch.float64).eps * statistics.gram),
        replace(statistics, dimension=statistics.dimension + 1),
    ]
    assert len({statistics_digest(each) for each in (statistics, *changed)}) == 5


# --- draws of a model ---


def test_span_draws_are_coefficients_of_the_latents(vectors: TaskVectors) -> None:
    poe = poe_of(vectors, anchor=Anchor(average))
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    coordinates = posterior.span
    latents = gibbs(posterior, 4, generator=seeded(0), chains=2)
    draws = SpanDraws.of(latents, posterior)
    design = Design(poe)
    for index, name in enumerate(MODULES):
        tensor = name.partition("[")[0]
        module = next(each for each in read_modules(vectors, tensor, design) if each.name == name)
        update = draws.update(module, 6)  # chain 1, draw 2
        # |Z - Z_0| is the same in both coordinates, those aside that only pad the span (the average lies in it).
        assert posterior.center is not None
        inside = (coordinates.transform[index] != 0).any(0)
        assert int(inside.sum()) == 4  # three updates and the merge
        distance = (latents.values[1, 2, index] - posterior.center[index])[inside].square().sum()
        assert module.center is not None
        assert_close((update - module.center).square().sum(), distance, 1e-9)
        full = module.posterior
        assert_close(full.residuals(update.unsqueeze(0))[0], posterior.residuals(latents.values[1, 2])[index], 1e-8)


def test_draws_in_full_coordinates_are_no_span_draws(vectors: TaskVectors) -> None:
    (module,) = read_modules(vectors, "a.weight", Design(poe_of(vectors)))
    draws = gibbs(module.posterior, 1, generator=seeded(0), chains=1, warmup=0)
    with pytest.raises(ValueError, match="the posterior is in Full coordinates"):
        SpanDraws.of(draws, module.posterior)


def test_thinning_is_fair_to_chains_and_even_along_them(vectors: TaskVectors) -> None:
    draws = span_draws(vectors, poe_of(vectors), count=100)
    marks = torch.arange(400, dtype=torch.float64).view(4, 100, 1, 1).expand(4, 100, 5, 4)
    marked = replace(draws, coefficients=marks)
    thinned = marked.thinned(10)
    kept = thinned.coefficients[0, :, 0, 0].tolist()
    assert (thinned.num_chains, thinned.num_draws, len(thinned)) == (1, 10, 10)
    assert sorted(int(mark) // 100 for mark in kept) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert kept[:3] == [16.0, 50.0, 83.0]
    assert torch.equal(thinned.stats["lp"][0, 0], draws.stats["lp"][0, 16])
    assert len(set(marked.thinned(400).coefficients[0, :, 0, 0].tolist())) == 400
    for count in (0, 401):
        with pytest.raises(ValueError, match="there are 400 draws"):
            marked.thinned(count)


def test_indexing_and_restricting(vectors: TaskVectors) -> None:
    draws = span_draws(vectors, poe_of(vectors), count=3)
    assert torch.equal(draws[7].coefficients[0, 0], draws.coefficients[2, 1])
    assert [torch.equal(a.coefficients, b.coefficients) for a, b in zip(draws, list(draws), strict=True)] == [True] * 12
    with pytest.raises(IndexError):
        draws[12]
    only = draws.restrict(r"in_proj_weight\[[02]\]")
    assert only.modules == ("attn.in_proj_weight[0]", "attn.in_proj_weight[2]")
    assert torch.equal(only.coefficients, draws.coefficients[:, :, [2, 4]])
    assert torch.equal(only.stats["lp"], draws.stats["lp"][:, :, [2, 4]])
    with pytest.raises(ValueError, match=r"restrict\('mlp'\).*fits none of the 5 modules"):
        draws.restrict("mlp")


CASES: list[tuple[Any, Any]] = [
    (InputGram(), Cauchy()),
    (OutputGram(), StudentT(4.0)),
    (Directional(), Cauchy()),
    (Identity(), StudentT(3.0, "multivariate")),
]


@pytest.mark.parametrize(("residual_map", "energy"), CASES, ids=name_of)
@pytest.mark.parametrize("method", ["gibbs", "laplace"])
def test_full_draws_come_back_bit_for_bit(
    residual_map: Any, energy: Any, method: Any, vectors: TaskVectors, tmp_path: Path
) -> None:
    poe = poe_of(vectors, residual_map=residual_map, energy=energy, anchor=Anchor(average, RelativePrecision(1.0)))
    generator = seeded(5)
    draws = sample_full(vectors, poe, 2, generator=generator, sampler=method, chains=2, warmup=10)
    save_draws(draws, tmp_path / "draws")
    loaded = load_draws(tmp_path / "draws", draws.source)
    assert isinstance(loaded, FullDraws)
    assert (loaded.designs, loaded.environment, loaded.sampler) == (draws.designs, draws.environment, method)
    assert loaded.digest() == draws.digest()
    for module in read_modules(vectors, "attn.in_proj_weight", Design(poe)):
        for member in range(len(draws)):
            assert torch.equal(draws.update(module, member), loaded.update(module, member))
        assert not torch.equal(loaded.update(module, 0), loaded.update(module, 1))


def test_full_draws_of_a_model_are_those_of_the_sampler(vectors: TaskVectors) -> None:
    poe = poe_of(vectors, energy=StudentT(4.0), temperature=0.3)
    draws = sample_full(vectors, poe, 3, generator=seeded(5), chains=2, warmup=10)
    (module,) = read_modules(vectors, "a.weight", Design(poe))
    own = gibbs(poe.bind(module.updates), 3, generator=seeded(5), chains=2, warmup=10)
    assert torch.equal(draws.update(module, 4), own.latents(1, 1)[0])
    # The energy the chain had at this draw.
    energy = module.posterior.energy(draws.update(module, 4).unsqueeze(0))
    assert_close(draws.stats["lp"][1, 1, 0], -energy[0] / 0.3, 1e-10)


def test_full_draws_of_some_modules(vectors: TaskVectors) -> None:
    draws = sample_full(vectors, poe_of(vectors), 2, generator=seeded(5), pattern=r"a\.weight|\[1\]", warmup=2)
    assert draws.modules == ("a.weight", "attn.in_proj_weight[1]")
    with pytest.raises(ValueError, match="fits none of the merged modules"):
        sample_full(vectors, poe_of(vectors), 2, generator=torch.Generator(), pattern="nothing")


def test_modules_are_let_go_once_they_are_drawn(vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[weakref.ref[Module]]] = []

    def watched(task_vectors: TaskVectors, tensor: str, design: Design) -> list[Module]:
        assert not any(module() for modules in read[:-1] for module in modules)  # the last tensor's at most
        modules = read_modules(task_vectors, tensor, design)
        read.append([weakref.ref(module) for module in modules])
        return modules

    monkeypatch.setattr(full_draws, "read_modules", watched)
    for method in ("gibbs", "laplace"):
        sample_full(vectors, poe_of(vectors), 2, generator=torch.Generator(), sampler=method, chains=1, warmup=1)  # type: ignore[arg-type]
    assert len(read) == 6


def test_draws_from_the_mode_go_with_the_solver_that_finds_it(vectors: TaskVectors) -> None:
    poe = poe_of(vectors, energy=StudentT(4.0))
    early = Design(poe, options=SolverOptions(max_steps=1))
    with pytest.warns(UserWarning, match=r"the MAP of 'a.weight': not converged"):
        draws = sample_full(vectors, early, 2, generator=torch.Generator(), sampler="laplace", pattern=r"a\.weight")
    (module,) = read_modules(vectors, "a.weight", early)
    with pytest.warns(UserWarning, match="not converged"):
        mode = module.mode
    assert_close(mode, early.solve(module.updates.unsqueeze(0)).value[0], 1e-9)
    with pytest.raises(ValueError, match="another design .experts, anchor or solver"):
        MergedEnsemble(vectors, poe, draws)
    with pytest.warns(UserWarning, match="not converged"):
        exact = sample_full(vectors, early, 2, generator=torch.Generator(), pattern=r"a\.weight", warmup=2)
    MergedEnsemble(vectors, poe, exact)  # Gibbs draws need no MAP
    with pytest.raises(ValueError, match="experts, anchor or solver"):
        MergedEnsemble(vectors, early, noise_control(exact, vectors, poe, generator=torch.Generator()))


def test_experts_that_differ_between_tensors_are_padded(vectors: TaskVectors, tmp_path: Path) -> None:
    few = ProductOfExperts.of(["y", "x"])
    designs = {"a.weight": Design(few)}
    draws = sample_full(
        vectors,
        lambda name: designs.get(name, Design(poe_of(vectors))),
        2,
        generator=seeded(1),
        warmup=3,
    )
    assert draws.weights.shape == (4, 2, 5, 3)
    assert bool((draws.weights[:, :, 0, 2] == 0).all())
    assert float(draws.squared_norms[0, 3]) == 0.0
    loaded = load_draws(save_draws(draws, tmp_path / "draws"))
    (module,) = read_modules(vectors, "a.weight", Design(few))
    own = gibbs(few.bind(module.updates), 2, generator=seeded(1), warmup=3)
    assert torch.equal(loaded.update(module, 7), own.latents(3, 1)[0])


def save_adapter(folder: Path, generator: torch.Generator) -> None:
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["a"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    factors = {"A": torch.randn(2, 40, generator=generator), "B": torch.randn(12, 2, generator=generator)}
    tensors = {f"base_model.model.a.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()], ids=name_of)
def test_adapters_are_drawn_with_their_factors(residual_map: Any, generator: torch.Generator, tmp_path: Path) -> None:
    """An adapter's module is compressed by its factors when it is drawn, and so it must be when it is made again."""
    save_file({"a.weight": torch.randn(12, 40, generator=generator)}, tmp_path / "base.safetensors")
    for name in ("x", "y"):
        save_adapter(tmp_path / name, generator)
    vectors = TaskVectors(
        tmp_path / "base.safetensors", {name: tmp_path / name for name in ("x", "y")}, dtype=torch.float64
    )
    poe = poe_of(vectors, residual_map=residual_map)
    draws = sample_full(vectors, poe, 1, generator=seeded(0), chains=1, warmup=3)
    (module,) = read_modules(vectors, "a.weight", Design(poe))
    assert module.low_rank is not None
    energy = replace(module, low_rank=None).posterior.energy(draws.update(module, 0).unsqueeze(0))
    assert_close(draws.stats["lp"][0, 0], -energy, 1e-9)
    loaded = load_draws(save_draws(draws, tmp_path / "draws"), draws.source)
    assert torch.equal(loaded.update(module, 0), draws.update(module, 0))


# --- refusals and warnings ---


def test_span_draws_from_other_statistics_are_refused(vectors: TaskVectors, tmp_path: Path) -> None:
    poe, other = poe_of(vectors), poe_of(vectors, residual_map=OutputGram())
    draws = span_draws(vectors, poe)
    save_draws(draws, tmp_path / "draws")
    statistics = collect_statistics(vectors, poe)
    loaded = load_draws(tmp_path / "draws", statistics)
    assert isinstance(loaded, SpanDraws)
    assert torch.equal(loaded.coefficients, draws.coefficients)
    assert loaded.updates == ("x", "y", "z")
    assert torch.equal(loaded.stats["lp"], draws.stats["lp"])
    with pytest.raises(CheckpointError, match="made from other statistics"):
        load_draws(tmp_path / "draws", collect_statistics(vectors, other))
    with pytest.raises(CheckpointError, match="made from other statistics"):
        load_draws(tmp_path / "draws", "0" * 64)


def test_full_draws_from_other_weights_are_refused(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = sample_full(vectors, poe_of(vectors), 1, generator=seeded(1), warmup=2)
    save_draws(draws, tmp_path / "draws")
    with pytest.raises(CheckpointError, match="made from other weights"):
        load_draws(tmp_path / "draws", "0" * 64)


DRAW_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (corrupt_weights, "not the file that was saved"),
    "no coordinates": (
        lambda folder: edit_json(folder / "draws.json", lambda data: data.pop("coordinates")),
        "incomplete draws",
    ),
    "fewer modules": (
        lambda folder: edit_json(folder / "draws.json", lambda data: data["modules"].pop()),
        "incomplete draws.*shape",
    ),
    "statistics": (lambda folder: (folder / "draws.json").unlink(), "no draws here"),
}


@pytest.mark.parametrize("damage", DRAW_DAMAGES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("kind", ["span", "full"])
def test_damaged_draws_are_one_clear_error(damage: str, kind: str, vectors: TaskVectors, tmp_path: Path) -> None:
    generator = seeded(1)
    poe = poe_of(vectors)
    draws: ModelDraws = span_draws(vectors, poe, count=2)
    if kind == "full":
        draws = sample_full(vectors, poe, 1, generator=generator, warmup=2)
    save_draws(draws, tmp_path / "draws")
    break_it, message = DRAW_DAMAGES[damage]
    break_it(tmp_path / "draws")
    with pytest.raises(CheckpointError, match=message):
        load_draws(tmp_path / "draws")


def test_draws_that_are_not_finite_are_refused(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = span_draws(vectors, poe_of(vectors), count=2)
    bad = replace(draws, coefficients=torch.full_like(draws.coefficients, torch.nan))
    save_draws(bad, tmp_path / "draws")
    with pytest.raises(CheckpointError, match="expected finite"):
        load_draws(tmp_path / "draws")


def test_temperatures_of_modules_come_back(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = span_draws(vectors, poe_of(vectors, temperature=0.3), count=2)
    assert draws.temperature is not None
    for name, factor in (("same", torch.ones(5)), ("different", torch.arange(1, 6))):
        given = replace(draws, temperature=draws.temperature * factor)
        loaded = load_draws(save_draws(given, tmp_path / name))
        assert loaded.temperature is not None
        assert torch.equal(loaded.temperature, given.temperature)
        assert loaded.digest() == given.digest()


def test_only_named_draws_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"SpanDraws.of\(draws, posterior\)"):
        save_draws(Draws(torch.zeros(1, 1, 1, 2, 1)), tmp_path / "draws")  # type: ignore[arg-type]


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram(), Directional()], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_threads_warn_and_the_tolerance_holds(
    residual_map: Any, dtype: torch.dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    vectors = TaskVectors(*states(generator, {"a.weight": (96, 160)}), dtype=dtype)
    poe = poe_of(vectors, residual_map=residual_map, anchor=Anchor(precision=RelativePrecision(1e-2)), temperature=1e-3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        draws = sample_full(vectors, poe, 1, generator=seeded(3), chains=1, warmup=3)
        save_draws(draws, tmp_path / "draws")
        (module,) = read_modules(vectors, "a.weight", Design(poe))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            here = load_draws(tmp_path / "draws").update(module, 0)
        torch.set_num_threads(2)
        with pytest.warns(RegenerationWarning, match=rf"threads 1 -> 2.*within {TOLERANCE[dtype]:g}"):
            there = load_draws(tmp_path / "draws").update(module, 0)
    finally:
        torch.set_num_threads(threads)
    assert_close(there, here, TOLERANCE[dtype])


def test_another_torch_or_device_warn_with_what_holds(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = sample_full(vectors, poe_of(vectors), 1, generator=seeded(1), warmup=2)
    older = replace(draws, environment={**draws.environment, "torch": "1.0.0"})
    save_draws(older, tmp_path / "older")
    with pytest.warns(RegenerationWarning, match=r"torch 1\.0\.0 -> .*within 1e-11"):
        load_draws(tmp_path / "older")
    strange = replace(draws, environment={**draws.environment, "dtype": "Tensor"})
    with pytest.raises(CheckpointError, match="unknown environment"):
        load_draws(save_draws(strange, tmp_path / "strange"))
    elsewhere = replace(draws, environment={**draws.environment, "device": "cuda"})
    save_draws(elsewhere, tmp_path / "elsewhere")
    with pytest.warns(RegenerationWarning, match=r"device cuda -> cpu.*other draws of the same posterior"):
        load_draws(tmp_path / "elsewhere")


def test_files_have_nothing_but_tensors_and_json(vectors: TaskVectors, tmp_path: Path) -> None:
    folder = save_draws(span_draws(vectors, poe_of(vectors), count=2), tmp_path / "draws")
    assert sorted(path.name for path in folder.iterdir()) == ["draws.json", "draws.safetensors"]
    tensors = load_file(folder / "draws.safetensors")
    distance = {"merge.displacement", "merge.spread", "merge.length"}
    assert set(tensors) == {"coefficients", "squared_norms", "stats.lp", *distance}
    save_file(tensors, folder / "draws.safetensors", metadata={"other": "file"})
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        load_draws(folder)
