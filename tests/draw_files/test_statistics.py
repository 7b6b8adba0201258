"""Statistics on disk: bit for bit, small, and refused when anything about them is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.gibbs import gibbs
from inference.map import fixed_point
from inference.models.design import Design
from inference.models.draw_files import save_draws
from inference.models.merge import OutputError
from inference.models.modules import read_modules
from inference.models.statistics_files import collect_statistics, load_statistics, save_statistics, statistics_digest
from poe_models import (
    Anchor,
    CheckpointError,
    InputGram,
    OutputGram,
    ProductOfExperts,
    StudentT,
    TaskVectors,
    average,
    open_checkpoint,
    span_statistics,
)
from poe_models.weights.rules import DEFAULT_RULES, Rule
from tests.draw_files.toys import MODULES, SHAPES, corrupt_weights, edit_json, poe_of, span_draws, states
from tests.helpers import assert_close
from tests.seeds import seeded


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
    with pytest.warns(UserWarning, match="the rules keep all"):
        vectors = TaskVectors(base, experts, rules=rules)
    with pytest.raises(ValueError, match="no tensor of the base is merged"):
        collect_statistics(vectors, poe_of(vectors))


def test_statistics_come_back_bit_for_bit_and_give_the_same_posterior(vectors: TaskVectors, tmp_path: Path) -> None:
    poe = poe_of(vectors, residual_map=(InputGram(), OutputGram()), anchor=Anchor(average))
    statistics = collect_statistics(vectors, poe)
    inputs = {"base": {"source": "../base", "sha256": {"model.safetensors": "0"}}}
    folder = save_statistics(statistics, tmp_path / "stats", inputs=inputs, settings={"eta": 0.1})
    loaded = load_statistics(tmp_path / "stats")
    assert folder == tmp_path / "stats"
    for name in statistics.__dataclass_fields__:
        before, after = getattr(statistics, name), getattr(loaded, name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    draws = [gibbs(poe.bind(each), 3, generator=seeded(1)).values for each in (statistics, loaded)]
    assert torch.equal(*draws)
    record = json.loads((folder / "statistics.json").read_text())
    assert record["inputs"] == inputs
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
        r"incomplete statistics: there are 6 modules, and designs of 5 merges",
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
