from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.draws import Draws
from inference.evidence.estimate import log_evidence
from inference.gibbs import gibbs
from inference.laplace import Laplace
from inference.map import fixed_point
from inference.models.draw_files import load_draws
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.statistics_files import load_statistics, statistics_digest
from inference.samplers import SAMPLERS, Sampler
from inference.slice import slice_sample
from poe_merge import sample as _sample
from poe_merge import sampling as _sampling
from poe_merge import stats as _stats
from poe_merge.cli import run
from poe_models import Anchor, ProductOfExperts, RelativePrecision, StudentT
from poe_models.posterior import Posterior
from tests.helpers import assert_close
from tests.seeds import seeded

State = dict[str, Tensor]
Cli = Callable[..., tuple[int, str, str]]
SHAPES = {"0.mlp.weight": (8, 4), "1.mlp.weight": (8, 4), "1.attn.weight": (4, 4), "1.bias": (4,)}
MERGED = ("0.mlp.weight", "1.attn.weight", "1.mlp.weight")
CONFIG = {
    "base_model": "base",
    "models": [{"model": "mnist"}, {"model": "emoji"}],
    "parameters": {"energy": "StudentT(4.0)", "eta": 0.2, "scaling": 0.7},
}
QUICK = ("--draws", "20", "--warmup", "5")


@pytest.fixture
def state(generator: torch.Generator) -> Callable[[], State]:
    return lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base, two experts, another checkpoint and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji", "other"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def done(cli: Cli) -> Cli:
    """A call that succeeds."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status, out, err = cli(*arguments)
        assert status == 0, err
        return status, out, err

    return call


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def fails(cli: Cli, here: Path) -> Callable[..., str]:
    """One line on stderr, status 2, nothing printed, nothing written."""

    def call(*arguments: object) -> str:
        before = listing(here)
        status, out, err = cli(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert listing(here) == before
        return err.removeprefix("error: ").strip()

    return call


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def updates(here: Path, tensor: str) -> Tensor:
    """The experts' updates, (N, d_out, d_in) float64."""
    base = weights(here / "base")[tensor].double()
    return torch.stack([weights(here / name)[tensor].double() - base for name in ("mnist", "emoji")])


# --- stats ---


def test_stats_saves_everything_and_says_what(done: Cli, here: Path) -> None:
    _, out, err = done("stats", "config.yaml", "--out", "stats")
    assert err == ""
    record = json.loads((here / "stats" / "statistics.json").read_text())
    assert {path.name for path in (here / "stats").iterdir()} == {"statistics.json", "statistics.safetensors"}
    assert re.search(r"stats: 3 modules, 2 experts \(mnist, emoji\), InputGram\(\) around the centre zero; \d", out)
    assert f"digest {record['digest'][:12]}." in out
    statistics = load_statistics(here / "stats")
    assert statistics.modules == MERGED
    for index, tensor in enumerate(MERGED):
        flat = updates(here, tensor).flatten(1)
        assert_close(statistics.gram[index, :2, :2], flat @ flat.mT, 1e-5)
    assert set(record["inputs"]) == {"base", "expert mnist", "expert emoji"}
    assert record["settings"]["config"]["parameters"]["eta"] == "RelativePrecision(eta=0.2)"


def test_every_span_method_runs_from_the_file_alone(done: Cli, here: Path) -> None:
    done("stats", "config.yaml", "--coordinates", "span", "--out", "stats")
    done("merge", "config.yaml", "--coordinates", "span", "--dtype", "float64", "--out", "merged")
    base, expected = weights(here / "base"), weights(here / "merged")
    basis = {tensor: updates(here, tensor) for tensor in MERGED}
    for name in ("base", "mnist", "emoji", "other"):
        shutil.rmtree(here / name)

    statistics = load_statistics(here / "stats")
    anchor = Anchor(precision=RelativePrecision(0.2))
    posterior = ProductOfExperts.of(["mnist", "emoji"], energy=StudentT(4.0), anchor=anchor).bind(statistics)
    coordinates = posterior.span
    mode = fixed_point(posterior).value
    for tensor, coefficients in zip(MERGED, coordinates.coefficients(mode), strict=True):
        merged = base[tensor].double() + 0.7 * torch.einsum("j,jab->ab", coefficients[:2], basis[tensor])
        assert_close(merged, expected[tensor].double(), 1e-5)
    generator = seeded(0)
    exact = gibbs(posterior, 1000, generator=generator).values.flatten(0, 1)
    general = slice_sample(posterior, 1000, generator=generator).values.flatten(0, 1)
    normal = Laplace(posterior, mode)
    spread = normal.standard_deviations()
    assert float((exact.mean(0) - general.mean(0)).abs().max() / exact.std(0).max()) < 0.15
    assert float((spread / exact.std(0))[..., :2, :].log().abs().max()) < 1.0
    bounded = ProductOfExperts.of(["mnist", "emoji"], energy=StudentT(4.0, "multivariate"), anchor=anchor)
    normalised = bounded.bind(statistics)
    with pytest.raises(ValueError, match="span is made of the updates"):
        log_evidence(normalised, generator=generator)


