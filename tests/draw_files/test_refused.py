"""Draws that do not belong to their design or are damaged, and what is warned about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.draws import Draws
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.full_draws import TOLERANCE, RegenerationWarning, sample_full
from inference.models.model_draws import ModelDraws, SpanDraws
from inference.models.modules import read_modules
from inference.models.statistics_files import collect_statistics
from poe_models import Anchor, CheckpointError, Directional, InputGram, OutputGram, RelativePrecision, TaskVectors
from tests.draw_files.toys import corrupt_weights, edit_json, poe_of, span_draws, states
from tests.helpers import assert_close, name_of
from tests.seeds import seeded


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
