"""Whole models on a GPU against the CPU: methods, statistics, checkpoints, draws, ensembles, tails, the command line.

The mathematics is in `test_gpu.py`, and what `POE_TEST_DEVICE` does in conftest.py.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from diagnostics import pooled_tails, residuals, surrogate_residuals
from inference import (
    Design,
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
from poe_models import (
    METHODS,
    TSVM,
    Activation,
    Anchor,
    Cauchy,
    Dare,
    Fisher,
    InputGram,
    IsoC,
    MergingMethod,
    Mixed,
    ModuleStatistics,
    OutputGram,
    ProductOfExperts,
    ResidualMap,
    StatisticsFolder,
    StudentT,
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
from tests.devices import on
from tests.helpers import assert_close, merged, random_updates
from tests.seeds import seeded

pytestmark = pytest.mark.gpu
NAMES = ("x", "y", "z")
WIDTH, CLASSES = 12, 4


class Net(nn.Module):
    """Layers in a ModuleList, so that features before the last can be computed once, with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * CLASSES)
        self.norm = nn.LayerNorm(3 * CLASSES)
        self.head = nn.Linear(3 * CLASSES, CLASSES)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(self.qkv(x)))


def net(seed: int, base: nn.Module | None = None) -> Net:
    """A model of random weights, or one near a base."""
    generator = seeded(seed)
    model = Net() if base is None else copy.deepcopy(base)
    assert isinstance(model, Net)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if base is None else parameter + 0.3 * noise)
    return model


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    base = net(0)
    return {"base": base} | {name: net(i, base) for i, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="module")
def folders(nets: dict[str, Net], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for name, model in nets.items():
        (home / name).mkdir()
        save_file(model.state_dict(), home / name / "model.safetensors", metadata={"format": "pt"})
        (home / name / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return home


Open = Callable[..., TaskVectors]


@pytest.fixture
def opened(folders: Path) -> Open:
    def make(device: torch.device | str, dtype: torch.dtype = torch.float32) -> TaskVectors:
        return TaskVectors(folders / "base", {n: folders / n for n in NAMES}, dtype=dtype, device=device)

    return make


def product(**given: Any) -> ProductOfExperts:
    return ProductOfExperts.of(NAMES, **{"energy": StudentT(4.0), "anchor": Anchor(average), **given})


def batches(count: int = 24) -> list[Tensor]:
    return list(torch.randn(count, 5, generator=seeded(9)).split(8))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- methods ---


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
        return made(statistics=ModuleStatistics(kind, given)).prepare(vectors_of(base, updates, device))
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


# --- statistics ---


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
        ModuleStatistics(kind, there[kind]).save(tmp_path / kind)  # type: ignore[arg-type]
        again = StatisticsFolder(str(tmp_path / kind)).opened(kind)  # type: ignore[arg-type]
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
        made = ModuleStatistics("fisher" if kind is Fisher else "activations", given)
        result: ResidualMap = kind(made, 0.5)
        return result

    here = product(residual_map=of(statistics), anchor=Anchor(average))
    there = product(residual_map=of(on_device if where == "device" else statistics), anchor=Anchor(average))
    for how in ({}, {"coordinates": "span"}):
        one = merged(here.for_modules(modules).bind(updates, **how))  # type: ignore[arg-type]
        other = merged(there.for_modules(modules).bind(updates.to(device), **how))  # type: ignore[arg-type]
        assert_close(other.cpu(), one, 1e-6)


# --- checkpoints ---


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


# --- draws and ensembles ---


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


# --- diagnostics ---


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


# --- the command line ---


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


# --- memory ---

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
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=root)
    assert "out of memory on cuda at 'fc.weight', which take" in done.stdout
    assert "or --device cpu; what is finished is kept" in done.stdout


def test_slice_draws_through_the_merge_on_the_device(opened: Open, device: torch.device) -> None:
    (module,) = opened(device, torch.float64).modules("head.weight")
    posterior = product().bind(module, coordinates="span")
    draws = slice_sample(posterior, 20, generator=on(device, 0), warmup=10, chains=2)
    assert draws.values.device.type == device.type
    assert posterior.update(draws.latents(0, 3)).shape == (1, 4, 12)