def test_stats_leaves_nothing_half_written(
    cli: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "there").mkdir()
    assert "the output folder there exists" in fails("stats", "config.yaml", "--out", "there")
    assert "contains the input" in fails("stats", "config.yaml", "--out", "mnist/..")
    assert "give the folder to make, --out DIR" in fails("stats", "config.yaml")

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = listing(here)
    for place in ("collect_statistics", "save_statistics"):
        with monkeypatch.context() as patch:
            patch.setattr(_stats, place, interrupted)
            status, _, err = cli("stats", "config.yaml", "--out", "stats")
        assert (status, err) == (130, "warning: interrupted. Nothing was written.\n")
        assert listing(here) == before
    monkeypatch.setattr("inference.models.staging.save_file", interrupted)
    assert cli("stats", "config.yaml", "--out", "stats")[0] == 130
    assert listing(here) == before


def test_bad_weights_and_designs_are_refused(fails: Callable[..., str], here: Path) -> None:
    maps = {"residual_map": [{"filter": "attn", "value": "OutputGram"}, {"value": "InputGram"}]}
    (here / "maps.yaml").write_text(yaml.safe_dump({**CONFIG, "parameters": maps}))
    assert re.search(r"'1.attn.weight' has OutputGram\(\).*make two sets", fails("stats", "maps.yaml", "--out", "s"))
    shutil.copy(here / "base" / "model.safetensors", here / "mnist" / "model.safetensors")
    assert "holds the same weights as the base" in fails("stats", "config.yaml", "--out", "s")
    broken = weights(here / "other")
    broken["0.mlp.weight"][0, 0] = torch.nan
    save_file(broken, here / "mnist" / "model.safetensors")
    assert re.search("'0.mlp.weight'.*NaN", fails("stats", "config.yaml", "--out", "s"))


# --- statistics of something else ---


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--residual-map", "OutputGram"), r'residual_maps\[0\] was "InputGram\(\)", now it is "OutputGram\(\)"'),
        (("--anchor", "average"), r'center was "zero", now it is "'),
        (("--dtype", "float64"), r'dtype was "float32", now it is "float64"'),
        (("--rule", "{match: attn, action: base}"), "tensors.1.attn.weight was .*, now it is missing"),
        (("--rule", "{match: attn, action: merge, view: {blocks: 2}}"), "tensors.1.attn.weight was .*equal row blocks"),
        (("--model", "mnist", "--model", "other"), r'updates\[1\] was "emoji", now it is "other"'),
        (("--model", "mnist", "--model", "emoji=other"), "model.safetensors of the expert emoji has the sha256"),
        (("--base-model", "other"), "model.safetensors of the base has the sha256"),
    ],
)
def test_statistics_of_something_else_name_it(
    arguments: tuple[str, ...], what: str, done: Cli, fails: Callable[..., str]
) -> None:
    done("stats", "config.yaml", "--out", "stats")
    message = fails("sample", "config.yaml", "--stats", "stats", "--out", "out", *arguments)
    assert re.search(rf"^stats: these statistics .*{what}.*Make the statistics again", message)


def test_statistics_through_a_merge_belong_to_one_energy_and_others_to_any(
    done: Cli, fails: Callable[..., str], here: Path
) -> None:
    done("stats", "config.yaml", "--out", "through")
    spans = yaml.safe_dump({**CONFIG, "parameters": {**CONFIG["parameters"], "coordinates": "span"}})  # type: ignore[dict-item]
    (here / "span.yaml").write_text(spans)
    done("stats", "span.yaml", "--out", "plain")
    (here / "mnist").rename(here / "moved")
    paths = ("--model", "mnist=moved", "--model", "emoji", "--scaling", "0.3")
    done("sample", "config.yaml", "--stats", "through", "--out", "out", "-n", "1", *QUICK, *paths)
    other = (*paths, "--energy", "Cauchy", "--eta", "2")
    message = fails("sample", "config.yaml", "--stats", "through", "--out", "o", *other)
    assert re.search(r'merge\[0\].anchor.precision was "RelativePrecision\(eta=0.2\)", now it is "Rel', message)
    done("sample", "span.yaml", "--stats", "plain", "--out", "again", "-n", "1", *QUICK, *other)
    message = fails("sample", "config.yaml", "--stats", "plain", "--out", "o", *paths)
    assert 'coordinates was "span", now it is "full"' in message


def test_files_that_are_no_statistics(done: Cli, fails: Callable[..., str], here: Path) -> None:
    assert "no statistics here" in fails("sample", "config.yaml", "--stats", "base", "--out", "out")
    done("stats", "config.yaml", "--out", "stats")
    record = here / "stats" / "statistics.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "inputs": None}))
    assert "nothing is recorded" in fails("sample", "config.yaml", "--stats", "stats", "--out", "out")


# --- sample ---


