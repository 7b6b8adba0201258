"""Whole models on a GPU against the CPU: draws, ensembles, diagnostics and the command line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from diagnostics import pooled_tails, residuals, surrogate_residuals
from inference import (
    FullDraws,
    MergedEnsemble,
    MethodDraws,
    SpanDraws,
    collect_statistics,
    distance_from_merge,
    gibbs,
    load_draws,
    load_statistics,
    merge_checkpoint,
    noise_control,
    sample_full,
    save_draws,
    save_statistics,
    slice_sample,
    temper,
)
from poe_merge.cli import run
from poe_models import Cauchy, Dare, InputGram
from tests.devices import on
from tests.gpu.toys import CLASSES, NAMES, Net, Open, batches, product, weights
from tests.helpers import assert_close, merged
from tests.seeds import seeded

pytestmark = pytest.mark.gpu


def test_statistics_of_a_model_agree_and_give_draws(opened: Open, device: torch.device, tmp_path: Path) -> None:
    here, there = (collect_statistics(opened(place, torch.float64), product()) for place in ("cpu", device))
    assert there.modules == here.modules
    for name in ("gram", "forms", "mean_curvature", "dimension"):
        assert_close(getattr(there, name), getattr(here, name), 1e-6)
    save_statistics(there, tmp_path / "statistics")
    posterior = product().bind(load_statistics(tmp_path / "statistics"))
    draws = SpanDraws.of(gibbs(posterior, 50, generator=seeded(0), warmup=20), posterior)
    assert draws.from_merge is not None
    distances = [distance_from_merge(draws, opened(place, torch.float64), product()) for place in ("cpu", device)]
    assert_close(distances[1].spread, distances[0].spread, 1e-5)
    assert_close(distances[1].displacement, distances[0].displacement, 1e-3)


def test_span_draws_from_the_device_are_those_of_files(opened: Open, device: torch.device, tmp_path: Path) -> None:
    """A posterior that was bound on the device, as nobody who collects statistics has it."""
    vectors = opened(device, torch.float64)
    modules = [module for module in vectors if module.name in ("layers.0.weight", "layers.1.weight")]
    merges = merged(product().bind(modules))
    posterior = product().bind(modules, coordinates="span", through=list(merges))
    draws = SpanDraws.of(gibbs(posterior, 40, generator=on(device, 0), warmup=20), posterior)
    save_draws(draws, tmp_path / "draws")
    again = load_draws(tmp_path / "draws")
    assert isinstance(again, SpanDraws)
    assert torch.equal(again.coefficients, draws.coefficients.cpu())
    for found in (draws, again):
        distance = distance_from_merge(found, vectors, product())
        assert distance.spread.device.type == "cpu"
        assert bool(distance.distance.isfinite().all())
    states = [list(MergedEnsemble(vectors, product(), each.thinned(2)).members()) for each in (draws, again)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("sampler", ["gibbs", "laplace"])
def test_full_draws_of_a_model_are_made_again_on_the_device(
    sampler: Any, opened: Open, device: torch.device, tmp_path: Path
) -> None:
    vectors, poe = opened(device), product(temperature=0.1)
    how: dict[str, Any] = {"sampler": sampler, "chains": 2, "warmup": 5, "pattern": "layers"}
    drawn, same = (sample_full(vectors, poe, 4, generator=on(device, 3), **how) for _ in range(2))
    assert torch.equal(drawn.seeds, same.seeds)
    assert drawn.environment["device"] == device.type
    one, other = (list(MergedEnsemble(vectors, poe, each).members()) for each in (drawn, same))
    for first, second in zip(one, other, strict=True):
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(one[0]["layers.0.weight"], one[1]["layers.0.weight"])
    if device.type in ("cpu", "cuda"):
        save_draws(drawn, tmp_path / "draws")
        again = load_draws(tmp_path / "draws")
        assert isinstance(again, FullDraws)
        members = list(MergedEnsemble(vectors, poe, again).members())
        assert torch.equal(members[1]["layers.0.weight"], one[1]["layers.0.weight"])
    noise = noise_control(drawn, vectors, poe, generator=on(device, 4))
    assert len(list(MergedEnsemble(vectors, poe, noise).members())) == len(drawn)
    assert bool((noise.weights > 0).all())
    assert distance_from_merge(drawn, vectors, poe).modules == drawn.modules


@pytest.mark.parametrize("cut", [None, "layers.1"])
def test_ensembles_predict_alike(cut: str | None, nets: dict[str, Net], opened: Open, device: torch.device) -> None:
    poe = product(temperature=0.1)
    posterior = poe.bind(collect_statistics(opened("cpu"), poe))
    draws = SpanDraws.of(gibbs(posterior, 10, generator=seeded(0), warmup=10), posterior).thinned(4)
    found, keys = [], []
    for place in (torch.device("cpu"), device):
        ensemble = MergedEnsemble(opened(place), poe, draws.restrict(r"layers\.1|head"))
        model = copy.deepcopy(nets["base"]).to(place)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        prediction = ensemble.predict(model, batches(), cut=cut)  # of the CPU: batches go to the model's device
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        found.append(prediction)
        keys.append(prediction.reused)
    assert keys[0] == keys[1] == "layers.1"
    assert_close(found[1].probabilities, found[0].probabilities, 1e-3)
    assert_close(found[1].entropy, found[0].entropy, 1e-3)
    assert float((found[1].mutual_information - found[0].mutual_information).abs().max()) < 1e-4


def test_seeds_of_a_random_method_are_the_same_models(opened: Open, device: torch.device) -> None:
    method, states = Dare(drop=0.5), []
    for place in ("cpu", device):
        vectors = opened(place)
        states.append(list(MergedEnsemble(vectors, method, MethodDraws.of(vectors, method, [3, 8])).members()))
    for one, other in zip(*states, strict=True):
        for name, value in one.items():
            assert_close(other[name], value, 1e-6)


def test_the_temperature_is_chosen_alike(nets: dict[str, Net], opened: Open, device: torch.device) -> None:
    poe, labels = product(), torch.arange(24) % CLASSES
    statistics = collect_statistics(opened("cpu"), poe)

    def sample(temperature: float) -> SpanDraws:
        posterior = replace(poe, temperature=temperature).bind(statistics)
        return SpanDraws.of(gibbs(posterior, 5, generator=seeded(0), chains=1, warmup=5), posterior)

    paths = []
    for place in (torch.device("cpu"), device):
        predictor = MergedEnsemble(opened(place), poe, sample(0.01)).predictor(
            copy.deepcopy(nets["base"]).to(place), batches()
        )
        chosen = temper(sample, predictor, labels.to(place), (0.001, 0.1), num_temperatures=3, refinements=0)
        paths.append([point.nll for point in chosen.path])
    assert paths[1] == pytest.approx(paths[0], rel=1e-3)


def test_residuals_and_those_of_surrogates_agree(opened: Open, device: torch.device, tmp_path: Path) -> None:
    poe = product(residual_map=InputGram(), energy=Cauchy())
    merge_checkpoint(opened("cpu"), poe, tmp_path / "merged")
    found = []
    for place in ("cpu", device):
        vectors = opened(place)
        measured = residuals(tmp_path / "merged", vectors, poe)
        surrogates = surrogate_residuals(vectors, poe, num_surrogates=2, seed=1)
        found.append((measured, surrogates, pooled_tails(measured, seed=0)))
    for one, other in zip(found[0][0].entries, found[1][0].entries, strict=True):
        np.testing.assert_allclose(other.signed, one.signed, rtol=1e-3, atol=1e-3 * np.abs(one.signed).max())
        assert other.scale == pytest.approx(one.scale, rel=1e-4)
    for one, other in zip(found[0][1].residuals[0].entries, found[1][1].residuals[0].entries, strict=True):
        np.testing.assert_allclose(other.lengths, one.lengths, rtol=1e-2, atol=1e-2 * one.lengths.max())
    assert str(found[1][2]).split()[:3] == str(found[0][2]).split()[:3]


@pytest.fixture
def configured(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = {
        "base_model": str(folders / "base"),
        "models": [{"model": str(folders / name)} for name in NAMES],
        "parameters": {"energy": "StudentT(4.0)", "eta": 0.2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def call(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def test_the_command_line_runs_on_the_device(
    configured: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ("--device", str(device))
    call("plan", "config.yaml", *there)
    call("merge", "config.yaml", *there, "--out", "merged")
    call("merge", "config.yaml", "--device", "cpu", "--out", "reference")
    for name, value in weights(configured / "reference").items():
        assert_close(weights(configured / "merged")[name], value, 1e-3)
    assert json.loads((configured / "merged" / "poe_merge.json").read_text())["device"] == str(device)
    call("stats", "config.yaml", *there, "--out", "stats")
    quick = ("--draws", "8", "--warmup", "5")
    call("sample", "config.yaml", *there, *quick, "--out", "sampled")
    call("sample", "config.yaml", *there, *quick, "--out", "again")
    for file in ("draws.safetensors", "draws.json"):
        assert (configured / "sampled" / "draws" / file).read_bytes() == (
            configured / "again" / "draws" / file
        ).read_bytes()
    full = ("--sampler", "laplace", "--coordinates", "full", "--members", "2")
    call("sample", "config.yaml", *there, *full, "--out", "full")
    call("sample", "--merge", "merged", *quick, "--out", "around")
    call("diagnose", "merged", "--draws", "around/draws", "--surrogates", "2", "--out", "report.html")
    assert "Residuals and their tails" in (configured / "report.html").read_text(encoding="utf-8")
    assert "Traceback" not in capsys.readouterr().err


_TOO_LARGE = """
import sys, torch
from inference.models.memory import OutOfMemory
from inference import merge_checkpoint
from poe_models import ProductOfExperts, TaskVectors
torch.cuda.set_per_process_memory_fraction(64 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
size = 2048
base = {"fc.weight": torch.zeros(size, size)}
experts = {n: {"fc.weight": torch.randn(size, size)} for n in "ab"}
vectors = TaskVectors(base, experts, device="cuda")
try:
    merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), sys.argv[1])
except OutOfMemory as error:
    print(error)
"""


def test_a_module_that_is_too_large_for_the_card_is_one_message(device: torch.device, tmp_path: Path) -> None:
    if device.type != "cuda":
        pytest.skip("only a card has a limit of its own")
    command = [sys.executable, "-c", _TOO_LARGE, str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=root)
    assert "out of memory on cuda at 'fc.weight', which take" in done.stdout
    assert "or --device cpu; what is finished is kept" in done.stdout


def test_slice_draws_through_the_merge_on_the_device(opened: Open, device: torch.device) -> None:
    (module,) = opened(device, torch.float64).modules("head.weight")
    posterior = product().bind(module, coordinates="span")
    draws = slice_sample(posterior, 20, generator=on(device, 0), warmup=10, chains=2)
    assert draws.values.device.type == device.type
    assert posterior.update(draws.latents(0, 3)).shape == (1, 4, 12)
