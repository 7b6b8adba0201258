"""Draws on disk come back bit for bit, thinned, restricted and padded."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inference.gibbs import gibbs
from inference.models import full_draws
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import noise_control, sample_full
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.modules import Module, read_modules
from inference.models.statistics_files import collect_statistics
from inference.reweighting import SolverOptions
from poe_models import (
    Anchor,
    Cauchy,
    Directional,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    StudentT,
    TaskVectors,
    average,
)
from tests.draw_files.toys import MODULES, poe_of, span_draws
from tests.helpers import assert_close, name_of
from tests.seeds import seeded


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


def first_of(generator: torch.Generator) -> torch.Generator:
    """The generator of the first of the five modules."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (5,), generator=generator)[0]))


def test_full_draws_of_a_model_are_those_of_the_sampler(vectors: TaskVectors) -> None:
    poe = poe_of(vectors, energy=StudentT(4.0), temperature=0.3)
    draws = sample_full(vectors, poe, 3, generator=seeded(5), chains=2, warmup=10)
    (module,) = read_modules(vectors, "a.weight", Design(poe))
    own = gibbs(poe.bind(module.updates), 3, generator=first_of(seeded(5)), chains=2, warmup=10)
    assert torch.equal(draws.update(module, 4), own.latents(1, 1)[0])
    # The energy the chain had at this draw.
    energy = module.posterior.energy(draws.update(module, 4).unsqueeze(0))
    assert_close(draws.stats["lp"][1, 1, 0], -energy[0] / 0.3, 1e-10)


def test_full_draws_of_some_modules(vectors: TaskVectors) -> None:
    draws = sample_full(vectors, poe_of(vectors), 2, generator=seeded(5), pattern=r"a\.weight|\[1\]", warmup=2)
    assert draws.modules == ("a.weight", "attn.in_proj_weight[1]")
    every = sample_full(vectors, poe_of(vectors), 2, generator=seeded(5), warmup=2)
    assert torch.equal(draws.weights, every.weights[:, :, [every.index(name) for name in draws.modules]])
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
    own = gibbs(few.bind(module.updates), 2, generator=first_of(seeded(1)), warmup=3)
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