def test_members_are_the_thinned_draws(done: Cli, here: Path) -> None:
    _, out, err = done("sample", "config.yaml", "-n", "3", "--out", "out", "--seed", "3")
    assert re.search(r"out: 3 members as checkpoints, .*; 3 modules drawn by gibbs in Span coordinates at temp", out)
    shown = re.search(r"4 chains of 500 draws: largest R-hat (\d\.\d{3}), smallest effective sample size (\d+)\.", out)
    assert shown is not None
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert (draws.num_chains, draws.num_draws, draws.modules) == (4, 500, MERGED)
    some = draws.thinned(3).coefficients[0]
    done("merge", "config.yaml", "--scaling", "1", "--out", "merged")
    base, merged = weights(here / "base"), weights(here / "merged")
    for number in range(3):
        member = weights(here / "out" / f"member-{number:03d}")
        assert {name: tuple(value.shape) for name, value in member.items()} == SHAPES
        for index, tensor in enumerate(MERGED):
            basis = torch.stack([*updates(here, tensor), (merged[tensor] - base[tensor]).double()])
            update = torch.einsum("j,jab->ab", some[number, index, [0, 1, 3]], basis)
            assert_close(member[tensor].double(), base[tensor].double() + 0.7 * update, 1e-5)
    data = az.from_netcdf(str(here / "out" / "draws.nc"))
    assert data.posterior["coefficients"].shape == (4, 500, 3, 3)
    assert np.array_equal(data.posterior["coefficients"].values, draws.coefficients[..., [0, 1, 3]].numpy())
    assert "lp" in data.sample_stats
    assert data.attrs["statistics_digest"] == draws.source
    told = {key: data.attrs[key] for key in ("coordinates_of_draws", "sampler", "temperature", "around")}
    assert told == {"coordinates_of_draws": "span", "sampler": "gibbs", "temperature": 1.0, "around": "the merge"}
    assert draws.from_merge is not None
    assert data.attrs["merge_distance"] == pytest.approx(draws.from_merge.worst)
    assert f"{draws.from_merge.worst:.2g} standard deviations of the draws from the merge in" in out
    found = float(az.rhat(data.posterior["coefficients"])["coefficients"].max())
    assert float(shown[1]) == pytest.approx(found, abs=6e-4)
    record = json.loads((here / "out" / "sample.json").read_text())
    assert record["convergence"]["r_hat"] == pytest.approx(found)
    assert ("R-hat" in err) == (found > 1.01)
    assert json.loads((here / "out" / "ensemble.json").read_text())["members"] == 3


def test_statistics_and_a_pass_over_the_weights_give_the_same_bytes(done: Cli, here: Path) -> None:
    done("stats", "config.yaml", "--out", "stats")
    arguments = ("sample", "config.yaml", "-n", "2", *QUICK)
    done(*arguments, "--out", "one", "--stats", "stats")
    done(*arguments, "--out", "two")
    done(*arguments, "--out", "three", "--seed", "1")
    one, two, three = (load_draws(here / name / "draws") for name in ("one", "two", "three"))
    assert one.source == statistics_digest(load_statistics(here / "stats"))
    assert one.digest() == two.digest() != three.digest()
    for number in range(2):
        name = f"member-{number:03d}/model.safetensors"
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()


def test_deltas_add_up_to_the_checkpoints(done: Cli, here: Path) -> None:
    arguments = ("sample", "config.yaml", "-n", "2", *QUICK, "--pattern", "mlp")
    done(*arguments, "--out", "whole")
    done(*arguments, "--out", "deltas", "--format", "deltas")
    shared = load_file(here / "deltas" / "shared" / "delta.safetensors")
    assert set(shared) == {"1.attn.weight", "1.bias"}
    for number in range(2):
        delta = load_file(here / "deltas" / f"member-{number:03d}" / "delta.safetensors")
        assert {value.dtype for value in delta.values()} == {torch.float32}
        for name, value in weights(here / "whole" / f"member-{number:03d}").items():
            assert_close(weights(here / "base")[name] + {**shared, **delta}[name], value, 1e-6)


def test_a_pattern_leaves_the_rest_at_the_map(done: Cli, here: Path) -> None:
    _, out, _ = done("sample", "config.yaml", "-n", "2", *QUICK, "--pattern", r"^1\.(mlp|bias)", "--out", "out")
    assert "1 module drawn" in out
    assert "2 more tensors at the merge" in out
    done("merge", "config.yaml", "--out", "merged")
    first, second, merged = (weights(here / n) for n in ("out/member-000", "out/member-001", "merged"))
    for name in SHAPES:
        assert torch.equal(first[name], second[name]) == (name != "1.mlp.weight")
        if name != "1.mlp.weight":
            assert_close(first[name], merged[name], 1e-6)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("gibbs", ("--draws", "5", "--thin", "2", "--warmup", "20")),
        ("laplace", ()),
        ("slice", ("--draws", "5", "--thin", "2", "--warmup", "60")),
        ("nuts", ("--chains", "2", "--draws", "2", "--warmup", "20")),
        ("full-gibbs", ("--draws", "5", "--warmup", "20", "--coordinates", "full")),
        ("full-laplace", ("--coordinates", "full")),
    ],
)
def test_cold_draws_of_any_method_are_the_map(method: str, arguments: tuple[str, ...], done: Cli, here: Path) -> None:
    """Designs that differ between tensors, in an order of their own: each module must be drawn from its own."""
    energies = [{"filter": "attn", "value": "Gaussian"}, {"value": "StudentT(4.0)"}]
    config = {**CONFIG, "parameters": {"energy": energies, "eta": [{"filter": "attn", "value": 0.5}, {"value": 0.1}]}}
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    coordinates = "full" if "full" in method else "span"
    done("merge", "config.yaml", "--out", "merged")
    # Trajectories from starts at the task vectors take longer, the colder it is.
    temperature, tolerance = (1e-2, 0.5) if method == "nuts" else (1e-9, 2e-3)
    options = ("--sampler", method.removeprefix("full-"), "--temperature", str(temperature), *arguments)
    done("sample", "config.yaml", "-n", "2", "--out", "out", *options)
    merged, base = weights(here / "merged"), weights(here / "base")
    for number in range(2):
        member = weights(here / "out" / f"member-{number:03d}")
        for name in MERGED:
            assert_close(member[name] - base[name], merged[name] - base[name], tolerance)
    draws = load_draws(here / "out" / "draws")
    assert draws.modules == MERGED
    files = {path.name for path in (here / "out").glob("*.nc")}
    assert files == (set() if coordinates == "full" else {"draws-0.nc", "draws-1.nc"})
    if isinstance(draws, SpanDraws):
        for number in range(2):
            data = az.from_netcdf(str(here / "out" / f"draws-{number}.nc"))
            places = [MERGED.index(name) for name in data.posterior["module"].values]
            kept = draws.coefficients[:, :, places][..., [0, 1, 3]]
            assert np.array_equal(data.posterior["coefficients"].values, kept.numpy())
    else:
        assert isinstance(draws, FullDraws)
        assert draws.temperature.tolist() == [1e-9] * 3


def test_a_sampler_of_ones_own_is_one_entry(
    done: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def near(
        posterior: Posterior, num_samples: int, *, generator: torch.Generator, mode: Tensor, chains: int = 2
    ) -> Draws:
        noise = torch.randn((chains, num_samples, *mode.shape), generator=generator, dtype=torch.float64)
        return Draws(mode + 1e-3 * noise, sampler="near", temperature=posterior.fixed_temperature)

    monkeypatch.setitem(SAMPLERS, "near", Sampler(near, "stays near the merge"))
    assert "near: stays near the merge" in " ".join(done("sample", "--help")[1].split())
    assert "--warmup 3: near has no use for it" in fails(
        "sample", "config.yaml", "--out", "o", "--sampler", "near", "--warmup", 3
    )
    assert "draws in Span coordinates only" in fails(
        "sample", "config.yaml", "--out", "o", "--sampler", "near", "--coordinates", "full"
    )
    done("merge", "config.yaml", "--out", "merged")
    _, out, err = done("sample", "--merge", "merged", "-n", 2, "--out", "out", "--sampler", "near", "--draws", 200)
    assert "3 modules drawn by near in Span coordinates" in out
    assert "2 chains of 200 draws: largest R-hat 1.0" in out
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert (draws.sampler, draws.independent, draws.num_chains) == ("near", False, 2)
    assert json.loads((here / "out" / "sample.json").read_text())["sampling"]["sampler"] == "near"
    assert az.from_netcdf(str(here / "out" / "draws.nc")).attrs["sampler"] == "near"
    done("diagnose", "merged", "--draws", "out/draws", "--no-tails", "--out", "page.html")
    assert "near draws in Span coordinates through the merge" in (here / "page.html").read_text()


def test_what_cannot_be_drawn_is_refused_before_the_weights_are_read(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sample, "collect_statistics", None)
    message = fails("sample", "config.yaml", "--out", "o", "--energy", "Welsch")
    assert message.endswith("Use --sampler slice, nuts or laplace.")
    message = fails("sample", "config.yaml", "--out", "o", "--energy", "Welsch", "--coordinates", "full")
    assert message.endswith("Use --sampler laplace; or, with --coordinates span, slice or nuts.")
    assert "fits none of" in fails("sample", "config.yaml", "--out", "o", "--pattern", "nothing")


def test_maps_that_differ_between_tensors_need_no_file(done: Cli, fails: Callable[..., str], here: Path) -> None:
    maps = [{"filter": "attn", "value": ["OutputGram", "InputGram"]}, {"value": "InputGram"}]
    config = {**CONFIG, "parameters": {"residual_map": maps, "eta": 0.1}}
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    assert "`poe-merge sample` without --stats makes them on the way" in fails("stats", "config.yaml", "--out", "s")
    done("merge", "config.yaml", "--out", "merged")
    done("sample", "config.yaml", "-n", "1", "--out", "out", "--temperature", "1e-9", *QUICK)
    merged, member, base = (weights(here / name) for name in ("merged", "out/member-000", "base"))
    for name in MERGED:
        assert_close(member[name] - base[name], merged[name] - base[name], 2e-3)
    draws = load_draws(here / "out" / "draws")
    assert draws.modules == ("0.mlp.weight", "1.mlp.weight", "1.attn.weight")
    assert re.fullmatch("[0-9a-f]{64}", draws.source)
    own = {"weight": [{"filter": "attn", "value": 0}, {"value": 1}]}
    models = [{"model": "mnist", "parameters": own}, {"model": "emoji"}]
    (here / "config.yaml").write_text(yaml.safe_dump({**config, "models": models}))
    assert "one set of coefficients" in fails("sample", "config.yaml", "--out", "o")


@pytest.mark.parametrize("stats", [True, False])
def test_a_checkpoint_as_the_anchor(stats: bool, done: Cli, fails: Callable[..., str], here: Path) -> None:
    anchor = ("--anchor", "other", "--eta", "1.0")
    done("merge", "config.yaml", "--out", "merged", *anchor)
    given: tuple[str, ...] = ()
    if stats:
        _, out, _ = done("stats", "config.yaml", "--out", "stats", *anchor)
        assert "around the centre tensor" in out
        given = ("--stats", "stats")
    done("sample", "config.yaml", "-n", "1", "--out", "out", "--temperature", "1e-9", *QUICK, *anchor, *given)
    merged, member, base = (weights(here / name) for name in ("merged", "out/member-000", "base"))
    for name in MERGED:
        assert_close(member[name] - base[name], merged[name] - base[name], 2e-3)
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert bool((draws.squared_norms[:, 2] > 0).all())  # the centre is in the basis
    if stats:
        shutil.copy(here / "mnist" / "model.safetensors", here / "other" / "model.safetensors")
        message = fails("sample", "config.yaml", "--stats", "stats", "--out", "again", *anchor)
        assert "model.safetensors of the anchor 1 has the sha256" in message


def test_fewer_members_than_chains_and_more_than_the_default(
    done: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("sample", "config.yaml", "-n", "1", "--out", "one", "--chains", "3", *QUICK)
    assert listing(here / "one") >= {"member-000"}
    assert "member-001" not in listing(here / "one")
    _, _, err = done("sample", "config.yaml", "-n", "3", "--out", "few", "--chains", "1", "--draws", "3")
    assert "1 chains of 3 draws are too few to trust R-hat" in err
    assert "there is one chain" in err
    monkeypatch.setattr(_sampling, "DRAWS", 2)
    done("sample", "config.yaml", "-n", "5", "--out", "many", "--chains", "2", "--warmup", "5")
    assert load_draws(here / "many" / "draws").num_draws == 3


def test_chains_that_disagree_are_warned_about(done: Cli) -> None:
    _, out, err = done(
        "sample", "config.yaml", "-n", "1", "--out", "out", "--draws", "6", "--warmup", "0", "--eta", "1e-6"
    )
    shown = re.search(r"largest R-hat (\d\.\d+)", out)
    assert shown is not None
    assert float(shown[1]) > 1.01
    assert f"warning: R-hat: largest R-hat {shown[1]}" in err


def test_laplace_has_no_chains_and_uses_the_solvers_settings(done: Cli) -> None:
    _, out, err = done("sample", "config.yaml", "-n", "2", "--out", "out", "--sampler", "laplace")
    assert "Independent draws: there are no chains to judge" in out
    assert "R-hat" not in err
    short = ("--max-steps", "1", "--starts", "experts", "--tolerance", "1e-12", "--energy", "Cauchy(exponent=9)")
    _, _, err = done("sample", "config.yaml", "-n", "2", "--out", "short", "--sampler", "laplace", *short)
    assert "the MAP of '0.mlp.weight': not converged: raise max_steps" in err


def test_a_copy_of_the_base_says_nothing(done: Cli, here: Path) -> None:
    shutil.copy(here / "base" / "model.safetensors", here / "mnist" / "model.safetensors")
    _, _, err = done("sample", "config.yaml", "-n", "1", "--out", "out", *QUICK)
    assert "warning: 'mnist' has no update in any merged tensor" in err
    _, _, err = done("sample", "config.yaml", "-n", "1", "--out", "alone", *QUICK, "--model", "emoji")
    assert "has no update" not in err


def test_hot_draws_are_warned_about(done: Cli) -> None:
    def done_at(temperature: str, *more: str) -> str:
        out = f"out-{temperature}-{len(more)}"
        return done("sample", "config.yaml", "-n", "1", "--out", out, *QUICK, "--temperature", temperature, *more)[2]

    assert "draws are the anchor's rather than the experts'" in done_at("30")
    assert "anchor's" not in done_at("0.5")
    assert "anchor's" in done_at("1.0", "--coordinates", "full")  # 2 sum kappa / D = 10 / 16 at most


# --- interrupted and resumed ---


def test_resume_goes_on_with_the_draws_there_are(
    cli: Cli, done: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("sample", "config.yaml", "-n", "3", *QUICK)
    done(*arguments, "--out", "whole")
    real = _sample.MergedEnsemble.save

    def stopped(self: Any, out: Path, **options: Any) -> Path:
        class Stop:
            def begin(self, stage: str, modules: int, nbytes: int) -> None:
                self.stage = stage

            def advance(self, modules: int, nbytes: int) -> None:
                if self.stage == "members":
                    raise KeyboardInterrupt

        return real(self, out, **{**options, "progress": Stop()})

    with monkeypatch.context() as patch:
        patch.setattr(_sample.MergedEnsemble, "save", stopped)
        status, _, err = cli(*arguments, "--out", "out")
    assert status == 130
    assert "Go on with the same command and --resume" in err
    assert not (here / "out").exists()
    assert listing(here / "out.partial" / "output") >= {"member-000", "draws", "draws.nc", "sample.json"}
    assert "left from an interrupted save" in fails(*arguments, "--out", "out")
    message = fails(*arguments, "--out", "out", "--resume", "--temperature", "0.5")
    assert "was begun with sampling.temperature = 1.0, now it is 0.5" in message
    message = fails(*arguments, "--out", "out", "--resume", "--eta", "0.3")
    assert "config.parameters.eta" in message
    monkeypatch.setattr(_sample, "draw_span", None)  # nothing is drawn again
    _, out, _ = done(*arguments, "--out", "out", "--resume")
    assert "largest R-hat" in out
    assert listing(here / "out") == listing(here / "whole")
    for number in range(3):
        name = f"member-{number:03d}/model.safetensors"
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_interrupted_draws_leave_nothing(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = listing(here)
    monkeypatch.setitem(SAMPLERS, "gibbs", replace(SAMPLERS["gibbs"], draw=interrupted))
    status, _, err = cli("sample", "config.yaml", "--out", "out")
    assert (status, err) == (130, "warning: interrupted. Nothing was written.\n")
    assert listing(here) == before


# --- seeds of a merging method ---


@pytest.fixture
def by_method(here: Path) -> Callable[..., Path]:
    """Write the configuration of a merging method."""

    def write(method: str, **parameters: float) -> Path:
        config = {**CONFIG, "merge_method": method, "parameters": parameters}
        (here / "method.yaml").write_text(yaml.safe_dump(config))
        return here / "method.yaml"

    return write


def test_members_are_merges_at_the_methods_seed_and_those_after_it(
    done: Cli, by_method: Callable[..., Path], here: Path
) -> None:
    config = by_method("dare-ties(density=0.6, seed=5)", **{"scaling": 0.7})
    _, out, _ = done("sample", config, "-n", "3", "--out", "out")
    assert "3 modules drawn by DareTies(" in out
    assert "at the seeds 5, 6, 7.\nIndependent draws: there are no chains to judge." in out
    for index, seed in enumerate((5, 6, 7)):
        done("merge", by_method(f"dare-ties(density=0.6, seed={seed})", **{"scaling": 0.7}), "--out", f"at{seed}")
        expected, member = weights(here / f"at{seed}"), weights(here / "out" / f"member-{index:03d}")
        assert set(member) == set(expected)
        assert all(torch.equal(member[name], expected[name]) for name in expected)
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, MethodDraws)
    assert draws.seeds.tolist() == [[5, 6, 7]]
    record = json.loads((here / "out" / "sample.json").read_text())
    assert (record["convergence"], record["sampling"]["first"]) == (None, 5)
    flags = (
        "--method",
        "dare-ties(density=0.6, seed=5)",
        "--base-model",
        "base",
        "--model",
        "mnist",
        "--model",
        "emoji",
    )
    done("sample", *flags, "--scaling", "0.7", "-n", "1", "--out", "flags")
    member = weights(here / "flags" / "member-000")
    assert all(torch.equal(member[name], value) for name, value in weights(here / "at5").items())


def test_some_modules_at_seeds(done: Cli, by_method: Callable[..., Path], here: Path) -> None:
    config = by_method("dare")
    _, out, _ = done("sample", config, "-n", "2", "--pattern", "attn", "--format", "deltas", "--out", "out")
    assert "1 module drawn by Dare(" in out
    assert "2 more tensors at seed 0" in out
    one, two = (load_file(here / "out" / f"member-00{i}" / "delta.safetensors") for i in range(2))
    assert set(one) == {"1.attn.weight"}
    assert not torch.equal(one["1.attn.weight"], two["1.attn.weight"])


def test_seeds_go_on_after_an_interruption(
    done: Cli, cli: Cli, by_method: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = by_method("knots-dare-ties")
    done("sample", config, "-n", "2", "--out", "whole")
    with monkeypatch.context() as patched:

        def stop(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("inference.models.ensemble_files.write_companions", stop)
        assert cli("sample", config, "-n", "2", "--out", "out")[0] == 130
    assert (here / "out.partial" / "output" / "draws" / "draws.json").is_file()
    assert (
        "was begun with sampling.members = 2, now it is 3"
        in cli("sample", config, "-n", "3", "--out", "out", "--resume")[2]
    )
    done("sample", config, "-n", "2", "--out", "out", "--resume")
    for name in ("member-000", "member-001"):
        one, two = weights(here / "whole" / name), weights(here / "out" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("ties", (), "gives the same merge at every seed. Use `poe-merge merge`; methods that draw are Dare, DareTies"),
        ("dare", ("--sampler", "gibbs"), "--sampler gibbs: is about a posterior, and merge_method is Dare("),
        ("dare", ("--temperature", "0.5"), "--temperature 0.5: is about a posterior"),
        ("dare", ("--stats", "stats"), "--stats stats: is about a posterior"),
        ("dare", ("--chains", "2"), "--chains 2: is about a posterior"),
        ("dare", ("--format", "delta"), "did you mean `deltas`?"),
        ("dare", ("--pattern", "("), "not a regular expression"),
        ("dare", ("--pattern", "lm_head"), "fits none of the modules that are merged at random"),
        ("concrete-task-arithmetic", (), "it needs data (inputs)"),
        (
            "poe",
            ("--sampler", "dare"),
            "--sampler dare: is a merging method. To draw it at several seeds, give --met",
        ),
    ],
)
def test_seeds_that_cannot_be_drawn(
    method: str, arguments: tuple[str, ...], message: str, by_method: Callable[..., Path], fails: Callable[..., str]
) -> None:
    assert message in fails("sample", by_method(method), "--out", "o", *arguments)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the folder to make, --out DIR"),
        (("--out", "mnist"), "contains the input"),
        (("--out", "o", "--sampler", "gibs"), "--sampler gibs: did you mean `gibbs`?"),
        (("--out", "o", "--format", "delta"), "--format delta: did you mean `deltas`?"),
        (("--out", "o", "--tempreature", "1"), "no option `--tempreature`; did you mean `--temperature`?"),
        (("--out", "o", "--temperature", "0"), "--temperature 0: must be positive and finite"),
        (("--out", "o", "--temperature", "nan"), "--temperature nan: must be positive and finite"),
        (("--out", "o", "--pattern", "("), r"--pattern '(': not a regular expression"),
        (
            ("--out", "o", "--pattern", "lm_head"),
            "--pattern 'lm_head': fits none of the 3 merged modules (0.mlp.weight",
        ),
        (("--out", "o", "--pattern", "bias", "--coordinates", "full"), "fits none of the 3 merged modules"),
        (("--out", "o", "-n", "0"), "Invalid value for '-n'"),
        (("--out", "o", "-n", "9", "--chains", "2", "--draws", "4"), "2 chains of 4 draws are only 8"),
        (
            ("--out", "o", "--energy", "Welsch"),
            "Welsch() of 'mnist' has no known Gaussian scale mixture. Use --sampler slice",
        ),
        (("--out", "o", "--energy", "Huber(1.0)", "--coordinates", "full"), "with --coordinates span"),
        (
            ("--out", "o", "--coordinates", "full", "--sampler", "nuts"),
            "--sampler nuts: draws in Span coordinates",
        ),
        (("--out", "o", "--coordinates", "full", "--stats", "s"), "--stats: Full draws are made from the weights"),
        (("--out", "o", "--sampler", "laplace", "--warmup", "3"), "--warmup 3: laplace has no use for it"),
        (("--out", "o", "--sampler", "nuts", "--thin", "3"), "--thin 3: nuts has no use for it"),
        (("--out", "o", "--sampler", "hmc"), "--sampler hmc: Choose from gibbs, slice, nuts, laplace"),
        (("--out", "o", "--eta", "0"), "the anchor's precision is zero"),
        (("--out", "o", "--eta", "0", "--coordinates", "full"), "the posterior of '0.mlp.weight' has no anchor"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, fails: Callable[..., str]) -> None:
    assert message in fails("sample", "config.yaml", *arguments)


def test_coordinates_of_one_kind(fails: Callable[..., str], here: Path) -> None:
    mixed = [{"filter": "attn", "value": "full"}, {"value": "span"}]
    (here / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "parameters": {"coordinates": mixed}}))
    assert "`coordinates` differ between tensors" in fails("sample", "config.yaml", "--out", "o")


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_a_module_that_no_expert_changes_is_left_where_it_is(
    coordinates: str, done: Cli, fails: Any, here: Path
) -> None:
    base = load_file(here / "base/model.safetensors")
    for name in ("mnist", "emoji"):
        state = load_file(here / name / "model.safetensors")
        save_file(state | {"1.attn.weight": base["1.attn.weight"]}, here / name / "model.safetensors")
    settings = ("config.yaml", "--coordinates", coordinates, "-n", 2, *QUICK)
    _, _, err = done("sample", *settings, "--out", "members")
    assert "nothing changes 1.attn.weight: not drawn but left at the MAP, the anchor's centre" in err
    assert "nothing changes" in " ".join(json.loads((here / "members/sample.json").read_text())["warnings"])
    assert load_draws(here / "members/draws").modules == ("0.mlp.weight", "1.mlp.weight")
    member = load_file(here / "members/member-001/model.safetensors")
    assert_close(member["1.attn.weight"], base["1.attn.weight"], 1e-6)
    assert float((member["0.mlp.weight"] - base["0.mlp.weight"]).abs().max()) > 1e-3
    message = fails("sample", *settings, "--pattern", "attn", "--out", "nothing")
    assert re.search("change.* any of th", message)


def test_only_the_directions_that_experts_see_count_for_a_temperature(done: Cli) -> None:
    def said(temperature: float) -> bool:
        _, _, err = done(
            "sample", "config.yaml", "--coordinates", "full", "--residual-map", "Directional", "--temperature",
            temperature, "-n", 2, *QUICK, "--out", f"at{temperature}",
        )  # fmt: skip
        return "draws are the anchor's" in err

    # Two experts with k = 5/2 and one direction each: 2 * 2 * 2.5 / 2.
    assert [said(temperature) for temperature in (4.9, 5.1)] == [False, True]


def test_a_fused_tensor_is_several_modules_and_one_tensor(done: Cli, here: Path, generator: torch.Generator) -> None:
    for name in ("base", "mnist", "emoji"):
        fused = {"attn.in_proj_weight": torch.randn(12, 4, generator=generator)}
        save_file({**load_file(here / name / "model.safetensors"), **fused}, here / name / "model.safetensors")
    _, out, _ = done("sample", "config.yaml", "-n", "1", "--out", "all", *QUICK)
    assert "6 modules drawn" in out
    assert "more tensors" not in out
    _, out, _ = done("sample", "config.yaml", "-n", "1", "--out", "some", "--pattern", r"in_proj_weight\[1\]", *QUICK)
    assert "1 module drawn" in out
    assert "3 more tensors at the merge" in out


# --- around a merge ---


def test_draws_around_a_folder_have_its_settings_and_its_tensors(
    done: Cli, fails: Callable[..., str], here: Path
) -> None:
    done("merge", "config.yaml", "--out", "merged")
    settings = ("-n", 2, *QUICK, "--temperature", "0.01", "--pattern", "mlp")
    _, out, _ = done("sample", "--merge", "merged", *settings, "--out", "around")
    _, same, _ = done("sample", "config.yaml", *settings, "--out", "solved")
    assert re.search("gibbs draws in Span coordinates through the merge at temperature 0.01: their mean is", out)
    assert re.search(
        r"The merge kept of the experts' updates: mnist \d+% \(\d+% of its squared residual left\), em", same
    )
    one, other = (load_draws(here / name / "draws") for name in ("around", "solved"))
    assert one.digest() == other.digest()
    assert isinstance(one, SpanDraws)
    assert isinstance(other, SpanDraws)
    assert one.from_merge is not None
    assert other.from_merge is not None
    assert abs(one.from_merge.worst - other.from_merge.worst) < 0.05  # measured on the weights, and by the statistics
    merged = weights(here / "merged")
    for name in ("around/member-000", "around/member-001", "solved/member-000"):
        member = weights(here / name)
        for tensor in ("1.attn.weight", "1.bias"):
            assert torch.equal(member[tensor], merged[tensor]) or name.startswith("solved")
            assert_close(member[tensor], merged[tensor], 1e-6)
    record = json.loads((here / "around" / "sample.json").read_text())
    told = record["around"]
    assert (told["coordinates"], told["surrounds"], told["sampler"]) == ("span", "full", "gibbs")
    assert told["merge_distance"] == pytest.approx(one.from_merge.worst)
    assert [each["name"] for each in record["experts"]] == ["mnist", "emoji"]
    data = az.from_netcdf(str(here / "around" / "draws.nc"))
    assert data.attrs["merge_distance"] == pytest.approx(one.from_merge.worst)
    assert data.attrs["merge_distance_module"] == one.from_merge.where
    message = fails("sample", "config.yaml", "--merge", "merged", "--out", "o")
    assert "config.yaml: --merge merged has its own configuration" in message
    assert "--eta: the merge in merged was made with settings of its own" in fails(
        "sample", "--merge", "merged", "--eta", "3", "--out", "o"
    )
    assert "base: no merge, poe_merge.json is missing" in fails("sample", "--merge", "base", "--out", "o")
    shutil.copy(here / "other" / "model.safetensors", here / "mnist" / "model.safetensors")
    message = fails("sample", "--merge", "merged", *settings, "--out", "o")
    assert "merged: it was merged from other checkpoints: model.safetensors of the expert mnist has the" in message


def test_a_merge_in_span_coordinates_has_draws_of_its_own(done: Cli, fails: Callable[..., str], here: Path) -> None:
    done("merge", "config.yaml", "--coordinates", "span", "--out", "merged")
    _, out, _ = done("sample", "--merge", "merged", "-n", 1, "--draws", 100, "--temperature", "0.01", "--out", "around")
    assert "gibbs draws in Span coordinates around the MAP of the span at temperature 0.01: their mean is" in out
    draws = load_draws(here / "around" / "draws")
    assert isinstance(draws, SpanDraws)
    assert not draws.through_merge
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 1.0
    message = fails("sample", "--merge", "merged", "--coordinates", "full", "--out", "o")
    assert "--coordinates full: the configuration's merge is the MAP in Span coordinates" in message
    done("merge", "config.yaml", "--out", "full")  # draws of one merge beside another
    _, _, err = done("diagnose", "full", "--draws", "around/draws", "--no-tails", "--out", "page.html")
    assert "mean of the draws: the merge was solved in Full coordinates, and these draws are around another" in err
    assert re.search(r"their mean is [\d.]+ standard deviations of the draws from the merge in", err)


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_a_report_says_where_draws_are(coordinates: str, done: Cli, here: Path) -> None:
    done("merge", "config.yaml", "--out", "merged")
    more = ("--coordinates", coordinates, "--temperature", "0.01", *QUICK)
    done("sample", "--merge", "merged", "-n", 1, "--out", "around", *more)
    done("diagnose", "merged", "--draws", "around/draws", "--no-tails", "--out", "page.html")
    page = (here / "page.html").read_text()
    assert re.search(f"gibbs draws in {coordinates.capitalize()} coordinates.* at temperature 0.01: their mean", page)
    assert "What the merge kept of each expert" in page
    done("sample", "config.yaml", "--eta", "3", "-n", 1, "--out", "elsewhere", *more)
    _, _, err = done("diagnose", "merged", "--draws", "elsewhere/draws", "--no-tails", "--out", "page.html")
    assert "under other experts, scales or anchor than this merge was made with" in err


def test_an_expert_that_is_passed_by_is_a_warning(done: Cli, here: Path, generator: torch.Generator) -> None:
    base = weights(here / "base")
    for name, length in (("mnist", 1e-3), ("emoji", 1.0)):
        state = {k: v + length * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        save_file(state, here / name / "model.safetensors")
    shared = ("--scale", "Relative(1.0)", "--energy", "Gaussian")
    done("merge", "config.yaml", "--out", "merged", *shared)
    _, _, err = done("sample", "--merge", "merged", "-n", 1, "--out", "around", *QUICK)
    assert "warning: expert 'emoji': " in err or "warning: the merge is little more than the base" in err
    _, _, same = done("sample", "config.yaml", "-n", 1, "--out", "solved", *QUICK, *shared)
    assert [line for line in err.splitlines() if "of its" in line or "little more" in line] == [
        line for line in same.splitlines() if "of its" in line or "little more" in line
    ]
    _, _, err = done("diagnose", "merged", "--no-tails", "--out", "page.html")
    assert "experts: " in err
